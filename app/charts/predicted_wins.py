"""What the ratings predict for every pair, whether or not it ever met."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from app import leaderboard_rows, look, pair_matrix, rows
from app.charts import Chart
from app.context import Picks
from results_db.store import Store


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per ordered pair of variants; blank where two were never linked by battles."""
    table = leaderboard_rows.pairs(store, picks)
    table["value"] = table["predicted"]
    table["hover"] = [_hover(record) for record in rows.records(table)]
    return table


def _hover(record: rows.Record) -> str:
    met = f"they met {record['battles']:.0f} times" if record["battles"] else "they never met"
    share = look.percent(record["predicted"]) if record["predicted"] >= 0 else look.MISSING
    return pair_matrix.pair(record, f"predicted to win {share}; {met}")


def draw(table: pd.DataFrame) -> go.Figure:
    """Blue where the row is predicted to win, orange where to lose; even on the diagonal."""
    if not len(table):
        return look.empty_figure("No votes yet.")
    return pair_matrix.figure(
        table,
        lambda share: f"{100 * share:.0f}",
        scale=pair_matrix.EVEN,
        span=(0.0, 1.0),
        title="Row wins",
    )


def say(table: pd.DataFrame) -> str:
    """The widest predicted gap, in a sentence."""
    known = table[table["value"].notna() & (table["row"] != table["column"])]
    if not len(known):
        return "No two variants are linked by votes yet."
    best = known.sort_values("value", kind="stable").iloc[-1]
    return (
        f"Wins predicted by the ratings, ties as half; the widest gap is {best['row_name']} "
        f"over {best['column_name']} at {look.percent(best['value'])}."
    )


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    return {
        "row_name": "Variant",
        "column_name": "Against",
        "value": "Predicted share of wins",
        "battles": "Battles",
    }


CHART = Chart("Predicted wins", "leaderboard", chart_rows, draw, say, columns)
