"""The product on a CPU: tiles of rows are looked up into a buffer that is reused.

It saves memory, not time: PyTorch has no CPU operation that multiplies by looked-up weights.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels.codebook.layout import ROWS, by_row
from kernels.codebook.levels import dynamic8, levels_of, numbering
from kernels.workspace import WORKSPACES

TILES = 2  # of 64 rows at once: 128 rows of 4096 weights in fp32 stay in the cache
BLOCK = 256  # scales that share a second level


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
    """x [m, k] -> [m, n] in x's dtype; see kernel.py for the others."""
    m, k = x.shape
    y = x.new_empty(m, n)
    for start in range(0, len(words), TILES):
        tiles = slice(start, min(start + TILES, len(words)))
        part = dense(words, scales, second, offset, k, group, table, tiles)
        w = WORKSPACES.take("rows", part.numel(), x.dtype, x.device).view_as(part)
        w.copy_(part)
        rows = slice(start * ROWS, min(tiles.stop * ROWS, n))
        y[:, rows] = functional.linear(x, w[: rows.stop - rows.start])
    return y


def dense(
    words: Tensor,
    scales: Tensor,
    second: Tensor | None,
    offset: Tensor | None,
    k: int,
    group: int,
    table: str,
    tiles: slice,
) -> Tensor:
    """W_hat [rows padded, k] fp32 of some tiles."""
    held = words[tiles]
    bytes_ = held.contiguous().view(torch.uint8).view(*held.shape, 2).int()
    looked_up = functional.embedding(bytes_, pairs(table, words.device)).flatten(-2)
    w = by_row(looked_up)[:, :k]  # [rows, k]
    rows = torch.arange(tiles.start * ROWS, tiles.stop * ROWS, device=words.device)
    scale = scales_of(scales, second, offset, rows)  # [rows, G]
    whole = k - k % group if group else 0
    if whole:
        parts = w[:, :whole].view(len(w), -1, group)
        parts.mul_(scale[:, : whole // group, None])
    if whole < k:
        w[:, whole:] *= scale[:, -1:]
    return w


def scales_of(scales: Tensor, second: Tensor | None, offset: Tensor | None, rows: Tensor) -> Tensor:
    """Scales [rows, G] fp32, from 8 bits and a second level where they are so."""
    own = scales[:, rows[0] : rows[-1] + 1].T
    if second is None or offset is None:
        return own.float()
    level = dynamic8().to(own.device)[own.long()]
    index = rows[:, None] * len(scales) + torch.arange(len(scales), device=own.device)
    block = (index // BLOCK).clamp_max(len(second) - 1)
    return (level * second[block] + offset[0]).clamp_min(0)


@cache
def pairs(table: str, device: torch.device) -> Tensor:
    """[256, 2] fp32: the levels of the low and high nibble of every byte."""
    by_nibble = torch.empty(16)
    by_nibble[numbering(table).long()] = levels_of(table)
    byte = torch.arange(256)
    return torch.stack([by_nibble[byte & 15], by_nibble[byte >> 4]], 1).to(device)
