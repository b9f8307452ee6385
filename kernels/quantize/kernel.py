"""Triton: rows of activations to 8-bit codes, after a norm or an activation function if one is
fused, and codes of any width to dense bytes. One program a row, the row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import Build
from kernels.quantize import Grid
from kernels.workspace import WORKSPACES

PLAIN, NORM, SILU = 0, 1, 2  # what a row is before it is rounded: x, RMSNorm(x) or silu(x) * other
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it keeps no fraction, halves to even
PACK_ROWS = 256  # groups of eight codes a program packs


@triton.jit
def nearest(v):
    """v rounded to a whole number, halves to even, fp32; |v| < 2^22."""
    return (v + MAGIC) - MAGIC


@triton.jit
def quotient(v, scale, inverse, FMA: tl.constexpr):
    """v / scale correctly rounded, from inverse = 1 / scale: three instructions, a division 15.

    Markstein 1990, theorem: one step of correction from the exact remainder. Quotients below 2^-24
    may be off, which all codes round to 0. FMA: False in the interpreter, whose fma rounds twice.
    """
    if not FMA:
        return tl.div_rn(v, scale)
    near = v * inverse
    return tl.fma(tl.fma(-near, scale, v), inverse, near)


@triton.jit
def stored(scale, DTYPE: tl.constexpr):
    """fp32 scale as it is after storage in DTYPE: never 0, never infinite, still fp32."""
    if DTYPE == "float16":
        kept = tl.minimum(tl.maximum(scale, 5.960464477539063e-08), 65504.0)
        return kept.to(tl.float16).to(tl.float32)
    if DTYPE == "bfloat16":
        kept = tl.minimum(tl.maximum(scale, 1.1754943508222875e-38), 3.3895313892515355e38)
        bits = kept.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)  # halves to even
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.maximum(scale, 1.1754943508222875e-38)


@triton.jit
def int_grid(low, high, BITS: tl.constexpr, STEPS: tl.constexpr, DTYPE: tl.constexpr):
    """Ends of a range, low <= 0 <= high -> scale fp32 and lack = middle - zero, a whole number.

    The int format's rule (kernels.integers.activation_codes): STEPS is that of the symmetric
    convention, 0 for a range of its own. A code around the middle plus lack is x / scale.
    """
    TOP: tl.constexpr = 2**BITS - 1
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    empty = (low == 0) & (high == 0)
    low = tl.where(empty, -1.0, low)
    high = tl.where(empty, 1.0, high)
    if STEPS > 0:
        scale = stored(tl.div_rn(tl.maximum(-low, high), STEPS), DTYPE)
        lack = scale * 0
    else:
        scale = stored(tl.div_rn(high - low, TOP * 1.0), DTYPE)
        zero = nearest(tl.minimum(tl.div_rn(-low, scale), TOP))
        lack = MIDDLE - zero
    return scale, lack


@triton.jit
def int_code(v, scale, inverse, lack, BITS: tl.constexpr, FMA: tl.constexpr):
    """x / scale as a code around the middle of its grid, fp32: whole, -2^(BITS-1) or more."""
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    steps = tl.minimum(tl.maximum(quotient(v, scale, inverse, FMA), -2.0 * MIDDLE), 2.0 * MIDDLE)
    return tl.minimum(tl.maximum(nearest(steps) - lack, -MIDDLE), MIDDLE - 1)


@triton.jit
def peak_grid(peak):
    """Largest magnitudes -> scale = peak / 127 and the factor 127 / peak, as LLM.int8() rounds."""
    peak = tl.where(peak == 0, 1.0, peak)
    return tl.div_rn(peak, 127.0), tl.div_rn(127.0, peak)


@triton.jit
def e4m3_code(v):
    """fp32 -> code of the nearest E4M3 number, halves to even, 448 where larger; int32 0..255.

    Normal numbers keep 3 of fp32's 23 bits; below 2^-6 numbers are 2^-9 apart.
    """
    magnitude = tl.minimum(tl.abs(v), 448.0)
    whole = magnitude.to(tl.int32, bitcast=True)
    normal = ((whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20) - 960  # 8 (127 - 7)
    small = nearest(magnitude * 512.0).to(tl.int32)
    return tl.where(magnitude < 0.015625, small, normal) | tl.where(v < 0, 128, 0)


@triton.jit
def e4m3_rounded(v):
    """fp32 -> the nearest E4M3 number as e4m3_code has it, fp32: the same without the code."""
    magnitude = tl.minimum(tl.abs(v), 448.0)
    whole = magnitude.to(tl.int32, bitcast=True)
    normal = ((whole + 0x7FFFF + ((whole >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = nearest(magnitude * 512.0) * 0.001953125
    magnitude = tl.where(magnitude < 0.015625, small, normal)
    return tl.where(v < 0, -magnitude, magnitude)


@triton.jit
def row_values(x, other, row, column, inside, k, eps, SOURCE: tl.constexpr):
    """One row [BLOCK] fp32 of what is rounded: x, RMSNorm(x) by weights `other`, or silu(x) other.

    Every step is rounded to x's dtype where a model in that dtype rounds it.
    """
    dtype = x.dtype.element_ty
    v = tl.load(x + row * k + column, mask=inside, other=0.0).to(tl.float32)
    if SOURCE == 1:
        scale = 1.0 / tl.sqrt_rn(tl.sum(v * v, 0) / k + eps)
        weight = tl.load(other + column, mask=inside, other=0.0).to(tl.float32)
        v = ((v * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    if SOURCE == 2:
        up = tl.load(other + row * k + column, mask=inside, other=0.0).to(tl.float32)
        gate = (v / (1.0 + tl.exp(-v))).to(dtype).to(tl.float32)
        v = (gate * up).to(dtype).to(tl.float32)
    return v


@triton.jit
def int_rows(
    x,
    other,
    codes,
    scales,
    offsets,
    ends,
    m,
    k,
    width,
    eps,
    SOURCE: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    SHARED: tl.constexpr,
    FMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """codes [m, width] int8, scales [m], offsets [m, 2] int32: lack, and the sum of the codes.

    SHARED: one scale for all rows, whose own ends [m, 2] an earlier launch has written.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < k
    v = row_values(x, other, row, column, inside, k, eps, SOURCE)
    if SHARED:
        low, high = 0.0, 0.0
        for start in range(0, m, ROWS):
            r = start + tl.arange(0, ROWS)
            low = tl.minimum(low, tl.min(tl.load(ends + 2 * r, mask=r < m, other=0.0)))
            high = tl.maximum(high, tl.max(tl.load(ends + 2 * r + 1, mask=r < m, other=0.0)))
    else:
        low, high = tl.minimum(tl.min(v), 0.0), tl.maximum(tl.max(v), 0.0)
    scale, lack = int_grid(low, high, BITS, STEPS, DTYPE)
    q = tl.where(inside, int_code(v, scale, tl.div_rn(1.0, scale), lack, BITS, FMA), 0.0)
    tl.store(codes + row * width + column, q.to(tl.int8), mask=column < width)
    tl.store(scales + row, scale)
    tl.store(offsets + 2 * row, lack.to(tl.int32))
    tl.store(offsets + 2 * row + 1, tl.sum(q.to(tl.int32), 0))


@triton.jit
def row_ends(x, other, ends, k, eps, SOURCE: tl.constexpr, BLOCK: tl.constexpr):
    """ends [m, 2] fp32: the lowest and the highest of each row, 0 included."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    v = row_values(x, other, row, column, column < k, k, eps, SOURCE)
    tl.store(ends + 2 * row, tl.minimum(tl.min(v), 0.0))
    tl.store(ends + 2 * row + 1, tl.maximum(tl.max(v), 0.0))


@triton.jit
def peak_rows(x, keep, codes, scales, k, width, BLOCK: tl.constexpr):
    """LLM.int8(): codes [m, width] int8 and scales [m]; columns with keep [k] = 0 count as 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    kept = tl.load(keep + column, mask=column < k, other=0)
    v = tl.load(x + row * k + column, mask=column < k, other=0.0).to(tl.float32)
    v = tl.where(kept != 0, v, 0.0)
    scale, factor = peak_grid(tl.max(tl.abs(v)))
    tl.store(codes + row * width + column, nearest(v * factor).to(tl.int8), mask=column < width)
    tl.store(scales + row, scale)


@triton.jit
def e4m3_rows(
    x,
    codes,
    scales,
    ends,
    m,
    k,
    width,
    DTYPE: tl.constexpr,
    SHARED: tl.constexpr,
    FMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """codes [m, width] uint8 of E4M3 and scales [m], peak / 448."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    v = tl.load(x + row * k + column, mask=column < k, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(v))
    if SHARED:
        for start in range(0, m, ROWS):
            r = start + tl.arange(0, ROWS)
            low = tl.load(ends + 2 * r, mask=r < m, other=0.0)
            high = tl.load(ends + 2 * r + 1, mask=r < m, other=0.0)
            peak = tl.maximum(peak, tl.max(tl.maximum(-low, high)))
    scale = e4m3_scale(peak, DTYPE)
    code = e4m3_code(quotient(v, scale, tl.div_rn(1.0, scale), FMA))
    tl.store(codes + row * width + column, code.to(tl.uint8), mask=column < width)
    tl.store(scales + row, scale)


@triton.jit
def e4m3_scale(peak, DTYPE: tl.constexpr):
    """Largest magnitudes -> the minifloat format's scale."""
    peak = tl.where(peak == 0, 1.0, peak)
    return stored(tl.div_rn(peak, 448.0), DTYPE)


@triton.jit
def pack_eights(codes, words, count, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Eight codes -> BITS bytes, low bit first: the dense stream of kernels.packing.pack_bits."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS] groups of eight
    i = tl.arange(0, 8)
    at = r[:, None] * 8 + i[None, :]
    field = tl.load(codes + at, mask=at < count, other=0).to(tl.uint64)  # [ROWS, 8]
    word = tl.sum(field << (BITS * i[None, :]).to(tl.uint64), 1)  # [ROWS]; fields do not overlap
    byte = (word[:, None] >> (8 * i[None, :]).to(tl.uint64)) & 255
    to = r[:, None] * BITS + i[None, :]
    last = (count * BITS + 7) // 8
    tl.store(words + to, byte.to(tl.uint8), mask=(i[None, :] < BITS) & (to < last))


def block_of(width: int) -> tuple[int, int]:
    """Columns of a program and its warps: about 16 numbers a lane."""
    block = max(triton.next_power_of_2(width), 128)
    return block, min(max(block // 512, 1), 32)


def launch_ends(x: Tensor, other: Tensor, source: int, eps: float) -> Tensor:
    """x [m, k] -> lowest and highest of each row, [m, 2] fp32, in memory that is used again."""
    m, k = x.shape
    block, warps = block_of(k)
    ends = WORKSPACES.take("row_ends", 2 * m, torch.float32, x.device)
    row_ends[(m,)](x, other, ends, k, eps, SOURCE=source, BLOCK=block, num_warps=warps)
    return ends


def launch_int_rows(
    x: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    source: int = PLAIN,
    other: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """x [m, k] -> out: codes [m, width] int8, scales [m] fp32 and offsets [m, 2] int32."""
    codes, scales, offsets = out
    m, k = x.shape
    width = codes.shape[1]
    block, warps = block_of(width)
    beside = x if other is None else other
    int_rows[(m,)](
        x,
        beside,
        codes,
        scales,
        offsets,
        launch_ends(x, beside, source, eps) if grid.shared else scales,
        m,
        k,
        width,
        eps,
        SOURCE=source,
        BITS=grid.bits,
        STEPS=grid.steps,
        DTYPE=grid.scale_dtype,
        SHARED=grid.shared,
        FMA=x.is_cuda,
        ROWS=128,
        BLOCK=block,
        num_warps=warps,
    )


def launch_e4m3_rows(x: Tensor, out: tuple[Tensor, Tensor], scale_dtype: str, shared: bool) -> None:
    """x [m, k] -> out: codes [m, width] uint8 and scales [m] fp32."""
    codes, scales = out
    m, k = x.shape
    width = codes.shape[1]
    block, warps = block_of(width)
    e4m3_rows[(m,)](
        x,
        codes,
        scales,
        launch_ends(x, x, PLAIN, 0.0) if shared else scales,
        m,
        k,
        width,
        DTYPE=scale_dtype,
        SHARED=shared,
        FMA=x.is_cuda,
        ROWS=128,
        BLOCK=block,
        num_warps=warps,
    )


def launch_peak_rows(x: Tensor, keep: Tensor, codes: Tensor, scales: Tensor) -> None:
    """x [m, k], keep [k] uint8 -> codes [m, width] int8 and scales [m] fp32, as LLM.int8() does."""
    m, k = x.shape
    block, warps = block_of(codes.shape[1])
    peak_rows[(m,)](x, keep, codes, scales, k, codes.shape[1], BLOCK=block, num_warps=warps)


def packed(codes: Tensor, bits: int) -> Tensor:
    """codes [...] uint8 below 2^bits -> [bytes] uint8, the stream of kernels.packing.pack_bits."""
    count = codes.numel()
    words = codes.new_empty((count * bits + 7) // 8)
    grid = (triton.cdiv(count, 8 * PACK_ROWS),)
    if count:
        pack_eights[grid](codes, words, count, BITS=bits, ROWS=PACK_ROWS)
    return words


ROW_TYPES = {
    "x": "*bf16",
    "scales": "*fp32",
    "ends": "*fp32",
    "m": "i32",
    "k": "i32",
    "width": "i32",
}
INT_TYPES = {**ROW_TYPES, "other": "*bf16", "codes": "*i8", "offsets": "*i32", "eps": "fp32"}
E4M3_ROWS = {"DTYPE": "float32", "SHARED": False, "FMA": True, "ROWS": 128, "BLOCK": 4096}
INT_ROWS = {**E4M3_ROWS, "BITS": 8, "STEPS": 127.0, "SOURCE": NORM}
WIDE = {**INT_ROWS, "STEPS": 0.0, "SOURCE": SILU, "BLOCK": 16384}
WHOLE = ("k", "width")
E4M3_TYPES = {**ROW_TYPES, "codes": "*u8"}
ENDS_TYPES = {"x": "*bf16", "other": "*bf16", "ends": "*fp32", "k": "i32", "eps": "fp32"}
ENDS = {"SOURCE": NORM, "BLOCK": 4096}
PEAK_TYPES = {"x": "*bf16", "keep": "*u8", "codes": "*i8", "scales": "*fp32"}
PEAK_TYPES |= {"k": "i32", "width": "i32"}
PACK_TYPES = {"codes": "*u8", "words": "*u8", "count": "i64"}
BUILDS = (
    Build("norm", int_rows, INT_TYPES, INT_ROWS, warps=8, per_pass=4096, divisible=WHOLE),
    Build("silu_14336", int_rows, INT_TYPES, WIDE, warps=32, per_pass=16384, divisible=WHOLE),
    Build("e4m3", e4m3_rows, E4M3_TYPES, E4M3_ROWS, warps=8, per_pass=4096, divisible=WHOLE),
    Build(
        "ends", row_ends, ENDS_TYPES, ENDS, warps=8, per_pass=4096, divisible=WHOLE, targets=(90,)
    ),
    Build("peaks", peak_rows, PEAK_TYPES, {"BLOCK": 4096}, 8, per_pass=4096, divisible=WHOLE),
    Build("pack3", pack_eights, PACK_TYPES, {"BITS": 3, "ROWS": PACK_ROWS}),
)
