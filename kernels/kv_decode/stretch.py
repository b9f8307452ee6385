"""Attention of one new token in plain torch, a stretch of the cached tokens at a time."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

STRETCH = {"cpu": 256, "cuda": 8192}  # tokens unpacked at once: cached there, or few launches here
LEAST = torch.finfo(torch.float32).min  # instead of -inf, whose differences are no numbers
TINY = torch.finfo(torch.float32).tiny


class Readable(Protocol):
    """Keys or values of one layer."""

    @property
    def count(self) -> int:
        """Tokens."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens start.. [B, H, t, D]."""
        ...


def attend(
    q: Tensor,
    keys: Readable,
    values: Readable,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """q [B, Hq, D] -> [B, Hq, D] in its type; mask [B, n] bool, or None: all tokens are read.

    softmax(q K^T scaling) V with a running maximum and mass (Milakov and Gimelshein 2018), so no
    more than `step` tokens are ever unpacked. A sequence that reads nothing gives zeros.
    """
    batch, query_heads, _ = q.shape
    step = STRETCH[q.device.type]
    top = mass = total = torch.zeros((), device=q.device)
    for start in range(0, keys.count, step):
        stop = min(start + step, keys.count)
        k = keys.read(start, stop).float()  # [B, H, t, D]
        heads = k.shape[1]
        grouped = q.float().view(batch, heads, query_heads // heads, -1)
        scores = grouped @ k.transpose(-1, -2) * scaling  # [B, H, Hq / H, t]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, start:stop], -torch.inf)
        higher = scores.amax(-1, keepdim=True)
        if start:
            higher = torch.maximum(top, higher)
        p = (scores - higher.clamp_min(LEAST)).exp()
        shrink = (top - higher.clamp_min(LEAST)).exp() if start else torch.zeros_like(higher)
        mass = mass * shrink + p.sum(-1, keepdim=True)
        total = total * shrink + p @ values.read(start, stop).float()  # [B, H, Hq / H, D]
        top = higher
    return (total / mass.clamp_min(TINY)).view(batch, query_heads, -1).to(q.dtype)
