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
def finish(  # type: ignore[no-untyped-def]
    acc,  # [R, MB] fp32, the part of this split
    y,  # [M, N]
    partials,  # [SPLITS, M tiles, N tiles, MB, R] fp32
    counters,  # [M tiles, N tiles] int32 zeros, zeros again at the end
    M,
    N,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    MB: tl.constexpr,
):
    """Store y^T's tile (program_id 0: of n, 2: of m); the last of its splits to come sums all."""
    tile, split, m_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile * R + tl.arange(0, R)
    m = m_tile * MB + tl.arange(0, MB)
    out = y + m[None, :].to(tl.int64) * N + n[:, None]
    inside = (m[None, :] < M) & (n[:, None] < N)
    if SPLITS == 1:
        tl.store(out, acc.to(y.dtype.element_ty), mask=inside)
    else:
        tiles, m_tiles = tl.num_programs(0), tl.num_programs(2)
        place = m_tile * tiles + tile
        cell = tl.arange(0, MB)[None, :] * R + tl.arange(0, R)[:, None]
        size: tl.constexpr = MB * R
        tl.store(partials + (split * m_tiles * tiles + place) * size + cell, acc)
        tl.debug_barrier()  # every lane's part is stored before the count says so
        done = tl.atomic_add(counters + place, 1, sem="acq_rel")
        if done == SPLITS - 1:
            total = tl.zeros((R, MB), tl.float32)
            for s in range(SPLITS):  # in order, whoever came last: the same bits every time
                total += tl.load(partials + (s * m_tiles * tiles + place) * size + cell)
            tl.store(counters + place, 0)
            tl.store(out, total.to(y.dtype.element_ty), mask=inside)


def splits_for(tiles: int, blocks: int, device: torch.device) -> int:
    """Into how many parts the `blocks` along K go, so that `tiles` of y fill the GPU."""
    return max(1, min(blocks, -(-PER_SM * multiprocessors(device) // tiles)))


def memory_for(
    splits: int, m_tiles: int, tiles: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """partials and counters of `finish`, for tiles of `size` numbers."""
    count = m_tiles * tiles
    partials = WORKSPACES.take("partials", splits * count * size, torch.float32, device)
    return partials, WORKSPACES.take("counters", count, torch.int32, device)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; 1 for the interpreter on the CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
