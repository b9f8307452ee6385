"""Speed of packed products over bf16 against how many tokens are multiplied at once."""

from __future__ import annotations

import html
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from app import kernel_rows, look, rows
from app.charts import Chart
from app.context import Picks
from results_db.store import Store

COLOURS = (
    look.BLUE,
    look.ORANGE,
    look.GREEN,
    look.VERMILION,
    look.SKY,
    look.PURPLE,
    look.YELLOW,
    look.GREY,
)
DASHES = ("solid", "dash", "dot", "dashdot")


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per (product, m) of one shape that has a ratio."""
    table = kernel_rows.of_job(store, picks)
    shape = kernel_rows.shape_of(table, picks)
    own = table[(table["shape"] == shape) & (table["kernel"] != kernel_rows.DENSE)]
    own = own[own["ratio_to_bf16"].notna()]
    own = own[["format", "m", "ratio_to_bf16", "median_ms", "gbps"]].reset_index(drop=True)
    own.attrs = {**table.attrs, "shape": shape}
    return own


def draw(table: pd.DataFrame) -> go.Figure:
    """m across, times bf16 up, both logarithmic; a line per product, level 1 marked."""
    if not len(table):
        return look.empty_figure("No product of this shape has a steady time.")
    fig = look.figure()
    for number, (name, own) in enumerate(ordered(table).items()):
        colour, dash = style_of(number)
        fig.add_scatter(
            x=own["m"].tolist(),
            y=[round(v, 4) for v in own["ratio_to_bf16"].tolist()],
            name=html.escape(name),
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"size": 6},
            text=[
                f"{ms:.3g} ms, {gb:.3g} GB/s"
                for ms, gb in zip(own["median_ms"], own["gbps"], strict=True)
            ],
            hovertemplate=f"{html.escape(name)}<br>m = %{{x}}: <b>%{{y:.2f}}x</b> bf16<br>"
            "%{text}<extra></extra>",
        )
    fig.add_hline(y=1, line={"color": look.INK, "width": 1.5, "dash": "dash"})
    ticks = sorted(set(table["m"].tolist()))
    fig.update_xaxes(
        title={"text": "tokens at once, m"},
        type="log",
        tickvals=ticks,
        ticktext=list(map(str, ticks)),
    )
    fig.update_yaxes(title={"text": "times bf16 (higher is better)"}, type="log", dtick="D2")
    legend = {"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"}
    fig.update_layout(height=460, showlegend=True, legend=legend)
    return fig


def style_of(number: int) -> tuple[str, str]:
    """Colour and dash of the product at this place in the order."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def ordered(table: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """{product: its rows}, the quickest at the fewest tokens first."""
    first = table.sort_values(["m", "ratio_to_bf16"], ascending=[True, False])
    return {
        str(name): table[table["format"] == name].sort_values("m")
        for name in dict.fromkeys(first["format"])
    }


def say(table: pd.DataFrame) -> str:
    """The best product at the fewest tokens, and at the most."""
    if not len(table):
        return "No product of this shape has a steady time."
    told = []
    for m in sorted({table["m"].min(), table["m"].max()}):
        own = table[table["m"] == m]
        best = rows.records(own.sort_values("ratio_to_bf16"))[-1]
        told.append(f"at m = {m} {best['format']} with {best['ratio_to_bf16']:.2f} times bf16")
    where = f" on {table.attrs['device']}" if table.attrs.get("device") else ""
    shape = kernel_rows.spaced(table.attrs["shape"])
    return f"Quickest for weights of {shape}{where}: {' and '.join(told)}."


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    return {
        "format": "Product",
        "m": "m",
        "ratio_to_bf16": "Times bf16",
        "median_ms": "Median, ms",
        "gbps": "GB/s",
    }


CHART = Chart("Speed against tokens at once", "kernels", chart_rows, draw, say, columns)
