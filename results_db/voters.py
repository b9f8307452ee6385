"""The voters: who votes unlike the crowd, who prefers a side, and what comes too often."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import bdtr, betaincinv, chdtrc

from results_db.tally import Floats, Ints, Rows, check_battles, counted_rows, expanded

CROWD = 20  # earlier votes of others on a pair, before a vote on it can be called unusual
LOOKS = 5  # times that a voter is tested,
HORIZON = 100  # at random within the first so many votes
AT_ONCE = 2048  # voters tested together
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
    rows = expanded(counted_rows(battles, in_time=True))
    judge = battles["judge"].iloc[rows.at]
    voter, known = pd.factorize(judge.where(judge.notna() & (judge != "")), sort=True)
    names = list(known)  # twenty thousand times one of a list costs less than of an index
    crowd, chances = _against_the_crowd(rows, voter)
    tested = (voter >= 0) & (crowd >= CROWD)
    found = pd.DataFrame(
        {
            "judge": pd.Series(names, dtype=object).infer_objects(),
            "votes": np.bincount(voter[voter >= 0], minlength=len(names)),
            "tested": np.bincount(voter[tested], minlength=len(names)),
            "p_value": _unlike(voter[tested], chances[tested], names, seed),
        }
    )
    found["flagged"] = found["p_value"] <= alpha
    return found.sort_values(["p_value", "judge"], ignore_index=True)


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


def _against_the_crowd(rows: Rows, voter: Ints) -> tuple[Ints, Floats]:
    """Single votes in order of time, and whose they are (-1: nobody's) -> how many earlier votes
    of others there are on the pair [votes], and the p-values of a vote that favours the first, or
    the second, model of the pair that much [votes, 2]."""
    pair = np.minimum(rows.a, rows.b) * len(rows.models) + np.maximum(rows.a, rows.b)
    vote = (2 * np.where(rows.a > rows.b, 1 - rows.score, rows.score)).astype(np.int64)
    cast = pd.DataFrame(vote[:, None] == np.arange(3)).astype(np.int64)  # lost, tie, won
    own = pair * (voter.max(initial=-1) + 2) + voter + 1  # a number per pair and voter
    before = cast.groupby(pair).cumsum() - cast.groupby(own).cumsum()
    others = before.to_numpy()  # [votes, 3], of others only
    crowd = others.sum(axis=1)
    up_to = others.cumsum(axis=1)[np.arange(len(vote)), vote] if len(vote) else crowd
    alike = (others * cast.to_numpy()).sum(axis=1)
    favour = np.stack([1 + crowd - up_to + alike, 1 + up_to], axis=1)
    return crowd, favour / (1 + crowd)[:, None]


def _unlike(voter: Ints, chances: Floats, names: Sequence[Any], seed: int) -> Floats:
    """Smallest p-value of each voter's tests, times their number; NaN where none came up. [voters]

    `voter` and `chances` are of the tested votes in order of time.
    """
    order = np.argsort(voter, kind="stable")
    starts = np.searchsorted(voter[order], np.arange(len(names) + 1))
    found = np.full(len(names), np.nan)
    for first in range(0, len(names), AT_ONCE):
        some = np.arange(first, min(first + AT_ONCE, len(names)))
        looks = np.array(
            [_looks(name, seed) for name in names[first : first + AT_ONCE]]
        )  # [V, LOOKS]
        tests = starts[some, None] + np.arange(HORIZON)  # [V, HORIZON]
        real = tests < starts[some + 1, None]
        logs = np.zeros((len(some), HORIZON, 2))
        logs[real] = np.log(chances[order[tests[real]]])
        sums = -2 * np.take_along_axis(logs.cumsum(axis=1), looks[..., None] - 1, axis=1)
        p = chdtrc(2 * looks[..., None], sums).min(axis=2)  # [V, LOOKS]
        p[~np.take_along_axis(real, looks - 1, axis=1)] = np.nan
        found[some] = np.fmin.reduce(p, axis=1)
    return np.minimum(found * 2 * LOOKS, 1.0)


def _looks(judge: Any, seed: int) -> Ints:
    """After how many votes a voter is tested: drawn for each alone, so that others change none."""
    rng = np.random.default_rng([seed, zlib.crc32(str(judge).encode())])
    return 1 + rng.choice(HORIZON, LOOKS, replace=False)


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
