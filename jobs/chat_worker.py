"""One chat process: holds one model, answers over a socket, leaves when the socket closes.

JSON lines. In: {"do": "load" | "generate" | "stop" | "score", ...}. Out: {"event": ..., ...}:
`grows` and `ready` of a load; `started`, `tokens` and `done` of an answer; `scored`; `memory`;
`failed`, with the id of what failed unless that is the load, and `ends` if the process does now.
One thing is done at a time, in the order asked; only `stop` is heard at once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from jobs import failure, folders, worker
from jobs.devices import Place

if TYPE_CHECKING:
    from torch import Tensor

    from backend.chat import AnswerText, Opened
    from backend.spec import RunSpec

log = logging.getLogger(__name__)

ENDED, FAILED = 0, 1  # exit statuses
NICE = 1  # a little behind the web server, level with the workers of the queue
OOM_SCORE = 500  # where memory runs out the system ends a chat before it ends the server
WARM_UP = 8  # tokens read once before the first answer: what is set up lazily costs 0.1 s
SPARE_DISK_BYTES = 1 << 30

Command = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """The model of this process."""

    opened: Opened
    device: str


class Chat:
    """Two threads: this one works, the other listens."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.stopped: set[int] = set()  # answers that were asked to stop
        self.loaded: Loaded | None = None

    def listen(self) -> None:
        """Take commands until the other end is closed or dead; then this process is over."""
        with suppress(OSError, ValueError), self.connection.makefile("rb") as lines:
            for line in lines:
                command = json.loads(line)
                if command["do"] == "stop":
                    self.stopped.add(command["id"])
                else:
                    self.commands.put(command)
        os._exit(ENDED)

    def tell(self, event: str, **data: Any) -> None:
        """Send one event."""
        try:
            self.connection.sendall(json.dumps({"event": event, **data}).encode() + b"\n")
        except OSError:
            os._exit(ENDED)

    def work(self) -> int:
        """Do what is asked -> exit status, once something went wrong that may have left traces."""
        while True:
            command = self.commands.get()
            about = {"id": command["id"]} if "id" in command else {}
            try:
                DOES[command["do"]](self, command)
            except ValueError as error:
                log.warning("%s: %s", command["do"], error)
                self.tell("failed", **about, why=one_sentence(error))
            except Exception as error:
                log.exception("%s failed", command["do"])
                why = failure.sentences(error, "chat")[0]
                self.tell("failed", **about, why=why, ends=True)
                return FAILED

    # What it does

    def load(self, command: Command) -> None:
        """{folder, device, dtype}: open the run in the folder."""
        import torch

        from backend.chat import open_run
        from backend.execute import BLOCKS

        folder, device = Path(command["folder"]), command["device"]
        opened = open_run(
            read_spec(folder),
            folder / BLOCKS,
            device=device,
            dtype=getattr(torch, command["dtype"]) if command["dtype"] else None,
            falling_back=lambda: self.tell("grows"),
        )
        run = opened.run
        list(run.generate(torch.arange(WARM_UP)[None] % run.vocabulary, max_new=2))
        release_memory()
        self.loaded = Loaded(opened, device)
        self.tell(
            "ready",
            packed=opened.packed,
            dtype=run.dtype,
            notes=opened.notes,
            bytes=memory_bytes(device),
        )

    def generate(self, command: Command) -> None:
        """{id, messages, sampling, prefix}: answer, token by token."""
        from backend import chat
        from backend.dialogue import Message, Sampling

        began = time.perf_counter()
        opened, run = self._model().opened, self._model().opened.run
        sampling = Sampling(**command["sampling"])
        prompt = chat.prompt_of(run, [Message(**said) for said in command["messages"]])
        prefix = checked_tokens(command["prefix"], run.vocabulary)
        writer = chat.AnswerText(
            chat.Detokenizer(run.tokenizer, prompt.ids), "" if prompt.templated else chat.NEXT_TURN
        )
        plain = () if prompt.templated else (chat.NO_TEMPLATE,)
        self.tell(
            "started",
            id=command["id"],
            dropped=prompt.dropped,
            notes=[*opened.notes, *plain],
            pieces=[[token, writer.push(token)] for token in prefix],
        )
        tokens = chat.answer(run, prompt.ids, sampling, prefix)
        count, stopped, first_s = 0, False, None
        while not (stopped := command["id"] in self.stopped) and not writer.ended:
            token = next(tokens, None)
            if token is None:
                break
            count += 1
            first_s = first_s or time.perf_counter() - began
            self._tell_token(command["id"], token, writer, first_s)
        given = len(prompt.ids) + len(prefix)
        finish = chat.finish_of(count, sampling, given, run.context)
        finish = "end" if writer.ended else "stopped" if stopped else finish
        self.tell(
            "done",
            id=command["id"],
            finish=finish,
            rest=writer.flush(),
            ttft_s=first_s,
            seconds=time.perf_counter() - began,
        )
        self.stopped.discard(command["id"])
        self.tell("memory", bytes=memory_bytes(self._model().device))

    def _tell_token(self, id: int, token: int, writer: AnswerText, first_s: float) -> None:
        self.tell("tokens", id=id, pieces=[[token, writer.push(token)]], ttft_s=first_s)

    def score(self, command: Command) -> None:
        """{id, messages, tokens, write, read, dtype}: log-probabilities along the answer's tokens.

        `write`: put them into this file. `read`: compare with those of another model, whose
        16-bit model this is; says only its dtype if that is not `dtype`. Neither: with itself.
        """
        from backend import chat
        from backend.dialogue import Message

        run = self._model().opened.run
        if command["dtype"] not in ("", run.dtype):
            self.tell("scored", id=command["id"], dtype=run.dtype)
            return
        tokens = checked_tokens(command["tokens"], run.vocabulary)
        prompt = chat.prompt_of(run, [Message(**said) for said in command["messages"]])
        own = chat.log_probs(run, [*prompt.ids, *tokens], len(prompt.ids))  # [T, V]
        if command["write"]:
            write_rows(Path(command["write"]), own)
            self.tell("scored", id=command["id"], dtype=run.dtype)
            return
        other = read_rows(Path(command["read"])) if command["read"] else own
        found = chat.score_rows(own, other, tokens)
        self.tell(
            "scored",
            id=command["id"],
            dtype=run.dtype,
            kld=found.kld.tolist(),
            nll=found.nll.tolist(),
            base_nll=found.nll_base.tolist(),
            top=tops(chat.top_tokens(run.tokenizer, other)),
            base_top=tops(chat.top_tokens(run.tokenizer, own)),
        )

    def _model(self) -> Loaded:
        if self.loaded is None:
            raise ValueError("no model is loaded")
        return self.loaded


DOES: dict[str, Callable[[Chat, Command], None]] = {
    "load": Chat.load,
    "generate": Chat.generate,
    "score": Chat.score,
}


def serve(connection: socket.socket) -> int:
    """Work for the other end of the connection -> exit status."""
    chat = Chat(connection)
    threading.Thread(target=chat.listen, daemon=True, name="listen").start()
    return chat.work()


def settle_in(path: Path, place: Place) -> None:
    """Make this process a chat: own session, log file, GPU, threads, and manners."""
    with suppress(PermissionError):  # it leads a group already
        os.setsid()
    worker._log_to(path)
    os.nice(NICE)
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    if place.device == "cpu" or place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu or ""
    if place.threads and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(place.threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for who started us


def read_spec(folder: Path) -> RunSpec:
    """The run's spec. ValueError in one sentence where this program cannot read it."""
    from backend.spec import RunSpec

    try:
        return RunSpec.model_validate_json((folder / folders.SPEC).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        log.warning("%s", error)
        raise ValueError(
            f"the spec of run {folder.name} is not understood by this version"
        ) from None


def one_sentence(error: Exception) -> str:
    """The error's text on one line."""
    return " ".join(str(error).split())


def checked_tokens(tokens: list[int], vocabulary: int) -> list[int]:
    """The tokens. ValueError if the model has no such one."""
    if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
        raise ValueError(f"token {wrong[0]} is none of the {vocabulary} that the model has")
    return tokens


def write_rows(path: Path, rows: Tensor) -> None:
    """rows [T, V] fp32 into a file. ValueError with the numbers if the disk has no room."""
    import numpy as np

    size, free = rows.numel() * rows.element_size(), psutil.disk_usage(str(path.parent)).free
    if size + SPARE_DISK_BYTES > free:
        raise ValueError(
            f"comparing these tokens takes {size / 1e9:.1f} GB on disk and {free / 1e9:.1f} GB "
            "are free; free some or compare a shorter answer"
        )
    with path.open("wb") as file:
        np.save(file, rows.numpy())


def read_rows(path: Path) -> Tensor:
    """The inverse of write_rows, read as it is used."""
    import numpy as np
    import torch

    return torch.from_numpy(np.load(path, mmap_mode="c"))


def tops(rows: list[list[Any]]) -> list[list[dict[str, Any]]]:
    """Likeliest tokens as JSON data."""
    return [[asdict(top) for top in row] for row in rows]


def memory_bytes(device: str) -> int:
    """What would be free if this process ended: shared pages are not its own."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_reserved())
    with suppress(psutil.Error, OSError):
        return int(psutil.Process().memory_full_info().uss)
    return int(psutil.Process().memory_info().rss)


def release_memory() -> None:
    """Give back what loading took for a moment."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
