"""Seconds a layer of methods that solve or search one, for `quantarena bench`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backend.layer import linear_of
from backend.methods import METHODS, Method, Seen
from backend.model.families import Block, Family, NormFeed
from backend.model.stats import LayerStats, gather_layer
from kernels.timing import Timing, interleaved

SIDE, TOKENS, ROUNDS = 2048, 2048, 5  # one square layer of a model of about 1.5 billion parameters
SOLVERS: Mapping[str, dict[str, Any]] = {
    "gptq": {"kind": "gptq", "format": {"kind": "int", "bits": 4, "group": 128}},
    "awq": {"kind": "awq", "format": {"kind": "int", "bits": 4, "group": 128}},
    "spqr": {"kind": "spqr"},
    "bcq": {
        "kind": "rtn",
        "format": {"kind": "bcq", "bits": 4, "group": 128, "rounds": 15},
    },
}
NORM, LINEAR = "norm", "linear"
NORMED = Family(
    layers="", embed=(), head="", norm_feeds=(NormFeed(NORM, (LINEAR,)),), waves=((LINEAR,),)
)


def time_methods(names: Sequence[str]) -> list[dict[str, Any]]:
    """Seconds for one SIDE x SIDE layer with TOKENS calibration tokens, statistics included.

    In turn, so that ratios hold on a machine that slows down.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=generator)
    inputs = torch.randn(TOKENS, SIDE, generator=generator)
    steps = {name: METHODS.build(SOLVERS[name]) for name in names}
    calls = {
        name: lambda number, step=step: solve(step, weight, inputs) for name, step in steps.items()
    }
    timings = interleaved(calls, rounds=ROUNDS)
    rows = [row_of(name, steps[name], timings) for name in names]
    for row in rows:
        print(line(row))
    return rows


@torch.no_grad()
def solve(method: Method, weight: Tensor, inputs: Tensor) -> nn.Module:
    """One method on weight [N, K] behind a norm, which can carry a scale -> what replaced it.

    inputs [T, K]: of the norm.
    """
    norm = nn.RMSNorm(weight.shape[1])
    module = nn.Sequential(OrderedDict({NORM: norm, LINEAR: linear_of(weight)}))
    block = Block(0, module, NORMED)
    for wave in method.waves(block):
        stats = LayerStats()
        if wave:
            stats = gather_layer(method.wanted(), [norm(inputs)], weight.shape[1], stats.note)
        method.apply(block, Seen(dict.fromkeys(wave, stats), lambda: iter([(inputs[None], {})])))
    return block.get(LINEAR)


def row_of(name: str, step: Method, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """One method's times and how they compare with GPTQ's of the same run."""
    timing, gptq = timings[name], timings.get("gptq")
    return {
        "method": name,
        "step": step.data(),
        "n": SIDE,
        "k": SIDE,
        "tokens": TOKENS,
        "median_s": timing.median_ms / 1e3,
        "p20_s": timing.p20_ms / 1e3,
        "p80_s": timing.p80_ms / 1e3,
        "steady": timing.steady,
        "ratio_to_gptq": timing.median_ms / gptq.median_ms if gptq else None,
    }


def line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    spread = f"{row['median_s']:.2f} s ({row['p20_s']:.2f}-{row['p80_s']:.2f})"
    ratio = row["ratio_to_gptq"]
    compared = "" if ratio is None else f"  {ratio:.2f}x gptq"
    unsteady = "" if row["steady"] else "  unsteady"
    return f"{row['method']} {SIDE}x{SIDE}, {TOKENS} tokens: {spread}{compared}{unsteady}"
