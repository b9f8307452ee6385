"""Heat map of one run: error of every quantized matrix, block by module."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from app import look
from app.charts import Chart, lkd
from app.context import Picks
from results_db import queries
from results_db.store import Store

PREFERRED = ("output_sqnr", "weight_sqnr")
COLUMNS = ("block", "module", "value")
SCALE = [[0.0, "#7f2704"], [0.35, "#d94801"], [0.6, "#fdae6b"], [0.8, "#c6dbef"], [1.0, "#2171b5"]]


def rows(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per (block, module) of the picked per-layer value of the run `picks.id`."""
    found = queries.layers(store, picks.id)
    # Values of whole blocks and curves over steps: the charts `depth` and `lkd` have them.
    found = found[(found["module"] != "") & (found["name"] != lkd.NAME)]
    names = available(found)
    name = picks.layer if picks.layer in names else (names[0] if names else "")
    table = found[found["name"] == name].drop_duplicates(["block", "module"], keep="last")
    units = table["unit"].dropna()
    better = table["better"].dropna()
    table = table[list(COLUMNS)].reset_index(drop=True)
    table.attrs = {
        "name": name,
        "names": names,
        "unit": str(units.iloc[0]) if len(units) else "",
        "better": str(better.iloc[0]) if len(better) else "",
        "cell": (picks.block, picks.module),
    }
    return table


def available(layers: pd.DataFrame) -> list[str]:
    """Names of per-layer values, the error at the layer's output first."""
    names = sorted(layers["name"].unique())
    return sorted(names, key=lambda n: PREFERRED.index(n) if n in PREFERRED else len(PREFERRED))


def draw(table: pd.DataFrame) -> go.Figure:
    """Modules across, blocks down, the value written into each cell."""
    if not len(table):
        return look.empty_figure("This run has no per-layer values.")
    name, unit = table.attrs.get("name", ""), table.attrs.get("unit", "")
    modules = sorted(table["module"].unique(), key=model_order)
    grid = table.pivot(index="block", columns="module", values="value")[modules]
    texts = grid.map(lambda v: look.quantity(name, v, unit))
    high_is_good = table.attrs.get("better") != "lower"
    heat = go.Heatmap(
        z=grid.to_numpy(),
        x=[short(m) for m in modules],
        y=[f"block {b}" for b in grid.index],
        text=texts.to_numpy(),
        texttemplate="%{text}" if grid.size <= 400 else None,
        textfont={"size": 12},
        customdata=[[f"{b}~{m}" for m in modules] for b in grid.index],
        hovertext=[[f"block {b}, {m}" for m in modules] for b in grid.index],
        hovertemplate="%{hovertext}<br><b>%{text}</b> " + unit + "<extra></extra>",
        colorscale=SCALE,
        reversescale=not high_is_good,
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": unit}, "thickness": 10, "outlinewidth": 0, "ticklen": 3},
    )
    fig = look.figure([heat])
    fig.update_xaxes(side="top", ticks="", showgrid=False, linecolor="rgba(0,0,0,0)")
    fig.update_yaxes(autorange="reversed", ticks="", showgrid=False, linecolor="rgba(0,0,0,0)")
    fig.update_layout(height=max(220, 90 + 34 * len(grid)), margin={"t": 40, "b": 16})
    fig.update_layout(meta={"params": ["block", "module"]})  # what a click on a cell sets
    block, module = table.attrs.get("cell", ("", ""))
    blocks = [str(b) for b in grid.index]
    if block in blocks and module in modules:
        x, y = modules.index(module), blocks.index(block)
        box = {"x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5}
        fig.add_shape(type="rect", line={"color": look.INK, "width": 2.5}, **box)
    return fig


ORDER = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv",
    "o_proj",
    "out_proj",
    "dense",
    "gate",
    "up",
    "fc1",
    "h_to_4h",
    "down",
    "fc2",
    "4h_to_h",
)


def model_order(module: str) -> tuple[int, str]:
    """Attention before feed-forward, in the order data flows; unknown names last."""
    return next((at for at, name in enumerate(ORDER) if name in short(module)), len(ORDER)), module


def short(module: str) -> str:
    """`self_attn.q_proj` -> `q_proj`: the last part says enough."""
    return module.rsplit(".", 1)[-1]


def say(table: pd.DataFrame) -> str:
    """The worst matrix, in a sentence."""
    table = table[table["value"].notna()]
    values = table["value"]
    if not len(values):
        return "No per-layer values."
    low_is_good = table.attrs.get("better") == "lower"
    worst = table.iloc[
        int(values.to_numpy().argmax() if low_is_good else values.to_numpy().argmin())
    ]
    name, unit = table.attrs.get("name", ""), table.attrs.get("unit", "")
    number = look.quantity(name, worst["value"], unit)
    return (
        f"{look.label(name)} of {len(table)} matrices; the worst is {worst['module']} of block "
        f"{worst['block']} at {number} {unit}.".replace(" .", ".")
    )


def columns(table: pd.DataFrame) -> dict[str, str]:
    """Headings of the chart as a table."""
    name, unit = table.attrs.get("name", ""), table.attrs.get("unit", "")
    return {"block": "Block", "module": "Module", "value": f"{look.label(name)}, {unit}"}


CHART = Chart("Error by layer", "run", rows, draw, say, columns)
