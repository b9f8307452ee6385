"""One stage of one run, in a process of its own: `python -m jobs.worker FOLDER`."""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import failure, folders, kinds, locks
from jobs.devices import Place
from jobs.events import State, append, read
from jobs.view import Folded, fold

if TYPE_CHECKING:
    from backend.spec import JobSpec

log = logging.getLogger(__name__)

DONE, FAILED, BUSY, STOPPED = 0, 1, 3, 75  # exit statuses; STOPPED asks to be started again
PACE_S = 0.1  # between progress events of one stage


class Emitter:
    """What the stage reports, written to the run's events."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self._clock = clock
        self._began = clock()
        self._last = -PACE_S

    def __call__(self, type: str, /, **data: Any) -> None:
        """Append one event; progress at most every PACE_S, except its end."""
        if type == "progress":
            now = self._clock()
            if now - self._last < PACE_S and data.get("fraction", 0) < 1:
                return
            self._last = now
            data.setdefault("eta_s", self._eta(data.get("fraction") or 0.0))
        append(self.folder, type, **data)

    def _eta(self, fraction: float) -> float | None:
        """Seconds left of this stage at its own pace."""
        elapsed = self._clock() - self._began
        return elapsed * (1 - fraction) / fraction if fraction > 0.02 else None


class Stop:
    """True once the run is to stop: cancelled by its file, or this process by SIGTERM."""

    def __init__(self, folder: Path) -> None:
        self.cancel = folder / folders.CANCEL
        self.told = False

    def __call__(self) -> bool:
        return self.told or self.cancel.exists()

    def listen(self) -> None:
        """React to SIGTERM; the stage looks between blocks and items."""
        signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, number: int, frame: object) -> None:
        # A cancel that is taken back before the next look must not stop the stage, and SIGTERM
        # from anybody else must.
        self.told = not self.cancel.exists()


def work(folder: Path, place: Place, stop: Stop | None = None) -> int:
    """Do the next unfinished stage of the run -> exit status. Only one process at a time does."""
    lock = locks.take(folder / folders.LOCK, {**locks.myself(), "place": place.data()})
    if lock is None:
        log.error("%s: another process works on it", folder)
        return BUSY
    try:
        return _turn(folder, place, stop or Stop(folder))
    finally:
        os.close(lock)


def _turn(folder: Path, place: Place, stop: Stop) -> int:
    run = fold(Folded(), read(folder)[0])
    if run.state.ended:
        return DONE
    try:
        spec = read_spec(folder)
        left = [stage for stage in spec.stages() if stage not in run.done]
        if run.state is State.QUEUED:
            append(folder, "state", state=State.RUNNING)
        return _stage(folder, spec, left, place, stop) if left else _all_done(folder)
    except Exception as error:
        return _fail(folder, run.stage or "", error)


def _stage(folder: Path, spec: JobSpec, left: list[str], place: Place, stop: Stop) -> int:
    from backend.pipeline import Cancelled

    stage = left[0]
    append(folder, "stage", stage=stage, status="started", **place.data())
    log.info("stage %s of run %s on %s", stage, folder.name, place.gpu or place.device)
    _clear_parts(folder)
    home = folder.parents[1]
    try:
        kinds.find(spec.kind).work(
            spec,
            stage,
            folder,
            device=place.device,
            home=home,
            emit=Emitter(folder),
            should_stop=stop,
        )
    except Cancelled:
        return _stopped(folder, stage, stop)
    except Exception as error:
        return _fail(folder, stage, error)
    append(folder, "stage", stage=stage, status="done")
    return _all_done(folder) if len(left) == 1 else DONE


def _all_done(folder: Path) -> int:
    append(folder, "state", state=State.DONE)
    return DONE


def _stopped(folder: Path, stage: str, stop: Stop) -> int:
    append(folder, "stage", stage=stage, status="stopped")
    if not stop.cancel.exists():
        return STOPPED  # the cancel was taken back, or the machine shuts down: go on later
    append(folder, "state", state=State.CANCELLED)
    return DONE


def _fail(folder: Path, stage: str, error: Exception) -> int:
    log.error("stage %s failed", stage, exc_info=error)
    _clear_parts(folder)  # on a full disk this makes the room for the event
    append(folder, "state", state=State.FAILED, error=failure.explain(error, stage))
    return FAILED


def _clear_parts(folder: Path) -> None:
    """Remove half-written files, which nobody reads."""
    for part in folder.rglob("*.part"):
        part.unlink(missing_ok=True)


def read_spec(folder: Path) -> JobSpec:
    """The job's spec, refused if its parts now compute something else than when submitted."""
    spec = kinds.validate(json.loads((folder / folders.SPEC).read_text(encoding="utf-8")))
    submitted = json.loads((folder / folders.JOB).read_text(encoding="utf-8"))
    if spec.artifact_id() != submitted["artifact_id"]:
        raise ValueError(
            f"a part of this {spec.kind} has changed since it was submitted, so what it finished "
            "cannot be continued; submit it again"
        )
    return spec


def settle_in(folder: Path, place: Place) -> Stop:
    """Make this process the run's worker: own session, log file, signals, GPU and threads."""
    with suppress(PermissionError):  # it leads a group already
        os.setsid()
    _log_to(folder / folders.LOG)
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    if place.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if place.threads and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(place.threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for who started us
    stop = Stop(folder)
    stop.listen()
    return stop


def _log_to(path: Path) -> None:
    """Everything printed or logged from here on goes to the run's log."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(2)  # a segfault leaves its Python stack in the log
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=form, force=True)


def main(argv: list[str] | None = None) -> int:
    """Command line of one worker; the same as what the supervisor starts."""
    parser = argparse.ArgumentParser("jobs.worker", description=__doc__)
    parser.add_argument("folder", type=Path, help="run folder, HOME/runs/RUN_ID")
    parser.add_argument("--gpu", help="card for a run on cuda, as CUDA_VISIBLE_DEVICES names it")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads; 0: its own choice")
    given = parser.parse_args(argv)
    folder = given.folder.resolve()
    if not (folder / folders.JOB).is_file():
        parser.error(f"{folder} is not a run folder")
    kind, _, number = json.loads((folder / folders.JOB).read_text())["device"].partition(":")
    place = Place(kind, given.gpu or number or None, given.threads)
    return work(folder, place, settle_in(folder, place))


if __name__ == "__main__":
    sys.exit(main())
