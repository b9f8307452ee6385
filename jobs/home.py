"""The home folder: where it is, who owns its database, how to reach that process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import platformdirs

from jobs import locks

VARIABLE = "QUANTARENA_HOME"
LOCK = "server.lock"
ADDRESS = "server.json"
DATABASE = "results.duckdb"


@dataclass(frozen=True)
class Server:
    """Where the process that owns a home answers."""

    url: str
    pid: int
    token: str = ""


def home_folder(given: str | Path | None = None) -> Path:
    """`given` (--home), else $QUANTARENA_HOME, else the platform's data folder; made if missing."""
    chosen = given or os.environ.get(VARIABLE) or platformdirs.user_data_path("quantarena")
    home = Path(chosen).expanduser().resolve()
    try:
        (home / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"the home folder {home} cannot be made ({error.strerror}); choose another with --home"
        ) from None
    return home


class Ownership:
    """This process owns the home's database until `release` or its death."""

    def __init__(self, home: Path) -> None:
        """ValueError in one sentence, with the pid, if another process owns it."""
        self.home = home
        self._fd = locks.take(home / LOCK, locks.myself(), patient=False)
        if self._fd is None:
            raise ValueError(taken(home))

    def announce(self, url: str, token: str = "") -> None:
        """Write server.json, readable by this user alone, for clients on this machine."""
        write_private(self.home / ADDRESS, asdict(Server(url, os.getpid(), token)))

    def release(self) -> None:
        """Let another process have the home."""
        if self._fd is not None:
            (self.home / ADDRESS).unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Ownership:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.release()


def taken(home: Path) -> str:
    """The sentence for a second server."""
    address = server(home)
    pid = locks.content(home / LOCK).get("pid", "unknown")
    where = f", {address.url}" if address else ""
    return (
        f"{home} is in use by another QuantArena (process {pid}{where}); "
        "use that one, stop it, or choose another --home"
    )


def owned(home: Path) -> bool:
    """True while some process owns the home."""
    return locks.held(home / LOCK)


def server(home: Path) -> Server | None:
    """The running server of this home; None where nobody serves, whatever files a crash left."""
    data = locks.content(home / ADDRESS)
    if not owned(home) or data.get("pid") != locks.content(home / LOCK).get("pid"):
        return None
    with suppress(TypeError):
        return Server(**data)
    return None


def write_private(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step; mode 600 from its first byte."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump(dict(data), file)
    part.replace(path)
