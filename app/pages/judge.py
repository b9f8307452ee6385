"""Judge: let a language model grade or compare answers, and read what it said."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import gradio as gr
from markupsafe import Markup

from app import judge_form, judge_results, look, rows
from app.context import Context, Visit
from app.judge_draft import JudgeDraft, command_line, key_names, style_with
from app.judge_plan import JudgePlan, plan_of
from app.markup import join, tag
from app.pages.compare import copy_line
from app.pages.jobs import actions, error_part, perform, progress, state_of
from app.sides import variants
from app.views import model_of, spec_data
from app.widgets import connect, live, query, skeleton
from jobs.events import State
from jobs.queue import RunView
from results_db import queries, verdicts
from results_db.variants import shown, variant_names

TITLE, PATH, ORDER, KEY = "Judge", "/judge", 0, ""
KIND = "judge"
LISTED = 50  # earlier jobs


def build(ctx: Context) -> None:
    """A form with its rail; or, with ?id=, one job and all that it found."""
    with gr.Column(elem_classes="page new judge", elem_id="content"):
        top = live("", elem_classes="head")
        with gr.Row(elem_classes="split"):
            form_part = live(skeleton(500), elem_classes="draft")
            rail = live("", elem_classes="card rail")
        below = live("", elem_classes="judge-below")

    def draw(request: gr.Request) -> list[Markup]:
        return screen(ctx, request)

    def act(data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
        return change(ctx, data, request)

    def stamp(request: gr.Request) -> Hashable:
        jobs = [v for v in ctx.runs.runs() if v.kind == KIND]
        return ctx.store.version, tuple((v.run_id, v.state, v.fraction) for v in jobs)

    connect(draw, [top, form_part, rail, below], stamp=stamp, act=act)


def screen(ctx: Context, request: Visit) -> list[Markup]:
    """Head, form, rail, and what lies below."""
    params = query(request)  # type: ignore[arg-type]
    if params.get("id"):
        return one(ctx, params)
    draft = draft_of(ctx, params)
    below = earlier(ctx, draft.model)
    if not ctx.trusted(request):
        return [closed(), Markup(""), Markup(""), below]
    if not variants(ctx.store, draft.model):
        return [judge_form.nobody(draft), Markup(""), Markup(""), below]
    line = copy_line(command_line(draft))
    rail = judge_form.rail(draft, plan(ctx, request, draft), line)
    return [Markup(""), judge_form.blocks(ctx, draft), rail, below]


def draft_of(ctx: Context, params: Mapping[str, Any]) -> JudgeDraft:
    """The draft in the URL, with the last used model where it names none."""
    draft = JudgeDraft.read(params)
    known = [] if draft.model else rows.models(ctx.store)
    return replace(draft, model=draft.model or (known[0] if known else "demo"))


def plan(ctx: Context, request: Visit, draft: JudgeDraft) -> JudgePlan:
    """What the draft takes, the agreement aside."""
    states = tuple((view.run_id, view.state) for view in ctx.runs.runs())
    version = hash((ctx.store.version, states, tuple(key_names())))
    return plan_of(ctx, ctx.change(request), replace(draft, agreed=""), version)


def closed() -> Markup:
    """What a visitor without the token sees."""
    words = (
        "You may read every result below, but asking a judge needs the token: open the link that "
        "the server printed when it started."
    )
    return join([tag("h1", "Judges are asked by this server's owner."), tag("p", words)])


# ---- what is done --------------------------------------------------------------------------


def change(ctx: Context, data: Mapping[str, Any], request: Visit) -> Mapping[str, Any]:
    """A knob, the question whether to start, the start, or an act on a job."""
    do, draft = data.get("do"), draft_of(ctx, query(request))  # type: ignore[arg-type]
    if do in ("cancel", "uncancel", "retry"):
        return perform(ctx, data, request)  # type: ignore[arg-type]
    if do == "knob":
        style = style_with(draft.style, str(data["knob"]), str(data["value"]))
        return {"params": draft.changed(style=style), "replace": True}
    if do not in ("ask", "start"):
        raise ValueError(f"this page cannot do {do!r}")
    ready = plan(ctx, request, draft)
    if ready.error or ready.spec is None:
        raise ValueError(ready.error)
    if do == "ask":
        return {"params": {"agreed": ready.key}, "replace": True}
    if str(data.get("agreed")) != ready.key:
        raise ValueError("the job has changed since you were asked; look at it again")
    job = ctx.change(request).submit(ready.spec, device=draft.device or "auto")
    return {"toast": "The judge is queued.", "go": f"/judge?id={quote(job)}"}


# ---- one job -------------------------------------------------------------------------------


def one(ctx: Context, params: Mapping[str, str]) -> list[Markup]:
    """A job by its id: state, then everything it found so far."""
    job = params["id"]
    try:
        view = ctx.runs.view(job)
    except ValueError as error:
        return [unknown(str(error)), Markup(""), Markup(""), Markup("")]
    if view.kind != KIND:
        link = tag("a", "Open it there", href=f"/run?id={quote(job)}", data_carry=True)
        text = join([tag("h1", "This is no judge job."), tag("p", link)])
        return [text, Markup(""), Markup(""), Markup("")]
    runs = list(spec_data(view).get("runs") or [])
    names = names_of(ctx, model_of(view), runs)
    first = variant_names(ctx.store).get(runs[0], runs[0]) if runs else ""
    told = judge_results.found(ctx.store, ctx.store.version, job, first)
    name = lambda variant: names.get(variant, shown(variant))  # noqa: E731
    page = params.get("page", "")
    said = judge_results.verdict_part(
        ctx.store,
        job,
        params.get("search", ""),
        params.get("failed") == "1",
        max(1, int(page)) if page.isdecimal() and len(page) < 8 else 1,
        name,
    )
    parts = [judge_results.results(told, first, name), said] if told.anything else [waiting(view)]
    return [header(ctx, view), Markup(""), Markup(""), join(parts)]


def names_of(ctx: Context, model: str, runs: list[str]) -> dict[str, str]:
    """{variant as votes name it: recipe in words}."""
    return _names(ctx.store, ctx.store.version, model, tuple(runs))


@lru_cache(maxsize=8)
def _names(store: Any, version: int, model: str, runs: tuple[str, ...]) -> dict[str, str]:
    wide = rows.wide(store, model)
    recipes = dict(zip(wide["run_id"], wide["name"], strict=True))
    ids = variant_names(store)
    return {ids.get(run, run): str(recipes[run]) for run in runs if run in recipes}


def header(ctx: Context, view: RunView) -> Markup:
    """Title, state, what was asked of whom, notes, error."""
    stored = verdicts.jobs(ctx.store, model_of(view))
    stored = stored[stored["job_id"] == view.run_id]
    title = tag("h1", view.recipe, " ", tag("small", state_of(view)))
    new = tag("a", "Judge something else", href="/judge", data_carry=True, class_="tool")
    board = tag("a", "Leaderboard", href="/leaderboard", data_carry=True, class_="tool")
    top = tag("div", title, tag("span", actions(view), new, board, class_="tools"),
              class_="between wrap")  # fmt: skip
    going = None
    if not view.state.ended:
        left = f"about {look.duration(view.eta_s)} left" if view.eta_s is not None else ""
        going = tag("div", progress(view), tag("small", left), class_="job-progress",
                    aria_live="polite")  # fmt: skip
    lines = facts(view, stored.iloc[0]) if len(stored) else None
    notes = list(queries.notes(ctx.store, view.run_id)["text"])
    listed = tag("ul", [tag("li", note) for note in notes]) if notes else None
    box = tag("div", tag("b", "Notes"), listed, class_="notes-box", role="note") if notes else None
    return join([top, going, lines, error_part(view.error), box])


def facts(view: RunView, job: Any) -> Markup:
    """Model, judge, verdicts by sort, and what was sent, as one line."""
    spec = spec_data(view)
    place = spec.get("judge_model", {}).get("base_url", "")
    sorts = {"failed": "failed", "empty": "empty answers", "identical": "identical answers",
             "cut": "with a cut answer"}  # fmt: skip
    counted = [f"{look.whole(job[n])} {words}" for n, words in sorts.items() if job[n]]
    took = f"in {look.duration(view.seconds)}" if view.seconds else ""
    price = spent(spec, job)
    parts = [
        f"{model_of(view)} judged by {job['judge']}" + (f" at {place}" if place else ""),
        ", ".join([f"{look.whole(job['verdicts'])} verdicts", *counted]),
        f"{look.whole(job['requests'])} requests, {look.whole(job['prompt_tokens'])} prompt and "
        f"{look.whole(job['completion_tokens'])} reply tokens {took}".strip(),
        *([price] if price else []),
    ]
    return tag("p", " · ".join(parts), class_="facts")


def spent(spec: Mapping[str, Any], job: Any) -> str:
    """Money so far, where prices were given."""
    limits = spec.get("limits", {})
    prices = limits.get("prompt_price"), limits.get("completion_price")
    if None in prices:
        return ""
    cost = (job["prompt_tokens"] * prices[0] + job["completion_tokens"] * prices[1]) / 1e6
    return f"cost {cost:.2f}"


def waiting(view: RunView) -> Markup:
    """Before the first verdict."""
    if view.state is State.DONE:
        return tag("p", "The job made no verdicts.", class_="muted")
    if view.state.ended:
        return tag("p", "It ended before the first verdict.", class_="muted")
    return tag("p", "Verdicts appear here as the judge gives them.", class_="muted")


def unknown(why: str) -> Markup:
    """No such job."""
    link = tag("a", "All jobs", href="/jobs", data_carry=True)
    return join([tag("h1", "There is no such job."), tag("p", why), tag("p", link)])


# ---- all jobs ------------------------------------------------------------------------------


def earlier(ctx: Context, model: str) -> Markup:
    """Judge jobs of the model, newest first."""
    views = [v for v in ctx.runs.runs() if v.kind == KIND and model_of(v) == model]
    if not views:
        return Markup("")
    counts = verdicts.jobs(ctx.store, model).set_index("job_id")["verdicts"].to_dict()
    views = sorted(views, key=lambda view: -view.submitted)[:LISTED]
    lines = [
        [
            tag("a", view.recipe, href=f"/judge?id={quote(view.run_id)}", data_carry=True),
            state_of(view),
            look.whole(counts.get(view.run_id, 0)),
        ]
        for view in views
    ]
    body = judge_results.table(["Job", "State", "Verdicts"], lines)
    return tag("section", tag("h2", f"Judge jobs on {model}"), body, class_="card pad")
