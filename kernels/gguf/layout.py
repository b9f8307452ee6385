"""How packed GGUF weights lie in memory: bit planes, and the members of sub-blocks apart.

A row's codes are put in the order [member, sub-block], so that one scale of each sub-block meets
all members as they lie. Their bits go to planes of 4, 2 and 1 bits (8 alone), lowest first; a byte
of a plane of b bits holds the codes of 8 / b members that are as far apart as they can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Levels of IQ4, denser around 0; `kvalues_iq4nl` of llama.cpp's ggml-common.h.
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Type:
    """What a block type's codes and scales mean."""

    bits: int
    block: int  # weights that share d
    sub: int  # weights that share a scale
    zero: int = 0  # code of 0, where there is neither offset nor table
    table: bool = False  # codes look up TABLE
    scale_zero: int = 0  # what is taken off a sub-block's stored scale


# Sizes of ggml-common.h. Scales of 8 bits are stored with their sign, others around scale_zero.
TYPES = {
    "Q8_0": Type(8, 32, 32, zero=128),
    "Q4_0": Type(4, 32, 32, zero=8),
    "Q4_1": Type(4, 32, 32),
    "Q5_0": Type(5, 32, 32, zero=16),
    "Q5_1": Type(5, 32, 32),
    "Q2_K": Type(2, 256, 16),
    "Q3_K": Type(3, 256, 16, zero=4, scale_zero=32),
    "Q4_K": Type(4, 256, 32),
    "Q5_K": Type(5, 256, 32),
    "Q6_K": Type(6, 256, 16, zero=32),
    "IQ4_NL": Type(4, 32, 32, table=True),
    "IQ4_XS": Type(4, 256, 32, table=True, scale_zero=32),
}


def widths(bits: int) -> list[int]:
    """Bits of the planes: 8, or those of 4, 2 and 1 whose sum is `bits`, the widest first."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack_planes(codes: Tensor, kind: Type) -> Tensor:
    """codes [n, k] uint8, k in whole blocks -> [n, k bits / 8] uint8."""
    n, k = codes.shape
    cells = codes.view(n, -1, kind.sub).transpose(1, 2).reshape(n, k)
    planes, at = [], 0
    for width in widths(kind.bits):
        parts = (cells >> at & 2**width - 1).view(n, 8 // width, -1)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        planes.append((parts << shifts[:, None]).sum(1, dtype=torch.uint8))
        at += width
    return torch.cat(planes, 1)


def unpack_planes(packed: Tensor, kind: Type, cells: Tensor) -> Tensor:
    """[n, bytes] -> codes into cells [n, k] uint8, in the order [member, sub-block]."""
    n, k = cells.shape
    start = at = 0
    for width in widths(kind.bits):
        count = k * width // 8
        plane = packed[:, start : start + count]
        parts = cells.view(n, 8 // width, count)
        for i in range(8 // width):
            part = plane >> (i * width) if i else plane
            if i * width + width < 8:
                part = part & (2**width - 1)
            if at:
                parts[:, i] |= part << at
            else:
                parts[:, i] = part
        start, at = start + count, at + width
    return cells


def ordered(x: Tensor, kind: Type) -> Tensor:
    """x [m, k] -> the same in the order [member, sub-block]."""
    m, k = x.shape
    return x.view(m, -1, kind.sub).transpose(1, 2).reshape(m, k)
