"""The page of a mining job: variants, prompts, links to Chat; and answers that go on."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
import seeded
from chat_stand_in import StandIn, token_of
from test_chat_page import Page, home, known, pair

from app.context import Context
from app.pages import jobs, mined
from app.permalink import from_query
from backend.spec import MineSpec, ModelRef
from jobs.events import append
from jobs.queue import Queue

__all__ = ["home", "known", "pair"]  # fixtures

HOSTILE = '<img src=x onerror=alert(1)> say "hi" ~ & 100%'


def told(run: str, prompt: str, text: str, kld: float, departs: int, same: bool) -> dict:
    return {
        "run_id": run, "artifact_id": f"art-{run}", "prompt_id": prompt, "category": "math",
        "language": "English", "prompt": text, "kld": kld, "kld_max": kld, "agreement": 0.75,
        "departs": departs, "tokens": 8, "base_tokens": 9, "finish": "end", "identical": same,
        "answer_hash": "x", "temperature": 0.0, "top_p": 1.0, "max_new": 64, "seed": 0,
        "device": "cpu", "dtype": "float32", "storage": "simulated",
    }  # fmt: skip


@pytest.fixture(scope="module")
def dug(tmp_path_factory) -> Iterator[tuple[Context, str, list[str]]]:
    """A home with a mining job of thirty prompts on three runs."""
    folder = tmp_path_factory.mktemp("dug")
    runs = seeded.fill(folder)[:3]
    queue = Queue(folder, resolve=lambda spec: spec, preflight=lambda spec, device, home: None)
    model = ModelRef(id="demo", content="c0ffee123456")
    spec = MineSpec(model=model, runs=tuple(runs), prompts=tuple(f"p{i}" for i in range(30)))
    job = queue.submit(spec, device="cpu")
    made = folder / "runs" / job
    append(made, "state", state="running")
    for at in range(30):
        text = HOSTILE if at == 29 else f"question {at}?"
        append(made, "mined", **told(runs[0], f"p{at}", text, 0.0, 9, True))
        append(made, "mined", **told(runs[1], f"p{at}", text, at / 10, at % 5, at % 3 == 0))
        append(made, "mined", **told(runs[2], f"p{at}", text, at / 20, 4 + at % 5, True))
    append(made, "state", state="done")
    store = seeded.store_of(folder)
    yield Context(store, queue, folder, (), "127.0.0.1", "", queue), job, runs
    store.close()


def test_prompts_that_tell_most_come_first_with_a_way_to_chat(dug):
    ctx, job, runs = dug
    head, body = mined.screen(ctx, {"id": job})
    assert "Mine" in head
    assert "33.3 %" in body  # 10 of the second run's 30 answers are those of 16 bits
    assert "<img" not in body
    assert body.index("divergence 2.90") < body.index("divergence 2.80")
    assert "1 to 20 of 30 prompts" in body
    assert "parts at token 5 · 1 of 2 quantized variants answer as 16-bit does" in body  # the 29th
    links = [html.unescape(link) for link in re.findall(r'href="(/chat[^"]*)"', body)]
    asked = parse_qs(urlsplit(links[0]).query)
    assert from_query(asked["q"][0]) == [HOSTILE]
    assert asked["runs"] == [f"{runs[0]}~{runs[1]}"]
    assert "21 to 30 of 30 prompts" in mined.screen(ctx, {"id": job, "page": "2"})[1]
    assert "1 to 20 of 30" in mined.screen(ctx, {"id": job, "page": "77"})[1]


def test_prompts_are_searched_and_ranked_by_one_variant(dug):
    ctx, job, runs = dug
    body = mined.screen(ctx, {"id": job, "run": runs[2]})[1]
    assert "divergence 1.45" in body
    assert "divergence 2.90" not in body
    assert "1 to 1 of 1 prompts" in mined.screen(ctx, {"id": job, "search": "QUESTION 17"})[1]
    assert "No prompt is like that" in mined.screen(ctx, {"id": job, "search": "nowhere"})[1]
    assert "1 to 20 of 30" in mined.screen(ctx, {"id": job, "run": "gone"})[1]


def test_other_jobs_and_unknown_ones_are_told(dug):
    ctx, _, runs = dug
    assert "no mining job" in mined.screen(ctx, {"id": runs[0]})[0]
    assert "no such job" in mined.screen(ctx, {"id": "gone"})[0]


def visitor(host: str = "127.0.0.1:7860", **params: str) -> SimpleNamespace:
    return SimpleNamespace(headers={"host": host}, cookies={}, query_params=params, client=None)


def test_without_a_job_the_page_lists_them_and_starts_one(dug):
    ctx, job, _ = dug
    head, below = mined.overview(ctx, visitor())
    assert "Mine " in head
    assert f'href="/mined?id={job}"' in below
    after = mined.start(ctx, visitor(model="demo"))
    new = after["go"].partition("id=")[2]
    view = ctx.runs.view(new)
    assert (view.kind, mined.model_of(view)) == ("mine", "demo")
    ctx.change(visitor()).cancel(new)


def test_nobody_mines_a_model_without_runs_or_from_elsewhere(dug):
    ctx, _, _ = dug
    assert "at least one variant" in mined.overview(ctx, visitor(model="nothing"))[0]
    strange = mined.overview(ctx, visitor(host="elsewhere.example"))[0]
    assert "needs the token" in strange
    assert "<button" not in strange


def test_jobs_link_to_the_page_of_their_kind(dug):
    ctx, job, runs = dug
    body = jobs.screen(ctx, jobs.Wanted(open=tuple(v.label and f"sweep:{v.label}" for v in
                                                   ctx.runs.runs())))  # fmt: skip
    assert f'href="/mined?id={job}"' in body
    assert f'href="/run?id={runs[1]}"' in body
    view = SimpleNamespace(kind="judge", run_id="j")
    assert jobs.where(view) == "/judge?id=j"  # type: ignore[arg-type]


# ---- answers that go on


def shortened(pool: StandIn, at: int = -1) -> None:
    """As if the answer had ended at its limit of tokens."""
    pool.told[at]._view = replace(pool.told[at].view(), finish="length")


def test_an_answer_that_was_cut_off_goes_on(home, pair):
    pool = StandIn({pair[0]: ["The"], pair[1]: ["The", " second"]})
    page = Page(home, pool)
    page.do("send", text="one")
    assert "Continue" not in page.text
    with pytest.raises(ValueError, match="cut off can go on"):
        page.do("extend", run=pair[1])
    for at in range(2):
        shortened(pool, at)
    assert page.answers()[1].count(">Continue<") == 1
    pool.said[pair[1]] = ["The", " second", " one", "."]
    page.do("extend", run=pair[1])
    assert pool.asked[-1][0] == pair[1]
    assert pool.asked[-1][3] == (token_of("The"), token_of(" second"))
    assert pool.asked[-1][1] == pool.asked[-2][1]  # the same conversation
    assert "4, 2 kept" in page.answers()[1]
    assert "Continue" not in page.answers()[1]
    assert "instead of" not in page.answers()[1]
    assert "Continue" in page.answers()[0]  # the other side stays as it was
    page.do("send", text="two")  # the longer answer is what the next prompt follows
    said = [message.content for message in pool.asked[-1][1]]
    assert said[1].endswith(" one.")


def test_only_the_last_answer_goes_on(home, pair):
    pool = StandIn({pair[0]: ["The"], pair[1]: ["The"]})
    page = Page(home, pool)
    page.do("send", text="one")
    for at in range(2):
        shortened(pool, at)
    page.do("send", text="two")
    assert "Continue" not in page.text
    with pytest.raises(ValueError, match="cut off can go on"):
        page.do("extend", run=pair[1])
    with pytest.raises(ValueError, match="no longer shown"):
        page.do("extend", run="gone")


def test_a_refused_continuation_leaves_the_answer(home, pair):
    pool = StandIn({pair[0]: ["The"], pair[1]: ["The", " end"]})
    page = Page(home, pool)
    page.do("send", text="one")
    shortened(pool)
    pool.refuses[pair[1]] = "an answer of 5,000 tokens is not continued"
    with pytest.raises(ValueError, match="is not continued"):
        page.do("extend", run=pair[1])
    assert "The end" in page.answers()[1]
