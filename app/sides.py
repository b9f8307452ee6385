"""Variants to chat with: the finished runs of a model, and which of them stand side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from markupsafe import Markup

from app import look, rows
from results_db import queries
from results_db.store import Store

MOST = 4


@dataclass(frozen=True)
class Variant:
    """What one finished run made."""

    run_id: str
    name: str  # recipe in words
    recipe: str  # canonical text
    family: str
    target: str
    packed: bool
    baseline: bool
    bits: float  # per weight as measured, else of the codes
    divergence: float  # mean KL divergence from the 16-bit model, NaN where not measured
    content: str  # which weights the run began from

    @property
    def mark(self) -> Markup:
        """Its mark on the charts."""
        return look.mark(self.target, self.packed, self.family, self.baseline)


@lru_cache(maxsize=8)
def _variants(store: Store, version: int, model: str) -> tuple[Variant, ...]:
    """Kept until the store moves: every open page asks several times a second."""
    wide = rows.wide(store, model)
    done = rows.records(wide[wide["state"] == "done"].drop_duplicates("run_id"))
    newest = {(r["artifact_id"], r["packed"]): r for r in done}  # the last of those that made it
    found = [_variant(record) for record in newest.values()]
    return tuple(sorted(found, key=lambda v: (not v.baseline, -v.bits, v.name)))


def variants(store: Store, model: str) -> tuple[Variant, ...]:
    """One per artifact, the 16-bit model first, then the most bits first."""
    return _variants(store, store.version, model)


def _variant(record: rows.Record) -> Variant:
    measured = (_number(record.get("bits_per_weight")), _number(record.get("bits")))
    return Variant(
        run_id=str(record["run_id"]),
        name=str(record["name"]),
        recipe=str(record["text"]),
        family=str(record["family"]),
        target=str(record["target"]),
        packed=bool(record["packed"]),
        baseline=bool(record["is_baseline"]),
        bits=next((value for value in measured if not math.isnan(value)), math.nan),
        divergence=_number(record.get("mean_kld")),
        content=str(record["model_content"]),
    )


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


@lru_cache(maxsize=64)
def _model(store: Store, version: int, run_id: str) -> str:
    found = queries.run(store, run_id)
    return str(found["model"].iloc[0] or "") if len(found) else ""


def model_of_run(store: Store, run_id: str) -> str:
    """Id of a run's model; "" for an unknown run."""
    return _model(store, store.version, run_id)


@lru_cache(maxsize=8)
def _latest(store: Store, version: int) -> str:
    return next(iter(rows.models(store)), "")


def latest_model(store: Store) -> str:
    """The model that was run last; "" before the first run."""
    return _latest(store, store.version)


def base_of(variant: Variant, known: Sequence[Variant]) -> Variant | None:
    """The 16-bit model that a variant was made from."""
    return next((v for v in known if v.baseline and v.content == variant.content), None)


def chosen(known: Sequence[Variant], wanted: Sequence[str]) -> list[Variant]:
    """The variants with these run ids, at most four; two telling ones where fewer were named."""
    by_id = {v.run_id: v for v in known}
    named = [by_id[run_id] for run_id in dict.fromkeys(wanted) if run_id in by_id][:MOST]
    if len(named) >= 2 or not known:
        return named
    base = base_of(named[0] if named else known[-1], known)
    if named and base and not named[0].baseline:
        return [base, named[0]]
    first = named[0] if named else base or known[0]
    rivals = [v for v in known if v is not first and v.content == first.content]
    return [first, *([most_different(rivals)] if rivals else [])]


def most_different(rivals: Sequence[Variant]) -> Variant:
    """The one farthest from 16 bits as measured, else the one with the fewest bits."""
    measured = [v for v in rivals if not math.isnan(v.divergence)]
    if measured:
        return max(measured, key=lambda v: v.divergence)
    return min(rivals, key=lambda v: (v.bits, v.name))
