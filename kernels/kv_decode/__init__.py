"""Attention of one new token on keys and values that stay packed. No product with weights here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import ops
from kernels.base import Json
from kernels.kv_decode.layout import FIELD_BITS, Held
from kernels.kv_decode.stretch import attend

OFFSETS = {"int": "zero", "kivi": "low"}  # formats, and what they keep beside scales, if anything
BYTES = 16  # of a row of codes: a tensor core takes 16 at once
WIDTHS = (64, 128, 256)  # channels of a head that the Triton kernel takes


def why_not_held(grid: Json, axis: str, dim: int) -> str | None:
    """One sentence why `decode` cannot read such keys or values, None if it can.

    grid: a format's `data()`; axis: what shares a scale, "token" or "channel"; of heads of `dim`
    channels.
    """
    if grid["kind"] not in OFFSETS:
        return f"it reads {' and '.join(map(repr, OFFSETS))} codes, not {grid['kind']!r}"
    if grid["bits"] not in FIELD_BITS:
        return f"it reads codes of 2, 4 and 8 bits, not {grid['bits']}: a byte holds whole ones"
    if dim * grid["bits"] % 8:
        return f"{dim} codes of {grid['bits']} bits do not end at a byte"
    group = grid["group"] or dim
    if axis == "token" and dim % group:
        return f"groups of {group} channels do not divide the {dim} of a head"
    return None


def why_not_triton(keys: Held, values: Held) -> str | None:
    """One sentence why the Triton kernel cannot read what `decode` can, None if it can."""
    dim = keys.newest.shape[-1]
    if dim not in WIDTHS:
        return f"it reads heads of {WIDTHS} channels, not of {dim}"
    if keys.sinks != values.sinks:
        return f"{keys.sinks} first keys and {values.sinks} first values are in 16 bits"
    groups = [side.groups(dim) for side in (keys, values)]
    if min(groups) > 1 and groups[0] != groups[1]:
        return f"keys have {groups[0]} groups of channels and values {groups[1]}"
    for side, count in zip((keys, values), groups, strict=True):
        if not side.bits:
            continue
        if dim * side.bits < 8 * BYTES:
            return f"rows of {dim * side.bits // 8} bytes are too short, {BYTES} are the least"
        if side.block > 1 and side.block % BYTES:
            return f"blocks of {side.block} tokens are no multiple of {BYTES}"
        if count & (count - 1) or count > BYTES or dim // count * side.bits < 8:
            return f"{count} groups of channels are no power of two up to {BYTES}"
    return None


def decode(
    q: Tensor, keys: Held, values: Held, mask: Tensor | None = None, *, scaling: float
) -> Tensor:
    """q [B, Hq, D] -> softmax(q K^T scaling) V [B, Hq, D]; mask [B, n] bool says what is read.

    Query heads share key-value heads in order. Codes are read packed, a stretch at a time.
    """
    sides = [
        x
        for side in (keys, values)
        for x in (
            side.newest,
            side.codes,
            side.scale,
            side.offset,
            side.first,
            side.bits,
            side.block,
        )
    ]
    out: Tensor = OP(q, *sides, mask, scaling)
    return out


def reference(
    q: Tensor, keys: Held, values: Held, mask: Tensor | None = None, *, scaling: float
) -> Tensor:
    """The same in float64 from every token at once, [B, Hq, D]: the truth in tests."""
    k, v = (side.read(0, side.count).double() for side in (keys, values))  # [B, H, n, D]
    rows = q.double().unflatten(1, (k.shape[1], -1))  # [B, H, Hq / H, D]
    scores = rows @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).flatten(1, 2)


def on_cpu(q: Tensor, *told: Any) -> Tensor:
    """Unpacks a stretch of tokens at a time."""
    keys, values, mask, scaling = read_arguments(told)
    return attend(q, keys, values, mask, scaling)


def on_cuda(q: Tensor, *told: Any) -> Tensor:
    """Unpacks in registers where the kernel can, else as on a CPU."""
    keys, values, mask, scaling = read_arguments(told)
    if why_not_triton(keys, values):
        return attend(q, keys, values, mask, scaling)
    from kernels.kv_decode.kernel import attention

    return attention(q, keys, values, mask, scaling)


def read_arguments(told: tuple[Any, ...]) -> tuple[Held, Held, Tensor | None, float]:
    """The op's arguments after q -> keys, values, mask and scaling."""
    keys, values = Held(*told[:7]), Held(*told[7:14])
    return keys, values, told[14], told[15]


def shape_of(q: Tensor, *told: Any) -> Tensor:
    """The result without its numbers."""
    return torch.empty_like(q, memory_format=torch.contiguous_format)


SIDE = (
    "Tensor {0}, Tensor? {0}_codes, Tensor? {0}_scale, Tensor? {0}_offset, Tensor? {0}_first, "
    "int {0}_bits, int {0}_block"
)
OP = ops.register(
    f"kv_decode(Tensor q, {SIDE.format('keys')}, {SIDE.format('values')}, Tensor? mask, "
    "float scaling) -> Tensor",
    cpu=on_cpu,
    cuda=on_cuda,
    fake=shape_of,
)
