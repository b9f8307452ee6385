"""New run: a model, recipes and metrics become runs in the queue."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from markupsafe import Markup

from app import form, look, rows, rule_editor
from app.builder import blocks
from app.context import Context
from app.draft import PRESETS, Draft, check_paths, is_here, kind_of, one_sentence, specs
from app.form import StepDraft
from app.markup import join, tag
from app.recipe_words import recipe_of_steps, text_of_steps
from app.widgets import connect, live, query, skeleton
from backend.estimate import Estimate, estimate
from backend.methods import METHODS
from backend.model.identity import find_model, resolve
from backend.spec import ModelRef, RunSpec
from jobs.devices import here, settle
from jobs.events import State

TITLE, PATH, ORDER, KEY = "New run", "/new", 2, "n"


def build(ctx: Context) -> None:
    """Model, recipes and metrics on the left; what follows from them on the right."""
    with gr.Column(elem_classes="page new", elem_id="content"):
        with gr.Row(elem_classes="split"):
            form_part = live(skeleton(600), elem_classes="draft")
            rail = live(skeleton(320), elem_classes="card rail")

    def draw(request: gr.Request) -> list[Markup]:
        draft = Draft.read(query(request))
        if not ctx.trusted(request):
            return [closed(), Markup("")]
        plan = plan_of(ctx, with_model(ctx, draft))
        return [blocks(ctx, with_model(ctx, draft)), rail_part(draft, plan)]

    def act(data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
        draft = with_model(ctx, Draft.read(query(request)))
        if data.get("do") == "queue":
            return submit(ctx, draft, request)
        edit = EDITS.get(str(data.get("do")))
        if edit is None:
            raise ValueError(f"this page cannot do {data.get('do')!r}")
        return {"params": draft.changed(**edit(draft, data)), "replace": True}

    def stamp(request: gr.Request) -> Hashable:
        return tuple((view.run_id, view.state) for view in ctx.runs.runs())

    connect(draw, [form_part, rail], stamp=stamp, act=act, every_s=2.0)


def closed() -> Markup:
    """What a visitor without the token sees."""
    text = (
        "You may look at everything here, but starting runs needs the token: open the link that "
        "the server printed when it started."
    )
    return tag(
        "div",
        tag("h1", "Runs are started by this server's owner."),
        tag("p", text),
        class_="empty-state words",
    )


def with_model(ctx: Context, draft: Draft) -> Draft:
    """The draft with the last used model where none was chosen."""
    if draft.model:
        return draft
    return Draft(**draft.__dict__ | {"model": (rows.models(ctx.store) or ["demo"])[0]})


# ---- what the draft makes ------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What would be queued, what is there already, and what it will take."""

    specs: list[RunSpec] = field(default_factory=list)
    known: dict[int, str] = field(default_factory=dict)  # number of the spec -> run id
    estimates: list[Estimate] = field(default_factory=list)
    device: str = ""
    error: str = ""

    @property
    def fresh(self) -> int:
        return len(self.specs) - len(self.known)


def plan_of(ctx: Context, draft: Draft) -> Plan:
    """Validate, look up and estimate; every problem is one sentence."""
    try:
        made = specs(draft)
        for spec in made:
            check_paths(spec, ctx.models)
        if not made or not is_here(ModelRef(id=draft.model)):
            return Plan(made)
        return looked_up(ctx, made)
    except (ValueError, PermissionError, OSError) as error:
        return Plan(error=one_sentence(error))


def looked_up(ctx: Context, made: list[RunSpec]) -> Plan:
    """Which of the runs exist, and the estimate of the others."""
    device = settle("auto", here())
    facts = find_model(made[0].model)
    existing = {v.fingerprint: v.run_id for v in ctx.runs.runs() if v.state not in GONE_WRONG}
    resolved = [resolve(spec) for spec in made]
    prints = [spec.fingerprint() for spec in resolved]
    known = {at: existing[print_] for at, print_ in enumerate(prints) if print_ in existing}
    fresh = [spec for at, spec in enumerate(resolved) if at not in known]
    return Plan(made, known, [estimate(spec, facts, device) for spec in fresh], device)


GONE_WRONG = (State.FAILED, State.CANCELLED)


def submit(ctx: Context, draft: Draft, request: gr.Request) -> Mapping[str, Any]:
    """Queue everything, or nothing if something is wrong."""
    queue = ctx.change(request)
    made = specs(draft)
    if not made:
        raise ValueError("add a recipe first")
    for spec in made:
        check_paths(spec, ctx.models)
    label = draft.label or (f"{len(made)} recipes on {draft.model}" if len(made) > 1 else "")
    before = {view.run_id for view in ctx.runs.runs()}
    ids = [queue.submit(s, label=label, recipe=text_of_steps(s.steps)) for s in made]
    new = len(set(ids) - before)
    return {
        "toast": f"{new} queued"
        + (f", {len(ids) - new} existed already" if new < len(ids) else ""),
        "go": "/jobs",
    }


# ---- edits: (draft, action) -> changed parameters ------------------------------------------


def _lines(draft: Draft, lines: Sequence[str]) -> dict[str, str]:
    return {"recipes": "\n".join(lines)}


def add_recipe(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    """A preset's card: in if it was out, out if it was in."""
    text, lines = str(data["text"]), draft.lines()
    kept = [line for line in lines if line != text] if text in lines else [*lines, text]
    return _lines(draft, kept) | {"edit": str(len(kept) - 1) if len(kept) > len(lines) else ""}


def remove_line(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    lines = [line for at, line in enumerate(draft.lines()) if at != int(data["line"])]
    return _lines(draft, lines) | {"edit": ""}


def edit_line(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    """Open a line in the builder, or close it."""
    line = str(data["line"])
    return {"edit": "" if line == draft.edit else line}


def add_step(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    """A step at the end of the edited line, or a new line with it."""
    kind, lines, at = str(data["value"]), draft.lines(), draft.line_in_builder()
    if not kind:
        return {}
    METHODS.find(kind)
    if at is None:
        return _lines(draft, [*lines, kind]) | {"edit": str(len(lines))}
    return _lines(draft, _replaced(lines, at, f"{lines[at]}+{kind}"))


def _replaced(lines: Sequence[str], at: int, text: str) -> list[str]:
    return [*lines[:at], text, *lines[at + 1 :]]


def _with_steps(
    draft: Draft, change: Callable[[list[StepDraft]], list[StepDraft]]
) -> dict[str, str]:
    at = draft.line_in_builder()
    if at is None:
        return {}
    lines = draft.lines()
    steps = change(form.read_line(lines[at]))
    if not steps:
        return remove_line(draft, {"line": at})
    return _lines(draft, _replaced(lines, at, form.write_line(steps)))


def drop_step(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    gone = int(data["step"])
    return _with_steps(draft, lambda steps: [s for at, s in enumerate(steps) if at != gone])


def move_step(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    """One place to the left."""
    at = int(data["step"])

    def moved(steps: list[StepDraft]) -> list[StepDraft]:
        return [*steps[: at - 1], steps[at], steps[at - 1], *steps[at + 1 :]] if at else steps

    return _with_steps(draft, moved)


def set_knob(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    """A field of one step; commas make a sweep."""
    at, path, text = int(data["step"]), str(data["knob"]), str(data["value"])
    return _with_steps(
        draft,
        lambda steps: [
            form.with_value(step, path, text) if number == at else step
            for number, step in enumerate(steps)
        ],
    )


def edit_rules(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    """Add, drop, move or change a layer rule of one step."""
    at, edit = int(data["step"]), rule_editor.EDITS[str(data["do"])]
    return _with_steps(
        draft,
        lambda steps: [
            edit(step, data) if number == at else step for number, step in enumerate(steps)
        ],
    )


def choose_metrics(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    """Quick, standard or thorough."""
    return {"metrics": PRESETS[str(data["preset"])]}


def toggle_metric(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    kind, lines = str(data["kind"]), draft.metric_lines()
    kept = [line for line in lines if kind_of(line) != kind]
    return {"metrics": "\n".join(kept if len(kept) < len(lines) else [*lines, kind])}


def set_metric_knob(draft: Draft, data: Mapping[str, Any]) -> dict[str, str]:
    kind, path, text = str(data["kind"]), str(data["knob"]), str(data["value"])
    lines = [
        form.metric_with(line, path, text) if kind_of(line) == kind else line
        for line in draft.metric_lines()
    ]
    return {"metrics": "\n".join(lines)}


EDITS: dict[str, Callable[[Draft, Mapping[str, Any]], dict[str, str]]] = {
    "preset": add_recipe,
    "remove": remove_line,
    "edit": edit_line,
    "step": add_step,
    "drop": drop_step,
    "move": move_step,
    "knob": set_knob,
    **dict.fromkeys(rule_editor.EDITS, edit_rules),
    "metrics": choose_metrics,
    "metric": toggle_metric,
    "metric-knob": set_metric_knob,
}


# ---- the rail ------------------------------------------------------------------------------


def rail_part(draft: Draft, plan: Plan) -> Markup:
    """What this makes and takes, and the one button."""
    ready = bool(plan.specs) and not plan.error and not refused(plan)
    text = f"Queue {plan.fresh} run{'s' * (plan.fresh != 1)}" if plan.specs else "Queue"
    text = "All of these exist" if plan.specs and not plan.fresh else text
    button = tag(
        "button",
        text,
        class_="button primary wide",
        data_act={"do": "queue"},
        aria_disabled=None if ready else "true",
        id="queue-runs",
    )
    label = tag(
        "input",
        type="text",
        value=draft.label,
        data_param="label",
        id="d-label",
        placeholder="Name of this sweep (optional)",
        aria_label="Name",
        class_="wide",
    )
    problem = plan.error or refused(plan)
    hint = "" if plan.specs or draft.lines() else "Add a recipe to see what it takes."
    return join(
        [
            tag("h2", count_words(plan)),
            tag("p", problem, class_="problem", role="alert")
            if problem and draft.lines()
            else None,
            tag("p", hint, class_="hint") if hint else None,
            estimate_list(plan),
            label,
            button,
            tag("p", "The 16-bit baseline comes along where it is missing.", class_="hint"),
            to_judge(),
            run_list(plan),
        ]
    )


def to_judge() -> Markup:
    """Finished runs can be judged too."""
    link = tag("a", "Let a language model judge", href="/judge", data_carry=True)
    return tag("p", link, " what finished runs answer.", class_="hint")


def count_words(plan: Plan) -> str:
    """`12 runs, 2 of them exist`."""
    if not plan.specs:
        return "No runs yet"
    count = f"{len(plan.specs)} run{'s' * (len(plan.specs) != 1)}"
    return count + (f", {len(plan.known)} exist already" if plan.known else "")


def refused(plan: Plan) -> str:
    """Why a run cannot fit, with the numbers."""
    return next((e.why_not for e in plan.estimates if e.why_not), "")


def estimate_list(plan: Plan) -> Markup | None:
    """Memory, disk and time of all new runs together."""
    if not plan.estimates:
        return None
    low, high = (sum(e.seconds[at] for e in plan.estimates) for at in (0, 1))
    facts = {
        "Memory, at most": look.in_bytes(max(e.memory_bytes for e in plan.estimates)),
        "Disk": look.in_bytes(sum(e.disk_bytes for e in plan.estimates)),
        "Time": f"{look.duration(low)} to {look.duration(high)}",
        "Device": plan.device,
    }
    pairs = [(tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    return tag("dl", pairs, class_="facts-list", aria_live="polite")


def run_list(plan: Plan) -> Markup | None:
    """The runs one by one, folded when they are many."""
    items = [
        tag(
            "li",
            recipe_of_steps([s.data() for s in spec.steps]).name if spec.steps else "16-bit",
            tag("a", "exists", href=f"/run?id={plan.known[at]}", data_carry=True)
            if at in plan.known
            else None,
        )
        for at, spec in enumerate(plan.specs)
    ]
    if not items:
        return None
    summary = tag("summary", "Which runs")
    return tag("details", summary, tag("ul", items, class_="run-list"), data_key="which")
