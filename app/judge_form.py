"""The form of the Judge page as HTML: variants, judge, questions; and the rail beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from app import look
from app.builder import block, field_row
from app.context import Context
from app.form import values_of
from app.judge_draft import (
    LONGEST_PROMPT,
    NO_KEY,
    OTHER_ENDPOINT,
    OTHER_RUN,
    PROMPTS,
    JudgeDraft,
    key_names,
    knobs,
    read_style,
    words,
)
from app.judge_plan import JudgePlan, agreement
from app.markup import join, tag
from app.sides import Variant, variants
from backend.judges import JUDGES
from backend.prompts import LANGUAGES, pool

NAMES = {
    "single": "Grades, 1 to 10",
    "pairwise": "Pairs, each in both orders",
    "preference": "Preference, from one letter",
}
ADDRESSES = (
    "https://api.openai.com/v1",
    "http://127.0.0.1:8000/v1",
    "http://127.0.0.1:11434/v1",
)


def blocks(ctx: Context, draft: JudgeDraft) -> Markup:
    """Variants, judge, questions."""
    known = variants(ctx.store, draft.model)
    title = tag("h1", "Let a language model judge")
    about = tag(
        "p",
        "A judge grades the answers of your variants or compares them two by two. Its verdicts are "
        "kept as it gave them, and counted apart from people's votes.",
        class_="muted",
    )
    parts = [variants_block(draft, known), judge_block(draft, known), style_block(draft)]
    return join([title, about, *parts, questions_block(ctx, draft)])


def nobody(draft: JudgeDraft) -> Markup:
    """No finished run of the model."""
    link = tag("a", "New run", href="/new", class_="button primary", data_carry=True)
    words_ = [
        tag("h1", "A judge needs finished variants."),
        tag("p", f"There is no finished run of {draft.model or 'any model'} to judge yet."),
        tag("p", link),
    ]
    return tag("div", tag("div", words_, class_="words"), class_="empty-state single")


# ---- blocks --------------------------------------------------------------------------------


def variants_block(draft: JudgeDraft, known: Sequence[Variant]) -> Markup:
    """Which variants are judged; the first is what the others are compared with."""
    on = draft.chosen or tuple(variant.run_id for variant in known)
    chips = []
    for variant in known:
        has = variant.run_id in on
        rest = [v for v in on if v != variant.run_id] if has else [*on, variant.run_id]
        every = len(rest) == len(known)
        chips.append(
            tag(
                "button",
                variant.mark,
                variant.name,
                class_="chip",
                aria_pressed=str(has).lower(),
                data_set={"runs": "" if every or not rest else "~".join(rest)},
            )
        )
    first = next((v.name for v in known if v.run_id == on[0]), on[0]) if on else ""
    words_ = f"{len(on)} chosen. Where pairs meet one variant, they meet {first}, chosen first."
    return block(1, "Variants", tag("div", chips, class_="chips"), tag("p", words_, class_="hint"))


def judge_block(draft: JudgeDraft, known: Sequence[Variant]) -> Markup:
    """Who judges: another program's model, or a run of this home."""
    choices = {OTHER_ENDPOINT: "A model behind an endpoint", OTHER_RUN: "One of your runs"}
    tabs = [
        tag(
            "button",
            title,
            class_="chip",
            aria_pressed=str(draft.by == name).lower(),
            data_set={"by": "" if name == OTHER_ENDPOINT else name},
        )
        for name, title in choices.items()
    ]
    fields = local_fields(draft, known) if draft.by == OTHER_RUN else endpoint_fields(draft)
    return block(
        2, "Judge", tag("div", tabs, class_="chips"), tag("div", fields, class_="fields plain")
    )


def endpoint_fields(draft: JudgeDraft) -> list[Markup]:
    """Address, model, and the name of the variable with the key. The key itself is never asked."""
    listed = tag("datalist", [tag("option", value=url) for url in ADDRESSES], id="j-addresses")
    address = box("url", draft.url, "Endpoint", "Address up to, without, /chat/completions. Any "
                  "program that speaks OpenAI's protocol.", list="j-addresses")  # fmt: skip
    name = box("name", draft.name, "Model", "Name the endpoint knows it by.")
    return [join([address, listed]), name, key_field(draft)]


def key_field(draft: JudgeDraft) -> Markup:
    """A list of names: nobody can type a key into it."""
    here = key_names()
    names = [*dict.fromkeys([*here, JudgeDraft.key, draft.key])]
    options = [
        tag("option", name if name in here else f"{name} (not set here)", value=name,
            selected=name == draft.key)
        for name in names
        if name != NO_KEY
    ]  # fmt: skip
    options.append(tag("option", "no key is sent", value=NO_KEY, selected=draft.key == NO_KEY))
    select = tag("select", options, id="j-key", data_param="key", aria_describedby="j-key-help")
    about = (
        "Variable of this server's environment that holds the key. The key is read when the judge "
        "is asked; it is never shown, stored or logged. Names end in API_KEY."
    )
    return labelled("key", "Key from", select, about)


def local_fields(draft: JudgeDraft, known: Sequence[Variant]) -> list[Markup]:
    """Which run judges."""
    options = [tag("option", "choose…", value="", selected=not draft.by_run)]
    options += [
        tag("option", v.name, value=v.run_id, selected=v.run_id == draft.by_run) for v in known
    ]
    select = tag("select", options, id="j-by_run", data_param="by_run",
                 aria_describedby="j-by_run-help")  # fmt: skip
    about = (
        "No key and no cost, and only as good as its model: a small model hardly tells good from "
        "bad, and one of the judged family favours its own."
    )
    return [labelled("by_run", "Run", select, about)]


def style_block(draft: JudgeDraft) -> Markup:
    """How it judges, with the knobs of that way and own prompts."""
    cards = [
        tag(
            "button",
            tag("b", NAMES.get(kind, kind)),
            tag("small", cls.summary()),
            class_="preset",
            aria_pressed=str(kind == draft.kind).lower(),
            data_set={"style": "" if kind == JudgeDraft.style else kind},
            data_key=f"style-{kind}",
        )
        for kind, cls in JUDGES.load().items()
    ]
    try:
        judge = read_style(draft.style)
    except ValueError as error:
        wrong = tag("p", str(error), class_="problem", role="alert")
        return block(3, "Way of judging", tag("div", cards, class_="cards"), wrong)
    values = values_of(judge)
    rows = [
        field_row(
            widget,
            values[widget.path],
            {"do": "knob", "knob": widget.path},
            "j",
            changed=values[widget.path] != widget.default,
        )
        for widget in knobs(judge.kind)
    ]
    settings = fold("Settings", "style", tag("div", rows, class_="fields"))
    reference = tag(
        "p",
        "Where a question has a known answer, the judge is shown it as a reference.",
        class_="hint",
    )
    own = fold("Own prompts", "own", own_prompts(draft))
    return block(3, "Way of judging", tag("div", cards, class_="cards"), reference, settings, own)


def own_prompts(draft: JudgeDraft) -> Markup:
    """Boxes for the judge's texts, with the slots there are and ours as the example."""
    judge = read_style(draft.style)
    ours = {
        "system": judge.system_default,
        "prompt": judge.prompt_default,
        "later": judge.later_default,
    }
    slots = ", ".join(f"{{{slot}}}" for slot in sorted(judge.slots))
    boxes = [
        tag(
            "div",
            tag("label", title, for_=f"j-{field}"),
            tag(
                "textarea",
                getattr(draft, field),
                id=f"j-{field}",
                data_param=field,
                rows=4,
                maxlength=LONGEST_PROMPT,
                placeholder=ours[field],
                spellcheck="false",
                class_="wide mono",
            ),
            class_="field",
        )
        for field, title in PROMPTS.items()
    ]
    about = tag("p", f"Slots: {slots}. Empty: ours, which stands in grey.", class_="hint")
    return tag("div", about, boxes, class_="own-prompts")


def questions_block(ctx: Context, draft: JudgeDraft) -> Markup:
    """Which questions, how many, how they are answered, and the limits."""
    asked = pool(draft.model.partition("@")[0], ctx.home)
    counts: dict[str, int] = {}
    for prompt in asked:
        counts[prompt.category] = counts.get(prompt.category, 0) + 1
    on = words(draft.category)
    chips = []
    for name, count in sorted(counts.items()):
        rest = [c for c in on if c != name] if name in on else [*on, name]
        chips.append(
            tag(
                "button",
                name,
                tag("small", count),
                class_="chip",
                aria_pressed=str(name in on).lower(),
                data_set={"category": "~".join(rest)},
            )
        )
    spoken = sorted({prompt.language for prompt in asked} | set(LANGUAGES.values()))
    languages = [tag("option", "all", value="", selected=not draft.language)] + [
        tag("option", name, value=name, selected=name == draft.language) for name in spoken
    ]
    select = tag("select", languages, id="j-language", data_param="language")
    fields = [
        box("limit", draft.limit, "Number of questions", "Spread evenly over the list; 0: all.",
            inputmode="numeric"),
        labelled("language", "Language", select, "Of the questions."),
        box("questions", draft.questions, "Own questions", "A file of this machine, an object a "
            "line or one JSON list, as MT-Bench and AlpacaEval have them; empty: those that come "
            "along.", placeholder="/path/to/questions.jsonl"),
    ]  # fmt: skip
    group = tag("div", chips, class_="chips", role="group", aria_label="Categories")
    limits = tag("div", limit_fields(draft), class_="fields")
    more = fold("Answers, limits and prices", "more", limits)
    return block(4, "Questions", group if not draft.questions else None,
                 tag("div", fields, class_="fields plain"), more)  # fmt: skip


LIMITS: Sequence[tuple[str, str, str]] = (
    ("max_new", "Tokens of an answer", "At most."),
    ("temperature", "Temperature of answers", "Empty: by category, as MT-Bench does."),
    ("seed", "Seed of answers", "Where they are sampled."),
    ("prompt_price", "Price of prompt tokens", "Of a million, to count what it costs."),
    ("reply_price", "Price of reply tokens", "Of a million."),
    ("max_cost", "Most money", "Ends the job, in the prices' currency; needs both prices."),
    ("max_requests", "Most requests", "Repeated ones included."),
    ("per_minute", "Requests a minute", "0: as fast as it answers."),
    ("concurrency", "Requests at once", "1 to 64."),
    ("device", "Device", "Where the variants answer: auto, cpu, cuda or cuda:N."),
    ("dtype", "dtype", "That of the runs."),
)


def limit_fields(draft: JudgeDraft) -> list[Markup]:
    """Everything that decides how long and for how much, and how answers are drawn."""
    return [box(name, getattr(draft, name), title, about) for name, title, about in LIMITS]


def box(name: str, value: str, title: str, about: str, **more: Any) -> Markup:
    """A labelled text box that is one URL parameter."""
    field = tag("input", type="text", value=value, id=f"j-{name}", data_param=name,
                spellcheck="false", autocomplete="off", aria_describedby=f"j-{name}-help",
                **more)  # fmt: skip
    changed = value != getattr(JudgeDraft, name) and bool(value)
    return labelled(name, title, field, about, changed=changed)


def labelled(name: str, title: str, field: Markup, about: str, *, changed: bool = False) -> Markup:
    """A field with its label above and its help below."""
    return tag(
        "div",
        tag("label", title, for_=f"j-{name}"),
        field,
        tag("p", about, id=f"j-{name}-help"),
        class_="field changed" if changed else "field",
        data_key=f"j-{name}-field",
    )


def fold(title: str, key: str, *children: Any) -> Markup:
    """What most people leave alone."""
    return tag("details", tag("summary", title), children, data_key=f"j-fold-{key}")


# ---- the rail ------------------------------------------------------------------------------


def rail(draft: JudgeDraft, plan: JudgePlan, line: Markup) -> Markup:
    """What it takes, and the button; then the question whether to start."""
    if plan.error or plan.needed is None:
        button = tag("button", "Start judging", class_="button primary wide", aria_disabled="true")
        why = tag("p", plan.error, class_="problem", role="alert")
        return join([tag("h2", "Not ready yet"), why, button])
    parts = [tag("h2", f"{look.whole(plan.needed.requests)} requests"), facts(plan)]
    if plan.run_id:
        link = tag("a", "Its results", href=f"/judge?id={plan.run_id}", data_carry=True)
        parts.append(tag("p", "This very job exists already. ", link, class_="hint"))
    elif draft.agreed == plan.key:
        parts.append(question(plan))
    else:
        parts.append(
            tag("button", "Start judging", class_="button primary wide", data_act={"do": "ask"})
        )
        parts.append(tag("p", "You are asked once more before anything is sent.", class_="hint"))
    parts.append(fold("The same on the command line", "line", line))
    return join(parts)


def question(plan: JudgePlan) -> Markup:
    """What starts, where it goes, what it costs; yes or no."""
    lines = [tag("p", line) for line in agreement(plan)]
    yes = tag("button", "Yes, start", class_="button primary",
              data_act={"do": "start", "agreed": plan.key})  # fmt: skip
    no = tag("button", "No", class_="button", data_set={"agreed": ""})
    row = tag("div", yes, no, class_="row")
    return tag("div", tag("b", "Start?"), lines, row, class_="confirm", role="alertdialog",
               aria_label="Start judging?")  # fmt: skip


def facts(plan: JudgePlan) -> Markup:
    """Answers, tokens, money and time, at most."""
    needed = plan.needed
    assert needed is not None
    low, high = plan.seconds
    told = "as its replies took so far" if plan.known_s else "if a reply takes 1 to 15 s"
    pairs: Mapping[str, Any] = {
        "Answers of variants": look.whole(plan.answers),
        "Requests to the judge": look.whole(needed.requests),
        "Prompt tokens, about": look.whole(needed.prompt_tokens),
        "Reply tokens, at most": look.whole(needed.completion_tokens),
        "Cost": "nothing" if plan.free else "no prices given"
        if needed.cost is None else f"at most {needed.cost:.2f}",
        "Time of judging": f"{look.duration(low)} to {look.duration(high)}",
    }  # fmt: skip
    listed = [(tag("dt", name), tag("dd", value)) for name, value in pairs.items()]
    note = tag("p", f"Time: {told}; the variants' answers come before.", class_="hint")
    return join([tag("dl", listed, class_="facts-list", aria_live="polite"), note])
