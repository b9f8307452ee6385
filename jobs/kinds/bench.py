"""Bench: times of kernels on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jobs.kinds import Kind

if TYPE_CHECKING:
    from backend.spec import BenchSpec
    from jobs.queue import Queue


class Bench(Kind["BenchSpec"]):
    """A BenchSpec; its times want the processor for themselves."""

    name: ClassVar[str] = "bench"

    def validate(self, data: Mapping[str, Any]) -> BenchSpec:
        from backend.spec import BenchSpec

        return BenchSpec.model_validate(data)

    def title(self, spec: BenchSpec) -> str:
        return f"Time {', '.join(spec.kernels) or 'all kernels'}"

    def resolve(self, spec: BenchSpec, queue: Queue) -> BenchSpec:
        """Known kernels, and the moment: the same question later is another job."""
        from backend.kernel_times import check_names

        check_names(spec.kernels)
        return spec.model_copy(update={"asked": time.time()})

    def kin(self, spec: BenchSpec, device: str) -> dict[str, str]:
        return {"time": json.dumps([device, "time", spec.kernels, spec.shapes, spec.rows])}

    def alone(self, spec: BenchSpec) -> tuple[str, ...]:
        return ("time",)

    def work(
        self,
        spec: BenchSpec,
        stage: str,
        folder: Path,
        *,
        device: str,
        home: Path,
        emit: Callable[..., None],
        should_stop: Callable[[], bool],
    ) -> None:
        from backend.kernel_times import measure

        measure(spec, device=device, emit=emit, should_stop=should_stop)


KIND = Bench()
