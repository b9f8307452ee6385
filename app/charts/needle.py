"""Needle in a haystack of one run, length by depth; beside another run, the difference."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from app import look, pair_matrix, rows
from app.charts import Chart, layers
from app.context import Picks
from app.recipe_words import recipe_of
from results_db import queries
from results_db.store import Store

NAME = "needle"
MEAN = "mean"
SOUND = 0.9  # share of keys from which a length counts as held
SHOWN_WRONG = 3  # wrong answers that a cell tells
COLUMNS = ("length", "depth", "value", "n", "rounded", "needle_rounded", "wrong")
MEASURED = """
    SELECT run_id, metric_id, device, dtype, detail, value, n
    FROM measurements WHERE run_id = $run_id AND name = $name AND value IS NOT NULL
    ORDER BY measured_at
"""


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per (length, depth) of the run `picks.id`; blank where the length was left out.

    `value`: share of keys found. With `picks.against`, where that run answered the same prompts,
    `other` is its share and `difference` is value - other.
    """
    own = grid_of(store, picks.id)
    table = cells(own)
    table.attrs = {"name": name_of(store, picks.id), "other": "", "left_out": left_out(own)}
    if own is None or not picks.against:
        return table
    other = grid_of(store, picks.against, str(own["metric_id"]))
    table.attrs["other"] = name_of(store, picks.against)
    table.attrs["alike"] = other is not None
    if other is None:
        return table
    theirs = cells(other)[["length", "depth", "value"]].rename(columns={"value": "other"})
    both = table.merge(theirs, on=["length", "depth"], how="left")
    both = both.assign(difference=both["value"] - both["other"])
    both.attrs = table.attrs
    return both


def grid_of(store: Store, run_id: str, metric_id: str = "") -> Mapping[str, Any] | None:
    """The largest grid that a run was measured on, the last of equal ones, its detail read.

    `metric_id`: of the same prompts, under the same settings.
    """
    found = store.frame(MEASURED, run_id=run_id, name=NAME)
    if metric_id:
        found = found[found["metric_id"] == metric_id]
    grids = [{**row, "detail": json.loads(row["detail"])} for row in rows.records(found)]
    grids = [grid for grid in grids if grid["detail"].get("cells")]
    return max(
        reversed(grids), key=lambda grid: sum(map(len, grid["detail"]["cells"])), default=None
    )


def runs_alike(store: Store, run_id: str) -> list[str]:
    """Other runs that answered the same prompts, the newest first."""
    own = grid_of(store, run_id)
    if own is None:
        return []
    sql = """
        SELECT run_id FROM measurements JOIN runs USING (run_id)
        WHERE name = $name AND metric_id = $metric_id AND run_id <> $run_id
        GROUP BY run_id, submitted ORDER BY submitted DESC NULLS LAST, run_id
    """
    found = store.frame(sql, name=NAME, metric_id=str(own["metric_id"]), run_id=run_id)
    return [str(found_id) for found_id in found["run_id"]]


def name_of(store: Store, run_id: str) -> str:
    """The recipe of a run in words."""
    found = queries.run(store, run_id)
    return recipe_of(str(found["spec"].iloc[0])).name if len(found) else ""


def left_out(grid: Mapping[str, Any] | None) -> dict[int, str]:
    """Lengths that were not asked, and why."""
    told = grid["detail"].get("left_out", {}) if grid else {}
    return {int(length): str(why) for length, why in told.items()}


def cells(grid: Mapping[str, Any] | None) -> pd.DataFrame:
    """A row per cell, lengths that were left out blank."""
    if grid is None:
        return pd.DataFrame(columns=list(COLUMNS))
    detail = grid["detail"]
    depths, lengths = detail["depths"], detail["lengths"]
    per_cell = int(detail["repeats"]) * int(detail["needles"])
    found = []
    for at, length in enumerate(lengths):
        for depth_at, depth in enumerate(depths):
            first = (at * len(depths) + depth_at) * per_cell
            asked = slice(first, first + per_cell)
            shares = [mean(detail.get(f"rounded_{side}", ())[asked]) for side in ("keys", "values")]
            found.append(
                {
                    "length": length,
                    "depth": depth,
                    "value": detail["cells"][at][depth_at],
                    "n": per_cell,
                    "rounded": sum(shares) / 2,
                    "needle_rounded": mean(detail.get("needle_rounded", ())[asked]),
                    "wrong": wrong(detail, asked),
                }
            )
    blank = {"value": math.nan, "n": 0, "rounded": math.nan, "needle_rounded": math.nan}
    found += [
        {"length": length, "depth": depth, "wrong": "", **blank}
        for length in left_out(grid)
        for depth in depths
    ]
    return pd.DataFrame(found, columns=list(COLUMNS)).sort_values(
        ["length", "depth"], ignore_index=True
    )


def mean(values: Sequence[float]) -> float:
    """NaN of nothing: a 16-bit cache rounds no tokens, so that it has no share of them."""
    return sum(values) / len(values) if values else math.nan


def wrong(detail: Mapping[str, Any], asked: slice) -> str:
    """Answers of a cell without their keys: `4188 → 4108`."""
    pairs = zip(detail.get("keys", ())[asked], detail.get("answers", ())[asked], strict=True)
    missed = [f"{key} → {said.strip()}" for key, said in pairs if key not in said]
    return "; ".join(missed[:SHOWN_WRONG]) + ("; …" if missed[SHOWN_WRONG:] else "")


# ---- the picture ---------------------------------------------------------------------------


def shown(table: pd.DataFrame) -> str:
    """The column that is drawn."""
    return "difference" if "difference" in table else "value"


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """Depths down, lengths across, each with its mean at the end."""
    grid = table.pivot(index="depth", columns="length", values=shown(table)).astype(float)
    grid.columns = pd.Index([look.whole(float(length)) for length in grid.columns.tolist()])
    grid.index = pd.Index([f"{depth:g} %" for depth in grid.index])
    grid[MEAN] = grid.mean(axis=1)
    grid.loc[MEAN] = grid.mean(axis=0)
    return grid


def draw(table: pd.DataFrame) -> go.Figure:
    """Lengths across, depths down from the beginning of the text, the share in each cell."""
    if not len(table):
        return look.empty_figure("This run was not asked for needles.")
    grid, apart = wide(table), shown(table) == "difference"
    words = {(r["length"], r["depth"]): hover(r, apart) for r in rows.records(table)}
    kept = set(marked(table))
    lengths, depths = sorted(table["length"].unique()), sorted(table["depth"].unique())
    texts = [[text(v, apart) for v in line] for line in grid.to_numpy().tolist()]
    told = [[text(v, apart) for v in line] for line in grid.to_numpy().tolist()]
    for y, depth in enumerate(depths):
        for x, length in enumerate(lengths):
            texts[y][x] += "*" if (length, depth) in kept else ""
            told[y][x] = words[(length, depth)]
    style = (
        {"colorscale": pair_matrix.EVEN, "zmin": -1, "zmax": 1}
        if apart
        else {"colorscale": layers.SCALE, "zmin": 0, "zmax": 1}
    )
    heat = go.Heatmap(
        z=[[None if math.isnan(v) else v for v in line] for line in grid.to_numpy().tolist()],
        x=list(grid.columns),
        y=list(grid.index),
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 11, **({"color": pair_matrix.DARK} if apart else {})},
        customdata=told,
        hovertemplate="%{x} tokens, depth %{y}<br>%{customdata}<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        showscale=False,
        **style,
    )
    fig = look.figure([heat])
    bare = {"ticks": "", "showgrid": False, "zeroline": False, "linecolor": "rgba(0,0,0,0)"}
    x_title = {"text": "length, tokens"}
    fig.update_xaxes(type="category", side="top", title=x_title, **bare)
    fig.update_yaxes(type="category", autorange="reversed", title={"text": "depth of the key"})
    fig.update_yaxes(**bare)
    height = max(260, 100 + 24 * len(grid))
    fig.update_layout(height=height, margin={"t": 60, "b": 12, "r": 8}, dragmode=False)
    return fig


def text(value: float, apart: bool = False) -> str:
    """Per cent without the sign; differences in points with theirs; blank where not asked."""
    if math.isnan(value):
        return ""
    points = round(100 * value)
    return (f"{points:+d}" if apart and points else f"{points}").replace("-", "−")


def hover(record: Mapping[str, Any], apart: bool) -> str:
    """What a cell says."""
    if math.isnan(record["value"]):
        return "not asked"
    lines = [f"<b>{look.percent(record['value'])}</b> of {record['n']} keys found"]
    if apart and not math.isnan(record["other"]):
        lines.append(f"{look.percent(record['other'])} in the other run")
    if not math.isnan(record["rounded"]):
        lines.append(f"{look.percent(record['rounded'])} of the cache was rounded")
        lines.append(f"{look.percent(record['needle_rounded'])} of the needle itself")
    if record["wrong"]:
        lines.append(f"wrong: {html.escape(record['wrong'])}")
    return "<br>".join(lines)


def marked(table: pd.DataFrame) -> list[tuple[int, float]]:
    """Cells whose needle was still in 16 bits, though other tokens were rounded."""
    kept = table[(table["needle_rounded"] == 0) & table["value"].notna()]
    return list(zip(kept["length"], kept["depth"], strict=True))


# ---- in words ------------------------------------------------------------------------------


def say(table: pd.DataFrame) -> str:
    """What is found, where it is lost, and against the other run."""
    asked = table[table["value"].notna()]
    if not len(asked):
        return "This run was not asked for needles."
    name = table.attrs.get("name") or "This run"
    parts = [found(asked, name)]
    other = table.attrs.get("other")
    if shown(table) == "difference":
        parts.append(against(asked, str(other)))
    elif other:
        parts.append(f"{other} did not answer the same prompts, so there is no difference to show.")
    if kept := len(marked(table)):
        cells_are = "cell" if kept == 1 else "cells"
        parts.append(f"In {kept} {cells_are}, marked *, the key was among the tokens in 16 bits.")
    for length, why in table.attrs.get("left_out", {}).items():
        parts.append(f"{look.whole(length)} tokens were not asked: {why}.")
    return " ".join(parts)


def unit(table: pd.DataFrame) -> str:
    """What the numbers in the cells are."""
    if shown(table) == "difference":
        return "Cells: difference in points, blue where this run finds more."
    return "Cells: keys found, %."


def found(asked: pd.DataFrame, name: str) -> str:
    """The share of all keys, and the lengths that hold."""
    by_length = asked.groupby("length")["value"].mean()
    overall = f"{name} finds {look.percent(asked['value'].mean())} of {asked['n'].sum()} keys"
    least = by_length.min()
    longest = look.whole(by_length.index.max())
    if least >= SOUND:
        each = (
            f", at least {look.percent(least)} at every length up to"
            if len(by_length) > 1
            else " at"
        )
        return f"{overall}{each} {longest} tokens."
    sound = by_length[(by_length >= SOUND).cummin()]
    least_at = by_length.index.tolist()[int(by_length.to_numpy().argmin())]
    worst = f"the least, {look.percent(least)}, at {look.whole(least_at)} tokens"
    if not len(sound):
        return f"{overall}; {worst}."
    return f"{overall}: at least 90 % up to {look.whole(sound.index.max())} tokens, and {worst}."


def against(asked: pd.DataFrame, other: str) -> str:
    """The difference to another run."""
    both = asked[asked["difference"].notna()]
    change = float(both["difference"].mean())
    lost, gained = int((both["difference"] < 0).sum()), int((both["difference"] > 0).sum())
    points = f"{abs(100 * change):.1f} points {'fewer' if change < 0 else 'more'} than"
    told = "as many as" if not round(1000 * change) else points
    return f"That is {told} {other}: {lost} of {len(both)} cells lose keys and {gained} gain some."


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    heads = {"length": "Length, tokens", "depth": "Depth, %", "value": "Keys found", "n": "Asked"}
    apart = {"other": "Keys found in the other run", "difference": "Difference"}
    return heads | (apart if shown(table) == "difference" else {})


CHART = Chart("Needle in a haystack", "run", chart_rows, draw, say, columns)
