"""Battles in the field's columns: what goes out comes back, and what is wrong adds nothing."""

import csv
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from results_db import battles_io
from results_db.battles_io import (
    COLUMNS,
    READERS,
    REQUIRED,
    SCHEMA,
    WRITERS,
    export_battles,
    import_battles,
    read_battles,
)
from results_db.store import Store
from results_db.vote_log import check
from results_db.votes import FILE, Vote, Votes

KINDS = sorted(WRITERS)
TALK = [{"role": "user", "content": "=1+1, please"}, {"role": "assistant", "content": "- 2\r\n"}]


def row(**changes: Any) -> dict[str, Any]:
    """One battle as a public dump has it."""
    return {
        "model_a": "vicuna-13b",
        "model_b": "koala-13b",
        "winner": "model_a",
        "judge": "arena_user_17",
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1322,
        "conversation_a": TALK,
        "conversation_b": [*TALK, {"role": "user", "content": 'and "three"?'}],
    } | changes


def put(file: Path, rows: list[dict[str, Any]]) -> Path:
    """A dump as other programs write it: pandas, pyarrow, json."""
    if file.suffix == ".csv":
        texts = [
            {k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows
        ]
        pd.DataFrame(texts).to_csv(file, index=False)
    elif file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


@pytest.fixture
def votes(store: Store, path: Path) -> Votes:
    return Votes(store, path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_public_dump_becomes_votes_of_their_own_kind(votes, tmp_path, kind):
    rows = [row(), row(winner="tie (bothbad)", anony=False, extra=3), row(winner="both_bad")]
    file = put(tmp_path / f"battles{kind}", rows)
    assert import_battles(votes, file).added == 3
    assert votes.frame().empty
    found = votes.frame(kinds=("import",), counted=False, text=True)
    assert found["winner"].tolist() == ["model_a", "tie (bothbad)", "tie (bothbad)"]
    assert found["anony"].tolist() == [True, False, True]
    assert found["conversation_b"].tolist() == [row()["conversation_b"]] * 3
    assert set(found["prompt"]) == {"=1+1, please"}
    assert set(found["lists_a"]) == {1}
    assert set(found["tstamp"]) == {1682351591.1322}
    assert set(found["model"]) == {""}


def test_the_same_battles_add_nothing_in_whatever_format(votes, tmp_path, path):
    rows = [row(tstamp=i / 7) for i in range(20)]
    for kind in KINDS:
        done = import_battles(votes, put(tmp_path / f"battles{kind}", [*rows, rows[3]]))
        assert (done.rows, done.added) == (21, 20 if kind == KINDS[0] else 0)
    assert check(path).votes == 20
    more = put(tmp_path / "more.jsonl", [*rows[:5], row(judge="somebody else")])
    assert import_battles(votes, more).added == 1


TEXT = st.text(max_size=20)
LINE = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)
RISKY = st.builds(
    str.__add__, st.sampled_from(["=", "+", "-", "@", "'=", "''@", "'", "'-'", "＝"]), LINE
)
NAMES = st.one_of(LINE, RISKY)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}),
    max_size=3,
)
ROWS = st.fixed_dictionaries(
    {
        "model_a": NAMES.filter(bool),
        "model_b": NAMES.filter(bool),
        "winner": st.sampled_from(["model_a", "model_b", "tie", "tie (bothbad)"]),
        "judge": NAMES,
        "turn": st.integers(1, 50),
        "anony": st.booleans(),
        "language": NAMES,
        "tstamp": st.floats(0, 2e9),
        "conversation_a": MESSAGES,
        "conversation_b": MESSAGES,
    }
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("battles")


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(rows=st.lists(ROWS, max_size=4))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_as_it_was(shared, kind, rows):
    """Through the writer and the reader of each format, without a log in between."""
    file = shared / f"rows{kind}"
    assert WRITERS[kind](file, rows) == len(rows)
    read = [
        {name: getattr(v, name) for name in COLUMNS} for v in map(votes_of, READERS[kind](file))
    ]
    assert read == rows
    if kind == ".csv":
        with file.open(encoding="utf-8", newline="") as text:
            for cells in csv.reader(text):
                assert not any(cell.startswith(tuple("=+-@\t\r＝")) for cell in cells)


votes_of = battles_io.vote_of


@pytest.mark.parametrize("kind", KINDS)
def test_an_import_goes_out_again_as_it_came_in(votes, path, tmp_path, kind):
    rows = [row(tstamp=float(i), judge=f"-{i}", anony=i % 2 == 0) for i in range(7)]
    import_battles(votes, put(tmp_path / "in.jsonl", rows))
    out = tmp_path / f"out{kind}"
    assert export_battles(path, out) == 7
    with closing(Store(tmp_path / "other.duckdb")) as store:
        others = Votes(store, tmp_path / "other.jsonl")
        assert import_battles(others, out).added == 7
        again = tmp_path / f"again{kind}"
        export_battles(tmp_path / "other.jsonl", again)
        assert again.read_bytes() == out.read_bytes()
    assert import_battles(votes, out).added == 0


def test_other_programs_read_what_is_written(votes, path, tmp_path):
    import_battles(votes, put(tmp_path / "in.jsonl", [row(), row(winner="tie")]))
    for kind in KINDS:
        export_battles(path, tmp_path / f"out{kind}")
    frames = [
        pd.read_csv(tmp_path / "out.csv"),
        pd.read_parquet(tmp_path / "out.parquet"),
        pd.read_json(tmp_path / "out.json", convert_dates=False),
        pd.read_json(tmp_path / "out.jsonl", lines=True, convert_dates=False),
    ]
    for frame in frames:
        assert list(frame.columns) == list(COLUMNS)
        assert frame["winner"].tolist() == ["model_a", "tie"]
        assert frame["anony"].tolist() == [True, True]
        assert frame["tstamp"].tolist() == [1682351591.1322] * 2
    assert frames[2]["conversation_a"][0] == TALK
    assert json.loads(frames[0]["conversation_a"][0]) == TALK


def test_only_votes_that_count_go_out_and_only_of_the_kinds_asked_for(votes, path, tmp_path):
    human = Vote("h1", "demo", "a", "b", "tie", "human", "ann", 1.0)
    votes.cast_all(
        [
            human,
            replace(human, battle_id="h2"),
            replace(human, battle_id="h3", flags=("leak",)),
            replace(human, battle_id="h4", flags=("identical",)),
            replace(human, battle_id="h5", anony=False),
            replace(human, battle_id="j1", kind="judge", judge="some-model"),
        ]
    )
    votes.retract("h2", 2.0)
    out = tmp_path / "out.jsonl"
    assert export_battles(path, out) == 3
    assert [json.loads(line)["anony"] for line in out.open()] == [True, True, False]
    assert export_battles(path, out, ("judge",)) == 1
    assert json.loads(out.read_text())["judge"] == "some-model"


@pytest.mark.parametrize("kind", KINDS)
def test_no_votes_make_an_empty_file_of_the_right_form(tmp_path, kind):
    out = tmp_path / f"out{kind}"
    assert export_battles(tmp_path / FILE, out) == 0
    assert list(READERS[kind](out)) == []
    with pytest.raises(ValueError, match="holds no battles"):
        list(read_battles(out))


WRONG = [
    ({"winner": "A"}, "winner is 'A' and not one of"),
    ({"winner": None}, "winner is"),
    ({"turn": "two"}, "turn is 'two'"),
    ({"turn": 1.5}, "turn is"),
    ({"turn": 0}, "turn of a vote"),
    ({"anony": "maybe"}, "anony is 'maybe'"),
    ({"tstamp": "yesterday"}, "tstamp is 'yesterday'"),
    ({"tstamp": -1}, "tstamp of a vote"),
    ({"tstamp": 1682351591132}, "tstamp of a vote"),
    ({"model_a": ""}, "model_a of a vote"),
    ({"model_b": "two\nlines"}, "model_b is 'two"),
    ({"language": "x" * 301}, "language is"),
    ({"conversation_a": "hello"}, "conversation_a is 'hello' and not a list"),
    ({"conversation_b": [{"role": "user"}]}, "conversation_b is"),
    ({"conversation_a": [{"role": "user", "content": "x" * 5000}]}, "characters, over the"),
]


@pytest.mark.parametrize(("changes", "why"), WRONG, ids=[str(w)[:40] for w, _ in WRONG])
def test_one_bad_row_is_named_and_nothing_is_added(
    votes, path, tmp_path, monkeypatch, changes, why
):
    monkeypatch.setattr(battles_io, "MAX_TEXT", 4000)
    file = put(tmp_path / "battles.jsonl", [row(), row(tstamp=1.0), row(**changes), row()])
    with pytest.raises(ValueError, match=rf"^battles\.jsonl: row 3: .*{why}") as refusal:
        import_battles(votes, file)
    assert len(str(refusal.value)) < 500
    assert not path.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_column_is_named(tmp_path, kind, name):
    rows = [{k: v for k, v in row().items() if k != name}] * 2
    with pytest.raises(ValueError, match=f"there is no '{name}'; a battle has model_a, "):
        list(read_battles(put(tmp_path / f"battles{kind}", rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_may_be_missing(votes, tmp_path, kind):
    rows = [{k: v for k, v in row().items() if not k.startswith("conversation")}]
    assert import_battles(votes, put(tmp_path / f"battles{kind}", rows)).added == 1
    (found,) = votes.frame(kinds=("import",), text=True).to_dict("records")
    assert (found["conversation_a"], found["prompt"]) == ([], "")
    assert pd.isna(found["headers_a"])


def parquet_of_times(file: Path) -> None:
    table = pa.Table.from_pylist([row(tstamp=None)], SCHEMA)
    when = pa.array([datetime(2024, 1, 2, tzinfo=UTC)])
    at = SCHEMA.get_field_index("tstamp")
    parquet.write_table(table.set_column(at, "tstamp", when), file)


def test_parquet_may_hold_dates_and_numbers_as_judges(tmp_path):
    parquet_of_times(tmp_path / "a.parquet")
    (vote,) = read_battles(tmp_path / "a.parquet")
    assert vote.tstamp == datetime(2024, 1, 2, tzinfo=UTC).timestamp()
    (vote,) = read_battles(put(tmp_path / "b.parquet", [row(judge=17)]))
    assert vote.judge == "17"


def write(text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda file: file.write_bytes(data)


HEADER = ",".join(REQUIRED)
BROKEN = [
    ("x.csv", write(b"\xff\xfe\x00"), "not UTF-8"),
    ("x.csv", write(f"{HEADER}\na,b,tie\n"), "line 2 has not as many cells"),
    ("x.csv", write(f"{HEADER}\na,b,tie,j,1,True,en,1,more\n"), "line 2 has not as many cells"),
    ("x.csv", write(f'{HEADER}\n"a,b,tie\n'), "unexpected end"),
    ("x.csv", write(f"{HEADER}\n{'a' * 6000},b,tie,j,1,True,en,1\n"), "field larger than"),
    ("x.csv", write(""), "there is no 'model_a'"),
    ("x.parquet", write("no parquet"), "Parquet"),
    ("x.json", write("{"), "Expecting property name"),
    ("x.json", write('{"model_a": []}'), "not a list"),
    ("x.json", write("[1]"), "where a battle should be"),
    ("x.json", write("[" * 100_000), "nested too deeply"),
    ("x.jsonl", write(json.dumps(row()) + "\n{\n"), "line 2 is not JSON"),
    ("x.jsonl", write("[1]\n"), "where a battle should be"),
    ("x.jsonl", write("\n\n"), "holds no battles"),
    ("x.txt", write("a"), "must end in one of .csv, "),
]


@pytest.mark.parametrize(("name", "make", "why"), BROKEN, ids=[w for _, _, w in BROKEN])
def test_a_broken_file_gets_one_sentence(votes, path, tmp_path, monkeypatch, name, make, why):
    monkeypatch.setattr(battles_io, "MAX_TEXT", 4000)
    file = tmp_path / name
    make(file)
    with pytest.raises(ValueError, match=why) as refusal:
        import_battles(votes, file)
    assert str(refusal.value).startswith(name)
    assert len(str(refusal.value).splitlines()) == 1
    assert not path.exists()


def test_sizes_are_bounded(tmp_path, monkeypatch):
    file = put(tmp_path / "x.json", [row(), row()])
    with monkeypatch.context() as patch:
        patch.setattr(battles_io, "MAX_ROWS", 1)
        with pytest.raises(ValueError, match="more than the 1 rows"):
            list(read_battles(file))
    for limit in ("MAX_FILE", "MAX_JSON"):
        with monkeypatch.context() as patch:
            patch.setattr(battles_io, limit, 10)
            with pytest.raises(ValueError, match=r"x\.json is over the"):
                list(read_battles(file))
    with pytest.raises(ValueError, match="there is no file"):
        list(read_battles(tmp_path / "none.csv"))


def test_a_failed_export_leaves_the_old_file(votes, path, tmp_path, monkeypatch):
    import_battles(votes, put(tmp_path / "in.jsonl", [row()]))
    out = tmp_path / "out.csv"
    export_battles(path, out)
    before = out.read_bytes()

    def fail(file: Path, rows: object) -> int:
        file.write_text("half")
        raise OSError("no space left")

    monkeypatch.setitem(WRITERS, ".csv", fail)
    with pytest.raises(OSError, match="no space"):
        export_battles(path, out)
    assert out.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))
