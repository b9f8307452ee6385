"""Affine integers: equally spaced levels whose zero point is a real number."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from backend.formats import FORMATS
from backend.formats.base import Format, GroupField, Params
from backend.formats.int_group import DTYPES, SMALLEST


@FORMATS.register
class Affine(Format):
    """Equally spaced levels between a group's own ends; the zero point is a real number.

    code = clamp(round(x / scale + zero), 0, 2^bits - 1), value = scale * (code - zero), the grid of
    HQQ (Badri and Shaji 2023). scale = (max - min) / (2^bits - 1), zero = -min / scale: unlike
    `int` the range need not hold 0, and then 0 itself is no level. A constant group is exact.
    """

    kind: ClassVar[str] = "affine"
    bits: int = Field(4, ge=1, le=8, description="Bits of one code.")
    group: GroupField = 0
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="What scale and zero point are stored as, before codes are chosen."
    )

    @property
    def top(self) -> int:
        """Largest code, 2^bits - 1."""
        return 2**self.bits - 1

    def code_bits(self) -> float:
        return float(self.bits)

    def fit(self, w: Tensor, base: Params, importance: Tensor | None = None) -> Params:
        """w [..., g] -> scale and zero [..., 1]."""
        low, high = w.float().amin(-1, keepdim=True), w.float().amax(-1, keepdim=True)
        # A constant group is one step away from 0: code 0 with zero -1 or 1; all zeros have zero 0.
        alone = torch.where(low == 0, 1.0, low.abs())
        scale = torch.where(low == high, alone, (high - low) / self.top)
        scale = self.stored(scale.clamp_min(SMALLEST[self.scale_dtype]))
        return {"scale": scale, "zero": self.stored(-low / scale.float())}

    def encode(self, w: Tensor, p: Params, at: int = 0) -> Tensor:
        codes = (w.float() / p["scale"].float() + p["zero"].float()).round_()
        return codes.clamp_(0, self.top).to(torch.uint8)

    def decode(self, codes: Tensor, p: Params, at: int = 0) -> Tensor:
        return (codes.float() - p["zero"].float()) * p["scale"].float()

    def stored(self, x: Tensor) -> Tensor:
        """fp32 -> storage dtype, never infinite."""
        dtype = DTYPES[self.scale_dtype]
        return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
