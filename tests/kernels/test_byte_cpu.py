"""Products of bytes in C: inputs rounded as the format says, bit for bit; sums against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import byte_cpu, int_act_cpu
from kernels.base import Case
from kernels.int_act_cpu import KERNEL
from kernels.integers import activation_codes, dequantized, int_format, rounded_activations

pytestmark = pytest.mark.skipif(
    byte_cpu.native() is None, reason="no compiler, or a CPU without products of bytes"
)
GRIDS = [
    int_format(bits=8, symmetric=True),
    int_format(bits=8),
    int_format(bits=5, symmetric=True, convention="offset"),
    int_format(bits=4, symmetric=True, convention="full"),
    int_format(bits=8, scale_dtype="float16"),
    int_format(bits=6, symmetric=True, scale_dtype="bfloat16"),
    int_format(bits=8, symmetric=True, per_tensor=True),
    int_format(bits=3, per_tensor=True),
]


def through(x: torch.Tensor, grid: list[float], **more: torch.Tensor) -> torch.Tensor:
    """x times the unit matrix: x as it was rounded."""
    k = x.shape[1]
    held = byte_cpu.pack(torch.eye(k).to(torch.int8), torch.ones(k, 1), None, half=False)
    rest = (more.get("keep"), more.get("beside"))
    return byte_cpu.product(x, held["q"], held["scale"], None, held["row_sum"], *rest, k, grid)


@pytest.mark.parametrize("act", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_rounded_as_the_format_says(act, dtype):
    x = torch.randn(9, 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 0
    x[2] = x[2].abs()  # zero points at an end
    x[3] *= 1e30
    x[4] *= 1e-42
    x[5, 3:] = 0
    codes, scale, zero = activation_codes(x, act)
    got = through(x, byte_cpu.grid_of(act))
    exact = ((codes - zero) * scale).to(dtype)
    assert torch.equal(got, exact)


def test_what_is_no_number_stays_none():
    for act in GRIDS[:2]:
        x = torch.ones(3, 40)
        x[1, 33] = float("nan")
        got = through(x, byte_cpu.grid_of(act))
        assert got[1].isnan().all()
        assert torch.equal(got[0], got[2])
        assert got[0].isfinite().all()
        x[1, 33] = float("inf")
        assert torch.equal(got[0], through(x, byte_cpu.grid_of(act))[0])


def test_channels_left_out_and_what_is_added():
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    x[:, 7] = 100
    keep, beside = torch.ones(50, dtype=torch.uint8), torch.randn(4, 50)
    keep[7] = 0
    grid = byte_cpu.grid_of(GRIDS[0])
    got = through(x, grid, keep=keep, beside=beside) - beside
    assert (got - x * keep).abs().max() <= 0.51 * (x * keep).abs().max() / 127


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_packing_round_trip(n, k, half, seed):
    low, high = (-8, 8) if half else (-128, 128)
    shape = (byte_cpu.ROWS * n, 8 * k)
    q = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    words = byte_cpu.blocks(q.to(torch.int8), half)
    assert words.is_contiguous()
    assert words.numel() == q.numel() // (2 if half else 1)
    assert torch.equal(byte_cpu.unblocked(words).long(), q)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 13, 258])
@pytest.mark.parametrize(
    ("weight", "n", "k"),
    [
        (int_format(bits=8, symmetric=True), 70, 1301),  # more than one step, padded
        (int_format(bits=8, group=20), 33, 60),
        (int_format(bits=4, group=136, symmetric=True), 64, 680),
        (int_format(bits=3, group=12), 5, 48),  # bytes: 12 channels are no whole half bytes
        (int_format(bits=2, per_tensor=True), 130, 99),
        (int_format(bits=8, group=1032), 17, 1032),
        ({"kind": "affine", "bits": 8, "group": 64}, 40, 128),
    ],
    ids=str,
)
def test_products_at_awkward_shapes(weight, n, k, m):
    rng = torch.Generator().manual_seed(m)
    codes, params = KERNEL.example(Case(m, n, k, weight), rng)
    x = torch.randn(m, k, generator=rng)
    for act in GRIDS[:2]:
        assert KERNEL.why_not(weight, act, torch.device("cpu"), n, k) is None
        packed = KERNEL.pack(codes, params, weight, act)
        exact = rounded_activations(x, act).double() @ dequantized(codes, params, weight).double().T
        for y in (KERNEL.matmul(x, packed), KERNEL.reference(x, packed)):
            assert (y - exact).abs().max() <= 2e-6 * exact.abs().max() * k**0.5
        narrow = KERNEL.matmul(x.bfloat16(), packed)
        assert narrow.dtype == torch.bfloat16
        same = KERNEL.reference(x.bfloat16(), packed)
        assert torch.allclose(narrow.float(), same, rtol=2**-8, atol=1e-4 * float(same.abs().max()))


def test_the_op_is_sound_and_compiles_and_threads_change_nothing():
    weight, act = int_format(bits=4, group=64), int_format(bits=8)
    codes, params = KERNEL.example(Case(1, 70, 128, weight), torch.Generator())
    packed, x = KERNEL.pack(codes, params, weight, act), torch.randn(300, 128)
    held = packed.tensors
    tensors = (held["q"], held["scale"], held["offset"], held["row_sum"], None, None)
    torch.library.opcheck(byte_cpu.OP, (x, *tensors, 70, byte_cpu.grid_of(act)))
    matmul = torch.compile(KERNEL.matmul, fullgraph=True, backend="aot_eager")
    assert torch.equal(matmul(x, packed), KERNEL.matmul(x, packed))
    threads = torch.get_num_threads()
    try:
        got = []
        for count in (1, 3):
            torch.set_num_threads(count)
            got.append(KERNEL.matmul(x, packed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*got)


@pytest.mark.parametrize("weight", [int_format(bits=8), int_format(bits=4, symmetric=True)])
def test_without_a_compiler_onednn_multiplies(weight, monkeypatch):
    act = int_format(bits=8)
    codes, params = KERNEL.example(Case(1, 33, 65, weight), torch.Generator())
    x = torch.randn(5, 65)
    ours = KERNEL.matmul(x, KERNEL.pack(codes, params, weight, act))
    monkeypatch.setattr(byte_cpu, "native", lambda: None)
    if not int_act_cpu.works():
        pytest.skip("this build of PyTorch has no exact int8 product on this CPU")
    packed = KERNEL.pack(codes, params, weight, act)
    assert "blocks" in packed.tensors
    for y in (KERNEL.matmul(x, packed), KERNEL.reference(x, packed)):
        assert (y - ours).abs().max() <= 1e-5 * ours.abs().max()
    cpu = torch.device("cpu")
    grouped = int_format(bits=8, group=32)
    assert "one scale per row, not per 32" in str(KERNEL.why_not(grouped, act, cpu, 64, 64))
    affine = {"kind": "affine", "bits": 4, "group": 64}
    assert "whole zero points only" in str(KERNEL.why_not(affine, act, cpu, 64, 64))


def test_what_it_refuses():
    cpu, act = torch.device("cpu"), int_format(bits=8)
    for group, k in ((6, 48), (32, 48)):
        why = str(KERNEL.why_not(int_format(bits=8, group=group), act, cpu, 8, k))
        assert why == f"group {group} must divide the {k} input channels and be a multiple of 4"


def test_no_rows():
    assert through(torch.ones(0, 40), byte_cpu.grid_of(GRIDS[6])).shape == (0, 40)
