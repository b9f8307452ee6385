"""Mined: what a mining job found, prompts that tell variants apart first; and how to start one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import gradio as gr
import pandas as pd
from markupsafe import Markup

from app import look, rows
from app.context import Context
from app.judge_results import bar, pager, table
from app.markup import join, search_box, tag
from app.pages.jobs import actions, error_part, perform, progress, state_of
from app.permalink import to_query
from app.sides import MOST
from app.views import model_of, spec_data
from app.widgets import connect, live, query, skeleton
from backend.spec import MineSpec, ModelRef
from jobs.events import State
from jobs.queue import RunView
from results_db import mined, queries

TITLE, PATH, ORDER, KEY = "Mined prompts", "/mined", 0, ""
KIND = "mine"
PAGE = 20  # prompts on one page
LISTED = 20  # jobs
SHOWN = 600  # characters of a prompt
TOLD = 12  # variants told of one prompt, those that differ most


def build(ctx: Context) -> None:
    """State, variants, prompts."""
    with gr.Column(elem_classes="page judge mined", elem_id="content"):
        head = live(skeleton(80), elem_classes="head")
        body = live(skeleton(400))

    def draw(request: gr.Request) -> list[Markup]:
        params = query(request)
        return screen(ctx, params) if "id" in params else overview(ctx, request)

    def act(data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
        if data.get("do") == "mine":
            return start(ctx, request)
        return perform(ctx, data, request)

    def stamp(request: gr.Request) -> Hashable:
        moving = [(v.run_id, v.state, v.fraction) for v in ctx.runs.runs() if v.kind == KIND]
        return ctx.store.version, tuple(moving)

    connect(draw, [head, body], stamp=stamp, act=act)


# ---- which job, and a new one --------------------------------------------------------------


def overview(ctx: Context, request: gr.Request) -> list[Markup]:
    """What mining is, a button that starts it, and the jobs there are."""
    model = model_wanted(ctx, query(request))
    words = (
        "On most prompts, variants of one model answer alike, and a vote on them tells nothing. "
        "Mining puts the whole pool of prompts to every finished run, 16-bit first, and ranks them "
        "by how far the answers part. The arena then draws from those, and answers them at once."
    )
    head = [tag("h1", f"Find the prompts that tell variants of {model} apart"),
            tag("p", words, class_="facts")]  # fmt: skip
    return [join([*head, begin(ctx, request, model)]), listed(ctx, model)]


def model_wanted(ctx: Context, params: Mapping[str, str]) -> str:
    """The model in the URL, else the one that was run last."""
    known = rows.models(ctx.store)
    return params.get("model") or (known[0] if known else "demo")


def begin(ctx: Context, request: gr.Request, model: str) -> Markup:
    """The button, or why there is none."""
    if not ctx.trusted(request):
        words = "Starting one needs the token: open the link that the server printed at its start."
        return tag("p", words, class_="muted")
    count = len(rows.wide(ctx.store, model))
    if count < 2:
        link = tag("a", "New run", href="/new", class_="button primary", data_carry=True)
        words = tag("p", "It takes a finished 16-bit run and at least one variant.", class_="muted")
        return join([words, tag("p", link)])
    button = tag("button", f"Mine {count} runs", class_="button primary", data_act={"do": "mine"})
    more = join(["Chosen prompts, sampling and lengths: ", tag("code", "quantarena mine --help")])
    return join([tag("p", button), tag("p", more, class_="hint")])


def start(ctx: Context, request: gr.Request) -> Mapping[str, Any]:
    """Queue one job over every finished run and the whole pool."""
    name, _, revision = model_wanted(ctx, query(request)).partition("@")
    spec = MineSpec(model=ModelRef(id=name, revision=revision))
    job = ctx.change(request).submit(spec, device="auto")
    return {"toast": "Mining is queued.", "go": f"/mined?id={quote(job)}"}


def listed(ctx: Context, model: str) -> Markup:
    """Mining jobs on the model, newest first."""
    views = [v for v in ctx.runs.runs() if v.kind == KIND and model_of(v) == model]
    lines = [
        [
            tag("a", view.recipe, href=f"/mined?id={quote(view.run_id)}", data_carry=True),
            state_of(view),
            look.duration(view.seconds) if view.seconds else "",
        ]
        for view in sorted(views, key=lambda view: -view.submitted)[:LISTED]
    ]
    if not lines:
        return Markup("")
    jobs = table(["Job", "State", "Took"], lines)
    return tag("section", tag("h2", f"Mining jobs on {model}"), jobs, class_="card pad")


# ---- one job -------------------------------------------------------------------------------


def screen(ctx: Context, params: Mapping[str, str]) -> list[Markup]:
    """Head and body."""
    job = params.get("id", "")
    try:
        view = ctx.runs.view(job)
    except ValueError as error:
        return [unknown(str(error)), Markup("")]
    if view.kind != KIND:
        link = tag("a", "Open it there", href=f"/run?id={quote(job)}", data_carry=True)
        return [join([tag("h1", "This is no mining job."), tag("p", link)]), Markup("")]
    variants = mined.variants_of(ctx.store, job)
    if not len(variants):
        return [header(view), error_part(view.error) or waiting(view)]
    names = names_of(ctx, view)
    run = params.get("run", "")
    page = params.get("page", "")
    parts = [
        variant_part(view, variants, names, run),
        prompt_part(
            ctx,
            view,
            names,
            run if run in set(variants["run_id"]) else "",
            params.get("search", ""),
            max(1, int(page)) if page.isdecimal() and len(page) < 8 else 1,
        ),
    ]
    notes = list(queries.notes(ctx.store, job)["text"])
    listed = tag("ul", [tag("li", note) for note in notes])
    box = tag("div", tag("b", "Notes"), listed, class_="notes-box", role="note") if notes else None
    return [join([header(view), error_part(view.error), box]), join(parts)]


def names_of(ctx: Context, view: RunView) -> dict[str, str]:
    """{run id: recipe in words}, of the job's runs."""
    wide = rows.wide(ctx.store, model_of(view))
    known = dict(zip(wide["run_id"], wide["name"], strict=True))
    return {run: str(known.get(run, run)) for run in runs_of(view)}


def runs_of(view: RunView) -> list[str]:
    """Runs that were asked, the 16-bit one first."""
    return [str(run) for run in spec_data(view).get("runs") or []]


def header(view: RunView) -> Markup:
    """Title, state, how far it is."""
    title = tag("h1", view.recipe, " ", tag("small", state_of(view)))
    arena = tag("a", "Arena", href="/arena", data_carry=True, class_="tool")
    tools = tag("span", actions(view), arena, class_="tools")
    top = tag("div", title, tools, class_="between wrap")
    going = None if view.state.ended else tag("div", progress(view), class_="job-progress")
    about = (
        f"Every variant of {model_of(view)} answered the same prompts greedily. Divergence is the "
        "mean KL divergence from the 16-bit model along its own answer, in nats: the larger, the "
        "more a prompt tells. The arena draws from those on which a pair differs."
    )
    return join([top, going, tag("p", about, class_="facts")])


def waiting(view: RunView) -> Markup:
    """Before the first answer."""
    if view.state is State.DONE:
        return tag("p", "The job found nothing.", class_="muted")
    words = "It ended before the first answer." if view.state.ended else "Answers appear here."
    return tag("p", words, class_="muted")


def unknown(why: str) -> Markup:
    """No such job."""
    link = tag("a", "All jobs", href="/jobs", data_carry=True)
    return join([tag("h1", "There is no such job."), tag("p", why), tag("p", link)])


# ---- tables --------------------------------------------------------------------------------


def variant_part(
    view: RunView, variants: pd.DataFrame, names: Mapping[str, str], run: str
) -> Markup:
    """Per variant: how often its answer is that of 16 bits, and where it parts otherwise."""
    lines = []
    for record in rows.records(variants):
        on = record["run_id"] == run
        pick = tag(
            "button",
            names.get(str(record["run_id"]), str(record["run_id"])),
            class_="chip",
            aria_pressed=str(on).lower(),
            data_set={"run": "" if on else record["run_id"], "page": ""},
        )
        share = float(record["identical"])
        lines.append(
            [
                pick,
                join([bar(share), " ", look.percent(share)]),
                place(record["departs"]),
                nats(record["kld"]),
                nats(record["kld_max"]),
                dash(record["agreement"], look.percent),
                look.whole(record["prompts"]),
            ]
        )
    titles = ["Variant", "Same answer as 16-bit", "Parts at token (median)", "Divergence, mean",
              "Largest", "Same top token", "Prompts"]  # fmt: skip
    about = "Choose a variant to rank the prompts by its answers alone."
    head = join([tag("h2", "Variants"), tag("p", about, class_="hint")])
    return tag("section", head, table(titles, lines), class_="card pad")


def prompt_part(
    ctx: Context, view: RunView, names: Mapping[str, str], run: str, search: str, page: int
) -> Markup:
    """Prompts by divergence, with the variants that differ most."""
    found, total = mined.prompts_of(
        ctx.store, view.run_id, run=run, search=search, offset=PAGE * (page - 1), limit=PAGE
    )
    if not total and page > 1:
        page = 1
        found, total = mined.prompts_of(ctx.store, view.run_id, run=run, search=search, limit=PAGE)
    box = search_box("Search prompts", value=search, data_param="search")
    of = f" of {names.get(run, run)}" if run else ""
    head = tag("div", tag("h2", f"Prompts that tell most{of}"), box, class_="between wrap")
    cards = [
        prompt_card(view, rows.records(own), names) for _, own in found.groupby("place", sort=False)
    ]
    nothing = tag("p", "No prompt is like that.", class_="muted") if not total else None
    return tag("section", head, nothing, cards, pager(page, total, PAGE, "prompts"),
               class_="card pad verdicts")  # fmt: skip


def prompt_card(
    view: RunView, own: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> Markup:
    """One prompt: its text, how far answers part, a link to see them side by side."""
    first = own[0]
    prompt = str(first["prompt"])
    cut = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}…"
    small = [str(first["category"] or ""), str(first["prompt_id"])]
    small += [told_apart(view, own, names)]
    lines = [
        [
            names.get(str(r["run_id"]), str(r["run_id"])),
            nats(r["kld"]),
            "the same answer" if r["same"] else place(r["parts_at"]),
            dash(r["agreement"], look.percent),
            dash(r["tokens"], look.whole),
        ]
        for r in own[:TOLD]
    ]
    titles = ["Variant", "Divergence", "Parts at token", "Same top token", "Tokens"]
    more = len(own) - TOLD
    rest = tag("p", f"{more} more variants differ less.", class_="hint") if more > 0 else None
    fold = tag("summary", "By variant")
    key = f"prompt-{first['prompt_id']}"
    return tag(
        "article",
        tag("div", tag("b", f"{int(first['place'])}."), tag("span", "divergence ",
            nats(first["divergence"]), class_="outcome"), class_="between wrap"),
        tag("pre", cut, dir="auto"),
        tag("p", tag("small", " · ".join(filter(None, small)))),
        tag("div", chat_link(view, own, prompt), class_="row"),
        tag("details", fold, table(titles, lines), rest, data_key=f"{key}-by"),
        class_="verdict",
        data_key=key,
    )  # fmt: skip


def told_apart(view: RunView, own: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Who parts first and where, and how many say what the 16-bit model says."""
    base = runs_of(view)[:1]
    others = [r for r in own if r["run_id"] not in base]
    if not others:
        return "no quantized variant has answered yet"
    same = sum(bool(r["same"]) for r in others)
    count = f"{same} of {len(others)} quantized variants answer as 16-bit does"
    parting = [r for r in others if not r["same"] and not pd.isna(r["parts_at"])]
    if not parting:
        return count
    soonest = min(parting, key=lambda r: float(r["parts_at"]))
    who = names.get(str(soonest["run_id"]), str(soonest["run_id"]))
    return f"{who} parts at token {int(soonest['parts_at']) + 1} · {count}"


def chat_link(view: RunView, own: Sequence[Mapping[str, Any]], prompt: str) -> Markup:
    """To the 16-bit model and the variants that differ most, with this prompt to be asked."""
    differing = [str(r["run_id"]) for r in own if not r["same"]] or [str(own[0]["run_id"])]
    runs = list(dict.fromkeys([*runs_of(view)[:1], *differing]))[:MOST]
    asked = to_query([prompt])
    where = {"model": model_of(view), "runs": "~".join(runs)} | ({"q": asked} if asked else {})
    note = None if asked else tag("small", "the prompt is too long for a link")
    href = f"/chat?{urlencode(where, safe='~')}"
    return join([tag("a", "Chat with these", href=href, class_="tool"), note], " ")


def place(value: Any) -> Any:
    """A token's place, counted from 1."""
    return dash(value, lambda at: f"{at + 1:.0f}")


def nats(value: Any) -> Any:
    """A divergence."""
    return dash(value, look.divergence)


def dash(value: Any, how: Any) -> Any:
    """A number, or a dash that says why there is none."""
    if value is None or pd.isna(value) or math.isinf(float(value)):
        return tag("span", look.MISSING, title="Nothing was measured here.", class_="missing")
    return how(float(value))
