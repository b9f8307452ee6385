"""Who beat whom how often: the share of decided battles that the row's variant won."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from app import leaderboard_rows, look, pair_matrix, rows
from app.charts import Chart
from app.context import Picks
from results_db.store import Store


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per ordered pair of variants, rows and columns by rating; blank without a win."""
    table = leaderboard_rows.pairs(store, picks)
    table["value"] = table["win_fraction"]
    table["hover"] = [_hover(record) for record in rows.records(table)]
    return table


def _hover(record: rows.Record) -> str:
    decided = f"won {record['wins']:.0f}, lost {record['losses']:.0f}, ties not counted"
    return pair_matrix.pair(record, decided)


def draw(table: pd.DataFrame) -> go.Figure:
    """Blue where the row wins, orange where it loses."""
    if not table["value"].notna().any():
        return look.empty_figure("No decided battle yet.")
    return pair_matrix.figure(
        table,
        lambda share: f"{100 * share:.0f}",
        scale=pair_matrix.EVEN,
        span=(0.0, 1.0),
        title="Row wins",
    )


def say(table: pd.DataFrame) -> str:
    """The most one-sided pair, in a sentence."""
    known = table[table["value"].notna()]
    if not len(known):
        return "No decided battle yet."
    best = known.sort_values(["value", "wins"], kind="stable").iloc[-1]
    decided = best["wins"] + best["losses"]
    return (
        f"Share of decided battles won, for {len(known) // 2} pairs; the most one-sided is "
        f"{best['row_name']} against {best['column_name']} with {best['wins']:.0f} of "
        f"{decided:.0f}."
    )


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    return {
        "row_name": "Variant",
        "column_name": "Against",
        "value": "Share of decided battles won",
        "wins": "Won",
        "losses": "Lost",
    }


CHART = Chart("Win fraction", "leaderboard", chart_rows, draw, say, columns)
