"""What a judge job costs: estimated before the start, counted on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.judges.base import Game, JudgingStopped, Reply, Request, Variant, games_of
from backend.judges.spec import JudgeSpec, Limits
from backend.prompts import Prompt

CHARACTERS_PER_TOKEN = 4  # where no tokenizer counts


@dataclass(frozen=True)
class Estimate:
    """What a job asks of its judge, at most."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None  # None: no prices given

    def sentence(self) -> str:
        """In words."""
        money = "" if self.cost is None else f", for at most {self.cost:.2f}"
        return (
            f"{self.requests:,} requests with about {self.prompt_tokens:,} prompt tokens and at "
            f"most {self.completion_tokens:,} reply tokens{money}"
        )


def estimate(spec: JudgeSpec, questions: Sequence[Prompt]) -> Estimate:
    """Before the answers are there: as if each were as long as it may be."""
    length = min(spec.judge.longest, spec.answers.max_new * CHARACTERS_PER_TOKEN)
    variants = [Variant(run, spec.model.id, "") for run in spec.runs]
    talks = {
        (variant.run_id, question.id, turn): "x" * length
        for variant in variants
        for question in questions
        for turn in range(1, len(question.turns) + 1)
    }
    return estimate_of(spec, games_of(spec.judge, variants, questions, talks))


def estimate_of(spec: JudgeSpec, games: Iterable[Game]) -> Estimate:
    """Of the games given, settled ones too."""
    requests = [spec.judge.request(game) for game in games]
    prompt = sum(tokens_in(request) for request in requests)
    completion = sum(request.max_tokens for request in requests)
    return Estimate(len(requests), prompt, completion, spec.limits.cost(prompt, completion))


def check_budget(spec: JudgeSpec, questions: Sequence[Prompt]) -> Estimate:
    """What the job needs; ValueError where its own limits cannot let it end."""
    needed, limits = estimate(spec, questions), spec.limits
    if not spec.judge_model.remote:
        return needed
    if needed.requests > limits.max_requests:
        raise ValueError(
            f"the job asks the judge {needed.requests:,} times and max_requests is "
            f"{limits.max_requests:,}; raise it, or ask fewer questions"
        )
    if limits.max_cost is not None and needed.cost is None:
        raise ValueError("max_cost needs prompt_price and completion_price to count with")
    return needed


def tokens_in(request: Request) -> int:
    """Of the messages, by their characters."""
    return -(-request.characters() // CHARACTERS_PER_TOKEN)


class Ledger:
    """What was asked so far, and the budget that ends it."""

    def __init__(self, limits: Limits, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self.limits = limits
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        for verdict in earlier:
            self.requests += verdict["attempts"]
            self.prompt_tokens += verdict["prompt_tokens"] or 0
            self.completion_tokens += verdict["completion_tokens"] or 0

    def spend(self) -> None:
        """Called before every request. Raises JudgingStopped once the budget is used up."""
        limit, cost = self.limits, self.cost()
        if self.requests >= limit.max_requests:
            raise JudgingStopped(
                f"the judge was asked {self.requests:,} times, which is max_requests; submit the "
                "job with a higher one to go on with what is missing"
            )
        if limit.max_cost is not None and cost is not None and cost >= limit.max_cost:
            raise JudgingStopped(
                f"the judge has cost {cost:.2f} and max_cost is {limit.max_cost:.2f}; submit the "
                "job with a higher one to go on with what is missing"
            )
        self.requests += 1

    def add(self, request: Request, reply: Reply) -> None:
        """A reply's tokens; by characters where the server counts none."""
        counted = (reply.prompt_tokens, reply.completion_tokens)
        guessed = (tokens_in(request), -(-len(reply.text) // CHARACTERS_PER_TOKEN))
        prompt, completion = (g if c is None else c for c, g in zip(counted, guessed, strict=True))
        self.prompt_tokens += prompt
        self.completion_tokens += completion

    def cost(self) -> float | None:
        """Money so far, None without prices."""
        return self.limits.cost(self.prompt_tokens, self.completion_tokens)

    def sentence(self) -> str:
        """In words."""
        cost = self.cost()
        money = "" if cost is None else f", for {cost:.2f}"
        return (
            f"the judge was asked {self.requests:,} times: {self.prompt_tokens:,} prompt tokens "
            f"and {self.completion_tokens:,} reply tokens{money}"
        )
