"""BCQ as bit planes: packing, both kernels and the CPU path against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.formats import FORMATS
from backend.formats.bcq import BCQ
from backend.formats.int_group import IntGroup
from backend.model.quant_linear import QuantLinear
from kernels.base import Case, find, kernels
from kernels.bcq import KERNEL, OP, bcq_format
from kernels.bcq.layout import (
    LONGEST,
    bits_as,
    group_starts,
    numbers,
    pack_planes,
    plane_of,
    sum_ends,
    unpack_planes,
)

# Tiles as on a GPU; test_table_cpu.py has the rows that C multiplies by.
pytestmark = pytest.mark.usefixtures("without_c")

CASES = [pytest.param(c, id=f"{c.weight['bits']}b-{c.m}x{c.n}x{c.k}") for c in KERNEL.cases]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """new_empty gives NaN, so an element that is never written shows."""
    make = torch.Tensor.new_empty

    def empty(*args, **kwargs):
        made = make(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", empty)


def made(case, seed=0, *, offset=False):
    """Codes, parameters and W_hat [n, k] fp64 by the definition, scales from 1e-4 to 1e2."""
    rng = torch.Generator().manual_seed(seed)
    codes, params = KERNEL.example(case, rng)
    spread = 10 ** (6 * torch.rand(params["alpha"].shape[:2], generator=rng) - 4)
    spread[0, 0] = 0  # a group of zeros
    params["alpha"] = (params["alpha"] * 60 * spread[..., None]).to(params["alpha"].dtype)
    if offset:
        params["offset"] = spread * torch.randn(spread.shape, generator=rng)
    w = torch.zeros(case.n, case.k, dtype=torch.float64)
    group = case.weight["group"] or case.k
    for j in range(case.k):
        for b in range(case.weight["bits"]):
            sign = (codes[:, j] >> b & 1).double() * 2 - 1
            w[:, j] += sign * params["alpha"][:, j // group, b].double()
        if offset:
            w[:, j] += params["offset"][:, j // group].double()
    return codes, params, w


def error(y, exact):
    """||y - exact|| / ||exact||."""
    return float((y.double() - exact).norm() / exact.norm())


def inputs(case, dtype, seed=1):
    return torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_path_is_the_definition(case, offset):
    from kernels.bcq.kernel import expanded, multiply_packed

    codes, params, w = made(case, offset=offset)
    packed = KERNEL.pack(codes, params, case.weight, None)
    t = packed.tensors
    held = (t["words"], t["alphas"], t.get("offsets"), case.n, case.weight["group"])
    x = inputs(case, torch.float32)
    # fp32: sums of a few hundred products, each exact to 2^-24.
    assert error(KERNEL.reference(x, packed), x.double() @ w.T) < 1e-6
    assert error(KERNEL.matmul(x, packed), x.double() @ w.T) < 1e-6
    assert (expanded(x, *held).double() - w).abs().max() < 1e-6 * w.abs().max()
    half = x.half()
    for splits in (1, 2):
        y = multiply_packed(half, *held, splits=splits)
        assert y.dtype == torch.float16
        assert error(y, half.double() @ w.T) < 1e-3  # 16-bit results: 2^-12 on average
        assert torch.equal(y, multiply_packed(half, *held, splits=splits))
    assert error(KERNEL.matmul(x.bfloat16(), packed), x.bfloat16().double() @ w.T) < 8e-3


def test_many_rows_take_expanded_weights_and_large_inputs_stay_finite():
    from kernels.bcq.kernel import EXPAND_ABOVE, multiply

    case = Case(EXPAND_ABOVE + 1, 20, 96, bcq_format(bits=2, group=32))
    codes, params, w = made(case)
    t = KERNEL.pack(codes, params, case.weight, None).tensors
    x = inputs(case, torch.float32)
    y = multiply(x, t["words"], t["alphas"], None, case.n, 32)
    assert error(y, x.double() @ w.T) < 1e-6
    loud = torch.full((1, case.k), 6e4).half()
    quiet = {**params, "alpha": torch.full_like(params["alpha"], 1e-3)}
    t = KERNEL.pack(codes, quiet, case.weight, None).tensors
    assert multiply(loud, t["words"], t["alphas"], None, case.n, 32).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_bit_of_a_float_is_one_of_two_exact_numbers(dtype):
    for mask, beside, step, less in numbers(dtype):
        low, high = bits_as([beside & 0xFFFF, (beside | mask) & 0xFFFF], dtype)
        # alpha (2 bit - 1) = alpha (step v - less), and v is never a bf16 subnormal
        assert (step * low - less, step * high - less) == pytest.approx((-1, 1), abs=1e-12)
        assert dtype == torch.float16 or low == 0 or abs(low) > 1e-30


@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 140), st.sampled_from([16, 32, 64]))
@settings(max_examples=40, deadline=None)
def test_packing_round_trip(bits, n, k, plane):
    rng = torch.Generator().manual_seed(n * k)
    codes = torch.randint(0, 2**bits, (n, k), generator=rng, dtype=torch.uint8)
    words = pack_planes(codes, bits, plane)
    assert words.dtype == torch.int16
    assert torch.equal(unpack_planes(words, bits, n, k), codes)


@pytest.mark.parametrize(("bits", "k"), [(4, 4096), (3, 4096), (2, 14336), (1, 4096)])
def test_words_hold_the_codes_and_little_more(bits, k):
    plane = plane_of(bits, 128, k)
    assert plane == LONGEST[bits]
    codes = torch.zeros(64, k, dtype=torch.uint8)
    assert pack_planes(codes, bits, plane).numel() * 16 == 64 * k * bits


def test_scales_are_fetched_and_sums_end_where_groups_do():
    assert group_starts(4, 128, 128) == (True,) * 4
    assert group_starts(2, 256, 128) == (True, False) * 4
    assert group_starts(3, 48, 16) == (True,) * 16  # three planes do not divide sixteen
    assert group_starts(4, 0, 64) == group_starts(4, 1024, 128) == (True, False, False, False)
    assert sum_ends(torch.float16, 3, 1024, 64) == (False,) * 14 + (True, True)  # but for the sign
    assert all(sum_ends(torch.bfloat16, 3, 1024, 64)[:12])  # low is lost beside 1 further up


def test_sums_that_are_whole_levels_go_to_the_kernel_for_integers():
    w = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    q = IntGroup(bits=4, group=32).quantize(w)
    uniform = BCQ.from_uniform(q)
    packed = KERNEL.pack(uniform.codes, uniform.params, uniform.format.data(), None)
    assert packed.weight["as"]["kernel"] == find(packed.weight["as"], None, "cpu", 48, 128).name
    assert "words" not in packed.tensors
    x = torch.randn(3, 128).bfloat16()
    exact = x.double() @ q.dequantize().double().T
    assert error(KERNEL.matmul(x, packed), exact) < 8e-3
    assert error(KERNEL.reference(x, packed), exact) < 4e-3  # zero points in bf16 on the CPU
    odd = IntGroup(bits=4, group=48).quantize(w)  # no kernel for integers takes it on the CPU
    for other in (BCQ.from_uniform(odd), BCQ(bits=4, group=32).quantize(w)):
        held = KERNEL.pack(other.codes, other.params, other.format.data(), None)
        assert "words" in held.tensors
        assert error(KERNEL.reference(x, held), x.double() @ other.dequantize().double().T) < 1e-6


@pytest.mark.parametrize(
    ("weight", "act", "says"),
    [
        (bcq_format(bits=5), None, "1 to 4 bits, not 5"),
        (bcq_format(group=24), None, "group 24 is no multiple of 16"),
        (bcq_format(), {"kind": "int"}, "activations in 16 bits"),
        ({**bcq_format(), "beside": ["keep"]}, None, "these have keep"),
        ({"kind": "codebook"}, None, "not 'codebook'"),
    ],
)
def test_refusals(weight, act, says):
    assert says in KERNEL.why_not(weight, act, torch.device("cuda"), 64, 64)


def test_the_op_is_well_formed_and_compiles():
    case = KERNEL.cases[1]
    codes, params, _ = made(case)
    packed = KERNEL.pack(codes, params, case.weight, None)
    t, x = packed.tensors, inputs(case, torch.float32)
    args = (x, t["words"], t["alphas"], None, case.n, case.weight["group"])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OP, args, test_utils=checks)
    compiled = torch.compile(
        lambda x: KERNEL.matmul(x, packed), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), KERNEL.matmul(x, packed))


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (3, 64), (2, 32)])
def test_packed_agrees_with_simulated(bits, group):
    fmt = FORMATS.build(
        {"kind": "bcq", "bits": bits, "group": group, "scale_dtype": "float16", "rounds": 2}
    )
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 1024, generator=rng), torch.randn(2, 5, 1024, generator=rng)
    layer = QuantLinear(fmt.quantize(w), torch.ones(64), dtype=torch.float32)
    simulated, stored = layer(x), sum(layer.bits().values())
    layer.pack(layer.kernel_for("cpu"))
    assert layer.kernel is kernels()["bcq"]
    assert error(layer(x), simulated.double()) < 1e-6
    held = (layer.resident_bytes() - 64 * 4) * 8 / w.numel()
    assert held == pytest.approx(stored, rel=0.01)
