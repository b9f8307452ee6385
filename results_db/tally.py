"""Battles as the ratings count them: which rows count, as arrays, and equal votes together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import union_categoricals

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What the vote is worth for side A. Both kinds of tie are half a win and half a loss.
SCORES: Mapping[str, float] = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}
WINNERS = tuple(SCORES)
NEEDED = ("model_a", "model_b", "winner")


@dataclass(frozen=True)
class Rows:
    """The battles that count, in arrays over rows; `at` are their positions in the frame."""

    models: tuple[str, ...]  # sorted; sides index it
    a: Ints
    b: Ints
    winner: Ints  # index into WINNERS
    count: Ints  # equal votes that a row stands for
    at: Ints

    @property
    def score(self) -> Floats:
        """Of side A: 1, 0.5 or 0."""
        return np.array(list(SCORES.values()))[self.winner]

    def table(self, counts: NDArray[Any]) -> Floats:
        """Sums of `counts` per side A (row) and side B (column): [models, models]."""
        m = len(self.models)
        return sums(self.a * m + self.b, counts, m * m).reshape(m, m)


@dataclass(frozen=True)
class Cells:
    """Votes of equal pair, outcome, weight and style, counted together.

    Each is seen from the model whose name comes first, so that the side on which a model was
    shown leaves no trace.
    """

    models: tuple[str, ...]
    first: Ints  # [C]
    second: Ints  # [C], first < second
    score: Floats  # [C] of `first`: 1, 0.5 or 0
    count: Floats  # [C] votes
    weight: Floats  # [C] of each of these votes, 1 on average
    features: Floats  # [F, C] style of first against second

    def votes(self) -> Floats:
        """Number of votes of each model. [M]"""
        m = len(self.models)
        return sums(self.first, self.count, m) + sums(self.second, self.count, m)

    def pair(self) -> Ints:
        """One number per pair of models. [C]"""
        return self._pair

    @cached_property
    def _pair(self) -> Ints:
        """Asked for at every step of a fit."""
        return self.first * len(self.models) + self.second


def counted_rows(battles: pd.DataFrame, *, in_time: bool = False) -> Rows:
    """Battles -> those that count: names hidden (`anony` not False), two models, a known winner.

    `count`, where there is such a column, says how many equal votes a row stands for; `in_time`
    sorts by `tstamp`, where there is one.
    """
    check_battles(battles)
    code, names = _coded(battles["model_a"], battles["model_b"])
    a, b = code[: len(battles)], code[len(battles) :]
    winner = _winners(battles["winner"])
    count = _whole_counts(battles)
    counts = (a != b) & (count > 0)  # a battle with oneself says nothing
    if "anony" in battles:
        counts &= battles["anony"].ne(False).to_numpy(dtype=bool, na_value=True)
    at = np.flatnonzero(counts)
    if in_time and "tstamp" in battles:
        moments = battles["tstamp"].iloc[at].reset_index(drop=True)
        at = at[moments.sort_values(kind="stable").index.to_numpy()]
    rows = Rows(tuple(map(str, names)), a[at], b[at], winner[at], count[at], at)
    return rows if len(at) == len(battles) else _without_absent(rows)


def cells_of(rows: Rows, weight: Floats | None = None, features: Floats | None = None) -> Cells:
    """Rows -> cells. `weight` [rows] is brought to 1 on average; `features` [F, rows] keep
    every row apart."""
    swapped = rows.a > rows.b
    first, second = np.minimum(rows.a, rows.b), np.maximum(rows.a, rows.b)
    score = np.where(swapped, 1 - rows.score, rows.score)
    count = rows.count.astype(np.float64)
    if features is not None:
        weight = np.ones(len(count)) if weight is None else weight
        style = np.where(swapped, -features, features)
        return _weighed(Cells(rows.models, first, second, score, count, weight, style))
    m = len(rows.models)
    key = (first * m + second) * 3 + (2 * score).astype(np.int64)
    summed = pd.Series(count).groupby(key if weight is None else [key, weight]).sum()
    keys = summed.index.get_level_values(0).to_numpy(dtype=np.int64)
    weights = np.ones(len(keys)) if weight is None else summed.index.get_level_values(1)
    pair, outcome = np.divmod(keys, 3)
    return _weighed(
        Cells(
            rows.models,
            *np.divmod(pair, max(m, 1)),
            score=outcome / 2,
            count=np.asarray(summed, dtype=np.float64),
            weight=np.asarray(weights, dtype=np.float64),
            features=np.empty((0, len(keys))),
        )
    )


def balanced_pairs(cells: Cells, floor: int = 50) -> Cells:
    """Each vote weighs 1 / max(votes of its pair, floor): often-drawn pairs count less."""
    _, at = np.unique(cells.pair(), return_inverse=True)
    votes = sums(at, cells.count, len(at))[at]
    return _weighed(replace(cells, weight=1 / np.maximum(votes, floor)))


def expanded(rows: Rows) -> Rows:
    """A row for each single vote."""
    each = np.repeat(np.arange(len(rows.at)), rows.count)
    single = np.ones(len(each), dtype=np.int64)
    return Rows(rows.models, rows.a[each], rows.b[each], rows.winner[each], single, rows.at[each])


def sums(at: Ints, values: NDArray[Any], size: int) -> Floats:
    """Sum of the values that share a place, for each of `size` places."""
    return np.asarray(np.bincount(at, values, size), dtype=np.float64)


def check_battles(battles: pd.DataFrame, also: Sequence[str] = ()) -> None:
    """Refuse a frame that lacks a column."""
    if missing := [name for name in (*NEEDED, *also) if name not in battles]:
        raise ValueError(
            f"Battles need the columns {', '.join((*NEEDED, *also))}; missing: "
            f"{', '.join(missing)}."
        )


def _coded(a: pd.Series, b: pd.Series) -> tuple[Ints, pd.Index]:
    """Both sides, one below the other, as places in the sorted list of names."""
    if a.isna().any() or b.isna().any():
        raise ValueError("Battles without the name of a model cannot be rated.")
    sides = [a, b]
    if not all(isinstance(side.dtype, pd.CategoricalDtype) for side in sides):
        plain = [s.astype(object) if isinstance(s.dtype, pd.CategoricalDtype) else s for s in sides]
        return pd.factorize(pd.concat(plain, ignore_index=True), sort=True)
    both = union_categoricals(sides, sort_categories=True, ignore_order=True)
    both = both.remove_unused_categories()
    return both.codes.astype(np.int64), both.categories


def _winners(winner: pd.Series) -> Ints:
    code, found = pd.factorize(winner, use_na_sentinel=False)
    places = {name: at for at, name in enumerate(WINNERS)}
    if unknown := [name for name in found if name not in places]:
        raise ValueError(f"winner is {unknown[0]!r}; it can be {', '.join(map(repr, WINNERS))}.")
    return np.array([places[name] for name in found], dtype=np.int64)[code]


def _whole_counts(battles: pd.DataFrame) -> Ints:
    if "count" not in battles:
        return np.ones(len(battles), dtype=np.int64)
    count = battles["count"].to_numpy(dtype=np.float64, na_value=np.nan)
    if not (np.isfinite(count) & (count >= 0) & (count == np.floor(count))).all():
        raise ValueError("count must be a whole number of votes, 0 or more, in every row.")
    return count.astype(np.int64)


def _without_absent(rows: Rows) -> Rows:
    """Models without a vote are not listed."""
    present, at = np.unique(np.concatenate([rows.a, rows.b]), return_inverse=True)
    models = tuple(rows.models[code] for code in present)
    return replace(rows, models=models, a=at[: len(rows.a)], b=at[len(rows.a) :])


def _weighed(cells: Cells) -> Cells:
    """Weights of 1 on average: then virtual ties and penalties mean the same under any."""
    if not len(cells.weight):
        return cells
    mean = np.average(cells.weight, weights=cells.count)
    return replace(cells, weight=cells.weight / mean)
