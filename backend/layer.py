"""quantize_layer: one step on one weight, for tests, notebooks and the Learn page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backend.methods import METHODS, Method, Seen
from backend.model.families import Block, Family
from backend.model.quant_linear import PLAIN_BITS, LinearLike
from backend.model.stats import LayerStats, gather_layer

NAME = "linear"
ALONE = Family(layers="", embed=(), head="", norm_feeds=(), waves=((NAME,),))


@dataclass(frozen=True)
class QuantizedLayer:
    """What a step made of one linear; called with x [..., K] it gives [..., N]."""

    module: nn.Module
    notes: list[str] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        """[N, K] fp32, what the layer now multiplies by."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().float()

    @property
    def bits(self) -> dict[str, float]:
        """Bits per weight: codes, scales, zeros, outliers, index."""
        return self.module.bits() if isinstance(self.module, LinearLike) else dict(PLAIN_BITS)

    @property
    def bits_per_weight(self) -> float:
        """Sum of `bits`."""
        return sum(self.bits.values())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x)
        return result


@torch.no_grad()
def quantize_layer(
    step: Mapping[str, Any] | Method, weight: Tensor, inputs: Tensor | None = None, *, seed: int = 0
) -> QuantizedLayer:
    """One step on one linear without bias.

    weight [N, K]; inputs [T, K], or [B, T, K] for B sequences, None for methods that look at no
    data. The caller's tensors stay as they are.
    """
    method = step if isinstance(step, Method) else METHODS.build(step)
    check_shapes(method, weight, inputs)
    block = Block(0, nn.ModuleDict({NAME: linear_of(weight)}), ALONE)
    notes: list[str] = []
    for wave in method.waves(block):
        stats = LayerStats(note=notes.append)
        if inputs is not None:
            stats = gather_layer(method.wanted(), [inputs], weight.shape[1], notes.append)
        seen = Seen(dict.fromkeys(wave, stats), note=lambda text, _: notes.append(text), seed=seed)
        method.apply(block, seen)
    return QuantizedLayer(block.get(NAME), notes)


def check_shapes(method: Method, weight: Tensor, inputs: Tensor | None) -> None:
    """ValueError unless weight is [N, K] and inputs end in K."""
    if weight.dim() != 2:
        raise ValueError(f"{method.kind}: weight must be [N, K], got shape {list(weight.shape)}")
    if inputs is not None and (inputs.dim() not in (2, 3) or inputs.shape[-1] != weight.shape[1]):
        raise ValueError(
            f"{method.kind}: inputs must be [T, {weight.shape[1]}] or [B, T, {weight.shape[1]}], "
            f"got shape {list(inputs.shape)}"
        )


def linear_of(weight: Tensor) -> nn.Linear:
    """An nn.Linear without bias that multiplies by a copy of weight [N, K]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return linear
