"""Run folders: their names, their files, and how one comes into being whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.events import append

RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")  # UTC date, time, and six random digits
SPEC = "spec.json"  # what decides the numbers
JOB = "job.json"  # what decides when and where
LOCK = "lock"
LOG = "log.txt"
CANCEL = "cancel"
TAIL = 1 << 18  # bytes of a log that are looked at for its last lines


@dataclass(frozen=True)
class Draft:
    """A run about to be submitted."""

    run_id: str
    spec: Mapping[str, Any]
    job: Mapping[str, Any]


def new_id() -> str:
    """Sortable by time, readable, and safe as a file name: 20261124-213501-abc123."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def folder_of(home: Path, run_id: str) -> Path:
    """The run's folder. ValueError if there is none; an id is checked before it becomes a path."""
    folder = home / "runs" / run_id
    if not RUN_ID.fullmatch(run_id) or not folder.is_dir():
        raise ValueError(f"there is no run {run_id!r} in {home}")
    return folder


def run_ids(home: Path) -> list[str]:
    """Every run of this home, oldest second first."""
    with suppress(FileNotFoundError):
        return sorted(name for name in os.listdir(home / "runs") if RUN_ID.fullmatch(name))
    return []


def create(home: Path, drafts: Sequence[Draft]) -> None:
    """Make all folders or, where the disk refuses, none."""
    runs = home / "runs"
    try:
        for draft in drafts:
            _write(runs / f".{draft.run_id}", draft)
        for draft in drafts:
            (runs / f".{draft.run_id}").rename(runs / draft.run_id)
    except BaseException:
        for draft in drafts:
            shutil.rmtree(runs / f".{draft.run_id}", ignore_errors=True)
            shutil.rmtree(runs / draft.run_id, ignore_errors=True)
        raise


def _write(folder: Path, draft: Draft) -> None:
    folder.mkdir(parents=True)
    _write_json(folder / SPEC, draft.spec)
    _write_json(folder / JOB, draft.job)
    append(folder, "submitted", **draft.job)
    append(folder, "state", state="queued")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(dict(data), file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())  # an acknowledged run survives a power cut


@contextmanager
def writing(home: Path, failed: str) -> Iterator[None]:
    """What the disk refuses becomes one sentence; `failed` says what did not happen."""
    try:
        yield
    except OSError as error:
        reason = f"{home} cannot be written ({error.strerror}): {failed}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"no space is left in {home}: {failed}; free some and try again"
        raise ValueError(reason) from error


def tail(path: Path, lines: int) -> str:
    """The last lines of a log; "" if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
