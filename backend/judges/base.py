"""Judge: a way of judging answers. JudgeModel: the model that does it."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, Self

from pydantic import Field, model_validator

from backend.dialogue import Message
from backend.judges import prompts
from backend.prompts import Prompt
from backend.registry import Part, short_hash

FIRST, TIE, SECOND = 1.0, 1.5, 2.0  # AlpacaEval's preference: which of two is better
THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)  # of models that reason aloud first


@dataclass(frozen=True)
class Variant:
    """What one finished run made of a model."""

    run_id: str
    model: str
    artifact_id: str


@dataclass(frozen=True)
class Answers:
    """What one variant answered to the turns of one question."""

    variant: Variant
    texts: tuple[str, ...]


Talks = Mapping[tuple[str, str, int], str]  # (run id, question, turn) -> answer


@dataclass(frozen=True)
class Game:
    """One thing to be judged: an answer, or two in the order in which the judge sees them."""

    question: Prompt
    turn: int  # whose answers are judged, from 1
    shown: tuple[Answers, ...]
    swapped: bool = False  # the second variant of the pair is shown first
    games: int = 1  # that together decide about this pair, question and turn

    def unshuffled(self) -> tuple[Answers, ...]:
        """The answers in the order of the pair, whichever was shown first."""
        return self.shown[::-1] if self.swapped else self.shown

    def answers(self) -> list[str]:
        """The answers that are judged, as shown."""
        return [side.texts[self.turn - 1] for side in self.shown]

    def talks(self) -> list[tuple[str, ...]]:
        """What each variant said up to the turn that is judged, as shown."""
        return [side.texts[: self.turn] for side in self.shown]


@dataclass(frozen=True)
class Reading:
    """What a reply says. Exactly one of the three is set."""

    score: float | None = None  # 1 to 10
    preference: float | None = None  # 1: the first shown is better, 2: the second, 1.5: a tie
    failed: str = ""  # why there is neither


@dataclass(frozen=True)
class Settled:
    """A verdict that needs no judge, and why."""

    reading: Reading
    flag: str  # "empty", "identical"


@dataclass(frozen=True)
class Request:
    """What a judge model is asked."""

    messages: tuple[Message, ...]
    max_tokens: int
    letters: tuple[str, ...] = ()  # wanted: the probabilities of these as the first token
    flags: tuple[str, ...] = ()  # "cut": an answer was too long to be shown whole

    def hash(self) -> str:
        """12 hex digits over the messages."""
        return short_hash([message.data() for message in self.messages])

    def characters(self) -> int:
        """Of all messages together."""
        return sum(len(message.content) for message in self.messages)


@dataclass(frozen=True)
class Reply:
    """What a judge model answered."""

    text: str
    model: str  # as the model's server reports it
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float = 0.0  # of the last attempt
    attempts: int = 1
    finish: str = ""  # stop, length, ...
    chances: Mapping[str, float] = field(default_factory=dict)  # first token -> log-probability

    def said(self) -> str:
        """The text without what a reasoning model thought before it spoke."""
        return THINKING.sub("", self.text, count=1)


class NoReply(Exception):
    """A request that failed for good, in one sentence."""

    def __init__(self, reason: str, attempts: int, latency_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.attempts, self.latency_s = reason, attempts, latency_s


class JudgingStopped(ValueError):
    """The job cannot go on: out of its budget, or nothing but failures."""


@dataclass(frozen=True)
class Patience:
    """How a judge model may be asked: what costs time and money, and decides no verdict."""

    timeout_s: float = 120.0
    retries: int = 5
    backoff_s: float = 1.0
    longest_wait_s: float = 120.0
    per_minute: int = 0  # requests; 0: as fast as it answers


@dataclass(frozen=True)
class Opening:
    """What a judge model may know of the job that opens it."""

    home: Path
    device: str = "cpu"
    patience: Patience = Patience()
    spend: Callable[[], None] = lambda: None  # called before every request; raises JudgingStopped
    should_stop: Callable[[], bool] = lambda: False
    note: Callable[[str], None] = lambda text: None


class Ask(Protocol):
    """An open judge model. Raises NoReply."""

    def __call__(self, request: Request, /) -> Awaitable[Reply]: ...


class JudgeModel(Part):
    """A model that judges; its fields say which one and how it is sampled."""

    remote: ClassVar[bool] = False  # True: requests may cost money, and several go at once

    def check(self) -> None:
        """ValueError if it cannot be asked from here, before anything is spent."""

    def open(self, opening: Opening) -> AbstractAsyncContextManager[Ask]:
        """Connect or load; what it yields is asked request by request."""
        raise NotImplementedError(f"{self.kind} opens nothing")

    def related(self, variant: Variant, home: Path) -> str:
        """How this judge is kin to a variant and may favour it, "" where nothing is known."""
        return ""


class Judge(Part):
    """A way of judging: who meets whom, what the judge is asked, and how its reply is read."""

    sides: ClassVar[int] = 1  # answers in one game
    slots: ClassVar[frozenset[str]] = frozenset({"question", "turn", "reference"})
    needed: ClassVar[tuple[frozenset[str], ...]] = ()  # one of these must be in a prompt
    system_default: ClassVar[str] = prompts.SYSTEM
    prompt_default: ClassVar[str] = ""
    later_default: ClassVar[str] = ""

    system: str = Field("", max_length=20_000, description="Own system text; empty: ours.")
    prompt: str = Field("", max_length=20_000, description="Own prompt with slots; empty: ours.")
    later: str = Field(
        "", max_length=20_000, description="Own prompt for turns after the first; empty: as above."
    )
    longest: int = Field(
        8000, ge=100, le=15_000, description="Characters of an answer that the judge sees."
    )
    max_tokens: int = Field(2048, ge=1, le=32_768, description="Longest reply of the judge.")

    @model_validator(mode="after")
    def _prompts_show_what_is_judged(self) -> Self:
        for text in filter(None, (self.prompt, self.later)):
            prompts.check(text, self.slots, self.needed)
        return self

    def template(self, turn: int) -> str:
        """The prompt for a turn: own ones first; a single own prompt serves all turns."""
        if turn == 1:
            return self.prompt or self.prompt_default
        return self.later or self.prompt or self.later_default

    def meetings(self, variants: Sequence[Variant]) -> list[tuple[Variant, ...]]:
        """Which variants are judged together, `sides` at a time."""
        raise NotImplementedError(f"{self.kind} judges nobody")

    def games(self, question: Prompt, meeting: Sequence[Answers]) -> list[Game]:
        """Everything to be judged about one question."""
        raise NotImplementedError(f"{self.kind} plays no games")

    def settle(self, game: Game) -> Settled | None:
        """The verdict where no judge is needed: empty and identical answers."""
        return None

    def own_slots(self, game: Game, talks: list[list[str]], mark: str) -> dict[str, str]:
        """Slots beside the question's, from what is shown of every side."""
        raise NotImplementedError(f"{self.kind} shows nothing")

    def letters(self) -> tuple[str, ...]:
        """First tokens whose probabilities the verdict is read from."""
        return ()

    def read(self, reply: Reply) -> Reading:
        """What the judge says, from its reply alone."""
        raise NotImplementedError(f"{self.kind} reads nothing")

    def request(self, game: Game) -> Request:
        """The prompt of a game: every text between marks, long answers cut."""
        shown = [[prompts.clipped(t, self.longest) for t in talk] for talk in game.talks()]
        talks = [[text for text, _ in talk] for talk in shown]
        turns = game.question.turns[: game.turn]
        references = game.question.references[: game.turn]
        mark = prompts.mark_of([*turns, *references, *(t for talk in talks for t in talk)])
        slots = {
            "question": prompts.marked("question", turns[-1], mark),
            "turn": str(game.turn),
            "reference": prompts.reference_block(references, mark),
            **self.own_slots(game, talks, mark),
        }
        messages = (
            Message("system", self.system or self.system_default),
            Message("user", prompts.fill(self.template(game.turn), slots)),
        )
        cut = any(was_cut for talk in shown for _, was_cut in talk)
        return Request(messages, self.max_tokens, self.letters(), ("cut",) if cut else ())


def preference_of(chances: Mapping[str, float], letters: Sequence[str]) -> float | None:
    """2 - P(first letter), over the tokens that spell one of two letters; None where none does."""
    mass = dict.fromkeys(letters, 0.0)
    for token, log_probability in chances.items():
        if token.strip() in mass:
            mass[token.strip()] += math.exp(min(log_probability, 0.0))
    total = sum(mass.values())
    return 2 - mass[letters[0]] / total if total > 0 else None


def games_of(
    judge: Judge, variants: Sequence[Variant], questions: Sequence[Prompt], talks: Talks
) -> list[Game]:
    """Every game of a job, question by question."""
    meetings = judge.meetings(variants)
    return [
        game
        for question in questions
        for meeting in meetings
        for game in judge.games(question, [answers_of(v, question, talks) for v in meeting])
    ]


def answers_of(variant: Variant, question: Prompt, talks: Talks) -> Answers:
    """A variant's answers to all turns of a question."""
    turns = range(1, len(question.turns) + 1)
    return Answers(variant, tuple(talks[variant.run_id, question.id, turn] for turn in turns))
