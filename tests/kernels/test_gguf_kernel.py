"""GGUF weights: bit planes, every type against the format's own numbers, and the whole linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.formats import FORMATS
from backend.formats import gguf as formats
from backend.formats.base import QTensor
from backend.formats.gguf_bytes import bits_per_weight
from backend.model.quant_linear import QuantLinear
from kernels import gguf
from kernels.base import kernels
from kernels.gguf import KERNEL, NAMES, OP, expanded, gguf_format
from kernels.gguf.layout import TABLE, TYPES, ordered, pack_planes, unpack_planes
from kernels.workspace import Workspaces

# Tiles as on a GPU; test_table_cpu.py has the rows that C multiplies by.
pytestmark = pytest.mark.usefixtures("without_c")

CPU = torch.device("cpu")
CASES = [pytest.param(case, id=case.weight["type"]) for case in KERNEL.cases]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """new_empty gives NaN, so an element that is never written shows."""
    empty = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def weights(case, seed=0):
    """Codes and parameters of a case, and the QTensor that knows what they mean."""
    codes, params = KERNEL.example(case, torch.Generator().manual_seed(seed))
    form = FORMATS.build({"kind": "gguf", "type": case.weight["type"]})
    return codes, params, QTensor(codes, dict(params), form)


def inputs(case, dtype=torch.float32, seed=1):
    return torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_types_are_those_of_the_format():
    assert tuple(TYPES) == tuple(formats.TYPES)
    assert TABLE == formats.TABLE
    for name, own in TYPES.items():
        theirs = formats.TYPES[name]
        assert (own.bits, own.block, own.sub, own.table) == (
            theirs.bits,
            theirs.block,
            theirs.sub,
            theirs.table,
        )
        assert own.zero == (0 if theirs.offset or theirs.table else theirs.zero)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matmul_and_reference_agree_with_the_definition(case, dtype):
    codes, params, q = weights(case)
    w = q.dequantize()
    packed = KERNEL.pack(codes, params, case.weight, None)
    kept = {name: t for name, t in packed.tensors.items() if name != "planes"}
    kind = TYPES[case.weight["type"]]
    assert torch.equal(expanded(packed.tensors["planes"], kept, kind), ordered(w, kind))
    x = inputs(case, dtype)
    exact = x.double() @ w.double().T
    y = KERNEL.matmul(x, packed)
    assert y.dtype == dtype
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (y.double() - exact).norm() <= limit * exact.norm()
    assert (KERNEL.reference(x, packed) - exact).norm() <= 1e-6 * exact.norm()


@given(st.sampled_from(sorted(TYPES)), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_packing_round_trip(name, n, blocks):
    kind = TYPES[name]
    rng = torch.Generator().manual_seed(n + 10 * blocks)
    k = kind.block * blocks
    codes = torch.randint(0, 2**kind.bits, (n, k), generator=rng, dtype=torch.uint8)
    packed = pack_planes(codes, kind)
    assert packed.shape == (n, k * kind.bits // 8)
    assert torch.equal(
        unpack_planes(packed, kind, torch.full_like(codes, 255)), ordered(codes, kind)
    )


@pytest.mark.parametrize("name", sorted(TYPES))
def test_bytes_held_are_those_of_a_file_or_little_more(name, make_weight):
    q = FORMATS.build({"kind": "gguf", "type": name}).quantize(make_weight(16, 512))
    packed = KERNEL.pack(q.codes, q.params, gguf_format(name), None)
    held = 8 * packed.nbytes() / q.codes.numel()
    assert bits_per_weight(name) <= held + 1e-9
    assert held <= bits_per_weight(name) + 0.51
    if not KERNEL.container(gguf_format(name)):
        assert held == pytest.approx(bits_per_weight(name))


@pytest.fixture
def make_weight():
    """make_weight(n, k) -> random weights."""
    return lambda n, k: torch.randn(n, k, generator=torch.Generator().manual_seed(7)) / 30


@pytest.mark.parametrize("case", CASES[:1] + CASES[7:8])
def test_the_op_is_one_to_torch(case):
    codes, params, _ = weights(case)
    packed = KERNEL.pack(codes, params, case.weight, None)
    held, x = packed.tensors, inputs(case)
    arguments = (x, held["planes"], *(held.get(name) for name in NAMES), case.weight["type"])
    torch.library.opcheck(OP, arguments)
    compiled = torch.compile(
        lambda x: KERNEL.matmul(x, packed) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), KERNEL.matmul(x, packed) + 1)


@pytest.mark.parametrize(
    ("weight", "act", "says"),
    [
        ({"kind": "int"}, None, "not 'int'"),
        (gguf_format("Q4_K"), {"kind": "int"}, "inputs in 16 bits"),
        (gguf_format("Q4_K"), None, "blocks of 256 do not divide 64"),
        ({**gguf_format("Q4_0"), "beside": ["keep"]}, None, "these have keep"),
    ],
)
def test_what_it_cannot_do_it_says(weight, act, says):
    assert says in KERNEL.why_not(weight, act, CPU, 64, 64)


@pytest.mark.parametrize("name", sorted(TYPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_linear_gives_the_simulated_numbers(name, dtype, make_weight):
    form = FORMATS.build({"kind": "gguf", "type": name})
    layer = QuantLinear(form.quantize(make_weight(48, 512)), torch.ones(48), dtype=dtype)
    x = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(8)).to(dtype)
    simulated, before = layer(x).float(), layer.resident_bytes()
    layer.pack(layer.kernel_for("cpu"))
    assert layer.kernel is kernels()["gguf"]
    assert layer.resident_bytes() < before
    # The same W_hat to the last bit; sums in another order.
    limit = 1e-5 if dtype == torch.float32 else 8e-3
    assert (layer(x).float() - simulated).abs().max() <= limit * simulated.abs().max()


@pytest.mark.parametrize("name", ["Q6_K", "IQ4_XS"])
def test_tiles_of_rows_give_the_same_numbers_in_less_memory(monkeypatch, name):
    case = next(c for c in KERNEL.cases if c.weight["type"] == name)
    codes, params, _ = weights(case)
    packed, x = KERNEL.pack(codes, params, case.weight, None), inputs(case)
    whole = KERNEL.matmul(x, packed)
    monkeypatch.setattr(gguf, "CELLS", {"cpu": 3 * case.k})
    monkeypatch.setattr(gguf, "WORKSPACES", held := Workspaces())
    # another blocking of the same sums: rounding of fp32 alone
    assert (KERNEL.matmul(x, packed) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert max(b.numel() for grown in held.held.values() for b in grown) == 3 * case.k
