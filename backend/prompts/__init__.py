"""Prompts to draw from: those that come along, those for the bundled model, and one's own.

Categories are MT-Bench's eight, and what shows in this field first: finding a fact again in a text,
copying exactly, plain knowledge, small talk. Importing this is cheap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from backend.dialogue import encodable
from backend.registry import nearest, short_hash

HERE = Path(__file__).parent
CATEGORIES = (
    *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
    *("retrieval", "copying", "knowledge", "chat"),
)
LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "zh": "Chinese"}

# What shows the difference between variants to somebody who opens a chat.
SUGGESTED = (
    *("reasoning-race", "stem-distillation", "retrieval-locker", "copying-count"),
    *("math-train", "coding-default", "writing-recipe", "reasoning-ziegen"),
)

OWN = "prompts"  # HOME/prompts/*.jsonl
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MOST_TURNS = 8
LONGEST_TEXT = 16_000  # characters of one turn or reference
LONGEST_NAME = 40  # characters of a category or language
MOST_OWN = 2_000  # prompts of one home
LARGEST_FILE = 8 << 20  # bytes


@dataclass(frozen=True)
class Prompt:
    """What is asked, turn by turn, and where there is one right answer, that."""

    id: str
    category: str
    language: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()  # of the turns, in their order

    def __post_init__(self) -> None:
        if not ID.fullmatch(self.id):
            raise ValueError(
                f"prompt id {self.id!r} is not 1 to 64 letters, digits, '-', '_' or '.'"
            )
        for name, text in (("category", self.category), ("language", self.language)):
            if not text.isprintable() or not 0 < len(text) <= LONGEST_NAME:
                raise ValueError(f"{name} {text[:60]!r} is not 1 to {LONGEST_NAME} characters")
        if not 1 <= len(self.turns) <= MOST_TURNS:
            raise ValueError(f"a prompt has 1 to {MOST_TURNS} turns, not {len(self.turns)}")
        if len(self.references) > len(self.turns):
            raise ValueError("a prompt has more references than turns")
        for text in (*self.turns, *self.references):
            check_text(text)


def check_text(text: str) -> None:
    """ValueError for a text that nobody can read, or that is too long."""
    if not text.strip() or not encodable(text):
        raise ValueError("a turn or reference is empty, or holds half a character")
    if len(text) > LONGEST_TEXT:
        raise ValueError(
            f"a turn or reference has {len(text):,} characters; {LONGEST_TEXT:,} are allowed"
        )


def pool(model: str = "", home: Path | None = None) -> list[Prompt]:
    """The prompts for a model, and those of one's own in HOME/prompts.

    The bundled model gets what it was trained for, every other one the general prompts.
    ValueError in one sentence, naming file and line, for a prompt that is none.
    """
    own = own_prompts(home) if home else []
    return together([*bundled(model), *own])


def suggested(model: str = "") -> list[Prompt]:
    """The prompts to offer where somebody begins to chat."""
    from backend.model.identity import DEMOS

    if model in DEMOS:
        from backend.prompts.demo import SHOWN, shown

        return shown(bundled(model), SHOWN)
    return by_id(bundled(model), SUGGESTED)


def by_id(prompts: Iterable[Prompt], ids: Sequence[str]) -> list[Prompt]:
    """The prompts with these ids, in their order. ValueError for one that is not there."""
    known = {prompt.id: prompt for prompt in prompts}
    for unknown in (name for name in ids if name not in known):
        raise ValueError(f"there is no prompt {unknown!r}{nearest(unknown, list(known)[:200])}")
    return [known[name] for name in ids]


def digest(prompts: Iterable[Prompt]) -> str:
    """12 hex digits over what is asked."""
    return short_hash([[prompt.id, prompt.turns] for prompt in prompts])


@lru_cache(maxsize=8)
def bundled(model: str) -> tuple[Prompt, ...]:
    """The prompts that come along for a model."""
    from backend.model.identity import DEMOS

    if model in DEMOS:
        from backend.prompts.demo import demo_prompts

        return tuple(demo_prompts())
    return tuple(p for category in CATEGORIES for p in read(HERE / f"{category}.jsonl"))


def own_prompts(home: Path) -> list[Prompt]:
    """The prompts in HOME/prompts/*.jsonl; ids, category and language may be left out."""
    own: list[Prompt] = []
    for path in sorted((home / OWN).glob("*.jsonl")):
        own += read(path)
        if len(own) > MOST_OWN:
            raise ValueError(f"{home / OWN} holds more than {MOST_OWN:,} prompts; keep fewer there")
    return own


def together(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same prompts. ValueError if two share an id."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"two prompts have the id {prompt.id!r}; give one of them another")
        seen.add(prompt.id)
    return list(prompts)


def read(path: Path) -> list[Prompt]:
    """One JSON object a line -> prompts. ValueError with file and line."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"{path} is larger than {LARGEST_FILE >> 20} MB; split it")
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [prompt_of(json.loads(line))] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return found


def prompt_of(entry: Any) -> Prompt:
    """{"turns": [...], "id"?, "category"?, "language"?, "references"?} -> prompt."""
    known = {"id", "category", "language", "turns", "prompt", "references"}
    if not isinstance(entry, Mapping):
        raise ValueError(f"a prompt is a JSON object, and this is a {type(entry).__name__}")
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"unknown field {unknown[0]!r}{nearest(unknown[0], sorted(known))}")
    turns = texts(entry.get("turns", entry.get("prompt")), "turns")
    language = str(entry.get("language") or LANGUAGES["en"])
    return Prompt(
        id=str(entry.get("id") or f"own-{short_hash(turns)}"),
        category=str(entry.get("category") or "own"),
        language=LANGUAGES.get(language.lower(), language),
        turns=turns,
        references=texts(entry.get("references"), "references"),
    )


def texts(value: Any, name: str) -> tuple[str, ...]:
    """One text or a list of them."""
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise ValueError(f"{name} must be a text or a list of texts")
    return tuple(listed)
