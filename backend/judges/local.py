"""A finished run of this home as the judge."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from backend.dialogue import LONGEST_ANSWER, Sampling
from backend.judges import JUDGE_MODELS
from backend.judges.base import Ask, JudgeModel, NoReply, Opening, Reply, Request, Variant
from backend.spec import RunSpec

if TYPE_CHECKING:
    from backend.chat import Opened
    from backend.run import Run

RUN_NAME = r"^[\w\-]+$"  # it becomes a path
LIKELIEST = 20  # first tokens whose probabilities are looked at


@JUDGE_MODELS.register
class Local(JudgeModel):
    """A finished run of this home: no key, no cost, and only as good as its model."""

    kind: ClassVar[str] = "local"

    run: str = Field(pattern=RUN_NAME, max_length=64, description="Run whose model judges.")
    temperature: float = Field(0.0, ge=0, le=2, description="Of the judge; 0 is greedy.")
    seed: int = Field(0, ge=0, description="Of sampling, where the temperature is not 0.")

    def open(self, opening: Opening) -> AbstractAsyncContextManager[Ask]:
        """Load the run's model."""
        return loaded(self, opening)

    def related(self, variant: Variant, home: Path) -> str:
        """A variant of the model that is judged, or the variant itself."""
        own, other = run_spec(home, self.run), run_spec(home, variant.run_id)
        if own.artifact_id() == other.artifact_id():
            return f"the judge {self.run} is one of the judged variants"
        if own.model.content == other.model.content:
            return f"the judge {self.run} is a variant of the judged model"
        return ""


@asynccontextmanager
async def loaded(model: Local, opening: Opening) -> AsyncIterator[Ask]:
    """The run on its device. Nothing else runs meanwhile, so replies are waited for in place."""
    from backend.chat import prompt_of
    from backend.mine import answer_to

    opened = open_variant(opening.home, model.run, opening.device, opening.note)
    name = run_spec(opening.home, model.run).model.id

    async def ask(request: Request, /) -> Reply:
        opening.spend()
        began = time.monotonic()
        length = min(request.max_tokens, LONGEST_ANSWER)
        sampling = Sampling(model.temperature, 1.0, length, model.seed)
        try:
            prompt = prompt_of(opened.run, request.messages).ids
            given = answer_to(opened, request.messages, sampling, opening.should_stop)
        except ValueError as error:  # the prompt does not fit the model's context
            raise NoReply(str(error), 1, time.monotonic() - began) from None
        return Reply(
            text=given.text,
            model=f"{name} (run {model.run})",
            prompt_tokens=len(prompt),
            completion_tokens=len(given.pieces),
            latency_s=time.monotonic() - began,
            finish=given.finish,
            chances=likeliest(opened.run, prompt) if request.letters else {},
        )

    yield ask


def run_spec(home: Path, run_id: str) -> RunSpec:
    """The spec of a run. ValueError if there is none; an id is checked before it is a path."""
    try:
        if not re.fullmatch(RUN_NAME, run_id):
            raise ValueError("that is no run id")
        path = home / "runs" / run_id / "spec.json"
        return RunSpec.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"run {run_id!r} cannot be read: {error}") from None


def open_variant(home: Path, run_id: str, device: str, note: Callable[[str], None]) -> Opened:
    """A finished run's model, packed where there are kernels for it."""
    from backend.chat import open_run

    found = open_run(run_spec(home, run_id), home / "runs" / run_id / "blocks", device=device)
    for text in found.notes:
        note(f"run {run_id}: {text}")
    return found


def likeliest(run: Run, prompt: Sequence[int]) -> dict[str, float]:
    """{token: log-probability} of the likeliest first tokens of an answer."""
    from backend.chat import log_probs, token_text

    rows = log_probs(run, [*prompt, prompt[-1]], len(prompt))  # [1, V]
    values, tokens = rows[0].topk(min(LIKELIEST, rows.shape[1]))
    found: dict[str, float] = {}
    for token, value in zip(tokens.tolist(), values.tolist(), strict=True):
        found.setdefault(token_text(run.tokenizer, token), value)
    return found
