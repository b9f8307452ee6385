"""Steps on one small matrix, opened up: what the Learn page shows beside the numbers themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backend.formats import Format, QTensor
from backend.methods.base import Method, Seen
from backend.methods.gptq import GPTQ, damped_factor, revive
from backend.metrics.base import Measurement
from backend.model.families import Block, Family, NormFeed
from backend.model.quant_linear import PLAIN_BITS, LinearLike
from backend.model.stats import Hessian, LayerStats, gather_layer

NORM, LINEAR = "norm", "linear"
SMALL = Family(
    layers="", embed=(), head="", norm_feeds=(NormFeed(NORM, (LINEAR,)),), waves=((LINEAR,),)
)


class Gain(nn.Module):
    """What stands for a norm: multiplies each channel, at first by 1."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(k), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., K]."""
        return x * self.weight


class SmallBlock(nn.Module):
    """A gain and a linear that reads it: the least block that can carry a scale."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.norm = Gain(w.shape[1])
        self.linear: nn.Module = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        self.linear.weight = nn.Parameter(w.clone(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., K] -> [..., N]."""
        y: Tensor = self.linear(self.norm(hidden))
        return y


@dataclass(frozen=True)
class Rounded:
    """What steps made of W [N, K] behind a gain, and of its inputs x [T, K]."""

    weight: Tensor  # [N, K] what x is multiplied by in the end
    output: Tensor  # [T, N]
    scale: Tensor  # [K] what the inputs were divided by, 1 where nothing moved
    qtensor: QTensor | None
    inputs: Tensor | None  # [T, K] x as it was rounded, the scale taken out again; None: as it is
    bits: Mapping[str, float]
    notes: tuple[str, ...]
    measured: tuple[Measurement, ...]  # what the methods found on the way


@torch.no_grad()
def rounded(steps: Sequence[Method], w: Tensor, x: Tensor) -> Rounded:
    """Every step on a small block whose linear is W [N, K] and whose calibration data is x [T, K].

    Unlike the lone linear of `backend.layer.quantize_layer`, it can carry a scale (AWQ).
    """
    notes: list[str] = []
    found: list[Measurement] = []
    block = Block(0, SmallBlock(w), SMALL)
    for step in steps:
        rewrite(block, step, x, notes.append, found.append)
    norm, linear = block.get(NORM), block.get(LINEAR)
    gain = norm.get_parameter("weight")
    return Rounded(
        weight=linear.weight.detach().float() * gain,  # type: ignore[operator]
        output=block.module(x[None])[0].float(),
        scale=1 / gain.detach(),
        qtensor=getattr(linear, "qtensor", None),
        inputs=inputs_of(linear, norm(x), gain),
        bits=linear.bits() if isinstance(linear, LinearLike) else dict(PLAIN_BITS),
        notes=tuple(dict.fromkeys(notes)),
        measured=tuple(found),
    )


def rewrite(
    block: Block,
    step: Method,
    x: Tensor,
    note: Callable[[str], None],
    measure: Callable[[Measurement], None],
) -> None:
    """One step on the small block, as `backend.layer.quantize_layer` does it for a lone linear.

    Its inputs x [T, K] are calibration data too, and reach the linear through the gain.
    """
    for wave in step.waves(block):
        inside = block.get(NORM)(x)  # [T, K], by earlier steps and waves divided by their scales
        stats = gather_layer(step.wanted(), [inside[None]], x.shape[1], note)
        seen = Seen(
            dict.fromkeys(wave, stats),
            lambda: iter([(x[None], {})]),
            note=lambda text, _: note(text),
            measure=measure,
        )
        step.apply(block, seen)


def inputs_of(linear: nn.Module, x: Tensor, gain: Tensor) -> Tensor | None:
    """What a linear makes of its inputs [T, K] before it multiplies; None if it keeps them."""
    act: Format | None = getattr(linear, "act", None)
    if act is None:
        return None
    params = getattr(linear, "act_params", None)
    return (act.fake(x) if params is None else act.fake_static(x, params)) / gain


@dataclass(frozen=True)
class Walk:
    """GPTQ's columns in the order it takes them."""

    order: list[int]  # column of W at each step
    factor: Tensor  # [K, K] U, in that order
    errors: Tensor  # [N, K] (w - q) / U_cc, in that order
    start: Tensor  # [N, K] W in that order, dead columns 0
    rounded: Tensor  # [N, K] the result in that order

    def before(self, step: int) -> Tensor:
        """[N, K] in that order: the first `step` columns rounded, the others made up for it."""
        rest = self.start - self.errors[:, :step] @ self.factor[:step]
        return torch.cat([self.rounded[:, :step], rest[:, step:]], 1)


@torch.no_grad()
def gptq_walk(method: Method, w: Tensor, x: Tensor, result: Tensor) -> Walk | None:
    """How `gptq` came from w [N, K] and x [T, K] to its result [N, K].

    None for other methods, and where no damping makes the Hessian invertible.
    """
    if not isinstance(method, GPTQ):
        return None
    w, hessian = w.clone(), Hessian(w.shape[1])
    hessian.update(x[None])
    h = hessian.matrix
    revive(w, h, method.live_damping)
    order = torch.arange(w.shape[1])
    if method.act_order:
        order = h.diagonal().argsort(descending=True, stable=True)
    factor = damped_factor(h[order][:, order], method.damping, LayerStats())
    if factor is None:
        return None
    start, result = w[:, order], result[:, order]
    errors = torch.zeros_like(start)
    for c in range(start.shape[1]):
        column = start[:, c] - errors[:, :c] @ factor[:c, c]
        errors[:, c] = (column - result[:, c]) / factor[c, c]
    return Walk(order.tolist(), factor, errors, start, result)
