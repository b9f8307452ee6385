"""Three components and how a page uses them: HTML that changes in place, charts, and the wire.

The URL is the only state of a page. A click changes the URL in the browser (app.js), the wire says
so, and the page is drawn again from the URL and the store; what did not change stays in place.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import gradio as gr
import plotly.graph_objects as go
from markupsafe import Markup

Draw = Callable[[gr.Request], Sequence[Any]]
Stamp = Callable[[gr.Request], Hashable]
Act = Callable[[Mapping[str, Any], gr.Request], Mapping[str, Any]]

QUIET: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
}
nonce = itertools.count(1)  # equal commands one after the other are still two commands


# Functions, not classes: Gradio writes a .pyi file beside every subclass of a component.


def live(value: str = "", **kwargs: Any) -> gr.HTML:
    """HTML that is patched in place: focus, open details and scroll positions survive."""
    return _html("<div class='live'></div>", "qa.live(element, props, watch);", value, **kwargs)


def plotly_chart(value: str = "", **kwargs: Any) -> gr.HTML:
    """A Plotly figure drawn by Plotly's own library; clicks and zooms end up in the URL."""
    return _html("<div class='plot'></div>", "qa.chart(element, props, watch);", value, **kwargs)


def _wire() -> gr.HTML:
    """Carries "the URL moved" and actions to the server, and commands back to the browser."""
    script = "qa.wire(props, watch, trigger, ['moved', 'act']);"
    return _html("<div></div>", script, "", elem_classes="wire")


def _html(template: str, script: str, value: str, **kwargs: Any) -> gr.HTML:
    return gr.HTML(
        value, html_template=template, js_on_load=script, apply_default_css=False, **kwargs
    )


def chart_value(figure: go.Figure, summary: str) -> str:
    """What a `plotly_chart` takes: the figure and its summary sentence."""
    return json.dumps({"figure": figure.to_plotly_json(), "say": summary}, cls=_Encoder)


class _Encoder(json.JSONEncoder):
    """Arrays and numpy scalars as plain lists and numbers; NaN becomes null beforehand."""

    def default(self, o: Any) -> Any:
        return o.tolist() if hasattr(o, "tolist") else super().default(o)


def connect(
    draw: Draw,
    outputs: Sequence[gr.HTML],
    *,
    stamp: Stamp,
    act: Act | None = None,
    every_s: float = 1.0,
) -> None:
    """Draw `outputs` when the URL moves, when an action was done, and when `stamp` has changed.

    `stamp` is asked every `every_s` by every open page, so it must be cheap.
    """
    wire = _wire()
    seen = gr.State(None)

    def redraw(request: gr.Request) -> list[Any]:
        return [_seen(stamp, request), *draw(request)]

    def refresh(last: Any, request: gr.Request) -> Any:
        if _seen(stamp, request) == last:
            return [gr.skip()] * (1 + len(outputs))
        return redraw(request)

    def perform(event: gr.EventData, request: gr.Request) -> list[Any]:
        return [command(act, event._data or {}, request), *redraw(request)]

    wire.moved(redraw, None, [seen, *outputs], trigger_mode="always_last", **QUIET)
    gr.Timer(every_s).tick(refresh, seen, [seen, *outputs], **QUIET)
    if act is not None:
        wire.act(perform, None, [wire, seen, *outputs], trigger_mode="multiple", **QUIET)


def _seen(stamp: Stamp, request: gr.Request) -> Any:
    return repr((stamp(request), sorted(dict(request.query_params).items())))


def command(act: Act | None, data: Mapping[str, Any], request: gr.Request) -> str:
    """Do what was asked -> a command for the browser; refusals come back as one sentence."""
    try:
        answer = act(data, request) if act else {}
    except (ValueError, PermissionError, OSError) as error:
        answer = {"toast": str(error), "bad": True}
    # Gradio looks for script tags in what it takes for HTML
    return json.dumps({"nonce": next(nonce), **answer}).replace("<", "\\u003c")


def query(request: gr.Request) -> dict[str, str]:
    """URL parameters of the page that asks."""
    return {str(name): str(value) for name, value in dict(request.query_params).items()}


def skeleton(height: int) -> Markup:
    """Room of the final shape while a page loads."""
    return Markup('<div class="skeleton" style="height:{}px"></div>').format(height)
