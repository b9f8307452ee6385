"""Integer weights kept in 2, 4 or 8 bits and expanded to 16 bits for every product, on a GPU.

It saves memory, not time: the expanded weights are written and read again. Its numbers are those
of the simulated model, bit for bit, because W_hat is computed in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kernels.base import Case, Json, Packed
from kernels.integers import (
    dequantized,
    int_format,
    random_weight,
    refuse,
    rounded_activations,
)

WIDTHS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # bits of a code -> bits of its field


class IntDequant:
    """y = act(x) W_hat^T with W_hat expanded in x's dtype."""

    name = "int_dequant"
    rank = 90
    cases = (
        Case(1, 64, 64, int_format(bits=4, group=32)),
        Case(3, 33, 50, int_format(bits=3, group=16, symmetric=True)),
        Case(7, 20, 65, int_format(bits=2)),
        Case(2, 9, 31, int_format(bits=8, symmetric=True), int_format(bits=8, symmetric=True)),
        Case(5, 16, 40, int_format(bits=6, per_tensor=True)),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if device.type != "cuda":
            return "on the CPU it would be slower than 16 bits by an order of magnitude"
        return refuse(weight, act)

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        per_byte = 8 // WIDTHS[weight["bits"]]
        n, k = codes.shape
        fields = functional.pad(codes, (0, -k % per_byte)).view(n, -1, per_byte)
        packed = torch.zeros_like(fields[..., 0])  # [n, bytes]
        for i in range(per_byte):
            packed |= fields[..., i] << (i * WIDTHS[weight["bits"]])
        return Packed({"codes": packed.contiguous(), **params}, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        x = x if packed.act is None else rounded_activations(x, packed.act).to(x.dtype)
        return functional.linear(x, dense(packed).to(x.dtype))

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        return rounded_activations(x, packed.act) @ dense(packed).T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return random_weight(case, generator)

    def container(self, weight: Json) -> str:
        width = WIDTHS[weight["bits"]]
        if weight["bits"] == width:
            return ""
        return f"{weight['bits']}-bit codes are kept in {width}-bit fields, which fill bytes evenly"


def dense(packed: Packed) -> Tensor:
    """W_hat [n, k] fp32."""
    width = WIDTHS[packed.weight["bits"]]
    held = packed.tensors["codes"]
    fields = [(held >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    codes = torch.stack(fields, -1).flatten(1)[:, : packed.k]
    params = {name: t for name, t in packed.tensors.items() if name != "codes"}
    return dequantized(codes, params, packed.weight)


KERNEL = IntDequant()
