"""Grades from 1 to 10, one answer at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from backend.judges import JUDGES, prompts
from backend.judges.base import Answers, Game, Judge, Reading, Reply, Settled, Variant
from backend.prompts import Prompt

# ASCII digits: `\d` would take those of every script.
RATINGS = (re.compile(r"\[\[([0-9]+(?:\.[0-9]+)?)\]\]"), re.compile(r"\[([0-9]+(?:\.[0-9]+)?)\]"))
LOWEST, HIGHEST = 1.0, 10.0


@JUDGES.register
class Single(Judge):
    """MT-Bench's single-answer grading: every turn of every answer gets 1 to 10.

    arXiv 2306.05685, in own words. A known answer is shown where the question has one.
    """

    kind: ClassVar[str] = "single"
    slots: ClassVar = Judge.slots | {"answer", "conversation"}
    needed: ClassVar = (frozenset({"answer"}), frozenset({"conversation"}))
    prompt_default: ClassVar[str] = prompts.SINGLE
    later_default: ClassVar[str] = prompts.SINGLE_LATER

    skip_empty: bool = Field(True, description="Give empty answers 1 without asking.")

    def meetings(self, variants: Sequence[Variant]) -> list[tuple[Variant, ...]]:
        """Each on its own."""
        return [(variant,) for variant in variants]

    def games(self, question: Prompt, meeting: Sequence[Answers]) -> list[Game]:
        """One per turn."""
        turns = range(1, len(question.turns) + 1)
        return [Game(question, turn, tuple(meeting)) for turn in turns]

    def settle(self, game: Game) -> Settled | None:
        """Nothing said: the lowest grade."""
        if self.skip_empty and not game.answers()[0].strip():
            return Settled(Reading(score=LOWEST), "empty")
        return None

    def own_slots(self, game: Game, talks: list[list[str]], mark: str) -> dict[str, str]:
        """{answer} and {conversation}."""
        return {
            "answer": prompts.marked("answer", talks[0][-1], mark),
            "conversation": prompts.conversation(game.question.turns[: game.turn], talks[0], mark),
        }

    def read(self, reply: Reply) -> Reading:
        """The first grade in double brackets, else in single ones."""
        return rating(reply.said())


def rating(text: str) -> Reading:
    """`Rating: [[7.5]]` -> 7.5. Outside 1 to 10 it fails; the original takes any number."""
    found = next(filter(None, (pattern.search(text) for pattern in RATINGS)), None)
    if found is None:
        return Reading(failed="the reply holds no grade in brackets")
    score = float(found[1])
    if not LOWEST <= score <= HIGHEST:
        return Reading(failed=f"the grade {found[1]} is outside 1 to 10")
    return Reading(score=score)
