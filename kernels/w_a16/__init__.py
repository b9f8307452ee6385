"""Integer weights of 2-8 bits times 16-bit inputs on a GPU, expanded in registers.

x may be on an integer grid too: it is rounded to it and multiplied in 16 bits. Many rows of x take
W_hat expanded once into memory that all products share, and the product of PyTorch: beyond
about 200 rows arithmetic takes longer than reading weights, and expanding them costs little.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kernels import ops
from kernels.base import Case, Json, Packed
from kernels.integers import int_format, random_weight, refuse, rounded_activations, zeros
from kernels.w_a16 import cpu
from kernels.w_a16.layout import FIELDS, PLANES, pack_planes, plane_of
from kernels.workspace import WORKSPACES

FIELD_BITS = {
    2: 2,
    3: 3,
    4: 4,
    5: 8,
    6: 8,
    7: 8,
    8: 8,
}  # bits of a code -> bits of its field
ROWS_AT_ONCE = 192  # rows of x above which W_hat is expanded once


class WA16:
    """y = act(x) W_hat^T, W_hat in 2-8 bit integer codes."""

    name = "w_a16"
    rank = 30
    reads = ("int",)
    devices = ("cuda",)
    cases = (
        Case(1, 64, 512, int_format(bits=4, group=128, scale_dtype="float16")),
        Case(1, 70, 300, int_format(bits=3, group=64)),
        Case(3, 33, 130, int_format(bits=2, group=16, symmetric=True)),
        Case(5, 190, 144, int_format(bits=8, symmetric=True)),
        Case(17, 65, 100, int_format(bits=4, group=48, symmetric=True)),
        Case(2, 96, 31, int_format(bits=5, per_tensor=True)),
        Case(2, 20, 65, int_format(bits=4, group=32), int_format(bits=8, symmetric=True)),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if device.type != "cuda":
            return "on the CPU it would be slower than 16 bits by an order of magnitude"
        if reason := refuse(weight, act):
            return reason
        if not plane_of(FIELD_BITS[weight["bits"]], weight["group"], k):
            return f"its groups are multiples of {PLANES[-1]} channels, not {weight['group']}"
        return None

    def pack(
        self,
        codes: Tensor,
        params: Mapping[str, Tensor],
        weight: Json,
        act: Json | None,
    ) -> Packed:
        """words as in layout.py; scales as stored and zeros fp16 [G, n], padded to whole tiles."""
        n, k = codes.shape
        bits = FIELD_BITS[weight["bits"]]
        plane = plane_of(bits, weight["group"], k)
        words = pack_planes(codes, bits, plane)
        groups = 1
        if weight["group"]:
            groups = -(-words.shape[1] * FIELDS[bits] * plane // weight["group"])
        padded = (groups, words.shape[0] * words.shape[3])
        tensors = {"words": words, "scales": laid_out(params["scale"], n, padded)}
        if "zero" in params or bits != weight["bits"]:
            zero = zeros(params, weight).to(torch.float16)  # whole numbers to 255: exact
            tensors["zeros"] = laid_out(zero, n, padded)
        return Packed(tensors, n, k, weight, act)

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return random_weight(case, generator)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        if packed.act is not None:
            x = rounded_activations(x, packed.act).to(x.dtype)
        held, n, _, bits, group = arguments(packed)
        return OP(x.contiguous(), *held, bits, n, group)

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        held, n, k, bits, group = arguments(packed)
        return rounded_activations(x, packed.act) @ cpu.dense(*held, bits, n, k, group).T

    def container(self, weight: Json) -> str:
        width = FIELD_BITS[weight["bits"]]
        if weight["bits"] == width:
            return ""
        return f"{weight['bits']}-bit codes are kept in {width}-bit fields, which fill words evenly"


def laid_out(values: Tensor, n: int, padded: tuple[int, int]) -> Tensor:
    """values [n, G], [n, 1] or [1, 1] -> [groups padded, n padded], 0 where there is no weight."""
    shape = values.expand(n, -1).T
    return functional.pad(shape, (0, padded[1] - n, 0, padded[0] - shape.shape[0])).contiguous()


def arguments(
    packed: Packed,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], int, int, int, int]:
    """words, scales and zeros; n, k, bits of a field, input channels per group (0: all)."""
    held = packed.tensors
    bits = FIELD_BITS[packed.weight["bits"]]
    tensors = held["words"], held["scales"], held.get("zeros")
    return tensors, packed.n, packed.k, bits, packed.weight["group"]


def on_gpu(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    n: int,
    group: int,
) -> Tensor:
    """Few rows of x: expanded in registers. Many, or 32-bit x: expanded in memory."""
    from kernels.w_a16 import kernel

    m, k = x.shape
    if m <= ROWS_AT_ONCE and x.dtype != torch.float32:
        return kernel.product(x, words, scales, zeros, bits, n, group)
    w = WORKSPACES.take("expanded", n * k, x.dtype, x.device).view(n, k)
    return functional.linear(x, kernel.expand(words, scales, zeros, bits, group, w))


def fake(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    n: int,
    group: int,
) -> Tensor:
    """[m, n] like x."""
    return x.new_empty(x.shape[0], n)


OP = ops.register(
    "w_a16(Tensor x, Tensor words, Tensor scales, Tensor? zeros, int bits, int n, int group)"
    " -> Tensor",
    cpu=cpu.product,
    cuda=on_gpu,
    fake=fake,
)


KERNEL = WA16()
