"""Planar words: codes [n, k] of 2, 3, 4 or 8 bits in int16 words, as the Triton kernel reads them.

A plane is PLANE successive input channels of one row. A word holds one code of each of `fields`
successive planes, so that a field of a row of words is a plain tile that meets a contiguous slice
of x, and unpacking moves nothing between lanes:

    words[tile, block, row, j], field i  =  codes[64 tile + row, (block fields + i) plane + j]

Rows come in tiles of 64 so that every load is contiguous. Three 16-bit words hold sixteen 3-bit
codes: five in the low fifteen bits of each, and the sixteenth in the three top bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 64  # of W in a tile
PLANES = (128, 64, 32, 16)  # lengths of a plane; 16 is the least a tensor core takes
LONGEST = {2: 128, 3: 64, 4: 128, 8: 128}  # more 3-bit words would leave no room for a second block
FIELDS = {2: 8, 3: 16, 4: 4, 8: 2}  # codes in a word, in three words for 3 bits
WORDS = {2: 1, 3: 3, 4: 1, 8: 1}


def plane_of(bits: int, group: int, k: int) -> int:
    """Length of a plane: the longest that groups of input channels hold whole, with least padding.

    0 if `group` (0: the whole row) is no multiple of 16.
    """
    fit = [p for p in PLANES if group % p == 0 and p <= LONGEST[bits]]
    if not fit:
        return 0
    return min(fit, key=lambda p: (-(-k // (FIELDS[bits] * p)) * p, -p))


def pack_planes(codes: Tensor, bits: int, plane: int) -> Tensor:
    """codes [n, k] uint8 -> words [tiles, blocks, words per code, 64, plane] int16; 0 beyond."""
    n, k = codes.shape
    count = FIELDS[bits]
    codes = functional.pad(codes, (0, -k % (count * plane), 0, -n % ROWS)).int()
    tiles = codes.view(codes.shape[0] // ROWS, ROWS, -1, count, plane)
    fields = tiles.permute(3, 0, 2, 1, 4)  # [fields, tiles, blocks, 64, plane]
    if bits == 3:
        words = [join(fields[5 * i : 5 * i + 5], 3) | (fields[15] >> i & 1) << 15 for i in range(3)]
    else:
        words = [join(fields, bits)]
    packed = torch.stack(words, 2)  # int32, below 2^16
    return torch.where(packed < 2**15, packed, packed - 2**16).to(torch.int16).contiguous()


def join(fields: Tensor, bits: int) -> Tensor:
    """[fields, ...] int32 -> one word each [...] int32, the first field in the lowest bits."""
    word = torch.zeros_like(fields[0])
    for i, field in enumerate(fields):
        word |= field << (bits * i)
    return word


def unpack_planes(words: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of pack_planes: codes [n, k] uint8."""
    unsigned = words.int() & 0xFFFF
    count = 5 if bits == 3 else FIELDS[bits]
    mask = 2**bits - 1
    fields = [word >> (bits * i) & mask for word in unsigned.unbind(2) for i in range(count)]
    if bits == 3:
        fields.append(sum((word >> 15) << i for i, word in enumerate(unsigned.unbind(2))))
    tiles = torch.stack(fields, 3)  # [tiles, blocks, 64, fields, plane]
    return tiles.transpose(1, 2).flatten(0, 1).flatten(1)[:n, :k].to(torch.uint8)
