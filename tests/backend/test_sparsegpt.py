"""SparseGPT against magnitude pruning, GPTQ, brute force and the sum of its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.formats.int_group import IntGroup
from backend.layer import quantize_layer
from backend.methods.gptq import inverse_factor
from backend.methods.pruning import BUCKETS
from backend.methods.sparsegpt import Rounding, SparseGPT
from backend.model.families import FAMILIES, Block
from backend.model.quant_linear import PLAIN_BITS
from backend.model.stats import Hessian, LayerStats


def inputs(tokens: int, k: int, seed: int = 0) -> Tensor:
    """[tokens, k] fp64 inputs whose channels depend on each other; two are outliers."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=make, dtype=torch.float64) / k**0.5
    mix += 0.5 * torch.eye(k, dtype=torch.float64)
    x = torch.randn(tokens, k, generator=make, dtype=torch.float64) @ mix
    x[:, 3] *= 20
    x[:, k // 2] *= 10
    return x


def weights(n: int, k: int, seed: int = 1) -> Tensor:
    """[n, k] fp64."""
    return 0.05 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).double()


def hessian(x: Tensor) -> Tensor:
    """[K, K] fp64, 2 / T x^T x."""
    return 2 / len(x) * x.T @ x


def damped(h: Tensor, damping: float = 0.01) -> Tensor:
    """h + damping mean(diag h) I."""
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def step(**knobs: Any) -> dict[str, Any]:
    """A sparsegpt step with fp32 scales and values."""
    return {"kind": "sparsegpt", "scale_dtype": "float32", "value_dtype": "float32", **knobs}


def output_error(x: Tensor, w: Tensor, rounded: Tensor) -> float:
    """Sum of squared differences of the outputs."""
    return (x.double() @ (w.double() - rounded.double()).T).square().sum().item()


def walked(w: Tensor, h: Tensor, **knobs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One fp64 walk -> values [N, K], where they stay [N, K], scaled errors [N, K]."""
    method, factor = SparseGPT(**knobs), inverse_factor(h, 0.01)
    assert factor is not None
    return method.walk(w, factor, None if method.grid is None else Rounding(method.grid, w))


HOW = [
    {"sparsity": 0.5, "block": 16},
    {"sparsity": 0.8, "block": 128},
    {"pattern": "2:4", "block": 16},
    {"pattern": "4:8", "block": 10},
    {"sparsity": 0.5, "bits": 4},
    {"pattern": "2:4", "bits": 3, "group": 16},
]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_errors_sum_to_the_loss(how):
    w, h = weights(9, 48), hessian(inputs(200, 48))
    values, keep, errors = walked(w, h, **how)
    assert not values[~keep].any()
    loss = ((w - values) @ damped(h) @ (w - values).T).trace()
    torch.testing.assert_close(errors.square().sum(), loss, rtol=1e-9, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.77])
@pytest.mark.parametrize("block", [16, 20, 128])
def test_every_block_of_columns_has_the_share_asked_for(block, share):
    w, h = weights(7, 48), hessian(inputs(200, 48))
    _, keep, _ = walked(w, h, sparsity=share, block=block)
    for part in keep.split(block, dim=1):
        assert (~part).sum().item() == round(share * part.numel())


@pytest.mark.parametrize("pattern", BUCKETS)
@pytest.mark.parametrize("bits", [16, 4])
def test_every_bucket_has_its_zeros(pattern, bits):
    gone, of = BUCKETS[pattern]
    w, x = weights(16, 64).float(), inputs(300, 64).float()
    pruned = quantize_layer(step(pattern=pattern, bits=bits), w, x)
    dropped = ~pruned.module.keep.view(16, -1, of)
    assert (dropped.sum(-1) == gone).all()
    assert not pruned.weight.view(16, -1, of)[dropped].any()
    if bits == 16:
        assert ((pruned.weight.view(16, -1, of) == 0).sum(-1) == gone).all()


def brute_force(w: Tensor, h: Tensor, gone: int, of: int) -> Tensor:
    """n:m with an inverse that shrinks column by column; scores from inverses within the bucket."""
    w = w.clone()
    n, k = w.shape
    for start in range(0, k, of):
        # U_cc^2 of a column is the first diagonal entry of the inverse over it and those after it.
        diagonal = [torch.linalg.inv(h[c:, c:])[0, 0] for c in range(start, start + of)]
        score = w[:, start : start + of].square() / torch.stack(diagonal)
        drop = torch.zeros(n, of, dtype=torch.bool)
        drop.scatter_(1, score.argsort(1)[:, :gone], True)
        for at in range(of):
            c, column = start + at, w[:, start + at].clone()
            inverse = torch.linalg.inv(h[c:, c:])
            value = column.masked_fill(drop[:, at], 0)
            w[:, c:] -= ((column - value) / inverse[0, 0])[:, None] * inverse[0]
            w[:, c] = value
    return w


@pytest.mark.parametrize("pattern", BUCKETS)
@pytest.mark.parametrize("seed", range(3))
def test_buckets_equal_brute_force(pattern, seed):
    w, h = weights(6, 24, seed), hessian(inputs(100, 24, seed))
    values, _, _ = walked(w, h, pattern=pattern, block=7)
    torch.testing.assert_close(
        values, brute_force(w, damped(h), *BUCKETS[pattern]), rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize("seed", range(3))
def test_what_stays_after_the_last_zero_is_the_least_squares_answer(seed):
    """All zeros in the first block: the columns after it are refitted on the inputs."""
    w, h = weights(4, 12, seed), hessian(inputs(100, 12, seed))
    values, _, _ = walked(w, h, pattern="2:4", block=4)
    first = values[:, :4]
    factor = damped(h)
    refitted = w[:, 4:] + (w[:, :4] - first) @ factor[:4, 4:] @ torch.linalg.inv(factor[4:, 4:])
    again, _, _ = walked(torch.cat([first, refitted], 1), h, pattern="2:4", block=4)
    torch.testing.assert_close(again, values, rtol=1e-8, atol=1e-12)


PATTERNS = [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8"}]


@pytest.mark.parametrize("how", [*PATTERNS, {"sparsity": 0.5, "bits": 4}], ids=str)
def test_it_beats_magnitude_on_its_own_inputs(how):
    for seed in range(5):
        w, x = weights(64, 128, seed).float(), inputs(600, 128, seed).float()
        ours = quantize_layer({"kind": "sparsegpt", **how}, w, x)
        control = quantize_layer({"kind": "magnitude", **how}, w)
        assert output_error(x, w, ours.weight) < output_error(x, w, control.weight)
        assert ours.bits == pytest.approx(control.bits)


def test_freer_patterns_err_less():
    """Unstructured, 4:8, 2:4 at 50 %: mean error over five draws."""
    errors = []
    for how in ({"sparsity": 0.5}, {"pattern": "4:8"}, {"pattern": "2:4"}):
        total = 0.0
        for seed in range(5):
            w, x = weights(64, 128, seed).float(), inputs(600, 128, seed).float()
            total += output_error(x, w, quantize_layer(step(**how), w, x).weight)
        errors.append(total)
    assert errors == sorted(errors)


@pytest.mark.parametrize("grid", [{"bits": 4}, {"bits": 3, "group": 16, "symmetric": True}])
def test_without_zeros_it_is_gptq(grid):
    w, x = weights(24, 64).float(), inputs(300, 64).float()
    ours = quantize_layer(step(sparsity=0.0, **grid), w, x)
    gptq = {"kind": "gptq", "format": {"kind": "int", **grid}, "static_groups": True}
    theirs = quantize_layer(gptq, w, x)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.bits == theirs.bits


def test_without_zeros_and_rounding_nothing_happens():
    w, x = weights(24, 64).float(), inputs(300, 64).float()
    x[:, 5] = 0
    layer = quantize_layer(step(sparsity=0.0), w, x)
    assert torch.equal(layer.weight, w)
    assert layer.bits == PLAIN_BITS
    assert layer.notes == ["sparsity 0 and 16 bits: the weights stay as they are"]


def test_all_zeros_is_all_zeros():
    w, x = weights(8, 64).float(), inputs(300, 64).float()
    for bits in (16, 4):
        assert not quantize_layer(step(sparsity=1.0, bits=bits), w, x).weight.any()


def test_rounded_weights_lie_on_the_grid_of_the_full_matrix():
    w, x = weights(8, 64).float(), inputs(300, 64).float()
    layer = quantize_layer(step(bits=3), w, x)
    p = IntGroup(bits=3).fit(w, {})
    assert torch.equal(layer.module.qtensor.params["scale"], p["scale"])
    levels = (layer.weight / p["scale"]).round() * p["scale"]
    torch.testing.assert_close(layer.weight, levels)
    assert (layer.weight == 0).sum() >= w.numel() // 2


def test_dead_inputs_count_as_zeros():
    w, x = weights(8, 48).float(), inputs(200, 48).float()
    x[:, :12] = 0
    layer = quantize_layer(step(sparsity=0.5), w, x)
    assert not layer.weight[:, :12].any()
    assert (layer.weight == 0).sum() == w.numel() // 2
    assert layer.notes == ["12 of 48 inputs were always 0; their weights became 0"]


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (torch.full((20, 20), torch.nan), "not finite"),
        (torch.zeros(20, 20), "none came"),
        (-torch.eye(20), "singular even at damping 1"),
    ],
    ids=["nan", "zero", "negative"],
)
@pytest.mark.parametrize("bits", [16, 4])
def test_a_useless_hessian_means_magnitude_and_a_note(matrix, words, bits):
    h, notes = Hessian(20), []
    h.matrix = matrix
    linear = nn.Linear(20, 6, bias=False)
    linear.weight = nn.Parameter(weights(6, 20).float())
    made = SparseGPT(bits=bits).quantize(linear, LayerStats({Hessian: h}, notes.append))
    control = quantize_layer({"kind": "magnitude", "bits": bits}, weights(6, 20).float())
    assert torch.equal(made.weight, control.weight)
    assert words in notes[-1]
    assert "pruned by magnitude" in notes[-1]


def test_waves_follow_the_order_of_computation():
    block = Block(0, nn.ModuleDict({"self_attn": nn.ModuleDict()}), FAMILIES["llama"])
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    for name in names:
        block.get("self_attn").add_module(name.split(".")[1], nn.Linear(2, 2))
    assert SparseGPT().waves(block) == [names]
    assert SparseGPT(true_sequential=True).waves(block) == [names[:3], names[3:]]


def test_inputs_are_asked_for():
    with pytest.raises(ValueError, match="needs calibration inputs"):
        quantize_layer(step(), weights(4, 8).float())
