"""JudgeSpec: everything that decides a verdict, and the limits that decide none."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from backend.dialogue import LONGEST_ANSWER, Sampling
from backend.judges import JudgeField, JudgeModelField
from backend.judges.base import Patience
from backend.judges.endpoint import Endpoint
from backend.judges.questions import Questions, temperature_of
from backend.judges.single import Single
from backend.registry import short_hash, versions
from backend.spec import Frozen, JobSpec, ModelRef


class Answering(Frozen):
    """How the variants are sampled."""

    temperature: float | None = Field(
        None, ge=0, le=2, description="Of all answers; null: by category, as MT-Bench does."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Share of the probability sampled from.")
    max_new: int = Field(512, ge=1, le=LONGEST_ANSWER, description="Most tokens of an answer.")
    seed: int = Field(0, ge=0)

    def of(self, category: str) -> Sampling:
        """The settings of one answer."""
        given = self.temperature
        temperature = temperature_of(category) if given is None else given
        return Sampling(temperature, self.top_p, self.max_new, self.seed)


class Limits(Frozen):
    """How long and how often a judge is asked, and for how much money. Decides no verdict."""

    timeout_s: float = Field(120.0, gt=0, le=3600, description="Longest wait for one reply.")
    retries: int = Field(5, ge=0, le=20, description="Further attempts after one that failed.")
    backoff_s: float = Field(1.0, ge=0, le=60, description="First wait between attempts; doubles.")
    longest_wait_s: float = Field(120.0, ge=0, le=3600, description="Longest of these waits.")
    per_minute: int = Field(0, ge=0, description="Requests a minute; 0: as fast as it answers.")
    concurrency: int = Field(4, ge=1, le=64, description="Requests under way at once.")
    failures: int = Field(5, ge=1, description="Failed verdicts in a row that end the job.")
    max_requests: int = Field(2000, ge=1, description="Requests at most, repeated ones included.")
    prompt_price: float | None = Field(None, ge=0, description="Of a million prompt tokens.")
    completion_price: float | None = Field(None, ge=0, description="Of a million reply tokens.")
    max_cost: float | None = Field(None, ge=0, description="Ends the job, in the prices' currency.")

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Money for so many tokens, None without prices."""
        if self.prompt_price is None or self.completion_price is None:
            return None
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6

    def patience(self) -> Patience:
        """The part that a judge model keeps to itself."""
        return Patience(
            self.timeout_s, self.retries, self.backoff_s, self.longest_wait_s, self.per_minute
        )


class JudgeSpec(JobSpec):
    """Variants of one model answer questions, and a judge grades or compares their answers."""

    kind: Literal["judge"] = "judge"
    model: ModelRef
    runs: tuple[str, ...] = Field((), description="Finished runs of the model; none: all of them.")
    judge: JudgeField = Single()
    judge_model: JudgeModelField = Endpoint()
    questions: Questions = Questions()
    answers: Answering = Answering()
    limits: Limits = Limits()
    artifacts: tuple[str, ...] = ()  # artifact ids of the runs, filled in when submitted
    version: ClassVar[int] = 1  # raise when the same settings give other verdicts

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if twice := sorted({run for run in self.runs if self.runs.count(run) > 1}):
            raise ValueError(f"runs: {twice[0]} is named twice; name it once")
        return self

    def judge_id(self) -> str:
        """12 hex over who judges and how; verdicts with other ones are never counted together."""
        return short_hash([self.judge.digest(), self.judge_model.digest()])

    def artifact_id(self) -> str:
        """All that decides a verdict."""
        data = self.model_dump(mode="json", exclude={"limits"})
        parts = [versions(self.judge), versions(self.judge_model)]
        return short_hash([data, parts, self.version])

    def fingerprint(self) -> str:
        """With the limits: a job under a higher one is another job."""
        return short_hash([self.artifact_id(), self.limits.model_dump(mode="json")])

    def stages(self) -> list[str]:
        """Answers first, so that a judge that cannot be reached costs none of them."""
        return ["answer", "judge"]
