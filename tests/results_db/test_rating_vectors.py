"""Ratings against the outputs of FastChat's and arena-rank's own code, where those are at hand.

Tolerances are those that come with the vectors: how far the authors' optimisers stop from the
maximum. ../shared is not part of a clone; the tests then skip.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from ballots import column

from results_db import ratings
from results_db.estimate import ELO_PER_NAT
from results_db.likelihood import fit, resampled
from results_db.pairs import average_win_rates, battle_counts, predicted_wins, win_fractions
from results_db.ratings import bradley_terry, elo, ranks
from results_db.style import FASTCHAT
from results_db.tally import cells_of, counted_rows, expanded

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "vectors"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "ratings_a.json").is_file(), reason="the shared test vectors are not here"
)
DEGENERATE = (
    "one_model_wins_everything", "one_model_loses_everything", "all_ties", "disconnected_pairs",
    "total_order_no_upsets", "model_only_ever_in_position_b",
)  # fmt: skip
MARKDOWN = {"headers": "header_count", "lists": "list_count", "bold": "bold_count"}


@cache
def known(case: str) -> Any:
    return json.loads((FOLDER / f"ratings_{case}.json").read_text())


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    """640 votes of which 600 count, not in order of time, with counts of style."""
    frame = pd.DataFrame(known("battles_a"))
    meta = pd.DataFrame(list(frame["conv_metadata"]))
    for side in "ab":
        frame[f"tokens_{side}"] = meta[f"sum_assistant_{side}_tokens"]
        for name, theirs in MARKDOWN.items():
            frame[f"{name}_{side}"] = meta[f"{theirs}_{side}"].map(
                lambda kinds: sum(kinds.values())
            )
    return frame


@pytest.fixture(scope="module")
def decisive(log) -> pd.DataFrame:
    return log[~log["winner"].str.startswith("tie")]


def test_online_elo(log, decisive):
    assert column(elo(log, rounds=0)) == pytest.approx(known("a")["online_elo"], abs=1e-6)
    without = known("a")["exclude_ties"]["online_elo"]
    assert column(elo(decisive, rounds=0)) == pytest.approx(without, abs=1e-6)


def test_bradley_terry(log, decisive):
    found = bradley_terry(log)
    assert column(found) == pytest.approx(known("a")["bt_rating"], abs=0.02)
    exact = known("a")["bt_rating_exact_mle_by_definition"]
    assert column(found) == pytest.approx(exact, abs=1e-6)
    assert found.attrs["votes"] == known("a")["num_battles_used"]
    votes = {m: row["num_battles"] for m, row in known("a")["leaderboard"].items()}
    assert column(found, "battles") == votes
    without = known("a")["exclude_ties"]["bt_rating"]
    assert column(bradley_terry(decisive)) == pytest.approx(without, abs=0.02)


def test_bradley_terry_with_an_anchor(log):
    held = known("a")["bt_rating_when_oak_is_the_anchor_1114"]
    found = column(bradley_terry(log, anchor=("model-oak", 1114.0)))
    assert found == pytest.approx(held, abs=0.02)
    assert found["model-oak"] == 1114


def test_bootstrap_with_the_stored_draws(log):
    cells = cells_of(counted_rows(log))
    names = list(cells.models)
    rows = known("a")["unique_outcomes"]["rows"]
    place = [cell_of(cells, names.index(a), names.index(b), y) for a, b, y, _ in rows]
    draws = [np.bincount(place, d, len(cells.count)) for d in known("a")["bootstrap_counts"]]
    assert np.bincount(place, [r[3] for r in rows]).tolist() == cells.count.tolist()
    point = fit(cells, np.zeros(len(names)))
    nats = np.array([again.theta for again in resampled(point, cells, draws, anchor=-1)])
    points = pd.DataFrame(1000 + ELO_PER_NAT * nats, columns=names)
    theirs = known("a")["bootstrap_bt"]
    for name, of_all in (
        ("median", points.median()),
        ("q025", points.quantile(0.025)),
        ("q975", points.quantile(0.975)),
    ):
        assert of_all.to_dict() == pytest.approx(theirs[name], abs=0.05)
        exact = known("a")["bootstrap_bt_exact_fits_by_definition"][name]
        assert of_all.to_dict() == pytest.approx(exact, abs=1e-6)
    assert points.var(ddof=1).to_dict() == pytest.approx(theirs["variance"], rel=1e-3)
    final = {m: row["final_ranking"] for m, row in known("a")["leaderboard"].items()}
    by_quantiles = ranks(points.quantile(0.025), points.quantile(0.975))
    assert dict(zip(names, by_quantiles.tolist(), strict=True)) == final


def cell_of(cells, a, b, score):
    """Where a row of the authors, which keep the sides apart, falls among our cells."""
    lo, hi, y = (a, b, score) if a < b else (b, a, 1 - score)
    return int(np.flatnonzero((cells.first == lo) & (cells.second == hi) & (cells.score == y))[0])


def test_bootstrap_with_own_draws(log):
    theirs = known("a")["bootstrap_bt"]
    found = bradley_terry(log, interval="bootstrap", rounds=100)
    assert column(found, "low") == pytest.approx(theirs["q025"], abs=35)
    assert column(found, "high") == pytest.approx(theirs["q975"], abs=35)


def test_bootstrap_of_online_elo(log):
    """The authors' draws come from numpy's old generator; the recurrence is the same."""
    theirs = known("a")["bootstrap_online_elo_np_random_seed_42"]
    rows = expanded(counted_rows(log, in_time=True))
    picks = np.random.RandomState(42).randint(0, len(rows.at), size=(len(rows.at), 100))
    points = ratings._elo_resampled(rows, [picks], 4.0, np.log(10) / 400, 100)
    found = pd.DataFrame(1000 + points, columns=list(rows.models))
    assert found.median().to_dict() == pytest.approx(theirs["median"], abs=1e-6)
    assert found.quantile(0.025).to_dict() == pytest.approx(theirs["q025"], abs=1e-6)
    own = elo(log)
    assert column(own, "low") == pytest.approx(theirs["q025"], abs=35)
    assert column(own, "high") == pytest.approx(theirs["q975"], abs=35)


@pytest.mark.parametrize(("kind", "reweight"), [("plain", None), ("reweighted", "pairs")])
def test_arena_rank(log, kind, reweight):
    theirs = pd.DataFrame(known("arenarank_a")[kind]).T
    found = bradley_terry(log, reweight=reweight)
    for name, other in (("rating", "rating"), ("low", "lower"), ("high", "upper")):
        assert column(found, name) == pytest.approx(theirs[other].to_dict(), abs=0.05)
    assert column(found, "rank") == known("arenarank_a")[f"{kind}_ranks_from_intervals"]


def test_style_control(log):
    theirs = known("a")["style_control"]
    found = bradley_terry(log, style=FASTCHAT)
    assert column(found) == pytest.approx(theirs["rating"], abs=0.05)
    ours = [effect["coefficient"] for effect in found.attrs["style"].values()]
    assert ours == pytest.approx(theirs["coefficients_[length,header,list,bold]"], abs=1e-4)
    # Our own form differs in penalty and centring only: a few points here.
    assert column(bradley_terry(log, style=True)) == pytest.approx(theirs["rating"], abs=3)


def test_matrices(log):
    theirs = known("a")["predicted_win_rate_by_formula"]
    order = theirs["order"]
    found = predicted_wins(bradley_terry(log), order)
    assert found.to_numpy() == pytest.approx(np.array(theirs["matrix"]), abs=1e-4)
    theirs = known("a")["empirical_win_fraction_no_ties"]
    shares = np.array(theirs["matrix"], dtype=float)
    found = win_fractions(log, theirs["order"])
    assert found.to_numpy() == pytest.approx(shares, abs=1e-12, nan_ok=True)
    means = known("a")["average_win_rate_no_ties"]
    assert average_win_rates(log).to_dict() == pytest.approx(means, abs=1e-12)
    assert battle_counts(log).to_numpy().sum() == 2 * 600


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_logs(case):
    theirs = known("degenerate_a")[case]
    frame = pd.DataFrame(theirs["battles"])
    assert column(elo(frame, rounds=0)) == pytest.approx(theirs["online_elo"], abs=1e-6)
    found = bradley_terry(frame)
    assert np.isfinite(found[["rating", "low", "high"]]).all(axis=None)
    no_optimum = case in (
        "one_model_wins_everything",
        "one_model_loses_everything",
        "total_order_no_upsets",
    )
    assert found.attrs["regularised"] == no_optimum
    if no_optimum:
        # Theirs is where the optimiser stopped: only the order means something, and of models
        # that are far apart.
        order = sorted(theirs["bt_rating"], key=theirs["bt_rating"].__getitem__)
        rating = column(found)
        assert rating[order[-1]] == max(rating.values())
        assert rating[order[0]] == min(rating.values())
        assert found["low"].le(found["rating"]).all()
        assert found["high"].ge(found["rating"]).all()
    else:
        assert column(found) == pytest.approx(theirs["bt_rating"], abs=0.02)
