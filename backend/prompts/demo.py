"""Prompts for the bundled model: held-out exercises of its skills, and what else it was taught."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from backend.demo import tasks_folder
from backend.demo.words import TERMS
from backend.prompts import HERE, LANGUAGES, Prompt, read
from backend.registry import short_hash

PER_SKILL = 12
MARKUP = re.compile(r"<\|\w+\|>")
CATEGORY = {  # of each skill; knowledge for the others
    **dict.fromkeys(("addition", "subtraction", "comparison"), "math"),
    **dict.fromkeys(("whereabouts", "race", "lists"), "reasoning"),
    **dict.fromkeys(("codes", "long_codes"), "retrieval"),
    "backwards": "copying",
}

# Beginnings of ids; the first prompt with each is shown.
SHOWN = (
    *("demo-hello", "demo-race-third", "demo-term-knowledge-distillation", "demo-codes-"),
    *("demo-whereabouts-", "demo-addition-", "demo-backwards-", "demo-story-dragon"),
)


def demo_prompts() -> list[Prompt]:
    """Written ones, terms of this field, then exercises with one right answer."""
    tasks = sorted(tasks_folder().glob("*.jsonl"))
    return [*read(HERE / "demo.jsonl"), *terms(), *(p for path in tasks for p in exercises(path))]


def terms() -> list[Prompt]:
    """Terms that the model can explain, with the explanation it was taught."""
    return [
        Prompt(f"demo-term-{slug(term)}", "stem", LANGUAGES["en"], (f"What is {term}?",), (told,))
        for term, told in TERMS.items()
    ]


def exercises(path: Path) -> Iterator[Prompt]:
    """The first held-out exercises of a skill, without the markup of the chat template."""
    lines = path.read_text(encoding="utf-8").splitlines()[:PER_SKILL]
    for item in map(json.loads, lines):
        said = [text.strip() for text in MARKUP.split(item["prompt"]) if text.strip()]
        if len(said) > 1:
            continue  # a later turn of a dialogue: without the earlier ones it asks nothing
        name = f"demo-{path.stem}-{short_hash(said)[:6]}"
        category = CATEGORY.get(path.stem, "knowledge")
        yield Prompt(name, category, LANGUAGES["en"], (said[0],), (item["answer"].strip(),))


def shown(prompts: Sequence[Prompt], beginnings: Sequence[str]) -> list[Prompt]:
    """For each beginning of an id the first prompt that has it, if there is one."""
    firsts = (next((p for p in prompts if p.id.startswith(b)), None) for b in beginnings)
    return [prompt for prompt in firsts if prompt is not None]


def slug(term: str) -> str:
    """`the KV cache` -> kv-cache."""
    words = re.findall(r"[a-z0-9]+", term.lower())
    return "-".join(word for word in words if word not in ("a", "an", "the"))
