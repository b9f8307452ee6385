"""Jobs that measure no model: listed and opened, and absent where runs are compared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import seeded

from app import api, rows, status
from app.context import Context, Picks
from app.pages import compare, jobs, run
from app.views import model_of, recipe_in, spec_data
from backend.spec import MineSpec, ModelRef
from jobs.events import append, read

ERROR = {"type": "ValueError", "message": "no room", "todo": "make some", "traceback": ""}


@pytest.fixture(scope="module")
def ctx(tmp_path_factory) -> Iterator[Context]:
    """A tour, a mining job at work, and one that failed."""
    home = tmp_path_factory.mktemp("home")
    seeded.fill(home)
    queue = seeded.queue_of(home)
    runs = tuple(view.run_id for view in queue.runs()[:2])
    for seed in range(2):
        queue.submit(
            MineSpec(model=ModelRef(id="demo"), runs=runs, prompts=("a", "b"), seed=seed),
            device="cpu",
        )
    working, failed = mining(queue)
    for job in (working, failed):
        append(queue.folder(job), "state", state="running")
        append(queue.folder(job), "stage", stage="mine", status="started")
    append(queue.folder(working), "progress", stage="mine", fraction=0.4, item="variant 1 of 2, a")
    append(queue.folder(working), "note", block=None, module="", text="prompt b is left out: long")
    append(queue.folder(failed), "state", state="failed", error=ERROR)
    store = seeded.store_of(home)
    yield Context(store, queue, home, (), "127.0.0.1", "", queue)
    store.close()


def mining(queue) -> list[str]:
    return [view.run_id for view in queue.runs() if view.kind == "mine"]


def test_the_jobs_page_lists_them_with_what_they_do(ctx):
    page = jobs.screen(ctx, jobs.Wanted(open=tuple(mining(ctx.runs))))
    assert page.count("Mine 2 prompts on 2 variants</a>") == 2
    assert "variant 1 of 2, a" in page
    assert "no room" in page
    assert "prompt b is left out" in page
    found = jobs.screen(ctx, jobs.Wanted(search="mine prompts"))
    assert found.count('class="job-line"') == 2


def test_the_run_page_opens_them(ctx):
    working, failed = mining(ctx.runs)
    head, *_, below = run.screen(ctx, Picks(id=working))
    assert "Mine 2 prompts on 2 variants" in head
    assert "on demo" in head
    assert "16-bit" not in head
    assert "max_new" in below
    assert "no room" in run.screen(ctx, Picks(id=failed))[0]
    beside = run.screen(ctx, Picks(id=working, against=ctx.runs.runs()[0].run_id))
    assert "What decided it" in beside[-1]
    assert failed not in beside[-1]  # a job of another kind is nothing to compare settings with


def test_they_are_no_runs_where_runs_are_compared(ctx):
    jobs_there = set(mining(ctx.runs))
    assert not jobs_there & set(rows.wide(ctx.store, "demo")["run_id"])
    counts = compare.progress(ctx, "demo")
    assert counts == {"done": len(ctx.runs.runs()) - 2}
    assert not jobs_there & {line["run_id"] for line in list_runs(ctx)}


def list_runs(ctx: Context) -> list[dict]:
    return [api.summary(view) for view in ctx.runs.runs() if view.kind == "run"]


def test_they_are_told_in_their_own_words(ctx):
    view = ctx.runs.view(mining(ctx.runs)[0])
    assert recipe_in(view).name == "Mine 2 prompts on 2 variants"
    assert (spec_data(view)["kind"], model_of(view)) == ("mine", "demo")
    assert status.status(ctx)["text"].startswith("Running Mine 2 prompts on 2 variants, mine, 40%")
    told = api.full(ctx, view.run_id)
    assert (told["recipe"], told["measurements"]) == (view.recipe, [])
    assert told["notes"] == ["prompt b is left out: long"]


def test_a_kind_from_the_future_breaks_no_page(ctx):
    working = mining(ctx.runs)[0]
    path = ctx.home / "runs" / working / "spec.json"
    text = path.read_text()
    path.write_text(text.replace('"mine"', '"from_the_future"'))
    later = Context(ctx.store, seeded.queue_of(ctx.home), ctx.home)
    try:
        assert "Mine 2 prompts" in jobs.screen(later, jobs.Wanted())
        assert "Mine 2 prompts" in run.screen(later, Picks(id=working))[0]
        assert status.status(later)["text"]
    finally:
        path.write_text(text)
    assert read(ctx.home / "runs" / working)[0]
