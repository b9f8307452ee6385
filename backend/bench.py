"""`quantarena bench`: seconds a layer for methods that solve one, times of kernels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from backend.layer import quantize_layer
from backend.methods import METHODS
from backend.registry import nearest
from kernels.base import kernels
from kernels.bench import bench as bench_kernels
from kernels.timing import interleaved

SIDE, TOKENS, ROUNDS = 2048, 2048, 5  # one square layer of a model of about 1.5 billion parameters
SOLVERS: Mapping[str, dict[str, Any]] = {
    "gptq": {"kind": "gptq", "format": {"kind": "int", "bits": 4, "group": 128}},
    "bcq": {
        "kind": "rtn",
        "format": {"kind": "bcq", "bits": 4, "group": 128, "rounds": 15},
    },
}


def bench(names: Sequence[str]) -> list[dict[str, Any]]:
    """Time the named kernels and methods, all if none is named -> rows, printed as they come."""
    known = [*kernels(), *SOLVERS]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown kernel or method {name!r}{nearest(name, known)}")
    chosen = names or known
    rows = [time_method(name) for name in chosen if name in SOLVERS]
    rows += bench_kernels([name for name in chosen if name not in SOLVERS])
    threads = torch.get_num_threads()
    print(json.dumps({"threads": threads, "torch": torch.__version__, "rows": rows}))
    return rows


def time_method(kind: str) -> dict[str, Any]:
    """Seconds for one SIDE x SIDE layer with TOKENS calibration tokens, statistics included."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=generator)
    inputs = torch.randn(TOKENS, SIDE, generator=generator)
    step = METHODS.build(SOLVERS[kind])
    timing = interleaved({kind: lambda: quantize_layer(step, weight, inputs)}, rounds=ROUNDS)[kind]
    row = {
        "method": kind,
        "step": step.data(),
        "n": SIDE,
        "k": SIDE,
        "tokens": TOKENS,
        "median_s": timing.median_ms / 1e3,
        "p20_s": timing.p20_ms / 1e3,
        "p80_s": timing.p80_ms / 1e3,
        "steady": timing.steady,
    }
    spread = f"{row['median_s']:.2f} s ({row['p20_s']:.2f}-{row['p80_s']:.2f})"
    print(f"{kind} {SIDE}x{SIDE}, {TOKENS} tokens: {spread}{'' if timing.steady else '  unsteady'}")
    return row
