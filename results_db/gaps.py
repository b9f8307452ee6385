"""Two models at a time: how far apart they are, and how many votes would settle it."""

import numpy as np
import pandas as pd
from scipy.special import expit, ndtri

from results_db import likelihood
from results_db.estimate import ELO_PER_NAT, Estimate, check_level
from results_db.tally import Ints, sums


def gaps(found: Estimate, *, level: float = 0.95) -> pd.DataFrame:
    """Every pair within a component, the higher rated as model_a.

    The gap in Elo points, the share of wins it predicts, the ends of both, the votes between the
    two, and `told_apart`: the interval leaves out 0. The anchor plays no part in any of it.
    """
    check_level(level)
    a, b = _pairs(found)
    gap, low, high = found.contrast(a, b, level)
    names = np.array(found.models, dtype=object)
    return pd.DataFrame(
        {
            "model_a": pd.Series(names[a], dtype="str"),
            "model_b": pd.Series(names[b], dtype="str"),
            "gap": ELO_PER_NAT * gap,
            "low": ELO_PER_NAT * low,
            "high": ELO_PER_NAT * high,
            "win": expit(gap),
            "win_low": expit(low),
            "win_high": expit(high),
            "battles": _between(found)[a, b],
            "told_apart": low > 0,
        }
    )


def votes_needed(found: Estimate, *, level: float = 0.95, power: float = 0.8) -> pd.DataFrame:
    """Every pair as in `gaps`, with `needed`: votes between the two still to come.

    So many that the interval of their gap will leave out 0 with probability `power`, should the
    gap be what it now seems: 0 where they are told apart, infinite where they seem equal. One
    vote adds p (1 - p) / r to the information on a gap in nats, r being the squared residuals of
    the votes so far as a share of p (1 - p). For two new models with a score of 0.5 + d that comes
    to about 1.96 / d^2 votes; ties, which vary less than wins, make it fewer.
    """
    check_level(level)
    check_level(power, "power")
    a, b = _pairs(found)
    gap, low, _ = found.contrast(a, b, level)
    share = 1.0 if found.interval == "model" else likelihood.residual_ratio(found.fit)
    one_vote = expit(gap) * expit(-gap) / share
    with np.errstate(divide="ignore", invalid="ignore"):
        information = ((ndtri(0.5 + level / 2) + ndtri(power)) / gap) ** 2
        further = np.ceil((information - 1 / found.variance(a, b)) / one_vote)
    further = np.where(np.isnan(further), np.inf, np.maximum(further, 1))
    rows = gaps(found, level=level)[["model_a", "model_b", "gap", "battles", "told_apart"]]
    return rows.assign(needed=np.where(low > 0, 0.0, further))


def _pairs(found: Estimate) -> tuple[Ints, Ints]:
    """Pairs within a component, the stronger first, by falling strength."""
    order = np.argsort(-found.fit.strength, kind="stable")
    above, below = np.triu_indices(len(order), 1)
    a, b = order[above], order[below]
    same = found.fit.component[a] == found.fit.component[b]
    return a[same], b[same]


def _between(found: Estimate) -> Ints:
    """Votes between each two models. [M, M]"""
    m, cells = len(found.models), found.cells
    met = sums(cells.pair(), cells.count, m * m).reshape(m, m)
    return (met + met.T).astype(np.int64)
