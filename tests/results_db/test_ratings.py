"""Elo and Bradley-Terry against closed forms, brute force, other libraries and themselves."""

import choix
import evalica
import numpy as np
import pandas as pd
import pytest
from ballots import BAD, FOUR, LOST, TIE, TWO, WON, battles, column, drawn, grouped, swapped
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from results_db.estimate import ELO_PER_NAT, estimate
from results_db.ratings import bradley_terry, elo, ranks, table
from results_db.tally import SCORES

EXACT = 1e-6  # Elo points; Newton's last step is below 1e-9 nats
STRENGTHS = [0.9, 0.4, 0.1, -0.3, -1.1]
outcome = st.sampled_from(list(SCORES))
vote = st.tuples(st.sampled_from("ABCDE"), st.sampled_from("ABCDE"), outcome)
votes = st.lists(vote.filter(lambda v: v[0] != v[1]), min_size=1, max_size=40)


def each_vote(frame, models):
    """Design [N, M] and score [N] of side A, one row per vote."""
    x = np.zeros((len(frame), len(models)))
    for row, (a, b) in enumerate(zip(frame["model_a"], frame["model_b"], strict=True)):
        x[row, models.index(a)], x[row, models.index(b)] = 1, -1
    return x, frame["winner"].map(SCORES).to_numpy(dtype=float)


def by_brute_force(frame, models):
    """Strengths with mean 0 from a general optimiser, vote by vote."""
    x, y = each_vote(frame, models)
    loss = lambda xi: (np.logaddexp(0, x @ xi) - y * (x @ xi)).sum()  # noqa: E731
    slope = lambda xi: x.T @ (expit(x @ xi) - y)  # noqa: E731
    found = minimize(loss, np.zeros(len(models)), jac=slope, method="BFGS", options={"gtol": 1e-9})
    return found.x - found.x.mean()


# --- online Elo


def test_elo_of_three_votes_is_the_recurrence():
    log = battles(("A", "B", WON), ("B", "C", TIE), ("C", "A", WON), ("A", "B", LOST))
    found = column(elo(log))
    assert found == pytest.approx({"A": 997.9770, "B": 1000.0229, "C": 1002.0001}, abs=5e-5)


def test_elo_moves_by_half_k_between_equals_and_not_at_all_on_a_tie():
    assert column(elo(battles(("A", "B", WON)))) == {"A": 1002, "B": 998}
    assert column(elo(battles(("A", "B", BAD)))) == {"A": 1000, "B": 1000}
    assert column(elo(battles(("A", "B", WON)), k=32, start=0)) == {"A": 16, "B": -16}


@settings(max_examples=40, deadline=None)
@given(votes)
def test_elo_keeps_the_sum_and_forgets_the_sides(log):
    frame = battles(*log)
    found = elo(frame, rounds=0)
    assert found["rating"].mean() == pytest.approx(1000, abs=1e-9)
    pd.testing.assert_frame_equal(elo(swapped(frame), rounds=0), found)


def test_elo_goes_by_time_and_depends_on_it():
    log = drawn(STRENGTHS, 300, seed=0)
    shuffled = log.sample(frac=1, random_state=1)
    assert column(elo(shuffled, rounds=0)) == column(elo(log, rounds=0))
    assert column(elo(log.assign(tstamp=-log["tstamp"]), rounds=0)) != column(elo(log, rounds=0))
    without = log.sort_values("tstamp").drop(columns=["tstamp", "anony"])
    assert column(elo(without, rounds=0)) == column(elo(log, rounds=0))


def test_elo_resamples_are_nearly_free_of_the_order():
    log = drawn(STRENGTHS, 400, seed=0)
    found, turned = elo(log), elo(log.assign(tstamp=-log["tstamp"]), seed=1)
    middle = [(t["low"] + t["high"]).to_numpy() / 2 for t in (found, turned.set_index("model"))]
    a, b = pd.Series(middle[0], found["model"]), pd.Series(middle[1], turned["model"])
    # The ends of 100 rounds move by about 5 points from seed to seed.
    assert (a - b[a.index]).abs().max() < 15
    assert (found["low"] < found["rating"]).all()
    assert (found["high"] > found["rating"]).all()


def test_elo_agrees_with_evalica():
    log = drawn(STRENGTHS, 500, seed=2, ties=0.2).sort_values("tstamp")
    other = evalica.elo(log["model_a"], log["model_b"], log["winner"].map(EVALICA), k=4.0)
    assert column(elo(log, rounds=0)) == pytest.approx(other.scores.to_dict(), abs=1e-9)


EVALICA = {
    WON: evalica.Winner.X, LOST: evalica.Winner.Y, TIE: evalica.Winner.Draw,
    BAD: evalica.Winner.Draw,
}  # fmt: skip


# --- Bradley-Terry: the maximum


def test_two_models_are_the_closed_form():
    """10 wins, 5 ties, 3 losses: 400 log10(12.5 / 5.5)."""
    found = column(bradley_terry(TWO))
    assert found["A"] - found["B"] == pytest.approx(400 * np.log10(12.5 / 5.5), abs=EXACT)
    assert found["A"] - found["B"] == pytest.approx(142.6189, abs=5e-5)
    assert found["A"] + found["B"] == pytest.approx(2000, abs=EXACT)


def test_four_players_are_as_computed_elsewhere():
    found = bradley_terry(FOUR)
    known = {"A": 922.43, "B": 1007.37, "C": 927.77, "D": 1142.44}
    assert column(found) == pytest.approx(known, abs=0.005)
    assert found["rank"].tolist() == [1] * 4  # 95 % intervals overlap
    assert list(found["model"]) == ["D", "B", "C", "A"]


@pytest.mark.parametrize(
    ("interval", "stderr", "pair"),
    [
        ("sandwich", [94.56, 84.19, 91.75, 108.39], 155.06),
        ("model", [95.21, 83.69, 90.40, 107.94], None),
    ],
)
def test_four_players_standard_errors(interval, stderr, pair):
    found = estimate(FOUR, interval=interval, floors=False)
    i = np.arange(4)
    errors = ELO_PER_NAT * np.sqrt(found.variance(i, np.full(4, 4)))
    assert errors == pytest.approx(stderr, abs=0.005)
    if pair:
        apart = ELO_PER_NAT * np.sqrt(found.variance(i[:1], i[3:]))
        assert apart == pytest.approx([pair], abs=0.005)


@settings(max_examples=40, deadline=None)
@given(votes)
def test_the_maximum_is_the_one_of_a_general_optimiser(log):
    """With a tie added to every pair that met, the maximum is always finite."""
    ties = [(a, b, TIE) for a, b in {tuple(sorted(v[:2])) for v in log}]
    frame = battles(*log, *ties)
    found = estimate(frame)
    assert not found.fit.regularised.any()
    for component in range(found.fit.component.max() + 1):
        models = [m for m, c in zip(found.models, found.fit.component, strict=True)
                  if c == component]  # fmt: skip
        here = frame[frame["model_a"].isin(models)]
        own = found.fit.strength[found.fit.component == component]
        # BFGS stops at gradients of 1e-9 to 1e-6, where its line search ends.
        assert own == pytest.approx(by_brute_force(here, models), abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(votes, st.data())
def test_millions_of_votes_beside_a_handful_settle(log, data):
    """The slope at the maximum is 0 to rounding, however contradictory and lopsided the votes."""
    sizes = st.integers(0, 7).map(lambda power: 10**power)
    count = data.draw(st.lists(sizes, min_size=len(log), max_size=len(log)))
    found = estimate(battles(*log).assign(count=count), floors=False)
    cells, strength = found.fit.cells, found.fit.strength
    p = expit(strength[cells.first] - strength[cells.second])
    slope = np.zeros(len(strength))
    np.add.at(slope, cells.first, cells.count * (cells.score - p))
    np.add.at(slope, cells.second, cells.count * (p - cells.score))
    assert np.abs(slope).max() < 1e-12 * cells.count.sum() + 1e-6
    assert np.isfinite(found.covariance).all()


def test_agrees_with_evalica_and_choix():
    log = drawn(STRENGTHS, 2000, seed=3, ties=0.1)
    found = bradley_terry(log)
    models = sorted(found["model"])
    ours = np.array([column(found)[m] for m in models]) / ELO_PER_NAT

    other = evalica.bradley_terry(
        log["model_a"], log["model_b"], log["winner"].map(EVALICA), tolerance=1e-10, limit=10_000
    )
    theirs = np.log(other.scores[models].to_numpy())
    assert ours - ours.mean() == pytest.approx(theirs - theirs.mean(), abs=1e-6)

    # choix knows no ties: every vote twice, a tie once each way.
    pairs = []
    for a, b, winner in zip(log["model_a"], log["model_b"], log["winner"], strict=True):
        i, j = models.index(a), models.index(b)
        pairs += {WON: [(i, j)] * 2, LOST: [(j, i)] * 2}.get(winner, [(i, j), (j, i)])
    spectral = choix.ilsr_pairwise(len(models), pairs, tol=1e-10, max_iter=1000)
    assert ours - ours.mean() == pytest.approx(spectral - spectral.mean(), abs=1e-6)
    newton = choix.opt_pairwise(len(models), pairs, alpha=0, tol=1e-10)
    assert ours - ours.mean() == pytest.approx(newton - newton.mean(), abs=1e-5)


def test_a_ridge_is_the_penalised_maximum():
    """Two models, three wins: 3 sigmoid(-g) = ridge g / 2, as xi = +-g / 2."""
    found = estimate(battles(("A", "B", WON, 3)), ridge=0.01)
    gap = found.fit.strength[0] - found.fit.strength[1]
    assert 3 * expit(-gap) == pytest.approx(0.01 * gap / 2, abs=1e-9)
    assert found.fit.regularised.all()


# --- what must not matter


@settings(max_examples=30, deadline=None)
@given(votes)
def test_sides_order_and_grouping_leave_no_trace(log):
    """Exactly: every vote is seen from the model whose name comes first."""
    frame = battles(*log)
    found = bradley_terry(frame)
    half = np.arange(len(frame)) % 2 == 0
    turned = pd.concat([frame[half], swapped(frame[~half])])
    for same in (turned, frame[::-1], grouped(frame), grouped(turned).sample(frac=1)):
        pd.testing.assert_frame_equal(bradley_terry(same), found)
    assert bradley_terry(grouped(frame)).attrs == found.attrs


def test_what_does_not_count_changes_nothing():
    log = drawn(STRENGTHS, 300, seed=4)
    seen = pd.DataFrame(
        [("m4", "m0", WON, 1e6, False)] * 50 + [("new", "m0", WON, 1e6, False)],
        columns=log.columns,
    )
    itself = battles(("m0", "m0", WON, 5))
    none = log.assign(count=1), log.tail(5).assign(count=0)
    for more in (pd.concat([log, seen]), pd.concat([log, itself]), pd.concat(none)):
        pd.testing.assert_frame_equal(bradley_terry(more), bradley_terry(log))
        pd.testing.assert_frame_equal(elo(more), elo(log))


def test_twice_the_votes_are_surer_by_root_two():
    log = drawn(STRENGTHS, 1500, seed=5)
    once, twice = bradley_terry(log), bradley_terry(pd.concat([log, log]))
    assert column(twice) == pytest.approx(column(once), abs=EXACT)
    ratio = (once["high"] - once["low"]) / (twice["high"] - twice["low"])
    assert ratio.to_numpy() == pytest.approx(np.sqrt(2), abs=1e-6)


def test_an_anchor_shifts_and_its_interval_is_that_of_the_gap():
    log = drawn(STRENGTHS, 1500, seed=6)
    free, held = bradley_terry(log), bradley_terry(log, anchor=("m2", 1000.0))
    shift = {m: held_at - column(free)[m] for m, held_at in column(held).items()}
    assert list(shift.values()) == pytest.approx([shift["m2"]] * 5, abs=EXACT)
    base = held[held["model"] == "m2"].iloc[0]
    assert (base["rating"], base["low"], base["high"]) == (1000, 1000, 1000)
    found = estimate(log)
    i = np.array([found.models.index(m) for m in held["model"]])
    wide = 1.959964 * ELO_PER_NAT * np.sqrt(found.variance(i, np.full(5, found.models.index("m2"))))
    assert (held["high"] - held["rating"]).to_numpy() == pytest.approx(wide, abs=1e-4)


def test_an_anchor_without_votes_is_told():
    found = bradley_terry(FOUR, anchor=("Z", 1200.0))
    assert found["rating"].mean() == pytest.approx(1000)
    assert "Z has no votes" in found.attrs["notes"][0]


# --- when the maximum is not finite


def test_a_model_that_never_lost_is_finite_and_said_to_be_regularised():
    log = battles(("A", "B", WON, 30), ("B", "C", WON, 10), ("B", "C", LOST, 5))
    found = bradley_terry(log)
    assert found.attrs["regularised"]
    assert found.attrs["interval"] == "model"
    assert "Regularised" in found.attrs["notes"][0]
    rating = column(found)
    # One virtual tie: 30.5 wins to 0.5 losses; B-C likewise.
    assert rating["A"] - rating["B"] == pytest.approx(400 * np.log10(30.5 / 0.5), abs=EXACT)
    assert rating["B"] - rating["C"] == pytest.approx(400 * np.log10(10.5 / 5.5), abs=EXACT)
    assert found["battles"].tolist() == [30, 45, 15]  # virtual ties are not votes


@settings(max_examples=60, deadline=None)
@given(votes)
def test_existence_is_reachability(log):
    """Brute force: from every model one can walk to every other over part-wins, or not."""
    found = estimate(battles(*log))
    models = list(found.models)
    reach = {m: {m} for m in models}
    took = {(a, b) for a, b, w in log if SCORES[w] > 0} | {(b, a) for a, b, w in log
                                                           if SCORES[w] < 1}  # fmt: skip
    met = took | {(b, a) for a, b in took}
    for edges, out in ((took, reach), (met, linked := {m: {m} for m in models})):
        for _ in models:
            for a, b in edges:
                out[a] |= out[b]
    for at, m in enumerate(models):
        together = {models[i] for i in np.flatnonzero(found.fit.component ==
                                                      found.fit.component[at])}  # fmt: skip
        assert together == linked[m]
        sound = all(reach[one] == linked[m] for one in together)
        assert found.fit.regularised[at] == (not sound)
    assert np.isfinite(found.fit.theta).all()


def test_components_are_ranked_apart():
    log = battles(
        ("A", "B", WON, 40), ("A", "B", LOST, 20),
        ("X", "Y", WON, 70), ("X", "Y", LOST, 2),
    )  # fmt: skip
    found = bradley_terry(log)
    assert found["model"].tolist() == ["X", "Y", "A", "B"]  # more votes first
    assert found["component"].tolist() == [1, 1, 2, 2]
    assert found["rank"].tolist() == [1, 2, 1, 2]
    assert found.groupby("component")["rating"].mean().tolist() == pytest.approx([1000, 1000])
    assert found.attrs["components"] == 2
    held = bradley_terry(log, anchor=("B", 1000.0))
    assert held["model"].tolist() == ["A", "B", "X", "Y"]  # the anchor's first
    assert column(held)["X"] == pytest.approx(column(found)["X"])


def test_a_component_without_a_finite_maximum_leaves_the_others_alone():
    sound = drawn(STRENGTHS, 500, seed=7)
    found = bradley_terry(pd.concat([sound, battles(("X", "Y", WON, 3))]))
    assert set(found.loc[found["regularised"], "model"]) == {"X", "Y"}
    alone = column(bradley_terry(sound))
    assert {m: column(found)[m] for m in alone} == pytest.approx(alone, abs=EXACT)
    assert found["few_votes"].tolist() == [False] * 5 + [True] * 2


# --- intervals


def test_sandwich_is_the_definition_vote_by_vote():
    """H^+ G H^+ with H and G summed over single votes, and the pseudo-inverse of numpy."""
    log = drawn(STRENGTHS, 600, seed=8, ties=0.3)
    found = estimate(log)
    assert found.interval == "sandwich"
    x, y = each_vote(log, list(found.models))
    p = expit(x @ found.fit.strength)
    bread = np.linalg.pinv((x.T * (p * (1 - p))) @ x)
    v = bread @ ((x.T * (y - p) ** 2) @ x) @ bread
    assert found.covariance[:-1, :-1] == pytest.approx(v, abs=1e-12)
    bare = estimate(log, interval="model").covariance[:-1, :-1]
    assert bare == pytest.approx(bread, abs=1e-12)


def test_ties_make_the_sandwich_narrower():
    """10, 5, 3: variance of the gap 0.176 against 0.262."""
    one, other = np.array([0]), np.array([1])
    robust = estimate(TWO, floors=False).variance(one, other)
    assert robust == pytest.approx([0.176], abs=5e-4)
    bare = estimate(TWO, interval="model").variance(one, other)
    assert bare == pytest.approx([0.262], abs=5e-4)


def test_the_sandwich_gives_way_where_it_would_claim_too_much():
    few = bradley_terry(battles(("A", "B", WON, 30), ("A", "B", LOST, 19)))
    assert few.attrs["interval"] == "model"
    assert "has 49 votes" in few.attrs["notes"][0]
    enough = bradley_terry(battles(("A", "B", WON, 30), ("A", "B", LOST, 20)))
    assert enough.attrs["interval"] == "sandwich"
    assert enough.attrs["notes"] == []
    tied = battles(("A", "B", WON, 10), ("A", "B", LOST, 9), ("A", "B", TIE, 81))
    assert bradley_terry(tied).attrs["interval"] == "model"
    assert "81 % of the votes are ties" in bradley_terry(tied).attrs["notes"][0]
    assert bradley_terry(tied, floors=False).attrs["interval"] == "sandwich"
    # With nothing but ties the sandwich would have no width at all.
    only = bradley_terry(battles(("A", "B", TIE, 100)))
    assert only["rating"].tolist() == [1000, 1000]
    assert (only["high"] - only["low"]).min() > 50


def test_bootstrap_and_sandwich_agree():
    log = drawn(STRENGTHS, 2000, seed=9, ties=0.2)
    wide = [
        t.set_index("model").eval("high - low")
        for t in (bradley_terry(log), bradley_terry(log, interval="bootstrap"))
    ]
    assert (wide[1] / wide[0]).between(0.8, 1.2).all()


def test_coverage_of_simulated_votes():
    """2000 votes, 5 models, 100 worlds: about 95 % of the intervals hold the truth."""
    truth = np.array(STRENGTHS) - np.mean(STRENGTHS)
    hits = []
    for seed in range(100):
        found = bradley_terry(drawn(STRENGTHS, 2000, seed=seed)).sort_values("model")
        real = 1000 + ELO_PER_NAT * truth
        hits += [(found["low"] <= real) & (real <= found["high"])]
    assert 0.90 <= np.mean(hits) <= 0.98


def test_a_model_against_itself():
    """The same model under two names: the interval of the gap holds 0 in about 95 of 100."""
    hits = 0
    for seed in range(100):
        found = bradley_terry(drawn([0, 0], 400, seed=seed, ties=0.3), anchor=("m0", 1000.0))
        other = found[found["model"] == "m1"].iloc[0]
        hits += other["low"] <= 1000 <= other["high"]
    assert 90 <= hits <= 99


def test_bootstrap_leaves_out_models_that_a_resample_lost():
    log = pd.concat([drawn(STRENGTHS, 300, seed=10), battles(("rare", "m0", TIE, 1))])
    found = estimate(log, interval="bootstrap", rounds=200)
    at = found.models.index("rare")
    missing = np.isnan(found.samples[:, at]).mean()
    assert missing == pytest.approx(np.exp(-1), abs=0.12)  # 200 rounds: se 0.034
    assert "rare was left out of" in " ".join(found.notes)
    others = np.delete(found.samples, at, axis=1)
    assert not np.isnan(others).any()
    # Without it, the others are not pulled towards the place where its absence puts the mean.
    gone = np.isnan(found.samples[:, at])
    rest = [i for i in range(len(found.models)) if i != at]
    assert found.samples[gone][:, rest].mean(axis=1) == pytest.approx(
        found.fit.strength[rest].mean(), abs=1e-9
    )


def test_bootstrap_is_the_same_for_rows_cells_and_seed():
    log = drawn(STRENGTHS, 400, seed=11)
    one = bradley_terry(log, interval="bootstrap", rounds=50, seed=3)
    pd.testing.assert_frame_equal(
        bradley_terry(grouped(log), interval="bootstrap", rounds=50, seed=3), one
    )
    other = bradley_terry(log, interval="bootstrap", rounds=50, seed=4)
    assert column(other, "low") != column(one, "low")


def test_levels():
    log = drawn(STRENGTHS, 1000, seed=12)
    found = estimate(log)
    wide = [table(found, level=level).eval("high - low") for level in (0.5, 0.95)]
    assert (wide[1] / wide[0]).to_numpy() == pytest.approx(1.959964 / 0.674490, abs=1e-5)
    together = table(found, simultaneous=True)
    assert together.attrs["level"] == pytest.approx(0.99)
    assert (together["high"] - together["low"] > wide[1]).all()


# --- re-weighting


def test_pairs_weigh_at_most_as_much_as_fifty_votes():
    """Two pairs: the strengths between them do not depend on weights, the intervals do."""
    log = battles(
        ("A", "B", WON, 300), ("A", "B", LOST, 100), ("B", "C", WON, 30), ("B", "C", LOST, 30),
    )  # fmt: skip
    even, plain = bradley_terry(log, reweight="pairs"), bradley_terry(log)
    assert column(even) == pytest.approx(column(plain), abs=EXACT)
    more = pd.concat([log, battles(("A", "C", WON, 20), ("A", "C", LOST, 40))])
    assert column(bradley_terry(more, reweight="pairs")) != pytest.approx(
        column(bradley_terry(more)), abs=1
    )


def test_propensities_undo_how_pairs_were_drawn():
    """Votes that break the model, drawn unevenly: weights give what even draws would give."""
    even = battles(
        ("A", "B", WON, 80), ("A", "B", LOST, 20), ("B", "C", WON, 80), ("B", "C", LOST, 20),
        ("A", "C", WON, 30), ("A", "C", LOST, 70),
    )  # fmt: skip
    uneven = pd.concat([even, *[even[even["model_b"] == "B"]] * 3])
    share = np.where(uneven["model_b"] == "B", 4 / 6, 1 / 6)
    found = bradley_terry(uneven.assign(propensity=share), reweight="propensity")
    assert column(found) == pytest.approx(column(bradley_terry(even)), abs=EXACT)
    with pytest.raises(ValueError, match="propensity"):
        bradley_terry(even, reweight="propensity")
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        bradley_terry(even.assign(propensity=np.nan), reweight="propensity")


# --- ranks, few votes, empty, wrong


def test_ranks_by_intervals():
    assert ranks([10, 18, 31], [20, 30, 40]).tolist() == [2, 2, 1]
    assert ranks([1, 2], [2, 3]).tolist() == [1, 1]  # touching is not above
    assert ranks([], []).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_ranks_are_the_definition(ends):
    low, high = zip(*[sorted(pair) for pair in ends], strict=True)
    found = ranks(low, high).tolist()
    assert found == [1 + sum(other > top for other in low) for top in high]
    assert min(found) == 1
    assert max(found) <= len(ends)


@settings(max_examples=40, deadline=None)
@given(votes)
def test_the_best_of_a_component_has_rank_one(log):
    found = bradley_terry(battles(*log))
    for _, part in found.groupby("component"):
        assert part["rank"].iloc[0] == 1
        assert part["rank"].between(1, len(part)).all()
        assert part["rating"].is_monotonic_decreasing
    assert (found["few_votes"] == (found["battles"] < 10)).all()


@pytest.mark.parametrize("interval", ["sandwich", "bootstrap", "model"])
def test_no_votes_no_rows(interval):
    nothing = FOUR.iloc[:0]
    found = bradley_terry(nothing, interval=interval)
    assert len(found) == 0
    assert list(found)[:6] == ["model", "rating", "low", "high", "battles", "rank"]
    assert len(elo(nothing)) == 0
    assert len(bradley_terry(FOUR.assign(anony=False))) == 0
    bare = pd.DataFrame(columns=["model_a", "model_b", "winner"])
    assert len(bradley_terry(bare)) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.drop(columns="winner"), "missing: winner"),
        (lambda f: f.assign(winner="draw"), "winner is 'draw'"),
        (lambda f: f.assign(winner=None), "winner is"),
        (lambda f: f.assign(model_a=None), "without the name"),
        (lambda f: f.assign(count=0.5), "whole number"),
        (lambda f: f.assign(count=-1), "whole number"),
    ],
)
def test_battles_that_cannot_be_read_are_refused(change, words):
    for rate in (elo, bradley_terry):
        with pytest.raises(ValueError, match=words):
            rate(change(FOUR))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"interval": "jackknife"}, "'sandwich', 'bootstrap', 'model'"),
        ({"reweight": "users"}, "'pairs', 'propensity'"),
        ({"interval": "bootstrap", "rounds": 1}, "at least 2"),
        ({"level": 95}, "between 0 and 1"),
        ({"style": True}, "tokens_a|characters_a"),
    ],
)
def test_choices_that_do_not_exist_are_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        bradley_terry(FOUR, **asked)


def test_columns_of_any_kind_of_text():
    found = bradley_terry(FOUR)
    for kind in ("category", "object", "str"):
        named = FOUR.astype({"model_a": kind, "model_b": kind, "winner": kind})
        pd.testing.assert_frame_equal(bradley_terry(named), found)
    maybe = FOUR.assign(anony=pd.array([None, True] * (len(FOUR) // 2), dtype="boolean"))
    pd.testing.assert_frame_equal(bradley_terry(maybe), found)
