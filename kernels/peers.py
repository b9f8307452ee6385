"""Products that PyTorch itself offers for low bits on a GPU, timed beside ours in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.base import Case

GROUP = 128


Held = tuple[Tensor, ...]


@dataclass(frozen=True)
class Peer:
    """One product of somebody else's, on its own rounding of the same weights."""

    name: str
    held: Held  # its weights
    product: Callable[[Tensor, Held], Tensor]
    exact: Callable[[Tensor], Tensor]  # what it should be, in fp32

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return sum(t.numel() * t.element_size() for t in self.held)

    @staticmethod
    def clone(held: Held) -> Held:
        """The same weights in memory of their own."""
        return tuple(t.clone() for t in held)

    def error(self, x: Tensor) -> float:
        """max |y - exact| / max |exact|."""
        y, exact = self.product(x, self.held).float(), self.exact(x)
        return float((y - exact).abs().max() / exact.abs().max())


def peers(case: Case, w: Tensor, device: torch.device) -> Iterator[Peer]:
    """Those of the width of a case; w [n, k] bf16. None on the CPU: our op is PyTorch's there."""
    if device.type != "cuda" or case.weight["kind"] not in ("int", "minifloat"):
        return
    bits = case.weight.get("bits")
    for wanted, make in (
        (case.weight["kind"] == "int" and bits == 4 and case.act is None, tinygemm),
        (case.weight["kind"] == "int" and bits == 8 and case.act is not None, int_mm),
        (case.weight["kind"] == "minifloat" and case.act is not None, scaled_mm),
    ):
        peer = made(make, case, w) if wanted else None
        if peer is not None:
            yield peer


def made(make: Callable[[Case, Tensor], Peer], case: Case, w: Tensor) -> Peer | None:
    """A peer, or None where this build or this card has none or refuses the shape."""
    try:
        peer = make(case, w)
        x = torch.zeros(case.m, case.k, device=w.device, dtype=torch.bfloat16)
        peer.product(x, peer.held)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    return peer


def tinygemm(case: Case, w: Tensor) -> Peer:
    """`_weight_int4pack_mm`, 4 bits in groups."""
    groups = w.float().unflatten(1, (-1, GROUP))  # [n, G, g]
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-6)
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    offset = low + 8 * scale  # its codes count from 8
    w_hat = ((codes - 8) * scale[..., None] + offset[..., None]).flatten(1)
    both = torch.stack([scale, offset], -1).transpose(0, 1).contiguous().bfloat16()  # [G, n, 2]
    pairs = codes.flatten(1).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs[:, ::2] << 4 | pairs[:, 1::2], 8)
    return Peer(
        "torch int4pack",
        (packed, both),
        lambda x, held: torch.ops.aten._weight_int4pack_mm(x, held[0], GROUP, held[1]),
        lambda x: x.float() @ w_hat.T,
    )


def rowwise(x: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """x [m, k] over its scale, and the scale [m, 1] fp32."""
    scale = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / top
    return x.float() / scale, scale


def int_mm(case: Case, w: Tensor) -> Peer:
    """`_int_mm` with quantization per token and rescaling in torch."""
    q, scale = rowwise(w, 127)
    codes = q.round().to(torch.int8)

    def product(x: Tensor, held: Held) -> Tensor:
        a, a_scale = rowwise(x, 127)
        sums: Tensor = torch._int_mm(a.round().to(torch.int8), held[0].T)
        return (sums * a_scale * held[1].T).to(x.dtype)

    def exact(x: Tensor) -> Tensor:
        a, a_scale = rowwise(x, 127)
        return (a.round() * a_scale) @ (codes.float() * scale).T

    return Peer("torch int_mm", (codes, scale), product, exact)


def scaled_mm(case: Case, w: Tensor) -> Peer:
    """`_scaled_mm` in e4m3 with a scale per row, quantization included."""
    kind: Any = torch.float8_e4m3fn
    q, scale = rowwise(w, 448)
    codes = q.to(kind)

    def product(x: Tensor, held: Held) -> Tensor:
        a, a_scale = rowwise(x, 448)
        return torch._scaled_mm(
            a.to(kind), held[0].T, scale_a=a_scale, scale_b=held[1].T, out_dtype=torch.bfloat16
        )

    def exact(x: Tensor) -> Tensor:
        a, a_scale = rowwise(x, 448)
        return (a.to(kind).float() * a_scale) @ (codes.float() * scale).T

    return Peer("torch scaled_mm", (codes, scale), product, exact)
