"""The product on a CPU: by C that looks codes up in tables of sums, or tiles that are expanded.

Expanded, it saves memory and no time: PyTorch has no CPU operation that multiplies by bit planes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.bcq.layout import FIELDS, ROWS, place
from kernels.table_cpu import SUMS, Table, by_tiles, columns, is_rows, takes, unpack_rows
from kernels.table_cpu import multiply as by_table
from kernels.workspace import WORKSPACES

TILES = 2  # of 64 rows at once: 128 rows of 4096 weights in fp32 stay in the cache


def multiply(
    x: Tensor, words: Tensor, alphas: Tensor, offsets: Tensor | None, n: int, group: int
) -> Tensor:
    """x [m, k] -> [m, n] in x's dtype; see layout.py for the others."""
    m, k = x.shape
    if is_rows(words):
        return by_rows(x, words, alphas, offsets, n, group)
    y = x.new_empty(m, n)
    for start in range(0, len(words), TILES):
        rows = slice(start * ROWS, min((start + TILES) * ROWS, n))
        part = dense(words, alphas, offsets, k, group, slice(start, start + TILES))
        w = WORKSPACES.take("rows", part.numel(), x.dtype, x.device).view_as(part)
        w.copy_(part)
        y[:, rows] = functional.linear(x, w[: rows.stop - rows.start])
    return y


def by_rows(
    x: Tensor, words: Tensor, alphas: Tensor, offsets: Tensor | None, n: int, group: int
) -> Tensor:
    """The same of table_cpu's rows; alphas [n, G, bits], offsets [n, G]."""
    form = alphas.shape[2]
    if takes(x):
        return by_table(
            x, Table(words, form, SUMS, group, alphas.shape[1], scale=alphas, more=offsets), n
        )
    return by_tiles(x, n, lambda rows: dense_rows(words, alphas, offsets, x.shape[1], group, rows))


def dense_rows(
    words: Tensor, alphas: Tensor, offsets: Tensor | None, k: int, group: int, rows: slice
) -> Tensor:
    """W_hat [rows, k] fp32 from table_cpu's rows, each sum in the format's order."""
    bits, of = alphas.shape[2], columns(k, group)
    codes, own = unpack_rows(words[rows], bits, k), alphas[rows].float()
    w = torch.zeros(codes.shape)
    for b in range(bits):
        w.addcmul_((codes >> b & 1).float() * 2 - 1, own[:, of, b])
    return w if offsets is None else w.add_(offsets[rows].float()[:, of])


def dense(
    words: Tensor,
    alphas: Tensor,
    offsets: Tensor | None,
    k: int,
    group: int,
    tiles: slice,
) -> Tensor:
    """W_hat [rows padded, k] fp32 of some tiles, each sum in the format's order."""
    bits, (_, blocks, _, _, plane) = alphas.shape[2], words.shape
    held = words[tiles]
    fields = FIELDS[bits]
    first = tiles.start * ROWS
    rows = slice(first, first + len(held) * ROWS)
    column = torch.arange(blocks * fields, device=words.device) * plane  # [planes]
    of = (column // group).clamp_max(len(alphas) - 1) if group else torch.zeros_like(column)

    def of_planes(values: Tensor) -> Tensor:
        """[G, rows] -> [tiles, blocks, F, 64, 1] fp32."""
        chosen = values.float()[of].view(blocks, fields, len(held), ROWS)
        return chosen.permute(2, 0, 1, 3)[..., None].contiguous()

    shape = (len(held), blocks, fields, ROWS, plane)
    w = WORKSPACES.take("sums", held.numel() * 16 // bits, torch.float32, words.device)
    w = w.view(shape).zero_()
    signs = WORKSPACES.take("signs", w.numel(), torch.float32, words.device).view(shape)
    for b in range(bits):
        word, bit = place(bits, b, 0)
        # A float's sign bit is bit 31: 0x3F800000 is 1.0, and 0x80000000 more is -1.0.
        shift = torch.arange(31 - bit, 31 - bit - fields, -1, dtype=torch.int32)
        whole = signs.view(torch.int32)
        unset = (~held[:, :, word]).to(torch.int32)[:, :, None]
        torch.bitwise_left_shift(unset, shift[:, None, None].to(words.device), out=whole)
        whole.bitwise_and_(-(2**31)).bitwise_or_(0x3F800000)
        w.addcmul_(signs, of_planes(alphas[:, rows, b]))
    if offsets is not None:
        w.add_(of_planes(offsets[:, rows]))
    return w.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[:, :k]
