"""GPTQ: column by column, each rounding error spread over the columns still to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from backend.formats import Format, FormatField, QTensor
from backend.formats.base import Params
from backend.formats.int_group import IntGroup
from backend.methods import METHODS
from backend.methods.base import LinearMethod, Target, names_in
from backend.model.quant_linear import QuantLinear
from backend.model.stats import Hessian, LayerStats

if TYPE_CHECKING:
    from backend.model.families import Block

MOST_DAMPING = 1.0


@METHODS.register
class GPTQ(LinearMethod):
    """Round column by column and let later columns make up for each error, guided by inputs.

    Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", algorithm 1; act order and static groups as in the released code. The defaults
    give that code's numbers; `fresh_groups` and `live_damping` repair two of its traits.
    """

    kind: ClassVar[str] = "gptq"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights"})
    needs: ClassVar = (Hessian,)
    format: FormatField = Field(IntGroup(), description="The grid that weights are rounded to.")
    act_order: bool = Field(
        False, description="Round the input channels with the largest activations first."
    )
    static_groups: bool = Field(
        False,
        description="Fit all groups before the first rounding, on the original weights; with act "
        "order a group then stays a run of neighbours and no index is stored.",
    )
    block: int = Field(
        128, ge=1, le=4096, description="Columns rounded before the rest is updated at once."
    )
    damping: float = Field(
        0.01, ge=0, le=1, description="Share of the Hessian's mean diagonal added to its diagonal."
    )
    true_sequential: bool = Field(
        False,
        description="Within a block, show each linear inputs that carry the errors of those "
        "before it; four passes instead of one.",
    )
    fresh_groups: bool = Field(
        False,
        description="Fit a group on fully updated weights; off: as of the last block's end.",
    )
    live_damping: bool = Field(
        False,
        description="Average the diagonal over inputs that are not always 0; off: over all, the "
        "dead ones counting as 1.",
    )

    def waves(self, block: Block) -> list[list[str]]:
        """All at once, or the block's own order with true_sequential."""
        names = list(block.linears())
        if not self.true_sequential:
            return [names]
        waves = [[name for name in wave if name in names] for wave in block.family.waves]
        rest = [name for name in names if name not in names_in(waves)]
        return [wave for wave in [*waves, rest] if wave]

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> QuantLinear:
        w = linear.weight.detach().float()  # [N, K]
        h, reason = stats[Hessian].matrix.to(w.device), ""
        if not h.isfinite().all():
            reason = "the Hessian is not finite"
        elif not h.diagonal().any():
            reason = "every calibration input was 0 or none came"
        q = self.solve(w, h, stats) if not reason else None
        if q is None:
            reason = reason or f"the Hessian is singular even at damping {MOST_DAMPING:g}"
            stats.note(f"{reason}; rounded to nearest instead")
            q = self.format.quantize(w)
        return QuantLinear(q, linear.bias, dtype=linear.weight.dtype)

    def solve(self, w: Tensor, h: Tensor, stats: LayerStats) -> QTensor | None:
        """w [N, K], h [K, K] -> rounded weights; None where no damping makes h invertible."""
        base = self.format.prepare(w)
        whole = {} if self.format.group else self.fit_all(w, base)
        w, h = w.clone(), h.clone()
        if dead := revive(w, h, self.live_damping):
            stats.note(f"{dead} of {w.shape[1]} inputs were always 0; their weights became 0")
        order = torch.arange(w.shape[1], device=w.device)
        if self.act_order:
            order = h.diagonal().argsort(descending=True, stable=True)
        factor = self.damped_factor(h[order][:, order], stats)
        if factor is None:
            return None
        fitted = whole or (self.fit_all(w, base) if self.static_groups else {})
        place = order.tolist() if fitted else list(range(len(order)))
        codes, _ = sweep(
            w[:, order],
            factor,
            self.format,
            base,
            fitted,
            place=place,
            block=self.block,
            fresh=self.fresh_groups,
        )
        return self.assemble(codes, fitted, order, place)

    def damped_factor(self, h: Tensor, stats: LayerStats) -> Tensor | None:
        """U [K, K] of the damped h, ten times the damping after each failure; None at the end."""
        damping = self.damping
        while (factor := inverse_factor(h, damping)) is None:
            if damping >= MOST_DAMPING:
                return None
            damping = min(damping * 10 or 0.01, MOST_DAMPING)
        if damping > self.damping:
            stats.note(
                f"Hessian not positive definite at damping {self.damping:g}; used {damping:g}"
            )
        return factor

    def fit_all(self, w: Tensor, base: Params) -> dict[int, Params]:
        """w [N, K] in its own order -> parameters of every group."""
        groups = enumerate(self.format.groups(w.shape[1]))
        return {
            i: self.format.fit(w[:, start:stop], self.format.params_of(base, i))
            for i, (start, stop) in groups
        }

    def assemble(
        self, codes: Tensor, fitted: dict[int, Params], order: Tensor, place: list[int]
    ) -> QTensor:
        """Codes [N, K] in rounding order -> a QTensor with the columns where they were."""
        back = order.argsort()
        index = None
        if self.act_order and len(fitted) > 1 and not self.static_groups:
            group = torch.tensor(place, device=order.device) // self.format.group
            index = group[back].to(torch.int32)
        params = self.format.stack([fitted[i] for i in range(len(fitted))])
        return QTensor(codes[:, back], params, self.format, column_group=index)


def revive(w: Tensor, h: Tensor, live: bool) -> int:
    """Inputs that were always 0: their weights [N, K] become 0, their diagonal of h 1, in place.

    With `live` their diagonal is the mean of the others, so that they leave the damping alone:
    where activations are small, ones would raise it until GPTQ is no better than rounding.
    """
    diagonal = h.diagonal()  # [K], a view
    dead = diagonal == 0
    diagonal[dead] = diagonal[~dead].mean() if live else 1
    w[:, dead] = 0
    return int(dead.sum())


def inverse_factor(h: Tensor, damping: float) -> Tensor | None:
    """h [K, K] -> upper U with U^T U = (h + damping mean(diag h) I)^-1; None if it has none.

    From the Cholesky factor of h read backwards, which spares the explicit inverse: with
    h = M M^T, M upper, U is M^-1.
    """
    damped = h.flip(0, 1)
    damped.diagonal().add_(damping * h.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    factor = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
    return factor.contiguous() if factor.isfinite().all() else None


def sweep(
    w: Tensor,
    factor: Tensor,
    fmt: Format,
    base: Params,
    fitted: dict[int, Params],
    *,
    place: list[int],
    block: int,
    fresh: bool,
) -> tuple[Tensor, Tensor]:
    """Round the columns of w [N, K] from left to right -> codes [N, K], scaled errors [N, K].

    `place[c]` is the column that c stands for among the groups; groups missing from `fitted` are
    fitted, and put there, when the sweep reaches their first column. The squared errors sum to
    trace((W - Q) H (W - Q)^T), H the damped Hessian.
    """
    n, k = w.shape
    rows = w.T.contiguous()  # [K, N], as of the last block's end; a column lies in one piece
    codes = torch.empty(k, n, dtype=torch.uint8, device=w.device)
    errors = torch.zeros_like(rows)
    pivots = factor.diagonal().tolist()
    step = fmt.group or k
    for start in range(0, k, block):
        stop = min(start + block, k)
        for c in range(start, stop):
            group, at = divmod(place[c], step)
            if group not in fitted:
                span = rows[c : c + step]  # [g, N]
                if fresh:
                    span = span - factor[start:c, c : c + step].T @ errors[start:c]
                fitted[group] = fmt.fit(span.T, fmt.params_of(base, group))
            column = torch.addmv(rows[c], errors[start:c].T, factor[start:c, c], alpha=-1)  # [N]
            codes[c : c + 1] = fmt.encode(column[:, None], fitted[group], at).T
            value = fmt.decode(codes[c : c + 1].T, fitted[group], at)[:, 0]
            torch.sub(column, value, out=errors[c]).div_(pivots[c])
        rows[stop:] -= factor[start:stop, stop:].T @ errors[start:stop]
    return codes.T.contiguous(), errors.T


RECIPES = {
    "GPTQ W8": "gptq(bits=8,scale_dtype=float16,act_order=true,live_damping=true)",
    "GPTQ W8 g128": "gptq(bits=8,group=128,scale_dtype=float16,act_order=true,"
    "static_groups=true,live_damping=true)",
    "GPTQ W4": "gptq(bits=4,scale_dtype=float16,act_order=true,live_damping=true)",
    "GPTQ W4 g128": "gptq(bits=4,group=128,scale_dtype=float16,act_order=true,"
    "static_groups=true,live_damping=true)",
    "GPTQ W4 g64": "gptq(bits=4,group=64,scale_dtype=float16,act_order=true,"
    "static_groups=true,live_damping=true)",
    "GPTQ W4 g128 true sequential": "gptq(bits=4,group=128,scale_dtype=float16,act_order=true,"
    "static_groups=true,true_sequential=true,live_damping=true)",
    "GPTQ W3": "gptq(bits=3,scale_dtype=float16,act_order=true,live_damping=true)",
    "GPTQ W3 g128": "gptq(bits=3,group=128,scale_dtype=float16,act_order=true,"
    "static_groups=true,live_damping=true)",
    "GPTQ W2 g64": "gptq(bits=2,group=64,scale_dtype=float16,act_order=true,"
    "static_groups=true,live_damping=true)",
}
