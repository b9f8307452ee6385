"""GPTQ: column by column, each rounding error spread over the columns still to come."""

from __future__ import annotations

from collections.abc import Iterator
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
SINGULAR = f"the Hessian is singular even at damping {MOST_DAMPING:g}"


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
    of_block: ClassVar[frozenset[str]] = frozenset({"true_sequential"})
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
        return waves_of(block) if self.true_sequential else super().waves(block)

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> QuantLinear:
        w = linear.weight.detach().float()  # [N, K]
        h = stats[Hessian].matrix.to(w.device)
        reason = why_useless(h)
        q = self.solve(w, h, stats) if not reason else None
        if q is None:
            stats.note(f"{reason or SINGULAR}; rounded to nearest instead")
            q = self.format.quantize(w)
        return QuantLinear(q, linear.bias, dtype=linear.weight.dtype)

    def solve(self, w: Tensor, h: Tensor, stats: LayerStats) -> QTensor | None:
        """w [N, K], h [K, K] -> rounded weights; None where no damping makes h invertible."""
        base = self.format.prepare(w)
        whole = {} if self.format.group else fit_all(self.format, w, base)
        w, h = w.clone(), h.clone()
        if dead := revive(w, h, self.live_damping):
            stats.note(f"{dead} of {w.shape[1]} inputs were always 0; their weights became 0")
        order = torch.arange(w.shape[1], device=w.device)
        if self.act_order:
            order = h.diagonal().argsort(descending=True, stable=True)
        factor = damped_factor(h[order][:, order], self.damping, stats)
        if factor is None:
            return None
        fitted = whole or (fit_all(self.format, w, base) if self.static_groups else {})
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


def waves_of(block: Block) -> list[list[str]]:
    """Names of a block's linears in the order in which they compute, unknown ones last."""
    names = list(block.linears())
    waves = [[name for name in wave if name in names] for wave in block.family.waves]
    rest = [name for name in names if name not in names_in(waves)]
    return [wave for wave in [*waves, rest] if wave]


def why_useless(h: Tensor) -> str:
    """Why h [K, K] says nothing about the inputs, "" where it may."""
    if not h.isfinite().all():
        return "the Hessian is not finite"
    return "" if h.diagonal().any() else "every calibration input was 0 or none came"


def fit_all(fmt: Format, w: Tensor, base: Params) -> dict[int, Params]:
    """w [N, K] in its own order -> parameters of every group."""
    groups = enumerate(fmt.groups(w.shape[1]))
    return {i: fmt.fit(w[:, start:stop], fmt.params_of(base, i)) for i, (start, stop) in groups}


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


def damped_factor(h: Tensor, damping: float, stats: LayerStats) -> Tensor | None:
    """U [K, K] of the damped h, ten times the damping after each failure; None at the end."""
    tried = damping
    while (factor := inverse_factor(h, tried)) is None:
        if tried >= MOST_DAMPING:
            return None
        tried = min(tried * 10 or 0.01, MOST_DAMPING)
    if tried > damping:
        stats.note(f"Hessian not positive definite at damping {damping:g}; used {tried:g}")
    return factor


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


class Walk:
    """Columns of w [N, K] from left to right; the error of each is spread over those to come.

    `for c, column in walk` gives each column [N] as the errors before it left it; `settle` says
    what it became. The squared `errors` [K, N] sum to trace((W - Q) H (W - Q)^T), H the damped
    Hessian with factor U.
    """

    def __init__(self, w: Tensor, factor: Tensor, block: int) -> None:
        self.rows = w.T.contiguous()  # [K, N], as of the last block's end; a column in one piece
        self.factor, self.block = factor, block
        self.errors = torch.zeros_like(self.rows)
        self.pivots = factor.diagonal().tolist()
        self.start = self.at = 0  # first column of the block, column at hand

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        k = len(self.rows)
        for start in range(0, k, self.block):
            stop = min(start + self.block, k)
            for at in range(start, stop):
                self.start, self.at = start, at
                errors, shares = self.errors[start:at].T, self.factor[start:at, at]
                yield at, torch.addmv(self.rows[at], errors, shares, alpha=-1)
            self.rows[stop:] -= self.factor[start:stop, stop:].T @ self.errors[start:stop]

    def settle(self, column: Tensor, value: Tensor) -> None:
        """The column at hand, [N] as it came, becomes `value` [N]."""
        torch.sub(column, value, out=self.errors[self.at]).div_(self.pivots[self.at])

    def ahead(self, width: int, fresh: bool) -> Tensor:
        """The next `width` columns [N, width]: now, or (not fresh) as of the last block's end."""
        span = self.rows[self.at : self.at + width]
        if fresh:
            before = slice(self.start, self.at)
            span = span - self.factor[before, self.at : self.at + width].T @ self.errors[before]
        return span.T


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
    fitted, and put there, when the sweep reaches their first column.
    """
    n, k = w.shape
    codes = torch.empty(k, n, dtype=torch.uint8, device=w.device)
    walk, step = Walk(w, factor, block), fmt.group or k
    for c, column in walk:
        group, at = divmod(place[c], step)
        if group not in fitted:
            fitted[group] = fmt.fit(walk.ahead(step, fresh), fmt.params_of(base, group))
        codes[c : c + 1] = fmt.encode(column[:, None], fitted[group], at).T
        walk.settle(column, fmt.decode(codes[c : c + 1].T, fitted[group], at)[:, 0])
    return codes.T.contiguous(), walk.errors.T


RECIPES = {
    "GPTQ W8": "gptq(bits=8,scale_dtype=float16,act_order=true,live_damping=true)",
    "GPTQ W8 g128": "gptq(bits=8,group=128,scale_dtype=float16,act_order=true,"
    "static_groups=true,live_damping=true)",
    "GPTQ W4": "gptq(bits=4,scale_dtype=float16,act_order=true,live_damping=true)",
    "GPTQ W4 g128": "gptq(bits=4,group=128,scale_dtype=float16,act_order=true,"
    "static_groups=true,live_damping=true)",
    "GPTQ W4 g128, down_proj in 8 bits": "gptq(bits=4,group=128,scale_dtype=float16,"
    "act_order=true,static_groups=true,live_damping=true,"
    "layers=[on(modules=down_proj,bits=8)])",
    "GPTQ W4 g64": "gptq(bits=4,group=64,scale_dtype=float16,act_order=true,"
    "static_groups=true,live_damping=true)",
    "GPTQ W4 g128 true sequential": "gptq(bits=4,group=128,scale_dtype=float16,act_order=true,"
    "static_groups=true,true_sequential=true,live_damping=true)",
    "GPTQ W3": "gptq(bits=3,scale_dtype=float16,act_order=true,live_damping=true)",
    "GPTQ W3 g128": "gptq(bits=3,group=128,scale_dtype=float16,act_order=true,"
    "static_groups=true,live_damping=true)",
    "GPTQ W3 g1024": "gptq(bits=3,group=1024,scale_dtype=float16,act_order=true,"
    "static_groups=true,live_damping=true)",
    **{
        f"GPTQ W2 g{group}": f"gptq(bits=2,group={group},scale_dtype=float16,act_order=true,"
        "static_groups=true,live_damping=true)"
        for group in (128, 64, 32)
    },
    **{
        f"GPTQ W{bits} (no act order)": f"gptq(bits={bits},scale_dtype=float16,live_damping=true)"
        for bits in (4, 3)
    },
}
