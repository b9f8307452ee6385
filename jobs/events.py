"""A run's events: one JSON object a line, appended whole, read from any byte offset."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

Event = dict[str, Any]  # {"t": unix seconds, "type": ..., and the fields of that type}

EVENTS = "events.jsonl"
MAX_TEXT = 16_384  # characters of one text; a traceback through a deep model can have far more
MAX_LINE = 1 << 20  # bytes; long series belong into items/, not into an event


class State(StrEnum):
    """Where a run stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True if nothing more happens unless somebody asks for it."""
        return self not in (State.QUEUED, State.RUNNING)


def append(folder: Path, type: str, **data: Any) -> None:
    """Add one event in one write. On a full disk nothing of it stays and OSError is raised."""
    line = encode({"t": time.time(), "type": type, **data})
    fd = os.open(folder / EVENTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line  # the writer before died inside a line; readers skip what it left
        if os.write(fd, line) < len(line):
            os.ftruncate(fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / EVENTS))
    finally:
        os.close(fd)


def read(folder: Path, offset: int = 0) -> tuple[list[Event], int]:
    """Events from byte `offset` on -> (events, offset after them). A torn last line waits."""
    try:
        with (folder / EVENTS).open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    found = (decode(line) for line in data[:end].split(b"\n"))
    return [event for event in found if event is not None], offset + end


def encode(event: Mapping[str, Any]) -> bytes:
    """One line of strict JSON: long texts cut, NaN and infinity as strings."""
    line = json.dumps(plain(event), allow_nan=False).encode() + b"\n"  # ASCII: no odd line ends
    if len(line) > MAX_LINE:
        raise ValueError(
            f"a {event.get('type')} event of {len(line)} bytes is over the {MAX_LINE} that a line "
            "may have; write long series to a file in items/"
        )
    return line


def decode(line: bytes) -> Event | None:
    """One line -> event; None for the remains of a torn one."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(event, dict) and isinstance(event.get("type"), str) and "t" in event
    return event if whole else None


def plain(value: Any) -> Any:
    """JSON data with long texts cut and non-finite numbers as "nan", "inf", "-inf"."""
    if isinstance(value, str):
        return cut(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """The beginning and, as a traceback ends with its cause, three times as much of the end."""
    if len(text) <= limit:
        return text
    head, tail = limit // 4, limit - limit // 4
    return f"{text[:head]}\n[... {len(text) - limit} characters cut ...]\n{text[-tail:]}"


def state_of(folder: Path) -> State:
    """The last state that the events name."""
    states = [event["state"] for event in read(folder)[0] if event["type"] == "state"]
    return State(states[-1]) if states else State.QUEUED
