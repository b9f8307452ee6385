"""Pages over a seeded home, named endpoints, plain routes, and what visitors may not do."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import pytest
import seeded
import uvicorn
from gradio_client import Client

from app import first_tour, pages, server, status
from app.__main__ import parser
from app.commands import merged, specs_of
from app.context import TOKEN_NAME, Context, Picks
from app.draft import Draft
from app.pages import compare, jobs, new_run, run
from app.specs import defaults, differences, flat, reproduce
from backend.recipes import parse
from backend.spec import Calibration, ModelRef, RunSpec
from jobs.events import State

STATES = ["failed", "running", "queued", "cancelled"]
TOKEN = "let-me-in"


@pytest.fixture(scope="module")
def ctx(tmp_path_factory) -> Iterator[Context]:
    """Eight finished runs, one failed, one running, one queued, one cancelled."""
    home = tmp_path_factory.mktemp("home")
    seeded.fill(home, states=STATES)
    store, queue = seeded.store_of(home), seeded.queue_of(home)
    yield Context(store, queue, home, (), "127.0.0.1", "", queue)
    store.close()


@pytest.fixture
def empty(tmp_path) -> Iterator[Context]:
    (tmp_path / "runs").mkdir()
    store, queue = seeded.store_of(tmp_path), seeded.queue_of(tmp_path)
    yield Context(store, queue, tmp_path, (), "127.0.0.1", "", queue)
    store.close()


def run_in(ctx: Context, state: str) -> str:
    return next(v.run_id for v in ctx.runs.runs() if v.state == state)


def request(**query: str) -> Any:
    """What handlers see of somebody at this machine."""
    return SimpleNamespace(headers={"host": "127.0.0.1:7860"}, cookies={}, query_params=query)


# ---- pages


def test_pages_are_found_ordered_and_complete():
    found = pages.find()
    assert [p.title for p in found if p.in_bar] == [
        "Compare",
        "New run",
        "Jobs",
        "Chat",
        "Arena",
        "Leaderboard",
        "Kernels",
        "Learn",
    ]
    assert len({p.path for p in found}) == len(found)
    keys = [p.key for p in found if p.in_bar]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("home", ["ctx", "empty"])
def test_every_page_builds(home, request):
    blocks = server.build(request.getfixturevalue(home))
    assert isinstance(blocks, gr.Blocks)
    assert {path for path, *_ in blocks.pages} == {p.path.strip("/") for p in pages.find()}


def test_only_the_named_endpoints_are_public(ctx):
    blocks = server.build(ctx)
    public = {f.api_name for f in blocks.fns.values() if f.api_visibility == "public"}
    assert public == {"submit_run", "list_runs", "results", "cancel_run"}


def test_compare_tells_what_is_there_and_what_is_still_coming(ctx):
    head, above, chart, below, side, table = compare.screen(ctx, Picks())
    assert "8 of 12 runs so far" in head
    assert "On demo, " in head
    assert json.loads(chart)["figure"]["data"]
    assert "Perplexity" in above
    assert "Bits per weight" in below
    assert "Nothing selected" in side
    assert table.count("<tr data-run") == 8


def test_compare_offers_the_tour_on_an_empty_home(empty):
    head, *others = compare.screen(empty, Picks())
    assert "First tour" in head
    assert not any(others)


def test_selected_runs_stand_side_by_side_differences_first(ctx):
    done = [v.run_id for v in ctx.runs.runs() if v.state is State.DONE][1:3]
    *_, side, table = compare.screen(ctx, Picks(runs=tuple(done)))
    assert "2 runs side by side" in side
    assert side.index("What differs") < side.index("Numbers")
    assert side.count("quantarena run --model demo") == 2 * 2  # shown and copied
    assert table.count('aria-selected="true"') == 2


def test_the_table_sorts_filters_and_chooses_columns(ctx):
    *_, table = compare.screen(ctx, Picks(sort="-perplexity", columns=("perplexity",)))
    values = [float(v) for v in re.findall(r'class="number"[^>]*>([\d.]+)<small', table)]
    assert values == sorted(values, reverse=True)
    assert "Mean KLD" not in table.split("</thead>")[0].split("<thead>")[1]
    *_, table = compare.screen(ctx, Picks(search="gptq"))
    assert "GPTQ" in table
    assert "RTN" not in table.split("<tbody>")[1]


def test_unlike_conditions_are_announced_and_can_be_chosen(ctx, monkeypatch):
    wide = compare.rows.wide(ctx.store, "demo")
    wide.loc[wide.index[-2:], "perplexity__device"] = "cuda"
    monkeypatch.setattr(compare.rows, "wide", lambda store, model: wide)
    head = next(iter(compare.screen(ctx, Picks())))
    assert "2 left out: measured under other conditions" in head
    assert 'data-param="set"' in head


def test_jobs_show_state_progress_error_and_what_to_do(ctx):
    failed = run_in(ctx, "failed")
    page = jobs.screen(ctx, jobs.Wanted(open=(failed,)))
    assert "1 running, 1 queued" in page
    assert "window 9 of 24" in page
    assert "OutOfMemoryError" in page
    assert "What to do: choose fewer calibration samples" in page
    assert 'role="progressbar"' in page


def test_what_others_wrote_is_text_never_markup(ctx):
    failed = run_in(ctx, "failed")
    page = jobs.screen(ctx, jobs.Wanted(open=(failed,)))
    assert "&lt;b&gt;not bold&lt;/b&gt;" in page
    assert "<b>not bold" not in page
    hostile = "<img src=x onerror=alert(1)>"
    for part in compare.screen(ctx, Picks(search=hostile, runs=(hostile,), family=(hostile,))):
        assert "<img" not in part
    for part in run.screen(ctx, Picks(id=hostile)):
        assert "<img" not in part


def test_finished_sweeps_fold_into_one_line(tmp_path):
    seeded.fill(tmp_path)
    queue = seeded.queue_of(tmp_path)
    groups = jobs.grouped(queue.runs())
    assert [(g.label, len(g.views)) for g in groups] == [(first_tour.LABEL, 12)]


def test_cancel_can_be_taken_back(ctx):
    queued = run_in(ctx, "queued")
    said = jobs.perform(ctx, {"do": "cancel", "run": queued}, request())
    assert said["undo"] == {"do": "uncancel", "run": queued}
    assert ctx.runs.view(queued).state is State.CANCELLED
    jobs.perform(ctx, said["undo"], request())
    assert ctx.runs.view(queued).state is State.QUEUED


def test_run_shows_numbers_layers_settings_and_the_command(ctx):
    run_id = next(v.run_id for v in ctx.runs.runs() if v.state is State.DONE and v.spec.steps)
    other = [v.run_id for v in ctx.runs.runs() if v.state is State.DONE][-1]
    head, above, chart, below = run.screen(ctx, Picks(id=run_id, against=other))
    assert "Perplexity" in head
    assert "quantarena run --model demo --recipe" in head
    assert "Output SQNR" in above
    assert json.loads(chart)["figure"]["data"][0]["type"] == "heatmap"
    assert 'class="differs"' in below
    assert "EPYC" in below


def test_an_unknown_run_is_one_sentence(ctx):
    head, *others = run.screen(ctx, Picks(id="nothing"))
    assert "nothing" in head
    assert not any(others)


def test_the_bar_says_what_runs(ctx):
    said = status.status(ctx)
    assert (said["running"], said["queued"]) == (1, 1)
    assert said["text"].startswith("Running ")
    assert said["models"] == ["demo"]


# ---- new run


def plan_and_form(ctx: Context, **values: str) -> tuple[str, str]:
    draft = Draft(**({"model": "demo"} | values))
    plan = new_run.plan_of(ctx, draft)
    return new_run.blocks(ctx, draft), new_run.rail_part(draft, plan)


def test_a_sweep_is_counted_and_estimated(ctx):
    form_part, rail = plan_and_form(ctx, recipes="rtn(bits=3|4,group=32|64)", metrics="size")
    assert "4 runs" in form_part
    assert "Queue 4 runs" in rail
    assert "Memory" in rail


def test_a_bad_line_is_one_sentence_and_loses_nothing(ctx):
    form_part, rail = plan_and_form(ctx, recipes="rtn(bits=4)\ngptqq(bits=3)")
    assert "did you mean" in form_part
    assert "rtn(bits=4)\ngptqq(bits=3)" in form_part
    assert 'aria-disabled="true"' in rail


def test_edits_change_the_draft(ctx):
    draft = Draft(model="demo", recipes="rtn(bits=4)", edit="0")
    assert new_run.set_knob(draft, {"step": 0, "knob": "format.bits", "value": "2, 3"}) == {
        "recipes": "rtn(bits=2|3)"
    }
    assert new_run.add_step(draft, {"value": "activations"}) == {
        "recipes": "rtn(bits=4)+activations"
    }
    two = Draft(model="demo", recipes="rtn(bits=4)+activations(bits=8)", edit="0")
    assert new_run.move_step(two, {"step": 1})["recipes"] == "activations(bits=8)+rtn(bits=4)"
    assert new_run.drop_step(two, {"step": 0})["recipes"] == "activations(bits=8)"
    assert new_run.toggle_metric(draft, {"kind": "size"})["metrics"].count("size") == 0
    knob = {"kind": "perplexity", "knob": "limit", "value": "8"}
    assert "perplexity(limit=8)" in new_run.set_metric_knob(draft, knob)["metrics"]


def test_queueing_makes_the_runs_and_says_so(empty):
    draft = Draft(model="demo", recipes="rtn(bits=4|3)", metrics="size")
    said = new_run.submit(empty, draft, request())
    assert said == {"toast": "2 queued", "go": "/jobs"}
    again = new_run.submit(empty, draft, request())
    assert again["toast"] == "0 queued, 2 existed already"


def test_the_tour_is_submitted_with_one_click(empty):
    queue = empty.change(request())
    assert len(first_tour.start(queue)) == 12
    views = empty.runs.runs()
    assert len(views) == 12
    assert sum(not v.spec.steps for v in views) == 1


# ---- specs in words


def test_a_reproduced_command_names_what_differs_from_the_defaults(ctx):
    view = next(v for v in ctx.runs.runs() if "smoothquant" in v.recipe)
    line = reproduce(view.spec.model_dump_json())
    assert "--model demo" in line
    recipe = re.search(r"--recipe '([^']+)'", line)
    assert recipe
    assert parse(recipe[1]) == view.spec.steps
    assert "perplexity(limit=" in line


def test_a_reproduced_command_gives_the_same_calibration_back():
    settings = Calibration(dataset="c4", samples=32, length=256, seed=7)
    spec = RunSpec(model=ModelRef(id="demo"), steps=parse("gptq"), calibration=settings)
    words = shlex.split(reproduce(spec.model_dump_json()))
    ((_, baseline), (_, again)) = specs_of(parser().parse_args(words[1:]))
    assert baseline.is_baseline
    assert again.calibration == settings
    assert again.steps == spec.steps


def test_differences_skip_knobs_that_only_one_has_at_their_defaults(ctx):
    specs = [v.spec.model_dump(mode="json") for v in ctx.runs.runs()]
    rtn = next(s for s in specs if s["steps"] and s["steps"][0]["kind"] == "rtn")
    gptq = next(s for s in specs if s["steps"] and s["steps"][0]["kind"] == "gptq")
    names = [name for name, _ in differences([rtn, gptq])]
    assert "step 1" in names
    assert "step 1 · damping" not in names
    assert differences([rtn, rtn]) == []
    told = {n for n in defaults(rtn) if not n.startswith("calibration")}
    assert told <= set(flat(rtn))  # an unresolved calibration decides nothing and is not told


# ---- over HTTP


class Served:
    """A server in a thread."""

    def __init__(self, ctx: Context) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            server.build_app(ctx), log_level="error", timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __enter__(self) -> Served:
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def served(ctx) -> Iterator[str]:
    with Served(ctx) as running:
        yield running.url


@pytest.fixture(scope="module")
def locked(ctx) -> Iterator[str]:
    """The same home behind a token, as on a non-loopback address."""
    open_to_all = Context(ctx.store, ctx.runs, ctx.home, (), "0.0.0.0", TOKEN, ctx._queue)
    with Served(open_to_all) as running:
        yield running.url


@pytest.mark.parametrize("page", pages.find(), ids=lambda page: page.name)
def test_every_page_answers_with_our_head_and_nothing_from_elsewhere(page, served):
    answer = httpx.get(served + page.path)
    assert answer.status_code == 200
    for link in re.findall(r'<(?:script|link)[^>]+(?:src|href)="([^"]+)"', answer.text):
        assert not link.startswith(("http:", "https:", "//")), link
    assert "/files/app.js?" in answer.text


@pytest.mark.parametrize(
    "path", ["/files/app.js", "/files/app.css", "/files/plotly.min.js", "/favicon.ico"]
)
def test_assets_are_served(path, served):
    assert httpx.get(served + path).status_code == 200


def test_fonts_named_in_the_styles_are_served(served):
    styles = httpx.get(served + "/files/app.css").text
    fonts = set(re.findall(r'url\("(/[^"]+)"\)', styles))
    assert fonts
    assert {httpx.get(served + font).status_code for font in fonts} == {200}
    assert "http://" not in styles.replace("http://www.w3.org/2000/svg", "")


def test_health_and_status(served):
    assert httpx.get(served + "/healthz").json()["ok"] is True
    assert httpx.get(served + "/api/status").json()["running"] == 1


def test_sql_answers_and_refuses(served):
    good = httpx.post(served + "/api/sql", json={"sql": "SELECT count(*) AS n FROM runs"})
    assert good.json() == {"columns": ["n"], "rows": [[12]]}
    for sql in ("DROP TABLE runs", "SELEC 1"):
        bad = httpx.post(served + "/api/sql", json={"sql": sql})
        assert bad.status_code == 400
        assert bad.json()["error"]
    assert httpx.post(served + "/api/sql", content=b"nonsense").status_code == 400


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_the_table_as_a_file(kind, served):
    answer = httpx.get(f"{served}/download/runs.{kind}?family=gptq")
    assert answer.status_code == 200
    assert f"runs.{kind}" in answer.headers["content-disposition"]
    if kind == "json":
        found = {row["family"] for row in answer.json()}
        assert found == {"gptq", "baseline"}
    assert httpx.get(served + "/download/runs.xls").status_code == 404


def test_a_program_submits_reads_and_cancels(served, ctx):
    client = Client(served, verbose=False)
    run_id = client.predict("demo", "rtn(bits=5)", ["size"], api_name="/submit_run")
    listed = client.predict(api_name="/list_runs")
    assert {"run_id": run_id, "recipe": "rtn(bits=5)", "state": "queued"}.items() <= next(
        line for line in listed if line["run_id"] == run_id
    ).items()
    assert client.predict(run_id, api_name="/cancel_run") == "cancelled"
    done = next(v.run_id for v in ctx.runs.runs() if v.state is State.DONE)
    found = client.predict(done, api_name="/results")
    assert {"perplexity", "bits_per_weight"} <= {m["name"] for m in found["measurements"]}
    with pytest.raises(Exception, match="did you mean 'rtn'"):
        client.predict("demo", "rtnn(bits=4)", ["size"], api_name="/submit_run")
    client.close()


def test_a_visitor_without_the_token_changes_nothing(locked, ctx):
    client = Client(locked, verbose=False)
    before = [(v.run_id, v.state) for v in ctx.runs.runs()]
    queued = run_in(ctx, "queued")
    for arguments, name in (
        (("demo", "rtn(bits=6)", ["size"]), "/submit_run"),
        ((queued,), "/cancel_run"),
    ):
        with pytest.raises(Exception, match="look but not change"):
            client.predict(*arguments, api_name=name)
    assert [(v.run_id, v.state) for v in ctx.runs.runs()] == before
    assert client.predict(api_name="/list_runs")
    client.close()
    assert httpx.post(locked + "/api/sql", json={"sql": "SELECT 1"}).status_code == 403
    assert httpx.post(locked + "/gradio_api/upload").status_code == 403


def test_every_action_of_every_page_needs_the_token(ctx):
    stranger = SimpleNamespace(headers={"host": "10.0.0.7"}, cookies={}, query_params={})
    shut = Context(ctx.store, ctx.runs, ctx.home, (), "0.0.0.0", TOKEN, ctx._queue)
    for do in ("cancel", "uncancel", "retry"):
        with pytest.raises(PermissionError):
            jobs.perform(shut, {"do": do, "run": run_in(ctx, "failed")}, stranger)
    with pytest.raises(PermissionError):
        new_run.submit(shut, Draft(model="demo", recipes="rtn(bits=4)"), stranger)


def test_the_token_in_the_link_becomes_a_cookie(locked):
    with httpx.Client(base_url=locked) as browser:
        answer = browser.get(f"/?token={TOKEN}&x=mean_kld")
        assert answer.status_code == 307
        assert answer.headers["location"] == "/?x=mean_kld"
        assert "httponly" in answer.headers["set-cookie"].lower()
        assert browser.post("/api/sql", json={"sql": "SELECT 1"}).status_code == 200
    wrong = httpx.get(locked + "/?token=guess")
    assert TOKEN_NAME not in wrong.headers["set-cookie"]


def test_a_program_shows_the_token_in_its_header(locked):
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    answer = httpx.post(locked + "/api/sql", json={"sql": "SELECT 1"}, headers=bearer)
    assert answer.status_code == 200


def test_a_port_in_use_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match="--port"):
            server.listening("127.0.0.1", port)


def test_what_many_linears_say_alike_is_printed_once():
    notes = ["one block", "block 0 mlp.up: A: b", "block 1 mlp.up: A: b", "block 1 mlp.down: C"]
    assert merged(notes) == ["one block", "2 linears: A: b", "block 1 mlp.down: C"]


def test_a_note_names_its_places_once():
    places = [{"block": at, "module": name} for at in (0, 3) for name in ("q", "k")]
    assert run._note("t", places) == "4 linears, blocks 0 to 3: t"
    assert run._note("t", places[:1]) == "block 0, q: t"
    assert run._note("t", places[:2]) == "2 linears, block 0: t"
    assert run._note("t", [{"block": None, "module": ""}]) == "t"
    assert run._note("t", [{"block": 2, "module": ""}]) == "block 2: t"


def test_a_reader_that_has_read_enough_is_no_error():
    """As in `quantarena methods | head -1`."""
    command = [sys.executable, "-m", "app", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as listing:
        assert listing.stdout is not None
        assert listing.stdout.readline()
        listing.stdout.close()
        assert listing.stderr is not None
        assert listing.stderr.read() == b""
