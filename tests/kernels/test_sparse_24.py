"""Pruned weights packed: places, masks, both products against the definition, SparseLinear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.layer import quantize_layer
from kernels import table_cpu
from kernels.base import Case, kernels
from kernels.integers import dequantized, int_format
from kernels.sparse_24 import KERNEL, OP, pruned, rows
from kernels.sparse_24.layout import is_placed, keep_of, kept_of, pack_kept, pack_where

CASES = [pytest.param(c, id=f"{c.weight['kind']}-{c.m}x{c.n}x{c.k}") for c in KERNEL.cases]
PLACED = [KERNEL.cases[0], KERNEL.cases[1]]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """new_empty gives NaN, so an element that is never written shows."""
    make = torch.Tensor.new_empty

    def empty(*args, **kwargs):
        made = make(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", empty)


def made(case, seed=0):
    """Packed weights and W_hat [n, k] fp32."""
    codes, params = KERNEL.example(case, torch.Generator().manual_seed(seed))
    whole = codes.float()
    if case.weight["kind"] == "int":
        whole = dequantized(codes, params, case.weight)
    packed = KERNEL.pack(codes, params, case.weight, None)
    return packed, whole.masked_fill(~params["keep"], 0)


def error(y, exact):
    """||y - exact|| / ||exact||."""
    return float((y.double() - exact).norm() / exact.norm())


@pytest.fixture(params=["c", "torch"])
def path(request):
    """Both layouts on a CPU."""
    if request.param == "torch":
        request.getfixturevalue("without_c")
    elif not table_cpu.enough():
        pytest.skip("no compiler, or no AVX-512 for bf16")
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_both_cpu_paths_are_the_definition(case, path):
    packed, w = made(case)
    assert ("values" in packed.tensors) == (path == "c")
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(2))
    exact = x.double() @ w.double().T
    # fp32: sums of a few hundred products, each exact to 2^-24.
    assert error(KERNEL.reference(x, packed), exact) < 1e-6
    assert error(KERNEL.matmul(x, packed), exact) < 1e-6
    assert error(KERNEL.matmul(x.bfloat16(), packed), exact) < 8e-3


@pytest.mark.parametrize("m", [1, 2, 3, 70, 300])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [0, 16, 80])
def test_codes_of_pruned_rows_in_c(bits, group, m):
    if not table_cpu.enough():
        pytest.skip("no compiler, or no AVX-512 for bf16")
    rng = torch.Generator().manual_seed(m)
    n, k = 67, 400
    for symmetric in (False, True):
        form = pruned(int_format(bits=bits, group=group, symmetric=symmetric))
        codes, params = KERNEL.example(Case(m, n, k, form), rng)
        params["keep"] = torch.rand(n, k, generator=rng) < torch.rand(n, 1, generator=rng)
        params["keep"][3] = False  # a row without any
        w = dequantized(codes, params, form).masked_fill(~params["keep"], 0)
        packed = KERNEL.pack(codes, params, form, None)
        assert torch.equal(KERNEL.reference(torch.eye(k), packed), w.T)
        x = torch.randn(m, k, generator=rng).bfloat16()
        assert error(KERNEL.matmul(x, packed), x.double() @ w.double().T) < 6e-3


def test_every_fp16_number_is_rounded_to_bf16_as_torch_rounds():
    if not table_cpu.enough():
        pytest.skip("no compiler, or no AVX-512 for bf16")
    bits = torch.arange(2**16).to(torch.int16).view(torch.half)
    w = bits[bits.isfinite()].view(-1, 1).expand(-1, 32).contiguous()  # [63488, 32]
    held = KERNEL.pack(w, {"keep": torch.ones(w.shape, dtype=torch.bool)}, pruned("float16"), None)
    x = torch.zeros(3, 32).bfloat16()
    x[0, 0] = x[1, 17] = x[2, 31] = 1
    for m in (1, 3):
        assert torch.equal(KERNEL.matmul(x[:m], held)[0].abs(), w[:, 0].bfloat16().abs())
    assert torch.equal(KERNEL.matmul(x, held)[2].abs(), w[:, 0].bfloat16().abs())


@pytest.mark.parametrize("case", PLACED, ids=str)
def test_the_kernel_for_few_rows_is_the_definition(case, without_c):
    from kernels.sparse_24.kernel import multiply_packed

    packed, w = made(case)
    t = packed.tensors
    assert packed.weight["placed"]
    for m in (case.m, 9):
        x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(2)).half()
        for splits in (1, 2):
            y = multiply_packed(x, t["stream"], t["where"], splits=splits)
            assert error(y, x.double() @ w.half().double().T) < 1e-3  # 16-bit results
            assert torch.equal(y, multiply_packed(x, t["stream"], t["where"], splits=splits))


@given(st.integers(1, 20), st.integers(1, 40), st.booleans(), st.sampled_from([3, 4, 8, 16]))
@settings(max_examples=60, deadline=None)
def test_packing_round_trip(n, k, placed, bits):
    rng = torch.Generator().manual_seed(n * k)
    k = 8 * k if placed else k
    keep = torch.rand(n, k, generator=rng) < 0.4
    if placed:
        keep = (torch.rand(n, k // 4, 4, generator=rng).argsort(-1).argsort(-1) < 2).flatten(1)
        assert is_placed(keep, 4)
    values = torch.randint(0, 2 ** min(bits, 8), (n, k), generator=rng, dtype=torch.uint8)
    values = values.half() if bits > 8 else values
    assert torch.equal(keep_of(pack_where(keep, placed), k, placed), keep)
    stream, starts = pack_kept(values, keep, bits, 7)
    for tile, start in enumerate(range(0, n, 7)):
        kept = kept_of(stream, bits, starts[tile], starts[tile + 1])
        own = values[start : start + 7][keep[start : start + 7]]
        assert torch.equal(kept[: len(own)], own)


def test_places_and_masks_take_half_a_bit_and_one():
    keep = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0]]).bool()
    assert pack_where(keep, True).tolist() == [[0 | 3 << 2 | 1 << 4 | 2 << 6]]
    assert pack_where(keep, False).tolist() == [[0b01101001]]
    assert not is_placed(keep, 8)
    assert not is_placed(~keep | keep, 4)


@pytest.mark.parametrize(
    ("weight", "act", "says"),
    [
        (int_format(), None, "these are whole"),
        ({**int_format(), "beside": ["keep", "outliers"], "bucket": 0}, None, "have outliers"),
        (pruned("float64"), None, "not 'float64'"),
        (pruned("float16"), {"kind": "int"}, "activations in 16 bits"),
    ],
)
def test_refusals(weight, act, says):
    assert says in KERNEL.why_not(weight, act, torch.device("cuda"), 64, 64)


def test_the_op_is_well_formed_and_compiles(path):
    case = KERNEL.cases[3]
    packed, _ = made(case)
    t, form, x = packed.tensors, packed.weight, torch.randn(case.m, case.k)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    if path == "c":
        args = (x, t["values"], t["where"], t["starts"], t["scale"], t["zero"], 4, 32)
        torch.library.opcheck(rows.OP, args, test_utils=checks)
    else:
        args = (x, t["stream"], t["where"], t["scale"], t["zero"])
        args += (form["starts"], form["rows"], 4, 32, True)
        torch.library.opcheck(OP, args, test_utils=checks)
    compiled = torch.compile(
        lambda x: KERNEL.matmul(x, packed), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), KERNEL.matmul(x, packed))


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"sparsity": 0.9},
        {"sparsity": 1.0},
        {"pattern": "2:4"},
        {"pattern": "4:8"},
        {"pattern": "2:4", "bits": 4, "group": 64},
        {"bits": 3, "symmetric": True},
        {"value_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_packed_agrees_with_simulated_and_takes_what_it_says(knobs, path):
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(128, 512, generator=rng), torch.randn(2, 5, 512, generator=rng)
    layer = quantize_layer({"kind": "magnitude", **knobs}, w).module
    simulated, stored = layer(x), layer.bits()
    layer.pack(layer.kernel_for("cpu"))
    assert layer.kernel is kernels()["sparse_24"]
    assert torch.allclose(layer(x), simulated, rtol=1e-5, atol=1e-4)
    assert layer.bits() == stored
    held = layer.resident_bytes() * 8 / w.numel()
    # Zero points take a byte in memory, as many bits as a code on disk; in C codes take four bits,
    # rows a start of 64 bits, and a 2:4 place no less than a bit a weight.
    more = 0.5 * (4 - knobs["bits"]) if path == "c" and "bits" in knobs else 0
    more += 64 / 512 if path == "c" else 0
    assert held == pytest.approx(sum(stored.values()) + more, rel=0.03)
    assert ("half bytes" in layer.resident_note()) is (knobs.get("bits", 4) < 4)
    with pytest.raises(ValueError, match="save it before packing"):
        layer.to_state()


def test_large_inputs_take_dense_tiles(without_c):
    from kernels.sparse_24.kernel import multiply

    packed, w = made(Case(1, 70, 64, pruned("float16", 4)))
    t, form = packed.tensors, packed.weight
    x = torch.randn(65, 64)
    y = multiply(x, t["stream"], t["where"], None, None, form["starts"], form["rows"], 16, 0, True)
    assert error(y, x.double() @ w.double().T) < 1e-6
