"""The warm process: has imported everything heavy, and forks a worker when asked.

A fork costs 0.02 s where a new interpreter with torch, transformers and lm-eval costs 4 to 9 s.
It runs no tensor operation and touches no CUDA, because neither survives a fork. It talks over one
socket: a request in, `pid` and later `exit` out. Once the socket closes it starts nothing more, and
leaves when its last worker has. A request for a chat brings the chat's own socket along.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.devices import Place

PRELOAD = (
    "torch",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "lm_eval.models.huggingface",
    "backend.execute",
    "backend.environment",
    "jobs.worker",
)
CHAT_PRELOAD = (
    "torch",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "backend.chat",
    "jobs.chat_worker",
)
REQUEST_BYTES = 1 << 16


class Warm:
    """One thread, one selector: requests on the socket, deaths of children on the wake-up pipe."""

    def __init__(self, requests: socket.socket) -> None:
        self.requests = requests
        self.children: dict[int, str] = {}  # pid -> run id
        self.open = True
        self.deaths, self.wake = socket.socketpair()
        for end in (self.deaths, self.wake):
            end.setblocking(False)
        signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # makes the wake-up happen
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def serve(self) -> None:
        """Until the parent is gone and every worker has ended."""
        with selectors.DefaultSelector() as ready:
            ready.register(self.requests, selectors.EVENT_READ)
            ready.register(self.deaths, selectors.EVENT_READ)
            while self.open or self.children:
                sources = [key.fileobj for key, _ in ready.select()]
                if self.deaths in sources:
                    self.reap()
                if self.requests in sources and not self.answer():
                    ready.unregister(self.requests)

    def answer(self) -> bool:
        """Take one request -> False once the parent is gone."""
        data, passed, _, _ = socket.recv_fds(self.requests, REQUEST_BYTES, 1)
        if not data:
            self.open = False
            return False
        self.fork(json.loads(data), passed)
        return True

    def fork(self, request: dict[str, Any], passed: list[int]) -> None:
        """Start a worker for {run, folder, place}, or a chat for {run, log, place} and a socket."""
        try:
            pid = os.fork()
        except OSError as error:
            self.tell(run=request["run"], exit=None, why=f"no new process: {error.strerror}")
        else:
            if pid == 0:
                self.become(request, passed)
            self.children[pid] = request["run"]
            self.tell(run=request["run"], pid=pid)
        for fd in passed:
            os.close(fd)  # whoever holds the other end must see when the child's end is gone

    def become(self, request: dict[str, Any], passed: list[int]) -> None:
        """In the child. Never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self.requests, self.deaths, self.wake):
                end.close()
            status = work(request, passed)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):  # a full disk, a closed stream
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def reap(self) -> None:
        """Report every child that ended: exit status, or minus the signal's number."""
        with suppress(BlockingIOError):
            self.deaths.recv(4096)
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self.tell(run=self.children.pop(pid), exit=os.waitstatus_to_exitcode(status))

    def tell(self, **message: Any) -> None:
        """Send one message to the parent, if it still listens."""
        with suppress(OSError):
            self.requests.send(json.dumps(message).encode())


def work(request: dict[str, Any], passed: list[int]) -> int:
    """What the child was forked for -> exit status."""
    place = Place(**request["place"])
    if passed:
        from jobs.chat_worker import serve, settle_in

        settle_in(Path(request["log"]), place)
        return serve(socket.socket(fileno=passed[0]))
    from jobs import worker

    folder = Path(request["folder"])
    return worker.work(folder, place, worker.settle_in(folder, place))


def load(modules: tuple[str, ...]) -> None:
    """Import everything a worker needs, then keep the collector from touching the shared pages."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            traceback.print_exc()  # whoever needs it meets the same error, with the run's name
    _load_parts()
    gc.collect()
    gc.freeze()


def _load_parts() -> None:
    from backend.formats import FORMATS
    from backend.methods import METHODS
    from backend.metrics import METRICS

    for registry in (FORMATS, METHODS, METRICS):
        registry.load()


def main(argv: list[str]) -> None:
    """`python -m jobs.warm FD MODULE...`: FD is our end of a socket pair."""
    requests = socket.socket(fileno=int(argv[0]))
    requests.set_inheritable(False)
    warm = Warm(requests)
    load(tuple(argv[1:]))
    warm.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
