"""Integer weights and integer activations, scaled per token as they come, multiplied in int8.

Sums are exact 32-bit integers; one scale per row and one per token apply to them at the end. On a
GPU up to a few tokens are rounded inside the product, more of them in one launch before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels import ops
from kernels.base import Case, Json, Packed
from kernels.integers import int_format, random_weight, refuse, rounded_activations, zeros
from kernels.quantize import Grid, int_rows_reference
from kernels.w8_a8.layout import padded

W8, A8 = int_format(bits=8, symmetric=True), int_format(bits=8, symmetric=True)


class W8A8:
    """y = act(x) W_hat^T, both in 2-8 bit integer codes, each code a byte."""

    name = "w8_a8"
    rank = 20  # on a CPU, after oneDNN's product of bytes
    reads = ("int",)
    devices = ("cuda", "cpu")
    cases = (
        Case(1, 64, 64, W8, A8),
        Case(5, 33, 65, W8, A8),
        Case(40, 7, 100, int_format(bits=8), A8),
        Case(3, 48, 96, int_format(bits=4), int_format(bits=8)),
        Case(17, 50, 128, int_format(bits=4, symmetric=True), int_format(bits=6)),
        Case(9, 32, 64, int_format(bits=8, per_tensor=True, symmetric=True), A8),
        Case(4, 16, 48, W8, int_format(bits=8, symmetric=True, per_tensor=True)),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if reason := refuse(weight, act):
            return reason
        if act is None:
            return "it needs activations in integers too"
        if weight["group"]:
            return f"it has one scale per row of weights, not per {weight['group']} channels"
        if k * reach(weight) * reach(act) >= 2**31:
            return f"sums over {k} input channels could overflow 32 bits"
        return None

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        """codes [n, width] int8 around the middle; scale [n]; shift, sums [n] int32 where needed.

        w = (code + shift) scale, shift = middle - zero; sums are those of code + shift.
        """
        assert act is not None
        n, k = codes.shape
        middle = 2 ** (weight["bits"] - 1)
        q = codes.to(torch.int16) - middle  # [n, k]
        scale = params["scale"].float().expand(n, 1).flatten().contiguous()
        tensors = {"codes": padded(q.to(torch.int8)), "scale": scale}
        shift = torch.zeros(n, dtype=torch.int32, device=codes.device)
        if "zero" in params:
            shift = (middle - zeros(params, weight).expand(n, 1).flatten()).to(torch.int32)
            tensors["shift"] = shift
        if not act["symmetric"]:
            tensors["sums"] = q.sum(1, dtype=torch.int32) + k * shift
        return Packed(tensors, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        act, held = packed.act, packed.tensors
        assert act is not None
        y: Tensor = OP(
            x,
            held["codes"],
            held["scale"],
            held.get("shift"),
            held.get("sums"),
            *Grid.of(act),
        )
        return y

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        held = packed.tensors
        w = held["codes"][:, : packed.k].float()
        if "shift" in held:
            w = w + held["shift"][:, None]
        return rounded_activations(x, packed.act) @ (w * held["scale"][:, None]).T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return random_weight(case, generator)

    def container(self, weight: Json) -> str:
        if weight["bits"] == 8:
            return ""
        return f"{weight['bits']}-bit codes are kept in bytes, as int8 products read them"


def reach(form: Json) -> int:
    """The largest magnitude of a code less its zero."""
    return int(2 ** (form["bits"] - 1) if form["symmetric"] else 2 ** form["bits"] - 1)


def _cpu(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    sums: Tensor | None,
    *grid: Any,
) -> Tensor:
    """The same sums, by PyTorch's product of int8 matrices."""
    a, a_scale, offsets = int_rows_reference(x, codes.shape[1], Grid(*grid))
    total = torch._int_mm(a, codes.T)  # [m, n] int32
    if shift is not None:
        total.addcmul_(offsets[:, 1:], shift)
    if sums is not None:
        total.addcmul_(offsets[:, :1], sums)
    return (total.float() * a_scale[:, None] * scale).to(x.dtype)


def _cuda(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    sums: Tensor | None,
    *grid: Any,
) -> Tensor:
    from kernels.w8_a8.kernel import Weight, product

    return product(x, Weight(codes, scale, shift, sums), Grid(*grid))


OP = ops.register(
    "w8_a8(Tensor x, Tensor codes, Tensor scale, Tensor? shift, Tensor? sums, int bits, "
    "float steps, str scale_dtype, bool shared) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda x, codes, *rest: x.new_empty(x.shape[0], codes.shape[0]),
)

KERNEL = W8A8()
