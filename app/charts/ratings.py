"""Ratings with their intervals, best first; what was never compared stands apart."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping

import pandas as pd
import plotly.graph_objects as go

from app import leaderboard_rows, look, rows
from app.charts import Chart
from app.context import Picks
from results_db.store import Store

FEW = 0.4  # opacity of ratings that rest on few votes
ROW = 28  # pixels per variant
MOST = 60  # variants drawn; the table has all


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per variant with votes: its rating, interval, votes and what made it."""
    return leaderboard_rows.rated(store, picks)


def draw(table: pd.DataFrame) -> go.Figure:
    """A dot and an interval per variant on one scale, the 16-bit model as a dotted line."""
    if not len(table):
        return look.empty_figure("No votes yet.")
    shown = table.head(MOST)
    fig = look.figure(_intervals(shown))
    labels = [_label(record) for record in rows.records(shown)]
    fig.update_yaxes(
        tickvals=list(range(len(shown))),
        ticktext=labels,
        range=[len(shown) - 0.4, -0.6],
        showgrid=False,
        ticks="",
        zeroline=False,
        automargin=True,
    )
    fig.update_xaxes(title_text="Rating (higher is better)", zeroline=False)
    base = shown[shown["is_baseline"]]
    for rating in base["rating"].head(1):
        style = {"color": look.MUTED, "width": 1, "dash": "dot"}
        fig.add_vline(x=rating, line=style, layer="below")
    for at in _breaks(shown):
        style = {"color": look.LINE, "width": 1}
        fig.add_hline(y=at - 0.5, line=style, layer="below")
    fig.update_layout(height=max(180, 84 + ROW * len(shown)), margin={"l": 16}, dragmode=False)
    return fig


def _intervals(shown: pd.DataFrame) -> Iterator[go.Scatter]:
    for at, record in enumerate(rows.records(shown)):
        colour = look.INK if record["is_baseline"] else look.family_colour(record["family"])
        symbol = "star" if record["is_baseline"] else look.shape(record["target"], record["packed"])
        yield go.Scatter(
            x=[record["rating"]],
            y=[at],
            mode="markers",
            name=record["name"],
            text=[hover(record)],
            hovertemplate="%{text}<extra></extra>",
            opacity=FEW if record["few"] else 1.0,
            marker={
                "color": colour,
                "symbol": symbol,
                "size": 13 if record["is_baseline"] else 9,
                "line": {"width": 2, "color": colour},
            },
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [record["high"] - record["rating"]],
                "arrayminus": [record["rating"] - record["low"]],
                "color": colour,
                "thickness": 1.5,
                "width": 0,
            },
        )


def _label(record: rows.Record) -> str:
    name = html.escape(str(record["name"]))
    return name if len(name) <= 34 else name[:32] + "…"


def _breaks(shown: pd.DataFrame) -> list[int]:
    """Where a new group of variants begins that was never compared with those above."""
    groups = list(shown["group"])
    return [at for at in range(1, len(groups)) if groups[at] != groups[at - 1]]


def hover(record: rows.Record) -> str:
    """The box at a dot: recipe, rating with interval, votes."""
    few = " (few: the rating may move a lot)" if record["few"] else ""
    lines = [
        f"<b>{html.escape(str(record['text']))}</b>",
        f"rating  <b>{points(record['rating'])}</b>, "
        f"95 % interval {points(record['low'])} to {points(record['high'])}",
        f"{look.whole(record['votes'])} votes{few}",
    ]
    return "<br>".join(lines)


def points(rating: float) -> str:
    """A rating as people read it."""
    return f"{rating:.0f}".replace("-", "−")


def say(table: pd.DataFrame) -> str:
    """Who leads, and from whom it cannot be told apart."""
    if not len(table):
        return "No votes yet."
    main = table[table["group"] == table["group"].iloc[0]]
    best, others = main.iloc[0], main.iloc[1:]
    near = others[others["high"] >= best["low"]]
    told = (
        f"{best['name']} has the highest rating, {points(best['rating'])} "
        f"(95 % interval {points(best['low'])} to {points(best['high'])})"
    )
    if not len(others):
        return f"{told}."
    if not len(near):
        return f"{told}; its interval lies above those of all {len(others)} others."
    return f"{told}; the intervals of {len(near)} of {len(others)} others overlap with it."


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    return {
        "name": "Variant",
        "rating": "Rating",
        "low": "Low",
        "high": "High",
        "rank": "Rank",
        "votes": "Votes",
    }


CHART = Chart("Ratings", "leaderboard", chart_rows, draw, say, columns)
