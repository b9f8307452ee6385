"""The truth gate: a packed model must say what its simulated twin says, but for rounding.

Both hold the same weights on the same grid, so what differs between them is the kernels' doing: a
fault is told as one, not counted as a loss of the method. How far honest rounding reaches is
measured on the twin itself, every linear's output moved by up to a unit in its last place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from backend.metrics.base import Measurement
from backend.model.quant_linear import LinearLike

if TYPE_CHECKING:
    from backend.run import Run

KIND, VERSION = "truth", 1
NAME = "kernel_kld"
SEQUENCES, LENGTH = 2, 128  # tokens of the bundled text that go through both
SLACK = 4  # times the floor: one draw of roundings is not the largest there is
LEAST = 1e-6  # nats: below this, fp32 sums over a vocabulary differ by themselves


def sample(run: Run) -> Tensor:
    """Fixed tokens [SEQUENCES, <= LENGTH]: the same for every run of a model."""
    from backend import data
    from backend.spec import Calibration

    length = min(LENGTH, run.context)
    settings = Calibration(dataset="demo", samples=SEQUENCES, length=length)
    return data.calibration(run.tokenizer, settings)[0]


class Twin:
    """What the simulated model says to the fixed tokens, and how far rounding moves that."""

    def __init__(self, run: Run) -> None:
        self.ids = sample(run)
        self.said = run.logits(self.ids)  # [B, T, V] in the compute dtype
        with rounding(run.model, step_of(run.dtype)):
            self.floor = divergence(self.said, run.logits(self.ids))

    def measure(self, packed: Run) -> Measurement:
        """How far the packed model is from it, in nats per token."""
        found = divergence(self.said, packed.logits(self.ids))
        limit = max(SLACK * self.floor, LEAST)
        detail = {"floor": self.floor, "limit": limit, "faulty": not found <= limit}
        return Measurement(NAME, found, "nats", "lower", n=self.ids.numel(), detail=detail)


def fault(measured: Measurement) -> str:
    """The sentence that a faulty kernel gets, "" where all is well."""
    if not measured.detail["faulty"]:
        return ""
    return (
        f"kernel fault: the packed model is {measured.value:.2g} nats a token from the simulated "
        f"one, and rounding explains {measured.detail['limit']:.2g}; its losses are not the "
        "method's alone"
    )


def divergence(said: Tensor, other: Tensor) -> float:
    """Mean KL(said || other) over all positions; logits [B, T, V], a sequence at a time in fp32."""
    sums = [kl_sum(p.float(), q.float()) for p, q in zip(said, other, strict=True)]
    return sum(sums) / (said.shape[0] * said.shape[1])


def kl_sum(p: Tensor, q: Tensor) -> float:
    """Sum over positions of KL(p || q) of logits [T, V]."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))


def step_of(dtype: str) -> float:
    """A unit in the last place, relative: of the compute dtype, of bf16 where that is fp32.

    Kernels take fp32 inputs in bf16.
    """
    known = getattr(torch, dtype)
    return torch.finfo(torch.bfloat16 if known == torch.float32 else known).eps


@contextmanager
def rounding(model: nn.Module, step: float) -> Iterator[None]:
    """Within it, the outputs of quantized linears are off by up to `step` of themselves."""
    source = torch.Generator().manual_seed(0)

    def moved(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        noise = torch.rand(y.shape, generator=source).mul_(2).sub_(1).to(y.device)
        return (y.float() * (1 + step * noise)).to(y.dtype)

    linears = [module for module in model.modules() if isinstance(module, LinearLike)]
    hooks = [linear.register_forward_hook(moved) for linear in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
