"""How votes were cast: won, tied, both bad, lost; per side as shown, then per variant."""

from __future__ import annotations

import html
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from app import leaderboard_rows, look
from app.charts import Chart
from app.context import Picks
from results_db.store import Store

OUTCOMES = {  # of the bar's own side: heading, colour
    "won": ("Better", look.BLUE),
    "tie": ("Tie", "#9aa5b1"),
    "bad": ("Both bad", "#5f6872"),
    "lost": ("Worse", look.ORANGE),
}
ROW = 26  # pixels per bar
MOST = 60  # bars drawn; the table has all
SURE = 0.05  # p below which a side counts as preferred


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per bar: the left answer first, then every variant, best rating first."""
    return leaderboard_rows.vote_mix(store, picks)


def draw(table: pd.DataFrame) -> go.Figure:
    """Stacked bars of shares."""
    if not len(table):
        return look.empty_figure("No votes yet.")
    shown = table.head(MOST)
    total = shown[list(OUTCOMES)].sum(axis=1)
    names = [html.escape(n if len(n) <= 34 else n[:32] + "…") for n in shown["name"]]
    at = list(range(len(shown)))
    fig = look.figure(
        go.Bar(
            x=shown[name] / total,
            y=at,
            name=words,
            orientation="h",
            marker={"color": colour, "line": {"width": 0}},
            text=[
                f"<b>{label}</b><br>{words}: {count:.0f} of {whole:.0f} ({count / whole:.0%})"
                for label, count, whole in zip(names, shown[name], total, strict=True)
            ],
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
        )
        for name, (words, colour) in OUTCOMES.items()
    )
    fig.update_yaxes(
        tickvals=at, ticktext=names, range=[len(shown) - 0.4, -0.6], showgrid=False, ticks="",
        automargin=True,
    )  # fmt: skip
    fig.update_xaxes(tickformat=".0%", range=[0, 1], title_text="Share of votes")
    fig.update_layout(
        barmode="stack",
        dragmode=False,
        bargap=0.3,
        showlegend=True,
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        height=max(200, 110 + ROW * len(shown)),
        margin={"l": 16, "t": 40},
    )
    return fig


def say(table: pd.DataFrame) -> str:
    """How many ties there are, and whether a side is preferred."""
    if not len(table):
        return "No votes yet."
    left = table.iloc[0]
    total = sum(left[name] for name in OUTCOMES)
    tied = (left["tie"] + left["bad"]) / total
    decided = left["won"] + left["lost"]
    start = f"{look.whole(total)} votes, {look.percent(tied)} of them ties or both bad; "
    if not decided:
        return f"{start}no vote preferred a side."
    p = left["p"]
    verdict = (
        "more than chance explains, so sides are not judged alike"
        if p < SURE
        else "what chance explains"
    )
    return (
        f"{start}the left answer won {look.percent(left['won'] / decided)} of decided battles, "
        f"{verdict} ({p_text(p)})."
    )


def p_text(p: float) -> str:
    """`p = 0.42` of a test."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    return {"name": "Side or variant"} | {name: words for name, (words, _) in OUTCOMES.items()}


CHART = Chart("Votes", "leaderboard", chart_rows, draw, say, columns)
