"""Triton: E4M3 weights by E4M3 or 16-bit activations, scales per group of input channels or row.

`few` takes the numbers in 16 bits, which hold them all, divided by 256 because that only moves
bits; at 8 columns Triton would convert them to fp16 even where the GPU multiplies E4M3, at 16
instructions a weight. `many` multiplies E4M3 as it is on GPUs that can (NATIVE, sm_89 on). Tiles
are those of kernels.w8_a8; partial sums are fp32, added in the order of the input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tables
from kernels.aot import Build
from kernels.quantize.kernel import e4m3_rounded, e4m3_scale, launch_e4m3_rows, quotient
from kernels.split_k import finish, memory_for, splits_for
from kernels.w8_a8.kernel import FEW, MOST_SPLITS, RESCANNED, tile_of
from kernels.workspace import WORKSPACES


@triton.jit
def row_scale(x, rows, m, k, DTYPE, SHARED: tl.constexpr, MB: tl.constexpr, SCAN: tl.constexpr):
    """Scales [MB] fp32 of the rows of x [m, k]."""
    peak = tl.zeros((MB,), tl.float32)
    for start in range(0, k, SCAN):
        column = start + tl.arange(0, SCAN)
        inside = (rows < m)[:, None] & (column < k)[None, :]
        v = tl.load(x + rows.to(tl.int64)[:, None] * k + column[None, :], mask=inside, other=0.0)
        peak = tl.maximum(peak, tl.max(tl.abs(v.to(tl.float32)), 1))
    if SHARED:
        peak = tl.max(peak) + tl.zeros((MB,), tl.float32)
    return e4m3_scale(peak, DTYPE)


@triton.jit
def e4m3_fp16(code, ASM: tl.constexpr):
    """Codes [...] uint8 -> their numbers / 256, fp16 and exact: the same bits, another bias."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t, s;
            prmt.b32 t, $2, 0, 0x1404; shr.u32 s, t, 1; and.b32 t, t, 0x80008000;
            lop3.b32 $0, s, 0x3f803f80, t, 0xea;
            prmt.b32 t, $2, 0, 0x3424; shr.u32 s, t, 1; and.b32 t, t, 0x80008000;
            lop3.b32 $1, s, 0x3f803f80, t, 0xea; }""",
            "=&r,=&r,r",
            [code],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    wide = code.to(tl.int16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def e4m3_bf16(code, ASM: tl.constexpr):
    """Codes [...] uint8 -> their numbers / 256, bf16 and exact: moved bits are 2^-120 too small."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t, s, r, z;
            mov.b32 r, 0x77807780; mov.b32 z, 0x80008000;
            prmt.b32 t, $2, 0, 0x1404; shr.u32 s, t, 4; and.b32 t, t, 0x80008000;
            lop3.b32 $0, s, 0x07f007f0, t, 0xea; fma.rn.bf16x2 $0, $0, r, z;
            prmt.b32 t, $2, 0, 0x3424; shr.u32 s, t, 4; and.b32 t, t, 0x80008000;
            lop3.b32 $1, s, 0x07f007f0, t, 0xea; fma.rn.bf16x2 $1, $1, r, z; }""",
            "=&r,=&r,r",
            [code],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return e4m3_fp16(code, False).to(tl.bfloat16)


@triton.jit
def numbers(code, like, ASM: tl.constexpr):
    """Codes -> their numbers / 256 in the dtype of `like`."""
    if like.dtype == tl.bfloat16:
        return e4m3_bf16(code, ASM)
    return e4m3_fp16(code, ASM).to(like.dtype)


@triton.jit
def few(
    x,
    a,
    a_scale,
    w,
    w_scale,
    y,
    partials,
    counters,
    m,
    n,
    k,
    width,
    group,
    groups,
    blocks,
    per_split,
    ROUNDED: tl.constexpr,
    FUSED: tl.constexpr,
    DTYPE: tl.constexpr,
    SHARED: tl.constexpr,
    GROUPED: tl.constexpr,
    NATIVE: tl.constexpr,
    ASM: tl.constexpr,
    SPLITS: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCAN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y [m, n] = act(x) W_hat^T for m <= MB; w [n, width] codes, w_scale [n, groups].

    ROUNDED activations are codes a [m, width] with a_scale [m], or made here of x [m, k] if FUSED;
    without them x is multiplied as it is. GROUPED: a block of input channels has its own scale.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = tile * BN + tl.arange(0, BN)
    near = tl.minimum(row, n - 1)  # rows past the last repeat it and are not stored
    token = tl.arange(0, MB)
    scale = tl.full((MB,), 1.0, tl.float32)
    if ROUNDED:
        if FUSED:
            scale = row_scale(x, token, m, k, DTYPE, SHARED, MB, SCAN)
        else:
            scale = tl.load(a_scale + token, mask=token < m, other=1.0)
    inverse = tl.div_rn(1.0, scale)
    acc = tl.zeros((BN, MB), tl.float32)
    last = tl.minimum(blocks, (split + 1) * per_split)
    for block in tl.range(split * per_split, last, num_stages=STAGES):
        column = block * BK + tl.arange(0, BK)
        q = tl.load(w + near.to(tl.int64)[:, None] * width + column[None, :])  # [BN, BK]
        if ROUNDED and not FUSED:
            at = a + token.to(tl.int64)[None, :] * width + column[:, None]
            code = tl.load(at, mask=(token < m)[None, :], other=0)
            v = e4m3_fp16(code, ASM) * 256.0  # exact too
        else:
            inside = (column < k)[:, None] & (token < m)[None, :]
            at = x + token.to(tl.int64)[None, :] * k + column[:, None]
            v = tl.load(at, mask=inside, other=0.0)  # [BK, MB]
            if ROUNDED:
                v = quotient(v.to(tl.float32), scale[None, :], inverse[None, :], ASM)
                v = v.to(tl.float8e4nv) if NATIVE else e4m3_rounded(v)
                v = v.to(tl.float16)
        part = tl.dot(numbers(q, v, ASM), v, input_precision="ieee")
        if GROUPED:
            at_group = tl.minimum(block * BK // group, groups - 1)
            part *= tl.load(w_scale + near * groups + at_group)[:, None]
        acc += part
    acc *= 256.0 * scale[None, :]
    if not GROUPED:
        acc *= tl.load(w_scale + near)[:, None]
    finish(acc, y, partials, counters, m, n, SPLITS, BN, MB)


@triton.jit
def many(
    a,
    a_scale,
    w,
    w_scale,
    y,
    m,
    n,
    width,
    group,
    groups,
    GROUPED: tl.constexpr,
    NATIVE: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y [m, n] from codes a [m, width]; GROUP rows of tiles share the weights they read."""
    token, row = tile_of(m, n, BM, BN, GROUP)
    near_token, near = tl.minimum(token, m - 1), tl.minimum(row, n - 1)
    column = tl.arange(0, BK)
    from_a = a + near_token.to(tl.int64)[:, None] * width + column[None, :]
    from_w = w + near.to(tl.int64)[None, :] * width + column[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        v, q = tl.load(from_a + start), tl.load(from_w + start)
        if NATIVE:  # Hopper's sums are short of 32 bits: each block's is added up in fp32
            v, q = v.to(tl.float8e4nv, bitcast=True), q.to(tl.float8e4nv, bitcast=True)
            part = tl.dot(v, q, max_num_imprecise_acc=BK)
        else:
            part = tl.dot(e4m3_fp16(v, ASM), e4m3_fp16(q, ASM)) * 65536.0
        if GROUPED:
            at_group = tl.minimum(start // group, groups - 1)
            part *= tl.load(w_scale + near * groups + at_group)[None, :]
        acc += part
    acc *= tl.load(a_scale + near_token)[:, None]
    if not GROUPED:
        acc *= tl.load(w_scale + near)[None, :]
    at = y + token.to(tl.int64)[:, None] * n + row[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(token < m)[:, None] & (row < n)[None, :])


@dataclass(frozen=True)
class Rounding:
    """How activations are rounded to E4M3."""

    scale_dtype: str
    shared: bool  # one scale for all tokens


def product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    group: int,
    rounding: Rounding | None,
    native: bool,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """x [m, k], codes [n, width] uint8, scale [n, groups] -> [m, n]. At most FEW without rounding.

    `group`: input channels per scale, a multiple of 32 if there are several scales a row.
    """
    m, k = x.shape
    n, width = codes.shape
    y = x.new_empty(m, n)
    if m == 0:
        return y
    if config is None:
        key = {"n": n, "k": k, "group": group, "rounded": rounding is not None}
        config = tables.configured("fp8", x.device, m, **key)
    config = config or heuristic(m, n, width, group if scale.shape[1] > 1 else 0, x.device)
    x = x.contiguous()
    a, scales = x, scale
    if rounding and not config["fused"]:
        a, scales = rounded_rows(x, width, rounding.scale_dtype, rounding.shared)
    if m > FEW:
        launch_many(a, scales, codes, scale, y, group, native, config)
    else:
        launch_few(x, a, scales, rounding, codes, scale, y, group, native, config)
    return y


def rounded_rows(x: Tensor, width: int, scale_dtype: str, shared: bool) -> tuple[Tensor, Tensor]:
    """x [m, k] -> codes [m, width] uint8 and scales [m] fp32, in memory that is used again."""
    m = len(x)
    a = WORKSPACES.take("e4m3_rows", m * width, torch.uint8, x.device).view(m, width)
    scales = WORKSPACES.take("row_scales", m, torch.float32, x.device)
    launch_e4m3_rows(x, (a, scales), scale_dtype, shared)
    return a, scales


def heuristic(m: int, n: int, width: int, group: int, device: torch.device) -> Mapping[str, Any]:
    """A configuration for a shape that was not measured; a block of channels has one scale."""
    bk = next(b for b in (128, 64, 32) if width % b == 0 and group % b == 0)
    if m > FEW:
        warps = 8 if m > 256 and n >= 4096 else 4
        return {"fused": False, "bm": 128, "bn": 128, "bk": bk, "warps": warps, "stages": 3}
    tiles = triton.cdiv(n, 128)
    splits = min(splits_for(tiles, max(width // bk // 2, 1), device), MOST_SPLITS)
    fused = m <= 16 and tiles * splits * m * width <= RESCANNED
    bk = min(bk, 64) if fused else bk  # tokens are rounded in registers, which 128 exceed
    return {"fused": fused, "bn": 128, "bk": bk, "splits": splits, "warps": 4, "stages": 4}


def launch_few(
    x: Tensor,
    a: Tensor,
    a_scale: Tensor,
    rounding: Rounding | None,
    codes: Tensor,
    scale: Tensor,
    y: Tensor,
    group: int,
    native: bool,
    config: Mapping[str, Any],
) -> None:
    """Up to FEW tokens."""
    (m, k), (n, width) = x.shape, codes.shape
    tiles, blocks = triton.cdiv(n, config["bn"]), triton.cdiv(width, config["bk"])
    per_split = triton.cdiv(blocks, config["splits"])
    splits = triton.cdiv(blocks, per_split)
    columns = max(8, triton.next_power_of_2(m))
    partials, counters = memory_for(splits, 1, tiles, config["bn"] * columns, x.device)
    few[(tiles, splits)](
        x,
        a,
        a_scale,
        codes,
        scale,
        y,
        partials,
        counters,
        m,
        n,
        k,
        width,
        group,
        scale.shape[1],
        blocks,
        per_split,
        ROUNDED=rounding is not None,
        FUSED=config["fused"],
        DTYPE=rounding.scale_dtype if rounding else "float32",
        SHARED=rounding.shared if rounding else False,
        GROUPED=scale.shape[1] > 1,
        NATIVE=native,
        ASM=x.is_cuda,
        SPLITS=splits,
        MB=columns,
        BN=config["bn"],
        BK=config["bk"],
        SCAN=4096 // columns,
        STAGES=config["stages"],
        num_warps=config["warps"],
    )


def launch_many(
    a: Tensor,
    a_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    y: Tensor,
    group: int,
    native: bool,
    config: Mapping[str, Any],
) -> None:
    """Any number of tokens, in codes [m, width]."""
    m, (n, width) = len(a), codes.shape
    tiles = triton.cdiv(m, config["bm"]) * triton.cdiv(n, config["bn"])
    many[(tiles,)](
        a,
        a_scale,
        codes,
        scale,
        y,
        m,
        n,
        width,
        group,
        scale.shape[1],
        GROUPED=scale.shape[1] > 1,
        NATIVE=native,
        ASM=a.is_cuda,
        BM=config["bm"],
        BN=config["bn"],
        BK=config["bk"],
        GROUP=8,
        STAGES=config["stages"],
        num_warps=config["warps"],
    )


TYPES = {
    "a": "*u8",
    "a_scale": "*fp32",
    "w": "*u8",
    "w_scale": "*fp32",
    "y": "*bf16",
    "m": "i32",
    "n": "i32",
    "width": "i32",
    "group": "i32",
    "groups": "i32",
}
FEW_TYPES = {
    **TYPES,
    "x": "*bf16",
    "partials": "*fp32",
    "counters": "*i32",
    "k": "i32",
    "blocks": "i32",
    "per_split": "i32",
}
FUSED = {
    "ROUNDED": True,
    "FUSED": True,
    "DTYPE": "float32",
    "SHARED": False,
    "GROUPED": False,
    "NATIVE": True,
    "ASM": True,
    "SPLITS": 8,
    "MB": 8,
    "BN": 128,
    "SCAN": 512,
    "STAGES": 4,
}
MANY = {
    "GROUPED": True,
    "NATIVE": True,
    "ASM": True,
    "BM": 128,
    "BN": 128,
    "BK": 128,
    "GROUP": 8,
    "STAGES": 3,
}
OLD, NEW = (80,), (90, 100)
WHOLE = ("n", "k", "width")
CORES = "HMMA|HGMMA|QMMA|QGMMA|UTCHMMA|UTCQMMA"


def few_build(name: str, targets: tuple[int, ...], **constants: object) -> Build:
    """One of `few`, kept within the issue rate of W8; a fused one takes 64 channels a pass."""
    constants = {**FUSED, **constants}
    bk = 64 if constants["FUSED"] else 128
    return Build(
        name,
        few,
        FEW_TYPES,
        {**constants, "BK": bk},
        warps=4,
        stages=4,
        divisible=WHOLE,
        per_pass=128 * bk,
        budget=7.8,
        tensor_core=CORES,
        targets=targets,
    )


def many_build(name: str, targets: tuple[int, ...], **constants: object) -> Build:
    """One of `many`."""
    return Build(
        name,
        many,
        TYPES,
        {**MANY, **constants},
        warps=8,
        divisible=WHOLE,
        per_pass=128 * 128,
        tensor_core=CORES,
        targets=targets,
    )


BUILDS = (
    few_build("few_fused", NEW),
    few_build("few_fused_fp16", OLD, NATIVE=False),
    few_build("few_codes_64", OLD + NEW, FUSED=False, MB=64, SCAN=64),
    few_build("few_weights_only", OLD + NEW, ROUNDED=False, FUSED=False, GROUPED=True),
    many_build("many_grouped", NEW),
    many_build("many_fp16", OLD, NATIVE=False, GROUPED=False),
)
