"""KVQuant: levels against the authors' outputs and brute force, its cache, gradients, memory."""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from backend.cache.build import Caches, cache_argument, token_bytes
from backend.cache.layer import RoundedLayer
from backend.cache.nonuniform import (
    Codebook,
    KeyCodec,
    Levels,
    ValueCodec,
    flatten,
    inner_range,
    per_side,
    unflatten,
)
from backend.cache.watch import watch
from backend.methods import Seen
from backend.methods.kvquant import KVQuant, fit_codebook, fit_values, kmeans
from backend.model.checkpoint import Checkpoint
from backend.model.families import blocks_of
from backend.pipeline import quantize
from backend.recipes import parse
from backend.spec import RunSpec

FOLDER = Path(__file__).parents[3] / "shared" / "vectors"
needs_vectors = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no test vectors at {FOLDER}")
SHARES = {"dense": 0.0, "sp10": 0.01, "sp1": 0.001}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def ids(n: int = 4, length: int = 48, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, length), generator=torch.Generator().manual_seed(seed))


class Forgetful:
    """A checkpoint that keeps nothing."""

    def has(self, index: int) -> bool:
        return False

    def save(self, block: Any) -> None:
        pass

    def restore(self, block: Any) -> None:
        raise AssertionError("nothing was saved")


def calibrated(model: Any, recipe: str = "kvquant", notes: list[str] | None = None) -> Any:
    """The model with what the recipe fits to a few random tokens."""
    keep = [] if notes is None else notes
    quantize(model, parse(recipe), ids(), Forgetful(), note=lambda *told: keep.append(told[2]))
    return model


def caches(model: Any, recipe: str = "kvquant", *, packed: bool = False) -> Caches:
    return Caches(model, parse(recipe), packed=packed)


def passed(model: Any, tokens: Tensor, cache: Any = None) -> Tensor:
    given = {} if cache is None else {cache_argument(model): cache}
    with torch.inference_mode():
        return model(input_ids=tokens, **given).logits


# -- the authors' outputs ------------------------------------------------------------------------


@cache
def arrays() -> dict[str, Tensor]:
    with np.load(FOLDER / "kvquant_a.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@cache
def configs() -> dict[str, Any]:
    path = FOLDER / "kvquant_a.json"
    found = json.loads(path.read_text())["configs"] if path.is_file() else {}
    return {name: c for name, c in found.items() if isinstance(c, dict)}


def fitted(name: str, **knobs: Any) -> Codebook:
    """The codebook of one config, on our own levels."""
    data, config = arrays(), configs()[name]
    weights = data["in_fisher"] if config["fisher"] else None
    share = SHARES[name.split("_")[1]]
    return fit_codebook(data["in_K"], weights, config["bits"], share, **knobs)


def nearly_all(given: Tensor, expected: Tensor) -> bool:
    """Within 1e-5, but for one entry in a thousand that lay in the middle of two levels."""
    return ((given - expected).abs() > 1e-5).float().mean().item() <= 1e-3


@needs_vectors
@pytest.mark.parametrize("name", configs())
def test_ranges_and_outliers_are_the_authors(name):
    book, data = fitted(name), arrays()
    if f"{name}__upper" in data:
        torch.testing.assert_close(book.upper, data[f"{name}__upper"], rtol=1e-5, atol=0)
        torch.testing.assert_close(book.lower, data[f"{name}__lower"], rtol=1e-5, atol=0)
    if f"{name}__outlier_mask" in data:
        assert torch.equal(book.outliers(data["in_K"]), data[f"{name}__outlier_mask"].bool())


@needs_vectors
@pytest.mark.parametrize("name", configs())
def test_the_authors_levels_round_as_theirs(name):
    book, data = fitted(name), arrays()
    levels = data[f"{name}__lut_unsorted"].sort().values
    theirs = Codebook(Levels(levels, levels), book.lower, book.upper, book.sparse)
    assert nearly_all(theirs.fake(data["in_K"]), data[f"{name}__dq"])


@needs_vectors
@pytest.mark.parametrize("name", configs())
def test_our_levels_cost_next_to_the_least_possible(name):
    book, data, config = fitted(name), arrays(), configs()[name]
    x = data["in_K"]
    weight = data["in_fisher"] if config["fisher"] else torch.ones_like(x)
    error = (book.fake(x) - x) / ((book.upper - book.lower) / 2)
    cost = (weight * error.double().square()).sum().item()
    # 1.12 is asked for; dynamic programming before Lloyd's rounds finds the optimum to 1e-4.
    assert cost <= 1.0001 * config["weighted_kmeans_global_optimum_cost"]


@needs_vectors
@pytest.mark.parametrize("bits", [3, 4])
def test_the_other_tables_are_the_authors(bits):
    data = arrays()
    x = data["in_K"]
    even = fit_codebook(x, None, bits, 0.01, table="uniform")
    assert nearly_all(even.fake(x), data[f"int{bits}_sp10__dq"])
    bell = fit_codebook(x, None, bits, 0.01, table="normal")
    # The released levels pass through fp16.
    torch.testing.assert_close(
        bell.levels.chosen, data[f"nf{bits}__signposts"], rtol=5e-4, atol=1e-6
    )
    torch.testing.assert_close(bell.fake(x), data[f"nf{bits}_sp10__dq"], rtol=0, atol=1e-2)


@needs_vectors
@pytest.mark.parametrize("bits", [3, 4])
def test_the_outliers_of_values_are_the_authors(bits):
    x = arrays()["in_K"]
    _, _, index = inner_range(x, 0.01)
    mask = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, index, True)
    assert torch.equal(mask, arrays()[f"V_int{bits}_token_dyn_sp10__outlier_mask"].bool())


# -- levels --------------------------------------------------------------------------------------


def least_cost(z: Tensor, weight: Tensor, clusters: int) -> float:
    """Least weighted squares of any partition of sorted z: all are tried."""
    z, order = z.double().sort()
    weight = weight.double()[order]
    costs = []
    for inner in combinations(range(1, len(z)), clusters - 1):
        ends = [0, *inner, len(z)]
        cost = 0.0
        for a, b in pairwise(ends):
            w, x = weight[a:b], z[a:b]
            cost += (w * (x - (w * x).sum() / w.sum()).square()).sum().item()
        costs.append(cost)
    return min(costs)


@pytest.mark.parametrize("seed", range(8))
def test_kmeans_finds_the_best_partition(seed):
    z, weight = normal(14, seed=seed), uniform(14, seed=seed) ** 4
    levels = Levels(found := kmeans(z, weight, 4), found)
    cost = (weight * (levels.values(levels.codes(z)) - z).square()).sum().item()
    assert cost == pytest.approx(least_cost(z, weight, 4), rel=1e-4)


def test_constant_weights_are_no_weights():
    z = normal(500)
    assert torch.equal(kmeans(z, torch.full_like(z, 3.7), 8), kmeans(z, None, 8))


def test_few_distinct_numbers_are_exact():
    z = torch.tensor([0.5, -1.0, 0.5, 0.25])
    levels = kmeans(z, None, 8)
    assert levels.unique().tolist() == [-1.0, 0.25, 0.5]
    assert torch.equal(levels, levels.sort().values)
    assert kmeans(z, torch.zeros(4), 8).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_sorted_distinct_and_within_one(bits):
    book = fit_codebook(normal(400, 6) * 5 + 2, uniform(400, 6), bits, 0.01)
    levels = book.levels.chosen
    assert torch.equal(levels, levels.unique())
    assert len(levels) == 2**bits
    assert levels.abs().max() <= 1


def test_more_bits_cost_less():
    x, weight = normal(400, 8), uniform(400, 8) ** 3
    costs = []
    for bits in (1, 2, 3, 4):
        error = (fit_codebook(x, weight, bits, 0.01).fake(x) - x).square()
        costs.append((weight * error).sum().item())
    assert all(more < less for less, more in pairwise(costs))


def test_a_uniform_table_without_outliers_is_plain_rounding():
    x = normal(64, 5) * torch.tensor([1.0, 30.0, 0.1, 2.0, 1.0]) + 3
    book = fit_codebook(x, None, 3, 0.0, table="uniform")
    low, high = x.amin(0), x.amax(0)
    step = (high - low) / 7
    expected = ((x - low) / step).round() * step + low
    torch.testing.assert_close(book.fake(x), expected, rtol=1e-5, atol=1e-5)


def test_outliers_are_exact_and_as_many_as_asked():
    x = normal(4000, 16) ** 3
    book = fit_codebook(x, None, 2, 0.01)
    outside = book.outliers(x)
    assert outside.float().mean().item() == pytest.approx(0.01, abs=1e-3)
    assert torch.equal(book.fake(x)[outside], x[outside])
    assert not torch.equal(book.fake(x), x)
    assert not fit_codebook(x, None, 2, 0.0).outliers(100 * x).any()


def test_a_constant_channel_is_exact():
    x = torch.cat([normal(64, 2), torch.full((64, 1), 0.3)], 1)
    for share in (0.0, 0.01):
        assert torch.equal(fit_codebook(x, None, 2, share).fake(x)[:, 2], x[:, 2])


@pytest.mark.parametrize("bits", [2, 3])
def test_q_norm_keeps_mean_and_deviation(bits):
    x = normal(3000, 4).exp()
    plain = fit_codebook(x, None, bits, 0.01)
    book = fit_codebook(x, None, bits, 0.01, norm=True)
    inside = ~book.outliers(x)
    assert torch.equal(book.levels.chosen, plain.levels.chosen)
    half = (book.upper - book.lower) / 2
    z, rounded = ((v - (book.upper + book.lower) / 2) / half for v in (x, book.fake(x)))
    # fp32 numbers, normalised twice: 1e-4.
    assert rounded[inside].mean().item() == pytest.approx(z[inside].mean().item(), abs=1e-4)
    assert rounded[inside].std().item() == pytest.approx(z[inside].std().item(), rel=1e-4)
    assert plain.fake(x)[inside].std() < book.fake(x)[inside].std()


def test_scaled_weights_lower_the_error_of_the_keys_themselves():
    x = normal(2000, 4) * torch.tensor([0.1, 1.0, 1.0, 20.0])
    x[:, 3] = x[:, 3].abs()
    weight = uniform(2000, 4)
    errors = [
        (weight * (fit_codebook(x, weight, 2, 0.0, scaled=scaled).fake(x) - x).square()).sum()
        for scaled in (False, True)
    ]
    assert errors[1] < errors[0]


def test_a_codebook_needs_a_matrix():
    with pytest.raises(ValueError, match=r"not to \[2, 3, 4\]"):
        fit_codebook(normal(2, 3, 4), None, 2, 0.01)


# -- codecs --------------------------------------------------------------------------------------


def codecs(share: float = 0.05, bits: int = 3, heads: int = 2, dim: int = 20) -> list[Any]:
    sample = normal(600, heads * dim, seed=5)
    keys = KeyCodec(fit_codebook(sample, None, bits, share), share)
    return [keys, ValueCodec(fit_values(sample, None, bits, share), share)]


def states(tokens: int = 11, batch: int = 3, seed: int = 6) -> Tensor:
    """[B, 2, t, 20], some of it outside the ranges, in fp16's numbers."""
    return (1.3 * normal(batch, 2, tokens, 20, seed=seed)).half().float()


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_is_lossless(at, share, bits):
    codec = codecs(share, bits)[at]
    codes = codec.encode(states())
    packed = codec.pack(codes)
    assert torch.equal(codec.decode(codec.unpack(packed)), codec.decode(codes))
    assert packed["codes"].shape[2:] == (11, -(-40 * bits // 8))


@pytest.mark.parametrize("at", [0, 1])
def test_packed_tokens_are_joined_cut_and_chosen(at):
    codec, x = codecs()[at], states()
    whole = codec.decode(codec.encode(x))
    parts = [codec.pack(codec.encode(x[:, :, a:b])) for a, b in ((0, 4), (4, 5), (5, 11))]
    packed = codec.join(parts)
    assert torch.equal(codec.decode(codec.unpack(packed)), whole)
    some = codec.part(packed, 3, 9)
    assert torch.equal(codec.decode(codec.unpack(some)), whole[:, :, 3:9])
    assert torch.equal(codec.decode(codec.unpack(codec.part(packed, 8, 99))), whole[:, :, 8:])
    rows = torch.tensor([2, 0, 2, 1])
    chosen = codec.select(packed, rows)
    assert torch.equal(codec.decode(codec.unpack(chosen)), whole[rows])
    again = codec.join([chosen, codec.pack(codec.encode(x[rows, :, :2]))])
    assert torch.equal(
        codec.decode(codec.unpack(again)), torch.cat([whole[rows], whole[rows, :, :2]], 2)
    )


def test_outliers_of_a_cache_are_exact():
    keys, values = codecs()
    x = states()
    outside = unflatten(keys.codebook.outliers(flatten(x)), 2)
    assert 0 < outside.sum() < outside.numel() / 2
    assert torch.equal(keys.decode(keys.encode(x))[outside], x[outside])
    assert torch.equal(keys.decode(keys.encode(x)), unflatten(keys.codebook.fake(flatten(x)), 2))
    rounded, flat = flatten(values.decode(values.encode(x))), flatten(x)
    exact = (rounded == flat).sum(-1)
    assert (exact >= 2 * per_side(0.05, 40)).all()
    for ends in (flat.topk(1, -1).indices, (-flat).topk(1, -1).indices):
        assert torch.equal(rounded.gather(-1, ends), flat.gather(-1, ends))


@pytest.mark.parametrize(("share", "channels"), [(0.01, 1024), (0.01, 4096), (0.01, 64), (0.1, 40)])
def test_outliers_of_a_token_are_those_at_its_percentiles(share, channels):
    x = normal(20, channels)
    low, high = (
        torch.quantile(x.double(), q, dim=1, keepdim=True) for q in (share / 2, 1 - share / 2)
    )
    _, _, index = inner_range(x, share)
    mask = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, index, True)
    assert torch.equal(mask, (x <= low) | (x >= high))
    assert index.shape[1] == 2 * per_side(share, channels)


def test_bits_of_the_published_tables():
    def per_element(codec: Any) -> float:
        return codec.bits_per_token(8, 128) / 1024

    for bits in (2, 3, 4):
        levels = Levels(torch.linspace(-1, 1, 2**bits), torch.linspace(-1, 1, 2**bits))
        ends = torch.ones(1024)
        # Published 4.31, 4.34 and so on; ours with 16 bits more for how many keys are outliers,
        # and six values a side where 0.5 % is 5.12.
        keys = per_element(KeyCodec(Codebook(levels, -ends, ends), 0.01))
        assert keys == pytest.approx(bits + 0.32 + 16 / 1024)
        values = per_element(ValueCodec(levels, 0.01))
        assert values == pytest.approx(bits + 12 * 32 / 1024 + 32 / 1024)


def test_numbers_past_fp16_stay_finite():
    for codec in codecs():
        x = states() * 1e6
        assert codec.decode(codec.encode(x)).isfinite().all()


# -- calibration ---------------------------------------------------------------------------------


def by_hooks(model: Any, row: Tensor, parts: tuple[str, str]) -> list[Tensor]:
    """Outputs of two modules of block 1, flat, and their gradients, by a plain backward pass."""
    held = {}

    def keep(name: str) -> Any:
        def hook(module: Any, given: Any, out: Tensor) -> None:
            out.requires_grad_() if not out.requires_grad else None
            out.retain_grad()
            held[name] = out

        return hook

    attention = model.model.layers[1].self_attn
    hooks = [attention.get_submodule(name).register_forward_hook(keep(name)) for name in parts]
    logits = model(row[None]).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], row[1:]).backward()
    for hook in hooks:
        hook.remove()
    outs = [held[name] for name in parts]
    return [
        t.detach().flatten(2 if t.dim() == 4 else 1).view(len(row), -1)
        for t in (*outs, *(out.grad for out in outs))
    ]


@pytest.mark.parametrize(("kind", "key"), [("llama", "k_proj"), ("qwen3", "k_norm")])
def test_keys_values_and_slopes_are_those_of_a_plain_backward_pass(kind, key, make_model):
    model, tokens = make_model(kind), ids(2, 20)
    found = watch(model, blocks_of(model), tokens, slopes=True, pre_rope=True, wanted=[1, 2])
    assert sorted(found) == [1, 2]
    for at, row in enumerate(tokens):
        keys, values, *slopes = by_hooks(model, row, (key, "v_proj"))
        sample = found[1]
        for given, expected in (
            (sample.keys, keys),
            (sample.values, values),
            (sample.key_slope, slopes[0]),
            (sample.value_slope, slopes[1]),
        ):
            # The rotation is undone in fp32: 1e-5 of the largest number.
            scale = expected.abs().max().item()
            torch.testing.assert_close(given[at], expected, rtol=1e-4, atol=1e-5 * scale)


def test_watching_leaves_the_model_as_it_was(make_model):
    model, tokens = make_model("llama").requires_grad_(), ids(2, 20)
    before = passed(model, tokens)
    watch(model, blocks_of(model), tokens, slopes=True, pre_rope=True, wanted=[0])
    assert torch.equal(passed(model, tokens), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any("forward" in vars(block.module) for block in blocks_of(model))


def test_without_slopes_nothing_is_differentiated(make_model):
    model = make_model("llama")
    found = watch(model, blocks_of(model), ids(), slopes=False, pre_rope=False, wanted=[0])
    assert found[0].key_slope is None
    assert found[0].keys.shape == (4, 48, 32)
    for recipe in ("kvquant(fisher=off)", "kvquant(table=normal)", "kvquant(table=uniform)"):
        assert not parse(recipe)[0].slopes
    assert parse("kvquant")[0].slopes


def test_first_tokens_set_no_range(make_model):
    model = make_model("llama")
    found = watch(model, blocks_of(model), ids(), slopes=False, pre_rope=True, wanted=[0])[0]
    step = KVQuant(sinks=2, fisher="off")
    changed = type(found)(found.keys.clone(), found.values.clone())
    changed.keys[:, :2] *= 100
    changed.values[:, :2] *= 100
    fits = [step.fitted(sample) for sample in (found, changed)]
    assert all(torch.equal(fits[0][name], fits[1][name]) for name in fits[0])


def test_blocks_in_parts_are_blocks_at_once(make_model, monkeypatch):
    whole = calibrated(make_model())
    monkeypatch.setattr("backend.methods.kvquant.blocks_at_once", lambda *given: 1)
    parts = calibrated(make_model())
    for a, b in zip(blocks_of(whole), blocks_of(parts), strict=True):
        for name, value in a.fit().items():
            torch.testing.assert_close(value, b.fit()[name], rtol=1e-4, atol=1e-5)


def test_memory_is_checked_first(make_model, monkeypatch):
    monkeypatch.setattr("backend.baseline.free_bytes", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"use shorter calibration sequences or fisher=off"):
        calibrated(make_model())
    monkeypatch.setattr("backend.methods.kvquant.pass_bytes", lambda *given: 0)
    with pytest.raises(ValueError, match="use fewer samples"):
        calibrated(make_model())


def test_bad_inputs_get_a_sentence(make_model):
    with pytest.raises(ValueError, match="no rotary positions"):
        calibrated(make_model("opt"))
    calibrated(make_model("opt"), "kvquant(rope=post)")
    with pytest.raises(ValueError, match="leave none to learn"):
        calibrated(make_model(), "kvquant(sinks=48)")
    with pytest.raises(ValueError, match="leave none to learn"):
        parse("kvquant")[0].before(make_model(), torch.empty(0, 0).long(), Seen({}))
    with pytest.raises(ValueError, match="quantize the run first"):
        caches(make_model())
    model = calibrated(make_model(), "kvquant(bits=2)")
    with pytest.raises(ValueError, match="no table of 8 levels"):
        caches(model, "kvquant(bits=3)")


def test_too_few_distinct_numbers_are_noted(make_model):
    notes: list[str] = []
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    calibrated(model, notes=notes)
    assert "block 1: only 1 distinct levels of values" in notes


# -- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_are_rounded_alike_alone_and_together(packed, make_model):
    made = caches(calibrated(make_model()), packed=packed)
    x = [normal(2, 2, 30, 16, seed=s) for s in (1, 2)]
    whole = made.new().layers[0].update(*x)
    layer = made.new().layers[0]
    for t in range(30):
        found = layer.update(*(side[:, :, t : t + 1] for side in x))
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))
    later = [torch.cat([side[:, :, :20], 9 * side[:, :, 20:]], 2) for side in x]
    other = made.new().layers[0].update(*later)
    assert all(torch.equal(a[:, :, :20], b[:, :, :20]) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("recipe", ["kvquant", "kvquant(bits=2,outliers=0)", "kvquant(norm=true)"])
def test_packed_is_simulated(recipe, make_model):
    model = calibrated(make_model(), recipe)
    outputs = []
    for packed in (False, True):
        made = caches(model, recipe, packed=packed)
        outputs.append(passed(model, ids(2), made.new()))
        how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        given = {cache_argument(model): made.new()}
        outputs.append(model.generate(ids(1, 20), **given, **how))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_the_first_tokens_are_exact_however_they_come(sinks, make_model):
    recipe = f"kvquant(bits=2,sinks={sinks})"
    made = caches(calibrated(make_model(), recipe), recipe)
    x = [normal(2, 2, 8, 16, seed=s) for s in (1, 2)]
    for step in (1, 8):
        layer = made.new().layers[0]
        for t in range(0, 8, step):
            found = layer.update(*(side[:, :, t : t + step] for side in x))
        for given, exact in zip(found, x, strict=True):
            assert torch.equal(given[:, :, :sinks], exact[:, :, :sinks])
            assert (given[:, :, sinks:] != exact[:, :, sinks:]).any(3).all()


def test_keys_are_rounded_before_they_turn(make_model):
    model = calibrated(make_model(), "kvquant(sinks=0)")
    layer = caches(model, "kvquant(sinks=0)").new().layers[0]
    assert isinstance(layer, RoundedLayer)
    keys, values = normal(1, 2, 9, 16), normal(1, 2, 9, 16, seed=4)
    cos, sin = model.model.rotary_emb(keys, torch.arange(9)[None])
    turned, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    layer.turns.extend(cos, sin, 9)
    found, _ = layer.update(turned, values)
    codec = layer.sides[0].codec
    expected, _ = apply_rotary_pos_emb(codec.decode(codec.encode(keys)), keys, cos, sin)
    # Turned and turned back in fp32; exact outliers are fp16 on both sides.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_what_a_packed_token_takes(make_model):
    for recipe in ("kvquant", "kvquant(bits=2,outliers=0)", "kvquant(bits=4,outliers=0.1)"):
        found = token_bytes(caches(calibrated(make_model(), recipe), recipe))
        assert found.measured == pytest.approx(found.formula, rel=0.02)


def test_fits_are_saved_and_restored(make_model, tmp_path):
    model = make_model()
    quantize(model, parse("kvquant"), ids(), Checkpoint(tmp_path))
    again = make_model()
    quantize(again, parse("kvquant"), ids(), Checkpoint(tmp_path))
    for a, b in zip(blocks_of(model), blocks_of(again), strict=True):
        assert len(a.fit()) == 6
        assert all(torch.equal(value, b.fit()[name]) for name, value in a.fit().items())
    one, two = (passed(m, ids(1), caches(m).new()) for m in (model, again))
    assert torch.equal(one, two)


def test_rules_for_blocks(make_model):
    recipe = "kvquant(layers=[on(blocks=first,bits=2),on(blocks=last,keep=true)])"
    model = calibrated(make_model(), recipe)
    made = caches(model, recipe)
    sizes = [len(block.fit().get("key_levels", ())) for block in blocks_of(model)]
    assert sizes == [4, 8, 0]
    assert [isinstance(layer, RoundedLayer) for layer in made.new().layers] == [True, True, False]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3", "gpt_neox"])
def test_models_of_many_kinds(kind, make_model):
    model = calibrated(make_model(kind))
    exact = passed(model, ids(2))
    rounded = passed(model, ids(2), caches(model).new())
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < exact.norm()


def test_a_run_calibrates_it():
    spec = RunSpec(model={"id": "demo"}, steps=parse("KVQuant-3bit-1%"))
    assert spec.needs_calibration()
    assert spec.walks
    assert spec.targets() == ["kv_cache"]
    assert parse("KVQuant-2bit-1%") == (KVQuant(bits=2),)
