"""Codebooks packed: tables, byte permutes, both kernels and the CPU path against the format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.formats import FORMATS, QTensor
from backend.formats import codebook as formats
from backend.model.quant_linear import QuantLinear
from kernels.base import Case, kernels
from kernels.codebook import KERNEL, OP, codebook_format
from kernels.codebook.layout import group_starts, pack_nibbles, plane_of, unpack_nibbles
from kernels.codebook.levels import (
    TABLES,
    dynamic8,
    levels_of,
    numbering,
    permute_tables,
    scaled_table,
)

# Tiles as on a GPU; test_table_cpu.py has the rows that C multiplies by.
pytestmark = pytest.mark.usefixtures("without_c")

HALVES = [torch.float16, torch.bfloat16]
CASES = [pytest.param(c, id=f"{c.weight['table']}-{c.m}x{c.n}x{c.k}") for c in KERNEL.cases]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """new_empty gives NaN, so an element that is never written shows."""
    make = torch.Tensor.new_empty

    def empty(*args, **kwargs):
        made = make(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", empty)


def made(case, seed=0):
    """Packed weights and W_hat [n, k] fp32 as the format decodes the same codes."""
    codes, params = KERNEL.example(case, torch.Generator().manual_seed(seed))
    if "second" not in params:
        rng = torch.Generator().manual_seed(seed + 1)
        params["scale"] *= 10 ** (6 * torch.rand(params["scale"].shape, generator=rng) - 2)
        params["scale"][0, 0] = 0  # a group of zeros
    fmt = FORMATS.build(dict(case.weight))
    w = QTensor(codes, params, fmt).dequantize()
    return KERNEL.pack(codes, params, case.weight, None), w


def arguments(packed):
    t = packed.tensors
    return (t["words"], t["scales"], t.get("second"), t.get("offset"))


def error(y, exact):
    """||y - exact|| / ||exact||."""
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", CASES)
def test_every_path_is_the_format(case):
    from kernels.codebook.kernel import expanded, multiply_packed

    packed, w = made(case)
    held, group = arguments(packed), case.weight["group"]
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(2))
    exact = x.double() @ w.double().T
    # fp32: sums of a few hundred products, each exact to 2^-24.
    assert error(KERNEL.reference(x, packed), exact) < 1e-6
    assert error(KERNEL.matmul(x, packed), exact) < 1e-6
    assert torch.equal(expanded(x, *held, packed.tensors["levels"], case.n, group), w)
    half = x.half()
    for splits in (1, 2):
        y = multiply_packed(half, *held, case.n, group, case.weight["table"], splits=splits)
        again = multiply_packed(half, *held, case.n, group, case.weight["table"], splits=splits)
        assert error(y, half.double() @ w.double().T) < 1e-3  # 16-bit levels and results
        assert torch.equal(y, again)
    assert error(KERNEL.matmul(x.bfloat16(), packed), exact) < 8e-3


def test_many_rows_take_expanded_weights():
    from kernels.codebook.kernel import EXPAND_ABOVE, multiply

    packed, w = made(Case(1, 20, 96, codebook_format(group=32)))
    x = torch.randn(EXPAND_ABOVE + 1, 96)
    y = multiply(x, *arguments(packed), packed.tensors["levels"], 20, 32, "nf4")
    assert error(y, x.double() @ w.double().T) < 1e-6


def test_tables_are_the_formats():
    assert all(torch.equal(levels_of(name), formats.table(name)) for name in TABLES)
    assert torch.equal(dynamic8(), formats.table("dynamic8"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", sorted(TABLES))
def test_byte_permutes_find_every_level(name, dtype):
    table, _ = scaled_table(name, dtype)
    words = permute_tables(table)
    bits = table.view(torch.int16).tolist()
    for start in range(13):
        for word in [*range(start * 5041 % 65536, 65536, 997), 0xFFFF]:
            low, high = (
                [
                    a ^ b
                    for a, b in zip(
                        permuted(words[i], words[i + 1], word),
                        permuted(words[i + 2], words[i + 3], word ^ 0x8888),
                        strict=True,
                    )
                ]
                for i in (0, 4)
            )
            assert [h << 8 | lo for h, lo in zip(high, low, strict=True)] == [
                bits[word >> 4 * f & 15] & 0xFFFF for f in range(4)
            ]


def permuted(a: int, b: int, selector: int) -> list[int]:
    """Four bytes as PTX's prmt.b32 picks them: bit 3 of a selector repeats the byte's top bit."""
    source = [word >> 8 * i & 255 for word in (a, b) for i in range(4)]
    picked = [(source[selector >> 4 * f & 7], selector >> 4 * f & 8) for f in range(4)]
    return [(255 * (byte >> 7) if top else byte) for byte, top in picked]


@pytest.mark.parametrize("name", sorted(TABLES))
def test_scaled_tables_are_the_levels(name):
    for dtype, close in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        table, factor = scaled_table(name, dtype)
        by_code = table.float()[numbering(name).long()] / factor
        assert torch.allclose(by_code, levels_of(name), rtol=close, atol=0)
    assert sorted(numbering(name).tolist()) == list(range(16))


@given(st.integers(1, 70), st.integers(1, 140), st.sampled_from([16, 32, 64, 128]))
@settings(max_examples=40, deadline=None)
def test_packing_round_trip(n, k, plane):
    rng = torch.Generator().manual_seed(n * k)
    nibbles = torch.randint(0, 16, (n, k), generator=rng, dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(nibbles, plane), n, k), nibbles)


def test_planes_and_groups():
    assert (plane_of(64, 4096), plane_of(128, 14336), plane_of(48, 96)) == (64, 128, 16)
    assert plane_of(24, 96) == 0
    assert group_starts(64, 64) == (True,) * 4
    assert group_starts(0, 64) == group_starts(512, 128) == (True, False, False, False)
    assert group_starts(128, 64) == (True, False, True, False)


@pytest.mark.parametrize(
    ("weight", "act", "says"),
    [
        (codebook_format(group=24), None, "group 24 is no multiple of 16"),
        (codebook_format(table="other"), None, "not 'other'"),
        (codebook_format(), {"kind": "int"}, "activations in 16 bits"),
        ({**codebook_format(), "beside": ["keep"]}, None, "these have keep"),
        ({"kind": "bcq"}, None, "not 'bcq'"),
    ],
)
def test_refusals(weight, act, says):
    assert says in KERNEL.why_not(weight, act, torch.device("cuda"), 64, 64)


@pytest.mark.parametrize("case", [KERNEL.cases[1], KERNEL.cases[2]], ids=str)
def test_the_op_is_well_formed_and_compiles(case):
    packed, _ = made(case)
    x = torch.randn(case.m, case.k)
    own = (*arguments(packed), packed.tensors["levels"])
    args = (x, *own, case.n, case.weight["group"], case.weight["table"])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OP, args, test_utils=checks)
    compiled = torch.compile(
        lambda x: KERNEL.matmul(x, packed), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), KERNEL.matmul(x, packed))


@pytest.mark.parametrize(
    "knobs", [{}, {"double_quant": True}, {"table": "fp4", "group": 128}], ids=str
)
def test_packed_agrees_with_simulated(knobs):
    fmt = FORMATS.build({"kind": "codebook", **knobs})
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(128, 1024, generator=rng), torch.randn(2, 5, 1024, generator=rng)
    layer = QuantLinear(fmt.quantize(w), torch.ones(128), dtype=torch.float32)
    simulated, stored = layer(x), sum(layer.bits().values())
    layer.pack(layer.kernel_for("cpu"))
    assert layer.kernel is kernels()["codebook"]
    assert error(layer(x), simulated.double()) < 1e-6
    held = (layer.resident_bytes() - 128 * 4 - 16 * 4) * 8 / w.numel()
    assert held == pytest.approx(stored, rel=0.01)
