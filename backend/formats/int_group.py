"""Uniform integers: equally spaced levels, one scale per tensor, row or group of input channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from backend.formats import FORMATS
from backend.formats.base import Format, Granularity, GroupField, Params, QTensor
from backend.model.stats import AbsMax

if TYPE_CHECKING:
    from backend.model.stats import LayerStats

NORM, GRID, SHRINK = 2.4, 100, 0.8  # clip search of GPTQ's Quantizer.find_params(mse=True)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Below these a stored scale would be 0 and every quotient infinite. fp16 counts on its subnormals:
# 8-bit scales of ordinary weights lie under its smallest normal number, 6e-5.
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}


@FORMATS.register
class IntGroup(Format):
    """Equally spaced integer levels with one scale per group, row or tensor.

    code = clamp(round(x / scale) + zero, 0, 2^bits - 1), value = scale * (code - zero), halves to
    even, fp32. The range always holds 0, so 0 stays exactly 0; a group of zeros uses [-1, 1].
    Symmetric grids have the constant zero 2^(bits-1), which is not stored. Conventions:
    restricted (SmoothQuant, bitsandbytes): scale = peak / (2^(bits-1) - 1); offset (GPTQ,
    Frantar et al. 2023): 2 peak / (2^bits - 1); full (DeepSpeed): peak / 2^(bits-1), the positive
    peak is clipped by one step. GPTQ's released code halves the offset scale for rows without
    negative values and then clips their upper half; ours does not.
    """

    kind: ClassVar[str] = "int"
    bits: int = Field(4, ge=2, le=8, description="Bits of one code.")
    group: GroupField = 0
    symmetric: bool = Field(
        False, description="Levels symmetric around 0, no zero point; else the range's own ends."
    )
    convention: Literal["restricted", "offset", "full"] = Field(
        "restricted",
        description="Symmetric scale. restricted: the peak is the top level, the lowest code idle; "
        "offset: all codes, the peak half a step past the top; full: all codes, a positive peak is "
        "clipped by a step.",
    )
    per_tensor: bool = Field(False, description="One scale for the whole matrix; group must be 0.")
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="What a scale is stored as; it is rounded before codes are chosen."
    )
    mse: bool = Field(
        False,
        description="Search 80 clipped ranges, down to 21 %, for the least error (exponent 2.4).",
    )

    @model_validator(mode="after")
    def _one_granularity(self) -> Self:
        if self.per_tensor and self.group:
            raise ValueError(
                f"int: per_tensor is one scale for the whole matrix, group {self.group} one per "
                f"{self.group} channels; set group=0 or per_tensor=false"
            )
        return self

    @property
    def granularity(self) -> Granularity:
        """What one scale covers."""
        return "tensor" if self.per_tensor else super().granularity

    @property
    def top(self) -> int:
        """Largest code, 2^bits - 1."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code of 0 on symmetric grids, 2^(bits-1)."""
        return 2 ** (self.bits - 1)

    def code_bits(self) -> float:
        return float(self.bits)

    def prepare(self, w: Tensor) -> Params:
        """w [N, K] -> the tensor's own parameters [1, 1] per tensor, else {}."""
        return self._fit(w.float().reshape(1, -1)) if self.per_tensor else {}

    def fit(self, w: Tensor, base: Params, importance: Tensor | None = None) -> Params:
        """w [N, g] -> scale [N, 1] (and zero [N, 1] uint8); importance weighs the clip search."""
        return dict(base) if self.per_tensor and base else self._fit(w.float(), importance)

    def encode(self, w: Tensor, p: Params, at: int = 0) -> Tensor:
        return self._codes(w.float(), p).to(torch.uint8)

    def decode(self, codes: Tensor, p: Params, at: int = 0) -> Tensor:
        return self._values(codes.float(), p)

    def calibrate(self, stats: LayerStats) -> Params:
        """Extremes of the calibration inputs -> one static scale [1, 1] (and zero)."""
        if self.group:
            raise ValueError(
                f"int: static activations have one scale per tensor, not per {self.group} "
                "channels; set group=0 or static=false"
            )
        low, high = stats[AbsMax].low.min(), stats[AbsMax].high.max()
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(
                f"int: calibration inputs range from {low.item():g} to {high.item():g}; "
                "a static scale needs finite inputs"
            )
        return self._fit(torch.stack([low, high]).view(1, 2).float(), search=False)

    def param_bits(self, params: Params) -> dict[str, float]:
        width = torch.finfo(DTYPES[self.scale_dtype]).bits
        zeros = self.bits * params["zero"].numel() if "zero" in params else 0
        return {"scales": float(width * params["scale"].numel()), "zeros": float(zeros)}

    def quantize(self, w: Tensor, importance: Tensor | None = None) -> QTensor:
        """All whole groups at once; the same numbers as group by group."""
        w = w.float()
        if self.granularity != "group" or importance is not None:
            return super().quantize(w, importance)
        parts = [self._quantize_groups(part) for part in self._whole_and_rest(w)]
        names = parts[0][1]
        params = {name: torch.cat([p[name] for _, p in parts], 1) for name in names}
        return QTensor(torch.cat([codes for codes, _ in parts], 1), params, self)

    def fake(self, x: Tensor) -> Tensor:
        """Without a detour over codes; the same numbers."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if self.granularity == "group":
            done = [self._fake_units(part).flatten(1) for part in self._whole_and_rest(rows)]
            return torch.cat(done, 1).view(x.shape).to(x.dtype)
        units = rows.reshape(1, -1) if self.per_tensor else rows
        return self._fake_units(units).view(x.shape).to(x.dtype)

    def _whole_and_rest(self, w: Tensor) -> list[Tensor]:
        """w [N, K] -> whole groups [N, G, group] and the shorter last one [N, 1, rest], if any."""
        n, k = w.shape
        whole = k - k % self.group
        parts = [w[:, :whole].reshape(n, -1, self.group), w[:, whole:].reshape(n, 1, -1)]
        return [part for part in parts if part.numel()]

    def _quantize_groups(self, units: Tensor) -> tuple[Tensor, Params]:
        """[N, G, g] -> codes [N, G g] uint8 and parameters [N, G]."""
        p = self._fit(units)
        codes = self._codes(units, p).to(torch.uint8).flatten(1)
        return codes, {name: value.squeeze(-1) for name, value in p.items()}

    def _fake_units(self, units: Tensor) -> Tensor:
        """[..., g] -> rounded, one scale per last axis."""
        p = self._fit(units)
        return self._values(self._codes(units, p), p)

    def _codes(self, w: Tensor, p: Params) -> Tensor:
        """fp32 values -> whole numbers 0..top, still fp32."""
        codes = (w / p["scale"].float()).round_().add_(p.get("zero", self.middle))
        return codes.clamp_(0, self.top)

    def _values(self, codes: Tensor, p: Params) -> Tensor:
        """fp32 codes, overwritten -> values."""
        return codes.sub_(p.get("zero", self.middle)).mul_(p["scale"].float())

    def _fit(self, x: Tensor, importance: Tensor | None = None, search: bool = True) -> Params:
        """[..., g] fp32 -> parameters [..., 1], each of one last axis."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # aminmax: 7-19 x slower
        low, high = low.clamp_max(0), high.clamp_min(0)
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
        if self.mse and search:
            return self._search(x, low, high, importance)
        return self._grid(low, high)

    def _grid(self, low: Tensor, high: Tensor) -> Params:
        """Ends of the range [..., 1], low <= 0 <= high -> parameters in storage dtype."""
        if not self.symmetric:
            scale = self._stored((high - low) / self.top)
            zero = (-low / scale.float()).round().clamp(0, self.top)
            return {"scale": scale, "zero": zero.to(torch.uint8)}
        peak = torch.maximum(-low, high)
        steps = {"restricted": self.middle - 1, "offset": self.top / 2, "full": self.middle}
        return {"scale": self._stored(peak / steps[self.convention])}

    def _stored(self, scale: Tensor) -> Tensor:
        """fp32 -> storage dtype, never 0 and never infinite."""
        dtype = DTYPES[self.scale_dtype]
        return scale.clamp(SMALLEST[self.scale_dtype], torch.finfo(dtype).max).to(dtype)

    def _search(self, x: Tensor, low: Tensor, high: Tensor, importance: Tensor | None) -> Params:
        """The range, both ends shrunk alike, of least sum |error|^2.4; the widest of equals."""
        best = self._grid(low, high)
        least = torch.full_like(low, torch.inf)
        for i in range(int(SHRINK * GRID)):
            p = self._grid(low * (1 - i / GRID), high * (1 - i / GRID))
            error = self._values(self._codes(x, p), p).sub_(x).abs_().pow_(NORM)
            if importance is not None:
                error = error * importance.float()
            error = error.sum(-1, keepdim=True)
            better = error < least
            best = {name: torch.where(better, p[name], best[name]) for name in best}
            least = torch.minimum(error, least)
        return best
