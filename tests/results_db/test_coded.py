"""Text as categories, and voters tested many at a time: the same numbers as the slow way."""

import zlib

import numpy as np
import pandas as pd
import pytest
from ballots import LOST, TIE, WON, battles, drawn
from scipy.stats import chi2

from results_db.ratings import bradley_terry
from results_db.store import Store
from results_db.tally import cells_of, counted_rows
from results_db.voters import CROWD, HORIZON, LOOKS, anomalous_voters

TEXT = ["model_a", "model_b", "winner"]


def coded(log: pd.DataFrame, *more: str) -> pd.DataFrame:
    return log.astype(dict.fromkeys([*TEXT, *more], "category"))


def test_the_store_gives_the_same_rows_as_categories(tmp_path):
    store = Store(tmp_path / "results.duckdb")
    sql = """
        SELECT * FROM (VALUES ('b', 1::BIGINT, 2.5, NULL), ('a', NULL, 'nan'::DOUBLE, 'x'),
                              ('b', 3, -1, 'x')) AS t(word, whole, number, gap)
        WHERE word <> $without ORDER BY word DESC, whole
    """
    plain, found = (ask(sql, without="z") for ask in (store.frame, store.coded))
    assert list(found["word"].cat.categories) == ["a", "b"]
    assert found["gap"].isna().tolist() == [True, False, False]
    words = ["word", "gap"]
    pd.testing.assert_frame_equal(
        found.astype(dict.fromkeys(words, "str")), plain, check_dtype=False
    )
    assert len(store.coded(sql, without="a")) == 2
    assert len(store.coded("SELECT 'a' AS word WHERE false")) == 0
    store.close()


def test_categories_rate_like_text_whether_used_or_not():
    log = drawn([0.4, 0.1, -0.2, -0.4], 900, seed=0)
    words = coded(log)
    pd.testing.assert_frame_equal(bradley_terry(words), bradley_terry(log))
    some = log["model_a"] != "m3"
    some &= log["model_b"] != "m3"
    left = words[some]  # m3 is still a category
    assert counted_rows(left).models == ("m0", "m1", "m2")
    pd.testing.assert_frame_equal(bradley_terry(left), bradley_terry(log[some]))
    half = words.assign(model_b=log["model_b"])  # one side as categories
    assert cells_of(counted_rows(half)).count.tolist() == cells_of(counted_rows(log)).count.tolist()
    with pytest.raises(ValueError, match="without the name"):
        counted_rows(words.assign(model_a=words["model_a"].where(words["model_a"] != "m0")))
    backwards = words.assign(model_a=words["model_a"].cat.set_categories(["m3", "m1", "m0", "m2"]))
    pd.testing.assert_frame_equal(bradley_terry(backwards), bradley_terry(log))


def one_by_one(log: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """The test as the paper says it, vote by vote: {voter: p-value}."""
    cast: dict[tuple[str, str], list[tuple[str, float]]] = {}
    chances: dict[str, list[tuple[float, float]]] = {}
    for a, b, winner, judge in log.sort_values("tstamp")[[*TEXT, "judge"]].itertuples(index=False):
        first, second = sorted((a, b))
        said = {WON: 1.0, LOST: 0.0}.get(winner, 0.5)
        said = said if a == first else 1 - said
        earlier = cast.setdefault((first, second), [])
        others = [theirs for who, theirs in earlier if who != judge]
        if judge and len(others) >= CROWD:
            at_least = sum(theirs >= said for theirs in others)
            at_most = sum(theirs <= said for theirs in others)
            p = ((1 + at_least) / (1 + len(others)), (1 + at_most) / (1 + len(others)))
            chances.setdefault(judge, []).append(p)
        earlier.append((judge, said))
    found = {}
    for judge, own in chances.items():
        rng = np.random.default_rng([seed, zlib.crc32(judge.encode())])
        looks = [int(j) for j in 1 + rng.choice(HORIZON, LOOKS, replace=False) if j <= len(own)]
        sums = -2 * np.log(np.array(own)).cumsum(axis=0)
        tests = [chi2.sf(value, 2 * j) for j in looks for value in sums[j - 1]]
        if tests:
            found[judge] = min(1.0, 2 * LOOKS * min(tests))
    return found


@pytest.mark.parametrize("voters", [3, 40, 700])
def test_many_voters_at_a_time_are_tested_as_one_by_one(voters, monkeypatch):
    monkeypatch.setattr("results_db.voters.AT_ONCE", 16)  # several rounds, the last one short
    log = drawn([1.0, 0.0, -1.0], 1500, seed=voters, ties=0.2)
    rng = np.random.default_rng(voters)
    names = np.array(["", *(f"v{i}" for i in range(voters))])
    log = log.assign(judge=names[rng.integers(voters + 1, size=len(log))])
    log.loc[log["judge"] == "v1", "winner"] = TIE
    found = anomalous_voters(log)
    told = found.dropna(subset="p_value").set_index("judge")["p_value"].to_dict()
    assert told == pytest.approx(one_by_one(log), rel=1e-12)
    pd.testing.assert_frame_equal(anomalous_voters(coded(log, "judge")), found, check_dtype=False)


def test_a_name_of_a_voter_may_be_anything():
    log = battles(("A", "B", WON, 60)).assign(
        judge=[["x,'\"", "ü", "x,'\""][i % 3] for i in range(60)]
    )
    assert set(anomalous_voters(log)["judge"]) == {"x,'\"", "ü"}
