"""Triton: x [M, K] times weights looked up in a table of 16; layout in layout.py.

Four codes at a time become the low and high bytes of four 16-bit numbers by byte permutes, as
levels.py says; nothing is read from memory for it and no lane waits for another. The table was
scaled by a factor, and scales are divided by it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels import tables
from kernels.aot import TARGETS, Build
from kernels.codebook.layout import FIELDS, ROWS, group_starts
from kernels.codebook.levels import dynamic8, permute_tables, scaled_table
from kernels.split_k import finish, memory_for, splits_for
from kernels.workspace import WORKSPACES

EXPAND_ABOVE = 64  # rows of x from which W is expanded once, for PyTorch's own product
COLUMNS = (8, 16, 32, 64)  # rows of x at once
EXPAND_WARPS = 8  # with 4 planes of 128 may spill registers
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
# Instructions per weight at which reading, not issuing, is the limit (H200, 4.3 TB/s), are 4.4.
# Eight of 32 are table words moved into place; scales of two levels cost the rest of the second.
BUDGETS = {False: 4.4, True: 5.2}


@cache
def lookup(table: str, dtype: torch.dtype) -> str:
    """PTX: two int16 words of four nibbles ($4) -> their levels, two to a register ($0 to $3)."""
    names = [f"{half}{byte}{i}" for byte in "lh" for half in "ab" for i in (0, 1)]
    words = permute_tables(scaled_table(table, dtype)[0])
    moves = [f"mov.b32 {n}, 0x{w:08x};" for n, w in zip(names, words, strict=True)]
    body = [f".reg .b32 {', '.join(names)}, x, u, v, lo, hi, o;", *moves]
    body += ["xor.b32 x, $4, 0x88888888;", "shr.b32 u, $4, 16;", "shr.b32 v, x, 16;"]
    for word, (own, other) in enumerate((("$4", "x"), ("u", "v"))):
        for byte, to in (("l", "lo"), ("h", "hi")):
            body += [
                f"prmt.b32 {to}, a{byte}0, a{byte}1, {own};",
                f"prmt.b32 o, b{byte}0, b{byte}1, {other};",
                f"xor.b32 {to}, {to}, o;",
            ]
        body += [f"prmt.b32 ${2 * word}, lo, hi, 0x5140;"]
        body += [f"prmt.b32 ${2 * word + 1}, lo, hi, 0x7362;"]
    return "{" + " ".join(body) + "}"


@triton.jit
def words_at(words, part_of_n, block, blocks, j, R: tl.constexpr, P: tl.constexpr):
    """Words [R, P] of one block of R rows, all in one tile; j [P] says which of each row."""
    row = part_of_n * R + tl.arange(0, R)
    start = ((row // 64).to(tl.int64) * blocks + block) * (64 * P) + row % 64 * P
    return tl.load(words + start[:, None] + j[None, :])


@triton.jit
def field(
    words, levels, part_of_n, block, blocks, i: tl.constexpr, R: tl.constexpr, P: tl.constexpr
):
    """Levels [R, P] of plane i by plain look-up."""
    j = tl.arange(0, P)
    held = words_at(words, part_of_n, block, blocks, j // 2 * 2 + i // 2, R, P)
    nibble = (held.to(tl.int32) >> ((i % 2 * 2 + j % 2) * 4)[None, :]) & 15
    return tl.load(levels + nibble)


@triton.jit
def scale_at(scales, second, offset, dynamic, group, groups, padded, n):
    """Scales [R] fp32 of one group: stored, or 8 bits on a second level; never negative."""
    scale = tl.load(scales + group * padded + n)
    if second is not None:
        level = tl.load(dynamic + scale.to(tl.int32))
        # Rows of padding have scales and no second level: the last is as good.
        at = tl.minimum((n * groups + group) // 256, tl.load(offset + 1).to(tl.int32))
        scale = tl.maximum(level * tl.load(second + at) + tl.load(offset), 0.0)
    return scale.to(tl.float32)


@triton.jit
def product(
    x,  # [M, K]
    words,  # [tiles, blocks, 64, P] int16
    scales,  # [G, n padded], any float, or uint8 with `second`
    second,  # [second-level blocks] fp32, or None
    offset,  # [2] fp32: offset, last second-level block; or None
    dynamic,  # [256] fp32, or None
    levels,  # [16] in x's type
    y,  # [M, N]
    partials,
    counters,
    M,
    N,
    K,
    padded,  # N, padded to tiles
    blocks,  # of words along K
    groups,
    inverse,  # 1 / the table's factor
    P: tl.constexpr,
    GROUP: tl.constexpr,  # planes per group; 0: the whole row
    WHOLE: tl.constexpr,  # K fills its blocks
    STARTS: tl.constexpr,  # group_starts
    LOOKUP: tl.constexpr,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    MB: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] level[n, k] scale; a tile of R n and MB m, a part of K."""
    part_of_n, split, m_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    T: tl.constexpr = x.dtype.element_ty
    n = part_of_n * R + tl.arange(0, R)
    m = m_tile * MB + tl.arange(0, MB)
    inside = m[None, :] < M
    rows = x + m[None, :].to(tl.int64) * K
    each = (blocks + SPLITS - 1) // SPLITS
    acc = tl.zeros((R, MB), tl.float32)
    for block in tl.range(split * each, min(split * each + each, blocks), num_stages=STAGES):
        if ASM:
            held = words_at(words, part_of_n, block, blocks, tl.arange(0, P), R, P)
            v = tl.inline_asm_elementwise(
                LOOKUP,
                "=&r,=&r,=&r,=&r,r",
                [held],
                (tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True,
                pack=2,
            )
        for i in tl.static_range(4):
            plane = block * 4 + i
            k = plane * P + tl.arange(0, P)
            if WHOLE:
                part = tl.load(rows + k[:, None], mask=inside, other=0.0)
            else:
                part = tl.load(rows + k[:, None], mask=inside & (k[:, None] < K), other=0.0)
            if STARTS[i]:
                group = tl.minimum(plane // GROUP, groups - 1) if GROUP else 0
                scale = scale_at(scales, second, offset, dynamic, group, groups, padded, n)
            if ASM:
                w = v[i].to(T, bitcast=True)
            else:
                w = field(words, levels, part_of_n, block, blocks, i, R, P)
            acc += tl.dot(w, part) * scale[:, None]
    finish(acc * inverse, y, partials, counters, M, N, SPLITS, R, MB)


@triton.jit
def expand(
    words,
    scales,
    second,
    offset,
    dynamic,
    levels,  # [16] fp32, exact
    w,  # [N, K]
    N,
    K,
    padded,
    blocks,
    groups,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
):
    """w[n, k] = level scale, as the format defines it; one block of one tile."""
    tile, block = tl.program_id(0), tl.program_id(1)
    n = tile * R + tl.arange(0, R)
    for i in tl.static_range(4):
        plane = block * 4 + i
        k = plane * P + tl.arange(0, P)
        group = tl.minimum(plane // GROUP, groups - 1) if GROUP else 0
        scale = scale_at(scales, second, offset, dynamic, group, groups, padded, n)
        value = field(words, levels, tile, block, blocks, i, R, P) * scale[:, None]
        inside = (n[:, None] < N) & (k[None, :] < K)
        out = w + n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(out, value.to(w.dtype.element_ty), mask=inside)


def multiply(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    second: Tensor | None,
    offset: Tensor | None,
    levels: Tensor,
    n: int,
    group: int,
    table: str,
) -> Tensor:
    """x [m, k] -> [m, n] in x's dtype, by the path that suits m."""
    held = (words, scales, second, offset)
    if len(x) > EXPAND_ABOVE or x.dtype not in NAMES:
        return functional.linear(x, expanded(x, *held, levels, n, group))
    return multiply_packed(x, *held, n, group, table)


def multiply_packed(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    second: Tensor | None,
    offset: Tensor | None,
    n: int,
    group: int,
    table: str,
    splits: int = 0,
) -> Tensor:
    """x [m, k] fp16 or bf16 times the packed weights -> [m, n]; `splits` of K, 0: chosen."""
    x = x.contiguous()
    m, k = x.shape
    y = x.new_empty(m, n)
    tiles, blocks, rows, plane = words.shape
    mb = next(c for c in COLUMNS if m <= c or c == COLUMNS[-1])
    m_tiles = triton.cdiv(m, mb)
    double = second is not None
    config = configuration(x.device, m, n=n, k=k, group=group, double=double)
    splits = splits or config.get("splits") or splits_for(tiles * m_tiles, blocks, x.device)
    partials, counters = memory_for(splits, m_tiles, tiles, mb * rows, x.device)
    levels, factor = table_on(table, x.dtype, x.device)
    product[(tiles, splits, m_tiles)](
        x,
        words,
        scales,
        second,
        offset,
        None if second is None else dynamic_on(x.device),
        levels,
        y,
        partials,
        counters,
        m,
        n,
        k,
        scales.shape[1],
        blocks,
        len(scales),
        1 / factor,
        P=plane,
        GROUP=group // plane,
        WHOLE=k == blocks * FIELDS * plane,
        STARTS=group_starts(group, plane),
        LOOKUP=lookup(table, x.dtype),
        SPLITS=splits,
        R=rows,
        MB=mb,
        STAGES=config.get("stages", 3),
        ASM=x.is_cuda,
        num_warps=config.get("warps", 4),
    )
    return y


def expanded(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    second: Tensor | None,
    offset: Tensor | None,
    levels: Tensor,
    n: int,
    group: int,
) -> Tensor:
    """W_hat [n, k] in x's dtype, in memory that the next product takes again."""
    k = x.shape[1]
    tiles, blocks, rows, plane = words.shape
    w = WORKSPACES.take("expanded", n * k, x.dtype, x.device).view(n, k)
    dynamic = None if second is None else dynamic_on(x.device)
    expand[(tiles, blocks)](
        words,
        scales,
        second,
        offset,
        dynamic,
        levels,
        w,
        n,
        k,
        scales.shape[1],
        blocks,
        len(scales),
        P=plane,
        GROUP=group // plane,
        R=rows,
        num_warps=EXPAND_WARPS,
    )
    return w


@cache
def table_on(table: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    """The scaled table by nibble [16] on a device, and its factor."""
    levels, factor = scaled_table(table, dtype)
    return levels.to(device), factor


@cache
def dynamic_on(device: torch.device) -> Tensor:
    """The levels of 8-bit scales [256] on a device."""
    return dynamic8().to(device)


def configuration(device: torch.device, m: int, **key: int) -> dict[str, Any]:
    """The measured configuration of a shape, {} where none was measured."""
    return dict(tables.configured("codebook", device, m, **key) or {})


def scale_types(double: bool) -> tuple[dict[str, str], dict[str, None]]:
    """Types of what scales are read from, and the arguments that are not there."""
    if double:
        return {"scales": "u8", "second": "fp32", "offset": "fp32", "dynamic": "fp32"}, {}
    return {"scales": "fp32"}, {"second": None, "offset": None, "dynamic": None}


def build_expand(*, double: bool = False) -> Build:
    """`expand` to bf16: planes of 64, or of 128 where scales of groups of 128 have two levels."""
    scales, none = scale_types(double)
    pointers = {"words": "i16", **scales, "levels": "fp32", "w": "bf16"}
    integers = ("N", "K", "padded", "blocks", "groups")
    return Build(
        name="expand" + ("-double" if double else ""),
        kernel=expand,
        types={n: f"*{t}" for n, t in pointers.items()} | dict.fromkeys(integers, "i32"),
        constants={"P": 128 if double else 64, "GROUP": 1, "R": ROWS, **none},
        warps=EXPAND_WARPS,
        divisible=("N", "K", "padded"),
        targets=TARGETS if double else (90,),
    )


def build(dtype: torch.dtype, mb: int, *, double: bool = False) -> Build:
    """`product` as a layer of 4096 input channels in groups of 64 would run it."""
    element, plane = NAMES[dtype], 64
    scales, none = scale_types(double)
    pointers = {"x": element, "words": "i16", **scales, "levels": element, "y": element}
    pointers |= {"partials": "fp32", "counters": "i32"}
    integers = ("M", "N", "K", "padded", "blocks", "groups")
    constants: dict[str, object] = {
        "P": plane,
        "GROUP": 1,
        "WHOLE": True,
        "STARTS": group_starts(64, plane),
        "LOOKUP": lookup("nf4", dtype),
        "SPLITS": 4,
        "R": ROWS,
        "MB": mb,
        "STAGES": 3,
        "ASM": True,
    }
    types = {n: f"*{t}" for n, t in pointers.items()} | dict.fromkeys(integers, "i32")
    return Build(
        name=f"nf4-{element}-m{mb}" + ("-double" if double else ""),
        kernel=product,
        types=types | {"inverse": "fp32"},
        constants=constants | none,
        divisible=("N", "K", "padded"),
        per_pass=ROWS * plane * FIELDS,
        budget=BUDGETS[double] if mb == 8 else 0,  # with more columns multiplying is the limit
        spills=8 if mb == 64 else 0,  # on sm_80, of 1800 instructions
        tensor_core="HMMA|HGMMA|UTCHMMA",
    )


BUILDS = (
    build(torch.bfloat16, 8),
    build(torch.bfloat16, 8, double=True),
    build(torch.bfloat16, 16),
    build(torch.bfloat16, 64),
    build_expand(),
    build_expand(double=True),
)
