"""Weights of 4 bits looked up in a table of 16 levels (NF4, FP4), one scale per group.

On a GPU byte permutes look four codes up at a time, in registers. Scales of 8 bits with a second
level stay as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import ops
from kernels.base import Case, Json, Packed
from kernels.codebook import cpu
from kernels.codebook.layout import pack_nibbles, pack_scales, plane_of
from kernels.codebook.levels import TABLES, levels_of, numbering
from kernels.table_cpu import is_rows, pack_rows, ready


def on_gpu(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    second: Tensor | None,
    offset: Tensor | None,
    levels: Tensor,
    n: int,
    group: int,
    table: str,
) -> Tensor:
    """The op on CUDA; Triton is imported when it first runs."""
    from kernels.codebook.kernel import multiply

    return multiply(x, words, scales, second, offset, levels, n, group, table)


def shape_of(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    second: Tensor | None,
    offset: Tensor | None,
    levels: Tensor,
    n: int,
    group: int,
    table: str,
) -> Tensor:
    """An empty result."""
    return x.new_empty(x.shape[0], n)


OP = ops.register(
    "codebook_linear(Tensor x, Tensor words, Tensor scales, Tensor? second, Tensor? offset,"
    " Tensor levels, int n, int group, str table) -> Tensor",
    cpu=cpu.multiply,
    cuda=on_gpu,
    fake=shape_of,
)


def codebook_format(**knobs: object) -> Json:
    """The codebook format's JSON: defaults but for `knobs`."""
    plain = {
        "kind": "codebook",
        "table": "nf4",
        "group": 64,
        "double_quant": False,
        "chosen_by": "stored",
        "scale_dtype": "float32",
    }
    return {**plain, **knobs}


class Codebook:
    """y = x W_hat^T, W_hat levels of a table times scales."""

    name = "codebook"
    rank = 30
    reads = ("codebook",)
    devices = ("cuda", "cpu")
    cases = (
        Case(1, 64, 256, codebook_format()),
        Case(3, 70, 200, codebook_format(table="fp4", group=32, scale_dtype="bfloat16")),
        Case(9, 33, 300, codebook_format(double_quant=True)),
        Case(2, 130, 77, codebook_format(group=0)),
        Case(17, 20, 96, codebook_format(group=48, double_quant=True, table="fp4")),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if weight["kind"] != "codebook":
            return f"it multiplies by 'codebook' weights, not {weight['kind']!r}"
        if beside := weight.get("beside"):
            return f"it keeps nothing beside the codes, and these have {' and '.join(beside)}"
        if act is not None:
            return "it takes activations in 16 bits; leave out the activations step"
        if weight["table"] not in TABLES:
            return f"it knows the tables {' and '.join(TABLES)}, not {weight['table']!r}"
        if not plane_of(weight["group"], k):
            return f"group {weight['group']} is no multiple of 16; use 32, 64, 128 or 0"
        return None

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        n, k = codes.shape
        if ready(codes.device):
            held = {
                "words": pack_rows(codes, 4),
                "scales": params["scale"].contiguous(),
                "levels": levels_of(weight["table"]),
            }
        else:
            nibbles = numbering(weight["table"]).to(codes.device)[codes.long()]
            held = {
                "words": pack_nibbles(nibbles, plane_of(weight["group"], k)),
                "scales": pack_scales(params["scale"]),
                "levels": by_nibble(weight["table"]).to(codes.device),
            }
        if "second" in params:
            second = params["second"].float().flatten()
            last = torch.full_like(second[:1], len(second) - 1)
            held["second"] = second.contiguous()
            held["offset"] = torch.cat([params["offset"].float().flatten(), last])
        return Packed(held, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        t, form = packed.tensors, packed.weight
        own = (t["words"], t["scales"], t.get("second"), t.get("offset"), t["levels"])
        return OP(x, *own, packed.n, form["group"], form["table"])

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        t, form = packed.tensors, packed.weight
        own = (t["words"], t["scales"], t.get("second"), t.get("offset"))
        every = slice(0, len(t["words"]))
        if is_rows(t["words"]):
            w = cpu.dense_rows(*own, t["levels"], packed.k, form["group"], every)
            return x.float() @ w.T
        w = cpu.dense(*own, packed.k, form["group"], form["table"], every)
        return x.float() @ w[: packed.n].T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        shape, form = (case.n, case.k), case.weight
        codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
        groups = -(-case.k // (form["group"] or case.k))
        if not form["double_quant"]:
            scale = 0.01 + 0.01 * torch.rand(case.n, groups, generator=generator)
            return codes, {"scale": scale.to(getattr(torch, form["scale_dtype"]))}
        scale = torch.randint(0, 256, (case.n, groups), generator=generator, dtype=torch.uint8)
        blocks = -(-case.n * groups // 256)
        second = 0.004 + 0.004 * torch.rand(blocks, 1, generator=generator)
        return codes, {"scale": scale, "second": second, "offset": torch.full((1, 1), 0.015)}

    def container(self, weight: Json) -> str:
        return ""


def by_nibble(table: str) -> Tensor:
    """[16] fp32: the level of each nibble."""
    found = torch.empty(16)
    found[numbering(table).long()] = levels_of(table)
    return found


KERNEL = Codebook()
