"""ZeroQuant: its grids against brute force, what must hold, and that LKD only ever helps."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.recipe_words import recipe_of_steps
from backend import recipes
from backend.formats.int_group import IntGroup
from backend.layer import quantize_block, quantize_layer
from backend.methods.base import Seen
from backend.methods.rtn import RTN
from backend.methods.zeroquant import (
    SCHEDULES,
    BlockInputs,
    Lesson,
    PieceLinear,
    Rounding,
    RoundingLinear,
    ZeroQuant,
)
from backend.metrics.base import Measurement
from backend.model.checkpoint import Checkpoint
from backend.model.families import FAMILIES, Block, blocks_of
from backend.model.quant_linear import QuantLinear
from backend.model.stats import LayerStats
from backend.pipeline import Cancelled, quantize
from backend.spec import ModelRef, RunSpec

LEARNING = {"bits_attn": 3, "bits_ffn": 3, "bits_a": 16, "lkd_steps": 40, "lkd_rate": 1e-3}


class Forgetful:
    """A checkpoint that only counts."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def has(self, index: int) -> bool:
        return False

    def save(self, block: Block) -> None:
        self.saved.append(block.index)

    def restore(self, block: Block) -> None:
        raise AssertionError("nothing was saved")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(n: int = 16, length: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(seed))


def walk(model: Any, text: str, **told: Any) -> tuple[list[Measurement], list[str]]:
    """Applies a recipe -> its measurements, its notes."""
    found: list[Measurement] = []
    notes: list[str] = []
    quantize(
        model,
        recipes.parse(text),
        ids(),
        told.pop("checkpoint", Forgetful()),
        note=lambda block, name, text: notes.append(f"{name}: {text}"),
        measure=found.append,
        **told,
    )
    return found, notes


def full_range(w: Tensor, bits: int, size: int) -> Tensor:
    """DeepSpeed's symmetric grid on runs of `size` weights, one after another, fp16 scales."""
    out = torch.empty_like(w.flatten())
    for start in range(0, w.numel(), size):
        piece = w.flatten()[start : start + size]
        scale = (piece.abs().max() / 2 ** (bits - 1)).half().float()
        top = 2 ** (bits - 1)
        out[start : start + size] = (piece / scale).round().clamp(-top, top - 1) * scale
    return out.view(w.shape)


# ---- the grid ------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "groups"), [((12, 128), 4), ((64, 96), 16)])
def test_groups_that_span_rows_are_packed_in_shorter_ones(shape, groups):
    layer = quantize_layer(ZeroQuant(groups=groups, bits_a=16), normal(*shape)).module
    assert isinstance(layer, PieceLinear)
    w, x = layer.weight.float(), normal(3, shape[1])
    assert torch.equal(layer.by_rows().dequantize(), layer.qtensor.dequantize().view(shape))
    layer.pack(layer.kernel_for("cpu"))
    exact = x @ w.T
    assert (layer(x) - exact).abs().max() <= 0.02 * exact.abs().max()  # bf16 sums


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("groups", "size"),
    [(24, 20), (12, 40), (6, 80), (5, 96), (7, 69), (1, 480), (480, 1), (1000, 1), (96, 5)],
)
def test_groups_are_runs_of_weights_that_may_span_rows(groups, size, bits):
    """Whole rows, parts of rows, several rows, 2.4 rows, a short last run."""
    w = normal(12, 40)
    layer = quantize_layer(ZeroQuant(bits_ffn=bits, bits_a=16, groups=groups), w)
    torch.testing.assert_close(layer.weight, full_range(w, bits, size), rtol=1e-6, atol=0)
    runs = -(-480 // size)
    assert layer.bits_per_weight == pytest.approx(bits + 16 * runs / 480)
    assert (480 % size != 0) == any("do not divide 480 weights" in note for note in layer.notes)


def test_as_many_groups_as_rows_is_a_scale_per_row():
    w = normal(12, 40)
    for method in (ZeroQuant(groups=12), ZeroQuant()):
        layer = quantize_layer(method, w)
        grid = IntGroup(bits=4, symmetric=True, convention="full", scale_dtype="float16")
        assert torch.equal(layer.weight, grid.fake(w))
        assert type(layer.module) is QuantLinear


@pytest.mark.parametrize("group", [0, 16, 24])
def test_without_steps_it_is_group_rounding(group):
    w = normal(12, 40)
    grid = IntGroup(bits=4, group=group, symmetric=True, convention="full", scale_dtype="float16")
    ours = quantize_layer(ZeroQuant(bits_a=16, group=group), w)
    plain = quantize_layer(RTN(format=grid), w)
    assert torch.equal(ours.weight, plain.weight)
    assert ours.bits == plain.bits


def test_without_steps_no_data_is_asked_for():
    assert ZeroQuant().wanted() == ()
    assert ZeroQuant().prefix == "quantized"
    spec = RunSpec(model=ModelRef(id="demo"), steps=(ZeroQuant(),))
    assert not spec.needs_calibration()
    learning = spec.model_copy(update={"steps": (ZeroQuant(lkd_steps=1),)})
    assert learning.needs_calibration()
    assert ZeroQuant(lkd_steps=1).prefix == "original"


def test_a_group_of_zeros_stays_zero():
    w = normal(8, 32)
    w[3] = 0
    for knobs in ({}, {"groups": 8}, {"groups": 64}, {"groups": 3}):
        layer = quantize_layer(ZeroQuant(**knobs), w)
        assert not layer.weight[3].any() or knobs == {"groups": 3}
        assert layer.weight.isfinite().all()


def test_inputs_have_a_scale_per_token():
    w, x = torch.eye(32), normal(20, 32) * torch.arange(1, 21)[:, None]
    layer = quantize_layer(ZeroQuant(bits_ffn=8), w)
    scale = x.abs().amax(1, keepdim=True) / 128
    expected = (x / scale).round().clamp(-128, 127) * scale @ layer.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    one_by_one = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), one_by_one)
    positive = x.abs() + 100
    fine = quantize_layer(ZeroQuant(bits_ffn=8, bits_a=4, symmetric_a=False), w)
    coarse = quantize_layer(ZeroQuant(bits_ffn=8, bits_a=4), w)
    exact = positive @ layer.weight.T
    assert (fine(positive) - exact).norm() < (coarse(positive) - exact).norm()


def test_attention_and_feed_forward_have_their_own_bits(make_model):
    for family in sorted(FAMILIES):
        model = make_model(family)
        walk(model, "zeroquant(bits_attn=8,bits_ffn=4)")
        for block in blocks_of(model):
            for name, linear in block.linears().items():
                attention = "attn" in name or "attention" in name
                assert linear.qtensor.format.bits == (8 if attention else 4), (family, name)


def test_eight_bits_err_far_less_than_four_in_the_ffn(make_model):
    tokens = ids(seed=9)
    exact = make_model("llama")(tokens).logits
    errors = {}
    for name in ("ZeroQuant W8A8", "ZeroQuant W4/8A8", "ZeroQuant W4A4"):
        text = recipes.presets()[name].replace("groups=4096", "groups=0")
        model = make_model("llama")
        walk(model, text)
        errors[name] = (model(tokens).logits - exact).square().mean().item()
    assert errors["ZeroQuant W8A8"] < 0.1 * errors["ZeroQuant W4/8A8"]
    assert errors["ZeroQuant W4/8A8"] < errors["ZeroQuant W4A4"]


def test_the_papers_mix_takes_four_point_eight_bits():
    """Reference, section 5: 4.77 bits for a block of Llama-3.1-8B, scales left out."""
    attention, ffn = 2 * 4096**2 + 2 * 4096 * 1024, 3 * 4096 * 14336
    assert (8 * attention + 4 * ffn) / (attention + ffn) == pytest.approx(4.77, abs=0.005)


@pytest.mark.parametrize("groups", [0, 12, 16, 24, 48, 100])
def test_saved_and_restored_bit_equal(groups, make_model, tmp_path):
    model = make_model("llama", dtype="bfloat16")
    folder = Checkpoint(tmp_path)
    walk(model, f"zeroquant(groups={groups})", checkpoint=folder)
    again = make_model("llama", dtype="bfloat16", seed=1)
    for one, other in zip(blocks_of(model), blocks_of(again), strict=True):
        folder.restore(other)
        for name, linear in one.linears().items():
            restored = other.get(name)
            assert type(restored) is type(linear)
            assert torch.equal(restored.weight, linear.weight)
            assert torch.equal(restored.qtensor.codes, linear.qtensor.codes)
            assert restored.act == linear.act
            assert restored.bits() == linear.bits()


def test_stored_bytes_are_the_bits_it_says():
    w = normal(64, 96)
    layer = quantize_layer(ZeroQuant(groups=100, bits_a=16), w)
    assert isinstance(layer.module, PieceLinear)
    tensors, _ = layer.module.to_state()
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored / w.numel() == pytest.approx(layer.bits_per_weight, rel=0.01)


def test_groups_that_span_rows_are_not_packed_and_take_activations_later():
    layer = quantize_layer(ZeroQuant(groups=5, bits_a=16), normal(12, 40))
    assert "span rows" in layer.module.why_not_packed()
    rounding = layer.module.with_act(IntGroup(bits=8, symmetric=True))
    assert isinstance(rounding, PieceLinear)
    assert torch.equal(rounding.weight, layer.module.weight)
    with pytest.raises(ValueError, match="already rounded"):
        rounding.with_act(IntGroup())
    assert quantize_layer(ZeroQuant(group=20), normal(12, 40)).module.why_not_packed() == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zeroquant(groups=4,group=8)", "give one of them"),
        ("zeroquant(bits_a=12)", "2 to 8 bits, or 16"),
        ("zeroquant(bits_ffn=1)", "bits_ffn = 1"),
        ("zeroquant(lkd_schedule=step)", "lkd_schedule"),
        ("rtn+zeroquant", "keep one weight step"),
        ("zeroquant(lkd_steps=5,layers=[on(modules=down_proj,bits_ffn=8)])", "as a whole"),
        ("zeroquant(layers=[on(modules=down_proj,lkd_steps=5)])", "as a whole"),
    ],
)
def test_bad_knobs_get_one_sentence(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        RunSpec(model=ModelRef(id="demo"), steps=recipes.parse(text))
    assert "\n" not in str(caught.value).splitlines()[0]


def test_a_lone_linear_cannot_be_distilled():
    with pytest.raises(ValueError, match="set lkd_steps=0"):
        quantize_layer(ZeroQuant(lkd_steps=1), normal(8, 16), normal(20, 16))


def test_charts_know_its_bits():
    def words(text: str) -> tuple[str, str, str, str]:
        recipe = recipe_of_steps([step.data() for step in recipes.parse(text)])
        return recipe.name, recipe.bits, recipe.act_bits, recipe.target

    both = "weights + activations"
    assert words("ZeroQuant W8A8") == ("ZeroQuant W8A8", "8", "8", both)
    assert words("ZeroQuant W4/8A16") == ("ZeroQuant W4/8A16", "4", "16", "weights")
    assert words("zeroquant(bits_a=4)")[1:] == ("4", "4", both)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("zeroquant", ["activations", "weights"]),
        ("zeroquant(bits_a=16)", ["weights"]),
        ("zeroquant(bits_a=16)+activations", ["activations", "weights"]),
        ("zeroquant(bits_a=16,layers=[on(blocks=first,bits_a=8)])", ["activations", "weights"]),
    ],
)
def test_inputs_of_16_bits_are_no_target(text, targets):
    spec = RunSpec(model=ModelRef(id="demo"), steps=recipes.parse(text))
    assert spec.targets() == targets


# ---- LKD -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_learns_and_no_block_ends_worse(family, make_model):
    text = recipes.render((ZeroQuant(**{**LEARNING, "lkd_steps": 10, "lkd_batch": 8}),))
    model = make_model(family)
    found, _ = walk(model, text)
    gains = [m for m in found if m.name == "lkd_gain"]
    assert [m.layer for m in gains] == [(index, "") for index in range(3)]
    assert all(m.value <= 1 for m in gains)
    assert any(m.value < 0.99 for m in gains)
    assert model(ids(seed=1)).logits.isfinite().all()
    assert not any(p.requires_grad for p in model.parameters())


def test_the_best_step_is_what_the_block_becomes(make_model):
    """The final block's loss, from its own forward pass, is the least of the curve."""
    block = blocks_of(make_model("llama"))[0].module
    x = normal(16, 24, 64)
    found: list[Measurement] = []
    made = quantize_block([ZeroQuant(**LEARNING)], block, x, measure=found.append)
    (gain,) = [m for m in found if m.name == "lkd_gain"]
    curve = gain.detail["held_out"]
    assert gain.value == min(curve) / curve[0] < 0.99
    assert gain.detail["step"] == gain.detail["steps"][curve.index(min(curve))]
    exact, ours = held_out_outputs(block, made, x)
    loss = (ours - exact).square().mean() / exact.var(dim=(1, 2)).mean()
    assert loss.item() == pytest.approx(min(curve), rel=1e-4)
    plain = quantize_block([ZeroQuant(**{**LEARNING, "lkd_steps": 0})], block, x)
    exact, ours = held_out_outputs(block, plain, x)
    loss = (ours - exact).square().mean() / exact.var(dim=(1, 2)).mean()
    assert loss.item() == pytest.approx(curve[0], rel=1e-4)


def held_out_outputs(block: nn.Module, made: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of both for the last eighth of the sequences."""
    from backend.layer import arguments_of, config_of

    arguments = arguments_of(config_of(block), block, x)
    with torch.no_grad():
        return block(x[-2:], **arguments), made(x[-2:], **arguments)


def test_the_curve_can_be_queried_step_by_step(make_model):
    found, _ = walk(make_model("llama"), recipes.render((ZeroQuant(**LEARNING),)))
    losses = [m for m in found if m.name == "lkd_loss" and m.layer and m.layer[0] == 1]
    (gain,) = [m for m in found if m.name == "lkd_gain" and m.layer == (1, "")]
    assert [m.value for m in losses] == gain.detail["held_out"]
    assert [m.layer[1] for m in losses] == [f"step {s:04d}" for s in gain.detail["steps"]]
    assert len({m.layer for m in losses}) == len(losses)


def test_the_teacher_is_the_original_model(make_model):
    """Later blocks learn on inputs without the rounding errors of earlier ones."""
    model = make_model("llama")
    original = deepcopy(model)
    seen: list[Tensor] = []

    class Spy(ZeroQuant):
        def lesson(self, block: Block, names: list[str], shown: Seen) -> Lesson:
            lesson = super().lesson(block, names, shown)
            seen.append(torch.cat([lesson.sequences, lesson.held_out]))
            return lesson

    quantize(model, [Spy(bits_ffn=2, lkd_steps=1)], ids(), Forgetful())
    states = original(ids(), output_hidden_states=True).hidden_states
    for block in range(3):
        torch.testing.assert_close(seen[block], states[block], rtol=1e-4, atol=1e-4)


def test_masters_are_fp32_and_gradients_pass_straight_through(make_model):
    linear = nn.Linear(16, 8).requires_grad_(True)
    grid = IntGroup(bits=3, symmetric=True, convention="full")
    student = RoundingLinear(linear, torch.Size((8, 16)), grid, None)
    x = normal(5, 16)
    y = student(x)
    torch.testing.assert_close(y, x @ grid.fake(linear.weight.detach()).T + linear.bias)
    y.sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(8, 16))
    value = torch.tensor([0.4, 1.6], requires_grad=True)
    Rounding.apply(value, torch.round).sum().backward()
    assert torch.equal(value.grad, torch.ones(2))

    found, _ = walk(make_model("llama", dtype="bfloat16"), recipes.render((ZeroQuant(**LEARNING),)))
    assert all(m.value <= 1 for m in found if m.name == "lkd_gain")


def test_small_steps_that_bf16_would_lose_still_add_up(make_model):
    """5e-6 is far below a bf16 unit of these weights; fp32 masters carry it."""
    step = ZeroQuant(bits_ffn=4, bits_a=16, lkd_steps=100, lkd_rate=5e-6, lkd_patience=20)
    found, _ = walk(make_model("llama", dtype="bfloat16"), recipes.render((step,)))
    assert all(m.value < 1 for m in found if m.name == "lkd_gain")


def test_a_loss_that_rises_ends_the_training(make_model):
    """A rate far too high: three checks without a new best, then stop, and the start is kept."""
    knobs = {**LEARNING, "lkd_steps": 200, "lkd_rate": 1e-2, "bits_attn": 8, "bits_ffn": 8}
    found, notes = walk(make_model("llama"), recipes.render((ZeroQuant(**knobs),)))
    for gain in (m for m in found if m.name == "lkd_gain"):
        best = gain.detail["steps"].index(gain.detail["step"])
        assert len(gain.detail["steps"]) == best + 1 + 3
        assert gain.detail["steps"][-1] < 200
    kept = sum(m.detail["step"] == 0 for m in found if m.name == "lkd_gain")
    assert kept
    assert sum("at no step" in note for note in notes) == kept


def test_one_sequence_is_both_and_says_so(make_model):
    found: list[str] = []
    block = blocks_of(make_model("llama"))[0].module
    step = ZeroQuant(**{**LEARNING, "lkd_steps": 2})
    quantize_block([step], block, normal(1, 24, 64), note=found.append)
    assert any("one calibration sequence" in note for note in found)


def test_a_cancelled_run_keeps_no_half_trained_block(make_model):
    checkpoint, late = Forgetful(), []

    def stop() -> bool:
        late.extend([1] * len(checkpoint.saved))
        return len(late) > 30  # in the middle of the second block's steps

    text = recipes.render((ZeroQuant(**{**LEARNING, "lkd_steps": 60, "lkd_patience": 20}),))
    with pytest.raises(Cancelled):
        walk(make_model("llama"), text, checkpoint=checkpoint, should_stop=stop)
    assert checkpoint.saved == [0]


def test_the_same_seed_gives_the_same_weights(make_model):
    text = recipes.render((ZeroQuant(**{**LEARNING, "lkd_steps": 10}),))
    one, same, other = make_model("llama"), make_model("llama"), make_model("llama")
    walk(one, text, seed=1)
    walk(same, text, seed=1)
    walk(other, text, seed=2)
    name = "model.layers.1.mlp.down_proj"
    weight = one.get_submodule(name).weight
    assert torch.equal(weight, same.get_submodule(name).weight)
    assert not torch.equal(weight, other.get_submodule(name).weight)


def test_progress_reaches_the_end(make_model):
    shares: list[float] = []
    text = recipes.render((ZeroQuant(**{**LEARNING, "lkd_patience": 20}),))
    walk(
        make_model("llama"), text, progress=lambda block, blocks, item, share: shares.append(share)
    )
    assert shares == sorted(shares)
    assert len(shares) > 3 * 20
    assert shares[-1] == 1


def test_only_the_last_block_learns_under_a_rule(make_model):
    found, _ = walk(
        make_model("llama"),
        "zeroquant(bits_ffn=3,layers=[on(blocks=last,lkd_steps=10,lkd_rate=0.001)])",
    )
    assert [m.layer for m in found if m.name == "lkd_gain"] == [(2, "")]


def test_kept_linears_stay_as_they_are(make_model):
    model, before = make_model("llama"), make_model("llama")
    knobs = "bits_ffn=3,lkd_steps=10,lkd_rate=0.001"
    walk(model, f"zeroquant({knobs},layers=[on(modules=down_proj,keep=true)])")
    for one, other in zip(blocks_of(model), blocks_of(before), strict=True):
        kept = one.get("mlp.down_proj")
        assert isinstance(kept, nn.Linear)
        assert torch.equal(kept.weight, other.get("mlp.down_proj").weight)
        assert isinstance(one.get("mlp.up_proj"), QuantLinear)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_start_whole_and_never_rise(name):
    values = [SCHEDULES[name](i / 20) for i in range(21)]
    assert values[0] == 1
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(1 if name == "constant" else 0)


def test_a_statistic_that_only_asks():
    stats = LayerStats({BlockInputs: BlockInputs(4)})
    stats.update(normal(3, 4))
    assert BlockInputs in stats


def test_presets_cover_the_tables():
    names = [name for name in recipes.presets() if name.startswith("ZeroQuant")]
    for name in ("W8A8", "W4/8A16", "W4/8A8", "W4A4"):
        assert f"ZeroQuant {name}" in names
    assert sum("last layer" in name for name in names) == 7


def test_estimates_know_what_training_costs():
    assert ZeroQuant().passes(128, 2048) == 0
    few, many = (ZeroQuant(lkd_steps=steps).passes(128, 2048) for steps in (100, 600))
    assert few == 4 * 100 * 4 / 128 + 5
    assert many - few == 4 * 500 * 4 / 128
