"""Ratings from votes: online Elo and Bradley-Terry, with intervals and ranks.

Battles are rows of `model_a, model_b, winner` and, where there are such columns, `tstamp` and
`anony`; a column `count` lets a row stand for several equal votes. `estimate` fits once what
`table` here and the questions in `gaps.py` are answered from.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from results_db import likelihood
from results_db.estimate import (
    ELO_PER_NAT,
    Anchor,
    Estimate,
    Interval,
    Reweight,
    anchor_index,
    anchor_notes,
    check_level,
    estimate,
    quantiles,
)
from results_db.style import StyleControl
from results_db.tally import Floats, Ints, Rows, cells_of, counted_rows, expanded

MEAN = 1000.0  # of the ratings, where nothing is anchored
FEW_VOTES = 10
BLOCK = 4096  # votes drawn at once for the resamples of Elo


def elo(
    battles: pd.DataFrame,
    *,
    k: float = 4.0,
    scale: float = 400.0,
    base: float = 10.0,
    start: float = MEAN,
    anchor: Anchor | None = None,
    rounds: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Online Elo, vote by vote in order of time -> the columns of `bradley_terry`.

    The order matters and old votes fade: this is for live display. Intervals lie between
    quantiles of `rounds` resamples with replacement, each in random order; 0 rounds leave them
    blank, which for a million votes is a matter of a second rather than ten.
    """
    check_level(level)
    rows = expanded(counted_rows(battles, in_time=True))
    cells = cells_of(rows)
    per_point = math.log(base) / scale
    ratings = start + _elo_in_order(rows, k, per_point)
    samples = start + _elo_resampled(rows, _picks(len(rows.at), rounds, seed), k, per_point, rounds)
    at = anchor_index(rows.models, anchor)
    if anchor and at >= 0:
        ratings, samples = (x + anchor[1] - x[..., [at]] for x in (ratings, samples))
    found = _rows(
        rows.models,
        cells.votes(),
        likelihood.existence(cells)[0],
        at,
        ratings,
        *quantiles(samples, level),
    )
    found.attrs = {
        "votes": len(rows.at),
        "interval": "bootstrap" if rounds else "none",
        "level": level,
        "notes": anchor_notes(rows.models, anchor),
    }
    return found


def bradley_terry(
    battles: pd.DataFrame,
    *,
    anchor: Anchor | None = None,
    interval: Interval = "sandwich",
    rounds: int = 500,
    seed: int = 0,
    level: float = 0.95,
    simultaneous: bool = False,
    style: StyleControl | bool | None = None,
    reweight: Reweight | None = None,
    ridge: float = 0.0,
    floors: bool = True,
) -> pd.DataFrame:
    """Maximum likelihood -> model, rating, low, high, battles, rank, component, few_votes,
    regularised; `attrs` say what was done. The arguments are those of `estimate` and `table`."""
    found = estimate(
        battles,
        anchor=anchor,
        interval=interval,
        rounds=rounds,
        seed=seed,
        style=style,
        reweight=reweight,
        ridge=ridge,
        floors=floors,
    )
    return table(found, level=level, simultaneous=simultaneous)


def table(found: Estimate, *, level: float = 0.95, simultaneous: bool = False) -> pd.DataFrame:
    """Ratings, best first within each component: the anchor's first, then those with most votes.

    The anchor's interval has no width; the others' are those of their difference to it.
    `simultaneous` widens all (Bonferroni over the models) so that they hold together, for which a
    bootstrap takes many times more rounds.
    """
    check_level(level)
    m = len(found.models)
    at, component = anchor_index(found.models, found.anchor), found.fit.component
    anchored = component == component[at] if at >= 0 else np.zeros(m, dtype=bool)
    against = np.where(anchored, at, m)  # seen from the anchor, or from the component's mean
    each = 1 - (1 - level) / max(m, 1) if simultaneous else level
    zero = np.where(anchored, found.anchor[1] if found.anchor else MEAN, MEAN)
    ends = (zero + ELO_PER_NAT * x for x in found.contrast(np.arange(m), against, each))
    rows = _rows(found.models, found.cells.votes(), component, at, *ends)
    regularised = dict(zip(found.models, found.fit.regularised, strict=True))
    rows["regularised"] = rows["model"].map(regularised).astype(bool)
    rows.attrs = {
        "votes": int(found.cells.count.sum()),
        "interval": found.interval,
        "level": each,
        "regularised": bool(found.fit.regularised.any()),
        "components": len(np.unique(component)),
        "style": found.style,
        "notes": list(found.notes),
    }
    return rows


def ranks(low: Sequence[float] | Floats, high: Sequence[float] | Floats) -> Ints:
    """Rank of each interval: 1 + how many lie wholly above it. Overlapping ones share ranks.

    Fits any measure where more is better. An interval with NaN is above nothing, and rank 1.
    """
    lows = np.sort(np.asarray(low, dtype=np.float64))
    lows = lows[~np.isnan(lows)]
    return 1 + len(lows) - np.searchsorted(lows, np.asarray(high, dtype=np.float64), "right")


def _rows(
    models: tuple[str, ...],
    votes: Floats,
    component: Ints,
    anchor: int,
    ratings: Floats,
    low: Floats,
    high: Floats,
) -> pd.DataFrame:
    """The table, with components numbered from 1 in its order and ranks within each."""
    rows = pd.DataFrame(
        {
            "model": pd.Series(models, dtype="str"),
            "rating": ratings,
            "low": low,
            "high": high,
            "battles": votes.astype(np.int64),
        }
    )
    rows["component"] = _by_votes(component, votes, anchor)
    rows["rank"] = 0
    for _, group in rows.groupby("component"):
        rows.loc[group.index, "rank"] = ranks(group["low"].to_numpy(), group["high"].to_numpy())
    rows["few_votes"] = rows["battles"] < FEW_VOTES
    rows = rows.sort_values(
        ["component", "rating", "model"], ascending=[True, False, True], ignore_index=True
    )
    return rows[["model", "rating", "low", "high", "battles", "rank", "component", "few_votes"]]


def _by_votes(component: Ints, votes: Floats, anchor: int) -> Ints:
    """Components renumbered from 1: the anchor's, then the others by falling number of votes."""
    total = np.bincount(component, votes)
    if anchor >= 0:
        total[component[anchor]] = np.inf
    place = np.empty(len(total), dtype=np.int64)
    place[np.argsort(-total, kind="stable")] = np.arange(1, len(total) + 1)
    return place[component]


def _elo_in_order(rows: Rows, k: float, per_point: float) -> Floats:
    """Points gained by each model, from 0. [M]"""
    points = [0.0] * len(rows.models)
    for a, b, score in zip(rows.a.tolist(), rows.b.tolist(), rows.score.tolist(), strict=True):
        change = k * (score - 1 / (1 + math.exp(per_point * (points[b] - points[a]))))
        points[a] += change
        points[b] -= change
    return np.array(points)


def _picks(votes: int, rounds: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """For each step of a resample, which vote each round plays: blocks of [steps, rounds]."""
    rng = np.random.default_rng(seed)
    for done in range(0, votes if rounds else 0, BLOCK):
        yield rng.integers(votes, size=(min(BLOCK, votes - done), rounds))


def _elo_resampled(
    rows: Rows, picks: Iterable[NDArray[np.int64]], k: float, per_point: float, rounds: int
) -> Floats:
    """Points gained in each round, all rounds a step at a time: [rounds, M]"""
    points = np.zeros((rounds, len(rows.models)))
    each = np.arange(rounds)
    for block in picks:
        for a, b, score in zip(rows.a[block], rows.b[block], rows.score[block], strict=True):
            gap = points[each, a] - points[each, b]
            change = k * (score - 1 / (1 + np.exp(-per_point * gap)))
            points[each, a] += change
            points[each, b] -= change
    return points
