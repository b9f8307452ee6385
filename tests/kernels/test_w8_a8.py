"""int8 by int8: exact sums, every path of the Triton kernel in its interpreter, the op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.base import Case, find, kernels
from kernels.integers import activation_codes, dequantized, int_format
from kernels.quantize import Grid
from kernels.w8_a8 import KERNEL, OP, kernel
from kernels.w8_a8.layout import padded, unpadded

W8, A8 = int_format(bits=8, symmetric=True), int_format(bits=8, symmetric=True)
FUSED = {"fused": True, "bn": 32, "bk": 64, "splits": 1, "warps": 4, "stages": 2}
PATHS = {
    "rounded inside": FUSED,
    "rounded inside, split": {**FUSED, "splits": 3},
    "rounded before, split": {**FUSED, "fused": False, "splits": 2},
}
MANY = {"fused": False, "bm": 32, "bn": 32, "bk": 64, "warps": 4, "stages": 2}
FORMATS = {
    "symmetric": (W8, A8),
    "own ranges": (int_format(bits=8), int_format(bits=8)),
    "weights' own range": (int_format(bits=4), A8),
    "tokens' own range": (W8, int_format(bits=6, scale_dtype="bfloat16")),
    "one scale": (int_format(bits=8, symmetric=True, per_tensor=True), int_format(per_tensor=True)),
}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """new_empty gives NaN or 85, so an element that is never written shows."""
    plain = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        made = plain(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 85)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def example(m, n, k, forms, seed=0):
    """x [m, k] of magnitudes 1e-4 to 1e2 with a token of zeros, codes, parameters, packed."""
    case, rng = Case(m, n, k, *forms), torch.Generator().manual_seed(seed)
    codes, params = KERNEL.example(case, rng)
    x = torch.randn(m, k, generator=rng) * torch.logspace(-4, 2, m)[:, None]
    if m > 2:
        x[1] = 0
    return x, codes, params, KERNEL.pack(codes, params, *forms)


def multiplied(x, packed, config, name="w8_a8"):
    """The Triton kernel, on CPU tensors."""
    held = packed.tensors
    weight = kernel.Weight(held["codes"], held["scale"], held.get("shift"), held.get("sums"))
    return kernel.product(x, weight, Grid.of(packed.act), name, config)


def exact(x, codes, params, forms):
    """[m, n] fp64 from the definition of the formats."""
    code, scale, zero = activation_codes(x, forms[1])
    return ((code - zero).double() * scale.double()) @ dequantized(
        codes, params, forms[0]
    ).double().T


@pytest.mark.parametrize("forms", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("config", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 100), (3, 70, 320)])
def test_few_tokens(forms, config, m, n, k):
    x, codes, params, packed = example(m, n, k, forms, seed=m)
    y = multiplied(x, packed, config)
    expected = exact(x, codes, params, forms)
    # whole sums are exact; scales are rounded to fp32 (2^-24 each) and so is their product
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(y, multiplied(x, packed, config))


@pytest.mark.parametrize("forms", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("m", "n", "k"), [(17, 33, 100), (65, 70, 130)])
def test_many_tokens(forms, m, n, k):
    x, codes, params, packed = example(m, n, k, forms, seed=m)
    held = packed.tensors
    weight = kernel.Weight(held["codes"], held["scale"], held.get("shift"), held.get("sums"))
    rows = torch.empty(m, held["codes"].shape[1], dtype=torch.int8)
    scales, offsets = torch.empty(m), torch.empty(m, 2, dtype=torch.int32)
    kernel.launch_int_rows(x, (rows, scales, offsets), Grid.of(forms[1]))
    y = torch.full((m, n), torch.nan)
    kernel.launch_many(x, (rows, scales, offsets), weight, y, MANY, Grid.of(forms[1]))
    expected = exact(x, codes, params, forms)
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(y, OP(x, *arguments(packed)))


@pytest.mark.parametrize("m", [1, 8, 9, 16])
def test_the_heuristic_s_own_configurations(m):
    x, codes, params, packed = example(m, 65, 256, (W8, A8))
    y = multiplied(x.half(), packed, None)
    expected = exact(x.half(), codes, params, (W8, A8))
    assert y.dtype == torch.float16
    assert (y - expected).abs().max() <= 1e-3 * expected.abs().max()


def arguments(packed):
    held, act = packed.tensors, packed.act
    return held["codes"], held["scale"], held.get("shift"), held.get("sums"), *Grid.of(act)


@pytest.mark.parametrize("k", [64, 500])
def test_sums_are_whole_numbers_and_exact(k):
    """Scales of 1 show the sums themselves: extremes at every place, none saturates."""
    x = torch.randint(0, 2, (3, k)) * 254.0 - 127
    x[0] = 127
    codes = torch.randint(0, 256, (40, k), dtype=torch.uint8)
    codes[0], codes[1] = 0, 255
    packed = KERNEL.pack(codes, {"scale": torch.ones(40, 1)}, W8, A8)
    sums = x.long() @ (codes.long() - 128).T
    for y in (
        *(multiplied(x, packed, config) for config in PATHS.values()),
        KERNEL.matmul(x, packed),
        KERNEL.reference(x, packed),
    ):
        assert torch.equal(y.long(), sums)


def test_counters_are_ready_for_the_next_product():
    x, _, _, packed = example(2, 70, 320, (W8, A8))
    first = multiplied(x, packed, PATHS["rounded inside, split"])
    held = kernel.WORKSPACES.take("counters", 3, torch.int32, x.device)
    assert not held.any()
    other, *_ = example(2, 70, 320, (W8, A8), seed=9)
    multiplied(other, packed, PATHS["rounded inside, split"])
    assert torch.equal(first, multiplied(x, packed, PATHS["rounded inside, split"]))


@given(st.integers(1, 5), st.integers(1, 200))
@settings(max_examples=25, deadline=None)
def test_padding_round_trip(n, k):
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    wide = padded(codes)
    assert wide.shape[1] % 64 == 0
    assert wide.shape[1] < k + 64
    assert torch.equal(unpadded(wide, k), codes)


def test_no_tokens_give_no_rows():
    _, _, _, packed = example(1, 9, 64, (W8, A8))
    assert KERNEL.matmul(torch.empty(0, 64), packed).shape == (0, 9)
    assert multiplied(torch.empty(0, 64), packed, FUSED).shape == (0, 9)


@pytest.mark.parametrize("forms", list(FORMATS.values())[:2], ids=list(FORMATS)[:2])
def test_the_op_is_traceable_and_its_fake_right(forms):
    x, _, _, packed = example(3, 10, 70, forms)
    torch.library.opcheck(OP, (x, *arguments(packed)))
    whole = torch.compile(
        lambda x: KERNEL.matmul(x, packed) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(whole(x), KERNEL.matmul(x, packed) + 1)


@pytest.mark.parametrize(
    ("weight", "act", "k", "says"),
    [
        (W8, None, 64, "needs activations in integers too"),
        (int_format(bits=8, group=32), A8, 64, "one scale per row of weights, not per 32"),
        (int_format(bits=8), int_format(bits=8), 33100, "sums over 33100 input channels"),
        ({"kind": "sdr"}, A8, 64, "not 'sdr'"),
        ({**W8, "beside": ["outliers"]}, A8, 64, "these have outliers"),
    ],
)
def test_it_says_why_not(weight, act, k, says):
    assert says in KERNEL.why_not(weight, act, torch.device("cuda"), 64, k)


def test_a_gpu_takes_it():
    assert find(W8, A8, "cuda", 64, 64) is kernels()["w8_a8"]
    assert (
        KERNEL.why_not(int_format(bits=8), int_format(bits=8), torch.device("cuda"), 1, 33000)
        is None
    )
