"""What a run's events say: a fold, pure, no file and no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jobs.events import Event, State

if TYPE_CHECKING:
    from backend.spec import JobSpec


@dataclass(frozen=True)
class Folded:
    """A run as of its last event. Times are unix seconds."""

    state: State = State.QUEUED
    stage: str | None = None
    open: bool = False  # the stage began and has neither ended, stopped nor died
    done: tuple[str, ...] = ()  # stages that ended well
    deaths: int = 0  # of the current stage, since the run was last queued
    fraction: float = 0.0  # of the current stage, 0 to 1
    begun_at: float | None = 0.0  # where the stage resumed; None until it says so
    block: int | None = None
    blocks: int | None = None
    item: str = ""
    stage_started: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)  # worked, by stage
    submitted: float | None = None
    started: float | None = None
    finished: float | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class RunView:
    """One job of any kind, as pages and command line show it."""

    run_id: str
    label: str
    recipe: str  # of a run; of another kind one line that says what is done
    spec: JobSpec | dict[str, Any]  # plain data if this program does not know one of its parts
    kind: str  # run, mine, ...
    state: State
    stage: str | None
    stages: tuple[str, ...]
    alone: tuple[str, ...]  # stages beside which nothing else may run on the CPU
    done: tuple[str, ...]  # stages finished
    fraction: float  # over all stages, 0 to 1
    block: int | None
    blocks: int | None
    item: str
    eta_s: float | None  # seconds of work left, without time in the queue
    submitted: float
    started: float | None
    finished: float | None
    error: dict[str, Any] | None  # type, message, todo, traceback
    priority: int
    device: str  # cpu, cuda or cuda:N
    after: str | None  # as the user asked
    waits: tuple[str, ...]  # every run that must be done before: `after` and baselines
    fingerprint: str
    artifact_id: str
    seconds: float  # worked so far, all stages
    deaths: int
    cancelling: bool  # asked to stop and still running


def fold(folded: Folded, events: Iterable[Event]) -> Folded:
    """The run after `events`. Unknown types change nothing."""
    for event in events:
        step = FOLDS.get(event["type"])
        folded = step(folded, event) if step else folded
    return folded


def _submitted(run: Folded, event: Event) -> Folded:
    return replace(run, submitted=event["t"])


def _state(run: Folded, event: Event) -> Folded:
    state = State(event["state"])
    if state is State.QUEUED:
        return replace(run, state=state, error=None, finished=None, deaths=0)
    if state is State.RUNNING:
        return replace(run, state=state, started=run.started or event["t"])
    return replace(_closed(run, event), state=state, finished=event["t"], error=event.get("error"))


def _stage(run: Folded, event: Event) -> Folded:
    if event["status"] == "started":
        deaths = run.deaths if event["stage"] == run.stage else 0
        fresh = replace(run, stage=event["stage"], open=True, stage_started=event["t"])
        begun_at = None if event["stage"] in run.seconds else 0.0
        fresh = replace(fresh, deaths=deaths, fraction=0.0, begun_at=begun_at)
        return replace(fresh, block=None, blocks=None, item="")
    closed = _closed(run, event)
    if event["status"] == "done":
        return replace(closed, done=(*run.done, event["stage"]), deaths=0, fraction=1.0, item="")
    return closed


def _died(run: Folded, event: Event) -> Folded:
    closed = _closed(run, event)
    return replace(closed, stage=event["stage"], deaths=run.deaths + 1, item="")


def _closed(run: Folded, event: Event) -> Folded:
    """The open stage, if any, ends now; its time counts."""
    if not run.open or run.stage is None or run.stage_started is None:
        return run
    worked = run.seconds.get(run.stage, 0.0) + max(0.0, event["t"] - run.stage_started)
    return replace(run, open=False, seconds={**run.seconds, run.stage: worked})


def _progress(run: Folded, event: Event) -> Folded:
    fraction = min(1.0, max(0.0, float(event.get("fraction") or 0.0)))
    return replace(
        run,
        fraction=fraction,
        begun_at=fraction if run.begun_at is None else run.begun_at,
        block=event.get("block"),
        blocks=event.get("blocks"),
        item=event.get("item") or "",
    )


FOLDS: dict[str, Callable[[Folded, Event], Folded]] = {
    "submitted": _submitted,
    "state": _state,
    "stage": _stage,
    "died": _died,
    "progress": _progress,
}


def overall(run: Folded, stages: tuple[str, ...], typical: Mapping[str, float]) -> float:
    """Share of the work done, 0 to 1: stages weigh what they usually take, else the same."""
    if run.state is State.DONE:
        return 1.0
    known = all(typical.get(stage) for stage in stages)
    weights = {stage: typical[stage] if known else 1.0 for stage in stages}
    total = sum(weights.values())
    part = dict.fromkeys(run.done, 1.0)
    if run.stage is not None and run.stage not in run.done:
        part[run.stage] = run.fraction
    return sum(w * part.get(stage, 0.0) for stage, w in weights.items()) / total if total else 0.0


def remaining(
    run: Folded, stages: tuple[str, ...], typical: Mapping[str, float], now: float
) -> float | None:
    """Seconds of work left; None while there is nothing to judge by."""
    if run.state.ended:
        return None
    left = 0.0
    for stage in stages:
        if stage in run.done:
            continue
        current = run.open and stage == run.stage
        seconds = _left(run, typical.get(stage), now) if current else typical.get(stage)
        if seconds is None:
            return None
        left += seconds
    return left


def _left(run: Folded, usual: float | None, now: float) -> float | None:
    """Of the stage under way: by its own pace, else by what such a stage took before."""
    elapsed = max(0.0, now - (run.stage_started or now))
    # A stage that resumes begins where it stopped: what it did before says nothing of its pace.
    covered = run.fraction - (run.begun_at or 0.0)
    if covered > 0.02 and elapsed > 0:
        return elapsed * (1 - run.fraction) / covered
    return None if usual is None else max(0.0, usual - elapsed)
