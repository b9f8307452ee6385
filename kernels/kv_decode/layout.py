"""Keys or values of one layer as a packed cache holds them, and their numbers again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FIELD_BITS = (2, 4, 8)  # of a code: a byte holds whole ones
OffsetKind = Literal["none", "middle", "zero", "low"]


@dataclass(frozen=True)
class Held:
    """Tokens of one side, in order: [first | codes | newest], first and newest in 16 bits.

    codes [B, n, H D bits / 8] uint8 has a row for each token, or [B, n, H block D bits / 8] for
    each block of tokens that share the scale of a channel; channels last, low bits first. scale is
    [B, H, n, G] (groups of a token's channels) or [B, H, n, D] (channels of a block).

    offset None: code 2^(bits-1) is 0. uint8 [B, n, bytes]: the codes of 0, packed like codes, as
    many as scales. Else, like scale: the value of code 0.
    """

    newest: Tensor  # [B, H, r, D]
    codes: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    first: Tensor | None = None  # [B, H, s, D]
    bits: int = 0
    block: int = 1

    @property
    def units(self) -> int:
        """Rows of codes: tokens, or blocks."""
        return 0 if self.codes is None else self.codes.shape[1]

    @property
    def rounded(self) -> int:
        """Tokens that are codes."""
        return self.units * self.block

    @property
    def sinks(self) -> int:
        """First tokens in 16 bits."""
        return 0 if self.first is None else self.first.shape[2]

    @property
    def count(self) -> int:
        """All tokens."""
        return self.sinks + self.rounded + self.newest.shape[2]

    @property
    def offset_kind(self) -> OffsetKind:
        """How the value of code 0 is kept."""
        if self.codes is None:
            return "none"
        if self.offset is None:
            return "middle"
        return "zero" if self.offset.dtype == torch.uint8 else "low"

    @property
    def zero_bytes(self) -> int:
        """Bytes of the zeros of a token or block, all heads."""
        return (
            self.offset.shape[-1] if self.offset_kind == "zero" and self.offset is not None else 0
        )

    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.newest, self.codes, self.scale, self.offset, self.first)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def groups(self, dim: int) -> int:
        """Groups of a token's channels that have a scale each."""
        return 1 if self.scale is None or self.block > 1 else self.scale.shape[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens start.. as attention reads them, in the type of the newest: [B, H, t, D].

        So a cache that keeps rounded numbers would give them; the Triton kernel does not round
        them again.
        """
        first, last = self.sinks, self.sinks + self.rounded
        parts = []
        if start < first and self.first is not None:
            parts.append(self.first[:, :, start:stop])
        if start < last and stop > first:
            parts.append(self._decoded(max(start, first) - first, min(stop, last) - first))
        if stop > last:
            parts.append(self.newest[:, :, max(start - last, 0) : stop - last])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _decoded(self, start: int, stop: int) -> Tensor:
        """Tokens start.. of the codes."""
        assert self.codes is not None
        assert self.scale is not None
        batch, heads, _, dim = self.newest.shape
        low, high = start // self.block, -(-stop // self.block)
        rows = fields(self.codes[:, low:high], self.bits)  # [B, n, H block D]
        codes = rows.view(batch, high - low, heads, self.block, dim).transpose(1, 2)
        scale = self.scale[:, :, low:high].float()  # [B, H, n, G or D]
        offset = self._low(scale, low, high)
        if self.block == 1:
            codes = codes.unflatten(-1, (scale.shape[-1], -1)).squeeze(3)  # [B, H, n, G, D / G]
        along = -1 if self.block == 1 else 3
        values = codes.to(torch.float32, memory_format=torch.contiguous_format)
        values = values.mul_(scale.unsqueeze(along)).add_(offset.unsqueeze(along))
        values = values.view(batch, heads, -1, dim)  # [B, H, n block, D]
        values = values[:, :, start - low * self.block : stop - low * self.block]
        return values.to(self.newest.dtype)

    def _low(self, scale: Tensor, low: int, high: int) -> Tensor:
        """Values of code 0 of tokens or blocks low.., like scale."""
        if self.offset is None:
            return -scale * 2 ** (self.bits - 1)
        if self.offset_kind == "low":
            return self.offset[:, :, low:high].float()
        batch, heads, units, count = scale.shape
        zeros = fields(self.offset[:, low:high], self.bits)[..., : heads * count]
        return -scale * zeros.view(batch, units, heads, count).transpose(1, 2).float()


def fields(rows: Tensor, bits: int) -> Tensor:
    """rows [..., bytes] -> codes [..., bytes * 8 / bits] uint8, low bits first."""
    if bits == 8:
        return rows
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=rows.device)
    return ((rows.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
