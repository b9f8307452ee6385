"""Launchers: how a worker gets started, and who tells that it ended."""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jobs import warm
from jobs.devices import Place

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]  # where our packages lie, in a checkout or installed
MESSAGE_BYTES = 1 << 16


@dataclass(frozen=True)
class Ended:
    """A worker that is gone."""

    run_id: str
    exit: int | None  # exit status, minus the signal's number, or None: nobody saw
    why: str = ""


class Launcher(Protocol):
    """Starts one worker per call; none of the calls waits for it."""

    def open(self) -> None:
        """Get ready, without waiting for it."""

    def start(self, folder: Path, place: Place) -> None:
        """Start a worker on the run in `folder`."""

    def ended(self) -> list[Ended]:
        """Workers that ended since the last call, each once."""

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until something ends."""

    def close(self) -> None:
        """Start nothing more. Workers under way finish their stage."""


class WarmLauncher:
    """Workers forked from a warm process, which is started on demand and again if it dies."""

    def __init__(
        self, home: Path, preload: tuple[str, ...] = warm.PRELOAD, log: str = "warm.log"
    ) -> None:
        self.home = home
        self.preload = preload
        self.log = home / log
        self.pids: dict[str, int | None] = {}  # run id -> pid of its living worker, once known
        self._ended: list[Ended] = []
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        """Start the warm process, if none runs; its imports take seconds, this call does not."""
        if self._socket is not None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self.log.open("wb") as out:
            fd = theirs.fileno()
            self._process = subprocess.Popen(
                # -P: a folder named jobs where the user stands must not take our place
                [sys.executable, "-P", "-m", "jobs.warm", str(fd), *self.preload],
                env={**os.environ, "PYTHONPATH": _search_path()},
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C in the terminal is not for it
            )
        ours.setblocking(False)
        self._socket = ours

    def start(self, folder: Path, place: Place) -> None:
        """Ask for a fork. If the warm process is gone, the run is among the ended ones."""
        self._ask(folder.name, place, {"folder": str(folder)})

    def start_chat(self, name: str, log: Path, place: Place, end: socket.socket) -> None:
        """Ask for a fork that chats over `end`; if there is none, `end` closes by itself."""
        self._ask(name, place, {"log": str(log)}, [end.fileno()])

    def _ask(self, name: str, place: Place, what: dict, passed: Sequence[int] = ()) -> None:
        self.open()
        assert self._socket is not None
        request = {"run": name, "place": place.data(), **what}
        self.pids[name] = None
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], passed)
        except OSError:
            self._lost()

    def ended(self) -> list[Ended]:
        """Workers that ended since the last call, each once."""
        while self._socket is not None and (data := self._receive()) is not None:
            if data:
                self._hear(json.loads(data))
            else:
                self._lost()
        ended, self._ended = self._ended, []
        return ended

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until something ends."""
        if self._socket is None:
            time.sleep(seconds)
        else:
            select.select([self._socket], [], [], seconds)

    def close(self) -> None:
        """Start nothing more. The warm process leaves when its last worker has."""
        if self._socket is None or self._process is None:
            return
        self._socket.close()
        self._socket = None
        if not self.pids:
            self._process.terminate()  # it may still be importing
            self._process.wait()

    def _receive(self) -> bytes | None:
        """The next message, b"" at the end, None if there is none yet."""
        assert self._socket is not None
        try:
            return self._socket.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except ConnectionError:
            return b""

    def _hear(self, message: dict) -> None:
        run_id = message["run"]
        if "pid" in message:
            self.pids[run_id] = message["pid"]
        elif self.pids.pop(run_id, -1) != -1:
            self._ended.append(Ended(run_id, message["exit"], message.get("why", "")))

    def _lost(self) -> None:
        """The warm process is gone. Its workers may live on; their locks tell."""
        assert self._socket is not None
        assert self._process is not None
        self._socket.close()
        self._socket = None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        why = f"the process that starts workers ended; {self.log} says why"
        log.error("%s", why)
        self._ended += [Ended(run_id, None, why) for run_id in self.pids]
        self.pids.clear()


def _search_path() -> str:
    """PYTHONPATH with our packages first."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
