"""The named endpoints: what other programs may ask for through gradio_client or plain HTTP."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
import pandas as pd

from app.context import Context
from app.recipe_words import recipe_of
from app.views import model_of, spec_data
from backend.metrics import METRICS
from backend.recipes import parse
from backend.spec import ModelRef, RunSpec
from jobs.kinds import RUN
from jobs.queue import RunView
from results_db import queries


def publish(ctx: Context) -> None:
    """Add the four endpoints to the app under construction."""

    def submit_run(
        request: gr.Request,
        model: str,
        recipe: str,
        metrics: list[str],
        storage: str = "simulated",
    ) -> str:
        """Queue one run -> its id; an equal run's id where there is one."""
        with Refusing():
            spec = spec_of(model, recipe, metrics, storage)
            return ctx.change(request).submit(spec, recipe=recipe)

    def cancel_run(request: gr.Request, run_id: str) -> str:
        """Ask a run to stop -> its state."""
        with Refusing():
            ctx.change(request).cancel(run_id)
            return str(ctx.runs.view(run_id).state)

    def list_runs() -> list[dict[str, Any]]:
        """Every run: id, recipe, model, state, share done."""
        return [summary(view) for view in ctx.runs.runs() if view.kind == RUN]

    def results(run_id: str) -> dict[str, Any]:
        """A run with its measurements and notes."""
        with Refusing():
            return full(ctx, run_id)

    for endpoint in (submit_run, list_runs, results, cancel_run):
        gr.api(endpoint, api_name=endpoint.__name__, queue=False)


class Refusing:
    """Turns a refusal into an error that the caller reads as one sentence."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, at: Any) -> None:
        if isinstance(error, ValueError | PermissionError | OSError):
            raise gr.Error(str(error), print_exception=False) from error


def spec_of(model: str, recipe: str, metrics: list[str], storage: str) -> RunSpec:
    """Plain words -> a spec; ValueError in one sentence."""
    name, _, revision = model.partition("@")
    return RunSpec.model_validate(
        {
            "model": ModelRef(id=name, revision=revision),
            "steps": parse(recipe),
            "metrics": tuple(METRICS.build({"kind": kind}) for kind in metrics),
            "storage": storage,
        }
    )


def summary(view: RunView) -> dict[str, Any]:
    """One line of list_runs."""
    return {
        "run_id": view.run_id,
        "recipe": view.recipe,
        "label": view.label,
        "model": model_of(view),
        "storage": spec_data(view).get("storage"),
        "state": str(view.state),
        "fraction": view.fraction,
    }


def full(ctx: Context, run_id: str) -> dict[str, Any]:
    """One run with everything measured so far."""
    view = ctx.runs.view(run_id)
    measured = queries.measurements(ctx.store)
    notes = queries.notes(ctx.store, run_id)
    stored = queries.run(ctx.store, run_id)
    known = len(stored) and view.kind == RUN
    text = recipe_of(str(stored["spec"].iloc[0])).text if known else view.recipe
    return summary(view) | {
        "recipe": text,
        "fingerprint": view.fingerprint,
        "error": view.error,
        "measurements": records(measured[measured["run_id"] == run_id]),
        "notes": list(notes["text"]),
    }


KEPT = ("name", "value", "unit", "better", "n", "stderr", "device", "dtype", "storage", "metric_id")


def records(measured: pd.DataFrame) -> list[dict[str, Any]]:
    """Measurements as plain JSON: missing is null, not NaN; infinity is a word."""
    lines = json.loads(measured[list(KEPT)].to_json(orient="records"))
    for line, value, detail in zip(lines, measured["value"], measured["detail"], strict=True):
        if pd.notna(value) and abs(value) == float("inf"):
            line["value"] = "inf" if value > 0 else "-inf"
        line["detail"] = json.loads(detail)
    return list(lines)
