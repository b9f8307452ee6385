"""What pages read of a run in the queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from app.recipe_words import BASELINE, Recipe, recipe_of_steps
from jobs.kinds import RUN
from jobs.queue import RunView


def spec_data(view: RunView) -> Mapping[str, Any]:
    """The spec as JSON, also where one of its parts is unknown here."""
    return view.spec if isinstance(view.spec, dict) else view.spec.model_dump(mode="json")


def recipe_in(view: RunView) -> Recipe:
    """The recipe of a run in words; of a job of another kind, what it does."""
    if view.kind != RUN:
        return replace(BASELINE, text=view.recipe, name=view.recipe, long_name=view.recipe)
    steps = list(spec_data(view).get("steps") or [])
    return recipe_of_steps(steps) if steps else BASELINE


def model_of(view: RunView) -> str:
    """Id of the run's model."""
    return str(spec_data(view).get("model", {}).get("id", ""))
