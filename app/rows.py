"""Rows that charts and tables show: the store's wide table with each recipe taken apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, cast

import pandas as pd

from app import look
from app.context import Picks
from app.recipe_words import Recipe, recipe_of
from backend.registry import short_hash
from results_db import queries
from results_db.compare import NORMAL_95, on_front
from results_db.store import Store

CONDITIONS = ("metric_id", "version", "n", "device", "dtype")
QUALITY = ("perplexity", "mean_kld", "same_top")
SIZE = ("bits_per_weight", "weight_bytes")


def models(store: Store) -> list[str]:
    """Ids of the models that were run, the last one first."""
    found = queries.models(store).sort_values("last_submitted", ascending=False)
    return list(dict.fromkeys(found["model"].dropna()))


def wide(store: Store, model: str) -> pd.DataFrame:
    """`queries.wide` of one model with the recipe's columns: text, family, target, bits, packed."""
    return _wide(store, store.version, model).copy(deep=False)  # pandas copies on write


@lru_cache(maxsize=8)
def _wide(store: Store, version: int, model: str) -> pd.DataFrame:
    """Kept until the store moves: every click and every open page asks for it."""
    rows = queries.wide(store)
    rows = rows[rows["model"] == model] if model else rows
    specs = queries.runs(store)[["run_id", "spec"]]
    rows = rows.merge(specs, on="run_id", how="left").reset_index(drop=True)
    taken = [asdict(recipe_of(spec)) for spec in rows.pop("spec")]
    parts = tell_apart(pd.DataFrame(taken, columns=list(Recipe.__annotations__), index=rows.index))
    packed = (rows["storage"] == "packed") | rows["is_baseline"].astype(bool)
    return pd.concat([rows, parts, packed.rename("packed")], axis=1)


def tell_apart(parts: pd.DataFrame) -> pd.DataFrame:
    """Short names that stand for several recipes are replaced by their long ones."""
    texts = parts.groupby("name")["text"].transform("nunique")
    return parts.assign(name=parts["name"].where(texts < 2, parts["long_name"]))


def measured(rows: pd.DataFrame) -> list[str]:
    """Names of the measurements in wide rows, the well-known first, a mean before its parts."""
    names = [c.removesuffix("__unit") for c in rows.columns if c.endswith("__unit")]
    order = list(look.LABELS)
    places = {name: order.index(name) if name in order else len(order) for name in names}
    return sorted(names, key=lambda n: (places[n], "_" in n.partition("/")[0], n))


def condition(rows: pd.DataFrame, name: str, what: str) -> str:
    """A condition that all rows share ("unit", "better"); the most frequent where they do not."""
    column = rows.get(f"{name}__{what}")
    values = column.dropna() if column is not None else pd.Series(dtype=object)
    return str(values.mode().iloc[0]) if len(values) else ""


Record = Mapping[str, Any]  # one row: column -> value


def records(table: pd.DataFrame) -> list[Record]:
    """Rows one by one."""
    return cast("list[Record]", table.to_dict("records"))


@dataclass(frozen=True)
class Axis:
    """One measurement as an axis."""

    name: str
    unit: str
    better: str
    log: bool = False

    @property
    def title(self) -> str:
        """`Mean KL divergence, nats (lower is better)`."""
        unit = look.SHOWN_UNITS.get(self.unit, "")
        unit = "" if unit and unit in look.label(self.name).lower() else unit
        direction = f" ({self.better} is better)" if self.better else ""
        return look.label(self.name) + (f", {unit}" if unit else "") + direction


def axis(rows: pd.DataFrame, name: str, scale: str = "") -> Axis:
    """The axis of a measurement; logarithmic by itself where values span more than a decade."""
    unit, better = condition(rows, name, "unit"), condition(rows, name, "better")
    values = rows[name].dropna() if name in rows else pd.Series(dtype=float)
    positive = bool(len(values)) and bool((values > 0).all())
    decade = 4 if unit in ("bits", "bytes") else 10  # sizes halve and double: log sooner
    spans = positive and values.max() >= decade * values.min()
    return Axis(name, unit, better, log=positive and (scale == "log" or (not scale and spans)))


def default_axes(rows: pd.DataFrame, picks: Picks) -> tuple[str, str]:
    """Names of the axes: what was picked and is measured, else size against quality."""
    names = measured(rows)
    if not rows["state"].isin(["done", "failed", "cancelled"]).all():
        names = list(dict.fromkeys([*names, SIZE[0], QUALITY[0]]))  # on their way: hold the axes
    x = next((n for n in (picks.x, *SIZE, *names) if n in names), "")
    y = next((n for n in (picks.y, *QUALITY, *names) if n in names and n != x), x)
    return x, y


# ---- like with like ------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditions:
    """One way of measuring the two axes: rows under it may share a chart."""

    key: str
    text: str  # "cpu, float32; perplexity over 64"
    rows: int


def condition_key(row: Record, names: Sequence[str]) -> str:
    """A short key over everything that the numbers called `names` were measured under."""
    return short_hash([[str(row.get(f"{n}__{c}")) for c in CONDITIONS] for n in names])[:8]


def condition_sets(rows: pd.DataFrame, names: Sequence[str]) -> list[Conditions]:
    """The sets of conditions under which all `names` were measured, the most frequent first."""
    complete = rows.dropna(subset=[n for n in names if n in rows])
    found = records(complete)
    keys = pd.Series([condition_key(r, names) for r in found], dtype=object)
    counts = keys.value_counts()
    first = dict(reversed(list(zip(keys, found, strict=True))))
    sets = [
        Conditions(str(key), condition_text(first[str(key)], names), int(count))
        for key, count in counts.items()
    ]
    return told_apart(sets)


def condition_text(row: Record, names: Sequence[str]) -> str:
    """The conditions of one row in words."""
    counted = [n for n in names if str(row.get(f"{n}__unit")) not in ("bits", "bytes")] or names
    places = dict.fromkeys(f"{row[f'{n}__device']}, {row[f'{n}__dtype']}" for n in counted)
    counts = [
        f"{look.inline(n)} n = {look.whole(row[f'{n}__n'])}"
        for n in counted
        if row.get(f"{n}__n") is not None and not pd.isna(row[f"{n}__n"])
    ]
    return "; ".join([*places, *counts])


def told_apart(sets: Sequence[Conditions]) -> list[Conditions]:
    """Sets whose words are equal get the key added: they differ in the metric's settings."""
    texts = [s.text for s in sets]
    return [
        replace(s, text=f"{s.text}; settings {s.key[:4]}") if texts.count(s.text) > 1 else s
        for s in sets
    ]


@dataclass(frozen=True)
class Choice:
    """What a chart shows of all rows, and what it leaves out."""

    rows: pd.DataFrame
    sets: list[Conditions]
    chosen: str
    unmeasured: int  # rows without a value on one of the axes

    def __deepcopy__(self, memo: dict[int, Any]) -> Choice:
        """Itself, frozen as it is: pandas copies `attrs` with every operation."""
        return self


def like(rows: pd.DataFrame, names: Sequence[str], wanted: str = "") -> Choice:
    """The rows measured under one set of conditions: the wanted one, else the most frequent."""
    known = [n for n in names if n in rows]
    complete = rows.dropna(subset=known) if known else rows.iloc[:0]
    sets = condition_sets(rows, known) if known else []
    chosen = wanted if any(s.key == wanted for s in sets) else (sets[0].key if sets else "")
    keys = [condition_key(r, known) for r in records(complete)]
    mask = pd.Series([key == chosen for key in keys], index=complete.index, dtype=bool)
    here = complete[mask].reset_index(drop=True)
    return Choice(here, sets, chosen, rows["run_id"].nunique() - complete["run_id"].nunique())


def kept(rows: pd.DataFrame, picks: Picks) -> pd.DataFrame:
    """Rows that pass the filters; the baseline always does."""
    keep = pd.Series(True, index=rows.index)
    for chosen, column in (
        (picks.family, "family"),
        (picks.bits, "bits"),
        (picks.target, "target"),
    ):
        if chosen:
            keep &= rows[column].isin(chosen)
    if picks.packed:
        keep &= rows["packed"]
    if picks.search:
        keep &= found(rows, picks.search)
    return rows[keep | rows["is_baseline"].astype(bool)].reset_index(drop=True)


def with_bases(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Rows with `<name>__base` and `<name>__base_stderr`: the 16-bit run's, measured alike."""
    columns, found = {}, records(rows)
    for name in names:
        known = {_alike(row, name): row for row in found if row["is_baseline"]}
        beside = [known.get(_alike(row, name), {}) for row in found]
        for what, column in (("base", name), ("base_stderr", f"{name}__stderr")):
            columns[f"{name}__{what}"] = [float(row.get(column, math.nan)) for row in beside]
    return pd.concat([rows, pd.DataFrame(columns, index=rows.index, dtype=float)], axis=1)


def _alike(row: Record, name: str) -> tuple[str, ...]:
    """What a number must share with the baseline's to be compared with it."""
    same = (f"{name}__{what}" for what in ("metric_id", "version", "device", "dtype"))
    return (str(row["model_content"]), *(str(row.get(column)) for column in same))


def found(rows: pd.DataFrame, search: str) -> pd.Series:
    """Which rows have every word of `search` in name, recipe, label, storage or run id."""
    columns = ["name", "text", "recipe", "label", "storage", "run_id"]
    words = search.lower().split()
    texts = [" ".join(map(str, values)).lower() for values in rows[columns].to_numpy()]
    hits = [all(word in text for word in words) for text in texts]
    return pd.Series(hits, index=rows.index, dtype=bool)


def with_front(rows: pd.DataFrame, x: Axis, y: Axis) -> pd.DataFrame:
    """Rows with a `front` column; the 16-bit baseline is a reference, not a competitor."""
    rows = rows.copy()
    rivals = rows[~rows["is_baseline"].astype(bool)]
    better = [a.better or "lower" for a in (x, y)]
    rows["front"] = False
    if len(rivals):
        front = on_front(rivals, x.name, y.name, *better)  # type: ignore[arg-type]
        rows.loc[rivals.index, "front"] = front
    return rows


def apart(a: Record, b: Record, name: str) -> bool:
    """True if the 95 % intervals of a measurement do not touch."""
    low = (a, b) if a[name] <= b[name] else (b, a)
    half = [NORMAL_95 * _error(row, name) for row in low]
    return low[0][name] + half[0] < low[1][name] - half[1]


def _error(row: Record, name: str) -> float:
    error = row.get(f"{name}__stderr")
    return 0.0 if error is None or pd.isna(error) else float(error)
