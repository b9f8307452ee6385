"""Activations to 8-bit codes in one launch, with what comes before fused; codes to dense bytes.

`int8_rows` and `e4m3_rows` round rows, by one scale each or one for all; `norm_int8_rows` and
`silu_int8_rows` first compute the RMSNorm before an attention's projections, and the product before
a feed-forward's last one, so that neither is written and read again. `pack_codes` is pack_bits of
kernels.packing on the GPU. The products of kernels/ take these codes; there is no KERNEL here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kernels import ops
from kernels.base import Json
from kernels.integers import activation_codes, int_format, stored
from kernels.packing import pack_bits, packed_bytes

LARGEST = 448.0  # of E4M3
Rows = tuple[Tensor, Tensor, Tensor]
PAST = {"restricted": 0.0, "offset": 0.5, "full": 1.0}  # steps of a peak beyond the top code


class Grid(NamedTuple):
    """What an op is told of an int format of activations; its arguments, in this order."""

    bits: int
    steps: float  # between 0 and the peak of a symmetric grid; 0 if the grid has a zero point
    scale_dtype: str
    shared: bool = False  # one scale for all rows

    @classmethod
    def of(cls, act: Json) -> Grid:
        """The grid of an int format's JSON."""
        steps = 2 ** (act["bits"] - 1) - 1 + PAST[act["convention"]]
        return cls(
            act["bits"],
            steps if act["symmetric"] else 0.0,
            act["scale_dtype"],
            act["per_tensor"],
        )

    def act(self) -> Json:
        """An int format's JSON of which this is the grid."""
        past = self.steps - (2 ** (self.bits - 1) - 1)
        convention = next((name for name, value in PAST.items() if value == past), "restricted")
        return int_format(
            bits=self.bits,
            symmetric=self.steps > 0,
            convention=convention,
            scale_dtype=self.scale_dtype,
            per_tensor=self.shared,
        )


def int_rows_reference(x: Tensor, width: int, grid: Grid) -> Rows:
    """x [m, k] -> codes [m, width] int8, scales [m] fp32, offsets [m, 2] int32.

    Codes are those of the int format less the middle of its grid; offsets are middle - zero and
    the sum of the codes. Columns past k hold 0.
    """
    codes, scale, zero = activation_codes(x, grid.act())
    middle = 2 ** (grid.bits - 1)
    q = (codes - middle).to(torch.int8)
    lack = (middle - zero).to(torch.int32)
    offsets = torch.cat([lack, q.sum(1, keepdim=True, dtype=torch.int32)], 1)
    return functional.pad(q, (0, width - x.shape[1])), scale.flatten().contiguous(), offsets


def e4m3_rows_reference(
    x: Tensor, width: int, scale_dtype: str, shared: bool
) -> tuple[Tensor, Tensor]:
    """x [m, k] -> codes [m, width] uint8 of E4M3 and scales [m] fp32; columns past k hold 0."""
    v = x.float()
    peak = v.abs().amax(1, keepdim=True)
    peak = peak.amax().expand_as(peak) if shared else peak
    scale = stored(peak.masked_fill(peak == 0, 1) / LARGEST, scale_dtype)  # [m, 1]
    fitting = (v / scale).clamp(-LARGEST, LARGEST)
    codes = fitting.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.masked_fill(fitting == 0, 0)  # +0 for -0, as the format has it
    return functional.pad(codes, (0, width - x.shape[1])), scale.flatten().contiguous()


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as Llama has it: in fp32, rounded to x's dtype before the weights [k]."""
    v = x.float()
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return weight * v.to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, each step in their dtype."""
    return functional.silu(gate) * up


def _empty_rows(x: Tensor, width: int) -> Rows:
    m = x.shape[0]
    return (
        x.new_empty(m, width, dtype=torch.int8),
        x.new_empty(m, dtype=torch.float32),
        x.new_empty(m, 2, dtype=torch.int32),
    )


def _empty_e4m3(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    m = x.shape[0]
    return x.new_empty(m, width, dtype=torch.uint8), x.new_empty(m, dtype=torch.float32)


def _int_rows_cuda(x: Tensor, width: int, *grid: Any) -> Rows:
    from kernels.quantize.kernel import launch_int_rows

    out = _empty_rows(x, width)
    launch_int_rows(x.contiguous(), out, Grid(*grid))
    return out


def _e4m3_rows_cuda(x: Tensor, width: int, scale_dtype: str, shared: bool) -> tuple[Tensor, Tensor]:
    from kernels.quantize.kernel import launch_e4m3_rows

    out = _empty_e4m3(x, width)
    launch_e4m3_rows(x.contiguous(), out, scale_dtype, shared)
    return out


def _norm_cuda(x: Tensor, weight: Tensor, eps: float, width: int, *grid: Any) -> Rows:
    from kernels.quantize.kernel import NORM, launch_int_rows

    out = _empty_rows(x, width)
    launch_int_rows(x.contiguous(), out, Grid(*grid), NORM, weight, eps)
    return out


def _silu_cuda(gate: Tensor, up: Tensor, width: int, *grid: Any) -> Rows:
    from kernels.quantize.kernel import SILU, launch_int_rows

    out = _empty_rows(gate, width)
    launch_int_rows(gate.contiguous(), out, Grid(*grid), SILU, up.contiguous())
    return out


def _pack_cuda(codes: Tensor, bits: int) -> Tensor:
    from kernels.quantize.kernel import packed

    return packed(codes.contiguous(), bits)


SCHEMA = "int bits, float steps, str scale_dtype"
ROWS = "(Tensor, Tensor, Tensor)"

int8_rows = ops.register(
    f"int8_rows(Tensor x, int width, {SCHEMA}, bool shared) -> {ROWS}",
    cpu=lambda x, width, *grid: int_rows_reference(x, width, Grid(*grid)),
    cuda=_int_rows_cuda,
    fake=lambda x, width, *grid: _empty_rows(x, width),
)
e4m3_rows = ops.register(
    "e4m3_rows(Tensor x, int width, str scale_dtype, bool shared) -> (Tensor, Tensor)",
    cpu=e4m3_rows_reference,
    cuda=_e4m3_rows_cuda,
    fake=lambda x, width, *grid: _empty_e4m3(x, width),
)
norm_int8_rows = ops.register(
    f"norm_int8_rows(Tensor x, Tensor weight, float eps, int width, {SCHEMA}) -> {ROWS}",
    cpu=lambda x, weight, eps, width, *grid: int_rows_reference(
        normed(x, weight, eps), width, Grid(*grid)
    ),
    cuda=_norm_cuda,
    fake=lambda x, weight, eps, width, *grid: _empty_rows(x, width),
)
silu_int8_rows = ops.register(
    f"silu_int8_rows(Tensor gate, Tensor up, int width, {SCHEMA}) -> {ROWS}",
    cpu=lambda gate, up, width, *grid: int_rows_reference(gated(gate, up), width, Grid(*grid)),
    cuda=_silu_cuda,
    fake=lambda gate, up, width, *grid: _empty_rows(gate, width),
)
pack_codes = ops.register(
    "pack_codes(Tensor codes, int bits) -> Tensor",
    cpu=pack_bits,
    cuda=_pack_cuda,
    fake=lambda codes, bits: codes.new_empty(packed_bytes(codes.numel(), bits)),
)
