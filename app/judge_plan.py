"""What a draft of a judge job would take: requests, tokens, money, time; or what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from app.context import Context
from app.draft import one_sentence
from app.judge_command import free_of_charge
from app.judge_draft import JudgeDraft, spec_of
from backend.judges.base import Variant
from backend.judges.budget import Estimate, check_budget
from backend.judges.spec import JudgeSpec
from backend.prompts import Prompt
from jobs import kinds
from jobs.events import State
from jobs.queue import Queue
from results_db import verdicts
from results_db.store import Store

SLOWEST_S, FASTEST_S = 15.0, 1.0  # of a reply, where this judge was never asked


@dataclass(frozen=True)
class JudgePlan:
    """A job that could be submitted, or why not."""

    error: str = ""
    spec: JudgeSpec | None = None  # resolved
    needed: Estimate | None = None
    answers: int = 0  # that the variants give
    known_s: float | None = None  # median time of this judge's replies so far
    seconds: tuple[float, float] = (0.0, 0.0)  # of judging
    run_id: str = ""  # of the same job, where there is one
    free: bool = False  # judged on this machine

    @property
    def key(self) -> str:
        """What one agrees to: another job, or another limit, is asked about anew."""
        return self.spec.fingerprint() if self.spec else ""


@lru_cache(maxsize=64)
def plan_of(ctx: Context, queue: Queue, draft: JudgeDraft, version: int) -> JudgePlan:
    """The plan of a draft. Kept while the store stands still: it reads files and prompts."""
    try:
        spec = kinds.find("judge").resolve(spec_of(draft, ctx.models), queue)
        spec.judge.meetings([Variant(run, spec.model.id, "") for run in spec.runs])
        questions = spec.questions.load(spec.model.id, ctx.home)
        needed = check_budget(spec, questions)
        spec.judge_model.check()
    except (ValueError, PermissionError, OSError) as error:
        return JudgePlan(error=one_sentence(error))
    known = reply_seconds(ctx.store, spec)
    same = (v for v in queue.runs() if v.fingerprint == spec.fingerprint())
    return JudgePlan(
        spec=spec,
        needed=needed,
        answers=answers_of(spec, questions),
        known_s=known,
        seconds=seconds_of(spec, needed.requests, known),
        run_id=next((v.run_id for v in same if v.state is not State.CANCELLED), ""),
        free=free_of_charge(spec),
    )


def answers_of(spec: JudgeSpec, questions: Sequence[Prompt]) -> int:
    """How many answers the variants give."""
    return len(spec.runs) * sum(len(question.turns) for question in questions)


def reply_seconds(store: Store, spec: JudgeSpec) -> float | None:
    """Median time of a reply in earlier jobs of the same judge; None where it never replied."""
    return verdicts.reply_seconds(
        store, str(getattr(spec.judge_model, "model", "")), spec.judge_id()
    )


def seconds_of(spec: JudgeSpec, requests: int, known: float | None) -> tuple[float, float]:
    """From and to: how long the requests take, with so many at once and so many a minute."""
    at_once = spec.limits.concurrency if spec.judge_model.remote else 1
    paced = 60 * requests / spec.limits.per_minute if spec.limits.per_minute else 0.0
    ends = (0.7 * known, 1.5 * known) if known else (FASTEST_S, SLOWEST_S)
    low, high = (max(requests * each / at_once, paced) for each in ends)
    return low, high


def agreement(plan: JudgePlan) -> list[str]:
    """What somebody agrees to, in sentences: who is asked what, where it goes, what it costs."""
    spec, needed = plan.spec, plan.needed
    assert spec is not None
    assert needed is not None
    place = str(getattr(spec.judge_model, "base_url", ""))
    run = str(getattr(spec.judge_model, "run", ""))
    who = str(getattr(spec.judge_model, "model", "")) or f"The model of run {run}"
    first = f"{who} is asked up to {needed.requests:,} times"
    sends = f", and questions and answers are sent to {place}." if place else ", on this machine."
    cost = "What that costs is not known: fill in its prices to see it."
    if plan.free:
        cost = "It costs nothing but time."
    elif needed.cost is not None:
        cost = f"It costs at most {needed.cost:.2f} at the prices given, retries apart."
    return [first + sends, cost]
