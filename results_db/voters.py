"""The voters: who votes unlike the crowd, who prefers a side, and what comes too often."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import bdtr, betaincinv, chdtrc

from results_db.tally import Floats, Ints, check_battles, counted_rows, expanded

CROWD = 20  # earlier votes of others on a pair, before a vote on it can be called unusual
LOOKS = 5  # times that a voter is tested,
HORIZON = 100  # at random within the first so many votes
PROMPT = 10_000  # characters in which two prompts must agree to be the same
FREQUENT = 0.9999  # quantile of how often prompts come; those above are thinned to it
DAY = 86_400  # seconds


def anomalous_voters(battles: pd.DataFrame, *, alpha: float = 0.05, seed: int = 0) -> pd.DataFrame:
    """Voters whose votes are unlike the others' -> judge, votes, tested, p_value, flagged.

    For each vote, p is the share of the earlier votes of others on the pair, itself included, that
    favour one of the two models at least as much; a mirror test does the same for the other model.
    Fisher's sum -2 ln p over j votes is held against chi-square of 2 j degrees, at five j that are
    drawn for each voter from 1 to 100, so that nobody can vote around the tests. `p_value` is the
    smallest times the number of tests, ten, and blank where none came up. Votes on a pair before
    20 of others are not tested, nor are votes without a name, which still are part of the crowd.
    A flag is a reason to look, not a proof.
    """
    check_battles(battles, also=["judge"])
    votes = _against_the_crowd(battles)
    votes = votes[votes["judge"] != ""]
    tested = votes[votes["crowd"] >= CROWD].groupby("judge")
    rows = votes.groupby("judge").size().rename("votes").reset_index()
    p_values = {judge: _unlike(own, judge, seed) for judge, own in tested}
    rows["tested"] = rows["judge"].map(tested.size()).fillna(0).astype(np.int64)
    rows["p_value"] = rows["judge"].map(p_values).astype(np.float64)
    rows["flagged"] = rows["p_value"] <= alpha
    return rows.sort_values(["p_value", "judge"], ignore_index=True)


def position_bias(
    battles: pd.DataFrame, by: str | None = None, *, alpha: float = 0.05
) -> pd.DataFrame:
    """Do votes favour the first side? -> first, second, ties, share, low, high, p_value, flagged.

    `share` is that of side A among decisive votes, with its exact 95 % interval; `p_value` is of
    the two-sided binomial test that it is 1/2. Sides are drawn by a fair coin, so that good models
    cannot cause a bias. `by` names a column ("judge") for a row per value, flagged at `alpha` over
    the number of rows that have a decisive vote.
    """
    rows = counted_rows(battles)
    keys = np.zeros(len(rows.at)) if by is None else battles[by].iloc[rows.at].to_numpy()
    sides = {"first": 1.0, "second": 0.0, "ties": 0.5}
    counts = pd.DataFrame({k: np.where(rows.score == v, rows.count, 0) for k, v in sides.items()})
    found = counts.groupby(pd.Series(keys, name=by)).sum()
    found = found.reset_index(drop=by is None)
    wins, n = found["first"].to_numpy(), (found["first"] + found["second"]).to_numpy()
    found["share"] = np.divide(wins, n, out=np.full(len(n), np.nan), where=n > 0)
    found["low"], found["high"] = _exact_interval(wins, n)
    p_value = np.minimum(2 * bdtr(np.minimum(wins, n - wins), n, 0.5), 1.0)
    found["p_value"] = np.where(n > 0, p_value, np.nan)
    return found.assign(flagged=found["p_value"] <= alpha / max(found["p_value"].count(), 1))


def thinned(battles: pd.DataFrame, *, quantile: float = FREQUENT, seed: int = 0) -> pd.Series:
    """Which battles to leave out because their prompt comes too often.

    Prompts that come more often than the `quantile` of how often prompts come are cut down to that
    number, at random. The prompt is `prompt`, or the user's turns in `conversation_a`, to 10,000
    characters; battles without one are left alone.
    """
    prompts = _prompts(battles).reset_index(drop=True)
    counts = prompts[prompts != ""].value_counts()
    if not len(counts):
        return pd.Series(False, index=battles.index, dtype=bool)
    most = int(counts.quantile(quantile))
    shuffled = np.random.default_rng(seed).permutation(len(prompts))
    place = prompts.iloc[shuffled].groupby(prompts.iloc[shuffled]).cumcount().sort_index()
    extra = (place >= most) & (prompts != "")
    return pd.Series(extra.to_numpy(dtype=bool), index=battles.index)


def beyond_daily(battles: pd.DataFrame, most: int) -> pd.Series:
    """Which battles come after the first `most` votes of their voter (`judge`) on that day, UTC."""
    check_battles(battles, also=["judge", "tstamp"])
    ordered = battles[["judge", "tstamp"]].reset_index(drop=True)
    ordered = ordered.sort_values("tstamp", kind="stable")
    place = ordered.groupby(["judge", ordered["tstamp"] // DAY]).cumcount().sort_index()
    return pd.Series((place >= most).to_numpy(dtype=bool), index=battles.index)


def _against_the_crowd(battles: pd.DataFrame) -> pd.DataFrame:
    """Votes in order of time -> judge, crowd (earlier votes of others on the pair), and the
    p-values of a vote that favours the first, or the second, model of the pair that much."""
    rows = expanded(counted_rows(battles, in_time=True))
    judge = battles["judge"].iloc[rows.at].fillna("").to_numpy()
    pair = np.minimum(rows.a, rows.b) * len(rows.models) + np.maximum(rows.a, rows.b)
    vote = (2 * np.where(rows.a > rows.b, 1 - rows.score, rows.score)).astype(np.int64)
    cast = pd.DataFrame(vote[:, None] == np.arange(3)).astype(np.int64)  # lost, tie, won
    before = cast.groupby(pair).cumsum() - cast.groupby([pair, judge]).cumsum()
    others = before.to_numpy()  # [votes, 3], of others only
    crowd = others.sum(axis=1)
    up_to = others.cumsum(axis=1)[np.arange(len(vote)), vote] if len(vote) else crowd
    alike = (others * cast.to_numpy()).sum(axis=1)
    return pd.DataFrame(
        {
            "judge": judge,
            "crowd": crowd,
            "for_first": (1 + crowd - up_to + alike) / (1 + crowd),
            "for_second": (1 + up_to) / (1 + crowd),
        }
    )


def _unlike(own: pd.DataFrame, judge: Any, seed: int) -> float:
    """Smallest p-value of one voter's tests, times their number; NaN if none came up."""
    rng = np.random.default_rng([seed, zlib.crc32(str(judge).encode())])
    looks = 1 + rng.choice(HORIZON, LOOKS, replace=False)
    looks = looks[looks <= len(own)]
    if not len(looks):
        return float("nan")
    sums = -2 * np.log(own[["for_first", "for_second"]].to_numpy()).cumsum(axis=0)
    smallest = chdtrc(2 * looks[:, None], sums[looks - 1]).min()
    return min(float(smallest) * 2 * LOOKS, 1.0)


def _exact_interval(wins: Ints, n: Ints) -> tuple[Floats, Floats]:
    """Clopper-Pearson interval of a share, 95 %; NaN of nothing."""
    low = np.where(wins > 0, betaincinv(wins, n - wins + 1, 0.025), 0.0)
    high = np.where(wins < n, betaincinv(wins + 1, n - wins, 0.975), 1.0)
    return np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)


def _prompts(battles: pd.DataFrame) -> pd.Series:
    if "prompt" in battles:
        return battles["prompt"].fillna("").astype(str).str[:PROMPT]
    if "conversation_a" not in battles:
        raise ValueError("Thinning needs the column prompt or conversation_a.")
    return battles["conversation_a"].map(_asked).astype(str).str[:PROMPT]


def _asked(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(str(m["content"]) for m in messages if m["role"] == "user")
