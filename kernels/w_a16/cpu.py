"""The same product in plain torch, on any device: W_hat a tile of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kernels.w_a16.layout import ROWS, unpack_planes
from kernels.workspace import WORKSPACES

TILES = 16  # tiles of 64 rows expanded at once: 8 MB of 4096 input channels in 16 bits


def product(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    n: int,
    group: int,
) -> Tensor:
    """x [m, k] -> [m, n] in x's dtype; `group` input channels to a scale, 0: the whole row."""
    k = x.shape[1]
    y = x.new_empty(len(x), n)
    held = WORKSPACES.take("expanded rows", TILES * ROWS * k, x.dtype, x.device)
    for rows, w in row_tiles(words, scales, zeros, bits, n, k, group):
        tile = held[: w.numel()].view_as(w).copy_(w)
        y[:, rows] = functional.linear(x, tile)
    return y


def row_tiles(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    n: int,
    k: int,
    group: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Successive rows, and W_hat of these rows [rows, k] fp32."""
    column = torch.arange(k, device=words.device) // (group or k)  # [k]
    for first in range(0, len(words), TILES):
        rows = slice(first * ROWS, min((first + TILES) * ROWS, n))
        codes = unpack_planes(words[first : first + TILES], bits, rows.stop - rows.start, k)
        zero = 2.0 ** (bits - 1) if zeros is None else zeros[:, rows].float()[column].T
        yield rows, (codes.float() - zero) * scales[:, rows].float()[column].T


def dense(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    n: int,
    k: int,
    group: int,
) -> Tensor:
    """W_hat [n, k] fp32."""
    return torch.cat([w for _, w in row_tiles(words, scales, zeros, bits, n, k, group)])
