"""Triton: int8 codes by int8 codes into exact 32-bit sums, activations rounded on the way.

`few` has the weights on the left, so that a token costs eight columns of a tensor-core product and
not sixteen rows; several programs share a tile of it, and the last to finish adds their whole
sums. It rounds its tokens itself where that is cheaper than a launch. `many` is a matrix product.
Both may end with outlier columns in 16 bits (kernels.llm_int8).
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
from kernels.quantize import Grid
from kernels.quantize.kernel import (
    int_code,
    int_grid,
    launch_int_rows,
    launch_peak_rows,
    nearest,
    peak_grid,
)
from kernels.split_k import memory_for, splits_for, summed
from kernels.workspace import WORKSPACES

FEW = 64  # tokens, above which `many` multiplies
MOST_SPLITS = 16
# Numbers that all programs together may read again before a launch of its own (2 us) is cheaper.
RESCANNED = 6_000_000


@triton.jit
def row_grid(
    x,
    keep,
    rows,
    m,
    k,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    SHARED: tl.constexpr,
    PEAK: tl.constexpr,
    MB: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Scales of the rows [MB] fp32 and what codes need beside: lack, or LLM.int8()'s factor."""
    low = tl.zeros((MB,), tl.float32)
    high = tl.zeros((MB,), tl.float32)
    for start in range(0, k, SCAN):
        column = start + tl.arange(0, SCAN)
        inside = (rows < m)[:, None] & (column < k)[None, :]
        v = tl.load(x + rows.to(tl.int64)[:, None] * k + column[None, :], mask=inside, other=0.0)
        v = v.to(tl.float32)
        if PEAK:
            kept = tl.load(keep + column, mask=column < k, other=0)
            v = tl.where((kept != 0)[None, :], v, 0.0)
        low = tl.minimum(low, tl.min(v, 1))
        high = tl.maximum(high, tl.max(v, 1))
    if SHARED:
        low = tl.min(low) + tl.zeros((MB,), tl.float32)
        high = tl.max(high) + tl.zeros((MB,), tl.float32)
    if PEAK:
        scale, beside = peak_grid(tl.maximum(-low, high))
    else:
        scale, beside = int_grid(low, high, BITS, STEPS, DTYPE)
    return scale, beside


@triton.jit
def outlier_sums(
    x,
    index,
    outliers,
    rows,
    tokens,
    m,
    k,
    C: tl.constexpr,
    SCALED: tl.constexpr,
    LEFT: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
):
    """rows [R] of the weights and tokens [M], over C outlier channels -> [R, M], else [M, R] fp32.

    SCALED: outliers [n, C] are int8 codes, else 16-bit weights. LEFT: weights on the left.
    """
    CHUNK: tl.constexpr = 32
    acc = tl.zeros((R, M) if LEFT else (M, R), tl.float32)
    for start in range(0, C, CHUNK):
        c = start + tl.arange(0, CHUNK)
        channel = tl.load(index + c)  # [CHUNK], -1 past the last
        listed = (channel >= 0)[None, :] & (tokens < m)[:, None]
        at = x + tokens.to(tl.int64)[:, None] * k + channel[None, :]
        v = tl.load(at, mask=listed, other=0.0)  # [M, CHUNK]
        w = tl.load(outliers + rows.to(tl.int64)[:, None] * C + c[None, :])  # 0 past the last
        if SCALED:
            w = w.to(v.dtype)  # whole numbers up to 128: exact
        elif v.dtype != w.dtype:
            v, w = v.to(tl.float32), w.to(tl.float32)
        if LEFT:
            acc = tl.dot(w, tl.trans(v), acc, input_precision="ieee")
        else:
            acc = tl.dot(v, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def scaled(total, x_scale, w_scale, beside, C: tl.constexpr, SCALED: tl.constexpr):
    """32-bit sums -> fp32, outliers added; SCALED: as codes, to which the rows' scales apply."""
    y = total.to(tl.float32) * x_scale
    if C == 0:
        return y * w_scale
    if SCALED:
        return (y + beside) * w_scale
    return y * w_scale + beside


@triton.jit
def few(
    x,
    a,
    a_scale,
    offsets,
    w,
    w_scale,
    shift,
    sums,
    keep,
    index,
    outliers,
    y,
    partials,
    counters,
    m,
    n,
    k,
    width,
    blocks,
    per_split,
    FUSED: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    SHARED: tl.constexpr,
    PEAK: tl.constexpr,
    SHIFTED: tl.constexpr,
    C: tl.constexpr,
    SCALED: tl.constexpr,
    FMA: tl.constexpr,
    SPLITS: tl.constexpr,
    MB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCAN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y [m, n] = act(x) W_hat^T for m <= MB. FUSED: x [m, k] is rounded here, else a [m, width].

    w = (q + shift) w_scale and x = (a + lack) a_scale, so the sum of their products is a sum of
    whole numbers, a q + a shift + lack sums with sums [n] those of q + shift.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    row = tile * BN + tl.arange(0, BN)
    near = tl.minimum(row, n - 1)  # rows past the last repeat it and are not stored
    token = tl.arange(0, MB)
    if FUSED:
        scale, beside = row_grid(x, keep, token, m, k, BITS, STEPS, DTYPE, SHARED, PEAK, MB, SCAN)
    else:
        scale = tl.load(a_scale + token, mask=token < m, other=1.0)
        beside = tl.zeros((MB,), tl.float32)
        if STEPS == 0:
            beside = tl.load(offsets + 2 * token, mask=token < m, other=0).to(tl.float32)
    inverse = tl.div_rn(1.0, scale)
    acc = tl.zeros((BN, MB), tl.int32)
    total = tl.zeros((MB,), tl.int32)
    last = tl.minimum(blocks, (split + 1) * per_split)
    for block in tl.range(split * per_split, last, num_stages=STAGES):
        column = block * BK + tl.arange(0, BK)
        q = tl.load(w + near.to(tl.int64)[:, None] * width + column[None, :])  # [BN, BK]
        if FUSED:
            inside = (column < k)[:, None] & (token < m)[None, :]
            at = x + token.to(tl.int64)[None, :] * k + column[:, None]
            v = tl.load(at, mask=inside, other=0.0).to(tl.float32)  # [BK, MB]
            if PEAK:
                kept = tl.load(keep + column, mask=column < k, other=0)
                v = tl.where((kept != 0)[:, None], v, 0.0)
                code = nearest(v * beside[None, :])
            else:
                code = int_code(v, scale[None, :], inverse[None, :], beside[None, :], BITS, FMA)
                code = tl.where(inside, code, 0.0)
            code = code.to(tl.int8)
        else:
            at = a + token.to(tl.int64)[None, :] * width + column[:, None]
            code = tl.load(at, mask=(token < m)[None, :], other=0)
        if SHIFTED:
            total += tl.sum(code.to(tl.int32), 0)
        acc = tl.dot(q, code, acc, out_dtype=tl.int32)
    if SHIFTED:
        acc += tl.load(shift + near)[:, None] * total[None, :]
    acc, mine = summed(acc, partials, counters, SPLITS, BN, MB)
    if mine:
        if STEPS == 0:
            acc += tl.load(sums + near)[:, None] * beside.to(tl.int32)[None, :]
        extra = 0.0
        if C > 0:
            extra = outlier_sums(x, index, outliers, near, token, m, k, C, SCALED, True, BN, MB)
        rows_scale = tl.load(w_scale + near)
        out = scaled(acc, scale[None, :], rows_scale[:, None], extra, C, SCALED)
        at = y + token.to(tl.int64)[None, :] * n + row[:, None]
        tl.store(at, out.to(y.dtype.element_ty), mask=(token < m)[None, :] & (row < n)[:, None])


@triton.jit
def tile_of(m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Tokens [BM] and rows of the weights [BN] of a program; GROUP tiles in turn share the rows."""
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inner = program % (GROUP * tiles_n)
    token = (first + inner % height) * BM + tl.arange(0, BM)
    return token, inner // height * BN + tl.arange(0, BN)


@triton.jit
def many(
    x,
    a,
    a_scale,
    offsets,
    w,
    w_scale,
    shift,
    sums,
    index,
    outliers,
    y,
    m,
    n,
    k,
    width,
    STEPS: tl.constexpr,
    SHIFTED: tl.constexpr,
    C: tl.constexpr,
    SCALED: tl.constexpr,
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
    acc = tl.zeros((BM, BN), tl.int32)
    for start in tl.range(0, width, BK, num_stages=STAGES):
        acc = tl.dot(tl.load(from_a + start), tl.load(from_w + start), acc, out_dtype=tl.int32)
    if SHIFTED:
        acc += tl.load(offsets + 2 * near_token + 1)[:, None] * tl.load(shift + near)[None, :]
    if STEPS == 0:
        acc += tl.load(offsets + 2 * near_token)[:, None] * tl.load(sums + near)[None, :]
    extra = 0.0
    if C > 0:
        extra = outlier_sums(x, index, outliers, near, near_token, m, k, C, SCALED, False, BN, BM)
    tokens_scale, rows_scale = tl.load(a_scale + near_token), tl.load(w_scale + near)
    out = scaled(acc, tokens_scale[:, None], rows_scale[None, :], extra, C, SCALED)
    at = y + token.to(tl.int64)[:, None] * n + row[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=(token < m)[:, None] & (row < n)[None, :])


@dataclass(frozen=True)
class Weight:
    """What `product` multiplies by: codes [n, width] int8, scale [n], and what the formats need."""

    codes: Tensor
    scale: Tensor
    shift: Tensor | None = None  # [n] int32, middle - zero of the weights
    sums: Tensor | None = None  # [n] int32, of code + shift, if activations have zero points
    keep: Tensor | None = None  # [k] uint8, 0 at outlier channels
    index: Tensor | None = None  # [C] int32, outlier channels, -1 past the last
    outliers: Tensor | None = None  # [n, C], 0 past the last
    scaled: bool = False  # the outliers are codes


def product(
    x: Tensor,
    weight: Weight,
    grid: Grid,
    name: str = "w8_a8",
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """x [m, k] -> [m, n] in x's dtype. An int grid of activations, or LLM.int8()'s with `keep`."""
    m, k = x.shape
    n, width = weight.codes.shape
    y = x.new_empty(m, n)
    if m == 0:
        return y
    if config is None:
        config = tables.configured(name, x.device, m, n=n, k=k)
    config = config or heuristic(m, n, width, x.device, weight.outliers is not None)
    x = x.contiguous()
    a, scales, offsets = (x, weight.scale, weight.scale)
    if not config["fused"]:
        a = WORKSPACES.take("int8_rows", m * width, torch.int8, x.device).view(m, width)
        scales = WORKSPACES.take("row_scales", m, torch.float32, x.device)
        offsets = WORKSPACES.take("row_offsets", 2 * m, torch.int32, x.device)
        if weight.keep is None:
            launch_int_rows(x, (a, scales, offsets), grid)
        else:
            launch_peak_rows(x, weight.keep, a, scales)
    launch = launch_few if m <= FEW else launch_many
    launch(x, (a, scales, offsets), weight, y, config, grid)
    return y


def heuristic(
    m: int, n: int, width: int, device: torch.device, outliers: bool = False
) -> Mapping[str, Any]:
    """A configuration for a shape that was not measured; outliers take as many sums again."""
    bk = 128 if width % 128 == 0 else 64
    if m > FEW:
        wide = m > 256 and n >= 4096
        bn = 256 if wide and not outliers else 128 if n >= 8192 or wide else 64
        return {
            "fused": False,
            "bm": 128,
            "bn": bn,
            "bk": bk,
            "warps": 8 if wide or outliers else 4,
            "stages": 3,
        }
    tiles, blocks = triton.cdiv(n, 64), width // bk
    splits = min(splits_for(tiles, max(blocks // 2, 1), device), MOST_SPLITS)
    return {
        "fused": m <= 16 and tiles * splits * m * width <= RESCANNED,
        "bn": 64,
        "bk": bk,
        "splits": splits,
        "warps": 4,
        "stages": 4,
    }


def launch_few(
    x: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    weight: Weight,
    y: Tensor,
    config: Mapping[str, Any],
    grid: Grid,
) -> None:
    """Up to FEW tokens."""
    (m, k), (n, width) = x.shape, weight.codes.shape
    tiles, blocks = triton.cdiv(n, config["bn"]), triton.cdiv(width, config["bk"])
    per_split = triton.cdiv(blocks, config["splits"])
    splits = triton.cdiv(blocks, per_split)
    columns = max(8, triton.next_power_of_2(m))
    size = config["bn"] * columns
    partials, counters = memory_for(splits, 1, tiles, size, x.device, torch.int32)
    few[(tiles, splits)](
        x,
        *rows,
        weight.codes,
        weight.scale,
        *or_scale(weight, "shift", "sums", "keep", "index", "outliers"),
        y,
        partials,
        counters,
        m,
        n,
        k,
        width,
        blocks,
        per_split,
        FUSED=config["fused"],
        BITS=grid.bits,
        STEPS=grid.steps,
        DTYPE=grid.scale_dtype,
        SHARED=grid.shared,
        PEAK=weight.keep is not None,
        SHIFTED=weight.shift is not None,
        C=0 if weight.outliers is None else weight.outliers.shape[1],
        SCALED=weight.scaled,
        FMA=x.is_cuda,
        SPLITS=splits,
        MB=columns,
        BN=config["bn"],
        BK=config["bk"],
        SCAN=4096 // columns,
        STAGES=config["stages"],
        num_warps=config["warps"],
    )


def launch_many(
    x: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    weight: Weight,
    y: Tensor,
    config: Mapping[str, Any],
    grid: Grid,
) -> None:
    """Any number of tokens."""
    (m, k), (n, width) = x.shape, weight.codes.shape
    tiles = triton.cdiv(m, config["bm"]) * triton.cdiv(n, config["bn"])
    many[(tiles,)](
        x,
        *rows,
        weight.codes,
        weight.scale,
        *or_scale(weight, "shift", "sums", "index", "outliers"),
        y,
        m,
        n,
        k,
        width,
        STEPS=grid.steps,
        SHIFTED=weight.shift is not None,
        C=0 if weight.outliers is None else weight.outliers.shape[1],
        SCALED=weight.scaled,
        BM=config["bm"],
        BN=config["bn"],
        BK=config["bk"],
        GROUP=8,
        STAGES=config["stages"],
        num_warps=config["warps"],
    )


def or_scale(weight: Weight, *names: str) -> list[Tensor]:
    """Tensors of a weight; where it has none its scale, a pointer that is not read."""
    found = (getattr(weight, name) for name in names)
    return [weight.scale if tensor is None else tensor for tensor in found]


TYPES = {
    "x": "*bf16",
    "a": "*i8",
    "a_scale": "*fp32",
    "offsets": "*i32",
    "w": "*i8",
    "w_scale": "*fp32",
    "shift": "*i32",
    "sums": "*i32",
    "index": "*i32",
    "outliers": "*bf16",
    "y": "*bf16",
    "m": "i32",
    "n": "i32",
    "k": "i32",
    "width": "i32",
}
FEW_TYPES = {
    **TYPES,
    "keep": "*u8",
    "partials": "*i32",
    "counters": "*i32",
    "blocks": "i32",
    "per_split": "i32",
}
PLAIN = {"STEPS": 127.0, "SHIFTED": False, "C": 0, "SCALED": False}
FEW_PLAIN = {
    **PLAIN,
    "FUSED": True,
    "BITS": 8,
    "DTYPE": "float32",
    "SHARED": False,
    "PEAK": False,
    "FMA": True,
    "SPLITS": 8,
    "MB": 8,
    "BN": 64,
    "BK": 128,
    "SCAN": 512,
    "STAGES": 4,
}
MANY_PLAIN = {**PLAIN, "BM": 128, "BN": 256, "BK": 128, "GROUP": 8, "STAGES": 3}
WHOLE = ("n", "k", "width")
CORES = "IMMA|IGMMA|UTCIMMA|UTCQMMA|UTCOMMA"
BUILDS = (
    Build(
        "few_fused",
        few,
        FEW_TYPES,
        FEW_PLAIN,
        stages=4,
        divisible=WHOLE,
        per_pass=64 * 128,
        budget=7.8,
        tensor_core=CORES,
    ),
    Build(
        "few_codes_64",
        few,
        FEW_TYPES,
        {**FEW_PLAIN, "FUSED": False, "MB": 64, "SCAN": 64, "STEPS": 0.0, "SHIFTED": True},
        stages=4,
        divisible=WHOLE,
        per_pass=64 * 128,
        budget=7.8,
        tensor_core=CORES,
    ),
    Build(
        "many",
        many,
        TYPES,
        MANY_PLAIN,
        warps=8,
        divisible=WHOLE,
        per_pass=256 * 128,
        tensor_core=CORES,
    ),
    Build(
        "many_zeros",
        many,
        TYPES,
        {**MANY_PLAIN, "STEPS": 0.0, "SHIFTED": True, "BM": 128, "BN": 128},
        warps=4,
        divisible=WHOLE,
        per_pass=128 * 128,
        tensor_core=CORES,
    ),
)
