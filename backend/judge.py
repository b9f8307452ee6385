"""Judge jobs: what variants answer to questions, and what a judge says about it.

Two stages, a process each. `answer` writes an `answer` event per variant, question and turn,
`judge` a `verdict` event per game. Both go on after what their events already hold.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from backend.dialogue import Message, Sampling
from backend.environment import environment
from backend.execute import SPEC, events
from backend.judges.base import (
    Ask,
    Game,
    Judge,
    JudgingStopped,
    NoReply,
    Opening,
    Reading,
    Reply,
    Request,
    Talks,
    Variant,
    games_of,
)
from backend.judges.budget import Ledger
from backend.judges.local import open_variant, run_spec
from backend.judges.spec import JudgeSpec
from backend.pipeline import Cancelled
from backend.prompts import Prompt

if TYPE_CHECKING:
    from backend.mine import Answers as Kept

POLL_S = 0.2  # how long a cancel waits while requests are under way
STORED_CHARACTERS = 16_000  # of one text in an event; the judge is shown no more of an answer

Emit = Callable[..., None]


@dataclass(frozen=True)
class Said:
    """One answer, whole."""

    text: str
    tokens: int
    finish: str  # end, length, context


class Talker(Protocol):
    """A variant that is ready to answer."""

    def __call__(self, messages: Sequence[Message], sampling: Sampling, /) -> Said: ...


OpenTalker = Callable[[Variant], AbstractContextManager[Talker]]
Key = tuple[str, int, str, str, bool]  # question, turn, run a, run b, swapped


def execute(
    spec: JudgeSpec,
    stage: str,
    folder: Path,
    *,
    device: str,
    home: Path,
    emit: Emit,
    should_stop: Callable[[], bool],
    answers: Kept | None = None,
    open_talker: OpenTalker | None = None,
) -> None:
    """One stage of the judge job in `folder`. Raises Cancelled; other exceptions are failures.

    `answers`: where answers of chats are kept. `open_talker` stands in for the variants' models.
    """
    if stage not in spec.stages():
        raise ValueError(f"a judge job has no stage {stage!r}; it has {', '.join(spec.stages())}")
    emit("env", env=environment())
    work = Stage(spec, folder, home, device, emit, should_stop, answers)
    if stage == "answer":
        work.answer(open_talker or work.load)
    else:
        asyncio.run(work.judge())


@dataclass(frozen=True)
class Stage:
    """One stage of a judge job, and whom it reports to."""

    spec: JudgeSpec
    folder: Path
    home: Path
    device: str
    emit: Emit
    should_stop: Callable[[], bool]
    kept: Kept | None = None
    failed: Counter[str] = field(default_factory=Counter)  # reason -> verdicts

    def variants(self) -> list[Variant]:
        """Of the spec's runs. ValueError if one is gone or has changed."""
        found = [variant_of(self.home, run_id) for run_id in self.spec.runs]
        wanted = self.spec.artifacts or [variant.artifact_id for variant in found]
        for variant, artifact in zip(found, wanted, strict=True):
            if variant.artifact_id != artifact:
                raise ValueError(f"run {variant.run_id} has changed since the job was submitted")
        return found

    def questions(self) -> list[Prompt]:
        """Those of the spec."""
        return self.spec.questions.load(self.spec.model.id, self.home)

    def check(self) -> None:
        """Raise Cancelled once the job is to stop."""
        if self.should_stop():
            raise Cancelled

    def note(self, text: str) -> None:
        """Something to know about the verdicts."""
        self.emit("note", block=None, module="", text=text)

    def progress(self, stage: str, done: int, total: int, item: str) -> None:
        """How far the stage is."""
        share = done / total if total else 1.0
        self.emit("progress", stage=stage, block=None, blocks=None, item=item, fraction=share)

    # -- answer ----------------------------------------------------------------------------------

    @contextmanager
    def load(self, variant: Variant) -> Iterator[Talker]:
        """The variant's model, ready to answer as it does in chats."""
        from backend.mine import answer_to, release

        held = [open_variant(self.home, variant.run_id, self.device, self.note)]

        def talk(messages: Sequence[Message], sampling: Sampling) -> Said:
            asked = variant.artifact_id, messages, sampling
            given = self.kept.get(*asked, held[0]) if self.kept else None
            if given is None:
                given = answer_to(held[0], messages, sampling, self.should_stop)
                if self.kept:
                    self.kept.put(*asked, given)
            return Said(given.text, len(given.pieces), given.finish)

        try:
            yield talk
        finally:
            held.clear()  # whoever still has `talk` must not keep the model in memory
            release()

    def answer(self, open_talker: OpenTalker) -> None:
        """Every variant's answer to every turn of every question, one variant at a time."""
        variants, questions = self.variants(), self.questions()
        have = talks_in(events(self.folder))
        total, done = len(variants) * len(questions), 0
        for variant in variants:
            missing = [q for q in questions if not answered(have, variant, q)]
            done += len(questions) - len(missing)
            if not missing:
                continue
            with open_talker(variant) as talk:
                for question in missing:
                    self.check()
                    self.progress("answer", done, total, f"{variant.run_id}: {question.id}")
                    self.talk_through(variant, question, talk)
                    done += 1
        self.progress("answer", total, total, "")

    def talk_through(self, variant: Variant, question: Prompt, talk: Talker) -> None:
        """All turns of one question: later ones see the variant's own earlier answers."""
        sampling = self.spec.answers.of(question.category)
        messages: list[Message] = []
        for turn, text in enumerate(question.turns, 1):
            messages.append(Message("user", text))
            began = time.monotonic()
            said = talk(messages, sampling)
            messages.append(Message("assistant", said.text))
            self.emit(
                "answer",
                run_id=variant.run_id,
                artifact_id=variant.artifact_id,
                question=question.id,
                category=question.category,
                language=question.language,
                turn=turn,
                prompt=bounded(text),
                text=bounded(said.text),
                characters=len(said.text),
                tokens=said.tokens,
                finish=said.finish,
                seconds=time.monotonic() - began,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_new=sampling.max_new,
                seed=sampling.seed,
            )

    # -- judge -----------------------------------------------------------------------------------

    async def judge(self) -> None:
        """A verdict on every game that has none yet; failed ones are asked for again."""
        spec, variants, questions = self.spec, self.variants(), self.questions()
        self.warn_of_kin(variants)
        games = games_of(spec.judge, variants, questions, talks_in(events(self.folder)))
        own = verdicts_in(events(self.folder))
        good = {key for key, verdict in own.items() if not verdict["failed"]}
        asked = self.settle([game for game in games if key_of(game) not in good])
        asked = self.take_over(asked)
        ledger = Ledger(spec.limits, verdict_events(events(self.folder)))
        self.progress("judge", len(games) - len(asked), len(games), "")
        if asked:
            await self.ask(asked, ledger, len(games))
            self.note(ledger.sentence())
        for reason, count in self.failed.items():
            self.note(f"{count} of {len(games)} verdicts failed: {reason}")
        self.progress("judge", 1, 1, "")

    def warn_of_kin(self, variants: Sequence[Variant]) -> None:
        """A note where the judge may favour its own."""
        kin = [self.spec.judge_model.related(variant, self.home) for variant in variants]
        for text in dict.fromkeys(filter(None, kin)):
            self.note(f"{text}: judges are known to prefer their own answers")

    def settle(self, games: Sequence[Game]) -> list[Game]:
        """Verdicts that need no judge -> the games that do."""
        asked = []
        for game in games:
            settled = self.spec.judge.settle(game)
            if settled is None:
                asked.append(game)
            else:
                self.report(game, settled.reading, [settled.flag])
        return asked

    def take_over(self, games: Sequence[Game]) -> list[Game]:
        """Verdicts on the same prompts from jobs with other limits -> the games without one."""
        earlier = earlier_verdicts(self.home, self.spec.artifact_id(), self.folder)
        left = []
        for game in games:
            verdict = earlier.get(key_of(game))
            if verdict and verdict["prompt_hash"] == self.spec.judge.request(game).hash():
                flags = dict.fromkeys([*verdict["flags"], "reused"])
                spent = {"attempts": 0, "prompt_tokens": 0, "completion_tokens": 0}
                self.emit("verdict", **verdict | spent | {"flags": list(flags)})
            else:
                left.append(game)
        return left

    async def ask(self, games: Sequence[Game], ledger: Ledger, total: int) -> None:
        """Put the games to the judge; too many failures in a row, or the budget, end it."""
        spec, in_a_row, done = self.spec, 0, total - len(games)
        opening = Opening(
            self.home,
            self.device,
            spec.limits.patience(),
            ledger.spend,
            self.should_stop,
            self.note,
        )
        at_once = spec.limits.concurrency if spec.judge_model.remote else 1
        async with spec.judge_model.open(opening) as model:
            async with aclosing(play(spec.judge, games, model, at_once, self.check)) as played:
                async for game, request, reply in played:
                    reading = self.hear(game, request, reply, ledger)
                    in_a_row = in_a_row + 1 if reading.failed else 0
                    done += 1
                    self.progress("judge", done, total, game.question.id)
                    if in_a_row >= spec.limits.failures:
                        raise JudgingStopped(
                            f"the last {in_a_row} verdicts failed, so the rest was not asked for; "
                            f"the last one: {reading.failed}"
                        )

    def hear(self, game: Game, request: Request, reply: Reply | NoReply, ledger: Ledger) -> Reading:
        """One reply or its lack -> what it says, reported."""
        if isinstance(reply, NoReply):
            reading = Reading(failed=reply.reason)
            self.report(game, reading, request.flags, request, reply)
            return reading
        ledger.add(request, reply)
        reading = self.spec.judge.read(reply)
        if reading.failed and reply.finish == "length":
            limit = request.max_tokens
            reading = Reading(failed=f"{reading.failed}; it was cut off after {limit} tokens")
        self.report(game, reading, request.flags, request, reply)
        return reading

    def report(
        self,
        game: Game,
        reading: Reading,
        flags: Sequence[str],
        request: Request | None = None,
        reply: Reply | NoReply | None = None,
    ) -> None:
        """One verdict event, everything turned back from the order shown to that of the pair."""
        if reading.failed:
            self.failed[reading.failed] += 1
        said = reply if isinstance(reply, Reply) else None
        preference = reading.preference
        sides = [side.variant.run_id for side in game.unshuffled()]
        self.emit(
            "verdict",
            judge_id=self.spec.judge_id(),
            style=self.spec.judge.kind,
            question=game.question.id,
            category=game.question.category,
            language=game.question.language,
            turn=game.turn,
            run_a=sides[0],
            run_b=sides[1] if len(sides) > 1 else "",
            swapped=game.swapped,
            games=game.games,
            score=reading.score,
            preference=3 - preference if preference and game.swapped else preference,
            failed=reading.failed,
            flags=list(flags),
            judge=said.model if said else "",
            text=bounded(said.text) if said else "",
            prompt_hash=request.hash() if request else "",
            prompt_tokens=said.prompt_tokens if said else None,
            completion_tokens=said.completion_tokens if said else None,
            latency_s=reply.latency_s if reply else None,
            attempts=reply.attempts if reply else 0,
        )


async def play(
    judge: Judge, games: Iterable[Game], ask: Ask, at_once: int, check: Callable[[], None]
) -> AsyncGenerator[tuple[Game, Request, Reply | NoReply], None]:
    """Ask about every game, `at_once` at a time, in the order in which the replies come.

    When the budget is used up, what is under way may end, because it is paid for.
    """
    waiting = iter(games)
    under_way: dict[asyncio.Task[Any], tuple[Game, Request]] = {}
    stopped: JudgingStopped | None = None
    try:
        while True:
            check()
            for game in islice(waiting, 0 if stopped else at_once - len(under_way)):
                request = judge.request(game)
                under_way[asyncio.create_task(outcome(ask, request))] = game, request
            if not under_way:
                break
            done, _ = await asyncio.wait(
                under_way, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                game, request = under_way.pop(task)
                reply = task.result()
                if isinstance(reply, JudgingStopped):
                    stopped = reply
                else:
                    yield game, request, reply
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
    if stopped:
        raise stopped


async def outcome(ask: Ask, request: Request) -> Reply | NoReply | JudgingStopped:
    """How one request ended."""
    try:
        return await ask(request)
    except (NoReply, JudgingStopped) as end:
        return end


# -- what there is -------------------------------------------------------------------------------


def answered(have: Talks, variant: Variant, question: Prompt) -> bool:
    """True if all turns have an answer; a talk that was interrupted is held again."""
    turns = range(1, len(question.turns) + 1)
    return all((variant.run_id, question.id, turn) in have for turn in turns)


def variant_of(home: Path, run_id: str) -> Variant:
    """What a finished run made, from its spec."""
    spec = run_spec(home, run_id)
    return Variant(run_id, spec.model.id, spec.artifact_id())


def talks_in(found: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, int], str]:
    """The answers among events; the last one counts."""
    return {
        (event["run_id"], event["question"], event["turn"]): event["text"]
        for event in found
        if event["type"] == "answer"
    }


def verdict_events(found: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The verdicts among events, in their order, without what every event has."""
    for event in found:
        if event["type"] == "verdict":
            yield {name: value for name, value in event.items() if name not in ("t", "type")}


def verdicts_in(found: Iterable[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    """The verdicts among events by what they are about; the last one counts."""
    names = ("question", "turn", "run_a", "run_b", "swapped")
    return {tuple(v[n] for n in names): v for v in verdict_events(found)}


def key_of(game: Game) -> Key:
    """What a verdict is about."""
    runs = [side.variant.run_id for side in game.unshuffled()]
    return (game.question.id, game.turn, runs[0], runs[1] if len(runs) > 1 else "", game.swapped)


def earlier_verdicts(home: Path, artifact_id: str, but: Path) -> dict[Key, dict[str, Any]]:
    """Verdicts of other judge jobs that differ from this one in nothing but their limits."""
    found: dict[Key, dict[str, Any]] = {}
    for path in sorted((home / "runs").glob(f"*/{SPEC}")):
        if path.parent.resolve() != but.resolve() and judged_by(path) == artifact_id:
            good = verdicts_in(events(path.parent)).items()
            found |= {key: verdict for key, verdict in good if not verdict["failed"]}
    return found


def judged_by(path: Path) -> str:
    """artifact_id of a judge job's spec; "" where it is none that this version reads."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return JudgeSpec.model_validate(data).artifact_id() if data["kind"] == "judge" else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def bounded(text: str) -> str:
    """At most STORED_CHARACTERS: the beginning and the end, where the verdict is."""
    if len(text) <= STORED_CHARACTERS:
        return text
    half = (STORED_CHARACTERS - 100) // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[{left_out} characters left out]\n{text[-half:]}"
