"""Pairs of models: which to show next, and the matrices of what happened between them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit

from results_db.estimate import ELO_PER_NAT
from results_db.tally import WINNERS, Floats, Rows, counted_rows

EPSILON = 0.1  # share of draws that are uniform, so that every pair keeps a known probability
MIX = ("win", "loss", "tie", "bothbad")


@dataclass(frozen=True)
class Draw:
    """A pair by the side to show it on, and the probability with which it was drawn."""

    model_a: str
    model_b: str
    propensity: float


def pair_scores(
    battles: pd.DataFrame, models: Sequence[str], *, epsilon: float = EPSILON
) -> pd.DataFrame:
    """Every pair of `models` -> votes, score of model_a, gain, probability of being drawn next.

    The gain is what one more vote takes off the width of the pair's interval:
    sqrt(S / n) - sqrt(S / (n + 1)) with n = votes + 1, S = p (1 - p) and p the share of wins with
    half a win and half a loss added, twice. Pairs are drawn in proportion to it, but uniformly in
    `epsilon` of the draws.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}; it must lie between 0 and 1.")
    names = sorted(set(models))
    pairs = pd.DataFrame(itertools.combinations(names, 2), columns=["model_a", "model_b"])
    rows = counted_rows(battles)
    votes, won = (
        _square(rows, rows.table(counts), names) for counts in (rows.count, rows.count * rows.score)
    )
    lost = votes - won
    a, b = np.triu_indices(len(names), 1)
    n, taken = votes[a, b] + votes[b, a], won[a, b] + lost[b, a]
    p = (taken + 1) / (n + 2)
    gain = np.sqrt(p * (1 - p)) * (1 / np.sqrt(n + 1) - 1 / np.sqrt(n + 2))
    informed = gain / gain.sum() if len(gain) else gain
    probability = (1 - epsilon) * informed + epsilon / max(len(pairs), 1)
    return pairs.assign(votes=n.astype(np.int64), score=p, gain=gain, probability=probability)


def draw_pair(rng: np.random.Generator, scores: pd.DataFrame) -> Draw:
    """One of the pairs of `pair_scores`, or of some of its rows, on sides by a fair coin."""
    if not len(scores):
        raise ValueError("A battle takes two models, and there are not two to draw from.")
    chances = scores["probability"].to_numpy(dtype=np.float64)
    chances = chances / chances.sum()
    at = int(rng.choice(len(scores), p=chances))
    left, right = scores["model_a"].iloc[at], scores["model_b"].iloc[at]
    if rng.random() < 0.5:
        left, right = right, left
    return Draw(left, right, float(chances[at]))


def win_fractions(battles: pd.DataFrame, models: Sequence[str] | None = None) -> pd.DataFrame:
    """Share of the decisive votes between two models that the row won; blank where none was.

    Both sides together, so that a cell and its mirror image add up to 1. `models` gives rows and
    columns and their order; without it, all that have votes, by name.
    """
    rows = counted_rows(battles)
    names = _names(rows, models)
    won = _square(rows, _wins(rows), names)
    decisive = won + won.T
    share = np.divide(won, decisive, out=np.full_like(won, np.nan), where=decisive > 0)
    np.fill_diagonal(share, np.nan)
    return _frame(share, names)


def battle_counts(
    battles: pd.DataFrame, models: Sequence[str] | None = None, *, ties: bool = True
) -> pd.DataFrame:
    """Votes between two models, whichever side, with or without ties: a symmetric matrix."""
    rows = counted_rows(battles)
    names = _names(rows, models)
    counts = rows.count if ties else np.where(rows.score == 0.5, 0, rows.count)
    met = _square(rows, rows.table(counts), names)
    return _frame((met + met.T).astype(np.int64), names)


def predicted_wins(ratings: pd.DataFrame, models: Sequence[str] | None = None) -> pd.DataFrame:
    """Rows of `elo` or `bradley_terry` -> the share of wins that the row's rating promises over
    the column's. 0.5 on the diagonal; blank between components, which have no common scale."""
    known = ratings.set_index("model")
    names = list(known.index if models is None else models)
    known = known.reindex(names)
    points = known["rating"].to_numpy(dtype=np.float64) / ELO_PER_NAT
    share = expit(points[:, None] - points)
    if "component" in known:
        component = known["component"].to_numpy(dtype=np.float64, na_value=np.nan)
        share[component[:, None] != component] = np.nan
    return _frame(share, names)


def average_win_rates(battles: pd.DataFrame, models: Sequence[str] | None = None) -> pd.Series:
    """Mean of each model's win fractions over its opponents, each counting the same."""
    return win_fractions(battles, models).mean(axis=1).rename("win_rate")


def vote_mix(battles: pd.DataFrame, models: Sequence[str] | None = None) -> pd.DataFrame:
    """How the votes of each model went -> model, side (a, b, both), votes, and the shares win,
    loss, tie, bothbad; blank where there are no votes."""
    rows = counted_rows(battles)
    names = _names(rows, models)
    as_a = _outcomes(rows, rows.a, names)
    as_b = _outcomes(rows, rows.b, names)[:, [1, 0, 2, 3]]  # B's win is A's loss
    sides = {"a": as_a, "b": as_b, "both": as_a + as_b}
    frames = [_shares(counts, names).assign(side=side) for side, counts in sides.items()]
    mixed = pd.concat(frames).sort_index(kind="stable").reset_index(drop=True)
    return mixed[["model", "side", "votes", *MIX]]


def _names(rows: Rows, models: Sequence[str] | None) -> list[str]:
    return list(rows.models if models is None else dict.fromkeys(models))


def _wins(rows: Rows) -> Floats:
    """Decisive votes that the row model won, from either side. [M, M]"""
    as_a = rows.table(np.where(rows.score == 1, rows.count, 0))
    as_b = rows.table(np.where(rows.score == 0, rows.count, 0))
    return as_a + as_b.T


def _square(rows: Rows, values: Floats, names: list[str]) -> Floats:
    """The matrix over `names` in their order, 0 where a name has no votes."""
    return (
        pd.DataFrame(values, rows.models, rows.models)
        .reindex(index=names, columns=names, fill_value=0.0)
        .to_numpy(dtype=np.float64, copy=True)
    )


def _frame(values: np.ndarray, names: list[str]) -> pd.DataFrame:
    return pd.DataFrame(values, index=names, columns=names)


def _outcomes(rows: Rows, side: np.ndarray, names: list[str]) -> Floats:
    """Votes of each model on one side, by WINNERS. [names, 4]"""
    m, kinds = len(rows.models), len(WINNERS)
    counts = np.bincount(side * kinds + rows.winner, rows.count, m * kinds).reshape(m, kinds)
    return pd.DataFrame(counts, rows.models).reindex(names, fill_value=0.0).to_numpy()


def _shares(counts: Floats, names: list[str]) -> pd.DataFrame:
    votes = counts.sum(axis=1)
    with np.errstate(invalid="ignore"):
        shares = counts / votes[:, None]
    frame = pd.DataFrame(shares, columns=list(MIX))
    return frame.assign(model=names, votes=votes.astype(np.int64))
