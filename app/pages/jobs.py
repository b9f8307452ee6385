"""Jobs: what runs, what waits, what went wrong and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import gradio as gr
from markupsafe import Markup

from app import look
from app.context import BETWEEN, Context
from app.markup import join, search_box, tag
from app.views import model_of, recipe_in
from app.widgets import connect, live, query, skeleton
from jobs.events import State
from jobs.queue import RunView
from results_db import queries

TITLE, PATH, ORDER, KEY = "Jobs", "/jobs", 3, "j"
FILTERS = ("all", "running", "queued", "done", "failed", "cancelled")
LOG_LINES = 60
SHOWN_ALONE = 100  # finished single runs listed; older ones are on Compare


def build(ctx: Context) -> None:
    """One line per run, live."""
    with gr.Column(elem_classes="page jobs", elem_id="content"):
        body = live(skeleton(400))

    def draw(request: gr.Request) -> list[Markup]:
        return [screen(ctx, Wanted.read(query(request)))]

    def act(data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
        return perform(ctx, data, request)

    connect(draw, [body], stamp=lambda request: stamp(ctx), act=act)


def stamp(ctx: Context) -> Hashable:
    """Changes with every event; while something runs, every second, for the times."""
    views = ctx.runs.runs()
    moving = any(not view.state.ended for view in views)
    seen = tuple((v.run_id, v.state, v.stage, round(v.fraction, 3), v.cancelling) for v in views)
    return seen, int(time.time()) if moving else 0


@dataclass(frozen=True)
class Wanted:
    """What the URL says: a state, a search, the opened runs and sweeps."""

    state: str = "all"
    search: str = ""
    open: tuple[str, ...] = ()

    @classmethod
    def read(cls, params: Mapping[str, str]) -> Wanted:
        state = params.get("state", "all")
        opened = tuple(part for part in params.get("open", "").split(BETWEEN) if part)
        return cls(state if state in FILTERS else "all", params.get("search", ""), opened)


def perform(ctx: Context, data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
    """Cancel, take it back, or try again."""
    queue, run_id = ctx.change(request), str(data.get("run", ""))
    recipe = queue.view(run_id).recipe
    if data.get("do") == "cancel":
        queue.cancel(run_id)
        return {"toast": f"Cancelled {recipe}.", "undo": {"do": "uncancel", "run": run_id}}
    if data.get("do") == "uncancel":
        queue.uncancel(run_id)
        return {"toast": f"{recipe} goes on."}
    if data.get("do") == "retry":
        queue.retry(run_id)
        return {"toast": f"{recipe} is queued again; it continues after its last finished block."}
    raise ValueError(f"this page cannot do {data.get('do')!r}")


# ---- the list ------------------------------------------------------------------------------


def screen(ctx: Context, wanted: Wanted) -> Markup:
    """Filters above, sweeps and runs below, newest first; what is going on comes first."""
    views = sorted(ctx.runs.runs(), key=_order)
    if not views:
        return empty()
    shown = [view for view in views if passes(view, wanted)]
    groups = grouped(shown)
    parts = [group_part(ctx, group, wanted) for group in groups]
    nothing = tag("p", "No run is like that.", class_="muted pad") if not shown else None
    return join([filters(views, wanted), tag("div", parts, nothing, class_="card job-list")])


def _order(view: RunView) -> tuple[int, float]:
    """Running, then queued in the order they start, then the others, newest first."""
    first = {State.RUNNING: 0, State.QUEUED: 1}.get(view.state, 2)
    return first, view.submitted if first < 2 else -(view.finished or view.submitted)


def empty() -> Markup:
    """Nothing was ever queued."""
    link = tag("a", "New run", href="/new", class_="button primary", data_carry=True)
    words = tag(
        "div",
        tag("h1", "Runs in the queue, at work and finished are listed here."),
        tag("p", "Each shows how far it is, its log, and what to do if it fails."),
        tag("p", link),
        class_="words",
    )
    return tag("div", words, class_="empty-state single")


def passes(view: RunView, wanted: Wanted) -> bool:
    """True for runs of the wanted state with every searched word."""
    text = f"{view.recipe} {view.label} {view.run_id} {model_of(view)}".lower()
    right_state = wanted.state in ("all", str(view.state))
    return right_state and all(word in text for word in wanted.search.lower().split())


def filters(views: Sequence[RunView], wanted: Wanted) -> Markup:
    counts = {state: sum(str(v.state) == state for v in views) for state in FILTERS[1:]}
    chips = [
        tag(
            "button",
            state,
            tag("span", counts.get(state, len(views)), class_="count"),
            class_="chip",
            aria_pressed=str(state == wanted.state).lower(),
            data_set={"state": "" if state == "all" else state},
        )
        for state in FILTERS
        if state == "all" or counts[state] or state == wanted.state
    ]
    search = search_box("Search", label="Search runs", value=wanted.search, data_param="search")
    return tag(
        "div",
        tag("h1", summary(views), class_="headline"),
        tag("div", tag("span", chips, class_="chips"), search, class_="between wrap"),
        class_="jobs-head",
        aria_live="polite",
    )


def summary(views: Sequence[RunView]) -> str:
    """`1 running, 4 queued: about 40 s left.`"""
    running = [v for v in views if v.state is State.RUNNING]
    queued = [v for v in views if v.state is State.QUEUED]
    if not running and not queued:
        failed = sum(v.state is State.FAILED for v in views)
        return "Nothing is running." + (f" {failed} failed." if failed else "")
    left = [v.eta_s for v in (*running, *queued)]
    known = [seconds for seconds in left if seconds is not None]
    about = f": about {look.duration(sum(known))} of work left" if len(known) == len(left) else ""
    return f"{len(running)} running, {len(queued)} queued{about}."


@dataclass(frozen=True)
class Group:
    """Runs submitted together, or one alone."""

    label: str
    views: tuple[RunView, ...]

    @property
    def settled(self) -> bool:
        """True once nothing of it moves: it can be folded into one line."""
        return len(self.views) > 1 and all(v.state is State.DONE for v in self.views)


def grouped(views: Sequence[RunView]) -> list[Group]:
    """Sweeps whose runs are all done become one group; every other run stands alone."""
    by_label: dict[str, list[RunView]] = {}
    for view in views:
        if view.label:
            by_label.setdefault(view.label, []).append(view)
    folded = {label for label, found in by_label.items() if Group(label, tuple(found)).settled}
    groups: list[Group] = []
    for view in views:
        if view.label not in folded:
            groups.append(Group("", (view,)))
        elif view is by_label[view.label][0]:
            groups.append(Group(view.label, tuple(by_label[view.label])))
    return groups[:SHOWN_ALONE]


def group_part(ctx: Context, group: Group, wanted: Wanted) -> Markup:
    """A finished sweep as one line, or its runs."""
    if not group.label:
        return job(ctx, group.views[0], wanted)
    key = f"sweep:{group.label}"
    opened = key in wanted.open
    runs = [job(ctx, view, wanted) for view in group.views] if opened else None
    seconds = sum(view.seconds for view in group.views)
    model = quote(model_of(group.views[0]), safe="")
    line = tag(
        "div",
        toggle(key, opened, group.label),
        tag("span", look.state_mark("done"), class_="job-state"),
        tag(
            "span",
            tag("b", group.label),
            tag("small", f"{len(group.views)} runs on {model_of(group.views[0])}"),
            class_="job-name",
        ),
        tag("span", class_="job-progress"),
        tag("span", look.duration(seconds), " ", tag("small", "of work"), class_="job-time"),
        tag("span", tag("a", "Compare", href=f"/?model={model}", class_="tool"), class_="tools"),
        class_="job-line",
    )
    return tag(
        "div", line, tag("div", runs, class_="sweep") if runs else None, class_="job", data_key=key
    )


# ---- one run -------------------------------------------------------------------------------


def job(ctx: Context, view: RunView, wanted: Wanted) -> Markup:
    """One line; opened, the log, notes and the error in full."""
    opened = view.run_id in wanted.open
    recipe = recipe_in(view)
    progress_ = tag(
        "span", progress(view) if view.state is not State.DONE else None, class_="job-progress"
    )
    line = tag(
        "div",
        toggle(view.run_id, opened, view.recipe),
        tag("span", state_of(view), class_="job-state"),
        tag(
            "span",
            tag("a", recipe.name, href=where(view), data_carry=True),
            tag("small", " · ".join(p for p in (model_of(view), view.label) if p)),
            class_="job-name",
        ),
        progress_,
        tag("span", times(view), class_="job-time"),
        tag("span", actions(view), class_="tools"),
        class_="job-line",
    )
    brief = error_line(view) if view.error and not opened else None
    return tag(
        "div",
        line,
        brief,
        details(ctx, view) if opened else None,
        class_=f"job is-{view.state}",
        data_key=view.run_id,
    )


PAGES = {"judge": "/judge", "mine": "/mined"}  # kinds of jobs with a page of their own


def where(view: RunView) -> str:
    """Address of the page that shows a job's results."""
    return f"{PAGES.get(view.kind, '/run')}?id={quote(view.run_id)}"


def toggle(key: str, opened: bool, name: str) -> Markup:
    """The triangle in front of a line."""
    return tag(
        "button",
        look.icon("M6 4l4 4-4 4"),
        class_="fold",
        aria_expanded=str(opened).lower(),
        aria_label=f"Details of {name}",
        data_toggle={"name": "open", "value": key},
    )


def state_of(view: RunView) -> Markup:
    """State, or that it is about to stop."""
    return (
        tag("span", "stopping…", class_="state") if view.cancelling else look.state_mark(view.state)
    )


def progress(view: RunView) -> Markup | None:
    """Stage, block and a bar; nothing for what has not begun."""
    if view.state is State.QUEUED and not view.fraction:
        return tag(
            "small", f"waits for {len(view.waits)} other" if view.waits else "waits for a slot"
        )
    where = view.stage or ""
    if view.block is not None and view.blocks:
        where += f", block {view.block + 1} of {view.blocks}"
    words = ", ".join(part for part in (where, view.item) if part)
    bar = tag(
        "span",
        tag("i", style=f"width:{100 * view.fraction:.1f}%"),
        class_="meter",
        role="progressbar",
        aria_valuenow=round(100 * view.fraction),
        aria_valuemin=0,
        aria_valuemax=100,
        aria_label=f"{view.recipe}: {view.fraction:.0%}",
    )
    return join([bar, tag("small", f"{view.fraction:.0%} · {words}")])


def times(view: RunView) -> Markup:
    """What is left, or what it took; and where."""
    if not view.state.ended and view.eta_s is not None:
        when = f"{look.duration(view.eta_s)} left"
    else:
        when = look.duration(view.seconds) if view.seconds else ""
    return join([when, tag("small", view.device)], " ")


def actions(view: RunView) -> list[Markup]:
    """What can be done with a run now."""
    acts = {"cancel": "Cancel"} if not view.state.ended and not view.cancelling else {}
    if view.state in (State.FAILED, State.CANCELLED):
        acts = {"retry": "Retry"}
    return [
        tag(
            "button",
            word,
            class_="tool",
            data_act={"do": act, "run": view.run_id},
            aria_label=f"{word} {view.recipe}",
        )
        for act, word in acts.items()
    ]


def error_line(view: RunView) -> Markup:
    """What happened, in a sentence."""
    error = view.error or {}
    return tag(
        "p", f"{error.get('type', 'Error')}: {error.get('message', '')}", class_="problem brief"
    )


def details(ctx: Context, view: RunView) -> Markup:
    """Error in full with what to do next, notes, log."""
    notes = list(queries.notes(ctx.store, view.run_id)["text"])
    listed = tag("ul", [tag("li", note) for note in notes]) if notes else None
    log = ctx.runs.log(view.run_id, LOG_LINES)
    parts = [
        error_part(view.error),
        tag("div", tag("h3", "Notes"), listed, class_="notes") if notes else None,
        tag("h3", f"Log, last {LOG_LINES} lines"),
        tag("pre", log or "Nothing printed yet.", class_="log", data_follow=True, tabindex="0"),
        tag("p", tag("small", f"run {view.run_id} · {' → '.join(view.stages)}")),
    ]
    return tag("div", parts, class_="job-details")


def error_part(error: Mapping[str, Any] | None) -> Markup | None:
    """Type, message, what to do; the traceback folded under it."""
    if not error:
        return None
    kind, trace = str(error.get("type", "Error")), error.get("traceback")
    fold = tag("details", tag("summary", "Traceback"), tag("pre", trace), data_key="trace")
    return tag(
        "div",
        tag("p", tag("b", kind), ": ", str(error.get("message", "")).removeprefix(f"{kind}: ")),
        tag("p", "What to do: ", error["todo"]) if error.get("todo") else None,
        fold if trace else None,
        class_="error-box",
        role="alert",
    )
