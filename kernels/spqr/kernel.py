"""Triton: 16-bit inputs times SpQR weights, codes and outliers in one launch (layout.py).

A code becomes a whole number in fp16 as in kernels/w_a16, then its value in fp32, rounded once to
the type of x: origins are real numbers, and in 16 bits their rounding would show. Outliers are
added to the sums of their rows, one of each row at a time. Many rows of x take W_hat expanded once,
and PyTorch's product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels.aot import Build
from kernels.split_k import finish, memory_for, splits_for
from kernels.spqr.layout import PLANE, ROWS, UNIT, sets_of
from kernels.w_a16.kernel import load_words, plane_number
from kernels.w_a16.layout import FIELDS, WORDS
from kernels.workspace import WORKSPACES

SPLITS = (1, 2, 4, 8)  # few, for each is a compilation
EXPAND_ABOVE = 128  # rows of x from which W_hat is expanded once: four tiles expand it four times
EXPAND_WARPS = 8
OUTLIERS = 64  # of a row, added to W_hat at once
PIECE = 1024  # inputs that one program gathers


@triton.jit
def gather(x, order, out, K, PADDED, BLOCK: tl.constexpr):
    """out[m, i] = x[m, order[i]], 0 where that is K."""
    m = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(order + i, mask=i < PADDED, other=0)
    value = tl.load(x + m * K + column, mask=column < K, other=0.0)
    tl.store(out + m * PADDED + i, value, mask=i < PADDED)


@triton.jit
def statistics(
    stats, ends, n, piece, j, SETS, G, STAT_GROUP: tl.constexpr, PER_GROUP: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Scales [R, P] fp32 of rows n and units j of a piece, and what they add: -origin * scale."""
    shared = tl.minimum(n // STAT_GROUP, SETS - 1)[:, None].to(tl.int64) * G
    own = n[:, None].to(tl.int64) * G
    size = tl.full((1, 1), SETS, tl.int64) * G  # 1 is a constant, without a method
    if PER_GROUP == 0:
        g = j * 0
    elif P % PER_GROUP == 0:
        g = piece * (P // PER_GROUP) + j // PER_GROUP
    else:
        g = (piece * P + j) // PER_GROUP
    codes = tl.load(stats + own + g[None, :])
    low, step = tl.load(ends + shared + g[None, :]), tl.load(ends + size + shared + g[None, :])
    first, width = (
        tl.load(ends + 2 * size + shared + g[None, :]),
        tl.load(ends + 3 * size + shared + g[None, :]),
    )
    scale = low.to(tl.float32) + (codes & 15).to(tl.float32) * step.to(tl.float32)
    origin = first.to(tl.float32) + (codes >> 4).to(tl.float32) * width.to(tl.float32)
    return scale, -origin * scale


@triton.jit
def expand(
    words,
    stats,
    ends,
    unit,  # [1] fp32
    w,  # [N, PADDED], columns in the order of the words
    N,
    PADDED,
    G,
    SETS,
    pieces,
    BITS: tl.constexpr,
    FIELDS_: tl.constexpr,
    WORDS_: tl.constexpr,
    PER_GROUP: tl.constexpr,
    STAT_GROUP: tl.constexpr,
    UNIT_: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    ASM: tl.constexpr,
):
    """W_hat but for its outliers: one piece of one tile of rows."""
    tile, piece = tl.program_id(0), tl.program_id(1)
    j = tl.arange(0, P)
    n = tile * R + tl.arange(0, R)
    scale, less = statistics(stats, ends, n, piece, j, SETS, G, STAT_GROUP, PER_GROUP, P)
    scale, less = scale * tl.load(unit), less * tl.load(unit)
    zero = tl.zeros((R,), tl.float32)
    out = w + n[:, None].to(tl.int64) * PADDED + j[None, :]
    BLOCKS: tl.constexpr = UNIT_ // FIELDS_
    for b in tl.static_range(BLOCKS):
        start = ((tile.to(tl.int64) * pieces + piece) * BLOCKS + b) * (WORDS_ * R * P)
        held = load_words(words + start, BITS, R, P)
        for i in tl.static_range(FIELDS_):
            code = plane_number(held, zero, i, BITS, tl.float16, ASM).to(tl.float32)
            value = (code * scale + less).to(w.dtype.element_ty)
            tl.store(out + (piece * UNIT_ + b * FIELDS_ + i) * P, value, mask=n[:, None] < N)


@triton.jit
def place_columns(order, place, K, PADDED, BLOCK: tl.constexpr):
    """place[order[i]] = i, [K] int32: where the words hold a column."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(order + i, mask=i < PADDED, other=0)
    tl.store(place + column, i, mask=(i < PADDED) & (column < K))


@triton.jit
def add_outliers(ptr, column, delta, place, unit, w, PADDED, BLOCK: tl.constexpr):
    """w[n, place[column]] += delta unit for the outliers of one row, each at a place of its own."""
    n = tl.program_id(0)
    end = tl.load(ptr + n + 1)
    for start in range(tl.load(ptr + n), end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        k = tl.load(column + i, mask=i < end, other=0).to(tl.int32)
        at = w + n.to(tl.int64) * PADDED + tl.load(place + k)
        more = tl.load(delta + i, mask=i < end, other=0.0).to(tl.float32) * tl.load(unit)
        value = tl.load(at, mask=i < end, other=0.0).to(tl.float32) + more
        tl.store(at, value.to(w.dtype.element_ty), mask=i < end)


@triton.jit
def multiply(
    raw,  # [M, K], columns as they come: for outliers
    x,  # [M, PADDED] gathered
    words,
    stats,  # [n padded, G]
    ends,  # [4, SETS, G]
    unit,  # [1] fp32
    ptr,  # [N + 1] int32; None: no outliers
    column,  # [count]
    delta,  # [count] fp16
    y,  # [M, N]
    partials,
    counters,
    M,
    N,
    K,
    PADDED,
    G,
    SETS,
    pieces,  # of PLANE units along K
    BITS: tl.constexpr,
    FIELDS_: tl.constexpr,
    WORDS_: tl.constexpr,
    PER_GROUP: tl.constexpr,  # units of a group; 0: all
    STAT_GROUP: tl.constexpr,
    UNIT_: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    MB: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] w[n, k]: one tile of R n and MB m."""
    tile, split, m_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r, j = tl.arange(0, R), tl.arange(0, P)
    m = m_tile * MB + tl.arange(0, MB)
    n = tile * R + r
    row = tl.minimum(m, M - 1).to(tl.int64)[None, :]  # rows past the last are not stored
    at = x + row * PADDED + j[:, None]
    zero = tl.zeros((R,), tl.float32)
    BLOCKS: tl.constexpr = UNIT_ // FIELDS_  # of words in a piece
    acc = tl.zeros((R, MB), tl.float32)
    each = (pieces + SPLITS - 1) // SPLITS
    for piece in tl.range(split * each, min(split * each + each, pieces), num_stages=STAGES):
        scale, less = statistics(stats, ends, n, piece, j, SETS, G, STAT_GROUP, PER_GROUP, P)
        for b in tl.static_range(BLOCKS):
            start = ((tile.to(tl.int64) * pieces + piece) * BLOCKS + b) * (WORDS_ * R * P)
            held = load_words(words + start, BITS, R, P)
            for i in tl.static_range(FIELDS_):
                part = tl.load(at + (piece * UNIT_ + b * FIELDS_ + i) * P)
                code = plane_number(held, zero, i, BITS, tl.float16, ASM).to(tl.float32)
                acc = tl.dot((code * scale + less).to(part.dtype), part, acc)
    if ptr is not None:
        begin = tl.load(ptr + n, mask=n < N, other=0)
        end = tl.load(ptr + n + 1, mask=n < N, other=0)
        for i in range(split, tl.max(end - begin, 0), SPLITS):
            mine = begin + i < end
            k = tl.load(column + begin + i, mask=mine, other=0).to(tl.int64)
            more = tl.load(delta + begin + i, mask=mine, other=0.0).to(tl.float32)
            value = tl.load(raw + row * K + k[:, None]).to(tl.float32)
            acc += more[:, None] * value
    finish(acc * tl.load(unit), y, partials, counters, M, N, SPLITS, R, MB)


def product(x: Tensor, held: dict[str, Tensor], n: int, weight: dict[str, Any]) -> Tensor:
    """x [m, k], packed weights -> x W^T [m, n] in x's dtype, by the path that suits m."""
    if len(x) > EXPAND_ABOVE or x.dtype == torch.float32:
        return functional.linear(gathered(x, held), expanded(x, held, n, weight))
    return multiply_packed(x, held, n, weight)


def gathered(x: Tensor, held: dict[str, Tensor]) -> Tensor:
    """x [m, k] -> [m, padded], columns in the order of the words, on a workspace."""
    (m, k), padded = x.shape, len(held["order"])
    moved = WORKSPACES.take("spqr x", m * padded, x.dtype, x.device)
    gather[(m, -(-padded // PIECE))](x, held["order"], moved, k, padded, BLOCK=PIECE)
    return moved.view(m, padded)


def expanded(x: Tensor, held: dict[str, Tensor], n: int, weight: dict[str, Any]) -> Tensor:
    """W_hat [n, padded] in x's dtype, columns in the order of the words, on a workspace."""
    k, padded, (tiles, *_), device = x.shape[1], len(held["order"]), held["words"].shape, x.device
    w = WORKSPACES.take("expanded", n * padded, x.dtype, device).view(n, padded)
    stats, ends, unit = held["stats"], held["ends"], held["unit"]
    expand[(tiles, sets_of(k))](
        held["words"],
        stats,
        ends,
        unit,
        w,
        n,
        padded,
        stats.shape[1],
        ends.shape[1],
        sets_of(k),
        ASM=x.is_cuda,
        num_warps=EXPAND_WARPS,
        **layout_constants(weight["bits"], weight["group"], weight["stat_group"]),
    )
    if "ptr" in held:
        place = WORKSPACES.take("spqr places", k, torch.int32, device)
        place_columns[(-(-padded // PIECE),)](held["order"], place, k, padded, BLOCK=PIECE)
        outliers = held["ptr"], held["column"], held["delta"]
        add_outliers[(n,)](*outliers, place, unit, w, padded, BLOCK=OUTLIERS, num_warps=1)
    return w


def layout_constants(bits: int, group: int, stat_group: int) -> dict[str, Any]:
    """What both kernels must know of the layout at compilation."""
    return {
        "BITS": bits,
        "FIELDS_": FIELDS[bits],
        "WORDS_": WORDS[bits],
        "PER_GROUP": group // UNIT,
        "STAT_GROUP": stat_group,
        "UNIT_": UNIT,
        "P": PLANE,
        "R": ROWS,
    }


def multiply_packed(x: Tensor, held: dict[str, Tensor], n: int, weight: dict[str, Any]) -> Tensor:
    """x [m, k] fp16 or bf16 times the packed weights -> [m, n]."""
    (m, k), device = x.shape, x.device
    y = torch.empty(m, n, dtype=x.dtype, device=device)
    if not m:
        return y
    pieces, padded = sets_of(k), len(held["order"])
    moved = gathered(x, held)
    mb = next((size for size in (8, 16) if m <= size), 32)
    m_tiles, tiles = -(-m // mb), held["words"].shape[0]
    wanted = splits_for(tiles * m_tiles, pieces, device)
    splits = max(s for s in SPLITS if s <= wanted)
    partials, counters = memory_for(splits, m_tiles, tiles, mb * ROWS, device)
    stats, ends = held["stats"], held["ends"]
    multiply[(tiles, splits, m_tiles)](
        x,
        moved,
        held["words"],
        stats,
        ends,
        held["unit"],
        held.get("ptr"),
        held.get("column"),
        held.get("delta"),
        y,
        partials,
        counters,
        m,
        n,
        k,
        padded,
        stats.shape[1],
        ends.shape[1],
        pieces,
        MB=mb,
        SPLITS=splits,
        STAGES=2,
        ASM=x.is_cuda,
        **layout_constants(weight["bits"], weight["group"], weight["stat_group"]),
    )
    return y


def build_expand(bits: int, group: int) -> Build:
    """`expand` to bf16."""
    types = {"words": "*i16", "stats": "*u8", "ends": "*fp16", "unit": "*fp32", "w": "*bf16"}
    return Build(
        name=f"expand{bits}",
        kernel=expand,
        types=types | dict.fromkeys(("N", "PADDED", "G", "SETS", "pieces"), "i32"),
        constants={**layout_constants(bits, group, 16), "ASM": True},
        warps=EXPAND_WARPS,
        divisible=("N", "PADDED", "G"),
    )


def build(bits: int, element: str, mb: int, group: int) -> Build:
    """`multiply` for a layer with outliers."""
    types = {"raw": element, "x": element, "words": "i16", "stats": "u8", "ends": "fp16"}
    types |= {"unit": "fp32", "ptr": "i32", "column": "u16", "delta": "fp16", "y": element}
    types |= {"partials": "fp32", "counters": "i32"}
    numbers = ("M", "N", "K", "PADDED", "G", "SETS", "pieces")
    constants: dict[str, object] = {
        **layout_constants(bits, group, 16),
        "MB": mb,
        "SPLITS": 4,
        "STAGES": 2,
        "ASM": True,
    }
    return Build(
        name=f"w{bits}-{element}-m{mb}",
        kernel=multiply,
        types={n: f"*{t}" for n, t in types.items()} | dict.fromkeys(numbers, "i32"),
        constants=constants,
        stages=2,
        divisible=("N", "K", "PADDED", "G"),
        per_pass=ROWS * PLANE * UNIT,
        tensor_core="HMMA|HGMMA|UTCHMMA",
    )


BUILDS = (
    build(3, "bf16", 8, 16),
    build(4, "bf16", 8, 16),
    build(2, "bf16", 8, 32),
    build(3, "bf16", 32, 16),
    build_expand(3, 16),
    Build(
        "outliers",
        add_outliers,
        {
            "ptr": "*i32",
            "column": "*u16",
            "delta": "*fp16",
            "place": "*i32",
            "unit": "*fp32",
            "w": "*bf16",
            "PADDED": "i32",
        },
        {"BLOCK": OUTLIERS},
        warps=1,
        divisible=("PADDED",),
        targets=(90,),
    ),
    Build(
        "gather",
        gather,
        {"x": "*bf16", "order": "*i32", "out": "*bf16", "K": "i32", "PADDED": "i32"},
        {"BLOCK": PIECE},
        divisible=("K", "PADDED"),
        targets=(90,),
    ),
)
