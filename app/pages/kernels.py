"""Kernels: what packed products cost here, beside a bf16 product timed in the same run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import gradio as gr
import pandas as pd
from markupsafe import Markup

from app import kernel_rows, look, rows
from app.charts import Chart, kernel_speed, roofline
from app.context import Context, Picks
from app.kernel_rows import spaced
from app.markup import join, tag
from app.pages.jobs import error_part, perform, progress, state_of
from app.widgets import chart_value, connect, live, plotly_chart, query, skeleton
from backend import published
from backend.spec import BenchSpec
from results_db import queries

TITLE, PATH, ORDER, KEY = "Kernels", "/kernels", 7, "k"
KIND = "bench"
PRINTED = "LUT-GEMM kernel latency"
TINT = 60  # per cent of colour in the cell furthest from 1
STRONGEST = math.log(4)  # a ratio of 4 or 1/4 has all the colour
ABOUT = (
    "Each number is the time of a bf16 product over that of the packed one, in turn in the same "
    "run, weights cold; a product that is wrong has no time, and a time that is unsteady counts "
    "for nothing."
)
CACHES = (
    "One new token's attention, 32 query heads on 8 of keys and values with 128 channels each: the "
    "time on a bf16 cache over that on the packed one, in the same way."
)


def build(ctx: Context) -> None:
    """Head, table, two charts, published times."""
    with gr.Column(elem_classes="page kernels", elem_id="content"):
        head = live(skeleton(90), elem_classes="head")
        table = live(skeleton(400), elem_classes="card table-card")
        with gr.Row(elem_classes="split halves"):
            with gr.Column(elem_classes="card chart-card kernel-card"):
                speed = [live(""), plotly_chart(), live("")]
            with gr.Column(elem_classes="card chart-card kernel-card"):
                roof = [live(""), plotly_chart(), live("")]
        printed = live("", elem_classes="card pad")

    def draw(request: gr.Request) -> list[Any]:
        return screen(ctx, Picks.read(query(request)), ctx.trusted(request))

    def act(data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
        if data.get("do") == "bench":
            job = ctx.change(request).submit(BenchSpec(), device="auto")
            return {"toast": "Timing is queued.", "go": f"/kernels?id={quote(job)}"}
        return perform(ctx, data, request)

    def stamp(request: gr.Request) -> Hashable:
        moving = [(v.run_id, v.state, v.fraction) for v in ctx.runs.runs() if v.kind == KIND]
        return ctx.store.version, tuple(moving)

    connect(draw, [head, table, *speed, *roof, printed], stamp=stamp, act=act)


def screen(ctx: Context, picks: Picks, trusted: bool = True) -> list[Any]:
    """All parts of the page."""
    found = kernel_rows.of_job(ctx.store, picks)
    caches = kernel_rows.attention_of_job(ctx.store, picks)
    charts = [
        part
        for name, chart in (("kernel_speed", kernel_speed.CHART), ("roofline", roofline.CHART))
        for part in chart_parts(ctx, chart, name, picks, found)
    ]
    return [
        header(ctx, picks, found, trusted, timed=len(found) + len(caches)),
        join([products_table(found), caches_table(caches)]),
        *charts,
        published_part(),
    ]


# ---- head ----------------------------------------------------------------------------------


def header(ctx: Context, picks: Picks, found: pd.DataFrame, trusted: bool, *, timed: int) -> Markup:
    """Headline, conditions, the choice of a job, and the button that starts one.

    found: products, of the `timed` rows that the job has.
    """
    going = [v for v in ctx.runs.runs() if v.kind == KIND and not v.state.ended]
    failed = [v for v in ctx.runs.runs() if v.kind == KIND and v.run_id == picks.id and v.error]
    button = tag("button", "Time kernels here", class_="button primary", data_act={"do": "bench"})
    start = tag("p", button) if trusted and not going else None
    work = [tag("div", state_of(v), progress(v), class_="job-progress") for v in going]
    errors = [error_part(v.error) for v in failed]
    if not timed:
        words = (
            "Nothing is timed on this machine yet. One click times every packed product that runs "
            "here beside a bf16 product, in a few minutes and with the processor to itself."
        )
        title = tag("h1", "How fast are the packed products?")
        return join([title, tag("p", words, class_="facts"), *work, *errors, start])
    tools = tag("div", job_picker(ctx, found), shape_picker(found, picks), start, class_="row")
    return join([tag("h1", headline(found)), conditions(ctx, found), *work, *errors, tools])


def headline(found: pd.DataFrame) -> str:
    """The product with the best ratio at the fewest tokens of the largest shape.

    A question where only caches are timed.
    """
    if not len(found):
        return "How fast is attention on packed caches?"
    rivals = found[found["ratio_to_bf16"].notna() & (found["kernel"] != kernel_rows.DENSE)]
    if not len(rivals):
        return "No product here has a steady time."
    own = rivals[rivals["shape"] == kernel_rows.shapes(rivals)[0]]
    own = own[own["m"] == own["m"].min()]
    best = rows.records(own.sort_values("ratio_to_bf16"))[-1]
    tokens = "a single token" if best["m"] == 1 else f"{best['m']} tokens at once"
    return f"{best['format']} is {best['ratio_to_bf16']:.1f} times as fast as bf16 for {tokens}."


def conditions(ctx: Context, found: pd.DataFrame) -> Markup:
    """Device, threads, versions and measured ceilings of the job."""
    jobs = queries.kernel_jobs(ctx.store)
    own = rows.records(jobs[jobs["job_id"] == found.attrs["job"]])[0]
    env = json.loads(own["env"] or "{}")
    versions = [f"{name} {env[name]}" for name in ("torch", "triton", "driver") if env.get(name)]
    threads = f"{own['threads']} thread{'s' * (own['threads'] != 1)}"
    limits = found.attrs["ceilings"]
    can = [
        f"{text} {limits[name]:.3g} {unit}"
        for name, text, unit in (
            ("read", "reading", "GB/s"),
            ("bf16 product", "bf16 product", "TFLOP/s"),
            ("launch in a graph", "launch", "µs"),
        )
        if name in limits
    ]
    when = f"{own['measured_at']:%Y-%m-%d %H:%M} UTC"
    parts = [str(own["device"]), threads, *versions, *can, when]
    return tag("p", " · ".join(parts), class_="facts")


def job_picker(ctx: Context, found: pd.DataFrame) -> Markup | None:
    """Which job's times are shown, where there are several."""
    jobs = rows.records(queries.kernel_jobs(ctx.store))
    if len(jobs) < 2:
        return None
    options = [
        tag(
            "option",
            f"{job['device']}, {job['measured_at']:%Y-%m-%d %H:%M}",
            value=job["job_id"],
            selected=job["job_id"] == found.attrs["job"] or None,
        )
        for job in jobs[:100]
    ]
    return tag("select", options, data_param="id", aria_label="Job whose times are shown")


def shape_picker(found: pd.DataFrame, picks: Picks) -> Markup | None:
    """Which weights the charts are about."""
    known, now = kernel_rows.shapes(found), kernel_rows.shape_of(found, picks)
    if len(known) < 2:
        return None
    options = [
        tag(
            "option",
            f"charts: {spaced(shape)}",
            value=shape,
            selected=shape == now or None,
        )
        for shape in known
    ]
    return tag("select", options, data_param="shape", aria_label="Shape that the charts show")


# ---- table ---------------------------------------------------------------------------------


def products_table(found: pd.DataFrame) -> Markup | None:
    """Products with weights: a column per n x k and m."""
    if not len(found):
        return None
    table = times_table(found, "Product", lambda shape: f"n × k = {spaced(shape)}", "m = {}".format)
    return join([tag("p", ABOUT, class_="muted pad"), table])


def caches_table(found: pd.DataFrame) -> Markup | None:
    """Attention on packed caches: a column per tokens in the cache and sequences."""
    if not len(found):
        return None
    title = tag("h2", "Decode attention on a packed cache")
    table = times_table(
        found,
        "Cache",
        lambda tokens: f"{spaced(tokens)} tokens",
        lambda m: f"{m} sequence{'s' * (m != 1)}",
    )
    return join([tag("div", title, tag("p", CACHES, class_="muted"), class_="pad"), table])


def times_table(
    found: pd.DataFrame, what: str, over: Callable[[str], str], under: Callable[[int], str]
) -> Markup:
    """A row per format, a column per shape and m; `over` and `under` write these two."""
    places = found[["shape", "n", "k", "m"]].drop_duplicates()
    places = places.sort_values(["n", "k", "m"], ascending=[False, False, True])
    compared = found["kernel"].isin(kernel_rows.COMPARED)
    rivals = found[~compared]
    cells = {(r["format"], r["shape"], r["m"]): r for r in rows.records(rivals)}
    dense = {(r["shape"], r["m"]): r for r in rows.records(found[compared])}
    counts = places["shape"].value_counts(sort=False)
    top = [tag("th", what, scope="col", rowspan="2")] + [
        tag(
            "th",
            over(str(shape)),
            scope="colgroup",
            colspan=str(counts[shape]),
        )
        for shape in places["shape"].drop_duplicates()
    ]
    keys = list(zip(places["shape"], places["m"], strict=True))
    second = [tag("th", under(m), scope="col", class_="number") for _, m in keys]
    reference = tag(
        "tr",
        tag("th", "bf16 ", tag("small", "ms"), scope="row"),
        [tag("td", dense_text(dense.get(key)), class_="number muted") for key in keys],
    )
    lines = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            [cell(cells.get((name, *key)), dense.get(key), found) for key in keys],
        )
        for name in product_order(rivals)
    ]
    body = tag("tbody", reference, lines)
    table = tag("table", tag("thead", tag("tr", top), tag("tr", second)), body, class_="times")
    return tag("div", table, class_="scroll")


def product_order(rivals: pd.DataFrame) -> list[str]:
    """Products, the quickest at the fewest tokens first; those without a ratio last."""
    first = rivals[rivals["m"] == rivals["m"].min()]
    best = first.groupby("format")["ratio_to_bf16"].max().fillna(0.0)
    names = sorted(rivals["format"].unique(), key=lambda name: (-best.get(name, 0.0), name))
    return [str(name) for name in names]


def dense_text(record: Mapping[str, Any] | None) -> str:
    """Median of the bf16 product."""
    return look.MISSING if record is None else look.significant(record["median_ms"], 3)


def cell(
    record: Mapping[str, Any] | None, dense: Mapping[str, Any] | None, found: pd.DataFrame
) -> Markup:
    """One ratio on its tint, or why there is none."""
    if record is None:
        return tag("td", look.MISSING, class_="number muted", title="it does not take this shape")
    if not record["correct"]:
        wrong = f"wrong by {look.significant(record['max_rel_err'], 2)}: no time"
        return tag("td", "wrong", class_="number warn", title=wrong)
    spread = f"{record['median_ms']:.3g} ms ({record['p20_ms']:.3g}–{record['p80_ms']:.3g})"
    ratio = record["ratio_to_bf16"]
    if ratio is None or pd.isna(ratio):
        return tag("td", "unsteady", class_="number muted", title=f"{spread}: no result")
    read = found.attrs["ceilings"].get("read")
    share = f", {look.percent(record['gbps'] / read)} of the bandwidth" if read else ""
    base = "" if dense is None else f" against {dense['median_ms']:.3g} ms"
    title = f"{spread}{base}; {record['gbps']:.3g} GB/s{share}"
    if not pd.isna(record["eager_ms"]):
        title += f"; {record['eager_ms']:.3g} ms with its launch"
    colour = look.BLUE if ratio >= 1 else look.ORANGE
    tint = round(TINT * min(1.0, abs(math.log(ratio)) / STRONGEST))
    style = f"background:color-mix(in srgb, {colour} {tint}%, transparent)"
    return tag("td", f"{ratio:.2f}×", class_="number", style=style, title=title)


# ---- charts --------------------------------------------------------------------------------


def chart_parts(
    ctx: Context, chart: Chart, name: str, picks: Picks, found: pd.DataFrame
) -> list[Any]:
    """Title and sentence, figure, and the table in its place."""
    if not len(found):
        return ["", "", ""]
    table = chart.rows(ctx.store, picks)
    as_table = name in picks.tables
    switch = tag(
        "button",
        "Show as chart" if as_table else "Show as table",
        class_="tool",
        aria_pressed=str(as_table).lower(),
        aria_label=f"{chart.title}: show as {'chart' if as_table else 'table'}",
        data_toggle={"name": "tables", "value": name},
    )
    top = tag("div", tag("h2", chart.title), switch, class_="between")
    head = join([top, tag("p", chart.say(table), class_="muted")])
    if as_table:
        return [head, "", plain_table(table, chart.columns(table))]
    return [head, chart_value(chart.draw(table), chart.say(table)), ""]


def plain_table(table: pd.DataFrame, heads: Mapping[str, str]) -> Markup:
    """A chart's rows."""
    top = [
        tag("th", head, scope="col", class_="number" if at else None)
        for at, head in enumerate(heads.values())
    ]
    lines = [
        tag(
            "tr",
            [
                tag("td", value if at == 0 else plain(value), class_="number" if at else None)
                for at, value in enumerate(record[name] for name in heads)
            ],
        )
        for record in rows.records(table)
    ]
    body = tag("table", tag("thead", tag("tr", top)), tag("tbody", lines))
    return tag("div", body, class_="scroll as-table")


def plain(value: Any) -> str:
    """A number of a table."""
    return look.whole(value) if isinstance(value, int) else look.significant(float(value), 3)


# ---- what is in print ------------------------------------------------------------------------


def published_part() -> Markup:
    """Printed times, on other hardware: beside ours, never among them."""
    table = published.results()
    found = table[(table["table"] == PRINTED) & (table["metric"] == "speedup")]
    found = found.assign(
        product=[
            f"{name} W{bits:g}" if name != "fp16" else "cuBLAS FP16"
            for name, bits in zip(found["method"].map(printed_name), found["w_bits"], strict=True)
        ]
    )
    shapes = list(dict.fromkeys(found["settings"]))
    cells = {(r["product"], r["settings"]): r["value"] for r in rows.records(found)}
    names: Sequence[str] = list(dict.fromkeys(found["product"]))
    top = [tag("th", "m = 1, n × k", scope="col")] + [
        tag("th", name, scope="col", class_="number") for name in names
    ]
    lines = [
        tag(
            "tr",
            tag("th", shape_in(shape), scope="row", class_="nowrap"),
            [tag("td", f"{cells[name, shape]:.2f}×", class_="number") for name in names],
        )
        for shape in shapes
    ]
    source = rows.records(found.head(1))[0]
    words = (
        f"Published, other hardware: times of cuBLAS FP16 over these, as printed by "
        f"{source['source']} ({source['read_in']}). {source['note'].split(';')[-1].strip()}."
    )
    body = tag("table", tag("thead", tag("tr", top)), tag("tbody", lines))
    title = tag("h2", "In print")
    return join([title, tag("p", words, class_="muted"), tag("div", body, class_="scroll")])


def printed_name(method: str) -> str:
    """As papers write it."""
    return {"gptq": "GPTQ", "lut_gemm": "LUT-GEMM"}.get(method, method)


def shape_in(settings: str) -> str:
    """`m=1 n=512 k=2048` -> `512 × 2 048`."""
    sides = dict(part.split("=") for part in settings.split())
    return spaced(f"{sides['n']}x{sides['k']}")
