"""Fair timing of small functions: in turn, cold weights, medians and spread, unsteady flagged."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CALLS = 20  # of one function in a CUDA graph, at least
ROUNDS = 30
ATTEMPTS = 3  # at steady times
COLD_BYTES = {"cpu": 130_000_000, "cuda": 256_000_000}  # weights rotate through this much
MOST_COPIES = {"cpu": 32, "cuda": 256}  # on the CPU more would not get a turn

Call = Callable[[int], object]  # takes the number of the call: which of the copies to use


@dataclass(frozen=True)
class InTurn:
    """Calls of a product, each by the next copy of its weights."""

    product: Callable[[Any, Any], object]
    x: Any
    held: Sequence[Any]

    def __call__(self, number: int) -> object:
        return self.product(self.x, self.held[number % len(self.held)])


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


def copies(one: Any, clone: Callable[[Any], Any], size: int, device: torch.device) -> list[Any]:
    """So many of `size` bytes that each is cold when its turn comes."""
    count = min(MOST_COPIES[device.type], 1 + COLD_BYTES[device.type] // max(size, 1))
    return [one, *(clone(one) for _ in range(count - 1))]


def timed(
    calls: Mapping[str, Call], device: torch.device
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Times from graphs, and with launches, on a GPU; on the CPU there is one kind, none beside.

    Again where they are unsteady, and after some attempts as they are.
    """
    measure = interleaved if device.type == "cpu" else replayed
    for _ in range(ATTEMPTS):
        times = measure(calls)
        if all(own.steady for own in times.values()):
            break
    return times, {} if device.type == "cpu" else interleaved(calls, device=device.type)


def interleaved(
    functions: Mapping[str, Call], rounds: int | None = None, device: str = "cpu"
) -> dict[str, Timing]:
    """Every function once a round, in turn, so that a machine that slows down slows all alike.

    A call on a GPU counts with its launch: the queue is drained before and after it.
    """
    for call in functions.values():
        call(0)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds or ROUNDS):
        for name, call in functions.items():
            samples[name].append(once(call, number, device))
    return {name: summary(values) for name, values in samples.items()}


def replayed(functions: Mapping[str, Call]) -> dict[str, Timing]:
    """As `interleaved` on a GPU, many calls of a function in one CUDA graph: no launch counts.

    So many that every copy of the weights has its turn: what is left in a cache is never theirs.
    """
    counts = {name: max(CALLS, len(getattr(c, "held", ()))) for name, c in functions.items()}
    graphs = {name: captured(call, counts[name]) for name, call in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            samples[name].append(replay(graph) / counts[name])
    return {name: summary(values) for name, values in samples.items()}


def captured(call: Call, count: int = CALLS) -> torch.cuda.CUDAGraph:
    """So many calls as one graph, warmed up on a stream of its own as capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(3):
            call(number)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            call(number)
    return graph


def replay(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay, by events on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def once(call: Call, number: int, device: str) -> float:
    """Milliseconds of one call, the device's queue drained before and after."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call(number)
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def summary(values: list[float]) -> Timing:
    """Median and the 20th and 80th percentile."""
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], len(values))
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[-1], len(values))
