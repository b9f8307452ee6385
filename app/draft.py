"""A draft of runs: what the New run page holds, in the URL, and what it would queue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from app.form import expand, read_metric
from backend.model.identity import DEMOS, looks_local
from backend.recipes import parse
from backend.registry import Part, one_sentence
from backend.spec import Calibration, ModelRef, RunSpec

QUICK = "perplexity(limit=16)\ndivergence(limit=8)\nsize"
STANDARD = "perplexity\ndivergence\nsize\ntasks"
THOROUGH = "perplexity\ndivergence(limit=0)\nsize\ntasks(limit=0)\nspeed"
PRESETS = {"quick": QUICK, "standard": STANDARD, "thorough": THOROUGH}
MOST_RUNS = 400


@dataclass(frozen=True)
class Draft:
    """Every field is one URL parameter, as text."""

    model: str = ""
    recipes: str = ""  # one pipeline per line; a|b sweeps
    metrics: str = STANDARD  # one per line
    edit: str = ""  # number of the line in the builder, from 0
    storage: str = "simulated"
    data: str = "auto"  # calibration
    samples: str = "128"
    length: str = "2048"
    seed: str = "0"
    dtype: str = "auto"
    label: str = ""

    @classmethod
    def read(cls, query: Mapping[str, Any]) -> Draft:
        """URL parameters -> draft."""
        return cls(**{f.name: str(query[f.name]) for f in fields(cls) if f.name in query})

    def changed(self, **changes: str) -> dict[str, str]:
        """URL parameters after a change: "" removes one."""
        after = {f.name: changes.get(f.name, getattr(self, f.name)) for f in fields(self)}
        return {f.name: "" if after[f.name] == f.default else after[f.name] for f in fields(self)}

    def lines(self) -> list[str]:
        """The recipe lines that are not blank."""
        return [line.strip() for line in self.recipes.splitlines() if line.strip()]

    def metric_lines(self) -> list[str]:
        return [line.strip() for line in self.metrics.splitlines() if line.strip()]

    def line_in_builder(self) -> int | None:
        """Number of the line being edited, if there is such a line."""
        at = int(self.edit) if self.edit.isdigit() else -1
        return at if 0 <= at < len(self.lines()) else None


@dataclass(frozen=True)
class Line:
    """One recipe line: the pipelines it makes, or what is wrong with it."""

    text: str
    pipelines: tuple[str, ...] = ()
    error: str = ""


def check_line(text: str) -> Line:
    """A recipe line, validated."""
    try:
        pipelines = tuple(expand(text))
        for pipeline in pipelines:
            parse(pipeline)
    except ValueError as error:
        return Line(text, error=one_sentence(error))
    return Line(text, pipelines)


def metrics_of(draft: Draft) -> tuple[Part, ...]:
    """The metrics chosen. ValueError in one sentence."""
    return tuple(read_metric(line) for line in draft.metric_lines())


def whole(name: str, text: str) -> int:
    """A field of the page that must be a whole number."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} takes a whole number, not {text!r}") from None


def specs(draft: Draft) -> list[RunSpec]:
    """Every run the draft makes, unresolved. ValueError in one sentence for the first problem."""
    if not draft.model:
        raise ValueError("choose a model first")
    lines = [check_line(text) for text in draft.lines()]
    wrong = next((line for line in lines if line.error), None)
    if wrong:
        raise ValueError(wrong.error)
    pipelines = list(dict.fromkeys(p for line in lines for p in line.pipelines))
    if len(pipelines) > MOST_RUNS:
        raise ValueError(f"that makes {len(pipelines)} runs; at most {MOST_RUNS} at once")
    metrics = metrics_of(draft)
    if not metrics:
        raise ValueError("choose at least one metric")
    try:
        return [_spec(draft, pipeline, metrics) for pipeline in pipelines]
    except ValueError as error:
        raise ValueError(one_sentence(error)) from None


def _spec(draft: Draft, pipeline: str, metrics: Sequence[Part]) -> RunSpec:
    name, _, revision = draft.model.partition("@")
    steps = parse(pipeline)
    calibration = {
        "dataset": draft.data or "auto",
        "samples": whole("calibration samples", draft.samples),
        "length": whole("calibration length", draft.length),
        "seed": whole("seed", draft.seed),
    }
    return RunSpec.model_validate(
        {
            "model": ModelRef.model_validate(
                {"id": name, "revision": revision, "dtype": draft.dtype}
            ),
            "steps": steps,
            "metrics": tuple(metrics),
            "calibration": Calibration.model_validate(calibration),
            "storage": draft.storage,
            "seed": whole("seed", draft.seed),
        }
    )


# ---- where local files may come from -------------------------------------------------------


def check_paths(spec: RunSpec, folders: Iterable[Path]) -> None:
    """PermissionError if the spec names a local file or folder outside `folders`."""
    allowed = [folder.expanduser().resolve() for folder in folders]
    for path in local_paths(spec):
        if not any(path.is_relative_to(folder) for folder in allowed):
            raise PermissionError(
                f"{path} is not in a folder this server may read; start it with "
                f"--models {path.parent} to allow that"
            )


def local_paths(spec: RunSpec) -> list[Path]:
    """Folders and files of this machine that a spec names: model, texts."""
    names = [spec.calibration.dataset, *(getattr(m, "dataset", "") for m in spec.metrics)]
    paths = [name.removeprefix("file:").partition("#")[0] for name in names if is_path(name)]
    if spec.model.id not in DEMOS and looks_local(spec.model.id):
        paths.append(spec.model.id)
    return [Path(path).expanduser().resolve() for path in paths]


def is_path(name: str) -> bool:
    """True for `file:...` and for anything with a slash or a dot."""
    return name.startswith("file:") or any(sign in name for sign in "/\\.~")


def is_here(ref: ModelRef) -> bool:
    """True if looking at the model's files needs no network."""
    from huggingface_hub import try_to_load_from_cache

    if ref.id in DEMOS or looks_local(ref.id):
        return True
    name, _, revision = ref.id.partition("@")
    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision or None), str)


def kind_of(line: str) -> str:
    """`perplexity(limit=16)` -> perplexity."""
    return line.partition("(")[0].strip()
