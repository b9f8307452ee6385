"""A chat pool without models: answers are written down beforehand and come when a test says so."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from jobs.chat_types import (
    AnswerView,
    Message,
    Piece,
    PoolState,
    Sampling,
    Scores,
    TopToken,
)


def token_of(text: str) -> int:
    """A token's number: the same text always has the same."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 50_000


def pieces_of(texts: Sequence[str]) -> tuple[Piece, ...]:
    return tuple(Piece(token_of(text), text) for text in texts)


class Told:
    """An answer that grows when it is told to."""

    def __init__(self, pieces: tuple[Piece, ...], given: int, position: int) -> None:
        self._all = pieces
        self._lock = threading.Lock()
        state: Any = "queued" if position else "running"
        self._view = AnswerView(state=state, position=position)
        self._show(pieces=pieces[:given], given=given)

    def view(self) -> AnswerView:
        return self._view

    def stop(self) -> None:
        if not self._view.ended:
            self._show(state="stopped", finish="stopped", seconds=1.0)

    def grow(self, count: int = 1) -> None:
        """So many more tokens; the last of them ends it."""
        with self._lock:
            have = min(len(self._view.pieces) + count, len(self._all))
            times = {"ttft_s": 0.1, "packed": True, "position": 0}
            self._show(state="running", pieces=self._all[:have], **times)
            if have == len(self._all):
                self._show(state="done", finish="end", seconds=0.1 + (have - 1) / 50)

    def fail(self, why: str) -> None:
        self._show(state="failed", error=why)

    def _show(self, **changes: Any) -> None:
        if self._view.ended:
            return
        pieces = changes.get("pieces", self._view.pieces)
        text = "".join(piece.text for piece in pieces)
        self._view = replace(self._view, text=text, **changes, version=self._view.version + 1)


class StandIn:
    """What the page uses of a ChatPool."""

    def __init__(self, said: Mapping[str, Sequence[str]], *, slow: bool = False) -> None:
        """`said`: what each run answers, token by token; `slow`: only when `grow` is called."""
        self.said = dict(said)
        self.slow = slow
        self.asked: list[tuple[str, tuple[Message, ...], Sampling, tuple[int, ...]]] = []
        self.told: list[Told] = []
        self.warmed: SimpleQueue[str] = SimpleQueue()
        self.scored: list[tuple[str, str]] = []
        self.states: dict[str, PoolState] = {}
        self.refuses: dict[str, str] = {}
        self.position = 0

    def warm(self, run_id: str) -> None:
        self.warmed.put(run_id)

    def state(self, run_id: str) -> PoolState:
        return self.states.get(run_id, PoolState())

    def generate(
        self,
        run_id: str,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        prefix: Sequence[int] = (),
    ) -> Told:
        if run_id in self.refuses:
            raise ValueError(self.refuses[run_id])
        self.asked.append((run_id, tuple(messages), sampling, tuple(prefix)))
        written = pieces_of(self.said.get(run_id, ["nothing"]))
        begun = tuple(Piece(token, f"<{token}>") for token in prefix)
        told = Told(begun + written[len(begun) :], len(begun), self.position)
        self.told.append(told)
        if not self.slow:
            told.grow(10_000)
        return told

    def grow(self, count: int = 1) -> None:
        """So many more tokens of every answer."""
        for told in self.told:
            told.grow(count)

    def score(
        self, run_id: str, base_run_id: str, messages: Sequence[Message], tokens: Sequence[int]
    ) -> Scores:
        """Divergence 0.001, 0.05, 0.3, 1, 5 and so on round; the 16-bit model would say other."""
        self.scored.append((run_id, base_run_id))
        scale = (0.001, 0.05, 0.3, 1.0, 5.0)
        own = tuple((TopToken(t, f"<{t}>", 0.6), TopToken(7, " seven", 0.1)) for t in tokens)
        base = tuple((TopToken(8, " eight", 0.7), TopToken(t, f"<{t}>", 0.2)) for t in tokens)
        return Scores(
            tokens=tuple(tokens),
            kld=tuple(scale[i % len(scale)] for i in range(len(tokens))),
            nll=(0.5,) * len(tokens),
            base_nll=(1.6,) * len(tokens),
            top=own,
            base_top=base,
            dtype="float32",
        )

    def close(self) -> None:
        pass
