"""Every kernel against plain arithmetic on the codes, at awkward shapes; packing; `find`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import byte_cpu
from kernels.base import find, kernels
from kernels.integers import int_format
from kernels.packing import pack_bits, packed_bytes, unpack_bits

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
INT = int_format()
CASES = [  # of the int format, which by_hand knows; other formats' kernels have tests of their own
    pytest.param(kernel, case, id=f"{name}-{case.m}x{case.n}x{case.k}-{case.weight['bits']}b")
    for name, kernel in kernels().items()
    for case in kernel.cases
    if case.weight["kind"] == "int"
    and "beside" not in case.weight
    and (case.act or INT)["kind"] == "int"
]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """torch.empty and new_empty give NaN, so an element that is never written shows."""
    # Not torch.use_deterministic_algorithms, which does the same: it imports the whole compiler.

    def filled(make):
        def empty(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(85)

        return empty

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


def weights(case, seed=0):
    """Random codes [n, k] and parameters, scales in bf16 so that no kernel rounds them."""
    rng = torch.Generator().manual_seed(seed)
    group = case.weight["group"] or case.k
    shape = (1, 1) if case.weight["per_tensor"] else (case.n, -(-case.k // group))
    top = 2 ** case.weight["bits"] - 1
    codes = torch.randint(0, top + 1, (case.n, case.k), generator=rng).to(torch.uint8)
    params = {"scale": (0.5 + torch.rand(shape, generator=rng)).bfloat16().float()}
    if not case.weight["symmetric"]:
        params["zero"] = torch.randint(0, top + 1, shape, generator=rng).to(torch.uint8)
    return codes, params


def by_hand(x, codes, params, case):
    """x [m, k] -> [m, n] fp64, element by element from the definition of the int format."""
    group = case.weight["group"] or case.k
    w = torch.empty(case.n, case.k, dtype=torch.float64)
    for j in range(case.k):
        scale = (
            params["scale"]
            .double()
            .expand(case.n, -1)[:, j // group * (params["scale"].shape[1] > 1)]
        )
        zero = torch.tensor(2.0 ** (case.weight["bits"] - 1))
        if "zero" in params:
            zero = (
                params["zero"]
                .double()
                .expand(case.n, -1)[:, j // group * (params["zero"].shape[1] > 1)]
            )
        w[:, j] = (codes[:, j].double() - zero) * scale
    return act_by_hand(x, case.act) @ w.T


def act_by_hand(x, act):
    """x rounded token by token in Python floats' precision, scales in fp32 as the format says."""
    if act is None:
        return x.double()
    rows = x.float().reshape(1, -1) if act["per_tensor"] else x.float()
    top = 2 ** act["bits"] - 1
    out = []
    for row in rows:
        low, high = min(row.min(), torch.tensor(0.0)), max(row.max(), torch.tensor(0.0))
        if act["symmetric"]:
            scale, zero = max(-low, high) / (2 ** (act["bits"] - 1) - 1), 2 ** (act["bits"] - 1)
        else:
            scale = (high - low) / top
            zero = float((-low / scale).round())
        code = ((row / scale).round() + zero).clamp(0, top)
        out.append((code.double() - zero) * scale.double())
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_matmul_and_reference_agree_with_the_definition(kernel, case):
    codes, params = weights(case)
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed = kernel.pack(codes, params, case.weight, case.act)
    exact = by_hand(x, codes, params, case)
    peak = exact.abs().max()
    # fp32 sums of a few hundred terms, and the 4-bit op's zero points in bf16 (0.4 % of 8 steps).
    limit = 0.005 if kernel.name == "int_cpu" and "zero" in params else 1e-5
    reference = kernel.reference(x, packed)
    assert reference.shape == (case.m, case.n)
    assert (reference - exact).abs().max() <= limit * peak
    got = kernel.matmul(x, packed)
    assert got.dtype == x.dtype
    # bf16 results: half a unit in the 8th bit of the largest value, and bf16 tiles or partial sums.
    assert (got.double() - exact).abs().max() <= 0.015 * peak


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_zero_inputs_give_zero_and_one_row_equals_many(kernel, case):
    codes, params = weights(case, seed=2)
    packed = kernel.pack(codes, params, case.weight, case.act)
    assert not kernel.matmul(torch.zeros(2, case.k).bfloat16(), packed).any()
    if case.act and case.act["per_tensor"]:
        return  # one scale for all rows: rows depend on each other
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(3)).bfloat16()
    whole = kernel.matmul(x, packed).float()
    alone = torch.cat([kernel.matmul(row[None], packed) for row in x]).float()
    assert (whole - alone).abs().max() <= 0.015 * whole.abs().max()  # other code path, bf16 sums


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_a_kernel_takes_its_own_cases_and_says_where_codes_grow(kernel, case):
    device = torch.device("cuda" if kernel.name == "w_a16" else "cpu")
    assert kernel.why_not(case.weight, case.act, device, case.n, case.k) is None
    packed = kernel.pack(*weights(case), case.weight, case.act)
    held = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    assert packed.nbytes() == held
    if case.n >= 96 and not kernel.container(case.weight):  # small ones are mostly padding
        assert packed.nbytes() <= 1.7 * case.n * case.k * case.weight["bits"] / 8


def test_find_takes_the_fastest_that_can():
    plain, act = int_format(bits=8, symmetric=True), int_format(bits=8, symmetric=True)
    assert find(plain, None, "cpu", 64, 64).name == "int_cpu"
    assert find(plain, act, "cpu", 64, 64).name == "int_act_cpu"
    grouped = "int_cpu" if byte_cpu.native() is None else "int_act_cpu"
    assert find(int_format(group=32), act, "cpu", 64, 64).name == grouped
    assert find(plain, act, "cuda", 64, 64).name == "w8_a8"
    assert find(plain, None, "cuda", 64, 64).name == "w_a16"
    assert find(int_format(group=32), act, "cuda", 64, 64).name == "w_a16"


@pytest.mark.parametrize(
    ("weight", "act", "k", "says"),
    [
        (int_format(bits=4, group=16), None, 64, "group 16 does not fit 64 input channels"),
        (int_format(bits=4, group=128), None, 192, "use one of [64, 32]"),
        (int_format(bits=4), None, 50, "no group does"),
        (int_format(bits=8, group=48), None, 96, "multiple of 32"),
        (int_format(bits=4), int_format(group=32), 64, "one activation scale per token"),
        (int_format(bits=4), int_format(mse=True), 64, "mse=false"),
        ({"kind": "runes", "group": 16}, None, 64, "no kernel multiplies by these 'runes' weights"),
        (int_format(bits=4), {"kind": "minifloat", "group": 0}, 64, "not 'minifloat'"),
    ],
)
def test_find_gives_every_reason(weight, act, k, says):
    with pytest.raises(ValueError, match="no kernel multiplies") as caught:
        find(weight, act, "cpu", 64, k)
    assert says in str(caught.value)
    told = {part.split(":")[0] for part in str(caught.value).split(": ", 1)[-1].split("; ")}
    here = {name for name, kernel in kernels().items() if "cpu" in kernel.devices}
    of_ints = {name for name in here if "int" in kernels()[name].reads} - {"sparse_24"}
    assert {name for name in told if name in kernels()} <= of_ints


def test_every_kernel_says_what_it_reads_and_where():
    for kernel in kernels().values():
        assert kernel.devices
        assert set(kernel.devices) <= {"cpu", "cuda"}
        for case in kernel.cases:
            assert case.weight["kind"] in kernel.reads
            assert set(getattr(kernel, "needs", ())) <= set(case.weight.get("beside", ()))


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=70))
@settings(max_examples=200, deadline=None)
def test_packing_round_trip(bits, values):
    codes = torch.tensor([v & (2**bits - 1) for v in values], dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.numel() == packed_bytes(len(values), bits) == -(-len(values) * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, len(values)), codes)


def test_packing_layout_is_one_little_endian_stream():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 5], dtype=torch.uint8)
    number = sum(int(c) << (3 * i) for i, c in enumerate(codes))
    assert bytes(pack_bits(codes, 3).tolist()) == number.to_bytes(4, "little")


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="code 8 does not fit in 3 bits"):
        pack_bits(torch.tensor([8], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="1 to 8 bits, not 9"):
        pack_bits(torch.tensor([8], dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="take 2 bytes, got 1"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 3, 4)


def test_kernels_import_with_torch_alone():
    code = (
        "import sys; from kernels.base import kernels; kernels()\n"
        "ours = {'backend', 'jobs', 'app', 'results_db', 'transformers'}\n"
        "assert not ours & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
