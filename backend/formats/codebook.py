"""Codebooks: unequal levels from a table, one scale per block (NF4 and FP4 of bitsandbytes)."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from backend.formats import FORMATS
from backend.formats.base import Format, GroupField, Params, stack_groups
from backend.formats.int_group import DTYPES

TINY = torch.finfo(torch.float32).tiny
BLOCK = 256  # scales that share a second-level scale
SHARED = ("second", "offset")  # parameters of the whole matrix, not of one group


def normal_float(bits: int = 4) -> list[float]:
    """NF4: 8 positive and 7 negative quantiles of the normal distribution, and 0, within [-1, 1].

    Of other widths half of all codes above 0, one less below.

    Dettmers et al. 2023, "QLoRA", appendix E; 0.9677083 is the released code's outermost quantile.
    """
    normal = torch.distributions.Normal(0.0, 1.0)

    def quantiles(count: int) -> Tensor:
        return normal.icdf(torch.linspace(0.9677083, 0.5, count + 1, dtype=torch.float64)[:-1])

    half = 2 ** (bits - 1)
    levels = torch.cat([-quantiles(half - 1), torch.zeros(1), quantiles(half).flip(0)])
    return (levels / levels.max()).tolist()


def float4() -> list[float]:
    """bitsandbytes' FP4 by bit pattern, within [-1, 1]: not IEEE's order; 8 is a second zero."""
    positive = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    return [level / 12 for level in positive] + [-level / 12 for level in positive]


def dynamic8() -> list[float]:
    """The 8-bit dynamic map in ascending order: seven decades, ever finer, both signs, 0 and 1.

    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 1.3; decade i,
    from 10^(i-6) down, has 2^i levels at the middles of equal steps of [0.1, 1].
    """
    levels = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)  # fp32: the last bit is that of the released map
        middles = (ends[1:] + ends[:-1]) / 2 * 10.0 ** (i - 6)
        levels += [*middles.tolist(), *(-middles).tolist()]
    return sorted(levels)


TABLES = {"nf4": normal_float, "fp4": float4, "dynamic8": dynamic8}


@cache
def table(name: str) -> Tensor:
    """[levels] fp32, the level of each code."""
    return torch.tensor(TABLES[name](), dtype=torch.float32)


@cache
def boundaries(name: str) -> tuple[Tensor, Tensor]:
    """Middles between levels in ascending order [U - 1], and the code of each level [U] uint8."""
    levels = table(name)
    ascending = levels.unique()  # [U]
    codes = (levels == ascending[:, None]).int().argmax(1)  # of equal levels the first
    return (ascending[1:] + ascending[:-1]) / 2, codes.to(torch.uint8)


def nearest(x: Tensor, name: str) -> Tensor:
    """x [...] -> codes of the nearest levels of a table [...] uint8; a middle takes the lower."""
    middles, codes = (part.to(x.device) for part in boundaries(name))
    return codes[torch.bucketize(x, middles)]


@FORMATS.register
class Codebook(Format):
    """Sixteen unequal levels, one scale per block of weights; NF4 has them where normal ones lie.

    value = peak * level[code], the code that of the level nearest w / peak: the levels of NF4 are
    quantiles of the normal distribution (Dettmers et al. 2023, "QLoRA", section 3), those of FP4
    bitsandbytes' own. A block is `group` input channels of one row; bitsandbytes lets blocks run
    on into the next row, which is the same where the group divides the row.
    """

    kind: ClassVar[str] = "codebook"
    row_local: ClassVar[bool] = False  # under double quantization
    table: Literal["nf4", "fp4"] = Field(
        "nf4", description="Levels. nf4: quantiles of a normal distribution; fp4: floating point."
    )
    group: GroupField = Field(64, description="Input channels per block; 0 is one per row.")
    double_quant: bool = Field(
        False,
        description="Block scales in 8 bits of their own, 256 of them to a scale: 4.127 bits a "
        "weight instead of 4.5 in groups of 64.",
    )
    chosen_by: Literal["stored", "released"] = Field(
        "stored",
        description="Scale that chooses the codes under double quantization. stored: the rounded "
        "one, with less error; released: the one before its own rounding, as in bitsandbytes.",
    )
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="What a scale is stored as, unless double_quant makes it 8 bits."
    )

    @property
    def levels(self) -> Tensor:
        """Levels [16] fp32, by code."""
        return table(self.table)

    def code_bits(self) -> float:
        return 4.0

    def prepare(self, w: Tensor) -> Params:
        """w [N, K] -> for double quantization, all scales [N, G] and their second level, else {}.

        The scales, row by row, less their mean `offset` [1, 1], in blocks of 256 with peak `second`
        [blocks, 1].
        """
        if not self.double_quant:
            return {}
        w = w.float().abs()
        spans = self.groups(w.shape[1])
        peaks = torch.cat([w[:, a:b].amax(1, keepdim=True) for a, b in spans], 1)  # [N, G]
        offset = peaks.mean().view(1, 1)
        rest = (peaks - offset).abs().flatten()
        padded = torch.nn.functional.pad(rest, (0, -len(rest) % BLOCK))
        second = padded.view(-1, BLOCK).amax(1, keepdim=True)  # [blocks, 1]
        return {"scale": peaks, "second": second, "offset": offset}

    def fit(self, w: Tensor, base: Params, importance: Tensor | None = None) -> Params:
        """w [N, g] -> scale [N, 1]; in 8 bits, on the second level in `base`, if there is one."""
        peak = w.float().abs().amax(1, keepdim=True)
        if not base:
            dtype = DTYPES[self.scale_dtype]
            return {"scale": peak.clamp_max(torch.finfo(dtype).max).to(dtype)}
        second = base["second"][base["block"]].clamp_min(TINY)  # [N, 1]
        codes = nearest((peak - base["offset"]) / second, "dynamic8")
        return {**base, "scale": codes, "peak": peak}

    def stack(self, fitted: list[Params]) -> Params:
        """The second level once, and no exact peaks: those chose the codes and are dropped."""
        shared = {name: fitted[0][name] for name in SHARED if name in fitted[0]}
        return stack_groups([{"scale": p["scale"]} for p in fitted]) | shared

    def params_of(self, params: Params, index: int) -> Params:
        """Parameters of group `index`; `block` [N] is where its scales are on the second level."""
        p = super().params_of(params, index)
        if self.double_quant:
            n, groups = params["scale"].shape
            rows = torch.arange(n, device=params["scale"].device)
            p["block"] = (rows * groups + index) // BLOCK
            p["second"] = params["second"]
        return p

    def encode(self, w: Tensor, p: Params, at: int = 0) -> Tensor:
        exact = self.chosen_by == "released" and "peak" in p
        scale = p["peak"] if exact else self._scale(p)
        return nearest(w.float() / scale.clamp_min(TINY), self.table)

    def decode(self, codes: Tensor, p: Params, at: int = 0) -> Tensor:
        return self.levels.to(codes.device)[codes.long()] * self._scale(p)

    def _scale(self, p: Params) -> Tensor:
        """Parameters of a group -> its scales [N, 1] fp32, never negative."""
        if not self.double_quant:
            return p["scale"].float()
        level = table("dynamic8").to(p["scale"].device)[p["scale"].long()]
        return (level * p["second"][p["block"]] + p["offset"]).clamp_min(0)


RECIPES = {
    "NF4": "rtn(format=codebook(table=nf4,group=64))",
    "NF4 double quant": "rtn(format=codebook(table=nf4,group=64,double_quant=true,"
    "chosen_by=released))",
    "FP4": "rtn(format=codebook(table=fp4,group=64))",
    "FP4 double quant": "rtn(format=codebook(table=fp4,group=64,double_quant=true,"
    "chosen_by=released))",
    "GPTQ NF4": "gptq(format=codebook(table=nf4,group=64),act_order=true,static_groups=true,"
    "live_damping=true)",
}
