import json
import math
import random
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from results_db.database import MIGRATIONS, migrate, set_aside, version_of
from results_db.store import Store, StoreError

ROOT = Path(__file__).parents[2]
NEWEST = max(int(file.name[:3]) for file in MIGRATIONS.glob("*.sql"))


def rows_of(store: Store) -> dict[str, str]:
    """Every table as text, which unlike == takes NaN for equal to NaN."""
    tables = store.snapshot()
    del tables["schema_version"]
    return {name: repr(table.to_pylist()) for name, table in tables.items()}


def in_a_process(code: str, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_every_event_finds_its_table(store, example):
    store.ingest("r1", example.spec(), example.whole(), 900)
    run = store.frame("FROM runs").iloc[0]
    assert (run["model"], run["model_content"], run["storage"]) == ("demo", "c0ffee", "simulated")
    assert (run["label"], run["targets"], run["state"]) == ("first", "weights,kv", "done")
    assert (run["started"], run["finished"]) == (
        pd.Timestamp(2, unit="s"),
        pd.Timestamp(6, unit="s"),
    )
    assert json.loads(run["env"]) == {"gpu": None, "torch": "2.13", "nan": "nan"}
    assert store.frame("SELECT block, value FROM layers ORDER BY 1").values.tolist() == [
        [0, 0.5],
        [1, 0.25],
    ]
    assert store.frame("FROM notes")["text"].tolist() == [
        "dead columns",
        "fewer samples than asked",
    ]
    assert store.offset("r1") == 900
    assert store.offset("unknown") == 0


def test_missing_and_nan_and_infinity_stay_apart(store, example):
    store.ingest("r1", example.spec(), example.whole(), 900)
    values = {row["name"]: row for row in store.snapshot()["measurements"].to_pylist()}
    assert values["mean_kld"]["value"] is None
    assert values["kld_max"]["value"] == math.inf
    assert math.isnan(values["kld_max"]["stderr"])
    items = [row["value"] for row in store.snapshot()["items"].to_pylist()]
    assert items[:2] == [7.0, 7.5]
    assert math.isnan(items[2])


def test_the_same_events_again_change_nothing(store, example):
    store.ingest("r1", example.spec(), example.whole(), 900)
    before, version = rows_of(store), store.version
    store.ingest("r1", example.spec(), example.whole(), 900)
    store.ingest("r1", example.spec(), example.whole()[:3], 300)
    assert rows_of(store) == before
    assert store.version == version


def test_progress_moves_the_offset_and_not_the_version(store, example):
    store.ingest("r1", example.spec(), [example.submitted()], 100)
    version = store.version
    store.ingest("r1", example.spec(), [{"t": 2.0, "type": "progress", "done": 1}], 150)
    assert (store.offset("r1"), store.version) == (150, version)


def test_a_later_measurement_takes_the_place_of_the_earlier(store, example):
    first = example.measured(value=9.0, items=[1, 2, 3])
    store.ingest("r1", example.spec(), [first, example.measured(device="cuda")], 100)
    store.ingest("r1", example.spec(), [example.measured(value=8.0, t=9.0, items=[4])], 200)
    found = store.frame("SELECT device, value FROM measurements ORDER BY device")
    assert found.values.tolist() == [["cpu", 8.0], ["cuda", 7.25]]
    assert store.frame("SELECT item, value FROM items").values.tolist() == [[0, 4.0]]


def test_any_cut_and_any_overlap_give_the_same_rows(tmp_path, example):
    """The server may die and read again between any two bytes of the file."""
    retried = [example.state("failed", 7.0, error={"type": "E"}), example.state("queued", 8.0)]
    again = [example.state("running", 9.0), example.measured(value=6.0, t=9.5, items=[6.0])]
    events = example.whole() + retried + again + [example.note("fewer samples than asked")]
    rng = random.Random(0)
    seen = []
    for trial in range(12):
        with closing(Store(tmp_path / f"{trial}.duckdb")) as store:
            end = 0
            while end < len(events):
                start, end = rng.randint(0, end), min(end + rng.randint(0, 6), len(events))
                store.ingest("r1", example.spec(), events[start:end], end)
            seen.append(rows_of(store))
    assert all(rows == seen[0] for rows in seen)
    assert "fewer" in seen[0]["notes"]


def test_the_first_word_may_be_a_measurement(store, example):
    store.ingest("r1", example.spec(), [example.measured()], 50)
    store.ingest("r1", example.spec(), [example.submitted()], 90)
    assert store.frame("SELECT state, label FROM runs").values.tolist() == [["queued", "first"]]


def test_a_broken_event_stores_nothing_of_its_batch(store, example):
    broken = {"t": 1.0, "type": "measurement", "value": 1.0}
    with pytest.raises(StoreError, match=r"r1: new event 2 \(measurement\).*metric_id"):
        store.ingest("r1", example.spec(), [example.submitted(), broken], 90)
    assert store.frame("FROM runs").empty
    assert (store.offset("r1"), store.version) == (0, 0)


def test_delete_forgets_one_run(store, example):
    for run_id in ("r1", "r2"):
        store.ingest(run_id, example.spec(), example.whole(), 900)
    version = store.version
    store.delete("r1")
    assert store.version > version
    assert store.offset("r1") == 0
    for table in ("runs", "measurements", "items", "layers", "notes"):
        assert store.frame(f"SELECT DISTINCT run_id FROM {table}")["run_id"].tolist() == ["r2"]


KILLED = """
import json, sys
from pathlib import Path
from results_db.store import Store
store = Store(Path(sys.argv[1]))
event = json.loads(sys.argv[2])
for i in range(int(sys.argv[3]), 1_000_000):
    many = [event | {"name": f"n{k}", "value": i, "t": i} for k in range(20)]
    store.ingest("r1", '{"model": {"id": "demo"}}', many, i)
    print(i, flush=True)
"""


def test_kill_in_the_middle_of_ingest_loses_nothing_acknowledged(tmp_path, example):
    path, rng, said = tmp_path / "results.duckdb", random.Random(0), 0
    event = json.dumps(example.measured(items=[1, 2, 3]))
    for _ in range(4):
        with in_a_process(KILLED, str(path), event, str(said + 1)) as writer:
            assert writer.stdout is not None
            for _ in range(rng.randint(1, 5)):
                said = int(writer.stdout.readline())
            time.sleep(rng.uniform(0, 0.05))
            writer.kill()
            said = int((writer.stdout.read().split() or [said])[-1])
        with closing(Store(path)) as store:
            stored = store.offset("r1")
            assert stored in (said, said + 1)  # the last one may have died before it said so
            values = store.frame("SELECT value, count(*) AS rows FROM measurements GROUP BY 1")
            assert values.values.tolist() == [[stored, 20]]
            assert store.frame("SELECT count(*) AS n FROM items")["n"].tolist() == [60]
        said = stored


def test_eight_readers_and_a_writer(store, example):
    """A reader sees whole batches only, and the version moves after the rows do."""
    errors, done = [], threading.Event()
    sql = "SELECT count(*) AS n, count(DISTINCT value) AS k, max(value) AS top FROM measurements"

    def read() -> None:
        try:
            while not done.is_set():
                version = store.version
                n, k, top = store.frame(sql).iloc[0]
                assert version == 0 or (n == 5 and k == 1 and top >= version - 1)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    for i in range(25):
        batch = [example.measured(f"n{k}", i, t=float(i)) for k in range(5)]
        store.ingest("r1", example.spec(), batch, i)
    done.set()
    for reader in readers:
        reader.join()
    assert not errors
    assert store.version == 25


def test_two_writers_take_turns(store, example):
    def write(run_id: str) -> None:
        for i in range(20):
            store.ingest(run_id, example.spec(), [example.measured(value=i, t=float(i))], i)

    writers = [threading.Thread(target=write, args=(f"r{k}",)) for k in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert store.frame("SELECT value FROM measurements")["value"].tolist() == [19.0, 19.0]
    assert store.version == 40


def test_frame_cannot_write(store):
    with pytest.raises(duckdb.TransactionException, match="read-only"):
        store.frame("DELETE FROM runs")


def test_a_database_from_the_future_is_refused(tmp_path):
    path = tmp_path / "results.duckdb"
    Store(path).close()
    with duckdb.connect(str(path)) as connection:
        connection.execute("INSERT INTO schema_version VALUES (999, now()::TIMESTAMP)")
    with pytest.raises(StoreError, match=f"version 999 and this program knows up to {NEWEST}"):
        Store(path)


def test_migrations_from_nothing_are_applied_once_each(tmp_path):
    folder = tmp_path / "migrations"
    folder.mkdir()
    (folder / "001_init.sql").write_text("CREATE TABLE schema_version (v INT, at TIMESTAMP)")
    with duckdb.connect(":memory:") as connection:
        assert version_of(connection) == 0
    (folder / "001_init.sql").write_text(
        "CREATE TABLE schema_version (version INT, applied_at TIMESTAMP); CREATE TABLE a (x INT)"
    )
    with duckdb.connect(str(tmp_path / "m.duckdb")) as connection:
        migrate(connection, folder)
        (folder / "002_more.sql").write_text("INSERT INTO a VALUES (1); ALTER TABLE a ADD y INT")
        migrate(connection, folder)
        migrate(connection, folder)
        assert connection.execute("FROM a").fetchall() == [(1, None)]
        (folder / "003_bad.sql").write_text("INSERT INTO a VALUES (2, 2); SELECT * FROM nowhere")
        with pytest.raises(duckdb.CatalogException):
            migrate(connection, folder)
        assert connection.execute("SELECT count(*) FROM a").fetchone() == (1,)
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(1,), (2,)]


def test_reopening_keeps_everything(tmp_path, example):
    path = tmp_path / "results.duckdb"
    with closing(Store(path)) as store:
        store.ingest("r1", example.spec(), example.whole(), 900)
        before = rows_of(store)
    with closing(Store(path)) as store:
        assert rows_of(store) == before
        applied = store.frame("SELECT version FROM schema_version")["version"].tolist()
        assert applied == list(range(1, NEWEST + 1))


def test_a_second_process_is_told_who_holds_it(store):
    code = "import sys, pathlib, results_db.store as s; s.Store(pathlib.Path(sys.argv[1]))"
    _, error = in_a_process(code, str(store.path)).communicate(timeout=60)
    sentence = error.strip().splitlines()[-1]
    assert "StoreError" in sentence
    assert "is open in another process (PID" in sentence


def test_a_second_store_in_this_process_is_refused(store):
    with pytest.raises(StoreError, match="already open in this process"):
        Store(store.path)
    assert store.frame("FROM runs").empty


def test_a_corrupt_file_is_left_as_it_is_until_set_aside(tmp_path):
    path, log = tmp_path / "results.duckdb", tmp_path / "results.duckdb.wal"
    path.write_bytes(b"x" * 10_000)
    log.write_bytes(b"y")
    with pytest.raises(StoreError, match="quantarena rebuild"):
        Store(path)
    assert path.read_bytes() == b"x" * 10_000
    kept = set_aside(path)
    assert [file.read_bytes()[:1] for file in kept] == [b"x", b"y"]
    Store(path).close()


REFUSED = [
    "INSERT INTO runs (run_id) VALUES ('x')",
    "WITH q AS (INSERT INTO notes VALUES ('x', 1, '', 'y') RETURNING text) FROM q",
    "DELETE FROM runs",
    "CREATE TEMP TABLE t AS SELECT 1",
    "COPY runs TO 'out.csv'",
    "COPY (SELECT 1) TO 'out.csv'",
    "ATTACH 'other.duckdb'",
    "PRAGMA version",
    "SET threads = 1",
    "LOAD httpfs",
    "CALL pragma_version()",
    "CHECKPOINT",
    "EXPLAIN ANALYZE DELETE FROM runs",
    "EXPORT DATABASE 'out'",
    "SELECT 1; SELECT 2",
    "FROM read_csv('{here}')",
    "FROM read_text('{here}')",
    "FROM '{here}'",
    "FROM glob('/*')",
    "FROM read_duckdb('{here}', table_name := 'runs')",
    "FROM enable_logging()",
    "FROM add_grammar_extension('x')",
    "FROM secret_of_the_caller",
    "SELECT",
    "nonsense",
    "",
    "-- nothing",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_a_stranger_may_only_select(store, example, sql):
    store.ingest("r1", example.spec(), example.whole(), 900)
    secret_of_the_caller = pd.DataFrame({"x": [1]})
    before = rows_of(store)
    with pytest.raises(StoreError) as refusal:
        store.query(sql.format(here=__file__))
    assert len(str(refusal.value).splitlines()) == 1
    assert rows_of(store) == before
    assert len(secret_of_the_caller) == 1


@pytest.mark.parametrize(
    "sql", ["FROM runs", "WITH a AS (SELECT 1) FROM a -- end", "DESCRIBE runs", "SUMMARIZE runs"]
)
def test_a_stranger_may_look(store, example, sql):
    store.ingest("r1", example.spec(), example.whole(), 900)
    assert len(store.query(sql))


def test_a_stranger_gets_the_first_rows_in_time(store):
    found = store.query("SELECT range AS i FROM range(10_000_000_000)", rows=3000)
    assert found["i"].tolist() == list(range(3000))
    assert list(store.query("SELECT 1 AS one WHERE false").columns) == ["one"]


def test_a_stranger_runs_out_of_time(store):
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"longer than 0\.3 s"):
        store.query(
            "SELECT sum(a.range * b.range) FROM range(10_000_000) a, range(1_000_000) b",
            seconds=0.3,
        )
    assert time.monotonic() - started < 5  # a loaded machine schedules the timer late
    assert store.frame("SELECT 1 AS one")["one"].tolist() == [1]
