"""Rows to codes and codes to bytes: Triton in its interpreter against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import quantize
from kernels.integers import activation_codes, int_format
from kernels.packing import pack_bits
from kernels.quantize import Grid, kernel

ACTS = [
    int_format(bits=8, symmetric=True),
    int_format(bits=8),
    int_format(bits=4, symmetric=True, convention="full"),
    int_format(bits=6, symmetric=True, convention="offset", scale_dtype="bfloat16"),
    int_format(bits=5, scale_dtype="float16"),
    int_format(bits=8, symmetric=True, per_tensor=True),
    int_format(bits=8, per_tensor=True),
]
NAN = float("nan")


def rows(m, k, seed=0, dtype=torch.float32):
    """Rows of magnitudes 1e-4 to 1e2, one all 0, one without negatives, ties of .5 among them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=rng) * torch.logspace(-4, 2, m)[:, None]
    x[0] = (torch.randint(-254, 255, (k,), generator=rng) / 2).float()
    x[0, 0] = 127
    if m > 2:
        x[1], x[2] = 0, x[2].abs()
    return x.to(dtype)


def empty_rows(m, width):
    """What a kernel must write in full: no element keeps its 85, NaN or -1."""
    return (
        torch.full((m, width), 85, dtype=torch.int8),
        torch.full((m,), NAN),
        torch.full((m, 2), -1, dtype=torch.int32),
    )


@pytest.mark.parametrize("act", ACTS, ids=lambda a: f"{a['bits']}-{a['scale_dtype']}")
@pytest.mark.parametrize(("m", "k", "width"), [(1, 33, 64), (5, 100, 128), (3, 130, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_integer_rows_are_those_of_the_format(act, m, k, width, dtype):
    x = rows(m, k, seed=m, dtype=dtype)
    out = empty_rows(m, width)
    kernel.launch_int_rows(x, out, Grid.of(act))
    q, scale, offsets = out
    codes, expected_scale, zero = activation_codes(x, act)
    middle = 2 ** (act["bits"] - 1)
    assert torch.equal(q[:, :k].float(), codes - middle)
    assert not q[:, k:].any()
    assert torch.equal(scale, expected_scale.flatten())
    assert torch.equal(offsets[:, 0].float(), middle - zero.flatten())
    assert torch.equal(offsets[:, 1].float(), (codes - middle).sum(1))
    for got, expected in zip(out, quantize.int8_rows(x, width, *Grid.of(act)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "k", "width"), [(1, 33, 64), (5, 100, 128)])
def test_e4m3_rows_are_those_torch_casts(shared, scale_dtype, m, k, width):
    x = rows(m, k, seed=k)
    out = torch.full((m, width), 85, dtype=torch.uint8), torch.full((m,), NAN)
    kernel.launch_e4m3_rows(x, out, scale_dtype, shared)
    peak = x.abs().max() if shared else x.abs().amax(1, keepdim=True)
    scale = torch.where(peak == 0, 1, peak).expand(m, 1) / 448
    if scale_dtype == "bfloat16":
        scale = scale.bfloat16().float()
    cast = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(out[1], scale.flatten())
    assert torch.equal(out[0][:, :k].view(torch.float8_e4m3fn).float(), cast.float())
    assert not out[0][:, k:].any()
    for got, plain in zip(out, quantize.e4m3_rows(x, width, scale_dtype, shared), strict=True):
        assert torch.equal(got, plain)


def test_every_e4m3_number_and_every_middle_between_two_is_rounded_right():
    codes = torch.arange(0x7F, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()  # 0 to 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(448.0))])
    x = torch.cat([numbers, middles, near])
    x = torch.cat([x, -x, torch.tensor([448.0])])[None]  # its scale is 1
    out = torch.zeros(1, x.shape[1], dtype=torch.uint8), torch.zeros(1)
    kernel.launch_e4m3_rows(x, out, "float32", False)
    assert out[1] == 1
    expected = x.to(torch.float8_e4m3fn)
    assert torch.equal(out[0].view(torch.float8_e4m3fn).float(), expected.float())


def test_three_instructions_divide_as_exactly_as_a_division():
    """kernel.quotient's steps with a fused multiply-add in 64-bit mantissas, rounded to fp32."""
    rng = np.random.default_rng(0)
    scale = np.exp2(rng.uniform(-40, 10, 200_000)).astype(np.float32)
    v = (scale * rng.uniform(-300, 300, scale.shape)).astype(np.float32)
    v[::2] = scale[::2] * (rng.integers(-254, 255, v[::2].shape) / 2)  # near the ties

    def fma(a, b, c):
        long = np.longdouble
        return (a.astype(long) * b.astype(long) + c.astype(long)).astype(np.float32)

    inverse = np.float32(1) / scale
    near = v * inverse
    assert (near != v / scale).any()
    assert np.array_equal(fma(fma(-near, scale, v), inverse, near), v / scale)


def apart(got, expected):
    """Codes [m, width] of both: how many differ, none by more than one."""
    off = (got.int() - expected.int()).abs()
    assert off.max() <= 1
    return int((off > 0).sum())


@pytest.mark.parametrize("act", ACTS[:2], ids=["symmetric", "own range"])
def test_a_norm_and_a_gate_are_fused(act):
    """Sums in another order and another exp move a value by an ulp, and few codes with it."""
    x, up = (rows(4, 100, seed=i, dtype=torch.float16).clamp(-20, 20) for i in range(2))
    weight = (1 + rows(1, 100, seed=2)[0] / 300).half()
    told = Grid.of(act)
    out = empty_rows(4, 128)
    kernel.launch_int_rows(x, out, told, kernel.NORM, weight, 1e-5)
    expected = quantize.norm_int8_rows(x, weight, 1e-5, 128, *told[:3])
    assert apart(out[0], expected[0]) <= 4
    assert torch.allclose(out[1], expected[1], rtol=1e-3)  # an ulp of fp16 at the peak
    out = empty_rows(4, 128)
    kernel.launch_int_rows(x, out, told, kernel.SILU, up)
    expected = quantize.silu_int8_rows(x, up, 128, *told[:3])
    assert apart(out[0], expected[0]) <= 4
    assert torch.allclose(out[1], expected[1], rtol=1e-3)


def test_the_norm_is_llamas():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64, eps=1e-5).bfloat16()
    norm.weight.data = torch.linspace(0.5, 2, 64).bfloat16()
    x = rows(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(quantize.normed(x, norm.weight, 1e-5), norm(x))


def test_peak_rows_leave_columns_out():
    x, keep = rows(4, 70), torch.ones(70, dtype=torch.uint8)
    keep[3] = keep[66] = 0
    x[:, 3] = 1e4
    codes, scale = torch.full((4, 128), 85, dtype=torch.int8), torch.full((4,), NAN)
    kernel.launch_peak_rows(x, keep, codes, scale)
    kept = x * keep
    peak = kept.abs().amax(1, keepdim=True)
    peak[peak == 0] = 1
    assert torch.equal(codes[:, :70].float(), (kept * (127 / peak)).round())
    assert torch.equal(scale, (peak / 127).flatten())
    assert not codes[:, 70:].any()


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
@settings(max_examples=30, deadline=None)
def test_packing_is_the_dense_stream(bits, values):
    codes = torch.tensor([v & (2**bits - 1) for v in values], dtype=torch.uint8)
    assert torch.equal(kernel.packed(codes, bits), pack_bits(codes, bits))
    assert torch.equal(quantize.pack_codes(codes, bits), pack_bits(codes, bits))


def test_packing_more_than_one_block():
    codes = torch.randint(0, 8, (5000,), dtype=torch.uint8)
    assert torch.equal(kernel.packed(codes, 3), pack_bits(codes, 3))


def test_ops_are_traceable_and_their_fakes_right():
    x, gate = rows(3, 40), rows(3, 40, seed=1)
    told = (64, 8, 127.0, "float32")
    codes = torch.randint(0, 8, (3, 5), dtype=torch.uint8)
    for op, arguments in (
        (quantize.int8_rows, (x, *told, False)),
        (quantize.e4m3_rows, (x, 64, "float32", False)),
        (quantize.norm_int8_rows, (x, x[0].contiguous(), 1e-5, *told)),
        (quantize.silu_int8_rows, (gate, x, *told)),
        (quantize.pack_codes, (codes, 3)),
    ):
        torch.library.opcheck(op, arguments)
    whole = torch.compile(lambda x: quantize.int8_rows(x, *told, False)[0], backend="aot_eager")
    assert torch.equal(whole(x), quantize.int8_rows(x, *told, False)[0])
