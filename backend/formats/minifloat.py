"""Small floating point: 8-bit E4M3 and E5M2, 4-bit E2M1, scaled to the range of the data."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from backend.formats import FORMATS
from backend.formats.base import Format, Granularity, GroupField, Params
from backend.formats.int_group import DTYPES, SMALLEST
from backend.model.stats import AbsMax

if TYPE_CHECKING:
    from backend.model.stats import LayerStats


class Layout(NamedTuple):
    """A sign, then exponent and mantissa; the largest code is finite and all below it are used."""

    bits: int
    mantissa: int  # bits
    lowest: int  # exponent of the smallest normal number, 1 - bias
    top: int  # code of the largest finite magnitude

    @property
    def sign(self) -> int:
        """The code's sign bit."""
        return 2 ** (self.bits - 1)


# Micikevicius et al. 2022, "FP8 Formats for Deep Learning", table 1: E4M3 has no infinities and
# one NaN (0x7F), E5M2 keeps IEEE's. E2M1 (Open Compute Project, MX formats 1.0) has neither.
LAYOUTS = {
    "fp8_e4m3": Layout(bits=8, mantissa=3, lowest=-6, top=0x7E),
    "fp8_e5m2": Layout(bits=8, mantissa=2, lowest=-14, top=0x7B),
    "fp4_e2m1": Layout(bits=4, mantissa=1, lowest=0, top=0x7),
}


@cache
def values_of(layout: Layout) -> Tensor:
    """[2^bits] fp32: the number of every code; codes past `top` count as the largest."""
    magnitude = torch.arange(layout.sign).clamp_max(layout.top)  # [2^(bits-1)]
    one = 2**layout.mantissa
    binade, fraction = magnitude // one, magnitude % one
    whole = torch.where(binade > 0, one + fraction, fraction).float()
    exponent = (binade - 1).clamp_min(0) + layout.lowest - layout.mantissa
    positive = torch.ldexp(whole, exponent)
    return torch.cat([positive, -positive])


@FORMATS.register
class Minifloat(Format):
    """Floating point of 8 or 4 bits with one scale per group, row or tensor.

    scale = peak / largest, value = scale * cast(x / scale), to nearest with halves to even; what
    lies past the largest finite number takes that number, as static scales need. E4M3 reaches 448
    with 3 bits of mantissa, E5M2 57344 with 2 (Micikevicius et al. 2022, "FP8 Formats for Deep
    Learning"), E2M1 6 with 1 (Open Compute Project, "Microscaling Formats" 1.0, section 5.3.3).
    """

    kind: ClassVar[str] = "minifloat"
    type: Literal["fp8_e4m3", "fp8_e5m2", "fp4_e2m1"] = Field(
        "fp8_e4m3", description="Bits of exponent and mantissa: precision against range."
    )
    group: GroupField = 0
    per_tensor: bool = Field(False, description="One scale for the whole matrix; group must be 0.")
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="What a scale is stored as; it is rounded before codes are chosen."
    )

    @model_validator(mode="after")
    def _one_granularity(self) -> Self:
        if self.per_tensor and self.group:
            raise ValueError(
                f"minifloat: per_tensor is one scale for the whole matrix, group {self.group} one "
                f"per {self.group} channels; set group=0 or per_tensor=false"
            )
        return self

    @property
    def granularity(self) -> Granularity:
        """What one scale covers."""
        return "tensor" if self.per_tensor else super().granularity

    @property
    def layout(self) -> Layout:
        """Where the bits go."""
        return LAYOUTS[self.type]

    @property
    def largest(self) -> float:
        """Largest finite number: 448, 57344 or 6."""
        return float(values_of(self.layout)[self.layout.top])

    def code_bits(self) -> float:
        return float(self.layout.bits)

    def prepare(self, w: Tensor) -> Params:
        """w [N, K] -> the tensor's own scale [1, 1] per tensor, else {}."""
        return self._scale(w.float().abs().amax().view(1, 1)) if self.per_tensor else {}

    def fit(self, w: Tensor, base: Params, importance: Tensor | None = None) -> Params:
        """w [N, g] -> scale [N, 1]."""
        return dict(base) if base else self._scale(w.float().abs().amax(1, keepdim=True))

    def encode(self, w: Tensor, p: Params, at: int = 0) -> Tensor:
        return self.cast(w.float() / p["scale"].float())

    def decode(self, codes: Tensor, p: Params, at: int = 0) -> Tensor:
        return values_of(self.layout).to(codes.device)[codes.long()] * p["scale"].float()

    def cast(self, x: Tensor) -> Tensor:
        """fp32 numbers [...] -> codes of the nearest ones of this type [...] uint8.

        Within a binade codes are equally spaced and the next binade follows on, so that the code of
        k steps of 2^(e - mantissa) is k + (e - lowest) 2^mantissa, for subnormals (e = lowest) too.
        """
        layout = self.layout
        magnitude = x.abs().clamp_max(self.largest)
        exponent = torch.frexp(magnitude.clamp_min(2.0**layout.lowest)).exponent - 1
        steps = torch.ldexp(magnitude, layout.mantissa - exponent).round_()
        codes = steps.int() + (exponent - layout.lowest) * 2**layout.mantissa
        return torch.where(x < 0, codes + layout.sign, codes).to(torch.uint8)

    def calibrate(self, stats: LayerStats) -> Params:
        """Extremes of the calibration inputs -> one static scale [1, 1]."""
        if reason := self.why_not_static():
            raise ValueError(f"minifloat: {reason}")
        peak = torch.maximum(stats[AbsMax].low.min().abs(), stats[AbsMax].high.max().abs())
        if not peak.isfinite():
            raise ValueError(
                f"minifloat: the largest calibration input is {peak.item():g}; a static scale "
                "needs finite inputs"
            )
        return self._scale(peak.float().view(1, 1))

    def _scale(self, peak: Tensor) -> Params:
        """Largest magnitudes -> scale in storage dtype, never 0 and never infinite."""
        dtype = DTYPES[self.scale_dtype]
        scale = peak.masked_fill(peak == 0, 1) / self.largest
        return {"scale": scale.clamp(SMALLEST[self.scale_dtype], torch.finfo(dtype).max).to(dtype)}


PER_TENSOR = "minifloat(type=fp8_e4m3,per_tensor=true)"

RECIPES = {
    "FP8 weights": "rtn(format=minifloat(type=fp8_e4m3))",
    "FP8 dynamic": "rtn(format=minifloat(type=fp8_e4m3))"
    "+activations(format=minifloat(type=fp8_e4m3))",
    "FP8 dynamic per tensor": f"rtn(format={PER_TENSOR})+activations(format={PER_TENSOR})",
    "FP8 static": f"rtn(format={PER_TENSOR})+activations(format={PER_TENSOR},static=true)",
    "FP8 E5M2 dynamic": "rtn(format=minifloat(type=fp8_e5m2))"
    "+activations(format=minifloat(type=fp8_e5m2))",
    "FP4 E2M1 g32": "rtn(format=minifloat(type=fp4_e2m1,group=32,scale_dtype=float16))",
    "GPTQ FP4 E2M1 g32": "gptq(format=minifloat(type=fp4_e2m1,group=32,scale_dtype=float16),"
    "act_order=true,static_groups=true,live_damping=true)",
}
