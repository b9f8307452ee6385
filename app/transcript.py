"""A conversation as a file: JSON with every token, or Markdown to read."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from app.chat_parts import FINISH, Scene, sampling_words
from app.chats import Attempt, Turn
from app.sides import Variant


def as_json(model: str, scene: Scene) -> dict[str, Any]:
    """Everything that was asked and answered, with what decided it."""
    sides = [
        {
            "run_id": side.run_id,
            "variant": side.name,
            "recipe": side.recipe,
            "bits_per_weight": side.bits if side.bits == side.bits else None,
            "packed": side.packed,
        }
        for side in scene.sides
    ]
    return {"model": model, "sides": sides, "turns": [turn_data(scene, t) for t in scene.turns]}


def turn_data(scene: Scene, turn: Turn) -> dict[str, Any]:
    """One prompt and what each side on the screen answered."""
    answers = [answer_data(made) for run in scene.runs if (made := turn.of(run))]
    return {"prompt": turn.prompt, "sampling": asdict(turn.sampling), "answers": answers}


def answer_data(attempt: Attempt) -> dict[str, Any]:
    """An answer with its tokens and times."""
    view = attempt.view
    return {
        "run_id": attempt.run_id,
        "text": view.text,
        "tokens": list(view.tokens),
        "state": view.state,
        "finish": view.finish,
        "ttft_s": view.ttft_s,
        "seconds": view.seconds,
        "packed": view.packed,
        "dtype": view.dtype,
        "cached": view.cached,
        "dropped_turns": view.dropped,
        "notes": list(view.notes),
        "fork": asdict(attempt.fork) if attempt.fork else None,
    }


def as_markdown(model: str, scene: Scene) -> str:
    """The conversation to read; prompts and answers are quoted, so that they stay what they are."""
    parts = [f"# Chat with variants of {model}"]
    for at, turn in enumerate(scene.turns, 1):
        how = sampling_words(turn.sampling) or "greedy"
        parts += [f"## Prompt {at} ({how})", quoted(turn.prompt)]
        parts += [answer_text(side, turn) for side in scene.sides]
    return "\n\n".join(parts) + "\n"


def answer_text(side: Variant, turn: Turn) -> str:
    """One side's answer under its name."""
    attempt = turn.of(side.run_id)
    if attempt is None:
        return f"### {side.name}\n\nNot asked."
    view = attempt.view
    ended = f"{len(view.pieces)} tokens, ended {FINISH[view.finish] or view.state}"
    return f"### {side.name} ({side.bits:.2f} bits per weight)\n\n{quoted(view.text)}\n\n{ended}"


def quoted(text: str) -> str:
    """A text as a block quote."""
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines() or [""])
