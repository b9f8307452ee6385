"""Triton: x [M, K] in 16 bits times 2:4 weights, for few rows of x; layout in layout.py.

Both kept numbers of a bucket are read and put at their places in registers. That costs more
instructions than reading zeros would take time: what is saved is memory. PyTorch's product on
sparse tensor cores wants an order of its own, which would have to be kept beside this one or made
in every call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import Build
from kernels.sparse_24 import expand
from kernels.split_k import finish, memory_for, splits_for

ROWS = 64  # of W in a tile
CHANNELS = 64  # of K at once
COLUMNS = (8, 16, 32, 64)  # rows of x at once
HALVES = (torch.float16, torch.bfloat16)


@triton.jit
def product(
    x,  # [M, K]
    values,  # [N, K / 2]
    where,  # [N, K / 8] uint8
    y,  # [M, N]
    partials,
    counters,
    M,
    N,
    K,
    blocks,  # of P channels along K
    P: tl.constexpr,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    MB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] W[n, k]; a tile of R n and MB m, a part of K."""
    tile, split, m_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    T: tl.constexpr = x.dtype.element_ty
    n = tile * R + tl.arange(0, R)
    m = m_tile * MB + tl.arange(0, MB)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    rows = x + m[None, :].to(tl.int64) * K
    each = (blocks + SPLITS - 1) // SPLITS
    acc = tl.zeros((R, MB), tl.float32)
    for block in tl.range(split * each, min(split * each + each, blocks), num_stages=STAGES):
        k = block * P + tl.arange(0, P)
        inside = k < K
        byte = tl.load(where + row * (K // 8) + (k // 8)[None, :], mask=inside[None, :], other=0)
        nibble = byte.to(tl.int32) >> (k % 8 // 4 * 4)[None, :]
        pair = values + row * (K // 2) + (k // 4 * 2)[None, :]
        first = tl.load(pair, mask=inside[None, :], other=0.0)
        second = tl.load(pair + 1, mask=inside[None, :], other=0.0)
        place = (k % 4)[None, :]
        w = tl.where(place == (nibble & 3), first, 0.0)
        w = tl.where(place == (nibble >> 2 & 3), second, w).to(T)
        part = tl.load(rows + k[:, None], mask=(m[None, :] < M) & inside[:, None], other=0.0)
        acc += tl.dot(w, part)
    finish(acc, y, partials, counters, M, N, SPLITS, R, MB)


def multiply(
    x: Tensor,
    stream: Tensor,
    where: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    starts: list[int],
    rows: int,
    bits: int,
    group: int,
    placed: bool,
) -> Tensor:
    """x [m, k] -> [m, n] in x's dtype, by the path that suits m and the weights."""
    if placed and scale is None and x.dtype in HALVES and len(x) <= COLUMNS[-1]:
        return multiply_packed(x, stream, where)
    return expand.multiply(x, stream, where, scale, zero, starts, rows, bits, group, placed)


def multiply_packed(x: Tensor, values: Tensor, where: Tensor, splits: int = 0) -> Tensor:
    """x [m, k] fp16 or bf16 times 2:4 numbers -> [m, n]; `splits` of K, 0: chosen."""
    x = x.contiguous()
    m, k = x.shape
    n = len(where)
    y = x.new_empty(m, n)
    mb = next(c for c in COLUMNS if m <= c or c == COLUMNS[-1])
    tiles, m_tiles, blocks = triton.cdiv(n, ROWS), triton.cdiv(m, mb), triton.cdiv(k, CHANNELS)
    splits = splits or splits_for(tiles * m_tiles, blocks, x.device)
    partials, counters = memory_for(splits, m_tiles, tiles, mb * ROWS, x.device)
    product[(tiles, splits, m_tiles)](
        x,
        values,
        where,
        y,
        partials,
        counters,
        m,
        n,
        k,
        blocks,
        P=CHANNELS,
        SPLITS=splits,
        R=ROWS,
        MB=mb,
        STAGES=3,
        num_warps=4,
    )
    return y


def build(element: str, mb: int) -> Build:
    """`product` as a layer whose rows of x fill a tile would run it."""
    pointers = {"x": element, "values": "fp16", "where": "u8", "y": element}
    pointers |= {"partials": "fp32", "counters": "i32"}
    return Build(
        name=f"2:4-{element}-m{mb}",
        kernel=product,
        types={n: f"*{t}" for n, t in pointers.items()}
        | dict.fromkeys(("M", "N", "K", "blocks"), "i32"),
        constants={"P": CHANNELS, "SPLITS": 4, "R": ROWS, "MB": mb, "STAGES": 3},
        divisible=("N", "K"),
        spills=16 if mb > 8 else 0,
        tensor_core="HMMA|HGMMA|UTCHMMA",
    )


BUILDS = (build("bf16", 8), build("fp16", 16))
