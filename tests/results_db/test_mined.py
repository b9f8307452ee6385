"""Which prompts tell two variants apart: against a brute force over plain rows."""

import json
import random
import shutil
from contextlib import closing

import duckdb
import pytest

from results_db import queries
from results_db.database import MIGRATIONS, migrate
from results_db.mined import identical_pairs, telling, variants
from results_db.store import Store, StoreError

MODEL = "demo"


def spec(kind: str = "mine") -> str:
    return json.dumps({"kind": kind, "model": {"id": MODEL, "content": "c0ffee"}})


def mined(run: str, prompt: str, answer: str = "x", kld: float | str | None = 0.5, **more) -> dict:
    settings = {"temperature": 0.0, "top_p": 1.0, "max_new": 64, "seed": 0}
    where = {"device": "cpu", "dtype": "float32", "storage": "simulated"}
    asked = {"prompt_id": prompt, "prompt": f"text of {prompt}", "category": "math"}
    variant = {"run_id": run, "artifact_id": f"art-{run}", "language": "English"}
    numbers = {"kld": kld, "kld_max": kld, "agreement": 0.75, "departs": 3, "tokens": 8}
    answered = {"base_tokens": 9, "finish": "end", "identical": False, "answer_hash": answer}
    told = settings | where | asked | variant | numbers | answered
    return {"t": 10.0, "type": "mined"} | told | more


def test_ranking_and_ties_equal_brute_force(store):
    rng = random.Random(0)
    runs, prompts = ["r1", "r2", "r3", "r4"], [f"p{i:02}" for i in range(30)]
    rows = {
        (run, prompt): mined(
            run, prompt, rng.choice("xyz"), round(rng.random(), 2), departs=rng.randrange(4)
        )
        for run in runs
        for prompt in prompts
        if rng.random() < 0.9
    }
    store.ingest("job", spec(), list(rows.values()), 100)
    same = set()
    for run_a in runs:
        for run_b in runs:
            both = [p for p in prompts if (run_a, p) in rows and (run_b, p) in rows]
            pairs = [(p, rows[run_a, p], rows[run_b, p]) for p in both]
            apart = [
                (-max(a["kld"], b["kld"]), min(a["departs"], b["departs"]), p)
                for p, a, b in pairs
                if a["answer_hash"] != b["answer_hash"]
            ]
            found = telling(store, MODEL, run_a, run_b, 7)
            assert found["prompt_id"].tolist() == [p for *_, p in sorted(apart)][:7]
            alike = (p for p, a, b in pairs if a["answer_hash"] == b["answer_hash"])
            same |= {(run_a, run_b, p) for p in alike if run_a < run_b}
    found = identical_pairs(store, MODEL)
    assert set(zip(found["run_a"], found["run_b"], found["prompt_id"], strict=True)) == same
    some = identical_pairs(store, MODEL, ["r1", "r3"])
    assert set(zip(some["run_a"], some["run_b"], strict=True)) == {("r1", "r3")}
    assert len(some) == sum(pair[:2] == ("r1", "r3") for pair in same)


def test_another_run_of_the_same_artifact_finds_what_was_mined(store, example):
    store.ingest("twin", example.spec(), [example.submitted(artifact_id="art-r1")], 10)
    store.ingest("job", spec(), [mined("r1", "p"), mined("r2", "p", "y")], 10)
    assert telling(store, MODEL, "twin", "r2")["prompt_id"].tolist() == ["p"]
    assert telling(store, MODEL, "unknown", "r2").empty
    store.ingest("job-2", spec(), [mined("r1b", "q", artifact_id="art-r1"), mined("r2", "q")], 10)
    for runs, pair in ((["twin", "r2"], ["r2", "twin"]), (None, ["r1", "r2"])):
        (found,) = identical_pairs(store, MODEL, runs).to_dict("records")
        assert [found["run_a"], found["run_b"], found["prompt_id"]] == [*pair, "q"]
    assert identical_pairs(store, MODEL, ["twin", "unknown"]).empty
    assert variants(store, MODEL)["prompts"].tolist() == [2, 2]


def test_the_last_mining_counts_and_only_like_answers_are_compared(store):
    old = [mined("r1", "p", "x"), mined("r2", "p", "y"), mined("r1", "q", "x")]
    store.ingest("job-1", spec(), [*old, mined("r2", "q", "y", max_new=128)], 10)
    assert telling(store, MODEL, "r1", "r2")["prompt_id"].tolist() == ["p"]
    store.ingest("job-2", spec(), [mined("r2", "p", "x", t=20.0)], 10)
    assert telling(store, MODEL, "r1", "r2").empty
    assert identical_pairs(store, MODEL)["prompt_id"].tolist() == ["p"]
    changed = mined("r2", "p", "x", t=30.0) | {"prompt": "other words under the same id"}
    store.ingest("job-3", spec(), [changed], 10)
    assert identical_pairs(store, MODEL).empty


def test_settings_choose_among_several_minings(store):
    for length in (64, 128):
        both = [mined(run, "p", run, max_new=length) for run in ("r1", "r2")]
        store.ingest(f"job-{length}", spec(), both, 10)
    assert len(telling(store, MODEL, "r1", "r2")) == 2
    found = telling(store, MODEL, "r1", "r2", settings={"max_new": 64, "temperature": 0})
    assert found["max_new"].tolist() == [64]
    with pytest.raises(ValueError, match="'top_k' is no setting"):
        telling(store, MODEL, "r1", "r2", settings={"top_k": 1})
    with pytest.raises(ValueError, match="no setting"):
        identical_pairs(store, MODEL, settings={"x": 1})


def test_a_broken_model_tells_most_and_an_unmeasured_prompt_least(store):
    events = [mined("r1", p, "x", 0.1) for p in "abc"]
    events += [mined("r2", "a", "y", None), mined("r2", "b", "y", "nan"), mined("r2", "c", "y", 5)]
    store.ingest("job", spec(), [*events, mined("r1", "d", "x", None)], 10)
    store.ingest("job", spec(), [mined("r2", "d", "y", None)], 20)
    assert telling(store, MODEL, "r1", "r2")["prompt_id"].tolist() == ["b", "c", "a", "d"]


def test_one_row_per_variant(store):
    events = [mined("r1", f"p{i}", identical=i < 3, departs=i, kld=i / 4) for i in range(4)]
    store.ingest("job", spec(), [*events, mined("r2", "p0")], 10)
    first, second = variants(store, MODEL).to_dict("records")
    assert (first["run_id"], first["prompts"], first["identical"]) == ("r1", 4, 0.75)
    assert (first["departs"], first["kld"], first["agreement"]) == (1.5, 0.375, 0.75)
    assert second["prompts"] == 1
    assert variants(store, "another model").empty


def test_mining_is_stored_once_and_forgotten_with_its_job(store):
    events = [mined("r1", "p"), mined("r1", "q")]
    store.ingest("job", spec(), events, 10)
    version = store.version
    store.ingest("job", spec(), events, 10)
    assert store.version == version
    assert len(store.frame("FROM mined")) == 2
    store.ingest("job", spec(), [mined("r1", "p", kld=0.25)], 20)
    assert store.frame("SELECT kld FROM mined ORDER BY kld")["kld"].tolist() == [0.25, 0.5]
    store.delete("job")
    assert store.frame("FROM mined").empty
    with pytest.raises(StoreError, match=r"\(mined\)"):
        store.ingest("job", spec(), [{"t": 1.0, "type": "mined", "run_id": "r1"}], 10)


def test_jobs_of_other_kinds_are_no_runs(store, example):
    store.ingest("r1", example.spec(), example.whole(), 900)
    before = queries.wide(store)
    events = [example.submitted(), example.measured("odd"), mined("r1", "p"), example.state("done")]
    store.ingest("job", spec(), events, 900)
    assert store.offset("job") == 900
    assert queries.runs(store)["run_id"].tolist() == ["r1"]
    assert queries.models(store)["runs"].tolist() == [1]
    assert set(queries.measurements(store)["run_id"]) == {"r1"}
    assert queries.wide(store).equals(before)
    job = queries.run(store, "job").iloc[0]
    assert (job["kind"], bool(job["is_baseline"]), job["state"]) == ("mine", False, "done")
    assert queries.run(store, "r1")["kind"].tolist() == ["run"]


def test_runs_of_an_old_database_are_runs(tmp_path, example):
    """Before there were kinds: rows without one, in a table that has a key."""
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(MIGRATIONS / "001_init.sql", old)
    path = tmp_path / "results.duckdb"
    with duckdb.connect(str(path)) as connection:
        migrate(connection, old)
        connection.execute(
            "INSERT INTO runs (run_id, spec, state, seen_bytes) VALUES ('r1', ?, 'done', 7)",
            [example.spec()],
        )
    with closing(Store(path)) as store:
        assert queries.runs(store)[["run_id", "kind"]].values.tolist() == [["r1", "run"]]
        assert store.offset("r1") == 7
        store.ingest("r1", example.spec(), [example.state("done", 9.0)], 20)
        store.ingest("job", spec(), [mined("r1", "p")], 10)
    with closing(Store(path)) as store:
        assert store.frame("SELECT run_id, kind FROM runs ORDER BY 1").values.tolist() == [
            ["job", "mine"],
            ["r1", "run"],
        ]
