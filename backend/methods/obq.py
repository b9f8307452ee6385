"""OBQ: in every row, always round the weight that costs least now; the others make up for it."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from backend.formats import Format, FormatField, QTensor
from backend.formats.base import Params
from backend.formats.int_group import IntGroup
from backend.methods import METHODS
from backend.methods.base import LinearMethod, Target
from backend.methods.gptq import SINGULAR, damped_factor, fit_all, revive, why_useless
from backend.model.quant_linear import QuantLinear
from backend.model.stats import Hessian, LayerStats

CHUNK_BYTES = 256 << 20  # of the inverses of the rows worked on at once


@METHODS.register
class OBQ(LinearMethod):
    """Round one weight of a row at a time, cheapest first, and refit the rest; for small layers.

    Frantar and Alistarh 2022, "Optimal Brain Compression", algorithm 3: the exact greedy method
    that GPTQ makes fast by giving all rows one order. fp64 throughout; work grows with N K^3.
    """

    kind: ClassVar[str] = "obq"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights"})
    needs: ClassVar = (Hessian,)
    format: FormatField = Field(IntGroup(), description="The grid that weights are rounded to.")
    order: Literal["greedy", "natural"] = Field(
        "greedy",
        description="Next weight of a row. greedy: the one that costs least now; natural: from "
        "left to right, which is GPTQ.",
    )
    strays_first: bool = Field(
        True,
        description="A weight that earlier errors pushed more than half a step off the grid goes "
        "next, while many others can still make up for it.",
    )
    damping: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of the Hessian's mean diagonal added to its diagonal; 0 in the "
        "released code, 0.01 is GPTQ's.",
    )
    max_inputs: int = Field(
        1024, ge=1, le=8192, description="Linears with more input channels are refused."
    )

    def work(self, n: int, k: int) -> float:
        """Each of K steps of each row reads what the steps before it left, in fp64."""
        return 11.0 * n * k**3

    def sweeps(self) -> float:
        """None: rows are worked on, each in its own order."""
        return 0.0

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> QuantLinear:
        w = linear.weight.detach().float()  # [N, K]
        if w.shape[1] > self.max_inputs:
            raise ValueError(
                f"obq: a linear with {w.shape[1]} input channels is over max_inputs = "
                f"{self.max_inputs}, and work grows with their cube; use gptq, or raise max_inputs"
            )
        h = stats[Hessian].matrix.to(w.device)
        reason = why_useless(h)
        q = self.solve(w, h, stats) if not reason else None
        if q is None:
            stats.note(f"{reason or SINGULAR}; rounded to nearest instead")
            q = self.format.quantize(w)
        return QuantLinear(q, linear.bias, dtype=linear.weight.dtype)

    def solve(self, w: Tensor, h: Tensor, stats: LayerStats) -> QTensor | None:
        """w [N, K], h [K, K] -> rounded weights; None where no damping makes h invertible."""
        grid = FixedGrid(self.format, w)
        w, h = w.double(), h.double()  # copies
        if dead := revive(w, h, live=True):
            stats.note(f"{dead} of {w.shape[1]} inputs were always 0; their weights became 0")
        factor = damped_factor(h, self.damping, stats)
        if factor is None:
            return None
        n, k = w.shape
        chunk = max(1, CHUNK_BYTES // (8 * k * k))
        parts = [slice(start, start + chunk) for start in range(0, n, chunk)]
        inverse = factor.T @ factor
        codes = torch.cat([self.solve_rows(w, part, inverse, grid)[0] for part in parts])
        return QTensor(codes, grid.params(), self.format)

    def solve_rows(
        self, w: Tensor, rows: slice, inverse: Tensor, grid: FixedGrid
    ) -> tuple[Tensor, Tensor]:
        """R rows of w [N, K], H^-1 [K, K] -> codes [R, K] uint8, cost of each step [K, R].

        What a step leaves of a row's inverse is H^-1 - sum v v^T over the steps so far, v the
        picked column over the root of its pivot: only these v are kept, so that a step reads what
        was taken instead of rewriting all [R, K, K]. In natural order the v are the rows of GPTQ's
        factor U. Costs sum to trace((W - Q) H (W - Q)^T).
        """
        w = w[rows].clone()  # [R, K]
        r, k = w.shape
        every = torch.arange(r, device=w.device)
        taken = w.new_zeros(r, k, k)  # [R, step, K]
        left = inverse.diagonal().expand(r, k).clone()  # diagonal of what is left of the inverse
        done = torch.zeros(r, k, dtype=torch.bool, device=w.device)
        codes = torch.zeros(r, k, dtype=torch.uint8, device=w.device)
        costs = w.new_zeros(k, r)
        for t in range(k):
            proposed, values = grid.nearest(w, rows)
            squares = (w - values).square().masked_fill_(done, 0)
            pick = self.pick(t, squares, left, grid.strays(w, rows) & ~done, done)  # [R]
            column = inverse[pick]  # [R, K]
            column -= torch.bmm(taken[every, :t, pick][:, None], taken[:, :t])[:, 0]
            column.masked_fill_(done, 0)
            v = column / column[every, pick].sqrt()[:, None]  # [R, K]
            error = (w - values)[every, pick] / v[every, pick]  # [R]
            w -= error[:, None] * v
            codes[every, pick], w[every, pick] = proposed[every, pick], values[every, pick]
            done[every, pick] = True
            taken[:, t], costs[t] = v, error.square()
            left -= v.square()
        return codes, costs

    def pick(self, t: int, squares: Tensor, left: Tensor, strays: Tensor, done: Tensor) -> Tensor:
        """Squared errors, left diagonal, off the grid, done, each [R, K] -> next column [R]."""
        if self.order == "natural":
            return torch.full_like(done[:, 0], t, dtype=torch.long)
        cheapest = (squares / left).masked_fill_(done, torch.inf).argmin(1)
        if not self.strays_first:
            return cheapest
        return torch.where(strays.any(1), squares.argmax(1), cheapest)


class FixedGrid:
    """A format whose parameters were fitted on w [N, K], for some of its rows at a time."""

    def __init__(self, fmt: Format, w: Tensor) -> None:
        self.fmt, self.w = fmt, w
        self.fitted: dict[int, Params] = fit_all(fmt, w, fmt.prepare(w))
        self.high, self.low = self.edge(1), -self.edge(-1)  # [N, K]

    def edge(self, sign: int) -> Tensor:
        """Half a step past the last level up (1) or, negated, down (-1) of each weight [N, K]."""
        last = torch.full_like(self.w, -torch.inf)
        before = last.clone()
        for code in range(2 ** math.ceil(self.fmt.code_bits())):
            same = torch.full_like(self.w, code, dtype=torch.uint8)
            value = sign * self.values(same, self.fitted)
            value = value.masked_fill_(~value.isfinite(), -torch.inf)  # FP8 has codes for NaN
            before = torch.where(value < last, before.maximum(value), before)
            before = torch.where(value > last, last, before)
            last = last.maximum(value)
        return last + (last - before) / 2

    def nearest(self, x: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """x [R, K] in place of these rows -> codes [R, K] uint8, values [R, K] in x's dtype."""
        if not self.fmt.row_local:  # parameters are not one per row: show the format all rows
            whole = self.w.to(x.dtype)
            whole = torch.cat([whole[: rows.start], x, whole[rows.stop :]])
            codes, values = self.nearest_of(whole, slice(None))
            return codes[rows], values[rows]
        return self.nearest_of(x, rows)

    def nearest_of(self, x: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `nearest`, each parameter cut to these rows unless all rows share it."""
        fitted = {
            i: {name: v if len(v) == 1 else v[rows] for name, v in p.items()}
            for i, p in self.fitted.items()
        }
        groups = enumerate(self.fmt.groups(x.shape[1]))
        codes = torch.cat([self.fmt.encode(x[:, a:b], fitted[i]) for i, (a, b) in groups], 1)
        return codes, self.values(codes, fitted).to(x.dtype)

    def values(self, codes: Tensor, fitted: dict[int, Params]) -> Tensor:
        """codes [R, K], parameters of R rows -> what they stand for [R, K] fp32."""
        groups = enumerate(self.fmt.groups(codes.shape[1]))
        return torch.cat([self.fmt.decode(codes[:, a:b], fitted[i]) for i, (a, b) in groups], 1)

    def params(self) -> Params:
        """Parameters of the whole matrix, as stored."""
        return self.fmt.stack([self.fitted[i] for i in range(len(self.fitted))])

    def strays(self, x: Tensor, rows: slice) -> Tensor:
        """x [R, K] in place of these rows -> True where more than half a step off the grid."""
        return (x < self.low[rows]) | (x > self.high[rows])


RECIPES = {
    "OBQ W4": "obq(bits=4,scale_dtype=float16)",
    "OBQ W3": "obq(bits=3,scale_dtype=float16)",
    "OBQ W2 g64": "obq(bits=2,group=64,scale_dtype=float16)",
}
