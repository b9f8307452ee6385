"""Compare: which recipe keeps how much at which size."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
import pandas as pd
from markupsafe import Markup

from app import cube_view, first_tour, look, memory_view, published_rows, rows
from app.charts import pareto
from app.context import Context, Picks
from app.headline import headline
from app.markup import join, tag
from app.recipe_words import kind_name, target_words
from app.specs import differences, reproduce
from app.table import runs_table
from app.views import model_of
from app.widgets import chart_value, connect, live, plotly_chart, query, skeleton
from jobs.kinds import RUN
from results_db import queries
from results_db.compare import NORMAL_95

TITLE, PATH, ORDER, KEY = "Compare", "/", 1, "c"
SIDE_BY_SIDE = 4  # more columns than this cannot be read in a third of the page


def build(ctx: Context) -> None:
    """Sentence and filters, chart beside the selection, table."""
    with gr.Column(elem_classes="page compare", elem_id="content"):
        head = live(skeleton(96), elem_classes="head")
        with gr.Row(elem_classes="split"):
            with gr.Column(elem_classes="card chart-card"):
                above = live("", elem_classes="axis-y")
                plot = plotly_chart(elem_classes="main-plot selects")
                below = live("", elem_classes="axis-x")
            side = live(skeleton(420), elem_classes="card side")
        table = live(skeleton(300), elem_classes="card table-card")
        with gr.Column(elem_classes="card chart-card memory-card"):
            memory = [live(""), plotly_chart(), live("")]
        cube = live("", elem_classes="card pad cube-card")

    def draw(request: gr.Request) -> list[Any]:
        picks = Picks.read(query(request))
        return [*screen(ctx, picks), *caches(ctx, picks)]

    def act(data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
        queue = ctx.change(request)
        if data.get("do") == "tour":
            count = len(first_tour.start(queue))
            return {"toast": f"{count} runs queued; the first point appears in a few seconds."}
        raise ValueError(f"this page cannot do {data.get('do')!r}")

    def stamp(request: gr.Request) -> Hashable:
        return ctx.store.version, tuple(progress(ctx, "").items())

    connect(draw, [head, above, plot, below, side, table, *memory, cube], stamp=stamp, act=act)


def screen(ctx: Context, picks: Picks) -> Iterable[str]:
    """The page's six parts for one set of picks."""
    known = rows.models(ctx.store)
    model = picks.model or (known[0] if known else "")
    wide = rows.wide(ctx.store, model)
    if not len(wide):
        return empty(ctx, model), "", "", "", "", ""
    view = pareto.points(wide, picks)
    if picks.published and len(view):
        found = published_rows.over(ctx.store, model, view.attrs["x"], view.attrs["y"])
        view = pareto.laid_over(view, found, picks)
    if picks.table:
        below = chart_table(view) + x_picker(view, wide, picks)
    else:
        below = x_picker(view, wide, picks)
    return (
        top(ctx, model, wide, view, picks),
        y_picker(view, wide, picks),
        chart_value(pareto.draw(view), pareto.say(view)),
        below,
        side_panel(ctx, wide, view, picks),
        runs_table(wide, view, picks),
    )


def caches(ctx: Context, picks: Picks) -> list[str]:
    """Memory against context, in three parts, and the cube of weight bits, KV bits and windows."""
    known = rows.models(ctx.store)
    picks = replace(picks, model=picks.model or (known[0] if known else ""))
    if not len(rows.wide(ctx.store, picks.model)):
        return [""] * 4
    return [*memory_view.parts(ctx.store, picks), cube_view.part(ctx.store, picks)]


def progress(ctx: Context, model: str) -> dict[str, int]:
    """How many runs are in each state; of one model or, with "", of all."""
    counts: dict[str, int] = {}
    for view in ctx.runs.runs():
        if view.kind == RUN and (not model or model_of(view) == model):
            counts[str(view.state)] = counts.get(str(view.state), 0) + 1
    return counts


# ---- above the chart -----------------------------------------------------------------------


def empty(ctx: Context, model: str) -> Markup:
    """Before the first number: what will be here and the one button that fills it."""
    counts = progress(ctx, model)
    if counts.get("queued") or counts.get("running"):
        return _coming(counts)
    about = (
        "Measured trade-offs appear here: every point is a quantized model, lower left is better."
    )
    button = tag("button", "First tour", class_="button primary", data_act={"do": "tour"})
    facts = (
        f"The first tour runs the 16-bit baseline and {len(first_tour.RECIPES)} recipes on the "
        "bundled model. It takes one to two minutes on two CPU cores and downloads nothing."
    )
    own = tag("a", "Or set up your own run", href="/new", data_carry=True)
    children = [tag("h1", about), tag("p", facts), tag("p", button, own, class_="row")]
    return tag("div", ghost_chart(), tag("div", children, class_="words"), class_="empty-state")


def _coming(counts: Mapping[str, int]) -> Markup:
    total, done = sum(counts.values()), counts.get("done", 0)
    words = tag("div", tag("h1", "The first point is on its way."), tag("p", so_far(done, total)))
    return tag("div", ghost_chart(), words, class_="empty-state", aria_live="polite")


def ghost_chart() -> Markup:
    """A drawing of what will be here, in grey."""
    dots = [(40, 30), (62, 68), (96, 90), (150, 106), (226, 112), (110, 52), (172, 80)]
    circles = [tag("circle", cx=x, cy=y, r=5) for x, y in dots]
    line = tag("path", d="M40 30H62V68H96V90H150V106H226V112")
    return tag("svg", line, circles, viewBox="0 0 260 150", class_="ghost", aria_hidden="true")


def so_far(done: int, total: int) -> str:
    """`8 of 12 runs so far`."""
    return f"{done} of {total} runs so far"


def top(ctx: Context, model: str, wide: pd.DataFrame, view: pd.DataFrame, picks: Picks) -> Markup:
    """Sentence, conditions, filters."""
    x, y, choice = (view.attrs[name] for name in ("x", "y", "choice"))
    sentence = headline(choice.rows, model, x, y) or f"Runs on {model}."
    return join(
        [
            tag("h1", sentence, class_="headline", aria_live="polite"),
            tag("p", join(_facts(ctx, model, wide, view, picks), " · "), class_="facts"),
            chips(wide, picks),
        ]
    )


def _facts(
    ctx: Context, model: str, wide: pd.DataFrame, view: pd.DataFrame, picks: Picks
) -> list[Markup]:
    counts = progress(ctx, model)
    waiting = counts.get("queued", 0) + counts.get("running", 0)
    total, drawn = wide["run_id"].nunique(), view["run_id"].nunique()
    facts = [tag("b", so_far(counts.get("done", 0), sum(counts.values())))] if waiting else []
    facts.append(tag("span", f"{drawn} of {total} measured runs drawn"))
    return facts + left_out(view, picks) + published_fact(view)


def published_fact(view: pd.DataFrame) -> list[Markup]:
    """Where the crosses come from, or why there are none."""
    over = view.attrs.get("published")
    if over is None:
        return []
    if over.why:
        return [tag("span", over.why, class_="warn")]
    others = len(over.sources) - 3
    sources = "; ".join(over.sources[:3]) + (f"; {others} more" if others > 0 else "")
    return [
        tag("span", f"crosses: {len(over.rows)} published values, measured elsewhere ({sources})")
    ]


def left_out(view: pd.DataFrame, picks: Picks) -> list[Markup]:
    """Which conditions the chart shows, which others there are, and who lacks a number."""
    choice = view.attrs["choice"]
    parts = []
    if len(choice.sets) > 1:
        options = [
            tag("option", f"{s.text} ({s.rows})", value=s.key, selected=s.key == choice.chosen)
            for s in choice.sets
        ]
        others = sum(s.rows for s in choice.sets if s.key != choice.chosen)
        why = f"{others} left out: measured under other conditions. Shown: "
        picker = tag("select", options, data_param="set", aria_label="Measuring conditions")
        parts.append(tag("label", tag("span", why, class_="warn"), picker))
    elif choice.sets:
        parts.append(tag("span", choice.sets[0].text))
    if choice.unmeasured:
        parts.append(tag("span", f"{choice.unmeasured} without one of these numbers"))
    return parts


def chips(wide: pd.DataFrame, picks: Picks) -> Markup:
    """Filters, one chip each; what is on is pressed."""
    rivals = wide[~wide["is_baseline"].astype(bool)]
    groups = [
        chip_group("Method", "family", sorted(rivals["family"].unique()), picks.family, kind_name),
        chip_group("Bits", "bits", sorted(rivals["bits"].unique(), key=float), picks.bits),
        chip_group(
            "Rounds", "target", sorted(rivals["target"].unique()), picks.target, target_words
        ),
    ]
    switches = [
        switch_chip("Packed only", "packed", picks.packed),
        switch_chip("Front only", "front", picks.front),
    ]
    used = picks.family or picks.bits or picks.target or picks.packed or picks.front
    cleared = dict.fromkeys(("family", "bits", "target", "packed", "front", "set"), "")
    clear = tag("button", "Clear", class_="link", data_set=cleared) if used else None
    return tag("div", groups, tag("span", switches, class_="chips"), clear, class_="filters")


def chip_group(
    title: str,
    name: str,
    values: Sequence[str],
    on: Sequence[str],
    words: Callable[[str], str] = str,
) -> Markup | None:
    """Chips of one filter; nothing where there is no choice."""
    if len(values) < 2 and not on:
        return None
    made = [
        tag(
            "button",
            _dot(value) if name == "family" else None,
            words(value),
            class_="chip",
            aria_pressed="true" if value in on else "false",
            data_toggle={"name": name, "value": value},
        )
        for value in values
    ]
    return tag(
        "span",
        tag("span", title, class_="chip-title"),
        made,
        class_="chips",
        role="group",
        aria_label=title,
    )


def _dot(family: str) -> Markup:
    return tag("i", class_="dot", style=f"background:{look.family_colour(family)}")


def switch_chip(title: str, name: str, on: bool) -> Markup:
    """A filter that is on or off."""
    pressed = "true" if on else "false"
    change = {name: "" if on else "1"}
    return tag("button", title, class_="chip", aria_pressed=pressed, data_set=change)


# ---- around the chart ----------------------------------------------------------------------


def y_picker(view: pd.DataFrame, wide: pd.DataFrame, picks: Picks) -> Markup:
    """The y axis and what can be done with the picture."""
    pictures = [
        tag("button", kind.upper(), class_="tool", data_picture=kind, title=f"Download {kind}")
        for kind in ("png", "svg")
    ]
    table = tag(
        "button",
        "Show as table" if not picks.table else "Show as chart",
        class_="tool",
        aria_pressed=str(picks.table).lower(),
        data_set={"table": "" if picks.table else "1"},
    )
    published = tag(
        "button",
        "Published values",
        class_="tool",
        aria_pressed=str(picks.published).lower(),
        data_set={"published": "" if picks.published else "1", "zoom": ""},
        title="Lay values printed in papers over the chart, as crosses",
    )
    zoom = tag("button", "Reset zoom", class_="tool", data_set={"zoom": ""}) if picks.zoom else None
    drag = tag(
        "button",
        "Select area",
        class_="tool",
        aria_pressed=str(picks.drag == "select").lower(),
        data_set={"drag": "" if picks.drag == "select" else "select"},
        title="Drag over the chart to select runs; else dragging zooms",
    )
    tools = tag("span", zoom, drag, published, table, pictures, class_="tools")
    return tag("div", axis_picker("y", view.attrs["y"], wide), tools, class_="axis-row")


def x_picker(view: pd.DataFrame, wide: pd.DataFrame, picks: Picks) -> Markup:
    """The x axis, under the picture."""
    return tag("div", axis_picker("x", view.attrs["x"], wide), class_="axis-row end")


def axis_picker(at: str, axis: rows.Axis, wide: pd.DataFrame) -> Markup:
    """Which measurement an axis shows, and its scale."""
    options = [
        tag("option", look.label(name), value=name, selected=name == axis.name)
        for name in rows.measured(wide)
    ]
    select = tag("select", options, data_param=at, aria_label=f"Measurement on the {at} axis")
    scale = tag(
        "button",
        "log" if axis.log else "linear",
        class_="tool",
        title="Switch between logarithmic and linear",
        aria_label=f"Scale of the {at} axis: {'log' if axis.log else 'linear'}",
        data_set={f"{at}scale": "linear" if axis.log else "log", "zoom": ""},
    )
    arrow = "↓" if axis.better == "lower" else "↑"
    better = tag("span", f"{arrow} {axis.better} is better", class_="better") if axis.better else ""
    name = tag("span", f"{at.upper()}", class_="axis-name", aria_hidden="true")
    return tag("span", name, select, scale, better, class_="axis-picker")


def chart_table(view: pd.DataFrame) -> Markup:
    """The chart's points as a plain table."""
    headings = pareto.columns(view)
    axes = {"x": view.attrs["x"], "y": view.attrs["y"]}
    lines = [
        tag("tr", [tag("td", _cell(record, name, axes)) for name in headings])
        for record in rows.records(view)
    ]
    head = tag("thead", tag("tr", [tag("th", text, scope="col") for text in headings.values()]))
    table = tag("table", head, tag("tbody", lines))
    return tag("div", table, published_table(view), class_="scroll as-table")


def published_table(view: pd.DataFrame) -> Markup | None:
    """The crosses, in a table of their own."""
    over = view.attrs.get("published")
    if over is None or not len(over.rows):
        return None
    axes = [view.attrs["x"], view.attrs["y"]]
    lines = [
        tag(
            "tr",
            tag("td", record["name"]),
            [
                tag("td", look.quantity(axis.name, record[at], axis.unit))
                for at, axis in zip(("x", "y"), axes, strict=True)
            ],
            tag("td", record["source"]),
        )
        for record in rows.records(over.rows)
    ]
    titles = ["Published, measured elsewhere", *(axis.title for axis in axes), "Source"]
    head = tag("thead", tag("tr", [tag("th", title, scope="col") for title in titles]))
    return tag("table", head, tag("tbody", lines))


def _cell(record: Mapping[str, Any], name: str, axes: Mapping[str, rows.Axis]) -> str:
    if name in axes:
        axis = axes[name]
        half = record[f"{name}_half"]
        spread = look.interval(axis.name, half / NORMAL_95, axis.unit)
        return f"{look.quantity(axis.name, record[name], axis.unit)} {spread}".strip()
    value = record[name]
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


# ---- the selection -------------------------------------------------------------------------


def side_panel(ctx: Context, wide: pd.DataFrame, view: pd.DataFrame, picks: Picks) -> Markup:
    """The selected runs side by side, or how to read the marks."""
    chosen = wide[wide["run_id"].isin(picks.runs)].drop_duplicates("run_id")
    order = {run_id: at for at, run_id in enumerate(picks.runs)}
    chosen = chosen.sort_values("run_id", key=lambda ids: ids.map(order)).head(SIDE_BY_SIDE)
    return selection(ctx, wide, chosen, picks) if len(chosen) else legend(view)


def legend(view: pd.DataFrame) -> Markup:
    """What the marks mean; only those on the chart."""
    rivals = view[~view["is_baseline"]] if len(view) else view
    families = [tag("li", _dot(f), kind_name(f)) for f in sorted(set(rivals.get("family", ())))]
    shapes = [
        tag("li", look.mark(t, True, "rtn"), target_words(t) + " rounded")
        for t in sorted(set(rivals.get("target", ())))
    ]
    shapes += [
        tag("li", look.mark("weights", True, "rtn"), "filled: packed, as it would be deployed"),
        tag("li", look.mark("weights", False, "rtn"), "hollow: simulated, rounded but stored wide"),
        tag(
            "li",
            look.mark("", True, "", baseline=True),
            "the 16-bit model, dotted guides through it",
        ),
        tag("li", tag("i", class_="step"), "the front: nothing is better in both"),
        tag("li", tag("i", class_="faded"), "faded: another recipe is better in both"),
        tag("li", tag("i", class_="whisker"), "95 % interval"),
    ]
    if view.attrs.get("published", published_rows.NONE).sources:
        crosses = tag("i", "×", class_="cross")
        shapes.append(tag("li", crosses, "published, measured elsewhere"))
    return join(
        [
            tag("h2", "Nothing selected"),
            tag(
                "p",
                "Click a point or a row to see what made it. Shift-click adds a second one "
                "and shows what differs.",
                class_="muted",
            ),
            tag("h3", "Marks"),
            tag("ul", families, class_="marks families"),
            tag("ul", shapes, class_="marks"),
        ]
    )


def selection(ctx: Context, wide: pd.DataFrame, chosen: pd.DataFrame, picks: Picks) -> Markup:
    """Spec differences first, then numbers, then what to do next."""
    records = rows.records(chosen)
    specs = [_spec(ctx, record["run_id"]) for record in records]
    base = rows.records(wide[wide["is_baseline"].astype(bool)].tail(1))
    clear = tag("button", "Clear", class_="link", data_set={"runs": ""})
    title = "1 run selected" if len(records) == 1 else f"{len(records)} runs side by side"
    links = tag("span", chat_link(records), " ", clear)
    parts = [tag("div", tag("h2", title), links, class_="between")]
    parts.append(side_table(records, specs, wide, base[0] if base else None))
    parts += [_actions(record, text) for record, text in zip(records, specs, strict=True)]
    if len(picks.runs) > SIDE_BY_SIDE:
        parts.append(tag("p", f"The first {SIDE_BY_SIDE} of {len(picks.runs)} are shown."))
    return join(parts)


def chat_link(records: Sequence[Mapping[str, Any]]) -> Markup | None:
    """To the selected runs side by side, those that are finished."""
    done = [record["run_id"] for record in records if record["state"] == "done"]
    where = f"/chat?runs={'~'.join(done)}"
    return tag("a", "Chat", href=where, class_="tool", data_carry=True) if done else None


def _spec(ctx: Context, run_id: str) -> str:
    return str(queries.run(ctx.store, run_id)["spec"].iloc[0])


def side_table(
    records: Sequence[Mapping[str, Any]],
    specs: Sequence[str],
    wide: pd.DataFrame,
    base: Mapping[str, Any] | None,
) -> Markup:
    """One column per run: what differs, then every number with its difference to 16 bits."""
    head = [
        tag(
            "th",
            look.mark(r["target"], r["packed"], r["family"], r["is_baseline"]),
            " ",
            r["name"],
            scope="col",
        )
        for r in records
    ]
    lines = _difference_lines(specs)
    if lines:
        lines = [_band("What differs", len(records)), *lines, _band("Numbers", len(records))]
    for name in rows.measured(wide):
        if any(not pd.isna(record.get(name)) for record in records):
            cells = [tag("td", number_with_delta(record, name, base)) for record in records]
            lines.append(tag("tr", tag("th", look.label(name, short=True), scope="row"), cells))
    table = tag("table", tag("thead", tag("tr", tag("th"), head)), tag("tbody", lines))
    return tag("div", table, class_="scroll side-table")


def _band(text: str, width: int) -> Markup:
    return tag("tr", tag("th", text, colspan=width + 1, scope="colgroup"), class_="band")


def _difference_lines(specs: Sequence[str]) -> list[Markup]:
    if len(specs) < 2:
        return []
    different = differences([json.loads(text) for text in specs])
    return [
        tag("tr", tag("th", name, scope="row"), [tag("td", value) for value in values])
        for name, values in different
    ]


def number_with_delta(
    record: Mapping[str, Any], name: str, base: Mapping[str, Any] | None
) -> Markup:
    """`7.284 ±0.031` and, lighter, the difference to the 16-bit run."""
    unit = str(record.get(f"{name}__unit") or "")
    value = record.get(name)
    parts = [tag("span", look.quantity(name, value, unit), class_="num")]
    spread = look.interval(name, record.get(f"{name}__stderr"), unit)
    if spread:
        parts.append(tag("small", spread, class_="pm"))
    if base is not None and not record["is_baseline"] and not pd.isna(base.get(name)):
        change = look.delta(name, value, base[name], unit) if value is not None else ""
        parts.append(tag("small", change, class_="delta"))
    return join(parts, " ")


def _actions(record: Mapping[str, Any], spec: str) -> Markup:
    open_link = tag(
        "a", "Open", href=f"/run?id={record['run_id']}", class_="button", data_carry=True
    )
    line = reproduce(spec)
    return tag(
        "div",
        tag("div", tag("b", record["name"]), open_link, class_="between"),
        copy_line(line),
        class_="run-actions",
    )


def copy_line(line: str) -> Markup:
    """A command with its copy button."""
    button = tag("button", "Copy", class_="tool", data_copy=line, aria_label="Copy the command")
    return tag("div", tag("code", line), button, class_="copy-line")
