"""Runs: quantize a model, then measure it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jobs.events import State
from jobs.kinds import Before, Kind

if TYPE_CHECKING:
    from backend.spec import RunSpec
    from jobs.queue import Queue
    from jobs.view import RunView

SHARED = ("quantize", "evaluate")  # every other stage is a timing


class Runs(Kind["RunSpec"]):
    """A RunSpec, and beside it the 16-bit baseline where its numbers are missing."""

    name: ClassVar[str] = "run"

    def validate(self, data: Mapping[str, Any]) -> RunSpec:
        from backend.spec import RunSpec

        return RunSpec.model_validate(data)

    def title(self, spec: RunSpec) -> str:
        from backend.recipes import render

        return render(spec.steps)

    def resolve(self, spec: RunSpec, queue: Queue) -> RunSpec:
        from backend.model.identity import resolve

        return resolve(spec)

    def check(self, spec: RunSpec, device: str, home: Path) -> None:
        from backend.estimate import estimate
        from backend.model.identity import find_model

        needed = estimate(spec, find_model(spec.model), device)
        if needed.why_not:
            raise ValueError(needed.why_not)
        free = shutil.disk_usage(home).free
        if needed.disk_bytes > free:
            raise ValueError(
                f"the run would write {needed.disk_bytes / 1e9:.1f} GB and {home} has "
                f"{free / 1e9:.1f} GB left; free some disk space or choose another --home"
            )

    def before(self, spec: RunSpec, views: Sequence[RunView], device: str) -> Before:
        """Baseline runs that have what `spec` compares with, and one of what none has."""
        if spec.is_baseline:
            return Before()
        have = measured_of_baseline(spec, views, device)
        needed = [m.digest() for m in spec.metrics if m.needs_baseline]
        waits = frozenset(have[digest] for digest in needed if digest in have)
        missing = tuple(m for m in spec.metrics if m.digest() not in have)
        if not missing:
            return Before(waits)
        lacking = spec.baseline().model_copy(update={"metrics": missing})
        return Before(waits, lacking, any(m.needs_baseline for m in missing))

    def kin(self, spec: RunSpec, device: str) -> dict[str, str]:
        """Knobs are left out: 3 and 4 bits take the same time."""
        model, steps = [spec.model.id, spec.model.content], [step.kind for step in spec.steps]
        return {
            stage: json.dumps(
                [*model, device, stage, steps, [m.kind for m in spec.metrics_of(stage)]]
            )
            for stage in spec.stages()
        }

    def alone(self, spec: RunSpec) -> tuple[str, ...]:
        return tuple(stage for stage in spec.stages() if stage not in SHARED)

    def work(
        self,
        spec: RunSpec,
        stage: str,
        folder: Path,
        *,
        device: str,
        home: Path,
        emit: Callable[..., None],
        should_stop: Callable[[], bool],
    ) -> None:
        from backend.execute import execute

        execute(spec, stage, folder, device=device, home=home, emit=emit, should_stop=should_stop)


def measured_of_baseline(spec: RunSpec, views: Sequence[RunView], device: str) -> dict[str, str]:
    """{metric digest: first run} over the model's baseline runs that did not go wrong."""
    from backend.spec import RunSpec

    found: dict[str, str] = {}
    for view in views:
        other, wrong = view.spec, view.state in (State.FAILED, State.CANCELLED)
        if not isinstance(other, RunSpec) or wrong or view.device != device:
            continue
        if other.is_baseline and other.model == spec.model:
            found = {metric.digest(): view.run_id for metric in other.metrics} | found
    return found


KIND = Runs()
