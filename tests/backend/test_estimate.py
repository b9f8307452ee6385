"""Pre-flight estimates against hand arithmetic, and refusals with numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend import estimate as module
from backend.environment import environment
from backend.estimate import PROGRAM_BYTES, estimate
from backend.methods import METHODS
from backend.metrics import METRICS
from backend.model.identity import ModelFacts
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
    config={"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256},
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
