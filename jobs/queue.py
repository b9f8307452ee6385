"""The queue: run folders, and the rules by which a spec becomes one of them."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import devices, folders, kinds
from jobs.events import EVENTS, State, append, read
from jobs.folders import Draft
from jobs.view import Folded, RunView, fold, overall, remaining

if TYPE_CHECKING:
    from backend.spec import JobSpec

log = logging.getLogger(__name__)


@dataclass
class Record:
    """What is remembered of one run folder, so that a look at it costs one stat."""

    folder: Path
    job: dict[str, Any]
    spec: JobSpec | dict[str, Any]
    events: str  # path of the file; a Path costs more to make than the look itself
    kin: Mapping[str, str]  # stage -> key; stages with one key take about the same time
    alone: tuple[str, ...] = ()  # stages beside which nothing else may run on the CPU
    folded: Folded = field(default_factory=Folded)
    offset: int = 0

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def kind(self) -> str:
        """What kind of job it is."""
        return kinds.name_in(self.spec) if isinstance(self.spec, dict) else self.spec.kind

    @property
    def stages(self) -> tuple[str, ...]:
        """All stages in order; () for a spec that is not understood here."""
        return tuple(self.kin)

    def stopping(self) -> bool:
        """True if it was asked to stop and has not ended."""
        return not self.folded.state.ended and (self.folder / folders.CANCEL).exists()

    def refresh(self) -> bool:
        """Fold the events that came since -> whether there were any."""
        if os.stat(self.events).st_size <= self.offset:
            return False
        events, self.offset = read(self.folder, self.offset)
        self.folded = fold(self.folded, events)
        return bool(events)


class Queue:
    """Jobs of one home, of every kind. Safe from any thread; any number of processes may submit."""

    def __init__(
        self,
        home: Path,
        *,
        slots: devices.Slots | None = None,
        resolve: Callable[[Any], JobSpec] | None = None,
        preflight: Callable[[Any, str, Path], None] | None = None,
    ) -> None:
        self.home = home
        self.slots = slots or devices.here()
        self._resolve = resolve or self._resolved
        self._preflight = preflight or fits
        self._records: dict[str, Record] = {}
        self._broken: set[str] = set()
        self._usual: dict[str, float] | None = None  # what stages took, until a run changes
        self._reading = threading.RLock()

    # What there is

    def runs(self, *, ended: bool = True) -> list[RunView]:
        """Every run, or those that have not ended, in the order of submission."""
        with self._reading:
            self._refresh()
            typical = self._typical()
            chosen = [r for r in self._records.values() if ended or not r.folded.state.ended]
            views = [self._view(record, typical) for record in chosen]
        return sorted(views, key=lambda view: (view.submitted, view.run_id))

    def seen(self) -> dict[str, int]:
        """{run id: bytes of its events so far}, a torn last line left out; oldest first."""
        with self._reading:
            self._refresh()
            return {run_id: record.offset for run_id, record in sorted(self._records.items())}

    def folded(self, run_id: str) -> Folded:
        """What the events of a run say now. ValueError if there is none."""
        return self._record(run_id).folded

    def view(self, run_id: str) -> RunView:
        """One run. ValueError if there is none."""
        with self._reading:
            record = self._record(run_id)
            return self._view(record, self._typical())

    def folder(self, run_id: str) -> Path:
        """The run's folder. ValueError if there is none."""
        return folders.folder_of(self.home, run_id)

    def log(self, run_id: str, lines: int = 200) -> str:
        """The last lines of what the run's workers printed."""
        return folders.tail(self.folder(run_id) / folders.LOG, lines)

    # What one can ask for

    def submit(
        self,
        spec: JobSpec,
        *,
        label: str = "",
        recipe: str = "",
        priority: int = 0,
        after: str | None = None,
        device: str = "auto",
    ) -> str:
        """Queue a job -> its id; a job with the same fingerprint on the same device is that job.

        A failed or cancelled one is retried. What a job needs of others comes along where it is
        missing: the 16-bit baseline of a run's model. ValueError in one sentence, and nothing
        queued, if it cannot be.
        """
        device = devices.settle(device, self.slots)
        if after is not None:
            self.folder(after)
        spec = self._resolve(spec)
        with self._submitting():
            twin = self._same(spec, device)
            if twin is not None:
                return self._again(twin)
            asked = {"label": label, "recipe": recipe, "priority": priority, "after": after}
            drafts, waits = self._before(spec, device, priority)
            drafts.append(self._draft(spec, device, waits, asked))
            with folders.writing(self.home, "nothing was submitted"):
                folders.create(self.home, drafts)
        return drafts[-1].run_id

    def cancel(self, run_id: str) -> None:
        """Ask a run to stop. One that waits is cancelled at once; an ended one stays as it is."""
        folder = self.folder(run_id)
        if not self.view(run_id).state.ended:
            with folders.writing(self.home, f"run {run_id} was not cancelled"):
                (folder / folders.CANCEL).touch()

    def uncancel(self, run_id: str) -> None:
        """Take `cancel` back. A run that has stopped meanwhile goes on after its last block."""
        (self.folder(run_id) / folders.CANCEL).unlink(missing_ok=True)
        if self.view(run_id).state is State.CANCELLED:
            self.retry(run_id)

    def retry(self, run_id: str) -> None:
        """Queue a failed or cancelled run again, and with it those it waits for.

        It continues after its last finished stage and block.
        """
        folder = self.folder(run_id)
        view = self.view(run_id)
        if view.state not in (State.FAILED, State.CANCELLED):
            return
        for other in view.waits:
            if (self.home / "runs" / other).is_dir():
                self.retry(other)
        (folder / folders.CANCEL).unlink(missing_ok=True)
        with folders.writing(self.home, f"run {run_id} was not queued again"):
            append(folder, "state", state=State.QUEUED)

    # Reading

    def _record(self, run_id: str) -> Record:
        folder = self.folder(run_id)
        with self._reading:
            self._refresh_one(run_id)
            if run_id not in self._records:
                raise ValueError(f"{folder} cannot be read as a run; the log says why")
            return self._records[run_id]

    def _refresh(self) -> None:
        names = folders.run_ids(self.home)
        for gone in self._records.keys() - set(names):
            del self._records[gone]
        for name in names:
            self._refresh_one(name)

    def _refresh_one(self, name: str) -> None:
        if name in self._broken:
            return
        try:
            if name not in self._records:
                self._records[name] = load(self.home / "runs" / name)
            if self._records[name].refresh():
                self._usual = None
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            log.warning("run folder %s is left out: %s: %s", name, type(error).__name__, error)
            self._records.pop(name, None)
            self._broken.add(name)

    def _typical(self) -> dict[str, float]:
        """Seconds that stages took, by kin: the median of those that ended."""
        if self._usual is not None:
            return self._usual
        taken: dict[str, list[float]] = defaultdict(list)
        for record in self._records.values():
            for stage in record.folded.done:
                if stage in record.kin:
                    taken[record.kin[stage]].append(record.folded.seconds.get(stage, 0.0))
        self._usual = {kin: statistics.median(seconds) for kin, seconds in taken.items()}
        return self._usual

    def _view(self, record: Record, typical: Mapping[str, float]) -> RunView:
        run, job = record.folded, record.job
        usual = {stage: typical[key] for stage, key in record.kin.items() if key in typical}
        now = time.time()
        worked = sum(run.seconds.values()) + (now - (run.stage_started or now)) * run.open
        stopping = record.stopping()
        waiting = stopping and run.state is State.QUEUED
        return RunView(
            run_id=record.run_id,
            label=job["label"],
            recipe=job["recipe"],
            spec=record.spec,
            kind=record.kind,
            state=State.CANCELLED if waiting else run.state,
            stage=run.stage,
            stages=record.stages,
            alone=record.alone,
            done=run.done,
            fraction=overall(run, record.stages, usual),
            block=run.block,
            blocks=run.blocks,
            item=run.item,
            eta_s=None if waiting else remaining(run, record.stages, usual, now),
            submitted=run.submitted or job["submitted"],
            started=run.started,
            finished=run.finished,
            error=run.error,
            priority=job["priority"],
            device=job["device"],
            after=job["after"],
            waits=tuple(job["waits"]),
            fingerprint=job["fingerprint"],
            artifact_id=job["artifact_id"],
            seconds=worked,
            deaths=run.deaths,
            cancelling=stopping and not waiting,
        )

    # Submitting

    def _resolved(self, spec: JobSpec) -> JobSpec:
        """Fill in what the home, the model's files and the data decide."""
        return kinds.find(spec.kind).resolve(spec, self)

    def _draft(
        self, spec: JobSpec, device: str, waits: list[str], asked: Mapping[str, Any]
    ) -> Draft:
        """A new job and its job.json; ValueError if it cannot fit."""
        self._preflight(spec, device, self.home)
        after = asked.get("after")
        job = {
            "label": asked.get("label", ""),
            "recipe": asked.get("recipe") or kinds.find(spec.kind).title(spec),
            "priority": asked.get("priority", 0),
            "after": after,
            "waits": [*waits, after] if after else waits,
            "device": device,
            "submitted": time.time(),
            "fingerprint": spec.fingerprint(),
            "artifact_id": spec.artifact_id(),
            "targets": spec.targets(),
        }
        return Draft(folders.new_id(), spec.model_dump(mode="json"), job)

    @contextmanager
    def _submitting(self) -> Iterator[None]:
        """One submission at a time in this home, so that equal ones meet."""
        with folders.writing(self.home, "nothing was submitted"):
            fd = os.open(self.home / "submit.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _same(self, spec: JobSpec, device: str) -> RunView | None:
        fingerprint = spec.fingerprint()
        twins = [v for v in self.runs() if (v.fingerprint, v.device) == (fingerprint, device)]
        return twins[-1] if twins else None

    def _again(self, twin: RunView) -> str:
        self.retry(twin.run_id)
        return twin.run_id

    def _before(self, spec: JobSpec, device: str, priority: int) -> tuple[list[Draft], list[str]]:
        """(what to submit with `spec`, ids of the jobs that `spec` must wait for)."""
        before = kinds.find(spec.kind).before(spec, self.runs(), device)
        if before.bring is None:
            return [], sorted(before.waits)
        twin = self._same(before.bring, device)
        made = [] if twin else [self._draft(before.bring, device, [], {"priority": priority})]
        brought = self._again(twin) if twin else made[0].run_id  # one that went wrong goes on
        return made, sorted(before.waits | ({brought} if before.wait_for_brought else set()))


def load(folder: Path) -> Record:
    """Read a job folder's two JSON files."""
    events = str(folder / EVENTS)
    job = json.loads((folder / folders.JOB).read_text(encoding="utf-8"))
    data = json.loads((folder / folders.SPEC).read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"{folders.SPEC} holds no JSON object")
    try:
        spec = kinds.validate(data)
    except ValueError as error:
        log.warning("the spec of run %s is not understood here: %s", folder.name, error)
        return Record(folder, job, data, events, {})
    kind = kinds.find(spec.kind)
    return Record(folder, job, spec, events, kind.kin(spec, job["device"]), kind.alone(spec))


def fits(spec: JobSpec, device: str, home: Path) -> None:
    """ValueError with the numbers if the job cannot fit into memory or onto the disk."""
    kinds.find(spec.kind).check(spec, device, home)
