"""The truth gate's arithmetic: divergence by hand, how far rounding moves a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from backend import truth
from backend.metrics.base import Measurement
from backend.model.quant_linear import QuantLinear


def test_divergence_is_the_mean_over_positions_of_kl():
    p = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])  # 1/4, 3/4; 1/2, 1/2
    q = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert truth.divergence(p, q) == pytest.approx(by_hand / 2, rel=1e-6)
    assert truth.divergence(p, p) == 0


def test_rounding_moves_quantized_linears_by_a_unit_at_most_and_leaves_no_trace():
    torch.manual_seed(0)
    layer = QuantLinear(torch.randn(64, 32), None, dtype=torch.float32)
    model = nn.Sequential(layer, nn.Linear(64, 64))
    x = torch.randn(16, 32)
    exact = layer(x)
    with truth.rounding(model, 0.01):
        moved = layer(x)
        assert torch.equal(model[1](exact), nn.functional.linear(exact, *model[1].parameters()))
    off = ((moved - exact) / exact).abs()
    assert 0.009 < off.max() <= 0.01 + 1e-6
    assert torch.equal(layer(x), exact)
    assert not layer._forward_hooks


def test_steps_are_those_of_the_dtype_that_kernels_compute_with():
    assert truth.step_of("bfloat16") == truth.step_of("float32") == 2**-7
    assert truth.step_of("float16") == 2**-10


def test_a_fault_is_told_with_its_numbers():
    detail = {"floor": 1e-4, "limit": 4e-4, "faulty": True}
    told = truth.fault(Measurement("kernel_kld", 0.02, "nats", "lower", detail=detail))
    assert "0.02 nats a token" in told
    assert "rounding explains 0.0004" in told
    assert truth.fault(Measurement("k", 0.0, "nats", "lower", detail={"faulty": False})) == ""
