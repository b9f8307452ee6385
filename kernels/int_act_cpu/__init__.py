"""Integer weights and integer activations, scaled per token as they come, on the CPU.

oneDNN multiplies unsigned activation codes by signed weight codes into exact 32-bit sums
(`onednn.qlinear_pointwise`; with signed activations it takes a reference path 100 times slower).
It is no op of ours: the packed blocks are mkldnn tensors, which PyTorch dispatches to its MkldnnCPU
key and not to what kernels.ops registers for CPU.
Scales and zero points are applied to the sums, so there is one scale per row of the weights.
Times: docs/log.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from kernels.base import Case, Json, Packed
from kernels.integers import (
    activation_codes,
    int_format,
    random_weight,
    refuse,
    rounded_activations,
    zeros,
)

W8, A8 = int_format(bits=8, symmetric=True), int_format(bits=8, symmetric=True)
MIDDLE = 128  # of unsigned bytes


class IntActCpu:
    """y = act(x) W_hat^T, both in 2-8 bit integer codes."""

    name = "int_act_cpu"
    rank = 10
    reads = ("int",)
    devices = ("cpu",)
    cases = (
        Case(1, 64, 64, W8, A8),
        Case(5, 33, 65, W8, A8),
        Case(40, 7, 100, int_format(bits=8), A8),
        Case(3, 48, 96, int_format(bits=4), int_format(bits=8)),
        Case(2, 50, 128, int_format(bits=4, symmetric=True), int_format(bits=6)),
        Case(9, 32, 64, int_format(bits=8, per_tensor=True, symmetric=True), A8),
        Case(4, 16, 48, W8, int_format(bits=8, symmetric=True, per_tensor=True)),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if device.type != "cpu":
            return "it runs on the CPU"
        if reason := refuse(weight, act):
            return reason
        if act is None:
            return "it needs activations in integers too"
        if weight["group"]:
            return f"it has one scale per row of weights, not per {weight['group']} channels"
        return None if works() else "this build of PyTorch has no exact int8 product on this CPU"

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        """codes [n, k] -> oneDNN's blocks; scale, shift, sums [n] fp32.

        w = q scale + shift, q the code around the middle of its range; sums are those of q scale.
        """
        n, k = codes.shape
        middle = 2 ** (weight["bits"] - 1)
        q = (codes.int() - middle).to(torch.int8)
        scale = params["scale"].float().expand(n, 1).flatten().contiguous()
        tensors = {
            "blocks": torch.ops.onednn.qlinear_prepack(q, None),
            "scale": scale,
            "sums": q.sum(1, dtype=torch.float32) * scale,
        }
        if "zero" in params:
            tensors["shift"] = (middle - zeros(params, weight).expand(n, 1).flatten()) * scale
        return Packed(tensors, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """sum over k of (a + lack) (q scale + shift), a and q the codes around their middles."""
        assert packed.act is not None
        held = packed.tensors
        codes, x_scale, x_zero = activation_codes(x, packed.act)
        middle = 2 ** (packed.act["bits"] - 1)
        bytes_ = (codes if middle == MIDDLE else codes + (MIDDLE - middle)).to(torch.uint8)
        y = int_product(bytes_, held["blocks"], held["scale"])  # [m, n], sum of a q scale
        if not packed.act["symmetric"]:
            y.addcmul_(middle - x_zero, held["sums"])
        if "shift" in held:
            y.addcmul_(codes.sum(1, keepdim=True) - packed.k * x_zero, held["shift"])
        return y.mul_(x_scale).to(x.dtype)

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        # oneDNN's blocks can be read in no other way than by multiplying with ones.
        ones = (torch.eye(packed.k) + MIDDLE).to(torch.uint8)
        w = int_product(ones, packed.tensors["blocks"], packed.tensors["scale"]).T  # [n, k]
        if "shift" in packed.tensors:
            w = w + packed.tensors["shift"][:, None]
        return rounded_activations(x, packed.act) @ w.T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return random_weight(case, generator)

    def container(self, weight: Json) -> str:
        if weight["bits"] == 8:
            return ""
        return f"{weight['bits']}-bit codes are kept in bytes, as oneDNN's product reads them"


def int_product(codes: Tensor, blocks: Tensor, scale: Tensor) -> Tensor:
    """codes [m, k] uint8 around 128, packed q [n, k], scale [n] -> sum (codes - 128) q scale, fp32.

    The sums over k are exact integers; scale is applied to them.
    """
    return torch.ops.onednn.qlinear_pointwise(
        codes,
        1.0,
        MIDDLE,
        blocks,
        scale,
        torch.zeros(len(scale), dtype=torch.int64),
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )


@lru_cache(maxsize=1)
def works() -> bool:
    """True if the product exists and is exact at the extremes, where 16-bit sums would saturate."""
    q = torch.tensor([[127] * 64, [-128] * 64], dtype=torch.int8)
    codes = torch.tensor([[255] * 64, [0] * 64], dtype=torch.uint8)
    exact = (codes.double() - MIDDLE) @ q.double().T
    try:
        got = int_product(codes, torch.ops.onednn.qlinear_prepack(q, None), torch.ones(2))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False  # the reason reaches the user through why_not
    return torch.equal(got.double(), exact)


KERNEL = IntActCpu()
