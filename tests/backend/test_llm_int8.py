"""LLM.int8(): bitsandbytes' outputs, and what the split into outliers and the rest must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backend import recipes
from backend.layer import quantize_layer
from backend.methods.bnb_int8 import BnbInt8
from backend.methods.llm_int8 import GRID, Int8Linear, LLMInt8, vector_wise
from backend.model.checkpoint import Checkpoint
from backend.model.families import blocks_of
from backend.model.quant_linear import LINEARS
from backend.model.stats import AbsMax, LayerStats
from backend.pipeline import quantize

FOLDER = Path(__file__).parents[3] / "shared" / "vectors"
needs_vectors = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no test vectors at {FOLDER}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier_inputs(tokens: int = 64, k: int = 128, seed: int = 1) -> Tensor:
    """[tokens, k], channels 5 and 70 20 and 30 times larger; all others stay below 6."""
    x = normal(tokens, k, seed=seed).clamp(-5, 5)
    x[:, 5] *= 20
    x[:, 70] *= 30
    return x


def layer(w: Tensor, x: Tensor | None = None, bias: Tensor | None = None, **knobs: Any) -> Any:
    """The quantized linear; x calibrates a static list."""
    method = LLMInt8(**knobs)
    stats = LayerStats({AbsMax: AbsMax(w.shape[1])})
    if x is not None:
        stats.update(x)
    linear = nn.Linear(*w.T.shape, bias=bias is not None)
    linear.weight = nn.Parameter(w.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return method.quantize(linear, stats)


def arrays() -> dict[str, Tensor]:
    with np.load(FOLDER / "bnb_a.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@needs_vectors
@pytest.mark.parametrize("threshold", [6.0, 3.0, 0.0])
def test_codes_and_outputs_are_those_of_bitsandbytes(threshold):
    data, name = arrays(), f"int8_thr{threshold:g}"
    module = layer(data["in_W"], bias=data["in_bias"], threshold=threshold)
    rows = module.qtensor.codes.int() - GRID.middle
    off = (rows - data["int8__CB"].int()).abs()
    assert not off.any()
    full = data["int8__SCB"] > 0  # an all-zero row has peak 0 there and [-1, 1] here
    scale = module.qtensor.params["scale"].flatten() * 127
    torch.testing.assert_close(scale[full], data["int8__SCB"][full], rtol=1e-6, atol=0)

    codes, scale, columns = vector_wise(data["in_X"], threshold)
    assert columns.tolist() == data.get(f"{name}__outlier_cols", torch.empty(0)).tolist()
    off = (codes - data[f"{name}__CA"].float()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() <= 0.001
    peak = data[f"{name}__SCA"]
    torch.testing.assert_close(127 * scale[peak > 0, 0], peak[peak > 0], rtol=1e-6, atol=0)

    y = module(data["in_X"])
    torch.testing.assert_close(y.double(), data[f"{name}__out_formula_f64"], rtol=0, atol=2e-4)
    torch.testing.assert_close(y, data[f"{name}__out"], rtol=0, atol=4e-3)


@needs_vectors
def test_the_outliers_of_one_token_are_those_of_bitsandbytes():
    """With one token the outlier columns are its outlier entries, which are 0 in its codes."""
    data = arrays()
    stored = data["int8_onetoken_thr6__outlier_cols"].tolist()
    x = next(x for x in data["in_X"] if (x.abs() >= 6).nonzero().flatten().tolist() == stored)
    codes, scale, columns = vector_wise(x[None], 6.0)
    assert columns.tolist() == stored
    peak = data["int8_onetoken_thr6__SCA"]
    torch.testing.assert_close(127 * scale[:, 0], peak, rtol=1e-6, atol=0)
    assert ((codes - data["int8_onetoken_thr6__CA"].float()).abs() > 0).float().mean() <= 0.001


@needs_vectors
def test_the_vectors_have_the_cases_tested_here():
    configs = json.loads((FOLDER / "bnb_a.json").read_text())["configs"]
    assert {name for name in configs if name.startswith("int8")} == {
        "int8_thr6",
        "int8_thr3",
        "int8_thr0",
    }


@pytest.mark.parametrize("knobs", [{"threshold": 0.0}, {"threshold": 1e6}], ids=str)
def test_without_outliers_it_is_vector_wise_w8a8(knobs):
    w, x = normal(24, 128), outlier_inputs()
    first, *rest = recipes.parse("rtn(bits=8,symmetric=true)+activations(bits=8,symmetric=true)")
    rounded = first.format.fake(w)
    y = rest[0].format.fake(x) @ rounded.T
    # the same products: summed as whole numbers here, as fractions there
    torch.testing.assert_close(layer(w, **knobs)(x), y, rtol=1e-5, atol=1e-4)
    assert torch.equal(layer(w, **knobs).weight, rounded)


def test_inputs_below_the_threshold_are_not_touched_by_it():
    w, x = normal(24, 128), normal(64, 128, seed=1).clamp(-5.9, 5.9)
    assert torch.equal(layer(w)(x), layer(w, threshold=0.0)(x))


def test_when_every_channel_is_an_outlier_only_weights_are_rounded():
    w, x = normal(24, 128), outlier_inputs()
    exact = layer(w, threshold=1e-9, outliers="exact")(x)
    torch.testing.assert_close(exact, x @ w.T, rtol=1e-6, atol=1e-5)
    rounded = layer(w, threshold=1e-9)(x)
    torch.testing.assert_close(rounded, x @ GRID.fake(w).T, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("outliers", ["int8", "exact"])
def test_error_falls_with_the_threshold(outliers):
    w, x = normal(256, 128), outlier_inputs(256)
    y = x @ w.T

    def error(threshold: float) -> float:
        out = layer(w, threshold=threshold, outliers=outliers)(x)
        return ((out - y).norm() / y.norm()).item()

    by_threshold = [error(t) for t in (1e6, 6.0, 3.0, 1e-9)]
    assert by_threshold == sorted(by_threshold, reverse=True)
    assert by_threshold[1] < 0.4 * by_threshold[0]


def test_one_outlier_takes_its_channel_out_for_every_token_of_the_call():
    w, x = normal(8, 32), normal(4, 32, seed=1).clamp(-3, 3)
    x[2, 7] = 50
    codes, scale, columns = vector_wise(x, 6.0)
    assert columns.tolist() == [7]
    assert not codes[:, 7].any()
    regular = x.clone()
    regular[2, 7] = 0
    # the other tokens' scales still count their own entry in that column
    torch.testing.assert_close(127 * scale[:, 0], regular.abs().amax(1))
    module = layer(w)
    assert module.mixes_rows()
    alone = module(x[:1])
    assert not torch.equal(module(x)[:1], alone)
    assert not layer(w, threshold=0.0).mixes_rows()


@pytest.mark.parametrize("outliers", ["int8", "exact"])
def test_a_static_list_gives_a_token_the_same_output_in_any_call(outliers):
    w, x = normal(24, 128), outlier_inputs()
    module = layer(w, x, outliers=outliers, static=True)
    assert module.columns.tolist() == [5, 70]
    assert not module.mixes_rows()
    one_by_one = torch.cat([module(row[None]) for row in x])
    torch.testing.assert_close(module(x), one_by_one, rtol=1e-5, atol=1e-4)
    x[:, [5, 70]] = 40 * x[:, [5, 70]].sign()  # then a dynamic list is the same
    torch.testing.assert_close(module(x), layer(w, outliers=outliers)(x), rtol=1e-5, atol=1e-4)


def test_zero_tokens_and_zero_rows_give_zero():
    w, x = normal(8, 32), normal(5, 32, seed=1)
    w[3], x[2] = 0, 0
    y = layer(w)(x)
    assert y.isfinite().all()
    assert not y[2].any()
    assert not y[:, 3].any()


def test_bits_count_what_is_kept():
    w, x = normal(24, 128), outlier_inputs()
    base = {"codes": 8.0, "scales": 32 / 128, "zeros": 0.0, "outliers": 0.0, "index": 0.0}
    assert layer(w).bits() == base
    assert layer(w, outliers="exact").bits() == base | {"outliers": 16.0}
    index = 32 * 2 / (24 * 128)
    assert layer(w, x, static=True).bits() == base | {"index": index}
    kept = layer(w, x, static=True, outliers="exact").bits()
    assert kept == base | {"outliers": 16 * 2 / 128, "index": index}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "knobs",
    [{}, {"outliers": "exact"}, {"static": True}, {"outliers": "exact", "static": True}],
    ids=str,
)
def test_state_comes_back_bit_equal_and_takes_the_bytes_it_says(knobs, dtype):
    w, x = normal(24, 128).to(dtype), outlier_inputs().to(dtype)
    module = layer(w, x, bias=normal(24).to(dtype), **knobs)
    tensors, config = module.to_state()
    again = LINEARS["llm_int8"].from_state(tensors, json.loads(json.dumps(config)), dtype)
    assert torch.equal(again(x), module(x))
    assert again.bits() == module.bits()
    stored = sum(t.numel() * t.element_size() for n, t in tensors.items() if n != "bias")
    if dtype == torch.bfloat16:
        assert stored == pytest.approx(sum(module.bits().values()) * w.numel() / 8, rel=0.01)


@pytest.mark.parametrize(
    "recipe", ["llm_int8", "llm_int8(outliers=exact,static=true,threshold=1.0)"]
)
def test_a_walk_saves_and_restores_bit_equal(recipe, make_model, tmp_path):
    tokens = torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(0))
    first, second = make_model("opt"), make_model("opt")
    steps = recipes.parse(recipe)
    quantize(first, steps, tokens, Checkpoint(tmp_path))
    for block in blocks_of(second):
        Checkpoint(tmp_path).restore(block)
        assert all(isinstance(m, Int8Linear) for m in block.linears().values())
    assert torch.equal(first(tokens).logits, second(tokens).logits)
    first.to(torch.float64).to(torch.float32)  # codes and lists keep their types
    assert torch.equal(first(tokens).logits, second(tokens).logits)


def test_only_a_static_list_needs_data():
    w, x = normal(24, 128), outlier_inputs()
    assert LLMInt8().wanted() == ()
    with pytest.raises(ValueError, match="needs calibration inputs"):
        quantize_layer({"kind": "llm_int8", "static": True}, w)
    dynamic = quantize_layer({"kind": "llm_int8"}, w)
    assert dynamic.bits_per_weight == 8.25
    assert dynamic(x).shape == (64, 24)


def test_bad_combinations_get_one_sentence(make_model):
    with pytest.raises(ValueError, match="threshold 0 lists no outliers"):
        recipes.parse("llm_int8(threshold=0,static=true)")
    module = layer(normal(8, 32))
    with pytest.raises(ValueError, match="already rounded to int8"):
        module.with_act(GRID)
    with pytest.raises(ValueError, match="found anew in every call; fix them with static=true"):
        module.kernel_for("cpu")


# ---- bitsandbytes itself -------------------------------------------------------------------


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


@torch.no_grad()
@pytest.mark.parametrize("threshold", [6.0, 3.0, 0.0])
def test_the_librarys_own_layer_gives_the_same(bnb, threshold):
    w, bias, x = normal(24, 128), normal(24), outlier_inputs().half()
    theirs = bnb.nn.Linear8bitLt(128, 24, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict({"weight": w.half(), "bias": bias.half()})
    theirs = theirs.to("cpu").eval()
    linear = nn.Linear(128, 24).half().requires_grad_(False)
    linear.weight.copy_(w)
    linear.bias.copy_(bias)
    ours = BnbInt8(threshold=threshold).quantize(linear, LayerStats())
    y = theirs(x)
    # fp16 results: one unit in the last place where a row scale came back rounded
    torch.testing.assert_close(ours(x), y, rtol=2e-3, atol=1e-3)
    assert (ours(x) != y).float().mean() < 0.05
    assert ours.mixes_rows() == (threshold > 0)


@needs_vectors
@pytest.mark.parametrize("threshold", [6.0, 3.0, 0.0])
def test_the_library_still_gives_what_it_gave(bnb, threshold):
    data = arrays()
    linear = nn.Linear(256, 48).requires_grad_(False)
    linear.weight.copy_(data["in_W"])
    linear.bias.copy_(data["in_bias"])
    y = BnbInt8(threshold=threshold).quantize(linear, LayerStats())(data["in_X"])
    torch.testing.assert_close(y, data[f"int8_thr{threshold:g}__out"], rtol=0, atol=4e-3)


def test_ours_and_the_librarys_differ_by_fp16_alone(bnb):
    w, x = normal(24, 128), outlier_inputs()
    ours, theirs = (quantize_layer({"kind": kind}, w) for kind in ("llm_int8", "bnb_int8"))
    assert ours.bits == theirs.bits
    error = (ours(x) - theirs(x)).norm() / ours(x).norm()
    assert error < 2e-3
