"""The state of all work in one small answer: for the bar on top of every page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app import look, rows
from app.context import Context
from app.views import recipe_in
from jobs.events import State
from jobs.queue import RunView


def status(ctx: Context) -> dict[str, Any]:
    """Counts, one sentence about what runs, its share done, and the known models."""
    live = [view for view in ctx.runs.runs() if not view.state.ended]
    running = [view for view in live if view.state is State.RUNNING]
    return {
        "running": len(running),
        "queued": len(live) - len(running),
        "text": sentence(running, len(live) - len(running)),
        "fraction": sum(v.fraction for v in running) / len(running) if running else None,
        "models": rows.models(ctx.store) or ["demo"],
    }


def sentence(running: Sequence[RunView], queued: int) -> str:
    """`Running GPTQ W4 g64, evaluate, 43 %, about 12 s left; 5 queued`; "" when idle."""
    waiting = f"{queued} queued" if queued else ""
    if not running:
        return waiting
    first = running[0]
    parts = [f"Running {recipe_in(first).name}", first.stage or "", f"{first.fraction:.0%}"]
    if first.eta_s is not None:
        parts.append(f"about {look.duration(first.eta_s)} left")
    more = f" and {len(running) - 1} more" if len(running) > 1 else ""
    return "; ".join(p for p in (", ".join(p for p in parts if p) + more, waiting) if p)
