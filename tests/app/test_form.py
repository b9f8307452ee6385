"""Every part renders as a form and comes back the same; lines with sweeps do too."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from app import form
from app.draft import Draft, check_line, check_paths, specs
from backend.formats import FORMATS
from backend.methods import METHODS
from backend.metrics import METRICS
from backend.recipes import parse, presets
from backend.registry import Part

PARTS = [
    (registry, kind) for registry in (FORMATS, METHODS, METRICS) for kind in sorted(registry.load())
]
IDS = [f"{registry.noun}-{kind}" for registry, kind in PARTS]


@pytest.mark.parametrize(("registry", "kind"), PARTS, ids=IDS)
def test_every_field_has_a_widget_with_help(registry, kind):
    cls = registry.find(kind)
    found = {widget.path: widget for widget in form.widgets(cls)}
    assert {name for name in found if "." not in name} == set(cls.model_fields)
    for widget in found.values():
        assert widget.help, f"{kind}.{widget.path} has no help"
        assert widget.label


@pytest.mark.parametrize(("registry", "kind"), PARTS, ids=IDS)
def test_every_part_survives_its_form(registry, kind):
    for part in variants(registry, kind):
        again = form.part_of(type(part), form.values_of(part))
        assert again == part
        assert again.digest() == part.digest()


def variants(registry: Any, kind: str) -> list[Part]:
    """The default part and, for each field, parts with another value in it."""
    default = registry.build({"kind": kind})
    found = [default]
    for widget in form.widgets(type(default)):
        for text in others(widget):
            values = form.values_of(default) | {widget.path: text}
            try:
                found.append(form.part_of(type(default), values))
            except ValueError:
                continue  # knobs that exclude each other: the part itself said so
    return found


def others(widget: form.Widget) -> list[str]:
    """Values other than the default that the widget allows."""
    if widget.kind == "switch":
        return ["true", "false"]
    if widget.kind in ("choice", "part"):
        return list(widget.choices)
    if widget.kind in ("whole", "number"):
        low, high = widget.low or 0, widget.high if widget.high is not None else 64
        middle = (low + high) / 2
        number = str(int(middle)) if widget.kind == "whole" else repr(float(middle))
        return [number] + ([""] if widget.nullable else [])
    if widget.kind == "rules":
        return ['on(blocks="first,last",keep=true), on(modules=attn)', "on(blocks=0)"]
    return ["demo"] if widget.kind == "text" else ["demo_capitals, demo_people"]


class Everything(Part):
    """Every kind of field at once."""

    kind: ClassVar[str] = "everything"
    whole: int = Field(3, ge=1, lt=9, description="w")
    ratio: float = Field(0.25, gt=0, le=1, description="r")
    on: bool = Field(True, description="o")
    mode: Literal["slow", "fast"] = Field("slow", description="m")
    size: Literal[1, 2, 4] = Field(2, description="s")
    words: tuple[str, ...] = Field((), description="t")
    numbers: tuple[int, ...] = Field((1, 2), description="n")
    limit: int | None = Field(None, description="l")
    name: str = Field("x", description="a")


def test_kinds_bounds_and_defaults_of_every_type():
    found = {w.path: w for w in form.widgets(Everything)}
    assert [found[n].kind for n in Everything.model_fields] == [
        "whole", "number", "switch", "choice", "choice", "list", "list", "whole", "text",
    ]  # fmt: skip
    assert (found["whole"].low, found["whole"].high) == (1, 9)
    assert found["ratio"].bounds == "0 to 1"
    assert found["limit"].nullable
    assert found["numbers"].default == "1, 2"
    assert form.value_of(found["numbers"], "4, 5") == (4, 5)
    assert form.value_of(found["limit"], "") is None


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("whole", "four", "whole number"),
        ("ratio", "much", "number"),
        ("on", "maybe", "true or false"),
    ],
)
def test_bad_text_is_one_sentence(path, text, says):
    widget = next(w for w in form.widgets(Everything) if w.path == path)
    with pytest.raises(ValueError, match=says) as error:
        form.value_of(widget, text)
    assert "\n" not in str(error.value)


# ---- sweeps


def test_a_sweep_is_the_product_of_its_values():
    lines = form.expand("rtn(bits=2|3,group=32|64)+activations(bits=8|6)")
    wanted = [
        f"rtn(bits={b},group={g})+activations(bits={a})"
        for b, g, a in itertools.product((2, 3), (32, 64), (8, 6))
    ]
    assert lines == wanted


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("rtn(bits=2..4)", "rtn(bits=2|3|4)"),
        ("rtn(bits=8..8)", "rtn(bits=8)"),
        ("gptq(bits=2..3,group=32..128..32)", "gptq(bits=2|3,group=32|64|96|128)"),
        ("smoothquant(alpha=0.3..0.6..0.1)+rtn", "smoothquant(alpha=0.3|0.4|0.5|0.6)+rtn"),
        ("rtn(bits=2|4..5)", "rtn(bits=2|4|5)"),
    ],
)
def test_a_range_stands_for_its_values(line, same):
    assert form.expand(line) == form.expand(same)


def test_a_range_in_quotes_is_text():
    assert form.spelled_out('x(a="1..3",b=1..3)', "|") == 'x(a="1..3",b=1|2|3)'


def test_ranges_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="is empty"):
        form.expand("rtn(bits=8..2)")
    with pytest.raises(ValueError, match="more than"):
        form.expand("rtn(bits=1..100000)")
    with pytest.raises(ValueError, match="is empty"):
        form.expand("rtn(bits=2..3..0)")


def test_a_range_in_a_field_is_a_sweep():
    step = form.read_line("rtn")[0]
    assert form.write_line([form.with_value(step, "format.bits", "2..3, 8")]) == "rtn(bits=2|3|8)"


def test_a_sweep_reaches_into_brackets():
    assert form.expand("gptq(format=int(bits=3|4),block=64)") == [
        "gptq(format=int(bits=3),block=64)",
        "gptq(format=int(bits=4),block=64)",
    ]


@pytest.mark.parametrize("line", ["rtn(bits=2|)", "rtn(bits=|3)"])
def test_a_missing_value_is_said(line):
    assert "missing" in check_line(line).error


def test_a_sweep_too_large_is_refused():
    values = "|".join(str(n) for n in range(1, 401))
    assert "more than" in check_line(f"gptq(bits=2|3,block={values})").error


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_survives_the_builder(name):
    text = presets()[name]
    steps = form.read_line(text)
    assert parse(form.write_line(steps)) == parse(text)


def test_a_swept_line_survives_the_builder():
    line = "rtn(bits=2|3|4,group=32|64)+activations(bits=8)"
    again = form.write_line(form.read_line(line))
    assert [parse(t) for t in form.expand(again)] == [parse(t) for t in form.expand(line)]


def test_setting_a_field_writes_the_line():
    (step,) = form.read_line("gptq(bits=4,group=64)")
    assert form.write_line([form.with_value(step, "format.bits", "2, 3")]) == (
        "gptq(bits=2|3,group=64)"
    )
    assert form.write_line([form.with_value(step, "act_order", "true")]) == (
        "gptq(bits=4,group=64,act_order=true)"
    )
    back = form.with_value(form.with_value(step, "damping", "0.1"), "damping", "0.01")
    assert form.write_line([back]) == "gptq(bits=4,group=64)"


@pytest.mark.parametrize("kind", sorted(METHODS.load()))
def test_every_field_of_every_method_can_be_set_from_nothing(kind):
    for widget in form.StepDraft(kind, {}).widgets():
        for text in others(widget):
            line = form.write_line([form.with_value(form.StepDraft(kind, {}), widget.path, text)])
            assert not check_line(line).error or "\n" not in check_line(line).error


@pytest.mark.parametrize("kind", sorted(METRICS.load()))
def test_metric_knobs_are_written_and_taken_back(kind):
    for widget in form.widgets(METRICS.find(kind)):
        for text in others(widget):
            try:
                line = form.metric_with(kind, widget.path, text)
            except ValueError:
                continue  # the metric refuses the value; its own tests say when
            again = form.metric_with(line, widget.path, widget.default)
            assert again == kind


# ---- drafts


def test_a_draft_makes_every_run_once():
    draft = Draft(model="demo", recipes="rtn(bits=3|4)\nrtn(bits=4)\nbaseline", metrics="size")
    made = specs(draft)
    assert len(made) == 3
    assert made[-1].is_baseline


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipes": "gptqq(bits=4)"}, "did you mean 'gptq'"),
        ({"recipes": "gptq(bit=4)"}, "did you mean 'bits'"),
        ({"recipes": "rtn(bits=11)"}, "less than or equal to 8"),
        ({"recipes": "rtn(bits=4"}, "at the end"),
        ({"metrics": "perplexityy"}, "did you mean 'perplexity'"),
        ({"metrics": ""}, "at least one metric"),
        ({"metrics": "speed"}, "packed"),
        ({"samples": "many"}, "whole number"),
        ({"samples": "0"}, "greater than or equal"),
        ({"model": ""}, "choose a model"),
    ],
)
def test_what_is_wrong_is_one_sentence(changes, says):
    values = {"model": "demo", "recipes": "rtn(bits=4)", "metrics": "size"} | changes
    with pytest.raises(ValueError, match=says) as error:
        specs(Draft(**values))
    assert "\n" not in str(error.value)


def test_a_draft_survives_the_url():
    draft = Draft(model="demo", recipes="rtn(bits=4)\ngptq(bits=3|4)", edit="1", samples="64")
    assert Draft.read({k: v for k, v in draft.changed().items() if v}) == draft


def test_local_paths_come_only_from_named_folders(tmp_path):
    inside, outside = tmp_path / "models" / "a", tmp_path / "b"
    inside.mkdir(parents=True)
    outside.mkdir()
    for model, fine in ((inside, True), (outside, False), (inside / ".." / ".." / "b", False)):
        made = specs(Draft(model=str(model), recipes="rtn(bits=4)", metrics="size"))
        if fine:
            check_paths(made[0], [tmp_path / "models"])
        else:
            with pytest.raises(PermissionError, match="--models"):
                check_paths(made[0], [tmp_path / "models"])


@pytest.mark.parametrize("metrics", ['perplexity(dataset="/etc/passwd")', "size"])
def test_local_texts_come_only_from_named_folders(metrics, tmp_path):
    data = "auto" if "passwd" in metrics else "file:/etc/passwd"
    made = specs(Draft(model="demo", recipes="rtn(bits=4)", metrics=metrics, data=data))
    with pytest.raises(PermissionError, match="--models"):
        check_paths(made[0], [tmp_path])
