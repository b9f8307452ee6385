"""QuantLinear: simulated, packed, saved and restored; for every format and every kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backend.formats import FORMATS
from backend.formats.base import QTensor, Sparse
from backend.model.quant_linear import LINEARS, PLAIN_BITS, QuantLinear, rounded
from backend.model.stats import AbsMax, LayerStats
from kernels.base import kernels


def int_format(**knobs):
    return FORMATS.build({"kind": "int", **knobs})


A8 = {"kind": "int", "bits": 8, "symmetric": True}
PACKABLE = [
    (int_format(bits=4, group=32), None),
    (int_format(bits=4, group=64, symmetric=True), None),
    (int_format(bits=3), None),
    (int_format(bits=2, group=32), None),
    (int_format(bits=8, symmetric=True), None),
    (int_format(bits=8, group=32), None),
    (int_format(bits=8, symmetric=True), FORMATS.build(A8)),
    (int_format(bits=4, group=32), FORMATS.build(A8)),
    (int_format(bits=4), int_format(bits=8)),
    (int_format(bits=8, per_tensor=True), int_format(bits=8, per_tensor=True)),
]


@pytest.fixture
def weight():
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x():
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))


def test_simulated_multiplies_by_the_dequantized_weights(weight, x):
    q = int_format(bits=3, group=32).quantize(weight)
    bias = torch.arange(48.0)
    layer = QuantLinear(q, bias, dtype=torch.float32)
    assert torch.equal(layer.weight, q.dequantize())
    assert torch.equal(layer(x), nn.functional.linear(x, q.dequantize(), bias))
    assert (layer.in_features, layer.out_features, layer.packed) == (64, 48, False)
    assert layer.bits() == q.bits()


def test_sixteen_bit_weights_with_rounded_inputs(weight, x):
    linear = nn.Linear(64, 48)
    act = FORMATS.build(A8)
    layer = QuantLinear.from_linear(linear, act)
    assert layer.bits() == PLAIN_BITS
    assert torch.equal(layer(x), linear(act.fake(x)))
    with pytest.raises(ValueError, match="cannot pack: its weights are not quantized"):
        layer.pack(None)


def test_static_activations_use_fixed_scales(weight, x):
    act = int_format(bits=8, symmetric=True, per_tensor=True)
    stats = LayerStats({AbsMax: AbsMax(64)})
    stats.update(x)
    params = act.calibrate(stats)
    layer = QuantLinear(weight, None, act=act, act_params=params, dtype=torch.float32)
    louder = 3 * x  # beyond the calibrated range: clipped, where a dynamic scale would follow
    step = float(params["scale"])
    clipped = (louder / step).round().clamp(-128, 127) * step
    assert torch.allclose(layer(louder), clipped @ weight.T, atol=1e-4)
    assert torch.equal(rounded(x, act, params), rounded(rounded(x, act, params), act, params))


def test_with_act_keeps_weights_and_is_given_once(weight, x):
    q = int_format(bits=4).quantize(weight)
    layer = QuantLinear(q, None, dtype=torch.float32)
    both = layer.with_act(FORMATS.build(A8))
    assert both.qtensor is q
    assert torch.equal(both.weight, layer.weight)
    assert torch.equal(both(x), layer(FORMATS.build(A8).fake(x)))
    with pytest.raises(ValueError, match="already rounded to int"):
        both.with_act(FORMATS.build(A8))


def test_casting_and_moving_leave_codes_and_scales_exact(weight):
    q = int_format(bits=8, group=32).quantize(weight)
    layer = QuantLinear(q, torch.zeros(48), dtype=torch.float32).to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.qtensor.params["scale"].dtype == torch.float32
    assert torch.equal(layer.qtensor.dequantize(), q.dequantize())


@pytest.mark.parametrize("kind", sorted(FORMATS.load()))
def test_every_format_survives_saving(kind, weight, x):
    fmt = FORMATS.load()[kind]()
    layer = QuantLinear(fmt.quantize(weight), torch.ones(48), act=fmt, dtype=torch.float32)
    tensors, config = layer.to_state()
    again = LINEARS["quant_linear"].from_state(tensors, config, torch.float32)
    assert torch.equal(again.weight, layer.weight)
    assert torch.equal(again(x), layer(x))
    assert again.bits() == layer.bits()


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_on_disk_are_what_bits_says(bits, weight):
    layer = QuantLinear(int_format(bits=bits, group=16).quantize(weight), None, dtype=torch.float32)
    tensors, _ = layer.to_state()
    stored = sum(t.numel() * t.element_size() for t in tensors.values()) * 8 / weight.numel()
    assert stored == pytest.approx(sum(layer.bits().values()), rel=0.01)


def test_outliers_and_act_order_survive_saving(weight, x):
    q = int_format(bits=3, group=32).quantize(weight)
    index = (torch.arange(64) // 32).flip(0).to(torch.int32)
    counts = torch.zeros(49, dtype=torch.int64)
    counts[7:] = 1
    sparse = Sparse(counts, torch.tensor([5]), torch.tensor([9.0]))
    layer = QuantLinear(
        QTensor(q.codes, q.params, q.format, index, sparse), None, dtype=torch.float32
    )
    again = QuantLinear.from_state(*layer.to_state(), torch.float32)
    assert torch.equal(again(x), layer(x))
    assert layer.weight[6, 5] == 9
    with pytest.raises(ValueError, match="act order scatters over groups and outliers kept apart"):
        layer.kernel_for("cpu")


@pytest.mark.parametrize(("fmt", "act"), PACKABLE, ids=str)
def test_packed_agrees_with_simulated(fmt, act, weight, x):
    bias = torch.linspace(-1, 1, 48)
    layer = QuantLinear(fmt.quantize(weight), bias, act=act, dtype=torch.bfloat16)
    simulated = layer(x.bfloat16()).float()
    stored = layer.bits()
    before = layer.resident_bytes()
    layer.pack(layer.kernel_for("cpu"))
    got = layer(x.bfloat16())
    assert (got.dtype, got.shape) == (torch.bfloat16, (2, 5, 48))
    # bf16 on both sides: W_hat or the kernel's scales and sums are rounded to 8 bits.
    assert (got.float() - simulated).abs().max() <= 0.02 * simulated.abs().max()
    assert layer.bits() == stored
    assert layer.packed
    assert layer.resident_bytes() < before
    assert layer.weight is None
    with pytest.raises(ValueError, match="save it before packing"):
        layer.to_state()


def test_resident_bytes_are_those_of_the_container():
    weight = torch.randn(64, 128)
    layer = QuantLinear(
        int_format(bits=3, group=128, symmetric=True).quantize(weight), None, dtype=torch.bfloat16
    )
    layer.pack(layer.kernel_for("cpu"))
    scales = 64 * 2 * 2  # one pair of bf16 per row and group
    assert layer.resident_bytes() == 64 * 128 // 2 + scales
    assert "3-bit codes are kept in 4-bit fields" in layer.resident_note()


def test_a_packed_linear_names_what_does_not_fit():
    layer = QuantLinear(
        int_format(bits=4, group=16).quantize(torch.randn(32, 64)), None, dtype=torch.float32
    )
    with pytest.raises(ValueError, match="group 16 does not fit 64 input channels"):
        layer.kernel_for("cpu")


@pytest.mark.parametrize("act", [None, FORMATS.build(A8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_expanding_kernel_gives_the_simulated_numbers_exactly(bits, dtype, act, weight, x):
    layer = QuantLinear(
        int_format(bits=bits, group=48).quantize(weight), None, act=act, dtype=dtype
    )
    simulated = layer(x.to(dtype))
    layer.pack(kernels()["w_a16"])
    assert torch.equal(layer(x.to(dtype)), simulated)


def test_a_group_longer_than_the_row_is_packed_as_the_row(weight, x):
    layer = QuantLinear(int_format(bits=4, group=4096).quantize(weight), None, dtype=torch.bfloat16)
    simulated = layer(x.bfloat16()).float()
    layer.pack(layer.kernel_for("cpu"))
    assert (layer(x.bfloat16()).float() - simulated).abs().max() <= 0.02 * simulated.abs().max()
