"""Conversations: what was asked, what each side answered, and what of it is still to come.

A conversation belongs to one browser (its session) and has an id (in the URL), so a copied address
shows nobody else's words. Conversations live in memory, the least recently used go first.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from jobs.chat_types import AnswerView, Message, PoolState, Sampling, Scores, check_conversation

LONGEST_PROMPT = 8_000  # characters
MOST_TURNS = 40
KEPT, KEPT_EACH = 300, 20  # conversations in all, and of one session
BUSY_EACH = 3  # conversations of one session that are being answered
ID = re.compile(r"[0-9a-z]{8,40}")


class Handle(Protocol):
    """What is used of an answer under way."""

    def view(self) -> AnswerView: ...
    def stop(self) -> None: ...


class Pool(Protocol):
    """What is used of the chat pool."""

    def warm(self, run_id: str) -> None: ...
    def state(self, run_id: str) -> PoolState: ...
    def generate(
        self,
        run_id: str,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        prefix: Sequence[int] = (),
    ) -> Handle: ...
    def score(
        self, run_id: str, base_run_id: str, messages: Sequence[Message], tokens: Sequence[int]
    ) -> Scores: ...


@dataclass(frozen=True)
class Fork:
    """One token exchanged for another: what follows is a new answer."""

    at: int  # tokens kept before it
    text: str
    instead: str


@dataclass(eq=False)
class Attempt:
    """One answer of one side to one prompt, with what it was asked."""

    run_id: str
    messages: tuple[Message, ...]
    sampling: Sampling
    handle: Handle
    fork: Fork | None = None
    scores: dict[str, Future[Scores]] = field(default_factory=dict)  # by the 16-bit run

    @property
    def view(self) -> AnswerView:
        """The answer as it stands."""
        return self.handle.view()


@dataclass
class Turn:
    """A prompt and each side's answer to it; a fork lies on top of the answer it came from."""

    prompt: str
    sampling: Sampling
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)

    def of(self, run_id: str) -> Attempt | None:
        """The answer that counts."""
        made = self.attempts.get(run_id)
        return made[-1] if made else None


class Conversation:
    """Prompts and answers of a few sides. Safe from any thread."""

    def __init__(self, pool: Pool, scorers: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._scorers = scorers
        self._lock = threading.RLock()
        self._turns: list[Turn] = []
        self._halted: dict[str, str] = {}  # sides that wait to be asked again, and why if refused

    # What there is

    @property
    def turns(self) -> list[Turn]:
        """Every prompt so far, the oldest first."""
        with self._lock:
            return list(self._turns)

    def busy(self) -> bool:
        """True while an answer is under way."""
        return any(not attempt.view.ended for attempt in self._current())

    def waits(self, run_id: str) -> str | None:
        """Why a side is asked no more until somebody says so; "" if stopped, None if it is not."""
        return self._halted.get(run_id)

    def stamp(self) -> Hashable:
        """Changes whenever something in it does."""
        with self._lock:
            parts = [
                (id(a), a.run_id, a.view.version, sum(f.done() for f in a.scores.values()))
                for a in self._current()
            ]
            return len(self._turns), tuple(parts), tuple(self._halted)

    def _current(self, run_ids: Iterable[str] | None = None) -> Iterator[Attempt]:
        with self._lock:
            made = [turn.of(run_id) for turn in self._turns for run_id in list(turn.attempts)]
        wanted = None if run_ids is None else set(run_ids)
        yield from (a for a in made if a and (wanted is None or a.run_id in wanted))

    # What can be done

    def ask(self, prompts: Sequence[str], sampling: Sampling, sides: Sequence[str]) -> None:
        """Put prompts to every side, one after the other. ValueError where that cannot be."""
        with self._lock:
            if self.busy():
                raise ValueError("the last prompt is still being answered; stop it or wait")
            known = len(self._turns)
            new = [Turn(checked(text, known + at), sampling) for at, text in enumerate(prompts)]
            self._turns += new
            self._halted.clear()
            self.advance(sides)
            refused = [why for why in self._halted.values() if why]
            if refused and len(self._halted) == len(sides):  # nobody took it: as if not asked
                del self._turns[known:]
                raise ValueError(refused[0])

    def advance(self, sides: Sequence[str]) -> None:
        """Start what is to come next on each side, and stop sides that are no longer shown."""
        with self._lock:
            for attempt in self._current():
                if attempt.run_id not in sides and not attempt.view.ended:
                    attempt.handle.stop()
            for run_id in sides:
                if run_id not in self._halted:
                    self._go(run_id)

    def _go(self, run_id: str) -> None:
        at = self._next(run_id)
        try:
            if at is not None:
                self._start(run_id, at)
        except ValueError as error:  # every further look would try, and fail, again
            self._halted[run_id] = str(error)

    def _next(self, run_id: str) -> int | None:
        """The first turn this side has not answered; None while it answers or after a failure."""
        for at, turn in enumerate(self._turns):
            attempt = turn.of(run_id)
            if attempt is None:
                return at
            if attempt.view.state not in ("done", "stopped"):
                return None
        return None

    def _start(
        self, run_id: str, at: int, prefix: Sequence[int] = (), fork: Fork | None = None
    ) -> None:
        turn, messages = self._turns[at], self._messages(run_id, at)
        handle = self._pool.generate(run_id, messages, turn.sampling, prefix=prefix)
        made = Attempt(run_id, messages, turn.sampling, handle, fork)
        turn.attempts.setdefault(run_id, []).append(made)

    def _messages(self, run_id: str, at: int) -> tuple[Message, ...]:
        """Prompts up to `at`, each followed by what this side itself answered."""
        said: list[Message] = []
        for turn in self._turns[:at]:
            attempt = turn.of(run_id)
            said.append(Message("user", turn.prompt))
            said.append(Message("assistant", attempt.view.text if attempt else ""))
        return (*said, Message("user", self._turns[at].prompt))

    def stop(self, sides: Iterable[str] | None = None) -> None:
        """No more tokens from these sides, or from any."""
        with self._lock:
            stopped = list(self._current(sides))
            self._halted.update({a.run_id: "" for a in stopped})
            for attempt in stopped:
                if not attempt.view.ended:
                    attempt.handle.stop()

    def retry(self, run_id: str) -> None:
        """Ask a side again from its failed answer on, or its last one if that was stopped."""
        with self._lock:
            self._halted.pop(run_id, None)
            states = [a.view.state if (a := t.of(run_id)) else "" for t in self._turns]
            last = len(states) - 1
            at = states.index("failed") if "failed" in states else last
            if states and states[at] in ("failed", "stopped"):
                for turn in self._turns[at:]:
                    turn.attempts.pop(run_id, None)
            self._go(run_id)

    def again(self, sampling: Sampling, sides: Sequence[str]) -> None:
        """Put the last prompt to every side once more."""
        with self._lock:
            if not self._turns:
                raise ValueError("nothing was asked yet")
            for attempt in self._turns[-1].attempts.values():
                attempt[-1].handle.stop()
            self._turns[-1] = Turn(self._turns[-1].prompt, sampling)
            self._halted.clear()
            self.advance(sides)

    def fork(self, run_id: str, at: int, token: int, text: str) -> None:
        """Continue the side's last answer from its first `at` tokens and then another one."""
        with self._lock:
            attempt = self._turns[-1].of(run_id) if self._turns else None
            view = attempt.view if attempt else None
            if view is None or not view.ended or not 0 <= at < len(view.pieces):
                raise ValueError("only a last answer that has ended can be continued another way")
            change = Fork(at, text, view.pieces[at].text)
            self._start(run_id, len(self._turns) - 1, (*view.tokens[:at], token), change)

    def extend(self, run_id: str) -> None:
        """Let the side's last answer, which its length limit cut off, go on from its end.

        The longer answer takes its place. Where the context is full, nothing is started.
        """
        with self._lock:
            attempt = self._turns[-1].of(run_id) if self._turns else None
            view = attempt.view if attempt else None
            if attempt is None or view is None or not can_go_on(view):
                raise ValueError("only a last answer that its length limit cut off can go on")
            self._start(run_id, len(self._turns) - 1, view.tokens, attempt.fork)
            del self._turns[-1].attempts[run_id][-2]

    def unfork(self, run_id: str) -> None:
        """Back to the answer that the last fork came from."""
        with self._lock:
            made = self._turns[-1].attempts.get(run_id, []) if self._turns else []
            if len(made) > 1:
                made.pop().handle.stop()

    def score(self, attempt: Attempt, base: str) -> Future[Scores] | None:
        """Divergence from the 16-bit run along an answer; None until the answer has ended."""
        with self._lock:
            view = attempt.view
            if base not in attempt.scores and view.state in ("done", "stopped") and view.pieces:
                attempt.scores[base] = self._scorers.submit(
                    self._pool.score, attempt.run_id, base, attempt.messages, view.tokens
                )
            return attempt.scores.get(base)


def can_go_on(view: AnswerView) -> bool:
    """True if the answer was cut off by the number of tokens it was allowed."""
    return view.state == "done" and view.finish == "length" and bool(view.pieces)


def checked(prompt: str, turns: int) -> str:
    """The prompt as it will be asked. ValueError in one sentence if it is empty or too long."""
    text = prompt.strip()
    if not text:
        raise ValueError("write something to ask")
    if len(text) > LONGEST_PROMPT:
        raise ValueError(
            f"the prompt has {len(text):,} characters; at most {LONGEST_PROMPT:,} are allowed"
        )
    if turns >= MOST_TURNS:
        raise ValueError(f"a conversation ends after {MOST_TURNS} prompts; start a new one")
    check_conversation([Message("user", text)])
    return text


class Chats:
    """All conversations of this server. Safe from any thread."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._scorers = ThreadPoolExecutor(2, thread_name_prefix="chat-score")
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Conversation] = OrderedDict()

    def find(self, session: str, chat_id: str) -> Conversation | None:
        """The session's conversation with that id, if it is still known."""
        with self._lock:
            found = self._kept.get((session, chat_id))
            if found:
                self._kept.move_to_end((session, chat_id))
            return found

    def open(self, session: str, chat_id: str) -> Conversation:
        """That conversation, new if need be. ValueError where the session has too many at once."""
        if not ID.fullmatch(chat_id):
            raise ValueError("this address holds no conversation; start a new one")
        with self._lock:
            others = [c for key, c in self._kept.items() if key[0] == session and key[1] != chat_id]
        if sum(chat.busy() for chat in others) >= BUSY_EACH:
            raise ValueError(
                f"{BUSY_EACH} of your conversations are still being answered; stop one or wait"
            )
        with self._lock:
            key = (session, chat_id)
            made = self._kept.setdefault(key, Conversation(self.pool, self._scorers))
            self._kept.move_to_end(key)
            dropped = [self._kept.pop(old) for old in self._surplus(session)]
        for chat in dropped:
            chat.stop()
        return made

    def _surplus(self, session: str) -> list[tuple[str, str]]:
        """The least recently used beyond the limits."""
        own = [key for key in self._kept if key[0] == session]
        return own[:-KEPT_EACH] or list(self._kept)[:-KEPT]
