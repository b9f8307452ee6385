"""Decode attention on packed caches: checked, then timed in turn with attention in bf16.

Of a row of the bench m is sequences, n tokens of each, k numbers of a token: keys and values of
all heads. "Weights" are the cache. Heads are those of Llama-3.1-8B.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from kernels.base import Case, Json
from kernels.contest import DENSE, Contender, Row, contest, relative_error
from kernels.integers import int_format
from kernels.kv_decode import decode, reference
from kernels.kv_decode.layout import Held
from kernels.timing import InTurn, copies

NAME, RIVAL = "kv_decode", "sdpa"
HEADS, GROUP, DIM = 8, 4, 128  # of keys and values; query heads to each of them; channels of a head
WIDTH, SCALING = 2 * HEADS * DIM, DIM**-0.5
PLACES = {  # sequences, tokens of each
    "cpu": ((1, 1024), (1, 4096)),
    "cuda": ((1, 4096), (1, 32768), (1, 131072), (32, 4096)),
}
KIVI = {"kind": "kivi", "group": 32, "scale_dtype": "float16", "keys": "channel", "newest": 128}
PER_TOKEN = {"keys": "token", "newest": 0}
CACHES: tuple[Json, ...] = (  # newest: tokens in 16 bits; values have a scale per token in all
    {**KIVI, "bits": 2},
    {**KIVI, "bits": 4},
    {**int_format(bits=8, symmetric=True, scale_dtype="float16"), **PER_TOKEN},
    {**int_format(bits=4, group=32, scale_dtype="float16"), **PER_TOKEN},
)

Cache = tuple[Held, Held]  # keys, values


@torch.no_grad()
def measure(batch: int, tokens: int, device: torch.device) -> Iterator[Row]:
    """Every cache of one size: correctness first, then times in turn with bf16 attention's."""
    source = torch.Generator(device).manual_seed(0)
    q = torch.randn(batch, HEADS * GROUP, DIM, generator=source, device=device).bfloat16()
    plain = Case(batch, tokens, WIDTH, {"kind": DENSE})
    rivals = []
    for form in CACHES:
        cache = example(form, batch, tokens, source)
        error = relative_error(on_packed(q, cache), reference(q, *cache, scaling=SCALING))
        size = sum(part.nbytes() for part in cache)
        call = InTurn(on_packed, q, copies(cache, deepcopy, size, device))
        rivals.append(Contender(NAME, replace(plain, weight=form), call, size, error))
    both = torch.randn(2, batch, HEADS, tokens, DIM, device=device, dtype=torch.bfloat16)
    dense = InTurn(in_bf16, q, copies(both, Tensor.clone, 2 * both.numel(), device))
    yield from contest(Contender(RIVAL, plain, dense, 2 * both.numel()), rivals, device)


def on_packed(q: Tensor, cache: Cache) -> Tensor:
    """q [B, Hq, D] -> [B, Hq, D]."""
    return decode(q, *cache, scaling=SCALING)


def in_bf16(q: Tensor, both: Tensor) -> Tensor:
    """The same by PyTorch on keys and values [2, B, H, n, D].

    Query heads of a key-value head are rows of one product: `enable_gqa` repeats keys and values
    on a CPU, which takes 8 to 13 times as long in PyTorch 2.13.
    """
    rows = q.unflatten(1, (HEADS, GROUP))  # [B, H, Hq / H, D]
    return functional.scaled_dot_product_attention(rows, *both).flatten(1, 2)


def example(form: Json, batch: int, tokens: int, source: torch.Generator) -> Cache:
    """Random keys and values, on the generator's device."""
    keys, values = (side(form, axis, batch, tokens, source) for axis in (form["keys"], "token"))
    return keys, values


def side(form: Json, axis: str, batch: int, tokens: int, source: torch.Generator) -> Held:
    """Keys or values whose scales are shared along an axis: numbers about 0, of order 1."""
    bits, newest, device = form["bits"], form["newest"], source.device
    block = form["group"] if axis == "channel" else 1
    units = (tokens - newest) // block
    params = DIM if axis == "channel" else DIM // (form["group"] or DIM)  # of a token or block

    def draw(*shape: int) -> Tensor:
        return torch.randint(
            0, 256, (batch, units, *shape), generator=source, device=device, dtype=torch.uint8
        )

    shape = (batch, HEADS, units, params)
    scale = 3 / 2**bits * (1 + torch.rand(shape, generator=source, device=device))
    offset = None
    if form["kind"] == "kivi":
        offset = (-scale * 2 ** (bits - 1)).half()
    elif not form["symmetric"]:
        offset = draw(HEADS * params * bits // 8)
    late = torch.randn(batch, HEADS, newest, DIM, generator=source, device=device)
    codes = draw(HEADS * block * DIM * bits // 8)
    return Held(late.bfloat16(), codes, scale.half(), offset, bits=bits, block=block)
