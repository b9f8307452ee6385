"""HQQ and the grid `affine` against their formulas, step by step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from backend import recipes
from backend.formats.affine import Affine
from backend.layer import QuantizedLayer, quantize_layer
from backend.methods.hqq import HQQ, shrink
from backend.spec import ModelRef, RunSpec


def heavy(n: int = 256, k: int = 1024, seed: int = 0) -> Tensor:
    """[n, k] numbers of Student's t distribution with 4 degrees of freedom, times 0.02."""
    make = torch.Generator().manual_seed(seed)
    squares = torch.randn(4, n, k, generator=make).square().sum(0)
    return 0.02 * torch.randn(n, k, generator=make) / (squares / 4).sqrt()


def solved(w: Tensor, **knobs: object) -> QuantizedLayer:
    """The layer that HQQ makes, with fp32 scales unless told otherwise."""
    return quantize_layer({"kind": "hqq", "scale_dtype": "float32", **knobs}, w)


def mean_error(w: Tensor, **knobs: object) -> float:
    """Mean |error|."""
    return (solved(w, **knobs).weight - w).abs().mean().item()


def test_affine_by_hand():
    w = torch.tensor([[1.0, 1.4, 2.2, 4.0]])  # range [1, 4] in 3 steps of 1, zero -1
    q = Affine(bits=2).quantize(w)
    assert q.params["scale"].item() == 1
    assert q.params["zero"].item() == -1
    assert q.codes.tolist() == [[0, 0, 1, 3]]
    assert q.dequantize().tolist() == [[1, 1, 2, 4]]


def test_affine_errs_by_half_a_step_at_most():
    w = heavy(32, 130)
    for bits in (1, 2, 3, 4, 8):
        q = Affine(bits=bits, group=64).quantize(w)
        step = q.params["scale"][:, q.group_of_column()]
        assert ((q.dequantize() - w).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_affine_keeps_constant_groups(dtype):
    w = torch.tensor([[0.75], [-1.25], [0.0], [3.0], [2.0**-20]]).expand(5, 16)
    assert torch.equal(Affine(group=8, scale_dtype=dtype).fake(w), w)


def test_without_steps_it_is_rounding_with_a_real_zero():
    w = heavy(24, 100)
    layer = solved(w, iters=0, bits=3, group=32)
    plain = quantize_layer({"kind": "rtn", "format": {"kind": "affine", "bits": 3, "group": 32}}, w)
    assert torch.equal(layer.weight, plain.weight)
    assert layer.bits == plain.bits


def test_more_steps_never_err_more():
    w = heavy(64, 256)
    for knobs in (
        {},
        {"bits": 2, "group": 16},
        {"beta": 1e4, "p": 0.5},
        {"scale_dtype": "float16"},
    ):
        errors = [mean_error(w, iters=iters, **knobs) for iters in range(12)]
        assert all(b <= a for a, b in pairwise(errors))
        assert errors[-1] < errors[0]


def test_heavy_tails_gain_what_the_reference_gains():
    """The project's method reference, section 17: 2.677e-3 to 2.594e-3, 7.70e-3 to 7.25e-3."""
    w = heavy()
    for knobs, before, after in (
        ({"bits": 4, "group": 64}, 2.677e-3, 2.594e-3),
        ({"bits": 2, "group": 16}, 7.70e-3, 7.25e-3),
    ):
        plain, ours = mean_error(w, iters=0, **knobs), mean_error(w, **knobs)
        assert plain == pytest.approx(before, rel=0.02)  # another draw of the same distribution
        assert ours == pytest.approx(after, rel=0.02)
        assert ours < 0.98 * plain


@pytest.mark.parametrize("p", [0.3, 0.7, 1.0])
def test_one_step_by_its_formula(p):
    w, beta = heavy(4, 32).double(), 1e3
    scale = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / 15
    zero = -w.amin(1, keepdim=True) / scale
    q = (w / scale + zero).round().clamp(0, 15)
    e = w - scale * (q - zero)
    sparse = torch.where(
        e.abs() > e.abs() ** (p - 1) / beta, e.abs() - e.abs() ** (p - 1) / beta, 0
    )
    zero = (q - (w - e.sign() * sparse) / scale).mean(1, keepdim=True)
    layer = solved(w.float(), iters=1, group=0, p=p, beta=beta)
    found = layer.module.qtensor.params["zero"].double()
    torch.testing.assert_close(found, zero, rtol=1e-4, atol=1e-4)


def test_zero_is_a_level_only_from_whole_zero_points():
    w = heavy(64, 64)
    w[:, 7] = 0
    real = solved(w, iters=0, group=0).weight[:, 7].abs()
    step = (w.amax(1) - w.amin(1)) / 15
    assert (real <= 0.5001 * step).all()
    assert real.mean() > 0.2 * step.mean()  # a quarter of a step on average
    assert not solved(w, iters=0, group=0, round_zero=True).weight[:, 7].any()


def test_shrinking():
    error = torch.tensor([-0.5, -0.05, 0.0, 0.05, 0.5])
    soft = torch.tensor([-0.4, 0.0, 0.0, 0.0, 0.4])  # p = 1: plain soft thresholding at 1 / beta
    torch.testing.assert_close(shrink(error, 1.0, 10.0), soft)
    assert shrink(error, 0.7, 10.0).isfinite().all()
    assert (shrink(error, 0.7, 10.0).abs() <= error.abs()).all()
    # The threshold is beta^(-1/(2-p)); with the usual knobs 0.17.
    edge = 10.0 ** (-1 / 1.3)
    assert not shrink(torch.tensor([0.999 * edge]), 0.7, 10.0).any()
    assert shrink(torch.tensor([1.001 * edge]), 0.7, 10.0).all()


def test_odd_rows_and_short_groups():
    w = heavy(6, 70)
    w[0], w[1], w[2, 1:] = 0, 0.5, 0
    layer = solved(w, group=64)
    assert layer.weight.isfinite().all()
    assert not layer.weight[0].any()
    assert torch.equal(layer.weight[1], w[1])
    tail = solved(w[:, 64:], group=64)
    assert torch.equal(layer.weight[:, 64:], tail.weight)


def test_it_needs_no_data_and_gives_the_same_each_time():
    assert HQQ().wanted() == ()
    w = heavy(16, 128)
    assert torch.equal(solved(w).weight, solved(w, iters=20).weight)


def test_stored_bits():
    assert solved(heavy(8, 128), scale_dtype="float16").bits == {
        "codes": 4,
        "scales": 16 / 64,
        "zeros": 16 / 64,
        "outliers": 0,
        "index": 0,
    }


def test_it_is_a_weight_step():
    steps = recipes.parse("rtn+hqq(bits=3,group=64,p=0.5)")
    with pytest.raises(ValueError, match="keep one weight step"):
        RunSpec(model=ModelRef(id="demo"), steps=steps)
    with pytest.raises(ValueError, match="bits = 9"):
        recipes.parse("hqq(bits=9)")
    with pytest.raises(ValueError, match="p = 0"):
        recipes.parse("hqq(p=0.0)")


def test_gptq_rounds_to_real_zero_points():
    w, x = heavy(32, 128), heavy(512, 128, seed=1) @ (heavy(128, 128, seed=2) * 10)
    fmt = {"kind": "affine", "bits": 3, "group": 32}
    layer = quantize_layer({"kind": "gptq", "format": fmt}, w, inputs=x)
    plain = quantize_layer({"kind": "rtn", "format": fmt}, w)
    ours, theirs = ((x @ (made.weight - w).T).square().sum() for made in (layer, plain))
    assert ours < 0.7 * theirs
