"""The product on a CPU: by C that looks codes up in registers, or tiles that are expanded.

Expanded, it saves memory and no time: PyTorch has no CPU operation for looked-up weights.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels.codebook.layout import ROWS, by_row
from kernels.codebook.levels import dynamic8, levels_of, numbering
from kernels.table_cpu import DOUBLE, PLAIN, Table, by_tiles, columns, is_rows, takes, unpack_rows
from kernels.table_cpu import multiply as by_table
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
    if is_rows(words):
        return by_rows(x, words, scales, second, offset, levels, n, group)
    y = x.new_empty(m, n)
    for start in range(0, len(words), TILES):
        tiles = slice(start, min(start + TILES, len(words)))
        part = dense(words, scales, second, offset, k, group, table, tiles)
        w = WORKSPACES.take("rows", part.numel(), x.dtype, x.device).view_as(part)
        w.copy_(part)
        rows = slice(start * ROWS, min(tiles.stop * ROWS, n))
        y[:, rows] = functional.linear(x, w[: rows.stop - rows.start])
    return y


def by_rows(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    second: Tensor | None,
    offset: Tensor | None,
    levels: Tensor,
    n: int,
    group: int,
) -> Tensor:
    """The same of table_cpu's rows, levels those of codes; scales [n, G]."""
    if takes(x):
        table = Table(words, 4, PLAIN, group, scales.shape[1], levels, scales)
        if second is not None:
            table.kind, table.more, table.low = DOUBLE, second, dynamic8()
            table.fourth, table.extra = offset, len(second)
        return by_table(x, table, n)
    own = (words, scales, second, offset, levels, x.shape[1], group)
    return by_tiles(x, n, lambda rows: dense_rows(*own, rows))


def dense_rows(
    words: Tensor,
    scales: Tensor,
    second: Tensor | None,
    offset: Tensor | None,
    levels: Tensor,
    k: int,
    group: int,
    rows: slice,
) -> Tensor:
    """W_hat [rows, k] fp32 from table_cpu's rows."""
    w = levels[unpack_rows(words[rows], 4, k).int()]
    which = torch.arange(rows.start, rows.start + len(w))
    return w.mul_(scales_of(scales.T, second, offset, which)[:, columns(k, group)])


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
