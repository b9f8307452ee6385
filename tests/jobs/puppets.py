"""Chat processes without models: threads that speak their language and do as a test says."""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.chat_types import Message, Sampling
from jobs.devices import Place
from jobs.events import append
from jobs.launch import Ended

DEADLINE_S = 60  # for anything a test waits for; reached only when it fails


def make_run(home: Path, number: int, *, state: str = "done", **spec: Any) -> str:
    """A run folder with what the chat reads of it -> run id. Number 0 is the 16-bit model."""
    run_id = f"20261124-120000-{number:06x}"
    folder = home / "runs" / run_id
    folder.mkdir(parents=True)
    content = {"kind": "run", "model": {"id": "demo"}, "steps": [{"kind": "rtn"}] * bool(number)}
    (folder / "spec.json").write_text(json.dumps(content | spec))
    (folder / "job.json").write_text(json.dumps({"artifact_id": f"{number:012x}"}))
    append(folder, "state", state=state)
    return run_id


def ask(text: str) -> list[Message]:
    return [Message("user", text)]


GREEDY = Sampling(max_new=8)


class Puppet:
    """One process. It answers a question with its words, and waits where it is told to."""

    def __init__(self, stage: Stage, name: str, connection: socket.socket) -> None:
        self.stage, self.name, self.connection = stage, name, connection
        self.run_id = name.split()[0]
        self.dtype = ""
        self.commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.stopped: set[int] = set()
        self.heard = threading.Condition()
        self.dead = False
        for work in (self.listen, self.work):
            threading.Thread(target=work, daemon=True).start()

    def listen(self) -> None:
        with self.connection.makefile("rb") as lines:
            try:
                for line in lines:
                    command = json.loads(line)
                    with self.stage.changed:
                        self.stage.heard.append((self.run_id, command))
                        if command["do"] == "stop":
                            self.stopped.add(command["id"])
                        self.stage.changed.notify_all()
                    if command["do"] != "stop":
                        self.commands.put(command)
            except OSError:
                pass
        self.die(0)

    def die(self, exit: int) -> None:
        """Close the connection, as the system does for a process that ends."""
        with self.stage.changed:
            if self.dead:
                return
            self.dead = True
            self.stage.pids.pop(self.name, None)
            self.stage.exits.append(Ended(self.name, exit))
            self.stage.living.pop(self.run_id, None)
            self.stage.changed.notify_all()
        self.commands.put(None)
        self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def tell(self, event: str, **data: Any) -> None:
        if self.dead:
            return
        try:
            self.connection.sendall(json.dumps({"event": event, **data}).encode() + b"\n")
        except OSError:
            self.die(0)

    def work(self) -> None:
        while (command := self.commands.get()) is not None:
            getattr(self, command["do"])(command)

    def load(self, command: dict[str, Any]) -> None:
        self.wait("load")
        trouble = self.stage.troubles.pop(self.run_id, "")
        if trouble == "grows":
            self.tell("grows")
        elif trouble:
            self.tell("failed", why=trouble)
            return
        dtype = command["dtype"] or self.stage.dtypes.get(self.run_id, "bfloat16")
        self.dtype = dtype
        size = self.stage.sizes.get(self.run_id, 10)
        self.tell("ready", packed=True, dtype=dtype, notes=[], bytes=size)

    def generate(self, command: dict[str, Any]) -> None:
        words = command["messages"][-1]["content"].split()
        began = {"dropped": 0, "notes": [], "pieces": [[t, "|"] for t in command["prefix"]]}
        self.tell("started", id=command["id"], **began)
        if "break" in words:
            self.tell("failed", id=command["id"], why="it broke", ends=True)
            self.wait("break")
            self.die(1)
            return
        finish = "end"
        for at, word in enumerate(words):
            self.tell("tokens", id=command["id"], pieces=[[at, f" {word}"]], ttft_s=0.5)
            self.wait(word, command["id"])
            if command["id"] in self.stopped:
                finish = "stopped"
                break
        times = {"ttft_s": 0.5, "seconds": 1.5, "rest": ""} if "garble" not in words else {}
        self.tell("done", id=command["id"], finish=finish, **times)
        self.tell("memory", bytes=self.stage.sizes.get(self.run_id, 10))

    def score(self, command: dict[str, Any]) -> None:
        if command["write"]:
            Path(command["write"]).write_text("numbers")
        rows = {"kld": [0.5], "nll": [1.0], "base_nll": [2.0], "top": [[]], "base_top": [[]]}
        other = command["dtype"] not in ("", self.dtype)
        said = {} if command["write"] or other else rows
        if command["read"]:
            assert Path(command["read"]).read_text() == "numbers"
        self.wait("score")
        self.tell("scored", id=command["id"], dtype=self.dtype, **said)

    def wait(self, place: str, number: int = 0) -> None:
        """At a closed gate, until it opens, or the answer is stopped, or the process dies."""
        with self.stage.changed:
            self.stage.changed.wait_for(
                lambda: place not in self.stage.gates or number in self.stopped or self.dead,
                DEADLINE_S,
            )


class Stage:
    """A launcher of puppets, and everything a test can pull."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.pids: dict[str, int | None] = {}
        self.exits: list[Ended] = []
        self.living: dict[str, Puppet] = {}  # by run id
        self.started: list[str] = []  # run ids
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.gates: set[str] = set()  # words at which puppets wait
        self.troubles: dict[str, str] = {}  # run id -> what goes wrong at its next load
        self.sizes: dict[str, int] = {}  # run id -> bytes it says it takes
        self.dtypes: dict[str, str] = {}

    def start_chat(self, name: str, log: Path, place: Place, end: socket.socket) -> None:
        with self.changed:
            self.pids[name] = None
            self.started.append(name.split()[0])
            puppet = Puppet(self, name, socket.socket(fileno=os.dup(end.fileno())))
            self.living[puppet.run_id] = puppet
            self.changed.notify_all()

    def ended(self) -> list[Ended]:
        with self.changed:
            ends, self.exits = self.exits, []
            return ends

    def wait(self, seconds: float) -> None:
        with self.changed:
            self.changed.wait(seconds)

    def close(self) -> None:
        """Nothing is left to end."""

    # For tests

    def open(self, *places: str) -> None:
        """Open gates; as a launcher, without any, it is ready."""
        with self.changed:
            self.gates -= set(places)
            self.changed.notify_all()

    def until(self, done: Any) -> None:
        """Wait for something that puppets do."""
        with self.changed:
            assert self.changed.wait_for(done, DEADLINE_S), "waited too long"

    def asked(self, run_id: str = "") -> list[str]:
        """Last messages of the answers asked for, in order."""
        return [
            command["messages"][-1]["content"]
            for run, command in self.heard
            if command["do"] == "generate" and run_id in ("", run)
        ]


def texts(answers: Sequence[Any]) -> list[str]:
    """What they say in the end."""
    return [answer.wait(DEADLINE_S).text for answer in answers]
