"""Which of two answers is better, each pair judged in both orders."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from backend.judges import JUDGES, prompts
from backend.judges.base import (
    FIRST,
    SECOND,
    TIE,
    Answers,
    Game,
    Judge,
    Reading,
    Reply,
    Settled,
    Variant,
)
from backend.prompts import Prompt
from backend.registry import short_hash

VERDICT = re.compile(r"\[\[([ABC])\]\]")
TWO_SCORES = re.compile(r"\[\[([0-9]+(?:\.[0-9]+)?)\s*,\s*([0-9]+(?:\.[0-9]+)?)\]\]")
CLOSE = 0.1  # scores that differ by no more are a tie
MEANING = {"A": FIRST, "B": SECOND, "C": TIE}


class PairJudge(Judge):
    """What ways of comparing two answers share: who meets whom, in which order, and the slots."""

    sides: ClassVar[int] = 2
    slots: ClassVar = Judge.slots | {"answer_a", "answer_b", "conversation_a", "conversation_b"}
    needed: ClassVar = (
        frozenset({"answer_a", "answer_b"}),
        frozenset({"conversation_a", "conversation_b"}),
    )

    against: Literal["first", "all"] = Field(
        "first", description="first: all others meet the first variant; all: every pair meets."
    )
    swap: bool = Field(True, description="Judge in both orders; else in one order that is drawn.")
    skip_empty: bool = Field(True, description="An empty answer loses without asking.")
    skip_identical: bool = Field(True, description="Identical answers tie without asking.")
    seed: int = Field(0, ge=0, description="Draws the order where each pair is judged once.")

    def meetings(self, variants: Sequence[Variant]) -> list[tuple[Variant, ...]]:
        """The first variant with each other one, or every pair."""
        if len(variants) < 2:
            raise ValueError(f"{self.kind}: comparing needs two runs or more, and there is one")
        if self.against == "first":
            return [(variants[0], other) for other in variants[1:]]
        return list(itertools.combinations(variants, 2))

    def games(self, question: Prompt, meeting: Sequence[Answers]) -> list[Game]:
        """Each turn in both orders, or in the one that the seed draws for it."""
        pair = tuple(meeting)
        made = []
        for turn in range(1, len(question.turns) + 1):
            orders = (False, True) if self.swap else (self.drawn(question, turn, pair),)
            made += [
                Game(question, turn, pair[::-1] if swapped else pair, swapped, len(orders))
                for swapped in orders
            ]
        return made

    def drawn(self, question: Prompt, turn: int, pair: tuple[Answers, ...]) -> bool:
        """A fair coin that falls the same way whenever the same pair is judged."""
        runs = [side.variant.run_id for side in pair]
        return int(short_hash([self.seed, question.id, turn, runs]), 16) % 2 == 1

    def settle(self, game: Game) -> Settled | None:
        """Equal talks tie; of two answers the only one that is not empty wins."""
        first, second = game.talks()
        if self.skip_identical and first == second:
            return Settled(Reading(preference=TIE), "identical")
        said = [bool(answer.strip()) for answer in game.answers()]
        if self.skip_empty and not all(said):
            preference = TIE if not any(said) else FIRST if said[0] else SECOND
            return Settled(Reading(preference=preference), "empty")
        return None

    def own_slots(self, game: Game, talks: list[list[str]], mark: str) -> dict[str, str]:
        """{answer_a}, {answer_b}, {conversation_a}, {conversation_b}."""
        turns = game.question.turns[: game.turn]
        found = {}
        for letter, talk in zip("ab", talks, strict=True):
            found[f"answer_{letter}"] = prompts.marked(f"answer {letter.upper()}", talk[-1], mark)
            found[f"conversation_{letter}"] = prompts.conversation(turns, talk, mark)
        return found


@JUDGES.register
class Pairwise(PairJudge):
    """A, B or tie, explained by the judge; only a verdict that both orders agree on is a win.

    MT-Bench's pairwise mode (arXiv 2306.05685) in own words.
    """

    kind: ClassVar[str] = "pairwise"
    prompt_default: ClassVar[str] = prompts.PAIRWISE
    later_default: ClassVar[str] = prompts.PAIRWISE_LATER

    def read(self, reply: Reply) -> Reading:
        """The last verdict in the reply."""
        return verdict(reply.said())


def verdict(text: str) -> Reading:
    """`... [[B]]` -> the second is better. Two scores, `[[8, 6.5]]`, are compared.

    FastChat takes the first of A, B, C that occurs anywhere; the last token is what the judge
    settled on, where its explanation quotes another.
    """
    letters = VERDICT.findall(text)
    if letters:
        return Reading(preference=MEANING[letters[-1]])
    scores = TWO_SCORES.findall(text)
    if scores:
        first, second = map(float, scores[-1])
        if abs(first - second) <= CLOSE + 1e-9:  # 8.1 - 8 is over 0.1 in binary
            return Reading(preference=TIE)
        return Reading(preference=FIRST if first > second else SECOND)
    return Reading(failed="the reply holds no verdict in double brackets")
