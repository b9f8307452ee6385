"""How the bytes of a cache grow with its tokens, and how many tokens fit into so many bytes.

Plain numbers and no model: `size` stores them beside its measurement, so that whoever has the
measurement can say what any context takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_TOKENS = 1 << 30  # no question goes beyond; sliding windows alone would fit for ever


@dataclass(frozen=True)
class Part:
    """Keys or values of `layers` layers that are kept alike: [sinks | rounded | newest]."""

    plain_bytes: float  # of one token of one layer in 16 bits
    rounded_bytes: float  # of one that is rounded; the same where none is
    layers: int = 1
    block: int = 1  # tokens that are rounded together
    residual: int = 0  # newest tokens in 16 bits
    sinks: int = 0  # first tokens in 16 bits
    window: int = 0  # newest tokens that are kept at all; 0 is every token

    @property
    def period(self) -> int:
        """Tokens after which as many of the last are rounded as before."""
        return 1 if self.block == 1 else max(self.residual, self.block)

    def bytes_at(self, tokens: Any) -> Any:
        """Of one sequence of so many tokens, an int or an array of them."""
        held = np.minimum(tokens, self.window) if self.window else tokens
        rounded = rounded_tokens(held, self.block, self.residual, self.sinks)
        each = rounded * self.rounded_bytes + (held - rounded) * self.plain_bytes
        return self.layers * each


def rounded_tokens(count: Any, block: int, residual: int, sinks: int) -> Any:
    """How many of `count` tokens are rounded, the oldest after the sinks.

    Blocks of several tokens wait until there are a whole block and `residual` tokens.
    """
    after = positive(count - sinks)
    if block == 1:
        return positive(after - residual)
    return after - after % max(residual, block)


def positive(x: Any) -> Any:
    """x or 0, of a number or an array."""
    return x * (x > 0)


def total_bytes(parts: Sequence[Part], tokens: Any) -> Any:
    """All parts at a length, an int or an array of them."""
    return sum(part.bytes_at(tokens) for part in parts)


def most_bytes(parts: Sequence[Part], tokens: int) -> float:
    """The most that a cache takes while it grows to `tokens` tokens.

    More than at the end where a block was rounded just before it. A whole period earlier it took
    no more than now, so the last period holds the most.
    """
    period = math.lcm(*(part.period for part in parts))
    lengths = np.arange(max(0, tokens - period + 1), tokens + 1)
    return float(np.max(total_bytes(parts, lengths)))


def longest(parts: Sequence[Part], room: float) -> int:
    """The longest context that fits into `room` bytes at every length on its way, 0 for none."""
    fits, too_long = 0, 1
    while too_long < MOST_TOKENS and most_bytes(parts, too_long) <= room:
        fits, too_long = too_long, 2 * too_long
    if too_long >= MOST_TOKENS:
        return MOST_TOKENS
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if most_bytes(parts, middle) <= room:
            fits = middle
        else:
            too_long = middle
    return fits
