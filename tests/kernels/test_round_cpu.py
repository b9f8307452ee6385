"""Inputs rounded in C: the same bits as in plain torch."""

from __future__ import annotations

import pytest
import torch

from kernels import round_cpu
from kernels.quantize import e4m3_rows_reference
from kernels.sdr.activations import integers, sdr_format

pytestmark = pytest.mark.skipif(
    round_cpu.native() is None, reason="no compiler, or a CPU without AVX-512"
)


def inputs(dtype: torch.dtype, k: int) -> torch.Tensor:
    """Rows of all sizes, one of them 0."""
    x = torch.randn(8, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    x[1] = 0
    x[2] *= torch.logspace(-6, 0, k).to(dtype)  # subnormal E4M3 numbers
    x[3] *= 1e30
    x[4] *= 1e-42
    x[5, : k // 2] = 0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_e4m3(dtype, shared, scale_dtype):
    x = inputs(dtype, 77)
    codes, scale = e4m3_rows_reference(x, 77, scale_dtype, shared)
    values, own = round_cpu.e4m3_rows(x, scale_dtype, shared)
    assert torch.equal(own, scale)
    assert torch.equal(values.float(), codes.view(torch.float8_e4m3fn).float())


def test_e4m3_halves_go_to_even():
    grid = torch.arange(0, 448 * 512 + 1, dtype=torch.float32) / 512  # all halves, and more
    x = torch.cat([grid, -grid])[None]
    values, scale = round_cpu.e4m3_rows(x, "float32", False)
    assert scale == 1
    assert torch.equal(values.float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "act",
    [
        sdr_format(base_bits=16, bits=8, per_tensor=True),
        sdr_format(base_bits=16, bits=4, group=32),
        sdr_format(base_bits=8, bits=4, group=12, saturation="symmetric", scale_dtype="float16"),
        sdr_format(base_bits=16, bits=4, group=0, scale_dtype="bfloat16"),
        sdr_format(base_bits=8, bits=8),
    ],
    ids=str,
)
def test_sdr(act, dtype):
    x = inputs(dtype, 100)
    q, scale = integers(x, act)
    values, own = round_cpu.sdr_rows(x, act)
    assert torch.equal(own, scale.flatten())
    assert torch.equal(values.float(), q)


def test_more_bits_than_bf16_holds_are_left_to_torch():
    assert round_cpu.sdr_rows(torch.ones(1, 16), sdr_format(base_bits=16, bits=12)) is None


def test_what_is_no_number_stays_none():
    x = torch.ones(2, 40)
    x[0, 33] = float("nan")
    values, scale = round_cpu.e4m3_rows(x, "float32", False)
    assert (values[0].float() * scale[0]).isnan().all()
    assert scale[1].isfinite()


def test_no_rows():
    x = torch.ones(0, 32)
    for values, scale in (
        round_cpu.e4m3_rows(x, "float32", True),
        round_cpu.sdr_rows(x, sdr_format(per_tensor=True)),
    ):
        assert values.shape == (0, 32)
        assert len(scale) == 0
