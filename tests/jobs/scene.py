"""A home with stand-in work, a supervisor over it, and no process left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend.spec import RunSpec
from jobs import folders, locks
from jobs.devices import Slots
from jobs.events import State, append
from jobs.launch import WarmLauncher
from jobs.queue import Queue
from jobs.supervisor import Supervisor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE_S = 240  # for anything a test waits for; reached only when it fails
PRELOAD = ("stand_in_worker", "jobs.worker")


class Notebook:
    """A store in memory: what was ingested, and up to where."""

    def __init__(self) -> None:
        self.events: dict[str, list] = {}
        self.offsets: dict[str, int] = {}

    def offset(self, run_id: str) -> int:
        return self.offsets.get(run_id, 0)

    def ingest(self, run_id: str, spec: str, events: Any, offset: int) -> None:
        assert offset > self.offset(run_id)
        self.events.setdefault(run_id, []).extend(events)
        self.offsets[run_id] = offset


class Lent:
    """A launcher that outlives whoever closes it."""

    def __init__(self, launcher: WarmLauncher) -> None:
        self.launcher = launcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launcher, name)

    def close(self) -> None:
        """The owner closes it."""


class Home:
    """One home folder with its queue and, once asked for, its supervisor."""

    def __init__(self, path: Path, shared: WarmLauncher | None = None) -> None:
        (path / "runs").mkdir(parents=True, exist_ok=True)
        self.path = path
        self.shared = shared
        self.store = Notebook()
        self.queue = Queue(
            path, slots=Slots(), resolve=lambda spec: spec, preflight=lambda *given: None
        )
        self.supervisors: list[Supervisor] = []

    def supervisor(self, *, own: bool = False, **knobs: Any) -> Supervisor:
        """A new one; its warm process is that of all tests, which took seconds, or its own."""
        launcher = WarmLauncher(self.path, PRELOAD) if own else self.shared
        assert launcher is not None
        made = Supervisor(self.queue, self.store, launcher=launcher, **knobs)
        self.supervisors.append(made)
        return made

    def submit(self, *steps: dict, metrics: Any = (), **knobs: Any) -> str:
        return self.queue.submit(spec(*steps, metrics=metrics), **knobs)

    def folder(self, run_id: str) -> Path:
        return self.queue.folder(run_id)

    def state(self, run_id: str) -> State:
        return self.queue.view(run_id).state

    def tick_until(self, supervisor: Supervisor, done: Callable[[], bool]) -> None:
        """Tick until `done`, as the supervisor's thread would."""
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < deadline, self.report()
            supervisor.tick()
            supervisor.launcher.wait(0.02)

    def finish(self, supervisor: Supervisor, *run_ids: str) -> None:
        """Tick until the runs have ended and their workers are gone."""
        gone = supervisor._launched.keys().isdisjoint
        self.tick_until(
            supervisor,
            lambda: gone(run_ids) and all(self.state(r).ended for r in run_ids),
        )

    def holder(self, run_id: str) -> dict:
        """Who works on the run now."""
        lock = self.folder(run_id) / folders.LOCK
        return locks.content(lock) if locks.held(lock) else {}

    def at_gate(self, run_id: str) -> bool:
        return (self.folder(run_id) / "acted").exists()

    def report(self) -> str:
        lines = [f"{v.run_id} {v.state} {v.stage} {v.error}" for v in self.queue.runs()]
        lines += [self.queue.log(v.run_id, 20) for v in self.queue.runs()]
        warm = self.path / "warm.log"
        return "\n".join([*lines, warm.read_text() if warm.exists() else ""])

    def close(self) -> None:
        """End every process of this home."""
        launchers = {id(s.launcher): s.launcher for s in self.supervisors}.values()
        own = [launcher for launcher in launchers if launcher is not self.shared]
        for launcher in own:
            launcher.close()
        for run_id in folders.run_ids(self.path):
            self._kill(run_id)
        for launcher in own:
            if launcher._process is not None:
                launcher._process.wait(DEADLINE_S)
        if self.shared is not None:
            wait_for(lambda: self.shared.ended() is None or not self.shared.pids)

    def _kill(self, run_id: str) -> None:
        holder = self.holder(run_id)
        if holder and holder["group"] != os.getpgrp():
            os.killpg(holder["group"], 9)


def spec(*steps: dict, metrics: Any = (), **knobs: Any) -> RunSpec:
    """A spec of stand-in parts."""
    data = {"model": {"id": "demo", "content": "c0"}, "steps": steps, "metrics": metrics}
    return RunSpec.model_validate(data | knobs)


def chain(**knobs: Any) -> dict:
    return {"kind": "test_chain", **knobs}


def score(**knobs: Any) -> dict:
    return {"kind": "test_score", **knobs}


def wait_for(done: Callable[[], Any]) -> Any:
    """Poll until `done` gives something true -> that."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := done()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
    return found


def begin(folder: Path, stage: str = "quantize") -> None:
    """What a worker writes first."""
    append(folder, "state", state=State.RUNNING)
    append(folder, "stage", stage=stage, status="started")
