"""File locks that say who is alive, and the process groups of those who held them.

The operating system releases a lock whatever the death, so it needs no clean-up and no clock.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

PROBES = 50  # a probe by `held` has the lock for microseconds; 50 x 10 ms outlast any of them


def take(path: Path, content: Mapping[str, Any], *, patient: bool = True) -> int | None:
    """Lock `path` and write who holds it -> file descriptor to keep; None if another has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for _ in range(PROBES if patient else 1):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
            continue
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(dict(content)).encode(), 0)
        return fd
    os.close(fd)
    return None


def held(path: Path) -> bool:
    """True while a living process holds the lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def content(path: Path) -> dict[str, Any]:
    """What the last holder wrote about itself; {} if nothing readable."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def myself() -> dict[str, Any]:
    """pid, process group and start time (unix seconds) of this process."""
    started = psutil.Process().create_time()
    return {"pid": os.getpid(), "group": os.getpgrp(), "started": started}


def living(holder: Mapping[str, Any]) -> bool:
    """True if the process described by `myself()` runs; a reused pid has another start time."""
    try:
        process = psutil.Process(holder["pid"])
        same = abs(process.create_time() - holder["started"]) < 0.1
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def members(holder: Mapping[str, Any]) -> list[int]:
    """Living pids of the holder's process group; [] once the number belongs to somebody else."""
    group, started = holder.get("group"), holder.get("started")
    if not group or not started or group == os.getpgrp():
        return []
    found = []
    for process in psutil.process_iter(["pid", "create_time", "status"]):
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append((process.pid, process.info["create_time"]))
    ours = all(born > started - 0.1 for _, born in found)
    leader = dict(found).get(group, started)
    return [pid for pid, _ in found] if ours and abs(leader - started) < 0.1 else []


def send(holder: Mapping[str, Any], number: signal.Signals) -> bool:
    """Signal everybody in the holder's process group -> whether there was anybody."""
    if not members(holder):
        return False
    with suppress(ProcessLookupError):
        os.killpg(holder["group"], number)
    return True
