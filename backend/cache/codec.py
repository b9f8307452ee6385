"""Codec: how the tokens of one tensor, keys or values, are rounded, stored and read back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from backend.formats import Format, QTensor
from kernels.kv_decode import OFFSETS, why_not_held
from kernels.kv_decode.layout import Held
from kernels.packing import pack_bits, packed_bytes, unpack_bits

Codes = dict[str, Tensor]  # each [B, ..., n, ...]: tokens, or blocks of them, on dimension 2
Axis = Literal["token", "channel"]
WHOLE_GROUPS = 64  # channels of a row that shows which parameters a format has


class Codec:
    """Rounds x [B, H, t, D], t a multiple of `block`. What it gives can be joined along tokens.

    Codes and parameters have the batch on dimension 0 and tokens (or blocks of tokens) on 2; where
    something else is stored, `join`, `select` and `part` are to be overridden.
    """

    block: int = 1  # tokens that are rounded together
    mixes_tokens: bool = False  # True: a padding token changes its neighbours

    def encode(self, x: Tensor) -> Codes:
        """x [B, H, t, D] of any floating type -> codes, one byte each, and parameters."""
        raise NotImplementedError(f"{type(self).__name__} cannot encode")

    def decode(self, codes: Codes) -> Tensor:
        """The inverse of `encode` but for the rounding -> [B, H, t, D] fp32."""
        raise NotImplementedError(f"{type(self).__name__} cannot decode")

    def bits_per_token(self, heads: int, dim: int) -> float:
        """Bits of a token of one layer, all its heads, everything that is stored."""
        raise NotImplementedError(f"{type(self).__name__} does not say how many bits it takes")

    def typical(self, x: Tensor) -> Tensor:
        """Normal numbers x [B, H, t, D] -> such as it was fitted to, where bytes depend on them."""
        return x

    def pack(self, codes: Codes) -> Codes:
        """What stays in memory."""
        return codes

    def unpack(self, packed: Codes) -> Codes:
        """The inverse of `pack`."""
        return packed

    def held(self, newest: Tensor, first: Tensor | None, packed: Codes | None) -> Held | None:
        """Packed codes between first and newest tokens for the op that reads such; None: it cannot.

        newest [B, H, r, D], first [B, H, s, D], both in 16 bits.
        """
        return None

    def join(self, parts: Sequence[Codes]) -> Codes:
        """Packed codes of earlier and later tokens in one."""
        return {name: torch.cat([part[name] for part in parts], 2) for name in parts[0]}

    def select(self, packed: Codes, rows: Tensor) -> Codes:
        """Packed codes of these sequences of the batch."""
        return {name: value.index_select(0, rows) for name, value in packed.items()}

    def part(self, packed: Codes, start: int, stop: int) -> Codes:
        """Packed codes of blocks start.. of all tokens."""
        return {name: value[:, :, start:stop] for name, value in packed.items()}


class GridCodec(Codec):
    """Any format of the registry. Its rows are the units that may share a scale.

    token: a row is one token of one head, D channels, in groups as the format has them, so that a
    token can be added without touching others. channel: a row is `group` tokens of one channel.
    """

    def __init__(self, grid: Format, axis: Axis = "token") -> None:
        if reason := why_not(grid, axis):
            raise ValueError(reason)
        self.grid = grid
        self.axis = axis
        self.block = grid.group if axis == "channel" else 1
        self.mixes_tokens = axis == "channel"
        self._widths: dict[str, int] = {}  # name -> bits of one whole number
        self._held: dict[int, bool] = {}
        self._shapes: dict[str, torch.Size] = {}  # name -> [H, ...] of one token or block, unpacked

    def encode(self, x: Tensor) -> Codes:
        units = self._units(x)  # [B, H, n, K] or [B, H, n, D, K]
        q = self.grid.quantize(units.reshape(-1, units.shape[-1]))
        params = {k: v.view(*units.shape[:-1], *v.shape[1:]) for k, v in q.params.items()}
        return {"codes": q.codes.view(units.shape), **params}

    def decode(self, codes: Codes) -> Tensor:
        last = codes["codes"].dim() - 2  # of the dimensions that number rows
        rows = {name: value.flatten(0, last) for name, value in codes.items()}
        q = QTensor(rows.pop("codes"), rows, self.grid)
        return self._tokens(q.dequantize().view(codes["codes"].shape))

    def bits_per_token(self, heads: int, dim: int) -> float:
        """As `pack` stores it: whole numbers of a row end at a byte, parameters as they are."""
        row = self._row(dim)  # of a head: one token, or one channel of a block
        rows = dim if self.axis == "channel" else 1
        total = heads * rows * 8 * packed_bytes(row.codes.numel(), self._width("codes"))
        for name, value in row.params.items():
            count = heads * rows * value.numel()
            small = value.dtype == torch.uint8
            width = self._width(name) if small else 8 * value.element_size()
            total += 8 * packed_bytes(count, width)
        return total / self.block

    def pack(self, codes: Codes) -> Codes:
        codes = self._channels_last(codes)
        self._shapes = {k: torch.Size([v.shape[1], *v.shape[3:]]) for k, v in codes.items()}
        return {name: self._packed(name, value) for name, value in codes.items()}

    def unpack(self, packed: Codes) -> Codes:
        codes = {name: self._unpacked(name, value) for name, value in packed.items()}
        return self._channels_last(codes)

    def held(self, newest: Tensor, first: Tensor | None, packed: Codes | None) -> Held | None:
        if not self._readable(newest.shape[-1]):
            return None
        if packed is None:
            return Held(newest, first=first)
        scale = packed["scale"].squeeze(-1) if self.axis == "channel" else packed["scale"]
        beside = OFFSETS[self.grid.kind]
        offset = packed.get(beside)
        if offset is not None and offset.dtype == torch.uint8:
            offset = offset.squeeze(1)
        elif offset is not None:
            offset = offset.squeeze(-1) if self.axis == "channel" else offset
        codes, bits = packed["codes"].squeeze(1), self._width("codes")
        return Held(newest, codes, scale, offset, first, bits, self.block)

    def _readable(self, dim: int) -> bool:
        """True if there is an op that reads these codes in heads of `dim` channels."""
        if dim not in self._held:  # asked for every token
            self._held[dim] = why_not_held(self.grid.data(), self.axis, dim) is None
        return self._held[dim]

    def _units(self, x: Tensor) -> Tensor:
        """x [B, H, t, D] -> rows on the last axis: as it is, or [B, H, t / block, D, block]."""
        return x if self.axis == "token" else x.unflatten(2, (-1, self.block)).transpose(-1, -2)

    def _tokens(self, units: Tensor) -> Tensor:
        """The inverse of `_units`."""
        return units if self.axis == "token" else units.transpose(-1, -2).flatten(2, 3)

    def _channels_last(self, codes: Codes) -> Codes:
        """Codes of blocks [B, H, n, D, block] -> [B, H, n, block, D], as attention reads them."""
        if self.axis == "token":
            return codes
        return {**codes, "codes": codes["codes"].transpose(-1, -2)}

    def _row(self, dim: int) -> QTensor:
        """One row of a head of `dim` channels, rounded."""
        return self.grid.quantize(torch.zeros(1, self.block if self.axis == "channel" else dim))

    def _packed(self, name: str, value: Tensor) -> Tensor:
        """[B, H, n, ...] -> [B, n', 1, ...], whole numbers as a row of bits for each token."""
        if value.dtype != torch.uint8:
            return value
        return pack_rows(value.transpose(1, 2).flatten(2), self._width(name)).unsqueeze(1)

    def _unpacked(self, name: str, value: Tensor) -> Tensor:
        if value.dtype != torch.uint8:
            return value
        shape = self._shapes[name]
        rows = unpack_rows(value.squeeze(1), self._width(name), shape.numel())
        return rows.unflatten(-1, shape).transpose(1, 2)

    def _width(self, name: str) -> int:
        """Bits of one whole number."""
        if name not in self._widths:
            self._widths[name] = self._counted_width(name)
        return self._widths[name]

    def _counted_width(self, name: str) -> int:
        """A code's bits, or those that the format counts for a parameter."""
        if name == "codes":
            return min(8, math.ceil(self.grid.code_bits()))
        params = self._row(WHOLE_GROUPS).params
        whole = [value for value in params.values() if value.dtype == torch.uint8]
        rest = [value for value in params.values() if value.dtype != torch.uint8]
        bits = sum(self.grid.param_bits(params).values())
        bits -= sum(8 * value.numel() * value.element_size() for value in rest)
        return math.ceil(bits / sum(value.numel() for value in whole))


def why_not(grid: Format, axis: Axis) -> str:
    """Why a format cannot round keys or values along an axis, "" if it can."""
    if not grid.row_local or grid.granularity == "tensor":
        return (
            f"{grid.kind} has scales that many tokens share, which later tokens would change; "
            "use a format with a scale per row or group"
        )
    if axis == "channel" and not grid.group:
        return (
            f"{grid.kind}: scales per channel cover blocks of tokens, and group=0 says not how "
            "many; set group=32"
        )
    other = getattr(grid, "axis", axis)
    return "" if other == axis else f"{grid.kind}: its axis is {other}, that of the cache {axis}"


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """codes [..., K] uint8 -> [..., ceil(K bits / 8)], each row a stream of its own."""
    k = codes.shape[-1]
    rows = torch.nn.functional.pad(codes, (0, -k % 8))
    packed = pack_bits(rows, bits).view(*codes.shape[:-1], -1)
    return packed[..., : packed_bytes(k, bits)].contiguous()


def unpack_rows(packed: Tensor, bits: int, k: int) -> Tensor:
    """[..., ceil(K bits / 8)] -> codes [..., K] uint8: the inverse of pack_rows."""
    whole = k + -k % 8
    rows = torch.nn.functional.pad(packed, (0, packed_bytes(whole, bits) - packed.shape[-1]))
    return unpack_bits(rows.flatten(), bits, rows[..., 0].numel() * whole).view(
        *packed.shape[:-1], whole
    )[..., :k]
