"""Pruned weights: kept numbers or codes, and where they were (2:4 places, or a mask).

A CPU where table_cpu.c compiles puts them in place in registers (rows.py). Elsewhere they save
memory, not time: putting weights in place costs what reading fewer saves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import ops
from kernels.base import Case, Json, Packed
from kernels.integers import DTYPES, int_format, random_weight
from kernels.sparse_24 import expand
from kernels.sparse_24 import rows as by_row
from kernels.sparse_24.layout import is_placed, pack_kept, pack_where
from kernels.table_cpu import ready

TILE = 128  # rows of W made dense at once on a CPU
CELLS = 2**24  # weights on a GPU: ten bytes each, places looked up included


def on_gpu(
    x: Tensor,
    stream: Tensor,
    where: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    starts: list[int],
    rows: int,
    bits: int,
    group: int,
    placed: bool,
) -> Tensor:
    """The op on CUDA; Triton is imported when it first runs."""
    from kernels.sparse_24.kernel import multiply

    return multiply(x, stream, where, scale, zero, starts, rows, bits, group, placed)


def shape_of(
    x: Tensor,
    stream: Tensor,
    where: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    starts: list[int],
    rows: int,
    bits: int,
    group: int,
    placed: bool,
) -> Tensor:
    """An empty result."""
    return x.new_empty(x.shape[0], where.shape[0])


OP = ops.register(
    "sparse_linear(Tensor x, Tensor stream, Tensor where, Tensor? scale, Tensor? zero,"
    " int[] starts, int rows, int bits, int group, bool placed) -> Tensor",
    cpu=expand.multiply,
    cuda=on_gpu,
    fake=shape_of,
)


def pruned(kind: Json | str, bucket: int = 0) -> Json:
    """The JSON of pruned weights: of an int format, or of a dtype."""
    form: Json = {"kind": kind} if isinstance(kind, str) else kind
    return {**form, "beside": ["keep"], "bucket": bucket}


class Sparse24:
    """y = x W_hat^T, W_hat 0 but for the kept."""

    name = "sparse_24"
    rank = 40
    reads = ("int", "float16", "bfloat16", "float32")
    devices = ("cuda", "cpu")
    needs = ("keep",)
    cases = (
        Case(1, 64, 128, pruned("float16", 4)),
        Case(3, 70, 200, pruned("bfloat16", 4)),
        Case(2, 130, 77, pruned("float16")),
        Case(9, 33, 96, pruned(int_format(bits=4, group=32), 4)),
        Case(5, 140, 50, pruned(int_format(bits=3, symmetric=True, scale_dtype="float16"))),
        Case(2, 20, 64, pruned("float32", 8)),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        beside = weight.get("beside") or []
        if "keep" not in beside:
            return "it multiplies by pruned weights, and these are whole"
        if list(beside) != ["keep"]:
            rest = " and ".join(name for name in beside if name != "keep")
            return f"it keeps nothing beside what was not pruned, and these have {rest}"
        if weight["kind"] != "int" and weight["kind"] not in DTYPES:
            return f"it keeps 'int' codes or 16-bit numbers, not {weight['kind']!r}"
        if act is not None:
            return "it takes activations in 16 bits; leave out the activations step"
        return None

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        """codes [n, k] uint8, or for a dtype W [n, k] itself; params has "keep" [n, k] bool."""
        n, k = codes.shape
        keep, bits = params["keep"], bits_of(weight)
        values = codes if weight["kind"] == "int" else codes.to(DTYPES[weight["kind"]])
        if ready(codes.device) and by_row.suits(weight):
            return Packed(by_row.pack(values, keep, params), n, k, weight, act)
        placed = is_placed(keep, weight["bucket"])
        rows = TILE if codes.device.type == "cpu" else 8 * max(1, CELLS // (8 * k))
        stream, starts = pack_kept(values, keep, bits, rows)
        held = {"stream": stream, "where": pack_where(keep, placed)}
        held |= {name: params[name] for name in ("scale", "zero") if name in params}
        how = {"starts": starts, "rows": rows, "placed": placed}
        return Packed(held, n, k, {**weight, **how}, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        t, form = packed.tensors, packed.weight
        if "values" in t:
            return by_row.product(x, t, form)
        own = (t["stream"], t["where"], t.get("scale"), t.get("zero"))
        how = (form["starts"], form["rows"], bits_of(form), form.get("group", 0), form["placed"])
        return OP(x, *own, *how)

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        t, form = packed.tensors, packed.weight
        if "values" in t:
            return by_row.product(x.float(), t, form)
        own = (t["stream"], t["where"], t.get("scale"), t.get("zero"))
        how = (form["starts"], form["rows"], bits_of(form), form.get("group", 0), form["placed"])
        return expand.multiply(x.float(), *own, *how)

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        shape, bucket = (case.n, case.k), case.weight["bucket"] or 2
        score = torch.rand(case.n, -(-case.k // bucket), bucket, generator=generator)
        keep = score.argsort(-1).argsort(-1) < bucket // 2
        kept = {"keep": keep.flatten(1)[:, : case.k].contiguous()}
        if case.weight["kind"] == "int":
            codes, params = random_weight(case, generator)
            return codes, params | kept
        return torch.randn(shape, generator=generator).to(DTYPES[case.weight["kind"]]), kept

    def container(self, weight: Json) -> str:
        if bits_of(weight) < 4:
            return f"a CPU keeps {bits_of(weight)}-bit codes in half bytes"
        return ""


def bits_of(weight: Json) -> int:
    """Bits of a kept weight."""
    if weight["kind"] == "int":
        return int(weight["bits"])
    return DTYPES[weight["kind"]].itemsize * 8


KERNEL = Sparse24()
