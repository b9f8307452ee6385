"""AlpacaEval's win rate and the length-controlled one, against its properties and a refit."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from results_db.length_control import L2_PER_COMPARISON, win_rate


def judged(n: int, theta: float, phi: float, seed: int, longer: float = 0.0):
    """Preferences of 1 and 2 from the model, and the lengths; `longer` shifts the model's."""
    rng = np.random.default_rng(seed)
    base, own = rng.normal(1000, 150, n), rng.normal(1000 + longer, 150, n)
    gap = base - own
    x = np.tanh(gap / gap.std(ddof=1))
    return 1.0 + (rng.random(n) < expit(theta + phi * x)), base, own


def test_rates_and_their_error():
    found = win_rate([1, 2, 2, 1.5, 0, np.nan, 1.9])
    score = np.array([0, 1, 1, 0.5, 0.5, 0.9])
    assert found.win_rate == pytest.approx(100 * score.mean())
    assert found.stderr == pytest.approx(100 * score.std(ddof=1) / np.sqrt(6))
    assert found.discrete == pytest.approx(100 * (3 + 2 / 2) / 6)
    assert (found.n, found.dropped) == (6, 1)
    assert found.length_controlled is None
    assert found.notes == ("Answer lengths are not known.",)


def test_equal_lengths_control_nothing():
    preference, base, _ = judged(400, 0.7, 0.0, seed=0)
    found = win_rate(preference, base, base)
    assert found.length_controlled == pytest.approx(found.win_rate, abs=1e-6)
    assert found.phi == 0
    assert found.length_controlled_stderr == pytest.approx(
        found.stderr, rel=0.01
    )  # n against n - 1


def test_a_judge_of_length_alone_is_seen_through():
    _, base, own = judged(600, 0.0, 0.0, seed=1, longer=200)
    found = win_rate(np.where(own > base, 2.0, 1.0), base, own)
    assert found.win_rate > 75
    assert found.length_controlled == pytest.approx(50, abs=6)
    assert found.phi < -3
    assert "moves the win rate" in found.notes[0]


def test_a_drawn_truth_is_recovered():
    preference, base, own = judged(20_000, 0.4, -1.5, seed=2, longer=80)
    found = win_rate(preference, base, own)
    assert found.theta == pytest.approx(0.4, abs=0.06)
    assert found.phi == pytest.approx(-1.5, abs=0.1)
    assert found.length_controlled == pytest.approx(100 * expit(0.4), abs=1.5)
    assert found.win_rate > found.length_controlled + 3


def test_swapping_the_roles_mirrors():
    preference, base, own = judged(500, 0.3, -1.0, seed=3, longer=50)
    preference[::7] = 1.5
    found, mirrored = win_rate(preference, base, own), win_rate(3 - preference, own, base)
    assert mirrored.win_rate == pytest.approx(100 - found.win_rate)
    assert mirrored.length_controlled == pytest.approx(100 - found.length_controlled, abs=1e-6)
    assert mirrored.phi == pytest.approx(found.phi, abs=1e-8)
    assert mirrored.discrete == pytest.approx(100 - found.discrete)


def test_always_a_tie_is_fifty():
    _, base, own = judged(200, 0.0, 0.0, seed=4, longer=100)
    found = win_rate(np.full(200, 1.5), base, own)
    assert (found.win_rate, found.discrete, found.stderr) == (50, 50, 0)
    assert found.length_controlled == pytest.approx(50)


def test_soft_preferences_are_the_maximum_of_a_general_optimiser():
    preference, base, own = judged(300, 0.2, -0.8, seed=5)
    soft = np.clip(preference + np.random.default_rng(6).normal(0, 0.2, 300), 1, 2)
    found = win_rate(soft, base, own)
    gap = base - own
    x, y = np.tanh(gap / gap.std(ddof=1)), soft - 1

    def loss(at):
        z = at[0] + at[1] * x
        return (np.logaddexp(0, z) - y * z).sum() + L2_PER_COMPARISON * 300 * at[1] ** 2 / 2

    best = minimize(loss, [0, 0], method="BFGS", options={"gtol": 1e-7}).x
    assert [found.theta, found.phi] == pytest.approx(best, abs=1e-4)


def test_what_cannot_be_told_is_withheld():
    preference, base, own = judged(99, 0.2, 0.0, seed=7)
    few = win_rate(preference, base, own)
    assert few.length_controlled is None
    assert "takes 100 comparisons; there are 99" in few.notes[0]
    assert win_rate(preference, base, own, minimum=50).length_controlled is not None
    preference, base, own = judged(200, 0.2, 0.0, seed=8)
    always = win_rate(np.full(200, 2.0), base, own)
    assert always.length_controlled is None
    assert always.win_rate == 100
    apart = win_rate(preference, base, base + 500 + own / 1000)
    assert apart.length_controlled is None
    assert "cannot be separated" in apart.notes[0]
    unknown = win_rate(preference, base, np.where(base > 1000, np.nan, own))
    assert unknown.notes == ("Some answers have no length.",)
    nothing = win_rate([])
    assert np.isnan(nothing.win_rate)
    assert nothing.n == 0


def test_preferences_outside_one_to_two_are_refused():
    for wrong in (2.5, 0.5, -1):
        with pytest.raises(ValueError, match="between 1"):
            win_rate([1, wrong])
