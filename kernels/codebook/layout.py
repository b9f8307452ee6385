"""Nibbles of four planes in int16 words, in the order in which byte permutes give them back.

A plane is PLANE successive input channels of one row; a block is four planes. Two neighbouring
words of a row hold two neighbouring channels of each plane, so that the two halves of a register
that come out of one word belong together:

    nibble 2 u + v of words[tile, block, row, 2 t + h]
        =  code[64 tile + row, (4 block + 2 h + u) PLANE + 2 t + v]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 64  # of W in a tile
FIELDS = 4  # planes in a block
PLANES = (128, 64, 32, 16)  # lengths of a plane; 16 is the least a tensor core takes
OVERHEAD = 8  # channels' worth of work that a plane costs beside its own: scales, slices of x


def plane_of(group: int, k: int) -> int:
    """Length of a plane that groups hold whole (0: a group is the row), 0 if there is none."""
    fit = [p for p in PLANES if group % p == 0]
    return min(fit, key=lambda p: -(-k // (FIELDS * p)) * FIELDS * (p + OVERHEAD), default=0)


def pack_nibbles(nibbles: Tensor, plane: int) -> Tensor:
    """[n, k] uint8 below 16 -> words [tiles, blocks, 64, plane] int16; 0 beyond."""
    n, k = nibbles.shape
    padded = functional.pad(nibbles, (0, -k % (FIELDS * plane), 0, -n % ROWS))
    parts = padded.view(padded.shape[0] // ROWS, ROWS, -1, 2, 2, plane // 2, 2)
    parts = parts.permute(0, 2, 1, 5, 3, 4, 6)  # [tiles, blocks, 64, t, h, u, v]
    words = torch.zeros(parts.shape[:5], dtype=torch.int16, device=nibbles.device)
    for u in range(2):
        for v in range(2):
            words |= parts[..., u, v].to(torch.int16) << (4 * (2 * u + v))
    return words.flatten(3).contiguous()


def unpack_nibbles(words: Tensor, n: int, k: int) -> Tensor:
    """The inverse of pack_nibbles."""
    shift = torch.arange(0, 16, 4, device=words.device)
    parts = (words[..., None] >> shift & 15).to(torch.uint8)
    return by_row(parts)[:n, :k].contiguous()


def by_row(parts: Tensor) -> Tensor:
    """[tiles, blocks, 64, plane, 4] of nibbles or their levels -> [n padded, k padded]."""
    tiles, blocks, rows, plane, _ = parts.shape
    split = parts.view(tiles, blocks, rows, plane // 2, 2, 2, 2)
    return split.permute(0, 2, 1, 4, 5, 3, 6).reshape(tiles * rows, -1)


def pack_scales(scale: Tensor) -> Tensor:
    """[n, G] -> [G, n padded], 0 beyond."""
    return functional.pad(scale.T, (0, -scale.shape[0] % ROWS)).contiguous()


def group_starts(group: int, plane: int) -> tuple[bool, ...]:
    """For each plane of a block: whether its scales may differ from those of the one before."""
    planes = group // plane  # of a group; 0: the whole row
    if planes == 0 or planes % FIELDS == 0:
        return tuple(i == 0 for i in range(FIELDS))
    return tuple(FIELDS % planes != 0 or i % planes == 0 for i in range(FIELDS))
