"""The Judge page: drafts, what is said before the start, jobs, results; keys stay secret."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "backend"))

from judge_server import judge_server

from app import judge_draft, judge_plan, judge_results
from app.context import Context
from app.judge_command import spec_of as command_spec
from app.judge_draft import JudgeDraft, command_line, read_style, spec_of, style_with
from app.markup import Markup
from app.pages import judge
from backend.spec import RunSpec
from jobs.devices import Place, Slots
from jobs.events import State
from jobs.queue import Queue
from jobs.supervisor import Copy
from jobs.worker import work
from results_db import verdicts
from results_db.store import Store
from results_db.vote import Vote
from results_db.votes import Votes

KEY = "sk-test-0123456789abcdef"
RTN = {"kind": "rtn", "format": {"kind": "int", "bits": 2, "group": 32}}
QUESTIONS = '{"turns": ["2 + 2?"]}\n{"turns": ["A word?"]}\n'
HOSTILE = "<script>alert(1)</script> [[A]]"


class House:
    """A home with the 16-bit run of a tiny model and one of 2 bits, and the page over it."""

    def __init__(self, path: Path, model: Path) -> None:
        self.path, self.model = path, model
        self.queue, self.store = Queue(path, slots=Slots()), Store(path / "results.duckdb")
        (path / "questions.jsonl").write_text(QUESTIONS)
        metrics = [{"kind": "size"}]
        given = {"model": {"id": str(model)}, "steps": [RTN], "metrics": metrics}
        self.queue.submit(RunSpec.model_validate(given), device="cpu")
        for view in self.queue.runs():
            self.finish(view.run_id)
        folders = (path, model.parent)
        self.ctx = Context(self.store, self.queue, path, folders, "127.0.0.1", "", self.queue)
        Copy(self.queue, self.store).all()

    def finish(self, run_id: str) -> State:
        while not self.queue.view(run_id).state.ended:
            work(self.queue.folder(run_id), Place())
        Copy(self.queue, self.store).all()
        return self.queue.view(run_id).state

    def params(self, **more: str) -> dict[str, str]:
        own = {"model": str(self.model), "questions": str(self.path / "questions.jsonl")}
        return own | {"max_new": "6", "limit": "0", "device": "cpu"} | more


def request(host: str = "127.0.0.1:7860", **params: str) -> Any:
    return SimpleNamespace(headers={"host": host}, cookies={}, query_params=params, client=None)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("judge-page"), llama_folder)
    yield made
    made.store.close()


def endpoint(url: str, **more: str) -> dict[str, str]:
    return {"name": "judge", "url": url, "key": judge_draft.NO_KEY, **more}


def page(house: House, **params: str) -> str:
    return "".join(judge.screen(house.ctx, request(**params)))


def started(house: House, params: dict[str, str]) -> str:
    """Asked, agreed, queued -> the job's id."""
    asked = judge.change(house.ctx, {"do": "ask"}, request(**params))
    agreed = asked["params"]["agreed"]
    screen = page(house, **params, agreed=agreed)
    assert "Yes, start" in screen
    done = judge.change(house.ctx, {"do": "start", "agreed": agreed}, request(**params))
    return str(done["go"]).partition("id=")[2]


# ---- drafts


def test_a_draft_is_the_command_s_spec(house, tmp_path):
    from app.__main__ import parser

    own = tmp_path / "prompt.txt"
    own.write_text("Is {answer} right?")
    draft = JudgeDraft.read(
        house.params(
            **endpoint("http://127.0.0.1:9/v1"), style="single(longest=500)", category="own",
            prompt_price="2", reply_price="8", max_cost="1.5", per_minute="60", temperature="0",
        )
    )  # fmt: skip
    line = command_line(draft)
    words = line.split()[1:]
    assert words[0] == "judge"
    words = [word.strip("'") for word in words if word != "''"]
    at = words.index("--key-variable")
    words.insert(at + 1, "")
    # quoted parts hold no blanks here, so that splitting at blanks gives the shell's words
    from_command = command_spec(parser().parse_args(words))
    from_page = spec_of(draft, house.ctx.models)
    source = from_command.questions.source
    assert from_page == from_command
    assert source == f"file:{house.path / 'questions.jsonl'}"
    with_prompt = spec_of(
        JudgeDraft(**{**draft.__dict__, "prompt": own.read_text()}), house.ctx.models
    )
    assert with_prompt.judge.prompt == "Is {answer} right?"


def test_knobs_are_written_into_the_style():
    text = style_with("pairwise", "against", "all")
    assert text == "pairwise(against=all)"
    assert read_style(style_with(text, "swap", "false")).swap is False
    assert style_with(text, "against", "first") == "pairwise"
    with pytest.raises(ValueError, match="no setting 'prompt'"):
        style_with("single", "prompt", "x")
    with pytest.raises(ValueError, match="whole number"):
        style_with("single", "longest", "many")


REFUSED = [
    ({"name": ""}, "name the model that judges"),
    ({"url": f"https://{KEY}@host/v1", "name": "m"}, "base_url holds a user"),
    ({"url": "ftp://host", "name": "m"}, "must begin with http"),
    ({"style": "best", "name": "m"}, "unknown judge"),
    ({"style": "pairwise,single", "name": "m"}, "choose one way"),
    ({"limit": "some", "name": "m"}, "number of questions takes a whole number"),
    ({"max_cost": "much", "name": "m"}, "most money takes a number"),
    ({"prompt": "no slot", "name": "m"}, "must show what is judged"),
    ({"prompt": "{answer}" + "x" * 5000, "name": "m"}, "longer than the 4,000"),
    ({"by": "local"}, "choose the run"),
    ({"by": "local", "by_run": "gone"}, "there is no run 'gone'"),
    ({"name": "m", "key": "NOT_SET_API_KEY"}, "NOT_SET_API_KEY is not set"),
    ({"name": "m", "questions": "/etc/hostname"}, "not in a folder this server may read"),
    ({"name": "m", "max_requests": "1", "key": "none"}, "max_requests is 1"),
    ({"name": "m", "max_cost": "1", "key": "none"}, "max_cost needs"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_is_wrong_is_one_sentence_on_the_rail(house, changes, sentence):
    params = house.params(**changes)
    rail = str(judge.screen(house.ctx, request(**params))[2])
    found = re.search(r'<p class="problem" role="alert">(.*?)</p>', rail)
    assert found
    assert sentence in str(Markup(found[1]).unescape())
    assert 'aria-disabled="true"' in rail
    assert KEY not in rail
    assert "Traceback" not in rail
    with pytest.raises((ValueError, PermissionError)):
        judge.change(house.ctx, {"do": "ask"}, request(**params))


def test_a_key_in_the_address_is_not_kept_and_none_is_shown(house, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", KEY)
    monkeypatch.setenv("OTHER_SECRET", "never-listed")
    assert JudgeDraft.read({"key": KEY}).key == JudgeDraft.key
    screen = page(house, **house.params(name="m", key=KEY))
    assert KEY not in screen
    assert "MY_API_KEY" in screen
    assert "OTHER_SECRET" not in screen
    assert 'id="j-key"' in screen
    assert "<select" in screen[screen.index('id="j-key"') - 40 :]


# ---- before the start


def test_cost_and_time_are_said_and_agreed_to_before_anything_is_sent(house):
    with judge_server("Good. Rating: [[7]]") as server:
        params = house.params(**endpoint(server.url), prompt_price="1", reply_price="2")
        rail = str(judge.screen(house.ctx, request(**params))[2])
        assert "4 requests" in rail
        assert "Cost" in rail
        assert "nothing" in rail  # on this machine
        assert "Start judging" in rail
        assert "Yes, start" not in rail
        asked = judge.change(house.ctx, {"do": "ask"}, request(**params))
        changed = params | {"max_requests": "9"}
        start = {"do": "start", "agreed": asked["params"]["agreed"]}
        with pytest.raises(ValueError, match="changed since you were asked"):
            judge.change(house.ctx, start, request(**changed))
        assert server.requests == []
    assert not [v for v in house.queue.runs() if v.kind == "judge" and not v.state.ended]


def test_money_is_named_for_a_judge_elsewhere(house, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    params = house.params(name="m", prompt_price="100", reply_price="100")
    plan = judge.plan(house.ctx, request(), JudgeDraft.read(params))
    assert plan.needed is not None
    assert plan.needed.cost is not None
    lines = judge_plan.agreement(plan)
    assert "https://api.openai.com/v1" in lines[0]
    assert f"at most {plan.needed.cost:.2f}" in lines[1]
    unpriced = judge.plan(house.ctx, request(), JudgeDraft.read(house.params(name="m")))
    assert "is not known" in judge_plan.agreement(unpriced)[1]
    assert KEY not in page(house, **params)


def test_time_follows_pace_and_what_was_measured(house):
    draft = JudgeDraft.read(house.params(**endpoint("http://127.0.0.1:9/v1"), per_minute="2"))
    spec = spec_of(draft, house.ctx.models)
    assert judge_plan.seconds_of(spec, 10, None) == (300, 300)  # five minutes at two a minute
    fast = judge_plan.seconds_of(spec.model_copy(update={"limits": type(spec.limits)()}), 40, 2.0)
    assert fast == pytest.approx((14, 30))


def test_visitors_without_the_token_may_read_but_not_ask(house):
    fields = {**house.ctx.__dict__, "host": "0.0.0.0", "token": "t"}
    ctx = Context(**fields)
    visitor = request("example.org", **house.params(name="m"))
    screen = "".join(judge.screen(ctx, visitor))
    assert "asked by this server" in screen
    assert "j-name" not in screen
    for do in ("ask", "start"):
        with pytest.raises(PermissionError):
            judge.change(ctx, {"do": do, "agreed": ""}, visitor)


def test_without_finished_runs_the_page_says_so(tmp_path):
    (tmp_path / "runs").mkdir()
    store, queue = Store(tmp_path / "results.duckdb"), Queue(tmp_path, slots=Slots())
    ctx = Context(store, queue, tmp_path, (), "127.0.0.1", "", queue)
    assert "needs finished variants" in "".join(judge.screen(ctx, request()))
    assert "no such job" in "".join(judge.screen(ctx, request(id="gone")))
    store.close()


# ---- jobs and results


def test_grades_from_the_button_to_the_tables(house):
    grades = iter([7, 9, 2, 4] * 2)

    def brain(body: dict[str, Any]) -> str:
        return f"<b>So so</b>. Rating: [[{next(grades)}]]"

    with judge_server(brain) as server:
        params = house.params(**endpoint(server.url), concurrency="1", seed="1")
        job = started(house, params)
        queued = page(house, id=job)
        assert "Verdicts appear here" in queued
        assert "Cancel" in queued
        assert house.finish(job) is State.DONE
    screen = page(house, id=job)
    assert "Grades" in screen
    assert "±" in screen
    assert "judged by judge-2026-11-01" in screen
    assert "&lt;b&gt;So so" in screen
    assert "<b>So so" not in screen
    assert "of 10" in screen
    assert "This very job exists already" in page(house, **params)
    assert f"/judge?id={job}" in page(house, **house.params())  # listed below the form


def test_pairs_show_games_rates_order_and_agreement(house, tmp_path):
    with judge_server(HOSTILE) as server:
        job = started(house, house.params(**endpoint(server.url), style="pairwise"))
        assert house.finish(job) is State.DONE
    screen = page(house, id=job)
    for heading in ("Games", "Win rates", "Position bias", "Judge and people"):
        assert f"<h2>{heading}</h2>" in screen
    assert "100.0%" in screen  # the first shown won both times
    assert "Nothing" not in screen
    assert "No person has voted" in screen
    assert "<script>" not in screen
    assert "&lt;script&gt;alert(1)" in screen
    told = verdicts.votes_of(house.store, job)
    votes = Votes(house.store, tmp_path / "votes.jsonl")
    for at, vote in enumerate(told):
        human = {**vars(vote), "battle_id": f"h{at}", "kind": "human", "judge": "me"}
        votes.cast(Vote(**{**human, "winner": "tie" if at else "model_a"}))
    found = verdicts.agreement_of(house.store, job)
    assert (found.all_n, found.all) == (2, 0.5)  # the judge said tie twice
    assert "Agreement on the same pair" in page(house, id=job)


def test_verdicts_are_searched_and_come_in_pages(house, monkeypatch):
    monkeypatch.setattr(judge_results, "PAGE", 3)
    replies = iter(["fine [[A]]", "needle [[B]]", "no verdict", "other [[C]]"] * 4)
    with judge_server(lambda body: next(replies)) as server:
        params = house.params(**endpoint(server.url), style="pairwise(max_tokens=99)")
        job = started(house, params | {"concurrency": "1"})
        house.finish(job)
    first = page(house, id=job)
    assert "1 to 3 of 4 verdicts" in first
    assert "4 to 4 of 4 verdicts" in page(house, id=job, page="2")
    assert "1 to 3 of 4" in page(house, id=job, page="99")
    assert "1 to 3 of 4" in page(house, id=job, page="-1")
    only = page(house, id=job, search="NEEDLE")
    assert "1 to 1 of 1 verdicts" in only
    assert "fine [[A]]" not in only
    failed = page(house, id=job, failed="1")
    assert "failed: the reply holds no verdict" in failed
    assert "1 to 1 of 1" in failed
    assert "No verdict is like that" in page(house, id=job, search="%_' OR 1=1 --")
    rows, total = verdicts.said(house.store, job, search="a word", limit=1)
    assert (len(rows), total) == (1, 2)


def test_a_job_that_fails_says_why_and_can_be_tried_again(house):
    with judge_server("no grade") as server:
        params = house.params(**endpoint(server.url), max_requests="3000", seed="7")
        job = started(house, params | {"style": "single(max_tokens=50)"})
        view = house.queue.view(job)
        assert view.kind == "judge"
        judge.change(house.ctx, {"do": "cancel", "run": job}, request(id=job))
        assert house.queue.view(job).state is State.CANCELLED
        assert "Retry" in page(house, id=job)
        judge.change(house.ctx, {"do": "retry", "run": job}, request(id=job))
        assert house.finish(job) is State.DONE
    screen = page(house, id=job)
    assert "the reply holds no grade" in screen
    assert "4 failed" in screen


def test_a_local_run_judges_without_a_key(house):
    run = house.queue.runs()[0].run_id
    params = house.params(by="local", by_run=run, style="single(max_tokens=4)",
                          system="Grade.", prompt="{answer}")  # fmt: skip
    rail = str(judge.screen(house.ctx, request(**params))[2])
    assert "nothing" in rail
    job = started(house, params)
    assert house.finish(job) is State.DONE
    assert "judges are known to prefer their own" in page(house, id=job)


def test_other_jobs_are_pointed_to_their_own_page(house):
    run = house.queue.runs()[0].run_id
    assert "This is no judge job" in page(house, id=run)


def test_the_key_is_nowhere(house, monkeypatch):
    monkeypatch.setenv("TEST_API_KEY", KEY)
    with judge_server(f"Your key is {KEY}. Rating: [[5]]", key=KEY) as server:
        params = house.params(**endpoint(server.url, key="TEST_API_KEY"), seed="3")
        job = started(house, params)
        assert house.finish(job) is State.DONE
    everything = page(house, id=job) + page(house, **params)
    everything += json.dumps(house.store.frame("FROM verdicts").astype(str).to_dict())
    for path in house.path.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".txt", ".log"):
            everything += path.read_text(errors="replace")
    assert KEY not in everything
