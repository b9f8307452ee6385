"""Judge jobs through queue, worker and database, on a tiny model and a stand-in endpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "backend"))

from judge_server import judge_server

from backend.judges import local
from backend.judges.spec import JudgeSpec
from backend.spec import RunSpec
from jobs.devices import Place, Slots
from jobs.events import State, read
from jobs.queue import Queue
from jobs.supervisor import Copy
from jobs.worker import DONE, FAILED, work
from results_db import judging, verdicts
from results_db.store import Store
from results_db.votes import Votes

QUESTIONS = [
    {"id": "two", "category": "math", "turns": ["2 + 2?", "And 3?"], "references": ["4", "5"]},
    {"id": "one", "category": "writing", "turns": ["A word?"]},
]
RTN = {"kind": "rtn", "format": {"kind": "int", "bits": 2, "group": 32}}

SHORT = {"system": "A or B?", "prompt": "{answer_a} {answer_b}"}  # the model's context is 256


class Home:
    """A home with the 16-bit run of a tiny model and one of 2 bits."""

    def __init__(self, path: Path, model: Path) -> None:
        path.mkdir()
        self.path, self.model = path, {"id": str(model)}
        self.questions = path / "questions.jsonl"
        self.questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
        self.queue = Queue(path, slots=Slots())
        size = {"kind": "size"}
        spec = RunSpec.model_validate({"model": self.model, "steps": [RTN], "metrics": [size]})
        self.rounded = self.queue.submit(spec, device="cpu")
        for view in self.queue.runs():
            assert self.finish(view.run_id) is State.DONE
        self.plain = next(v.run_id for v in self.queue.runs() if v.run_id != self.rounded)

    def spec(self, **knobs: Any) -> JudgeSpec:
        given = {
            "model": self.model,
            "questions": {"source": f"file:{self.questions}"},
            "answers": {"max_new": 6},
            **knobs,
        }
        given["limits"] = {"backoff_s": 0.0, **given.get("limits", {})}
        return JudgeSpec.model_validate(given)

    def submit(self, **knobs: Any) -> str:
        return self.queue.submit(self.spec(**knobs), device="cpu")

    def finish(self, run_id: str) -> State:
        """Do every stage, here."""
        while not self.queue.view(run_id).state.ended:
            assert work(self.queue.folder(run_id), Place()) in (DONE, FAILED)
        return self.queue.view(run_id).state

    def events(self, run_id: str, type: str) -> list[dict[str, Any]]:
        return [event for event in read(self.queue.folder(run_id))[0] if event["type"] == type]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Home:
    return Home(tmp_path_factory.mktemp("judge") / "home", llama_folder)


@pytest.fixture
def store(home: Home, tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "results.duckdb")) as store:
        yield store


def endpoint(url: str) -> dict[str, str]:
    return {"kind": "endpoint", "model": "judge", "base_url": url, "key_variable": ""}


def test_a_pairwise_job_from_submission_to_votes(home, store, tmp_path):
    with judge_server("The first. [[A]]") as server:
        run_id = home.submit(judge={"kind": "pairwise"}, judge_model=endpoint(server.url))
        view = home.queue.view(run_id)
        assert (view.kind, view.recipe) == ("judge", "Judge 2 variants by judge (pairwise)")
        assert view.stages == ("answer", "judge")
        assert view.spec.runs == (home.plain, home.rounded)  # the 16-bit run is what all meet
        assert home.submit(judge={"kind": "pairwise"}, judge_model=endpoint(server.url)) == run_id
        assert home.finish(run_id) is State.DONE
    assert len(server.requests) == 6  # three turns in both orders
    answers = home.events(run_id, "answer")
    assert len(answers) == 6
    assert {a["seed"] for a in answers} == {0}
    assert len(list((home.path / "chat" / "answers").rglob("*.json"))) >= 6
    Copy(home.queue, store).all()
    assert verdicts.jobs(store).iloc[0]["judge"] == "judge-2026-11-01"
    assert verdicts.bias(store, run_id).first_bias == 1
    table = verdicts.win_table(store, run_id)
    assert set(table["ties"]) == {3}
    votes = Votes(store, tmp_path / "votes.jsonl")
    assert verdicts.cast_votes(store, votes) == 3
    rows = votes.frame(kinds=("judge",), text=True)
    names = verdicts.variant_names(store)
    assert {(r.model_a, r.model_b) for r in rows.itertuples()} == {
        (names[home.plain], names[home.rounded])
    }
    two = rows[rows["turn"] == 2].iloc[0]
    assert two["prompt"] == "2 + 2?\n\nAnd 3?"
    assert [m["role"] for m in two["conversation_a"]] == ["user", "assistant"] * 2


def test_grades_of_named_runs(home, store):
    with judge_server("Rating: [[4]]") as server:
        run_id = home.submit(runs=[home.rounded], judge_model=endpoint(server.url))
        assert home.finish(run_id) is State.DONE
    Copy(home.queue, store).all()
    rows = judging.grades(verdicts.judgments(store, run_id))
    assert rows["overall"].tolist() == [4.0]
    assert rows["failed"].tolist() == [0]


def test_an_answer_of_a_chat_is_not_made_again(home, monkeypatch):
    import backend.mine

    with judge_server("Rating: [[4]]") as server:
        judge = {"kind": "single", "max_tokens": 100}  # another judge of the same answers
        first = home.submit(judge_model=endpoint(server.url))
        assert home.finish(first) is State.DONE
        run_id = home.submit(judge=judge, judge_model=endpoint(server.url))
        monkeypatch.setattr(backend.mine, "answer_to", None)
        assert home.finish(run_id) is State.DONE
    texts = [[a["text"] for a in home.events(job, "answer")] for job in (first, run_id)]
    assert texts[0] == texts[1]


def test_a_local_judge_by_its_probabilities(home, store, monkeypatch):
    monkeypatch.setattr(local, "LIKELIEST", 320)  # a random model has A and B among no favourites
    judge = {"kind": "preference", **SHORT}
    run_id = home.submit(judge=judge, judge_model={"kind": "local", "run": home.plain})
    assert home.finish(run_id) is State.DONE
    said = home.events(run_id, "verdict")
    assert len(said) == 6
    assert all(1 < v["preference"] < 2 for v in said)
    assert all(v["judge"].endswith(f"(run {home.plain})") for v in said)
    notes = "\n".join(event["text"] for event in home.events(run_id, "note"))
    assert "is one of the judged variants: judges are known to prefer their own" in notes
    assert "is a variant of the judged model" in notes
    Copy(home.queue, store).all()
    row = verdicts.win_rates(store, run_id).iloc[0]
    assert row["n"] == 3
    by_hand = {}
    for v in said:
        by_hand.setdefault((v["question"], v["turn"]), []).append(v["preference"] - 1)
    means = [sum(pair) / 2 for pair in by_hand.values()]
    assert row["win_rate"] == pytest.approx(100 * sum(means) / 3)


def test_a_local_judge_that_says_nothing_of_use_ends_the_job(home):
    judge = {"kind": "single", "max_tokens": 4, "system": "Grade.", "prompt": "{answer}"}
    model = {"kind": "local", "run": home.rounded}
    run_id = home.submit(judge=judge, judge_model=model, limits={"failures": 3})
    assert home.finish(run_id) is State.FAILED
    error = home.queue.view(run_id).error
    assert "the last 3 verdicts failed" in error["message"]
    assert len(home.events(run_id, "verdict")) == 3
    assert all(v["text"] for v in home.events(run_id, "verdict"))


def test_a_prompt_beyond_the_local_judges_context_is_a_failed_verdict(home):
    judge = {"kind": "single"}
    model = {"kind": "local", "run": home.plain}
    run_id = home.submit(judge=judge, judge_model=model, limits={"failures": 100})
    assert home.finish(run_id) is State.DONE
    assert all("context" in v["failed"] for v in home.events(run_id, "verdict"))


def test_a_job_waits_for_its_runs_and_its_judge(home):
    spec = RunSpec.model_validate({"model": home.model, "steps": [RTN], "seed": 1})
    waiting = home.queue.submit(spec, device="cpu")
    model = {"kind": "local", "run": waiting}
    run_id = home.submit(runs=[home.plain], judge_model=model)
    assert home.queue.view(run_id).waits == (waiting,)
    run_id = home.submit(
        runs=[home.plain, waiting], judge_model={"kind": "local", "run": home.plain}
    )
    assert home.queue.view(run_id).waits == (waiting,)
    home.queue.cancel(waiting)


REFUSED = [
    ({"judge_model": {"kind": "endpoint"}}, "give the name of the model"),
    ({"judge_model": {"kind": "endpoint", "model": "m"}}, "OPENAI_API_KEY is not set"),
    ({"runs": ["20200101-000000-000000"]}, "there is no run"),
    ({"judge_model": {"kind": "local", "run": "20200101-000000-000000"}}, "there is no run"),
    ({"judge_model": {"kind": "local", "run": ""}}, "run"),
    ({"limits": {"max_requests": 5}}, "max_requests is 5"),
    ({"questions": {"source": "file:/no/such/file"}}, "cannot read"),
    ({"questions": {"source": "pool", "categories": ["cooking"]}}, "no question is left"),
    ({"judge": {"kind": "pairwise"}, "runs": "plain"}, "needs two runs"),
    ({"runs": "twice"}, "named twice"),
]


@pytest.mark.parametrize(("knobs", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_judged_is_refused_in_one_sentence(home, monkeypatch, knobs, words):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    runs = {"plain": [home.plain], "twice": [home.plain] * 2}
    given = {"judge_model": endpoint("http://127.0.0.1:1/v1"), **knobs}
    if isinstance(given.get("runs"), str):
        given["runs"] = runs[given["runs"]]
    before = len(home.queue.runs())
    with pytest.raises(ValueError) as caught:
        home.submit(**given)
    assert words in str(caught.value)
    assert len(home.queue.runs()) == before


def test_no_finished_run_no_judging(home, tmp_path):
    empty = Queue(tmp_path, slots=Slots())
    with pytest.raises(ValueError, match="is finished; run some recipes first"):
        empty.submit(home.spec(judge_model=endpoint("http://127.0.0.1:1/v1")), device="cpu")
