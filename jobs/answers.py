"""Answers given before, on disk: the same question to the same weights is answered at once."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from jobs.chat_types import AnswerView, Message, Piece, Sampling

VERSION = 1  # raise when the same question gets another answer by our doing
LIMIT_BYTES = 256 << 20
KEPT_SHARE = 0.9  # of the limit, when the oldest files go
STORED = ("text", "given", "ttft_s", "seconds", "finish", "dropped", "notes", "packed", "dtype")


@dataclass(frozen=True)
class Question:
    """All that decides an answer, but for how the weights are held."""

    artifact_id: str
    messages: tuple[Message, ...]
    sampling: Sampling
    prefix: tuple[int, ...] = ()

    def digest(self) -> str:
        """Name of the answer's file."""
        said = [[message.role, message.content] for message in self.messages]
        parts = [VERSION, said, asdict(self.sampling.decisive()), self.prefix]
        return sha256(json.dumps(parts).encode()).hexdigest()[:32]


class AnswerCache:
    """One file per answer: HOME/chat/answers/DEVICE/ARTIFACT/MODE/DIGEST.json. Safe from threads.

    MODE says how the weights were held and computed with, "packed-bfloat16". The least recently
    used files go first. Files that cannot be read are as if they were not there.
    """

    def __init__(self, home: Path, *, device: str = "cpu", limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = home / "chat" / "answers"
        self.device = device.partition(":")[0]
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._size: int | None = None  # bytes of all files, once counted

    def mode(self, artifact_id: str) -> str:
        """How the artifact was held when it last answered; "" if it never did."""
        with suppress(OSError):
            found = [entry for entry in os.scandir(self._artifact(artifact_id)) if entry.is_dir()]
            if found:
                return max(found, key=lambda entry: entry.stat().st_mtime_ns).name
        return ""

    def get(self, question: Question, mode: str) -> AnswerView | None:
        """The answer given before."""
        path = self._path(question, mode)
        try:
            found = restored(json.loads(path.read_text(encoding="utf-8")))
            os.utime(path)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return found

    def put(self, question: Question, mode: str, view: AnswerView) -> None:
        """Keep an answer that ended by itself. A full disk costs the cache and nothing else."""
        if view.state != "done":
            return
        path = self._path(question, mode)
        data = json.dumps(stored(view)).encode()
        part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            return
        with self._lock:
            self._grow(len(data))

    def _grow(self, added: int) -> None:
        self._size = total(self._files()) if self._size is None else self._size + added
        if self._size > self.limit_bytes:
            self._size = self._shrink(round(self.limit_bytes * KEPT_SHARE))

    def _shrink(self, wanted: int) -> int:
        """Remove the least recently used until at most `wanted` bytes are left -> bytes left."""
        files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
        left = total(files)
        for path, stat in files:
            if left <= wanted:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                left -= stat.st_size
        return left

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.folder.glob("*/*/*/*"):  # parts that a crash left count and go too
            with suppress(OSError):
                found.append((path, path.stat()))
        return found

    def _artifact(self, artifact_id: str) -> Path:
        return self.folder / self.device / artifact_id

    def _path(self, question: Question, mode: str) -> Path:
        folder = self._artifact(question.artifact_id) / mode
        return folder / f"{question.digest()}.json"


def total(files: Sequence[tuple[Path, os.stat_result]]) -> int:
    """Bytes of the files."""
    return sum(stat.st_size for _, stat in files)


def stored(view: AnswerView) -> dict[str, Any]:
    """What is kept of an answer, as JSON data."""
    pieces = [[piece.token, piece.text] for piece in view.pieces]
    return {"pieces": pieces, **{name: getattr(view, name) for name in STORED}}


def restored(data: dict[str, Any]) -> AnswerView:
    """The inverse of `stored`. ValueError, TypeError or KeyError for anything else."""
    pieces = tuple(Piece(int(token), str(text)) for token, text in data["pieces"])
    known = {name: data[name] for name in STORED}
    view = AnswerView(state="done", cached=True, pieces=pieces, **known)
    if "".join(piece.text for piece in pieces) != view.text:
        raise ValueError("the text is not that of the pieces")
    return replace(view, notes=tuple(view.notes))
