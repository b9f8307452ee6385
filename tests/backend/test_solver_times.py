"""`quantarena bench` on methods: each really solves its layer, and ratios are to GPTQ's time."""

from __future__ import annotations

import pytest
import torch

from backend import solver_times
from backend.layer import quantize_layer
from backend.methods import METHODS
from backend.model.quant_linear import QuantLinear


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [name for name in solver_times.SOLVERS if name != "awq"])
def test_a_timed_layer_is_what_the_method_makes_of_the_weight(name):
    weight, inputs = normal(24, 32), normal(40, 32, seed=1)
    step = METHODS.build(solver_times.SOLVERS[name])
    normed = inputs / inputs.square().mean(1, keepdim=True).sqrt()
    expected = quantize_layer(step, weight, normed).weight
    off = (solver_times.solve(step, weight, inputs).weight - expected).abs() > 1e-4
    # The norm's own epsilon moves inputs in the last place, which may turn a tie.
    assert off.float().mean() < 0.02


def test_awqs_time_holds_its_search_for_a_scale():
    weight, inputs = normal(24, 32), normal(200, 32, seed=1)
    inputs[:, 5] *= 40
    step = METHODS.build({"kind": "awq", "format": {"kind": "int", "bits": 3, "group": 0}})
    solved = solver_times.solve(step, weight, inputs)
    assert isinstance(solved, QuantLinear)
    exact = torch.nn.RMSNorm(32)(inputs)
    alone = quantize_layer(step, weight, exact).weight  # clipped, but nothing carries a scale
    loudest = solved.weight.norm(dim=0).argmax()
    assert loudest == 5
    assert (alone.norm(dim=0) / weight.norm(dim=0))[5] < 2


def test_rows_compare_with_gptq_of_the_same_run(monkeypatch, capsys):
    monkeypatch.setattr(solver_times, "SIDE", 32)
    monkeypatch.setattr(solver_times, "TOKENS", 24)
    monkeypatch.setattr(solver_times, "ROUNDS", 2)
    rows = {row["method"]: row for row in solver_times.time_methods(list(solver_times.SOLVERS))}
    assert list(rows) == ["gptq", "awq", "spqr", "bcq"]
    assert rows["gptq"]["ratio_to_gptq"] == 1
    for row in rows.values():
        expected = row["median_s"] / rows["gptq"]["median_s"]
        assert row["ratio_to_gptq"] == pytest.approx(expected)
        assert row["step"] == METHODS.build(row["step"]).data()
    assert "x gptq" in capsys.readouterr().out
    (alone,) = solver_times.time_methods(["bcq"])
    assert alone["ratio_to_gptq"] is None
    assert "gptq" not in capsys.readouterr().out
