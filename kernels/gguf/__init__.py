"""GGUF block types as packed weights: bits as many as in a file, expanded some rows at a time.

On a CPU whose C compiles, codes are looked up in registers (kernels/table_cpu.py). Else it saves
memory, not time: a tile of rows is expanded in a buffer that all layers share, and multiplied.
Numbers are those of the simulated model, whose W_hat is computed in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels import ops
from kernels.base import Case, Json, Packed
from kernels.gguf.layout import TABLE, TYPES, Type, ordered, pack_planes, unpack_planes
from kernels.table_cpu import (
    BLOCKS,
    PLAIN,
    Table,
    by_tiles,
    pack_rows,
    ready,
    takes,
    unpack_rows,
)
from kernels.table_cpu import multiply as by_table
from kernels.workspace import WORKSPACES

CELLS = {"cpu": 2**20, "cuda": 2**24}  # weights expanded at once
NAMES = ("d", "zero_d", "scale", "zero_scale")  # parameters, as the format stores them


def gguf_format(kind: str) -> Json:
    """The gguf format's JSON for cases and tests, with the bits and the group of its type."""
    return {"kind": "gguf", "type": kind, "bits": TYPES[kind].bits, "group": TYPES[kind].block}


class GGUFKernel:
    """y = x W_hat^T, W_hat in blocks of llama.cpp."""

    name = "gguf"
    rank = 50
    reads = ("gguf",)
    devices = ("cuda", "cpu")
    cases = tuple(
        Case(m, n, k, gguf_format(kind))
        for kind, (m, n, k) in zip(
            TYPES, [(1, 64, 512), (3, 33, 256), (17, 20, 768)] * len(TYPES), strict=False
        )
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if weight["kind"] != "gguf":
            return f"it multiplies by 'gguf' weights, not {weight['kind']!r}"
        if act is not None:
            return "it takes inputs in 16 bits"
        if beside := weight.get("beside"):
            return f"it keeps nothing beside the codes, and these have {' and '.join(beside)}"
        block = TYPES[weight["type"]].block
        if k % block:
            return f"blocks of {block} do not divide {k} input channels"
        return None

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        """planes as layout.py has them, parameters as they are stored."""
        n, k = codes.shape
        kept = {name: params[name].contiguous() for name in NAMES if name in params}
        kind = TYPES[weight["type"]]
        if ready(codes.device):
            planes = pack_rows(codes, kind.bits).view(torch.int16)  # bytes are planes
        else:
            planes = pack_planes(codes, kind)
        tensors = {"planes": planes, **kept}
        return Packed(tensors, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        held = packed.tensors
        return OP(x, held["planes"], *(held.get(name) for name in NAMES), packed.weight["type"])

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        kind = TYPES[packed.weight["type"]]
        params = {name: t for name, t in packed.tensors.items() if name != "planes"}
        planes = packed.tensors["planes"]
        if planes.dtype == torch.int16:
            return x.float() @ dense_rows(planes, params, kind, packed.k).T
        return ordered(x.float(), kind) @ expanded(packed.tensors["planes"], params, kind).T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        kind, n = TYPES[case.weight["type"]], case.n
        blocks, subs = case.k // kind.block, kind.block // kind.sub

        def whole(top: int, *shape: int) -> Tensor:
            return torch.randint(0, top, shape, generator=generator, dtype=torch.uint8)

        offset = not kind.zero and not kind.table
        params = {"d": (0.001 + 0.001 * torch.rand(n, blocks, generator=generator)).half()}
        if offset:
            params["zero_d"] = params["d"].clone() * (1 if subs > 1 else -4)
        if subs > 1:
            params["scale"] = whole(16, n, blocks, subs)
            if case.weight["type"] == "Q6_K":
                params["scale"] = params["scale"].to(torch.int8) - 8
        if subs > 1 and offset:
            params["zero_scale"] = whole(16, n, blocks, subs)
        return whole(2**kind.bits, n, case.k), params

    def container(self, weight: Json) -> str:
        kind = TYPES[weight["type"]]
        if kind.block == kind.sub:
            return ""
        return "the small integers that scale sub-blocks are kept in a byte each"


def levels(params: Mapping[str, Tensor], kind: Type) -> tuple[Tensor, Tensor | None]:
    """Parameters of rows -> scale, and offset where there is one, of each sub-block [n, subs]."""
    scale, zero = params["d"].float(), params.get("zero_d")
    if "scale" not in params:
        return scale, None if zero is None else zero.float()
    scale = scale[..., None] * (params["scale"].float() - kind.scale_zero)
    if zero is None:
        return scale.flatten(1), None
    offset = zero.float()[..., None] * params["zero_scale"].float()
    return scale.flatten(1), offset.neg_().flatten(1)


@cache
def table_on(device: torch.device) -> Tensor:
    """TABLE [16] fp32 on a device: made once, for a copy to a GPU cannot be in a CUDA graph."""
    return torch.tensor(TABLE, dtype=torch.float32, device=device)


def expanded(planes: Tensor, params: Mapping[str, Tensor], kind: Type) -> Tensor:
    """Rows [n, bytes] and their parameters -> values [n, k] fp32 in the order of the planes.

    In a shared buffer: what was expanded before is gone.
    """
    n, k = len(planes), planes.shape[1] * 8 // kind.bits
    cells = WORKSPACES.take("gguf codes", n * k, torch.uint8, planes.device).view(n, k)
    unpack_planes(planes, kind, cells)
    w = WORKSPACES.take("gguf values", n * k, torch.float32, planes.device).view(n, k)
    if kind.table:
        torch.index_select(table_on(planes.device), 0, cells.flatten().int(), out=w.view(-1))
    else:
        w.copy_(cells)
        if kind.zero:
            w.sub_(kind.zero)
    scale, offset = levels(params, kind)
    view = w.view(n, kind.sub, -1)
    view.mul_(scale[:, None])
    if offset is not None:
        view.add_(offset[:, None])
    return w


def multiply(
    x: Tensor,
    planes: Tensor,
    d: Tensor,
    zero_d: Tensor | None,
    scale: Tensor | None,
    zero_scale: Tensor | None,
    type: str,
) -> Tensor:
    """On every device: some rows at a time, expanded to x's dtype."""
    kind, n, k = TYPES[type], len(planes), x.shape[1]
    if planes.dtype == torch.int16:
        return by_rows(x, planes, d, zero_d, scale, zero_scale, type)
    given = zip(NAMES, (d, zero_d, scale, zero_scale), strict=True)
    params = {name: t for name, t in given if t is not None}
    moved = ordered(x, kind)
    out = x.new_empty(len(x), n)
    step = max(1, CELLS[x.device.type] // k)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        w = expanded(planes[rows], {name: t[rows] for name, t in params.items()}, kind)
        if x.dtype != torch.float32:
            wide = WORKSPACES.take("gguf", w.numel(), x.dtype, x.device).view(w.shape)
            w = wide.copy_(w)
        out[:, rows] = functional.linear(moved, w)
    return out


def level_table(kind: Type) -> Tensor:
    """[2^bits] fp32: what each code of at most 5 bits stands for, before scale and offset."""
    if kind.table:
        return torch.tensor(TABLE, dtype=torch.float32)
    return torch.arange(2.0 ** min(kind.bits, 5)) - kind.zero


def dense_rows(planes: Tensor, params: Mapping[str, Tensor], kind: Type, k: int) -> Tensor:
    """W_hat [rows, k] fp32 from table_cpu's rows."""
    codes = unpack_rows(planes.view(torch.uint8), kind.bits, k)
    w = level_table(kind)[codes.int()] if kind.table else codes.float() - kind.zero
    scale, offset = levels(params, kind)
    w.view(len(w), -1, kind.sub).mul_(scale[..., None])
    if offset is not None:
        w.view(len(w), -1, kind.sub).add_(offset[..., None])
    return w


def by_rows(
    x: Tensor,
    planes: Tensor,
    d: Tensor,
    zero_d: Tensor | None,
    scale: Tensor | None,
    zero_scale: Tensor | None,
    type: str,
) -> Tensor:
    """The product of table_cpu's rows."""
    kind, k = TYPES[type], x.shape[1]
    if takes(x):
        words, groups = planes.view(torch.uint8), k // kind.sub
        own = Table(words, kind.bits, PLAIN, kind.sub, groups, level_table(kind), d, zero_d)
        if scale is not None:
            own.kind, own.low, own.fourth = BLOCKS, scale, zero_scale
            own.kind_type = 1 if scale.dtype == torch.int8 else kind.scale_zero
            own.extra = (kind.block // kind.sub).bit_length() - 1
        return by_table(x, own, len(planes))
    given = zip(NAMES, (d, zero_d, scale, zero_scale), strict=True)
    params = {name: t for name, t in given if t is not None}

    def rows_of(rows: slice) -> Tensor:
        return dense_rows(planes[rows], {a: t[rows] for a, t in params.items()}, kind, k)

    return by_tiles(x, len(planes), rows_of)


def fake(x: Tensor, planes: Tensor, *rest: object) -> Tensor:
    """An empty result."""
    return x.new_empty(x.shape[0], planes.shape[0])


OP = ops.register(
    "gguf(Tensor x, Tensor planes, Tensor d, Tensor? zero_d, Tensor? scale, "
    "Tensor? zero_scale, str type) -> Tensor",
    cpu=multiply,
    cuda=multiply,
    fake=fake,
)

KERNEL = GGUFKernel()
