"""A vote: which of two answers somebody found better, and what is known about the two."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

WINNERS = ("model_a", "model_b", "tie", "tie (bothbad)")
KINDS = ("human", "judge", "auto", "import")
LATEST = 253_402_300_799.0  # unix seconds: the end of the year 9999, where dates end
INT64 = 2**63

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Vote:
    """What one voter said of one battle, and under which conditions. ValueError if it cannot be."""

    battle_id: str
    model: str  # what both are variants of; "" in imports
    model_a: str  # variants by side as shown
    model_b: str
    winner: str
    kind: str
    judge: str  # hash of the session, name of the judge model, "identical", ...
    tstamp: float  # unix seconds
    turn: int = 1
    anony: bool = True
    language: str = ""
    category: str = ""
    prompt: str = ""
    conversation_a: Sequence[Message] = ()
    conversation_b: Sequence[Message] = ()
    tokens_a: int | None = None
    tokens_b: int | None = None
    run_a: str = ""
    run_b: str = ""
    seed_a: int = 0
    seed_b: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)  # sampling, template, ...
    propensity: float | None = None
    address: str = ""  # hash
    latency_s: float | None = None
    flags: Sequence[str] = ()

    def __post_init__(self) -> None:
        for names, fits, what in RULES:
            for name in names:
                value = getattr(self, name)
                if not fits(value):
                    raise ValueError(f"{name} of a vote is {value!r:.200}; it must be {what}")


def check_time(tstamp: float) -> float:
    """The same time; ValueError if it is not one in unix seconds."""
    if not _is_time(tstamp):
        raise ValueError(f"{tstamp!r:.200} is no time in unix seconds")
    return tstamp


FIELDS = tuple(field.name for field in fields(Vote))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and -INT64 <= value < INT64


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _is_whole(value)


def _is_maybe(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_time(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= LATEST


def _is_turn(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 2**31


def _are_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(m, Mapping) and _is_text(m.get("role")) and _is_text(m.get("content"))
        for m in value
    )


def _are_flags(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_name(f) and "," not in f for f in value)


# Fields, what their values must satisfy, and that in words.
RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("winner",), WINNERS.__contains__, f"one of {', '.join(WINNERS)}"),
    (("kind",), KINDS.__contains__, f"one of {', '.join(KINDS)}"),
    (("battle_id", "model_a", "model_b"), _is_name, "a text that is not empty"),
    (("model", "judge", "language", "category", "prompt"), _is_text, "a text"),
    (("run_a", "run_b", "address"), _is_text, "a text"),
    (("tstamp",), _is_time, "a time in unix seconds"),
    (("turn",), _is_turn, "a whole number above 0"),
    (("anony",), lambda value: isinstance(value, bool), "true or false"),
    (("conversation_a", "conversation_b"), _are_messages, "a list of {role: text, content: text}"),
    (("seed_a", "seed_b"), _is_whole, "a whole number of 64 bits"),
    (("tokens_a", "tokens_b"), _is_maybe(_is_whole), "a whole number, or nothing"),
    (("propensity", "latency_s"), _is_maybe(_is_number), "a finite number, or nothing"),
    (("settings",), lambda value: isinstance(value, Mapping), "an object"),
    (("flags",), _are_flags, "a list of words without commas"),
)
