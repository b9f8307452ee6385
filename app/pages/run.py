"""Run: one run, what it measured, what decided that, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import gradio as gr
import pandas as pd
from markupsafe import Markup

from app import kv_values, layer_values, look, rows
from app.charts import Chart, depth, layers, lkd, needle
from app.context import Context, Picks
from app.markup import join, tag
from app.pages.compare import copy_line
from app.pages.jobs import actions, error_part, perform, progress, state_of
from app.recipe_words import recipe_of
from app.specs import defaults, differences, flat, reproduce, words
from app.table import delta_cell, number_cell
from app.views import model_of, spec_data
from app.widgets import chart_value, connect, live, plotly_chart, query, skeleton
from backend.metrics import METRICS
from jobs.events import State
from jobs.kinds import RUN
from jobs.queue import RunView
from results_db import queries

TITLE, PATH, ORDER, KEY = "Run", "/run", 0, ""
NOTES = 6  # shown before the others are folded


def build(ctx: Context) -> None:
    """Header and numbers, then what decided them, then layers and log."""
    with gr.Column(elem_classes="page run", elem_id="content"):
        head = live(skeleton(200), elem_classes="head")
        with gr.Column(elem_classes="card chart-card layers-card"):
            above = live("")
            plot = plotly_chart(elem_classes="layers-plot")
            along = plotly_chart(elem_classes="layers-plot")
        with gr.Column(elem_classes="card chart-card lessons-card"):
            lesson = [live(""), plotly_chart(), live("")]
        with gr.Column(elem_classes="card chart-card lessons-card"):
            hidden = [live(""), plotly_chart(), live("")]
        with gr.Column(elem_classes="card chart-card values-card"):
            chosen = live("")
            with gr.Column(elem_classes="values-plots"):
                pictures = [plotly_chart() for _ in range(layer_values.PLOTS)]
            values = live("")
        with gr.Column(elem_classes="card chart-card cached-card"):
            cached = live("")
            with gr.Column(elem_classes="values-plots"):
                cached_plots = [plotly_chart() for _ in range(kv_values.PLOTS)]
            cached_numbers = live("")
        below = live(skeleton(300))

    def draw(request: gr.Request) -> list[str]:
        picks = Picks.read(query(request))
        return [
            *screen(ctx, picks),
            *inside(ctx, picks),
            *lessons(ctx, picks),
            *needles(ctx, picks),
            *keys_and_values(ctx, picks),
        ]

    def act(data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
        return perform(ctx, data, request)

    def stamp(request: gr.Request) -> Hashable:
        moving = [(v.run_id, v.state, v.fraction) for v in ctx.runs.runs() if not v.state.ended]
        return ctx.store.version, tuple(moving)

    outputs = [head, above, plot, below, along, chosen, *pictures, values, *lesson, *hidden]
    outputs += [cached, *cached_plots, cached_numbers]
    connect(draw, outputs, stamp=stamp, act=act)


def screen(ctx: Context, picks: Picks) -> Sequence[str]:
    """The four parts of the page."""
    try:
        view = ctx.runs.view(picks.id)
    except ValueError as error:
        return unknown(picks.id, error), "", "", ""
    stored = queries.run(ctx.store, picks.id)
    spec_text = str(stored["spec"].iloc[0]) if len(stored) else spec_of(view)
    heat = layers.rows(ctx.store, picks)
    chart = chart_value(layers.draw(heat), layers.say(heat)) if len(heat) else ""
    if view.kind != RUN:
        return job_header(ctx, view), "", "", conditions(ctx, view, stored, spec_text, picks)
    return (
        header(ctx, view, spec_text),
        layer_head(heat, spec_text),
        chart,
        conditions(ctx, view, stored, spec_text, picks),
    )


def spec_of(view: RunView) -> str:
    """The spec as text, from the queue where the store has not seen it yet."""
    return json.dumps(spec_data(view))


def unknown(run_id: str, error: Exception) -> Markup:
    """No such run."""
    sentence = str(error) if run_id else "Choose a run on Compare or Jobs; it opens here."
    link = tag("a", "Compare", href="/", class_="button", data_carry=True)
    return tag(
        "div",
        tag("div", tag("h1", sentence), tag("p", link), class_="words"),
        class_="empty-state single",
    )


# ---- header --------------------------------------------------------------------------------


def header(ctx: Context, view: RunView, spec_text: str) -> Markup:
    """Title in words, state, numbers with deltas, notes that cannot be missed."""
    recipe = recipe_of(spec_text)
    model = json.loads(spec_text)["model"]["id"]
    dot = look.mark(
        recipe.target,
        json.loads(spec_text).get("storage") == "packed",
        recipe.family,
        not recipe.target,
    )
    title = tag("h1", dot, " ", tag("span", recipe.name), tag("small", f"on {model}"))
    state = tag("div", state_of(view), actions(view), chat_link(view), class_="row")
    going = tag("div", progress(view), class_="job-progress") if not view.state.ended else None
    return join(
        [
            tag("div", title, state, class_="between wrap"),
            tag("p", tag("code", recipe.text), class_="muted"),
            going,
            error_part(view.error),
            numbers(ctx, view, model),
            notes_box(ctx, view.run_id),
            copy_line(reproduce(spec_text)),
        ]
    )


def chat_link(view: RunView) -> Markup | None:
    """To this run beside its 16-bit model."""
    if view.state is not State.DONE:
        return None
    return tag("a", "Chat", href=f"/chat?runs={view.run_id}", class_="button", data_carry=True)


def job_header(ctx: Context, view: RunView) -> Markup:
    """Of a job that measures no model: what it does, and how far it is."""
    title = tag("h1", tag("span", view.recipe), tag("small", f"on {model_of(view)}"))
    state = tag("div", state_of(view), actions(view), class_="row")
    going = tag("div", progress(view), class_="job-progress") if not view.state.ended else None
    top = tag("div", title, state, class_="between wrap")
    return join([top, going, error_part(view.error), notes_box(ctx, view.run_id)])


def numbers(ctx: Context, view: RunView, model: str) -> Markup:
    """Every measurement: value, interval, n, difference to 16 bits, conditions."""
    wide = rows.wide(ctx.store, model)
    names = rows.measured(wide)
    own = rows.with_bases(wide, names)
    own = own[own["run_id"] == view.run_id]
    if not len(own):
        return tag("p", "Nothing is measured yet.", class_="muted")
    settings = settings_apart(ctx, view.run_id, model)
    lines = [
        measurement_line(record, name, settings.get(str(record[f"{name}__metric_id"]), ""))
        for record in rows.records(own)
        for name in names
        if not pd.isna(record.get(f"{name}__metric_id"))
    ]
    titles = ("Measurement", "Value", "Compared with 16-bit", "n", "Measured on")
    numeric = (False, True, True, True, False)
    cells = [
        tag("th", t, scope="col", class_="number" if n else None)
        for t, n in zip(titles, numeric, strict=True)
    ]
    lines = list(dict.fromkeys(lines))
    return tag(
        "div",
        tag("table", tag("thead", tag("tr", cells)), tag("tbody", lines)),
        class_="scroll card numbers",
    )


def settings_apart(ctx: Context, run_id: str, model: str) -> dict[str, str]:
    """{metric id: "window 512"} where one kind of metric was asked for several times."""
    found = queries.measurements(ctx.store, model or None)
    found = found[found["run_id"] == run_id].drop_duplicates("metric_id")
    told: dict[str, str] = {}
    for kind, group in found.groupby("metric"):
        fields = METRICS.find(str(kind)).model_fields if str(kind) in METRICS.load() else {}
        details = [json.loads(text) for text in group["detail"]]
        for metric_id, own in zip(group["metric_id"], details, strict=True):
            apart = [
                f"{field} {words(own[field])}"
                for field in fields
                if field in own and any(other.get(field) != own[field] for other in details)
            ]
            told[str(metric_id)] = ", ".join(apart)
    return told


def measurement_line(record: Mapping[str, Any], name: str, settings: str = "") -> Markup:
    n = record.get(f"{name}__n")
    count = look.whole(n) if n is not None and not pd.isna(n) and n > 1 else look.MISSING
    place = f"{record[f'{name}__device']}, {record[f'{name}__dtype']}"
    better = record.get(f"{name}__better")
    unit = look.heading_unit(name, str(record.get(f"{name}__unit") or ""))
    about = ", ".join(p for p in (settings, unit, f"{better} is better" if better else "") if p)
    return tag(
        "tr",
        tag("th", look.label(name), " ", tag("small", about), scope="row"),
        number_cell(record, name),
        delta_cell(record, name),
        tag("td", count, class_="number"),
        tag("td", f"{place}, {record[f'{name}__storage']}", class_="muted"),
    )


def notes_box(ctx: Context, run_id: str) -> Markup | None:
    """Fallbacks and skips: part of the result. What many linears say alike is said once."""
    told: dict[str, list[Mapping[str, Any]]] = {}
    for record in rows.records(queries.notes(ctx.store, run_id)):
        told.setdefault(str(record["text"]), []).append(record)
    if not told:
        return None
    items = [tag("li", _note(text, records)) for text, records in told.items()]
    title = (
        f"{len(items)} note{'s' * (len(items) > 1)}: the result is not exactly what was asked for"
    )
    more, fold = items[NOTES:], None
    if more:
        fold = tag("details", tag("summary", f"{len(more)} more"), tag("ul", more), data_key="more")
    shown = tag("ul", items[:NOTES])
    return tag("div", tag("b", title), shown, fold, class_="notes-box", role="note")


def _note(text: str, records: Sequence[Mapping[str, Any]]) -> str:
    """A note after the places that it is about."""
    blocks = sorted({int(r["block"]) for r in records if not pd.isna(r["block"])})
    linears = sorted({str(r["module"]) for r in records if r["module"]})
    span = f"blocks {blocks[0]} to {blocks[-1]}" if blocks[1:] else f"block {sum(blocks)}"
    where = [span] if blocks else []
    if len(records) == 1 or not linears:
        where += linears
    else:
        where.insert(0, f"{len(records)} linears")
    return f"{', '.join(where)}: {text}" if where else text


# ---- layers --------------------------------------------------------------------------------


def inside(ctx: Context, picks: Picks) -> list[str]:
    """Error along the depth; then one matrix, read from the run's folder where one is chosen."""
    along = depth.chart_rows(ctx.store, picks)
    chart = chart_value(depth.draw(along), depth.say(along)) if len(along) else ""
    found = queries.run(ctx.store, picks.id)
    folder = ctx.home / "runs" / str(found["run_id"].iloc[0]) if len(found) else None
    if folder is None:
        return [chart, *[""] * (layer_values.PLOTS + 2)]
    values = queries.layers(ctx.store, picks.id)
    return [chart, *layer_values.parts(folder / "statistics", values, picks)]


def keys_and_values(ctx: Context, picks: Picks) -> list[str]:
    """What the model's keys and values look like, of a run whose evaluation looked at them."""
    found = queries.run(ctx.store, picks.id)
    if not len(found):
        return [""] * (kv_values.PLOTS + 2)
    return kv_values.parts(ctx.home / "runs" / str(found["run_id"].iloc[0]), picks)


def lessons(ctx: Context, picks: Picks) -> list[str]:
    """Title, curves and their sentence or table, of a run whose blocks were distilled."""
    table = lkd.chart_rows(ctx.store, picks)
    if not len(table):
        return ["", "", ""]
    as_table = "lkd" in picks.tables
    head = tag(
        "div", tag("h2", lkd.CHART.title), table_switch(lkd.CHART, "lkd", picks), class_="between"
    )
    said = tag("p", lkd.say(table), " ", LESSON, class_="muted")
    if as_table:
        return [head, "", join([said, lesson_table(table)])]
    return [head, chart_value(lkd.draw(table), lkd.say(table)), said]


def table_switch(chart: Chart, name: str, picks: Picks) -> Markup:
    """Between a chart and its table."""
    as_table = name in picks.tables
    return tag(
        "button",
        "Show as chart" if as_table else "Show as table",
        class_="tool",
        aria_pressed=str(as_table).lower(),
        aria_label=f"{chart.title}: show as {'chart' if as_table else 'table'}",
        data_toggle={"name": "tables", "value": name},
    )


LESSON = (
    "The loss, a share of the output's variance, is that of calibration sequences that were not "
    "trained on; the weights of its least value, ringed, were kept."
)


def lesson_table(table: pd.DataFrame) -> Markup:
    """A row per step, a column per block; the least loss of each block stands out."""
    wide = lkd.wide(table)
    heads = [tag("th", f"Block {block}", scope="col", class_="number") for block in wide.columns]
    least = wide.min().tolist()

    def cell(value: float, best: float) -> Markup:
        text = look.significant(value, 4) if value == value else look.MISSING
        return tag("td", tag("b", text) if value == best else text, class_="number")

    lines = [
        tag("tr", tag("th", step, scope="row"), map(cell, values, least))
        for step, values in zip(wide.index.tolist(), wide.to_numpy().tolist(), strict=True)
    ]
    top = tag("thead", tag("tr", tag("th", "Step", scope="col"), heads))
    return tag("div", tag("table", top, tag("tbody", lines)), class_="scroll as-table")


def needles(ctx: Context, picks: Picks) -> list[str]:
    """Title, heat map and its sentence or table, of a run that was asked for needles."""
    table = needle.chart_rows(ctx.store, picks)
    if not len(table):
        return ["", "", ""]
    tools = tag(
        "div",
        needle_picker(ctx, picks),
        table_switch(needle.CHART, "needle", picks),
        class_="row",
    )
    head = tag("div", tag("h2", needle.CHART.title), tools, class_="between wrap")
    said = tag("p", needle.say(table), " ", needle.unit(table), class_="muted")
    if "needle" in picks.tables:
        return [head, "", join([said, needle_table(table)])]
    return [join([head, said]), chart_value(needle.draw(table), needle.say(table)), ""]


def needle_picker(ctx: Context, picks: Picks) -> Markup:
    """Which run to take the difference to: one that answered the same prompts."""
    alike = needle.runs_alike(ctx.store, picks.id)
    options = [
        tag("option", needle.name_of(ctx.store, r), value=r, selected=r == picks.against)
        for r in alike[:300]
    ]
    none = tag("option", "difference to…", value="", selected=picks.against not in alike)
    label = "Difference of the needles to another run"
    return tag("select", none, options, data_param="against", aria_label=label)


def needle_table(table: pd.DataFrame) -> Markup:
    """A row per depth, a column per length, the means at the end."""
    grid, apart = needle.wide(table), needle.shown(table) == "difference"
    heads = [tag("th", str(name), scope="col", class_="number") for name in grid.columns]
    lines = [
        tag(
            "tr",
            tag("th", str(depth), scope="row"),
            [
                tag("td", needle.text(v, apart) or look.MISSING, class_="number")
                for v in grid.loc[depth].tolist()
            ],
        )
        for depth in grid.index.tolist()
    ]
    top = tag("thead", tag("tr", tag("th", "Depth", scope="col"), heads))
    return tag("div", tag("table", top, tag("tbody", lines)), class_="scroll as-table")


ONLY_CACHE = (
    "This recipe rounds cached keys and values only: the weights are as they were, so there are no "
    "errors by layer."
)


def layer_head(heat: pd.DataFrame, spec_text: str) -> Markup:
    """Which per-layer value is shown."""
    if not len(heat):
        waiting = "Error by layer appears here once a block is quantized."
        rounds = recipe_of(spec_text).target
        said = {"": layer_values.NO_BASELINE, "kv_cache": ONLY_CACHE}.get(rounds, waiting)
        return tag("p", said, class_="muted")
    options = [
        tag("option", look.label(name), value=name, selected=name == heat.attrs["name"])
        for name in heat.attrs["names"]
    ]
    picker = tag("select", options, data_param="layer", aria_label="Value per layer")
    said = tag("p", layers.say(heat), class_="muted")
    return tag("div", tag("h2", "Error by layer"), picker, said, class_="axis-row")


# ---- what decided the numbers --------------------------------------------------------------


def conditions(
    ctx: Context, view: RunView, stored: pd.DataFrame, spec_text: str, picks: Picks
) -> Markup:
    """Spec beside another run's, environment, times, log."""
    env = json.loads(stored["env"].iloc[0] or "{}") if len(stored) else {}
    left = tag("section", spec_table(ctx, view, spec_text, picks), class_="card pad")
    right = tag("section", environment_table(view, env), class_="card pad")
    return join([tag("div", left, right, class_="two"), log_part(ctx, view)])


def spec_table(ctx: Context, view: RunView, spec_text: str, picks: Picks) -> Markup:
    """Every setting; beside another run, what differs is marked."""
    own = flat(json.loads(spec_text))
    other = other_spec(ctx, picks.against)
    their = flat(json.loads(other)) if other else {}
    names = list(dict.fromkeys([*own, *their]))
    usual = defaults(json.loads(spec_text))
    apart = {name for name, _ in differences([json.loads(t) for t in (spec_text, other) if t])}
    told = [n for n in names if n in apart or own.get(n, usual.get(n)) != usual.get(n)]
    lines = [spec_line(name, own, their if other else None) for name in told]
    rest = [spec_line(n, own, their if other else None) for n in names if n not in told]
    fold = tag(
        "details",
        tag("summary", f"{len(rest)} settings at their defaults"),
        tag("table", tag("tbody", rest), class_="settings"),
        data_key="defaults",
    )
    head = tag(
        "div", tag("h2", "What decided it"), against_picker(ctx, view, picks), class_="between wrap"
    )
    titles = ["", "this run", *([recipe_of(other).name] if other else [])]
    top = tag("thead", tag("tr", [tag("th", t, scope="col") for t in titles])) if other else None
    table = tag("table", top, tag("tbody", lines), class_="settings")
    return join([head, tag("div", table, class_="scroll"), fold])


def spec_line(name: str, own: Mapping[str, str], their: Mapping[str, str] | None) -> Markup:
    mine = own.get(name, "–")
    cells = [tag("td", mine)]
    different = their is not None and their.get(name, "–") != mine
    if their is not None:
        cells.append(tag("td", their.get(name, "–")))
    return tag("tr", tag("th", name, scope="row"), cells, class_="differs" if different else None)


def other_spec(ctx: Context, run_id: str) -> str:
    """Spec of the run to compare with; "" without one."""
    found = queries.run(ctx.store, run_id) if run_id else pd.DataFrame()
    return str(found["spec"].iloc[0]) if len(found) else ""


def against_picker(ctx: Context, view: RunView, picks: Picks) -> Markup:
    """Which run to compare the settings with."""
    found = queries.runs(ctx.store)
    others = rows.records(found[found["run_id"] != view.run_id])
    options = [
        tag(
            "option",
            f"{recipe_of(r['spec']).name} on {r['model']}",
            value=r["run_id"],
            selected=r["run_id"] == picks.against,
        )
        for r in others[:300]
    ]
    none = tag("option", "compare with…", value="", selected=not picks.against)
    return tag("select", none, options, data_param="against", aria_label="Compare settings with")


def environment_table(view: RunView, env: Mapping[str, Any]) -> Markup:
    """Where and when it ran."""
    facts = {
        "run": view.run_id,
        "label": view.label or "–",
        "stages": " → ".join(view.stages),
        "worked": look.duration(view.seconds),
        "device": view.device,
        "fingerprint": view.fingerprint,
        "artifact": view.artifact_id,
    }
    facts |= {name.replace("_", " "): look_of(value) for name, value in env.items()}
    lines = [
        tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in facts.items()
    ]
    return join([tag("h2", "Where it ran"), tag("table", tag("tbody", lines), class_="settings")])


def look_of(value: Any) -> str:
    """An environment value as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {look_of(inner)}" for name, inner in value.items())
    return (
        {True: "yes", False: "no", None: "–"}.get(value, str(value))
        if not isinstance(value, int | float | list) or isinstance(value, bool)
        else str(value)
    )


def log_part(ctx: Context, view: RunView) -> Markup:
    """The log, folded."""
    log = ctx.runs.log(view.run_id, 400)
    return tag(
        "details",
        tag("summary", "Log"),
        tag("pre", log or "Nothing printed.", class_="log", tabindex="0"),
        class_="card pad",
        data_key="log",
        id="log",
    )
