"""SpQR weights as table_cpu.c takes them: rows of codes in the order of their groups.

stats[row, group]  = code of the scale (low nibble) and of the origin (high)
ends[set of rows, 4, group]  = low and step of scales, low and step of origins, over the unit
order              = which column each place holds, empty where it is the place itself
ptr, column, delta = outliers of one tile of 64 rows by 128 places after the other, row after row
                     of tiles: row in the tile times 128, plus place; and what the exact weight has
                     beyond its code's value
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kernels.base import Json
from kernels.table_cpu import (
    BILEVEL,
    ROWS,
    STEP,
    Table,
    by_tiles,
    columns,
    pack_rows,
    padded,
    takes,
    unpack_rows,
)
from kernels.table_cpu import fits as fits_table
from kernels.table_cpu import multiply as by_table

NAMES = ("scale_low", "scale_step", "origin_low", "origin_step")
HALF_MAX = torch.finfo(torch.float16).max


def fits(weight: Json, n: int, k: int) -> bool:
    """True if the C reads such weights: sets of rows are powers of two."""
    sets = min(weight["stat_group"], n)
    whole = sets & (sets - 1) == 0 or sets == n
    return fits_table(weight["group"]) and whole


def pack(codes: Tensor, params: Mapping[str, Tensor], weight: Json) -> dict[str, Tensor]:
    """codes [n, k] and parameters as the format stores them -> tensors by name."""
    n, k = codes.shape
    index = params.get("column_group")
    order = torch.arange(k) if index is None else index.long().argsort(stable=True)
    plain = {"origin_low": torch.zeros_like, "origin_step": torch.ones_like}  # whole zero points
    low = params["scale_low"]
    ends = [params[a] if a in params else plain[a](low) for a in NAMES]
    held = {
        "words": pack_rows(codes[:, order], weight["bits"]),
        "stats": (params["scale"] | params["origin"] << 4).contiguous(),
        "ends": torch.stack(ends, 1),
        "order": torch.empty(0, dtype=torch.int32),
        "unit": params["unit"].float().flatten(),
    }
    if index is not None:
        beyond = padded(k, weight["bits"]) - k
        held["order"] = functional.pad(order, (0, beyond), value=k).to(torch.int32)
    if "row_ptr" in params:
        ptr = params["row_ptr"].long()
        row = torch.repeat_interleave(torch.arange(n), ptr.diff())
        place = order.argsort()[params["column"].long()]
        steps = padded(k, weight["bits"]) // STEP
        tile = row // ROWS * steps + place // STEP
        sort = tile.argsort(stable=True)
        row, place, tile = row[sort], place[sort], tile[sort]
        w = dense(held, weight, slice(0, n), k)
        delta = params["value"].float()[sort] / held["unit"] - w[row, place]
        count = torch.bincount(tile, minlength=-(-n // ROWS) * steps)
        held["ptr"] = functional.pad(count.cumsum(0), (1, 0)).to(torch.int32)
        held["column"] = (row % ROWS * STEP + place % STEP).to(torch.uint16)
        held["delta"] = delta.clamp(-HALF_MAX, HALF_MAX).half()
    return held


def dense(held: Mapping[str, Tensor], weight: Json, rows: slice, k: int) -> Tensor:
    """W_hat [rows, k] fp32 over the unit, without outliers, columns by place."""
    stats, ends, of = held["stats"][rows], held["ends"], columns(k, weight["group"])
    sets = torch.arange(rows.start, rows.start + len(stats)) // weight["stat_group"]
    low, step, origin_low, origin_step = ends[sets.clamp_max(len(ends) - 1)].float().unbind(1)
    scale = torch.addcmul(low, (stats & 15).float(), step)
    origin = torch.addcmul(origin_low, (stats >> 4).float(), origin_step)
    codes = unpack_rows(held["words"][rows], weight["bits"], k).float()
    return codes.sub_(origin[:, of]).mul_(scale[:, of])


def outliers(w: Tensor, held: Mapping[str, Tensor], rows: slice) -> Tensor:
    """Rows of `dense`, from a tile's first on, with their outliers."""
    if "ptr" in held:
        steps = (len(held["ptr"]) - 1) // -(-len(held["stats"]) // ROWS)
        first = rows.start // ROWS * steps
        ptr = held["ptr"][first : first + -(-len(w) // ROWS) * steps + 1].long()
        part = slice(int(ptr[0]), int(ptr[-1]))
        tile = torch.repeat_interleave(torch.arange(len(ptr) - 1), ptr.diff())
        place = held["column"][part].long()
        row, column = tile // steps * ROWS + place // STEP, tile % steps * STEP + place % STEP
        w[row, column] += held["delta"][part].float()
    return w


def placed(w: Tensor, held: Mapping[str, Tensor], k: int) -> Tensor:
    """All rows of `dense` -> with outliers, columns as they are in W."""
    w = outliers(w, held, slice(0, len(w)))
    if not len(held["order"]):
        return w
    out = torch.empty_like(w)
    out[:, held["order"][:k].long()] = w
    return out


def multiply(x: Tensor, held: Mapping[str, Tensor], form: Json, n: int) -> Tensor:
    """x [m, k] -> [m, n] in x's dtype."""
    k, bits, order = x.shape[1], form["bits"], held["order"]
    if takes(x):
        table = Table(
            held["words"],
            bits,
            BILEVEL,
            form["group"],
            held["stats"].shape[1],
            torch.arange(2.0**bits),
            held["stats"],
            held["ends"],
            row_scale=held["unit"],
            order=order if len(order) else None,
            ptr=held.get("ptr"),
            place=held.get("column"),
            delta=held.get("delta"),
            extra=shift_of(form["stat_group"], n),
        )
        return by_table(x, table, n)
    moved = x[:, order[:k].long()] if len(order) else x

    def rows_of(rows: slice) -> Tensor:
        return outliers(dense(held, form, rows, k), held, rows)

    y = by_tiles(moved, n, rows_of)
    return y.float().mul_(held["unit"]).to(x.dtype)


def shift_of(stat_group: int, n: int) -> int:
    """log2 of the rows in a set, or of more than there are."""
    return (min(stat_group, n) - 1).bit_length()
