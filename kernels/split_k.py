"""Parts of a product's input channels to blocks of their own, and their sum: for Triton kernels.

Imports triton: only kernel.py files import this.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.workspace import WORKSPACES

PER_SM = 4  # blocks that hide each other's waits for memory


@triton.jit
def summed(  # type: ignore[no-untyped-def]
    acc,  # [R, MB], the part of this split
    partials,  # [SPLITS, M tiles, N tiles, MB, R] in acc's dtype
    counters,  # [M tiles, N tiles] int32 zeros, zeros again at the end
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    MB: tl.constexpr,
):
    """(the sum of all parts, True) for the last split of a tile to come, (.., False) for others.

    program_id 0: tile of n, 1: split, 2: tile of m.
    """
    if SPLITS == 1:
        return acc, True
    tiles, m_tiles = tl.num_programs(0), tl.num_programs(2)
    place = tl.program_id(2) * tiles + tl.program_id(0)
    size: tl.constexpr = MB * R
    places = m_tiles * tiles
    cell = tl.arange(0, MB)[None, :] * R + tl.arange(0, R)[:, None]
    tl.store(partials + (tl.program_id(1) * places + place).to(tl.int64) * size + cell, acc)
    tl.debug_barrier()  # every lane's part is stored before the count says so
    last = tl.atomic_add(counters + place, 1, sem="acq_rel") == SPLITS - 1
    if last:
        acc = tl.zeros((R, MB), acc.dtype)
        for s in range(SPLITS):  # in order, whoever came last: the same bits every time
            part = partials + (s * places + place).to(tl.int64) * size
            acc += tl.load(part + cell, cache_modifier=".cg")
        tl.store(counters + place, 0)
    return acc, last


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    acc,  # [R, MB] fp32, the part of this split
    y,  # [M, N]
    partials,
    counters,
    M,
    N,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    MB: tl.constexpr,
):
    """Store y^T's tile once all its splits are there; arguments as in `summed`."""
    acc, last = summed(acc, partials, counters, SPLITS, R, MB)
    if last:
        n = tl.program_id(0) * R + tl.arange(0, R)
        m = tl.program_id(2) * MB + tl.arange(0, MB)
        out = y + m[None, :].to(tl.int64) * N + n[:, None]
        inside = (m[None, :] < M) & (n[:, None] < N)
        tl.store(out, acc.to(y.dtype.element_ty), mask=inside)


def splits_for(tiles: int, blocks: int, device: torch.device) -> int:
    """Into how many parts the `blocks` along K go, so that `tiles` of y fill the GPU."""
    return max(1, min(blocks, -(-PER_SM * multiprocessors(device) // tiles)))


def memory_for(
    splits: int,
    m_tiles: int,
    tiles: int,
    size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """partials and counters of `summed`, for tiles of `size` numbers; empty for a single split."""
    count = m_tiles * tiles if splits > 1 else 0
    partials = WORKSPACES.take("partials", splits * count * size, dtype, device)
    return partials, WORKSPACES.take("counters", count, torch.int32, device)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; 1 for the interpreter on the CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
