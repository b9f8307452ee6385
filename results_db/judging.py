"""What a judge's verdicts come to: MT-Bench's grades and games, and how far two judges agree."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from results_db.compare import paired
from results_db.tally import WINNERS, check_battles

LOWEST, HIGHEST = 1.0, 10.0  # grades; anything else is a failed one
GAMES = ("A", "B", "tie", "error")  # verdict of one game, by the side that was shown
UNSWAPPED = {"A": "B", "B": "A"}  # verdict of the second game, seen with the sides of the first
RECONCILED = ("model_1", "model_2", "tie", "error")
CHANCE_ALL, CHANCE_DECISIVE = 1 / 3, 1 / 2  # agreement of two judges who guess


@dataclass(frozen=True)
class PositionReport:
    """How a judge met the same two answers in both orders; shares of the games without error."""

    consistent: float  # both orders gave the same verdict
    first_bias: float  # both times the answer shown first won
    second_bias: float
    games: int
    errors: int


@dataclass(frozen=True)
class Agreement:
    """Share of equal votes on common items; blank (NaN) where there are none."""

    all: float  # setup S1: ties count as a verdict
    all_n: int
    decisive: float  # setup S2: only where neither said tie
    decisive_n: int


@dataclass(frozen=True)
class Difference:
    """Mean of b - a over the questions that both were graded on, in points."""

    mean: float
    stderr: float
    questions: int


def grades(judgments: pd.DataFrame) -> pd.DataFrame:
    """model, question, turn, score -> per model: turn_1, turn_2, ..., overall, stderr, questions,
    failed; best first.

    Scores outside 1 to 10, -1 and NaN are failed and left out. `overall` is the mean of all valid
    scores; `stderr` the deviation over questions, turns averaged first, over the root of their
    number.
    """
    valid = _valid(judgments)
    by_model = valid.groupby("model")["score"]
    rows = pd.DataFrame(index=pd.Index(sorted(judgments["model"].unique()), name="model"))
    turns = valid.pivot_table(index="model", columns="turn", values="score", aggfunc="mean")
    rows = rows.join(turns.rename(columns="turn_{}".format))
    each = valid.groupby(["model", "question"])["score"].mean().groupby("model")
    rows["overall"] = by_model.mean()
    rows["stderr"] = each.std(ddof=1) / np.sqrt(each.size())
    rows["questions"] = each.size().reindex(rows.index, fill_value=0)
    rows["failed"] = judgments.groupby("model").size() - by_model.size().reindex(
        rows.index, fill_value=0
    )
    return rows.sort_values("overall", ascending=False, kind="stable").reset_index()


def category_means(judgments: pd.DataFrame) -> pd.DataFrame:
    """model, category, score -> mean valid score of each model (row) in each category (column)."""
    valid = _valid(judgments)
    return valid.pivot_table(index="model", columns="category", values="score", aggfunc="mean")


def grade_difference(judgments: pd.DataFrame, a: str, b: str) -> Difference:
    """Paired by question: far surer than the difference of two means, as hard questions cancel.

    Only turns that both were validly graded on count, averaged within a question.
    """
    valid = _valid(judgments)
    keys = ["question", "turn"]
    both = [valid[valid["model"] == name].set_index(keys)["score"] for name in (a, b)]
    pairs = pd.concat(both, axis=1, join="inner", keys=["a", "b"]).groupby("question").mean()
    if not len(pairs):
        return Difference(float("nan"), float("nan"), 0)
    return Difference(*paired(pairs["a"], pairs["b"]), len(pairs))


def reconcile(first: str, second: str) -> str:
    """Verdicts of the two orders -> model_1, model_2, tie or error.

    Game one shows model_1 first, game two model_2. A win takes both games; an error in either
    drops the question; everything else is a tie.
    """
    for verdict in (first, second):
        if verdict not in GAMES:
            raise ValueError(f"verdict is {verdict!r}; it can be {', '.join(map(repr, GAMES))}.")
    if "error" in (first, second):
        return "error"
    return {("A", "B"): "model_1", ("B", "A"): "model_2"}.get((first, second), "tie")


def games_table(games: pd.DataFrame) -> pd.DataFrame:
    """model_1, model_2, first, second -> per model: wins, losses, ties, errors, win_rate
    W / (W + L + T), adjusted (W + T / 2) / (W + L + T); best adjusted rate first."""
    verdict = _reconciled(games)
    one = pd.get_dummies(verdict)[list(RECONCILED)].astype(np.int64)
    one.columns = pd.Index(["wins", "losses", "ties", "errors"])
    two = one.rename(columns={"wins": "losses", "losses": "wins"})[one.columns]
    sides = [one.assign(model=games["model_1"]), two.assign(model=games["model_2"])]
    rows = pd.concat(sides).groupby("model").sum()
    played = (rows["wins"] + rows["losses"] + rows["ties"]).replace(0, np.nan)
    rows["win_rate"] = rows["wins"] / played
    rows["adjusted"] = (rows["wins"] + rows["ties"] / 2) / played
    return rows.sort_values("adjusted", ascending=False, kind="stable").reset_index()


def position_report(games: pd.DataFrame) -> PositionReport:
    """first, second: a judge's verdicts in both orders -> what the order did to them."""
    errors = _reconciled(games) == "error"
    first, second = games["first"][~errors], games["second"][~errors]
    return PositionReport(
        consistent=float((first == second.replace(UNSWAPPED)).mean()),
        first_bias=float(((first == "A") & (second == "A")).mean()),
        second_bias=float(((first == "B") & (second == "B")).mean()),
        games=len(first),
        errors=int(errors.sum()),
    )


def agreement(x: pd.DataFrame, y: pd.DataFrame, on: Sequence[str] = ("prompt",)) -> Agreement:
    """Battles of two voters -> how often they agree about the same two models on the same item.

    An item is one value of the columns `on`; sides may differ between the two. Where a voter has
    several votes on an item, each is held against each of the other's. Both kinds of tie are one.
    """
    said_x, said_y = (_said(battles, list(on)) for battles in (x, y))
    common = said_x.merge(said_y, on=[*on, "low", "high"], suffixes=("_x", "_y"))
    same = common["said_x"] == common["said_y"]
    decisive = (common["said_x"] != "tie") & (common["said_y"] != "tie")
    return Agreement(
        all=float(same.mean()),
        all_n=len(same),
        decisive=float(same[decisive].mean()),
        decisive_n=int(decisive.sum()),
    )


def _valid(judgments: pd.DataFrame) -> pd.DataFrame:
    return judgments[judgments["score"].between(LOWEST, HIGHEST)]


def _reconciled(games: pd.DataFrame) -> pd.Series:
    verdicts = [reconcile(a, b) for a, b in zip(games["first"], games["second"], strict=True)]
    return pd.Series(
        pd.Categorical(verdicts, categories=list(RECONCILED)), index=games.index, dtype="category"
    )


def _said(battles: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """Each vote as the name of the winner, or "tie", with the pair in one order."""
    check_battles(battles, also=on)
    a, b, winner = (battles[name].astype(str) for name in ("model_a", "model_b", "winner"))
    said = winner.map(dict.fromkeys(WINNERS, "tie"))
    said = said.mask(winner == "model_a", a).mask(winner == "model_b", b)
    return battles[on].assign(low=a.where(a < b, b), high=b.where(a < b, a), said=said)
