"""SpQR: GPTQ on tiny groups with few-bit scales; the most sensitive weights are kept in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from backend.formats.base import Params, QTensor, Sparse
from backend.formats.spqr import Bilevel
from backend.methods import METHODS
from backend.methods.base import LinearMethod, Target
from backend.methods.gptq import MOST_DAMPING, SINGULAR, Walk, inverse_factor, why_useless
from backend.model.quant_linear import QuantLinear
from backend.model.stats import Hessian, LayerStats

CLOSE = 0.005  # a search for target bits ends within this share of them; promised is 0.01
TRIES = 16  # sweeps of one search at most; 2 to 4 are usual
OUTLIER_BITS = 32  # a 16-bit value and a 16-bit column
USUAL_TRIES, USUAL_SHARE = 3, 0.01  # for estimates: sweeps of a search, weights kept as outliers


@METHODS.register
class SpQR(LinearMethod):
    """Round tiny groups with few-bit scales as GPTQ does, and keep sensitive weights in 16 bits.

    Dettmers et al. 2023, "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight
    Compression", algorithm 1; sensitivity and the relative threshold as in the released code,
    which divides by the Cholesky diagonal where the paper has the diagonal of the inverse.
    """

    kind: ClassVar[str] = "spqr"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights"})
    needs: ClassVar = (Hessian,)
    bits: int = Field(3, ge=1, le=8, description="Bits of one code.")
    group: int = Field(
        16, ge=0, le=65536, description="Input channels per scale; 0 is one scale per row."
    )
    scale_bits: int | None = Field(
        3, ge=1, le=8, description="Bits of a group's scale; null stores it as scale_dtype."
    )
    zero_bits: int | None = Field(
        3, ge=1, le=8, description="Bits of a group's zero point; null stores it as scale_dtype."
    )
    stat_group: int = Field(
        16, ge=2, le=65536, description="Rows whose scales, and whose zero points, share a range."
    )
    threshold: float | None = Field(
        0.2,
        gt=0,
        le=1e6,
        description="Weights whose rounding costs more than this many times the mean sensitivity "
        "stay in 16 bits: the lower, the more of them; null keeps none.",
    )
    target_bits: float | None = Field(
        None,
        gt=1,
        le=16,
        description="Bits per weight, all told: searches, from `threshold` on, the threshold that "
        "gives them in each linear; 2 to 4 sweeps instead of one.",
    )
    act_order: bool = Field(
        False, description="Round the input channels with the largest activations first."
    )
    damping: float = Field(
        0.01, ge=0, le=1, description="Share of the Hessian's mean diagonal added to its diagonal."
    )
    simplified_outliers: bool = Field(
        False,
        description="Fit groups on all their weights; off: without those whose absence would help.",
    )
    round_zero: bool = Field(
        False, description="Zero points are codes: 0 stays 0, each takes `bits` bits."
    )
    chosen_by: Literal["released", "stored"] = Field(
        "released",
        description="Scales that choose the codes. released: before their second level is cut to "
        "scale_dtype, as in the authors' code; stored: after.",
    )
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", description="What the ends of the second level are stored as."
    )
    block: int = Field(
        128, ge=1, le=4096, description="Columns rounded before the rest is updated at once."
    )

    @model_validator(mode="after")
    def _the_target_is_above_the_dense_codes(self) -> Self:
        if self.target_bits is None:
            return self
        if self.threshold is None:
            raise ValueError(
                "spqr: target_bits is met by keeping outliers, threshold null keeps none; "
                "set one of them"
            )
        dense = self.grid().dense_bits()
        if self.target_bits < 0.99 * dense:
            raise ValueError(
                f"spqr: target_bits {self.target_bits:g} is below the {dense:.4g} bits of codes "
                "and scales; use fewer bits or larger groups"
            )
        return self

    def grid(self) -> Bilevel:
        """The format that the codes are stored in."""
        return Bilevel(
            bits=self.bits,
            group=self.group,
            scale_bits=self.scale_bits,
            zero_bits=self.zero_bits,
            stat_group=self.stat_group,
            round_zero=self.round_zero,
            scale_dtype=self.scale_dtype,
        )

    def sweeps(self) -> float:
        """As GPTQ's, and as long again for outliers and second levels; a search makes several."""
        return 2.0 if self.target_bits is None else 2.0 * USUAL_TRIES

    def stored_bits(self, n: int, k: int, attention: bool) -> float:
        """What is asked for; without a target, dense codes and the usual share of outliers."""
        if self.target_bits is not None:
            return self.target_bits
        outliers = 0.0 if self.threshold is None else USUAL_SHARE * OUTLIER_BITS + 32 / k
        return self.grid().dense_bits() + outliers

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> QuantLinear:
        w = linear.weight.detach().float()  # [N, K]
        h = stats[Hessian].matrix.to(w.device)
        reason = why_useless(h)
        q = self.solve(w, h, stats) if not reason else None
        if q is None:
            stats.note(f"{reason or SINGULAR}; rounded to nearest instead, without outliers")
            q = self.grid().quantize(w)
        return QuantLinear(q, linear.bias, dtype=linear.weight.dtype)

    def solve(self, w: Tensor, h: Tensor, stats: LayerStats) -> QTensor | None:
        """w [N, K], h [K, K] -> rounded weights; None where no damping makes h invertible."""
        dead = h.diagonal() == 0
        if dead.any():
            stats.note(f"{int(dead.sum())} of {len(dead)} inputs were always 0; weights taken as 0")
        order = torch.arange(len(h), device=h.device)
        if self.act_order:
            order = h.diagonal().argsort(descending=True, stable=True)
        factor = self.factor_of(h[order][:, order], stats)
        if factor is None:
            return None
        w = w.masked_fill(dead, 0)[:, order]

        def rounded(threshold: float | None) -> QTensor:
            return self.rounded(w, factor, order, threshold)

        if self.threshold is None or self.target_bits is None:
            return rounded(self.threshold)
        return search(rounded, self.threshold, self.target_bits, stats.note)

    def factor_of(self, h: Tensor, stats: LayerStats) -> Tensor | None:
        """U [K, K] of the damped h, ten times the damping after each failure; None at the end.

        Inputs that were always 0 count into the damping as 0, and get 1 afterwards: the other way
        round than in GPTQ.
        """
        mean, dead, damping = h.diagonal().mean(), h.diagonal() == 0, self.damping
        while True:
            damped = h.clone()
            damped.diagonal().add_(damping * mean).masked_fill_(dead, 1)
            factor = inverse_factor(damped, 0)
            if factor is not None or damping >= MOST_DAMPING:
                break
            damping = min(damping * 10 or 0.01, MOST_DAMPING)
        if factor is not None and damping > self.damping:
            stats.note(
                f"Hessian not positive definite at damping {self.damping:g}; used {damping:g}"
            )
        return factor

    def rounded(self, w: Tensor, factor: Tensor, order: Tensor, threshold: float | None) -> QTensor:
        """w [N, K] and its factor in the `order` of rounding -> a QTensor in the linear's own."""
        limit = math.inf
        if threshold is not None:
            limit = threshold * sensitivity(w, factor.diagonal()).item()
        grid, back = self.grid(), order.argsort()
        # The released code never cuts the second level's ends; where it chooses, we cut afterwards.
        full = grid.model_copy(update={"scale_dtype": "float32"})
        chooser = full if self.chosen_by == "released" else grid
        swept = sweep(w, factor, chooser, limit, self.block, trim=not self.simplified_outliers)
        params = grid.cut(grid.stack(swept.fitted))
        index = None
        if self.act_order and 0 < self.group < len(order):
            index = (back // self.group).to(torch.int32)
        sparse = sparse_of(swept.outlier[:, back], swept.exact[:, back])
        return QTensor(swept.codes[:, back], params, grid, index, sparse)


@dataclass(frozen=True)
class Swept:
    """What one sweep over the columns leaves, in the order of rounding."""

    codes: Tensor  # [N, K] uint8
    fitted: list[Params]  # of each group
    outlier: Tensor  # [N, K] bool
    exact: Tensor  # [N, K] fp32, each weight as it was when its turn came


def sensitivity(w: Tensor, pivots: Tensor) -> Tensor:
    """w [N, K], pivots [K] -> [], mean over columns of Var(w) / pivot^2: the unit of thresholds."""
    variance = w.var(0) if len(w) > 1 else w[0].square()  # [K]
    return (variance / pivots.square()).mean()


def sweep(
    w: Tensor, factor: Tensor, grid: Bilevel, limit: float, block: int, *, trim: bool
) -> Swept:
    """Round the columns of w [N, K] from left to right, spreading each error as GPTQ does.

    Weights whose scaled error squared exceeds `limit` stay as they are and spread none. With `trim`
    groups are fitted without their likely outliers.
    """
    k, n = w.T.shape
    codes = torch.empty(k, n, dtype=torch.uint8, device=w.device)
    outlier = torch.empty(k, n, dtype=torch.bool, device=w.device)
    exact = torch.empty(k, n, device=w.device)
    walk, pivots = Walk(w, factor, block), factor.diagonal()
    base, step, fitted = grid.prepare(w), grid.group or k, []
    for c, column in walk:
        if c % step == 0:
            group = walk.ahead(step, fresh=True)  # [N, g]
            if trim and limit < math.inf:
                group = without_outliers(group, pivots[c : c + step], limit, grid)
            fitted.append(grid.fit(group, base))
            scale, origin = grid.levels(fitted[-1])  # [N, 1]
        code = grid.codes_on(column[:, None], scale, origin)
        value = ((code - origin) * scale)[:, 0]  # [N]
        torch.gt(((column - value) / pivots[c]).square(), limit, out=outlier[c])
        walk.settle(column, torch.where(outlier[c], column, value))
        codes[c], exact[c] = code[:, 0], column
    return Swept(codes.T.contiguous(), fitted, outlier.T, exact.T)


def without_outliers(w: Tensor, pivots: Tensor, limit: float, grid: Bilevel) -> Tensor:
    """One group w [N, g] -> the same, likely outliers replaced by the mean of the row's others."""
    likely = leave_one_out(w, pivots, grid) > limit  # [N, g]
    others = (~likely).sum(1, keepdim=True).clamp_min(1)
    mean = w.masked_fill(likely, 0).sum(1, keepdim=True) / others
    return torch.where(likely, mean, w)


def leave_one_out(w: Tensor, pivots: Tensor, grid: Bilevel) -> Tensor:
    """One group w [N, g] -> gain [N, g]: how far the row's summed squared error falls without each.

    The error of the other g - 1 weights is that of a grid fitted on them alone. Only a smallest or
    largest weight moves the grid by leaving; any other takes just its own error along. So three
    grids per row replace the g of the definition: O(N g) instead of O(N g^2), in time and memory.
    """
    if w.shape[1] == 1:
        return torch.zeros_like(w)
    low, lowest = w.topk(2, 1, largest=False)  # [N, 2] the two smallest, and where
    high, highest = w.topk(2, 1)

    def errors(low: Tensor, high: Tensor) -> Tensor:
        scale, origin = grid.first_level(low, high)  # [N, 1]
        value = (grid.codes_on(w, scale, origin) - origin) * scale
        return ((value - w) / pivots).square()  # [N, g]

    gain = errors(low[:, :1], high[:, :1])
    base = gain.sum(1, keepdim=True)
    left = (
        (lowest[:, :1], errors(low[:, 1:], high[:, :1])),
        (highest[:, :1], errors(low[:, :1], high[:, 1:])),
    )
    for index, error in left:
        gain.scatter_(1, index, base - error.scatter_(1, index, 0).sum(1, keepdim=True))
    return gain


def sparse_of(outlier: Tensor, exact: Tensor) -> Sparse | None:
    """Mask and values [N, K] -> CSR of 16-bit values and columns; None where none is set."""
    row, column = outlier.nonzero(as_tuple=True)
    if not len(row):
        return None
    counts = outlier.sum(1, dtype=torch.int32)
    row_ptr = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    limit = torch.finfo(torch.float16).max
    value = exact[row, column].clamp(-limit, limit).half()
    return Sparse(row_ptr, column.to(torch.uint16), value)


def search(
    rounded: Callable[[float | None], QTensor],
    start: float,
    target: float,
    note: Callable[[str], None],
) -> QTensor:
    """The threshold whose rounding takes `target` bits per weight, bracketed and interpolated.

    The number of outliers falls about as a power of the threshold: both are searched as logarithms.
    """
    q = rounded(start)
    n, k = q.codes.shape
    dense = sum(replace(q, sparse=None).bits().values())
    # Outliers bring a 32-bit pointer for each row and one more.
    wanted = (target - dense) * n * k / OUTLIER_BITS - (n + 1)
    if dense >= target * (1 - CLOSE) or wanted < 1:
        if abs(dense / target - 1) > 0.01:
            note(f"{target:g} bits leave no room for outliers; {dense:.3f} bits without them")
        return rounded(None)
    tried = {start: count_of(q)}
    best = start
    for _ in range(TRIES - 1):
        if abs(tried[best] - wanted) * OUTLIER_BITS <= CLOSE * target * n * k:
            break
        threshold = next_threshold(tried, wanted)
        other = rounded(threshold)
        tried[threshold] = count_of(other)
        if abs(tried[threshold] - wanted) < abs(tried[best] - wanted):
            best, q = threshold, other
    bits, share = sum(q.bits().values()), tried[best] / (n * k)
    missed = "" if abs(bits / target - 1) <= 0.01 else f", the nearest to {target:g} in reach"
    note(f"threshold {best:.4g}: {bits:.3f} bits a weight, {share:.2%} outliers{missed}")
    return q


def next_threshold(tried: dict[float, int], wanted: float) -> float:
    """Between the tried thresholds on both sides of `wanted` outliers, or beyond the last one."""
    low = max((t for t in tried if tried[t] > wanted), default=None)  # too many outliers
    high = min((t for t in tried if tried[t] <= wanted), default=None)
    if low is None or high is None or low > high:
        upward = high is None
        last = max(tried) if upward else min(tried)
        power = 0.6 * math.log(max(tried[last], 0.5) / wanted)
        least = 0.3 * len(tried)  # ever longer steps: where whole columns are outliers, it is flat
        return last * math.exp(max(power, least) if upward else min(power, -least))
    many, few = math.log(tried[low]), math.log(max(tried[high], 0.5))
    share = (many - math.log(wanted)) / (many - few)
    if len(tried) > 4 and len(tried) % 2:  # where that crawls, halve every other time
        share = 0.5
    return low * (high / low) ** min(max(share, 0.1), 0.9)


def count_of(q: QTensor) -> int:
    """Outliers."""
    return 0 if q.sparse is None else len(q.sparse.value)


SECOND = "scale_bits=3,zero_bits=3,stat_group=16"
OFFICIAL = f"{SECOND},act_order=true,damping=1.0"  # of the authors' README
RECIPES = {
    # The tables' own thresholds, 0.25 and 0.5, start the search; see docs/methods.md.
    "SpQR 3.99b": f"spqr(bits=3,group=16,{SECOND},threshold=0.25,target_bits=3.99)",
    "SpQR 3.07b": f"spqr(bits=2,group=32,{SECOND},threshold=0.5,target_bits=3.07)",
    "SpQR 3.99b (whole zeros)": f"spqr(bits=3,group=16,{SECOND},threshold=0.25,target_bits=3.99,"
    "round_zero=true)",
    "SpQR W3 g16": f"spqr(bits=3,group=16,{OFFICIAL},threshold=0.2)",
    "SpQR W4 g16": f"spqr(bits=4,group=16,{OFFICIAL},threshold=0.2)",
    "SpQR W3 g16 (no outliers)": f"spqr(bits=3,group=16,{OFFICIAL},threshold=null)",
}
