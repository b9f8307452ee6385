"""Pre-flight estimates against hand arithmetic, and refusals with numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from backend import estimate as module
from backend.environment import environment
from backend.estimate import PROGRAM_BYTES, estimate
from backend.methods import METHODS
from backend.metrics import METRICS
from backend.model.families import FAMILIES, blocks_of
from backend.model.identity import ModelFacts, find_model
from backend.spec import Calibration, ModelRef, RunSpec

LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
LLAMA_8B = ModelFacts(
    id="llama",
    folder=Path("llama"),
    content="0" * 12,
    parameters=LINEAR + 2 * 128256 * 4096,
    linear_parameters=LINEAR,
    weight_bytes=2 * (LINEAR + 2 * 128256 * 4096),
    context=131072,
    blocks=32,
    layer_bytes=LINEAR // 16,
    config={
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
)


def spec(*steps, **knobs):
    metric = METRICS.build({"kind": "perplexity", "window": 2048})
    built = tuple(METHODS.build(step) for step in steps)
    return RunSpec(model=ModelRef(id="llama"), steps=built, metrics=(metric,), **knobs)


@pytest.fixture
def big_machine(monkeypatch):
    monkeypatch.setattr(module, "main_memory", lambda: 256 << 30)
    monkeypatch.setattr(module, "gpus", lambda: [{"name": "GPU", "memory_bytes": 80 << 30}])


def test_gptq_of_an_8b_model_by_hand(big_machine):
    run = spec({"kind": "gptq"}, calibration=Calibration(samples=128, length=2048))
    guess = estimate(run, LLAMA_8B, "cpu")
    assert guess.parts["weights"] == 4 * LLAMA_8B.parameters  # fp32 on the CPU
    assert guess.parts["codes"] == LINEAR
    assert guess.parts["hidden states"] == 128 * 2048 * 4096 * 4
    assert guess.parts["statistics"] == 4 * (3 * 4096**2 + 3 * 14336**2)
    assert guess.memory_bytes == guess.host_bytes == sum(guess.parts.values())
    assert guess.disk_bytes == pytest.approx(LINEAR / 2, rel=0.01)
    assert guess.seconds[0] < guess.seconds[1]
    assert guess.why_not is None


def test_rtn_needs_no_calibration_and_an_original_stream_costs_three(big_machine):
    assert estimate(spec({"kind": "rtn"}), LLAMA_8B).parts["hidden states"] == 0
    smooth = estimate(spec({"kind": "smoothquant"}, {"kind": "gptq"}), LLAMA_8B)
    plain = estimate(spec({"kind": "gptq"}), LLAMA_8B)
    assert smooth.parts["hidden states"] == 3 * plain.parts["hidden states"]
    assert estimate(spec(), LLAMA_8B).disk_bytes == 0


FFN = 32 * 3 * 4096 * 14336  # weights of gate, up and down
ATTENTION = LINEAR - FFN


def disk(*steps):
    return estimate(spec(*steps), LLAMA_8B).disk_bytes - 32 * 7 * module.HEADER_BYTES


def test_each_linear_takes_the_bits_of_its_own_step(big_machine):
    grid = {"kind": "int", "bits": 4, "group": 128, "scale_dtype": "float16"}
    four, eight = 4 + 20 / 128, 8 + 24 / 128  # code, fp16 scale, zero point as wide as a code
    rules = [{"modules": "attn", "bits": 8}, {"blocks": "first", "keep": True}]
    assert disk({"kind": "rtn", "format": grid}) * 8 == pytest.approx(four * LINEAR, rel=1e-3)
    ruled = {"kind": "rtn", "format": grid, "layers": rules}
    expected = eight * ATTENTION + FFN / 32 * (31 * four + 32)  # kept ones in fp32
    assert disk(ruled) * 8 == pytest.approx(expected, rel=1e-3)
    smooth = {"kind": "smoothquant"}
    assert disk(smooth, {"kind": "rtn", "format": grid}) == disk({"kind": "rtn", "format": grid})
    assert disk({"kind": "activations"}) * 8 == 32 * LINEAR
    zeroquant = {"kind": "zeroquant", "group": 128}
    expected = (8 + 16 / 128) * ATTENTION + (4 + 16 / 128) * FFN
    assert disk(zeroquant) * 8 == pytest.approx(expected, rel=1e-3)


def test_spqr_takes_the_bits_it_is_asked_for(big_machine):
    asked = {"kind": "spqr", "bits": 3, "target_bits": 3.99}
    assert disk(asked) * 8 == pytest.approx(3.99 * LINEAR)
    plain = disk({"kind": "spqr", "threshold": None})
    assert plain < disk({"kind": "spqr"}) < disk(asked) * 1.01


def pruned(**knobs):
    return disk({"kind": "magnitude", **knobs}) * 8 / LINEAR


def test_pruned_weights_take_no_bits_but_their_places_do(big_machine):
    assert pruned(sparsity=0.75) == pytest.approx(0.25 * 16 + 1)
    assert pruned(bits=4, group=128) == pytest.approx(0.5 * 4 + 20 / 128 + 1, rel=1e-3)


def middle(*steps):
    low, high = estimate(spec(*steps), LLAMA_8B).seconds
    return (low * high) ** 0.5


def test_time_grows_with_what_a_step_does(big_machine):
    taught = {"kind": "zeroquant", "lkd_steps": 320}
    rule = {"blocks": "last", "lkd_steps": 320}
    plain, one, all_ = (
        middle(step)
        for step in (
            {"kind": "zeroquant"},
            {"kind": "zeroquant", "layers": [rule]},
            taught,
        )
    )
    # Without LKD anywhere nothing is calibrated; with it in one of 32 blocks, passes for all are.
    passes = 2.0 * LINEAR * 128 * 2048 / (module.CORE_FLOPS * module.cores())
    assert one - plain == pytest.approx(passes * (2 + (4 * 320 * 4 / 128 + 5) / 32), rel=0.01)
    assert all_ - plain == pytest.approx(passes * (2 + 4 * 320 * 4 / 128 + 5), rel=0.01)
    kept = {"kind": "zeroquant", "lkd_steps": 320, "layers": [{"blocks": "1..-1", "keep": True}]}
    assert middle(kept) < all_ / 4

    rtn, search = {"kind": "rtn"}, {"kind": "smoothquant", "search": 20}
    assert middle({"kind": "smoothquant"}, rtn) < middle(search, rtn)
    assert middle({"kind": "gptq"}) < middle({"kind": "spqr"})
    assert middle({"kind": "spqr"}) < middle({"kind": "spqr", "target_bits": 3.99})
    assert middle({"kind": "obq", "max_inputs": 8192}) > 50 * middle({"kind": "gptq"})
    few = middle({"kind": "awq", "search_tokens": 1024})
    assert few < middle({"kind": "awq"}) < middle({"kind": "awq", "search_tokens": 65536})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sizes_from_the_config_are_those_of_the_model(family, make_model):
    model = make_model(family)
    blocks = blocks_of(model)
    facts = replace(LLAMA_8B, config=model.config.to_dict(), blocks=len(blocks))
    guessed = [(m.block.index, m.name, m.n, m.k) for m in module.matrices_of(facts)]
    found = [
        (block.index, name, *linear.weight.shape)
        for block in blocks
        for name, linear in block.linears().items()
    ]
    assert sorted(guessed) == sorted(found)


def test_the_bundled_models_sizes_are_known(big_machine):
    for model in ("demo", "demo-outliers"):
        facts = find_model(ModelRef(id=model))
        assert sum(m.weights for m in module.matrices_of(facts)) == facts.linear_parameters


def test_on_a_gpu_numbers_take_two_bytes(big_machine):
    guess = estimate(spec({"kind": "gptq"}), LLAMA_8B, "cuda")
    assert guess.parts["weights"] == LLAMA_8B.weight_bytes
    assert guess.memory_bytes < 30e9
    assert guess.host_bytes > PROGRAM_BYTES + LLAMA_8B.weight_bytes
    assert guess.seconds[1] < estimate(spec({"kind": "gptq"}), LLAMA_8B, "cpu").seconds[0]


def test_what_does_not_fit_is_refused_with_both_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "main_memory", lambda: 16 * 10**9)
    monkeypatch.setattr(module, "gpus", lambda: [{"name": "GPU", "memory_bytes": 8 * 10**9}])
    run = spec({"kind": "gptq"})
    says = estimate(run, LLAMA_8B, "cpu").why_not
    assert says.startswith("it needs about 4")
    assert says.endswith("of memory, this machine has 16.0 GB")
    assert "GPU memory, the GPU has 8.0 GB" in estimate(run, LLAMA_8B, "cuda").why_not
    monkeypatch.setattr(module, "main_memory", lambda: 256 << 30)
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    says = estimate(run, LLAMA_8B, "cpu", tmp_path / "not" / "there").why_not
    assert says.startswith("it writes about 3.")
    assert "1.0 GB are free" in says


def test_the_environment_names_what_made_a_number():
    found = environment()
    assert set(found) >= {"python", "torch", "transformers", "commit", "dirty", "cpu", "gpu"}
    assert found["cores"] >= 1
    assert "/" not in str(found["commit"])
    assert environment() is found
