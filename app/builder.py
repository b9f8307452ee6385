"""The form of the New run page as HTML: model, recipes with their builder, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from app import form, learn_words, look, rows, rule_editor
from app.context import Context
from app.draft import PRESETS, Draft, Line, check_line, check_paths, is_here, kind_of, one_sentence
from app.form import StepDraft, Widget
from app.learn_state import address
from app.markup import join, search_box, tag
from app.recipe_words import kind_name
from backend.methods import METHODS
from backend.metrics import METRICS
from backend.model.identity import DEMOS, find_model
from backend.recipes import parse, presets
from backend.registry import Part
from backend.spec import ModelRef, RunSpec


def blocks(ctx: Context, draft: Draft) -> Markup:
    """Model, recipes, metrics."""
    title = tag("h1", "New run")
    return join([title, model_block(ctx, draft), recipe_block(draft), metric_block(draft)])


def block(number: int, title: str, *children: Any) -> Markup:
    """One of the three cards."""
    head = tag("h2", tag("span", number, class_="number-dot"), title)
    return tag("section", head, children, class_="card block-card", data_key=f"block-{number}")


def model_block(ctx: Context, draft: Draft) -> Markup:
    known = list(dict.fromkeys([*DEMOS, *rows.models(ctx.store), *cached_models()]))
    quick = [
        tag(
            "button",
            name,
            class_="chip",
            data_set={"model": name},
            aria_pressed=str(name == draft.model).lower(),
        )
        for name in known[:6]
    ]
    box = tag(
        "input",
        type="text",
        value=draft.model,
        list="known-models",
        data_param="model",
        id="model-name",
        aria_label="Model",
        placeholder="demo, org/name, org/name@revision or a folder",
        spellcheck="false",
        autocomplete="off",
        class_="wide",
    )
    options = tag("datalist", [tag("option", value=name) for name in known], id="known-models")
    chosen = tag("div", quick, class_="chips")
    return block(1, "Model", chosen, box, options, model_facts(ctx, draft))


def cached_models() -> list[str]:
    """Models of the local Hugging Face cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        found = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return sorted(repo.repo_id for repo in found if repo.repo_type == "model")


def model_facts(ctx: Context, draft: Draft) -> Markup:
    """What was found in the model's files, or what is wrong with it."""
    try:
        ref = ModelRef(id=draft.model)
        check_paths(RunSpec(model=ref), ctx.models)
        if not is_here(ref):
            return tag(
                "p",
                "Not in the local cache: it is downloaded when the run is queued.",
                class_="hint",
            )
        facts = find_model(ref)
    except (ValueError, PermissionError, OSError) as error:
        return tag("p", one_sentence(error), class_="problem", role="alert")
    parts = [
        str(facts.config.get("model_type", "")),
        f"{look.whole(facts.parameters)} parameters",
        f"{facts.blocks} blocks",
        f"context {look.whole(facts.context)}",
        f"{look.in_bytes(facts.weight_bytes)} in 16 bits",
    ]
    return tag("p", " · ".join(parts), class_="hint")


def recipe_block(draft: Draft) -> Markup:
    lines = [check_line(text) for text in draft.lines()]
    box = tag(
        "textarea",
        draft.recipes,
        data_param="recipes",
        id="recipes",
        rows=max(3, len(lines) + 1),
        spellcheck="false",
        aria_label="Recipes, one pipeline per line",
        placeholder="gptq(bits=4,group=64)\nrtn(bits=2|3|4,group=32|64)      | sweeps over values",
        class_="wide mono",
    )
    return block(
        2,
        "Recipes",
        tag("ol", [line_item(at, line, draft) for at, line in enumerate(lines)], class_="lines"),
        builder(draft, lines),
        preset_cards(draft),
        tag("details", tag("summary", "As text, one pipeline per line"), box, data_key="as-text"),
    )


def line_item(at: int, line: Line, draft: Draft) -> Markup:
    """One line: what it makes or what is wrong, edit and remove."""
    open_ = draft.line_in_builder() == at
    tools = [
        tag(
            "button",
            "Close" if open_ else "Edit",
            class_="tool",
            aria_expanded=str(open_).lower(),
            data_act={"do": "edit", "line": at},
        )
        if not line.error or open_
        else None,
        tag(
            "button",
            "Remove",
            class_="tool",
            data_act={"do": "remove", "line": at},
            aria_label=f"Remove {line.text}",
        ),
    ]
    count = f"{len(line.pipelines)} runs" if len(line.pipelines) > 1 else ""
    words = [tag("code", line.text), tag("small", count) if count else None]
    problem = tag("p", line.error, class_="problem", role="alert") if line.error else None
    return tag(
        "li",
        tag("div", tag("span", words), tag("span", tools, class_="tools"), class_="between"),
        problem,
        class_="open" if open_ else None,
    )


def builder(draft: Draft, lines: Sequence[Line]) -> Markup:
    """The pipeline bar and the form of every step of the line being edited."""
    at = draft.line_in_builder()
    options = [
        tag("option", f"{kind_name(kind)}: {cls.summary()}", value=kind)
        for kind, cls in METHODS.load().items()
    ]
    prompt = "Add a step…" if at is not None else "Build a pipeline: first step…"
    first = tag("option", prompt, value="", selected=True)
    add = tag(
        "select", first, options, data_field={"do": "step"}, aria_label=prompt, class_="add-step"
    )
    if at is None or lines[at].error:
        return tag("div", add, broken_methods(), class_="builder", data_key="builder")
    try:
        steps = form.read_line(lines[at].text)
    except ValueError as error:  # a fine line, but not one that a form can show
        return tag("p", str(error), class_="hint", data_key="builder")
    bar = [step_chip(number, step) for number, step in enumerate(steps)]
    return tag(
        "div",
        tag("div", join(bar), add, class_="pipeline"),
        [step_form(number, step) for number, step in enumerate(steps)],
        class_="builder open",
        data_key="builder",
    )


def broken_methods() -> Markup | None:
    """Files of methods that failed to import, with their traceback folded."""
    broken = METHODS.broken | METRICS.broken
    return (
        join(
            tag(
                "details",
                tag("summary", f"{name} could not be loaded", class_="problem"),
                tag("pre", text),
            )
            for name, text in broken.items()
        )
        if broken
        else None
    )


def step_chip(number: int, step: StepDraft) -> Markup:
    """A step in the pipeline bar: move left, remove."""
    left = (
        tag(
            "button",
            "◂",
            class_="mini",
            aria_label=f"Move {step.kind} to the left",
            data_act={"do": "move", "step": number},
        )
        if number
        else None
    )
    gone = tag(
        "button",
        "×",
        class_="mini",
        aria_label=f"Remove {step.kind}",
        data_act={"do": "drop", "step": number},
    )
    dot = tag("i", class_="dot", style=f"background:{look.family_colour(step.kind)}")
    arrow = tag("span", "→", class_="arrow", aria_hidden="true") if number else None
    return join([arrow, tag("span", left, dot, kind_name(step.kind), gone, class_="step-chip")])


def step_form(number: int, step: StepDraft) -> Markup:
    """The form of one step, made from its fields."""
    shown = step.widgets()
    swept = len(step.values.get("layers", ())) > 1
    fields_ = [
        field_row(
            widget,
            ", ".join(step.values.get(widget.path, [widget.default])),
            {"do": "knob", "step": number, "knob": widget.path},
            f"s{number}",
            changed=widget.path in step.values,
            sweep=True,
        )
        for widget in shown
        if widget.kind != "rules"
    ]
    rules = [
        tag("p", rule_editor.SEVERAL, class_="hint") if swept else rule_editor.editor(number, step)
        for widget in shown
        if widget.kind == "rules"
    ]
    known = {path: texts[0] for path, texts in step.values.items()}
    link = tag("a", "What is this?", href=address(step.kind, known), data_carry=True)
    about = tag("p", step.cls.summary(), " ", link, class_="hint")
    legend = tag("legend", kind_name(step.kind))
    return tag(
        "fieldset",
        legend,
        about,
        explanation(step.kind, number),
        tag("div", fields_, class_="fields"),
        rules,
        data_key=f"step-{number}-{step.kind}",
    )


def explanation(kind: str, number: int) -> Markup:
    """Idea, formula, cost and presets of a kind, folded."""
    names = ", ".join(learn_words.presets_of(kind))
    return tag(
        "details",
        tag("summary", "Idea, formula, cost"),
        learn_words.about(kind),
        tag("p", tag("b", "Presets: "), names, class_="hint") if names else None,
        class_="what-is",
        data_key=f"what-{number}-{kind}",
    )


def field_row(
    widget: Widget,
    value: str,
    action: Mapping[str, Any],
    prefix: str,
    *,
    changed: bool = False,
    sweep: bool = False,
) -> Markup:
    """A labelled input with its help and bounds."""
    name = f"{prefix}-{widget.path.replace('.', '-')}"
    default = widget.default if widget.default != "" else "empty"
    about = "; ".join(p for p in (widget.bounds, f"default {default}") if p)
    return tag(
        "div",
        tag("label", widget.label, for_=name),
        field_input(widget, value, action, name, sweep),
        tag("p", widget.help, " ", tag("span", f"({about})", class_="bounds"), id=f"{name}-help"),
        class_="field changed" if changed else "field",
        data_key=name,
    )


def field_input(
    widget: Widget, value: str, action: Mapping[str, Any], name: str, sweep: bool
) -> Markup:
    """Choices are lists, everything else a text box; commas sweep where that is possible."""
    common = {"id": name, "data_field": dict(action), "aria_describedby": f"{name}-help"}
    choices = ("true", "false") if widget.kind == "switch" else widget.choices
    if choices and "," not in value:
        words = {"true": "on", "false": "off"}
        options = [tag("option", words.get(c, c), value=c, selected=c == value) for c in choices]
        both = ", ".join(choices)
        if sweep and widget.kind != "part" and len(choices) <= 4:
            options.append(tag("option", f"try each: {both}", value=both))
        return tag("select", options, **common)
    mode = {"whole": "numeric", "number": "decimal"}.get(widget.kind)
    hint = "several (2, 3, 4 or 2..4) are tried one by one" if sweep else None
    return tag(
        "input",
        type="text",
        value=value,
        inputmode=mode,
        title=hint,
        spellcheck="false",
        autocomplete="off",
        **common,
    )


def preset_cards(draft: Draft) -> Markup:
    """Every preset, by family, searchable."""
    search = search_box("Search presets", data_filters=".preset", id="preset-search")
    lines = set(draft.lines())
    groups: dict[str, list[Markup]] = {}
    for name, text in presets().items():
        card = preset_card(name, text, text in lines)
        groups.setdefault(parse(text)[0].kind, []).append(card)
    made = [preset_group(kind, cards) for kind, cards in groups.items()]
    return tag(
        "div", tag("div", tag("h3", "Presets"), search, class_="between"), made, class_="presets"
    )


def preset_group(kind: str, cards: Sequence[Markup]) -> Markup:
    """One family's presets under its one-line idea."""
    head = tag(
        "h4",
        tag("i", class_="dot", style=f"background:{look.family_colour(kind)}"),
        kind_name(kind),
        tag("small", METHODS.find(kind).summary()),
    )
    return tag("div", head, tag("div", cards, class_="cards"), class_="preset-group")


def preset_card(name: str, text: str, chosen: bool) -> Markup:
    return tag(
        "button",
        tag("b", name),
        tag("small", cost_class(text)),
        class_="preset",
        title=text,
        aria_pressed=str(chosen).lower(),
        data_act={"do": "preset", "text": text},
        data_key=f"preset-{name}",
    )


def cost_class(text: str) -> str:
    """What a recipe asks for: nothing, a few samples, or a whole calibration pass."""
    wanted = {stat.__name__ for step in parse(text) for stat in step.gathered()}
    if not wanted:
        return "no data"
    return "calibration, solver" if "Hessian" in wanted else "calibration, light"


def metric_block(draft: Draft) -> Markup:
    chosen = {kind_of(line): line for line in draft.metric_lines()}
    same = next((n for n, text in PRESETS.items() if text.splitlines() == draft.metric_lines()), "")
    levels = [
        tag(
            "button",
            name,
            class_="chip",
            aria_pressed=str(name == same).lower(),
            data_act={"do": "metrics", "preset": name},
        )
        for name in PRESETS
    ]
    cards = [metric_card(kind, cls, chosen.get(kind)) for kind, cls in METRICS.load().items()]
    return block(
        3,
        "Measure",
        tag("div", levels, class_="chips"),
        tag("div", cards, class_="metric-cards"),
        tag("div", more_settings(draft), class_="fields plain"),
    )


def metric_card(kind: str, cls: type[Part], line: str | None) -> Markup:
    """A metric: on or off, its idea, its knobs when it is on."""
    switch = tag(
        "input",
        type="checkbox",
        checked=line is not None,
        id=f"metric-{kind}",
        data_field={"do": "metric", "kind": kind},
    )
    head = tag(
        "label", switch, tag("b", kind.replace("_", " ").capitalize()), for_=f"metric-{kind}"
    )
    knobs = None
    if line is not None and cls.model_fields:
        values = form.values_of(form.read_metric(line)) if not _wrong(line) else {}
        rows_ = [
            field_row(
                w,
                values.get(w.path, w.default),
                {"do": "metric-knob", "kind": kind, "knob": w.path},
                f"m-{kind}",
                changed=values.get(w.path, w.default) != w.default,
            )
            for w in form.widgets(cls)
        ]
        fold = tag("summary", "Settings")
        knobs = tag("details", fold, tag("div", rows_, class_="fields"), data_key=f"knobs-{kind}")
    return tag(
        "div",
        head,
        tag("p", cls.summary(), class_="hint"),
        knobs,
        class_="metric on" if line is not None else "metric",
        data_key=f"card-{kind}",
    )


def _wrong(line: str) -> bool:
    try:
        form.read_metric(line)
    except ValueError:
        return True
    return False


def more_settings(draft: Draft) -> list[Markup]:
    """Storage, calibration, seed: few, plain, at the end."""
    return [
        choice_row(
            "Stored",
            "storage",
            ("simulated", "packed"),
            draft.storage,
            "Simulated weights are rounded and kept wide: quality only. Packed ones are stored "
            "in their bits and run on low-bit kernels: quality, speed and memory.",
        ),
        choice_row(
            "Compute type",
            "dtype",
            ("auto", "float32", "bfloat16", "float16"),
            draft.dtype,
            "auto follows the device.",
        ),
        text_row(
            "Calibration text", "data", draft.data, "auto, demo-train, c4, wikitext2 or a file."
        ),
        text_row(
            "Calibration samples", "samples", draft.samples, "Sequences shown to the methods."
        ),
        text_row(
            "Calibration length", "length", draft.length, "Tokens of each; at most the context."
        ),
        text_row("Seed", "seed", draft.seed, "Of calibration and of methods that draw numbers."),
    ]


def choice_row(title: str, name: str, choices: Sequence[str], value: str, about: str) -> Markup:
    options = [tag("option", c, value=c, selected=c == value) for c in choices]
    box = tag("select", options, data_param=name, id=f"d-{name}")
    return tag("div", tag("label", title, for_=f"d-{name}"), box, tag("p", about), class_="field")


def text_row(title: str, name: str, value: str, about: str) -> Markup:
    box = tag(
        "input", type="text", value=value, data_param=name, id=f"d-{name}", autocomplete="off"
    )
    return tag("div", tag("label", title, for_=f"d-{name}"), box, tag("p", about), class_="field")
