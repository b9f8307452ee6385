"""Roofline: what each product achieves against what bandwidth and arithmetic allow."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from app import kernel_rows, look, rows
from app.charts import Chart
from app.charts.kernel_speed import ordered, style_of
from app.context import Picks
from results_db.store import Store

LEGEND = "Colours are those beside; the star is bf16."
COLUMNS = ("format", "kernel", "m", "intensity", "tflops", "gbps", "ratio_to_bf16")
READ, PRODUCT = "read", "bf16 product"
SYMBOLS = {"solid": "circle", "dash": "square", "dot": "diamond", "dashdot": "cross"}  # per dash


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per timed product of one shape, with intensity (FLOP/byte) and TFLOP/s."""
    table = kernel_rows.of_job(store, picks)
    shape = kernel_rows.shape_of(table, picks)
    own = table[(table["shape"] == shape) & table["steady"].fillna(False).astype(bool)]
    own = own[
        ["format", "kernel", "m", "intensity", "tflops", "gbps", "ratio_to_bf16"]
    ].reset_index(drop=True)
    own.attrs = {**table.attrs, "shape": shape}
    return own


def ceiling(table: pd.DataFrame, name: str) -> float:
    """A measured ceiling, 0 where there is none."""
    return float(table.attrs.get("ceilings", {}).get(name, 0.0))


def draw(table: pd.DataFrame) -> go.Figure:
    """Intensity across, TFLOP/s up, the two measured roofs above; a mark per product and m.

    Colours are those of the chart of speeds; the star is bf16.
    """
    if not len(table):
        return look.empty_figure("No product of this shape has a steady time.")
    fig = look.figure()
    read, product = ceiling(table, READ) * 1e-3, ceiling(table, PRODUCT)  # TB/s, TFLOP/s
    low, high = table["intensity"].min() / 2, table["intensity"].max() * 2
    if read and product:
        x = np.geomspace(low, high, 60)
        fig.add_scatter(
            x=x.tolist(),
            y=np.minimum(read * x, product).tolist(),
            name="measured ceilings",
            mode="lines",
            line={"color": look.INK, "width": 2},
            hovertemplate="%{x:.3g} FLOP/byte: at most <b>%{y:.3g}</b> TFLOP/s<extra></extra>",
        )
    rivals = ordered(table[table["kernel"] != kernel_rows.DENSE])  # as the chart of speeds has them
    looks = {name: style_of(number) for number, name in enumerate(rivals)}
    for name, own in table.groupby("format", sort=False):
        colour, dash = looks.get(str(name), (look.INK, ""))
        symbol = SYMBOLS.get(dash, "star")
        fig.add_scatter(
            x=own["intensity"].tolist(),
            y=own["tflops"].tolist(),
            name=html.escape(str(name)),
            mode="markers",
            marker={"color": colour, "size": 9, "symbol": symbol},
            customdata=list(zip(own["m"].tolist(), own["gbps"].tolist(), strict=True)),
            hovertemplate=f"{html.escape(str(name))}, m = %{{customdata[0]}}<br>"
            "%{y:.3g} TFLOP/s, %{customdata[1]:.3g} GB/s<extra></extra>",
        )
    fig.update_xaxes(title={"text": "FLOP per byte that must move"}, type="log", dtick="D2")
    fig.update_yaxes(title={"text": "TFLOP/s (higher is better)"}, type="log", dtick="D2")
    fig.update_layout(height=400)
    return fig


def say(table: pd.DataFrame) -> str:
    """How near the product that reads fastest comes to the measured bandwidth."""
    rivals = table[table["kernel"] != kernel_rows.DENSE] if len(table) else table
    if not len(rivals):
        return "No product of this shape has a steady time."
    best = rows.records(rivals.sort_values("gbps"))[-1]
    said = f"{best['format']} at m = {best['m']} moves {best['gbps']:.3g} GB/s"
    read = ceiling(table, READ)
    if not read:
        return f"{said}. {LEGEND}"
    share = look.percent(best["gbps"] / read)
    return f"{said}, {share} of the {read:.3g} GB/s that reading memory reaches here. {LEGEND}"


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    return {
        "format": "Product",
        "m": "m",
        "intensity": "FLOP per byte",
        "tflops": "TFLOP/s",
        "gbps": "GB/s",
    }


CHART = Chart("Roofline", "kernels", chart_rows, draw, say, columns)
