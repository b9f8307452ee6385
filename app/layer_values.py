"""Inside one matrix of a run: its weights and inputs before and after, as pictures and numbers.

Read from the run's folder (backend/statistics.py) only when a block and a module are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup

from app import look
from app.charts.layers import model_order
from app.context import Picks
from app.markup import join, tag
from app.widgets import chart_value
from backend.statistics import (
    MOMENTS,
    WHATS,
    Linear,
    Moment,
    Summary,
    What,
    blocks_in,
    modules_in,
    read,
)

PLOTS = 6  # two histograms, two rows of channel peaks, two surfaces
COLOURS: dict[Moment, str] = {"before": look.GREY, "after": look.BLUE}
SHADES = [[0.0, "#c6dbef"], [0.15, "#6baed6"], [0.4, "#2171b5"], [0.7, "#e6550d"], [1.0, "#7f2704"]]
NO_BASELINE = (
    "The 16-bit model is not walked block by block, so it has no errors and no statistics of its "
    "own; every quantized run of it shows its values as “before”."
)


def parts(folder: Path, layers: pd.DataFrame, picks: Picks) -> list[str]:
    """Head, PLOTS pictures and the numbers; pictures and numbers only of a chosen matrix."""
    blocks = blocks_in(folder)
    if not blocks:
        return [""] * (PLOTS + 2)
    block, module = chosen(folder, blocks, picks)
    linear = read(folder, block, module) if module else None
    head = heading(blocks, modules_in(folder, block), linear, picks)
    if linear is None:
        return [head, *[""] * (PLOTS + 1)]
    own = layers[(layers["block"] == block) & (layers["module"] == module)]
    return [head, *pictures(linear), numbers(linear, own)]


def chosen(folder: Path, blocks: Sequence[int], picks: Picks) -> tuple[int, str]:
    """The block and the module in the URL; what only one of them says is filled in, else ""."""
    block = int(picks.block) if picks.block.isdigit() else blocks[0]
    block = block if block in blocks else blocks[0]
    modules = sorted(modules_in(folder, block), key=model_order)
    if picks.module in modules:
        return block, picks.module
    return block, modules[0] if modules and picks.block else ""


# ---- head and numbers ----------------------------------------------------------------------


def heading(
    blocks: Sequence[int], modules: Sequence[str], linear: Linear | None, picks: Picks
) -> Markup:
    """Title, the two selects, and what the pictures say."""
    at, module = (str(linear.block), linear.module) if linear else ("", "")
    none = tag("option", "choose…", value="", selected=linear is None)
    block_options = [
        tag("option", f"block {b}", value=b, selected=str(b) == at or None) for b in blocks
    ]
    module_options = [
        tag("option", m, value=m, selected=m == module or None)
        for m in sorted(modules, key=model_order)
    ]
    selects = tag(
        "div",
        tag("select", none, block_options, data_param="block", aria_label="Block"),
        tag("select", none, module_options, data_param="module", aria_label="Matrix"),
        close_button() if linear else None,
        class_="row",
    )
    title = f"{linear.module} of block {linear.block}" if linear else "Values of one matrix"
    top = tag("div", tag("h2", title), selects, class_="axis-row")
    return join([top, tag("p", say(linear) if linear else HINT, class_="muted")])


HINT = "Click a cell above, or choose a block and a matrix, to see its weights and inputs."


def close_button() -> Markup:
    """Back to no matrix."""
    return tag("button", "Close", class_="button", data_set={"block": "", "module": ""})


def say(linear: Linear) -> str:
    """How far the largest channel stands out, before and after."""
    sentences = [
        f"{name}: the largest channel is {look.significant(outstanding(before), 3)} times the "
        f"median channel before and {look.significant(outstanding(after), 3)} times after."
        for what, name in (("inputs", "Inputs"), ("weights", "Weights"))
        if (before := linear.summaries.get((what, "before")))  # type: ignore[arg-type]
        and (after := linear.summaries.get((what, "after")))  # type: ignore[arg-type]
        and math.isfinite(outstanding(before) + outstanding(after))
    ]
    return " ".join(sentences)


def outstanding(summary: Summary) -> float:
    """Largest channel peak over the median one; nan where the median is 0."""
    median = float(np.median(summary.peaks))
    return float(np.max(summary.peaks)) / median if median else math.nan


def numbers(linear: Linear, layers: pd.DataFrame) -> Markup:
    """Before and after, side by side, and the errors of this matrix."""
    heads = ("", "Before", "After")
    lines = [line for what in WHATS for line in number_lines(linear, what)]
    for name in ("weight_sqnr", "output_sqnr"):
        for value in layers[layers["name"] == name]["value"].tail(1):
            lines.append(line_of(f"{look.label(name)}, dB", None, look.quantity(name, value, "dB")))
    top = tag("tr", [tag("th", h, scope="col", class_="number" if h else None) for h in heads])
    table = tag("table", tag("thead", top), tag("tbody", lines), class_="settings cell-values")
    about = "Inputs are those of the sample tokens, before they are rounded."
    return join([tag("div", table, class_="scroll"), tag("p", about, class_="muted")])


def number_lines(linear: Linear, what: What) -> list[Markup]:
    """The numbers of weights or inputs that are known."""
    pair = [linear.summaries.get((what, moment)) for moment in MOMENTS]
    if not any(pair):
        return []
    rows = {
        "largest magnitude": [number(s, "reach") for s in pair],
        "standard deviation": [number(s, "std") for s in pair],
        "excess kurtosis (normal: 0)": [number(s, "kurtosis") for s in pair],
        "largest / median channel": [text(outstanding(s)) if s else look.MISSING for s in pair],
    }
    if any(s and s.numbers["not_finite"] for s in pair):
        rows["not finite, left out"] = [number(s, "not_finite") for s in pair]
    return [line_of(f"{what}: {name}", *texts) for name, texts in rows.items()]


def number(summary: Summary | None, name: str) -> str:
    return text(summary.numbers[name]) if summary else look.MISSING


def text(value: float) -> str:
    return look.significant(value, 3).replace("-", "−") if math.isfinite(value) else look.MISSING


def line_of(name: str, before: str | None, after: str) -> Markup:
    cells = [tag("td", t or "", class_="number") for t in (before, after)]
    return tag("tr", tag("th", name, scope="row"), cells)


# ---- pictures ------------------------------------------------------------------------------


def pictures(linear: Linear) -> list[str]:
    """The PLOTS figures with their sentences; "" where something was not seen."""
    name = f"{linear.module} of block {linear.block}"
    return [
        *(picture(histogram(linear, w), f"Histogram of the {w} of {name}.") for w in HISTOGRAMS),
        *(picture(peaks(linear, w), f"Largest {w} per channel of {name}.") for w in HISTOGRAMS),
        *(
            picture(surface(linear, m), f"Input magnitudes of {name} by token and channel, {m}.")
            for m in MOMENTS
        ),
    ]


HISTOGRAMS: tuple[What, ...] = ("inputs", "weights")


def picture(figure: go.Figure | None, summary: str) -> str:
    return chart_value(figure or look.empty_figure("Not seen in this run."), summary)


def of(linear: Linear, what: What) -> Mapping[Moment, Summary]:
    """{moment: summary} in order."""
    found = {moment: linear.summaries.get((what, moment)) for moment in MOMENTS}
    return {moment: summary for moment, summary in found.items() if summary}


def histogram(linear: Linear, what: What) -> go.Figure | None:
    """Density of the values, on a log axis: tails are what rounding suffers from."""
    bars = []
    for moment, summary in of(linear, what).items():
        x, width, density = density_of(summary)
        shown = {"color": COLOURS[moment], "opacity": 0.55, "line": {"width": 0}}
        hover = f"{moment}<br>%{{x:.3g}}: density <b>%{{y:.3g}}</b><extra></extra>"
        bars.append(
            go.Bar(x=x, y=density, width=width, name=moment, marker=shown, hovertemplate=hover)
        )
    if not bars:
        return None
    fig = titled(bars, f"{what.capitalize()}: distribution")
    fig.update_layout(barmode="overlay", bargap=0)
    fig.update_xaxes(title={"text": "value"})
    fig.update_yaxes(title={"text": "density"}, **log_axis([y for bar in bars for y in bar.y]))
    return fig


def density_of(summary: Summary) -> tuple[list[float], float, list[float | None]]:
    """Bin centres, bin width, and the share of values per unit; None in empty bins."""
    reach = summary.numbers["reach"] or 1.0
    bins = len(summary.counts)
    width = 2 * reach / bins
    centres = np.linspace(-reach + width / 2, reach - width / 2, bins)
    density = summary.counts / max(float(summary.counts.sum()), 1) / width
    return rounded(centres, reach), width, [float(f"{d:.4g}") if d else None for d in density]


def peaks(linear: Linear, what: What) -> go.Figure | None:
    """Largest magnitude of every input channel."""
    lines = []
    for moment, summary in of(linear, what).items():
        x, own = channels_of(summary), np.asarray(summary.peaks, dtype=float)
        y = [float(f"{v:.4g}") if v > 0 else None for v in own]
        style = {"color": COLOURS[moment], "width": 1.5, "shape": "hvh"}
        hover = f"channel %{{x}}, {moment}<br><b>%{{y:.3g}}</b><extra></extra>"
        lines.append(
            go.Scatter(x=x, y=y, name=moment, mode="lines", line=style, hovertemplate=hover)
        )
    if not lines:
        return None
    fig = titled(lines, f"{what.capitalize()}: largest magnitude per channel")
    fig.update_xaxes(title={"text": channel_title(summary)})
    fig.update_yaxes(title={"text": "magnitude"}, **log_axis([y for line in lines for y in line.y]))
    return fig


def log_axis(values: Sequence[float | None]) -> dict[str, Any]:
    """A log axis that names decades, or numbers where there are not even two of them."""
    known = [v for v in values if v]
    if known and max(known) / min(known) > 100:
        return {"type": "log", "dtick": 1, "exponentformat": "power"}
    return {"type": "log", "tickformat": "~g", "nticks": 5}


def surface(linear: Linear, moment: Moment) -> go.Figure | None:
    """Magnitudes by token and channel; both moments have the same height and colours."""
    own = of(linear, "inputs")
    if moment not in own or own[moment].surface is None:
        return None
    summary = own[moment]
    top = max(float(np.max(s.surface)) for s in own.values() if s.surface is not None) or 1.0
    z = [rounded(row, top) for row in np.asarray(summary.surface, dtype=float)]
    hover = "token %{y}, channel %{x}<br><b>%{z:.3g}</b><extra></extra>"
    shape = go.Surface(
        z=z,
        x=channels_of(summary),
        y=list(range(len(z))),
        cmin=0,
        cmax=top,
        colorscale=SHADES,
        showscale=False,
        hovertemplate=hover,
    )
    fig = titled([shape], f"Inputs {moment}: magnitude by token and channel")
    axis = {
        "backgroundcolor": "rgba(0,0,0,0)",
        "gridcolor": look.LINE,
        "color": look.MUTED,
        "zerolinecolor": look.LINE,
        "nticks": 5,
        "tickfont": {"size": 11},
    }
    fig.update_layout(
        height=380,
        showlegend=False,
        margin={"l": 0, "r": 0, "t": 40, "b": 0},
        scene={
            "xaxis": {"title": {"text": channel_title(summary)}, **axis},
            "yaxis": {"title": {"text": "token"}, **axis},
            "zaxis": {"title": {"text": "magnitude"}, "range": [0, top], **axis},
            "aspectratio": {"x": 1.6, "y": 1.1, "z": 0.8},
            "camera": {"eye": {"x": 1.05, "y": -1.75, "z": 0.85}, "center": {"z": -0.3}},
        },
    )
    return fig


def titled(data: Sequence[Any], title: str) -> go.Figure:
    """A figure of this panel: a title and a legend above the plot."""
    fig = look.figure(data)
    heading = {"text": title, "x": 0, "xanchor": "left", "y": 0.98, "yanchor": "top"}
    legend = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}
    fig.update_layout(
        height=280,
        title=heading | {"font": {"size": 14, "color": look.INK}},
        showlegend=True,
        legend=legend,
        margin={"t": 62, "b": 48},
    )
    return fig


def channels_of(summary: Summary) -> list[int]:
    """First channel of every pool."""
    return [at * int(summary.numbers["pool"]) for at in range(len(summary.peaks))]


def channel_title(summary: Summary) -> str:
    pool = int(summary.numbers["pool"])
    return "input channel" + (f" (largest of each {pool})" if pool > 1 else "")


def rounded(values: Any, top: float) -> list[float]:
    """To a thousandth of `top`: what a screen can show, in a third of the bytes."""
    digits = 3 - math.floor(math.log10(top))
    return [round(float(v), digits) for v in values]
