"""How few votes hold up the first place, against all subsets of small logs."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from ballots import BAD, LOST, TIE, WON, battles, drawn

from results_db.fragility import fragility
from results_db.likelihood import fit
from results_db.tally import cells_of, counted_rows


def leader_falls(log, top):
    """Does a model that can be compared with `top` now have a higher rating?"""
    now = fitted(log)
    models = now.cells.models
    if top not in models:
        return False
    at = models.index(top)
    peers = now.strength[now.component == now.component[at]]
    return bool((peers > now.strength[at] + 1e-9).any())


def fitted(log):
    cells = cells_of(counted_rows(log))
    return fit(cells, np.zeros(len(cells.models)))


def fewest_by_brute_force(log, top, most):
    for k in range(1, most + 1):
        for taken in combinations(range(len(log)), k):
            if leader_falls(log.drop(index=list(taken)), top):
                return k
    return None


def without(log, found):
    """The log without the votes that were named, whichever of the equal ones."""
    left = log.replace({"winner": {BAD: TIE}})
    for a, b, winner, count in found.votes.itertuples(index=False):
        mirror = {WON: LOST, LOST: WON, TIE: TIE}[winner]
        same = (left["model_a"] == a) & (left["model_b"] == b) & (left["winner"] == winner)
        same |= (left["model_a"] == b) & (left["model_b"] == a) & (left["winner"] == mirror)
        assert same.sum() >= count
        left = left.drop(index=left.index[same][:count])
    return left


def test_two_models_are_a_subtraction():
    """12 wins to 9: taking 4 leaves 8 to 9."""
    found = fragility(battles(("A", "B", WON, 12), ("A", "B", LOST, 9), ("A", "B", TIE, 5)))
    assert (found.top, found.rival, found.k) == ("A", "B", 4)
    assert found.share == pytest.approx(4 / 26)
    assert found.votes.to_dict("records") == [
        {"model_a": "A", "model_b": "B", "winner": WON, "count": 4}
    ]


def test_never_below_brute_force_and_seldom_above():
    """20 random logs of 9 votes on 4 models: all subsets of up to 3 votes tried."""
    excess = []
    for seed in range(20):
        log = drawn([0.6, 0.2, 0.0, -0.5], 9, seed=seed, ties=0.2)
        whole = fitted(log)
        if whole.component.any():
            continue
        best = fewest_by_brute_force(log, whole.cells.models[whole.strength.argmax()], 3)
        found = fragility(log)
        if found is not None:
            assert leader_falls(without(log, found), found.top)
        if best is not None:
            excess.append(np.inf if found is None else found.k - best)
    assert len(excess) >= 12
    assert min(excess) >= 0
    assert np.mean(np.array(excess) == 0) >= 0.9


def test_large_logs_are_answered_and_checked():
    log = drawn(np.linspace(0.3, -0.3, 8), 5000, seed=1)
    found = fragility(log)
    assert 1 < found.k < 1500
    assert found.votes["count"].sum() == found.k
    assert leader_falls(without(log, found), found.top)
    cells = log.groupby(["model_a", "model_b", "winner"]).size().rename("count").reset_index()
    again = fragility(cells)
    assert (again.k, again.rival) == (found.k, found.rival)
    pd.testing.assert_frame_equal(again.votes, found.votes)


def test_influence_beats_the_direct_votes_alone():
    """The lead of A over B rests on their votes against C: those are found too."""
    log = battles(
        ("A", "C", WON, 8), ("A", "C", LOST, 2), ("B", "C", WON, 7), ("B", "C", LOST, 3),
    )  # fmt: skip
    found = fragility(log)
    assert (found.top, found.rival) == ("A", "B")
    # A falls to 5/7 after three wins less: 0.714 > 0.7 still; after four, 4/6 < 7/10.
    # Two of B's losses less make 7/8 > 8/10.
    assert found.k == 2
    assert found.votes.to_dict("records") == [
        {"model_a": "B", "model_b": "C", "winner": LOST, "count": 2}
    ]


def test_nothing_to_topple():
    assert fragility(battles(("A", "B", WON)).iloc[:0]) is None
    assert fragility(battles(("A", "B", WON, 3))) is None  # no vote speaks for B
    assert fragility(battles(("A", "B", WON, 30), ("A", "B", LOST, 9)), most=5) is None
