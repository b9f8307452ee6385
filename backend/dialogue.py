"""A conversation and how its next answer is drawn. Importing this is cheap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES = get_args(Role)

LONGEST_ANSWER = 1024  # tokens
LONGEST_CONVERSATION = 400_000  # characters
MOST_MESSAGES = 200
HOTTEST = 5.0
LARGEST_SEED = 2**63 - 1  # what PyTorch's generator takes


@dataclass(frozen=True)
class Message:
    """One thing said."""

    role: Role
    content: str

    def data(self) -> dict[str, str]:
        """As chat templates and JSON have it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many may come."""

    temperature: float = 0.0  # 0: always the likeliest
    top_p: float = 1.0  # share of the probability that is sampled from
    max_new: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= HOTTEST:  # also refuses NaN
            raise ValueError(f"temperature {self.temperature} is not between 0 and {HOTTEST:g}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not above 0 and at most 1")
        if not 1 <= self.max_new <= LONGEST_ANSWER:
            raise ValueError(f"max_new {self.max_new} is not between 1 and {LONGEST_ANSWER}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed {self.seed} is not between 0 and 2^63 - 1")

    def decisive(self) -> Sampling:
        """Without what makes no difference: greedy answers have one seed and one nucleus."""
        return self if self.temperature > 0 else Sampling(0.0, 1.0, self.max_new, 0)


def check_conversation(messages: Sequence[Message]) -> None:
    """ValueError in one sentence unless a model can answer these messages."""
    if not messages or messages[-1].role != "user":
        raise ValueError("a conversation ends with a message of the user; write one")
    if len(messages) > MOST_MESSAGES:
        raise ValueError(
            f"the conversation has {len(messages)} messages, at most {MOST_MESSAGES} are allowed; "
            "start a new one"
        )
    for at, message in enumerate(messages):
        if message.role not in ROLES:
            raise ValueError(f"role {message.role!r} is not one of {', '.join(ROLES)}")
        if message.role == "system" and at:
            raise ValueError("a system message can only be the first")
        if not encodable(message.content):
            raise ValueError("a message holds half a character, which no tokenizer can read")
    size = sum(len(message.content) for message in messages)
    if size > LONGEST_CONVERSATION:
        raise ValueError(
            f"the conversation has {size:,} characters, at most {LONGEST_CONVERSATION:,} are "
            "allowed; start a new one"
        )


def encodable(text: str) -> bool:
    """False for lone surrogates, which JSON can carry and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
