"""A kind of job for the process tests: counts, and misbehaves as it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import stand_in

from backend.pipeline import Cancelled
from backend.registry import short_hash
from backend.spec import JobSpec, ModelRef
from jobs import kinds
from jobs.events import read
from jobs.kinds import Before, Kind


class CountSpec(JobSpec):
    """Count to `numbers`, with `act` before one of them."""

    kind: Literal["test_count"] = "test_count"
    model: ModelRef
    numbers: int = 4
    at: int = 2
    act: str = ""
    after: tuple[str, ...] = ()
    version: ClassVar[int] = 1

    def artifact_id(self) -> str:
        return short_hash([self.model_dump(mode="json"), self.version])

    def fingerprint(self) -> str:
        return self.artifact_id()

    def stages(self) -> list[str]:
        return ["count", "time"]


class Count(Kind[CountSpec]):
    """Goes on after what it has counted already."""

    name: ClassVar[str] = "test_count"

    def validate(self, data: Mapping[str, Any]) -> CountSpec:
        return CountSpec.model_validate(data)

    def title(self, spec: CountSpec) -> str:
        return f"Count to {spec.numbers}"

    def before(self, spec: CountSpec, views: Sequence[Any], device: str) -> Before:
        return Before(frozenset(spec.after))

    def kin(self, spec: CountSpec, device: str) -> dict[str, str]:
        return {stage: f"{device} {stage}" for stage in spec.stages()}

    def alone(self, spec: CountSpec) -> tuple[str, ...]:
        return ("time",)

    def work(
        self,
        spec: CountSpec,
        stage: str,
        folder: Path,
        *,
        device: str,
        home: Path,
        emit: Callable[..., None],
        should_stop: Callable[[], bool],
    ) -> None:
        if stage == "time":
            return
        counted = {event["text"] for event in read(folder)[0] if event["type"] == "note"}
        for number in range(spec.numbers):
            if should_stop():
                raise Cancelled
            if number == spec.at:
                stand_in.Work(folder, emit, should_stop).act(spec.act)
            if str(number) not in counted:
                emit("note", block=None, module="", text=str(number))
            emit("progress", stage=stage, fraction=(number + 1) / spec.numbers, item=f"{number}")


def install() -> dict[str, Kind[Any]]:
    """The table of kinds, which a test or a warm process adds COUNT to."""
    return kinds.load()  # type: ignore[return-value]


COUNT = Count()
