"""Bilevel integers: small groups whose scales and zero points are themselves a few bits (SpQR)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from backend.formats import FORMATS
from backend.formats.base import Format, GroupField, Params
from backend.formats.int_group import DTYPES

FLAT = 256  # a group whose range is under 1/256 of its peak counts as constant


@FORMATS.register
class Bilevel(Format):
    """Small groups between their own ends; their scales and zero points are a few bits themselves.

    Dettmers et al. 2023, "SpQR", sections 4.2 and 4.3. First level, per group of one row:
    scale = (max - min) / (2^bits - 1), origin = -min / scale, a real number, and
    value = scale (code - origin); the range need not hold 0. Second level: the scales of one group
    of input channels in `stat_group` consecutive rows, low + step * code, and their origins
    likewise. A constant group is an end of [-w, w], where the released code takes [-1, 1]: its
    scale would swamp those of its neighbours. A group of zeros has scale 0, so that it stays exact.
    """

    kind: ClassVar[str] = "spqr"
    row_local: ClassVar[bool] = False
    bits: int = Field(3, ge=1, le=8, description="Bits of one code.")
    group: GroupField = Field(16, description="Input channels per group; 0 is one per row.")
    scale_bits: int | None = Field(
        3, ge=1, le=8, description="Bits of a group's scale; null stores it as scale_dtype."
    )
    zero_bits: int | None = Field(
        3, ge=1, le=8, description="Bits of a group's zero point; null stores it as scale_dtype."
    )
    stat_group: int = Field(
        16, ge=2, le=65536, description="Rows whose scales, and whose zero points, share a range."
    )
    round_zero: bool = Field(
        False,
        description="Zero points are codes: 0 stays 0, each takes `bits`, and zero_bits is idle.",
    )
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", description="What the ends of the second level are stored as."
    )

    @property
    def top(self) -> int:
        """Largest code, 2^bits - 1."""
        return 2**self.bits - 1

    @property
    def origin_bits(self) -> int | None:
        """Bits of a group's origin; None where it is in storage dtype."""
        return self.bits if self.round_zero else self.zero_bits

    def code_bits(self) -> float:
        return float(self.bits)

    def dense_bits(self) -> float:
        """Bits per weight without outliers where all groups are whole."""
        width = torch.finfo(DTYPES[self.scale_dtype]).bits
        shared = 2 * width / self.stat_group  # low and step, once for the rows of a set
        per_group = float((self.scale_bits or width) + (self.origin_bits or width))
        per_group += shared * (self.scale_bits is not None)
        per_group += shared * (self.zero_bits is not None and not self.round_zero)
        return self.bits + (per_group / self.group if self.group else 0)

    def first_level(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of groups [N, 1] fp32 -> their scale and origin [N, 1], not yet stored."""
        peak = torch.maximum(low.abs(), high.abs())
        if self.round_zero:
            low, high = low.clamp_max(0), high.clamp_min(0)
        else:
            flat = high - low <= peak / FLAT
            low, high = torch.where(flat, -peak, low), torch.where(flat, peak, high)
        scale = (high - low) / self.top
        origin = torch.where(scale > 0, -low / scale, 0 if self.round_zero else self.top / 2)
        return scale, origin.round().clamp(0, self.top) if self.round_zero else origin

    def prepare(self, w: Tensor) -> Params:
        """w [N, K] -> unit [1, 1], a power of two that keeps stored scales clear of underflow.

        Columns that meet large activations may be 1000 times smaller than the rest, and their
        scales below the smallest normal fp16 number. From the unit, 1/512 to 1/256 of the peak,
        scales reach from 2^-23 to 128 times the peak; within a factor of two all bits are kept.
        """
        peak = w.float().abs().max() if w.numel() else torch.zeros((), device=w.device)
        exponent = torch.where(peak > 0, peak, 1).log2().floor().clamp(-100, 100) - 8
        return {"unit": torch.exp2(exponent).view(1, 1)}

    def fit(self, w: Tensor, base: Params, importance: Tensor | None = None) -> Params:
        """w [N, g] -> scale and origin [N, 1], low and step of each set of rows [S, 1]."""
        w = w.float() / base["unit"]
        scale, origin = self.first_level(w.amin(1, keepdim=True), w.amax(1, keepdim=True))
        whole = {"origin": origin.to(torch.uint8)} if self.round_zero else {}
        shared = whole or self.share("origin", origin, self.zero_bits)
        return dict(base) | self.share("scale", scale, self.scale_bits) | shared

    def stack(self, fitted: list[Params]) -> Params:
        """The unit once, everything else group by group."""
        own = [{name: p[name] for name in p if name != "unit"} for p in fitted]
        return super().stack(own) | ({"unit": fitted[0]["unit"]} if fitted else {})

    def share(self, name: str, x: Tensor, bits: int | None) -> Params:
        """One statistic of each row x [N, 1] -> {name: codes [N, 1], name_low, name_step [S, 1]}.

        Without `bits`, itself in storage dtype.
        """
        if bits is None:
            return {name: self.stored(x)}
        n, size = len(x), min(self.stat_group, len(x))
        sets = torch.cat([x, x[-1:].expand(-n % size, 1)]).view(-1, size)  # [S, size]
        low, high = sets.amin(1, keepdim=True), sets.amax(1, keepdim=True)
        step = self.stored((high - low) / (2**bits - 1))
        low = self.stored(low)
        quotient = (sets - low.float()) / torch.where(step > 0, step.float(), 1)
        codes = quotient.round_().clamp_(0, 2**bits - 1).to(torch.uint8).view(-1, 1)[:n]
        return {name: codes, f"{name}_low": low, f"{name}_step": step}

    def cut(self, params: Params) -> Params:
        """Parameters fitted under another scale_dtype -> the same in this one's."""
        kept = {name: v for name, v in params.items() if name == "unit" or v.dtype == torch.uint8}
        return {name: self.stored(v.float()) for name, v in params.items()} | kept

    def levels(self, p: Params) -> tuple[Tensor, Tensor]:
        """Parameters of a group -> scale and origin of its rows, [N, 1] fp32."""
        return self.value_of("scale", p) * p["unit"], self.value_of("origin", p)

    def value_of(self, name: str, p: Params) -> Tensor:
        """A statistic as stored -> [N, 1] fp32."""
        codes = p[name].float()
        if f"{name}_low" not in p:
            return codes
        row = torch.arange(len(codes), device=codes.device) // self.stat_group  # [N]
        return torch.addcmul(p[f"{name}_low"].float()[row], codes, p[f"{name}_step"].float()[row])

    def encode(self, w: Tensor, p: Params, at: int = 0) -> Tensor:
        return self.codes_on(w.float(), *self.levels(p)).to(torch.uint8)

    def decode(self, codes: Tensor, p: Params, at: int = 0) -> Tensor:
        scale, origin = self.levels(p)
        return (codes.float() - origin) * scale

    def codes_on(self, w: Tensor, scale: Tensor, origin: Tensor) -> Tensor:
        """w [N, c], scale and origin [N, 1] -> whole numbers 0..top [N, c] fp32."""
        quotient = w / torch.where(scale > 0, scale, 1)
        return quotient.add_(origin).round_().clamp_(0, self.top)

    def param_bits(self, params: Params) -> dict[str, float]:
        """Codes at their own width, the ends of the second level at that of their dtype."""
        bits = {"scales": 0.0, "zeros": 0.0}
        widths = {"scale": self.scale_bits, "origin": self.origin_bits}
        for name, value in params.items():
            width = value.element_size() * 8
            if value.dtype == torch.uint8:
                width = widths[name] or width
            bits["zeros" if name.startswith("origin") else "scales"] += value.numel() * width
        return bits

    def stored(self, x: Tensor) -> Tensor:
        """fp32 -> storage dtype, never infinite."""
        dtype = DTYPES[self.scale_dtype]
        return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
