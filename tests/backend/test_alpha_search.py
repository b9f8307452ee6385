"""SmoothQuant's alpha, searched per norm: against brute force, and what it reports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.layer import smooth
from backend.methods.smoothquant import SmoothQuant
from backend.metrics.base import Measurement
from backend.model.checkpoint import Checkpoint
from backend.model.families import blocks_of
from backend.model.stats import AbsMax, SpreadSample
from backend.pipeline import quantize
from backend.recipes import parse


@pytest.fixture
def ids():
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))


def walk(model, recipe: str, ids, folder) -> list[Measurement]:
    """The alphas reported on the way; the model is changed in place."""
    found: list[Measurement] = []
    quantize(model, parse(recipe), ids, Checkpoint(folder), measure=found.append)
    return [m for m in found if m.name == "alpha"]


def rounded(x: Tensor, bits: int) -> Tensor:
    """Each row on 2^bits - 1 levels up to its peak."""
    step = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def inputs_of(model, ids, name: str) -> Tensor:
    """What a linear of block 0 receives [T, K]."""
    got: list[Tensor] = []
    linear = blocks_of(model)[0].get(name)
    hook = linear.register_forward_pre_hook(lambda module, given: got.append(given[0][0]))
    for row in ids:
        model(row[None])
    hook.remove()
    return torch.cat(got)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_alpha_is_the_best_of_the_grid_by_hand(bits, make_model, ids, tmp_path):
    model = make_model("llama")
    model.model.layers[0].input_layernorm.weight[3] *= 40  # an outlier channel
    x = inputs_of(model, ids, "self_attn.q_proj")
    weights = [blocks_of(model)[0].get(f"self_attn.{n}_proj").weight.clone() for n in "qkv"]
    peak, largest = x.abs().amax(0), torch.cat(weights).abs().amax(0)
    losses = []
    for i in range(11):
        s = peak ** (i / 10) / largest ** (1 - i / 10)
        q = rounded(x / s, bits)
        losses.append(
            sum((q @ rounded(w * s, bits).T - x @ w.T).square().sum().item() for w in weights)
        )
    first, *_ = walk(model, f"smoothquant(search=10,search_bits={bits})", ids, tmp_path)
    assert first.layer == (0, "input_layernorm")
    assert first.value == losses.index(min(losses)) / 10
    # Products are summed in another order; a rounding that falls on a tie moves a loss by more.
    assert list(first.detail["losses"]) == pytest.approx(losses, rel=0.02)
    assert len(set(losses)) > 5


def test_every_norm_reports_an_alpha_and_outputs_stay(make_model, ids, tmp_path):
    model = make_model("llama", dtype="float64")
    before = model(ids).logits
    found = walk(model, "smoothquant(search=10)", ids, tmp_path)
    assert [m.layer for m in found] == [
        (block, norm)
        for block in range(3)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    assert all(0 <= m.value <= 1 and m.n == ids.numel() for m in found)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-9, atol=1e-9)


def test_a_search_of_its_own_alpha_equals_giving_it(make_model, ids, tmp_path):
    searched, given = make_model("llama"), make_model("llama")
    alphas = walk(searched, "smoothquant(search=4)", ids, tmp_path / "a")
    rules = ",".join(f"on(blocks={m.layer[0]},alpha={m.value})" for m in alphas[::2])
    walk(given, f"smoothquant(layers=[{rules}])", ids, tmp_path / "b")
    for a, b in zip(blocks_of(searched), blocks_of(given), strict=True):
        assert torch.equal(a.get("input_layernorm").weight, b.get("input_layernorm").weight)


def test_only_a_search_keeps_tokens():
    assert SmoothQuant().wanted() == (AbsMax,)
    assert SmoothQuant(search=20).wanted() == (AbsMax, SpreadSample)


def test_a_norm_alone_cannot_be_searched(make_model):
    block = blocks_of(make_model("llama"))[0]
    readers = [block.get(f"self_attn.{n}_proj") for n in "qkv"]
    with pytest.raises(ValueError, match="give alpha alone"):
        smooth(block.get("input_layernorm"), readers, torch.ones(64), SmoothQuant(search=4))
