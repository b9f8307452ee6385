"""KIVI's grid: equally spaced levels from the minimum of a group of keys or values."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from backend.formats import FORMATS
from backend.formats.base import Format, GroupField, Params
from backend.formats.int_group import DTYPES, SMALLEST


@FORMATS.register
class Kivi(Format):
    """Equally spaced levels between a group's own ends, from its minimum, for keys and values.

    code = round(clamp((x - min) / scale, 0, 2^bits - 1)), value = code * scale + min, scale =
    (max - min) / (2^bits - 1) (Liu et al. 2024, "KIVI", section 3; quant/new_pack.py). The range
    need not hold 0. A constant group is exact, where the released code divides 0 by 0. Keys are
    rounded along tokens, channel by channel, values along the channels of each token.
    """

    kind: ClassVar[str] = "kivi"
    bits: int = Field(2, ge=1, le=8, description="Bits of one code.")
    group: GroupField = Field(
        32, description="Neighbours that share a scale: tokens per channel, channels per token."
    )
    axis: Literal["token", "channel"] = Field(
        "token",
        description="token: groups of channels within a token; channel: groups of tokens within a "
        "channel. Of [..., tokens, channels].",
    )
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="What scale and minimum are stored as, before codes are chosen."
    )

    @property
    def top(self) -> int:
        """Largest code, 2^bits - 1."""
        return 2**self.bits - 1

    def code_bits(self) -> float:
        return float(self.bits)

    def fit(self, w: Tensor, base: Params, importance: Tensor | None = None) -> Params:
        """w [..., g] -> scale and low [..., 1]."""
        low, high = w.float().amin(-1, keepdim=True), w.float().amax(-1, keepdim=True)
        scale = torch.where(low == high, 1.0, (high - low) / self.top)
        return {
            "scale": self.stored(scale.clamp_min(SMALLEST[self.scale_dtype])),
            "low": self.stored(low),
        }

    def encode(self, w: Tensor, p: Params, at: int = 0) -> Tensor:
        codes = (w.float() - p["low"].float()) / p["scale"].float()
        return codes.clamp_(0, self.top).round_().to(torch.uint8)

    def decode(self, codes: Tensor, p: Params, at: int = 0) -> Tensor:
        return codes.float() * p["scale"].float() + p["low"].float()

    def fake(self, x: Tensor) -> Tensor:
        """Round x [..., tokens, channels] along its axis and back, same shape and dtype."""
        if self.axis == "token":
            return super().fake(x)
        return super().fake(x.transpose(-1, -2).contiguous()).transpose(-1, -2).contiguous()

    def stored(self, x: Tensor) -> Tensor:
        """fp32 -> storage dtype, never infinite."""
        dtype = DTYPES[self.scale_dtype]
        return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
