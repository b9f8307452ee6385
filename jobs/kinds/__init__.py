"""Kinds of jobs: one file each in this folder, found by themselves.

A kind says what its spec is, what has to be there before it starts, and who does its stages.
Queue, events, progress, cancel, retry and the database are the same for all of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from backend.spec import JobSpec
    from jobs.queue import Queue
    from jobs.view import RunView

RUN = "run"  # the kind of a spec that names none

S = TypeVar("S", bound="JobSpec")


@dataclass(frozen=True)
class Before:
    """What a job needs of others."""

    waits: frozenset[str] = frozenset()  # jobs that must be done before it starts
    bring: JobSpec | None = None  # a job to submit with it, unless there is one like that
    wait_for_brought: bool = False


class Kind(Generic[S]):
    """One kind of job. Each file of this folder makes one and calls it KIND."""

    name: ClassVar[str]  # `kind` in spec.json

    def validate(self, data: Mapping[str, Any]) -> S:
        """JSON data of spec.json -> the spec. ValueError if it is none."""
        raise NotImplementedError

    def title(self, spec: S) -> str:
        """One short line for lists of jobs."""
        raise NotImplementedError

    def resolve(self, spec: S, queue: Queue) -> S:
        """Fill in what the home, the model's files and the data decide."""
        return spec

    def check(self, spec: S, device: str, home: Path) -> None:
        """ValueError with the numbers if the job cannot fit into memory or onto the disk."""

    def before(self, spec: S, views: Sequence[RunView], device: str) -> Before:
        """What it needs of the other jobs of the home."""
        return Before()

    def kin(self, spec: S, device: str) -> dict[str, str]:
        """{stage: key} for all stages in order; stages with one key take about the same time."""
        raise NotImplementedError

    def alone(self, spec: S) -> tuple[str, ...]:
        """Stages that measure time, so that nothing else may run on the CPU."""
        return ()

    def work(
        self,
        spec: S,
        stage: str,
        folder: Path,
        *,
        device: str,
        home: Path,
        emit: Callable[..., None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Do one stage, in a worker. Raises backend's Cancelled; other exceptions are failures."""
        raise NotImplementedError


@lru_cache(maxsize=1)
def load() -> Mapping[str, Kind[Any]]:
    """{name: kind} of every file in this folder."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    kinds = [importlib.import_module(f"{__name__}.{name}").KIND for name in names]
    return {kind.name: kind for kind in kinds}


def find(name: str) -> Kind[Any]:
    """The kind called `name`. ValueError if this program knows none."""
    kinds = load()
    if name not in kinds:
        raise ValueError(f"unknown kind of job {name!r}; there are: {', '.join(kinds)}")
    return kinds[name]


def name_in(data: Mapping[str, Any]) -> str:
    """The kind that a spec's JSON names; the first specs named none and were runs."""
    return str(data.get("kind", RUN))


def validate(data: Mapping[str, Any]) -> JobSpec:
    """JSON data of any spec -> the spec. ValueError if it is none of a known kind."""
    if not isinstance(data, Mapping):
        raise ValueError(f"a spec is a JSON object, and this is a {type(data).__name__}")
    return find(name_in(data)).validate(data)
