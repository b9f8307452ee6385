"""Mining: prompts that tell the variants of a model apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jobs.answers import AnswerCache, Question
from jobs.chat_types import AnswerView, Piece
from jobs.events import State
from jobs.kinds import RUN, Before, Kind

if TYPE_CHECKING:
    from backend.chat import Opened
    from backend.dialogue import Message, Sampling
    from backend.mine import Answered
    from backend.spec import MineSpec, ModelRef
    from jobs.queue import Queue
    from jobs.view import RunView

LEAST_BYTES = 2  # of one weight, however it is held while it is loaded


class Mine(Kind["MineSpec"]):
    """A MineSpec; waits for those of its runs that are not done."""

    name: ClassVar[str] = "mine"

    def validate(self, data: Mapping[str, Any]) -> MineSpec:
        from backend.spec import MineSpec

        return MineSpec.model_validate(data)

    def title(self, spec: MineSpec) -> str:
        return f"Mine {len(spec.prompts)} prompts on {len(spec.runs)} variants"

    def resolve(self, spec: MineSpec, queue: Queue) -> MineSpec:
        """Model, runs and prompts by name: what a home or a pool holds later changes nothing."""
        from backend.model.identity import resolve
        from backend.prompts import by_id, digest, pool
        from backend.spec import RunSpec

        model = resolve(RunSpec(model=spec.model)).model
        prompts = pool(model.id, queue.home)
        prompts = by_id(prompts, spec.prompts) if spec.prompts else prompts
        return spec.model_copy(
            update={
                "model": model,
                "runs": tuple(chosen(queue.runs(), spec.runs, model)),
                "prompts": tuple(prompt.id for prompt in prompts),
                "pool": digest(prompts),
            }
        )

    def check(self, spec: MineSpec, device: str, home: Path) -> None:
        """Refuses what cannot fit for sure: two models held as small as can be."""
        from backend.estimate import PROGRAM_BYTES, misfit
        from backend.model.identity import find_model

        cuda = device.startswith("cuda")
        models = 2 * LEAST_BYTES * find_model(spec.model).parameters
        host = PROGRAM_BYTES + (models // 2 if cuda else models)
        why_not = misfit(PROGRAM_BYTES + models, host, 0, cuda, home)
        if why_not:
            raise ValueError(f"mining holds the 16-bit model and one variant at a time: {why_not}")

    def before(self, spec: MineSpec, views: Sequence[RunView], device: str) -> Before:
        done = {view.run_id for view in views if view.state is State.DONE}
        return Before(frozenset(spec.runs) - done)

    def kin(self, spec: MineSpec, device: str) -> dict[str, str]:
        size = [len(spec.runs), len(spec.prompts), spec.max_new]
        return {"mine": json.dumps([spec.model.id, spec.model.content, device, "mine", size])}

    def work(
        self,
        spec: MineSpec,
        stage: str,
        folder: Path,
        *,
        device: str,
        home: Path,
        emit: Callable[..., None],
        should_stop: Callable[[], bool],
    ) -> None:
        from backend.mine import mine

        mine(
            spec,
            folder,
            device=device,
            home=home,
            emit=emit,
            should_stop=should_stop,
            answers=Kept(AnswerCache(home, device=device)),
        )


def chosen(views: Sequence[RunView], asked: Sequence[str], model: ModelRef) -> list[str]:
    """Ids of the runs to ask, a finished 16-bit run first. ValueError if one cannot be asked.

    Without names: every finished run of the model, of those with one artifact the first.
    """
    runs = {view.run_id: view for view in views if is_run_of(view, model)}
    for run_id in asked:
        check_run(run_id, {view.run_id: view for view in views}, runs)
    done: dict[str, str] = {}  # artifact -> its first run
    for view in runs.values():
        if view.state is State.DONE:
            done.setdefault(view.artifact_id, view.run_id)
    wanted = list(asked or done.values())
    plain = [run_id for run_id in (*wanted, *done.values()) if is_plain(runs[run_id])]
    others = [run_id for run_id in wanted if not is_plain(runs[run_id])]
    if not others:
        raise ValueError(
            f"no quantized run of {model.id} is finished, so no answers can differ; run some "
            "recipes first"
        )
    return [*plain[:1], *others]


def is_run_of(view: RunView, model: ModelRef) -> bool:
    """True for a run of exactly this model."""
    return view.kind == RUN and getattr(view.spec, "model", None) == model


def is_plain(view: RunView) -> bool:
    """True for the 16-bit model, which no step changed."""
    return getattr(view.spec, "steps", None) == ()


def check_run(run_id: str, every: Mapping[str, RunView], fitting: Mapping[str, RunView]) -> None:
    """ValueError in one sentence unless the run fits and has not gone wrong."""
    if run_id not in every:
        raise ValueError(f"there is no run {run_id!r} in this home")
    if run_id not in fitting:
        raise ValueError(f"run {run_id} is no run of this model in this dtype; leave it out")
    state = every[run_id].state
    if state in (State.FAILED, State.CANCELLED):
        raise ValueError(f"run {run_id} is {state}; retry it first, or leave it out")


class Kept:
    """The answers of chats, as mining asks for them and gives them."""

    def __init__(self, cache: AnswerCache) -> None:
        self.cache = cache

    def get(
        self, artifact: str, messages: Sequence[Message], sampling: Sampling, how: Opened
    ) -> Answered | None:
        """The answer that a model held like this gave before."""
        from backend.mine import Answered

        mode = mode_name(how.packed, how.run.dtype)
        view = self.cache.get(Question(artifact, tuple(messages), sampling), mode)
        if view is None or view.seconds is None or not view.finish:
            return None
        return Answered(
            pieces=tuple((piece.token, piece.text) for piece in view.pieces),
            finish=view.finish,
            ttft_s=view.ttft_s,
            seconds=view.seconds,
            dropped=view.dropped,
            notes=view.notes,
            packed=how.packed,
            dtype=how.run.dtype,
        )

    def put(
        self, artifact: str, messages: Sequence[Message], sampling: Sampling, given: Answered
    ) -> None:
        """Keep an answer for chats and battles."""
        view = AnswerView(
            state="done",
            text=given.text,
            pieces=tuple(Piece(token, text) for token, text in given.pieces),
            ttft_s=given.ttft_s,
            seconds=given.seconds,
            finish=given.finish,
            dropped=given.dropped,
            notes=given.notes,
            packed=given.packed,
            dtype=given.dtype,
        )
        question = Question(artifact, tuple(messages), sampling)
        self.cache.put(question, mode_name(given.packed, given.dtype), view)


def mode_name(packed: bool, dtype: str) -> str:
    """How a model is held, as cached answers name it: packed-bfloat16."""
    return f"{'packed' if packed else 'simulated'}-{dtype}"


KIND = Mine()
