"""What a chat is asked and what it tells: values, and what two token lists say of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from backend.dialogue import Message, Sampling, check_conversation

__all__ = ["Message", "Sampling", "check_conversation"]

AnswerState = Literal["queued", "loading", "running", "done", "stopped", "failed"]
ENDED: frozenset[AnswerState] = frozenset({"done", "stopped", "failed"})
Finish = Literal["", "end", "length", "context", "stopped"]
LoadState = Literal["cold", "loading", "ready", "failed"]
MOST_SCORED = 512  # tokens of one answer that are scored
GRAM = 4  # tokens of the pieces in which repetition is counted


@dataclass(frozen=True)
class Piece:
    """One token of an answer and the text it made certain: "" inside a character."""

    token: int
    text: str


@dataclass(frozen=True)
class AnswerView:
    """An answer as it stands. Its text is that of its pieces, one after the other."""

    state: AnswerState = "queued"
    position: int = 0  # answers on the same model that come before this one
    text: str = ""
    pieces: tuple[Piece, ...] = ()  # those of the prefix first
    given: int = 0  # pieces that were the prefix
    ttft_s: float | None = None  # from the start of its own work to its first new token
    seconds: float | None = None  # from there to its end
    finish: Finish = ""  # why no more tokens came, once it is done or stopped
    error: str = ""  # one sentence, where it failed
    dropped: int = 0  # oldest turns that the context had no room for
    notes: tuple[str, ...] = ()
    packed: bool | None = None  # False: simulated; None while nobody knows
    dtype: str = ""  # what it was computed in
    cached: bool = False  # answered before, with these settings; the times are of then
    version: int = 0  # grows with every change

    @property
    def ended(self) -> bool:
        """True if nothing more comes."""
        return self.state in ENDED

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of the whole answer."""
        return tuple(piece.token for piece in self.pieces)

    @property
    def new_tokens(self) -> int:
        """How many tokens the model itself wrote."""
        return len(self.pieces) - self.given

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first; None where that says nothing, see `why_no_speed`."""
        if not self.packed or self.ttft_s is None or self.seconds is None or self.new_tokens < 2:
            return None
        taken = self.seconds - self.ttft_s
        return (self.new_tokens - 1) / taken if taken > 0 else None

    @property
    def why_no_speed(self) -> str:
        """The reason where an ended answer has no speed."""
        if self.speed is not None or not self.ended:
            return ""
        if self.packed is False:
            return "simulated: slower than the real thing by construction"
        return "fewer than two new tokens"

    @property
    def repetition(self) -> float | None:
        """Share of its 4-grams that came before."""
        return repetition_rate(self.tokens)


@dataclass(frozen=True)
class PoolState:
    """Where a run stands in the chat."""

    state: LoadState = "cold"
    why: str = ""  # one sentence, where loading failed
    bytes: int = 0  # of memory: a guess while it loads, measured once it is ready
    packed: bool | None = None
    dtype: str = ""
    position: int = 0  # answers that would come before a new one
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TopToken:
    """One of the likeliest tokens at a place."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class Scores:
    """Both models along the tokens of one answer, position by position."""

    tokens: tuple[int, ...]
    kld: tuple[float, ...]  # KL(16-bit || this run) over the whole vocabulary, nats
    nll: tuple[float, ...]  # -ln p of the token under this run
    base_nll: tuple[float, ...]  # and under the 16-bit model
    top: tuple[tuple[TopToken, ...], ...]  # the five likeliest tokens under this run
    base_top: tuple[tuple[TopToken, ...], ...]
    dtype: str  # both computed in it
    notes: tuple[str, ...] = ()

    @property
    def mean_base_nll(self) -> float:
        """How surprising the answer is to the 16-bit model, nats per token."""
        return sum(self.base_nll) / len(self.base_nll)

    @property
    def mean_kld(self) -> float:
        """Nats per token."""
        return sum(self.kld) / len(self.kld)


def divergence_index(one: Sequence[int], other: Sequence[int]) -> int:
    """Index of the first token that differs; the length of the shorter where none does."""
    pairs = enumerate(zip(one, other, strict=False))
    shared = min(len(one), len(other))
    return next((at for at, (mine, theirs) in pairs if mine != theirs), shared)


def repetition_rate(tokens: Sequence[int], n: int = GRAM) -> float | None:
    """1 - unique n-grams / n-grams; None for fewer than n tokens, which have none."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None
