"""What a chat process can be asked to do, as those who ask see it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from jobs.answers import Question
from jobs.chat_types import AnswerState, AnswerView, Message, Piece, Scores, TopToken

Event = Mapping[str, Any]
LAST = frozenset({"done", "failed", "scored"})  # events after which a job is over


@dataclass(frozen=True)
class Mode:
    """How a model is held, as its process reported."""

    packed: bool
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name among cached answers: packed-bfloat16."""
        return f"{'packed' if self.packed else 'simulated'}-{self.dtype}"


class Job:
    """One thing a chat process is asked to do."""

    id: int = 0

    def command(self) -> dict[str, Any]:
        """What is sent."""
        raise NotImplementedError

    def place(self, position: int, loading: bool) -> None:
        """So many are done before it; `loading`: its model is not there yet."""

    def begin(self, mode: Mode) -> None:
        """It is sent now, to a model that is held like this."""

    def hear(self, event: Event) -> None:
        """Take one event of the process."""
        raise NotImplementedError

    def fail(self, why: str) -> None:
        """It will not be done. One sentence."""
        raise NotImplementedError


class Answer(Job):
    """One answer as it comes. Safe from any thread."""

    def __init__(
        self,
        question: Question,
        stop: Callable[[Answer], None] = lambda answer: None,
        keep: Callable[[Answer, AnswerView], None] = lambda answer, view: None,
    ) -> None:
        """`keep` is given the whole answer before anybody else sees that it is done."""
        self.question = question
        self._stop = stop
        self._keep = keep
        self._view = AnswerView()
        self._changed = threading.Condition()

    def view(self) -> AnswerView:
        """As it stands."""
        return self._view

    def stop(self) -> None:
        """No more tokens. What has come stays; an ended answer stays as it is."""
        self._stop(self)

    def wait(self, timeout: float | None = None) -> AnswerView:
        """Until it has ended, or so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._view.ended, timeout)
        return self._view

    def wait_change(self, version: int, timeout: float | None = None) -> AnswerView:
        """Until it is another than that version, or so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._view.version != version, timeout)
        return self._view

    # For the pool

    def show(self, **changes: Any) -> None:
        """Change what is seen. Nothing changes any more once it has ended."""
        with self._changed:
            if not self._view.ended:
                self._view = replace(self._view, **changes, version=self._view.version + 1)
                self._changed.notify_all()

    def recall(self, answered: AnswerView) -> None:
        """It is what was answered before."""
        self.show(**{name: getattr(answered, name) for name in RECALLED})

    def command(self) -> dict[str, Any]:
        asked = self.question
        return {
            "do": "generate",
            "id": self.id,
            "messages": [message.data() for message in asked.messages],
            "sampling": asdict(asked.sampling),
            "prefix": list(asked.prefix),
        }

    def place(self, position: int, loading: bool) -> None:
        state: AnswerState = "loading" if loading else "queued"
        if (self._view.position, self._view.state) != (position, state):
            self.show(position=position, state=state)

    def begin(self, mode: Mode) -> None:
        self.show(state="running", position=0, packed=mode.packed, dtype=mode.dtype)

    def hear(self, event: Event) -> None:
        heard = {
            "started": self._started,
            "tokens": self._more,
            "done": self._done,
            "failed": lambda event: self.fail(event["why"]),
        }
        heard[event["event"]](event)

    def _started(self, event: Event) -> None:
        notes, given = tuple(event["notes"]), len(event["pieces"])
        self.show(dropped=event["dropped"], notes=notes, given=given, **self._with(event))

    def _more(self, event: Event) -> None:
        self.show(ttft_s=event["ttft_s"], **self._with(event))

    def _with(self, event: Event) -> dict[str, Any]:
        """Pieces and text, longer by those of the event."""
        pieces = tuple(Piece(token, text) for token, text in event["pieces"])
        text = self._view.text + "".join(piece.text for piece in pieces)
        return {"pieces": self._view.pieces + pieces, "text": text}

    def _done(self, event: Event) -> None:
        pieces, rest = self._view.pieces, event["rest"]
        if rest and pieces:
            pieces = (*pieces[:-1], replace(pieces[-1], text=pieces[-1].text + rest))
        ended = replace(
            self._view,
            state="stopped" if event["finish"] == "stopped" else "done",
            pieces=pieces,
            text="".join(piece.text for piece in pieces),
            finish=event["finish"],
            ttft_s=event["ttft_s"],
            seconds=event["seconds"],
        )
        self._keep(self, ended)
        self.recall(ended)

    def fail(self, why: str) -> None:
        self.show(state="failed", error=why, position=0)


# All of a view but its version: an answer's own goes on.
RECALLED = tuple(field.name for field in fields(AnswerView) if field.name != "version")


class Scoring(Job):
    """One pass along an answer's tokens; its result is the process's event."""

    def __init__(
        self,
        messages: Sequence[Message],
        tokens: Sequence[int],
        *,
        write: Path | None = None,
        read: Path | None = None,
        dtype: str = "",
    ) -> None:
        """`write`, `read` and `dtype` are those of jobs.chat_worker.Chat.score."""
        self.done: Future[Event] = Future()
        self._asked = {
            "do": "score",
            "messages": [message.data() for message in messages],
            "tokens": list(tokens),
            "write": str(write or ""),
            "read": str(read or ""),
            "dtype": dtype,
        }

    def command(self) -> dict[str, Any]:
        return {**self._asked, "id": self.id}

    def hear(self, event: Event) -> None:
        if event["event"] == "failed":
            self.fail(event["why"])
        else:
            self.done.set_result(event)

    def fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(ValueError(why))


def scores_of(event: Event, tokens: tuple[int, ...], notes: tuple[str, ...] = ()) -> Scores:
    """The event of a comparison, as a value."""
    return Scores(
        tokens=tokens,
        kld=tuple(event["kld"]),
        nll=tuple(event["nll"]),
        base_nll=tuple(event["base_nll"]),
        top=tops_of(event["top"]),
        base_top=tops_of(event["base_top"]),
        dtype=event["dtype"],
        notes=notes,
    )


def tops_of(rows: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[tuple[TopToken, ...], ...]:
    """Likeliest tokens, from JSON data."""
    return tuple(tuple(TopToken(**top) for top in row) for row in rows)
