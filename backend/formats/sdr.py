"""SDR: the leading bits of integers, one shift for each group of neighbours (QRazor)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from backend.formats import FORMATS
from backend.formats.base import Format, Granularity, GroupField, Params, QTensor, stack_groups
from backend.formats.int_group import DTYPES, SMALLEST
from backend.model.stats import AbsMax

if TYPE_CHECKING:
    from backend.model.stats import LayerStats


@FORMATS.register
class SDR(Format):
    """Integers of 8 or 16 bits cut to their sign and leading bits, a shift per small group.

    Lee et al. 2025, "QRazor: Reliable and Effortless 4-bit LLM Quantization by Significant Data
    Razoring", sections 3 and 4. First q = round(x / scale), |q| < 2^(base_bits-1), one scale per
    row (output channel or token) or tensor. Then, in every group, the bits above the highest set
    one are left out and so many low bits, `shift` of them, that sign and bits - 1 remain:
    value = scale * code * 2^shift, halves to even. Stored are the codes, the shifts and the scales.
    """

    kind: ClassVar[str] = "sdr"
    base_bits: int = Field(
        8, ge=4, le=16, description="Bits of the integers to cut: 8 for weights, 16 for inputs."
    )
    bits: int = Field(4, ge=2, le=8, description="Bits kept of each, the sign included.")
    group: GroupField = Field(16, description="Neighbours that share a shift; 0 is a whole row.")
    saturation: Literal["released", "symmetric"] = Field(
        "released",
        description="Values that round up past the top code. released: only positive ones are "
        "cut, negative ones take the code below, as in the authors' code; symmetric: both are cut.",
    )
    per_tensor: bool = Field(False, description="One scale for the whole matrix, not per row.")
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="What a scale is stored as; it is rounded before codes are chosen."
    )

    @model_validator(mode="after")
    def _keeps_no_more_than_there_is(self) -> Self:
        if self.bits > self.base_bits:
            raise ValueError(
                f"sdr: cannot keep {self.bits} bits of {self.base_bits}; bits must not exceed "
                "base_bits"
            )
        return self

    @property
    def granularity(self) -> Granularity:
        """What one scale covers; a shift covers a group of a row in any case."""
        return "tensor" if self.per_tensor else "row"

    @property
    def top(self) -> int:
        """Largest code, 2^(bits-1) - 1."""
        return 2 ** (self.bits - 1) - 1

    @property
    def middle(self) -> int:
        """How the signed code 0 is stored: codes are shifted to start at 0."""
        return 2 ** (self.bits - 1)

    @property
    def peak(self) -> int:
        """Largest integer before cutting, 2^(base_bits-1) - 1."""
        return 2 ** (self.base_bits - 1) - 1

    @property
    def shift_bits(self) -> int:
        """Bits of a shift, which is 0 to base_bits - bits: 3 for 8 to 4, 4 for 16 to 4."""
        return (self.base_bits - self.bits).bit_length()

    def code_bits(self) -> float:
        return float(self.bits)

    def prepare(self, w: Tensor) -> Params:
        """w [N, K] -> scale [N, 1], or [1, 1] per tensor."""
        w = w.float()
        peak = w.abs().amax().view(1, 1) if self.per_tensor else w.abs().amax(1, keepdim=True)
        return self._scale(peak)

    def fit(self, w: Tensor, base: Params, importance: Tensor | None = None) -> Params:
        """w [N, g] -> the scale of `prepare` and shift [N, 1] uint8; none where nothing is cut."""
        base = base or self.prepare(w)
        if not self.shift_bits:
            return dict(base)
        shift = self.shifts(self._integers(w.float(), base["scale"]))
        return {**base, "shift": shift.to(torch.uint8)}

    def encode(self, w: Tensor, p: Params, at: int = 0) -> Tensor:
        q = self._integers(w.float(), p["scale"])
        return (self.cut(q, p.get("shift", 0)) + self.middle).to(torch.uint8)

    def decode(self, codes: Tensor, p: Params, at: int = 0) -> Tensor:
        return self._values(codes.float() - self.middle, p)

    def calibrate(self, stats: LayerStats) -> Params:
        """Extremes of the calibration inputs -> one static scale [1, 1]; shifts stay dynamic."""
        low, high = stats[AbsMax].low.min(), stats[AbsMax].high.max()
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(
                f"sdr: calibration inputs range from {low.item():g} to {high.item():g}; "
                "a static scale needs finite inputs"
            )
        return self._scale(torch.maximum(low.abs(), high.abs()).float().view(1, 1))

    def why_not_static(self) -> str:
        """Always possible: the scale is fixed, each group finds its own shift."""
        return ""

    def param_bits(self, params: Params) -> dict[str, float]:
        scales = torch.finfo(DTYPES[self.scale_dtype]).bits * params["scale"].numel()
        shifts = self.shift_bits * params["shift"].numel() if "shift" in params else 0
        return {"scales": float(scales + shifts), "zeros": 0.0}

    def stack(self, fitted: list[Params]) -> Params:
        """The scale that all groups have, and the shift of each [N, G]."""
        return {**stack_groups(fitted), "scale": fitted[0]["scale"]}

    def quantize(self, w: Tensor, importance: Tensor | None = None) -> QTensor:
        """All whole groups at once; the same numbers as group by group."""
        w = w.float()
        base = self.prepare(w)
        parts = [(part, self._fit_units(part, base)) for part in self._units(w)]
        codes = [self.encode(part, p).flatten(1) for part, p in parts]
        fitted = [base | {k: v.squeeze(-1) for k, v in p.items() if k != "scale"} for _, p in parts]
        return QTensor(torch.cat(codes, 1), self.stack(fitted), self)

    def fake(self, x: Tensor) -> Tensor:
        """Without a detour over codes; the same numbers."""
        return self.fake_static(x, self.prepare(x.reshape(-1, x.shape[-1])))

    def fake_static(self, x: Tensor, params: Params) -> Tensor:
        """x [..., K] on scales [N, 1] or [1, 1] that are given, shifts from x itself."""
        rows = x.reshape(-1, x.shape[-1]).float()
        done = []
        for part in self._units(rows):
            p = self._fit_units(part, params)
            q = self.cut(self._integers(part, p["scale"]), p.get("shift", 0))
            done.append(self._values(q, p).flatten(1))
        return torch.cat(done, 1).view(x.shape).to(x.dtype)

    def razor(self, ints: Tensor) -> Tensor:
        """Integers [..., K] of any size, cut along the last axis -> int32 on the same grid."""
        q = ints.reshape(-1, ints.shape[-1]).double()
        done = []
        for part in self._units(q):
            shift = self.shifts(part)
            done.append((self.cut(part, shift) * 2.0**shift).flatten(1))
        return torch.cat(done, 1).view(ints.shape).to(torch.int32)

    def shifts(self, q: Tensor) -> Tensor:
        """Whole numbers [..., g] -> low bits to leave out [..., 1] int32, 0 where all fit."""
        width = torch.frexp(q.abs().amax(-1, keepdim=True)).exponent  # bit length, 0 for 0
        return (width + 1 - self.bits).clamp_min(0)

    def cut(self, q: Tensor, shift: Tensor | int) -> Tensor:
        """Whole numbers [..., g], shift [..., 1] -> signed codes, still floating point."""
        low = -self.middle if self.saturation == "released" else -self.top
        # Halves go to even on either side of 0, so rounding q is rounding |q| with the sign kept.
        return torch.ldexp(q, -torch.as_tensor(shift).int()).round_().clamp_(low, self.top)

    def _units(self, w: Tensor) -> list[Tensor]:
        """w [N, K] -> whole groups [N, G, g] and the shorter last one [N, 1, rest], if any."""
        n, k = w.shape
        step = self.group or max(k, 1)
        whole = k - k % step
        parts = [w[:, :whole].reshape(n, -1, step), w[:, whole:].reshape(n, 1, -1)]
        return [part for part in parts if part.numel()]

    def _fit_units(self, units: Tensor, base: Params) -> Params:
        """[N, G, g] and the scales of their rows [N, 1] -> scale [N, 1, 1], shift [N, G, 1]."""
        return self.fit(units, {"scale": base["scale"].unsqueeze(-1)})

    def _integers(self, w: Tensor, scale: Tensor) -> Tensor:
        """fp32 values -> whole numbers, never -2^(base_bits-1), which would need one more shift."""
        return (w / scale.float()).round_().clamp_(-self.peak, self.peak)

    def _values(self, q: Tensor, p: Params) -> Tensor:
        """Signed codes, fp32 -> values."""
        if "shift" in p:
            q = torch.ldexp(q, p["shift"].int())
        return q * p["scale"].float()

    def _scale(self, peak: Tensor) -> Params:
        """Largest magnitudes -> scale in storage dtype, never 0 and never infinite."""
        dtype = DTYPES[self.scale_dtype]
        scale = peak.masked_fill(peak == 0, 1) / self.peak
        return {"scale": scale.clamp(SMALLEST[self.scale_dtype], torch.finfo(dtype).max).to(dtype)}


GROUPS = (8, 16, 32, 64, 128)
ACTIVATIONS = "activations(format=sdr(base_bits=16,bits={bits},group={g},per_tensor=true){static})"


def weights(g: int, how: str = "") -> str:
    """Weights of the published recipes: 8 to 4 bits, a scale per output channel."""
    knobs = f"format=sdr(bits=4,group={g},scale_dtype=float16)"
    return f"gptq({knobs},{how})" if how else f"rtn({knobs})"


def activations(bits: int, g: int, static: bool = False) -> str:
    """Inputs of the published recipes: 16 to `bits` bits, a scale per tensor."""
    return ACTIVATIONS.format(bits=bits, g=g, static=",static=true" if static else "")


GPTQ_KNOBS = "act_order=true,static_groups=true,live_damping=true"

RECIPES = {
    **{f"QRazor W4A16 g{g}": weights(g) for g in GROUPS},
    **{f"GPTQ QRazor W4A16 g{g}": weights(g, GPTQ_KNOBS) for g in GROUPS},
    **{f"QRazor W4A8 g{g}": f"{weights(g)}+{activations(8, g)}" for g in GROUPS},
    **{f"QRazor W4A4 g{g}": f"{weights(g)}+{activations(4, g)}" for g in GROUPS[:3]},
    **{f"QRazor W4A4 g{g} static": f"{weights(g)}+{activations(4, g, True)}" for g in (8, 16)},
    **{
        f"SmoothQuant QRazor W4A{bits} g16": f"smoothquant+{weights(16)}+{activations(bits, 16)}"
        for bits in (8, 4)
    },
    "SmoothQuant GPTQ QRazor W4A4 g16": f"smoothquant+{weights(16, GPTQ_KNOBS)}"
    f"+{activations(4, 16)}",
}
