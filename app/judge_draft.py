"""A draft of a judge job: what the Judge page holds, in the URL, and the job it would submit."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from app import form
from app.draft import check_paths, one_sentence, whole
from app.form import Widget
from backend.judges import JUDGES, Judge
from backend.judges.endpoint import KEY_NAME, Endpoint
from backend.judges.questions import POOL
from backend.judges.spec import JudgeSpec
from backend.recipes import read_calls
from backend.spec import RunSpec

PROMPTS = {"system": "System text", "prompt": "Prompt", "later": "Prompt for later turns"}
LONGEST_PROMPT = 4_000  # characters of an own prompt: it travels in the address
USUAL_QUESTIONS = "20"
NO_KEY = "none"  # in the address: "" would be the default
OTHER_RUN, OTHER_ENDPOINT = "local", "endpoint"


@dataclass(frozen=True)
class JudgeDraft:
    """Every field is one URL parameter, as text."""

    model: str = ""
    runs: str = ""  # ~ between them; "": every finished one
    style: str = "single"  # with knobs, as in pairwise(against=all)
    by: str = OTHER_ENDPOINT  # or local
    name: str = ""  # of the judge model at its endpoint
    url: str = str(Endpoint.model_fields["base_url"].default)
    key: str = str(Endpoint.model_fields["key_variable"].default)  # a variable's name, or none
    by_run: str = ""  # whose model judges, for local
    system: str = ""
    prompt: str = ""
    later: str = ""
    questions: str = ""  # file of one's own; "": the pool
    category: str = ""  # ~ between them
    language: str = ""
    limit: str = USUAL_QUESTIONS
    max_new: str = "512"
    temperature: str = ""
    seed: str = "0"
    max_requests: str = "2000"
    per_minute: str = "0"
    concurrency: str = "4"
    prompt_price: str = ""
    reply_price: str = ""
    max_cost: str = ""
    device: str = "auto"
    dtype: str = "auto"
    agreed: str = ""  # fingerprint of the job that was looked at last before it starts

    @classmethod
    def read(cls, query: Mapping[str, Any]) -> JudgeDraft:
        """URL parameters -> draft. What is no variable's name is not kept: it may be a key."""
        given = {f.name: str(query[f.name]) for f in fields(cls) if f.name in query}
        if not is_key_name(given.get("key", "")):
            given.pop("key", None)
        return cls(**given)

    def changed(self, **changes: str) -> dict[str, str]:
        """URL parameters after a change: "" removes one."""
        return {n: "" if v == getattr(JudgeDraft, n) else v for n, v in changes.items()}

    @property
    def kind(self) -> str:
        """Of the way of judging, without its knobs."""
        return self.style.partition("(")[0].strip()

    @property
    def chosen(self) -> tuple[str, ...]:
        """Runs by id; none: all that are finished."""
        return words(self.runs)


def words(text: str) -> tuple[str, ...]:
    """`a~b` -> a, b."""
    return tuple(part for part in text.split("~") if part)


def is_key_name(text: str) -> bool:
    """True for `none` and for what the name of a variable with a key can look like."""
    return text == NO_KEY or KEY_NAME.fullmatch(text) is not None


def key_names() -> list[str]:
    """Names, never values, of variables of this program's environment that may hold a key."""
    return sorted(name for name in os.environ if KEY_NAME.fullmatch(name))


# ---- the way of judging and its knobs ------------------------------------------------------


def read_style(text: str) -> Judge:
    """`pairwise(against=all)` -> the judge. ValueError in one sentence."""
    return JUDGES.build(one_call(text))


def one_call(text: str) -> dict[str, Any]:
    """`pairwise(against=all)` -> {"kind": "pairwise", "against": "all"}."""
    calls = read_calls(text)
    if len(calls) != 1:
        raise ValueError("choose one way of judging")
    return calls[0]


def knobs(kind: str) -> list[Widget]:
    """Fields of a way of judging, without its prompts, which have boxes of their own."""
    return [w for w in form.widgets(JUDGES.find(kind)) if w.path not in PROMPTS]


def style_with(text: str, path: str, value: str) -> str:
    """A way of judging with one knob set; those at their defaults are left out."""
    judge = read_style(text)
    by_path = {widget.path: widget for widget in knobs(judge.kind)}
    if path not in by_path:
        raise ValueError(f"{judge.kind} has no setting {path!r}")
    form.value_of(by_path[path], value)
    values = form.values_of(judge) | {path: value.strip()}
    changed = [
        f"{p}={form.recipe_text(w, values[p])}"
        for p, w in by_path.items()
        if values[p] != w.default
    ]
    text = f"{judge.kind}({','.join(changed)})" if changed else judge.kind
    read_style(text)
    return text


# ---- the job -------------------------------------------------------------------------------


def spec_of(draft: JudgeDraft, folders: Iterable[Path]) -> JudgeSpec:
    """The job, unresolved. ValueError or PermissionError in one sentence for the first problem."""
    name, _, revision = draft.model.partition("@")
    own = {field: getattr(draft, field) for field in PROMPTS if getattr(draft, field).strip()}
    if too_long := [PROMPTS[field] for field, text in own.items() if len(text) > LONGEST_PROMPT]:
        raise ValueError(
            f"{too_long[0]} is longer than the {LONGEST_PROMPT:,} characters that an address holds;"
            " give it to `quantarena judge` as a file"
        )
    given = {
        "model": {"id": name, "revision": revision, "dtype": draft.dtype},
        "runs": draft.chosen,
        "judge": one_call(draft.style) | own,
        "judge_model": judge_model(draft),
        "questions": {
            "source": f"file:{draft.questions.strip()}" if draft.questions.strip() else POOL,
            "categories": words(draft.category),
            "language": draft.language,
            "limit": whole("number of questions", draft.limit or "0"),
        },
        "answers": {
            "max_new": whole("tokens of an answer", draft.max_new),
            "temperature": number("temperature", draft.temperature),
            "seed": whole("seed", draft.seed),
        },
        "limits": {
            "max_requests": whole("most requests", draft.max_requests),
            "per_minute": whole("requests a minute", draft.per_minute),
            "concurrency": whole("requests at once", draft.concurrency),
            "prompt_price": number("price of prompt tokens", draft.prompt_price),
            "completion_price": number("price of reply tokens", draft.reply_price),
            "max_cost": number("most money", draft.max_cost),
        },
    }
    try:
        spec = JudgeSpec.model_validate(given)
    except ValueError as error:
        raise ValueError(one_sentence(error)) from None
    check_files(spec, folders)
    return spec


def judge_model(draft: JudgeDraft) -> dict[str, Any]:
    """Who judges, as the spec has it."""
    if draft.by == OTHER_RUN:
        if not draft.by_run:
            raise ValueError("choose the run whose model judges")
        return {"kind": "local", "run": draft.by_run}
    if not draft.name.strip():
        raise ValueError("name the model that judges, as its endpoint calls it")
    variable = "" if draft.key == NO_KEY else draft.key
    place = {"model": draft.name.strip(), "base_url": draft.url, "key_variable": variable}
    return {"kind": "endpoint", **place}


def check_files(spec: JudgeSpec, folders: Iterable[Path]) -> None:
    """PermissionError if model or questions come from a folder that the server may not read."""
    source = spec.questions.source
    data = {"dataset": source} if source != POOL else {}
    check_paths(RunSpec.model_validate({"model": spec.model, "calibration": data}), folders)


def number(name: str, text: str) -> float | None:
    """A field of the page that may be empty or must be a number."""
    try:
        return float(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"{name} takes a number, not {text!r}") from None


# ---- the same without a browser ------------------------------------------------------------

FLAGS = {  # field of the draft -> flag of the command
    "limit": "--limit",
    "max_new": "--max-new",
    "temperature": "--temperature",
    "seed": "--seed",
    "max_requests": "--max-requests",
    "per_minute": "--per-minute",
    "concurrency": "--concurrency",
    "max_cost": "--max-cost",
    "device": "--device",
    "dtype": "--dtype",
}
USUAL = {"limit": "0", "questions": ""}  # of the command, where they differ from the page's


def command_line(draft: JudgeDraft) -> str:
    """The command that does the same, defaults left out; own prompts go there as files."""
    parts = ["quantarena", "judge", "--model", draft.model, "--style", draft.style]
    if draft.by == OTHER_RUN:
        parts += ["--judge-run", draft.by_run]
    else:
        parts += ["--judge", draft.name]
        parts += ["--endpoint", draft.url] if draft.url != JudgeDraft.url else []
        variable = "" if draft.key == NO_KEY else draft.key
        parts += ["--key-variable", variable] if draft.key != JudgeDraft.key else []
    parts += ["--runs", *draft.chosen] if draft.chosen else []
    parts += ["--questions", draft.questions] if draft.questions.strip() else []
    parts += [part for name in words(draft.category) for part in ("--category", name)]
    for field, flag in FLAGS.items():
        value, usual = getattr(draft, field), USUAL.get(field, getattr(JudgeDraft, field))
        parts += [flag, value] if value and value != usual else []
    if draft.prompt_price and draft.reply_price:
        parts += ["--prices", draft.prompt_price, draft.reply_price]
    parts += [
        p for field in PROMPTS if getattr(draft, field) for p in (f"--{field}", f"{field}.txt")
    ]
    return shlex.join(parts)
