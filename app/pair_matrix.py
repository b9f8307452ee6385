"""A heat map of variants against variants, for every chart of pairs."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from app import look, rows

# Rows that win are blue, rows that lose are orange; the middle is even.
EVEN = [[0.0, "#e08a2e"], [0.25, "#f2bd80"], [0.5, "#f7f7f7"], [0.75, "#a3cdec"], [1.0, "#56a3dc"]]
MANY = [[0.0, "#f1f6fb"], [0.5, "#a3cdec"], [1.0, "#56a3dc"]]
DARK = "#1a1c1f"  # readable on every colour of both scales, in both themes
WRITTEN = 14  # variants up to which every cell has its number written in it
LABEL = 22  # characters of a name
SIDE, EDGE, LEAST = 30, 210, 340  # pixels: a cell, the labels, a whole picture
COLUMNS = ("row", "column", "row_name", "column_name", "value", "hover")


def figure(
    table: pd.DataFrame,
    text: Callable[[float], str],
    *,
    scale: Sequence[Sequence[Any]],
    span: tuple[float, float],
    title: str,
) -> go.Figure:
    """Long rows (row, column, value; NaN is blank) -> squares in the order in which they come."""
    names = dict(zip(table["row"], table["row_name"], strict=True))
    order = list(names)
    grid = table.pivot(index="row", columns="column", values="value").reindex(order, columns=order)
    hovers = table.pivot(index="row", columns="column", values="hover").reindex(
        order, columns=order
    )
    written = grid.map(lambda value: "" if pd.isna(value) else text(value))
    at = list(range(len(order)))
    heat = go.Heatmap(
        z=grid.to_numpy(),
        x=at,
        y=at,
        zmin=span[0],
        zmax=span[1],
        text=written.to_numpy(),
        texttemplate="%{text}" if len(order) <= WRITTEN else None,
        textfont={"size": 11, "color": DARK},
        customdata=hovers.fillna("").to_numpy(),
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale=[list(stop) for stop in scale],
        xgap=1,
        ygap=1,
        colorbar={
            "title": {"text": title, "side": "right"},
            "thickness": 10,
            "outlinewidth": 0,
            "ticklen": 3,
            **({"tickformat": ".0%"} if span == (0.0, 1.0) else {}),
        },
    )
    fig = look.figure([heat])
    labels = {"tickvals": at, "ticktext": [short(name) for name in names.values()]}
    bare = {"ticks": "", "showgrid": False, "zeroline": False, "linecolor": "rgba(0,0,0,0)"}
    fig.update_xaxes(side="top", tickangle=-45, **labels, **bare)
    fig.update_yaxes(autorange="reversed", **labels, **bare)
    height = max(LEAST, EDGE + SIDE * len(order))
    margin = {"l": 16, "r": 8, "t": 24, "b": 16}
    fig.update_layout(height=height, margin=margin, dragmode=False)  # a finger scrolls over it
    return fig


def short(name: str) -> str:
    """A name as a tick label: cut where it is long, never markup."""
    return html.escape(name if len(name) <= LABEL else name[: LABEL - 1] + "…")


def pair(record: rows.Record, words: str) -> str:
    """`GPTQ W4 against RTN W4` and what there is to say of it."""
    names = [html.escape(str(record[f"{side}_name"])) for side in ("row", "column")]
    return f"<b>{names[0]}</b> against <b>{names[1]}</b><br>{words}"
