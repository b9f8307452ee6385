"""Weights that are signed sums of 1 to 4 scales (BCQ), kept as bit planes.

On a GPU every bit plane meets the tensor cores as it lies, taken by one mask for two weights; the
scales multiply sums. Scales that double from one to the next are whole levels, and those weights
go to a kernel for integers, which needs one product where this needs one for each scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kernels import ops
from kernels.base import Case, Json, Kernel, Packed, find, kernels
from kernels.bcq import cpu
from kernels.bcq.layout import pack_offsets, pack_planes, pack_scales, plane_of
from kernels.integers import int_format
from kernels.table_cpu import is_rows, pack_rows, ready

MOST_BITS = 4
CLOSE = 1e-5  # of a scale: how near to twice the one before it, and zero points to whole numbers


def on_gpu(
    x: Tensor, words: Tensor, alphas: Tensor, offsets: Tensor | None, n: int, group: int
) -> Tensor:
    """The op on CUDA; Triton is imported when it first runs."""
    from kernels.bcq.kernel import multiply

    return multiply(x, words, alphas, offsets, n, group)


def shape_of(
    x: Tensor, words: Tensor, alphas: Tensor, offsets: Tensor | None, n: int, group: int
) -> Tensor:
    """An empty result."""
    return x.new_empty(x.shape[0], n)


OP = ops.register(
    "bcq_linear(Tensor x, Tensor words, Tensor alphas, Tensor? offsets, int n, int group)"
    " -> Tensor",
    cpu=cpu.multiply,
    cuda=on_gpu,
    fake=shape_of,
)


def bcq_format(**knobs: object) -> Json:
    """The bcq format's JSON: defaults but for `knobs`."""
    plain = {
        "kind": "bcq",
        "bits": 4,
        "group": 0,
        "rounds": 15,
        "refit": False,
        "solver": "released",
        "scale_dtype": "float32",
    }
    return {**plain, **knobs}


class BCQ:
    """y = x W_hat^T, W_hat signed sums of scales."""

    name = "bcq"
    rank = 30
    reads = ("bcq",)
    devices = ("cuda", "cpu")
    cases = (
        Case(1, 64, 128, bcq_format(bits=4, group=128, scale_dtype="float16")),
        Case(3, 70, 200, bcq_format(bits=3, group=64, scale_dtype="float16")),
        Case(9, 33, 300, bcq_format(bits=2, group=32)),
        Case(2, 130, 77, bcq_format(bits=3)),
        Case(17, 20, 96, bcq_format(bits=1, group=48)),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if weight["kind"] != "bcq":
            return f"it multiplies by 'bcq' weights, not {weight['kind']!r}"
        if beside := weight.get("beside"):
            return f"it keeps nothing beside the codes, and these have {' and '.join(beside)}"
        if act is not None:
            return "it takes activations in 16 bits; leave out the activations step"
        if weight["bits"] > MOST_BITS:
            return f"it takes 1 to {MOST_BITS} bits, not {weight['bits']}"
        if not plane_of(weight["bits"], weight["group"], k):
            return f"group {weight['group']} is no multiple of 16; use 32, 64, 128 or 0"
        return None

    def pack(
        self,
        codes: Tensor,
        params: Mapping[str, Tensor],
        weight: Json,
        act: Json | None,
    ) -> Packed:
        n, k = codes.shape
        if (uniform := as_integers(params, weight, n, k)) is not None:
            levels, form = uniform
            try:
                kernel = find(form, None, codes.device, n, k)
            except ValueError:
                pass  # an odd group: bit planes take it
            else:
                packed = kernel.pack(codes, levels, form, None)
                return replace(packed, weight={**weight, "as": {**form, "kernel": kernel.name}})
        groups = -(-k // weight["group"]) if weight["group"] else 1
        alpha = params["alpha"].expand(n, groups, weight["bits"])
        if ready(codes.device):
            held = {"words": pack_rows(codes, weight["bits"]), "alphas": alpha.contiguous()}
            if "offset" in params:
                held["offsets"] = params["offset"].expand(n, groups).contiguous()
            return Packed(held, n, k, weight, act)
        plane = plane_of(weight["bits"], weight["group"], k)
        held = {
            "words": pack_planes(codes, weight["bits"], plane),
            "alphas": pack_scales(alpha),
        }
        if "offset" in params:
            held["offsets"] = pack_offsets(params["offset"].expand(n, groups))
        return Packed(held, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        if "as" in packed.weight:
            return other_kernel(packed).matmul(x, as_packed(packed))
        t = packed.tensors
        return OP(
            x,
            t["words"],
            t["alphas"],
            t.get("offsets"),
            packed.n,
            packed.weight["group"],
        )

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        if "as" in packed.weight:
            return other_kernel(packed).reference(x, as_packed(packed))
        t, group = packed.tensors, packed.weight["group"]
        every = slice(0, len(t["words"]))
        dense = cpu.dense_rows if is_rows(t["words"]) else cpu.dense
        w = dense(t["words"], t["alphas"], t.get("offsets"), packed.k, group, every)
        return x.float() @ w[: packed.n].T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        bits, group = case.weight["bits"], case.weight["group"] or case.k
        shape = (case.n, case.k)
        codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
        size = 0.01 + 0.01 * torch.rand(case.n, -(-case.k // group), bits, generator=generator)
        alpha = size / 1.7 ** torch.arange(bits)
        return codes, {"alpha": alpha.to(getattr(torch, case.weight["scale_dtype"]))}

    def container(self, weight: Json) -> str:
        return ""


def as_integers(
    params: Mapping[str, Tensor], weight: Json, n: int, k: int
) -> tuple[dict[str, Tensor], Json] | None:
    """Scales and zero points of the "int" format where these sums are whole levels, else None.

    sum_b alpha_b (2 u_b - 1) + o with alpha_b = s 2^(b-1) is s (q - z), z = top / 2 - o / s.
    """
    alpha = params["alpha"].float()
    first = alpha[..., :1]
    doubled = first * 2.0 ** torch.arange(weight["bits"], device=alpha.device)
    if "offset" not in params or not (alpha - doubled).abs().le(CLOSE * doubled.abs()).all():
        return None  # without an offset zero is between two levels
    scale = 2 * first[..., 0]  # [n, G]
    top = 2 ** weight["bits"] - 1
    zero = top / 2 - params["offset"].float() / scale
    whole = zero.round()
    if not ((zero - whole).abs().le(top * CLOSE) & whole.ge(0) & whole.le(top)).all():
        return None
    groups = -(-k // weight["group"]) if weight["group"] else 1
    found = {
        "scale": scale.expand(n, groups),
        "zero": whole.to(torch.uint8).expand(n, groups),
    }
    return found, int_format(bits=weight["bits"], group=weight["group"])


def other_kernel(packed: Packed) -> Kernel:
    """The kernel for integers that holds these weights."""
    return kernels()[packed.weight["as"]["kernel"]]


def as_packed(packed: Packed) -> Packed:
    """What that kernel made."""
    return replace(packed, weight={k: v for k, v in packed.weight["as"].items() if k != "kernel"})


KERNEL = BCQ()
