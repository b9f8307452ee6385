"""A Bradley-Terry fit of battles and how sure it is: what every table of ratings is made from."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.special import ndtri

from results_db import likelihood
from results_db.likelihood import Fit
from results_db.style import StyleControl, differences
from results_db.tally import (
    Cells,
    Floats,
    Ints,
    Rows,
    balanced_pairs,
    cells_of,
    check_battles,
    counted_rows,
)

Interval = Literal["sandwich", "bootstrap", "model"]
Reweight = Literal["pairs", "propensity"]
Anchor = tuple[str, float]
Effect = dict[str, float]  # coefficient, its interval, and the same in Elo points

ELO_PER_NAT = 400 / math.log(10)  # 173.718
SANDWICH_VOTES = 50  # of each model; below, residuals say too little of their own spread
SANDWICH_TIES = 0.8  # above this share of ties the residuals are nearly 0, and so the sandwich


@dataclass(frozen=True)
class Estimate:
    """Strengths in nats and their spread. The index M stands for the mean of a component."""

    cells: Cells
    fit: Fit
    interval: Interval  # what was used, which may not be what was asked for
    covariance: Floats  # [M + 1, M + 1] nats^2
    samples: Floats | None  # [rounds, M + 1] if bootstrapped; NaN: not in that round
    anchor: Anchor | None  # None too if the model asked for has no vote
    style: dict[str, Effect]
    notes: tuple[str, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Names in the order of every array here."""
        return self.cells.models

    def variance(self, a: Ints, b: Ints) -> Floats:
        """Of strength a - strength b, nats^2."""
        v = self.covariance
        return np.maximum(v[a, a] + v[b, b] - 2 * v[a, b], 0.0)

    def contrast(self, a: Ints, b: Ints, level: float) -> tuple[Floats, Floats, Floats]:
        """Strength a - strength b and the ends of its interval, in nats."""
        strength = np.append(self.fit.strength, 0.0)
        gap = strength[a] - strength[b]
        if self.samples is not None:
            return gap, *quantiles(self.samples[:, a] - self.samples[:, b], level)
        half = ndtri(0.5 + level / 2) * np.sqrt(self.variance(a, b))
        return gap, gap - half, gap + half


def estimate(
    battles: pd.DataFrame,
    *,
    anchor: Anchor | None = None,
    interval: Interval = "sandwich",
    rounds: int = 500,
    seed: int = 0,
    style: StyleControl | bool | None = None,
    reweight: Reweight | None = None,
    ridge: float = 0.0,
    floors: bool = True,
) -> Estimate:
    """Fit the strengths of the models and how sure they are.

    `anchor` fixes one model's rating; without it, or without that model, each component of models
    that met has mean 1000. `style` frees the ratings of differences in style. `reweight` makes a
    vote weigh 1 / max(votes of its pair, 50) ("pairs") or 1 / `propensity`, the column with the
    probability of drawing the pair. `ridge` / 2 * strength^2, in nats, replaces virtual ties.
    `floors`: the sandwich gives way to the model's own variance, for the whole table, where it
    would be too narrow: a model with fewer than 50 votes, over 80 % ties, or a regularised fit.
    """
    _check_choice("interval", interval, ("sandwich", "bootstrap", "model"))
    control = StyleControl() if style is True else style or None
    cells = _cells(battles, counted_rows(battles), control, reweight)
    fitted = likelihood.fit(cells, _penalty(cells, control, ridge))
    notes = [*anchor_notes(cells.models, anchor), *_fit_notes(fitted)]
    if floors and interval == "sandwich" and (why := _too_narrow(cells, fitted)):
        interval = "model"
        notes.append(f"Intervals come from the model's own variance, not the sandwich: {why}.")
    anchor = anchor if anchor and anchor[0] in cells.models else None
    samples = None
    if interval == "bootstrap":
        samples = _bootstrap(fitted, cells, rounds, seed, anchor_index(cells.models, anchor))
        notes += _bootstrap_notes(cells.models, samples)
        spread = _sample_covariance(samples)
    else:
        spread = likelihood.covariance(fitted, robust=interval == "sandwich")
    m = len(cells.models)
    return Estimate(
        cells=cells,
        fit=fitted,
        interval=interval,
        covariance=np.pad(spread[:m, :m], (0, 1)),
        samples=None if samples is None else np.pad(samples[:, :m], ((0, 0), (0, 1))),
        anchor=anchor,
        style=_effects(fitted, spread, control),
        notes=tuple(notes),
    )


def quantiles(samples: Floats, level: float) -> tuple[Floats, Floats]:
    """Ends of the middle `level` of each column, NaN left out; NaN for a column of nothing."""
    ends = np.full((2, samples.shape[1]), np.nan)
    some = ~np.isnan(samples).all(axis=0)
    if len(samples) and some.any():
        tails = [(1 - level) / 2, (1 + level) / 2]
        ends[:, some] = np.nanquantile(samples[:, some], tails, axis=0)
    return ends[0], ends[1]


def anchor_index(models: tuple[str, ...], anchor: Anchor | None) -> int:
    """Place of the anchor among the models, -1 where there is none."""
    return models.index(anchor[0]) if anchor and anchor[0] in models else -1


def anchor_notes(models: tuple[str, ...], anchor: Anchor | None) -> list[str]:
    """A sentence if the anchor cannot hold the ratings."""
    if anchor is None or anchor_index(models, anchor) >= 0:
        return []
    return [f"The anchor {anchor[0]} has no votes; the mean of the ratings is 1000 instead."]


def check_level(level: float, name: str = "level") -> None:
    """Refuse a probability outside (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"{name} is {level}; it must lie between 0 and 1, like 0.95.")


def _check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{name} is {given!r}; it can be {', '.join(map(repr, choices))}.")


def _cells(
    battles: pd.DataFrame, rows: Rows, control: StyleControl | None, reweight: Reweight | None
) -> Cells:
    weight = features = None
    if reweight is not None:
        _check_choice("reweight", reweight, ("pairs", "propensity"))
    if reweight == "propensity":
        check_battles(battles, also=["propensity"])
        drawn = battles["propensity"].iloc[rows.at].to_numpy(dtype=np.float64, na_value=np.nan)
        if not ((drawn > 0) & (drawn <= 1)).all():
            raise ValueError("Weighting by propensity takes one above 0 and up to 1 in every vote.")
        weight = 1 / drawn
    if control is not None:
        whole = len(rows.at) == len(battles)  # then in their order: a copy of a million rows less
        features = differences(battles if whole else battles.iloc[rows.at], control)
    cells = cells_of(rows, weight, features)
    return balanced_pairs(cells) if reweight == "pairs" else cells


def _penalty(cells: Cells, control: StyleControl | None, ridge: float) -> Floats:
    """Of theta^2 / 2: on the strengths, then on the coefficients of style. [M + F]"""
    if control is None:
        return np.full(len(cells.models), float(ridge))
    on_style = control.l2 + control.l2_per_vote * cells.count.sum()
    sizes = [len(cells.models), len(control.features)]
    return np.repeat([ridge + control.l2_ratings, on_style], sizes)


def _fit_notes(fitted: Fit) -> list[str]:
    """What the maximum needed to be finite."""
    models, some = fitted.cells.models, fitted.regularised
    if not some.any():
        return []
    if fitted.penalty[: len(models)].any():
        return ["Regularised: a penalty draws the ratings together."]
    who = "the models" if some.all() else ", ".join(np.array(models)[some])
    return [
        f"Regularised: some of {who} never lost, or never won, against the others, so that no "
        "finite ratings fit best; one virtual tie was added to each pair of them that met."
    ]


def _too_narrow(cells: Cells, fitted: Fit) -> str | None:
    """Why the sandwich would claim too much, if it would."""
    votes = cells.votes()
    if not len(votes):
        return None
    if fitted.regularised.any():
        return "the fit is regularised"
    if votes.min() < SANDWICH_VOTES:
        fewest = cells.models[int(votes.argmin())]
        return f"{fewest} has {votes.min():.0f} votes, of the {SANDWICH_VOTES} that it takes"
    ties = cells.count[cells.score == 0.5].sum() / cells.count.sum()
    return f"{100 * ties:.0f} % of the votes are ties" if ties > SANDWICH_TIES else None


def _bootstrap(fitted: Fit, cells: Cells, rounds: int, seed: int, anchor: int) -> Floats:
    """Theta of `rounds` resamples of the votes, NaN for models absent from one: [rounds, M + F]"""
    if rounds < 2:
        raise ValueError(f"rounds is {rounds}; a bootstrap takes at least 2.")
    draws = _draws(cells, rounds, np.random.default_rng(seed))
    samples = np.empty((rounds, len(fitted.theta)))
    for at, again in enumerate(likelihood.resampled(fitted, cells, draws, anchor)):
        samples[at] = again.theta
    return samples


def _draws(cells: Cells, rounds: int, rng: np.random.Generator) -> Iterator[Floats]:
    """As many votes as there are, drawn with replacement: how often each cell came."""
    votes = int(cells.count.sum())
    for _ in range(rounds if votes else 0):
        yield rng.multinomial(votes, cells.count / votes).astype(np.float64)


def _sample_covariance(samples: Floats) -> Floats:
    """Over the rounds in which both of two parameters are known; NaN if those are under two."""
    if len(samples) < 2:
        return np.full((samples.shape[1], samples.shape[1]), np.nan)
    return pd.DataFrame(samples).cov(min_periods=2).to_numpy()


def _bootstrap_notes(models: tuple[str, ...], samples: Floats) -> list[str]:
    missing = np.isnan(samples[:, : len(models)]).sum(axis=0)
    return [
        f"{models[at]} was left out of {missing[at]} of {len(samples)} resamples for want of votes."
        for at in np.flatnonzero(missing)
    ]


def _effects(fitted: Fit, spread: Floats, control: StyleControl | None) -> dict[str, Effect]:
    """What one root mean square of each feature does to the odds, with its 95 % interval."""
    if control is None:
        return {}
    m = len(fitted.cells.models)
    found = {}
    for at, name in enumerate(control.features, start=m):
        value, half = fitted.theta[at], 1.959964 * math.sqrt(max(spread[at, at], 0.0))
        ends = {"coefficient": value, "low": value - half, "high": value + half}
        found[name] = {k: float(v) for k, v in ends.items()} | {"elo": float(ELO_PER_NAT * value)}
    return found
