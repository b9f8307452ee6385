"""What a kind of method or format is: its section of docs/methods.md, which the wheel carries too.

A section begins with "### `kind`: title". Its first paragraph is the idea, code spans with " = "
are its formulas, and "Cost: ..." up to the full stop is what it takes on an 8B model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from markupsafe import Markup

from app.answer_text import markdown
from app.look import family_colour
from app.markup import join, tag
from app.recipe_words import kind_name
from backend.formats import FORMATS
from backend.methods import METHODS
from backend.recipes import parse, presets
from backend.registry import Part

SECTIONS = Path(__file__).parent / "static" / "methods.md"  # a link to docs/methods.md
HEADING = re.compile(r"^### `(\w+)`(?:: *(.*))?$", re.MULTILINE)
NEXT = re.compile(r"^#{2,3} ", re.MULTILINE)
FORMULA = re.compile(r"`([^`]* = [^`]*)`")
EXPRESSION = re.compile(r"`([^`]*(?:\^|\|\w\|)[^`]*)`")  # what a section without formulas has
MOST_FORMULAS = 4  # on top; the text has them all
COST = re.compile(r"Cost: ([^.;]+(?:\.\d[^.;]*)*)[.;]")


@dataclass(frozen=True)
class Explanation:
    """One section."""

    title: str
    text: str  # markdown

    @property
    def formulas(self) -> list[str]:
        """Each once, in their order."""
        found = FORMULA.findall(self.text) or EXPRESSION.findall(self.text)
        return list(dict.fromkeys(" ".join(formula.split()) for formula in found))

    @property
    def cost(self) -> str:
        """`seconds`, `minutes, ...`; "" where the section does not say."""
        found = COST.search(" ".join(self.text.split()))
        return found[1].replace("`", "") if found else ""


@lru_cache(maxsize=1)
def explanations() -> dict[str, Explanation]:
    """{kind: its section}."""
    text = SECTIONS.read_text(encoding="utf-8")
    found: dict[str, Explanation] = {}
    for heading in HEADING.finditer(text):
        end = NEXT.search(text, heading.end())
        body = text[heading.end() : end.start() if end else None].strip()
        found[heading[1]] = Explanation(heading[2] or "", body)
    return found


def part_named(kind: str) -> type[Part]:
    """The method or else the format of this kind."""
    return METHODS.load().get(kind) or FORMATS.find(kind)


def about(kind: str) -> Markup:
    """Idea, formulas, cost and details of one kind; its docstring where it has no section."""
    told = explanations().get(kind)
    if told is None:
        return tag("p", part_named(kind).summary())
    facts = [
        (tag("dt", "Cost on an 8B model"), tag("dd", told.cost)) if told.cost else None,
        [(tag("dt", "Formula" if not at else ""), tag("dd", tag("code", formula)))
         for at, formula in enumerate(told.formulas[:MOST_FORMULAS])],
    ]  # fmt: skip
    listed = tag("dl", facts, class_="formula")
    return tag("div", listed, markdown(joined(told.text)), class_="learn-about")


def joined(text: str) -> str:
    """Markdown with its wrapped lines joined: the renderer keeps line breaks, as chat needs."""
    return re.sub(r"(?<!\n)\n(?!\n|- |\||#)", " ", text)


def heading_of(kind: str) -> Markup:
    """The kind's name with its colour, and its section's title."""
    told = explanations().get(kind)
    dot = tag("i", class_="dot", style=f"background:{family_colour(kind)}")
    return join([dot, " ", kind_name(kind), tag("small", told.title if told else "")])


def presets_of(kind: str) -> dict[str, str]:
    """The presets whose first step, or whose first step's grid, is of this kind."""
    return {name: text for name, text in presets().items() if kind in kinds_of(text)}


@lru_cache(maxsize=512)
def kinds_of(recipe: str) -> tuple[str, str]:
    """Kind of the first step, and of its grid."""
    first = parse(recipe)[0]
    grid = getattr(first, "format", None)
    return first.kind, grid.kind if grid is not None else ""
