"""What a run's events say, as rows. Pure: no database, no clock."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from results_db.database import StoreError

Row = dict[str, Any]
Event = Mapping[str, Any]

# A later row with the same key takes the place of the earlier one. First comes the job's own id.
KEYS: dict[str, tuple[str, ...]] = {
    "measurements": ("run_id", "metric_id", "name", "device", "dtype"),
    "layers": ("run_id", "metric_id", "block", "module", "name"),
    "notes": ("run_id", "block", "module", "text"),
    "mined": ("job_id", "run_id", "prompt_id"),
    "judged_answers": ("job_id", "run_id", "question", "turn"),
    "verdicts": ("job_id", "question", "turn", "run_a", "run_b", "swapped"),
    "kernel_times": ("job_id", "kernel", "weight", "act", "m", "n", "k"),
    "ceilings": ("job_id", "name"),
}


@dataclass(frozen=True)
class Batch:
    """Rows that a stretch of events adds: the run itself, and keyed rows of each table."""

    run: Row
    tables: dict[str, dict[tuple, Row]] = field(default_factory=lambda: {t: {} for t in KEYS})
    items: dict[tuple, list[float | None]] = field(default_factory=dict)

    def put(self, table: str, row: Row) -> tuple:
        """Keep `row` as the last word on its key -> that key."""
        key = tuple(row[column] for column in KEYS[table])
        self.tables[table][key] = row
        return key


def fold(run: Row, events: Iterable[Event]) -> Batch:
    """The run's row as it was before `events` -> everything those events say."""
    batch = Batch(dict(run))
    for number, event in enumerate(events, 1):
        try:
            FOLDS.get(event.get("type", ""), _ignore)(batch, event)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"Run {run['run_id']}: new event {number} ({_type(event)}) cannot be stored: "
                f"{type(error).__name__}: {error}."
            ) from error
    return batch


def new_run(run_id: str, spec: str) -> Row:
    """The row of a run of which nothing but its spec is known."""
    empty = ("fingerprint", "artifact_id", "label", "recipe", "targets", "env", "error")
    times = ("submitted", "started", "finished")
    blank: Row = dict.fromkeys(empty + times)
    return blank | from_spec(spec) | {"run_id": run_id, "state": "queued", "seen_bytes": 0}


def from_spec(spec: str) -> Row:
    """Columns of `runs` that the text of spec.json decides."""
    try:
        parsed = json.loads(spec)
        model = parsed.get("model", {})
        return {
            "spec": spec,
            "kind": parsed.get("kind", "run"),
            "storage": parsed.get("storage"),
            "model": model.get("id"),
            "revision": model.get("revision"),
            "model_content": model.get("content"),
        }
    except (AttributeError, ValueError) as error:
        raise StoreError(f"The spec is not a JSON object with a model: {error}.") from error


def number(value: float | str | None) -> float | None:
    """A JSON number, or the strings "nan", "inf", "-inf" -> float; None stays missing."""
    return None if value is None else float(value)


def plain(value: Any) -> Any:
    """The same value in strict JSON, which has no NaN and no infinity: those become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def _type(event: Any) -> str:
    return str(event.get("type")) if isinstance(event, Mapping) else type(event).__name__


def _ignore(batch: Batch, event: Event) -> None:
    pass


def _submitted(batch: Batch, event: Event) -> None:
    batch.run["submitted"] = _time(event)
    names = ("label", "recipe", "fingerprint", "artifact_id")
    batch.run.update({name: event[name] for name in names if name in event})
    if "targets" in event:
        batch.run["targets"] = ",".join(event["targets"])


def _state(batch: Batch, event: Event) -> None:
    state = event["state"]
    ended = state in ("done", "failed", "cancelled")
    batch.run["state"] = state
    batch.run["error"] = _json(event.get("error"))
    batch.run["finished"] = _time(event) if ended else None
    if state == "queued":
        batch.run["started"] = None
    elif state == "running" and batch.run["started"] is None:
        batch.run["started"] = _time(event)  # later stages also say running


def _env(batch: Batch, event: Event) -> None:
    batch.run["env"] = _json(event["env"])


def _note(batch: Batch, event: Event) -> None:
    row = {"block": event.get("block"), "module": event.get("module") or "", "text": event["text"]}
    batch.put("notes", {"run_id": batch.run["run_id"]} | row)


def _measurement(batch: Batch, event: Event) -> None:
    row = {
        "run_id": batch.run["run_id"],
        "metric_id": event["metric_id"],
        "name": event["name"],
        "value": number(event.get("value")),
        "unit": event.get("unit"),
        "better": event.get("better"),
    }
    if event.get("layer"):
        block, module = event["layer"]
        batch.put("layers", row | {"block": block, "module": module or ""})
    else:
        key = batch.put("measurements", row | _conditions(batch, event))
        batch.items[key] = [number(value) for value in event.get("items") or ()]


MINED_NUMBERS = ("kld", "kld_max", "agreement")
MINED = (
    *("run_id", "artifact_id", "prompt_id", "category", "language", "prompt"),
    *("departs", "tokens", "base_tokens", "finish", "identical", "answer_hash"),
    *("temperature", "top_p", "max_new", "seed", "device", "dtype", "storage"),
)


def _mined(batch: Batch, event: Event) -> None:
    of_job = {"job_id": batch.run["run_id"], "model": batch.run["model"], "mined_at": _time(event)}
    numbers = {name: number(event[name]) for name in MINED_NUMBERS}
    batch.put("mined", of_job | numbers | {name: event[name] for name in MINED})


ANSWER = (
    *("run_id", "artifact_id", "question", "category", "language", "turn", "prompt", "text"),
    *("characters", "tokens", "finish", "temperature", "top_p", "max_new", "seed"),
)
VERDICT = (
    *("judge_id", "style", "question", "category", "language", "turn", "run_a", "run_b"),
    *("swapped", "games", "score", "preference", "failed", "judge", "text", "prompt_hash"),
    *("prompt_tokens", "completion_tokens", "latency_s", "attempts"),
)


def _answer(batch: Batch, event: Event) -> None:
    of_job = {"job_id": batch.run["run_id"], "answered_at": _time(event)}
    batch.put("judged_answers", of_job | {name: event[name] for name in ANSWER})


def _verdict(batch: Batch, event: Event) -> None:
    of_job = {"job_id": batch.run["run_id"], "judged_at": _time(event)}
    flags = {"flags": ",".join(event["flags"])}
    batch.put("verdicts", of_job | flags | {name: event[name] for name in VERDICT})


KERNEL_TIME = (
    *("kernel", "weight", "act", "m", "n", "k", "weight_bytes", "steady", "correct"),
    *("device", "threads"),
)
KERNEL_NUMBERS = ("median_ms", "p20_ms", "p80_ms", "eager_ms", "ratio_to_bf16", "max_rel_err")


def _kernel_time(batch: Batch, event: Event) -> None:
    of_job = {"job_id": batch.run["run_id"], "measured_at": _time(event)}
    numbers = {name: number(event[name]) for name in KERNEL_NUMBERS}
    batch.put("kernel_times", of_job | numbers | {name: event[name] for name in KERNEL_TIME})


def _ceiling(batch: Batch, event: Event) -> None:
    of_job = {"job_id": batch.run["run_id"], "measured_at": _time(event)}
    told = {name: event[name] for name in ("name", "unit", "device")}
    batch.put("ceilings", of_job | told | {"value": number(event["value"])})


def _conditions(batch: Batch, event: Event) -> Row:
    """What a number was measured under, beside the columns it shares with a layer's."""
    return {
        "metric": event.get("metric"),
        "version": event.get("version", 1),
        "n": event.get("n"),
        "stderr": number(event.get("stderr")),
        "detail": _json(event.get("detail") or {}),
        "device": event.get("device") or "",
        "dtype": event.get("dtype") or "",
        "storage": event.get("storage") or batch.run["storage"],
        "data": event.get("data"),
        "measured_at": _time(event),
    }


def _time(event: Event) -> datetime:
    """UTC without a zone, as the database keeps it."""
    return datetime.fromtimestamp(event["t"], UTC).replace(tzinfo=None)


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(plain(value), ensure_ascii=False)


FOLDS: dict[str, Callable[[Batch, Event], None]] = {
    "submitted": _submitted,
    "state": _state,
    "env": _env,
    "note": _note,
    "measurement": _measurement,
    "mined": _mined,
    "answer": _answer,
    "verdict": _verdict,
    "kernel_time": _kernel_time,
    "ceiling": _ceiling,
}
