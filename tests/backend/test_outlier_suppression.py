"""Outlier Suppression: migration changes nothing, ranges against brute force, no stage loses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backend import recipes
from backend.formats.int_group import IntGroup
from backend.layer import quantize_layer
from backend.methods.outlier_suppression import (
    FLOOR,
    LearnedRange,
    OutlierSuppression,
    TokenRange,
    gamma,
    migrate,
    params_of,
)
from backend.methods.smoothquant import fold
from backend.metrics.base import Measurement
from backend.model.checkpoint import Checkpoint
from backend.model.families import FAMILIES, Block, Family, NormFeed, blocks_of
from backend.model.quant_linear import QuantLinear
from backend.pipeline import quantize

FOLDER = Path(__file__).parents[3] / "shared" / "vectors"
needs_vectors = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no test vectors at {FOLDER}")
FED = sorted(name for name, family in FAMILIES.items() if family.norm_feeds)


class Forgetful:
    """A checkpoint that keeps nothing."""

    def has(self, index: int) -> bool:
        return False

    def save(self, block: Block) -> None:
        pass

    def restore(self, block: Block) -> None:
        raise AssertionError("nothing was saved")


class MigrationOnly(OutlierSuppression):
    """Without its rounding."""

    def waves(self, block: Block) -> list[list[str]]:
        return [[]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(n: int = 8, length: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(seed))


def walk(
    model: Any, method: OutlierSuppression, **told: Any
) -> tuple[list[Measurement], list[str]]:
    """Applies one step -> its measurements, its notes."""
    found: list[Measurement] = []
    notes: list[str] = []
    quantize(
        model,
        [method],
        ids(),
        told.pop("checkpoint", Forgetful()),
        note=lambda block, name, text: notes.append(f"{name}: {text}"),
        measure=found.append,
    )
    return found, notes


# ---- gamma migration -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FED)
def test_migration_alone_changes_no_output(family, make_model):
    model = make_model(family, dtype="float64")
    before = model(ids(seed=1)).logits
    walk(model, MigrationOnly())
    # Gemma's norms compute 1 + weight in fp32 whatever the model's dtype.
    tolerance = 1e-4 if FAMILIES[family].norm_offset else 1e-9
    torch.testing.assert_close(model(ids(seed=1)).logits, before, rtol=tolerance, atol=tolerance)
    for block in blocks_of(model):
        for feed in block.family.norm_feeds:
            gain = block.get(feed.norm).weight + block.family.norm_offset
            torch.testing.assert_close(gain, torch.ones_like(gain))


def test_migration_alone_in_fp32(make_model):
    model = make_model("opt")
    before = model(ids(seed=1)).logits
    walk(model, MigrationOnly())
    after = model(ids(seed=1)).logits
    assert (after - before).abs().max() <= 5e-6 * before.abs().max()


def norm_and_readers(seed: int = 0) -> Block:
    """A LayerNorm with weights of both signs and near 0, and two linears that read it."""
    norm = nn.LayerNorm(32)
    linears = {f"fc{i}": nn.Linear(32, 24) for i in range(2)}
    with torch.no_grad():
        norm.weight.copy_(normal(32, seed=seed))
        norm.weight[3], norm.weight[4] = 0, -1e-7
        norm.bias.copy_(normal(32, seed=seed + 1))
    family = Family("", (), "", (NormFeed("norm", tuple(linears)),), (tuple(linears),))
    parts = nn.ModuleDict({"norm": norm, **linears}).double().requires_grad_(False)
    return Block(0, parts, family)


def test_migration_is_smoothquants_fold_with_gamma_for_its_scale():
    ours, theirs = norm_and_readers(), norm_and_readers()
    theirs.module.load_state_dict(ours.module.state_dict())
    migrate(ours)
    norm = theirs.get("norm")
    readers = [theirs.get("fc0"), theirs.get("fc1")]
    fold(norm, readers, gamma(norm, 0.0), 0.0)
    for one, other in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_signs_move_along_and_tiny_gammas_do_not_explode():
    block, x = norm_and_readers(), normal(50, 32).double()
    before = [block.get(name)(block.get("norm")(x)) for name in ("fc0", "fc1")]
    g, bias = block.get("norm").weight.clone(), block.get("norm").bias.clone()
    migrate(block)
    after = [block.get(name)(block.get("norm")(x)) for name in ("fc0", "fc1")]
    for y, exact in zip(after, before, strict=True):
        torch.testing.assert_close(y, exact, rtol=1e-9, atol=1e-9)
    norm = block.get("norm")
    ordinary = g.abs() >= FLOOR
    torch.testing.assert_close(norm.weight[ordinary], torch.ones(30).double())
    torch.testing.assert_close(norm.bias[ordinary], bias[ordinary] / g[ordinary])
    assert (norm.bias.abs() <= bias.abs() / FLOOR * 1.001).all()
    assert norm.bias.half().isfinite().all()


@needs_vectors
@torch.no_grad()
def test_migration_on_the_vectors_norm():
    """smoothquant_a's LayerNorm and readers, s = gamma: the readers' outputs stay the same."""
    with np.load(FOLDER / "smoothquant_a.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    norm = nn.LayerNorm(64)
    norm.weight.copy_(data["in_norm_weight"])
    norm.bias.copy_(data["in_norm_bias"])
    names = ("fc0", "fc1", "fc2")
    linears = {n: nn.Linear(64, len(data[f"in_{n}"]), bias=False) for n in names}
    for n in names:
        linears[n].weight.copy_(data[f"in_{n}"])
    family = Family("", (), "", (NormFeed("norm", names),), (names,))
    block = Block(0, nn.ModuleDict({"norm": norm, **linears}), family)
    x = data["in_hidden"].reshape(-1, 64)
    before = {n: linears[n](norm(x)) for n in names}
    migrate(block)
    for n in names:
        scale = before[n].abs().max()
        assert (linears[n](norm(x)) - before[n]).abs().max() <= 1e-5 * scale


def test_norms_that_feed_the_residual_are_refused(make_model):
    for model in (make_model("opt", do_layer_norm_before=False), make_model("olmo2")):
        with pytest.raises(ValueError, match=r"cannot give up their weights.*migrate=false"):
            walk(model, OutlierSuppression())
        walk(model, OutlierSuppression(migrate=False, bits_a=8))
        assert model(ids(seed=1)).logits.isfinite().all()


# ---- token-wise clipping -------------------------------------------------------------------


def brute_range(batches: list[Tensor], share: float, keep_first: bool) -> tuple[float, float]:
    """By the definition: quantiles over tokens with interpolation, token by token."""
    lows, highs = [], []
    for x in batches:  # [B, T, K]
        tokens = [x[b, t] for b in range(x.shape[0]) for t in range(x.shape[1])]
        first = [t for t in range(len(tokens)) if keep_first and t % x.shape[1] == 0]
        rest = [t for t in range(len(tokens)) if t not in first]
        peaks = np.array([tokens[t].max().item() for t in rest])
        dips = np.array([tokens[t].min().item() for t in rest])
        upper, lower = np.quantile(np.abs(peaks), share), -np.quantile(np.abs(dips), share)
        high = max(p for p in peaks if p <= upper + 1e-9)
        low = min(d for d in dips if d >= lower - 1e-9)
        highs.append(max([high, *(tokens[t].max().item() for t in first)]))
        lows.append(min([low, *(tokens[t].min().item() for t in first)]))
    return float(np.mean(lows)), float(np.mean(highs))


@pytest.mark.parametrize("keep_first", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.99, 0.9, 0.75, 0.1])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_ranges_equal_brute_force(share, keep_first, shift):
    batches = [normal(3, 37, 12, seed=seed) + shift for seed in range(4)]
    stat = TokenRange(12)
    for batch in batches:
        stat.update(batch)
    low, high = stat.clipped(share, keep_first)
    exact = brute_range(batches, share, keep_first)
    assert (low.item(), high.item()) == pytest.approx(exact, rel=1e-5)


def test_the_whole_share_is_the_average_of_extremes():
    stat = TokenRange(8)
    batches = [normal(2, 20, 8, seed=seed) for seed in range(3)]
    for batch in batches:
        stat.update(batch)
    low, high = stat.clipped(1.0, keep_first=False)
    torch.testing.assert_close(high, torch.stack([b.max() for b in batches]).mean())
    torch.testing.assert_close(low, torch.stack([b.min() for b in batches]).mean())


def test_the_first_token_is_never_clipped():
    stat, x = TokenRange(8), normal(4, 30, 8)
    x[:, 0, 2] = 50
    x[1, 5, 3] = 40
    stat.update(x)
    for share in (0.9, 0.5):
        assert stat.clipped(share, keep_first=True)[1] == 50
        assert stat.clipped(share, keep_first=False)[1] < 50


def test_lower_shares_give_narrower_ranges():
    stat = TokenRange(16)
    stat.update(normal(8, 64, 16))
    ranges = [stat.clipped(share, keep_first=False) for share in SHARES]
    widths = [(high - low).item() for low, high in ranges]
    assert widths == sorted(widths, reverse=True)


SHARES = [1 - i / 20 for i in range(20)]


@pytest.mark.parametrize(("bits", "tried"), [(8, 10), (7, 30), (6, 30), (5, 90), (4, 90)])
def test_as_many_shares_as_the_released_code_tries(bits, tried):
    shares = OutlierSuppression(bits_a=bits).shares()
    assert len(shares) == tried
    assert shares[0] == 1
    assert shares[1] == pytest.approx(0.99)
    assert shares[-1] > 0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_stage_raises_the_loss_in_any_family(family, make_model):
    model = make_model(family)
    knobs = {"migrate": bool(FAMILIES[family].norm_feeds), "clip_step": 0.05, "fine_rate": 0.01}
    found, notes = walk(model, OutlierSuppression(bits_a=6, fine_epochs=1, **knobs))
    for name in ("clip_gain", "fine_gain"):
        gains = [m for m in found if m.name == name]
        assert [m.layer for m in gains] == [(index, "") for index in range(3)]
        assert all(m.value <= 1 for m in gains)
    chosen = [m for m in found if m.name == "clip_share"]
    for m in chosen:
        losses = m.detail["losses"]
        assert m.value == m.detail["shares"][losses.index(min(losses))]
        assert min(losses) <= losses[0]
    assert not notes
    assert model(ids(seed=1)).logits.isfinite().all()
    for block in blocks_of(model):
        assert all(isinstance(linear, QuantLinear) for linear in block.linears().values())
    assert not any(p.requires_grad for p in model.parameters())


def test_the_loss_that_was_measured_is_that_of_the_finished_block(make_model):
    """One block, no earlier errors: the reported loss again from two whole models."""
    exact, model = (make_model("llama", num_hidden_layers=1) for _ in range(2))
    found, _ = walk(model, OutlierSuppression(bits_a=5, clip_step=0.05, fine_rate=0.01))
    (fine,) = [m for m in found if m.name == "fine_gain"]
    hidden = [
        m(ids(), output_hidden_states=True).hidden_states for m in (exact, model)
    ]  # the last one is after the final norm: take the block's own output by a hook instead
    outputs: list[Tensor] = []
    for m in (exact, model):
        hook = m.model.layers[0].register_forward_hook(
            lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        m(ids())
        hook.remove()
    torch.testing.assert_close(hidden[0][0], hidden[1][0])
    loss = (outputs[1] - outputs[0]).square().mean().item()
    assert loss == pytest.approx(fine.detail["loss"], rel=1e-4)


def test_clipping_rare_tokens_pays_where_they_do_not_matter(make_model):
    """A few tokens far out: without clipping they set the scale for all others."""
    model = make_model("llama", num_hidden_layers=1)
    rare = 7
    model.get_input_embeddings().weight[rare] *= 30
    tokens = ids(16, 64)
    tokens[:, 5] = rare
    outputs = {}
    for name, clip in (("whole", False), ("clipped", True)):
        work = make_model("llama", num_hidden_layers=1)
        work.load_state_dict(model.state_dict())
        step = OutlierSuppression(bits_a=6, clip=clip, fine_epochs=0, migrate=True)
        quantize(work, [step], tokens, Forgetful())
        outputs[name] = work(tokens).logits
    exact = model(tokens).logits
    others = torch.arange(64) != 5
    error = {k: (y - exact)[:, others].square().mean().item() for k, y in outputs.items()}
    assert error["clipped"] <= error["whole"]


def test_a_learned_range_rounds_as_the_grid_does_and_has_gradients():
    grid = IntGroup(bits=4, symmetric=False)
    ends = (torch.tensor(-1.0), torch.tensor(2.0))
    linear = QuantLinear(
        normal(6, 10), normal(6), act=grid, act_params=params_of(grid, ends), dtype=torch.float32
    )
    learned, x = LearnedRange(linear, ends), 2 * normal(20, 10)
    torch.testing.assert_close(learned(x), linear(x), rtol=1e-5, atol=1e-5)
    learned(x).square().mean().backward()
    assert learned.factors.grad.abs().min() > 0
    low, high = learned.ends()
    assert (low.item(), high.item()) == (-1, 2)


def test_training_the_ends_finds_a_better_range():
    """From a range three times too wide, at 4 bits, the ends move inwards and the error falls."""
    grid = IntGroup(bits=4, symmetric=False)
    ends = (torch.tensor(-9.0), torch.tensor(9.0))
    linear = QuantLinear(torch.eye(8), None, act=grid, act_params={}, dtype=torch.float32)
    learned, x = LearnedRange(linear, ends), normal(512, 8)
    optimizer = torch.optim.Adam([learned.factors], lr=0.01)
    losses = []
    for _ in range(100):
        loss = (learned(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    low, high = learned.ends()
    assert -9 < low < 0 < high < 9
    assert losses[-1] < 0.5 * losses[0]


# ---- the step ------------------------------------------------------------------------------


def test_what_it_makes_of_a_lone_linear():
    """Per-row symmetric weights, one asymmetric scale for inputs, averaged over no batches."""
    w, x = normal(8, 32), normal(200, 32) + 1
    step = {"kind": "outlier_suppression", "bits_a": 6, "keep_first": False}
    layer = quantize_layer(step, w, x)
    assert torch.equal(layer.weight, IntGroup(bits=8, symmetric=True).fake(w))
    scale = (x.max() - x.min()) / 63
    zero = (-x.min() / scale).round()
    rounded = ((x / scale).round() + zero).clamp(0, 63).sub(zero) * scale
    torch.testing.assert_close(layer(x), rounded @ layer.weight.T, rtol=1e-5, atol=1e-4)
    assert layer(torch.full((1, 32), 1e-6)).count_nonzero() == 0  # the scale does not follow x
    assert layer.notes == ["no block inputs to search with; ranges cover all tokens"]


def test_few_tokens_are_noted():
    layer = quantize_layer({"kind": "outlier_suppression"}, normal(8, 32), normal(99, 32))
    assert any("fewer than 100 tokens" in note for note in layer.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outlier_suppression(bits_a=16)", "bits_a = 16"),
        ("outlier_suppression(clip_step=0)", "clip_step"),
        ("outlier_suppression(gamma=true)", "unknown knob 'gamma'"),
        ("outlier_suppression(layers=[on(modules=down_proj,bits=8)])", "as a whole"),
    ],
)
def test_bad_knobs_get_one_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        recipes.parse(text)


def test_without_inputs_it_says_so():
    with pytest.raises(ValueError, match="needs calibration inputs"):
        quantize_layer({"kind": "outlier_suppression"}, normal(8, 32))


def test_saved_and_restored_bit_equal(make_model, tmp_path):
    model = make_model("llama", dtype="bfloat16")
    folder = Checkpoint(tmp_path)
    walk(model, OutlierSuppression(bits_a=6, clip_step=0.1), checkpoint=folder)
    again = make_model("llama", dtype="bfloat16", seed=1)
    for one, other in zip(blocks_of(model), blocks_of(again), strict=True):
        folder.restore(other)
        for name, value in one.module.state_dict().items():
            assert torch.equal(value, other.module.state_dict()[name])
        for name, linear in one.linears().items():
            restored = other.get(name)
            assert restored.act == linear.act
            for key, value in linear.act_params.items():
                assert torch.equal(value, restored.act_params[key])


def test_bits_of_presets():
    for bits in (8, 6, 4):
        (step,) = recipes.parse(f"Outlier Suppression W{bits}A{bits}")
        assert (step.format.bits, step.bits_a, step.format.symmetric) == (bits, bits, True)
        assert math.isclose(step.code_bits("activations"), bits)
