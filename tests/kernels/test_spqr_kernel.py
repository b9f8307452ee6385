"""SpQR weights: packing, outliers, act order, the Triton kernel, and the whole linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.formats import FORMATS
from backend.formats.base import QTensor, Sparse
from backend.model.quant_linear import QuantLinear
from kernels.base import kernels
from kernels.spqr import KERNEL, OP, dense, example_outliers, spqr_format
from kernels.spqr.layout import column_order

# Tiles as on a GPU; test_table_cpu.py has the rows that C multiplies by.
pytestmark = pytest.mark.usefixtures("without_c")

CPU = torch.device("cpu")
SMALL = [case for case in KERNEL.cases if case.n <= 128]


def named(case):
    """Short ids for tests."""
    return f"{case.m}x{case.n}x{case.k}w{case.weight['bits']}g{case.weight['group']}"


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """torch.empty gives NaN, so an element that is never written shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)


def weights(case, seed=0):
    """Codes and parameters of a case, and its QTensor, which knows what they mean."""
    codes, params = KERNEL.example(case, torch.Generator().manual_seed(seed))
    own = {n: v for n, v in params.items() if n.split("_")[0] in ("unit", "scale", "origin")}
    sparse = None
    if "row_ptr" in params:
        sparse = Sparse(params["row_ptr"], params["column"], params["value"])
    form = FORMATS.build({k: v for k, v in case.weight.items() if k != "beside"})
    return codes, params, QTensor(codes, own, form, params.get("column_group"), sparse)


def inputs(case, dtype, seed=1):
    return torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("case", SMALL, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matmul_and_reference_agree_with_the_definition(case, dtype):
    codes, params, q = weights(case)
    packed = KERNEL.pack(codes, params, case.weight, None)
    w = q.dequantize()
    # Outliers are kept as differences in fp16: 2^-12 of the largest of them.
    assert (dense(packed) - w).abs().max() <= 3e-4 * w.abs().max()
    if q.sparse is None:
        assert (dense(packed) - w).abs().max() <= 1e-7
    x = inputs(case, dtype)
    exact = x.double() @ w.double().T
    limit = {torch.float32: 3e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    y = KERNEL.matmul(x, packed)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= limit * exact.norm()
    assert (KERNEL.reference(x, packed) - exact).norm() <= 3e-4 * exact.norm()


@pytest.mark.parametrize("case", SMALL, ids=named)
def test_triton_agrees_with_the_definition(case):
    from kernels.spqr.kernel import product

    codes, params, q = weights(case, seed=2)
    packed = KERNEL.pack(codes, params, case.weight, None)
    x = inputs(case, torch.float16)
    exact = x.double() @ q.dequantize().double().T
    y = product(x, dict(packed.tensors), case.n, dict(case.weight))
    assert (y.double() - exact).norm() <= 1e-3 * exact.norm()
    assert torch.equal(product(x, dict(packed.tensors), case.n, dict(case.weight)), y)


@pytest.mark.parametrize("case", SMALL, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_expanded_weights_are_the_definition(case, dtype):
    from kernels.spqr.kernel import expanded, gathered

    codes, params, _ = weights(case, seed=3)
    packed = KERNEL.pack(codes, params, case.weight, None)
    x, held = inputs(case, dtype), dict(packed.tensors)
    w = expanded(x, held, case.n, dict(case.weight)).fill_(torch.nan)  # what was there before
    w = expanded(x, held, case.n, dict(case.weight))
    own = held["order"] < case.k
    natural = torch.empty(case.n, case.k)
    natural[:, held["order"][own].long()] = w[:, own].float()
    # In fp16 an outlier is added to what was rounded already: 2^-11 twice.
    limit = 1e-6 if dtype == torch.float32 else 1e-3
    assert (natural - dense(packed)).abs().max() <= limit * dense(packed).abs().max()
    assert w.isfinite().all()
    moved = gathered(x, held)
    assert torch.equal(moved[:, own], x[:, held["order"][own].long()])
    assert not moved[:, ~own].any()


def test_32_bits_and_many_rows_take_expanded_weights(monkeypatch):
    from kernels.spqr import kernel

    case = SMALL[0]
    codes, params, q = weights(case)
    packed = KERNEL.pack(codes, params, case.weight, None)
    x = inputs(case, torch.float32)
    exact = x.double() @ q.dequantize().double().T
    y = kernel.product(x, dict(packed.tensors), case.n, dict(case.weight))
    assert (y.double() - exact).norm() <= 3e-4 * exact.norm()
    monkeypatch.setattr(kernel, "EXPAND_ABOVE", case.m - 1)
    y = kernel.product(x.half(), dict(packed.tensors), case.n, dict(case.weight))
    assert (y.double() - exact).norm() <= 2e-3 * exact.norm()


@given(st.integers(1, 70), st.integers(1, 600), st.sampled_from([2, 3, 4]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_packing_round_trip(n, k, bits, scattered):
    """With scale 1 and origin 0 the values are the codes."""
    rng = torch.Generator().manual_seed(n * 1000 + k)
    codes = torch.randint(0, 2**bits, (n, k), generator=rng, dtype=torch.uint8)
    groups = -(-k // 16)
    params = {
        "unit": torch.ones(1, 1),
        "scale": torch.ones(n, groups, dtype=torch.uint8),
        "scale_low": torch.zeros(-(-n // 16), groups),
        "scale_step": torch.ones(-(-n // 16), groups),
        "origin": torch.zeros(n, groups, dtype=torch.uint8),
    }
    if scattered:
        params["column_group"] = (torch.arange(k) // 16)[torch.randperm(k, generator=rng)].int()
    packed = KERNEL.pack(codes, params, spqr_format(bits=bits, round_zero=True), None)
    assert torch.equal(dense(packed), codes.float())


def test_the_order_holds_every_column_once():
    index = (torch.arange(100) // 16).flip(0).int()
    order = column_order(index, 100)
    assert order.sort().values[:100].tolist() == list(range(100))
    assert (order == 100).sum() == len(order) - 100


def test_what_is_held_is_little_more_than_the_bits_of_the_paper():
    case = KERNEL.cases[0]
    codes = torch.zeros(case.n, 1024, dtype=torch.uint8)
    rng = torch.Generator().manual_seed(0)
    smaller = type(case)(1, case.n, 1024, spqr_format())
    _, params = KERNEL.example(smaller, rng)
    packed = KERNEL.pack(codes, params | example_outliers(case.n, 1024, rng), smaller.weight, None)
    # 3 + (4 + 4) / 16 + 4 * 16 / 256 + 0.32 of outliers, order and pointers
    assert 8 * packed.nbytes() / codes.numel() == pytest.approx(4.07, abs=0.05)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[2]], ids=named)
def test_the_op_is_one_to_torch(case):
    codes, params, _ = weights(case)
    packed = KERNEL.pack(codes, params, case.weight, None)
    names = ("words", "stats", "ends", "order", "unit", "ptr", "column", "delta")
    held, x = (packed.tensors.get(name) for name in names), inputs(case, torch.float32)
    form = case.weight
    torch.library.opcheck(OP, (x, *held, case.n, [form["bits"], form["group"], form["stat_group"]]))
    compiled = torch.compile(
        lambda x: KERNEL.matmul(x, packed) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), KERNEL.matmul(x, packed) + 1)


@pytest.mark.parametrize(
    ("weight", "act", "says"),
    [
        ({"kind": "int"}, None, "not 'int'"),
        (spqr_format(), {"kind": "int"}, "inputs in 16 bits"),
        (spqr_format(bits=5), None, "2, 3 or 4 bits, not 5"),
        (spqr_format(group=8), None, "multiples of 16 channels, not 8"),
        (spqr_format(scale_bits=None), None, "at most 4 bits"),
        (spqr_format(zero_bits=6), None, "at most 4 bits"),
        (spqr_format(beside=["keep", "outliers"]), None, "keeps no keep beside"),
    ],
)
def test_what_it_cannot_do_it_says(weight, act, says):
    assert says in KERNEL.why_not(weight, act, CPU, 64, 64)


@pytest.mark.parametrize("case", SMALL, ids=named)
def test_a_packed_linear_agrees_with_the_simulated_one(case):
    _, _, q = weights(case, seed=3)
    layer = QuantLinear(q, torch.ones(case.n), dtype=torch.float32)
    x = inputs(case, torch.float32)[None]
    simulated = layer(x)
    layer.pack(layer.kernel_for("cpu"))
    assert layer.kernel is kernels()["spqr"]
    assert (layer(x) - simulated).norm() <= 3e-4 * simulated.norm()
