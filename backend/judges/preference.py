"""How likely the judge is to prefer one of two answers, from a single token."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from backend.judges import JUDGES, prompts
from backend.judges.base import FIRST, SECOND, Reading, Reply, preference_of
from backend.judges.pairwise import PairJudge

LETTERS = ("A", "B")


@JUDGES.register
class Preference(PairJudge):
    """AlpacaEval 2's weighted preference: one letter, and how sure the judge model is of it.

    2 - P(first) where the judge model tells its log-probabilities, else its letter counts whole.
    arXiv 2404.04475, in own words.
    """

    kind: ClassVar[str] = "preference"
    prompt_default: ClassVar[str] = prompts.PREFERENCE
    later_default: ClassVar[str] = prompts.PREFERENCE_LATER

    max_tokens: int = Field(1, ge=1, le=32_768, description="Longest reply of the judge.")

    def letters(self) -> tuple[str, ...]:
        """The two replies there are."""
        return LETTERS

    def read(self, reply: Reply) -> Reading:
        """From the probabilities of the first token, else from the letter itself."""
        preference = preference_of(reply.chances, LETTERS)
        if preference is None:
            preference = {"A": FIRST, "B": SECOND}.get(reply.said().strip().rstrip("."))
        if preference is None:
            return Reading(failed="the reply is neither A nor B")
        return Reading(preference=preference)
