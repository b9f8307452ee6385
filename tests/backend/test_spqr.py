"""SpQR and its bilevel integers: the authors' outputs, a literal fp64 copy of the algorithm."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backend import recipes
from backend.formats.base import QTensor
from backend.formats.spqr import Bilevel
from backend.layer import QuantizedLayer, quantize_layer
from backend.methods.spqr import RECIPES, SpQR, leave_one_out, without_outliers
from backend.model.quant_linear import QuantLinear
from backend.model.stats import Hessian, LayerStats

FOLDER = Path(__file__).parents[3] / "shared" / "vectors"
HAVE_VECTORS = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no test vectors at {FOLDER}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, k: int, seed: int = 0) -> Tensor:
    """[tokens, k] channels that depend on each other; two are large."""
    mix = normal(k, k, seed=seed) / k**0.5 + 0.5 * torch.eye(k)
    x = normal(tokens, k, seed=seed + 1) @ mix
    x[:, 3] *= 20
    x[:, k // 2] *= 10
    return x


def step(**knobs: Any) -> dict[str, Any]:
    """A spqr step."""
    return {"kind": "spqr", **knobs}


def error_of(x: Tensor, w: Tensor, layer: QuantizedLayer) -> float:
    """Sum of squared differences of the outputs."""
    return (x.double() @ (w - layer.weight).double().T).square().sum().item()


def mask_of(q: QTensor) -> Tensor:
    """[N, K] true where a weight is kept apart."""
    mask = torch.zeros(q.codes.shape, dtype=torch.bool)
    if q.sparse is not None:
        counts = q.sparse.row_ptr.long().diff()
        mask[torch.repeat_interleave(torch.arange(len(counts)), counts), q.sparse.column.long()] = 1
    return mask


def scales_of(q: QTensor) -> Tensor:
    """[N, K] scale of each weight."""
    fmt = q.format
    count = len(fmt.groups(q.codes.shape[1]))
    scales = [fmt.levels(fmt.params_of(q.params, index))[0] for index in range(count)]
    return torch.cat(scales, 1)[:, q.group_of_column()]


# The authors' code ---------------------------------------------------------------------------


@cache
def arrays() -> dict[str, Tensor]:
    with np.load(FOLDER / "spqr_a.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@cache
def configs() -> dict[str, Any]:
    path = FOLDER / "spqr_a.json"
    return json.loads(path.read_text())["configs"] if path.is_file() else {}


def vector_layer(how: dict[str, Any]) -> QuantizedLayer:
    """The stored layer under one of the stored configurations."""
    knobs = step(
        bits=how["bits"],
        group=how["groupsize"],
        scale_bits=how["qq_scale_bits"],
        zero_bits=how["qq_zero_bits"],
        stat_group=how["qq_groupsize"],
        threshold=how.get("outlier_relative_threshold"),
        act_order=how.get("permutation_order") == "act_order",
        damping=how["percdamp"],
        round_zero=how["round_zero"],
        simplified_outliers=how.get("simplified_outliers", False),
    )
    return quantize_layer(knobs, arrays()["in_W"], inputs=arrays()["in_X"])


@HAVE_VECTORS
@pytest.mark.parametrize("name", configs())
def test_the_authors_outputs(name):
    """Tolerances of the vectors: 1 % of entries, 0.2 % of the mask, 1 % of the error."""
    how, data = configs()[name], arrays()
    layer = vector_layer(how)
    q = layer.module.qtensor
    off = (layer.weight - data[f"{name}__Wq"]).abs() > 0.1 * scales_of(q)
    assert off.float().mean() <= 0.01
    theirs = data.get(f"{name}__outlier_mask", torch.zeros_like(q.codes)).bool()
    assert (mask_of(q) != theirs).float().mean() <= 0.002
    assert error_of(data["in_X"], data["in_W"], layer) == pytest.approx(how["sq_err"], rel=0.01)
    dead = layer.weight[:, data["in_dead_column"]].abs().max().item()
    assert dead == pytest.approx(how["dead_column_dequantized_absmax"], rel=0.01)


@HAVE_VECTORS
@pytest.mark.parametrize("name", configs())
def test_the_authors_average_bits(name):
    """Without row pointers and act order's index, which they leave out; to two decimals."""
    how, bits = configs()[name], vector_layer(configs()[name]).bits
    average = sum(bits.values()) - bits["index"]
    if how["qq_scale_bits"] is None:  # they count a second level that is not there
        average += (32 if how["round_zero"] else 64) / how["groupsize"] / how["qq_groupsize"]
    assert average == pytest.approx(how["avg_bits"], abs=0.01)


@HAVE_VECTORS
@pytest.mark.parametrize("name", [n for n in configs() if n in ("inf", "thr0p2")])
def test_the_authors_second_level(name):
    data, q = arrays(), vector_layer(configs()[name]).module.qtensor
    for ours, theirs in (("scale", "scale"), ("origin", "zero")):
        codes = data[f"{name}__{theirs}_codes"]  # [groups, sets, 16]
        assert torch.equal(q.params[ours].T.reshape(codes.shape), codes)
        size, zero = (data[f"{name}__{theirs}_qq_{part}"][..., 0].T for part in ("scale", "zero"))
        unit = q.params["unit"] if ours == "scale" else 1
        low, ours_size = (q.params[f"{ours}_{part}"].float() * unit for part in ("low", "step"))
        torch.testing.assert_close(ours_size, size, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(low, -zero * size, rtol=2e-3, atol=1e-4)  # stored in fp16


# A literal copy ------------------------------------------------------------------------------


def affine(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """w [..., g] -> scale and real zero point [..., 1]."""
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return scale, -low / scale


def rounded(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """w on the grid of scale and zero."""
    return scale * ((w / scale + zero).round().clamp(0, 2**bits - 1) - zero)


def literal(w: Tensor, x: Tensor, threshold: float, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """SpQR with loops over weights, in fp64, every error spread at once -> weights, outliers."""
    w, x = w.double().clone(), x.double()
    h = 2 * x.T @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    d = factor.diagonal()
    limit = threshold * (w.var(0) / d**2).mean()
    outliers = torch.zeros(w.shape, dtype=torch.bool)
    for c in range(w.shape[1]):
        if c % group == 0:
            columns = slice(c, c + group)
            span = w[:, columns].clone()
            for row in span:
                gain = []
                for i in range(group):
                    rest = torch.arange(group) != i
                    whole = ((rounded(row, *affine(row, bits), bits) - row) / d[columns]) ** 2
                    part = rounded(row[rest], *affine(row[rest], bits), bits) - row[rest]
                    gain.append(whole.sum() - ((part / d[columns][rest]) ** 2).sum())
                likely = torch.stack(gain) > limit
                row[likely] = row[~likely].mean()
            scale, zero = affine(span, bits)
            scale, zero = (
                rounded(s.view(-1, 16), *affine(s.view(-1, 16), 3), 3).view(-1, 1)
                for s in (scale, zero)
            )
        value = rounded(w[:, c : c + 1], scale, zero, bits)[:, 0]
        error = (w[:, c] - value) / d[c]
        outliers[:, c] = error**2 > limit
        error[outliers[:, c]] = 0
        value = torch.where(outliers[:, c], w[:, c], value)
        w -= error[:, None] * factor[c]
        w[:, c] = value
    return w, outliers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("threshold", "block"), [(0.1, 128), (0.5, 8), (0.2, 5)])
def test_it_is_the_algorithm_word_by_word(threshold, block, seed):
    w, x = normal(32, 24, seed=seed), inputs(200, 24, seed=seed)
    theirs, outliers = literal(w, x, threshold, bits=3, group=8)
    knobs = step(group=8, threshold=threshold, block=block, scale_dtype="float32")
    layer = quantize_layer(knobs, w, inputs=x)
    assert torch.equal(mask_of(layer.module.qtensor), outliers)
    assert 0 < outliers.float().mean() < 0.15
    # Outliers are stored in fp16.
    torch.testing.assert_close(layer.weight, theirs.float(), rtol=6e-4, atol=2e-4)


@pytest.mark.parametrize("group", [2, 3, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_leave_one_out_is_the_refit_of_all_others(bits, group):
    w, pivots = normal(40, group).double(), normal(group, seed=1).double().abs() + 0.1
    w[5, 1] = w[5, 0]  # two equal ends
    fmt = Bilevel(bits=bits)

    def errors(w: Tensor, pivots: Tensor) -> Tensor:
        scale, origin = fmt.first_level(w.amin(1, keepdim=True), w.amax(1, keepdim=True))
        return ((rounded(w, scale, origin, bits) - w) / pivots).square().sum(1)

    expected = []
    for i in range(group):
        rest = torch.arange(group) != i
        expected.append(errors(w, pivots) - errors(w[:, rest], pivots[rest]))
    torch.testing.assert_close(leave_one_out(w, pivots, fmt), torch.stack(expected, 1))


def test_a_group_is_fitted_without_what_would_spoil_it():
    w = normal(8, 16)
    w[2, 4] = 40
    trimmed = without_outliers(w, torch.ones(16), 8.0, Bilevel())
    others = torch.arange(16) != 4
    assert trimmed[2, 4].item() == pytest.approx(w[2, others].mean().item(), abs=1e-6)
    trimmed[2, 4] = 40
    assert torch.equal(trimmed, w)
    assert not leave_one_out(w[:, :1], torch.ones(1), Bilevel()).any()


# What must hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("threshold", [None, 1e6])
def test_without_outliers_it_is_gptq_on_bilevel_integers(threshold, act_order):
    w, x = 0.05 * normal(40, 70), inputs(300, 70)
    ours = step(threshold=threshold, act_order=act_order, chosen_by="stored")
    grid = {"kind": "spqr", "bits": 3, "group": 16}
    same = {"kind": "gptq", "format": grid, "fresh_groups": True, "act_order": act_order}
    a, b = quantize_layer(ours, w, inputs=x), quantize_layer(same, w, inputs=x)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.module.qtensor.codes, b.module.qtensor.codes)
    assert a.bits == b.bits


def test_without_a_second_level_it_is_gptq_with_real_zero_points():
    w, x = 0.05 * normal(40, 70), inputs(300, 70)
    plain = {"scale_bits": None, "zero_bits": None, "scale_dtype": "float32"}
    grid = {"kind": "affine", "bits": 3, "group": 16}
    a = quantize_layer(step(threshold=None, **plain), w, inputs=x)
    b = quantize_layer({"kind": "gptq", "format": grid, "fresh_groups": True}, w, inputs=x)
    assert torch.equal(a.weight, b.weight)
    assert a.bits_per_weight == pytest.approx(b.bits_per_weight + 32 / w.numel())


@pytest.mark.parametrize("act_order", [False, True])
def test_a_lower_threshold_keeps_more_and_errs_less(act_order):
    w, x = 0.05 * normal(64, 256), inputs(1024, 256)
    shares, errors = [], []
    for threshold in (None, 1.0, 0.5, 0.25, 0.1):
        layer = quantize_layer(step(threshold=threshold, act_order=act_order), w, inputs=x)
        shares.append(layer.bits["outliers"] / 32)
        errors.append(error_of(x, w, layer))
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert errors == sorted(errors, reverse=True)
    # Reference, another draw: 0 / 0.18 / 0.72 / 2.0 / 5.5 %, errors 447 / 348 / 304 / 236 / 166.
    for share, published in zip(shares[1:], (0.0018, 0.0072, 0.020, 0.055), strict=True):
        assert published / 2 < share < published * 2
    for error, published in zip(errors[1:], (348, 304, 236, 166), strict=True):
        assert error / errors[0] == pytest.approx(published / 447, rel=0.25)


@pytest.mark.parametrize(("scale_bits", "bits"), [(2, 2), (3, 3), (4, 2)])
def test_levels_and_scales_are_as_few_as_their_bits_say(scale_bits, bits):
    w, x = normal(64, 96), inputs(300, 96)
    knobs = step(bits=bits, scale_bits=scale_bits, zero_bits=scale_bits)
    q = quantize_layer(knobs, w, inputs=x).module.qtensor
    assert int(q.codes.max()) < 2**bits
    scales = scales_of(q)[:, ::16].T.reshape(-1, 16)  # one row per second-level set
    assert all(len(row.unique()) <= 2**scale_bits for row in scales)
    weights = quantize_layer(knobs | {"threshold": None}, w, inputs=x).weight
    assert all(len(row.unique()) <= 2**bits for row in weights.reshape(-1, 16))


def test_outliers_are_their_stored_sixteen_bits():
    w, x = normal(48, 64), inputs(300, 64)
    for act_order in (False, True):
        layer = quantize_layer(step(threshold=0.1, act_order=act_order), w, inputs=x)
        q, mask = layer.module.qtensor, mask_of(layer.module.qtensor)
        assert q.sparse.value.dtype == torch.float16
        assert len(q.sparse.value) == mask.sum() > 50
        assert torch.equal(layer.weight[mask], q.sparse.value.float())
    first = mask[:, x.square().sum(0).argmax()]  # rounded before any error was spread
    column = w[first, x.square().sum(0).argmax()]
    assert torch.equal(layer.weight[first, x.square().sum(0).argmax()], column.half().float())


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"act_order": True},
        {"bits": 2, "group": 32},
        {"bits": 4, "scale_bits": 2, "zero_bits": 4},
        {"round_zero": True},
        {"scale_bits": None, "zero_bits": None},
        {"threshold": None},
    ],
    ids=str,
)
def test_bits_are_the_formula_and_the_bytes_on_disk(knobs):
    n, k = 256, 512
    method = SpQR(**knobs)
    layer = quantize_layer(method, normal(n, k), inputs=inputs(600, k))
    tensors, _ = layer.module.to_state()
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values()) / (n * k)
    assert layer.bits_per_weight == pytest.approx(stored, rel=0.01)
    share = mask_of(layer.module.qtensor).float().mean().item()
    b, g, s = method.bits, method.group, method.stat_group
    if method.round_zero:
        formula = b + (method.scale_bits + b) / g + 32 / (g * s)
    elif method.scale_bits is None:
        formula = b + 32 / g
    else:
        formula = b + (method.scale_bits + method.zero_bits) / g + 64 / (g * s)
    assert method.grid().dense_bits() == pytest.approx(formula)
    formula += 32 / (n * k)  # the unit
    formula += 32 * share + (32 * (n + 1) / (n * k) if share else 0) + 32 / n * method.act_order
    assert layer.bits_per_weight == pytest.approx(formula, rel=1e-6)


def test_the_published_bits():
    """The tables' averages from their outlier shares; they leave row pointers out."""
    first, second = (recipes.parse(RECIPES[name])[0] for name in ("SpQR 3.99b", "SpQR 3.07b"))
    assert first.grid().dense_bits() + 32 * 0.01138 == pytest.approx(3.99, abs=0.005)
    assert second.grid().dense_bits() + 32 * 0.02358 == pytest.approx(3.07, abs=0.005)
    assert {name[5:9] for name in ("SpQR 3.99b", "SpQR 3.07b")} == {
        f"{first.target_bits:.2f}",
        f"{second.target_bits:.2f}",
    }


@pytest.mark.parametrize("knobs", [{}, {"act_order": True}, {"round_zero": True, "group": 0}])
def test_it_is_saved_and_restored_bit_by_bit(knobs):
    layer = quantize_layer(step(threshold=0.1, **knobs), normal(40, 70), inputs=inputs(300, 70))
    tensors, config = layer.module.to_state()
    again = QuantLinear.from_state(tensors, json.loads(json.dumps(config)), torch.float32)
    assert torch.equal(again.weight, layer.module.weight)
    assert again.bits() == layer.bits


# Asking for bits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "target"),
    [(3, 16, 3.99), (3, 16, 4.4), (3, 16, 7.0), (2, 32, 3.07), (2, 32, 2.7), (4, 16, 4.95)],
)
@pytest.mark.parametrize("act_order", [False, True])
def test_a_target_is_met_within_one_percent(bits, group, target, act_order):
    n, k = 256, 512
    if act_order:
        target += 32 / n  # the index of the columns' groups
    knobs = step(bits=bits, group=group, target_bits=target, act_order=act_order)
    layer = quantize_layer(knobs, normal(n, k), inputs=inputs(600, k))
    assert layer.bits_per_weight == pytest.approx(target, rel=0.01)
    (note,) = layer.notes
    assert f"{layer.bits_per_weight:.3f} bits a weight" in note
    assert "nearest" not in note
    threshold = float(note.split()[1].rstrip(":"))
    assert 1e-6 < threshold < 10


def test_the_threshold_found_gives_the_same_layer():
    w, x = normal(64, 256), inputs(400, 256)
    searched = quantize_layer(step(target_bits=4.2, threshold=3.0), w, inputs=x)
    threshold = float(searched.notes[0].split()[1].rstrip(":"))
    direct = quantize_layer(step(threshold=threshold), w, inputs=x)
    assert direct.bits_per_weight == pytest.approx(searched.bits_per_weight, rel=2e-3)


def test_few_sweeps_find_the_threshold(monkeypatch):
    from backend.methods import spqr

    seen = []
    real = spqr.sweep
    monkeypatch.setattr(spqr, "sweep", lambda *a, **k: seen.append(a[3]) or real(*a, **k))
    for target, sweeps in ((3.99, 5), (4.5, 5), (6.0, 12)):
        seen.clear()
        knobs = step(target_bits=target, threshold=0.25)
        quantize_layer(knobs, normal(256, 512), inputs=inputs(600, 512))
        assert len(seen) <= sweeps


@pytest.mark.parametrize(
    ("bits", "group", "target"), [(3, 16, 3.99), (3, 16, 4.5), (2, 32, 3.07), (2, 32, 2.7)]
)
def test_a_target_is_met_where_whole_columns_are_outliers(bits, group, target):
    """Tiny weights on huge inputs stay outliers over a wide range of thresholds."""
    w, x = 0.05 * normal(128, 128), inputs(1024, 128)
    for column in (5, 40, 90):
        x[:, column] *= 1000
        w[:, column] /= 1000
    layer = quantize_layer(step(bits=bits, group=group, target_bits=target), w, inputs=x)
    assert layer.bits_per_weight == pytest.approx(target, rel=0.01)


def test_targets_out_of_reach_are_refused_or_noted():
    with pytest.raises(ValueError, match=r"target_bits 3\.5 is below the 3\.625 bits"):
        SpQR(target_bits=3.5)
    with pytest.raises(ValueError, match="threshold null keeps none"):
        SpQR(target_bits=4.0, threshold=None)
    w, x = normal(64, 64), inputs(200, 64)
    # 32 / 64 bits of row pointers come with the first outlier: 3.75 cannot be had.
    layer = quantize_layer(step(target_bits=3.75), w, inputs=x)
    assert layer.bits_per_weight == 3.625 + 32 / w.numel()
    assert layer.notes == ["3.75 bits leave no room for outliers; 3.633 bits without them"]
    exact = quantize_layer(step(target_bits=3.63), w, inputs=x)
    assert exact.bits_per_weight == 3.625 + 32 / w.numel()
    assert exact.notes == []
    nothing = quantize_layer(step(target_bits=5.0), torch.zeros(64, 64), inputs=x)
    assert "the nearest to 5 in reach" in nothing.notes[-1]
    assert not nothing.weight.any()


# Odd layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 16, 37])
@pytest.mark.parametrize("group", [0, 1, 7, 16, 100])
def test_rows_and_columns_need_not_divide(n, group):
    w, x = normal(n, 45), inputs(200, 45)
    for knobs in ({}, {"act_order": True}, {"round_zero": True}):
        layer = quantize_layer(step(group=group, threshold=0.3, **knobs), w, inputs=x)
        nearest = Bilevel(group=group, round_zero=layer.module.qtensor.format.round_zero).fake(w)
        assert layer.weight.isfinite().all()
        if group != 1:  # single weights are exact but for the second level
            assert error_of(x, w, layer) < (x @ (w - nearest).T).square().sum().item()


def test_odd_rows_stay_finite_and_zeros_stay_zero():
    w, x = normal(33, 48), inputs(200, 48)
    w[3], w[7], w[9, 16:32] = 0, 0.5, 0
    layer = quantize_layer(step(threshold=None), w, inputs=x)
    assert layer.weight.isfinite().all()
    assert not layer.weight[3].any()
    assert quantize_layer(step(), w.bfloat16(), inputs=x).weight.isfinite().all()


def test_inputs_that_were_always_0_are_noted():
    w, x = normal(32, 48), inputs(200, 48)
    x[:, [2, 9]] = 0
    layer = quantize_layer(step(), w, inputs=x)
    assert layer.notes == ["2 of 48 inputs were always 0; weights taken as 0"]
    assert not quantize_layer(step(round_zero=True), w, inputs=x).weight[:, [2, 9]].any()


def solved_with(matrix: Tensor, **knobs: Any) -> QuantizedLayer:
    """SpQR of a fixed weight with this Hessian [K, K]."""
    h, notes = Hessian(len(matrix)), []
    h.matrix = matrix
    linear = torch.nn.Linear(len(matrix), 6, bias=False)
    linear.weight = torch.nn.Parameter(normal(6, len(matrix)))
    module = SpQR(**knobs).quantize(linear, LayerStats({Hessian: h}, notes.append))
    return QuantizedLayer(module, notes)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (torch.full((20, 20), torch.nan), "not finite"),
        (torch.zeros(20, 20), "none came"),
        (-torch.eye(20), "singular even at damping 1"),
    ],
    ids=["nan", "zero", "negative"],
)
def test_a_useless_hessian_means_rounding_to_nearest_and_a_note(matrix, words):
    layer = solved_with(matrix)
    assert words in layer.notes[-1]
    assert "rounded to nearest" in layer.notes[-1]
    assert torch.equal(layer.weight, Bilevel().fake(normal(6, 20)))


def test_a_singular_hessian_is_damped_more_and_noted():
    x = inputs(5, 20)
    layer = solved_with(x.T @ x - 1e-3 * torch.eye(20), damping=0.0)
    assert "not positive definite at damping 0; used 0.01" in layer.notes[0]


def test_inputs_are_asked_for():
    with pytest.raises(ValueError, match="needs calibration inputs"):
        quantize_layer(step(), normal(4, 8))


# The format ----------------------------------------------------------------------------------


def test_the_second_level_by_hand():
    """Rows [0, 7], [0, 14], [0, 21]: scales 1, 2, 3 on 2 bits of [1, 3] are 1, 1 + 4/3, 3."""
    w = torch.tensor([[0.0, 7.0], [0.0, 14.0], [0.0, 21.0]])
    q = Bilevel(group=2, scale_bits=2, zero_bits=None, scale_dtype="float32").quantize(w)
    assert q.params["scale"].tolist() == [[0], [2], [3]]  # halves to even
    assert q.params["unit"].item() == 1 / 16  # 2^-8 of the largest power of two in 21
    assert q.params["scale_low"].tolist() == [[16.0]]
    torch.testing.assert_close(q.params["scale_step"] / 16, torch.tensor([[2 / 3]]))
    scale = torch.tensor([1, 1 + 4 / 3, 3])
    codes = torch.tensor([7.0, 6.0, 7.0])
    torch.testing.assert_close(q.dequantize(), torch.stack([torch.zeros(3), codes * scale], 1))


def test_a_constant_group_does_not_swamp_its_neighbours():
    """As [-1, 1], as in the released code, its scale would be 50 times theirs."""
    w = 0.02 * normal(16, 16)
    plain = (Bilevel().fake(w) - w)[1:].square().sum()
    w[0] = 0.01
    assert (Bilevel().fake(w) - w)[1:].square().sum() < 1.5 * plain
    exact = Bilevel(scale_bits=None, zero_bits=None, scale_dtype="float32")
    torch.testing.assert_close(exact.fake(w)[0], w[0])


def test_small_columns_keep_their_precision():
    """Where activations are large, weights are small: their fp16 scales must not underflow."""
    w = 0.02 * normal(32, 64)
    w[:, :16] /= 2000
    for dtype in ("float16", "float32"):
        error = (Bilevel(scale_dtype=dtype).fake(w) - w).square()
        small, large = error[:, :16].mean() / w[:, :16].var(), error[:, 16:].mean() / w.var()
        assert small < 1.5 * large
    x = inputs(300, 64)
    x[:, :16] *= 2000
    for act_order in (False, True):
        knobs = step(threshold=None, act_order=act_order)
        errors = [
            error_of(x, w, quantize_layer(knobs | {"scale_dtype": dtype}, w, inputs=x))
            for dtype in ("float16", "float32")
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_whole_zero_points_keep_zero():
    w = normal(32, 64)
    w[:, ::5] = 0
    w[4] = w[4].abs() + 1
    q = Bilevel(round_zero=True, bits=4).quantize(w)
    assert not q.dequantize()[w == 0].any()
    assert q.params["origin"].dtype == torch.uint8
    assert int(q.params["origin"].max()) < 16


def test_smaller_groups_and_finer_second_levels_err_less():
    w = normal(64, 512)

    def error(**knobs: Any) -> float:
        return (Bilevel(**knobs).fake(w) - w).square().sum().item()

    by_bits = [error(bits=bits) for bits in (2, 3, 4, 5)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_group = [error(group=group) for group in (0, 128, 64, 32, 16)]
    assert by_group == sorted(by_group, reverse=True)
    by_second = [error(scale_bits=bits, zero_bits=bits) for bits in (2, 3, 4, 6, None)]
    assert by_second == sorted(by_second, reverse=True)
    assert math.isclose(error(scale_dtype="float32"), error(), rel_tol=0.01)
