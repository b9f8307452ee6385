"""Verdicts: from events to grades, games, win rates and votes, against rows counted by hand."""

import json
import random

import numpy as np
import pandas as pd
import pytest

from results_db import judging, verdicts
from results_db.vote import Vote
from results_db.votes import Votes

MODEL, JOB = "demo", "job"
RUNS = {
    "r0": ("baseline", [], "aaaaaaaa0000"),
    "r1": ("rtn(bits=2)", [{"kind": "rtn"}], "bbbbbbbb1111"),
}
NAMES = {"r0": "demo/baseline@aaaaaaaa", "r1": "demo/rtn(bits=2)@bbbbbbbb"}


def answer(run: str, question: str, turn: int = 1, text: str = "An answer.", **more) -> dict:
    what = {"run_id": run, "artifact_id": RUNS[run][2], "question": question, "turn": turn}
    about = {"category": "math", "language": "English", "prompt": f"{question}, turn {turn}?"}
    said = {"text": text, "characters": len(text), "tokens": len(text.split()), "finish": "end"}
    sampled = {"temperature": 0.0, "top_p": 1.0, "max_new": 64, "seed": 3}
    return {"t": 5.0, "type": "answer"} | what | about | said | sampled | more


def verdict(question: str, turn: int = 1, a: str = "r0", b: str = "r1", **more) -> dict:
    about = {"question": question, "category": "math", "language": "English", "turn": turn}
    game = {"run_a": a, "run_b": b, "swapped": False, "games": 2, "judge_id": "j1"}
    said = {"score": None, "preference": None, "failed": "", "flags": [], "judge": "judge-1"}
    raw = {"style": "pairwise", "text": "[[A]]", "prompt_hash": "h", "attempts": 1}
    cost = {"prompt_tokens": 100, "completion_tokens": 10, "latency_s": 0.5}
    return {"t": 10.0, "type": "verdict"} | about | game | said | raw | cost | more


def both(question: str, first: str, second: str, turn: int = 1, **more) -> list[dict]:
    """Two games; `first` and `second` are verdicts by the side shown."""
    shown = {"A": 1.0, "B": 2.0, "tie": 1.5, "error": None}
    events = []
    for swapped, said in ((False, first), (True, second)):
        preference = shown[said]
        preference = 3 - preference if preference and swapped else preference
        failed = "" if preference else "no verdict"
        game = {"swapped": swapped, "preference": preference, "failed": failed}
        events.append(verdict(question, turn, **game, **more))
    return events


def graded(run: str, question: str, score: float | None, turn: int = 1, **more) -> dict:
    failed = "" if score else "no grade"
    given = {"style": "single", "games": 1, "score": score, "failed": failed}
    return verdict(question, turn, run, "", **given | more)


SPEC = {
    "kind": "judge",
    "model": {"id": MODEL},
    "judge_model": {"kind": "endpoint", "model": "judge"},
}


def fill(
    store, example, events: list[dict], job: str = JOB, artifact: str = "of-job", end: str = "done"
) -> None:
    """Two runs, and a judge job that ended with these events."""
    for number, (run, (recipe, steps, made)) in enumerate(RUNS.items()):
        told = example.submitted(float(number), recipe=recipe, artifact_id=made)
        store.ingest(run, example.spec(steps=steps), [told, example.state("done")], 10)
    whole = [example.submitted(3.0, artifact_id=artifact), *events, example.state(end, 20.0)]
    store.ingest(job, json.dumps(SPEC), whole, 1000)


# -- raw -----------------------------------------------------------------------------------------


def test_verdicts_are_kept_as_given_and_the_last_word_counts(store, example):
    first = verdict("q", failed="500", text="")
    fill(store, example, [first, verdict("q", preference=1.0, flags=["cut", "reused"])])
    rows = verdicts.verdicts(store, JOB)
    assert len(rows) == 1
    row = rows.iloc[0]
    assert (row["model_a"], row["model_b"]) == (NAMES["r0"], NAMES["r1"])
    assert (row["text"], row["flags"], row["failed"]) == ("[[A]]", "cut,reused", "")
    assert np.isnan(row["score"])
    found = verdicts.jobs(store).iloc[0]
    assert (found["judge"], found["verdicts"], found["cut"], found["requests"]) == (
        "judge-1",
        1,
        1,
        1,
    )
    assert verdicts.jobs(store, "other").empty
    store.delete(JOB)
    assert verdicts.verdicts(store, JOB).empty
    assert verdicts.answers(store, JOB).empty


def test_a_job_that_asked_nobody_names_the_judge_of_its_spec(store, example):
    fill(store, example, both("q", "tie", "tie", judge="", flags=["identical"], attempts=0))
    found = verdicts.jobs(store).iloc[0]
    assert (found["judge"], found["identical"], found["requests"]) == ("judge", 2, 0)


def test_nothing_judged_gives_empty_tables(store, example):
    fill(store, example, [])
    for read in (verdicts.verdicts, verdicts.answers, verdicts.judgments, verdicts.games):
        assert read(store, JOB).empty
    assert verdicts.win_rates(store, JOB).empty
    assert verdicts.win_table(store, JOB).empty
    assert judging.grades(verdicts.judgments(store, JOB)).empty
    assert verdicts.bias(store, JOB).games == 0
    assert verdicts.votes_of(store, JOB) == []
    with pytest.raises(ValueError, match="no judge job 'r0'"):
        verdicts.votes_of(store, "r0")


def test_a_run_that_is_gone_keeps_its_id(store, example):
    fill(store, example, both("q", "A", "B"))
    store.delete("r1")
    assert verdicts.games(store, JOB)["model_2"].tolist() == ["r1"]
    assert verdicts.votes_of(store, JOB) == []


# -- grades --------------------------------------------------------------------------------------


def test_grades_by_hand(store, example):
    events = [
        *[graded("r0", "q1", 8.0, 1), graded("r0", "q1", 6.0, 2), graded("r0", "q2", 3.0, 1)],
        *[graded("r1", "q1", 4.0, 1), graded("r1", "q1", None, 2), graded("r1", "q2", 1.0, 1)],
    ]
    fill(store, example, events)
    rows = judging.grades(verdicts.judgments(store, JOB)).set_index("model")
    best, worst = rows.loc[NAMES["r0"]], rows.loc[NAMES["r1"]]
    assert rows.index.tolist() == [NAMES["r0"], NAMES["r1"]]
    assert (best["turn_1"], best["turn_2"], best["failed"]) == (5.5, 6.0, 0)
    assert best["overall"] == pytest.approx(17 / 3)
    assert best["stderr"] == pytest.approx(np.std([7, 3], ddof=1) / 2**0.5)  # turns first
    assert (worst["overall"], worst["failed"], worst["questions"]) == (2.5, 1, 2)
    apart = judging.grade_difference(verdicts.judgments(store, JOB), NAMES["r0"], NAMES["r1"])
    assert (apart.mean, apart.questions) == (-3.0, 2)  # -4 and -2; the failed turn is in neither
    means = judging.category_means(verdicts.judgments(store, JOB))
    assert means.loc[NAMES["r1"], "math"] == 2.5


# -- games ---------------------------------------------------------------------------------------


def test_games_equal_brute_force(store, example):
    rng = random.Random(0)
    told = {
        f"q{n}": (rng.choice(["A", "B", "tie", "error"]), rng.choice(["A", "B", "tie", "error"]))
        for n in range(60)
    }
    fill(store, example, [event for q, pair in told.items() for event in both(q, *pair)])
    rows = verdicts.games(store, JOB).set_index("question")
    assert {q: (r["first"], r["second"]) for q, r in rows.iterrows()} == {
        # One failed game drops both: which of them it was does not matter.
        q: ("error", "error") if "error" in pair else pair
        for q, pair in told.items()
    }
    clean = [pair for pair in told.values() if "error" not in pair]
    table = verdicts.win_table(store, JOB).set_index("model").loc[NAMES["r1"]]
    wins, losses = clean.count(("B", "A")), clean.count(("A", "B"))
    assert (table["wins"], table["losses"], table["errors"]) == (wins, losses, 60 - len(clean))
    assert table["ties"] == len(clean) - wins - losses
    assert table["adjusted"] == pytest.approx((wins + table["ties"] / 2) / len(clean))
    report = verdicts.bias(store, JOB)
    assert report.first_bias == pytest.approx(clean.count(("A", "A")) / len(clean))
    assert report.second_bias == pytest.approx(clean.count(("B", "B")) / len(clean))


def test_the_judge_that_always_takes_the_first(store, example):
    fill(store, example, [event for n in range(5) for event in both(f"q{n}", "A", "A")])
    assert verdicts.bias(store, JOB).first_bias == 1
    assert verdicts.bias(store, JOB).consistent == 0
    assert set(verdicts.win_table(store, JOB)["ties"]) == {5}


def test_settled_pairs_and_single_orders_say_nothing_of_bias(store, example):
    events = [
        *both("same", "tie", "tie", flags=["identical"]),
        *both("mute", "A", "B", flags=["empty"]),
        verdict("once", preference=2.0, swapped=True, games=1),
        *both("asked", "A", "A"),
    ]
    fill(store, example, events)
    rows = verdicts.games(store, JOB).set_index("question")
    assert rows["settled"].to_dict() == {"same": True, "mute": True, "once": False, "asked": False}
    assert (rows.loc["once", "first"], rows.loc["once", "second"]) == ("B", "A")
    assert rows.loc["once", "orders"] == 1
    report = verdicts.bias(store, JOB)
    assert (report.games, report.first_bias) == (1, 1.0)
    table = verdicts.win_table(store, JOB).set_index("model").loc[NAMES["r1"]]
    assert (table["wins"], table["losses"], table["ties"]) == (1, 1, 2)


def test_a_missing_second_game_is_waited_for(store, example):
    fill(store, example, [*both("whole", "A", "B"), both("half", "A", "B")[0]])
    assert verdicts.games(store, JOB)["question"].tolist() == ["whole"]


# -- win rates -----------------------------------------------------------------------------------


def test_win_rate_by_hand(store, example):
    sure = [
        verdict("w", preference=p, swapped=s, style="preference")
        for p, s in ((1.9, False), (1.7, True))
    ]
    fill(
        store,
        example,
        [*both("a", "B", "A"), *both("b", "A", "A"), *both("c", "error", "A"), *sure],
    )
    row = verdicts.win_rates(store, JOB).iloc[0]
    scores = [1.0, 0.5, 0.8]
    assert (row["model_1"], row["model_2"]) == (NAMES["r0"], NAMES["r1"])
    assert row["win_rate"] == pytest.approx(100 * np.mean(scores))
    assert row["stderr"] == pytest.approx(100 * np.std(scores, ddof=1) / 3**0.5)
    assert row["discrete"] == pytest.approx(100 * 2.5 / 3)
    assert (row["n"], row["dropped"]) == (3, 1)
    assert row["length_controlled"] is None
    assert row["notes"]


def test_a_judge_of_lengths_is_seen_through(store, example):
    """Equal quality, and mostly the longer one wins: raw far from 50, controlled near it."""
    rng = np.random.default_rng(0)
    events = []
    for n in range(600):
        lengths = rng.integers(50, 400), rng.integers(120, 470)  # the second talks more
        chance = 1 / (1 + np.exp(-3 * np.tanh((lengths[1] - lengths[0]) / 140)))
        won = "B" if rng.random() < chance else "A"
        events += both(f"q{n}", won, {"A": "B", "B": "A"}[won])
        events += [
            answer(run, f"q{n}", text="x" * size) for run, size in zip(RUNS, lengths, strict=True)
        ]
    fill(store, example, events)
    row = verdicts.win_rates(store, JOB).iloc[0]
    assert row["win_rate"] > 60
    assert abs(row["length_controlled"] - 50) < 3 * row["length_controlled_stderr"]


# -- votes ---------------------------------------------------------------------------------------


def conversation(question: str = "q") -> list[dict]:
    return [answer(run, question, turn, f"{run} says {turn}.") for run in RUNS for turn in (1, 2)]


def test_votes_hold_all_that_decided_them(store, example):
    events = [
        *conversation(),
        *both("q", "A", "B"),
        *both("q", "B", "B", 2),
        *conversation("e"),
        *both("e", "A", "error"),
    ]
    fill(store, example, events)
    one, two = sorted(verdicts.votes_of(store, JOB), key=lambda vote: vote.turn)
    assert (one.winner, two.winner) == ("model_a", "tie")
    assert (one.model, one.model_a, one.model_b) == (MODEL, NAMES["r0"], NAMES["r1"])
    assert (one.kind, one.judge, one.anony, one.tstamp) == ("judge", "judge-1", True, 10.0)
    assert (one.run_a, one.run_b, one.seed_a, one.tokens_b) == ("r0", "r1", 3, 3)
    assert one.prompt == "q, turn 1?"
    assert two.prompt == "q, turn 1?\n\nq, turn 2?"  # as battles have it
    assert two.tokens_b == 6
    assert one.conversation_a == [
        {"role": "user", "content": "q, turn 1?"},
        {"role": "assistant", "content": "r0 says 1."},
    ]
    assert [m["content"] for m in two.conversation_b][1::2] == ["r1 says 1.", "r1 says 2."]
    assert one.settings["judge_id"] == "j1"
    assert one.settings["orders"] == 2


def test_votes_are_cast_once_and_never_among_peoples(store, example, tmp_path):
    fill(
        store,
        example,
        [*conversation(), *both("q", "A", "B"), *both("q", "tie", "tie", 2, flags=["identical"])],
    )
    votes = Votes(store, tmp_path / "votes.jsonl")
    assert verdicts.cast_votes(store, votes) == 2
    assert verdicts.cast_votes(store, votes) == 0
    # The same settings under other limits: the same battles.
    fill(store, example, [*conversation(), *both("q", "A", "B")], job="again")
    assert verdicts.cast_votes(store, votes, "again") == 0
    fill(store, example, [*conversation(), *both("q", "A", "B")], job="other", artifact="other")
    assert verdicts.cast_votes(store, votes) == 1
    assert votes.frame(model=MODEL).empty
    rows = votes.frame(model=MODEL, kinds=("judge",))
    assert rows["flags"].tolist().count("identical") == 1
    assert len(rows) == 3


def test_unfinished_jobs_cast_nothing(store, example, tmp_path):
    fill(store, example, [*conversation(), *both("q", "A", "B")], end="failed")
    assert len(verdicts.votes_of(store, JOB)) == 1
    assert verdicts.cast_votes(store, Votes(store, tmp_path / "votes.jsonl")) == 0


def test_the_caster_looks_at_each_job_once(store, example, tmp_path, monkeypatch):
    votes = Votes(store, tmp_path / "votes.jsonl")
    caster = verdicts.VoteCaster(store, votes)
    fill(store, example, [*conversation(), *both("q", "A", "B")])
    assert caster.cast() == 1
    fill(store, example, [*conversation(), *both("q", "A", "B")], job="other", artifact="other")
    read = []
    whole = verdicts.votes_of
    monkeypatch.setattr(verdicts, "votes_of", lambda s, job: read.append(job) or whole(s, job))
    assert (caster.cast(), caster.cast()) == (1, 0)
    assert read == ["other"]
    assert verdicts.VoteCaster(store, votes).cast() == 0  # the log has them all


def test_agreement_with_people(store, example, tmp_path):
    events = [event for q in "abc" for event in conversation(q)]
    fill(
        store, example, [*events, *both("a", "A", "B"), *both("b", "A", "B"), *both("c", "A", "A")]
    )
    votes = Votes(store, tmp_path / "votes.jsonl")
    verdicts.cast_votes(store, votes)
    for number, (question, winner) in enumerate(
        {"a": "model_b", "b": "model_a", "c": "tie"}.items()
    ):
        human = Vote(
            f"h{number}",
            MODEL,
            NAMES["r1"],
            NAMES["r0"],
            winner,
            "human",
            "somebody",
            1.0,
            prompt=f"{question}, turn 1?",
        )  # sides the other way round
        assert votes.cast(human)
    found = verdicts.agreement_with_people(votes, MODEL)
    assert (found.all_n, found.decisive_n) == (3, 2)
    assert (found.all, found.decisive) == (pytest.approx(2 / 3), 0.5)
    assert verdicts.agreement_with_people(votes, MODEL, "judge-1") == found
    assert verdicts.agreement_with_people(votes, MODEL, "judge-2").all_n == 0


def test_names_are_those_of_the_first_run_of_an_artifact(store, example):
    fill(store, example, [])
    told = example.submitted(9.0, recipe="my preset", artifact_id=RUNS["r1"][2])
    store.ingest("r9", example.spec(steps=[{"kind": "rtn"}]), [told], 10)
    names = verdicts.variant_names(store)
    assert names == {**NAMES, "r9": NAMES["r1"]}
    assert pd.Series(names).str.startswith(MODEL).all()
