"""The questions of a judge job: the pool of prompts, or a file of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from backend.data import file_text, text_digest
from backend.prompts import LANGUAGES, Prompt, pool, texts, together
from backend.registry import short_hash, tuples
from backend.spec import Frozen

POOL = "pool"

# MT-Bench's temperatures (FastChat); reasoning wants the likeliest answer, writing a lively one.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7

# What MT-Bench and AlpacaEval call these fields; the first name is ours.
NAMES = {
    "id": ("id", "question_id"),
    "turns": ("turns", "instruction", "prompt"),
    "category": ("category", "dataset"),
    "language": ("language",),
    "references": ("references", "reference"),
}


class Questions(Frozen):
    """Which questions are put to the variants."""

    source: str = Field(
        POOL, description="pool: those that come along and HOME/prompts; or file:/path."
    )
    categories: tuple[str, ...] = Field((), description="Only these categories; none: all.")
    language: str = Field("", description="Only this language, such as English; empty: all.")
    limit: int = Field(0, ge=0, description="So many, spread evenly over the list; 0: all.")
    content: str = ""  # hash of the questions, filled in when submitted

    @field_validator("categories", mode="before")
    @classmethod
    def _a_list_is_a_tuple(cls, value: Any) -> Any:
        return tuples(value)

    def pinned(self, model: str, home: Path) -> Questions:
        """The same with the content they have now; a file that changes later is noticed."""
        source = self.source
        if source.startswith("file:") and "#" not in source:
            source = f"{source}#{text_digest(source)}"
        chosen = self.model_copy(update={"source": source}).load(model, home)
        return self.model_copy(update={"source": source, "content": digest(chosen)})

    def load(self, model: str, home: Path) -> list[Prompt]:
        """The questions for a model. ValueError where there are none, or others than pinned."""
        every = pool(model, home) if self.source == POOL else from_text(self.text())
        chosen = [question for question in every if self.takes(question)]
        if not chosen:
            raise ValueError(f"no question is left{self.choice()}; {categories_told(every)}")
        if self.limit and self.limit < len(chosen):
            chosen = [chosen[i * len(chosen) // self.limit] for i in range(self.limit)]
        if self.content and digest(chosen) != self.content:
            raise ValueError("the questions have changed since the job was submitted; submit again")
        return chosen

    def text(self) -> str:
        """Of a file."""
        if not self.source.startswith("file:"):
            raise ValueError(f"questions come from {POOL!r} or 'file:/path', not {self.source!r}")
        return file_text(self.source)

    def takes(self, question: Prompt) -> bool:
        """True for the categories and the language asked for."""
        right = not self.language or question.language == self.language
        return right and (not self.categories or question.category in self.categories)

    def choice(self) -> str:
        """What was asked for, as the end of a sentence."""
        asked = [*self.categories, *filter(None, [self.language])]
        return f" for {', '.join(asked)}" if asked else ""


def from_text(text: str) -> list[Prompt]:
    """JSON lines or one JSON list -> questions. ValueError names the entry that is none."""
    found = []
    for number, entry in enumerate(entries(text), 1):
        try:
            found.append(question_of(entry, number))
        except ValueError as error:
            raise ValueError(f"question {number}: {error}") from None
    return together(found)


def entries(text: str) -> list[Any]:
    """The objects in a file."""
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"the questions are neither JSON lines nor a JSON list: {error}") from None


def question_of(entry: Any, number: int) -> Prompt:
    """One entry under our names, MT-Bench's or AlpacaEval's; its number where it has no id."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"it is a {type(entry).__name__}, not an object")
    given = {
        name: next((entry[n] for n in names if entry.get(n) is not None), None)
        for name, names in NAMES.items()
    }
    language = str(given["language"] or "en")
    return Prompt(
        id=str(given["id"] if given["id"] is not None else number),
        category=str(given["category"] or "own"),
        language=LANGUAGES.get(language.lower(), language),
        turns=texts(given["turns"], "turns"),
        references=texts(given["references"], "references"),
    )


def categories_told(questions: Sequence[Prompt]) -> str:
    """What there is, for an error."""
    names = sorted({question.category for question in questions if question.category})
    return f"there are the categories {', '.join(names)}" if names else "the list is empty"


def digest(questions: Sequence[Prompt]) -> str:
    """12 hex digits over ids, texts and references."""
    return short_hash([[q.id, q.turns, q.category, q.language, q.references] for q in questions])


def temperature_of(category: str) -> float:
    """What MT-Bench samples the answers to a category with."""
    return TEMPERATURES.get(category, OTHER_TEMPERATURE)
