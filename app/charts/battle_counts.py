"""How often each pair met: where ratings rest on much, and where on little."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from app import leaderboard_rows, look, pair_matrix, rows
from app.charts import Chart
from app.context import Picks
from results_db.store import Store


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per ordered pair of variants; with `ties=without` only decided battles count."""
    table = leaderboard_rows.pairs(store, picks)
    decided = table["wins"] + table["losses"]
    counts = decided if picks.ties == "without" else table["battles"]
    table["value"] = counts.where((counts > 0) & (table["row"] != table["column"]))
    table["hover"] = [_hover(record) for record in rows.records(table)]
    table.attrs["decided"] = picks.ties == "without"
    return table


def _hover(record: rows.Record) -> str:
    return pair_matrix.pair(
        record, f"{record['battles']:.0f} battles, {record['ties']:.0f} of them ties"
    )


def draw(table: pd.DataFrame) -> go.Figure:
    """Darker where more battles were fought."""
    if not table["value"].notna().any():
        return look.empty_figure("No battle yet.")
    return pair_matrix.figure(
        table,
        look.whole,
        scale=pair_matrix.MANY,
        span=(0.0, float(table["value"].max())),
        title="Decided battles" if table.attrs.get("decided") else "Battles",
    )


def say(table: pd.DataFrame) -> str:
    """How many pairs met, and how unevenly."""
    known = table[table["value"].notna()]
    variants = table["row"].nunique()
    possible = variants * (variants - 1) // 2
    if not len(known):
        return "No battle yet."
    what = "decided battles" if table.attrs.get("decided") else "battles"
    low, high = (look.whole(v) for v in (known["value"].min(), known["value"].max()))
    return (
        f"{len(known) // 2} of {possible} pairs met, in {low} to {high} {what} each."
        if low != high
        else f"{len(known) // 2} of {possible} pairs met, {what} of each: {low}."
    )


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    return {
        "row_name": "Variant",
        "column_name": "Against",
        "battles": "Battles",
        "ties": "Ties",
    }


CHART = Chart("Battles", "leaderboard", chart_rows, draw, say, columns)
