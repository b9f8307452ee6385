"""Specs side by side, and the command that makes a run again."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from app.recipe_words import recipe_of
from backend.methods import METHODS
from backend.metrics import METRICS
from backend.spec import Calibration, ModelRef, RunSpec

Spec = Mapping[str, Any]  # a RunSpec as JSON

HIDDEN = ("kind", "content")  # says nothing to a reader beside the rest


def flat(spec: Spec) -> dict[str, str]:
    """Nested spec -> {"step 1 · format · bits": "4"}; metrics of one kind are numbered."""
    found: dict[str, str] = {}
    for name, value in spec.items():
        if name == "calibration" and value["dataset"] == "auto":
            continue  # a submitted run names its data, unless its steps look at none
        if name == "steps":
            for number, step in enumerate(value, 1):
                found |= _leaves(f"step {number}", step)
        elif name == "metrics":
            kinds = Counter(metric["kind"] for metric in value)
            seen: Counter[str] = Counter()
            for metric in value:
                kind = metric["kind"]
                seen[kind] += 1
                path = f"{kind} {seen[kind]}" if kinds[kind] > 1 else kind
                found |= _leaves(path, metric, hidden=("kind",))
        elif name not in HIDDEN:
            found |= _leaves(name, value)
    return found


def _leaves(path: str, value: Any, hidden: Sequence[str] = ("content",)) -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {path: words(value)}
    found: dict[str, str] = {}
    for name, inner in value.items():
        if name == "kind" and "kind" not in hidden:
            found[path] = words(inner)
        elif name not in hidden:
            found |= _leaves(f"{path} · {name.replace('_', ' ')}", inner, hidden)
    return found


def defaults(spec: Spec) -> dict[str, str]:
    """`flat` of the same spec with every knob at its default; kinds and the model count as told."""
    parts = {"steps": METHODS, "metrics": METRICS}
    plain = RunSpec(model=ModelRef(id="-")).model_dump(mode="json")
    plain["calibration"]["dataset"] = "-"
    for name, registry in parts.items():
        plain[name] = [_default_part(registry, part) for part in spec.get(name, ())]
    return {n: v for n, v in flat(plain).items() if n != "model · id" and not n[-1].isdigit()}


def _default_part(registry: Any, part: Spec) -> dict[str, Any]:
    try:
        return dict(registry.find(part["kind"])().data())
    except ValueError:  # a kind of another version: all of it is told
        return {"kind": part["kind"]}


def words(value: Any) -> str:
    """A value as a reader wants it: yes, no, none, plain text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(specs: Sequence[Spec]) -> list[tuple[str, list[str]]]:
    """[(name, value in each spec), ...] of what is not the same everywhere; – where absent."""
    tables = [flat(spec) for spec in specs]
    names = dict.fromkeys(name for table in tables for name in table)
    usual = [defaults(spec) for spec in specs]
    lines = [(name, [table.get(name, "–") for table in tables]) for name in names]
    return [
        (name, values)
        for name, values in lines
        if len(set(values)) > 1 and not _only_defaults(name, values, usual)
    ]


def _only_defaults(name: str, values: Sequence[str], usual: Sequence[Mapping[str, str]]) -> bool:
    """True for a knob that some lack and the others leave at its default: it says nothing."""
    told = [(v, table.get(name)) for v, table in zip(values, usual, strict=True) if v != "–"]
    return len(told) < len(values) and all(value == default for value, default in told)


def reproduce(spec_text: str) -> str:
    """The command line that makes this run again, defaults left out."""
    spec = json.loads(spec_text)
    model = spec["model"]
    name = model["id"] + (f"@{model['revision']}" if model.get("revision") else "")
    parts = ["quantarena", "run", "--model", name, "--recipe", recipe_of(spec_text).text]
    kinds = [_metric(metric) for metric in spec.get("metrics", ())]
    parts += ["--metrics", ",".join(kinds)] if kinds else []
    parts += ["--storage", "packed"] if spec.get("storage") == "packed" and spec["steps"] else []
    parts += ["--dtype", model["dtype"]] if model.get("dtype", "auto") != "auto" else []
    parts += ["--seed", str(spec["seed"])] if spec.get("seed") else []
    parts += _calibration(spec.get("calibration", {})) if spec["steps"] else []
    return shlex.join(parts)


def _calibration(settings: Spec) -> list[str]:
    """The flags for the tokens that methods see, defaults left out."""
    dataset = settings.get("dataset", "auto")
    flags = ["--calibration", dataset] if dataset != "auto" else []
    for name in ("samples", "length", "seed"):
        usual = Calibration.model_fields[name].default
        if (value := settings.get(name, usual)) != usual:
            flags += [f"--calibration-{name}", str(value)]
    return flags


def _metric(data: Spec) -> str:
    """A metric as its kind, with the knobs that are not at their defaults in brackets."""
    try:
        defaults = METRICS.find(data["kind"])().data()
    except ValueError:
        return str(data["kind"])
    knobs = {k: v for k, v in data.items() if k != "kind" and v != defaults.get(k)}
    inside = ",".join(
        f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in knobs.items()
    )
    return data["kind"] + (f"({inside})" if inside else "")
