"""The tables that codes of 4 bits and scales of 8 bits stand for, and how bytes are looked up.

A GPU's byte permute takes 4 bytes out of 8 by four selectors of 4 bits: 3 bits say which, and the
fourth makes of the byte eight times its top bit. With a table of 16 cut into A and B,

    out = permute(A, word) ^ permute(B, word ^ 0x8888)

is A's byte or B's byte, but for those eight equal bits from the other half. They are all 0, or all
1 and undone by storing A's byte inverted, if both levels of a pair (A[i], B[i]) have the same top
bit. So levels are paired within a sign, codes renumbered, and the table is scaled by a factor
that makes the low bytes' top bits of every pair agree, with the least rounding error.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CANDIDATES = 2**12  # factors in [1, 2) that are tried


def normal_float() -> list[float]:
    """NF4: 8 positive and 7 negative quantiles of the normal distribution, and 0.

    Dettmers et al. 2023, "QLoRA", appendix E; 0.9677083 is the released code's outermost quantile.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    steps = (torch.linspace(0.9677083, 0.5, c + 1, dtype=torch.float64)[:-1] for c in (7, 8))
    low, high = (normal.icdf(s) for s in steps)
    levels = torch.cat([-low, torch.zeros(1), high.flip(0)])
    return (levels / levels.max()).tolist()


def float4() -> list[float]:
    """bitsandbytes' FP4 by bit pattern."""
    positive = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    return [level / 12 for level in positive] + [-level / 12 for level in positive]


TABLES = {"nf4": normal_float, "fp4": float4}


@cache
def levels_of(name: str) -> Tensor:
    """[16] fp32, the level of each code."""
    return torch.tensor(TABLES[name](), dtype=torch.float32)


@cache
def dynamic8() -> Tensor:
    """[256] fp32: the 8-bit dynamic map in ascending order (Dettmers et al. 2022, section 1.3)."""
    found = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        middles = (ends[1:] + ends[:-1]) / 2 * 10.0 ** (i - 6)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32)


@cache
def numbering(name: str) -> Tensor:
    """[16] uint8: the nibble of each code."""
    return arrangement(name)[0]


@cache
def scaled_table(name: str, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Levels by nibble [16] in a 16-bit type, times a factor that lets bytes be looked up."""
    nibbles, factors = arrangement(name)
    by_nibble = torch.empty(16)
    by_nibble[nibbles.long()] = levels_of(name)
    below = torch.arange(8) < 4  # the pairs at 0 or below it, whose zero is -0
    signed = by_nibble.abs() * torch.where(below.repeat(2), -1.0, 1.0)
    return (factors[dtype] * signed).to(dtype), factors[dtype]


@cache
def arrangement(name: str) -> tuple[Tensor, dict[torch.dtype, float]]:
    """The nibble of each code [16] uint8, bit 3 telling a pair's two, and a factor for each type.

    Pairs are the same for both types, as weights are packed before a type is known: of each sign
    an even number of levels must have any two top bits.
    """
    values, order = levels_of(name).sort(stable=True)
    wide, wide_error = candidates(values, torch.bfloat16)
    fine, fine_error = candidates(values, torch.float16)
    for i in wide_error.argsort().tolist():
        kinds = 2 * wide[i] + fine  # [candidates, 16]
        counts = torch.stack([(kinds == kind).view(-1, 2, 8).sum(-1) for kind in range(4)])
        error = torch.where((counts % 2 == 0).all(0).all(-1), fine_error, torch.inf)
        best = int(error.argmin())
        if error[best].isfinite():
            break
    else:
        raise AssertionError(f"no factor lets the levels of {name} be paired")
    kind = kinds[best].view(2, 8)
    rank = torch.cat([kind[0].sort(stable=True).indices, 8 + kind[1].sort(stable=True).indices])
    nibbles = torch.empty(16, dtype=torch.uint8)
    nibbles[order[rank]] = (
        torch.arange(16, dtype=torch.uint8) // 2 + torch.tensor([0, 8] * 8).byte()
    )
    factor = {torch.bfloat16: 1 + i / CANDIDATES, torch.float16: 1 + best / CANDIDATES}
    return nibbles, factor


def candidates(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Levels [16] -> for each factor the low bytes' top bits [F, 16] and squared rounding error."""
    exact = (1 + torch.arange(CANDIDATES) / CANDIDATES)[:, None] * values
    rounded = exact.to(dtype)
    error = ((rounded.float() - exact) / exact).nan_to_num(0).square().sum(1)
    return rounded.view(torch.int16).int() >> 7 & 1, error


def permute_tables(table: Tensor) -> tuple[int, ...]:
    """[16] of a 16-bit type -> eight words: low and high bytes of A, then of B, as permute takes.

    Order: A low 0-3, A low 4-7, B low 0-3, B low 4-7, and the same of the high bytes.
    """
    words: list[int] = []
    bits = table.view(torch.int16).int()
    for shift in (0, 8):
        byte = bits >> shift & 255
        top = byte[8:] >> 7 == 1  # [8]: A's byte is inverted where the pair's top bit is 1
        first = torch.where(top, byte[:8] ^ 255, byte[:8])
        for half in (first, byte[8:]):
            words += [word_of(half[:4]), word_of(half[4:])]
    return tuple(words)


def word_of(four: Tensor) -> int:
    """Four bytes as one word, the first lowest."""
    return sum(int(b) << (8 * i) for i, b in enumerate(four))
