"""The product in plain torch: one tile of rows after the other becomes dense.

It saves memory, not time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.integers import dequantized, int_format
from kernels.sparse_24.layout import keep_of, kept_of, spread


def multiply(
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
    """x [m, k] -> [m, n] in x's dtype. See layout.py; `rows` of W are a tile."""
    n = len(where)
    y = x.new_empty(len(x), n)
    for tile in range(len(starts) - 1):
        part = slice(tile * rows, min(tile * rows + rows, n))
        span = (starts[tile], starts[tile + 1])
        own = (scale, zero, part, span, bits, group, placed)
        y[:, part] = functional.linear(x, dense(stream, where, *own, x.shape[1], x.dtype))
    return y


def dense(
    stream: Tensor,
    where: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    part: slice,
    span: tuple[int, int],
    bits: int,
    group: int,
    placed: bool,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """W_hat [rows, k] of one tile."""
    kept = kept_of(stream, bits, *span)
    if scale is None:
        return spread(kept.to(dtype), where[part], k, placed)
    codes = spread(kept, where[part], k, placed)
    params = {"scale": scale[part] if len(scale) > 1 else scale}
    if zero is not None:
        params["zero"] = zero[part] if len(zero) > 1 else zero
    form = int_format(bits=bits, group=group, symmetric=zero is None)
    keep = keep_of(where[part], k, placed)
    return dequantized(codes, params, form).masked_fill_(~keep, 0).to(dtype)
