"""Fair timing of small functions: interleaved rounds, medians and spread, unsteady flagged."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    runs: int

    @property
    def steady(self) -> bool:
        """False where the middle runs differ by more than a tenth: not a result."""
        return self.p80_ms - self.p20_ms <= 0.1 * self.median_ms


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int = 30, device: str = "cpu"
) -> dict[str, Timing]:
    """Every function once a round, in turn, so that a machine that slows down slows all alike."""
    for call in functions.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, call in functions.items():
            samples[name].append(once(call, device))
    return {name: summary(values) for name, values in samples.items()}


def once(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, the device's queue drained before and after."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def summary(values: list[float]) -> Timing:
    """Median and the 20th and 80th percentile."""
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], len(values))
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[-1], len(values))
