"""Time to first token, time per token and peak memory, alone in a process."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import psutil
import torch
from pydantic import Field
from torch import Tensor

from backend.bandwidth import peak_of, token_traffic
from backend.energy import Energy
from backend.metrics import METRICS
from backend.metrics.base import Better, Measurement, Metric

if TYPE_CHECKING:
    from backend.run import Run

SHORT_WARMUPS = 3
STEADY_SPREAD = 0.1  # (p80 - p20) / median up to which a timing counts as steady


@dataclass(frozen=True)
class Generation:
    """Times of one generation in seconds: to the first token, and between later ones."""

    first_s: float
    steps_s: tuple[float, ...]


@METRICS.register
class Speed(Metric):
    """Latency and memory of greedy generation, one sequence, end token ignored.

    Time to first token (prefill and first choice), time per later token, tokens per second, peak
    memory, the share of the memory's bandwidth that the bytes a token must move make use of (MBU),
    and energy per token where the device reports it. After a warm-up; the median of the repeats
    counts and their 20th and 80th percentiles are kept. Only for packed weights and the 16-bit
    model: rounding a dense copy on the fly is slower than the real thing by construction.
    """

    kind: ClassVar[str] = "speed"
    alone: ClassVar[bool] = True
    storage: ClassVar[Literal["any", "packed"]] = "packed"
    yields: ClassVar[tuple[str, ...]] = (
        "ttft_ms",
        "tpot_ms",
        "decode_tps",
        "peak_memory_bytes",
        "mbu",
        "energy_per_token",
    )
    prompt: int = Field(128, ge=1, le=131072, description="Tokens in the prompt.")
    output: int = Field(64, ge=2, le=8192, description="Tokens generated.")
    repeats: int = Field(10, ge=3, le=1000, description="Generations timed.")

    def measure(self, run: Run) -> Iterator[Measurement]:
        check(run, self.prompt + self.output)
        source = torch.Generator().manual_seed(0)  # random tokens: dense models do not mind which
        ids = torch.randint(run.vocabulary, (1, self.prompt), generator=source).to(run.device)
        for output in (self.output, *[2] * SHORT_WARMUPS):
            generation(run, ids, output)
        gc.collect()
        peak, energy = PeakMemory(run.device), Energy(run.device)
        timed = []
        for done in range(self.repeats):
            run.progress(done, self.repeats, f"generation {done + 1} of {self.repeats}")
            timed.append(generation(run, ids, self.output))
        joules, memory = energy.used(), peak.measurement()
        how = {"prompt": self.prompt, "output": self.output, "batch": 1}
        yield from self.timings(timed, how)
        yield memory
        yield self.bandwidth_use(run, timed, how)
        yield self.energy(joules, energy, how)

    def energy(self, joules: float | None, energy: Energy, how: Mapping[str, Any]) -> Measurement:
        """Joules of all generations, prefill included, per token; None where none are counted."""
        if joules is None:
            told: dict[str, Any] = {**how, "reason": energy.why_not}
            return Measurement("energy_per_token", None, "J", "lower", detail=told)
        told = {**how, "source": energy.source, "joules": joules}
        per_token = joules / (self.repeats * self.output)
        return Measurement("energy_per_token", per_token, "J", "lower", detail=told)

    def timings(self, timed: Sequence[Generation], detail: dict[str, Any]) -> Iterator[Measurement]:
        """The three times, each the median over the repeats."""
        steps = [sum(g.steps_s) / len(g.steps_s) for g in timed]
        every = np.percentile([s * 1e3 for g in timed for s in g.steps_s], [50, 90, 99])
        tokens = dict(zip(("p50_ms", "p90_ms", "p99_ms"), every.tolist(), strict=True))
        yield spread("ttft_ms", [g.first_s * 1e3 for g in timed], "ms", "lower", detail)
        yield spread(
            "tpot_ms", [s * 1e3 for s in steps], "ms", "lower", {**detail, "tokens": tokens}
        )
        yield spread("decode_tps", [1 / s for s in steps], "tokens/s", "higher", detail)

    def bandwidth_use(
        self, run: Run, timed: Sequence[Generation], how: Mapping[str, Any]
    ) -> Measurement:
        """MBU: (weights and cache to read per token) / TPOT / the memory's bandwidth."""
        moved = token_traffic(run, self.prompt + self.output / 2)
        peak = peak_of(run.device)
        times = [sum(g.steps_s) / len(g.steps_s) for g in timed]
        shares = [sum(moved.values()) / t / peak.value for t in times]
        detail = {
            **how,
            "weight_bytes": moved["weights"],
            "cache_bytes": moved["cache"],
            "peak_bytes_per_s": peak.value,
            "peak_basis": peak.basis,
        }
        return spread("mbu", shares, "fraction", "higher", detail)


def check(run: Run, length: int) -> None:
    """ValueError unless this run may be timed at this length."""
    if run.spec.storage != "packed" and not run.spec.is_baseline:
        raise ValueError(
            "speed needs packed weights: a simulated model is slower and larger than the real one "
            "by construction; use storage='packed' or leave this metric out"
        )
    if length > run.context:
        raise ValueError(
            f"speed: prompt and output take {length} tokens, the model's context is {run.context}"
        )


def generation(run: Run, ids: Tensor, output: int) -> Generation:
    """Generate `output` tokens after ids [1, T] and note when each was there."""
    synchronize(run.device)
    times = [perf_counter()]
    for _ in run.generate(ids, max_new=output, ignore_end=True):
        times.append(perf_counter())  # a token's id was read back, so the device is done with it
    steps = np.diff(times[1:]).tolist()
    return Generation(times[1] - times[0], tuple(steps))


def synchronize(device: str) -> None:
    """Wait for what the device still has to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(torch.device(device))


def spread(
    name: str, values: Sequence[float], unit: str, better: Better, detail: dict[str, Any]
) -> Measurement:
    """The median of repeated values with their spread; an unsteady one says so."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    steady = p80 - p20 <= STEADY_SPREAD * median
    extra = {"p20": p20, "p80": p80, "steady": steady, "values": list(values)}
    # 1.253 = sqrt(pi / 2): standard error of a median against that of a mean
    stderr = 1.253 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Measurement(
        name, median, unit, better, n=len(values), stderr=stderr, detail={**detail, **extra}
    )


class PeakMemory:
    """Highest memory since it was made: the allocator's on a GPU, the process's on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.how = "highest resident size of the process while generating"
        if device.startswith("cuda"):
            self.how = "torch.cuda.max_memory_allocated while generating"
            torch.cuda.reset_peak_memory_stats(torch.device(device))
        elif not reset_peak_resident():
            self.how = "highest resident size since the process began, loading included"

    def measurement(self) -> Measurement:
        """peak_memory_bytes."""
        detail: dict[str, Any] = {"how": self.how}
        if self.device.startswith("cuda"):
            device = torch.device(self.device)
            value = torch.cuda.max_memory_allocated(device)
            detail["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        else:
            value = peak_resident()
        return Measurement("peak_memory_bytes", value, "bytes", "lower", detail=detail)


def reset_peak_resident() -> bool:
    """Make Linux count VmHWM from now on; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident() -> int:
    """Highest resident bytes of this process."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return kib[0] * 1024 if kib else int(psutil.Process().memory_info().rss)
