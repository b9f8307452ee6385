"""Layer rules in the builder: a row per rule, and what its fields and buttons do to the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from app.form import StepDraft, read_rules, rule_texts, with_value, write_line
from app.markup import tag
from app.recipe_words import rule_words, split_outside
from backend.layer_rules import On
from backend.recipes import parse, render_value

FIRST_RULE = 'on(blocks="first,last",keep=true)'  # what a new rule says until it is edited
NAMES = ("attn", "ffn", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEVERAL = "Layers: this line tries several sets of rules; they are edited in the text below."
PARTS: dict[str, tuple[str, str]] = {  # field -> label, example
    "blocks": ("Blocks", "all"),
    "modules": ("Linears", "all"),
    "knobs": ("Knobs there", "bits=8, group=64"),
}


# ---- text ----------------------------------------------------------------------------------


def knob_text(rule: On) -> str:
    """What a rule changes, as a person types it: `bits=8, group=64`."""
    return ", ".join(f"{name}={render_value(value)}" for name, value in rule.knobs.items())


def changed(rule: On, part: str, text: str) -> str:
    """A rule's text with one of its fields set; blank means all, or no knobs."""
    fields = {"blocks": rule.blocks, "modules": rule.modules, "knobs": knob_text(rule)}
    keep = rule.keep if part != "keep" else text == "true"
    if part in fields:
        quoted = part != "knobs"  # a person may quote blocks here as a recipe does
        fields[part] = text.strip().strip('"') if quoted else text.strip()
        keep = keep and not (part == "knobs" and text.strip())
    elif keep:
        fields["knobs"] = ""
    words = [
        f"{name}={render_value(fields[name])}" for name in ("blocks", "modules") if fields[name]
    ]
    words += ["keep=true"] if keep else split_outside(fields["knobs"], ",")
    return f"on({','.join(word.strip() for word in words if word.strip())})"


def with_rules(step: StepDraft, texts: Sequence[str]) -> StepDraft:
    """The step with these rules. ValueError in one sentence if it refuses one."""
    after = with_value(step, "layers", ", ".join(texts))
    parse(write_line([StepDraft(step.kind, {p: v[:1] for p, v in after.values.items()})]))
    return after


def texts_of(step: StepDraft) -> list[str]:
    """The rules of a step, each as text."""
    return rule_texts(step.values.get("layers", [""])[0])


def add_rule(step: StepDraft, data: Mapping[str, Any]) -> StepDraft:
    """One more at the end."""
    return with_rules(step, [*texts_of(step), FIRST_RULE])


def drop_rule(step: StepDraft, data: Mapping[str, Any]) -> StepDraft:
    """One less."""
    return with_rules(step, [t for at, t in enumerate(texts_of(step)) if at != int(data["rule"])])


def raise_rule(step: StepDraft, data: Mapping[str, Any]) -> StepDraft:
    """One place up: of the rules that match, the first decides."""
    texts, at = texts_of(step), int(data["rule"])
    if at:
        texts[at - 1], texts[at] = texts[at], texts[at - 1]
    return with_rules(step, texts)


def set_rule(step: StepDraft, data: Mapping[str, Any]) -> StepDraft:
    """A field of one rule."""
    texts, at = texts_of(step), int(data["rule"])
    (rule,) = read_rules(texts[at])
    texts[at] = changed(rule, str(data["part"]), str(data["value"]))
    return with_rules(step, texts)


EDITS: dict[str, Callable[[StepDraft, Mapping[str, Any]], StepDraft]] = {
    "add-rule": add_rule,
    "drop-rule": drop_rule,
    "raise-rule": raise_rule,
    "rule": set_rule,
}


# ---- markup --------------------------------------------------------------------------------


def editor(number: int, step: StepDraft) -> Markup:
    """All rules of a step, and a button for one more."""
    rules = read_rules(", ".join(texts_of(step)))
    by_module = bool(getattr(step.cls, "by_module", False))
    add = tag("button", "Add a rule", class_="tool", data_act={"do": "add-rule", "step": number})
    about = "Of the rules that match a linear, the first decides; the others get the knobs above."
    if not by_module:
        about = "This step works on a block as a whole, so its rules are for whole blocks. " + about
    return tag(
        "div",
        tag("h4", "Layers"),
        tag("p", about, class_="hint"),
        tag("ol", [row(number, at, rule, by_module) for at, rule in enumerate(rules)]),
        add,
        tag("datalist", [tag("option", value=name) for name in NAMES], id=f"s{number}-linears"),
        class_="layer-rules",
        data_key=f"s{number}-layers",
    )


def row(number: int, at: int, rule: On, by_module: bool) -> Markup:
    """One rule: where it holds, what it does there, and what that means in words."""
    target = {"step": number, "rule": at}
    texts = {"blocks": rule.blocks, "modules": rule.modules, "knobs": knob_text(rule)}
    shown = ["blocks"] + ["modules"] * by_module
    does = [("true", "stay in 16 bits"), ("false", "get other knobs")]
    name = f"s{number}-rule{at}"
    keep = tag(
        "select",
        [
            tag("option", words, value=value, selected=(value == "true") == rule.keep)
            for value, words in does
        ],
        id=f"{name}-keep",
        data_field={"do": "rule", "part": "keep", **target},
    )
    fields = [text_field(name, part, texts[part], target) for part in shown]
    fields.append(tag("div", tag("label", "There they", for_=f"{name}-keep"), keep, class_="field"))
    if not rule.keep:
        fields.append(text_field(name, "knobs", texts["knobs"], target))
    head = tag("span", tag("b", rule_words(rule.data())), class_="rule-words")
    up = button("▴", f"Move rule {at + 1} up", {"do": "raise-rule", **target}) if at else None
    gone = button("×", f"Remove rule {at + 1}", {"do": "drop-rule", **target})
    return tag(
        "li",
        tag("div", head, tag("span", up, gone, class_="tools"), class_="between"),
        tag("div", fields, class_="fields"),
        data_key=name,
    )


def text_field(name: str, part: str, value: str, target: Mapping[str, Any]) -> Markup:
    """A labelled text box of a rule, its help in the field's own words."""
    label, example = PARTS[part]
    about = On.model_fields[part].description if part in On.model_fields else None
    number = target["step"]
    box = tag(
        "input",
        type="text",
        value=value,
        placeholder=example,
        id=f"{name}-{part}",
        list=f"s{number}-linears" if part == "modules" else None,
        spellcheck="false",
        autocomplete="off",
        data_field={"do": "rule", "part": part, **target},
    )
    help_text = tag("p", about or "Knobs of the step or of its format, with commas between.")
    return tag("div", tag("label", label, for_=f"{name}-{part}"), box, help_text, class_="field")


def button(sign: str, says: str, action: Mapping[str, Any]) -> Markup:
    """A small button."""
    return tag("button", sign, class_="mini", aria_label=says, data_act=dict(action))
