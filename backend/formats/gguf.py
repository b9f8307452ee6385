"""GGUF: the block types of llama.cpp's files, from Q8_0 to Q2_K, encoded by our own searches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from backend.formats import FORMATS
from backend.formats.base import Format, Params, QTensor, stack_groups
from backend.formats.gguf_fit import (
    RangeSearch,
    in_range,
    offset_scale,
    positive_scale,
    quotient,
    signed_peak,
    swept_scale,
    symmetric_scale,
    table_scale,
)

CHUNK = 2**17  # numbers searched at once: stays in cache, changes nothing
HALF_MAX = torch.finfo(torch.float16).max
FLOOR = 1e-6  # least importance, of a block's mean: a weight without any would be free to be lost
# Levels of IQ4, denser around 0; `kvalues_iq4nl` of ggml-common.h.
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
WITH_IMPORTANCE = RangeSearch(-0.9, 0.05, 36)

Type = Literal[
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
]


@dataclass(frozen=True)
class BlockType:
    """Layout and searches of one type. A block is cut into sub-blocks with a scale each.

    Without second level (`scale_bits` 0) a block is one sub-block and its scale an fp16 number d;
    else sub-block j has the scale d * s_j, s_j a small integer.
    """

    bits: int  # of a code
    block: int  # weights that share d
    sub: int  # weights that share a scale
    zero: int = 0  # code of the value 0, where there is neither offset nor table
    offset: bool = False  # values are scale * code + offset, the offset never above 0
    table: bool = False  # codes look up TABLE
    scale_bits: int = 0  # of s_j, and of the offset's factor
    scale_zero: int = 0  # signed s_j: s_j + scale_zero lies in 0 .. 2^scale_bits - 1
    search: RangeSearch | None = None  # without importance; None: the plain peak or range
    spread: float | None = None  # importance * sqrt(spread * mean(x^2) + x^2); None: alone
    fallback: str = ""  # the type of rows that whole blocks do not fill


def four_or_five(bits: int, search: RangeSearch, fallback: str) -> BlockType:
    """Q4_K and Q5_K."""
    return BlockType(
        bits, 256, 32, offset=True, scale_bits=6, search=search, spread=2, fallback=fallback
    )


# ggml-common.h and ggml-quants.c; fallbacks of tensor_type_fallback in llama-quant.cpp.
TYPES: dict[str, BlockType] = {
    "Q8_0": BlockType(8, 32, 32, zero=128),
    "Q4_0": BlockType(4, 32, 32, zero=8, spread=1),
    "Q4_1": BlockType(4, 32, 32, offset=True, spread=1),
    "Q5_0": BlockType(5, 32, 32, zero=16, spread=1),
    "Q5_1": BlockType(5, 32, 32, offset=True, spread=1),
    "Q2_K": BlockType(
        2,
        256,
        16,
        offset=True,
        scale_bits=4,
        search=RangeSearch(-0.5, 0.1, 15, power=1),
        spread=1,
        fallback="Q4_0",
    ),
    "Q3_K": BlockType(3, 256, 16, zero=4, scale_bits=6, scale_zero=32, spread=2, fallback="Q4_0"),
    "Q4_K": four_or_five(4, RangeSearch(-1, 0.1, 20), "Q5_0"),
    "Q5_K": four_or_five(5, RangeSearch(-0.5, 0.1, 15), "Q5_1"),
    "Q6_K": BlockType(6, 256, 16, zero=32, scale_bits=8, scale_zero=128, fallback="Q8_0"),
    "IQ4_NL": BlockType(4, 32, 32, table=True, spread=2),
    "IQ4_XS": BlockType(
        4, 256, 32, table=True, scale_bits=6, scale_zero=32, spread=2, fallback="IQ4_NL"
    ),
}


@FORMATS.register
class GGUF(Format):
    """The block types of llama.cpp: blocks of 32 or 256 weights that carry their own scales.

    Gerganov and Kawrakow, llama.cpp (ggml-common.h for the layouts, ggml-quants.c for the searches,
    defined anew here). Types ending in _0 or _1 have an fp16 scale per 32 weights, and _1 an
    offset; _K and IQ4_XS have 256 weights, whose 8 or 16 sub-blocks have small integer scales under
    one fp16 scale; IQ4 has unequal levels. Importance, a number per input channel, weighs the
    errors in every search but that of Q8_0. Where blocks do not divide a row, llama.cpp takes
    another type (`suited`); by itself this format ends with a short block that has a whole header.
    """

    kind: ClassVar[str] = "gguf"
    type: Type = Field("Q4_K", description="Block type, as llama.cpp names it.")

    @property
    def layout(self) -> BlockType:
        """Sizes and searches of the type."""
        return TYPES[self.type]

    if TYPE_CHECKING:  # the base class declares a field; here it follows from `type`
        group: int = 0
    else:

        @property
        def group(self) -> int:
            """Weights of a block."""
            return self.layout.block

    def code_bits(self) -> float:
        return float(self.layout.bits)

    def suited(self, k: int) -> Format | None:
        """This type, or the one that llama.cpp takes for rows of k weights; None: 16 bits."""
        if k % self.group == 0:
            return self
        other = self.layout.fallback
        return GGUF(type=other).suited(k) if other else None  # type: ignore[arg-type]

    def prepare(self, w: Tensor) -> Params:
        """w [N, K] -> mean square of every row [N, 1], which importance is spread by."""
        return {"mean_square": w.float().square().mean(1, keepdim=True)}

    def fit(self, w: Tensor, base: Params, importance: Tensor | None = None) -> Params:
        """One block w [N, g] -> d [N, 1] fp16, scale [N, 1, sub-blocks], and both for the offset.

        Types of one level also return what they were before rounding, which chooses the codes.
        """
        w = w.float()
        rows = max(1, CHUNK // self.group)
        weight = None
        if importance is not None and self.type != "Q8_0":
            weight = importance.float().to(w.device).expand_as(w)
        mean = base.get("mean_square")
        mean = w.square().mean(1, keepdim=True) if mean is None else mean
        parts = [
            self._fit(
                w[i : i + rows].contiguous(),
                mean[i : i + rows],
                None if weight is None else weight[i : i + rows],
            )
            for i in range(0, len(w), rows)
        ]
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def encode(self, w: Tensor, p: Params, at: int = 0) -> Tensor:
        scale, offset = self._columns(p, w.shape[1], at, exact=True)
        lay = self.layout
        if lay.table:
            return nearest_codes().to(w.device)[place(quotient(w.float(), scale))]
        if lay.scale_bits or "exact_d" not in p:
            return self._nearest(quotient(w.float() - offset, scale))
        # One level: times the reciprocal, and halves up (Q8_0: away from 0), as llama.cpp does.
        steps = (w.float() - offset) * quotient(torch.ones(()), scale)
        if self.type == "Q8_0":
            whole = steps.abs().floor()
            steps = steps.sign() * (whole + (2 * (steps.abs() - whole)).floor()) + lay.zero
        else:
            steps = (steps + (lay.zero + 0.5)).floor()
        return steps.clamp(0, 2**lay.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, p: Params, at: int = 0) -> Tensor:
        scale, offset = self._columns(p, codes.shape[1], at)
        if self.layout.table:
            levels = torch.tensor(TABLE, dtype=torch.float32, device=codes.device)[codes.long()]
        else:
            levels = codes.float() - self.layout.zero
        return scale * levels + offset

    def stack(self, fitted: list[Params]) -> Params:
        """Without what was only there to choose codes."""
        kept = [n for n in fitted[0] if not n.startswith("exact_")] if fitted else []
        return stack_groups([{name: p[name] for name in kept} for p in fitted])

    def param_bits(self, params: Params) -> dict[str, float]:
        small = self.layout.scale_bits
        width = {"d": 16, "zero_d": 16, "scale": small, "zero_scale": small}
        bits = {"scales": 0.0, "zeros": 0.0}
        for name, value in params.items():
            bits["zeros" if name.startswith("zero") else "scales"] += width[name] * value.numel()
        return bits

    def quantize(self, w: Tensor, importance: Tensor | None = None) -> QTensor:
        """All whole blocks at once; the same numbers as block by block."""
        w = w.float()
        n, k = w.shape
        base, whole = self.prepare(w), k - k % self.group
        weight = None if importance is None else importance.to(w.device).expand_as(w)
        codes, fitted = [], []
        for start, stop in ((0, whole), (whole, k)):
            step = min(self.group, stop - start)
            if not step or not n:
                continue
            count = (stop - start) // step
            units = w[:, start:stop].reshape(-1, step)  # [N G, g]
            mass = None if weight is None else weight[:, start:stop].reshape(-1, step)
            mean = base["mean_square"].repeat_interleave(count, 0)
            p = self.fit(units, {"mean_square": mean}, mass)
            codes.append(self.encode(units, p).view(n, -1))
            kept = self.stack([p])
            fitted.append({a: v.reshape(n, count, *v.shape[2:]) for a, v in kept.items()})
        if not fitted:
            return super().quantize(w, importance)
        return QTensor(torch.cat(codes, 1), stack_groups(fitted), self)

    def _nearest(self, steps: Tensor) -> Tensor:
        """Values in steps of their scale -> codes, halves to even."""
        top = 2**self.layout.bits - 1
        return (steps.round() + self.layout.zero).clamp_(0, top).to(torch.uint8)

    def _columns(
        self, p: Params, width: int, at: int, exact: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Scale and offset [N, width] or [N, 1] of the columns from `at` on."""
        lay = self.layout
        d, zero = p["d"].float(), p.get("zero_d")
        if not lay.scale_bits:
            if exact and "exact_d" in p:
                d, zero = p["exact_d"], p.get("exact_zero_d")
            return d, torch.zeros_like(d) if zero is None else zero.float()
        column = torch.arange(at, at + width, device=d.device) // lay.sub
        scale = d * (p["scale"].squeeze(1).float() - self._stored_zero)  # [N, S]
        scale = scale[:, column]
        if zero is None:
            return scale, torch.zeros_like(scale[:, :1])
        offset = -(zero.float() * p["zero_scale"].squeeze(1).float())
        return scale, offset[:, column]

    @property
    def _stored_zero(self) -> int:
        """What is added to a signed s_j to store it; 8-bit ones are stored as int8."""
        return 0 if self.layout.scale_bits == 8 else self.layout.scale_zero

    # ---- searches --------------------------------------------------------------------------

    def _fit(self, w: Tensor, mean: Tensor, importance: Tensor | None) -> Params:
        """w [N, g], row means of squares [N, 1] -> parameters of one block."""
        lay = self.layout
        if not lay.scale_bits and not lay.table and importance is None:
            return self._plain(w)
        # Powers of two in and out again: exact, and squares of large or tiny weights stay finite.
        power = w.abs().amax(1, keepdim=True).frexp().exponent.clamp(-120, 120)
        unit = torch.ldexp(torch.ones_like(mean), -power)
        x = self._whole(w * unit)
        if importance is not None:
            importance = self._whole(importance)
        mass = self._mass(x, mean * unit * unit, importance)
        unit = unit[..., None]  # [N, 1, 1] against [N, sub-blocks, sub]
        if lay.offset:
            return self._with_offset(x, mass, unit, importance is not None)
        scale = self._symmetric(x, mass, importance is not None)[..., 0]  # [N, S]
        if not lay.scale_bits:
            return {"d": half(scale / unit[:, 0])}
        d, codes = self._second(scale, mass.sum(-1), importance is not None, unit[:, 0])
        stored = codes + self._stored_zero
        kind = torch.int8 if lay.scale_bits == 8 else torch.uint8
        return {"d": d, "scale": stored.to(kind)[:, None]}

    def _plain(self, w: Tensor) -> Params:
        """w [N, g] -> the scale at the peak or the range, and as it was before its rounding."""
        lay = self.layout
        top = 2**lay.bits - 1
        zero = torch.zeros_like(w[:, :1])
        if lay.offset:
            zero = w.amin(1, keepdim=True)
            d = (w.amax(1, keepdim=True) - zero) / top
        elif self.type == "Q8_0":
            d = w.abs().amax(1, keepdim=True) / 127
        else:
            d = signed_peak(w) / -lay.zero
        stored, stored_zero = half(d), half(zero)
        # Codes follow the unrounded numbers, as in llama.cpp, unless rounding moved a level by more
        # than a quarter of a step: tiny, huge or one-sided blocks.
        moved = (stored.float() - d).abs() * top + (stored_zero.float() - zero).abs()
        close = moved <= d.abs() / 4
        p = {"d": stored, "exact_d": torch.where(close, d, stored.float())}
        if lay.offset:
            exact = torch.where(close, zero, stored_zero.float())
            p |= {"zero_d": stored_zero, "exact_zero_d": exact}
        return p

    def _whole(self, x: Tensor) -> Tensor:
        """x [N, g] -> [N, sub-blocks, sub]; a short block repeats its last column."""
        missing = self.group - x.shape[1]
        if missing and self.layout.scale_bits:
            x = torch.cat([x, x[:, -1:].expand(-1, missing)], 1)
        return x.reshape(len(x), -1, min(self.layout.sub, x.shape[1]))

    def _mass(self, x: Tensor, mean: Tensor, importance: Tensor | None) -> Tensor:
        """x [N, S, sub] -> weights of the squared errors, the same shape."""
        lay = self.layout
        if importance is not None:
            average = importance.mean((1, 2), keepdim=True)
            mass = torch.where(average > 0, importance / average, 1).clamp_min(FLOOR)
            if lay.spread is None:
                return mass
            own = x.square().mean((1, 2), keepdim=True)
            legacy = not lay.scale_bits and not lay.table
            spread = mean[..., None] if legacy else lay.spread * own
            return mass * (spread + x.square()).sqrt()
        if not lay.offset:
            return x.square()
        if lay.bits == 2:
            return x.abs()
        return x.square().mean(-1, keepdim=True).sqrt() + x.abs()

    def _symmetric(self, x: Tensor, mass: Tensor, important: bool) -> Tensor:
        """x [N, S, sub] -> scale [N, S, 1]."""
        lay = self.layout
        if lay.table:
            return table_scale(x, mass, nearest_level, TABLE[0])
        if lay.bits == 3 and not important:
            start = quotient(signed_peak(x), torch.tensor(-float(lay.zero)))
            return swept_scale(x, mass, start, -lay.zero, lay.zero - 1)
        return symmetric_scale(x, mass, lay.zero)

    def _with_offset(self, x: Tensor, mass: Tensor, unit: Tensor, important: bool) -> Params:
        """x [N, S, sub] -> parameters of a type whose values are scale * code + offset."""
        lay = self.layout
        search = WITH_IMPORTANCE if important or lay.search is None else lay.search
        scale, offset = offset_scale(x, mass, 2**lay.bits - 1, search)
        if not lay.scale_bits:
            return {
                "d": half(scale[..., 0] / unit[:, 0]),
                "zero_d": half(offset[..., 0] / unit[:, 0]),
            }
        params: Params = {}
        for name, value in (("", scale), ("zero_", -offset)):
            d, codes = self._second(value[..., 0], mass.sum(-1), important, unit[:, 0])
            params |= {f"{name}d": d, f"{name}scale": codes.to(torch.uint8)[:, None]}
        return params

    def _second(
        self, scale: Tensor, mass: Tensor, important: bool, unit: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scales of sub-blocks [N, S] -> d [N, 1] fp16 and whole factors [N, S] fp32."""
        lay = self.layout
        low, high = -lay.scale_zero, 2**lay.scale_bits - 1 - lay.scale_zero
        if important:
            found = (
                positive_scale(scale, mass, high) if not low else symmetric_scale(scale, mass, -low)
            )
        else:
            found = quotient(signed_peak(scale), torch.tensor(float(low or high)))
        d = half(found / unit)
        codes = in_range(low, high)(quotient(scale, d.float() * unit))
        return d, codes


def half(x: Tensor) -> Tensor:
    """fp32 -> fp16, never infinite."""
    return x.clamp(-HALF_MAX, HALF_MAX).half()


@cache
def nearest_codes() -> Tensor:
    """[481] uint8: the code nearest to x at ceil(2 x) + 254, x from -127 to 113.

    Middles between whole levels are whole or halves, so that doubling finds the side exactly.
    """
    levels = torch.tensor(TABLE, dtype=torch.float32)
    x = torch.arange(2 * TABLE[0], 2 * TABLE[-1] + 1) / 2
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


@cache
def nearest_levels() -> Tensor:
    """[481] fp32: the level of each of nearest_codes."""
    return torch.tensor(TABLE, dtype=torch.float32)[nearest_codes().long()]


def place(x: Tensor) -> Tensor:
    """x [...] -> where its nearest level is in the two tables above; a middle takes the lower."""
    return (x * 2).ceil_().clamp_(2 * TABLE[0], 2 * TABLE[-1]).sub_(2 * TABLE[0]).int()


def nearest_level(x: Tensor) -> Tensor:
    """x [...] -> the nearest entries of TABLE [...] fp32."""
    return nearest_levels().to(x.device)[place(x)]


RECIPES = {
    f"GGUF {name} pure": f"rtn(format=gguf(type={name}))"
    for name in ("Q5_K", "Q4_K", "Q3_K", "Q2_K")
}
