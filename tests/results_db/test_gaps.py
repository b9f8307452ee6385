"""Gaps between two models, and how many votes would tell them apart."""

import numpy as np
import pandas as pd
import pytest
from ballots import FOUR, LOST, TIE, TWO, WON, battles, drawn
from scipy.special import expit

from results_db.estimate import ELO_PER_NAT, estimate
from results_db.gaps import gaps, votes_needed
from results_db.ratings import bradley_terry

STRENGTHS = [0.8, 0.3, 0.0, -0.6]


def test_the_predicted_share_of_two_models_is_what_was_seen():
    (row,) = gaps(estimate(TWO)).to_dict("records")
    assert (row["model_a"], row["model_b"], row["battles"]) == ("A", "B", 18)
    assert row["win"] == pytest.approx(12.5 / 18)
    assert row["gap"] == pytest.approx(142.6189, abs=5e-5)
    low, gap, high = (row[k] / ELO_PER_NAT for k in ("low", "gap", "high"))
    assert [expit(x) for x in (low, gap, high)] == pytest.approx(
        [row[k] for k in ("win_low", "win", "win_high")]
    )
    assert row["told_apart"] == (row["low"] > 0)


def test_four_players_have_their_known_interval():
    found = gaps(estimate(FOUR, floors=False)).set_index(["model_a", "model_b"])
    row = found.loc[("D", "A")]
    assert (row["high"] - row["gap"]) / 1.959964 == pytest.approx(155.06, abs=0.005)
    assert found["battles"].to_dict()[("D", "B")] == 0
    assert found["battles"].sum() == len(FOUR)


@pytest.mark.parametrize("interval", ["sandwich", "model", "bootstrap"])
def test_the_anchor_plays_no_part(interval):
    log = drawn(STRENGTHS, 800, seed=0)
    ask = {"interval": interval, "rounds": 40}
    free = gaps(estimate(log, **ask))
    held = gaps(estimate(log, anchor=("m3", 1000.0), **ask))
    pd.testing.assert_frame_equal(free, held)
    # ... and the interval of a model against the anchor is that of the gap.
    rows = bradley_terry(log, anchor=("m3", 1000.0), **ask).set_index("model")
    to_anchor = free[free["model_b"] == "m3"].set_index("model_a")
    for name in ("low", "high"):
        assert (rows[name] - 1000)[to_anchor.index].to_numpy() == pytest.approx(
            to_anchor[name].to_numpy(), abs=1e-9
        )


def test_models_that_never_met_even_through_others_have_no_gap():
    log = battles(("A", "B", WON), ("A", "B", LOST), ("X", "Y", WON), ("X", "Y", LOST))
    assert set(map(frozenset, gaps(estimate(log))[["model_a", "model_b"]].to_numpy())) == {
        frozenset("AB"),
        frozenset("XY"),
    }
    assert len(gaps(estimate(log.iloc[:0]))) == 0
    assert len(votes_needed(estimate(log.iloc[:0]))) == 0


def test_a_score_of_half_plus_d_takes_two_over_d_squared():
    """1.96 / d^2 votes in all, of which 200 are here; the normal approximation is 1 % off."""
    log = battles(("A", "B", WON, 110), ("A", "B", LOST, 90))
    (row,) = votes_needed(estimate(log, interval="model")).to_dict("records")
    assert row["needed"] + 200 == pytest.approx(1.962 / 0.05**2, rel=0.01)


def test_ties_make_it_fewer():
    plain = battles(("A", "B", WON, 105), ("A", "B", LOST, 95))
    tied = battles(("A", "B", WON, 55), ("A", "B", LOST, 45), ("A", "B", TIE, 100))
    few, many = (votes_needed(estimate(log))["needed"][0] for log in (tied, plain))
    # The same score, and half of the votes without any spread.
    assert (few + 200) / (many + 200) == pytest.approx(0.5, abs=0.01)


def test_nothing_is_needed_where_they_are_told_apart_and_no_number_where_equal():
    clear = votes_needed(estimate(battles(("A", "B", WON, 90), ("A", "B", LOST, 10))))
    assert clear["needed"].tolist() == [0]
    assert clear["told_apart"].tolist() == [True]
    same = votes_needed(estimate(battles(("A", "B", WON, 50), ("A", "B", LOST, 50))))
    assert same["needed"].tolist() == [np.inf]
    close = votes_needed(estimate(battles(("A", "B", WON, 60), ("A", "B", LOST, 41))))
    assert close["needed"][0] >= 1


def test_so_many_votes_tell_them_apart_four_times_in_five():
    """Simulation in a net of models: m0 - m1 gets the votes that were asked for."""
    hits = []
    for seed in range(100):
        log = drawn(STRENGTHS, 150, seed=seed)
        truth = STRENGTHS[0] - STRENGTHS[1]
        # As if the gap seemed to be what it is: from the information that there now is.
        found = estimate(log, interval="model")
        one, other = np.array([0]), np.array([1])
        wanted = (2.8015852 / truth) ** 2 - 1 / found.variance(one, other)[0]
        more = int(np.ceil(wanted / (expit(truth) * expit(-truth))))
        extra = drawn(STRENGTHS[:2], more, seed=10_000 + seed)
        both = gaps(estimate(pd.concat([log, extra]), interval="model"))
        pair = both[(both["model_a"] == "m0") & (both["model_b"] == "m1")]
        hits.append(len(pair) == 1 and bool(pair["told_apart"].iloc[0]))
    # 100 trials of 0.8 have a deviation of 0.04.
    assert np.mean(hits) == pytest.approx(0.8, abs=0.1)


def test_further_votes_are_from_that_information():
    """The formula that the simulation above confirms is the one in use."""
    log = drawn([0.2, 0.0, 0.0], 300, seed=3)
    found = estimate(log, interval="model")
    asked = votes_needed(found)
    row = asked[~asked["told_apart"]].iloc[0]
    i, j = (np.array([found.models.index(row[k])]) for k in ("model_a", "model_b"))
    gap = row["gap"] / ELO_PER_NAT
    wanted = (2.8015852 / gap) ** 2 - 1 / found.variance(i, j)[0]
    assert row["needed"] == np.ceil(wanted / (expit(gap) * expit(-gap)))


def test_more_power_takes_more_votes():
    found = estimate(battles(("A", "B", WON, 55), ("A", "B", LOST, 45)))
    needed = [votes_needed(found, power=p)["needed"][0] for p in (0.5, 0.8, 0.95)]
    assert needed == sorted(needed)
    assert needed[0] < needed[2]
    with pytest.raises(ValueError, match="power is 1"):
        votes_needed(found, power=1)
