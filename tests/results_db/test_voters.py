"""Unusual voters, preferred sides, prompts and people that come too often."""

import numpy as np
import pandas as pd
import pytest
from ballots import BAD, LOST, SWAP, TIE, WON, battles, drawn, swapped
from scipy.stats import binomtest, chi2

from results_db.voters import anomalous_voters, beyond_daily, position_bias, thinned


def crowd(n: int, voters: int, seed: int) -> pd.DataFrame:
    """Votes of people of one mind: m0 is clearly better than m1, and that than m2."""
    log = drawn([2.0, 0.0, -2.0], n, seed, ties=0.1)
    who = np.random.default_rng(seed + 1).integers(voters, size=n)
    return log.assign(judge=[f"v{i}" for i in who])


def test_the_sum_is_fisher_s_over_the_p_values_of_the_paper():
    """30 votes of others, 27 of them for A; then one person votes for B a hundred times."""
    others = battles(("A", "B", WON, 27), ("A", "B", LOST, 2), ("B", "A", TIE, 1))
    odd = battles(("B", "A", WON, 100)).assign(tstamp=np.arange(100.0) + 1000)
    log = pd.concat([others.assign(judge=[f"o{i}" for i in range(30)]), odd.assign(judge="odd")])
    found = anomalous_voters(log).set_index("judge").loc["odd"]
    assert (found["votes"], found["tested"]) == (100, 100)
    p = (1 + 2) / (1 + 30)  # of others, only the two losses are as bad for A
    candidates = [chi2.sf(-2 * j * np.log(p), 2 * j) * 10 for j in range(1, 101)]
    assert np.isclose(candidates, found["p_value"], rtol=1e-9, atol=0).any()
    assert found["flagged"]


def test_contrarians_are_flagged_and_the_crowd_is_not():
    log = crowd(6000, 60, seed=0)
    wrong = log["judge"].isin(["v3", "v7"])
    log.loc[wrong, "winner"] = log.loc[wrong, "winner"].map(SWAP)
    found = anomalous_voters(log).set_index("judge")
    assert found.loc[["v3", "v7"], "flagged"].all()
    assert found["flagged"].sum() <= 2 + 4  # 58 others at 5 % at most, in fact far fewer
    assert found["votes"].sum() == len(log)


def test_honest_voters_are_flagged_less_often_than_alpha():
    """300 voters of one mind, 20 worlds of 15; ties and few outcomes make the test cautious."""
    flags = [anomalous_voters(crowd(1500, 15, seed))["flagged"].sum() for seed in range(20)]
    assert sum(flags) <= 0.05 * 300


def test_sides_leave_no_trace_and_others_do_not_move_a_voter_s_looks():
    log = crowd(1000, 10, seed=1)
    pd.testing.assert_frame_equal(anomalous_voters(swapped(log)), anomalous_voters(log))
    later = crowd(50, 5, seed=2).assign(judge="later")
    later["tstamp"] += 1e6
    both = anomalous_voters(pd.concat([log, later]))
    assert both[both["judge"] != "later"].reset_index(drop=True).equals(anomalous_voters(log))


def test_votes_without_a_name_are_crowd_only():
    log = crowd(1000, 10, seed=3)
    blank = log.assign(judge=log["judge"].replace({"v0": "", "v1": None}))
    found = anomalous_voters(blank)
    assert set(found["judge"]) == {f"v{i}" for i in range(2, 10)}
    named = anomalous_voters(log).set_index("judge").loc[found["judge"]].reset_index()
    pd.testing.assert_frame_equal(found, named, check_dtype=False)


def test_without_a_crowd_nobody_is_tested():
    log = battles(("A", "B", WON, 30)).assign(judge="alone")
    (row,) = anomalous_voters(log).to_dict("records")
    assert (row["votes"], row["tested"], row["flagged"]) == (30, 0, False)
    assert np.isnan(row["p_value"])
    assert len(anomalous_voters(log.iloc[:0])) == 0
    with pytest.raises(ValueError, match="missing: judge"):
        anomalous_voters(log.drop(columns="judge"))


def test_position_bias_is_the_binomial_test():
    log = battles(("A", "B", WON, 70), ("B", "A", LOST, 30), ("A", "B", TIE, 9), ("A", "B", BAD, 1))
    (row,) = position_bias(log).to_dict("records")
    assert (row["first"], row["second"], row["ties"]) == (70, 30, 10)
    test = binomtest(70, 100)
    assert row["share"] == 0.7
    assert row["p_value"] == pytest.approx(test.pvalue)
    assert (row["low"], row["high"]) == pytest.approx(tuple(test.proportion_ci()))
    assert row["flagged"]
    for k, n in ((0, 5), (5, 5), (3, 7), (50, 100), (999, 2000)):
        (row,) = position_bias(battles(("A", "B", WON, k), ("A", "B", LOST, n - k))).to_dict(
            "records"
        )
        test = binomtest(k, n)
        assert row["p_value"] == pytest.approx(test.pvalue)
        assert (row["low"], row["high"]) == pytest.approx(tuple(test.proportion_ci()))
    assert not position_bias(battles(("A", "B", WON, 52), ("A", "B", LOST, 48)))["flagged"].any()


def test_position_bias_of_each_voter_is_held_against_their_number():
    first = battles(("A", "B", WON, 9), ("B", "A", WON, 1)).assign(judge="x")
    even = battles(("A", "B", WON, 5), ("B", "A", LOST, 5)).assign(judge="y")
    ties = battles(("A", "B", TIE, 5)).assign(judge="z")
    found = position_bias(pd.concat([first, even, ties]), by="judge").set_index("judge")
    assert found["first"].to_dict() == {"x": 10, "y": 5, "z": 0}
    assert found["flagged"].to_dict() == {"x": True, "y": False, "z": False}
    assert np.isnan(found.loc["z", "share"])
    # 7 of 7 has p = 0.016: too little among four voters.
    seven = [battles(("A", "B", WON, 7)).assign(judge=f"w{i}") for i in range(4)]
    assert not position_bias(pd.concat(seven), by="judge")["flagged"].any()
    assert position_bias(seven[0], by="judge")["flagged"].all()
    assert len(position_bias(first.iloc[:0])) == 0


def test_prompts_above_the_quantile_are_cut_down_at_random():
    prompts = ["hot"] * 60 + ["warm"] * 5 + [f"p{i}" for i in range(300)]
    log = battles(("A", "B", WON, len(prompts))).assign(prompt=prompts)
    log = log.sample(frac=1, random_state=0)
    out = thinned(log, quantile=0.997)  # of 302 counts the second highest is at 0.9967
    most = int(pd.Series([60, 5, *[1] * 300]).quantile(0.997))
    kept = log[~out]["prompt"].value_counts()
    assert kept["hot"] == most
    assert kept["warm"] == 5
    assert kept.drop(["hot", "warm"]).eq(1).all()
    assert thinned(log, quantile=0.997).equals(out)
    assert not thinned(log, quantile=0.997, seed=1).equals(out)
    assert not thinned(log, quantile=1.0).any()


def test_prompts_are_the_same_in_their_first_ten_thousand_characters():
    said = [[{"role": "user", "content": "x" * 10_000 + str(i)}] for i in range(4)]
    log = battles(("A", "B", WON, 4)).assign(conversation_a=said)
    assert thinned(log, quantile=0.0).sum() == 0  # all four are one prompt, and the only count
    other = [*said[:3], [{"role": "user", "content": "y"}, {"role": "assistant", "content": "x"}]]
    assert thinned(log.assign(conversation_a=other), quantile=0.0).sum() == 2
    blank = log.assign(prompt=["", None, "a", "a"])
    assert thinned(blank, quantile=0.0).sum() == 0
    assert len(thinned(log.iloc[:0])) == 0
    with pytest.raises(ValueError, match="prompt or conversation_a"):
        thinned(log.drop(columns="conversation_a"))


def test_only_the_first_votes_of_a_day():
    times = [100, 50, 86_401, 10, 86_402, 86_399]
    log = battles(("A", "B", WON, 6)).assign(judge=["x", "x", "x", "y", "x", "x"], tstamp=times)
    assert beyond_daily(log, 2).tolist() == [False, False, False, False, False, True]
    assert beyond_daily(log, 1).tolist() == [True, False, False, False, True, True]
