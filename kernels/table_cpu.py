"""Weights in 1-6, 8 and e4m3 bits times bf16 inputs on the CPU, by one product in C (table_cpu.c).

Every class whose weights are numbers of a small table, made for a row and a group of input
channels, keeps them like this on a CPU where the C compiles, and hands them to `multiply`. Inputs
of other types, which C does not take, are multiplied by tiles that plain torch expands.

Codes of a row lie in blocks; a chunk is 32 successive channels, and

    nibble c % 4 of word l of block c // 4      =  code of channel 32 c + l        (4 bits)

in words of 16 bits. 1 and 2 bits are the same with 16 and 8 chunks in a block. 3 bits are a plane
of 2 bits, two words for each l, and a plane of 1; 5 bits one of 4 and one of 1, 6 one of 4 and one
of 2, the low bits first. 8 bits are bytes in order. A block is never split, so rows are padded to
128, 256 or 512 channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from kernels.native import library
from kernels.round_cpu import TYPES
from kernels.workspace import WORKSPACES

CHUNK = 32  # channels that fill a register of bf16
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}  # bits of planes, low first
KEPT4, KEPT_BF16, KEPT_FP16, KEPT_FP32 = range(14, 18)  # forms of pruned rows: codes or numbers
E4M3 = 9  # the form of codes that are e4m3 numbers; other forms are bits
PLAIN, DOUBLE, SHIFT, BILEVEL, SUMS, BLOCKS, NONE, ZEROS = range(8)  # kinds of parameters, as in C
ABSENT = 3
UNIT = 16  # channels with a table of their own at least
ROWS, STEP = 64, 128  # of W, and channels, in a tile of outliers


def block_of(form: int) -> int:
    """Channels in a block."""
    return CHUNK * 16 // min(PLANES[form]) if form in PLANES else 4 * CHUNK


def padded(k: int, form: int) -> int:
    """k in whole blocks."""
    return k + -k % block_of(form)


def pack_rows(codes: Tensor, form: int) -> Tensor:
    """codes [n, k] uint8 -> [n, bytes] uint8; 0 beyond k."""
    n, k = codes.shape
    codes = functional.pad(codes, (0, padded(k, form) - k))
    if form not in PLANES:
        return codes.contiguous()
    parts, at = [], 0
    for width in PLANES[form]:
        count = 16 // width  # chunks in a word
        plane = (codes >> at & 2**width - 1).view(
            n, -1, block_of(form) // CHUNK // count, count, CHUNK
        )
        words = torch.zeros(*plane.shape[:3], CHUNK, dtype=torch.int16, device=codes.device)
        for i in range(count):
            words |= plane[:, :, :, i].to(torch.int16) << i * width
        parts.append(words.view(torch.uint8).flatten(2))
        at += width
    return torch.cat(parts, 2).flatten(1)


def unpack_rows(words: Tensor, form: int, k: int) -> Tensor:
    """The inverse of pack_rows: [n, k] uint8."""
    n = len(words)
    if form not in PLANES:
        return words[:, :k]
    blocks = words.view(n, -1, block_of(form) * form // 8)
    codes = torch.zeros(n, blocks.shape[1], block_of(form), dtype=torch.uint8)
    start = at = 0
    for width in PLANES[form]:
        stop = start + block_of(form) * width // 8
        held = blocks[:, :, start:stop].contiguous().view(torch.int16)
        held = held.view(n, blocks.shape[1], -1, 1, CHUNK)
        shift = torch.arange(0, 16, width, dtype=torch.int16)[:, None]
        part = (held >> shift & 2**width - 1).to(torch.uint8)
        codes |= part.view(codes.shape) << at
        start, at = stop, at + width
    return codes.flatten(1)[:, :k]


class Weights(ctypes.Structure):
    """What the C reads; see there."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("words", "where", "starts", "scale", "more", "low", "fourth", "levels"),
                *("row_scale", "token_scale", "order", "ptr", "place", "delta", "groups_at"),
            )
        ),
        *(
            (name, ctypes.c_long)
            for name in (
                *("n", "k", "padded", "row_bytes", "group", "groups", "row_step", "extra"),
            )
        ),
    ]


@dataclass
class Table:
    """Packed weights [n, k] as the product takes them; what a kind has beside is None elsewhere.

    scale and more are [n, groups] but where the C says otherwise, group in channels (0: the row).
    levels [16 or 32] fp32 are those of the codes: w = level scale + more.
    """

    words: Tensor
    form: int
    kind: int
    group: int = 0
    groups: int = 1
    levels: Tensor | None = None
    scale: Tensor | None = None
    more: Tensor | None = None
    low: Tensor | None = None
    fourth: Tensor | None = None
    row_scale: Tensor | None = None
    order: Tensor | None = None
    ptr: Tensor | None = None
    place: Tensor | None = None
    delta: Tensor | None = None
    where: Tensor | None = None
    starts: Tensor | None = None
    kind_type: int | None = None
    extra: int = 0


@lru_cache(maxsize=1)
def enough() -> bool:
    """True if this CPU and a compiler make the product: tried with one kind of table."""
    return built(4, PLAIN, 0, ABSENT) is not None


@lru_cache(maxsize=32)
def built(form: int, kind: int, kind_type: int, more_type: int) -> ctypes.CDLL | None:
    """The C for one form of codes and one kind of parameters in their types."""
    known = {"FORM": form, "KIND": kind, "TYPE": kind_type, "MORE_TYPE": more_type}
    flags = (f"-D{name}={value}" for name, value in known.items())
    compiled = library(Path(__file__).with_suffix(".c"), *flags)
    if compiled is not None:
        place, size = ctypes.c_void_p, ctypes.c_long
        compiled.table_product.argtypes = [
            *(ctypes.POINTER(Weights), place, place, size, place, ctypes.c_int)
        ]
        compiled.table_product.restype = None
    return compiled


def ready(device: torch.device) -> bool:
    """True if weights should be packed for this product."""
    return device.type == "cpu" and enough()


def fits(group: int) -> bool:
    """True if tables can have such groups (0: a whole row)."""
    return group % UNIT == 0


def takes(x: Tensor) -> bool:
    """True if C multiplies by this x."""
    return x.dtype == torch.bfloat16 and enough()


def multiply(x: Tensor, table: Table, n: int, token_scale: Tensor | None = None) -> Tensor:
    """x [m, k] bf16, token_scale [m] fp32 -> [m, n] bf16; in C."""
    (m, k), t = x.shape, table
    x, wide = x.contiguous(), padded(k, t.form)
    levels = BLANK if t.levels is None else t.levels.float().repeat(32 // len(t.levels))
    y = x.new_empty(m, n)
    own = Weights()
    tensors = {
        "words": t.words, "scale": t.scale, "more": t.more, "low": t.low, "fourth": t.fourth,
        "levels": levels, "row_scale": t.row_scale, "token_scale": token_scale, "order": t.order,
        "ptr": t.ptr, "place": t.place, "delta": t.delta, "where": t.where, "starts": t.starts,
    }  # fmt: skip
    room = wide // STEP * (2 + STEP // UNIT)
    tensors["groups_at"] = WORKSPACES.take("groups", room, torch.int32, x.device)
    for name, tensor in tensors.items():
        setattr(own, name, None if tensor is None else tensor.data_ptr())
    own.n, own.k, own.padded, own.row_bytes = n, k, wide, t.words.shape[-1]
    own.group, own.groups, own.extra = t.group or wide, t.groups, t.extra
    own.row_step = 0 if t.row_scale is None or t.row_scale.numel() == 1 else 1
    spare = WORKSPACES.take("arranged rows", m * wide, x.dtype, x.device)
    kind_type = type_of(t.scale) if t.kind_type is None else t.kind_type
    c = built(t.form, t.kind, kind_type, type_of(t.more))
    assert c is not None
    how = (ctypes.byref(own), x.data_ptr(), spare.data_ptr())
    c.table_product(*how, m, y.data_ptr(), torch.get_num_threads())
    return y


BLANK = torch.zeros(32)
TILE = 128  # rows expanded at once where C takes no part: 4096 channels in fp32 stay in the cache


def by_tiles(x: Tensor, n: int, rows_of: Callable[[slice], Tensor]) -> Tensor:
    """x [m, k] -> [m, n] by rows of W_hat [rows, k] fp32, as many at once as stay in the cache."""
    y = x.new_empty(len(x), n)
    for start in range(0, n, TILE):
        rows = slice(start, min(start + TILE, n))
        part = rows_of(rows)
        if x.dtype != torch.float32:
            wide = WORKSPACES.take("rows", part.numel(), x.dtype, x.device).view(part.shape)
            part = wide.copy_(part)
        y[:, rows] = functional.linear(x, part)
    return y


def columns(k: int, group: int) -> Tensor:
    """[k] int64: the group of every channel; 0: all are one."""
    return torch.arange(k) // (group or k)


def is_rows(words: Tensor) -> bool:
    """True if words are this file's and not a GPU's tiles."""
    return words.ndim == 2


def type_of(values: Tensor | None) -> int:
    """A parameter's type, as C numbers them."""
    return ABSENT if values is None else TYPES.get(values.dtype, 0)
