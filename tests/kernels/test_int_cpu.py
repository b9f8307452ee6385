"""Integer weights on the CPU: C and plain torch give the same numbers for every number of rows."""

from __future__ import annotations

import pytest
import torch

from kernels import int_cpu, native
from kernels.base import Case
from kernels.int_cpu import INT4, INT8, KERNEL
from kernels.integers import dequantized, int_format, rounded_activations

compiles = pytest.mark.skipif(
    int_cpu.native() is None, reason="no compiler, or a CPU without products of bf16 pairs"
)
FORMATS = (
    int_format(bits=4, group=32),
    int_format(bits=3, group=128, symmetric=True),
    int_format(bits=4),
    int_format(bits=8, group=128),
    int_format(bits=8, symmetric=True),
    int_format(bits=6, group=160),
    {"kind": "affine", "bits": 4, "group": 64},
    {"kind": "affine", "bits": 3, "group": 32},
)


@pytest.fixture(params=["c", "torch"])
def path(request, monkeypatch):
    """Each of the two ways."""
    if request.param == "torch":
        monkeypatch.setattr(int_cpu, "native", lambda: None)
    elif int_cpu.native() is None:
        pytest.skip("no compiler, or a CPU without products of bf16 pairs")


def made(weight, m, n, k, act=None):
    """Packed weights, W_hat [n, k] fp32 with bf16 scales where 4 bits store them so, and x."""
    rng = torch.Generator().manual_seed(m)
    codes, params = KERNEL.example(Case(m, n, k, weight), rng)
    params["scale"] = params["scale"].bfloat16().float()
    packed = KERNEL.pack(codes, params, weight, act)
    return packed, dequantized(codes, params, weight), torch.randn(m, k, generator=rng).bfloat16()


@pytest.mark.parametrize("m", [1, 5, 9, 13, 16, 17, 129, 258])
@pytest.mark.parametrize("weight", FORMATS, ids=lambda f: f"{f['bits']}b-{f['group']}")
def test_every_number_of_rows(weight, m, path):
    packed, w, x = made(weight, m, 70, 640)
    exact = x.double() @ w.double().T
    error = (KERNEL.matmul(x, packed).double() - exact).abs().max() / exact.abs().max()
    assert error <= 0.01  # W_hat, partial sums and results in bf16


@compiles
def test_c_rounds_8_bit_results_once():
    packed, w, x = made(int_format(bits=8, group=96), 7, 64, 480)
    held = packed.tensors
    got = INT8(x, held["blocks"], None, held["scale"], held["shift"], 64)
    exact = x.double() @ w.double().T
    assert torch.isclose(
        got.double(), exact, rtol=2**-8, atol=1e-6 * float(exact.abs().max())
    ).all()


@pytest.mark.parametrize("weight", FORMATS, ids=lambda f: f"{f['bits']}b-{f['group']}")
def test_integer_inputs_and_the_reference(weight, path):
    act = int_format(bits=8, symmetric=True)
    packed, w, x = made(weight, 12, 70, 640, act)
    exact = rounded_activations(x, act) @ w.T
    assert (KERNEL.matmul(x, packed).float() - exact).abs().max() <= 0.01 * exact.abs().max()
    assert (KERNEL.reference(x, packed) - exact).abs().max() <= 0.006 * exact.abs().max()


def test_the_ops_are_sound_and_compile(path):
    for weight in (FORMATS[0], FORMATS[3]):
        packed, _, x = made(weight, 12, 70, 640)
        held = packed.tensors
        if weight["bits"] == 4:
            torch.library.opcheck(INT4, (x, held["q"], held["scale_zero"], 70))
        else:
            names = ("blocks", "groups", "scale", "shift")
            torch.library.opcheck(INT8, (x, *(held.get(name) for name in names), 70))
        matmul = torch.compile(KERNEL.matmul, fullgraph=True, backend="aot_eager")
        assert torch.equal(matmul(x, packed), KERNEL.matmul(x, packed))


@compiles
def test_threads_share_the_work_without_changing_it():
    packed, _, x = made(FORMATS[0], 21, 200, 640)
    threads = torch.get_num_threads()
    try:
        got = []
        for count in (1, 3):
            torch.set_num_threads(count)
            got.append(KERNEL.matmul(x, packed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*got)


def test_c_that_does_not_compile_is_none(tmp_path):
    source = tmp_path / "wrong.c"
    source.write_text("#error no\n")
    assert native.library(source) is None
    assert native.library(tmp_path / "absent.c") is None


def test_zero_points_that_are_real_numbers_cost_a_thirtieth_of_a_step(path):
    packed, w, _ = made({"kind": "affine", "bits": 4, "group": 64}, 3, 70, 640)
    scale = packed.tensors["scale_zero"][..., 0].float()
    off = (KERNEL.reference(torch.eye(640).bfloat16(), packed).T - w).abs()
    assert off.max() <= 2**-5 * scale.max()  # z, at most eight steps, in bf16


def test_eight_bits_with_real_zero_points_are_refused():
    why = KERNEL.why_not(
        {"kind": "affine", "bits": 8, "group": 64}, None, torch.device("cpu"), 8, 64
    )
    assert why == "with zero points that are real numbers it takes 2 to 4 bits"


def test_memory_made_in_inference_mode_is_there_for_all():
    from kernels.workspace import Workspaces

    memory, cpu = Workspaces(), torch.device("cpu")
    with torch.inference_mode():
        first = memory.take("x", 4, torch.float32, cpu)
    first.add_(1)
    assert memory.take("x", 2, torch.float32, cpu).tolist() == [1.0, 1.0]
