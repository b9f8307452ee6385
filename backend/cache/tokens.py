"""Tokens: what a packed cache holds of one layer's keys or values, read a stretch at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.cache.codec import Codec, Codes
from backend.cache.rotary import Turns, rotate


@dataclass(frozen=True)
class Tokens:
    """[first | codes | newest] in order. A later update makes tensors of its own, so this stays."""

    newest: Tensor  # [B, H, r, D], 16 bits (or what the model computes in)
    first: Tensor | None = None  # [B, H, sinks, D]
    codes: Codes | None = None  # packed
    rounded: int = 0  # tokens that are codes
    codec: Codec | None = None
    turns: Turns | None = None  # of keys that are rounded before rotary positions

    @property
    def sinks(self) -> int:
        """First tokens in 16 bits."""
        return 0 if self.first is None else self.first.shape[2]

    @property
    def count(self) -> int:
        """All tokens."""
        return self.sinks + self.rounded + self.newest.shape[2]

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens start.. as attention sees them, in the type of the newest: [B, H, t, D]."""
        begin, end = self.sinks, self.sinks + self.rounded
        parts = []
        if start < begin and self.first is not None:
            parts.append(self.first[:, :, start:stop])
        if start < end and stop > begin:
            parts.append(self._decoded(max(start, begin) - begin, min(stop, end) - begin))
        if stop > end:
            parts.append(self.newest[:, :, max(start - end, 0) : stop - end])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _decoded(self, start: int, stop: int) -> Tensor:
        """Tokens start.. of the codes."""
        assert self.codec is not None
        assert self.codes is not None
        block = self.codec.block
        low, high = start // block, -(-stop // block)
        values = self.codec.decode(self.codec.unpack(self.codec.part(self.codes, low, high)))
        values = turned(values, self.turns, self.sinks + low * block)
        return values[:, :, start - low * block : stop - low * block].to(self.newest.dtype)


def turned(values: Tensor, turns: Turns | None, start: int) -> Tensor:
    """Decoded tokens start.. [B, H, t, D] fp32 -> at their rotary positions, if there are any."""
    if turns is None or turns.cos is None:
        return values
    return rotate(values, *turns.of(start, start + values.shape[2]))
