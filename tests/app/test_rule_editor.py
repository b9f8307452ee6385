"""Layer rules in the builder: rows, edits, and the words for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from app import builder, form, rule_editor
from app.draft import Draft, check_line
from app.pages import new_run
from app.recipe_words import recipe_of_steps, rule_words
from backend.recipes import parse

LINE = 'rtn(bits=4,group=128,layers=[on(modules=attn,bits=8),on(blocks="first,last",keep=true)])'


def edited(line: str, **data: Any) -> str:
    """The line after one action of the editor on its first step."""
    draft = Draft(model="demo", recipes=line, edit="0")
    return new_run.edit_rules(draft, {"step": 0, **data})["recipes"]


def test_the_page_knows_the_editors_actions():
    assert set(rule_editor.EDITS) <= set(new_run.EDITS)


def test_rules_are_made_edited_moved_and_dropped():
    line = edited("rtn(bits=4)", do="add-rule")
    assert line == 'rtn(bits=4,layers=[on(blocks="first,last",keep=true)])'
    line = edited(line, do="add-rule")
    line = edited(line, do="rule", rule=1, part="blocks", value="")
    line = edited(line, do="rule", rule=1, part="modules", value="attn")
    line = edited(line, do="rule", rule=1, part="knobs", value="bits=8, group=64")
    assert line == (
        'rtn(bits=4,layers=[on(blocks="first,last",keep=true),on(modules=attn,bits=8,group=64)])'
    )
    line = edited(line, do="raise-rule", rule=1)
    assert line.startswith("rtn(bits=4,layers=[on(modules=attn")
    assert edited(line, do="drop-rule", rule=0) == (
        'rtn(bits=4,layers=[on(blocks="first,last",keep=true)])'
    )
    for text in ("0..2", '"0..2"'):
        assert 'on(blocks="0..2",modules=attn' in edited(
            line, do="rule", rule=0, part="blocks", value=text
        )
    kept = edited(line, do="rule", rule=0, part="keep", value="true")
    assert kept.startswith("rtn(bits=4,layers=[on(modules=attn,keep=true)")
    assert edited("rtn(bits=4,layers=[on(blocks=0)])", do="drop-rule", rule=0) == "rtn(bits=4)"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"part": "knobs", "value": "bits=99"}, "less than or equal to 8"),
        ({"part": "knobs", "value": "bit=8"}, "did you mean 'bits'"),
        ({"part": "knobs", "value": "bits"}, "expected '='"),
        ({"part": "blocks", "value": "middle"}, "cannot read blocks"),
    ],
)
def test_a_bad_edit_is_one_sentence(change: Mapping[str, str], says):
    with pytest.raises(ValueError, match=says) as error:
        edited(LINE, do="rule", rule=0, **change)
    assert "\n" not in str(error.value)


def test_the_form_shows_every_rule_in_words_and_fields():
    draft = Draft(model="demo", recipes=LINE, edit="0")
    shown = builder.builder(draft, [check_line(LINE)])
    assert "attention in 8 bits" in shown
    assert "first and last block in 16 bits" in shown
    assert 'value="bits=8"' in shown
    assert "Add a rule" in shown


def test_steps_on_whole_blocks_offer_no_linears():
    line = "smoothquant(layers=[on(blocks=first,alpha=0.8)])"
    draft = Draft(model="demo", recipes=line, edit="0")
    shown = builder.builder(draft, [check_line(line)])
    assert "whole blocks" in shown
    assert 's0-rule0-blocks"' in shown
    assert 's0-rule0-modules"' not in shown


def test_sweeps_go_on_beside_rules_and_inside_them():
    for line in (LINE.replace("bits=4", "bits=3|4"), LINE.replace("bits=8", "bits=6|8")):
        checked = check_line(line)
        assert len(checked.pipelines) == 2
        again = form.write_line(form.read_line(line))
        assert [parse(t) for t in form.expand(again)] == [parse(t) for t in checked.pipelines]
        draft = Draft(model="demo", recipes=line, edit="0")
        assert "Layers" in builder.builder(draft, [checked])


def words(recipe: str) -> str:
    (step,) = parse(recipe)
    return rule_words(step.layers[0].data())


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("modules=attn,bits=8", "attention in 8 bits"),
        ("modules=ffn,keep=true", "FFN in 16 bits"),
        ('blocks="0..2",keep=true', "blocks 0..2 in 16 bits"),
        ("blocks=1,modules=down_proj,bits=8,group=32", "block 1 down_proj in 8 bits g32"),
        ("format=codebook(table=nf4)", "all in NF4"),
        ("blocks=first", "first block as the step stands"),
        ("modules=attn,symmetric=true", "attention in sym"),
    ],
)
def test_a_rule_in_words(rule, says):
    assert words(f"rtn(bits=4,layers=[on({rule})])") == says


def test_a_recipe_in_words_names_its_rules():
    steps = [step.data() for step in parse(LINE.replace("group=128", "group=64"))]
    recipe = recipe_of_steps(steps)
    assert recipe.name == "RTN W4 g64, attention in 8 bits, first and last block in 16 bits"
    assert parse(recipe.text) == parse(LINE.replace("group=128", "group=64"))
