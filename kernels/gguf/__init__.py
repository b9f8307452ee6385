"""GGUF block types as packed weights: bits as many as in a file, expanded some rows at a time.

It saves memory, not time: a tile of rows is expanded in a buffer that all layers share, and then
multiplied. Numbers are those of the simulated model, whose W_hat is computed in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kernels import ops
from kernels.base import Case, Json, Packed
from kernels.gguf.layout import TABLE, TYPES, Type, ordered, pack_planes, unpack_planes
from kernels.workspace import WORKSPACES

CELLS = 2**20  # weights expanded at once
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
        tensors = {"planes": pack_planes(codes, TYPES[weight["type"]]), **kept}
        return Packed(tensors, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        held = packed.tensors
        return OP(x, held["planes"], *(held.get(name) for name in NAMES), packed.weight["type"])

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        kind = TYPES[packed.weight["type"]]
        params = {name: t for name, t in packed.tensors.items() if name != "planes"}
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


def expanded(planes: Tensor, params: Mapping[str, Tensor], kind: Type) -> Tensor:
    """Rows [n, bytes] and their parameters -> values [n, k] fp32 in the order of the planes.

    In a shared buffer: what was expanded before is gone.
    """
    n, k = len(planes), planes.shape[1] * 8 // kind.bits
    cells = WORKSPACES.take("gguf codes", n * k, torch.uint8, planes.device).view(n, k)
    unpack_planes(planes, kind, cells)
    w = WORKSPACES.take("gguf values", n * k, torch.float32, planes.device).view(n, k)
    if kind.table:
        table = torch.tensor(TABLE, dtype=torch.float32, device=planes.device)
        torch.index_select(table, 0, cells.flatten().int(), out=w.view(-1))
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
    given = zip(NAMES, (d, zero_d, scale, zero_scale), strict=True)
    params = {name: t for name, t in given if t is not None}
    moved = ordered(x, kind)
    out = x.new_empty(len(x), n)
    step = max(1, CELLS // k) if x.device.type == "cpu" else n
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        w = expanded(planes[rows], {name: t[rows] for name, t in params.items()}, kind)
        if x.dtype != torch.float32:
            wide = WORKSPACES.take("gguf", w.numel(), x.dtype, x.device).view(w.shape)
            w = wide.copy_(w)
        out[:, rows] = functional.linear(moved, w)
    return out


def fake(x: Tensor, planes: Tensor, *rest: object) -> Tensor:
    """An empty result."""
    return x.new_empty(x.shape[0], planes.shape[0])


OP = ops.register(
    "quantarena_gguf(Tensor x, Tensor planes, Tensor d, Tensor? zero_d, Tensor? scale, "
    "Tensor? zero_scale, str type) -> Tensor",
    cpu=multiply,
    cuda=multiply,
    fake=fake,
)

KERNEL = GGUFKernel()
