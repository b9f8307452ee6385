"""Learn: the worked example, every kind on every example, bad input, links, explanations."""

from __future__ import annotations

import json
import re
import time
from html import unescape
from typing import Any

import pytest
import torch

from app import learn_parts, learn_state, learn_words
from app.builder import step_form
from app.form import StepDraft
from app.learn_maths import applied, by_hand, curve, walk_of
from app.learn_state import State, examples, lesson_of
from app.pages.learn import Memory, screen
from backend.formats import FORMATS
from backend.layer import quantize_layer
from backend.methods import METHODS
from backend.recipes import parse, render

NAMES = ("head", "editor", "controls", "result", "hand", "steps", "title", "chart", "said", "about")
GRIDS = [f"rtn/{kind}" for kind in FORMATS.load()]
SHOWN = [kind for kind in METHODS.load() if learn_parts.shown(kind)]


def shown(memory: Memory | None = None, **query: str) -> dict[str, str]:
    """The page's parts by name."""
    asked = {name.replace("__", "."): text for name, text in query.items()}
    parts = screen(asked, memory or Memory(), "one")
    return {name: str(part) for name, part in zip(NAMES, parts, strict=True)}


def problem(page: dict[str, str]) -> str:
    found = re.search(r'role="alert">([^<]*)<', page["controls"])
    return unescape(found[1]) if found else ""


def asked(kind: str, **more: str) -> dict[str, str]:
    method, _, grid = kind.partition("/")
    return {"kind": method, **({"k.format": grid} if grid else {}), **more}


# ---- the worked example


def test_three_ways_by_hand_give_the_published_numbers():
    w, x = torch.diag(torch.tensor([9.0, 4.0, 1.0])), torch.tensor([[1.0, 2.0, 3.0]])
    clip, scale, awq = by_hand(w, x, 2)
    assert clip.y.tolist() == [[3, 6, 3]]
    assert scale.codes.diagonal().tolist() == [3, 1, 0]
    assert scale.codes.diagonal().mul(x[0]).tolist() == [3, 2, 0]  # the levels times x
    assert scale.y.tolist() == [[9, 6, 0]]
    assert awq.codes.diagonal().tolist() == [3, 3, 1]
    assert torch.allclose(awq.y, torch.tensor([[9.0, 9.0, 3.0]]), atol=1e-5)


def test_the_page_opens_on_the_worked_example():
    page = shown()
    assert "off by 29.1 %" in page["result"]
    for number in ("(3, 6, 3)", "(3, 1, 0)", "(9, 9, 3)", "W × 0.333"):
        assert number in page["hand"]
    assert "rtn(bits=2,per_tensor=true)" in page["result"]
    assert "clamp(round(4 / 3) + 0, 0, 3) = 1" in page["result"]


# ---- every kind, on every matrix


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.title)
@pytest.mark.parametrize("kind", [*SHOWN, *GRIDS])
def test_every_kind_is_applied_live(kind, example):
    page = shown(**asked(kind, w=example.w, x=example.x))
    assert problem(page) == ""
    assert page["result"].count("Ŵ − W") >= 1
    assert "Try it on a model" in page["result"]


@pytest.mark.parametrize("kind", [k for k in SHOWN if not METHODS.find(k).exact])
def test_numbers_are_those_of_quantize_layer(kind):
    """Where no scale can move, the small block gives what a lone linear gives."""
    example = examples()[1]
    state = State.read({"kind": kind, "w": example.w, "x": example.x})
    lesson = lesson_of(state)
    done = applied(state, lesson)
    if done.moved or lesson.method.prefix == "original":
        pytest.skip("it moves a scale, which a lone linear has nothing to carry")
    alone = quantize_layer(lesson.method, lesson.w, lesson.x[None])
    assert torch.equal(done.w_hat, alone.weight)
    assert dict(done.bits) == alone.bits


def test_a_smoothed_layer_still_multiplies_by_the_same_weights():
    example = examples()[2]
    state = State.read({"kind": "smoothquant", "then": "none", "w": example.w, "x": example.x})
    done = applied(state, lesson_of(state))
    assert done.moved
    assert torch.allclose(done.w_hat, done.lesson.w, rtol=1e-5)
    assert torch.allclose(done.y, done.exact, rtol=1e-4, atol=1e-5)


def test_what_fp32_loses_is_not_shown_as_an_error():
    page = shown(kind="smoothquant")
    assert "the worst weight by 0," in page["result"]


def test_awq_finds_less_error_than_rounding_on_the_outlier_channel():
    example = examples()[2]
    given = {"w": example.w, "x": example.x, "k.format.bits": "3"}
    losses = []
    for kind in ("rtn", "awq"):
        state = State.read({"kind": kind, **given})
        losses.append(applied(state, lesson_of(state)).loss)
    assert losses[1] <= losses[0]


# ---- GPTQ column by column


@pytest.mark.parametrize("knobs", [{}, {"k.act_order": "true"}, {"k.format.group": "3"}])
def test_the_columns_end_in_what_gptq_gives(knobs):
    example = examples()[1]
    state = State.read({"kind": "gptq", "w": example.w, "x": example.x, **knobs})
    done = applied(state, lesson_of(state))
    walk = walk_of(done)
    assert walk is not None
    count = len(walk.order)
    assert torch.equal(walk.before(0), walk.start)
    assert torch.equal(walk.before(count), done.w_hat[:, walk.order])
    # Every column is the nearest level to what the walk says stood there: the same update rule.
    q = done.q
    assert q is not None
    groups = q.group_of_column()
    for step, column in enumerate(walk.order):
        p = q.format.params_of(q.params, int(groups[column]))
        codes = q.format.encode(walk.before(step)[:, step : step + 1], p)
        assert torch.equal(codes[:, 0], q.codes[:, column])


def test_the_stepper_tells_where_it_is():
    page = shown(kind="gptq", column="1")
    assert "1 of 3 done" in page["steps"]
    assert "Column 2 is rounded next" in page["steps"]
    assert "Every column is rounded" in shown(kind="gptq", column="99")["steps"]
    assert shown(kind="rtn")["steps"] == ""


# ---- curves


def test_curves_are_over_what_a_method_is_about():
    example = examples()[2]
    found = {}
    for kind in ("awq", "smoothquant", "rtn"):
        state = State.read({"kind": kind, "w": example.w, "x": example.x, "k.format.bits": "3"})
        found[kind] = curve(state, applied(state, lesson_of(state)))
    assert found["awq"].knob == "exponent r"
    assert found["awq"].now == found["awq"].best
    assert found["smoothquant"].knob == "alpha"
    assert len(found["smoothquant"].at) == 21
    assert found["rtn"].loss[-1] < found["rtn"].loss[0]


def test_a_chart_has_a_sentence_and_a_table():
    page = shown()
    assert json.loads(page["chart"])["say"].endswith(".")
    assert "as-table" in shown(kind="rtn", table="1")["said"]


# ---- state and links


def test_the_recipe_of_a_section_reads_back():
    state = State.read({"kind": "gptq", "k.format.bits": "3", "k.act_order": "true"})
    recipe = lesson_of(state).recipe
    assert recipe == "gptq(bits=3,act_order=true)"
    assert render(parse(recipe)) == recipe
    changes = learn_state.taught(state, recipe)
    assert changes["k.format.bits"] == "3"


def test_another_method_keeps_the_knobs_it_has():
    state = State.read({})
    assert learn_state.switched(state, "gptq")["k.format.bits"] == "2"
    assert learn_state.switched(state, "rtn", "sdr")["k.format.bits"] == "2"
    assert "k.format.bits" not in {k for k, v in learn_state.switched(state, "hqq").items() if v}


@pytest.mark.parametrize("kind", SHOWN)
def test_every_preset_loads(kind):
    state = State.read({"kind": kind})
    for text in learn_words.presets_of(kind).values():
        query = {k: v for k, v in learn_state.taught(state, text).items() if v}
        assert [step.kind for step in lesson_of(State.read(query)).steps] == [
            step.kind for step in parse(text)
        ]


def test_the_form_in_new_run_explains_the_method():
    html = str(step_form(0, StepDraft("gptq", {"format.bits": ["3"]})))
    assert "What is this?" in html
    assert "/learn?kind=gptq&amp;k.format.bits=3" in html
    assert "e = (w - w_hat)/U_cc" in unescape(html)
    assert "Presets: " in html


# ---- what does not hold


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"w": "9,zero;1,2"}, "W row 1, column 2: 'zero' is not a number."),
        ({"w": "9,nan;1,2"}, "'nan' is not a number between"),
        ({"w": "1,;1,2"}, "W row 1, column 2 is empty; write a number."),
        ({"w": ";".join([",".join(["1"] * 50)] * 50)}, "W is 50 x 50; this page shows up to"),
        ({"w": "1,2;3"}, "row 2 has 1 numbers and row 1 has 2"),
        ({"x": "1,2"}, "x has 2 numbers in a row and W 3 columns"),
        ({"kind": "rtn", "k.format.bits": "two"}, "bits takes a whole number, not 'two'"),
        ({"kind": "rtn", "k.format.bits": "9"}, "bits"),
        ({"kind": "rtnn"}, "did you mean 'rtn'?"),
        ({"kind": "rtn", "k.format": "nope"}, "unknown format 'nope'"),
        ({"kind": "rtn", "then": "nope("}, "recipe"),
    ],
)
def test_bad_input_is_one_sentence_and_the_last_good_state_stays(query, said):
    memory = Memory()
    good = shown(memory, kind="gptq", **{"k.format.bits": "3"})
    page = screen(query, memory, "one")
    text = problem({"controls": str(page[2])})
    assert said in text
    assert "\n" not in text
    assert str(page[3]) == good["result"]


def test_an_address_that_never_held_shows_the_worked_example():
    page = shown(w="a,b")
    assert problem(page)
    assert "off by 29.1 %" in page["result"]
    assert 'value="a"' in page["editor"]  # what was typed stays to be corrected
    assert "aria-invalid" in page["editor"]


def test_memory_forgets_the_oldest():
    memory = Memory(2)
    for name in "abc":
        memory.keep(name, State("1", "1", name))
    assert memory.last("a").kind == "rtn"
    assert memory.last("c").kind == "c"


def test_nothing_typed_becomes_markup():
    page = shown(w="<script>alert(1)</script>", kind="rtn", then="<b>")
    assert "<script>alert" not in "".join(page.values())


# ---- explanations


@pytest.mark.parametrize("kind", [*METHODS.load(), *FORMATS.load()])
def test_every_kind_says_its_idea_formula_and_cost(kind):
    told = learn_words.explanations().get(kind)
    assert told is not None, f"docs/methods.md needs a section ### `{kind}`: title"
    assert len(told.text) > 60
    assert told.formulas, f"the section of {kind} in docs/methods.md needs a formula in backticks"
    assert told.cost, f"the section of {kind} in docs/methods.md needs 'Cost: seconds.' or the like"


def test_the_packaged_text_is_the_document():
    assert learn_words.SECTIONS.is_symlink()
    assert learn_words.SECTIONS.resolve().parts[-2:] == ("docs", "methods.md")


def test_a_screen_is_quick():
    """Of CPU time, on whatever machine: a change shows within 300 ms on an idle one."""
    example: Any = examples()[1]
    query = {"kind": "gptq", "w": example.w, "x": example.x}
    shown(**query)
    start = time.process_time()
    for at in range(5):
        shown(**query, cell=f"{at},1")
    assert (time.process_time() - start) / 5 < 0.3
