"""How few votes hold up the first place: those whose removal puts another model on top."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.special import expit

from results_db import likelihood
from results_db.likelihood import Fit
from results_db.tally import Cells, Floats, cells_of, counted_rows

HIGHER = 1e-9  # nats; closer together, two ratings are equal
SINGLY = 30  # up to so many votes, also look by taking one at a time
LEVERAGE = 0.95  # a vote that alone holds two parts together has 1
WINNERS = {0.0: "model_b", 0.5: "tie", 1.0: "model_a"}


@dataclass(frozen=True)
class Fragility:
    """Without these votes `rival` is rated above `top`. `votes` has equal ones together."""

    top: str
    rival: str
    k: int
    share: float  # of all votes
    votes: pd.DataFrame  # model_a, model_b, winner, count


def fragility(battles: pd.DataFrame, *, most: int | None = None) -> Fragility | None:
    """The fewest votes found whose removal changes which model is rated highest, or None.

    The top model is that of the component with most votes. For each rival, votes are taken away in
    the order of what they add to the lead over it, and ratings fitted again as they change. The
    answer was checked by a fit without these votes, so that the true number is at most `k`; no
    search through all subsets is made, but where that is possible it rarely finds fewer. At most
    `most` votes are taken. Equal votes are interchangeable: any `count` of them will do.
    """
    cells = cells_of(counted_rows(battles))
    if not len(cells.models):
        return None
    whole = _fit(cells, cells.count)
    top, rivals = _contenders(whole, cells)
    best: Floats | None = None
    limit = float(cells.count.sum() if most is None else most)
    for rival in rivals:  # the closest first: what it takes bounds the search for the others
        for stride in (0.5, 0.0):
            if stride == 0.0 and limit > SINGLY:
                continue
            taken = _fewest(cells, whole, top, rival, limit, stride)
            if taken is not None:
                best, limit = taken, float(taken.sum()) - 1
    return None if best is None else _report(cells, top, best)


def _fit(cells: Cells, count: Floats) -> Fit:
    return likelihood.fit(replace(cells, count=count), np.zeros(len(cells.models)))


def _contenders(whole: Fit, cells: Cells) -> tuple[int, list[int]]:
    """The strongest model of the component with most votes, and the others by their strength."""
    main = np.bincount(whole.component, cells.votes()).argmax()
    order = np.argsort(-whole.strength, kind="stable")
    top, *rivals = order[whole.component[order] == main].tolist()
    return top, rivals


def _overtaken_by(now: Fit, top: int) -> int | None:
    """The strongest model now rated above `top`, among those comparable with it."""
    strength = np.where(now.component == now.component[top], now.strength, -np.inf)
    best = int(strength.argmax())
    return best if strength[best] > strength[top] + HIGHER else None


def _fewest(
    cells: Cells, whole: Fit, top: int, rival: int, limit: float, stride: float
) -> Floats | None:
    """Votes to take from each cell until `top` is overtaken; None if `limit` do not suffice."""
    for taken, now in _walk(cells, whole, top, rival, limit, stride):
        if _overtaken_by(now, top) is not None:
            return taken
    return None


def _walk(
    cells: Cells, now: Fit, top: int, rival: int, limit: float, stride: float
) -> Iterator[tuple[Floats, Fit]]:
    """Ever more votes to take, each step those worth `stride` of the lead over `rival`, but one
    vote at least; and the fit without them."""
    taken = np.zeros(len(cells.count))
    while now.component[top] == now.component[rival]:
        lead = float(now.strength[top] - now.strength[rival])
        left = cells.count - taken
        step = _take(_worth(cells, now, top, rival), left, lead * stride, limit - taken.sum())
        if not step.any():
            return
        taken = taken + step
        now = _fit(cells, cells.count - taken)
        yield taken, now


def _worth(cells: Cells, now: Fit, top: int, rival: int) -> Floats:
    """By how much the lead of `top` over `rival` shrinks without one vote of each cell, in nats:
    one step of Newton's method on the likelihood of the other votes. [C]"""
    inverse = likelihood.inverse_curvature(now)  # [M, M]
    pull = inverse[top] - inverse[rival]
    a, b = cells.first, cells.second
    p = expit(now.strength[a] - now.strength[b])
    distance = inverse[a, a] + inverse[b, b] - 2 * inverse[a, b]
    leverage = np.minimum(p * (1 - p) * distance, LEVERAGE)
    return (pull[a] - pull[b]) * (cells.score - p) / (1 - leverage)


def _take(worth: Floats, left: Floats, wanted: float, most: float) -> Floats:
    """Whole votes of each cell, the worthiest first, until together they are worth `wanted`."""
    step = np.zeros(len(worth))
    for cell in np.argsort(-worth, kind="stable"):
        if worth[cell] <= 0 or step.sum() >= most or (wanted <= 0 and step.any()):
            break
        enough = max(np.ceil(wanted / worth[cell]), 1)
        step[cell] = min(enough, left[cell], most - step.sum())
        wanted -= step[cell] * worth[cell]
    return step


def _report(cells: Cells, top: int, taken: Floats) -> Fragility:
    rival = _overtaken_by(_fit(cells, cells.count - taken), top)
    assert rival is not None
    some = np.flatnonzero(taken)
    names = np.array(cells.models, dtype=object)
    votes = pd.DataFrame(
        {
            "model_a": pd.Series(names[cells.first[some]], dtype="str"),
            "model_b": pd.Series(names[cells.second[some]], dtype="str"),
            "winner": [WINNERS[score] for score in cells.score[some]],
            "count": taken[some].astype(np.int64),
        }
    )
    k = int(taken.sum())
    share = k / float(cells.count.sum())
    return Fragility(cells.models[top], cells.models[rival], k, share, votes)
