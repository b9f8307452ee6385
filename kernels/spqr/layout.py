"""How packed SpQR weights lie in memory: planar words whose planes are members of units.

Columns are taken in the order of their groups. A unit is 16 successive ones, all of one group. A
set is PLANE units side by side, and its columns are reordered member by member, so that plane i of
its words (kernels/w_a16/layout.py) is member i of each unit: a tile [rows, plane] of codes meets a
tile of statistics element by element. Inputs are gathered in the same order.

    stats[row, group]       = code of the scale (low nibble) and of the origin (high)
    ends[4, set of rows, group]  = low and step of scales, low and step of origins, over the unit
    ptr, column, delta      = outliers row by row: what the exact weight has beyond its code's value
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kernels.base import Json
from kernels.w_a16.layout import ROWS, pack_planes, unpack_planes

UNIT = 16  # columns with one scale at least
PLANE = 32  # units side by side


def sets_of(k: int) -> int:
    """Sets of units that k columns fill."""
    return -(-k // (UNIT * PLANE))


def groups_of(k: int, group: int) -> int:
    """Groups in all sets, those without a column included."""
    return -(-sets_of(k) * UNIT * PLANE // group) if group else 1


def column_order(index: Tensor | None, k: int) -> Tensor:
    """[padded] int32: which column each place of the packed weights holds, k where none.

    index [k]: the group of every column, None where groups follow each other.
    """
    column = torch.arange(k) if index is None else index.cpu().long().argsort(stable=True)
    padded = functional.pad(column, (0, sets_of(k) * UNIT * PLANE - k), value=k)
    return padded.view(-1, PLANE, UNIT).transpose(1, 2).flatten().to(torch.int32)


def pack(
    codes: Tensor, params: Mapping[str, Tensor], weight: Json, order: Tensor
) -> dict[str, Tensor]:
    """codes [n, k] and parameters as the format stores them -> words, stats, ends."""
    n, k = codes.shape
    places = functional.pad(codes, (0, 1))[:, order.long().to(codes.device)]
    words = pack_planes(places, weight["bits"], PLANE)
    rows = words.shape[0] * ROWS
    scale, origin = params["scale"], params["origin"]
    more = groups_of(k, weight["group"]) - scale.shape[1]
    stats = functional.pad(scale | origin << 4, (0, more, 0, rows - n)).contiguous()
    names = ("scale_low", "scale_step", "origin_low", "origin_step")
    plain = {"origin_low": torch.zeros_like, "origin_step": torch.ones_like}  # whole zero points
    ends = [params[a] if a in params else plain[a](params["scale_low"]) for a in names]
    return {
        "words": words,
        "stats": stats,
        "ends": functional.pad(torch.stack(ends), (0, more)).contiguous(),
    }


def levels(stats: Tensor, ends: Tensor, first: int, stat_group: int) -> tuple[Tensor, Tensor]:
    """Rows of stats [r, G] from row `first` on -> scale, over the unit, and origin [r, G] fp32."""
    row = (torch.arange(first, first + len(stats), device=stats.device)) // stat_group
    low, step, origin_low, origin_step = ends[:, row.clamp_max(ends.shape[1] - 1)].float()
    return (
        torch.addcmul(low, (stats & 15).float(), step),
        torch.addcmul(origin_low, (stats >> 4).float(), origin_step),
    )


def spread(values: Tensor, k: int, group: int) -> Tensor:
    """[r, G] -> [r, sets * UNIT * PLANE] in the order of the words."""
    padded = sets_of(k) * UNIT * PLANE
    units = values.repeat_interleave(max(1, (group or padded) // UNIT), 1)[:, : padded // UNIT]
    return units.view(len(values), -1, 1, PLANE).expand(-1, -1, UNIT, -1).reshape(len(values), -1)


def expanded(held: Mapping[str, Tensor], first: int, stop: int, weight: Json, k: int) -> Tensor:
    """Tiles `first` to `stop` of rows -> their values over the unit, without outliers, fp32.

    [rows, padded], columns in the order of the words.
    """
    rows = slice(first * ROWS, stop * ROWS)
    padded = sets_of(k) * UNIT * PLANE
    words = held["words"][first:stop]
    w = unpack_planes(words, weight["bits"], len(words) * ROWS, padded).float()
    group, stat_group = weight["group"], weight["stat_group"]
    scale, origin = levels(held["stats"][rows], held["ends"], first * ROWS, stat_group)
    return w.sub_(spread(origin, k, group)).mul_(spread(scale, k, group))


def row_of(ptr: Tensor) -> Tensor:
    """ptr [n + 1] -> the row of each outlier [count] int64."""
    return torch.repeat_interleave(torch.arange(len(ptr) - 1, device=ptr.device), ptr.long().diff())
