"""Bytes of a cache by its parts, and the longest context that fits, against counting one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest

from backend.cache.build import Caches, cache_bytes, cache_parts, resident_bytes
from backend.cache.growth import MOST_TOKENS, Part, longest, most_bytes, total_bytes
from backend.recipes import parse

KIVI = Part(64.0, 12.0, layers=3, block=8, residual=32)
TOKENWISE = Part(64.0, 20.0, layers=3, residual=32, sinks=1)
WINDOW = Part(64.0, 64.0, layers=2, window=10)


def counted(part: Part, tokens: int) -> float:
    """Bytes token by token: a token is rounded once those after it are enough."""
    if part.window:
        tokens = min(tokens, part.window)
    kinds = ["plain"] * tokens
    start = min(part.sinks, tokens)
    if part.block == 1:
        for at in range(start, max(start, tokens - part.residual)):
            kinds[at] = "rounded"
    else:
        step, done = max(part.block, part.residual), start
        while done + step <= tokens:
            kinds[done : done + step] = ["rounded"] * step
            done += step
    each = {"plain": part.plain_bytes, "rounded": part.rounded_bytes}
    return part.layers * sum(each[kind] for kind in kinds)


@pytest.mark.parametrize("part", [KIVI, TOKENWISE, WINDOW])
def test_bytes_are_those_counted_token_by_token(part):
    lengths = list(range(140))
    assert [part.bytes_at(n) for n in lengths] == [counted(part, n) for n in lengths]
    assert part.bytes_at(np.array(lengths)).tolist() == [counted(part, n) for n in lengths]


def some_parts(rng: random.Random) -> list[Part]:
    block = rng.choice([1, 4, 8])
    residual = rng.choice([0, 8, 24]) if block > 1 else rng.randrange(30)
    sinks, window = rng.randrange(4), rng.choice([0, 0, 16])
    first = Part(16.0, rng.choice([2.0, 5.0]), rng.randint(1, 3), block, residual, sinks)
    return [first, Part(16.0, 6.0, residual=rng.randrange(9)), Part(16.0, 16.0, window=window)]


def test_the_longest_context_is_that_of_trying_every_length():
    rng = random.Random(0)
    for _ in range(60):
        parts = some_parts(rng)
        sums = [total_bytes(parts, n) for n in range(400)]
        room = rng.uniform(0, sums[-1] * 0.9)
        first_too_long = next((n for n, held in enumerate(sums) if held > room), None)
        assert first_too_long is not None
        assert longest(parts, room) == first_too_long - 1
        n = rng.randrange(1, 400)
        assert most_bytes(parts, n) == max(sums[: n + 1])


def test_what_never_fits_and_what_always_does():
    assert longest([KIVI], 0) == 0
    assert longest([KIVI], -5.0) == 0
    assert longest([WINDOW], 2 * 10 * 64.0) == MOST_TOKENS


def test_a_flush_frees_bytes_so_the_way_there_decides():
    room = total_bytes([KIVI], 63)  # the most before 32 tokens are rounded at 64
    assert total_bytes([KIVI], 64) < room
    assert longest([KIVI], room - 1) == 62
    assert longest([KIVI], room) > 64


@pytest.mark.parametrize("recipe", ["kv_cache(residual=5)", "kivi(group=8,residual=16)"])
@pytest.mark.parametrize("tokens", [1, 15, 16, 40, 61])
def test_parts_of_a_real_cache_say_what_it_holds(recipe, tokens, make_model):
    import torch

    model = make_model()
    caches = Caches(model, parse(recipe), packed=True)
    cache = caches.new(scoring=True)
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    model.bfloat16()(input_ids=ids, use_cache=True, past_key_values=cache)
    parts = cache_parts(caches)
    held = sum(map(resident_bytes, cache.layers))
    assert held == pytest.approx(total_bytes(parts, tokens), rel=0.02)
    assert cache_bytes(caches, tokens) == total_bytes(parts, tokens)
    assert len(parts) == 2 if "kivi" in recipe else 1
    assert sum(part.layers for part in parts) == 2 * 3


def test_the_16_bit_cache_of_sliding_windows_ends_at_their_length(make_model):
    caches = Caches(make_model("gemma3_text"), (), packed=False)
    token = 2 * 2 * 16 * 2  # keys and values of one layer
    assert cache_bytes(caches, 100) == (2 * 8 + 100) * token
