"""Imported by a warm process: answers are real, but for questions that ask for trouble."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from backend import chat
from backend.dialogue import Sampling
from backend.run import Run

answer = chat.answer


def answer_or_misbehave(
    run: Run, ids: Sequence[int], sampling: Sampling, prefix: Sequence[int] = ()
) -> Iterator[int]:
    asked = run.tokenizer.decode(list(ids))
    for token in answer(run, ids, sampling, prefix):
        yield token
        if "break" in asked:
            raise RuntimeError("a deliberate failure")
        if "hang" in asked:
            time.sleep(3600)


chat.answer = answer_or_misbehave
