"""Distillation of one run (LKD): held-out loss of each block over the training steps."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from app import look
from app.charts import Chart
from app.context import Picks
from results_db import queries
from results_db.store import Store

NAME = "lkd_loss"  # its module is "step 0005"
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
    """One row per (block, step) of the run `picks.id`: loss as a share of the output's variance."""
    found = queries.layers(store, picks.id)
    found = found[found["name"] == NAME].drop_duplicates(["block", "module"], keep="last")
    step = found["module"].str.removeprefix("step ").astype(int)
    return found.assign(step=step)[["block", "step", "value"]].sort_values(
        ["block", "step"], ignore_index=True
    )


def draw(table: pd.DataFrame) -> go.Figure:
    """Steps across, loss up on a log axis, a line per block; the step that was kept is ringed."""
    if not len(table):
        return look.empty_figure("No block of this run was distilled.")
    fig = look.figure()
    for number, (block, own) in enumerate(table.groupby("block")):
        colour = COLOURS[number % len(COLOURS)]
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        values = [float(v) if v > 0 else None for v in own["value"]]
        best = int(own["value"].to_numpy().argmin())
        sizes = [11 if at == best else 4 for at in range(len(own))]
        symbols = ["circle-open" if at == best else "circle" for at in range(len(own))]
        fig.add_scatter(
            x=own["step"].tolist(),
            y=values,
            name=f"block {block}",
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            marker={"color": colour, "size": sizes, "symbol": symbols},
            hovertemplate=f"block {block}, step %{{x}}<br><b>%{{y:.4g}}</b><extra></extra>",
        )
    fig.update_xaxes(title={"text": "training step"}, rangemode="tozero")
    title = "held-out loss (lower is better)"
    fig.update_yaxes(title={"text": title}, type="log", tickformat="~g", dtick="D2")
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    fig.update_layout(height=320, showlegend=True, legend=legend, margin={"t": 40})
    return fig


def say(table: pd.DataFrame) -> str:
    """What training gained, and where it gained least."""
    blocks = [own for _, own in table.groupby("block") if own["value"].iloc[0] > 0]
    if not blocks:
        return "No block of this run was distilled."
    gains = {int(own["block"].iloc[0]): gain(own) for own in blocks}
    least = max(gains, key=gains.__getitem__)
    first = f"Distillation left {look.percent(sum(gains.values()) / len(gains))} of the held-out "
    if len(gains) == 1:
        return first + f"loss of block {least}."
    return (
        f"{first}loss, the mean over {len(gains)} blocks; it gained least in block {least}, where "
        f"{look.percent(gains[least])} is left."
    )


def gain(own: pd.DataFrame) -> float:
    """Least loss of one block over its loss before training."""
    return float(own["value"].min() / own["value"].iloc[0])


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """The losses as a table: a row per step, a column per block."""
    return table.pivot(index="step", columns="block", values="value")


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    return {"block": "Block", "step": "Step", "value": "Held-out loss / output variance"}


CHART = Chart("Distillation by block", "run", chart_rows, draw, say, columns)
