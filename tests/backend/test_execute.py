"""execute: stages, events, items, reuse of blocks, cancelling, and what must be refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import backend.execute as module
from backend.execute import execute, plain
from backend.metrics import METRICS
from backend.model.identity import resolve
from backend.pipeline import Cancelled
from backend.recipes import parse
from backend.run import Run
from backend.spec import RunSpec
from kernels.base import kernels


class Folder:
    """A run's folder under a home, and the events that its stages gave."""

    def __init__(self, home: Path, name: str, spec: RunSpec) -> None:
        self.path = home / "runs" / name
        self.home = home
        self.spec = RunSpec.model_validate_json(spec.model_dump_json())  # as a worker reads it
        self.path.mkdir(parents=True)
        (self.path / "spec.json").write_text(spec.model_dump_json())
        self.events: list[dict[str, Any]] = []

    def emit(self, type: str, **data: Any) -> None:
        event = {"t": 0.0, "type": type, **data}
        with (self.path / "events.jsonl").open("a") as out:
            out.write(json.dumps(event, allow_nan=False) + "\n")
        self.events.append(event)

    def do(self, *stages: str, stop=lambda: False) -> Folder:
        for stage in stages or self.spec.stages():
            execute(
                self.spec,
                stage,
                self.path,
                device="cpu",
                home=self.home,
                emit=self.emit,
                should_stop=stop,
            )
        return self

    def of(self, type: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == type]

    def values(self) -> dict[str, Any]:
        return {e["name"]: e["value"] for e in self.of("measurement") if e["layer"] is None}

    def blocks(self) -> list[bytes]:
        return [file.read_bytes() for file in sorted((self.path / "blocks").glob("*"))]


@pytest.fixture
def make(llama_folder, text_file, home, tmp_path):
    """make("name", "rtn(bits=4)", "perplexity", {"kind": ...}) -> Folder."""
    seen = tmp_path / "calibration.txt"
    seen.write_text("".join(f"{i} and {i} make {2 * i}, not {i}. " for i in range(60)))

    def build(name: str, recipe: str, *metrics: str | dict[str, Any], **knobs: Any) -> Folder:
        text = {"dataset": f"file:{text_file}", "window": 64, "limit": 4}
        given = [m if isinstance(m, dict) else {"kind": m} for m in metrics]
        given = [{**text, **m} if m["kind"] in ("perplexity", "divergence") else m for m in given]
        spec = RunSpec(
            model={"id": str(llama_folder)},
            steps=parse(recipe),
            metrics=given,
            calibration={"dataset": f"file:{seen}", "samples": 4, "length": 64},
            **knobs,
        )
        return Folder(home, name, resolve(spec))

    return build


# -- a whole run ---------------------------------------------------------------------------------


def test_a_run_gives_blocks_measurements_and_items(make):
    run = make("a", "rtn(bits=4,group=32)", "perplexity", "divergence", "size").do()
    assert len(run.blocks()) == 3
    assert [e["env"]["torch"] for e in run.of("env")] == [torch.__version__] * 2  # once a stage
    names = set(run.values())
    assert {"perplexity", "mean_kld", "same_top", "bits_per_weight", "weight_bytes"} <= names
    layers = [e for e in run.of("measurement") if e["layer"]]
    assert {e["name"] for e in layers} >= {"weight_sqnr"}
    assert {e["layer"][0] for e in layers} == {0, 1, 2}
    for event in run.of("measurement"):
        assert (event["device"], event["dtype"], event["storage"]) == (
            "cpu",
            "float32",
            "simulated",
        )
        assert len(event["metric_id"]) == 12


def test_items_are_one_number_a_line_under_the_metrics_id(make):
    run = make("a", "", "perplexity").do()
    (event,) = run.of("measurement")
    assert event["items_file"] == f"items/{event['metric_id']}.perplexity.csv"
    items = [float(line) for line in (run.path / event["items_file"]).read_text().splitlines()]
    assert len(items) == 4
    assert math.exp(sum(items) / 4) == pytest.approx(event["value"])
    assert not list(run.path.rglob("*.part"))


def test_progress_runs_from_nothing_to_one_in_every_stage(make):
    run = make("a", "rtn", "perplexity", "size").do()
    for stage in ("quantize", "evaluate"):
        shares = [e["fraction"] for e in run.of("progress") if e["stage"] == stage]
        assert shares == sorted(shares)
        assert 0 <= shares[0] < 1
        assert shares[-1] == 1


def test_the_same_spec_gives_the_same_numbers(make):
    one, two = (make(name, "rtn(bits=3)", "perplexity", "divergence") for name in "ab")
    assert one.do("quantize", "evaluate").values() == two.do().values()
    assert one.blocks() == two.blocks()


def test_the_16_bit_run_has_no_blocks_and_no_divergence(make):
    run = make("base", "", "perplexity", "divergence", "size").do()
    values = run.values()
    assert not (run.path / "blocks").exists()
    assert values["mean_kld"] == 0
    assert values["ppl_ratio"] == 1
    assert values["bits_per_weight"] == 16
    # quality of the 16-bit model is compared with simulated runs, so it computes like them
    assert {e["dtype"] for e in run.of("measurement")} == {"float32"}


def test_fewer_bits_do_more_damage(make):
    damage = []
    for bits in (8, 4, 3, 2):
        run = make(f"b{bits}", f"rtn(bits={bits})", "divergence").do()
        damage.append(run.values()["mean_kld"])
    assert damage == sorted(damage)
    assert damage[0] > 0


def test_steps_without_calibration_measure_layers_within_the_context(make_folder, home):
    folder = make_folder("opt", dtype="bfloat16")
    spec = RunSpec(model={"id": str(folder)}, steps=parse("rtn"))
    run = Folder(home, "opt", resolve(spec)).do()
    names = {e["name"] for e in run.of("measurement")}
    assert {"weight_sqnr", "output_sqnr"} <= names
    assert run.of("note") == []


# -- taking over and going on --------------------------------------------------------------------


def test_one_more_metric_does_not_quantize_again(make, monkeypatch):
    first = make("a", "gptq(bits=4,group=32)", "perplexity").do()
    monkeypatch.setattr(module, "quantize", lambda *args, **kw: pytest.fail("quantized again"))
    second = make("b", "gptq(bits=4,group=32)", "perplexity", "size").do()
    assert second.blocks() == first.blocks()
    assert second.values()["perplexity"] == first.values()["perplexity"]

    def told(run: Folder) -> list[dict[str, Any]]:
        layers = [e for e in run.of("measurement") if e["layer"]]
        return layers + run.of("note")

    assert told(second) == told(first)  # errors of layers and fallbacks go with the blocks
    assert [e["block"] for e in second.of("progress") if e["stage"] == "quantize"] == [3]
    third = make("c", "gptq(bits=4,group=32)", "size").do("quantize")
    assert told(third) == told(first)


def test_unfinished_and_other_runs_are_not_taken_over(make):
    cut = make("a", "rtn(bits=4)", "size").do("quantize")
    (cut.path / "blocks" / "002.safetensors").unlink()
    broken = make("b", "rtn(bits=4)", "size").do("quantize")
    (broken.path / "blocks" / "001.safetensors").write_bytes(b"torn")
    make("c", "rtn(bits=3)", "size").do("quantize")
    (cut.home / "runs" / "d").mkdir()
    (cut.home / "runs" / "d" / "spec.json").write_text("{")
    run = make("e", "rtn(bits=4)", "size").do("quantize")
    assert len([e for e in run.of("progress") if e["stage"] == "quantize"]) > 1
    assert len(run.blocks()) == 3


def test_a_killed_walk_continues_to_the_same_bytes(make):
    whole = make("a", "gptq(bits=3)", "size").do("quantize")
    (whole.path / "spec.json").unlink()  # so that nothing is taken over
    run = make("b", "gptq(bits=3)", "size")
    with pytest.raises(Cancelled):
        run.do("quantize", stop=(run.path / "blocks" / "000.safetensors").exists)
    assert 0 < len(run.blocks()) < 3
    assert run.do("quantize").blocks() == whole.blocks()


# -- stopping and failing ------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["quantize", "evaluate"])
def test_a_cancelled_run_stops_in_every_stage(make, stage):
    run = make("a", "rtn", "perplexity")
    if stage == "evaluate":
        run.do("quantize")
    with pytest.raises(Cancelled):
        run.do(stage, stop=lambda: True)


def test_a_failing_metric_fails_the_run(make, monkeypatch):
    def measure(self, run):
        raise RuntimeError("out of ideas")
        yield

    monkeypatch.setattr(METRICS.find("size"), "measure", measure)
    run = make("a", "", "perplexity", "size")
    with pytest.raises(RuntimeError, match="out of ideas"):
        run.do()
    assert "perplexity" in run.values()  # what was measured before stays


def test_broken_logits_are_flagged_not_hidden(make, monkeypatch):
    logits = Run.logits
    monkeypatch.setattr(Run, "logits", lambda self, ids: logits(self, ids) * torch.nan)
    run = make("a", "", "perplexity", "divergence").do()
    values = run.values()
    assert values["perplexity"] == values["mean_kld"] == values["same_top"] == "nan"
    flagged = [e["detail"]["nonfinite"] for e in run.of("measurement")]
    assert set(flagged) == {4 * 63}


def test_unknown_stages_and_missing_blocks_are_refused(make):
    run = make("a", "rtn", "size")
    with pytest.raises(ValueError, match=r"no stage 'speed'; it has quantize, evaluate"):
        run.do("speed")
    with pytest.raises(ValueError, match="block 0 is missing"):
        run.do("evaluate")


def test_calibrating_on_the_text_measured_on_is_noted(make, llama_folder, text_file, home):
    knobs = {"dataset": f"file:{text_file}", "window": 64, "limit": 2}
    spec = RunSpec(
        model={"id": str(llama_folder)},
        steps=parse("gptq(bits=4)"),
        metrics=[{"kind": "perplexity", **knobs}],
        calibration={"dataset": f"file:{text_file}", "samples": 2, "length": 64},
    )
    run = Folder(home, "same", resolve(spec)).do()
    notes = [e["text"] for e in run.of("note")]
    assert "perplexity: calibrated on the text that it is measured on" in notes
    other = make("other", "gptq(bits=4)", "perplexity").do()
    assert not [e for e in other.of("note") if "measured on" in e["text"]]


# -- models that do not fit side by side ---------------------------------------------------------


def test_without_room_the_baseline_is_read_from_disk(make, monkeypatch):
    beside = make("a", "rtn(bits=3)", "divergence").do()
    monkeypatch.setattr(module, "fits", lambda *given: False)
    stored = make("b", "rtn(bits=3)", "divergence").do()
    assert len(list((stored.home / "baselines").glob("*/*.npy"))) == 4
    assert any("stored in fp16" in e["text"] for e in stored.of("note"))
    (mean,) = [e for e in stored.of("measurement") if e["name"] == "mean_kld"]
    assert mean["detail"]["baseline"] == "stored in fp16"
    assert mean["value"] == pytest.approx(beside.values()["mean_kld"], rel=1e-3)
    monkeypatch.setattr(module, "write_missing", lambda plain, metric, stored: None)
    again = make("c", "rtn(bits=2)", "divergence").do()
    assert again.values()["mean_kld"] > mean["value"]
    monkeypatch.setattr(module, "fits", lambda *given: True)
    exact = make("d", "rtn(bits=3)", {"kind": "divergence", "limit": 6}).do()  # others stored
    assert not exact.of("note")


# -- sizes, packing, speed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        "rtn(bits=4,group=32)",
        "rtn(bits=3,group=0)",
        "rtn(bits=8,group=0,symmetric=true)",
        "gptq(bits=4,group=32,act_order=true)",
        "gptq(bits=4,group=32,act_order=true,static_groups=true)",
    ],
)
def test_sizes_equal_the_bytes_on_disk(make, recipe):
    run = make("a", recipe, "size").do()
    parts = next(e for e in run.of("measurement") if e["name"] == "weight_bytes")["detail"]["parts"]
    from safetensors import safe_open

    held = {"linears": 0, "rest": 0}
    for file in (run.path / "blocks").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                kind = "linears" if name.startswith("linear/") else "rest"
                held[kind] += tensor.numel() * tensor.element_size()
    counted = sum(parts.get(n, 0) for n in ("codes", "scales", "zeros", "outliers", "index"))
    assert counted == pytest.approx(held["linears"], rel=0.01)


def test_packed_runs_are_timed_and_simulated_ones_are_not(make):
    speed = {"kind": "speed", "prompt": 8, "output": 4, "repeats": 3}
    run = make("a", "rtn(bits=4,group=32)", "size", speed, storage="packed").do()
    assert run.spec.stages() == ["quantize", "evaluate", "speed"]
    values = run.values()
    assert {"ttft_ms", "tpot_ms", "decode_tps", "peak_memory_bytes"} <= set(values)
    assert {e["dtype"] for e in run.of("measurement") if e["metric"] == "speed"} == {"bfloat16"}
    (size,) = [e for e in run.of("measurement") if e["name"] == "weight_bytes"]
    assert size["detail"]["basis"].startswith("resident")
    assert size["value"] == size["detail"]["resident_bytes"]
    with pytest.raises(ValueError, match="speed needs packed weights"):
        make("b", "rtn", speed)


def test_a_packed_run_is_held_against_its_simulated_twin_once(make):
    speed = {"kind": "speed", "prompt": 8, "output": 4, "repeats": 3}
    run = make("a", "rtn(bits=4,group=32)", "size", speed, storage="packed").do()
    (told,) = [e for e in run.of("measurement") if e["name"] == "kernel_kld"]
    assert 0 < told["value"] <= told["detail"]["limit"]
    assert not told["detail"]["faulty"]
    assert not [e for e in run.of("note") if "kernel fault" in e["text"]]
    simulated = make("b", "rtn(bits=4,group=32)", "size").do()
    assert "kernel_kld" not in simulated.values()


def test_a_wrong_kernel_is_a_fault_on_the_result(make, monkeypatch):
    kernel = kernels()["int_cpu"]
    right = kernel.matmul

    def wrong(x, packed):
        y = right(x, packed)
        y[:, ::16] *= 2  # as if a tile read another tile's scales
        return y

    monkeypatch.setattr(kernel, "matmul", wrong, raising=False)
    run = make("a", "rtn(bits=4,group=32)", "size", storage="packed").do()
    (told,) = [e for e in run.of("measurement") if e["name"] == "kernel_kld"]
    assert told["detail"]["faulty"]
    assert [e for e in run.of("note") if e["text"].startswith("kernel fault: the packed model is")]


def test_what_no_kernel_takes_is_refused_by_name(make):
    run = make("a", "rtn(bits=4,group=24)", "size", storage="packed")
    run.do("quantize")
    with pytest.raises(ValueError, match=r"self_attn\.q_proj of block 0, 64 input channels: .*24"):
        run.do("evaluate")


# -- plain data ----------------------------------------------------------------------------------


def test_plain_data_is_strict_json():
    import numpy as np

    given = {"a": float("nan"), "b": [np.float64(1.5), np.int64(3), -math.inf], "c": (True, None)}
    assert plain(given) == {"a": "nan", "b": [1.5, 3, "-inf"], "c": [True, None]}
    assert json.dumps(plain(given), allow_nan=False)
