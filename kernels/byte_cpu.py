"""Inputs rounded to bytes times weights in bytes or half bytes on the CPU, by a product in C.

    y = s_x (sum over groups of scale (a . q) + offset (a . 1)) - s_x zero_x row_sum

a and q are whole numbers of one byte: codes less the middle of their range; w = q scale + offset.
Rounding of x, product and scales are one call of byte_cpu.c; its sums of up to 512 channels are
exact, everything else is fp32. Used by int_act_cpu and llm_int8.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from kernels import ops
from kernels.base import Json
from kernels.native import library
from kernels.round_cpu import TYPES, Kept, stored_as
from kernels.workspace import WORKSPACES

ROWS = 64  # of W in a block; n is padded to whole ones
HALF = 8  # middle of the codes in half a byte
STEPS = {"restricted": -1.0, "offset": -0.5, "full": 0.0}  # beyond the middle, of a scale's peak


class Weights(ctypes.Structure):
    """What the C reads of W; see there."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "scale", "offset", "row_sum")),
        *((name, ctypes.c_long) for name in ("n", "k", "group", "bits")),
    ]


class Grid(ctypes.Structure):
    """The grid of x, likewise."""

    _fields_ = [
        ("keep", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("top", "middle", "steps")),
        ("kept", Kept),
        *((name, ctypes.c_long) for name in ("per_tensor", "inverse")),
    ]


class Rounded(ctypes.Structure):
    """Room for x in bytes."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "sums")]


@lru_cache(maxsize=1)
def native() -> ctypes.CDLL | None:
    """byte_cpu.c, None where it does not compile."""
    compiled = library(Path(__file__).with_suffix(".c"))
    if compiled is not None:
        place, size = ctypes.c_void_p, ctypes.c_long
        compiled.byte_product.argtypes = [
            *(ctypes.POINTER(Weights), ctypes.POINTER(Grid), ctypes.POINTER(Rounded)),
            *(place, size, place, size, size, size, place, ctypes.c_int),
        ]
        compiled.byte_product.restype = None
    return compiled


def pack(q: Tensor, scale: Tensor, offset: Tensor | None, half: bool) -> dict[str, Tensor]:
    """q [n, k] int8; scale and offset [n, G] fp32, w = q scale + offset -> what `product` takes.

    G divides k in groups of a multiple of 4, of 8 where codes take half a byte (-8 <= q < 8); one
    group may have any length. n is padded to whole blocks.
    """
    n, k = q.shape
    groups = scale.shape[1]
    more = -n % ROWS
    q = functional.pad(q, (0, -k % 8 if groups == 1 else 0, 0, more))
    scale = functional.pad(scale.float(), (0, 0, 0, more))
    total = q.view(len(q), groups, -1).sum(2, dtype=torch.float32).mul_(scale)  # [n, G]
    packed = {"q": blocks(q, half), "scale": scale.T.contiguous()}
    if offset is not None:
        offset = functional.pad(offset.float(), (0, 0, 0, more))
        packed["offset"] = offset.T.contiguous()
        total = total + offset * (k / groups)
    packed["row_sum"] = total.sum(1)
    return packed


def blocks(q: Tensor, half: bool) -> Tensor:
    """q [n, k] int8 -> [n / 64, k / 4, 64, 4] int8, or of half bytes [n / 64, k / 8, 64, 4] uint8.

    Byte i of word j of a row has channel 4 j + i; in halves, the low one has channel 8 j + i, the
    high one 8 j + 4 + i, each as q + 8.
    """
    n, k = q.shape
    words = q.view(n // ROWS, ROWS, k // 4, 4).transpose(1, 2)
    if not half:
        return words.contiguous()
    pairs = (words + HALF).to(torch.uint8).reshape(n // ROWS, k // 8, 2, ROWS, 4)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).contiguous()


def unblocked(q: Tensor) -> Tensor:
    """The inverse of `blocks`: [n, k] int8."""
    if q.dtype == torch.uint8:
        pairs = torch.stack([q & 15, q >> 4], 2).flatten(1, 2)  # [n / 64, k / 4, 64, 4]
        q = pairs.view(torch.int8) - HALF
    return q.transpose(1, 2).reshape(len(q) * ROWS, -1)


def dense(packed: Mapping[str, Tensor], n: int, k: int) -> Tensor:
    """W_hat [n, k] fp32 of packed tensors."""
    q, scale = unblocked(packed["q"]), packed["scale"].T[..., None]  # [n, G, 1]
    w = q.view(len(q), scale.shape[1], -1) * scale
    if "offset" in packed:
        w = w + packed["offset"].T[..., None]
    return w.flatten(1)[:n, :k]


def grid_of(act: Json) -> list[float]:
    """The int format's grid for inputs, in numbers as the op takes them; see Grid."""
    top, middle = 2 ** act["bits"] - 1, 2 ** (act["bits"] - 1)
    steps = middle + STEPS[act["convention"]] if act["symmetric"] else 0
    return [top, middle, steps, *stored_as(act["scale_dtype"]), bool(act["per_tensor"]), 0]


def product(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    row_sum: Tensor | None,
    keep: Tensor | None,
    beside: Tensor | None,
    n: int,
    grid: list[float],
) -> Tensor:
    """x [m, k] bf16 or fp32; grid as of grid_of; keep [k] uint8, 0 where x counts as 0; the rest
    as of `pack`, row_sum only where x has a zero point; beside [m, n] fp32 is added -> [m, n]."""
    c = native()
    assert c is not None  # nothing is packed like this without it
    (m, k), groups = x.shape, len(scale)
    half = q.dtype == torch.uint8
    padded = q.shape[1] * (8 if half else 4)
    y = x.new_empty(m, n)
    codes = WORKSPACES.take("bytes of x", m * padded, torch.uint8, x.device)
    sizes = [m, m, m * groups if offset is not None else 0]  # scales, zero points, sums of groups
    floats = WORKSPACES.take("grids of x", sum(sizes), torch.float32, x.device)
    at, places = floats.data_ptr(), []
    for size in sizes:
        places.append(at if size else None)
        at += 4 * size
    w = Weights(*(None if t is None else t.data_ptr() for t in (q, scale, offset, row_sum)))
    w.n, w.k, w.group, w.bits = scale.shape[1], padded, padded // groups, 4 if half else 8
    kept, flags = Kept(*grid[3:5], int(grid[5])), (int(v) for v in grid[6:])
    own = Grid(None if keep is None else keep.data_ptr(), *grid[:3], kept, *flags)
    room = Rounded(codes.data_ptr(), *places)
    more = None if beside is None else beside.data_ptr()
    how = (ctypes.byref(w), ctypes.byref(own), ctypes.byref(room), x.data_ptr(), TYPES[x.dtype])
    c.byte_product(*how, more, m, n, k, y.data_ptr(), torch.get_num_threads())
    return y


OP = ops.register(
    "byte_cpu(Tensor x, Tensor q, Tensor scale, Tensor? offset, Tensor? row_sum, "
    "Tensor? keep, Tensor? beside, int n, float[] grid) -> Tensor",
    cpu=product,
    fake=lambda x, q, scale, offset, row_sum, keep, beside, n, grid: x.new_empty(x.shape[0], n),
)
