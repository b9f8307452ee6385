"""Triton: activations to SDR integers, and their product with SDR weights (layout in layout.py).

A weight is code * 2^shift, a whole number of at most eight bits with four significant ones, and an
activation one of sixteen bits with four or eight. Three products, all exact in their multiplies:
HALF: inputs in 16 bits as they are. BYTES: activations as two signed bytes, each by the weights in
int8 with sums in int32, which are exact too. FP8: activations of four bits times 2^-9, and weights,
are e4m3 numbers, one product instead of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels import tables
from kernels.aot import Build
from kernels.base import Json
from kernels.sdr.activations import fits_fp8, one_byte, peak_of
from kernels.sdr.layout import ROWS, Layout, tiled
from kernels.split_k import finish, memory_for
from kernels.workspace import WORKSPACES

HALF, BYTES, FP8 = 0, 1, 2
MODES = ("half", "bytes", "fp8")  # as measured rows name them
PIECE = 1024  # inputs that one program rounds
EXPAND_ABOVE = 192  # rows of x from which W_hat is expanded once, but for FP8
FEW = 8  # rows of x whose planes of a whole unit fit beside the weights, twice over
ROOM = 110_000  # bytes of shared memory for that


@triton.jit
def whole(x):
    """fp32 below 2^22 to the nearest whole number, halves to even."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum has no bits for fractions


@triton.jit
def power(shift):
    """int32 -> 2^shift fp32."""
    return ((shift + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_peaks(x, peaks, K, BLOCK: tl.constexpr):
    """peaks[m] = max |x[m, :]| fp32."""
    m = tl.program_id(0).to(tl.int64)
    best = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.abs(tl.load(x + m * K + k, mask=k < K, other=0).to(tl.float32)))
    tl.store(peaks + m, tl.max(best, 0))


@triton.jit
def row_scale(peaks, m, M, PEAK: tl.constexpr, PER_TENSOR: tl.constexpr, LEAST: tl.constexpr,
              MOST: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The scale of row m, or of all rows, as it is stored."""
    if PER_TENSOR:
        best = tl.zeros((1024,), tl.float32)
        for start in range(0, M, 1024):
            r = start + tl.arange(0, 1024)
            best = tl.maximum(best, tl.load(peaks + r, mask=r < M, other=0))
        peak = tl.max(best, 0)
    else:
        peak = tl.load(peaks + m)
    scale = tl.div_rn(tl.where(peak == 0, 1.0, peak), PEAK * 1.0)
    return tl.minimum(tl.maximum(scale, LEAST), MOST).to(T).to(tl.float32)


@triton.jit
def compress(
    x,  # [M, K]
    peaks,  # [M] fp32
    high,  # [M, PADDED] int8, in the order of the weights
    low,  # [M, PADDED] int8, or e4m3
    scales,  # [M] fp32
    M,
    K,
    PADDED,
    GROUP,
    unit,
    plane,
    BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    PEAK: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    T: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # GROUP or the next power of two
    MODE: tl.constexpr,
    TWO: tl.constexpr,
):
    """GROUPS groups of one row: whole numbers of 16 bits cut to their leading BITS."""
    m = tl.program_id(0).to(tl.int64)
    scale = row_scale(peaks, m, M, PEAK, PER_TENSOR, LEAST, MOST, T)
    inner = tl.arange(0, WIDTH)[None, :]
    k = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[:, None] * GROUP + inner
    own = inner < GROUP
    value = tl.load(x + m * K + k, mask=own & (k < K), other=0).to(tl.float32)
    q = whole(tl.div_rn(value, tl.zeros_like(value) + scale))
    q = tl.minimum(tl.maximum(q, -PEAK * 1.0), PEAK * 1.0)
    largest = tl.max(tl.abs(q), 1)
    width = (largest.to(tl.int32, bitcast=True) >> 23) - 126  # bit length; below 0 for 0
    shift = tl.maximum(width + 1 - BITS, 0)[:, None]
    top: tl.constexpr = 2 ** (BITS - 1) - 1
    code = tl.minimum(tl.maximum(whole(q * power(-shift)), LOWEST), top)
    cell = k // unit
    place = ((cell // plane) * unit + k % unit) * plane + cell % plane
    to = m * PADDED + place
    mine = own & (k < PADDED)
    if MODE == 2:
        tl.store(low + to, (code * power(shift - 9)).to(tl.float8e4nv), mask=mine)
    else:
        left = (code * power(shift)).to(tl.int32)
        rest = ((left + 128) & 255) - 128
        tl.store(low + to, rest.to(tl.int8), mask=mine)
        if TWO:
            tl.store(high + to, ((left - rest) >> 8).to(tl.int8), mask=mine)
    if tl.program_id(1) == 0:
        tl.store(scales + m, scale)


@triton.jit
def field_of(words, FIELD: tl.constexpr, T: tl.constexpr):
    """Nibble FIELD of int16 words: 1024 + q or 1024 + 16 q in fp16, 128 + q in bf16; by asm."""
    HALVED: tl.constexpr = tl.float16 == T and FIELD % 2 == 1  # ten bits of mantissa: two nibbles
    SHIFT: tl.constexpr = FIELD // 2 * 8 if tl.float16 == T else FIELD * 4
    MASK: tl.constexpr = 0xF0 if HALVED else 0xF
    MAGIC: tl.constexpr = 0x6400 if tl.float16 == T else 0x4300
    if SHIFT:
        words = tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, 0, $2;",  # what enters from the other word is masked
            "=r,r,r",
            [words, tl.full([1, 1], SHIFT, tl.int16)],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    raw = tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xea;",  # (word & mask) | magic
        "=r,r,r,r",
        [words, tl.full([1, 1], MASK, tl.int16), tl.full([1, 1], MAGIC, tl.int16)],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )
    return raw.to(T, bitcast=True)


@triton.jit
def half_step(shift, BY: tl.constexpr, T: tl.constexpr):
    """Shifts [R, P] -> 2^(shift - BY) in T."""
    if tl.float16 == T:
        step = ((shift.to(tl.int16) + (15 - BY)) << 10).to(T, bitcast=True)
    else:
        step = ((shift.to(tl.int16) + (127 - BY)) << 7).to(T, bitcast=True)
    return step


@triton.jit
def half_weight(words, shift, FIELD: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    """Nibble FIELD of int16 words [R, P] -> (q - 8) 2^shift in T, exact."""
    if ASM:
        # One fma: (1024 + 16 q) 2^(shift-4) - (64 + 8) 2^shift, and so on; every term is exact.
        HALVED: tl.constexpr = tl.float16 == T and FIELD % 2 == 1
        BASE: tl.constexpr = 72.0 if HALVED else (1032.0 if tl.float16 == T else 136.0)
        step = half_step(shift, 4 if HALVED else 0, T)
        less = half_step(shift, 0, T) * tl.full([1, 1], -BASE, T)
        value = tl.fma(field_of(words, FIELD, T), step, less)
    else:
        code = ((words >> (4 * FIELD)) & 15).to(tl.float32) - 8.0
        value = (code * power(shift.to(tl.int32))).to(T)
    return value


@triton.jit
def byte_weight(words, shift, FIELD: tl.constexpr, MODE: tl.constexpr, ASM: tl.constexpr):
    """Nibble FIELD of bytes [R, P] -> (q - 8) 2^shift in int8 or e4m3, exact."""
    if ASM:
        step = half_step(shift, 0, tl.float16)
        zero: tl.constexpr = 1536.0 if MODE == 1 else 0.0
        less = tl.fma(step, tl.full([1, 1], -1032.0, tl.float16), tl.full([1, 1], zero, tl.float16))
        low = lowered_bytes(words) if FIELD else words
        if MODE == 1:
            value = bytes_by_asm(low, step, less)
        else:
            value = fp8_by_asm(low, step, less).to(tl.float8e4nv, bitcast=True)
    else:
        nibble = words >> 4 if FIELD else words & 15
        code = (nibble.to(tl.float32) - 8.0) * power(shift.to(tl.int32))
        value = code.to(tl.int8 if MODE == 1 else tl.float8e4nv)
    return value


@triton.jit
def lowered_bytes(words):
    """Bytes shifted right by four, four in a register; what enters is masked."""
    return tl.inline_asm_elementwise(
        "shr.u32 $0, $1, 4;", "=r,r", [words], dtype=tl.uint8, is_pure=True, pack=4
    )


@triton.jit
def bytes_by_asm(words, step, less):
    """(1024 + q) step + less, in [1024, 2048): the low byte of an fp16 mantissa is the number."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 q, a, b;
        and.b32 q, $1, 0x0f0f0f0f;
        prmt.b32 a, q, 0x64646464, 0x4140; prmt.b32 b, q, 0x64646464, 0x4342;
        fma.rn.f16x2 a, a, $2, $4; fma.rn.f16x2 b, b, $3, $5;
        prmt.b32 $0, a, b, 0x6420; }""",
        "=r,r,r,r,r,r",
        [words, step, less],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def fp8_by_asm(words, step, less):
    """(1024 + q) step + less in fp16, then in e4m3, which holds it exactly."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 q, a, b; .reg .b16 c, d;
        and.b32 q, $1, 0x0f0f0f0f;
        prmt.b32 a, q, 0x64646464, 0x4140; prmt.b32 b, q, 0x64646464, 0x4342;
        fma.rn.f16x2 a, a, $2, $4; fma.rn.f16x2 b, b, $3, $5;
        cvt.rn.satfinite.e4m3x2.f16x2 c, a; cvt.rn.satfinite.e4m3x2.f16x2 d, b;
        mov.b32 $0, {c, d}; }""",
        "=r,r,r,r,r,r",
        [words, step, less],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def one_word(
    at, shift, x, high, acc, acc_high, UNIT: tl.constexpr, PER: tl.constexpr, P: tl.constexpr,
    MODE: tl.constexpr, TWO: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of words by the planes of x that its fields meet, added to the sums."""
    word = tl.load(at)
    for field in tl.static_range(UNIT // PER):
        plane = field * PER * P
        part = tl.load(x + plane)
        if MODE == 0:
            acc = tl.dot(half_weight(word, shift, field, part.dtype, ASM), part, acc)
        elif MODE == 1:
            w = byte_weight(word, shift, field, MODE, ASM)
            acc = tl.dot(w, part, acc, out_dtype=tl.int32)
            if TWO:
                acc_high = tl.dot(w, tl.load(high + plane), acc_high, out_dtype=tl.int32)
        else:
            w = byte_weight(word, shift, field, MODE, ASM)
            acc = tl.dot(w, part, acc, max_num_imprecise_acc=P)
    return acc, acc_high


@triton.jit
def multiply(
    high,  # [M, PADDED] int8 where TWO
    x,  # [M, PADDED] in the order of the weights: 16 bits, int8 or e4m3
    words,
    shifts,
    scales,  # [N] of the weights
    x_scales,  # [M], None in HALF
    y,  # [M, N]
    partials,  # [SPLITS, M tiles, N tiles, MB, R] fp32
    counters,  # [M tiles, N tiles] int32 zeros, zeros again at the end
    M,
    N,
    PADDED,
    pairs,
    UNIT: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    MB: tl.constexpr,
    MODE: tl.constexpr,
    TWO: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    INNER: tl.constexpr,
    ASM: tl.constexpr,
):
    """y[m, n] = x_scale scale times the sum over k of x w: one tile of R n and MB m."""
    tile, split, m_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r, j = tl.arange(0, R), tl.arange(0, P)
    m = m_tile * MB + tl.arange(0, MB)
    cell = r[:, None] * P + j[None, :]
    # Rows past the last read it again, and are not stored: no mask, which fp8 loads lack here.
    at = tl.minimum(m, M - 1)[None, :].to(tl.int64) * PADDED + j[:, None]
    each = (pairs + SPLITS - 1) // SPLITS
    PER: tl.constexpr = UNIT // 4 if MODE == 0 else UNIT // 2  # words of a unit
    S: tl.constexpr = tl.int32 if MODE == 1 else tl.float32
    acc = tl.zeros((R, MB), S)
    acc_high = tl.zeros((R, MB), S)
    row = tile.to(tl.int64) * pairs
    for b in tl.range(split * each, min(split * each + each, pairs), num_stages=STAGES):
        both = tl.load(shifts + (row + b) * (R * P) + cell)
        for half in tl.static_range(2):
            shift = both >> 4 if half else both & 15
            start = words + (2 * (row + b) + half) * (PER * R * P) + cell
            k = (2 * b + half) * UNIT * P
            if INNER:  # many rows of x: its planes of one word are all that fits beside W
                for s in tl.range(PER, num_stages=STAGES):
                    acc, acc_high = one_word(
                        start + s * R * P, shift, x + at + (k + s * P), high + at + (k + s * P),
                        acc, acc_high, UNIT, PER, P, MODE, TWO, ASM,
                    )  # fmt: skip
            else:
                for s in tl.static_range(PER):
                    acc, acc_high = one_word(
                        start + s * R * P, shift, x + at + (k + s * P), high + at + (k + s * P),
                        acc, acc_high, UNIT, PER, P, MODE, TWO, ASM,
                    )  # fmt: skip
    total = acc.to(tl.float32)
    if TWO:
        total += acc_high.to(tl.float32) * 256.0
    n = tile * R + r
    scale = tl.load(scales + n, mask=n < N, other=0).to(tl.float32)[:, None]
    if x_scales is not None:
        lift: tl.constexpr = 512.0 if MODE == 2 else 1.0
        scale = scale * (tl.load(x_scales + m, mask=m < M, other=0)[None, :] * lift)
    finish(total * scale, y, partials, counters, M, N, SPLITS, R, MB)


@triton.jit
def expand(
    words, shifts, scales, w, N, PADDED, pairs, UNIT: tl.constexpr, P: tl.constexpr,
    R: tl.constexpr, MODE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """w [N, PADDED] in the order of the words: W_hat, or in BYTES its whole numbers. One pair."""
    tile, b = tl.program_id(0), tl.program_id(1)
    r, j = tl.arange(0, R), tl.arange(0, P)
    n = tile * R + r
    cell = r[:, None] * P + j[None, :]
    PER: tl.constexpr = UNIT // 4 if MODE == 0 else UNIT // 2
    row = tile.to(tl.int64) * pairs + b
    both = tl.load(shifts + row * (R * P) + cell)
    out = w + n[:, None].to(tl.int64) * PADDED + j[None, :]
    for half in tl.static_range(2):
        shift = both >> 4 if half else both & 15
        for s in tl.static_range(PER):
            word = tl.load(words + ((2 * row + half) * PER + s) * (R * P) + cell)
            for field in tl.static_range(UNIT // PER):
                if MODE == 0:
                    value = half_weight(word, shift, field, w.dtype.element_ty, ASM)
                    scale = tl.load(scales + n, mask=n < N, other=0)[:, None]
                    value = (value.to(tl.float32) * scale).to(w.dtype.element_ty)
                else:
                    value = byte_weight(word, shift, field, MODE, ASM)
                at = (2 * b + half) * UNIT * P + (field * PER + s) * P
                tl.store(out + at, value, mask=n[:, None] < N)


STORED: dict[str, tuple[Any, torch.dtype, float]] = {  # dtype of a scale, and the least above 0
    "float32": (tl.float32, torch.float32, 2.0**-126),
    "float16": (tl.float16, torch.float16, 2.0**-24),
    "bfloat16": (tl.bfloat16, torch.bfloat16, 2.0**-126),
}


def mode_of(act: Json | None, m: int, device: torch.device) -> int:
    """Which of the three products: e4m3 where it is exact and the GPU multiplies it.

    For few rows Triton would make fp16 of e4m3 numbers again, and two products of bytes are free.
    """
    if act is None:
        return HALF
    able = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    return FP8 if able and m > FEW and fits_fp8(act) else BYTES


def compressed(x: Tensor, act: Json, lay: Layout, mode: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [m, k] -> high and low (or e4m3) [m, padded], scale [m]; on workspaces, all but the last.

    Of one byte there is no high part: the low one is returned for both.
    """
    m, k = x.shape
    device, two = x.device, mode == BYTES and not one_byte(act)
    kind = torch.float8_e4m3fn if mode == FP8 else torch.int8
    low = WORKSPACES.take("sdr low", m * lay.padded, kind, device)
    high = WORKSPACES.take("sdr high", m * lay.padded, kind, device) if two else low
    floats = WORKSPACES.take("sdr scales", 2 * m, torch.float32, device)
    peaks, scales = floats[:m], floats[m:]
    group = min(act["group"] or lay.padded, lay.padded)
    width = triton.next_power_of_2(group)
    groups = max(1, PIECE // width)
    tl_type, kept, least = STORED[act["scale_dtype"]]
    top = 2 ** (act["bits"] - 1) - 1
    row_peaks[(m,)](x, peaks, k, BLOCK=min(4096, triton.next_power_of_2(k)))
    compress[(m, -(-lay.padded // (group * groups)))](
        x,
        peaks,
        high,
        low,
        scales,
        m,
        k,
        lay.padded,
        group,
        lay.unit,
        lay.plane,
        BITS=act["bits"],
        LOWEST=float(-top if act["saturation"] == "symmetric" else -top - 1),
        PEAK=peak_of(act),
        PER_TENSOR=act["per_tensor"],
        LEAST=least,
        MOST=float(torch.finfo(kept).max),
        T=tl_type,
        GROUPS=groups,
        WIDTH=width,
        MODE=mode,
        TWO=two,
    )
    return high, low, scales


def product(
    x: Tensor,
    words: Tensor,
    shifts: Tensor,
    scale: Tensor,
    act: Json | None,
    lay: Layout,
    mode: int | None = None,
) -> Tensor:
    """x [m, k], tiled weights, scale [n] -> x W^T [m, n] in x's dtype."""
    m = len(x)
    mode = mode_of(act, m, x.device) if mode is None else mode
    y = torch.empty(m, lay.n, dtype=x.dtype, device=x.device)
    if not m:
        return y
    x = x.contiguous()
    wide = act is None and x.dtype == torch.float32  # no tensor core takes its planes
    if wide or (m > EXPAND_ABOVE and whole_products(mode, lay)):
        return by_expanded(x, words, shifts, scale, act, lay)
    if act is None:
        high = low = WORKSPACES.take("sdr x", m * lay.padded, x.dtype, x.device)
        reorder[(m, lay.halves)](x, low, lay.k, lay.padded, UNIT=lay.unit, P=lay.plane)
        x_scales = None
    else:
        high, low, x_scales = compressed(x, act, lay, mode)
    two = act is not None and mode == BYTES and not one_byte(act)
    config = configuration(m, lay, mode, x.device, two)
    mb, splits = config["mb"], config["splits"]
    m_tiles = -(-m // mb)
    partials, counters = memory_for(
        splits if splits > 1 else 0, m_tiles, lay.tiles, mb * ROWS, x.device
    )
    multiply[(lay.tiles, splits, m_tiles)](
        high,
        low,
        words,
        shifts,
        scale,
        x_scales,
        y,
        partials,
        counters,
        m,
        lay.n,
        lay.padded,
        lay.halves // 2,
        UNIT=lay.unit,
        P=lay.plane,
        R=ROWS,
        MB=mb,
        MODE=mode,
        TWO=two,
        SPLITS=splits,
        STAGES=config["stages"],
        INNER=mb > FEW,
        ASM=x.is_cuda,
        num_warps=config["warps"],
    )
    return y


def whole_products(mode: int, lay: Layout) -> bool:
    """True if PyTorch has the product: that of bytes wants rows of W by eight."""
    return mode == HALF or (mode == BYTES and lay.n % 8 == 0)


def by_expanded(
    x: Tensor, words: Tensor, shifts: Tensor, scale: Tensor, act: Json | None, lay: Layout
) -> Tensor:
    """x [m, k] -> [m, n]: W_hat expanded once, and the products of PyTorch."""
    m, mode = len(x), HALF if act is None else BYTES
    kind = x.dtype if act is None else torch.int8
    w = WORKSPACES.take("expanded", lay.n * lay.padded, kind, x.device).view(lay.n, lay.padded)
    expand[(lay.tiles, lay.halves // 2)](
        words,
        shifts,
        scale,
        w,
        lay.n,
        lay.padded,
        lay.halves // 2,
        UNIT=lay.unit,
        P=lay.plane,
        R=ROWS,
        MODE=mode,
        ASM=x.is_cuda and x.dtype != torch.float32,
        num_warps=8,
    )
    if act is None:
        moved = WORKSPACES.take("sdr x", m * lay.padded, x.dtype, x.device)
        reorder[(m, lay.halves)](x, moved, lay.k, lay.padded, UNIT=lay.unit, P=lay.plane)
        return functional.linear(moved.view(m, lay.padded), w)
    high, low, x_scales = compressed(x, act, lay, BYTES)
    total = torch._int_mm(low.view(m, lay.padded), w.T).float()
    if not one_byte(act):
        total.add_(torch._int_mm(high.view(m, lay.padded), w.T), alpha=256)
    return total.mul_(scale * x_scales[:, None]).to(x.dtype)


def configuration(
    m: int, lay: Layout, mode: int, device: torch.device, two: bool = False
) -> dict[str, int]:
    """The measured one where there is, else tiles that keep four blocks on each multiprocessor."""
    known, room = None, ROOM
    if device.type == "cuda":
        key = {"n": lay.n, "k": lay.k, "unit": lay.unit, "mode": MODES[mode], "bytes": 1 + two}
        known = tables.configured("sdr", device, m, **key)
        own = torch.cuda.get_device_properties(device)
        room = getattr(own, "shared_memory_per_block_optin", ROOM)
    if known is not None:
        return dict(known)
    most = 32 if mode == BYTES else 64  # two sums of 64 columns do not fit in registers
    mb = next((size for size in (8, 16, 32) if m <= size), most)
    blocks = lay.tiles * -(-m // mb)
    splits = max(1, min(8, 512 // blocks, lay.halves // 2))
    stages = stages_of(mb, lay.plane) if room >= ROOM else 1
    return {"mb": mb, "splits": splits, "stages": stages, "warps": 4}


def stages_of(mb: int, plane: int) -> int:
    """Passes of the loop under way at once, as far as they fit in shared memory."""
    return 3 if mb > FEW or plane == 32 else 2


@triton.jit
def reorder(x, out, K, PADDED, UNIT: tl.constexpr, P: tl.constexpr):
    """x [M, K] -> [M, PADDED] in the order of the weights: one half of one row."""
    m, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inner = tl.arange(0, P)[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    k = h * (P * UNIT) + inner
    value = tl.load(x + m * K + k, mask=k < K, other=0)
    moved = h * (P * UNIT) + tl.arange(0, UNIT)[None, :] * P + tl.arange(0, P)[:, None]
    tl.store(out + m * PADDED + moved, value)


def build(name: str, mode: int, two: bool, mb: int, core: str, **how: Any) -> Build:
    """`multiply` as a layer of 4096 input channels in groups of 16 would run it."""
    element = {HALF: "*bf16", BYTES: "*i8", FP8: "*fp8e4nv"}[mode]
    plane = tiled(ROWS, 4096, 16, 4 if mode == HALF else 2).plane
    types = {"high": element, "x": element, "words": "*u8", "shifts": "*u8", "scales": "*fp32"}
    types |= {"y": "*bf16", "partials": "*fp32", "counters": "*i32"}
    types |= dict.fromkeys(("M", "N", "PADDED", "pairs"), "i32")
    types |= {"words": "*i16"} if mode == HALF else {"x_scales": "*fp32"}
    constants: dict[str, object] = {
        "UNIT": 16,
        "P": plane,
        "R": ROWS,
        "MB": mb,
        "MODE": mode,
        "TWO": two,
        "SPLITS": 4 if mb <= FEW else 1,
        "STAGES": stages_of(mb, plane),
        "INNER": mb > FEW,
        "ASM": True,
    }
    return Build(
        name=name,
        kernel=multiply,
        types=types,
        constants=constants | ({"x_scales": None} if mode == HALF else {}),
        stages=stages_of(mb, plane),
        divisible=("N", "PADDED"),
        # Weights are what must come quickly for few rows; a loop in a loop has no one length.
        per_pass=ROWS * 2 * plane * 16 if mb <= FEW else 0,
        tensor_core=core,
        **how,
    )


def build_expand(mode: int) -> Build:
    """`expand` to bf16, or to bytes."""
    plane = tiled(ROWS, 4096, 16, 4 if mode == HALF else 2).plane
    types = {"shifts": "*u8", "scales": "*fp32"} | dict.fromkeys(("N", "PADDED", "pairs"), "i32")
    types |= {"words": "*i16", "w": "*bf16"} if mode == HALF else {"words": "*u8", "w": "*i8"}
    constants = {"UNIT": 16, "P": plane, "R": ROWS, "MODE": mode, "ASM": True}
    divisible = ("N", "PADDED")
    name = f"expand-{MODES[mode]}"
    return Build(name, expand, types, constants, 8, divisible=divisible, targets=(90,))


def build_compress(name: str, bits: int, mode: int) -> Build:
    """`compress` of 16 bits per tensor in groups of 16, as QRazor has them."""
    types = {"x": "*bf16", "peaks": "*fp32", "high": "*i8", "low": "*i8", "scales": "*fp32"}
    types |= {"low": "*fp8e4nv"} if mode == FP8 else {}
    types |= dict.fromkeys(("M", "K", "PADDED", "GROUP", "unit", "plane"), "i32")
    constants: dict[str, object] = {
        "BITS": bits,
        "LOWEST": -(2.0 ** (bits - 1)),
        "PEAK": 2**15 - 1,
        "PER_TENSOR": True,
        "LEAST": STORED["float32"][2],
        "MOST": torch.finfo(torch.float32).max,
        "T": tl.float32,
        "GROUPS": PIECE // 16,
        "WIDTH": 16,
        "MODE": mode,
        "TWO": mode == BYTES,
    }
    divisible = ("K", "PADDED", "GROUP", "unit", "plane")
    return Build(f"compress-{name}", compress, types, constants, divisible=divisible, targets=(90,))


BUILDS = (
    build("a16-m8", HALF, False, 8, "HMMA|HGMMA|UTCHMMA", budget=3.2),
    build("a8-m8", BYTES, True, 8, "IMMA|IGMMA|UTCIMMA", budget=3.2),
    build("a16-m64", HALF, False, 64, "HMMA|HGMMA|UTCHMMA"),
    build("a8-m32", BYTES, True, 32, "IMMA|IGMMA|UTCIMMA"),
    build_expand(HALF),
    build_expand(BYTES),
    build_compress("a8", 8, BYTES),
    build_compress("a4-fp8", 4, FP8),
    Build(
        "row_peaks",
        row_peaks,
        {"x": "*bf16", "peaks": "*fp32", "K": "i32"},
        {"BLOCK": 4096},
        targets=(90,),
    ),
    Build(
        "reorder",
        reorder,
        {"x": "*bf16", "out": "*bf16", "K": "i32", "PADDED": "i32"},
        {"UNIT": 16, "P": 64},
        divisible=("K", "PADDED"),
        targets=(90,),
    ),
    build("a4-m64", FP8, False, 64, "QMMA|QGMMA|UTCQMMA", targets=(90, 100)),
)
