"""The Bradley-Terry likelihood of votes: when it has a maximum, where, and how sure that is.

P(first beats second) = sigmoid(x . theta), where x is +1 at the first model, -1 at the second and
the difference in style below them, and theta holds the strengths in nats, then the coefficients of
style. A tie is half a win and half a loss. Everything is fp64.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from results_db.tally import Cells, Floats, Ints, sums

Bools = NDArray[np.bool_]

MAX_STEPS = 1000  # Newton takes about six; millions of votes beside few upsets, up to 200
STRIDE = 1.0  # nats
CLOSE = 1e-9  # nats; the error after such a step is of the order of its square
ROUNDING = 1e-15  # of all votes, in nats of likelihood; a step that promises less is noise


@dataclass(frozen=True)
class Fit:
    """Where the likelihood is highest. Strengths have mean 0 in each component."""

    cells: Cells  # what was fitted, virtual ties included
    theta: Floats  # [M + F]
    penalty: Floats  # [M + F], of theta^2 / 2
    component: Ints  # [M], from 0; models are comparable within one
    regularised: NDArray[np.bool_]  # [M], finite only thanks to virtual ties or a penalty

    @property
    def strength(self) -> Floats:
        """Of each model, in nats. [M]"""
        return self.theta[: len(self.cells.models)]

    def residuals(self) -> Floats:
        """What each cell's first model scored beyond what was expected. [C]"""
        return _residuals(self.cells, *_chances(self.cells, self.theta))

    def variances(self) -> Floats:
        """Of a decisive vote with each cell's odds: p (1 - p). [C]"""
        p, q = _chances(self.cells, self.theta)
        return p * q


def fit(cells: Cells, penalty: Floats, start: Floats | None = None) -> Fit:
    """Maximise the likelihood less `penalty` / 2 of each parameter squared.

    A finite maximum exists where the graph "took at least a part-win from" is strongly connected
    in each component. Where it is not, and the strengths carry no penalty, one virtual tie is
    added to every pair that met in that component, which always connects it.
    """
    cells = _present(cells)
    component, sound = existence(cells)
    if penalty[: len(cells.models)].any():
        regularised = np.ones(len(cells.models), dtype=bool)
    else:
        regularised = ~sound[component]
        cells = _with_virtual_ties(cells, regularised)
    start = np.zeros(len(penalty)) if start is None else start
    theta = _maximise(cells, penalty, component, _centred(start, component))
    return Fit(cells, theta, penalty, component, regularised)


def existence(cells: Cells) -> tuple[Ints, Bools]:
    """Component of each model [M], and of each component whether its maximum is finite."""
    won = _won(cells)
    number, component = connected_components(won, directed=False)
    _, strong = connected_components(won, directed=True, connection="strong")
    parts = np.unique(np.stack([component, strong]), axis=1)[0]
    return component.astype(np.int64), np.bincount(parts, minlength=number) == 1


def covariance(fit: Fit, robust: bool) -> Floats:
    """Of theta, in nats^2, with strengths mean-centred in each component: [M + F, M + F].

    Robust is the sandwich, with each vote's own squared residual in the middle; else the model's
    p (1 - p) stands there, which without weights and penalties leaves the inverse information.
    """
    bread, cells = inverse_curvature(fit), fit.cells
    spread = fit.residuals() ** 2 if robust else fit.variances()
    return bread @ _outer(cells, cells.count * cells.weight**2 * spread) @ bread


def inverse_curvature(fit: Fit) -> Floats:
    """Of minus the log likelihood at its maximum, up to shifts of a component: [M + F, M + F]."""
    total = _curvature(fit.cells, fit.variances(), fit.penalty, fit.component)
    return np.asarray(np.linalg.inv(total), dtype=np.float64)


def resampled(point: Fit, cells: Cells, draws: Iterable[Floats], anchor: int) -> Iterator[Fit]:
    """A fit for each draw of the counts of `cells`, on the level of the point estimate.

    Models that a draw leaves without a link to the anchor, or to the largest part of their
    component, are NaN in it: nothing was learned of them. `anchor` is -1 where there is none.
    """
    for count in draws:
        again = fit(replace(cells, count=count), point.penalty, point.theta)
        yield replace(again, theta=_levelled(point, again, anchor))


def residual_ratio(fit: Fit) -> float:
    """Squared residuals of the votes against what coin flips with their odds would have.

    Below 1 where ties are common: a vote that is often a tie varies less.
    """
    mass = fit.cells.count * fit.cells.weight**2
    if not mass.any():
        return 1.0
    return float(mass @ fit.residuals() ** 2 / (mass @ fit.variances()))


def _maximise(cells: Cells, penalty: Floats, component: Ints, start: Floats) -> Floats:
    """Newton's method, shortened where a vote's log-odds would move by more than `STRIDE`.

    Every step then raises the likelihood: along it the curvature grows by a factor of e at most,
    which leaves at least 3 - e of what the slope promises. Without that, thousands of straight
    wins beside a handful of upsets send it off to where the curvature vanishes.
    """
    theta, mass = start, cells.count * cells.weight
    for _ in range(MAX_STEPS):
        p, q = _chances(cells, theta)
        slope = _sum(cells, mass * _residuals(cells, p, q)) - penalty * theta
        curvature = _curvature(cells, p * q, penalty, component)
        step = np.asarray(np.linalg.solve(curvature, slope), dtype=np.float64)
        longest = np.abs(_logits(cells, step)).max(initial=0)
        theta = theta + step / max(longest / STRIDE, 1)
        if longest < CLOSE or slope @ step < ROUNDING * mass.sum():
            return _centred(theta, component)
    raise ArithmeticError(f"The ratings did not settle in {MAX_STEPS} steps.")


def _chances(cells: Cells, theta: Floats) -> tuple[Floats, Floats]:
    """Of the first model and of the second; each exact to the last digit where it is tiny."""
    logits = _logits(cells, theta)
    return expit(logits), expit(-logits)


def _residuals(cells: Cells, p: Floats, q: Floats) -> Floats:
    """score - p, exact also where p is nearly 1."""
    return cells.score * q - (1 - cells.score) * p


def _logits(cells: Cells, theta: Floats) -> Floats:
    m = len(cells.models)
    gap = theta[cells.first] - theta[cells.second]
    return gap + theta[m:] @ cells.features if len(theta) > m else gap


def _sum(cells: Cells, values: Floats) -> Floats:
    """Sum of values * x over the cells. [M + F]"""
    return np.concatenate([_sum_of_models(cells, values), cells.features @ values])


def _sum_of_models(cells: Cells, values: Floats) -> Floats:
    """The part of `_sum` that belongs to the strengths. [M]"""
    m = len(cells.models)
    met = sums(cells.pair(), values, m * m).reshape(m, m)
    return met.sum(1) - met.sum(0)


def _outer(cells: Cells, values: Floats) -> Floats:
    """Sum of values * x x^T over the cells. [M + F, M + F]"""
    m, f = len(cells.models), len(cells.features)
    met = sums(cells.pair(), values, m * m).reshape(m, m)
    met = met + met.T
    total = np.empty((m + f, m + f))
    total[:m, :m] = np.diag(met.sum(1)) - met
    scaled = cells.features * values  # [F, C]
    for at, feature in enumerate(scaled, start=m):
        total[:m, at] = total[at, :m] = _sum_of_models(cells, feature)
    total[m:, m:] = scaled @ cells.features.T
    return total


def _curvature(cells: Cells, variance: Floats, penalty: Floats, component: Ints) -> Floats:
    """Minus the second derivative, made invertible: [M + F, M + F].

    The likelihood is flat along a shift of all strengths of a component. A weight on that shift
    changes neither Newton's step nor the covariance, both of which have none of it.
    """
    total = _outer(cells, cells.count * cells.weight * variance) + np.diag(penalty)
    m = len(cells.models)
    together = component[:, None] == component  # [M, M]
    size = max(float(np.trace(total[:m, :m])) / max(m, 1), 1e-6)
    total[:m, :m] += size * together / together.sum(1)
    idle = total.diagonal() == 0  # a feature that is 0 in every vote, without a penalty
    total[idle, idle] = 1.0
    return total


def _centred(theta: Floats, component: Ints) -> Floats:
    m = len(component)
    means = np.bincount(component, theta[:m]) / np.maximum(np.bincount(component), 1)
    return np.concatenate([theta[:m] - means[component], theta[m:]])


def _won(cells: Cells) -> Floats:
    """How many votes each model (row) took from each other, ties half. [M, M]"""
    m, pair = len(cells.models), cells.pair()
    won = sums(pair, cells.count * cells.score, m * m).reshape(m, m)
    lost = sums(pair, cells.count * (1 - cells.score), m * m).reshape(m, m)
    return won + lost.T


def _present(cells: Cells) -> Cells:
    """Without the cells that have no vote."""
    some = cells.count > 0
    return cells if some.all() else _chosen(cells, some)


def _chosen(cells: Cells, which: Bools) -> Cells:
    return Cells(
        cells.models,
        cells.first[which],
        cells.second[which],
        cells.score[which],
        cells.count[which],
        cells.weight[which],
        cells.features[:, which],
    )


def _with_virtual_ties(cells: Cells, where: Bools) -> Cells:
    """A tie more, of weight 1 and without style, for each pair that met among these models."""
    if not where.any():
        return cells
    pairs = np.unique(cells.pair()[where[cells.first]])
    first, second = np.divmod(pairs, len(cells.models))
    ones = np.ones(len(pairs))
    return Cells(
        cells.models,
        np.append(cells.first, first),
        np.append(cells.second, second),
        np.append(cells.score, ones / 2),
        np.append(cells.count, ones),
        np.append(cells.weight, ones),
        np.append(cells.features, np.zeros((len(cells.features), len(pairs))), axis=1),
    )


def _levelled(point: Fit, again: Fit, anchor: int) -> Floats:
    """Theta of a draw, each component at the point estimate's mean of the same models."""
    theta = again.theta.copy()
    for component in range(point.component.max(initial=-1) + 1):
        members = np.flatnonzero(point.component == component)
        parts = again.component[members]
        sizes = np.bincount(parts)
        main = again.component[anchor] if anchor in members else sizes.argmax()
        here = members[parts == main]
        theta[here] += point.theta[here].mean() - theta[here].mean()
        theta[members if sizes[main] == 1 else members[parts != main]] = np.nan
    return theta
