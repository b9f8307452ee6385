"""The chat pool: one process per loaded run, answers in the order asked, within a memory budget.

Each variant that is wanted has a thread here, which owns the socket to its process. Everybody else
only changes the variant's queue and rings its bell: no call waits for a model, save `score`, which
is there to be waited for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from jobs import failure, warm
from jobs.answers import AnswerCache, Question
from jobs.chat_jobs import Answer, Event, Job, Scoring, scores_of
from jobs.chat_process import LEAVE_S, Launches, Processes, Session
from jobs.chat_room import Room, Variant
from jobs.chat_runs import ChatRun, Need, budget, find_run, needed
from jobs.chat_types import (
    MOST_SCORED,
    AnswerView,
    Message,
    PoolState,
    Sampling,
    Scores,
    check_conversation,
)
from jobs.launch import WarmLauncher

__all__ = ["Answer", "AnswerView", "ChatPool", "Message", "PoolState", "Sampling", "Scores"]

log = logging.getLogger(__name__)

LONGEST_PREFIX = 4096  # tokens


class ChatPool:
    """Runs that can be talked to. Safe from any thread."""

    def __init__(
        self,
        home: Path,
        *,
        budget_bytes: int | None = None,
        device: str = "cpu",
        launcher: Launches | None = None,
        need: Callable[[ChatRun, str, str], Need] = needed,
        answers: AnswerCache | None = None,
    ) -> None:
        """`budget_bytes`: memory of all its processes; None is half of what is free now."""
        self.home = home
        self.device = device
        self.folder = home / "chat"
        self.answers = answers or AnswerCache(home, device=device)
        self._room = Room(budget(device) if budget_bytes is None else budget_bytes)
        launcher = launcher or WarmLauncher(home, warm.CHAT_PRELOAD, "warm-chat.log")
        self._processes = Processes(launcher, self.folder, device)
        self._need = need
        self._runs: dict[str, ChatRun] = {}
        self._troubles: dict[str, str] = {}  # run id -> why it cannot be talked to
        self._threads: set[threading.Thread] = set()
        for left in self.folder.glob("score-*"):
            left.unlink(missing_ok=True)

    # What one can ask for

    def open(self) -> None:
        """Start what all processes are forked from. Its imports take seconds, this call does not.

        The first `warm` or `generate` does it too.
        """
        self._processes.open()

    def warm(self, run_id: str) -> None:
        """Begin loading. Returns at once; `state` says how it goes."""
        with suppress(ValueError):
            variant = self._room.variant(self._run(run_id))
            with self._room.lock:
                variant.used = self._room.number()
                self._wake(variant)

    def generate(
        self,
        run_id: str,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        prefix: Sequence[int] = (),
    ) -> Answer:
        """Answer the last message. Returns at once; answers of one run come in the order asked.

        `prefix`: tokens that the answer begins with. ValueError in one sentence for a question
        that no model can answer; what is wrong with the run is told by the answer.
        """
        check_conversation(messages)
        if len(prefix) > LONGEST_PREFIX:
            raise ValueError(
                f"an answer of {len(prefix):,} tokens is not continued; at most {LONGEST_PREFIX:,}"
            )
        question = Question("", tuple(messages), sampling, tuple(prefix))
        try:
            run = self._run(run_id)
        except ValueError as error:
            answer = Answer(question)
            answer.fail(str(error))
            return answer
        variant = self._room.variant(run)
        answer = Answer(
            replace(question, artifact_id=run.artifact_id),
            stop=lambda answer: self._stop(variant, answer),
            keep=lambda answer, view: self._keep(variant, answer, view),
        )
        if not self._recalled(variant, answer):
            self._submit(variant, answer)
        return answer

    def score(
        self,
        run_id: str,
        base_run_id: str,
        messages: Sequence[Message],
        tokens: Sequence[int],
        *,
        timeout: float = 300.0,
    ) -> Scores:
        """Both models along the first MOST_SCORED tokens of an answer; waits for them.

        Both compute in the same dtype. ValueError in one sentence if it cannot be.
        """
        check_conversation(messages)
        if not tokens:
            raise ValueError("an answer without tokens cannot be compared")
        scored, deadline = tuple(tokens[:MOST_SCORED]), time.monotonic() + timeout
        run, base = self._run(run_id), self._run(base_run_id)
        if not base.is_baseline or base.model != run.model:
            raise ValueError(f"run {base_run_id} is not the 16-bit model of run {run_id}")
        if run.artifact_id == base.artifact_id:
            found = self._scored(base, Scoring(messages, scored), deadline)
            return scores_of(found, scored)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"score-{os.getpid()}-{self._room.number()}.npy"
        try:
            written = Scoring(messages, scored, write=path)
            dtype = self._scored(run, written, deadline)["dtype"]
            read = Scoring(messages, scored, read=path, dtype=dtype)
            found = self._scored(base, read, deadline)
            if found["dtype"] != dtype:  # it computes in another by itself
                read = Scoring(messages, scored, read=path, dtype=dtype)
                found = self._scored(base, read, deadline, dtype)
        finally:
            path.unlink(missing_ok=True)
        mode = self._room.variant(run).mode
        return scores_of(found, scored, mode.notes if mode else ())

    def state(self, run_id: str) -> PoolState:
        """How a run stands here."""
        with self._room.lock:
            if run_id in self._troubles:
                return PoolState("failed", self._troubles[run_id])
            variant = self._room.variants.get((run_id, ""))
            return PoolState() if variant is None else variant.seen()

    def close(self) -> None:
        """End every process; what is not answered by now fails."""
        self._room.close()
        until = time.monotonic() + LEAVE_S
        with self._room.lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._processes.close()

    # Runs

    def _run(self, run_id: str) -> ChatRun:
        """A finished run. Looked at once: nothing of it changes any more, but it may go."""
        with self._room.lock:
            try:
                if run_id not in self._runs or not self._runs[run_id].folder.is_dir():
                    self._runs[run_id] = find_run(self.home, run_id)
            except ValueError as error:
                self._runs.pop(run_id, None)
                self._troubles[run_id] = str(error)
                raise
            self._troubles.pop(run_id, None)
            return self._runs[run_id]

    def _submit(self, variant: Variant, job: Job) -> None:
        with self._room.lock:
            self._room.submit(variant, job)
            self._wake(variant)

    def _wake(self, variant: Variant) -> None:
        """See to it that a thread works for the variant."""
        if variant.threaded or self._room.closed:
            variant.ring()
            return
        variant.threaded, variant.state, variant.why = True, "loading", ""
        name = f"chat {variant.run.run_id}"
        thread = threading.Thread(target=self._work, args=(variant,), name=name, daemon=True)
        self._threads.add(thread)
        thread.start()

    def _work(self, variant: Variant) -> None:
        """Load the variant and work off its queue, again and again, until it is empty."""
        going = True
        while going:
            why = self._session(variant)
            with self._room.lock:
                if variant.current is not None:
                    variant.current.fail(why)
                variant.reset(why)
                if why:
                    self._room.fail(variant, why)
                self._room.settle()
                going = bool(variant.waiting) and not self._room.closed
                variant.threaded = going
                if going:
                    variant.state = "loading"
                else:
                    self._threads.discard(threading.current_thread())

    def _session(self, variant: Variant) -> str:
        """The life of one process -> why there was none, in one sentence, else ""."""
        try:
            need = self._need(variant.run, self.device, variant.dtype)
            Session(variant, self._room, self._processes, self._recalled).live(need)
        except ValueError as error:
            return str(error)
        except Exception as error:
            log.exception("the chat with run %s", variant.run.run_id)
            return failure.sentences(error, "chat")[0]
        return ""

    def _stop(self, variant: Variant, answer: Answer) -> None:
        with self._room.lock:
            if self._room.withdraw(variant, answer):
                answer.show(state="stopped", finish="stopped", position=0)
            elif variant.current is answer:
                variant.to_stop.append(answer.id)
                variant.ring()

    def _scored(self, run: ChatRun, job: Scoring, deadline: float, dtype: str = "") -> Event:
        variant = self._room.variant(run, dtype)
        self._submit(variant, job)
        try:
            return job.done.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            self._room.withdraw(variant, job)
            raise ValueError("comparing took too long; try again, or a shorter answer") from None

    # Answers given before

    def _recalled(self, variant: Variant, job: Job) -> bool:
        """True if the job is an answer that was given before, and is given again."""
        if not isinstance(job, Answer):
            return False
        mode = variant.mode
        name = mode.name if mode else self.answers.mode(variant.run.artifact_id)
        found = self.answers.get(job.question, name) if name else None
        if found is not None:
            job.recall(found)
        return found is not None

    def _keep(self, variant: Variant, answer: Answer, view: AnswerView) -> None:
        if variant.mode is not None:
            self.answers.put(answer.question, variant.mode.name, view)
