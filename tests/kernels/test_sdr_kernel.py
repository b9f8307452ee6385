"""SDR weights (QRazor): packing, the three products, rounding of inputs, and the whole linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.formats import FORMATS
from backend.model.quant_linear import QuantLinear
from kernels.base import Case, kernels
from kernels.sdr import KERNEL, OP, act_of, dense
from kernels.sdr.activations import bytes_of, fits_fp8, integers, sdr_format
from kernels.sdr.layout import MIDDLE, flat, ordered, pack, tiled, unit_of, unpack

# Tiles as on a GPU; test_table_cpu.py has the rows that C multiplies by.
pytestmark = pytest.mark.usefixtures("without_c")

CPU = torch.device("cpu")
SMALL = [case for case in KERNEL.cases if case.n <= 128]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """torch.empty gives NaN, so an element that is never written shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)


def named(case):
    """Short ids for tests."""
    group, act = case.weight["group"], case.act
    return f"{case.m}x{case.n}x{case.k}g{group}" + (f"a{act['bits']}g{act['group']}" if act else "")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(case, seed=0):
    """Codes and parameters of a case, and W_hat [n, k] fp64 from the format's definition."""
    codes, params = KERNEL.example(case, torch.Generator().manual_seed(seed))
    shift = params["shift"].repeat_interleave(case.weight["group"] or case.k, 1)[:, : case.k]
    w = (codes.double() - MIDDLE) * 2.0 ** shift.double() * params["scale"].double()
    return codes, params, w


def rounded(x, act):
    """Inputs as the format's own class rounds them, fp64 from its fp32."""
    return (x if act is None else FORMATS.build(dict(act)).fake(x.float())).double()


def on_gpu(codes, params, case):
    """The tiled tensors that `pack` makes on a GPU, here on the CPU, and their layout."""
    lay = tiled(case.n, case.k, unit_of(case.weight["group"]), 4 if case.act is None else 2)
    times = (case.weight["group"] or lay.padded) // lay.unit
    shift = params["shift"].repeat_interleave(times, 1)[:, : -(-case.k // lay.unit)]
    scale = params["scale"].expand(case.n, 1).flatten().contiguous()
    return (*pack(codes, shift, lay), scale), lay


@pytest.mark.parametrize("case", SMALL, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matmul_and_reference_agree_with_the_definition(case, dtype):
    codes, params, w = weights(case)
    packed = KERNEL.pack(codes, params, case.weight, case.act)
    assert torch.equal(dense(packed), w.float())
    x = random(case.m, case.k).to(dtype)
    exact = rounded(x, case.act) @ w.T
    assert (KERNEL.reference(x, packed) - exact).abs().max() <= 1e-6 * exact.abs().max()
    y = KERNEL.matmul(x, packed)
    assert y.dtype == dtype
    # Whole numbers are summed exactly or in fp32; the result is rounded to dtype, bf16 twice.
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (y.double() - exact).abs().max() <= limit * exact.abs().max()
    assert torch.equal(KERNEL.matmul(x, packed), y)


@pytest.mark.parametrize("case", SMALL, ids=named)
def test_triton_agrees_with_the_definition(case):
    from kernels.sdr.kernel import BYTES, FP8, HALF, product

    codes, params, w = weights(case, seed=1)
    tensors, lay = on_gpu(codes, params, case)
    x = random(case.m, case.k, seed=2).to(torch.float16 if case.act is None else torch.float32)
    exact = rounded(x, case.act) @ w.T
    modes = [HALF] if case.act is None else [BYTES] + [FP8] * fits_fp8(case.act)
    for mode in modes:
        y = product(x, *tensors, case.act, lay, mode)
        limit = 1e-3 if case.act is None else 1e-6  # fp16 results; fp32 ones of exact products
        assert (y.double() - exact).abs().max() <= limit * exact.abs().max()
        assert torch.equal(product(x, *tensors, case.act, lay, mode), y)


@pytest.mark.parametrize("case", SMALL, ids=named)
def test_expanded_weights_give_the_definition(case):
    from kernels.sdr.kernel import by_expanded

    codes, params, w = weights(case, seed=1)
    tensors, lay = on_gpu(codes, params, case)
    x = random(case.m, case.k, seed=2)
    exact = rounded(x, case.act) @ w.T
    y = by_expanded(x, *tensors, case.act, lay)
    assert (y.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
    if case.act is None:  # W_hat and the result are rounded to fp16
        y = by_expanded(x.half(), *tensors, None, lay)
        exact = x.half().double() @ w.double().T
        assert (y.double() - exact).abs().max() <= 2e-3 * exact.abs().max()


def test_bytes_give_the_exact_whole_numbers():
    """Inputs and weights at their extremes: sums past 2^24, where fp32 sums would be rounded."""
    case = Case(2, 8, 512, {**KERNEL.cases[3].weight, "group": 8}, act_of(8, 8))
    codes = torch.full((8, 512), 15, dtype=torch.uint8)
    codes[:, 0] = MIDDLE + 1
    params = {"scale": torch.ones(8, 1), "shift": torch.full((8, 64), 4, dtype=torch.uint8)}
    x = torch.full((2, 512), 32512.0)  # 127 * 2^8, which a scale of 1 keeps
    x[:, -1] = 32767
    packed = KERNEL.pack(codes, params, case.weight, case.act)
    q, scale = integers(x, case.act)
    whole = q.long() @ ((codes.long() - MIDDLE) << 4).T
    assert scale.unique().tolist() == [1.0]
    assert int(whole.max()) > 2**28
    # Two sums, exact each, then rounded to fp32 when they are joined.
    assert torch.equal(KERNEL.matmul(x, packed), whole.double().float())


@pytest.mark.parametrize("base", [8, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_value_of_few_bits_is_an_fp8_number(bits, base):
    top = 2 ** (bits - 1)
    codes = torch.arange(-top, top).float()[:, None]
    lift = 0 if base == 8 else -9
    values = codes * 2.0 ** (torch.arange(base - bits + 1) + lift)
    assert torch.equal(values.to(torch.float8_e4m3fn).float(), values)
    assert fits_fp8(sdr_format(bits=bits, base_bits=base))


def test_values_of_eight_bits_are_no_fp8_numbers_but_two_bytes():
    assert not fits_fp8(act_of(8))
    codes = torch.arange(-128.0, 128)[:, None]
    assert not torch.equal(codes.to(torch.float8_e4m3fn).float(), codes)
    values = codes * 2.0 ** torch.arange(9)
    high, low = bytes_of(values)
    assert torch.equal(high.float() * 256 + low.float(), values)


def test_assembly_is_exact_for_every_code_and_shift():
    """The fmas of kernel.py in fp16 and bf16: each term, and the result, is a number of theirs."""
    q, shift = torch.arange(16.0)[:, None], torch.arange(5.0)
    value = (q - 8) * 2**shift

    def fma(a, b, c, dtype):
        for term in (a, b, c):
            assert torch.equal(torch.as_tensor(term).to(dtype).double(), torch.as_tensor(term))
        return (a * b + c).to(dtype).double()

    q, shift = q.double(), shift.double()
    step, half, bf16 = 2**shift, torch.float16, torch.bfloat16
    assert torch.equal(fma(1024 + q, step, -1032 * step, half), value.double())
    assert torch.equal(fma(1024 + 16 * q, step / 16, -72 * step, half), value.double())
    assert torch.equal(fma(128 + q, step, -136 * step, bf16), value.double())
    shown = fma(1024 + q, step, 1536 - 1032 * step, half).half().view(torch.int16)
    assert torch.equal((shown & 255).to(torch.uint8).view(torch.int8).double(), value.double())


@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from([0, 4, 8, 12, 16, 32]), st.data())
@settings(max_examples=40, deadline=None)
def test_packing_round_trip(n, k, group, data):
    unit = unit_of(group)
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 16, (n, k), generator=rng, dtype=torch.uint8)
    shift = torch.randint(0, 5, (n, -(-k // unit)), generator=rng, dtype=torch.uint8)
    lay = data.draw(st.sampled_from([flat(n, k, unit), tiled(n, k, unit, 2), tiled(n, k, unit, 4)]))
    got, spread = unpack(*pack(codes, shift, lay), lay)
    assert torch.equal(got, codes)
    assert torch.equal(spread, shift.repeat_interleave(unit, 1)[:, :k])


def test_weights_take_half_a_byte_and_shifts_a_quarter_of_a_bit():
    codes = torch.zeros(64, 4096, dtype=torch.uint8)
    lay = tiled(64, 4096, 16, 2)
    words, shifts = pack(codes, torch.zeros(64, 256, dtype=torch.uint8), lay)
    assert 8 * (words.numel() + shifts.numel()) == 4.25 * codes.numel()


@pytest.mark.parametrize("act", [act_of(8), act_of(4), act_of(8, 24), act_of(4, 0)], ids=str)
@pytest.mark.parametrize("knobs", [{}, {"per_tensor": False, "scale_dtype": "float16"}], ids=str)
def test_inputs_are_rounded_as_by_the_format(act, knobs):
    act = {**act, **knobs, "saturation": "symmetric" if knobs else "released"}
    x = random(5, 100, seed=3) * torch.tensor([1e-3, 1, 50, 0, 1.0])[:, None]
    q, scale = integers(x, act)
    assert torch.equal(q * scale, FORMATS.build(dict(act)).fake(x))


@pytest.mark.parametrize("act", [act_of(8), act_of(4, 8), act_of(4, 24), act_of(8, 0)], ids=str)
def test_triton_rounds_inputs_to_the_same_integers(act):
    from kernels.sdr.kernel import BYTES, FP8, compressed

    x = random(3, 90, seed=4)
    x[1] = 0
    lay = tiled(16, 90, 16, 2)
    q, scale = integers(x, act)
    high, low, scales = compressed(x, act, lay, BYTES)
    got = 256 * high[: 3 * lay.padded].float() + low[: 3 * lay.padded].float()
    assert torch.equal(got.view(3, -1), ordered(q, lay))
    assert torch.equal(scales[:, None], scale)
    if fits_fp8(act):
        _, low, _ = compressed(x, act, lay, FP8)
        assert torch.equal(512 * low[: 3 * lay.padded].float().view(3, -1), ordered(q, lay))


@pytest.mark.parametrize("act", [None, act_of(8), act_of(4)], ids=str)
def test_the_op_is_one_to_torch(act):
    case = Case(2, 20, 48, KERNEL.cases[3].weight, act)
    codes, params, _ = weights(case)
    packed = KERNEL.pack(codes, params, case.weight, act)
    held, x = packed.tensors, random(2, 48)
    numbers = [0, 0, 0] if act is None else [act["bits"], act["base_bits"], act["group"]]
    arguments = (x, held["words"], held["shifts"], held["scale"], 16, numbers, False, True)
    torch.library.opcheck(OP, (*arguments, "float32" if act else ""))
    compiled = torch.compile(
        lambda x: KERNEL.matmul(x, packed) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), KERNEL.matmul(x, packed) + 1)


@pytest.mark.parametrize(
    ("weight", "act", "says"),
    [
        ({"kind": "int"}, None, "not 'int'"),
        (sdr_format(base_bits=16), None, "not 16 cut to 4"),
        (sdr_format(bits=8), None, "not 8 cut to 8"),
        (sdr_format(group=6), None, "groups of 6 weights"),
        (sdr_format(beside=["column_group"]), None, "these have column_group"),
        (sdr_format(), {"kind": "int"}, "it rounds activations to 'sdr', not 'int'"),
    ],
)
def test_what_it_cannot_do_it_says(weight, act, says):
    assert says in KERNEL.why_not(weight, act, CPU, 64, 64)


@pytest.mark.parametrize("group", [8, 16, 32, 128])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_packed_linear_agrees_with_the_simulated_one(group, bits):
    w, x, bias = random(48, 300, seed=5) / 10, random(2, 3, 300, seed=6), torch.ones(48)
    form = FORMATS.build({"kind": "sdr", "group": group, "scale_dtype": "float16"})
    act = None if bits is None else FORMATS.build(dict(act_of(bits, group)))
    layer = QuantLinear(form.quantize(w), bias, act=act, dtype=torch.float32)
    simulated, before = layer(x), layer.resident_bytes()
    layer.pack(layer.kernel_for("cpu"))
    assert layer.kernel is kernels()["sdr"]
    assert layer.resident_bytes() < before / 4
    assert (layer(x) - simulated).abs().max() <= 1e-5 * simulated.abs().max()
