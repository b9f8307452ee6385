"""Decode attention on packed keys and values against float64, at awkward lengths and layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import kv_decode
from kernels.kv_decode import decode, reference, why_not_held, why_not_triton
from kernels.kv_decode.layout import Held, fields
from kernels.kv_decode.stretch import STRETCH
from kernels.packing import pack_bits
from kernels.workspace import WORKSPACES

kernel = pytest.importorskip("kernels.kv_decode.kernel", reason="Triton is not installed")


@dataclass(frozen=True)
class Kept:
    """How one side is kept: `rounded` tokens as codes, `rest` in 16 bits."""

    rounded: int
    rest: int
    bits: int = 2
    block: int = 1
    group: int = 32
    offset: str = "low"


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def held(
    kept: Kept,
    batch: int = 2,
    heads: int = 3,
    dim: int = 64,
    sinks: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    size: float = 1.0,
) -> Held:
    """Random tokens; numbers of order `size`."""
    g = source(seed)
    newest = size * torch.randn(batch, heads, kept.rest, dim, generator=g)
    first = size * torch.randn(batch, heads, sinks, dim, generator=g) if sinks else None
    first = None if first is None else first.to(dtype)
    if not kept.rounded:
        return Held(newest.to(dtype), first=first)
    units, bits = kept.rounded // kept.block, kept.bits
    row = heads * kept.block * dim * bits // 8
    codes = torch.randint(0, 256, (batch, units, row), generator=g, dtype=torch.uint8)
    params = dim if kept.block > 1 else dim // kept.group
    scale = torch.rand(batch, heads, units, params, generator=g) * 3 / 2**bits + 0.01
    offset = None
    if kept.offset == "low":
        offset = (size * (torch.randn(scale.shape, generator=g) - 1.5)).half()
    if kept.offset == "zero":
        shape = (batch, units, -(-heads * params * bits // 8))
        offset = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    return Held(newest.to(dtype), codes, (size * scale).half(), offset, first, bits, kept.block)


CASES: dict[str, tuple[Kept, Kept, dict[str, Any]]] = {
    # name: keys, values, {sinks, channels of a head, query heads a key-value head, masked}
    "KIVI-2": (Kept(96, 9, 2, 32), Kept(73, 32, 2), {"group": 4}),
    "KIVI-4, one query head": (Kept(64, 5, 4, 32), Kept(37, 32, 4), {}),
    "KIVI-2 of 128 channels": (Kept(64, 1, 2, 64), Kept(33, 32, 2), {"dim": 128, "group": 8}),
    "only newest keys": (Kept(0, 45), Kept(13, 32, 2), {"group": 4}),
    "nothing rounded": (Kept(0, 7), Kept(0, 7), {}),
    "sinks, a mask, packed zeros": (
        Kept(48, 9, 4, 16, offset="zero"),
        Kept(50, 7, 4, offset="zero"),
        {"sinks": 3, "masked": True},
    ),
    "per token, symmetric": (
        Kept(40, 1, 8, group=64, offset="middle"),
        Kept(40, 1, 8, group=64, offset="middle"),
        {"group": 2},
    ),
    "per token, groups": (Kept(35, 0, 4, offset="zero"), Kept(35, 0, 4, offset="zero"), {}),
    "per channel both": (
        Kept(64, 5, 4, 32, offset="zero"),
        Kept(64, 5, 4, 32, offset="middle"),
        {"group": 3, "masked": True},
    ),
    "keys alone": (Kept(32, 3, 8, 32), Kept(0, 35), {"dim": 128}),
}


def example(name: str, dtype: torch.dtype, size: float = 1.0) -> tuple[Any, ...]:
    """q, keys, values, mask and scaling of a case."""
    keys, values, more = CASES[name]
    sinks, dim, group = more.get("sinks", 0), more.get("dim", 64), more.get("group", 1)
    sides = [
        held(kept, dim=dim, sinks=sinks, dtype=dtype, seed=seed, size=size)
        for seed, kept in enumerate((keys, values))
    ]
    q = torch.randn(2, 3 * group, dim, generator=source(9)).to(dtype)
    mask = None
    if more.get("masked"):
        mask = torch.rand(2, sides[0].count, generator=source(8)) > 0.3
        mask[1, :40] = False  # whole passes see nothing
    return q, *sides, mask, dim**-0.5


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by that of the expected."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs and workspaces begin as NaN."""
    empty_like = torch.empty_like

    def poison(x: Tensor, **how: Any) -> Tensor:
        return empty_like(x, **how).fill_(torch.nan)

    monkeypatch.setattr(kernel.torch, "empty_like", poison)
    for name in ("kv_decode parts", "kv_decode stats"):
        WORKSPACES.take(name, 1 << 18, torch.float32, torch.device("cpu")).fill_(torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_triton_kernel_is_attention_in_float64(name, dtype, poisoned):
    """fp16: codes times scales that were rounded to fp16, as q and the weights are: 2e-3."""
    q, keys, values, mask, scaling = example(name, dtype)
    assert why_not_triton(keys, values) is None
    found = kernel.attention(q, keys, values, mask, scaling)
    expected = reference(q, keys, values, mask, scaling=scaling)
    assert found.dtype == dtype
    assert error(found, expected) < (1e-6 if dtype == torch.float32 else 2e-3)
    again = kernel.attention(q, keys, values, mask, scaling)
    assert torch.equal(found, again)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 32])
def test_passes_of_one_program_are_added_with_a_running_maximum(
    block, masked, splits, poisoned, monkeypatch
):
    monkeypatch.setattr(kernel, "splits_for", lambda *about: splits)
    keys, values = held(Kept(160, 5, 4, block), heads=1), held(Kept(133, 32, 4), heads=1, seed=1)
    q = 3 * torch.randn(2, 2, 64, generator=source(9))
    mask = torch.rand(2, 165, generator=source(8)) > 0.3 if masked else None
    if mask is not None:
        mask[0, :70] = False  # the first two passes see nothing
    found = kernel.attention(q, keys, values, mask, 0.125)
    assert error(found, reference(q, keys, values, mask, scaling=0.125)) < 1e-6


@pytest.mark.parametrize("size", [1e-3, 100.0])
def test_sizes_fp16_cannot_hold_are_no_trouble(size):
    q, keys, values, mask, scaling = example("KIVI-2", torch.float16, size)
    scaling /= size  # else softmax picks one token
    found = kernel.attention(q * 1000, keys, values, mask, scaling / 1000)
    assert error(found, reference(q * 1000, keys, values, mask, scaling=scaling / 1000)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_op_on_a_cpu_is_attention_in_float64(name, dtype, monkeypatch):
    monkeypatch.setitem(STRETCH, "cpu", 23)  # cuts blocks and sinks
    q, keys, values, mask, scaling = example(name, dtype)
    found = decode(q, keys, values, mask, scaling=scaling)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    assert error(found, reference(q, keys, values, mask, scaling=scaling)) < tolerance[dtype]


def test_tensors_may_lie_in_any_order():
    """As projections give them: tokens before heads."""
    q, keys, values, mask, scaling = example("sinks, a mask, packed zeros", torch.float32)
    expected = kernel.attention(q, keys, values, mask, scaling)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    keys, values = (
        replace(side, newest=turned(side.newest), first=turned(side.first))
        for side in (keys, values)
    )
    assert torch.equal(kernel.attention(q, keys, values, mask.T.contiguous().T, scaling), expected)


@pytest.mark.parametrize("run", ["op", "triton"])
def test_weights_add_up_to_one(run):
    q, keys, _, mask, scaling = example("KIVI-2", torch.float32)
    ones = Held(torch.ones(2, 3, keys.count, 64))
    if run == "op":
        found = decode(q, keys, ones, mask, scaling=scaling)
    else:
        found = kernel.attention(q, keys, ones, mask, scaling)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-6, atol=1e-6)


def test_a_sequence_that_reads_nothing_gives_zeros():
    q, keys, values, _, scaling = example("KIVI-2", torch.float32)
    mask = torch.ones(2, keys.count, dtype=torch.bool)
    mask[0] = False
    for found in (
        decode(q, keys, values, mask, scaling=scaling),
        kernel.attention(q, keys, values, mask, scaling),
    ):
        assert (found[0] == 0).all()
        assert found[1].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_fields_are_the_codes_that_were_packed(bits, rows, bytes_, seed):
    count = rows * bytes_ * 8 // bits
    codes = torch.randint(0, 2**bits, (count,), generator=source(seed), dtype=torch.uint8)
    assert torch.equal(fields(pack_bits(codes, bits).view(rows, bytes_), bits).flatten(), codes)


@pytest.mark.parametrize("name", ["KIVI-2", "sinks, a mask, packed zeros", "nothing rounded"])
def test_any_cut_reads_the_same_tokens(name):
    _, keys, values, _, _ = example(name, torch.float32)
    for side in (keys, values):
        whole = side.read(0, side.count)
        for step in (1, 7, 50):
            cuts = range(0, side.count, step)
            parts = [side.read(at, min(at + step, side.count)) for at in cuts]
            assert torch.equal(torch.cat(parts, 2), whole)


def arguments(name: str) -> tuple[Any, ...]:
    """What the op gets in a case."""
    q, keys, values, mask, scaling = example(name, torch.float32)
    sides = [
        (s.newest, s.codes, s.scale, s.offset, s.first, s.bits, s.block) for s in (keys, values)
    ]
    return (q, *sides[0], *sides[1], mask, scaling)


@pytest.mark.parametrize("name", ["KIVI-2", "sinks, a mask, packed zeros"])
def test_the_op_is_a_good_one(name):
    torch.library.opcheck(kv_decode.OP, arguments(name))


def test_it_compiles_in_one_graph():
    q, *rest = arguments("KIVI-2")
    compiled = torch.compile(
        lambda x: kv_decode.OP(x, *rest) + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q), kv_decode.OP(q, *rest) + 1)


KIVI = {"kind": "kivi", "bits": 2, "group": 32}


@pytest.mark.parametrize(
    ("knobs", "axis", "dim", "says"),
    [
        ({}, "channel", 64, None),
        ({"kind": "int", "bits": 8, "group": 0}, "token", 64, None),
        ({"kind": "sdr"}, "token", 64, "'int' and 'kivi' codes, not 'sdr'"),
        ({"bits": 3}, "token", 64, "2, 4 and 8 bits, not 3"),
        ({}, "token", 80, "groups of 32 channels do not divide the 80"),
        ({}, "channel", 10, "10 codes of 2 bits do not end at a byte"),
    ],
)
def test_what_the_op_cannot_read_gets_a_sentence(knobs, axis, dim, says):
    found = why_not_held({**KIVI, **knobs}, axis, dim)
    assert found is None if says is None else says in found


@pytest.mark.parametrize(
    ("keys", "values", "more", "says"),
    [
        (Kept(32, 1, 2, 32), Kept(32, 1, 2), {"dim": 32}, "not of 32"),
        (Kept(24, 1, 2, 8), Kept(24, 1, 2), {}, "blocks of 8 tokens"),
        (Kept(24, 1, 4, group=16), Kept(24, 1, 4), {}, "keys have 4 groups of channels"),
    ],
)
def test_what_triton_cannot_read_gets_a_sentence(keys, values, more, says):
    assert says in why_not_triton(held(keys, **more), held(values, **more))
    uneven = why_not_triton(held(Kept(0, 9), sinks=2), held(Kept(0, 11)))
    assert "2 first keys and 0 first values" in uneven
