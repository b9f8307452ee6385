"""LLM.int8() in one launch: the Triton kernel in its interpreter, the op, the method's linear."""

from __future__ import annotations

import pytest
import torch

from backend.methods.bnb_int8 import BnbInt8Linear
from backend.methods.llm_int8 import LLMInt8, vector_wise
from backend.model.stats import AbsMax, LayerStats
from kernels.base import Case, Packed, find, kernels
from kernels.llm_int8 import KERNEL, OP, arranged, kernel, llm_int8
from kernels.w8_a8 import kernel as w8_a8

FUSED = {"fused": True, "bn": 32, "bk": 64, "splits": 1, "warps": 4, "stages": 2}
PATHS = {
    "rounded inside": FUSED,
    "rounded inside, split": {**FUSED, "splits": 3},
    "rounded before, split": {**FUSED, "fused": False, "splits": 2},
}
MANY = {"fused": False, "bm": 32, "bn": 32, "bk": 64, "warps": 4, "stages": 2}
WEIGHTS = [llm_int8("exact", 3), llm_int8("int8", 5), llm_int8("int8", 40), llm_int8()]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """new_empty gives NaN or 85, so an element that is never written shows."""
    plain = torch.Tensor.new_empty

    def filled(*args, **kwargs):
        made = plain(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 85)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def example(m, n, k, weight, dtype=torch.float32):
    """x [m, k] with outliers and a token of zeros, packed weights, exact [m, n] fp64."""
    rng = torch.Generator().manual_seed(m)
    codes, params = KERNEL.example(Case(m, n, k, weight), rng)
    x = torch.randn(m, k, generator=rng)
    x[:, params["columns"].long()] *= 20
    if m > 2:
        x[1] = 0
    x = x.to(dtype)
    tensors = arranged(codes, params, weight, blocks=False)
    return x, Packed(tensors, n, k, weight), exact(x, codes, params)


def exact(x, codes, params):
    """As the method's simulated linear multiplies, in fp64."""
    a, scale, columns = vector_wise(x.float(), 6.0, params["columns"])
    q = codes.double() - 128
    w = params["exact"].double() if "exact" in params else q[:, columns] * params["scale"].double()
    y = (a.double() @ q.T) * scale.double() * params["scale"].double().T
    return y + x.double()[:, columns] @ w.T


def arguments(packed):
    held = packed.tensors
    names = ("codes", "scale", "keep", "index", "outliers")
    return *(held[name] for name in names), packed.weight["outliers"] == "int8"


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("config", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 100), (3, 70, 192)])
def test_few_tokens(weight, config, m, n, k):
    x, packed, expected = example(m, n, k, weight)
    y = kernel.product(x, *arguments(packed), config)
    # sums of codes are exact; scales, and sums of up to 40 outliers, are rounded to fp32
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(y, kernel.product(x, *arguments(packed), config))


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_many_tokens(weight):
    x, packed, expected = example(65, 70, 130, weight)
    y = kernel.product(x, *arguments(packed), MANY)
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("m", [1, 9, 65])
def test_half_precision_and_the_heuristic(m):
    x, packed, expected = example(m, 40, 128, llm_int8("int8", 4), torch.float16)
    y = kernel.product(x, *arguments(packed))
    assert y.dtype == torch.float16
    assert (y - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("case", KERNEL.cases, ids=str)
def test_the_op_on_a_cpu(case, blocks):
    x, packed, expected = example(case.m, case.n, case.k, case.weight)
    if blocks:
        codes, params = KERNEL.example(case, torch.Generator().manual_seed(case.m))
        packed = KERNEL.pack(codes, params, case.weight, None)
    for y in (KERNEL.matmul(x, packed), KERNEL.reference(x, packed)):
        assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
    got = KERNEL.matmul(x.bfloat16(), packed)
    assert got.dtype == torch.bfloat16
    assert (got - KERNEL.reference(x.bfloat16(), packed)).abs().max() <= 4e-3 * expected.abs().max()
    assert KERNEL.why_not(case.weight, None, torch.device("cpu"), case.n, case.k) is None


def test_sums_are_whole_numbers_and_exact():
    x = torch.randint(0, 2, (3, 200)) * 254.0 - 127  # its scale is 1
    x[:, 7] = 4000
    codes = torch.randint(1, 256, (40, 200), dtype=torch.uint8)
    codes[0], codes[1] = 1, 255
    params = {"scale": torch.ones(40, 1), "columns": torch.tensor([7], dtype=torch.int32)}
    weight = llm_int8("int8", 1)
    packed = Packed(arranged(codes, params, weight, blocks=False), 40, 200, weight)
    sums = x.long() @ (codes.long() - 128).T
    for config in (*PATHS.values(), None):
        assert torch.equal(kernel.product(x, *arguments(packed), config).long(), sums)
    for held in (packed, KERNEL.pack(codes, params, weight, None)):
        assert torch.equal(KERNEL.matmul(x, held).long(), sums)


def test_packing_lists_channels_in_whole_chunks():
    codes, params = KERNEL.example(Case(1, 6, 70, llm_int8("exact", 33)), torch.Generator())
    packed = arranged(codes, params, llm_int8("exact", 33), blocks=False)
    assert torch.equal(packed["codes"][:, :70] + 128 & 255, codes.to(torch.int8) & 255)
    assert torch.equal(packed["index"][:33], params["columns"])
    assert (packed["index"][33:] == -1).all()
    assert len(packed["index"]) == 64
    assert torch.equal(packed["outliers"][:, :33], params["exact"])
    assert not packed["outliers"][:, 33:].any()
    assert torch.equal((packed["keep"] == 0).nonzero().flatten(), params["columns"].long())


@pytest.mark.parametrize("weight", WEIGHTS[:2], ids=str)
def test_the_op_is_traceable_and_its_fake_right(weight):
    x, packed, _ = example(3, 10, 70, weight)
    torch.library.opcheck(OP, (x, *arguments(packed)))
    whole = torch.compile(
        lambda x: KERNEL.matmul(x, packed) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(whole(x), KERNEL.matmul(x, packed) + 1)


def test_it_says_why_not():
    gpu = torch.device("cuda")
    assert find(llm_int8("exact", 3), None, gpu, 64, 64) is kernels()["llm_int8"]
    assert "not 'int'" in KERNEL.why_not({"kind": "int"}, None, gpu, 64, 64)
    assert "itself" in KERNEL.why_not(llm_int8(), {"kind": "int"}, gpu, 64, 64)
    assert "overflow" in KERNEL.why_not(llm_int8(), None, gpu, 64, 2**17)


def test_no_tokens_give_no_rows():
    _, packed, _ = example(1, 9, 64, llm_int8())
    assert KERNEL.matmul(torch.empty(0, 64), packed).shape == (0, 9)


def test_sums_fit_into_registers():
    """Outliers take as many sums again: half the tile."""
    cpu = torch.device("cpu")
    assert [w8_a8.heuristic(2048, 4096, 4096, cpu, o)["bn"] for o in (False, True)] == [256, 128]


def linear_of(knobs, x, dtype):
    """The method's linear [48, 64], its static list from x."""
    method, stats = LLMInt8(**knobs), LayerStats({AbsMax: AbsMax(64)})
    stats.update(x)
    linear = torch.nn.Linear(64, 48).to(dtype)
    return method.quantize(linear, stats)


@pytest.mark.parametrize(
    "knobs",
    [{"static": True, "outliers": "exact"}, {"static": True}, {"threshold": 0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_linear_is_the_simulated_one(knobs, dtype):
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    x[..., 9] *= 30
    x = x.to(dtype)
    layer = linear_of(knobs, x, dtype)
    simulated, stored, before = layer(x), layer.bits(), layer.resident_bytes()
    layer.pack(layer.kernel_for("cpu"))
    got = layer(x)
    assert (got.dtype, got.shape) == (dtype, (2, 5, 48))
    # bf16: the bias is added to a rounded product, two roundings for one
    limit = 1e-6 if dtype == torch.float32 else 8e-3
    assert (got - simulated).abs().max() <= limit * simulated.abs().max()
    assert layer.bits() == stored
    assert layer.resident_bytes() < before
    assert not layer.mixes_rows()


def test_a_list_made_in_every_call_is_refused():
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match="fix them with static=true"):
        linear_of({}, x, torch.float32).kernel_for("cpu")
    assert "bitsandbytes" in BnbInt8Linear.why_not_packed(None)
