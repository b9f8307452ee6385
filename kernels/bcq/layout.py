"""Bit planes: codes [n, k] of signed sums in int16 words whose every bit is taken by one mask.

A plane is PLANE successive input channels of one row; a block is 4 to 16 successive planes, its
fields. A word holds bits of a code for each field: of one scale for 16 fields, of four for 4, so

    bit s F + i of words[tile, block, w, row, j]  =  bit b of codes[64 tile + row, channel]

with F fields, channel = (block F + i) PLANE + j and b = s + w 16 / F. A field is then a plain tile
that meets a contiguous slice of x and needs no shift. Rows come in tiles of 64, so every load is
contiguous.

One bit of a 16-bit float makes of it one of two numbers, low or low + span, both exact. In fp16
each bit but the sign stands alone, as a subnormal 2^-24 ... 2^-15 or as 2^-14 ... 2: low is 0. In
bf16, whose subnormals vanish in fp32 products, the bit is set into the bits of 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 64  # of W in a tile
FIELDS = {
    1: 16,
    2: 8,
    3: 16,
    4: 4,
}  # planes in a block, by bits of a code: all that fill words
PLANES = (128, 64, 32, 16)  # lengths of a plane; 16 is the least a tensor core takes
LONGEST = {1: 64, 2: 128, 3: 64, 4: 128}  # plane that registers hold
OVERHEAD = 4  # channels' worth of work that a plane costs beside its own: scales, slices of x
ONE = {torch.float16: 0x3C00, torch.bfloat16: 0x3F80}  # the bits of 1.0


def plane_of(bits: int, group: int, k: int) -> int:
    """Length of a plane that groups hold whole (0: a group is the row), 0 if there is none."""
    fields = FIELDS[bits]
    fit = [p for p in PLANES if group % p == 0 and p <= LONGEST[bits]]
    return min(fit, key=lambda p: -(-k // (fields * p)) * fields * (p + OVERHEAD), default=0)


def place(bits: int, b: int, i: int) -> tuple[int, int]:
    """Word and bit that hold bit b of the code in field i."""
    index = b * FIELDS[bits] + i
    return index // 16, index % 16


def pack_planes(codes: Tensor, bits: int, plane: int) -> Tensor:
    """codes [n, k] uint8 -> words [tiles, blocks, bits F / 16, 64, plane] int16; 0 beyond."""
    n, k = codes.shape
    count = FIELDS[bits]
    codes = functional.pad(codes, (0, -k % (count * plane), 0, -n % ROWS))
    tiles = codes.view(codes.shape[0] // ROWS, ROWS, -1, count, plane)
    fields = tiles.permute(3, 0, 2, 1, 4)  # [F, tiles, blocks, 64, plane]
    shape = (*fields.shape[1:3], bits * count // 16, ROWS, plane)
    words = torch.zeros(shape, dtype=torch.int16, device=codes.device)
    for i, field in enumerate(fields):
        for b in range(bits):
            word, bit = place(bits, b, i)
            words[:, :, word] |= ((field >> b) & 1).to(torch.int16) << bit
    return words


def unpack_planes(words: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of pack_planes: codes [n, k] uint8."""
    fields = []
    for i in range(FIELDS[bits]):
        code = torch.zeros_like(words[:, :, 0])
        for b in range(bits):
            word, bit = place(bits, b, i)
            code |= ((words[:, :, word] >> bit) & 1) << b
        fields.append(code.to(torch.uint8))
    codes = torch.stack(fields, 2)  # [tiles, blocks, F, 64, plane]
    return codes.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[:n, :k].contiguous()


def pack_scales(alpha: Tensor) -> Tensor:
    """alpha [n, G, bits] -> [G, n padded, bits], 0 beyond."""
    return functional.pad(alpha.transpose(0, 1), (0, 0, 0, -alpha.shape[0] % ROWS)).contiguous()


def pack_offsets(offset: Tensor) -> Tensor:
    """offset [n, G] -> [G, n padded], 0 beyond."""
    return functional.pad(offset.T, (0, -offset.shape[0] % ROWS)).contiguous()


def numbers(dtype: torch.dtype) -> tuple[tuple[int, int, float, float], ...]:
    """For bit p of a 16-bit float, v = low + span bit: mask, bits beside it, step and less.

    alpha (2 bit - 1) = alpha step v - alpha less, with step = 2 / span and less = 1 + step low.
    """
    found = []
    for p in range(16):
        mask = 1 << p
        alone = p == 14 or (dtype == torch.float16 and p < 14)
        beside = 0 if alone else ONE[dtype] & ~mask
        low, high = bits_as([beside, beside | mask], dtype)
        step = 2 / (high - low)
        found.append((signed(mask), beside, step, 1 + step * low))
    return tuple(found)


def bits_as(patterns: list[int], dtype: torch.dtype) -> list[float]:
    """What 16 bits each are as numbers of a 16-bit type."""
    words = torch.tensor([signed(p) for p in patterns], dtype=torch.int16)
    return [float(value) for value in words.view(dtype)]


def signed(word: int) -> int:
    """16 bits as an int16."""
    return word - 2**16 if word >= 2**15 else word


def group_starts(bits: int, group: int, plane: int) -> tuple[bool, ...]:
    """For each plane of a block: whether its scales may differ from those of the one before."""
    planes, count = group // plane, FIELDS[bits]  # planes of a group; 0: the whole row
    if planes == 0 or planes % count == 0:
        return tuple(i == 0 for i in range(count))
    return tuple(count % planes != 0 or i % planes == 0 for i in range(count))


def sum_ends(dtype: torch.dtype, bits: int, group: int, plane: int) -> tuple[bool, ...]:
    """For each plane of a block: whether the one after it weighs sums of x otherwise."""
    less = [
        [numbers(dtype)[place(bits, b, i)[1]][3] for b in range(bits)] for i in range(FIELDS[bits])
    ]
    starts = group_starts(bits, group, plane)
    return tuple(
        a != b or start
        for a, b, start in zip(less, [*less[1:], []], [*starts[1:], True], strict=True)
    )
