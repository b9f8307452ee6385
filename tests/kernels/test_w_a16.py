"""Packed integer weights by Triton's interpreter, against fp64; its layout; the op."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import aot
from kernels.base import Case
from kernels.integers import DTYPES, dequantized, int_format
from kernels.w_a16 import FIELD_BITS, KERNEL, OP, arguments, cpu, kernel
from kernels.w_a16.layout import FIELDS, PLANES, pack_planes, plane_of, unpack_planes
from kernels.workspace import WORKSPACES

CUDA = torch.device("cuda")
SHAPES = (  # m, n, k: one row of x and more than a tile, n and k off tiles, planes and groups
    (1, 64, 256),
    (9, 65, 100),
    (17, 130, 512),
)
WIDTHS = (2, 3, 4, 5, 8)


def made(m, n, k, seed=0, **knobs):
    """A random weight packed, W_hat [n, k] fp64 by its definition, x [m, k] fp16."""
    case = Case(m, n, k, int_format(**knobs))
    rng = torch.Generator().manual_seed(seed)
    codes, params = KERNEL.example(case, rng)
    params["scale"] = params["scale"].to(DTYPES[case.weight["scale_dtype"]])
    packed = KERNEL.pack(codes, params, case.weight, None)
    w = dequantized(codes, params, case.weight)
    return packed, w, torch.randn(m, k, generator=rng).half()


def poisoned(monkeypatch):
    """New outputs and workspaces hold NaN, so what is never written shows."""
    new_empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    for (purpose, dtype, _), buffers in WORKSPACES.held.items():
        if purpose == "partials" and dtype.is_floating_point:
            buffers[-1].fill_(torch.nan)


def run(x, packed, **config):
    """The kernel in the interpreter."""
    held, n, _, bits, group = arguments(packed)
    return kernel.product(x, *held, bits, n, group, config or None)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_the_kernel_multiplies(bits, m, n, k, monkeypatch):
    group = {256: 128, 100: 32, 512: 0}[k]
    packed, w, x = made(m, n, k, bits=bits, group=group, symmetric=m == 9)
    poisoned(monkeypatch)
    exact = x.double() @ w.double().T
    got = run(x, packed)
    assert got.shape == (m, n)
    # Results are rounded to fp16, 5e-4 of themselves; sums are fp32.
    assert (got.double() - exact).abs().max() <= 6e-4 * exact.abs().max()


@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_parts_of_the_input_channels_are_summed_and_the_counters_rest_at_zero(splits, monkeypatch):
    packed, w, x = made(3, 70, 500, bits=4, group=16)
    poisoned(monkeypatch)
    exact = x.double() @ w.double().T
    config = {"columns": 8, "splits": splits, "warps": 4, "stages": 3}
    got = [run(x, packed, **config) for _ in range(2)]
    assert torch.equal(*got)
    assert (got[0].double() - exact).abs().max() <= 6e-4 * exact.abs().max()
    assert not WORKSPACES.take("counters", 2, torch.int32, x.device).any()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_expanded_weights_are_the_format_s_own(bits, dtype):
    packed, w, _ = made(1, 65, 100, bits=bits, group=16)
    held, n, k, width, group = arguments(packed)
    out = torch.full((n, k), torch.nan, dtype=dtype)
    assert torch.equal(kernel.expand(*held, width, group, out), w.to(dtype))


@pytest.mark.parametrize("bits", sorted(set(FIELD_BITS.values())))
@pytest.mark.parametrize("dtype", [tl.float16, tl.bfloat16], ids=str)
def test_the_bit_tricks_give_whole_numbers(bits, dtype, monkeypatch):
    """Every field of every word: the machine's path, its instructions in plain words."""

    @triton.jit
    def lowered(words, SHIFT: tl.constexpr):
        return words >> SHIFT  # ones come in from the left, as bits of the other word would

    @triton.jit
    def masked(words, MASK: tl.constexpr, OTHER):
        return (words & MASK) | OTHER

    @triton.jit
    def byte_floats(words, FIELD: tl.constexpr):
        byte = (words.to(tl.int32) >> (8 * FIELD)) & 255
        return (byte | 0x4B000000).to(tl.float32, bitcast=True)

    @triton.jit
    def fused(raw, STEP: tl.constexpr, less):
        number = raw.to(tl.float32) * STEP + less.to(tl.float32)[:, None]
        return number.to(raw.dtype)

    @triton.jit
    def compared(words, zeros, out, BITS: tl.constexpr, FIELD: tl.constexpr, DTYPE: tl.constexpr):
        row = tl.arange(0, 4)
        at = row[:, None] * 16384 + tl.arange(0, 16384)[None, :]
        first = tl.load(words + at)
        held = (first, first, first)
        zero = tl.load(zeros + row)
        number = kernel.plane_number(held, zero, FIELD, BITS, DTYPE, True)
        plain = kernel.plane_number(held, zero, FIELD, BITS, tl.float32, False)
        tl.store(out + at, number.to(tl.float32) - plain)

    for twin in (lowered, masked, byte_floats, fused):
        monkeypatch.setattr(kernel, twin.fn.__name__, twin)
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    for zero in (0, 1, 2 ** (bits - 1), 2**bits - 1):
        for field in range(FIELDS[bits]):
            out = torch.full((2**16,), torch.nan)
            compared[(1,)](words, torch.full((4,), float(zero)), out, bits, field, dtype)
            assert not out.any(), (zero, field)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_planes_round_trip(data):
    bits = data.draw(st.sampled_from(sorted(FIELDS)))
    n, k = data.draw(st.integers(1, 130)), data.draw(st.integers(1, 300))
    plane = data.draw(st.sampled_from(PLANES))
    seed = data.draw(st.integers(0, 2**16))
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=rng, dtype=torch.uint8)
    words = pack_planes(codes, bits, plane)
    assert words.element_size() * 8 * words.numel() == bits * words.shape[0] * 64 * (
        words.shape[1] * FIELDS[bits] * plane
    )
    assert torch.equal(unpack_planes(words, bits, n, k), codes)


def test_words_are_planes():
    codes = torch.arange(64 * 64).view(64, 64).to(torch.uint8) & 15
    words = pack_planes(codes, 4, 16)
    assert words.shape == (1, 1, 1, 64, 16)
    expected = sum(int(codes[5, 16 * i + 3]) << (4 * i) for i in range(4))
    assert int(words[0, 0, 0, 5, 3]) & 0xFFFF == expected


def test_planes_are_long_where_groups_allow():
    assert plane_of(4, 128, 4096) == 128
    assert plane_of(4, 48, 4096) == 16
    assert plane_of(4, 0, 4096) == 128
    assert plane_of(3, 128, 4096) == 64
    assert plane_of(2, 0, 130) == 32  # 256 channels with padding; 128 would take 1024
    assert plane_of(4, 24, 96) == 0


def test_plans_fill_the_gpu_and_fit_its_memory():
    def plan(m, n, bits=4):
        return kernel.plan(torch.device("cpu"), m, n, 4096, bits, 128, plane_of(bits, 128, 4096))

    assert plan(1, 4096)["splits"] == 8  # 64 tiles on 132 multiprocessors
    assert plan(1, 28672)["splits"] == 1
    assert plan(64, 4096)["columns"] == 64
    assert plan(64, 4096)["splits"] == 2  # 229 KB of shared memory: one block at once on each
    assert plan(1, 4096, bits=3)["splits"] == 4  # 80 KB: two
    assert plan(192, 4096)["columns"] == 64
    assert plan(64, 4096, bits=3)["columns"] == 16
    for build in kernel.BUILDS:
        if build.kernel is kernel.product_tiles:
            c = build.constants
            counted = kernel.shared_bytes(c["BITS"], c["P"], c["MB"])
            assert counted <= aot.SHARED[90]


@pytest.mark.parametrize(
    ("knobs", "act", "says"),
    [
        ({"group": 24}, None, "multiples of 16 channels, not 24"),
        ({"beside": ["keep"]}, None, "nothing beside the codes"),
        ({"kind": "sdr"}, None, "not 'sdr'"),
        ({}, int_format(group=32), "one activation scale per token"),
    ],
)
def test_it_says_why_not(knobs, act, says):
    assert says in KERNEL.why_not({**int_format(), **knobs}, act, CUDA, 64, 96)


def test_it_takes_every_width_group_and_length():
    for bits in range(2, 9):
        for group, k in ((0, 31), (16, 100), (48, 4096), (128, 14336)):
            weight = int_format(bits=bits, group=group)
            assert KERNEL.why_not(weight, None, CUDA, 7, k) is None
    assert "slower" in KERNEL.why_not(int_format(), None, torch.device("cpu"), 64, 64)


def test_memory_is_what_the_codes_take():
    packed, _, _ = made(1, 4096, 4096, bits=3, group=128, scale_dtype="float16")
    assert packed.nbytes() * 8 / 4096**2 == pytest.approx(3 + 32 / 128)  # scale and zero, 16 bits


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_op_is_sound_and_compiles(symmetric):
    packed, w, x = made(3, 70, 130, bits=3, group=32, symmetric=symmetric)
    held, n, _, bits, group = arguments(packed)
    torch.library.opcheck(OP, (x, *held, bits, n, group))
    compiled = torch.compile(
        lambda x: KERNEL.matmul(x, packed), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), KERNEL.matmul(x, packed))
    assert torch.equal(cpu.dense(*held, bits, n, 130, group), w)
    assert KERNEL.matmul(x[:0], packed).shape == (0, 70)
    assert run(x[:0], packed).shape == (0, 70)
