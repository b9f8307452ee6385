"""The loss curve of the Learn page as a figure: pure, a curve in and a figure out."""

from __future__ import annotations

import plotly.graph_objects as go

from app import look
from app.learn_maths import Curve


def draw(curve: Curve) -> go.Figure:
    """Mean squared output error over a knob; a ring where the form stands, a star at the least."""
    line = go.Scatter(
        x=list(curve.at),
        y=list(curve.loss),
        mode="lines+markers",
        line={"color": look.BLUE, "width": 2},
        marker={"size": 6},
        hovertemplate=f"{curve.knob} %{{x:g}}<br>error %{{y:.4g}}<extra></extra>",
    )
    best = mark(curve, curve.best, "star", look.ORANGE)
    marks = [best] if curve.now is None else [best, mark(curve, curve.now, "circle-open", look.INK)]
    fig = look.figure([line, *marks])
    positive = [loss for loss in curve.loss if loss > 0]
    if len(positive) == len(curve.loss) and max(positive) > 10 * min(positive):
        fig.update_yaxes(type="log")
    fig.update_xaxes(title={"text": curve.knob})
    fig.update_yaxes(title={"text": "Mean squared error (lower is better)"}, rangemode="tozero")
    fig.update_layout(height=320)
    return fig


def mark(curve: Curve, at: float, symbol: str, colour: str) -> go.Scatter:
    """One point of the curve, told apart."""
    near = min(range(len(curve.at)), key=lambda i: abs(curve.at[i] - at))
    return go.Scatter(
        x=[curve.at[near]],
        y=[curve.loss[near]],
        mode="markers",
        marker={"symbol": symbol, "size": 14, "color": colour, "line": {"width": 2}},
        hoverinfo="skip",
    )
