"""How packed SDR weights lie in memory: members of a group apart, so that one tile has one of each.

A unit is UNIT (or fewer) successive weights of a row with one shift. A word holds the codes of two
members of a unit (a byte) or of four (int16); words of PLANE successive units lie side by side, and
so do their shifts: a tile of words [rows, plane] meets a tile of shifts [rows, plane] element by
element, whatever the group.

    half h = 2 b + i of a row has units h plane + j, and weight k = (h plane + j) unit + member
    words[tile, h, s, row, j], nibble f  =  code of member f unit / fields + s
    shifts[tile, b, row, j]  =  shifts of the unit in half 2 b (low nibble) and 2 b + 1 (high)

Inputs are put into the same order [m, half, member, j] before the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

UNIT = 16  # most weights with a shift of their own; longer groups repeat it
MIDDLE = 8  # the nibble of the code 0
ROWS = 64  # of W in a tile on a GPU
PLANES = (64, 32)  # units side by side on a GPU; 8-bit tensor cores take no fewer than 32


@dataclass(frozen=True)
class Layout:
    """Sizes of packed weights [n, k]."""

    n: int
    k: int
    unit: int
    plane: int
    rows: int
    fields: int  # codes in a word: 2 in a byte, 4 in int16

    @property
    def tiles(self) -> int:
        """Tiles of rows."""
        return -(-self.n // self.rows)

    @property
    def halves(self) -> int:
        """Pieces of plane * unit weights in a row, an even number."""
        return 2 * -(-self.k // (2 * self.plane * self.unit))

    @property
    def padded(self) -> int:
        """k in whole pieces."""
        return self.halves * self.plane * self.unit


def unit_of(group: int) -> int:
    """Weights per stored shift for groups of `group`, 0 a whole row; odd groups give 1."""
    return gcd(group, UNIT) if group else UNIT


def flat(n: int, k: int, unit: int) -> Layout:
    """For the CPU: rows by themselves, with one piece in each half."""
    return Layout(n, k, unit, -(-k // (2 * unit)), 1, 2)


def tiled(n: int, k: int, unit: int, fields: int) -> Layout:
    """For a GPU: tiles of rows, the plane with the least padding.

    Words of 16 bits where inputs have 16, bytes where they have 8: tensor cores then take fields of
    words as they are, without an exchange between lanes.
    """
    layouts = [Layout(n, k, unit, plane, ROWS, fields) for plane in PLANES]
    return min(layouts, key=lambda lay: lay.padded)


def pack(codes: Tensor, shift: Tensor, lay: Layout) -> tuple[Tensor, Tensor]:
    """codes [n, k] around MIDDLE, shift of each [n, units] -> words and shifts."""
    n, k = codes.shape
    rows = -n % lay.rows
    codes = functional.pad(codes, (0, lay.padded - k, 0, rows), value=MIDDLE)
    cells = codes.view(lay.tiles, lay.rows, lay.halves, lay.plane, lay.unit)
    cells = cells.permute(0, 2, 4, 1, 3)  # [tiles, halves, unit, rows, plane]
    units = lay.halves * lay.plane
    shift = functional.pad(shift, (0, units - shift.shape[1], 0, rows))
    pairs = shift.view(lay.tiles, lay.rows, -1, 2, lay.plane).permute(3, 0, 2, 1, 4)
    return joined(cells, lay.fields), (pairs[0] | pairs[1] << 4).contiguous()


def joined(cells: Tensor, fields: int) -> Tensor:
    """Nibbles [tiles, halves, unit, rows, plane] uint8 -> words [tiles, halves, s, rows, plane]."""
    parts = cells.chunk(fields, 2)
    halves = [low | high << 4 for low, high in zip(parts[::2], parts[1::2], strict=True)]
    if fields == 2:
        return halves[0].contiguous()
    return torch.stack(halves, -1).contiguous().view(torch.int16).squeeze(-1)


def parted(words: Tensor, fields: int) -> Tensor:
    """The inverse of joined."""
    pieces = [words] if fields == 2 else list(words[..., None].view(torch.uint8).unbind(-1))
    return torch.cat([half for piece in pieces for half in (piece & 15, piece >> 4)], 2)


def unpack(words: Tensor, shifts: Tensor, lay: Layout) -> tuple[Tensor, Tensor]:
    """The inverse: codes [n, k] uint8 and the shift of every weight [n, k] uint8."""
    cells = parted(words, lay.fields)  # [tiles, halves, unit, rows, plane]
    pairs = torch.stack([shifts & 15, shifts >> 4], 2)  # [tiles, pairs, 2, rows, plane]
    spread = pairs.flatten(1, 2)[:, :, None].expand(cells.shape)
    return tuple(  # type: ignore[return-value]
        part.permute(0, 3, 1, 4, 2).reshape(-1, lay.padded)[: lay.n, : lay.k].contiguous()
        for part in (cells, spread)
    )


def ordered(x: Tensor, lay: Layout) -> Tensor:
    """x [m, k] -> [m, padded] in the order of the weights, 0 beyond."""
    x = functional.pad(x, (0, lay.padded - lay.k))
    parts = x.view(len(x), lay.halves, lay.plane, lay.unit).transpose(2, 3)
    return parts.reshape(len(x), -1)
