"""OBQ against brute force, against GPTQ in its own order, and by the sum of its costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.formats import FORMATS
from backend.formats.int_group import IntGroup
from backend.layer import quantize_layer
from backend.methods import obq as module
from backend.methods.gptq import fit_all, inverse_factor, sweep
from backend.methods.obq import OBQ, FixedGrid
from backend.model.stats import Hessian, LayerStats


def inputs(tokens: int, k: int, seed: int = 0, outlier: float = 1) -> Tensor:
    """[tokens, k] fp64 inputs whose channels depend on each other; channel 3 times `outlier`."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=make, dtype=torch.float64) / k**0.5
    x = torch.randn(tokens, k, generator=make, dtype=torch.float64)
    x = x @ (mix + 0.5 * torch.eye(k, dtype=torch.float64))
    x[:, 3] *= outlier
    return x


def weights(n: int, k: int, seed: int = 1) -> Tensor:
    """[n, k] fp64."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).double()


def hessian(x: Tensor, damping: float = 0.01) -> Tensor:
    """[K, K] fp64, 2 / T x^T x, damped."""
    h = 2 / len(x) * x.T @ x
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def solved(method: OBQ, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One fp64 solution for the damped h -> values [N, K], costs [K, N]."""
    grid, every = FixedGrid(method.format, w), slice(0, len(w))
    codes, costs = method.solve_rows(w, every, torch.linalg.inv(h), grid)
    fitted = fit_all(method.format, w, method.format.prepare(w))
    groups = enumerate(method.format.groups(w.shape[1]))
    values = [method.format.decode(codes[:, a:b], fitted[i]) for i, (a, b) in groups]
    return torch.cat(values, 1).double(), costs


def step(**knobs: Any) -> dict[str, Any]:
    """An obq step; bits and group go into its format."""
    grid = {name: knobs.pop(name) for name in ("bits", "group") if name in knobs}
    return {"kind": "obq", "format": {"kind": "int", **grid}, **knobs}


def output_error(x: Tensor, w: Tensor, rounded: Tensor) -> float:
    """Sum of squared differences of the outputs."""
    return (x.double() @ (w.double() - rounded.double()).T).square().sum().item()


def brute_force(w: Tensor, h: Tensor, fmt: IntGroup, strays: bool) -> Tensor:
    """Row by row, weight by weight: the inverse of what is left is computed anew every time."""
    p, result = fmt.fit(w, {}), torch.empty_like(w)
    for i, row in enumerate(w):
        q = {name: value[i : i + 1] for name, value in p.items()}
        row, left, half = row.clone(), list(range(len(row))), q["scale"].double().item() / 2
        while left:
            inverse = torch.linalg.inv(h[left][:, left])
            rounded = fmt.decode(fmt.encode(row[left][None], q), q)[0].double()
            error = rounded - row[left]
            cost = error.square() / inverse.diagonal()
            at = int(cost.argmin())
            if strays and (error.abs() > half * 1.000001).any():
                at = int(error.abs().argmax())
            row[left] += error[at] / inverse[at, at] * inverse[at]
            row[left[at]] = rounded[at]
            left.pop(at)
        result[i] = row
    return result


@pytest.mark.parametrize("strays", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_greedy_order_of_brute_force(seed, strays):
    w, h, fmt = weights(7, 19, seed), hessian(inputs(80, 19, seed)), IntGroup(bits=3)
    found, _ = solved(OBQ(format=fmt, strays_first=strays), w, h)
    expected = brute_force(w, h, fmt, strays)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("seed", range(5))
def test_from_left_to_right_it_is_gptq(seed, group):
    x, w, fmt = inputs(120, 37, seed, 20), weights(9, 37, seed), IntGroup(bits=3, group=group)
    found, costs = solved(OBQ(format=fmt, order="natural"), w, hessian(x))
    factor, fitted = inverse_factor(hessian(x, 0), 0.01), fit_all(fmt, w, {})
    assert factor is not None
    codes, errors = sweep(w, factor, fmt, {}, fitted, place=list(range(37)), block=16, fresh=False)
    parts = [fmt.decode(codes[:, a:b], fitted[i]) for i, (a, b) in enumerate(fmt.groups(37))]
    assert torch.equal(found, torch.cat(parts, 1).double())
    torch.testing.assert_close(costs, errors.T.square(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("order", ["greedy", "natural"])
@pytest.mark.parametrize("fmt", [IntGroup(bits=2), IntGroup(bits=4, group=16, symmetric=True)])
def test_the_costs_sum_to_the_loss(fmt, order):
    w, h = weights(11, 48), hessian(inputs(200, 48, outlier=10))
    found, costs = solved(OBQ(format=fmt, order=order), w, h)
    loss = ((w - found) @ h @ (w - found).T).diagonal()
    torch.testing.assert_close(costs.sum(0), loss, rtol=1e-9, atol=0)


def mean_errors(outlier: float) -> dict[str, float]:
    """Output errors at 3 bits, mean over 6 draws of 48 inputs."""
    steps = {
        "rtn": {"kind": "rtn", "format": {"kind": "int", "bits": 3}},
        "gptq": {"kind": "gptq", "format": {"kind": "int", "bits": 3}},
        "obq": step(bits=3),
    }
    totals = dict.fromkeys(steps, 0.0)
    for seed in range(6):
        w, x = weights(32, 48, seed).float(), inputs(300, 48, seed, outlier).float()
        for name, how in steps.items():
            totals[name] += output_error(x, w, quantize_layer(how, w, x).weight) / 6
    return totals


def test_without_outliers_it_beats_gptq_and_gptq_beats_rounding():
    error = mean_errors(outlier=1)
    assert error["obq"] < error["gptq"] < error["rtn"]


def test_cheapest_first_is_harmful_where_an_input_is_an_outlier():
    """The channel's weights cost most, so they come last, with nothing left to make up for them."""
    error = mean_errors(outlier=10)
    assert error["gptq"] < 0.7 * error["obq"]


def test_independent_inputs_give_rounding_to_nearest():
    w, x = weights(12, 40).float(), torch.eye(40) * torch.linspace(3, 1, 40)
    for grid in ({"bits": 4}, {"bits": 3, "group": 16}, {"bits": 2, "group": 7}):
        layer = quantize_layer(step(**grid), w, x)
        nearest = quantize_layer({"kind": "rtn", "format": {"kind": "int", **grid}}, w)
        assert torch.equal(layer.weight, nearest.weight)
        assert layer.bits == nearest.bits
        assert layer.notes == []


def test_rows_are_solved_in_pieces_of_bounded_memory(monkeypatch):
    w, x = weights(10, 24).float(), inputs(100, 24).float()
    whole = quantize_layer(step(bits=3), w, x).weight
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 8 * 24 * 24)
    assert torch.equal(quantize_layer(step(bits=3), w, x).weight, whole)


@pytest.mark.parametrize("kind", sorted(FORMATS.load()))
def test_every_format_serves(kind, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 8 * 256 * 256)
    w, x = weights(8, 256).float(), inputs(600, 256).float()
    fmt = FORMATS.load()[kind]()
    layer = quantize_layer({"kind": "obq", "format": fmt}, w, inputs=x)
    nearest = quantize_layer({"kind": "rtn", "format": fmt}, w)
    assert output_error(x, w, layer.weight) < output_error(x, w, nearest.weight)
    assert layer.bits == nearest.bits


def test_formats_whose_rows_share_parameters_are_cut_into_pieces_too(monkeypatch):
    fmt = FORMATS.build({"kind": "codebook", "group": 16, "double_quant": True})
    w, x = weights(10, 48).float(), inputs(200, 48).float()
    whole = quantize_layer({"kind": "obq", "format": fmt}, w, x).weight
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 8 * 48 * 48)
    assert torch.equal(quantize_layer({"kind": "obq", "format": fmt}, w, x).weight, whole)


def test_large_layers_are_refused_in_a_sentence():
    w, x = weights(2, 24).float(), inputs(60, 24).float()
    with pytest.raises(ValueError, match=r"24 input channels is over max_inputs = 20.*use gptq"):
        quantize_layer(step(max_inputs=20), w, x)
    assert quantize_layer(step(max_inputs=24), w, x).weight.isfinite().all()


def test_dead_inputs_get_zero_weights_and_a_note():
    w, x = weights(8, 24).float(), inputs(100, 24).float()
    x[:, [2, 9]] = 0
    layer = quantize_layer(step(bits=4), w, x)
    assert not layer.weight[:, [2, 9]].any()
    assert layer.notes == ["2 of 24 inputs were always 0; their weights became 0"]


def solved_with(matrix: Tensor, **knobs: Any) -> tuple[Tensor, list[str]]:
    """OBQ of a fixed weight with this Hessian [K, K]: weights, notes."""
    h, notes = Hessian(len(matrix)), []
    h.matrix = matrix
    linear = nn.Linear(len(matrix), 6, bias=False)
    linear.weight = nn.Parameter(weights(6, len(matrix)).float())
    made = OBQ(**knobs).quantize(linear, LayerStats({Hessian: h}, notes.append))
    return made.weight, notes


def test_too_few_tokens_are_damped_and_noted():
    x = inputs(5, 20).float()  # 5 tokens, 20 inputs
    weight, notes = solved_with(x.T @ x - 1e-3 * torch.eye(20), damping=0.0)
    assert weight.isfinite().all()
    assert notes == ["Hessian not positive definite at damping 0; used 0.01"]


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
    weight, notes = solved_with(matrix)
    assert words in notes[-1]
    assert "rounded to nearest" in notes[-1]
    assert torch.equal(weight, IntGroup().fake(weights(6, 20).float()))


def test_inputs_are_asked_for():
    with pytest.raises(ValueError, match="needs calibration inputs"):
        quantize_layer(step(), weights(4, 8).float())
