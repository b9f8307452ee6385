"""`bcq` (LUT-GEMM): against the authors' outputs, brute force over signs, and closed forms."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backend import recipes
from backend.formats.base import QTensor
from backend.formats.bcq import BCQ, Runs, levels_of, sorted_levels, sums_by_code
from backend.formats.int_group import IntGroup
from backend.formats.sdr import SDR
from backend.layer import quantize_layer
from backend.model.quant_linear import qtensor_from_state, qtensor_state
from backend.published import results

FOLDER = Path(__file__).parents[3] / "shared" / "vectors"
needs_vectors = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no test vectors at {FOLDER}")


@cache
def vectors() -> dict[str, Tensor]:
    with np.load(FOLDER / "bcq_a.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@cache
def configs() -> dict[str, Any]:
    if not FOLDER.is_dir():
        return {}
    found: dict[str, Any] = json.loads((FOLDER / "bcq_a.json").read_text())["configs"]
    return found


FITTED = [name for name, how in configs().items() if "mse_by_round_0_to_15" in how]
CONVERTED = [name for name in configs() if name.startswith("rtn")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(fmt: BCQ | IntGroup, w: Tensor) -> float:
    """Mean squared error, summed in fp64."""
    return float((fmt.fake(w) - w).double().square().mean())


def signs(q: QTensor, bits: int) -> Tensor:
    """[N, K, bits], True for +1."""
    return (q.codes.long()[..., None] >> torch.arange(bits)) & 1 == 1


@needs_vectors
@pytest.mark.parametrize("name", FITTED)
def test_fitting_is_the_authors(name):
    bits, group = configs()[name]["qbits"], max(configs()[name]["group_size"], 0)
    w = vectors()["in_W"]
    for rounds, mse in enumerate(configs()[name]["mse_by_round_0_to_15"]):
        fmt = BCQ(bits=bits, group=group, rounds=rounds)
        q = fmt.quantize(w)
        ours = float((q.dequantize() - w).double().square().mean())
        assert ours == pytest.approx(mse, rel=1e-5)  # the README grants 2e-3
        key = f"{name}_r{rounds}"
        if f"{key}__What" not in vectors():
            continue
        torch.testing.assert_close(q.dequantize(), vectors()[f"{key}__What"], rtol=1e-4, atol=0)
        torch.testing.assert_close(q.params["alpha"], vectors()[f"{key}__alpha"], rtol=1e-4, atol=0)
        if f"{key}__B_packbits" in vectors():
            packed = np.packbits(signs(q, bits).numpy().ravel())
            assert np.array_equal(packed, vectors()[f"{key}__B_packbits"].numpy())


@needs_vectors
def test_groups_along_the_outputs_are_the_authors():
    fmt = BCQ(bits=3, rounds=5)
    ours = fmt.quantize(vectors()["in_W"].T.contiguous())
    expected = vectors()["q3_transposed_r5__What"].T
    torch.testing.assert_close(ours.dequantize(), expected, rtol=1e-4, atol=0)


@needs_vectors
@pytest.mark.parametrize("name", CONVERTED)
def test_conversion_is_the_authors(name):
    bits, group = configs()[name]["qbits"], max(configs()[name]["group_size"], 0)
    q = IntGroup(bits=bits, group=group).quantize(vectors()["in_W"])
    converted = BCQ.from_uniform(q)
    shape = vectors()[f"{name}__codes"].shape
    assert torch.equal(converted.codes.view(shape), vectors()[f"{name}__codes"])
    alpha, offset = converted.params["alpha"], converted.params["offset"]
    torch.testing.assert_close(alpha, vectors()[f"{name}__alpha"], rtol=1e-6, atol=0)
    torch.testing.assert_close(offset[..., None], vectors()[f"{name}__offset"], rtol=0, atol=1e-6)
    expected = vectors()[f"{name}__What"]
    torch.testing.assert_close(converted.dequantize(), expected, rtol=0, atol=1e-6)


UNIFORM = [
    {},
    {"group": 16},
    {"symmetric": True},
    {"symmetric": True, "convention": "offset", "group": 32},
    {"per_tensor": True},
    {"scale_dtype": "float16"},
]


@pytest.mark.parametrize("knobs", UNIFORM, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_codes_are_signed_sums(bits, knobs):
    w = normal(6, 70)
    w[2], w[3] = 0, w[3].abs()
    q = IntGroup(bits=bits, **knobs).quantize(w)
    converted = BCQ.from_uniform(q)
    assert torch.equal(converted.codes, q.codes)
    # Products and sums in another order: a few units in the last place of the largest level.
    atol = 4e-7 * q.dequantize().abs().max().item()
    torch.testing.assert_close(converted.dequantize(), q.dequantize(), rtol=0, atol=atol)
    again = converted.format.encode(
        converted.dequantize()[:, :1], converted.format.params_of(converted.params, 0)
    )
    assert torch.equal(again, q.codes[:, :1])  # its levels are found again
    tensors, config = qtensor_state(converted)
    restored = qtensor_from_state(tensors, config, list(w.shape))
    assert torch.equal(restored.dequantize(), converted.dequantize())


def test_gptq_codes_convert_too_with_their_column_groups():
    step = {"kind": "gptq", "format": {"kind": "int", "group": 16}, "act_order": True}
    q = quantize_layer(step, normal(8, 48), inputs=normal(200, 48, seed=1)).module.qtensor
    assert q.column_group is not None
    torch.testing.assert_close(BCQ.from_uniform(q).dequantize(), q.dequantize())


def test_only_uniform_codes_convert():
    with pytest.raises(ValueError, match="not sdr codes"):
        BCQ.from_uniform(SDR().quantize(normal(2, 32)))


def test_one_sign_is_the_mean_magnitude():
    w = normal(5, 33)
    for knobs in ({"rounds": 0}, {"rounds": 1}, {"rounds": 9, "solver": "exact"}):
        fmt = BCQ(bits=1, **knobs)
        expected = w.abs().mean(1, keepdim=True) * torch.where(w >= 0, 1.0, -1.0)
        torch.testing.assert_close(fmt.fake(w), expected)


def best_of_all_signs(w: Tensor, bits: int) -> float:
    """Least squared error of one group w [g] over every choice of signs, scales solved."""
    planes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(w)))).double()
    least = torch.inf
    for chosen in itertools.combinations(planes, bits):
        b = torch.stack(chosen, 1)  # [g, bits]
        alpha = torch.linalg.lstsq(b, w.double()[:, None], driver="gelsd").solution
        least = min(least, float((b @ alpha - w.double()[:, None]).square().sum()))
    return least


def test_alternating_ends_where_neither_step_helps_and_above_the_best_of_all():
    w = normal(20, 6, seed=5)
    fmt = BCQ(bits=2, rounds=30, solver="exact")
    q = fmt.quantize(w)
    ours = (q.dequantize() - w).double().square().sum(1)
    best = torch.tensor([best_of_all_signs(row, 2) for row in w]).double()
    assert (ours >= best - 1e-6).all()  # values are fp32
    assert ((ours - best) < 1e-6).float().mean() >= 0.5  # local optima, often the global one
    b = signs(q, 2).double() * 2 - 1  # [N, g, 2]
    solved = torch.linalg.lstsq(b, w.double()[..., None], driver="gelsd").solution
    refitted = ((b @ solved)[..., 0] - w).square().sum(1)
    torch.testing.assert_close(ours, refitted, rtol=1e-4, atol=1e-9)
    levels = fmt._levels(q.params)
    nearest = (w[..., None] - levels[:, None]).abs().amin(-1)
    torch.testing.assert_close((q.dequantize() - w).abs(), nearest)


@pytest.mark.parametrize("solver", ["released", "exact"])
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounds_never_raise_the_error(bits, refit, solver):
    w = normal(16, 192, seed=bits)
    w[3], w[4], w[5, 1:] = 0, 0.75, 0
    by_round = []
    for rounds in range(20):
        fmt = BCQ(bits=bits, group=64, rounds=rounds, refit=refit, solver=solver)
        errors = (fmt.fake(w) - w).double().square().view(16, 3, 64).sum(-1)
        by_round.append(errors)
    for before, after in itertools.pairwise(by_round):
        # Scales are rounded to fp32 before levels are made: 1e-6 of the group's own squares.
        assert (after <= before + 1e-6 * w.double().square().view(16, 3, 64).sum(-1)).all()
    assert by_round[-1].sum() < 0.95 * by_round[0].sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_refined_greedy_is_no_worse_than_greedy(bits):
    w = normal(64, 128, seed=9)
    greedy, refined = BCQ(bits=bits, rounds=0), BCQ(bits=bits, rounds=0, refit=True, solver="exact")
    ours, plain = ((fmt.fake(w) - w).square().sum(1) for fmt in (refined, greedy))
    assert (ours <= plain * 1.000001).all()  # row by row, summed in fp32
    assert ours.sum() < 0.95 * plain.sum()
    assert error(BCQ(bits=bits, rounds=1), w) < error(greedy, w)


# Relative squared error on 256 x 4096 standard normal numbers, groups of 128, from an independent
# implementation (the project's method reference, section 0.8); 3 %.
ORACLE = {(3, 30): 3.5e-2, (4, 30): 1.04e-2, (3, 0): 5.8e-2, (4, 0): 3.2e-2}


@pytest.mark.parametrize(("bits", "rounds"), ORACLE)
def test_error_on_normal_numbers(bits, rounds):
    w = normal(256, 4096)
    fmt = BCQ(bits=bits, group=128, rounds=rounds)
    assert error(fmt, w) == pytest.approx(ORACLE[bits, rounds], rel=0.03)


def test_it_clips_and_still_errs_less_than_rounding_rows():
    """Why weight error alone misleads: less of it than RTN, with the largest weights cut."""
    w = normal(32, 4096)
    fmt = BCQ(bits=4, rounds=15)
    top = fmt.quantize(w).params["alpha"].sum(-1)
    assert (top < 0.85 * w.abs().amax(1, keepdim=True)).all()
    assert error(fmt, w) < 0.7 * error(IntGroup(bits=4), w)


def test_levels_are_symmetric_around_the_offset():
    p = BCQ(bits=3, rounds=3).quantize(normal(7, 40)).params
    levels = levels_of(p["alpha"].squeeze(1))  # [N, 8]; code 7 - c has every sign of c turned
    assert torch.equal(levels, -levels.flip(1))
    assert (p["alpha"].diff(dim=-1) <= 0).all()


def look_up_product(q: QTensor, x: Tensor) -> Tensor:
    """LUT-GEMM, algorithm C in fp64: tables of all 256 sums of 8 inputs, then look-ups only."""
    n, k = q.codes.shape
    group, bits = q.format.group or k, q.params["alpha"].shape[-1]
    tables = torch.zeros(k // 8, 256, dtype=torch.float64)
    for t, chunk in enumerate(x.double().view(-1, 8)):
        tables[t, 0] = -chunk.sum()
        for j in range(8):
            tables[t, 2**j : 2 ** (j + 1)] = tables[t, : 2**j] + 2 * chunk[j]
    plane = signs(q, bits).long().view(n, k // 8, 8, bits)
    byte = (plane << torch.arange(8)[:, None]).sum(2)  # [N, K/8, bits]
    found = tables[torch.arange(k // 8)[:, None], byte]  # [N, K/8, bits]
    sums = found.view(n, k // group, group // 8, bits).sum(2)  # [N, G, bits]
    y = (sums * q.params["alpha"].double()).sum((1, 2))
    if "offset" in q.params:
        inputs = tables[:, 255].view(k // group, -1).sum(1)  # sum of x over each group
        y += (q.params["offset"].double() * inputs).sum(1)
    return y


@pytest.mark.parametrize("group", [0, 16])
def test_table_look_ups_give_the_product(group):
    w, x = normal(5, 48), normal(48, seed=1)
    fitted = BCQ(bits=3, group=group).quantize(w)
    uniform = BCQ.from_uniform(IntGroup(bits=4, group=group).quantize(w))
    for q in (fitted, uniform):
        # dequantize rounds to fp32, the look-ups stay in fp64.
        expected = q.dequantize().double() @ x.double()
        torch.testing.assert_close(look_up_product(q, x), expected, rtol=1e-6, atol=1e-5)


def test_runs_of_sorted_weights_have_the_sums_of_the_codes():
    w, mass = normal(9, 50), torch.rand(9, 50, generator=torch.Generator().manual_seed(1))
    levels, codes = sorted_levels(torch.tensor([[1.0, 0.5, 0.2]]).repeat(9, 1))
    nearest = (w[..., None] - levels[:, None]).abs().argmin(-1)
    expected = sums_by_code(w, mass, codes.gather(1, nearest), 3)
    for ours, brute in zip(Runs(w, mass).sums(levels, codes), expected, strict=True):
        torch.testing.assert_close(ours, brute)


@pytest.mark.parametrize("knobs", [{}, {"refit": True}, {"rounds": 0}], ids=str)
def test_a_weight_that_counts_three_times_is_a_weight_that_stands_there_three_times(knobs):
    w = normal(6, 20)
    times = torch.randint(1, 4, (20,), generator=torch.Generator().manual_seed(2))
    fmt = BCQ(bits=2, solver="exact", **knobs)
    weighted = fmt.fit(w, {}, times)["alpha"]
    repeated = fmt.fit(w.repeat_interleave(times, 1), {})["alpha"]
    torch.testing.assert_close(weighted, repeated, rtol=1e-5, atol=1e-6)


def test_the_exact_solver_does_not_mind_small_weights():
    w = normal(8, 128)
    exact, released = (BCQ(bits=3, rounds=10, solver=name) for name in ("exact", "released"))
    small = 2.0**-20  # a power of two: scaling is exact
    assert torch.equal(exact.fake(w * small), exact.fake(w) * small)
    assert error(released, w * small) > 1.1 * error(exact, w * small)  # stops short
    assert error(released, w) == pytest.approx(error(exact, w), rel=1e-3)


def test_stored_bits():
    w = normal(8, 256)
    fmt = BCQ(bits=4, group=128, scale_dtype="float16")
    assert sum(fmt.quantize(w).bits().values()) == 4.5
    uniform = BCQ.from_uniform(IntGroup(bits=4, group=128).quantize(w)).bits()
    assert uniform["scales"] == 4 * 32 / 128
    assert uniform["zeros"] == 32 / 128


def test_codes_survive_packing():
    for bits in range(1, 9):
        q = BCQ(bits=bits, group=32, rounds=2).quantize(normal(5, 70))
        tensors, config = qtensor_state(q)
        restored = qtensor_from_state(tensors, config, [5, 70])
        assert config["width"] == bits
        assert torch.equal(restored.codes, q.codes)


def test_impossible_knobs_get_one_sentence():
    with pytest.raises(ValueError, match="bits"):
        recipes.parse("rtn(format=bcq(bits=9))")
    with pytest.raises(ValueError, match="rounds"):
        recipes.parse("rtn(format=bcq(rounds=-1))")


def test_every_configuration_in_print_has_a_preset():
    table = results()
    rows = table[(table["method"] == "lut_gemm") & (table["table"] == "LUT-GEMM perplexity")]
    assert len(rows) == 8
    for row in rows.to_dict("records"):
        group = f" g{row['group']:g}" if row["group"] else ""
        assert f"LUT-GEMM W{row['w_bits']:g}{group}" in recipes.presets()
