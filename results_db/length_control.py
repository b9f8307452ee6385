"""AlpacaEval's win rate against a baseline, and the same freed of answer length."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from results_db import likelihood
from results_db.tally import Cells, Floats

MINIMUM = 100  # comparisons; below, the length-controlled rate is withheld
LOOSEST = 10.0  # points of standard error; above, length and quality cannot be told apart
L2_PER_COMPARISON = 1e-3  # l2 / 2 * phi^2 is added to the loss: keeps phi finite


@dataclass(frozen=True)
class WinRate:
    """Of the evaluated model against the baseline, in percent; standard errors in points."""

    win_rate: float  # mean of the preferences
    stderr: float
    discrete: float  # a preference above 1/2 is a win, of 1/2 half a win
    length_controlled: float | None  # None: withheld, see the notes
    length_controlled_stderr: float | None
    theta: float | None  # nats in favour of the model at equal lengths
    phi: float | None  # nats per unit of tanh(difference of lengths / its deviation)
    n: int
    dropped: int  # comparisons without a preference
    notes: tuple[str, ...]


def win_rate(
    preference: ArrayLike,
    baseline_length: ArrayLike | None = None,
    model_length: ArrayLike | None = None,
    *,
    minimum: int = MINIMUM,
) -> WinRate:
    """Preferences, from 1 (the baseline's answer) to 2 (the model's), and lengths in characters.

    1.5 is a tie, as is 0, which old files have; NaN is dropped and counted. Length control fits
    logit P(model wins) = theta + phi * tanh((baseline - model) / deviation of that difference)
    and answers for equal lengths: 100 * sigmoid(theta). It is the paper's model without the
    difficulty of instructions, which is known for AlpacaEval's own only, fitted by maximum
    likelihood with a slight penalty on phi instead of a cross-validated L1 on both.
    """
    given = np.asarray(preference, dtype=np.float64)
    known = ~np.isnan(given)
    score = np.where(given == 0, 1.5, given)[known] - 1
    if not ((score >= 0) & (score <= 1)).all():
        raise ValueError("A preference must lie between 1 (baseline) and 2 (model), or be NaN.")
    n, dropped = len(score), int((~known).sum())
    if not n:
        nan = float("nan")
        notes = ("No comparison has a preference.",)
        return WinRate(nan, nan, nan, None, None, None, None, 0, dropped, notes)
    raw = 100 * float(score.mean())
    stderr = 100 * float(score.std(ddof=1)) / n**0.5 if n > 1 else float("nan")
    wins, ties = float((score > 0.5).sum()), float((score == 0.5).sum())
    fit = _Control(notes=("Answer lengths are not known.",))
    if baseline_length is not None and model_length is not None:
        longer = np.asarray(baseline_length, np.float64) - np.asarray(model_length, np.float64)
        fit = _controlled(score, longer[known], raw, minimum)
    return WinRate(
        win_rate=raw,
        stderr=stderr,
        discrete=100 * (wins + ties / 2) / n,
        length_controlled=fit.rate,
        length_controlled_stderr=fit.stderr,
        theta=fit.theta,
        phi=fit.phi,
        n=n,
        dropped=dropped,
        notes=fit.notes,
    )


@dataclass(frozen=True)
class _Control:
    rate: float | None = None
    stderr: float | None = None
    theta: float | None = None
    phi: float | None = None
    notes: tuple[str, ...] = ()


def _controlled(score: Floats, longer: Floats, raw: float, minimum: int) -> _Control:
    """Fit and judge it. `longer` is by how much the baseline's answer is, in characters."""
    n = len(score)
    if np.isnan(longer).any():
        return _Control(notes=("Some answers have no length.",))
    if n < minimum:
        return _Control(notes=(f"Length control takes {minimum} comparisons; there are {n}.",))
    if score.mean() in (0.0, 1.0):
        return _Control(notes=("All comparisons went the same way; length plays no part.",))
    theta, phi, error, looseness = _fit(score, _scaled(longer))
    rate = 100 * float(expit(theta))
    points = rate * (1 - rate / 100)  # per nat of theta
    if points * looseness > LOOSEST:
        note = "One model's answers are nearly always the longer ones: length cannot be separated."
        return _Control(theta=theta, phi=phi, notes=(note,))
    return _Control(rate, points * error, theta, phi, _warnings(raw, rate))


def _scaled(longer: Floats) -> Floats:
    """tanh of the differences in units of their standard deviation (n - 1)."""
    deviation = longer.std(ddof=1)
    return np.tanh(longer / deviation) if deviation > 0 else np.zeros(len(longer))


def _fit(score: Floats, x: Floats) -> tuple[float, float, float, float]:
    """Theta, phi, the standard error of theta, and how loosely data and penalty hold theta.

    It is Bradley-Terry of two models with length as style. The error (sandwich) is about other
    samples of instructions; where x hardly varies, only the penalty keeps theta and phi apart,
    which shows in the inverse curvature alone.
    """
    n = len(score)
    model, baseline = np.zeros(n, dtype=np.int64), np.ones(n, dtype=np.int64)
    ones = np.ones(n)
    cells = Cells(("model", "baseline"), model, baseline, score, ones, ones, x[None])
    found = likelihood.fit(cells, np.array([0.0, 0.0, L2_PER_COMPARISON * n]))
    gap = found.strength[0] - found.strength[1]
    spreads = likelihood.covariance(found, robust=True), likelihood.inverse_curvature(found)
    error, looseness = (float(np.sqrt(v[0, 0] + v[1, 1] - 2 * v[0, 1])) for v in spreads)
    return float(gap), float(found.theta[2]), error, looseness


def _warnings(raw: float, rate: float) -> tuple[str, ...]:
    """Too far from the raw rate: over 10 points and a quarter of the way to 0 or 100."""
    room = raw if rate < raw else 100 - raw
    if abs(rate - raw) <= max(10.0, room / 4):
        return ()
    return (f"Length control moves the win rate from {raw:.1f} to {rate:.1f}: the fit may fail.",)
