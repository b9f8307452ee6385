"""What verdicts come to: grades, games in both orders, agreement of judges."""

import itertools
import random

import numpy as np
import pandas as pd
import pytest
from ballots import BAD, LOST, TIE, WON, battles, swapped

from results_db.judging import (
    GAMES,
    agreement,
    category_means,
    games_table,
    grade_difference,
    grades,
    position_report,
    reconcile,
)

GRADED = pd.DataFrame(
    [
        ("x", 1, "math", 1, 8.0), ("x", 1, "math", 2, 6.0), ("x", 2, "stem", 1, 10.0),
        ("x", 2, "stem", 2, -1.0), ("x", 3, "stem", 1, 5.5), ("x", 3, "stem", 2, 11.0),
        ("y", 1, "math", 1, 7.0), ("y", 1, "math", 2, 7.0), ("y", 2, "stem", 1, 9.0),
        ("y", 2, "stem", 2, 3.0), ("y", 3, "stem", 1, 0.0), ("y", 3, "stem", 2, np.nan),
        ("z", 1, "math", 1, -1.0),
    ],
    columns=["model", "question", "category", "turn", "score"],
)  # fmt: skip


def test_grades_leave_failures_out_and_count_them():
    found = grades(GRADED).set_index("model")
    assert list(found.index) == ["x", "y", "z"]
    x = found.loc["x"]
    assert x["turn_1"] == pytest.approx((8 + 10 + 5.5) / 3)
    assert x["turn_2"] == 6
    assert x["overall"] == pytest.approx((8 + 6 + 10 + 5.5) / 4)
    assert x["stderr"] == pytest.approx(np.std([7, 10, 5.5], ddof=1) / np.sqrt(3))
    assert found["failed"].to_dict() == {"x": 2, "y": 2, "z": 1}
    assert found["questions"].to_dict() == {"x": 3, "y": 2, "z": 0}
    assert np.isnan(found.loc["z", "overall"])
    assert len(grades(GRADED.iloc[:0])) == 0


def test_categories():
    found = category_means(GRADED)
    assert found.loc["x", "stem"] == pytest.approx((10 + 5.5) / 2)
    assert found.loc["y", "math"] == 7


def test_a_difference_is_paired_by_question_and_turn():
    found = grade_difference(GRADED, "x", "y")
    each = [(7 - 8 + 7 - 6) / 2, 9 - 10]  # question 2 has one turn that both have
    assert found.mean == pytest.approx(np.mean(each))
    assert found.stderr == pytest.approx(np.std(each, ddof=1) / np.sqrt(2))
    assert found.questions == 2
    back = grade_difference(GRADED, "y", "x")
    assert (back.mean, back.stderr) == pytest.approx((-found.mean, found.stderr))
    assert grade_difference(GRADED, "x", "z").questions == 0


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("A", "B", "model_1"),
        ("B", "A", "model_2"),
        ("A", "A", "tie"),
        ("B", "B", "tie"),
        ("A", "tie", "tie"),
        ("tie", "B", "tie"),
        ("tie", "tie", "tie"),
        ("error", "A", "error"),
        ("tie", "error", "error"),
    ],
)
def test_a_win_takes_both_orders(first, second, verdict):
    assert reconcile(first, second) == verdict


def test_exchanging_the_models_mirrors_every_verdict():
    mirror = {"model_1": "model_2", "model_2": "model_1"}
    for first, second in itertools.product(GAMES, GAMES):
        verdict = reconcile(first, second)
        assert reconcile(second, first) == mirror.get(verdict, verdict)
    with pytest.raises(ValueError, match="verdict is 'C'"):
        reconcile("C", "A")


def some_games(n: int, seed: int) -> pd.DataFrame:
    rng = random.Random(seed)
    rows = [(*rng.sample("xyz", 2), rng.choice(GAMES), rng.choice(GAMES)) for _ in range(n)]
    return pd.DataFrame(rows, columns=["model_1", "model_2", "first", "second"])


def test_games_add_up():
    games = some_games(200, seed=0)
    found = games_table(games).set_index("model")
    played = pd.concat([games["model_1"], games["model_2"]]).value_counts()
    total = found[["wins", "losses", "ties", "errors"]].sum(axis=1)
    assert total.to_dict() == played.to_dict()
    assert found["wins"].sum() == found["losses"].sum()
    x = found.loc["x"]
    n = x["wins"] + x["losses"] + x["ties"]
    assert x["win_rate"] == pytest.approx(x["wins"] / n)
    assert x["adjusted"] == pytest.approx((x["wins"] + x["ties"] / 2) / n)
    turned = games.rename(columns={"model_1": "model_2", "model_2": "model_1"})
    turned = turned.assign(first=games["second"], second=games["first"])
    pd.testing.assert_frame_equal(
        games_table(turned).sort_values("model", ignore_index=True),
        games_table(games).sort_values("model", ignore_index=True),
    )
    assert len(games_table(games.iloc[:0])) == 0


def test_a_judge_that_always_says_first():
    games = some_games(30, seed=1).assign(first="A", second="A")
    found = games_table(games)
    assert (found["wins"] == 0).all()
    assert (found["adjusted"] == 0.5).all()
    report = position_report(games)
    assert (report.consistent, report.first_bias, report.second_bias) == (0, 1, 0)
    assert (report.games, report.errors) == (30, 0)


def test_position_report_of_mixed_games():
    verdicts = [("A", "B"), ("tie", "tie"), ("B", "B"), ("A", "A"), ("A", "tie"), ("error", "A")]
    games = pd.DataFrame(verdicts, columns=["first", "second"])
    report = position_report(games)
    assert report.consistent == pytest.approx(2 / 5)
    assert report.first_bias == report.second_bias == pytest.approx(1 / 5)
    assert (report.games, report.errors) == (5, 1)
    assert np.isnan(position_report(games.iloc[:0]).consistent)


def test_agreement_in_both_setups():
    x = battles(
        ("A", "B", WON), ("A", "B", TIE), ("A", "B", LOST), ("A", "C", WON), ("A", "B", WON)
    )
    y = battles(
        ("B", "A", LOST), ("A", "B", BAD), ("A", "B", WON), ("A", "C", TIE), ("A", "C", WON)
    )
    items = ["p1", "p2", "p3", "p4", "p5"]
    found = agreement(x.assign(prompt=items), y.assign(prompt=items))
    # p1 equal though sides differ, p2 both tie, p3 opposite, p4 a tie against a win,
    # p5 about other models.
    assert (found.all, found.all_n) == (2 / 4, 4)
    assert (found.decisive, found.decisive_n) == (1 / 2, 2)
    same = agreement(swapped(y.assign(prompt=items)), x.assign(prompt=items))
    assert same == found


def test_several_votes_on_an_item_are_all_compared():
    x = battles(("A", "B", WON, 2), ("A", "B", LOST, 1)).assign(prompt="p")
    y = battles(("A", "B", WON, 1)).assign(prompt="p")
    assert agreement(x, y).all == pytest.approx(2 / 3)
    nothing = agreement(x, y.assign(prompt="q"))
    assert np.isnan(nothing.all)
    assert nothing.all_n == nothing.decisive_n == 0
    with pytest.raises(ValueError, match="missing: prompt"):
        agreement(x.drop(columns="prompt"), y)


def test_judges_who_guess_agree_by_chance():
    rng = np.random.default_rng(0)
    votes = [
        battles(("A", "B", WON, 6000)).assign(
            winner=rng.choice([WON, LOST, TIE], 6000), prompt=np.arange(6000)
        )
        for _ in range(2)
    ]
    found = agreement(*votes)
    assert found.all == pytest.approx(1 / 3, abs=0.03)
    assert found.decisive == pytest.approx(1 / 2, abs=0.04)
