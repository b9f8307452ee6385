"""Error along the depth of one run's model: of single matrices, of each block, of all so far."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from app import look
from app.charts import Chart
from app.context import Picks
from results_db import queries
from results_db.store import Store

# name of the values -> (what the line is, colour, dash); a block's matrices give their median
LINES: dict[str, tuple[str, str, str]] = {
    "output_sqnr": ("each matrix alone (median)", look.GREY, "dot"),
    "block_sqnr": ("each block alone", look.ORANGE, "dash"),
    "cumulative_sqnr": ("all blocks so far", look.BLUE, "solid"),
}


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per (line, block) of the run `picks.id`, in dB; infinite where nothing is lost."""
    found = queries.layers(store, picks.id)
    found = found[found["name"].isin(list(LINES))]
    table = found.groupby(["name", "block"], as_index=False)["value"].median()
    return table.assign(line=table["name"].map({name: line for name, (line, *_) in LINES.items()}))


def draw(table: pd.DataFrame) -> go.Figure:
    """Blocks across, dB up: the higher, the closer to the 16-bit model."""
    if not len(table):
        return look.empty_figure("This run has no errors by block.")
    fig = look.figure()
    for name, (line, colour, dash) in LINES.items():
        own = table[table["name"] == name]
        values = own["value"].where(own["value"].abs() != float("inf"))
        fig.add_scatter(
            x=own["block"].tolist(),
            y=[None if pd.isna(v) else v for v in values],
            name=line,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"color": colour, "size": 6},
            hovertemplate=f"block %{{x}}, {line}<br><b>%{{y:.1f}}</b> dB<extra></extra>",
        )
    fig.update_xaxes(title={"text": "block"}, dtick=max(1, int(table["block"].max()) // 12))
    fig.update_yaxes(title={"text": "SQNR, dB (higher is better)"})
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    fig.update_layout(height=280, showlegend=True, legend=legend, margin={"t": 40})
    return fig


def say(table: pd.DataFrame) -> str:
    """How much is left at the end, and which block costs most."""
    so_far, alone = (_finite(table, name) for name in ("cumulative_sqnr", "block_sqnr"))
    parts = []
    if len(so_far):
        last = so_far.iloc[-1]
        parts.append(
            f"After block {last['block']}, all errors together are {last['value']:.1f} dB below "
            "the 16-bit model's signal."
        )
    if len(alone):
        worst = alone.iloc[int(alone["value"].to_numpy().argmin())]
        parts.append(f"Block {worst['block']} alone loses most: {worst['value']:.1f} dB.")
    return " ".join(parts) or "No error by block is known, or there is none."


def _finite(table: pd.DataFrame, name: str) -> pd.DataFrame:
    own = table[(table["name"] == name) & table["value"].notna()]
    return own[own["value"].abs() != float("inf")].sort_values("block")


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    return {"block": "Block", "line": "Error of", "value": "SQNR, dB"}


CHART = Chart("Error along the depth", "run", chart_rows, draw, say, columns)
