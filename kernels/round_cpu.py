"""Inputs rounded row by row in C, for products on the CPU: E4M3 numbers and SDR integers in bf16.

Both are exact in bf16, so the product that follows is one of bf16 (kernels/table_cpu.py). Bytes
are rounded where they are multiplied (kernels/byte_cpu.py).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.base import Json
from kernels.integers import DTYPES, SMALLEST
from kernels.native import library
from kernels.workspace import WORKSPACES

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
EXACT = 9  # bits of a signed whole number that bf16 holds


class Kept(ctypes.Structure):
    """How scales are stored."""

    _fields_ = [("smallest", ctypes.c_float), ("most", ctypes.c_float), ("type", ctypes.c_long)]


class Cut(ctypes.Structure):
    """An SDR format."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("peak", "low", "top")),
        *((name, ctypes.c_long) for name in ("bits", "group")),
    ]


def stored_as(dtype: str) -> tuple[float, float, int]:
    """What Kept holds of a scale's type."""
    kept = DTYPES[dtype]
    return SMALLEST[dtype], torch.finfo(kept).max, TYPES[kept]


@lru_cache(maxsize=1)
def native() -> ctypes.CDLL | None:
    """round_cpu.c, None where it does not compile."""
    compiled = library(Path(__file__).with_suffix(".c"))
    if compiled is not None:
        place, size = ctypes.c_void_p, ctypes.c_long
        kept, cut = ctypes.POINTER(Kept), ctypes.POINTER(Cut)
        first, last = (place, size, size, size), (kept, size, place, place, ctypes.c_int)
        compiled.round_e4m3.argtypes = [*first, *last]
        compiled.round_sdr.argtypes = [*first, cut, *last]
        compiled.round_e4m3.restype = compiled.round_sdr.restype = None
    return compiled


def room(x: Tensor) -> tuple[Tensor, Tensor]:
    """values [m, k] bf16 and scales [m] fp32, in memory that is used again."""
    values = WORKSPACES.take("rounded x", x.numel(), torch.bfloat16, x.device).view(x.shape)
    return values, WORKSPACES.take("scales of x", len(x), torch.float32, x.device)


def e4m3_rows(x: Tensor, scale_dtype: str, shared: bool) -> tuple[Tensor, Tensor] | None:
    """x [m, k] bf16 or fp32 -> E4M3 numbers in bf16 and their scales [m]; None without C.

    The same as kernels.quantize.e4m3_rows_reference, bit for bit.
    """
    c = native()
    if c is None:
        return None
    x, (values, scale) = x.contiguous(), room(x)
    given = (x.data_ptr(), TYPES[x.dtype], *x.shape, Kept(*stored_as(scale_dtype)), int(shared))
    c.round_e4m3(*given, values.data_ptr(), scale.data_ptr(), torch.get_num_threads())
    return values, scale


def sdr_rows(x: Tensor, act: Json) -> tuple[Tensor, Tensor] | None:
    """The same in SDR, as kernels.sdr.activations.integers; None also where bf16 is not exact."""
    c = native()
    if c is None or act["bits"] > EXACT:
        return None
    top = 2 ** (act["bits"] - 1) - 1
    low = -top if act["saturation"] == "symmetric" else -top - 1
    cut = Cut(2 ** (act["base_bits"] - 1) - 1, low, top, act["bits"], act["group"] or x.shape[1])
    x, (values, scale) = x.contiguous(), room(x)
    given = (x.data_ptr(), TYPES[x.dtype], *x.shape, cut, Kept(*stored_as(act["scale_dtype"])))
    flag = int(act["per_tensor"])
    c.round_sdr(*given, flag, values.data_ptr(), scale.data_ptr(), torch.get_num_threads())
    return values, scale
