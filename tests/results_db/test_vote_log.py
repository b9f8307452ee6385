"""The vote log: what a crash, a full disk or a stranger's hand does to it, and what is said."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from results_db import vote_log
from results_db.store import StoreError
from results_db.vote_log import RETRACT, START, VOTE, VoteLog, check

ROOT = Path(__file__).parents[2]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "votes.jsonl"


def filled(path: Path, votes: int = 5) -> list[bytes]:
    """A log of some votes on battles b0, b1, ... -> its lines."""
    log = VoteLog(path)
    for i in range(votes):
        log.append(VOTE, {"battle_id": f"b{i}", "text": "ein Wort, 一句话\n" * i})
    return path.read_bytes().splitlines(keepends=True)


def chained(path: Path) -> str:
    """The chain as the documentation says it: whole, or the first line that is not."""
    prev = START
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        found = json.loads(line)
        body = {key: found[key] for key in ("seq", "t", "type", "data")}
        text = prev + json.dumps(body, separators=(",", ":"))
        prev_and_hash = (prev, hashlib.sha256(text.encode()).hexdigest())
        if (found["seq"], found["prev"], found["hash"]) != (number, *prev_and_hash):
            return f"line {number}"
        prev = found["hash"]
    return "whole"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(items=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=5))
def test_any_data_comes_back_and_the_documented_rule_checks_the_chain(path, items):
    path.unlink(missing_ok=True)
    log = VoteLog(path)
    written = [log.append(VOTE, data) for data in items]
    assert [entry.data for entry in written] == items
    assert list(log.read()) == written == list(VoteLog(path).read())
    for entry in written:
        assert list(log.read(entry.ends)) == written[entry.seq :]
    assert not items or chained(path) == "whole"


def test_many_entries_are_one_chain_with_those_before(path):
    log = VoteLog(path)
    log.append(VOTE, {"battle_id": "a"})
    log.append_all(VOTE, [{"battle_id": f"b{i}"} for i in range(10)])
    log.append(RETRACT, {"battle_id": "b3"})
    assert chained(path) == "whole"
    found = check(path)
    assert (found.head, found.votes, found.retractions, found.why) == (log.head, 11, 1, "")
    assert path.stat().st_mode & 0o777 == 0o600


def test_append_waits_for_the_disk_and_for_the_folder_s_entry(path, monkeypatch):
    synced = []

    def sync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").resolve())

    monkeypatch.setattr(vote_log.os, "fsync", sync)
    log = VoteLog(path)
    log.append(VOTE, {})
    log.append(VOTE, {})
    assert synced == [path, path.parent, path]


def test_a_line_cut_anywhere_is_cut_off_kept_aside_and_written_again(path):
    lines = filled(path, 3)
    whole = b"".join(lines[:2])
    sizes = [0, 1, *range(2, len(lines[2]), 9), len(lines[2]) - 1]
    for size in sizes:
        path.write_bytes(whole + lines[2][:size])
        torn = check(path).torn_bytes
        log = VoteLog(path)
        assert (torn, log.problem, log.head.seq) == (size, "", 2)
        assert path.read_bytes() == whole
    kept = [json.loads(line) for line in path.with_suffix(".torn").read_text().splitlines()]
    assert [k["text"].encode("latin-1") for k in kept] == [lines[2][:size] for size in sizes[1:]]
    assert "after entry 2" in kept[0]["note"]
    log.append(VOTE, {"battle_id": "again"})
    assert chained(path) == "whole"


def test_a_last_line_that_is_no_json_is_torn_too(path):
    lines = filled(path)
    path.write_bytes(b"".join(lines[:-1]) + b"\0" * 50 + b"\n")
    assert VoteLog(path).head.seq == 4
    assert path.read_bytes() == b"".join(lines[:-1])


def tampered(lines: list[bytes], rng: random.Random) -> tuple[list[bytes], int]:
    """One change that no crash makes -> (lines, the first that is not what was written)."""
    i = rng.randrange(len(lines) - 1)
    kind = rng.choice(["byte", "remove", "repeat", "swap", "empty"])
    changed = list(lines)
    if kind == "byte":
        line = bytearray(lines[i])
        line[rng.randrange(len(line) - 1)] ^= 1 << rng.randrange(3)
        changed[i] = bytes(line)
    elif kind == "remove":
        del changed[i]
    elif kind == "repeat":
        changed.insert(i + 1, lines[i])
        i += 1
    elif kind == "swap":
        changed[i], changed[i + 1] = changed[i + 1], changed[i]
    else:
        changed.insert(i, b"\n")
    return changed, i + 1


@pytest.mark.parametrize("seed", range(60))
def test_any_change_before_the_last_line_is_found_and_never_repaired(path, seed):
    changed, line = tampered(filled(path, 6), random.Random(seed))
    path.write_bytes(b"".join(changed))
    log = VoteLog(path)
    assert f"votes.jsonl is broken at line {line}: it" in log.problem
    assert (log.head.seq, check(path).broken_line) == (line - 1, line)
    assert [entry.seq for entry in log.read()] == list(range(1, line))
    with pytest.raises(StoreError, match=f"line {line}"):
        log.append(VOTE, {"battle_id": "new"})
    assert path.read_bytes() == b"".join(changed)
    assert not path.with_suffix(".torn").exists()


def test_a_changed_last_line_that_is_json_is_no_crash(path):
    lines = filled(path)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1].replace(b'"b4"', b'"b9"'))
    assert "line 5: its content was changed" in VoteLog(path).problem
    assert path.read_bytes().endswith(lines[-1][-10:])


def test_an_endless_line_is_read_in_bounds(path, monkeypatch):
    lines = filled(path)
    monkeypatch.setattr(vote_log, "MAX_LINE", 300)
    path.write_bytes(lines[0] + b"x" * 1000 + b"\n" + lines[1])
    assert check(path).broken_line == 2
    path.write_bytes(lines[0])
    with pytest.raises(StoreError, match="over the 300"):
        VoteLog(path).append(VOTE, {"text": "x" * 300})
    assert path.read_bytes() == lines[0]


def test_a_lost_tail_is_told_by_a_hash_noted_before(path):
    lines = filled(path)
    noted = json.loads(lines[3])["hash"]
    assert check(path, noted).expected_at == 4
    assert check(path, START).expected_at == 0
    path.write_bytes(b"".join(lines[:3]))
    found = check(path, noted)
    assert (found.why, found.expected_at, found.head.seq) == ("", None, 3)


@pytest.mark.parametrize(
    ("added", "why"),
    [
        ([(VOTE, "b1")], "second vote, on battle b1"),
        ([(RETRACT, "b9")], "without a vote to take back, on battle b9"),
        ([(RETRACT, "b1"), (RETRACT, "b1")], "without a vote"),
        ([(RETRACT, "b1"), (VOTE, "b1")], "second vote"),
        ([("praise", "b1")], "neither a vote nor a retraction"),
    ],
)
def test_check_knows_the_rules_of_votes(path, added, why):
    filled(path)
    log = VoteLog(path)
    for type, battle in added:
        log.append(type, {"battle_id": battle})
    found = check(path)
    assert why in found.why
    assert found.broken_line == 5 + len(added)


def test_no_file_is_an_empty_log(path):
    assert (check(path).head.seq, VoteLog(path).problem, list(VoteLog(path).read())) == (0, "", [])
    assert not path.exists()


def test_a_file_that_cannot_be_read_is_a_problem_and_no_crash(path):
    path.mkdir()
    log = VoteLog(path)
    assert "cannot be opened (Is a directory)" in log.problem
    with pytest.raises(StoreError):
        log.append(VOTE, {})


def test_what_is_no_json_is_refused_whole(path):
    log = VoteLog(path)
    for data in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(StoreError, match="cannot be written as JSON"):
            log.append_all(VOTE, [{"battle_id": "fine"}, data])
    assert (log.head.seq, path.exists()) == (0, False)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from results_db.vote_log import VoteLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = VoteLog(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    log.append("vote", {"battle_id": "x" * 200})
except ValueError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append("vote", {"battle_id": "y"})
"""


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_full_disk_leaves_nothing_half_written(path, room):
    """The kernel itself ends the write after `room` bytes."""
    before = filled(path, 2)
    limit = str(path.stat().st_size + room)
    command = [sys.executable, "-c", FULL_DISK, str(path), limit]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "votes.jsonl cannot be written" in done.stdout
    assert "nothing was counted" in done.stdout
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[:2] == before
    assert [json.loads(line)["data"]["battle_id"] for line in lines[2:]] == ["y"]
    assert chained(path) == "whole"


def failing_sync(fd: int) -> None:
    raise OSError(5, os.strerror(5))


def test_a_disk_error_takes_the_line_back(path, monkeypatch):
    before = b"".join(filled(path))
    log = VoteLog(path)
    with monkeypatch.context() as patch:
        patch.setattr(vote_log, "_put", lambda fd, data: (os.write(fd, data), failing_sync(fd)))
        with pytest.raises(StoreError, match=r"Input/output error\); nothing was counted"):
            log.append(VOTE, {"battle_id": "new"})
    assert path.read_bytes() == before
    log.append(VOTE, {"battle_id": "new"})
    assert chained(path) == "whole"


def test_a_line_that_cannot_be_taken_back_stops_the_log(path, monkeypatch):
    filled(path)
    log = VoteLog(path)
    with monkeypatch.context() as patch:
        patch.setattr(vote_log.os, "fsync", failing_sync)
        with pytest.raises(StoreError):
            log.append(VOTE, {"battle_id": "new"})
    with pytest.raises(StoreError, match="unknown after a failed write"):
        log.append(VOTE, {"battle_id": "next"})
    VoteLog(path).append(VOTE, {"battle_id": "next"})
    assert chained(path) == "whole"


@pytest.mark.parametrize("change", ["append", "cut", "remove"])
def test_a_file_changed_behind_its_back_is_not_written(path, change):
    lines = filled(path)
    log = VoteLog(path)
    if change == "append":
        VoteLog(path).append(VOTE, {"battle_id": "stranger"})
    elif change == "cut":
        path.write_bytes(b"".join(lines[:-1]))
    else:
        path.unlink()
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(StoreError):
        log.append(VOTE, {"battle_id": "new"})
    assert (path.read_bytes() if path.exists() else None) == before
