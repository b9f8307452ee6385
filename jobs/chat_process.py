"""The life of one chat process, seen from here: started, loaded, asked, and buried."""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from jobs import devices, failure
from jobs.chat_jobs import LAST, Event, Job, Mode
from jobs.chat_room import CLOSED, Room, Variant
from jobs.chat_runs import ChatRun, Need
from jobs.devices import Place
from jobs.launch import Ended

log = logging.getLogger(__name__)

SEND_S = 10.0  # in which a living process takes a command
LEAVE_S = 5.0  # in which a process ends that was told to
GLANCE_S = 0.05  # between looks for an end
RECEIVED_BYTES = 1 << 16
LOG_BYTES = 1 << 20  # of one run's log, before it starts anew


class Launches(Protocol):
    """What is needed of a launcher."""

    pids: dict[str, int | None]

    def open(self) -> None: ...

    def start_chat(self, name: str, log: Path, place: Place, end: socket.socket) -> None: ...

    def ended(self) -> list[Ended]: ...

    def wait(self, seconds: float) -> None: ...

    def close(self) -> None: ...


class Processes:
    """The launcher, for one thread at a time."""

    def __init__(self, launcher: Launches, folder: Path, device: str) -> None:
        self.folder = folder  # of logs
        self.device, _, self._card = device.partition(":")
        self._launcher = launcher
        self._lock = threading.Lock()
        self._exits: dict[str, int | None] = {}  # of those whose end was not asked for yet

    def open(self) -> None:
        """Get ready to start some."""
        with self._lock:
            self._launcher.open()

    def start(self, name: str, run: ChatRun, end: socket.socket) -> None:
        """Start one that chats over `end`, with half of the cores: two answers come at once."""
        place = Place(self.device, self._card or None, max(1, devices.cores() // 2))
        with self._lock:
            self._launcher.start_chat(name, self._fresh_log(run), place, end)

    def exit_of(self, name: str) -> int | None:
        """How one ended that has closed its socket; it is killed if it has not ended."""
        deadlines = [time.monotonic() + LEAVE_S * n for n in (1, 2)]
        while not self._gone(name) and deadlines:
            if time.monotonic() > deadlines[0]:
                del deadlines[0]
                self.kill(name)
        with self._lock:
            return self._exits.pop(name, None)

    def living(self) -> dict[str, int | None]:
        """{name: pid} of those whose end was not reported; None while it is not known."""
        with self._lock:
            self._exits |= {end.run_id: end.exit for end in self._launcher.ended()}
            return dict(self._launcher.pids)

    def kill(self, name: str) -> None:
        """At once. Its number is its own as long as its end was not reported."""
        if pid := self.living().get(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def log_file(self, run: ChatRun) -> Path:
        """Where the run's chat processes print."""
        return self.folder / f"{run.run_id}.log"

    def close(self) -> None:
        """End all of them, and start nothing more."""
        for name in self.living():
            self.kill(name)
            self.exit_of(name)
        self._launcher.close()

    def _gone(self, name: str) -> bool:
        """True once its end was reported; looks for a moment."""
        with self._lock:
            if name in self._launcher.pids:
                self._launcher.wait(GLANCE_S)
        return name not in self.living()

    def _fresh_log(self, run: ChatRun) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.log_file(run)
        with suppress(FileNotFoundError):
            if path.stat().st_size > LOG_BYTES:
                path.unlink()
        return path


class Gone(Exception):
    """The process has ended, or does not answer."""


class Session:
    """One process of one variant, in a thread of its own."""

    def __init__(
        self,
        variant: Variant,
        room: Room,
        processes: Processes,
        recalled: Callable[[Variant, Job], bool],
    ) -> None:
        """`recalled` answers a job without the process, if it was answered before."""
        self.variant = variant
        self.room = room
        self.processes = processes
        self._recalled = recalled
        self._name = f"{variant.run.run_id} {room.number()}"

    def live(self, need: Need) -> None:
        """Until the process is gone. ValueError in one sentence if it cannot be loaded."""
        self._need = need
        if not self.room.reserve(self.variant, need.packed):
            return
        ours, theirs = socket.socketpair()
        bell, ring = socket.socketpair()
        with ours, theirs, bell, ring:
            ours.settimeout(SEND_S)
            ring.setblocking(False)
            with self.room.lock:
                self.variant.bell = ring
            try:
                self.processes.start(self._name, self.variant.run, theirs)
                theirs.close()  # or its death would not be seen
                self._converse(ours, bell)
            except (OSError, Gone):
                ours.close()
                self._bury()
            finally:
                with self.room.lock:
                    self.variant.bell = None

    def _converse(self, ours: socket.socket, bell: socket.socket) -> None:
        """Send what is due and take what comes. Ends with Gone or OSError."""
        send(ours, self._load())
        received, patience = b"", None
        with selectors.DefaultSelector() as ready:
            ready.register(ours, selectors.EVENT_READ)
            ready.register(bell, selectors.EVENT_READ)
            while True:
                if self._send_due(ours):
                    patience = LEAVE_S
                sources = [key.fileobj for key, _ in ready.select(patience)]
                if bell in sources:
                    bell.recv(RECEIVED_BYTES)
                data = ours.recv(RECEIVED_BYTES) if ours in sources else b""
                if not data and (ours in sources or not sources):
                    raise Gone
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))

    def _load(self) -> dict[str, Any]:
        folder = str(self.variant.run.folder)
        device, dtype = self.processes.device, self.variant.dtype
        return {"do": "load", "folder": folder, "device": device, "dtype": dtype}

    def _send_due(self, ours: socket.socket) -> bool:
        """Stop what is to stop and begin what is next -> True if the process is to leave."""
        with self.room.lock:
            stops, self.variant.to_stop = self.variant.to_stop, []
            leaving = self.variant.leaving
        for number in stops:
            send(ours, {"do": "stop", "id": number})
        if leaving:
            ours.shutdown(socket.SHUT_WR)
            return True
        while (job := self.room.begin(self.variant)) is not None:
            if self._recalled(self.variant, job):
                self.room.end(self.variant)
                continue
            assert self.variant.mode is not None
            job.begin(self.variant.mode)
            send(ours, job.command())
        return False

    def _hear(self, event: Event) -> None:
        kind = event["event"]
        if kind == "failed" and "id" not in event:
            raise ValueError(event["why"])  # of loading
        if kind == "ready":
            self._ready(event)
        elif kind == "grows":
            self.room.check_fits(self._need.simulated)
            self.room.resize(self.variant, self._need.simulated)
        elif kind == "memory":
            self.room.resize(self.variant, event["bytes"])
        else:
            self._pass_on(event)

    def _ready(self, event: Event) -> None:
        with self.room.lock:
            self.variant.mode = Mode(event["packed"], event["dtype"], tuple(event["notes"]))
            self.variant.state = "ready"
            self.variant.used = self.room.number()
            self.variant.place()
            self.room.resize(self.variant, event["bytes"])

    def _pass_on(self, event: Event) -> None:
        """To the job it is about; after the last the process is free before anybody sees it."""
        job = self.variant.current
        if job is None or job.id != event["id"]:
            return
        if event["event"] in LAST:
            self.room.end(self.variant)
        try:
            job.hear(event)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            log.exception("run %s", self.variant.run.run_id)
            job.fail("what the chat process said is not understood; ask again")
            raise Gone from error
        if event.get("ends"):
            raise Gone

    def _bury(self) -> None:
        """It is gone: by our wish, or with the answer it was working on."""
        exit = self.processes.exit_of(self._name)
        with self.room.lock:
            job, self.variant.current = self.variant.current, None
            wished, loading = self.variant.leaving, self.variant.state == "loading"
        why = CLOSED if wished else obituary(exit, self.processes.log_file(self.variant.run))
        if job is not None:
            job.fail(why)
        if not wished:
            log.warning("run %s: %s", self.variant.run.run_id, why)
            if loading:
                raise ValueError(why)


def send(ours: socket.socket, command: Mapping[str, Any]) -> None:
    """One command, as a line. OSError if the process does not take it."""
    ours.sendall(json.dumps(command).encode() + b"\n")


def obituary(exit: int | None, log_file: Path) -> str:
    """What to say of a process that died by itself."""
    hint = ""
    if exit == -signal.SIGKILL:
        hint = " the system kills the largest process when memory runs out;"
    how = failure.manner(exit)
    return f"the chat process ended ({how});{hint} ask again, chat/{log_file.name} says more"
