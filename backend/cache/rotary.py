"""Rotary positions undone and done again, for what rounds keys as they are before them."""

from __future__ import annotations

import torch
from torch import Tensor


class Turns:
    """cos and sin [1 or B, n, R] of all tokens of a cache, shared by its layers."""

    def __init__(self) -> None:
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def extend(self, cos: Tensor, sin: Tensor, count: int) -> None:
        """Those of the newest tokens, as attention gets them; `count`: tokens there are then."""
        if self.cos is None or self.sin is None:
            self.cos, self.sin = cos, sin
        elif self.cos.shape[1] < count:  # the first layer of a pass brings them for all
            self.cos, self.sin = torch.cat([self.cos, cos], 1), torch.cat([self.sin, sin], 1)

    def of(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """cos and sin of tokens start.. [1 or B, 1, t, R]."""
        assert self.cos is not None
        assert self.sin is not None
        return self.cos[:, None, start:stop], self.sin[:, None, start:stop]

    def reset(self) -> None:
        """No tokens."""
        self.cos = self.sin = None

    def select(self, rows: Tensor, batch: int) -> None:
        """Keep these of `batch` sequences."""
        if self.cos is not None and self.sin is not None and len(self.cos) == batch > 1:
            self.cos, self.sin = self.cos.index_select(0, rows), self.sin.index_select(0, rows)

    def resident_bytes(self) -> int:
        """Bytes held."""
        held = [t for t in (self.cos, self.sin) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys [B, H, t, D] fp32 turned to their positions; only the first R channels turn."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = turned * cos.float() + half_turn(turned) * sin.float()
    return torch.cat([turned, rest], -1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotate`, which some models let scale by sqrt(cos^2 + sin^2) too."""
    cos, sin = cos.float(), sin.float()
    scale = cos.square() + sin.square()
    return rotate(x.float(), cos / scale, -sin / scale)


def half_turn(x: Tensor) -> Tensor:
    """[a, b] -> [-b, a], the halves of the last axis: transformers' `rotate_half`."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)
