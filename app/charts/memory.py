"""Memory against context: weights and cache of each KV recipe, and what fits in a budget.

Of measured runs only: `weight_bytes`, and what `size` keeps beside `kv_bytes_per_token` of the
parts of a cache, from which backend/cache/growth.py says what any context takes.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from app import look, rows
from app.charts import Chart
from app.context import Picks
from backend.cache.growth import MOST_TOKENS, Part, longest, most_bytes
from results_db import queries
from results_db.store import Store

WEIGHTS, TOKEN = "weight_bytes", "kv_bytes_per_token"
UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
SIZE = re.compile(r"\s*(\d+(?:[.,]\d+)?)\s*([kmgt]i?b?)?\s*", re.IGNORECASE)
MOST_LINES = 12  # more cannot be told apart
POINTS = 120  # of a line
WIDEST = 16  # the axis ends at so many times what the 16-bit model can hold
DASHES = {  # Plotly's name -> the same in SVG
    "solid": "",
    "dash": "7 4",
    "dot": "2 3",
    "dashdot": "7 3 2 3",
    "longdash": "12 5",
    "longdashdot": "12 3 2 3",
}
COLUMNS = ("run_id", "name", "family", "is_baseline", "weights", "per_token", "parts", "longest")


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per KV recipe, the 16-bit run and what is selected, the longest context first.

    `attrs`: budget in bytes and whether it was asked for, context of the model, and how many runs
    were measured before caches were described.
    """
    return lines(rows.wide(store, picks.model), details(store, picks.model), picks)


def details(store: Store, model: str) -> Mapping[str, Mapping[str, Any]]:
    """{run id: what `size` says of its cache}."""
    return _details(store, store.version, model)


@lru_cache(maxsize=8)
def _details(store: Store, version: int, model: str) -> Mapping[str, Mapping[str, Any]]:
    found = queries.measurements(store, model or None)
    found = found[found["name"] == TOKEN]
    return {r: json.loads(d) for r, d in zip(found["run_id"], found["detail"], strict=True)}


def lines(
    wide: pd.DataFrame, described: Mapping[str, Mapping[str, Any]], picks: Picks
) -> pd.DataFrame:
    """Wide rows and what is known of their caches -> the rows of the chart."""
    shown = of_caches(wide, picks)
    parts = {r: parts_of(described.get(r, {})) for r in shown["run_id"]}
    known = shown[shown["run_id"].map(lambda r: bool(parts[r])).astype(bool)]
    contexts = [int(d["context"]) for d in described.values() if d.get("context")]
    table = known[["run_id", "name", "family"]].copy()
    table["is_baseline"] = known["is_baseline"].astype(bool)
    for column, name in (("weights", WEIGHTS), ("per_token", TOKEN)):
        table[column] = known[name].astype(float) if name in known else 0.0
    table["parts"] = known["run_id"].map(parts)
    context = max(contexts, default=0)
    asked = in_bytes(picks.budget)
    budget = asked or usual_budget(rows.records(table), context)
    table["longest"] = [
        longest(record["parts"], budget - record["weights"]) for record in rows.records(table)
    ]
    table = table.sort_values("longest", ascending=False, kind="stable")
    table = table[list(COLUMNS)].reset_index(drop=True)
    unreadable = bool(picks.budget) and asked is None
    table.attrs = {"budget": budget, "asked": asked is not None, "unreadable": unreadable}
    table.attrs |= {"context": context, "old": len(shown) - len(known)}
    return table


def of_caches(wide: pd.DataFrame, picks: Picks) -> pd.DataFrame:
    """Rows with both sizes, one per recipe: KV recipes, the 16-bit run, what is selected."""
    if not {WEIGHTS, TOKEN} <= set(wide.columns):
        return wide.iloc[:0]
    measured = wide.dropna(subset=[WEIGHTS, TOKEN])
    rounds = measured["target"].str.contains("kv_cache")
    chosen = measured["run_id"].isin(picks.runs)
    measured = measured[rounds | chosen | measured["is_baseline"].astype(bool)]
    measured = rows.kept(measured, picks).sort_values("packed", kind="stable")  # those held last
    return measured.drop_duplicates("text", keep="last")


def parts_of(detail: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts of a cache as they were stored; () where a run was measured without."""
    try:
        return tuple(Part(**part) for part in detail.get("cache_parts") or ())
    except TypeError:  # written by another version
        return ()


# ---- the budget ----------------------------------------------------------------------------


def in_bytes(text: str) -> float | None:
    """`4 GiB`, `500MB` or `24` (GiB) -> bytes; None for anything else and for nothing."""
    found = SIZE.fullmatch(text)
    if not found:
        return None
    unit = (found[2] or "gib").lower()
    unit = unit if unit.endswith("b") else f"{unit[0]}ib"
    return float(found[1].replace(",", ".")) * UNITS[unit] or None


def usual_budget(records: Sequence[rows.Record], context: int) -> float:
    """What the 16-bit model takes at its own context; without it, what the largest here takes."""
    takes = {
        bool(record["is_baseline"]): total(record, max(context, 1))
        for record in sorted(records, key=lambda r: total(r, max(context, 1)))
    }
    return takes.get(True, takes.get(False, 0.0))


def total(record: rows.Record, tokens: int) -> float:
    """Weights and the most that the cache takes on its way to so many tokens."""
    return float(record["weights"]) + most_bytes(record["parts"], tokens)


# ---- drawing -------------------------------------------------------------------------------


def draw(table: pd.DataFrame) -> go.Figure:
    """Context across, bytes up, a line per recipe; a ring where it meets the budget."""
    if not len(table):
        return look.empty_figure("No run with a rounded cache has its sizes measured yet.")
    budget, own = table.attrs["budget"], table.attrs["context"]
    at, log = contexts(table)
    fig = look.figure()
    top = 0.0
    for record, (colour, dash) in drawn(table):
        caches = [most_bytes(record["parts"], tokens) for tokens in at]
        y = [record["weights"] + cache for cache in caches]
        top = max(top, *y)
        fig.add_scatter(x=at, y=y, **line_style(record, colour, dash, y, caches))
        if at[0] <= record["longest"] <= at[-1]:
            ring = {"color": colour, "size": 9, "symbol": "circle-open", "line": {"width": 2}}
            fig.add_scatter(
                x=[record["longest"]],
                y=[budget],
                mode="markers",
                marker=ring,
                hovertemplate=f"{html.escape(record['name'])}<br>fits <b>"
                f"{look.whole(record['longest'])}</b> tokens<extra></extra>",
            )
    high = min(top, 3 * budget)
    fig.add_hline(y=budget, line={"color": look.VERMILION, "width": 1.5, "dash": "dash"})
    told = {"text": f"budget {look.in_bytes(budget)}", "showarrow": False, "x": 0.01, "y": budget}
    place = {"xref": "paper", "xanchor": "left", "yanchor": "bottom"}
    fig.add_annotation(font={"color": look.VERMILION, "size": 12}, **told, **place)
    if own and at[0] < own < at[-1]:
        fig.add_vline(x=own, line={"color": look.MUTED, "width": 1, "dash": "dot"}, layer="below")
    style = {"type": "log", "dtick": "D2", "tickformat": "~s"} if log else {"tickformat": "~s"}
    fig.update_xaxes(title_text="context, tokens", **style)
    steps = byte_steps(high)
    fig.update_yaxes(
        title_text="weights and cache",
        range=[0, 1.05 * high],
        tickvals=steps,
        ticktext=[look.in_bytes(step) for step in steps],
    )
    fig.update_layout(height=380)
    return fig


def drawn(table: pd.DataFrame) -> list[tuple[rows.Record, tuple[str, str]]]:
    """The recipes that get a line, each with its colour and dash: one dash per line of a colour."""
    counts: Counter[str] = Counter()
    found = []
    for record in rows.records(table.head(MOST_LINES)):
        colour = look.INK if record["is_baseline"] else look.family_colour(record["family"])
        found.append((record, (colour, list(DASHES)[counts[colour] % len(DASHES)])))
        counts[colour] += 1
    return found


def line_style(
    record: rows.Record, colour: str, dash: str, sums: Sequence[float], caches: Sequence[float]
) -> dict[str, Any]:
    """How one recipe's line looks, and what it says under the pointer."""
    name = html.escape(record["name"])
    texts = [map(look.in_bytes, values) for values in (sums, caches)]
    return {
        "name": name,
        "mode": "lines",
        "line": {"color": colour, "dash": dash, "width": 2},
        "text": [f"<b>{s}</b>, of it cache {c}" for s, c in zip(*texts, strict=True)],
        "hovertemplate": f"{name}<br>%{{x:,}} tokens: %{{text}}<extra></extra>",
    }


def contexts(table: pd.DataFrame) -> tuple[list[int], bool]:
    """Lengths at which the lines are drawn; logarithmic where what fits spans over a decade."""
    base = table[table["is_baseline"]]["longest"]
    own = max(table.attrs["context"], 1)
    unit = max([own, *base.tolist()])
    fits = [n for n in table["longest"].tolist() if n > 0]
    end = int(1.1 * max(min(max(fits, default=own), WIDEST * unit), own))
    log = bool(fits) and max(fits) > 10 * min(fits)
    start = max(1, min([own, *fits]) // 4) if log else 1
    made = np.geomspace(start, end, POINTS) if log else np.linspace(start, end, POINTS)
    return sorted({round(x) for x in made.tolist()}), log


def byte_steps(high: float) -> list[float]:
    """Round numbers of one unit from 0 to `high`, at most seven of them."""
    unit = max([u for u in (1, 2**10, 2**20, 2**30) if u <= high] or [1])
    size = 10.0 ** math.floor(math.log10(max(high / unit, 1e-9)))
    step = next(size * m / 10 for m in (1, 2, 5, 10, 20) if high / unit <= 7 * size * m / 10)
    return [unit * step * k for k in range(math.floor(1.05 * high / unit / step) + 1)]


# ---- in words ------------------------------------------------------------------------------


def say(table: pd.DataFrame) -> str:
    """Which recipe has room for the longest context, and how it compares with 16 bits."""
    rivals = rows.records(table[~table["is_baseline"]]) if len(table) else []
    if not rivals:
        return "No recipe that rounds the cache is measured here yet."
    budget, best = look.in_bytes(table.attrs["budget"]), rivals[0]
    if not best["longest"]:
        return f"No recipe here fits into {budget}: the weights alone take more."
    said = f"In {budget}, {best['name']} has room for {tokens(best['longest'])}"
    base = rows.records(table[table["is_baseline"]])
    if not base:
        return f"{said}."
    if not base[0]["longest"]:
        return f"{said}; the 16-bit model does not fit at all."
    times = look.significant(best["longest"] / base[0]["longest"], 2)
    return f"{said}, {times} times as much as the 16-bit model ({whole(base[0]['longest'])})."


def tokens(count: int) -> str:
    return f"{whole(count)} token{'s' * (count != 1)}"


def whole(count: int) -> str:
    """A number of tokens; beyond a billion nothing is told apart."""
    return f"over {look.whole(10**9)}" if count >= MOST_TOKENS else look.whole(count)


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    return {
        "name": "Recipe",
        "longest": "Longest context that fits",
        "weights": "Weights",
        "per_token": "Cache per token, measured",
    }


CHART = Chart("Memory against context", "compare", chart_rows, draw, say, columns)
