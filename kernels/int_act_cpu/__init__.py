"""Integer weights and integer activations, scaled per token as they come, on the CPU.

Where it compiles, kernels/byte_cpu.py rounds and multiplies in one call, groups of input channels
and half bytes included. Else oneDNN multiplies unsigned activation codes by signed weight codes
into exact 32-bit sums (`onednn.qlinear_pointwise`; with signed activations it takes a reference
path 100 times slower), with one scale per row of the weights. That is no op of ours: the packed
blocks are mkldnn tensors, which PyTorch dispatches to its MkldnnCPU key and not to what kernels.ops
registers for CPU. Times: docs/log.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from kernels import byte_cpu
from kernels.base import Case, Json, Packed
from kernels.integers import (
    activation_codes,
    group_of,
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
    reads = ("int", "affine")
    devices = ("cpu",)
    cases = (
        Case(1, 64, 64, W8, A8),
        Case(5, 33, 65, W8, A8),
        Case(40, 7, 100, int_format(bits=8), A8),
        Case(3, 48, 96, int_format(bits=4), int_format(bits=8)),
        Case(2, 50, 128, int_format(bits=4, symmetric=True), int_format(bits=6)),
        Case(9, 32, 64, int_format(bits=8, per_tensor=True, symmetric=True), A8),
        Case(4, 16, 48, W8, int_format(bits=8, symmetric=True, per_tensor=True)),
        Case(7, 70, 256, int_format(bits=4, group=128), int_format(bits=8, symmetric=True)),
        Case(13, 40, 96, int_format(bits=8, group=32), int_format(bits=8)),
        Case(2, 65, 64, {"kind": "affine", "bits": 4, "group": 64}, A8),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if device.type != "cpu":
            return "it runs on the CPU"
        if reason := refuse(weight, act, self.reads):
            return reason
        if act is None:
            return "it needs activations in integers too"
        group = weight["group"]
        if byte_cpu.native() is not None:
            if group and (group % 4 or k % group):
                return f"group {group} must divide the {k} input channels and be a multiple of 4"
            return None
        if weight["kind"] == "affine":
            return "without its product in C it takes whole zero points only"
        if group:
            return f"without its product in C it has one scale per row, not per {group} channels"
        return None if works() else "this build of PyTorch has no exact int8 product on this CPU"

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        """As byte_cpu has them; else oneDNN's blocks with scale, shift, sums [n] fp32.

        w = q scale + offset or shift, q the code around the middle of its range; sums are those of
        q scale.
        """
        n, k = codes.shape
        middle = 2 ** (weight["bits"] - 1)
        q = (codes.int() - middle).to(torch.int8)
        groups = k // group_of(weight, k)
        scale = params["scale"].float().expand(n, groups)
        offset = None
        if "zero" in params:
            offset = (middle - zeros(params, weight).expand(n, groups)) * scale
        if byte_cpu.native() is not None:
            half = weight["bits"] <= 4 and (groups == 1 or k // groups % 8 == 0)
            return Packed(byte_cpu.pack(q, scale, offset, half), n, k, weight, act)
        scale = scale.flatten().contiguous()
        tensors = {
            "blocks": torch.ops.onednn.qlinear_prepack(q, None),
            "scale": scale,
            "sums": q.sum(1, dtype=torch.float32) * scale,
        }
        if offset is not None:
            tensors["shift"] = offset.flatten()
        return Packed(tensors, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        assert packed.act is not None
        if "blocks" in packed.tensors:
            return by_blocks(x, packed, packed.act)
        wide = x if x.dtype != torch.float16 else x.float()
        held = packed.tensors
        scales = (held["scale"], held.get("offset"))
        row_sum = None if packed.act["symmetric"] else held["row_sum"]
        grid = byte_cpu.grid_of(packed.act)
        y = byte_cpu.OP(wide.contiguous(), held["q"], *scales, row_sum, None, None, packed.n, grid)
        return y.to(x.dtype)

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        if "q" in packed.tensors:
            w = byte_cpu.dense(packed.tensors, packed.n, packed.k)
            return rounded_activations(x, packed.act) @ w.T
        # oneDNN's blocks can be read in no other way than by multiplying with ones.
        ones = (torch.eye(packed.k) + MIDDLE).to(torch.uint8)
        w = int_product(ones, packed.tensors["blocks"], packed.tensors["scale"]).T  # [n, k]
        if "shift" in packed.tensors:
            w = w + packed.tensors["shift"][:, None]
        return rounded_activations(x, packed.act) @ w.T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return random_weight(case, generator)

    def container(self, weight: Json) -> str:
        half = byte_cpu.native() is not None and weight["bits"] <= 4 and weight["group"] % 8 == 0
        if weight["bits"] == (4 if half else 8):
            return ""
        fields = "half bytes" if half else "bytes"
        return f"{weight['bits']}-bit codes are kept in {fields}, as the product reads them"


def by_blocks(x: Tensor, packed: Packed, act: Json) -> Tensor:
    """By oneDNN: sum over k of (a + lack) (q scale + shift), a and q codes around their middles."""
    held = packed.tensors
    codes, x_scale, x_zero = activation_codes(x, act)
    middle = 2 ** (act["bits"] - 1)
    bytes_ = (codes if middle == MIDDLE else codes + (MIDDLE - middle)).to(torch.uint8)
    y = int_product(bytes_, held["blocks"], held["scale"])  # [m, n], sum of a q scale
    if not act["symmetric"]:
        y.addcmul_(middle - x_zero, held["sums"])
    if "shift" in held:
        y.addcmul_(codes.sum(1, keepdim=True) - packed.k * x_zero, held["shift"])
    return y.mul_(x_scale).to(x.dtype)


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
