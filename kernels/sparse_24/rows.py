"""Pruned weights as table_cpu.c takes them: a bit for each channel, kept ones row after row.

values  = kept numbers, or kept codes two to a byte, low half first; each row follows the last at
          once, from the next code or number on; 64 bytes more, which the C may read
where   = [n, padded / 8] uint8, the bit of channel 8 j + i is bit i of byte j
starts  = [n + 1] int64, how many are kept in the rows before
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kernels import ops
from kernels.base import Json
from kernels.integers import dequantized, int_format
from kernels.sparse_24.layout import keep_of, pack_where
from kernels.table_cpu import (
    KEPT4,
    KEPT_BF16,
    KEPT_FP16,
    KEPT_FP32,
    NONE,
    PLAIN,
    ZEROS,
    Table,
    by_tiles,
    fits,
    padded,
    takes,
)
from kernels.table_cpu import multiply as by_table

SPARE = 64  # bytes after the last value
FORMS = {torch.bfloat16: KEPT_BF16, torch.float16: KEPT_FP16, torch.float32: KEPT_FP32}


def suits(weight: Json) -> bool:
    """True if the C reads such weights."""
    return weight["kind"] != "int" or (weight["bits"] <= 4 and fits(weight["group"]))


def pack(values: Tensor, keep: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Codes uint8 or numbers [n, k], keep [n, k] bool, scale and zero -> tensors by name."""
    n, k = values.shape
    kept = values[keep]
    if kept.dtype == torch.uint8:
        kept = functional.pad(kept, (0, len(kept) % 2))
        kept = kept[::2] | kept[1::2] << 4
    held = {
        "values": functional.pad(kept, (0, SPARE // kept.itemsize)),
        "where": pack_where(functional.pad(keep, (0, padded(k, KEPT4) - k)), placed=False),
        "starts": functional.pad(keep.sum(1).cumsum(0), (1, 0)),
    }
    for name in ("scale", "zero"):
        if name in params:
            held[name] = params[name].expand(n, params[name].shape[1]).contiguous()
    return held


def multiply(
    x: Tensor,
    values: Tensor,
    where: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """x [m, k] -> [m, n] in x's dtype: in C for bf16, else 128 rows of W_hat at a time."""
    n = len(where)
    if takes(x):
        form = FORMS[values.dtype] if scale is None else KEPT4
        table = Table(values, form, NONE, where=where, starts=starts)
        if scale is not None:
            table.kind, table.group, table.groups = PLAIN, group, scale.shape[1]
            table.scale = scale
            table.levels = torch.arange(16.0) - (2 ** (bits - 1) if zero is None else 0)
            if zero is not None:
                table.kind, table.more = ZEROS, zero
        return by_table(x, table, n)
    told = (values, where, starts, scale, zero, bits, group, x.shape[1])
    return by_tiles(x, n, lambda rows: dense(*told, rows))


def dense(
    values: Tensor,
    where: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    group: int,
    k: int,
    rows: slice,
) -> Tensor:
    """W_hat [rows, k] fp32."""
    keep = keep_of(where[rows], k, placed=False)
    first, last = int(starts[rows.start]), int(starts[rows.stop])
    if scale is None:
        return torch.zeros(keep.shape).masked_scatter_(keep, values[first:last].float())
    some = values[first // 2 : -(-last // 2)]
    kept = torch.stack([some & 15, some >> 4], 1).flatten()[first % 2 :]
    codes = torch.zeros(keep.shape, dtype=torch.uint8).masked_scatter_(keep, kept)
    params = {"scale": scale[rows]} | ({} if zero is None else {"zero": zero[rows]})
    form = int_format(bits=bits, group=group, symmetric=zero is None)
    return dequantized(codes, params, form).masked_fill_(~keep, 0)


OP = ops.register(
    "sparse_rows(Tensor x, Tensor values, Tensor where, Tensor starts, Tensor? scale, Tensor? zero,"
    " int bits, int group) -> Tensor",
    cpu=multiply,
    fake=lambda x, values, where, *rest: x.new_empty(x.shape[0], where.shape[0]),
)


def product(x: Tensor, held: Mapping[str, Tensor], form: Json) -> Tensor:
    """The op on packed tensors."""
    own = (held["values"], held["where"], held["starts"], held.get("scale"), held.get("zero"))
    whole = form["kind"] == "int"
    return OP(x, *own, form["bits"] if whole else 16, form["group"] if whole else 0)
