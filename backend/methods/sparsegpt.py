"""SparseGPT: weights that matter least for the output go, later columns make up for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from backend.formats import Format, QTensor
from backend.methods import METHODS
from backend.methods.gptq import (
    SINGULAR,
    Walk,
    damped_factor,
    fit_all,
    revive,
    waves_of,
    why_useless,
)
from backend.methods.pruning import Pruning
from backend.model.quant_linear import QuantLinear
from backend.model.stats import Hessian, LayerStats

if TYPE_CHECKING:
    from backend.formats.base import Params
    from backend.model.families import Block


@METHODS.register
class SparseGPT(Pruning):
    """Drop the weights that matter least, rounding the rest if asked; later columns make up for it.

    Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot", algorithm 1: the walk of GPTQ over the columns. What goes is chosen by
    w^2 / U_cc^2, U the factor of the inverse Hessian: among the `block` columns ahead, all rows
    together, or in every bucket of a pattern when the walk reaches it.
    """

    kind: ClassVar[str] = "sparsegpt"
    needs: ClassVar = (Hessian,)
    block: int = Field(
        128,
        ge=1,
        le=4096,
        description="Columns among which an unstructured choice is made, and after which the rest "
        "is updated at once.",
    )
    damping: float = Field(
        0.01, ge=0, le=1, description="Share of the Hessian's mean diagonal added to its diagonal."
    )
    true_sequential: bool = Field(
        False,
        description="Within a block, show each linear inputs that carry the errors of those "
        "before it; four passes instead of one.",
    )
    live_damping: bool = Field(
        False,
        description="Average the diagonal over inputs that are not always 0; off: over all, the "
        "dead ones counting as 1.",
    )

    def waves(self, block: Block) -> list[list[str]]:
        """All at once, or the block's own order with true_sequential."""
        return waves_of(block) if self.true_sequential else super().waves(block)

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> QuantLinear:
        w = linear.weight.detach().float()  # [N, K]
        if self.bits == 16 and not self.sparsity:
            stats.note("sparsity 0 and 16 bits: the weights stay as they are")
            return self.finished(linear, linear.weight, None)
        h = stats[Hessian].matrix.to(w.device)
        reason = why_useless(h)
        found = self.solve(w, h, stats) if not reason else None
        if found is None:
            stats.note(f"{reason or SINGULAR}; pruned by magnitude, nothing made up for")
            found = w if self.grid is None else self.grid.quantize(w), ~self.choose(w.abs())
        weight, keep = found
        return self.finished(linear, weight, keep if self.sparsity else None)

    def solve(
        self, w: Tensor, h: Tensor, stats: LayerStats
    ) -> tuple[QTensor | Tensor, Tensor] | None:
        """w [N, K], h [K, K] -> weights [N, K] and where they stay; None if h has no inverse."""
        grid = None if self.grid is None else Rounding(self.grid, w)
        w, h = w.clone(), h.clone()
        if dead := revive(w, h, self.live_damping):
            stats.note(f"{dead} of {w.shape[1]} inputs were always 0; their weights became 0")
        factor = damped_factor(h, self.damping, stats)
        if factor is None:
            return None
        values, keep, _ = self.walk(w, factor, grid)
        return (values if grid is None else grid.finish()), keep

    def walk(
        self, w: Tensor, factor: Tensor, grid: Rounding | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """w [N, K], U [K, K] -> values [N, K], where they stay [N, K], scaled errors [N, K]."""
        values, gone = torch.empty_like(w.T), torch.zeros_like(w, dtype=torch.bool).T  # [K, N]
        weight_of = 1 / factor.diagonal().square()  # [K], of a squared error
        width = self.bucket[1] or self.block
        walk = Walk(w, factor, self.block)
        for c, column in walk:
            if c % width == 0:
                span = walk.ahead(width, fresh=True).square() * weight_of[c : c + width]
                gone[c : c + width] = self.choose(span).T
            value = column if grid is None else grid.round(c, column)
            values[c] = value.masked_fill(gone[c], 0)
            walk.settle(column, values[c])
        return values.T, ~gone.T.contiguous(), walk.errors.T


class Rounding:
    """A format whose parameters were fitted on the full matrix w [N, K]; collects codes."""

    def __init__(self, fmt: Format, w: Tensor) -> None:
        self.fmt, self.step = fmt, fmt.group or w.shape[1]
        self.fitted: dict[int, Params] = fit_all(fmt, w, fmt.prepare(w))
        self.codes = torch.zeros(w.shape[1], w.shape[0], dtype=torch.uint8, device=w.device)

    def round(self, c: int, column: Tensor) -> Tensor:
        """Column c [N] -> the nearest values [N], their codes kept."""
        group, at = divmod(c, self.step)
        code = self.fmt.encode(column[:, None], self.fitted[group], at)
        self.codes[c] = code[:, 0]
        return self.fmt.decode(code, self.fitted[group], at)[:, 0].to(column.dtype)

    def finish(self) -> QTensor:
        """All columns, once each was rounded."""
        params = self.fmt.stack([self.fitted[i] for i in range(len(self.fitted))])
        return QTensor(self.codes.T.contiguous(), params, self.fmt)


RECIPES = {
    "SparseGPT 50%": "sparsegpt(sparsity=0.5,live_damping=true)",
    "SparseGPT 60%": "sparsegpt(sparsity=0.6,live_damping=true)",
    "SparseGPT 70%": "sparsegpt(sparsity=0.7,live_damping=true)",
    "SparseGPT 80%": "sparsegpt(sparsity=0.8,live_damping=true)",
    "SparseGPT 2:4": 'sparsegpt(pattern="2:4",live_damping=true)',
    "SparseGPT 4:8": 'sparsegpt(pattern="4:8",live_damping=true)',
    "SparseGPT 50% W4": "sparsegpt(sparsity=0.5,bits=4,live_damping=true)",
    "SparseGPT 50% W3": "sparsegpt(sparsity=0.5,bits=3,live_damping=true)",
    "SparseGPT 2:4 W4": 'sparsegpt(pattern="2:4",bits=4,live_damping=true)',
}
