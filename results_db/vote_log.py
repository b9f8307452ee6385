"""The log of votes: one JSON line per entry, each bound by its hash to the line before it.

A line is {"seq":1,"t":1.5,"type":"vote","data":{...},"prev":"...","hash":"..."}, in ASCII and
without blanks between its parts. `hash` is the SHA-256, in hex, of the previous line's hash (64
zeros before the first) followed by the line's own text up to `,"prev"` and a closing brace. So

    json.dumps({key: line[key] for key in ("seq", "t", "type", "data")}, separators=(",", ":"))

is what to hash after `prev`, and nothing can be changed, removed or put in between without
changing every hash from there on.
"""

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results_db.database import StoreError
from results_db.vote import FIELDS, Vote

VOTE = "vote"
RETRACT = "retract"
START = "0" * 64  # stands for the hash of a line before the first
MAX_LINE = 8 << 20  # bytes
PREV, HASH, CLOSE = b',"prev":"', b'","hash":"', b'"}\n'
TAIL = len(PREV) + len(HASH) + len(CLOSE) + 2 * len(START)
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Entry:
    """One line, read. `ends` is the byte of the file after it."""

    seq: int
    t: float  # unix seconds when it was written
    type: str
    data: Mapping[str, Any]
    prev: str
    hash: str
    ends: int

    def vote(self) -> Vote:
        """The vote of a VOTE entry; what a newer program wrote beside it is left out."""
        return Vote(**{name: self.data[name] for name in FIELDS if name in self.data})


@dataclass(frozen=True)
class Head:
    """A place between two lines: how many come before, the last one's hash, and their bytes."""

    seq: int = 0
    hash: str = START
    ends: int = 0

    def after(self, line: bytes) -> "Head":
        """The place after a line that follows this one."""
        own = line[-len(CLOSE) - len(START) : -len(CLOSE)].decode()
        return Head(self.seq + 1, own, self.ends + len(line))


class BrokenChain(StoreError):
    """A line that does not follow from the lines before it."""

    def __init__(self, path: Path, line: int, why: str) -> None:
        super().__init__(f"{path.name} is broken at line {line}: {why}.")
        self.line = line
        self.why = why


class VoteLog:
    """An open log. One process appends to it: the one that owns the database beside it.

    Opening never raises for what is in the file. A last line that a crash left half-written was
    never acknowledged: it moves to a file beside. Anything else that is wrong stays as it is:
    `problem` tells it, the lines before it can be read, and nothing can be appended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head = Head()
        self.problem = ""
        self._lock = threading.Lock()
        try:
            for head, _ in chain(path):
                self.head = head
            self._cut()
        except BrokenChain as error:
            self.problem = f"{error} No vote is taken; `quantarena check-votes` tells more."
        except OSError as error:
            self.problem = f"{path} cannot be opened ({error.strerror}); no vote is taken."

    def append(self, type: str, data: Mapping[str, Any]) -> Entry:
        """Add one entry; it is on the disk when this returns. StoreError if it cannot be."""
        return self.append_all(type, [data])[0]

    def append_all(self, type: str, items: Sequence[Mapping[str, Any]]) -> list[Entry]:
        """Add entries with one write: all of them or, where the disk refuses, none."""
        with self._lock:
            if self.problem:
                raise StoreError(self.problem)
            head, lines, added = self.head, [], []
            for data in items:
                lines.append(encode(head, time.time(), type, data))
                head = head.after(lines[-1])
                added.append(decode(lines[-1], head.ends))
            self._write(b"".join(lines))
            self.head = head
            return added

    def read(self, offset: int = 0) -> Iterator[Entry]:
        """Entries from byte `offset`, where a line begins, to what is the end now."""
        end = self.head.ends
        if offset >= end:
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            while offset < end:
                line = file.readline()
                offset += len(line)
                yield decode(line, offset)

    def holds(self, place: Head) -> bool:
        """True if `place` is one of this log's."""
        if not place.ends:
            return True
        end = place.hash.encode() + CLOSE
        with _opened(self.path, os.O_RDONLY) as (fd, _):
            return os.pread(fd, len(end), place.ends - len(end)) == end

    def _write(self, lines: bytes) -> None:
        """Add whole lines and wait for the disk; what it refuses leaves no byte behind."""
        new = os.O_CREAT if not self.head.ends else 0
        try:
            with _opened(self.path, os.O_WRONLY | os.O_APPEND | new) as (fd, size):
                if size != self.head.ends:
                    self.problem = (
                        f"{self.path.name} has {size} bytes where {self.head.ends} were written: "
                        "another program changed it; no vote is taken until the next start."
                    )
                    raise StoreError(self.problem)
                try:
                    _put(fd, lines)
                    if new:
                        _sync_folder(self.path.parent)
                except OSError:
                    self._take_back(fd)
                    raise
        except OSError as error:
            why = "no space is left" if error.errno in FULL else error.strerror
            raise StoreError(
                f"{self.path} cannot be written ({why}); nothing was counted."
            ) from error

    def _take_back(self, fd: int) -> None:
        try:
            os.ftruncate(fd, self.head.ends)
            os.fsync(fd)
        except OSError as error:
            self.problem = (
                f"The end of {self.path.name} is unknown after a failed write ({error.strerror}); "
                "no vote is taken until the next start."
            )

    def _cut(self) -> None:
        """Move what follows the last whole line to the file beside."""
        if not self.path.exists():
            return
        with _opened(self.path, os.O_RDWR) as (fd, size):
            if size > self.head.ends:
                _keep(self.path, os.pread(fd, size, self.head.ends), self.head)
                os.ftruncate(fd, self.head.ends)
                os.fsync(fd)


@dataclass(frozen=True)
class Check:
    """What `check` found. `head` is where the part that is whole ends."""

    head: Head
    votes: int
    retractions: int
    torn_bytes: int  # of a last line that was never finished, or is being written now
    broken_line: int | None
    why: str
    expected_at: int | None  # how many entries there were when the expected hash was the last


def check(path: Path, expect: str = "") -> Check:
    """Hold every line against the chain and against the rules of votes. Changes nothing.

    A file whose last lines were removed is whole in itself: only a hash noted earlier (`expect`)
    or the database can tell.
    """
    voted: set[str] = set()
    void: set[str] = set()
    head = Head()
    expected_at = 0 if expect == START else None
    line_number, why, torn = None, "", 0
    try:
        for whole, line in chain(path):
            _check_rules(path, whole, line, voted, void)
            head = whole
            expected_at = head.seq if head.hash == expect else expected_at
        torn = _size(path) - head.ends
    except BrokenChain as error:
        line_number, why = error.line, error.why
    return Check(head, len(voted), len(void), torn, line_number, why, expected_at)


def entries(path: Path) -> Iterator[Entry]:
    """Every whole entry, checked against the chain; changes nothing. BrokenChain where it is."""
    for head, line in chain(path):
        yield decode(line, head.ends)


def chain(path: Path) -> Iterator[tuple[Head, bytes]]:
    """(place after it, line) of every whole line; nothing where there is no file.

    BrokenChain at a line that does not follow. A last line without an end, or that is no JSON, is
    torn: the lines end before it.
    """
    size = _size(path)
    if not size:
        return
    head = Head()
    with path.open("rb") as file:
        while head.ends < size:
            line = file.readline(min(MAX_LINE, size - head.ends))
            why = _fault(line, head)
            if why and head.ends + len(line) == size and _torn(line):
                return
            if why:
                raise BrokenChain(path, head.seq + 1, why)
            head = head.after(line)
            yield head, line


def encode(head: Head, t: float, type: str, data: Mapping[str, Any]) -> bytes:
    """The line that follows `head`."""
    fields = {"seq": head.seq + 1, "t": t, "type": type, "data": data}
    try:
        body = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise StoreError(f"A {type} cannot be written as JSON: {error}.") from error
    line = b"".join((body[:-1], PREV, head.hash.encode(), HASH, _hash(head, body), CLOSE))
    if len(line) > MAX_LINE:
        raise StoreError(
            f"A {type} of {len(line)} bytes is over the {MAX_LINE} that one line may have."
        )
    return line


def decode(line: bytes, ends: int) -> Entry:
    """One line, of which the file has `ends` bytes up to its end."""
    return Entry(**json.loads(line), ends=ends)


def _hash(head: Head, body: bytes) -> bytes:
    return hashlib.sha256(head.hash.encode() + body).hexdigest().encode()


def _fault(line: bytes, head: Head) -> str:
    """Why a line does not follow `head`; "" if it does."""
    body, tail = line[:-TAIL] + b"}", line[-TAIL:]
    prev = tail[len(PREV) : len(PREV) + len(START)]
    own = tail[-len(CLOSE) - len(START) : -len(CLOSE)]
    if tail != b"".join((PREV, prev, HASH, own, CLOSE)):
        return "it does not end in the hashes that every line has"
    if not body.startswith(b'{"seq":%d,' % (head.seq + 1)):
        return f"it is not entry {head.seq + 1}"
    if prev != head.hash.encode():
        return "it was not written after the line that is before it"
    if own != _hash(head, body):
        return "its content was changed after it was written"
    return ""


def _torn(line: bytes) -> bool:
    """True for a last line that a crash could have left."""
    try:
        json.loads(line)
    except ValueError:
        return True
    return not line.endswith(b"\n")


def _check_rules(path: Path, head: Head, line: bytes, voted: set[str], void: set[str]) -> None:
    """A battle has at most one vote and then one retraction; there are no other entries."""
    try:
        entry = decode(line, head.ends)
        battle, seen = str(entry.data["battle_id"]), {VOTE: voted, RETRACT: void}[entry.type]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BrokenChain(path, head.seq, "it is neither a vote nor a retraction") from None
    if battle in seen or (seen is void and battle not in voted):
        what = "a second vote" if seen is voted else "a retraction without a vote to take back"
        raise BrokenChain(path, head.seq, f"it is {what}, on battle {battle}")
    seen.add(battle)


def _put(fd: int, data: bytes) -> None:
    if os.write(fd, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(fd)


def _keep(path: Path, torn: bytes, head: Head) -> None:
    """Add what is cut off the log to the file beside it, one JSON line each time."""
    note = f"the end of {path.name} after entry {head.seq}, never finished and never counted"
    line = json.dumps({"t": time.time(), "note": note, "text": torn.decode("latin-1")})
    with _opened(path.with_suffix(".torn"), os.O_WRONLY | os.O_APPEND | os.O_CREAT) as (fd, _):
        _put(fd, line.encode() + b"\n")


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[tuple[int, int]]:
    """(descriptor, bytes in it). A log holds what people wrote: it is its owner's alone."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd, os.fstat(fd).st_size
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    """A new file survives a power cut only once its folder is on the disk."""
    with _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as (fd, _):
        os.fsync(fd)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
