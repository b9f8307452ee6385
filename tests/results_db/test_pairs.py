"""Which pair comes next, and the matrices of what happened between models."""

import itertools

import numpy as np
import pandas as pd
import pytest
from ballots import BAD, LOST, TIE, TWO, WON, battles, drawn, grouped, swapped

from results_db.pairs import (
    average_win_rates,
    battle_counts,
    draw_pair,
    pair_scores,
    predicted_wins,
    vote_mix,
    win_fractions,
)
from results_db.ratings import bradley_terry

LOG = battles(
    ("A", "B", WON, 3), ("B", "A", WON, 1), ("A", "B", TIE, 2), ("C", "A", LOST, 4),
    ("B", "D", BAD, 5),
)  # fmt: skip
MODELS = ["D", "A", "B", "C", "E"]


@pytest.mark.parametrize(
    ("won", "lost", "tied", "p", "gain"),
    [
        (0, 0, 0, 0.5, 0.146447),
        (2, 2, 1, 0.5, 0.0151419),
        (9, 9, 2, 0.5, 0.0025086),
    ],
)
def test_gain_of_a_pair(won, lost, tied, p, gain):
    votes = battles(("A", "B", WON, won), ("B", "A", WON, lost), ("A", "B", TIE, tied))
    scores = pair_scores(votes, ["A", "B"])
    assert scores["score"].tolist() == [p]
    assert scores["gain"].tolist() == pytest.approx([gain], rel=1e-5)


def test_gain_of_an_uneven_pair():
    """p = (90.8 + 1) / 102 = 0.9 at 100 votes: 0.00014669."""
    votes = battles(("A", "B", WON, 90), ("A", "B", LOST, 8), ("A", "B", TIE, 2))
    (row,) = pair_scores(votes, ["A", "B"]).to_dict("records")
    p = 92 / 102
    assert row["score"] == pytest.approx(p)
    assert row["gain"] * np.sqrt(0.09 / (p * (1 - p))) == pytest.approx(0.00014669, abs=5e-9)


def test_probabilities_follow_the_gain_and_never_vanish():
    scores = pair_scores(LOG, MODELS)
    assert len(scores) == 10
    assert list(scores[["model_a", "model_b"]].itertuples(index=False, name=None)) == list(
        itertools.combinations("ABCDE", 2)
    )
    assert scores["probability"].sum() == pytest.approx(1)
    assert scores["probability"].min() >= 0.1 / 10
    even = pair_scores(LOG, MODELS, epsilon=1)
    assert even["probability"].tolist() == pytest.approx([0.1] * 10)
    greedy = pair_scores(LOG, MODELS, epsilon=0)
    assert greedy["probability"].to_numpy() == pytest.approx(
        (greedy["gain"] / greedy["gain"].sum()).to_numpy()
    )
    assert scores["votes"].to_dict() == {0: 6, 1: 4, 5: 5} | dict.fromkeys([2, 3, 4, 6, 7, 8, 9], 0)
    pd.testing.assert_frame_equal(pair_scores(swapped(LOG), MODELS), scores)
    pd.testing.assert_frame_equal(pair_scores(grouped(LOG), MODELS), scores)
    with pytest.raises(ValueError, match="epsilon is 2"):
        pair_scores(LOG, MODELS, epsilon=2)


def test_draws_come_as_often_as_they_say_on_fair_sides():
    scores = pair_scores(LOG, MODELS)
    rng = np.random.default_rng(0)
    draws = [draw_pair(rng, scores) for _ in range(10_000)]
    seen = pd.Series([tuple(sorted((d.model_a, d.model_b))) for d in draws]).value_counts()
    for row in scores.itertuples():
        expected = 10_000 * row.probability
        error = np.sqrt(expected * (1 - row.probability))
        assert abs(seen[(row.model_a, row.model_b)] - expected) < 4 * error
    said = {tuple(sorted((d.model_a, d.model_b))): d.propensity for d in draws}
    for row in scores.itertuples():
        assert said[(row.model_a, row.model_b)] == pytest.approx(row.probability)
    left = np.mean([d.model_a < d.model_b for d in draws])
    assert abs(left - 0.5) < 3 * 0.005


def test_a_draw_among_some_pairs_says_its_own_probability():
    scores = pair_scores(LOG, MODELS)
    some = scores[scores["model_a"] == "A"]
    draw = draw_pair(np.random.default_rng(0), some)
    assert "A" in (draw.model_a, draw.model_b)
    assert draw.propensity > scores["probability"].max() / scores["probability"].sum() / 2
    with pytest.raises(ValueError, match="takes two models"):
        draw_pair(np.random.default_rng(0), pair_scores(LOG, ["A"]))


def test_sampling_by_gain_narrows_the_widest_pair():
    """A thousand votes drawn so: pairs near 1/2 get more than lopsided ones."""
    rng = np.random.default_rng(1)
    log, truth = battles(("A", "B", TIE)), {"A": 3.0, "B": 0.0, "C": 0.0}
    scores = pair_scores(log, list(truth))
    votes: list[tuple] = []
    for step in range(1000):
        draw = draw_pair(rng, scores)
        p = 1 / (1 + np.exp(truth[draw.model_b] - truth[draw.model_a]))
        votes.append((draw.model_a, draw.model_b, WON if rng.random() < p else LOST))
        if step % 100 == 99:
            scores = pair_scores(battles(*votes), list(truth))
    counts = pair_scores(battles(*votes), list(truth)).set_index(["model_a", "model_b"])["votes"]
    assert counts[("B", "C")] > 1.2 * max(counts[("A", "B")], counts[("A", "C")])


def test_win_fractions_leave_ties_out_and_blanks_blank():
    found = win_fractions(LOG, MODELS)
    assert list(found) == list(found.index) == MODELS
    assert found.loc["A", "B"] == 3 / 4
    assert found.loc["A", "C"] == 1.0
    assert np.isnan(found.loc["B", "D"])  # ties only
    assert np.isnan(found.loc["E"]).all()
    assert np.isnan(np.diag(found)).all()
    both = found + found.T
    assert both.stack().dropna().eq(1).all()
    pd.testing.assert_frame_equal(win_fractions(swapped(LOG), MODELS), found)
    pd.testing.assert_frame_equal(win_fractions(grouped(LOG), MODELS), found)


def test_battle_counts_are_symmetric():
    found = battle_counts(LOG, MODELS)
    assert found.loc["A", "B"] == found.loc["B", "A"] == 6
    assert found.loc["D", "B"] == 5
    assert found.to_numpy().sum() == 2 * len(LOG)
    decisive = battle_counts(LOG, MODELS, ties=False)
    assert decisive.loc["A", "B"] == 4
    assert decisive.loc["D", "B"] == 0


def test_predicted_wins_are_the_formula():
    table = bradley_terry(TWO)
    found = predicted_wins(table)
    assert found.loc["A", "B"] == pytest.approx(12.5 / 18)
    assert found.loc["A", "A"] == 0.5
    assert (found + found.T).to_numpy() == pytest.approx(np.ones((2, 2)))
    apart = bradley_terry(battles(("A", "B", WON), ("A", "B", LOST), ("X", "Y", TIE)))
    wins = predicted_wins(apart, ["A", "X", "nobody"])
    assert np.isnan(wins.loc["A", "X"])
    assert np.isnan(wins.loc["nobody"]).all()
    assert wins.loc["A", "A"] == 0.5


def test_average_win_rate_counts_opponents_not_votes():
    found = average_win_rates(LOG, MODELS)
    assert found["A"] == pytest.approx((3 / 4 + 1) / 2)
    assert found["B"] == pytest.approx(1 / 4)
    assert np.isnan(found["D"])


def test_vote_mix_by_side():
    found = vote_mix(LOG, MODELS).set_index(["model", "side"])
    assert found.loc[("A", "a"), ["votes", "win", "tie"]].tolist() == [5, 3 / 5, 2 / 5]
    assert found.loc[("A", "b"), ["votes", "win", "loss"]].tolist() == [5, 4 / 5, 1 / 5]
    assert found.loc[("D", "b"), ["votes", "bothbad"]].tolist() == [5, 1]
    assert found.loc[("E", "both"), "votes"] == 0
    assert np.isnan(found.loc[("E", "both"), "win"])
    both = found.xs("both", level="side")
    assert both["votes"].sum() == 2 * len(LOG)
    shares = both.loc[both["votes"] > 0, ["win", "loss", "tie", "bothbad"]]
    assert shares.sum(axis=1).to_numpy() == pytest.approx(np.ones(4))
    assert list(found.index[:3]) == [("D", "a"), ("D", "b"), ("D", "both")]


def test_no_votes_are_empty_or_blank_tables():
    nothing = LOG.iloc[:0]
    assert win_fractions(nothing).shape == (0, 0)
    assert battle_counts(nothing, ["A", "B"]).to_numpy().tolist() == [[0, 0], [0, 0]]
    assert win_fractions(nothing, ["A", "B"]).isna().all(axis=None)
    assert predicted_wins(bradley_terry(nothing)).shape == (0, 0)
    assert len(vote_mix(nothing)) == 0
    assert average_win_rates(nothing, ["A"]).isna().all()
    assert pair_scores(nothing, ["A", "B"])["probability"].tolist() == [1.0]
    assert len(pair_scores(nothing, [])) == 0


def test_matrices_of_simulated_votes_agree_with_counting():
    log = drawn([0.5, 0.0, -0.5], 300, seed=0, ties=0.3)
    won, met = win_fractions(log), battle_counts(log)
    for a, b in itertools.permutations(["m0", "m1", "m2"], 2):
        first = log[(log["model_a"] == a) & (log["model_b"] == b)]["winner"]
        second = log[(log["model_a"] == b) & (log["model_b"] == a)]["winner"]
        wins = (first == WON).sum() + (second == LOST).sum()
        losses = (first == LOST).sum() + (second == WON).sum()
        assert won.loc[a, b] == pytest.approx(wins / (wins + losses))
        assert met.loc[a, b] == len(first) + len(second)
