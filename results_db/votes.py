"""Votes: cast, taken back and read. votes.jsonl is the truth, the database its copy."""

import hashlib
import hmac
import logging
import os
import secrets
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from results_db.database import StoreError
from results_db.events import Row, plain
from results_db.store import Store
from results_db.vote import FIELDS, Vote, check_time
from results_db.vote_log import RETRACT, VOTE, Head, VoteLog
from results_db.vote_rows import BATCH, copied, copy
from results_db.vote_table import EXCLUDING, IS_VOID, VoteTable

__all__ = [
    "EXCLUDING",
    "FILE",
    "IS_VOID",
    "Vote",
    "VoteTable",
    "Votes",
    "hashed",
    "home_key",
]

FILE = "votes.jsonl"  # in the home folder
KEY = "votes.key"

TAKES_NONE = "no vote is taken until it is put back, or `quantarena rebuild` has copied it anew"

log = logging.getLogger(__name__)


def home_key(home: Path) -> bytes:
    """The home's secret for hashing voters, made at first use, readable by this user alone."""
    path = home / KEY
    with suppress(FileNotFoundError):
        return path.read_bytes()
    part = path.with_name(f".{KEY}.{secrets.token_hex(4)}")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(fd)
        with suppress(FileExistsError):  # whoever was first decides
            os.link(part, path)
    finally:
        part.unlink()
    return path.read_bytes()


def hashed(key: bytes, text: str) -> str:
    """A session or an address as it is stored: the same for the same text, not to be undone."""
    return hmac.new(key, text.encode("utf-8", "backslashreplace"), hashlib.sha256).hexdigest()[:32]


class Votes(VoteTable):
    """All votes of a home. Safe from any thread of the one process that owns the home."""

    def __init__(self, store: Store, path: Path) -> None:
        """Open `path`, and copy into the store what it lacks. What is wrong is in `problem`."""
        super().__init__(store)
        self._log = VoteLog(path)
        self._copied = copied(store)
        self._mismatch = _mismatch(self._log, self._copied)
        self._voted = set(store.frame("SELECT battle_id FROM votes")["battle_id"])
        self._void = set(store.frame("SELECT battle_id FROM retractions")["battle_id"])
        self._casting = threading.Lock()
        self._copying = threading.Lock()
        if not self._mismatch:
            self._learn()
            self._try_to_copy()

    @property
    def problem(self) -> str:
        """Why no vote can be taken, in one sentence; "" if nothing is wrong."""
        return self._mismatch or self._log.problem

    @property
    def version(self) -> int:
        """How many entries readers see; grows with every vote and every retraction."""
        return self._copied.seq

    def cast(self, vote: Vote) -> bool:
        """Count a vote -> True once it is on the disk; False if its battle has one or is void.

        ValueError in one sentence if it cannot be stored: then nothing of it was counted.
        """
        return self.cast_all([vote]) == 1

    def cast_all(self, votes: Iterable[Vote]) -> int:
        """Count votes whose battles have none, many per write -> how many were counted."""
        counted = 0
        remaining = iter(votes)
        while some := list(islice(remaining, BATCH)):
            counted += self._cast_some(some)
        return counted

    def retract(self, battle_id: str, tstamp: float) -> bool:
        """Take the vote on a battle back; the battle is void for ever. False if it has none."""
        with self._casting:
            self._check()
            if battle_id not in self._voted or battle_id in self._void:
                return False
            self._log.append(RETRACT, {"battle_id": battle_id, "tstamp": check_time(tstamp)})
            self._void.add(battle_id)
        self._try_to_copy()
        return True

    def catch_up(self) -> None:
        """Copy into the database whatever the file has more."""
        with self._copying:
            self._copy()

    def _copy(self) -> None:
        """The work of `catch_up`, under its lock."""
        while self._copied.ends < self._log.head.ends:
            entries = list(islice(self._log.read(self._copied.ends), BATCH))
            self._store.write(partial(copy, entries=entries))
            last = entries[-1]
            self._copied = Head(last.seq, last.hash, last.ends)

    def _cast_some(self, votes: Sequence[Vote]) -> int:
        fresh: dict[str, Row] = {}
        with self._casting:
            self._check()
            for vote in votes:
                if vote.battle_id not in self._voted:
                    fresh.setdefault(vote.battle_id, _data(vote))
            if fresh:
                self._log.append_all(VOTE, list(fresh.values()))
                self._voted.update(fresh)
        self._try_to_copy()
        return len(fresh)

    def _learn(self) -> None:
        """Remember the battles of entries that the database does not have yet."""
        try:
            for entry in self._log.read(self._copied.ends):
                seen = {VOTE: self._voted, RETRACT: self._void}[entry.type]
                seen.add(entry.data["battle_id"])
        except (KeyError, TypeError, ValueError) as error:
            self._mismatch = (
                f"{self._log.path.name} holds what is no vote ({error!r}); {TAKES_NONE}."
            )

    def _check(self) -> None:
        if self.problem:
            raise StoreError(self.problem)

    def _try_to_copy(self) -> None:
        """A vote on the disk counts, whatever the database says: the next one copies it too.

        A voter does not wait for a copy under way: whoever makes it looks again after letting go.
        """
        try:
            while self._copied.ends < self._log.head.ends and self._copying.acquire(blocking=False):
                try:
                    self._copy()
                finally:
                    self._copying.release()
        except Exception:
            log.exception("votes are in %s and not yet in the database", self._log.path)


def _mismatch(log: VoteLog, copy: Head) -> str:
    """Why the database is no copy of the file; "" if it is one, or of its beginning."""
    if copy.ends > log.head.ends and not log.problem:
        return (
            f"{log.path.name} ends after entry {log.head.seq} and the database has copied "
            f"{copy.seq}: entries are missing; {TAKES_NONE}."
        )
    if copy.ends <= log.head.ends and not log.holds(copy):
        return (
            f"Entry {copy.seq} of {log.path.name} is not the one that the database has copied: "
            f"the file was replaced; {TAKES_NONE}."
        )
    return ""


def _data(vote: Vote) -> Row:
    """What the log keeps of a vote: plain JSON, in text that any encoding can hold."""
    return _encodable(plain({name: getattr(vote, name) for name in FIELDS}))


def _encodable(value: Any) -> Any:
    """Lone surrogates, which are no characters, become U+FFFD."""
    if isinstance(value, str):
        return value if value.isascii() else _joined(value)
    if isinstance(value, dict):
        return {_encodable(key): _encodable(inner) for key, inner in value.items()}
    return [_encodable(inner) for inner in value] if isinstance(value, list) else value


def _joined(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
