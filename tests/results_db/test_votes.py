"""Votes: at most one per battle, none lost, none doubled, whatever dies when."""

import json
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from results_db import votes as votes_module
from results_db.store import Store, StoreError
from results_db.style import style_of
from results_db.variants import shown, variant_id
from results_db.vote_log import check
from results_db.vote_rows import copy_file, difference
from results_db.votes import (
    EXCLUDING,
    FILE,
    Vote,
    Votes,
    VoteTable,
    hashed,
    home_key,
)

ROOT = Path(__file__).parents[2]
WINNERS = ("model_a", "model_b", "tie", "tie (bothbad)")


def a_vote(battle: str = "b1", **changes: Any) -> Vote:
    """A human vote with everything that one can carry."""
    asked = {"role": "user", "content": "Who overtakes whom?"}
    vote = Vote(
        battle_id=battle,
        model="demo",
        model_a="demo/baseline@aaaa0000",
        model_b="demo/rtn(bits=4)@bbbb0000",
        winner="model_a",
        kind="human",
        judge="0123abcd",
        tstamp=1_700_000_000.25,
        turn=2,
        language="English",
        category="reasoning",
        prompt="Who overtakes whom?",
        conversation_a=({**asked}, {"role": "assistant", "content": "# Third\n- **you** 🙂"}),
        conversation_b=({**asked}, {"role": "assistant", "content": "second"}),
        tokens_a=7,
        tokens_b=1,
        run_a="20260101-000000-aaaaaa",
        run_b="20260101-000000-bbbbbb",
        seed_a=1,
        seed_b=2**62,
        settings={"temperature": 0.0, "system": None},
        propensity=0.125,
        address="fedc",
        latency_s=4.5,
        flags=("identical",),
    )
    return replace(vote, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


@pytest.fixture
def votes(store: Store, path: Path) -> Votes:
    return Votes(store, path)


def again(store: Store, path: Path) -> Votes:
    """The next start of the server."""
    return Votes(store, path)


def battles(votes: Votes, **picks: Any) -> list[str]:
    return sorted(votes.frame(**picks)["battle_id"])


def test_a_vote_is_a_line_and_a_row_with_everything_it_carries(votes, store, path):
    assert votes.cast(a_vote())
    line = json.loads(path.read_text())
    assert Vote(**line["data"]) == replace(
        a_vote(),
        conversation_a=list(a_vote().conversation_a),
        conversation_b=list(a_vote().conversation_b),
        flags=["identical"],
    )
    (row,) = store.frame("FROM votes").to_dict("records")
    assert row["cast_at"] == datetime(2023, 11, 14, 22, 13, 20, 250_000)
    assert (row["seq"], row["ends"], row["hash"]) == (1, path.stat().st_size, line["hash"])
    assert json.loads(row["settings"]) == {"temperature": 0.0, "system": None}
    styles = {side: style_of([line["data"][f"conversation_{side}"][1]["content"]]) for side in "ab"}
    for name in ("headers", "lists", "bold", "characters"):
        for side in "ab":
            assert row[f"{name}_{side}"] == getattr(styles[side], name)
    assert (row["headers_a"], row["lists_a"], row["bold_a"]) == (1, 1, 1)
    (found,) = votes.frame(text=True).to_dict("records")
    assert found["conversation_b"] == list(a_vote().conversation_b)
    assert (found["tokens_a"], found["flags"], found["retracted"]) == (7, "identical", False)
    assert not {"prompt", "settings", "conversation_a"} & set(votes.frame().columns)


def test_without_a_text_there_is_no_style(votes, store):
    votes.cast(a_vote(conversation_a=(), tokens_a=None))
    row = store.frame("FROM votes").iloc[0]
    assert pd.isna([row["headers_a"], row["characters_a"], row["tokens_a"]]).all()
    assert row["characters_b"] == len("second")


def test_a_battle_has_one_vote_and_can_be_taken_back_once(votes, store, path):
    assert not votes.retract("b1", 1.0)
    assert votes.cast(a_vote())
    assert not votes.cast(a_vote(winner="model_b"))
    assert votes.retract("b1", 5.0)
    assert not votes.retract("b1", 6.0)
    assert not votes.cast(a_vote())
    assert battles(votes) == []
    assert votes.frame(counted=False)["retracted"].tolist() == [True]
    assert store.frame("SELECT battle_id, tstamp FROM retractions").values.tolist() == [["b1", 5.0]]
    assert (check(path).head.seq, votes.version) == (2, 2)
    later = again(store, path)
    assert not later.cast(a_vote())
    assert not later.retract("b1", 7.0)


def test_the_version_moves_after_the_rows_do(votes, store):
    seen = store.version
    assert votes.version == 0
    votes.cast(a_vote())
    assert (votes.version, len(votes.frame())) == (1, 1)
    assert store.version > seen
    seen = store.version
    votes.cast(a_vote())
    assert (votes.version, store.version) == (1, seen)


BAD = [
    ({"winner": "A"}, "winner"),
    ({"kind": "robot"}, "kind"),
    ({"battle_id": ""}, "battle_id"),
    ({"model_a": None}, "model_a"),
    ({"tstamp": math.nan}, "tstamp"),
    ({"tstamp": 1.7e12}, "tstamp"),
    ({"turn": 0}, "turn"),
    ({"anony": 1}, "anony"),
    ({"tokens_a": 2.5}, "tokens_a"),
    ({"seed_a": 2**63}, "seed_a"),
    ({"propensity": math.inf}, "propensity"),
    ({"conversation_a": ({"role": "user"},)}, "conversation_a"),
    ({"settings": []}, "settings"),
    ({"flags": ("a,b",)}, "flags"),
]


@pytest.mark.parametrize(("changes", "name"), BAD)
def test_what_is_no_vote_is_refused_in_one_sentence(changes, name):
    with pytest.raises(ValueError, match=f"^{name} of a vote is .*; it must be "):
        a_vote(**changes)


def test_settings_that_are_no_json_are_refused_and_nothing_stays(votes, path):
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        votes.cast(a_vote(settings={"x": object()}))
    with pytest.raises(ValueError, match="no time"):
        votes.retract("b1", math.nan) if votes.cast(a_vote()) else None
    assert check(path).head.seq == 1


TEXT = st.text(st.characters(codec=None, categories=None), max_size=20)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(prompt=TEXT, judge=TEXT, answer=TEXT, tstamp=st.floats(0, 253_402_300_799.0))
def test_whatever_people_type_is_stored(votes, store, path, prompt, judge, answer, tstamp):
    """Lone surrogates are no characters and come back as U+FFFD; all else as it was typed."""
    number = votes.version
    conversation = ({"role": "assistant", "content": answer},)
    vote = a_vote(f"b{number}", prompt=prompt, judge=judge, tstamp=tstamp)
    assert votes.cast(replace(vote, conversation_a=conversation, conversation_b=conversation))
    rows = votes.frame(text=True)
    row = rows[rows["battle_id"] == f"b{number}"].iloc[0]
    kept = [row["prompt"], row["judge"], row["conversation_a"][0]["content"]]
    assert kept == [
        t.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for t in (prompt, judge, answer)
    ]
    assert row["tstamp"] == tstamp
    assert difference(store, path) == ""


def mixed(n: int, seed: int = 0) -> list[Vote]:
    """Votes of every kind, with every reason not to count."""
    rng = random.Random(seed)
    names = [f"demo/r{k}@0000" for k in range(3)]
    return [
        a_vote(
            f"b{i}",
            model=rng.choice(["demo", "other", ""]),
            model_a=rng.choice(names),
            model_b=rng.choice(names),
            winner=rng.choice(WINNERS),
            kind=rng.choice(["human", "human", "judge", "auto", "import"]),
            judge=rng.choice(["ann", "bob", "eve"]),
            category=rng.choice(["math", "code", ""]),
            language=rng.choice(["English", "German"]),
            anony=rng.random() < 0.8,
            tstamp=rng.randrange(100) / 4,
            flags=tuple(rng.sample(["identical", "fast", *EXCLUDING], rng.choice([0, 0, 0, 1, 2]))),
        )
        for i in range(n)
    ]


PICKS = [
    {},
    {"counted": False},
    {"kinds": ("human", "judge", "auto", "import")},
    {"kinds": ("judge",), "counted": False},
    {"kinds": ()},
    {"model": "demo", "category": "math"},
    {"language": "German", "exclude_judges": ["eve", "nobody"]},
    {"exclude_judges": ["ann", "bob", "eve"]},
    {"model": "'; DROP TABLE votes; --"},
]


@pytest.mark.parametrize("picks", PICKS, ids=str)
def test_rows_and_cells_are_what_a_plain_loop_finds(votes, picks):
    cast = mixed(300)
    assert votes.cast_all(cast) == 300
    void = {f"b{i}" for i in range(0, 300, 7)}
    for battle in void:
        votes.retract(battle, 1.0)

    def counts(vote: Vote) -> bool:
        fair = vote.anony and vote.model_a != vote.model_b and vote.battle_id not in void
        return fair and not set(vote.flags) & set(EXCLUDING)

    expected = [
        vote
        for vote in cast
        if vote.kind in picks.get("kinds", ("human",))
        and all(picks.get(f, getattr(vote, f)) == getattr(vote, f) for f in FILTERED)
        and vote.judge not in picks.get("exclude_judges", ())
        and (not picks.get("counted", True) or counts(vote))
    ]
    expected.sort(key=lambda vote: vote.tstamp)
    rows, cells = votes.frame(**picks), votes.cells(**picks)
    assert rows["battle_id"].tolist() == [vote.battle_id for vote in expected]
    tally: dict[tuple[str, str, str], int] = {}
    for vote in expected:
        key = (vote.model_a, vote.model_b, vote.winner)
        tally[key] = tally.get(key, 0) + 1
    pairs = ["winner", "model_a", "tstamp"]
    pd.testing.assert_frame_equal(votes.frame(columns=pairs, **picks), rows[pairs])
    assert list(cells.columns) == ["model_a", "model_b", "winner", "count"]
    assert {tuple(row[:3]): row[3] for row in cells.values.tolist()} == tally


FILTERED = ("model", "category", "language")


def test_filters_know_what_there_is(votes):
    votes.cast_all(mixed(60))
    votes.cast(a_vote("x", model="third", category="poetry", language="Latin"))
    assert votes.models() == ["demo", "other", "third"]
    assert votes.categories() == ["code", "math", "poetry"]
    assert votes.categories("third") == ["poetry"]
    assert votes.languages("third") == ["Latin"]
    assert votes.languages("nobody") == []


def test_many_at_once_count_each_battle_once(votes, path):
    twice = [a_vote("b1"), a_vote("b1", winner="tie"), a_vote("b2")]
    assert votes.cast_all(twice) == 2
    assert votes.frame()["winner"].tolist() == ["model_a", "model_a"]
    assert votes.cast_all(a_vote(f"b{i}") for i in range(1203)) == 1201
    assert (len(votes.frame()), check(path).votes) == (1203, 1203)


def test_fifty_threads_lose_and_double_nothing(votes, store, path):
    """Each battle is wanted by several threads, some of which take it back at once."""
    battles_each, threads = 6, 50
    start = threading.Barrier(threads)
    won: list[str] = []
    undone: list[str] = []
    errors: list[BaseException] = []

    def voter(number: int) -> None:
        try:
            start.wait()
            for i in range(battles_each):
                battle = f"b{(number * battles_each + i) % 150}"
                if votes.cast(a_vote(battle, judge=str(number))):
                    won.append(battle)
                    votes.cells()
                if number % 10 == 0 and votes.retract(battle, 1.0):
                    undone.append(battle)
        except BaseException as error:
            errors.append(error)

    crowd = [threading.Thread(target=voter, args=(k,)) for k in range(threads)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert not errors
    assert sorted(won) == sorted({f"b{i}" for i in range(150)})
    assert len(undone) == len(set(undone)) > 0
    found = check(path)
    assert (found.why, found.votes, found.retractions) == ("", 150, len(undone))
    assert difference(store, path) == ""
    assert battles(votes) == sorted(set(won) - set(undone))


KILLED = """
import sys
from pathlib import Path
from results_db.store import Store
from results_db.votes import Vote, Votes
home = Path(sys.argv[1])
votes = Votes(Store(home / "results.duckdb"), home / "votes.jsonl")
for i in range(int(sys.argv[2]), 1_000_000):
    vote = Vote(f"b{i}", "demo", "a", "b", "tie", "human", "me", 1.0)
    assert votes.cast(vote) and not votes.cast(vote)
    if i % 3 == 0:
        assert votes.retract(f"b{i}", 2.0)
    print(i, flush=True)
"""


def test_kill_while_voting_loses_and_doubles_nothing_acknowledged(tmp_path):
    rng, said = random.Random(0), -1
    told: set[int] = set()  # what was acknowledged, a retraction where it owes one included
    for _ in range(3):
        first = said + 1
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(said + 1)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as voter:
            assert voter.stdout is not None
            for _ in range(rng.randint(1, 12)):
                said = int(voter.stdout.readline())
            voter.kill()
            said = int((voter.stdout.read().split() or [said])[-1])
        told |= set(range(first, said + 1))
        with closing(Store(tmp_path / "results.duckdb")) as store:
            votes = Votes(store, tmp_path / FILE)
            rows = votes.frame(counted=False)
            assert rows["battle_id"].is_unique
            cast = {int(name[1:]) for name in rows["battle_id"]}
            assert cast in (set(range(said + 1)), set(range(said + 2)))  # died before it said so
            void = {int(name[1:]) for name in rows["battle_id"][rows["retracted"]]}
            assert void >= {i for i in told if i % 3 == 0}
            assert difference(store, tmp_path / FILE) == ""
        said = max(cast)


DIES = """
import os, signal, sys
from pathlib import Path
from results_db.store import Store
from results_db.votes import Vote, Votes
home = Path(sys.argv[1])
store = Store(home / "results.duckdb")
votes = Votes(store, home / "votes.jsonl")
def die(change):
    os.kill(os.getpid(), signal.SIGKILL)
store.write = die
votes.{call}
"""
CALLS = {
    "cast": 'cast(Vote("b2", "demo", "a", "b", "tie", "human", "me", 1.0))',
    "retract": 'retract("b1", 2.0)',
}


@pytest.mark.parametrize("call", CALLS)
def test_death_between_file_and_database_is_made_good_at_the_next_start(tmp_path, path, call):
    with closing(Store(tmp_path / "results.duckdb")) as store:
        Votes(store, path).cast(a_vote("b1"))
    command = [sys.executable, "-c", DIES.replace("{call}", CALLS[call]), str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    with closing(Store(tmp_path / "results.duckdb")) as store:
        assert store.frame("SELECT seq FROM votes")["seq"].tolist() == [1]
        votes = Votes(store, path)
        assert (votes.problem, votes.version) == ("", 2)
        assert not votes.cast(a_vote("b1"))
        assert not votes.cast(a_vote("b2")) or call == "retract"
        assert not votes.retract("b1", 3.0) or call == "cast"
        assert difference(store, path) == ""


def test_a_vote_counts_even_if_the_database_refuses_it(votes, store, path, monkeypatch, caplog):
    def refuse(change: Callable) -> None:
        raise duckdb.IOException("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", refuse)
        assert votes.cast(a_vote("b1"))
        assert not votes.cast(a_vote("b1"))
        assert votes.retract("b1", 2.0)
        assert votes.cast(a_vote("b2"))
        with pytest.raises(duckdb.IOException):
            votes.catch_up()
        assert (battles(votes), votes.version) == ([], 0)
    assert "not yet in the database" in caplog.text
    votes.catch_up()
    assert (battles(votes), votes.version) == (["b2"], 3)
    votes.catch_up()
    assert difference(store, path) == ""


def test_a_lost_database_is_made_again(votes, path, tmp_path):
    votes.cast_all(mixed(1100))
    votes.retract("b3", 1.0)
    with closing(Store(tmp_path / "other.duckdb")) as other:
        later = again(other, path)
        pd.testing.assert_frame_equal(later.frame(text=True), votes.frame(text=True))
        assert not later.cast(a_vote("b3"))
    with closing(Store(tmp_path / "third.duckdb")) as third:
        copy_file(third, path)
        pd.testing.assert_frame_equal(VoteTable(third).cells(), votes.cells())
        assert difference(third, path) == ""


@pytest.fixture
def three(votes: Votes, path: Path) -> Iterator[list[bytes]]:
    """Three votes that are in file and database -> the file's lines."""
    for i in range(3):
        votes.cast(a_vote(f"b{i}"))
    return path.read_bytes().splitlines(keepends=True)


TAMPERED = {
    "broken": (lambda lines: [lines[0], lines[2]], "broken at line 2"),
    "cut": (lambda lines: lines[:2], "ends after entry 2 and the database has copied 3"),
    "torn": (lambda lines: [*lines[:2], lines[2][:-1]], "the database has copied 3"),
    "gone": (lambda lines: [], "ends after entry 0"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_file_that_lost_votes_is_told_and_takes_no_more(three, store, path, how):
    change, why = TAMPERED[how]
    path.write_bytes(b"".join(change(three)))
    votes = again(store, path)
    assert why in votes.problem
    assert len(votes.problem.splitlines()) == 1
    assert battles(votes) == ["b0", "b1", "b2"]
    for call in (lambda: votes.cast(a_vote("new")), lambda: votes.retract("b0", 1.0)):
        with pytest.raises(StoreError, match=why):
            call()
    assert difference(store, path)


def test_another_file_in_its_place_is_told(three, store, path, tmp_path):
    path.unlink()
    with closing(Store(tmp_path / "other.duckdb")) as other:
        strangers = Votes(other, path)
        for i in range(5):
            strangers.cast(a_vote(f"x{i}"))
    votes = again(store, path)
    assert "the file was replaced" in votes.problem
    assert battles(votes) == ["b0", "b1", "b2"]
    assert "battle_id" in difference(store, path) or "tstamp" in difference(store, path)


def test_a_broken_file_still_shows_what_is_before_the_break(three, path, tmp_path):
    path.write_bytes(b"".join([three[0], three[2]]))
    with closing(Store(tmp_path / "other.duckdb")) as other:
        votes = Votes(other, path)
        assert (battles(votes), "line 2" in votes.problem) == (["b0"], True)


def test_an_entry_from_elsewhere_does_not_keep_the_server_from_starting(votes, store, path):
    votes.cast(a_vote("b1"))
    votes._log.append("praise", {"text": "nice"})
    votes._log.append("vote", {"battle_id": "b2", "winner": "nobody"})
    later = again(store, path)
    assert "holds what is no vote" in later.problem
    assert battles(later) == ["b1"]


EDITS = [
    "UPDATE votes SET winner = 'tie' WHERE seq = 2",
    "UPDATE votes SET conversation_a = '[]' WHERE seq = 1",
    "DELETE FROM votes WHERE seq = 2",
    "INSERT INTO votes SELECT * FROM votes WHERE seq = 1",
    "DELETE FROM retractions",
]


@pytest.mark.parametrize("sql", EDITS)
def test_a_change_of_the_copy_is_found(three, votes, store, path, sql):
    votes.retract("b0", 1.0)
    votes.cast(a_vote("b9"))
    assert difference(store, path) == ""
    store.write(lambda cursor: bool(cursor.execute(sql)))
    assert difference(store, path)


def test_a_newer_program_s_field_is_left_out(votes, store, path):
    votes._log.append("vote", {**votes_module._data(a_vote("b1")), "mood": "good"})
    votes.catch_up()
    assert battles(votes) == ["b1"]


def test_voters_are_stored_as_keyed_hashes(tmp_path):
    key = home_key(tmp_path)
    assert home_key(tmp_path) == key
    assert len(key) == 32
    assert (tmp_path / "votes.key").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["votes.key"]
    assert hashed(key, "10.0.0.1") == hashed(key, "10.0.0.1")
    assert hashed(key, "10.0.0.1") != hashed(key, "10.0.0.2")
    assert hashed(key, "10.0.0.1") != hashed(os.urandom(32), "10.0.0.1")
    assert set(hashed(key, "\ud800")) <= set("0123456789abcdef")


def test_a_variant_has_its_recipe_in_its_name():
    name = variant_id("demo", "rtn(bits=4)", "0123456789ab")
    assert name == "demo/rtn(bits=4)@01234567"
    assert shown(name) == "demo/rtn(bits=4)"
    assert shown("some model") == "some model"
