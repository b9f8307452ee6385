"""Layer rules: how they read, what they refuse, and what each linear of a model then gets."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn

from backend.layer import quantize_layer
from backend.layer_rules import On, ends, rule_of
from backend.methods import METHODS, LinearMethod
from backend.metrics.size import sizes_of
from backend.model.checkpoint import Checkpoint
from backend.model.families import FAMILIES, blocks_of
from backend.model.quant_linear import QuantLinear
from backend.pipeline import quantize
from backend.recipes import parse, render
from backend.run import put_in
from backend.spec import ModelRef, RunSpec

MIXED = 'rtn(bits=4,group=16,layers=[on(modules=attn,bits=8),on(blocks="0,-1",keep=true)])'
TEXTS = [
    MIXED,
    "gptq(bits=4,layers=[on(modules=down_proj,bits=8)])",
    'rtn(format=codebook(table=nf4),layers=[on(modules="v_proj,down_proj",table=fp4)])',
    'rtn(bits=4,layers=[on(modules="*_proj",format=minifloat(type=fp8_e4m3))])',
    "activations(bits=8,layers=[on(modules=down_proj,keep=true)])",
    "smoothquant(layers=[on(blocks=first,alpha=0.8)])+rtn(bits=8)",
    'hqq(bits=4,layers=[on(blocks="1..-1",bits=8,group=32)])',
]


@pytest.fixture
def ids():
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))


def walk(model: Any, recipe: str, ids: Any, folder: Any, notes: list[str] | None = None) -> Any:
    """The model after a recipe."""
    said = [] if notes is None else notes
    saved = Checkpoint(folder / "blocks")
    quantize(model, parse(recipe), ids, saved, note=lambda block, name, text: said.append(text))
    return model


def code_bits(model: Any) -> dict[tuple[int, str], int]:
    """{(block, linear): bits of its codes}, 16 for plain ones."""
    return {
        (block.index, name): round(linear.bits()["codes"])
        if isinstance(linear, QuantLinear)
        else 16
        for block in blocks_of(model)
        for name, linear in block.linears().items()
    }


# ---- text and JSON


@pytest.mark.parametrize("text", TEXTS)
def test_rules_survive_text_and_json(text):
    steps = parse(text)
    assert render(steps) == text
    for step in steps:
        again = METHODS.build(json.loads(json.dumps(step.data())))
        assert again == step
        assert again.digest() == step.digest()


def test_a_step_without_rules_is_written_as_before():
    assert "layers" not in parse("rtn(bits=4)")[0].data()
    assert parse("rtn(layers=[])") == parse("rtn")
    assert parse("rtn(layers=on(blocks=0))") == parse('rtn(layers=[on(blocks="0")])')
    assert parse("rtn(layers=[on(blocks=[0,-1])])") == parse('rtn(layers=[on(blocks="0,-1")])')


def test_rules_decide_the_artifact():
    def artifact(recipe: str) -> str:
        model = ModelRef(id="demo", content="0123456789ab")
        return RunSpec(model=model, steps=parse(recipe)).artifact_id()

    texts = ["rtn(bits=4)", MIXED, MIXED.replace("attn", "ffn"), MIXED.replace("=8", "=6")]
    assert len({artifact(text) for text in texts}) == len(texts)
    assert artifact(MIXED) == artifact(MIXED.replace(",", ", "))


def test_calibration_is_needed_if_any_rule_needs_it():
    model = ModelRef(id="demo", content="0123456789ab")
    plain = RunSpec(model=model, steps=parse("activations"))
    ruled = RunSpec(model=model, steps=parse("activations(layers=[on(modules=ffn,static=true)])"))
    assert not plain.needs_calibration()
    assert ruled.needs_calibration()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rtn(layers=[on(bits=99)])", ["on(bits=99)", "bits = 99", "less than or equal to 8"]),
        ("rtn(layers=[on(bit=2)])", ["unknown knob 'bit'", "did you mean 'bits'"]),
        ("rtn(layers=[on(module=attn,bits=8)])", ["did you mean 'modules'"]),
        ("hqq(layers=[on(block=0,bits=8)])", ["did you mean 'blocks'"]),
        ("rtn(layers=[off(bits=2)])", ["a rule is on(...)", "off"]),
        ("rtn(layers=3)", ["layers = 3", "tuple"]),
        ('rtn(layers=[on(blocks="3..1")])', ["write 1..3"]),
        ("rtn(layers=[on(blocks=middle)])", ["cannot read blocks 'middle'"]),
        ("rtn(layers=[on(keep=true,bits=2)])", ["leave out bits"]),
        ("rtn(layers=[on(layers=[on])])", ["no rules of its own"]),
        ("smoothquant(layers=[on(modules=attn,alpha=0.8)])", ["leave out modules"]),
        ("gptq(layers=[on(modules=attn,true_sequential=true)])", ["true_sequential", "modules"]),
        ("awq(layers=[on(modules=attn,ratios=3)])", ["ratios", "leave out modules"]),
        ("activations(layers=[on(static=true,group=32)])", ["on(static=true,group=32)", "group=0"]),
    ],
)
def test_bad_rules_get_one_sentence(text, words):
    with pytest.raises(ValueError) as error:
        parse(text)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_one_linear_has_no_layers():
    with pytest.raises(ValueError, match="leave out layers"):
        quantize_layer(parse(MIXED)[0], torch.ones(4, 32))


# ---- what a rule matches


@pytest.mark.parametrize(
    ("spans", "count", "covered"),
    [
        ("", 4, {0, 1, 2, 3}),
        ("0..2", 4, {0, 1, 2}),
        ("0,-1", 4, {0, 3}),
        ("first, last", 5, {0, 4}),
        ("-2..-1", 5, {3, 4}),
        ("1..last", 4, {1, 2, 3}),
        ("7", 4, set()),
        ("-9", 4, set()),
        ("0", 1, {0}),
    ],
)
def test_blocks_are_counted_from_both_ends(spans, count, covered):
    rule = On(blocks=spans)
    assert {index for index in range(count) if rule.covers(index, count)} == covered


def test_ends_are_whole_numbers_from_zero():
    assert ends(["0..-1", "2", "first"], 8) == [(0, 7), (2, 2), (0, 0)]


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_attention_and_ffn_split_every_family_in_two(kind, make_model):
    block = blocks_of(make_model(kind))[0]
    names = list(block.linears())
    attention = [name for name in names if On(modules="attn").names(block, name)]
    assert attention == [n for n in names if n.startswith(("self_attn.", "attention."))]
    assert attention
    rest = [name for name in names if On(modules="ffn").names(block, name)]
    assert sorted(attention + rest) == sorted(names)
    assert rest


def test_patterns_match_dotted_runs_as_by_hand(make_model):
    block = blocks_of(make_model("llama"))[0]
    cases = {
        "down_proj": "mlp.down_proj",
        "self_attn": "self_attn.*",
        "mlp.up_proj": "mlp.up_proj",
        "*_proj": "*",
        "gate*": "mlp.gate_proj",
        "proj": "nothing",
        "self_attn.[qk]_proj": "self_attn.[qk]_proj",
    }
    for pattern, wanted in cases.items():
        for name in block.linears():
            assert On(modules=pattern).names(block, name) == fnmatchcase(name, wanted), pattern
    both = On(modules="down_proj, q_proj")
    assert [n for n in block.linears() if both.names(block, n)] == [
        "self_attn.q_proj",
        "mlp.down_proj",
    ]


def test_a_bare_word_is_a_rule_that_changes_nothing():
    assert rule_of("on") == On()
    (step,) = parse("rtn(bits=4,layers=[on])")
    assert step.under(step.layers[0]) == step.plain() == parse("rtn(bits=4)")[0]


# ---- the walk


def test_the_first_rule_that_matches_decides(make_model, ids, tmp_path):
    got = code_bits(walk(make_model("llama"), MIXED, ids, tmp_path))
    for (index, name), bits in got.items():
        assert bits == (8 if "self_attn" in name else 4 if index == 1 else 16), (index, name)


def test_an_exception_before_a_wider_rule(make_model, ids, tmp_path):
    recipe = "rtn(bits=4,layers=[on(blocks=1),on(modules=down_proj,bits=8)])"
    got = code_bits(walk(make_model("llama"), recipe, ids, tmp_path))
    assert {i for (i, name), bits in got.items() if bits == 8} == {0, 2}


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptq_sequential", "awq", "hqq"])
def test_each_linear_is_what_the_step_alone_would_make_of_it(method, make_model, ids, tmp_path):
    """In block 0, whose inputs no earlier rounding has touched."""
    extra = "true_sequential=true," if method == "gptq_sequential" else ""
    kind = method.partition("_")[0]
    if kind == "awq":
        extra = "ratios=1,"  # one scale for both, so that only the grids differ
    grid = "group=16"
    mixed = f"{kind}({extra}bits=4,{grid},layers=[on(modules=mlp,bits=8)])"
    ruled = blocks_of(walk(make_model("llama"), mixed, ids, tmp_path / "mixed"))[0]
    alone = {
        bits: blocks_of(
            walk(make_model("llama"), f"{kind}({extra}bits={bits},{grid})", ids, tmp_path / bits)
        )[0]
        for bits in ("4", "8")
    }
    for name, linear in ruled.linears().items():
        bits = "8" if "mlp" in name else "4"
        if bits == "8" and extra.startswith("true"):
            continue  # sees other inputs, by design
        assert torch.equal(linear.weight, alone[bits].get(name).weight), name


def test_kept_linears_are_untouched_and_count_sixteen_bits(make_model, ids, tmp_path):
    before = {
        (block.index, name): linear.weight.clone()
        for block in blocks_of(make_model("llama"))
        for name, linear in block.linears().items()
    }
    model = walk(
        make_model("llama"), "gptq(bits=4,layers=[on(modules=ffn,keep=true)])", ids, tmp_path
    )
    kept = held = total = 0
    for block in blocks_of(model):
        for name, linear in block.linears().items():
            count = linear.in_features * linear.out_features
            total += count
            if "mlp" in name:
                assert isinstance(linear, nn.Linear)
                assert torch.equal(linear.weight, before[block.index, name])
                kept += count
            else:
                held += sum(linear.bits().values()) * count
    assert sizes_of(model).bits_per_weight == pytest.approx((held + 16 * kept) / total)


def test_kept_inputs_stay_exact(make_model, ids, tmp_path):
    recipe = "rtn(bits=8)+activations(bits=8,layers=[on(modules=down_proj,keep=true)])"
    for block in blocks_of(walk(make_model("llama"), recipe, ids, tmp_path)):
        for name, linear in block.linears().items():
            assert (linear.act is None) == (name == "mlp.down_proj")


def test_static_scales_by_rule_look_at_data_only_there(make_model, ids, tmp_path):
    recipe = "activations(layers=[on(modules=attn,static=true)])"
    for block in blocks_of(walk(make_model("llama"), recipe, ids, tmp_path)):
        for name, linear in block.linears().items():
            assert (linear.act_params is not None) == ("self_attn" in name)


def test_steps_on_norms_take_rules_for_blocks(make_model, ids, tmp_path):
    plain = walk(make_model("llama"), "smoothquant(alpha=0.5)", ids, tmp_path / "a")
    recipe = "smoothquant(alpha=0.5,layers=[on(blocks=0,alpha=0.9),on(blocks=last,keep=true)])"
    ruled = walk(make_model("llama"), recipe, ids, tmp_path / "b")
    untouched = make_model("llama")
    norms = [
        [block.get("input_layernorm").weight for block in blocks_of(model)]
        for model in (plain, ruled, untouched)
    ]
    assert not torch.equal(norms[1][0], norms[0][0])
    assert torch.equal(norms[1][1], norms[0][1])
    assert torch.equal(norms[1][2], norms[2][2])


@pytest.mark.parametrize("kind", sorted(k for k, m in METHODS.load().items() if m.in_blocks))
def test_every_method_takes_rules_for_blocks(kind, make_model, ids, tmp_path):
    before, model = make_model("llama"), make_model("llama")
    walk(model, f"{kind}(layers=[on(blocks=0,keep=true)])", ids, tmp_path)
    kept = (blocks_of(each)[0].module.state_dict() for each in (before, model))
    for a, b in zip(*(state.values() for state in kept), strict=True):
        assert torch.equal(a, b)
    changed = (blocks_of(each)[1].module.state_dict() for each in (before, model))
    one, two = changed
    assert one.keys() != two.keys() or any(not torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("kind", sorted(METHODS.load()))
def test_every_method_takes_rules_for_linears_or_says_why_not(kind, make_model, ids, tmp_path):
    recipe = f"{kind}(layers=[on(modules=down_proj,keep=true)])"
    if not METHODS.load()[kind].by_module:
        with pytest.raises(ValueError, match="leave out modules"):
            parse(recipe)
        return
    for block in blocks_of(walk(make_model("llama"), recipe, ids, tmp_path)):
        for name, linear in block.linears().items():
            assert isinstance(linear, nn.Linear) == (name == "mlp.down_proj"), name
    assert issubclass(METHODS.load()[kind], LinearMethod) or kind == "activations"


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("rtn(layers=[on(modules=downproj,bits=8)])", "mlp.down_proj"),
        ("rtn(layers=[on(blocks=3,bits=8)])", "blocks 0 to 2"),
        ("rtn(layers=[on(blocks=0,modules=fc1,bits=8)])", "attn, ffn, self_attn.q_proj"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused_before_the_walk(
    recipe, says, make_model, ids, tmp_path
):
    with pytest.raises(ValueError, match="matches nothing") as error:
        walk(make_model("llama"), recipe, ids, tmp_path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not Checkpoint(tmp_path / "blocks").has(0)


def test_what_decides_nothing_is_a_note(make_model, ids, tmp_path):
    notes: list[str] = []
    recipe = 'rtn(layers=[on(modules="attn,fc1",bits=8),on(modules=q_proj,bits=2)])'
    walk(make_model("llama"), recipe, ids, tmp_path, notes)
    assert any("on(modules=q_proj,bits=2) decides nothing" in text for text in notes)
    assert any("'fc1'" in text for text in notes)


def test_a_mixed_model_resumes_and_packs(make_model, ids, tmp_path):
    """Saved blocks restore to the same bits, and what is quantized runs packed."""
    recipe = "rtn(bits=4,group=32,layers=[on(modules=attn,bits=8),on(modules=down_proj,keep=true)])"
    model = walk(make_model("llama"), recipe, ids, tmp_path)
    again = walk(make_model("llama"), recipe, ids, tmp_path)  # every block is there already
    assert torch.equal(model(ids[:1]).logits, again(ids[:1]).logits)
    saved, packed = Checkpoint(tmp_path / "blocks"), make_model("llama")
    with pytest.raises(ValueError, match="no linear that a kernel"):
        put_in(make_model("llama"), saved, "cpu", packed=True)
    put_in(packed, saved, "cpu", packed=True, kept=True)
    assert code_bits(packed) == code_bits(model)
    exact, got = model(ids[:1]).logits, packed(ids[:1]).logits
    # The kernel's own roundings: 0.9e-4 for all in 4 bits without rules, 1.9e-4 for all in 8.
    assert (got - exact).square().mean() < 4e-4 * exact.square().mean()
