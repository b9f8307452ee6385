"""Learn: one small matrix, any method, every number it leads to."""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from typing import Any

import gradio as gr

from app import form, learn_curve, learn_parts
from app.context import Context
from app.learn_maths import Applied, Curve, applied, curve, walk_of
from app.learn_state import Lesson, State, lesson_of, values_of
from app.widgets import chart_value, connect, live, plotly_chart, query, skeleton
from backend.methods import METHODS

TITLE, PATH, ORDER, KEY = "Learn", "/learn", 8, "e"
SESSIONS = 256  # whose last good state is remembered
BY_HAND_MOST = 4  # rows and columns of a matrix that is still worked by hand


class Memory:
    """The last state that held, of each open page: what stays on screen while one types."""

    def __init__(self, most: int = SESSIONS) -> None:
        self._most = most
        self._kept: OrderedDict[str, State] = OrderedDict()

    def keep(self, session: str, state: State) -> None:
        """A state that holds."""
        self._kept[session] = state
        self._kept.move_to_end(session)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def last(self, session: str) -> State:
        """The last one of this page, else the worked example."""
        return self._kept.get(session) or State.read({})


def build(ctx: Context) -> None:
    """Editor and form; results; by hand; GPTQ's steps; curve; explanation."""
    memory = Memory()
    with gr.Column(elem_classes="page learn", elem_id="content"):
        head = live(skeleton(120), elem_classes="head")
        with gr.Row(elem_classes="split"):
            with gr.Column(elem_classes="learn-numbers"):
                editor = live(skeleton(240), elem_classes="card pad learn-editor")
                result = live(skeleton(420), elem_classes="card pad learn-result")
            controls = live(skeleton(660), elem_classes="card pad learn-controls")
        hand = live("", elem_classes="card pad learn-section")
        steps = live("", elem_classes="card pad learn-section")
        with gr.Column(elem_classes="card chart-card learn-curve"):
            title, chart, said = live(""), plotly_chart(), live("")
        about = live(skeleton(200), elem_classes="card pad learn-section")

    def draw(request: gr.Request) -> list[Any]:
        session = str(getattr(request, "session_hash", "") or "")
        return screen(query(request), memory, session)

    outputs = [head, editor, controls, result, hand, steps, title, chart, said, about]
    connect(draw, outputs, stamp=lambda request: 0, every_s=5.0)


def screen(asked: dict[str, str], memory: Memory, session: str = "") -> list[Any]:
    """Every part of the page for one URL; what does not hold is said, and the last good stays."""
    state, problem = readable(asked)
    good, done = state, None
    if not problem:
        lesson, done, problem = attempt(state)
    if done is None:
        good = memory.last(session)
        lesson, done, _ = attempt(good)
    else:
        memory.keep(session, good)
    assert lesson is not None
    assert done is not None
    found, walk = curve(good, done), walk_of(done)
    by_hand = max(lesson.w.shape) <= BY_HAND_MOST
    recipe = lesson.recipe
    return [
        learn_parts.head(state),
        learn_parts.editor(state, lesson),
        learn_parts.controls(state, problem),
        learn_parts.result(good, done, walk),
        learn_parts.hand_section(good, lesson, bits_of(good)) if by_hand else "",
        learn_parts.walk_section(good, done, walk) if walk else "",
        learn_parts.curve_head(found, good.table) if found else "",
        drawn(found) if found and not good.table else "",
        learn_parts.curve_foot(found, good.table, recipe) if found else "",
        learn_parts.about(good, recipe),
    ]


@lru_cache(maxsize=64)
def drawn(found: Curve) -> str:
    """The curve's chart."""
    return chart_value(learn_curve.draw(found), learn_parts.curve_said(found))


def readable(asked: dict[str, str]) -> tuple[State, str]:
    """The state of a URL, and one sentence where its kind or grid does not exist."""
    state = State.read(asked)
    try:
        form.widgets(METHODS.find(state.kind), values_of(state))
    except ValueError as error:
        first = State.read({})
        known = {"w": state.w, "x": state.x, "kind": first.kind, "knobs": first.knobs}
        return State(**known), str(error)  # type: ignore[arg-type]
    return state, ""


def attempt(state: State) -> tuple[Lesson | None, Applied | None, str]:
    """The lesson and its result, or one sentence."""
    try:
        lesson = lesson_of(state)
        return lesson, applied(state, lesson), ""
    except ValueError as error:
        return None, None, str(error)


def bits_of(state: State) -> int:
    """Bits for the work by hand: those of the form where it says so, few enough to follow."""
    values = values_of(state)
    text = values.get("format.bits") or values.get("bits") or "2"
    return min(max(int(text), 2), 4) if text.isdigit() else 2
