"""Weight bits x KV bits x context on Compare: one small heat map per length of the windows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd
from markupsafe import Markup

from app import look, rows
from app.context import Picks
from app.markup import join, tag
from app.memory_view import new_run
from results_db import queries
from results_db.store import Store

TITLE = "Weight bits, KV bits and context"
SWEEP = """kv_cache
kivi(bits=4|2)
rtn(bits=8|4|3,group=64)
rtn(bits=8|4|3,group=64)+kv_cache
rtn(bits=8|4|3,group=64)+kivi(bits=4|2)"""
LIMIT = 8  # windows of each length in the sweep
LONGEST = 2048  # window in the sweep
TINT = 55  # per cent of colour in the worst cell: text stays readable on it in both themes
SETTINGS = ("version", "device", "dtype", "data_set", "bos")
WAITING = (
    "A cell for every pair of weight bits and KV bits, a panel for every window length, appears "
    "here once recipes that round the cache are measured on windows of some length."
)


def part(store: Store, picks: Picks) -> Markup:
    """The whole card."""
    table = cells(store, picks)
    title = tag("h2", TITLE)
    if not len(table) or (table["kv_bits"] == "16").all():
        link = sweep_link(store, picks, "Measure a sweep")
        return join([title, tag("p", WAITING, class_="muted"), tag("p", link)])
    top = tag("div", title, picker(table), class_="axis-row")
    windows = sorted(table["window"].unique())
    panels = [panel(table, window) for window in windows]
    body = tag("div", panels, class_="cube")
    end = [sweep_link(store, picks, "Measure a whole sweep")] if missing(table) else []
    return join(
        [top, tag("p", say(table), aria_live="polite"), body, about(table), *map(paragraph, end)]
    )


def paragraph(child: Markup) -> Markup:
    return tag("p", child)


def sweep_link(store: Store, picks: Picks, words: str) -> Markup:
    """To New run, with every pair of bits on windows of three lengths."""
    address = new_run(picks.model, SWEEP, sweep_metrics(context_of(store, picks.model)))
    return tag("a", words, href=address, class_="button")


def sweep_metrics(context: int) -> str:
    """Perplexity on windows of a quarter, half and all of the context, and sizes."""
    longest = min(context, LONGEST)
    lengths = (longest // 4, longest // 2, longest) if longest >= 64 else (0,)
    inside = [
        f"window={length},limit={LIMIT}" if length else f"limit={LIMIT}" for length in lengths
    ]
    return "\n".join([*(f"perplexity({text})" for text in inside), "size"])


# ---- what is measured ----------------------------------------------------------------------


def cells(store: Store, picks: Picks) -> pd.DataFrame:
    """The best recipe of every (window, weight bits, KV bits), all measured under like conditions.

    Recipes that round activations are left out. `attrs`: name, names, better, unit.
    """
    found = measured(store, picks.model)
    names = rows.measured(pd.DataFrame(columns=[f"{n}__unit" for n in found["name"].unique()]))
    name = picks.cube if picks.cube in names else next(iter(names), "")
    own = found[found["name"] == name].dropna(subset=["value"])
    own = rows.kept(own, picks)
    own = most_frequent(own, SETTINGS)
    own = pd.concat([most_frequent(g, ["metric_id"]) for _, g in own.groupby("window")] or [own])
    better, unit = (str(own[c].iloc[0] or "") if len(own) else "" for c in ("better", "unit"))
    own = own.sort_values("value", ascending=better != "higher", kind="stable")
    place = ["window", "bits", "kv_bits"]
    counts = own.groupby(place)["run_id"].transform("nunique") if len(own) else 0
    table = own.assign(tried=counts).drop_duplicates(place).reset_index(drop=True)
    table.attrs = {"name": name, "names": names, "better": better, "unit": unit}
    return table


def measured(store: Store, model: str) -> pd.DataFrame:
    """Every number that says on windows of which length it was measured."""
    return _measured(store, store.version, model).copy(deep=False)


@lru_cache(maxsize=8)
def _measured(store: Store, version: int, model: str) -> pd.DataFrame:
    found = queries.measurements(store, model or None)
    columns = ["metric_id", "name", "value", "stderr", "unit", "better", "window", *SETTINGS]
    told = [
        {**record, "window": window, "value": value, "data_set": str(detail.get("dataset", ""))}
        | {"bos": str(detail.get("bos", ""))}
        for record in rows.records(found)
        for detail in [json.loads(record["detail"])]
        for window, value in by_length(detail, record["value"])
    ]
    table = pd.DataFrame(told, columns=["run_id", *columns])
    about = rows.wide(store, model).drop_duplicates("run_id")
    about = about[[c for c in about.columns if c not in columns and "__" not in c]]
    table = table.merge(about, on="run_id")
    return table[table["act_bits"] == "16"].reset_index(drop=True)


def by_length(detail: Mapping[str, Any], value: float) -> list[tuple[int, float]]:
    """(length of the text, number) of one measurement: one of its windows, or one per length."""
    if window := detail.get("window"):
        return [(int(window), float(value))]
    return [
        (int(length), sum(scores) / len(scores))
        for length, scores in zip(detail.get("lengths", ()), detail.get("cells", ()), strict=False)
        if scores and None not in scores
    ]


def most_frequent(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The rows that share the most frequent values of these columns."""
    if not len(table):
        return table
    keys = pd.Series(list(zip(*(table[name] for name in names), strict=True)), index=table.index)
    return table[keys == keys.value_counts().index[0]]


def context_of(store: Store, model: str) -> int:
    """The model's context, where a run has told it; 0 where none has."""
    from app.charts.memory import details

    return max((int(d.get("context") or 0) for d in details(store, model).values()), default=0)


def widths(table: pd.DataFrame, name: str) -> list[str]:
    """Bits that occur, 16 first."""
    return sorted(table[name].unique(), key=float, reverse=True)


def missing(table: pd.DataFrame) -> bool:
    """True where a window has not every pair of weight bits and KV bits."""
    pairs = len(widths(table, "bits")) * len(widths(table, "kv_bits"))
    few = len(widths(table, "bits")) < 2 or len(widths(table, "kv_bits")) < 2
    return few or len(table) < pairs * table["window"].nunique()


# ---- in words and cells --------------------------------------------------------------------


def say(table: pd.DataFrame) -> str:
    """What the fewest KV bits cost at 16-bit weights, on the shortest and the longest windows."""
    name, unit = table.attrs["name"], table.attrs["unit"]
    what = look.inline(name)
    said = []
    for window in sorted({table["window"].min(), table["window"].max()}):
        own = table[(table["window"] == window) & (table["bits"] == "16")]
        values = dict(zip(own["kv_bits"], own["value"], strict=True))
        if "16" in values and len(values) > 1:
            least = min(values, key=float)
            change = look.delta(name, values[least], values["16"], unit)
            said.append(f"{change} on {look.whole(window)} tokens with {least}-bit keys and values")
    if said:
        return f"With 16-bit weights, {what} changes by {' and by '.join(said)}."
    return f"{look.label(name)} of the best recipe of each pair of bits."


def about(table: pd.DataFrame) -> Markup:
    """What a cell is."""
    first = rows.records(table.head(1))[0]
    better = table.attrs["better"]
    words = (
        f"Weight bits down, KV bits across; in each cell the best recipe measured ({better} is "
        f"better), the stronger the colour the worse. {first['device']}, {first['dtype']}. Recipes "
        "that round activations are left out; an en dash is not measured."
    )
    return tag("p", words, class_="muted")


def picker(table: pd.DataFrame) -> Markup | None:
    """Which measurement the cells show."""
    names, now = table.attrs["names"], table.attrs["name"]
    if len(names) < 2:
        return tag("b", look.label(now))
    options = [tag("option", look.label(n), value=n, selected=n == now or None) for n in names]
    return tag("select", options, data_param="cube", aria_label="Measurement in the cells")


def panel(table: pd.DataFrame, window: int) -> Markup:
    """The cells of one window length, as a table."""
    across, down = widths(table, "kv_bits"), widths(table, "bits")
    own = {(r["bits"], r["kv_bits"]): r for r in rows.records(table[table["window"] == window])}
    heads = [tag("th", f"KV{bits}", scope="col", class_="number") for bits in across]
    lines = [
        tag(
            "tr",
            tag("th", f"W{bits}", scope="row"),
            [cell(own.get((bits, kv)), table) for kv in across],
        )
        for bits in down
    ]
    caption = tag("caption", f"{look.whole(window)} tokens")
    grid = tag("table", caption, tag("thead", tag("tr", tag("td"), heads)), tag("tbody", lines))
    return tag("div", grid, class_="scroll")


def cell(record: Mapping[str, Any] | None, table: pd.DataFrame) -> Markup:
    """One number on its tint; it opens the run."""
    if record is None:
        return tag("td", look.MISSING, class_="number muted", title="not measured")
    name, unit = table.attrs["name"], table.attrs["unit"]
    text = look.quantity(name, record["value"], unit)
    spread = look.interval(name, record["stderr"], unit)
    others = f", the best of {record['tried']} runs" if record["tried"] > 1 else ""
    link = tag(
        "a",
        text,
        href=f"/run?id={record['run_id']}",
        data_carry=True,
        title=f"{record['name']}: {text} {spread}".rstrip() + others,
    )
    tint = round(TINT * loss(record["value"], table))
    style = f"background:color-mix(in srgb, {look.ORANGE} {tint}%, transparent)"
    return tag("td", link, class_="number", style=style)


def loss(value: float, table: pd.DataFrame) -> float:
    """0 for the best cell of all panels, 1 for the worst; by ratio where all are above 0."""
    known = table["value"][table["value"].map(math.isfinite)]
    if not math.isfinite(value):
        return 1.0
    scale = math.log if (known > 0).all() else float
    low, high = scale(known.min()), scale(known.max())
    if high == low:
        return 0.0
    share = (scale(value) - low) / (high - low)
    return share if table.attrs["better"] != "higher" else 1 - share
