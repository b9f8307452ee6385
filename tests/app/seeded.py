"""A home with plausible results: events of runs that never ran, for pages and pictures."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app import first_tour
from app.recipe_words import recipe_of
from backend.cache.growth import Part
from backend.metrics import METRICS
from backend.spec import BenchSpec, ModelRef, RunSpec
from jobs import folders
from jobs.events import append
from jobs.queue import Queue
from results_db.store import Store

LOSS = {"8": 0.0005, "6": 0.004, "4": 0.02, "3": 0.14, "2": 1.6, "16": 0.0}
WORTH = {"gptq": 0.45, "rtn": 1.0, "smoothquant": 0.8}


def fill(home: Path, *, states: Sequence[str] = ()) -> list[str]:
    """Write the tour's run folders with made-up numbers -> run ids. `states` of the last ones."""
    specs = first_tour.specs()
    ended = ["done"] * (len(specs) - len(states)) + list(states)
    return [
        _one(home, spec, state, at)
        for at, (spec, state) in enumerate(zip(specs, ended, strict=True))
    ]


def bench(home: Path, asked: float = 0.0, *, only_caches: bool = False) -> str:
    """A finished bench job with made-up times: steady, unsteady and wrong ones -> its id."""
    job = queue_of(home).submit(BenchSpec(asked=asked), recipe="Time all kernels", device="cpu")
    folder = home / "runs" / job
    append(folder, "state", state="running")
    append(folder, "env", env={"torch": "2.13.0", "triton": "3.7.1", "driver": None})
    for name, value, unit in (("read", 20.0, "GB/s"), ("bf16 product", 0.4, "TFLOP/s")):
        append(folder, "ceiling", name=name, value=value, unit=unit, device="EPYC")
    shapes = ((4096, 4096, 1), (4096, 4096, 64), (14336, 4096, 1), (14336, 4096, 64))
    for n, k, m in () if only_caches else shapes:
        dense = n * k / 1.6e7 * (1 + m / 30)
        for row in _times(n, k, m, dense):
            append(folder, "kernel_time", **row)
    for row in caches():
        append(folder, "kernel_time", **row)
    append(folder, "state", state="done")
    return job


def caches() -> Iterator[dict[str, Any]]:
    """Decode attention of one sequence of 4096 tokens: steady, and wrong."""
    kivi = {"kind": "kivi", "bits": 2, "group": 32, "keys": "channel", "newest": 128}
    int8 = {"kind": "int", "bits": 8, "group": 0, "symmetric": True, "keys": "token"}
    for kernel, weight, bits, gain, correct in (
        ("sdpa", {"kind": "bf16"}, 16, 1.0, True),
        ("kv_decode", kivi, 3.4, 0.25, True),
        ("kv_decode", int8, 8.1, 0.5, False),
    ):
        yield _time(kernel, weight, None, (1, 4096, 2048), bits, 3.0, gain, True, correct)


def _times(n: int, k: int, m: int, dense: float) -> Iterator[dict[str, Any]]:
    int4 = {"kind": "int", "bits": 4, "group": 128, "symmetric": False}
    int8 = {"kind": "int", "bits": 8, "group": 0, "symmetric": True}
    for kernel, weight, act, bits, gain, steady, correct in (
        ("bf16", {"kind": "bf16"}, None, 16, 1.0, True, True),
        ("int_cpu", int4, None, 4.25, 4.0 if m == 1 else 1.1, True, True),
        ("int_act_cpu", int8, int8, 8, 2.5, m == 1, True),
        ("codebook", {"kind": "nf4", "group": 64}, None, 4.5, 0.5, True, n == 4096),
    ):
        yield _time(kernel, weight, act, (m, n, k), bits, dense, gain, steady, correct)


def _time(
    kernel: str,
    weight: dict[str, Any],
    act: dict[str, Any] | None,
    shape: tuple[int, int, int],
    bits: float,
    dense: float,
    gain: float,
    steady: bool,
    correct: bool,
) -> dict[str, Any]:
    """One row: `dense` ms of bf16 over `gain`, of weights [n, k] that take so many bits."""
    m, n, k = shape
    time = dense / gain if correct else None
    return {
        "kernel": kernel,
        "weight": json.dumps(weight, sort_keys=True),
        "act": json.dumps(act, sort_keys=True),
        **{"m": m, "n": n, "k": k, "weight_bytes": round(n * k * bits / 8)},
        **{"median_ms": time, "p20_ms": time and 0.97 * time, "p80_ms": time and 1.02 * time},
        "eager_ms": None,
        "ratio_to_bf16": gain if steady and correct else None,
        "steady": steady if correct else None,
        "max_rel_err": 0.003 if correct else 0.4,
        "correct": correct,
        **{"device": "EPYC", "threads": 2},
    }


def known(spec: Any) -> Any:
    """The spec as if its model had been found."""
    if not hasattr(spec, "model"):
        return spec
    model = ModelRef(id=spec.model.id, content="c0ffee123456")
    return spec.model_copy(update={"model": model})


def queue_of(home: Path) -> Queue:
    """A queue that looks at no model and refuses nothing."""
    return Queue(home, resolve=known, preflight=lambda spec, device, home: None)


def store_of(home: Path) -> Store:
    """The store over all run folders of a home."""
    from jobs.events import read

    store = Store(home / "results.duckdb")
    for run_id in folders.run_ids(home):
        folder = home / "runs" / run_id
        events, offset = read(folder, 0)
        store.ingest(run_id, (folder / folders.SPEC).read_text(), events, offset)
    return store


def _one(home: Path, spec: RunSpec, state: str, at: int) -> str:
    text = json.dumps(spec.model_dump(mode="json"))
    run_id = queue_of(home).submit(
        spec, label=first_tour.LABEL, recipe=recipe_of(text).text, device="cpu"
    )
    folder = home / "runs" / run_id
    if state != "queued":
        append(
            folder, "env", env={"python": "3.11.7", "torch": "2.13.0", "cpu": "EPYC", "cores": 2}
        )
        append(folder, "state", state="running")
        for stage in spec.stages():
            append(folder, "stage", stage=stage, status="started")
            if state == "running" and stage == "evaluate":
                append(
                    folder,
                    "progress",
                    stage=stage,
                    block=None,
                    blocks=None,
                    item="window 9 of 24",
                    fraction=0.37,
                )
                break
            append(folder, "stage", stage=stage, status="done")
        for event in _events(spec, text, at) if state == "done" else ():
            append(folder, event.pop("type"), **event)
        if state not in ("running",):
            error = {
                "type": "OutOfMemoryError",
                "message": "block 2 needs 3.1 GiB and 2.0 are free",
                "todo": "choose fewer calibration samples or a smaller model",
                "traceback": "Traceback (most recent call last):\n  File ...",
            }
            append(folder, "state", state=state, **({"error": error} if state == "failed" else {}))
        (folder / "log.txt").write_text("loading demo\nblock 1 of 4\n<b>not bold</b>\n")
    return run_id


def _events(spec: RunSpec, text: str, at: int) -> Iterator[dict[str, Any]]:
    recipe, rng = recipe_of(text), random.Random(at)
    group = next((s.format.group for s in spec.steps if hasattr(s, "format")), 0)
    loss = LOSS[recipe.bits] * WORTH.get(recipe.family, 1.0) * (0.6 if group else 1.0)
    loss += 0.05 if "per_tensor" in recipe.text else 0.0
    bits = float(recipe.bits) + ((32 / group if group else 0.12) if spec.steps else 0.0)
    numbers = [
        ("perplexity", "perplexity", 7.03 * (1 + loss), "", "lower", 24552, 0.05 * (1 + loss)),
        ("divergence", "mean_kld", loss * 0.35, "nats", "lower", 16368, 0.02 * loss),
        ("divergence", "same_top", math.exp(-loss * 1.5), "fraction", "higher", 16368, 0.003),
        ("size", "bits_per_weight", bits, "bits", "lower", 1, None),
        ("size", "weight_bytes", 2_400_000 + 860_000 * bits, "bytes", "lower", 1, None),
        ("tasks", "demo_capitals/acc,none", 0.97 * math.exp(-loss), "fraction", "higher", 40, 0.02),
        ("tasks", "demo_sums/acc,none", 0.95 * math.exp(-2 * loss), "fraction", "higher", 40, 0.03),
    ]
    for kind, name, value, unit, better, n, stderr in numbers:
        yield _measurement(kind, name, value, unit, better, n, stderr, spec.storage)
    yield _needle(loss, spec.storage)
    yield cache_event(Part(512.0, 512.0, layers=2), 1024)
    if spec.steps:
        modules = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ]
        for block in range(4):
            for module in modules:
                db = 6.02 * float(recipe.act_bits if recipe.bits == "16" else recipe.bits)
                db += rng.gauss(0, 1.5) - (4 if "down" in module else 0)
                yield _measurement(
                    "size", "output_sqnr", db, "dB", "higher", 1, None, "", layer=[block, module]
                )
        for block in range(4):
            for at in range(0, 30, 5):
                loss = 0.02 * (block + 1) * (0.6 + 0.4 / (1 + at)) + 1e-4 * max(0, at - 15)
                yield _measurement(
                    "quantize", "lkd_loss", loss, "x", "lower", 1, None, "",
                    layer=[block, f"step {at:04d}"],
                )  # fmt: skip
    if recipe.family == "gptq" and recipe.bits == "2":
        yield {
            "type": "note",
            "block": 1,
            "module": "mlp.down_proj",
            "text": "Hessian singular at damping 0.01; rounded to nearest instead",
        }


def cache_event(part: Part, context: int) -> dict[str, Any]:
    """What `size` says of a cache whose keys and values are all kept as `part` is."""
    plain, grows = (part.layers * each for each in (part.plain_bytes, part.rounded_bytes))
    found = _measurement(
        "size", "kv_bytes_per_token", grows, "bytes", "lower", 1, None, "simulated"
    )
    parts = [asdict(part)]
    return found | {"detail": {"plain_bytes": plain, "context": context, "cache_parts": parts}}


def _needle(loss: float, storage: str) -> dict[str, Any]:
    """Keys found in 2 lengths at 2 depths, 2 asked in each; the more is lost, the fewer."""
    lengths, depths, per_cell = [128, 1024], [0.0, 100.0], 2
    scores = [
        float(0.9 * (at + 1) / len(lengths) * loss < (repeat + 1) / 4)
        for at in range(len(lengths))
        for _ in depths
        for repeat in range(per_cell)
    ]
    shares = [sum(scores[i : i + per_cell]) / per_cell for i in range(0, len(scores), per_cell)]
    detail = {
        "lengths": lengths,
        "depths": depths,
        "repeats": per_cell,
        "needles": 1,
        "cells": [shares[i : i + len(depths)] for i in range(0, len(shares), len(depths))],
        "left_out": {"2048": "longer than the context of 1024"},
        "keys": ["4188"] * len(scores),
        "answers": [" 4188." if score else " 4<1>8." for score in scores],
    }
    value, n = sum(scores) / len(scores), len(scores)
    found = _measurement("needle", "needle", value, "share", "higher", n, 0.02, storage)
    return found | {"detail": detail}


def _measurement(
    kind: str,
    name: str,
    value: float,
    unit: str,
    better: str,
    n: int,
    stderr: float | None,
    storage: str,
    layer: list[Any] | None = None,
) -> dict[str, Any]:
    metric_id = hashlib.sha256(kind.encode()).hexdigest()[:12]
    return {
        "type": "measurement",
        "metric_id": metric_id,
        "metric": kind,
        "version": 1,
        "name": name,
        "value": value,
        "unit": unit,
        "better": better,
        "n": n,
        "stderr": stderr,
        "layer": layer,
        "detail": {},
        "device": "cpu",
        "dtype": "float32",
        "storage": storage,
        "data": "d" * 12,
        "items_file": None,
    }


METRICS.load()
