"""E4M3: every path of the Triton kernel in its interpreter, the CPU's expansion, the op."""

from __future__ import annotations

import pytest
import torch

from backend.formats import FORMATS
from backend.model.quant_linear import QuantLinear
from kernels.base import Case, find, kernels
from kernels.fp8 import KERNEL, OP, e4m3, expanded, kernel
from kernels.w8_a8.layout import unpadded

FUSED = {"fused": True, "bn": 32, "bk": 64, "splits": 1, "warps": 4, "stages": 2}
PATHS = {
    "rounded inside": FUSED,
    "rounded inside, split": {**FUSED, "splits": 3},
    "rounded before, split": {**FUSED, "fused": False, "splits": 2},
}
MANY = {"fused": False, "bm": 32, "bn": 32, "bk": 64, "warps": 4, "stages": 2}
ROUNDED = {
    "token by row": (e4m3(), e4m3()),
    "one scale": (e4m3(per_tensor=True), e4m3(per_tensor=True)),
    "groups": (e4m3(group=64, scale_dtype="float16"), e4m3(scale_dtype="bfloat16")),
}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """new_empty gives NaN or 85, so an element that is never written shows."""
    plain = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        made = plain(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 85)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def example(m, n, k, forms, seed=0, dtype=torch.float32):
    """x [m, k] of magnitudes 1e-4 to 1e2 with a token of zeros, packed weights, exact [m, n]."""
    case, rng = Case(m, n, k, *forms), torch.Generator().manual_seed(seed)
    codes, params = KERNEL.example(case, rng)
    x = torch.randn(m, k, generator=rng) * torch.logspace(-4, 2, m)[:, None]
    if m > 2:
        x[1] = 0
    x = x.to(dtype)
    return x, KERNEL.pack(codes, params, *forms), exact(x, codes, params, forms)


def exact(x, codes, params, forms):
    """[m, n] fp64 by the formats themselves."""
    weight = FORMATS.build(dict(forms[0]))
    group = weight.group or codes.shape[1]
    w = torch.cat(
        [
            weight.decode(part, {"scale": params["scale"][:, i : i + 1]})
            for i, part in enumerate(codes.split(group, 1))
        ],
        1,
    )
    rows = x.float() if forms[1] is None else FORMATS.build(dict(forms[1])).fake(x.float())
    return rows.double() @ w.double().T


def multiplied(x, packed, config):
    """The Triton kernel, on CPU tensors."""
    held, act = packed.tensors, packed.act
    rounding = kernel.Rounding(act["scale_dtype"], act["per_tensor"]) if act else None
    group = packed.weight["group"] or packed.k
    return kernel.product(x, held["codes"], held["scale"], group, rounding, False, config)


def near(y, expected, limit=2e-6):
    """Within fp32 sums of a few hundred terms, token by token: they differ in size by 1e6."""
    room = limit * expected.abs().amax(1, keepdim=True)
    room += 2.0**-24 if y.dtype == torch.float16 else 0  # its smallest number
    return ((y.double() - expected).abs() <= room).all()


@pytest.mark.parametrize("forms", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("config", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("m", "n"), [(1, 33), (3, 70)])
def test_few_tokens(forms, config, m, n):
    x, packed, expected = example(m, n, 320, forms, seed=m)
    y = multiplied(x, packed, config)
    assert near(y, expected)
    assert torch.equal(y, multiplied(x, packed, config))


@pytest.mark.parametrize("config", [FUSED, {**FUSED, "splits": 2}])
def test_odd_channels(config):
    x, packed, expected = example(3, 40, 100, (e4m3(), e4m3()))
    assert near(multiplied(x, packed, config), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight", [e4m3(), e4m3(group=64)], ids=["rows", "groups"])
def test_weights_only(weight, dtype):
    x, packed, expected = example(5, 33, 192, (weight, None), dtype=dtype)
    y = multiplied(x, packed, {**FUSED, "fused": False, "splits": 2})
    assert y.dtype == dtype
    assert near(y, expected, 2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("forms", ROUNDED.values(), ids=ROUNDED)
def test_many_tokens(forms):
    x, packed, expected = example(65, 70, 192, forms)
    assert near(multiplied(x, packed, MANY), expected)


@pytest.mark.parametrize(("m", "group"), [(1, 0), (9, 64), (16, 32), (65, 128)])
def test_the_heuristic_s_own_configurations(m, group):
    x, packed, expected = example(m, 40, 256, (e4m3(group=group), e4m3()), dtype=torch.float16)
    assert near(multiplied(x, packed, None), expected, 1e-3)  # fp16 results


@pytest.mark.parametrize("case", KERNEL.cases, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_on_a_cpu(case, dtype):
    x, packed, expected = example(case.m, case.n, case.k, (case.weight, case.act), dtype=dtype)
    assert near(KERNEL.reference(x, packed).double(), expected)
    y = KERNEL.matmul(x, packed)
    assert y.dtype == dtype
    # bf16: sums, results and scaled weights of groups are rounded to 8 bits
    assert near(y, expected, 2e-6 if dtype == torch.float32 else 0.012)
    assert KERNEL.why_not(case.weight, case.act, torch.device("cpu"), case.n, case.k) is None
    assert packed.nbytes() == sum(t.numel() * t.element_size() for t in packed.tensors.values())


def test_zeros_give_zeros_and_no_tokens_no_rows():
    _, packed, _ = example(1, 33, 64, (e4m3(), e4m3()))
    assert not KERNEL.matmul(torch.zeros(2, 64), packed).any()
    assert KERNEL.matmul(torch.zeros(0, 64), packed).shape == (0, 33)
    assert multiplied(torch.zeros(0, 64), packed, FUSED).shape == (0, 33)


def test_every_code_is_expanded_to_its_number():
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)[None]
    numbers = codes.view(torch.float8_e4m3fn).float()
    for dtype in (torch.bfloat16, torch.float32):
        got = expanded(codes, dtype)
        assert got.dtype == dtype
        assert torch.equal(got.float(), numbers)


def test_packing_keeps_the_codes():
    codes, params = KERNEL.example(Case(5, 7, 70, e4m3()), torch.Generator())
    packed = KERNEL.pack(codes, params, e4m3(), None)
    assert torch.equal(unpadded(packed.tensors["codes"], 70), codes)
    assert packed.tensors["codes"].shape == (7, 128)
    weight = torch.randn(7, 70)
    q = FORMATS.build(dict(e4m3())).quantize(weight)
    held = KERNEL.pack(q.codes, q.params, e4m3(), None)
    identity = KERNEL.reference(torch.eye(70), held)
    assert torch.equal(identity.T, q.dequantize())


@pytest.mark.parametrize("forms", [(e4m3(), e4m3()), (e4m3(group=32), None)])
def test_the_op_is_traceable_and_its_fake_right(forms):
    x, packed, _ = example(3, 10, 64, forms)
    held = packed.tensors
    told = (forms[0]["group"] or 64, forms[1] is not None, "float32", False)
    torch.library.opcheck(OP, (x, held["codes"], held["scale"], *told))
    whole = torch.compile(
        lambda x: KERNEL.matmul(x, packed) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(whole(x), KERNEL.matmul(x, packed) + 1)


@pytest.mark.parametrize(
    ("weight", "act", "says"),
    [
        ({"kind": "int", "bits": 8}, None, "multiplies by 'minifloat', not 'int'"),
        (e4m3(type="fp8_e5m2"), None, "multiplies by fp8_e4m3, not fp8_e5m2"),
        (e4m3(), e4m3(type="fp8_e5m2"), "rounds activations to fp8_e4m3, not fp8_e5m2"),
        (e4m3(), e4m3(group=32), "one activation scale per token, not per 32 channels"),
        (e4m3(group=48), None, "groups of 48 are no multiple of 32 that divides 96"),
        (e4m3(group=64), None, "groups of 64 are no multiple of 32 that divides 96"),
        ({**e4m3(), "beside": ["column_group"]}, None, "these have column_group"),
    ],
)
def test_it_says_why_not(weight, act, says):
    assert says in KERNEL.why_not(weight, act, torch.device("cuda"), 64, 96)


def test_a_gpu_and_a_cpu_take_it():
    for device in ("cpu", "cuda"):
        assert find(e4m3(), e4m3(), device, 64, 64) is kernels()["fp8"]


@pytest.mark.parametrize("weight", [{}, {"per_tensor": True}, {"group": 32}], ids=str)
@pytest.mark.parametrize("act", [None, {}, {"per_tensor": True}], ids=str)
def test_a_packed_linear_is_the_simulated_one(weight, act):
    rng = torch.Generator().manual_seed(0)
    fmt = FORMATS.build(dict(e4m3(**weight)))
    rounding = None if act is None else FORMATS.build(dict(e4m3(**act)))
    q = fmt.quantize(torch.randn(48, 64, generator=rng))
    layer = QuantLinear(q, torch.linspace(-1, 1, 48), act=rounding, dtype=torch.float32)
    x = torch.randn(2, 5, 64, generator=rng)
    simulated = layer(x)
    layer.pack(layer.kernel_for("cpu"))
    assert (layer(x) - simulated).abs().max() <= 1e-6 * simulated.abs().max()
