"""The supervisor: starts stages, watches workers, and copies events into the store.

Writers take turns: a worker writes a run's events while it holds the run's lock, the supervisor
only when nobody does.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from jobs import failure, folders, locks
from jobs.devices import Free, Place, Slots
from jobs.events import Event, State, append, read
from jobs.kinds import RUN
from jobs.launch import Ended, Launcher, WarmLauncher
from jobs.queue import Queue
from jobs.view import RunView
from jobs.worker import BUSY, DONE, STOPPED

log = logging.getLogger(__name__)

PAUSE_S = 0.2  # between ticks, unless a worker ends
GONE_WRONG = (State.FAILED, State.CANCELLED)


class Ingests(Protocol):
    """What the supervisor needs of results_db.store.Store."""

    def offset(self, run_id: str) -> int: ...

    def ingest(
        self, run_id: str, spec: str, events: Sequence[Mapping[str, Any]], offset: int
    ) -> None: ...


@dataclass(frozen=True)
class Stopping:
    """A worker that was asked to stop."""

    since: float  # clock
    killed: bool = False


class Supervisor:
    """One per home, in the process that owns the database. All work happens in `tick`."""

    def __init__(
        self,
        queue: Queue,
        store: Ingests,
        *,
        slots: Slots | None = None,
        grace_s: float = 5.0,
        max_deaths: int = 2,
        launcher: Launcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.queue = queue
        self.slots = slots or queue.slots
        self.grace_s = grace_s
        self.max_deaths = max_deaths
        self.launcher = launcher or WarmLauncher(queue.home)
        self._copy = Copy(queue, store)
        self._stuck: dict[str, str] = {}  # run id -> why its events could not be written
        self._clock = clock
        self._launched: dict[str, Place] = {}  # started by us, end not yet reported
        self._stopping: dict[str, Stopping] = {}

    @property
    def trouble(self) -> dict[str, str]:
        """{run id: what keeps it from going on or from being stored}; passes with its cause."""
        return self._copy.trouble | self._stuck

    def run_until(self, stop: threading.Event) -> None:
        """Tick until told to stop. Workers under way then finish their stage alone."""
        self.launcher.open()
        while not stop.is_set():
            try:
                self.tick()
            except Exception:  # a full disk or a locked file passes; the queue must outlive it
                log.exception("the supervisor could not finish a round")
            self.launcher.wait(PAUSE_S)

    def tick(self) -> None:
        """One round: who ended, who must stop, who can start, what is new for the store."""
        ends = {end.run_id: end for end in self.launcher.ended()}
        for run_id, end in ends.items():
            self._launched.pop(run_id, None)
            folder = self.queue.home / "runs" / run_id
            # Held: it lives, though the process that started it does not.
            if folder.is_dir() and not locks.held(folder / folders.LOCK):
                self._guarded(run_id, self._settle, folder, end)
        taken = self._watch(self.queue.runs(ended=False))
        self._start(self.queue.runs(ended=False), taken)
        self._copy.all()

    def close(self) -> None:
        """Start nothing more, and store what came last. The store stays open."""
        self.launcher.close()
        self._copy.all()

    # Watching

    def _watch(self, views: list[RunView]) -> dict[str, Place]:
        """Look at every run that has not ended -> the places of those with a living worker."""
        taken = dict(self._launched)
        for view in views:
            folder = self.queue.home / "runs" / view.run_id
            if view.run_id not in taken and locks.held(folder / folders.LOCK):
                taken[view.run_id] = adopted(folder)
            if view.run_id in taken:
                self._watch_worker(view, folder)
            elif view.state is not State.QUEUED or view.run_id in self._stuck:
                self._stopping.pop(view.run_id, None)
                self._guarded(view.run_id, self._settle, folder, None)
        return taken

    def _watch_worker(self, view: RunView, folder: Path) -> None:
        """A living worker: stop it if asked; free the lock if only its children are left."""
        holder = locks.content(folder / folders.LOCK)
        held = locks.held(folder / folders.LOCK)
        if held and holder and not locks.living(holder):
            locks.send(holder, signal.SIGKILL)  # a forked child outlived it and keeps the lock
        elif held and view.cancelling:
            self._stop(view.run_id, holder)
        elif not view.cancelling:
            self._stopping.pop(view.run_id, None)

    def _stop(self, run_id: str, holder: Mapping[str, Any]) -> None:
        """SIGTERM to the worker's group, SIGKILL once its grace is over."""
        asked = self._stopping.get(run_id)
        if asked is None:
            locks.send(holder, signal.SIGTERM)
            self._stopping[run_id] = Stopping(self._clock())
        elif not asked.killed and self._clock() - asked.since > self.grace_s:
            log.warning("run %s did not stop within %g s and was killed", run_id, self.grace_s)
            locks.send(holder, signal.SIGKILL)
            self._stopping[run_id] = replace(asked, killed=True)

    def _settle(self, folder: Path, end: Ended | None) -> None:
        """A run whose worker is gone: say what became of it, unless the worker did."""
        run = self.queue.folded(folder.name)
        if end is not None or run.open:
            locks.send(locks.content(folder / folders.LOCK), signal.SIGKILL)  # programs it started
        if run.state.ended:
            (folder / folders.CANCEL).unlink(missing_ok=True)
            return
        if (folder / folders.CANCEL).exists():
            append(folder, "state", state=State.CANCELLED)
            (folder / folders.CANCEL).unlink(missing_ok=True)
            return
        bad = end is not None and end.exit not in (DONE, STOPPED, BUSY)
        if run.open or bad:
            self._died(folder, run.stage if run.open else None, end)

    def _died(self, folder: Path, stage: str | None, end: Ended | None) -> None:
        """Write the death down; too many in one stage fail the run, else it starts again."""
        view = self.queue.view(folder.name)
        at = stage or next((s for s in view.stages if s not in view.done), "")
        status = end.exit if end else None
        pid = locks.content(folder / folders.LOCK).get("pid")
        append(folder, "died", stage=at, pid=pid, exit=status)
        deaths = view.deaths + 1
        if deaths >= self.max_deaths:
            where = end.why if end and end.why else str(folder / folders.LOG)
            error = failure.death(at, status, deaths, where)
            append(folder, "state", state=State.FAILED, error=error)

    def _guarded(self, run_id: str, step: Callable[..., None], *given: Any) -> None:
        """Do one run's step; a full disk then delays this run and no other."""
        try:
            step(*given)
            self._stuck.pop(run_id, None)
        except OSError as error:
            if run_id not in self._stuck:
                log.error("run %s waits: %s", run_id, error)
            self._stuck[run_id] = str(error)

    # Starting

    def _start(self, views: list[RunView], taken: Mapping[str, Place]) -> None:
        """Give free slots to waiting runs, in their order."""
        free = Free(self.slots, taken)
        for view in in_order(views):
            if view.run_id in taken or view.cancelling:
                continue
            others = {run_id: self._state(run_id) for run_id in view.waits}
            bad = [r for r, state in others.items() if state in (None, *GONE_WRONG)]
            if bad:
                self._guarded(view.run_id, self._fail_waiting, view, bad[0], others[bad[0]])
            elif view.run_id not in self._stuck and all(s is State.DONE for s in others.values()):
                self._launch(view, free)

    def _state(self, run_id: str) -> State | None:
        """Of another run; None if it is gone."""
        try:
            return self.queue.view(run_id).state
        except ValueError:
            return None

    def _launch(self, view: RunView, free: Free) -> None:
        stage = next((s for s in view.stages if s not in view.done), "")
        place = free.claim(view.device, whole=stage in view.alone)
        if place is not None:
            self.launcher.start(self.queue.folder(view.run_id), place)
            self._launched[view.run_id] = place

    def _fail_waiting(self, view: RunView, other: str, state: State | None) -> None:
        """Waiting for a run that went wrong would last for ever."""
        error = {
            "type": "Blocked",
            "message": f"It waits for the run {other}, which is {state or 'gone'}.",
            "todo": f"See what became of {other}; retry continues both.",
            "traceback": "",
        }
        append(self.queue.folder(view.run_id), "state", state=State.FAILED, error=error)


def adopted(folder: Path) -> Place:
    """Where a worker works that this process did not start: it says so in its lock."""
    return Place(**locks.content(folder / folders.LOCK).get("place", {}))


def in_order(views: Iterable[RunView]) -> list[RunView]:
    """Runs that still have work, first to start first.

    A run counts as urgent as the most urgent one that waits for it. Among equals: what has begun,
    then baselines, then the order of submission.
    """
    waiting = [view for view in views if not view.state.ended]
    urgency = {view.run_id: view.priority for view in waiting}
    for view in sorted(waiting, key=lambda view: -view.priority):
        for other in view.waits:
            urgency[other] = max(urgency.get(other, view.priority), view.priority)
    return sorted(
        waiting,
        key=lambda view: (
            -urgency[view.run_id],
            view.state is not State.RUNNING,
            view.kind != RUN or "quantize" in view.stages,
            view.submitted,
            view.run_id,
        ),
    )


class Copy:
    """New events of every run, into the store, each batch together with where it ends."""

    def __init__(self, queue: Queue, store: Ingests, trouble: dict[str, str] | None = None) -> None:
        self.queue = queue
        self.store = store
        self.trouble = {} if trouble is None else trouble  # run id -> why it could not be stored
        self._offsets: dict[str, int] = {}
        self._refused: dict[str, int] = {}  # run id -> bytes of events when they were refused

    def all(self) -> None:
        """One pass over all runs."""
        for run_id, size in self.queue.seen().items():
            if run_id not in self._offsets:
                self._offsets[run_id] = self.store.offset(run_id)
            if size > self._offsets[run_id] and size != self._refused.get(run_id):
                self._one(self.queue.home / "runs" / run_id, size)

    def _one(self, folder: Path, size: int) -> None:
        events, offset = read(folder, self._offsets[folder.name])
        try:
            spec = (folder / folders.SPEC).read_text(encoding="utf-8")
            self.store.ingest(folder.name, spec, expand(folder, events), offset)
            self._offsets[folder.name] = offset
            self.trouble.pop(folder.name, None)
        except Exception as error:  # one unreadable run must not keep the others out of the store
            log.exception("the events of run %s cannot be stored", folder.name)
            self.trouble[folder.name] = str(error)
            self._refused[folder.name] = size


def expand(folder: Path, events: Iterable[Event]) -> list[Event]:
    """Events with the numbers that measurements keep in items/ files put in."""
    whole: list[Event] = []
    for event in events:
        named = event.get("items_file") if event["type"] == "measurement" else None
        if not named:
            whole.append(event)
            continue
        try:
            whole.append({**event, "items": items(folder, named)})
        except (OSError, ValueError) as error:
            text = f"the items of {event.get('name')} are missing ({named}): {error}"
            note = {"t": event["t"], "type": "note", "block": None, "module": "", "text": text}
            whole += [event, note]
    return whole


def items(folder: Path, named: str) -> list[float]:
    """Numbers of an items file, one a line, at a path inside the run's folder."""
    path = (folder / named).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError("the file is outside the run's folder")
    return [float(line) for line in path.read_text().split()]
