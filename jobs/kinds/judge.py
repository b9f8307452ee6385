"""Judging: a judge grades or compares what the variants of a model answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jobs.answers import AnswerCache
from jobs.events import State
from jobs.kinds import RUN, Before, Kind
from jobs.kinds.mine import LEAST_BYTES, Kept, check_run, is_plain, is_run_of

if TYPE_CHECKING:
    from backend.judges.spec import JudgeSpec
    from backend.spec import ModelRef
    from jobs.queue import Queue
    from jobs.view import RunView


class JudgeJobs(Kind["JudgeSpec"]):
    """A JudgeSpec; waits for those of its runs that are not done."""

    name: ClassVar[str] = "judge"

    def validate(self, data: Mapping[str, Any]) -> JudgeSpec:
        from backend.judges.spec import JudgeSpec

        return JudgeSpec.model_validate(data)

    def title(self, spec: JudgeSpec) -> str:
        judge = getattr(spec.judge_model, "model", "") or f"run {judging_run(spec)}"
        return f"Judge {len(spec.runs)} variants by {judge} ({spec.judge.kind})"

    def resolve(self, spec: JudgeSpec, queue: Queue) -> JudgeSpec:
        """Model, runs and questions by name: what a home or a file holds later changes nothing."""
        from backend.model.identity import resolve
        from backend.spec import RunSpec

        model = resolve(RunSpec(model=spec.model)).model
        views = queue.runs()
        runs = chosen(views, spec.runs, model)
        made = {view.run_id: view.artifact_id for view in views}
        if run_id := judging_run(spec):
            every = {view.run_id: view for view in views}
            check_run(run_id, every, {v.run_id: v for v in views if v.kind == RUN})
        return spec.model_copy(
            update={
                "model": model,
                "runs": tuple(runs),
                "artifacts": tuple(made[run_id] for run_id in runs),
                "questions": spec.questions.pinned(model.id, queue.home),
            }
        )

    def check(self, spec: JudgeSpec, device: str, home: Path) -> None:
        """Refuses a judge that cannot be asked, limits that cannot suffice, and what cannot fit."""
        from backend.estimate import PROGRAM_BYTES, misfit
        from backend.judges.base import Variant
        from backend.judges.budget import check_budget
        from backend.judges.local import run_spec
        from backend.model.identity import find_model

        spec.judge_model.check()
        spec.judge.meetings([Variant(run, spec.model.id, "") for run in spec.runs])
        check_budget(spec, spec.questions.load(spec.model.id, home))
        cuda = device.startswith("cuda")
        run_id = judging_run(spec)
        models = [spec.model, *([run_spec(home, run_id).model] if run_id else [])]
        weights = LEAST_BYTES * max(find_model(model).parameters for model in models)
        host = PROGRAM_BYTES + (0 if cuda else weights)
        why_not = misfit(PROGRAM_BYTES + weights, host, 0, cuda, home)
        if why_not:
            raise ValueError(f"judging holds one model at a time: {why_not}")

    def before(self, spec: JudgeSpec, views: Sequence[RunView], device: str) -> Before:
        done = {view.run_id for view in views if view.state is State.DONE}
        needed = {*spec.runs, *filter(None, [judging_run(spec)])}
        return Before(frozenset(needed - done))

    def kin(self, spec: JudgeSpec, device: str) -> dict[str, str]:
        size = [len(spec.runs), spec.questions.content, spec.answers.max_new]
        judge = [spec.judge.kind, spec.judge_model.data(), spec.limits.concurrency]
        return {
            "answer": json.dumps([spec.model.id, spec.model.content, device, "answer", size]),
            "judge": json.dumps([device, "judge", size, judge]),
        }

    def work(
        self,
        spec: JudgeSpec,
        stage: str,
        folder: Path,
        *,
        device: str,
        home: Path,
        emit: Callable[..., None],
        should_stop: Callable[[], bool],
    ) -> None:
        from backend.judge import execute

        execute(
            spec,
            stage,
            folder,
            device=device,
            home=home,
            emit=emit,
            should_stop=should_stop,
            answers=Kept(AnswerCache(home, device=device)),
        )


def judging_run(spec: JudgeSpec) -> str:
    """Id of the run whose model judges; "" where another program does."""
    return str(getattr(spec.judge_model, "run", ""))


def chosen(views: Sequence[RunView], asked: Sequence[str], model: ModelRef) -> list[str]:
    """Ids of the runs to judge. ValueError if one cannot be.

    Named ones stay in their order. Without names: every finished run of the model, of those with
    one artifact the first, the 16-bit run before the others.
    """
    runs = {view.run_id: view for view in views if is_run_of(view, model)}
    for run_id in asked:
        check_run(run_id, {view.run_id: view for view in views}, runs)
    if asked:
        return list(asked)
    done = {v.artifact_id: v.run_id for v in reversed(runs.values()) if v.state is State.DONE}
    if not done:
        raise ValueError(f"no run of {model.id} is finished; run some recipes first")
    return sorted(done.values(), key=lambda run_id: (not is_plain(runs[run_id]), run_id))


KIND = JudgeJobs()
