"""Low-bit products of PyTorch and bitsandbytes on a GPU, timed beside ours in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.base import Case
from kernels.contest import relative_error
from kernels.timing import captured

GROUP = 128

Held = tuple[Any, ...]  # tensors, or objects of the library that hold some


@dataclass(frozen=True)
class Peer:
    """One product of somebody else's, on its own rounding of the same weights."""

    name: str
    held: Held  # its weights
    product: Callable[[Tensor, Held], Tensor]
    exact: Callable[[Tensor], Tensor]  # what it should be, in fp32
    bytes: int  # of its weights

    @staticmethod
    def clone(held: Held) -> Held:
        """The same weights in memory of their own."""
        return deepcopy(held)

    def error(self, x: Tensor) -> float:
        """max |y - exact| / max |exact|."""
        return relative_error(self.product(x, self.held), self.exact(x))


def peers(case: Case, w: Tensor, device: torch.device) -> Iterator[Peer]:
    """Those of the width of a case; w [n, k] bf16. None on the CPU: our op is PyTorch's there."""
    for make in makers(case) if device.type == "cuda" else ():
        peer = made(make, case, w)
        if peer is not None:
            yield peer


def makers(case: Case) -> tuple[Callable[[Case, Tensor], Peer], ...]:
    """What makes the peers of a format."""
    kind, bits, rounded = case.weight["kind"], case.weight.get("bits"), case.act is not None
    return {
        ("int", 4, False): (tinygemm,),
        ("int", 8, True): (int_mm, bnb_int8),
        ("minifloat", bits, True): (scaled_mm,),
        ("codebook", bits, False): (bnb_4bit,),
        ("llm_int8", bits, False): (bnb_int8,),
    }.get((kind, bits, rounded), ())


def made(make: Callable[[Case, Tensor], Peer], case: Case, w: Tensor) -> Peer | None:
    """A peer; None where there is no such build or library, or it refuses the card or the shape.

    One that no graph can hold could not be timed as the others are.
    """
    try:
        peer = make(case, w)
        x = torch.zeros(case.m, case.k, device=w.device, dtype=torch.bfloat16)
        peer.product(x, peer.held)
        if w.is_cuda:
            captured(lambda number: peer.product(x, peer.held), 1)
    except (ImportError, RuntimeError, ValueError, AttributeError):
        return None
    return peer


def nbytes(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.nbytes for t in tensors)


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
        nbytes(packed, both),
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

    return Peer("torch int_mm", (codes, scale), product, exact, nbytes(codes, scale))


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

    return Peer("torch scaled_mm", (codes, scale), product, exact, nbytes(codes, scale))


def bnb_4bit(case: Case, w: Tensor) -> Peer:
    """bitsandbytes' NF4 or FP4 in its own blocks."""
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(
        w,
        blocksize=case.weight["group"],
        compress_statistics=case.weight["double_quant"],
        quant_type=case.weight["table"],
    )
    w_hat = bitsandbytes.functional.dequantize_4bit(packed, state).float()
    scales = (state.absmax, *((state.state2.absmax, state.state2.code) if state.nested else ()))
    return Peer(
        "bitsandbytes",
        (packed, state),
        lambda x, held: bitsandbytes.matmul_4bit(x, held[0].t(), held[1]),
        lambda x: x.float() @ w_hat.T,
        nbytes(packed, *scales),
    )


def bnb_int8(case: Case, w: Tensor) -> Peer:
    """LLM.int8() of bitsandbytes without outliers: it looks for them in every call, on the host.

    It takes and gives fp16, and casts bf16 itself, with a warning each time.
    """
    import bitsandbytes

    state = bitsandbytes.MatmulLtState()
    state.has_fp16_weights = state.is_training = False
    codes, peak, _ = bitsandbytes.functional.int8_vectorwise_quant(w.half())
    state.CB, state.SCB = codes, peak  # [n, k] int8, [n] fp32

    def exact(x: Tensor) -> Tensor:
        a, a_scale = rowwise(x.half(), 127)
        return (a.round() * a_scale) @ (codes.float() * peak[:, None] / 127).T

    return Peer(
        "bitsandbytes, no outliers",
        (state,),
        lambda x, held: bitsandbytes.matmul(x.half(), held[0].CB, state=held[0]).to(x.dtype),
        exact,
        nbytes(codes, peak),
    )
