"""Every method keeps the promises of backend/methods/base.py; rtn, smoothquant and activations."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from knobs import variants
from torch import Tensor, nn

from backend import recipes
from backend.formats.int_group import IntGroup
from backend.layer import quantize_layer
from backend.methods import METHODS, LinearMethod, Method, Seen
from backend.methods.activations import Activations
from backend.methods.rtn import RTN
from backend.methods.smoothquant import SmoothQuant
from backend.model.families import FAMILIES, Block, Family, NormFeed, blocks_of
from backend.model.quant_linear import LinearLike, QuantLinear
from backend.model.stats import AbsMax, LayerStats
from backend.pipeline import quantize

KINDS = sorted(METHODS.load())
EVERY = [method for cls in METHODS.load().values() for method in variants(cls)]
IN_BLOCKS = [kind for kind in KINDS if METHODS.load()[kind].in_blocks]  # others: in the cache only
EXACT = [kind for kind in KINDS if METHODS.load()[kind].exact]
SMOOTHABLE = sorted(name for name, family in FAMILIES.items() if family.norm_feeds)


class Forgetful:
    """A checkpoint that keeps nothing."""

    def has(self, index: int) -> bool:
        return False

    def save(self, block: Block) -> None:
        pass

    def restore(self, block: Block) -> None:
        raise AssertionError("nothing was saved")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(n: int = 4, length: int = 32) -> Tensor:
    """[n, length] random byte tokens."""
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(0))


def walk(model: Any, recipe: str, notes: list[str] | None = None) -> Any:
    """The model after a recipe, calibrated on random tokens."""
    keep = [] if notes is None else notes
    steps = recipes.parse(recipe)
    quantize(model, steps, ids(), Forgetful(), note=lambda block, name, text: keep.append(text))
    return model


def logits(model: Any, seed: int = 1) -> Tensor:
    """[2, 24, V] on tokens that calibration did not see."""
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(seed))
    return model(tokens).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_says_what_it_is(kind):
    cls = METHODS.load()[kind]
    assert cls.targets
    assert cls.targets <= {"weights", "activations", "kv_cache"}
    assert "\n\n" in (cls.__doc__ or ""), "the source of the method belongs in its docstring"
    assert set(cls().wanted()) <= set(cls.needs)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_have_bounds(kind):
    for name, field in METHODS.load()[kind].model_fields.items():
        assert field.description, name
        if field.annotation in (int, float):
            sides = {side for rule in field.metadata for side in ("ge", "gt", "le", "lt")}
            assert sides, f"{kind}.{name} has no bounds"


@pytest.mark.parametrize(
    "method", [m for cls in METHODS.load().values() for m in variants(cls)], ids=str
)
def test_a_method_survives_json_and_text(method):
    again = METHODS.build(json.loads(json.dumps(method.data())))
    assert again == method
    assert again.digest() == method.digest()
    text = recipes.render((method,))
    assert recipes.parse(text) == (method,)
    assert recipes.render(recipes.parse(text)) == text


@pytest.mark.parametrize("kind", IN_BLOCKS)
def test_a_method_leaves_runnable_blocks(kind, make_model):
    model = make_model("llama")
    before = logits(model)
    walk(model, kind)
    after = logits(model)
    assert after.isfinite().all()
    assert kind in EXACT or not torch.equal(after, before)
    for block in blocks_of(model):
        assert len(block.linears()) == 7
        expected = nn.Linear if kind in EXACT else LinearLike
        assert all(isinstance(linear, expected) for linear in block.linears().values())


@pytest.mark.parametrize("kind", [k for k in KINDS if issubclass(METHODS.load()[k], LinearMethod)])
def test_a_second_weight_step_is_refused(kind, make_model):
    with pytest.raises(ValueError, match="already quantized"):
        walk(make_model("llama"), f"rtn+{kind}")


@pytest.mark.parametrize("family", SMOOTHABLE)
@pytest.mark.parametrize("kind", EXACT)
def test_exact_methods_change_no_output(kind, family, make_model):
    model = make_model(family, dtype="float64")
    before, weights = logits(model), [p.clone() for p in model.parameters()]
    walk(model, kind)
    # Gemma's norms compute 1 + weight in fp32 whatever the model's dtype.
    tolerance = 1e-4 if FAMILIES[family].norm_offset else 1e-9
    torch.testing.assert_close(logits(model), before, rtol=tolerance, atol=tolerance)
    assert any(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", sorted({*KINDS} - {*IN_BLOCKS}))
def test_what_acts_in_the_cache_leaves_blocks_alone(kind, make_model):
    model = make_model("llama")
    before = logits(model)
    assert torch.equal(logits(walk(model, kind)), before)
    with pytest.raises(ValueError, match="no linear"):
        quantize_layer({"kind": kind}, normal(8, 32))


@pytest.mark.parametrize("kind", IN_BLOCKS)
def test_the_callers_weight_is_left_alone(kind):
    w, x = normal(8, 32), normal(64, 32, seed=1)
    kept = w.clone()
    if kind in EXACT:
        with pytest.raises(ValueError):
            quantize_layer({"kind": kind}, w, inputs=x)
    else:
        layer = quantize_layer({"kind": kind}, w, inputs=x)
        assert layer.weight.shape == w.shape
        assert layer.weight.dtype == torch.float32
        assert layer(x).shape == (64, 8)
        assert layer.bits_per_weight == pytest.approx(sum(layer.bits.values()))
        assert set(layer.bits) == {"codes", "scales", "zeros", "outliers", "index"}
    assert torch.equal(w, kept)


def test_wrong_shapes_get_one_sentence():
    with pytest.raises(ValueError, match=r"weight must be \[N, K\]"):
        quantize_layer({"kind": "rtn"}, torch.zeros(4))
    with pytest.raises(ValueError, match=r"inputs must be \[T, 8\]"):
        quantize_layer({"kind": "rtn"}, torch.zeros(4, 8), inputs=torch.zeros(5, 7))


def test_rtn_is_the_format_itself():
    w = normal(12, 70)
    fmt = IntGroup(bits=3, group=32, scale_dtype="float16")
    layer = quantize_layer(RTN(format=fmt), w)
    assert torch.equal(layer.weight, fmt.fake(w))
    assert layer.bits == fmt.quantize(w).bits()
    x = normal(5, 70)
    torch.testing.assert_close(layer(x), x @ fmt.fake(w).T)


def test_more_bits_and_smaller_groups_err_less():
    w = normal(64, 512)

    def error(**grid: Any) -> float:
        step = {"kind": "rtn", "format": {"kind": "int", **grid}}
        return (quantize_layer(step, w).weight - w).square().sum().item()

    by_bits = [error(bits=bits) for bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_group = [error(bits=4, group=group) for group in (0, 128, 64, 32, 16)]
    assert by_group == sorted(by_group, reverse=True)


def outlier_inputs(tokens: int, k: int = 32, seed: int = 0) -> Tensor:
    """[tokens, k]; channel 5 is 30 times larger than the others."""
    x = normal(tokens, k, seed=seed)
    x[:, 5] *= 30
    return x


def smooth_pair(k: int = 32, readers: int = 1, dtype: torch.dtype = torch.float32) -> Block:
    """A norm that does nothing but scale, and the linears that read it, as a block."""
    parts: dict[str, nn.Module] = {"norm": Scale(k)}
    names = tuple(f"fc{i}" for i in range(readers))
    for name in names:
        parts[name] = nn.Linear(k, 24)
        parts[name].weight = nn.Parameter(normal(24, k, seed=int(name[2:])))
    family = Family("", (), "", (NormFeed("norm", names),), (names,))
    return Block(0, nn.ModuleDict(parts).to(dtype).requires_grad_(False), family)


class Scale(nn.Module):
    """x * weight: a norm without normalising, so that inputs are what the test says."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(k))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def smooth(block: Block, x: Tensor, **knobs: Any) -> None:
    """Calibrate on x [T, K] and apply."""
    stats = LayerStats({AbsMax: AbsMax(x.shape[-1])})
    stats.update(block.get("norm")(x))
    SmoothQuant(**knobs).apply(block, Seen(dict.fromkeys(block.linears(), stats)))


def peaks(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitudes per channel [K] of inputs and weights."""
    weights = torch.cat([linear.weight for linear in block.linears().values()])
    return block.get("norm")(x).abs().amax(0), weights.abs().amax(0)


@pytest.mark.parametrize("readers", [1, 3])
def test_half_alpha_evens_out_activations_and_weights(readers):
    block, x = smooth_pair(readers=readers), outlier_inputs(100)
    a, b = peaks(block, x)
    smooth(block, x)
    smoothed_x, smoothed_w = peaks(block, x)
    torch.testing.assert_close(smoothed_x, (a * b).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(smoothed_w, (a * b).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [0, 1])
def test_at_the_ends_of_alpha_one_side_is_flat(alpha):
    block, x = smooth_pair(), outlier_inputs(100)
    smooth(block, x, alpha=float(alpha))
    flat = peaks(block, x)[0 if alpha else 1]
    torch.testing.assert_close(flat, torch.ones_like(flat), rtol=1e-5, atol=0)


def test_silent_channels_and_zero_weights_stay_finite():
    block, x = smooth_pair(), outlier_inputs(100)
    x[:, 2] = 0
    with torch.no_grad():
        block.get("fc0").weight[:, 4] = 0
    weight = block.get("fc0").weight.clone()
    smooth(block, x)
    assert block.get("norm").weight[2] == 1
    assert torch.equal(block.get("fc0").weight[:, 2], weight[:, 2])
    assert block.get("norm").weight.isfinite().all()
    assert block.get("norm").weight.half().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_powers_of_two_fold_exactly(dtype):
    block, x = smooth_pair(dtype=dtype), outlier_inputs(40).to(dtype)
    norm, weight = block.get("norm").weight.clone(), block.get("fc0").weight.clone()
    smooth(block, x, power_of_two=True)
    ratio = norm.double() / block.get("norm").weight.double()  # s
    assert torch.equal(ratio.log2(), ratio.log2().round())
    assert ratio.unique().numel() > 1
    assert torch.equal(block.get("fc0").weight.double(), weight.double() * ratio)


def test_layer_norm_bias_is_divided_too():
    norm = nn.LayerNorm(32).double().requires_grad_(False)
    norm.bias.copy_(normal(32))
    block = smooth_pair(dtype=torch.float64)
    block.replace("norm", norm)
    x = normal(50, 32).double()
    before = block.get("fc0")(norm(x))
    smooth(block, x)
    torch.testing.assert_close(block.get("fc0")(norm(x)), before, rtol=1e-9, atol=1e-9)


def test_smoothing_repairs_w8a8_where_one_channel_is_large():
    """Errors of W8A8 on held-out inputs, per-tensor scales: plain, then smoothed O1, O2, O3."""
    held_out = outlier_inputs(200, seed=9)
    levels = {
        "plain": ("", "activations(per_tensor=true)"),
        "O1": ("smoothquant", "activations"),
        "O2": ("smoothquant", "activations(per_tensor=true)"),
        "O3": ("smoothquant", "activations(per_tensor=true,static=true)"),
    }
    errors = {}
    for name, (first, last) in levels.items():
        block, x = smooth_pair(), outlier_inputs(400)
        exact = block.get("fc0")(block.get("norm")(held_out))
        if first:
            smooth(block, x)
        rest = recipes.parse(f"rtn(bits=8,symmetric=true,per_tensor=true)+{last}")
        stats = LayerStats({AbsMax: AbsMax(32)})
        stats.update(block.get("norm")(x))
        for step in rest:
            step.apply(block, Seen({"fc0": stats}))
        output = block.get("fc0")(block.get("norm")(held_out))
        errors[name] = (output - exact).square().mean().item()
    assert errors["O1"] < errors["O2"] < errors["O3"] * 1.02
    assert errors["O3"] < 0.5 * errors["plain"]


def test_what_cannot_be_smoothed_is_refused(make_model):
    post_norm = make_model("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match="post-norm"):
        walk(post_norm, "smoothquant")
    with pytest.raises(ValueError, match="put smoothquant before"):
        walk(make_model("llama"), "rtn+smoothquant")


def test_activations_scale_each_token_by_itself():
    w, x = normal(8, 32), outlier_inputs(20)
    layer = quantize_layer({"kind": "activations"}, w)
    peak = x.abs().amax(1, keepdim=True)
    rounded = (x / (peak / 127)).round() * (peak / 127)
    torch.testing.assert_close(layer(x), rounded @ w.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, w)
    assert layer.bits_per_weight == 16
    one_by_one = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), one_by_one)


def test_activations_per_tensor_share_a_scale():
    w, x = normal(8, 32), outlier_inputs(20).view(2, 10, 32)
    layer = quantize_layer(
        {"kind": "activations", "format": {"kind": "int", "per_tensor": True}}, w
    )
    scale = x.abs().max() / 127
    torch.testing.assert_close(layer(x), (x / scale).round() * scale @ w.T)


def test_static_activations_clip_at_the_calibration_peak():
    w, x = torch.eye(32), outlier_inputs(50)
    layer = quantize_layer({"kind": "activations", "static": True}, w, inputs=x)
    scale = x.abs().max() / 127
    torch.testing.assert_close(layer(x), (x / scale).round() * scale)
    assert layer(10 * x).abs().max() <= 128.001 * scale
    assert layer(torch.full((1, 32), 1e-6)).count_nonzero() == 0  # the scale does not follow x
    with pytest.raises(ValueError, match="needs calibration inputs"):
        quantize_layer({"kind": "activations", "static": True}, w)


def test_asymmetric_static_activations_use_both_ends():
    x = torch.rand(50, 16, generator=torch.Generator().manual_seed(0)) + 1  # as after a ReLU
    grid = {"kind": "int", "bits": 4, "symmetric": False}
    layer = quantize_layer(
        {"kind": "activations", "format": grid, "static": True}, torch.eye(16), x
    )
    assert (layer(x) - x).abs().max() <= 0.5001 * x.max() / 15


def test_knobs_of_activations_that_are_not_given_stay_at_eight_bits_symmetric():
    (by_bits,) = recipes.parse("activations(bits=6)")
    assert (by_bits.format.bits, by_bits.format.symmetric) == (6, True)
    (by_tensor,) = recipes.parse("activations(per_tensor=true)")
    assert (by_tensor.format.bits, by_tensor.format.symmetric) == (8, True)
    (told,) = recipes.parse("activations(bits=8,symmetric=false)")
    assert not told.format.symmetric
    assert Activations(format=IntGroup(bits=6)) == by_bits
    assert (
        recipes.parse("activations")[0] == Activations() == recipes.parse("activations(bits=8)")[0]
    )


def test_activations_after_a_weight_step_keep_its_codes(make_model):
    plain = walk(make_model("llama"), "rtn(bits=4,group=16)")
    both = walk(make_model("llama"), "rtn(bits=4,group=16)+activations(bits=8)")
    for block, other in zip(blocks_of(plain), blocks_of(both), strict=True):
        for name, linear in block.linears().items():
            rounded = other.get(name)
            assert isinstance(linear, QuantLinear)
            assert isinstance(rounded, QuantLinear)
            assert torch.equal(linear.weight, rounded.weight)
            assert linear.bits() == rounded.bits()
            assert linear.act is None
            assert rounded.act == IntGroup(bits=8, symmetric=True)
    with pytest.raises(ValueError, match="already rounded"):
        walk(make_model("llama"), "activations+activations")


def test_static_activations_refuse_groups():
    with pytest.raises(ValueError, match="group=0"):
        recipes.parse("activations(group=16,static=true)")


def test_presets_run(make_model):
    """All of them on one block whose rows no group of 64 or 128 divides."""
    sizes = {"hidden_size": 96, "head_dim": 24, "num_hidden_layers": 1}
    before = logits(make_model("llama", **sizes))
    for name, text in recipes.presets().items():
        after = logits(walk(make_model("llama", **sizes), name))
        assert after.isfinite().all(), name
        if "bits=8" in text and "bits=4" not in text:
            error = (after - before).square().mean() / before.square().mean()
            assert math.sqrt(error) < 0.2, name


def test_methods_are_described_for_people():
    for kind in KINDS:
        cls: type[Method] = METHODS.load()[kind]
        assert cls.summary().endswith(".")
        assert len(cls.summary()) < 130
