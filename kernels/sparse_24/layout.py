"""Pruned weights: kept ones in row-major order, and a bit or a place for where they were.

With two kept of every four neighbours (2:4) a bucket takes a nibble, first place | second << 2,
two buckets to a byte: half a bit a weight for every place. Else each weight takes a bit, eight to
a byte, low first. Either way a byte stands for eight neighbours, so one table of 256 reads both.
Kept weights are numbers or packed codes, tile after tile of rows, each tile padded to eight.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels.packing import pack_bits, unpack_bits


@cache
def kept_by_byte(placed: bool, device: torch.device) -> Tensor:
    """[256, 8] uint8: 1 where a byte says that a weight is kept."""
    byte = torch.arange(256)[:, None]
    if not placed:
        return (byte >> torch.arange(8) & 1).to(torch.uint8).to(device)
    found = torch.zeros(256, 8, dtype=torch.uint8)
    for at in (0, 2, 4, 6):
        place = (byte >> at & 3) + at // 4 * 4
        found.scatter_(1, place, 1)
    return found.to(device)


def is_placed(keep: Tensor, bucket: int) -> bool:
    """True if `bucket` is 4 and every four neighbours of a row keep two."""
    if bucket != 4 or keep.shape[1] % 8:
        return False
    return bool((keep.view(len(keep), -1, 4).sum(-1) == 2).all())


def pack_where(keep: Tensor, placed: bool) -> Tensor:
    """keep [n, k] bool -> [n, k / 8 rounded up] uint8."""
    keep = functional.pad(keep, (0, -keep.shape[1] % 8)).view(len(keep), -1, 8)
    if placed:
        place = (keep.nonzero()[:, 2] % 4).view(*keep.shape[:2], 4)  # 2 buckets, 2 places each
        bits, shift = place, torch.arange(0, 8, 2, device=keep.device)
    else:
        bits, shift = keep.long(), torch.arange(8, device=keep.device)
    return (bits << shift).sum(-1).to(torch.uint8)


def keep_of(where: Tensor, k: int, placed: bool) -> Tensor:
    """The inverse of pack_where: [rows, k] bool."""
    looked_up = kept_by_byte(placed, where.device)[where.long()]  # [rows, k / 8, 8]
    return looked_up.flatten(1)[:, :k].bool()


def pack_kept(values: Tensor, keep: Tensor, bits: int, rows: int) -> tuple[Tensor, list[int]]:
    """Kept of values [n, k], codes (bits <= 8) or numbers (16, 32) -> stream, starts of tiles.

    A start counts values; the last is their number.
    """
    parts, starts = [], [0]
    for start in range(0, len(values), rows):
        part = values[start : start + rows][keep[start : start + rows]]
        part = functional.pad(part, (0, -len(part) % 8))
        parts.append(part if bits > 8 else pack_bits(part, bits))
        starts.append(starts[-1] + len(part))
    return torch.cat(parts), starts


def kept_of(stream: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """Values `start` to `stop` of a stream: numbers, or codes uint8."""
    if bits > 8:
        return stream[start:stop]
    return unpack_bits(stream[start * bits // 8 : stop * bits // 8], bits, stop - start)


@cache
def ranks_by_byte(placed: bool, device: torch.device) -> Tensor:
    """[256, 8] int64: how many are kept before each of a byte's neighbours."""
    kept = kept_by_byte(placed, device).long()
    return kept.cumsum(1) - kept


def spread(kept: Tensor, where: Tensor, k: int, placed: bool) -> Tensor:
    """Kept values of some rows, in order, and where [rows, k / 8] -> [rows, k], 0 between them.

    Each weight looks its value up; `masked_scatter` would go one by one, ten times slower.
    """
    if not len(kept):
        return kept.new_zeros(len(where), k)
    byte = where.flatten().int()
    keep = functional.embedding(byte, kept_by_byte(placed, where.device))  # [bytes, 8]
    count = keep.sum(1)
    first = count.cumsum(0) - count
    index = functional.embedding(byte, ranks_by_byte(placed, where.device))
    index.add_(first[:, None]).clamp_max_(len(kept) - 1)
    values = kept[index].masked_fill_(keep == 0, 0)
    return values.view(len(where), -1)[:, :k]
