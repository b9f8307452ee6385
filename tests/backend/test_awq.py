"""AWQ: the authors' outputs, brute force, what its search must hold; lone blocks and norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from backend import recipes
from backend.formats import FORMATS
from backend.formats.int_group import IntGroup
from backend.layer import arguments_of, quantize_block, quantize_layer, smooth
from backend.methods.awq import AWQ, LoneSight, Place, clip_limits, scale_of, spread
from backend.metrics.base import Measurement
from backend.model.families import FAMILIES, OPT, Block, blocks_of
from backend.model.quant_linear import QuantLinear
from backend.model.stats import SpreadSample
from backend.pipeline import quantize

FOLDER = Path(__file__).parents[3] / "shared" / "vectors"
needs_vectors = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no test vectors at {FOLDER}")
CONFIGS = ("w4_g32", "w3_g32", "w4_g64")
SEARCHED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
CLIPPED = ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FED = sorted(kind for kind, family in FAMILIES.items() if family.norm_feeds or family.linear_feeds)


class Forgetful:
    """A checkpoint that keeps nothing."""

    def has(self, index: int) -> bool:
        return False

    def save(self, block: Any) -> None:
        pass

    def restore(self, block: Any) -> None:
        raise AssertionError("nothing was saved")


class ScalesOnly(AWQ):
    """AWQ without its rounding."""

    def waves(self, block: Any) -> list[list[str]]:
        return [[]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(n: int = 4, length: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(seed))


def walk(model: Any, method: AWQ) -> tuple[list[Measurement], list[str]]:
    """Applies one step to a model -> its searches, its notes."""
    found: list[Measurement] = []
    notes: list[str] = []
    quantize(
        model,
        [method],
        ids(),
        Forgetful(),
        note=lambda block, name, text: notes.append(f"{name}: {text}"),
        measure=found.append,
    )
    return [m for m in found if m.name == "awq_loss"], notes


# ---- the authors' outputs ------------------------------------------------------------------


def arrays(case: str = "awq_a") -> dict[str, Tensor]:
    with np.load(FOLDER / f"{case}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def configs() -> dict[str, Any]:
    return json.loads((FOLDER / "awq_a.json").read_text())["configs"]


def stored_block(data: dict[str, Tensor]) -> LlamaDecoderLayer:
    """The Llama block of the vectors."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
    )
    block = LlamaDecoderLayer(config, 0).eval().requires_grad_(False)
    for name, value in block.named_parameters():
        value.copy_(data["in_" + name.removesuffix(".weight").replace(".", "_")])
    return block


def features(data: dict[str, Tensor], name: str) -> Tensor:
    """Stored inputs [512, K] of a linear; those that share their input are stored once."""
    leader = {"self_attn.v_proj": SEARCHED[0], "mlp.up_proj": SEARCHED[2]}.get(name, name)
    return data["feat_" + leader.replace(".", "_")]


@needs_vectors
@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_searches_and_the_blocks_output_are_the_authors(name):
    data, how = arrays(), configs()[name]
    block, found = stored_block(data), []
    step = {"kind": "awq", "format": {"kind": "int", "bits": how["bits"], "group": how["group"]}}
    arguments = arguments_of(block.self_attn.config, block, data["in_X"])
    exact = block(data["in_X"], **arguments)
    rounded = quantize_block([step], block, data["in_X"], measure=found.append)
    searches = {m.layer[1]: m for m in found if m.name == "awq_loss"}
    assert tuple(searches) == SEARCHED
    for linear, search in searches.items():
        tail = linear.replace(".", "_")
        losses = torch.tensor(search.detail["losses"])
        torch.testing.assert_close(losses, data[f"{name}__history_{tail}"], rtol=2e-3, atol=0)
        assert how["searches"][linear]["second_best_rel_gap"] > 2e-3
        assert search.detail["ratio"] == pytest.approx(how["searches"][linear]["best_ratio"])
        scale = scale_of(features(data, linear).abs().mean(0), search.detail["ratio"])
        torch.testing.assert_close(scale, data[f"{name}__scales_{tail}"], rtol=1e-4, atol=0)
    error = (rounded(data["in_X"], **arguments) - exact).square().mean().item()
    assert error == pytest.approx(how["layer_out_mse_awq"], rel=1e-3)
    plain = quantize_block([{**step, "kind": "rtn"}], block, data["in_X"])
    error = (plain(data["in_X"], **arguments) - exact).square().mean().item()
    assert error == pytest.approx(how["layer_out_mse_rtn"], rel=1e-3)


@needs_vectors
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("linear", CLIPPED)
def test_clip_limits_are_the_authors(name, linear):
    data, how = arrays(), configs()[name]
    scales = {place: data[f"{name}__scales_{place.replace('.', '_')}"] for place in SEARCHED}
    into = {"self_attn.v_proj": SEARCHED[0], "mlp.up_proj": SEARCHED[2]}.get(linear, linear)
    w = data["in_" + linear.replace(".", "_")] * scales[into]
    out = {"self_attn.v_proj": SEARCHED[1], "mlp.up_proj": SEARCHED[3]}.get(linear)
    if out:  # its rows were divided by the scale of the linear that reads it
        w = w / scales[out][:, None]
    fmt = IntGroup(bits=how["bits"], group=how["group"])
    limit = clip_limits(w, features(data, linear) / scales[into], fmt, steps=20, tried=10)
    stored = data[f"{name}__clipmax_{linear.replace('.', '_')}"]
    # Ends clipped alike put the zero on a rounding tie: the authors' own fp64 rerun moves 0-4 %.
    assert ((limit / stored - 1).abs() < 1e-3).float().mean() >= 0.92


@needs_vectors
@pytest.mark.parametrize("name", ["AWQ_b3_asym_pc", "AWQ_b4_asym_pc", "AWQ_b4_asym_g32"])
def test_the_grid_is_the_released_one_where_a_group_has_both_signs(name):
    """The released quantizer's range need not hold 0: one-sided groups collapse. Ours differ."""
    data = arrays("uniform_a")
    w, group = data["in_W"], 32 if name.endswith("g32") else 128
    units = w.view(len(w), -1, group)
    both = (units.amin(-1) < 0) & (units.amax(-1) > 0)
    both &= units.amax(-1) - units.amin(-1) > 1e-3  # tiny ranges are floored at 1e-5 there
    fmt = IntGroup(bits=int(name[5]), group=group % 128)
    ours, theirs = (t.view(units.shape)[both] for t in (fmt.fake(w), data[f"{name}__dq"]))
    assert both.float().mean() > 0.6
    assert ((ours - theirs).abs() > 1e-5).float().mean() <= 0.002


@needs_vectors
@torch.no_grad()
@pytest.mark.parametrize("alpha", [25, 50, 75])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm", "gemma3"])
def test_smooth_gives_the_authors_scales(kind, alpha):
    data = arrays("smoothquant_a")
    norm = {"layernorm": nn.LayerNorm, "rmsnorm": LlamaRMSNorm, "gemma3": Gemma3RMSNorm}[kind](64)
    norm.weight.copy_(data["in_gemma3_norm_weight" if kind == "gemma3" else "in_norm_weight"])
    linears = [nn.Linear(64, len(data[f"in_fc{i}"]), bias=False) for i in range(3)]
    for i, linear in enumerate(linears):
        linear.weight.copy_(data[f"in_fc{i}"])
    name, peak = f"{kind}_a{alpha}", data[f"{kind}__act_scales"]
    scale = smooth(norm, linears, peak, {"kind": "smoothquant", "alpha": alpha / 100})
    live = peak > 0  # where nothing was active s stays 1, not 1e-5
    if kind != "gemma3":  # only its weights are stored
        stored = 1 / data[f"{name}__inv_scales"].flatten()
        torch.testing.assert_close(scale[live], stored[live], rtol=1e-5, atol=0)
    for i, linear in enumerate(linears):
        weight = data[f"{name}__fc{i}"][:, live]
        torch.testing.assert_close(linear.weight[:, live], weight, rtol=1e-5, atol=0)


# ---- what must hold ------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FED)
def test_scales_alone_change_no_output(family, make_model):
    model = make_model(family, dtype="float64")
    before, weights = model(ids(seed=1)).logits, [p.clone() for p in model.parameters()]
    searches, _ = walk(model, ScalesOnly(format=IntGroup(bits=3, group=16)))
    # Gemma's norms compute 1 + weight in fp32 whatever the model's dtype.
    tolerance = 1e-4 if FAMILIES[family].norm_offset else 1e-9
    torch.testing.assert_close(model(ids(seed=1)).logits, before, rtol=tolerance, atol=tolerance)
    assert any(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    feeds = len(FAMILIES[family].norm_feeds) + len(FAMILIES[family].linear_feeds)
    assert len(searches) == 3 * feeds


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_rounded_and_no_search_loses_to_plain_rounding(family, make_model):
    model = make_model(family)
    searches, notes = walk(model, AWQ(format=IntGroup(bits=3, group=48)))
    assert all(m.value is not None and m.value <= 1 for m in searches)
    assert all(len(m.detail["losses"]) == 20 for m in searches)
    assert any(m.value < 0.99 for m in searches) or not searches
    for block in blocks_of(model):
        assert {type(linear) for linear in block.linears().values()} == {QuantLinear}
    assert model(ids(seed=1)).logits.isfinite().all()
    unscaled = {note.split(":")[0] for note in notes if "can carry a scale" in note}
    feeds = FAMILIES[family].norm_feeds
    scaled = {name for feed in feeds for name in feed.readers}
    scaled |= {feed.reader for feed in FAMILIES[family].linear_feeds}
    assert unscaled == {name for wave in FAMILIES[family].waves for name in wave} - scaled


def test_scales_are_positive_and_centred():
    mean = normal(64).abs()
    mean[3] = 0
    for ratio in (0.0, 0.35, 0.95):
        s = scale_of(mean, ratio)
        assert (s > 0).all()
        assert s.isfinite().all()
        assert (s.max() * s.min()).item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(scale_of(mean, 0.0), torch.ones(64))


def test_equal_activations_scale_nothing():
    for ratio in (0.0, 0.5, 0.95):
        assert torch.equal(scale_of(torch.ones(16), ratio), torch.ones(16))
        torch.testing.assert_close(scale_of(torch.full((16,), 3.7), ratio), torch.ones(16))


@pytest.mark.parametrize("group", [0, 16, 24])
@pytest.mark.parametrize("tokens", [12, 300])
def test_clip_limits_equal_brute_force(group, tokens):
    """Token by token, group by group, candidate by candidate, in fp64."""
    fmt, w, x = IntGroup(bits=3, group=group), normal(6, 40), normal(tokens, 40, seed=1)
    x[:, 7] *= 10
    limit = clip_limits(w, x, fmt, steps=20, tried=10)
    for at, (start, stop) in enumerate(fmt.groups(40)):
        for row in range(6):
            whole = w[row : row + 1, start:stop]
            losses = {}
            for i in range(10):
                m = whole.abs().max().item() * (1 - i / 20)
                d = fmt.fake(whole.clamp(-m, m)).double() - whole.double()
                losses[m] = (x[:, start:stop].double() @ d.T).square().mean().item()
            chosen = min(losses, key=lambda m: abs(m - limit[row, at].item()))
            assert limit[row, at].item() == pytest.approx(chosen, rel=1e-5)
            # sums in another order: equal up to fp32 rounding of the rounded weights
            assert losses[chosen] <= min(losses.values()) * (1 + 1e-4)


def test_clipping_never_errs_more_on_the_sampled_tokens():
    fmt, w, x = IntGroup(bits=3, group=32), normal(32, 96), normal(200, 96, seed=1)
    limit = spread(clip_limits(w, x, fmt, steps=20, tried=10), fmt, 96)

    def errors(rounded: Tensor) -> Tensor:
        parts = (rounded - w).view(32, 3, 32)
        return torch.einsum("tgk,ngk->tng", x.view(-1, 3, 32), parts).square().mean(0)

    clipped, plain = errors(fmt.fake(w.clamp(-limit, limit))), errors(fmt.fake(w))
    assert (clipped <= plain * (1 + 1e-5)).all()
    assert (clipped < 0.9 * plain).any()


@torch.no_grad()
def test_a_lone_readers_loss_is_that_of_its_outputs():
    """What [K, K] says of all tokens against the outputs themselves, whatever the weights."""
    block = Block(0, nn.ModuleDict({"norm": nn.RMSNorm(40), "fc": nn.Linear(40, 12)}), OPT)
    sight = LoneSight(block, Place("norm", ("fc",), "fc", norm=True))
    batches = [normal(2, 30, 40), normal(3, 7, 40, seed=1)]
    linear = block.get("fc")
    hooks = sight.watch()
    for x in batches:
        linear(x)
    for hook in hooks:
        hook.remove()
    x, other = torch.cat([b.flatten(0, 1) for b in batches]), normal(12, 40, seed=2)
    torch.testing.assert_close(sight.mean(), x.abs().mean(0))
    exact = (x.double() @ (other - linear.weight).double().T).square().mean().item()
    assert sight.loss([other]) == pytest.approx(exact, rel=1e-5)
    assert sight.loss([linear.weight]) == 0


def test_clipped_weights_are_counted(make_model):
    found: list[Measurement] = []
    model = make_model("llama")
    quantize(model, [AWQ(format=IntGroup(bits=3, group=16))], ids(), Forgetful(),
             measure=found.append)  # fmt: skip
    shares = {m.layer: m.value for m in found if m.name == "clipped_weights"}
    assert {name.rpartition(".")[2] for _, name in shares} == {
        "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(0 <= share < 0.5 for share in shares.values())
    assert any(share > 0.02 for share in shares.values())
    found.clear()
    quantize(make_model("llama"), [AWQ(clip=False)], ids(), Forgetful(), measure=found.append)
    assert not any(m.name == "clipped_weights" for m in found)


# ---- grouped-query attention ---------------------------------------------------------------


def test_shared_scales_repeat_as_value_heads_do():
    place = Place("v", ("o",), "o", norm=False, copies=2, head=3)
    values = torch.arange(6.0)  # two value heads of three channels
    heads = values.view(1, 2, 1, 3).expand(1, 2, 2, 3).reshape(12)  # as repeat_kv lays them out
    assert torch.equal(place.repeated(values), heads)
    assert torch.equal(place.shared(heads), values)
    assert torch.equal(place.shared(torch.arange(12.0)), (values % 3) + 6 * (values // 3) + 1.5)


def test_grouped_queries_can_be_left_out_as_released(make_model):
    searches, notes = walk(make_model("llama"), AWQ(shared_heads=False, ratios=3))
    assert not any("o_proj" in m.layer[1] for m in searches)
    assert sum(note.startswith("self_attn.o_proj: nothing") for note in notes) == 3
    searches, _ = walk(make_model("llama", num_key_value_heads=4), AWQ(shared_heads=False))
    assert sum("o_proj" in m.layer[1] for m in searches) == 3


# ---- any grid, bad inputs, names that others rely on ---------------------------------------


@pytest.mark.parametrize("kind", sorted(FORMATS.load()))
def test_any_format_is_a_grid(kind):
    w, x = normal(12, 70), normal(300, 70, seed=1)
    x[:, 3] *= 20
    fmt = FORMATS.load()[kind]()
    errors = [
        (x @ (quantize_layer(step, w, inputs=x).weight - w).T).square().sum().item()
        for step in ({"kind": "rtn", "format": fmt}, {"kind": "awq", "format": fmt})
    ]
    assert errors[1] <= errors[0] * 1.05  # groups are searched apart, so their errors may add up


def test_one_linear_alone_is_clipped_and_says_that_nothing_was_scaled():
    w, x = normal(8, 64), normal(600, 64, seed=1)
    layer = quantize_layer({"kind": "awq", "format": {"kind": "int", "bits": 3}}, w, inputs=x)
    assert layer.notes == ["nothing in front of it can carry a scale; rounded without one"]
    rtn = quantize_layer({"kind": "rtn", "format": {"kind": "int", "bits": 3}}, w)
    assert layer.bits == rtn.bits
    off = quantize_layer({"kind": "awq", "format": {"kind": "int", "bits": 3}, "clip": False}, w)
    assert torch.equal(off.weight, rtn.weight)


def test_too_few_tokens_are_refused_and_few_are_noted():
    w = normal(8, 64)
    with pytest.raises(ValueError, match="at least 16 calibration tokens, got 7"):
        quantize_layer({"kind": "awq"}, w, inputs=normal(7, 64))
    layer = quantize_layer({"kind": "awq"}, w, inputs=normal(100, 64))
    assert "clip ranges chosen on 100 tokens, fewer than 512" in layer.notes
    with pytest.raises(ValueError, match="needs calibration inputs"):
        quantize_layer({"kind": "awq"}, w)


@pytest.mark.parametrize("batches", [[512], [700, 700], [3] * 1000, [100, 5000, 1]])
def test_sampled_rows_are_spread_over_all_tokens(batches):
    sample, at = SpreadSample(1), 0
    for size in batches:
        sample.update(torch.arange(at, at + size).view(1, -1, 1))
        at += size
    kept = sample.rows.flatten()
    assert torch.equal(kept, torch.arange(0, at, sample.stride).float())
    assert min(at, 512) <= len(kept) < 1024


def test_presets_of_the_tables():
    assert recipes.parse("AWQ W4 g128") == recipes.parse(
        "awq(bits=4,group=128,scale_dtype=float16)"
    )
    (step,) = recipes.parse("AWQ W3 g128")
    assert step.format.bits == 3


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text", "gpt_neox"])
def test_a_block_alone_is_quantized_as_in_its_model(family, make_model):
    model = make_model(family, num_hidden_layers=1, layer_types=None)
    module = blocks_of(model)[0].module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    given: list[Tensor] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(args[0]), with_kwargs=True
    )
    model(ids(), use_cache=False)
    hook.remove()
    step = AWQ(format=IntGroup(bits=4, group=16))
    alone = quantize_block([step], module, given[0])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    walk(model, step)
    walked = blocks_of(model)[0]
    for name, linear in walked.linears().items():
        # the mask is written out here and implied there, so attention may round differently
        off = (alone.get_submodule(name).weight - linear.weight).abs() > 1e-5
        assert off.float().mean() < 0.05, name


def test_bad_blocks_get_one_sentence():
    with pytest.raises(ValueError, match=r"must be \[B, T, D\]"):
        quantize_block([{"kind": "rtn"}], nn.Linear(4, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="Linear does not say which model config"):
        quantize_block([{"kind": "rtn"}], nn.Linear(4, 4), torch.zeros(1, 3, 4))


@torch.no_grad()
@pytest.mark.parametrize("make", [nn.LayerNorm, LlamaRMSNorm, Gemma3RMSNorm])
def test_smooth_changes_norm_and_readers_but_not_what_they_give(make):
    norm = make(32)
    norm.weight.add_(0.1 * normal(32))
    linears = [nn.Linear(32, 8), nn.Linear(32, 4)]
    x = normal(50, 32, seed=1)
    x[:, 3] *= 30
    before = [linear(norm(x)) for linear in linears]
    peak, columns = norm(x).abs().amax(0), [linear.weight.clone() for linear in linears]
    scale = smooth(norm, linears, peak, {"kind": "smoothquant", "alpha": 0.75})
    largest = torch.cat(columns).abs().amax(0)
    torch.testing.assert_close(scale, peak**0.75 / largest**0.25, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm(x).abs().amax(0), peak / scale, rtol=1e-4, atol=1e-6)
    for linear, column, y in zip(linears, columns, before, strict=True):
        torch.testing.assert_close(linear.weight, column * scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(linear(norm(x)), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="takes no scale out of a norm"):
        smooth(norm, linears, peak, {"kind": "rtn"})
    with pytest.raises(ValueError, match=r"act_max must be \[32\]"):
        smooth(norm, linears, peak[:5], {"kind": "smoothquant"})
