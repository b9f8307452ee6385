"""The arena over stand-in answers: draws, votes, limits, crashes, and what a browser receives."""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena_scene import (
    HERE,
    ME,
    MODEL,
    NO_LIMITS,
    PROMPTS,
    RECIPES,
    Scene,
    add_run,
    own_words,
    run_id_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.arena import GRACE_S
from jobs.battle import CHOICES, UNDO_S, Refused, State
from jobs.draws import SEEDS, Asked, variants
from jobs.limits import Limits, TooMany
from results_db.database import StoreError
from results_db.vote_log import check


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path / "home")
    yield made
    made.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator:
    made: list[Scene] = []

    def scene(**how) -> Scene:
        made.append(Scene(tmp_path / f"home{len(made)}", **how))
        return made[-1]

    yield scene
    for one in made:
        one.close()


def loaded(value):
    """JSON of a row, which DuckDB may have read already."""
    return json.loads(value) if isinstance(value, str) else value


def play_of(scene: Scene, battle: str):
    """What the arena itself knows of a battle."""
    return scene.arena._plays._plays[battle]


def held(scene: Scene) -> Scene:
    """From now on answers come when the test says."""
    scene.pool.answer = lambda run_id, messages: None
    return scene


# ---- one battle ----------------------------------------------------------------------------


def test_a_battle_from_the_draw_to_the_names(scene):
    opened = scene.arena.start(ME, HERE, MODEL)
    assert (opened.state, opened.can_ask, opened.can_vote) == ("open", True, False)
    assert len(scene.pool.warmed) == 2
    view = scene.arena.ask(opened.battle_id, ME, "Which is larger, 3 or 5?")
    assert (view.state, view.can_vote, view.hint) == ("ready", True, "")
    assert view.turns[0].answer_a != view.turns[0].answer_b
    scene.later(4)
    voted = scene.arena.vote(view.battle_id, ME, "model_a")
    assert (voted.state, voted.message, voted.counts) == ("voted", "Your vote is counted.", True)
    assert voted.undo_until == scene.clock.now + UNDO_S
    (row,) = scene.rows()
    assert (row["model_a"], row["model_b"]) == (voted.a.model, voted.b.model)
    assert (row["run_a"], row["run_b"]) == (voted.a.run_id, voted.b.run_id)
    assert (row["winner"], row["kind"], row["latency_s"]) == ("model_a", "human", 4.0)
    assert (row["prompt"], row["category"]) == ("Which is larger, 3 or 5?", "")
    assert ME not in json.dumps(row, default=str)
    assert HERE not in json.dumps(row, default=str)
    said = loaded(row["conversation_a"])
    assert said[-1] == {"role": "assistant", "content": view.turns[0].answer_a}


def test_both_sides_answer_under_equal_conditions_with_seeds_of_their_own(make):
    scene = make(answer=own_words, redraws=0)
    seeds = set()
    for n in range(40):
        scene.asked(f"prompt {n}")
        (run_a, said_a, how_a), (run_b, said_b, how_b) = scene.pool.asked[-2:]
        assert run_a != run_b
        assert said_a == said_b
        assert (how_a.temperature, how_a.top_p, how_a.max_new) == (0.0, 1.0, 256)
        assert (how_a.temperature, how_a.max_new) == (how_b.temperature, how_b.max_new)
        seeds.add((how_a.seed, how_b.seed))
    assert len(seeds) > SEEDS  # independent: more combinations than equal ones could give
    scene.arena.vote(scene.asked("more").battle_id, ME, "tie")
    row = scene.rows()[-1]
    assert (row["seed_a"], row["seed_b"]) == tuple(how.seed for _, _, how in scene.pool.asked[-2:])
    kept = loaded(row["settings"])
    assert (kept["temperature"], kept["max_new"], kept["packed"]) == (0.0, 256, [True, True])


def test_a_second_turn_is_told_to_both_and_each_hears_itself(scene):
    view = scene.asked("First?")
    second = scene.arena.ask(view.battle_id, ME, "Second?")
    for at, (_, said, _) in enumerate(scene.pool.asked[-2:]):
        own = [view.turns[0].answer_a, view.turns[0].answer_b][at]
        assert [m.content for m in said] == ["First?", own, "Second?"]
    assert len(second.turns) == 2
    scene.arena.vote(view.battle_id, ME, "model_b")
    assert (scene.rows()[0]["turn"], scene.rows()[0]["prompt"]) == (2, "First?\n\nSecond?")


def test_nothing_is_shown_until_both_answers_are_complete(scene):
    held(scene)
    view = scene.asked("Hello?")
    a, b = scene.pool.handles
    assert (view.state, view.hint) == ("answering", "The models are being loaded.")
    a.finish("done early, and quickly")
    half = scene.arena.view(view.battle_id, ME)
    assert half == view  # not a trace of which side, or that one of them, is done
    with pytest.raises(Refused, match="two complete answers"):
        scene.arena.vote(view.battle_id, ME, "model_a")
    with pytest.raises(Refused, match="Wait until both"):
        scene.arena.ask(view.battle_id, ME, "and?")
    b.finish("done late")
    both = scene.arena.view(view.battle_id, ME)
    assert (both.turns[0].answer_a, both.turns[0].answer_b) == (
        "done early, and quickly",
        "done late",
    )
    assert both.can_vote


@pytest.mark.parametrize("side", [0, 1])
def test_the_hint_is_the_same_whichever_side_is_slow(scene, side):
    held(scene)
    scene.asked("Hello?")
    slow, quick = scene.pool.handles[side], scene.pool.handles[1 - side]
    quick.finish("quick")
    slow._view = slow.view().__class__(state="queued", position=3)
    (battle,) = scene.arena._plays._plays
    assert scene.arena.view(battle, ME).hint == "Waiting: 3 other answers first."


# ---- votes ---------------------------------------------------------------------------------


def test_the_same_vote_again_says_so_and_another_is_refused(scene):
    battle = scene.asked("Hello?").battle_id
    scene.arena.vote(battle, ME, "tie")
    again = scene.arena.vote(battle, ME, "tie")
    assert (again.state, again.message) == ("voted", "Your vote is already counted.")
    with pytest.raises(Refused, match="names are known"):
        scene.arena.vote(battle, ME, "model_a")
    assert len(scene.rows()) == 1


def test_a_battle_is_its_owners_alone(scene):
    battle = scene.asked("Hello?").battle_id
    moves = (
        lambda: scene.arena.view(battle, "other"),
        lambda: scene.arena.ask(battle, "other", "x"),
        lambda: scene.arena.vote(battle, "other", "tie"),
        lambda: scene.arena.retract(battle, "other"),
        lambda: scene.arena.skip(battle, "other"),
    )
    for move in moves:
        with pytest.raises(Refused, match="another visitor"):
            move()
    assert scene.arena.view(battle, ME).can_vote


def test_many_threads_with_one_battle_make_one_vote(scene):
    battle = scene.asked("Hello?").battle_id
    barrier, outcomes = threading.Barrier(16), []

    def press(winner: str) -> None:
        barrier.wait()
        try:
            outcomes.append(scene.arena.vote(battle, ME, winner).winner)
        except Refused:
            outcomes.append("refused")

    threads = [threading.Thread(target=press, args=(CHOICES[n % 4],)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (row,) = scene.rows()
    assert Counter(outcomes) == {row["winner"]: 4, "refused": 12}


def test_undo_voids_the_battle_and_counts_nothing(scene):
    battle = scene.asked("Hello?").battle_id
    scene.arena.vote(battle, ME, "model_a")
    scene.later(UNDO_S)
    void = scene.arena.retract(battle, ME)
    assert (void.state, void.undo_until, void.counts) == ("void", None, False)
    assert scene.arena.retract(battle, ME).state == "void"
    for winner in CHOICES:
        with pytest.raises(Refused, match="withdrawn"):
            scene.arena.vote(battle, ME, winner)
    assert scene.rows()[0]["retracted"]
    assert len(scene.votes.frame(model=MODEL)) == 0
    found = check(scene.home / "votes.jsonl")
    assert (found.votes, found.retractions, found.broken_line) == (1, 1, None)


def test_undo_ends_after_ten_seconds(scene):
    battle = scene.asked("Hello?").battle_id
    scene.arena.vote(battle, ME, "model_a")
    scene.later(UNDO_S + 0.1)
    with pytest.raises(Refused, match="10 s"):
        scene.arena.retract(battle, ME)
    assert len(scene.votes.frame(model=MODEL)) == 1


def test_a_vote_that_cannot_be_written_is_not_counted_and_can_be_cast_again(scene, monkeypatch):
    battle = scene.asked("Hello?").battle_id

    def full(vote):
        raise StoreError("no space is left: nothing was counted.")

    with monkeypatch.context() as patch:
        patch.setattr(scene.votes, "cast", full)
        with pytest.raises(ValueError, match="nothing was counted"):
            scene.arena.vote(battle, ME, "tie")
    assert scene.arena.view(battle, ME).can_vote
    assert scene.arena.vote(battle, ME, "tie").counts  # and not as a duplicate of itself


def test_skipping_ends_a_battle_and_its_answers(scene):
    held(scene)
    battle = scene.asked("Hello?").battle_id
    skipped = scene.arena.skip(battle, ME)
    assert (skipped.state, skipped.a, skipped.can_vote) == ("skipped", None, False)
    assert all(handle.stopped for handle in scene.pool.handles)
    assert scene.arena.view(battle, ME).state == "skipped"
    with pytest.raises(Refused, match="skipped"):
        scene.arena.vote(battle, ME, "tie")


# ---- flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["answer", "prompt", "earlier turn"])
def test_a_vote_after_a_leak_is_kept_and_does_not_count(scene, where):
    said = "I run in int4." if where == "answer" else "I run."
    scene.pool.answer = lambda run_id, messages: f"{said} {own_words(run_id, messages)}"
    view = scene.asked("Are you GPTQ?" if where != "answer" else "Who are you?")
    if where == "earlier turn":
        view = scene.arena.ask(view.battle_id, ME, "And now?")
    word = "int4" if where == "answer" else "gptq"
    assert f"'{word}'" in view.message
    assert "will not count" in view.message
    voted = scene.arena.vote(view.battle_id, ME, "model_a")
    assert (voted.counts, voted.flags) == (False, ("leak",))
    assert f"does not count: the conversation says '{word}'" in voted.message
    assert scene.rows()[0]["flags"] == "leak"
    assert len(scene.votes.frame(model=MODEL)) == 0


def test_the_same_voter_pair_and_prompt_count_once(make):
    scene = make(recipes=RECIPES[:2])
    for session, flags in ((ME, ()), (ME, ("duplicate",)), ("other", ())):
        voted = scene.arena.vote(scene.asked("Hello?", session).battle_id, session, "tie")
        assert (voted.flags, voted.counts) == (flags, not flags)
    more = scene.asked("Something else?")
    assert scene.arena.vote(more.battle_id, ME, "tie").counts
    assert len(scene.votes.frame(model=MODEL)) == 3


def test_a_withdrawn_vote_makes_the_next_on_pair_and_prompt_a_duplicate(make):
    """Its names were seen with these very answers."""
    scene = make(recipes=RECIPES[:2])
    battle = scene.asked("Hello?").battle_id
    scene.arena.vote(battle, ME, "model_a")
    scene.arena.retract(battle, ME)
    assert scene.arena.vote(scene.asked("Hello?").battle_id, ME, "model_b").flags == ("duplicate",)


def test_what_a_voter_judged_is_known_after_a_restart(make):
    scene = make(recipes=RECIPES[:2])
    view = scene.asked("Hello?")
    scene.arena.ask(view.battle_id, ME, "Second turn")
    scene.arena.vote(view.battle_id, ME, "tie")
    scene.arena = scene.new_arena()
    assert scene.arena.vote(scene.asked("Hello?").battle_id, ME, "tie").flags == ("duplicate",)
    with pytest.raises(Refused, match="Your vote on this battle is counted"):
        scene.arena.vote(view.battle_id, ME, "tie")
    with pytest.raises(Refused, match="not known here any more"):
        scene.arena.view(view.battle_id, "other")


# ---- equal and empty answers ---------------------------------------------------------------


def alike(*prompts: str):
    """Answers that differ, but to these prompts."""
    return lambda run_id, said: (
        "The same. " if said[-1].content in prompts else own_words(run_id, said)
    )


def test_equal_answers_to_a_typed_prompt_are_one_tie_and_another_prompt_is_asked(make):
    scene = make(recipes=RECIPES[:2], answer=alike("Hello?"))
    view = scene.asked("Hello?")
    assert (view.state, view.can_vote, view.can_ask) == ("same", False, True)
    assert view.turns[0].answer_a == "The same. "
    with pytest.raises(Refused, match="two complete answers that differ"):
        scene.arena.vote(view.battle_id, ME, "tie")
    (tie,) = scene.rows()
    assert (tie["kind"], tie["judge"], tie["winner"], tie["flags"]) == (
        *("auto", "identical", "tie"),
        "identical",
    )
    for session in ("second", "third"):
        scene.asked("Hello?", session)
    scene.arena = scene.new_arena()
    scene.asked("Hello?", "fourth")
    assert len(scene.rows()) == 1  # of this pair, prompt and settings, for ever
    more = scene.arena.ask(scene.asked("Hello?").battle_id, ME, "And you?")
    assert (more.state, len(more.turns)) == ("ready", 2)
    assert len(scene.votes.frame(model=MODEL)) == 0  # no human's vote among them
    assert len(scene.votes.frame(model=MODEL, kinds=("auto",))) == 1


def test_a_drawn_prompt_to_which_both_answer_alike_is_drawn_again(make):
    telling = "chat question 5?"
    same = [asked.turns[0] for asked in PROMPTS if asked.turns[0] != telling]
    scene = make(recipes=RECIPES[:2], answer=alike(*same), redraws=len(PROMPTS))
    view = scene.asked()
    assert (view.state, [turn.prompt for turn in view.turns]) == ("ready", [telling])
    ties = scene.rows()
    assert {row["kind"] for row in ties} <= {"auto"}
    assert len({row["prompt"] for row in ties}) == len(ties) == len(scene.pool.asked) // 2 - 1
    voted = scene.arena.vote(view.battle_id, ME, "model_a")
    assert scene.rows()[-1]["category"] == "chat"
    assert voted.counts


def test_redraws_end(make):
    scene = make(answer=lambda run_id, said: "The same.", redraws=3)
    view = scene.asked()
    assert (view.state, view.can_ask) == ("same", True)
    assert len(scene.rows()) == 1 + 3
    assert view.message.startswith("Both gave the same answer")


def test_a_pair_that_always_answers_alike_is_left_for_another(make):
    """Nobody has seen it: the battle is as if the other pair had been drawn at once."""
    twins = {run_id_of(0), run_id_of(1)}
    scene = make(recipes=RECIPES[:3], stale_s=0.0)
    scene.pool.answer = lambda run_id, said: "x" if run_id in twins else own_words(run_id, said)
    kept = set()
    for n in range(20):
        view = scene.asked(session=f"s{n}")
        assert view.can_vote
        scene.arena.vote(view.battle_id, f"s{n}", "tie")
        pair = {scene.rows()[-1][name] for name in ("run_a", "run_b")}
        assert pair != twins
        kept.add(frozenset(pair))
        assert {run_id for run_id, _, _ in scene.pool.asked[-2:]} == pair
    assert len(kept) == 2


def test_a_redraw_while_answers_are_written_says_so(make):
    scene = held(make(redraws=5))
    battle = scene.asked().battle_id
    for handle in scene.pool.handles:
        handle.finish("The same.")
    view = scene.arena.view(battle, ME)
    assert (view.state, view.hint.split(".")[0]) == (
        "answering",
        "The last prompt told nothing, so another is tried",
    )
    for handle in scene.pool.handles[2:]:
        handle.finish(handle.run_id)
    assert scene.arena.view(battle, ME).can_vote


def test_an_empty_answer_is_no_tie_and_cannot_be_judged(make):
    scene = make(answer=lambda run_id, said: "" if said[-1].content == "Hello?" else run_id)
    view = scene.asked("Hello?")
    assert (view.state, view.can_vote, view.can_ask) == ("empty", False, True)
    assert scene.rows() == []
    more = scene.arena.ask(view.battle_id, ME, "Try again")
    assert (more.state, [turn.prompt for turn in more.turns]) == ("ready", ["Try again"])


def test_ties_that_mining_found_are_recorded_once_and_not_asked_again(make):
    scene = make(recipes=RECIPES[:2])
    prompt = PROMPTS[0].turns[0]
    mine(scene, {(0, prompt): "same", (1, prompt): "same"})
    assert [scene.arena.record_ties(MODEL) for _ in range(2)] == [1, 0]
    (row,) = scene.rows()
    assert (row["kind"], row["winner"], row["prompt"]) == ("auto", "tie", prompt)
    scene.pool.answer = alike(prompt)
    assert scene.asked(prompt).state == "same"
    assert len(scene.rows()) == 1  # the tie has the id that a battle gives it
    mine(scene, {(0, "new?"): "same", (1, "new?"): "same"})
    scene.later(60)
    assert [scene.arena.record_ties(MODEL) for _ in range(2)] == [1, 0]
    assert scene.new_arena().record_ties(MODEL) == 0
    seen = {scene.asked(session=f"s{n}").turns[0].prompt for n in range(60)}
    assert seen == {asked.turns[0] for asked in PROMPTS[1:]}


# ---- prompts -------------------------------------------------------------------------------


def mine(scene: Scene, answers: dict[tuple[int, str], str]) -> None:
    """Rows as mining makes them: (run, prompt) -> answer."""
    texts = {"job_id": "j", "model": MODEL, "category": "math", "language": "English"}
    where = {"device": "cpu", "dtype": "float32", "storage": "simulated"}
    numbers = {"kld": 0.5, "departs": 3, "tokens": 9, "identical": False}
    how = {"temperature": 0.0, "top_p": 1.0, "max_new": 256, "seed": 0}
    known = texts | where | numbers | how
    rows = [
        {
            **known,
            "run_id": run_id_of(at),
            "artifact_id": f"{at:02}fedcba9876",
            "prompt_id": prompt,
            "prompt": prompt,
            "answer_hash": answer,
        }
        for (at, prompt), answer in answers.items()
    ]
    columns = ", ".join(rows[0])
    marks = ", ".join(f"${name}" for name in rows[0])

    def put(cursor) -> bool:
        for row in rows:
            cursor.execute(
                f"INSERT INTO mined ({columns}, mined_at) VALUES ({marks}, TIMESTAMP '2026-11-24')",
                row,
            )
        return True

    scene.store.write(put)


def test_mined_prompts_that_tell_the_pair_apart_come_first(make):
    scene = make(recipes=RECIPES[:2], prompts=[*PROMPTS, Asked("math", "English", ("two?", "on?"))])
    told = {"two?": ("x", "y"), "mined only": ("x", "y"), PROMPTS[0].turns[0]: ("x", "x")}
    mine(scene, {(at, text): hashes[at] for text, hashes in told.items() for at in (0, 1)})
    drawn = [scene.asked().turns[0].prompt for _ in range(2)]
    assert sorted(drawn) == ["mined only", "two?"]
    rest = [scene.asked().turns[0].prompt for _ in range(len(PROMPTS) - 1)]
    assert sorted(rest) == sorted(asked.turns[0] for asked in PROMPTS[1:])


def test_a_drawn_prompt_suggests_how_it_goes_on(make):
    scene = make(prompts=[Asked("math", "English", ("one?", "two?"))])
    view = scene.asked()
    assert view.suggestion == "two?"
    done = scene.arena.ask(view.battle_id, ME, "two?")
    assert (done.suggestion, len(done.turns)) == ("", 2)
    scene.arena.vote(view.battle_id, ME, "tie")
    assert loaded(scene.rows()[0]["settings"])["drawn"] is True
    assert scene.asked("one?", "other").suggestion == ""


def test_no_prompt_comes_twice_to_one_visitor_before_all_have_come(make):
    scene = make(recipes=RECIPES[:2])
    drawn = [scene.asked().turns[0].prompt for _ in PROMPTS]
    assert sorted(drawn) == sorted(asked.turns[0] for asked in PROMPTS)
    repeated = scene.asked()  # seen, and not judged on this pair
    scene.arena.vote(repeated.battle_id, ME, "tie")
    for _ in PROMPTS[1:]:
        assert not scene.arena.vote(scene.asked().battle_id, ME, "tie").flags
    with pytest.raises(Refused, match="type one of your own"):
        scene.asked()


def test_prompts_keep_to_the_category_and_language_asked_for(scene):
    assert scene.arena.categories(MODEL) == ["chat", "math"]
    assert scene.arena.languages(MODEL) == ["English", "German"]
    for _ in range(6):
        assert scene.asked(category="math").turns[0].prompt.startswith("math")
    with pytest.raises(Refused, match="No English chat prompt is left"):
        scene.asked(category="chat", language="English")


def test_another_drawn_prompt_takes_the_place_of_what_was_asked(scene):
    view = scene.asked("my own")
    other = scene.arena.ask(view.battle_id, ME, None)
    assert len(other.turns) == 1
    assert other.turns[0].prompt in {asked.turns[0] for asked in PROMPTS}
    typed = scene.arena.ask(view.battle_id, ME, "and more")
    scene.arena.vote(typed.battle_id, ME, "tie")
    assert loaded(scene.rows()[0]["settings"])["drawn"] is False


# ---- draws ---------------------------------------------------------------------------------


def test_a_side_is_no_more_likely_for_either_variant(make):
    """|share on the left - 1/2| < 3 standard errors over 10,000 draws, for each of the pairs."""
    scene = make(recipes=RECIPES[:3], stale_s=1e9)
    n = 10_000
    left: Counter = Counter()
    met: Counter = Counter()
    for _ in range(n):
        a, b = (side.variant.name for side in scene.arena._draws.draw(MODEL).sides)
        left[a, b] += 1
        met[frozenset((a, b))] += 1
    assert len(met) == 3
    for pair, count in met.items():
        a, b = sorted(pair)
        assert abs(left[a, b] / count - 0.5) < 3 * math.sqrt(0.25 / count)
    swapped = sum(count for (a, b), count in left.items() if a < b)
    assert abs(swapped / n - 0.5) < 3 * math.sqrt(0.25 / n)


def test_pairs_come_as_often_as_the_propensity_kept_with_their_votes_says(make):
    scene = make(recipes=RECIPES[:3], stale_s=0.0)
    for n in range(30):
        scene.arena.vote(scene.asked(f"p{n}").battle_id, ME, "model_a")
    for known in (scene.arena._draws._scores, scene.arena._draws._variants):
        known._seconds = 1e9  # what was drawn by stays as it is from here on
    n, met, said = 4000, Counter(), {}
    for _ in range(n):
        draw = scene.arena._draws.draw(MODEL)
        pair = frozenset(side.variant.name for side in draw.sides)
        met[pair] += 1
        said[pair] = draw.propensity
    assert sum(said.values()) == pytest.approx(1.0)
    for pair, p in said.items():
        assert p > 0.1 / 3
        assert abs(met[pair] / n - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert all(0.1 / 3 < row["propensity"] < 1 for row in scene.rows())


def test_automatic_ties_are_information_on_a_pair(make):
    """A pair that always answers alike must not be drawn for ever."""
    scene = make(recipes=RECIPES[:3], stale_s=0.0, redraws=0)
    twins = {run_id_of(0), run_id_of(1)}
    scene.pool.answer = lambda run_id, said: "x" if run_id in twins else own_words(run_id, said)
    for n in range(40):
        scene.asked(f"p{n}")
    scores = scene.arena._draws._scored(MODEL, [v.name for v in variants(scene.store, MODEL)])
    least = scores.sort_values("probability").iloc[0]
    assert least["votes"] > 0
    assert {least["model_a"], least["model_b"]} == {
        v.name for v in variants(scene.store, MODEL) if v.run_id in twins
    }


def test_variants_are_one_per_artifact_of_finished_runs_of_the_newest_model(make):
    scene = make(recipes=[])
    store = scene.store
    add_run(store, 0, "baseline")
    add_run(store, 1, "rtn(bits=4, group=64)")
    add_run(store, 2, "another name", artifact_id="01fedcba9876")
    add_run(store, 3, "gptq", state="failed")
    add_run(store, 4, "gptq", state="running")
    add_run(store, 5, "hidden", kind="mine")
    add_run(store, 6, "gptq", model="other")
    add_run(store, 8, "RTN W4 g64")  # submitted under a preset's name
    found = variants(store, MODEL)
    assert [(v.name, v.run_id, v.is_baseline) for v in found] == [
        ("demo/baseline@00fedcba", run_id_of(0), True),
        ("demo/rtn(bits=4,group=64)@01fedcba", run_id_of(1), False),
        ("demo/RTNW4g64@08fedcba", run_id_of(8), False),
    ]
    add_run(store, 9, "rtn", content="c1")
    assert [v.run_id for v in variants(store, MODEL)] == [run_id_of(9)]


def test_too_few_variants_are_told_with_what_to_do(make):
    scene = make(recipes=RECIPES[:1])
    why = "A battle needs two variants of a model and demo has one finished run; start a run"
    assert scene.arena.why_not(MODEL).startswith(why)
    with pytest.raises(Refused, match="needs two variants"):
        scene.arena.start(ME, HERE, MODEL)
    assert "no finished run" in scene.arena.why_not("unknown")
    assert "first tour" in scene.arena.why_not("")
    with pytest.raises(Refused, match="cookie"):
        make().arena.start("", HERE, MODEL)


# ---- crashes -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, 1])
def test_a_crash_of_one_side_ends_the_battle_and_nothing_else(scene, side):
    before = scene.asked("Hello?", "other")
    held(scene)
    view = scene.asked("Hello?")
    a, b = scene.pool.handles[-2:]
    (a, b)[side].fail(f"the process of {run_id_of(0)} died")
    scene.arena.view(view.battle_id, ME)
    scene.later(GRACE_S)
    broken = scene.arena.view(view.battle_id, ME)
    assert (broken.state, broken.can_vote, broken.can_ask) == ("broken", False, False)
    assert broken.message.startswith("A model stopped while it answered")
    assert broken.turns[0].answer_a == broken.turns[0].answer_b == ""
    assert (a, b)[1 - side].stopped
    for move in (
        lambda: scene.arena.vote(view.battle_id, ME, "tie"),
        lambda: scene.arena.ask(view.battle_id, ME, "again"),
    ):
        with pytest.raises(Refused, match="start a new one"):
            move()
    assert scene.arena.vote(before.battle_id, "other", "tie").counts
    scene.pool.answer = own_words
    assert scene.asked("Hello?").can_vote


def test_a_prompt_that_neither_side_can_take_is_told_and_can_be_replaced(scene):
    held(scene)
    view = scene.asked("Much too long?")
    for handle in scene.pool.handles:
        handle.fail("the last message takes 900 tokens, the model's context is 512")
    told = scene.arena.view(view.battle_id, ME)
    assert (told.state, told.can_ask) == ("empty", True)
    assert told.message == "The last message takes 900 tokens, the model's context is 512."
    scene.pool.answer = own_words
    fresh = scene.arena.ask(view.battle_id, ME, "Shorter?")
    assert [turn.prompt for turn in fresh.turns] == ["Shorter?"]


def test_an_error_that_names_a_side_is_not_told(scene):
    for error in (f"there is no run {run_id_of(2)!r}", "gptq: no blocks", ""):
        scene.pool.refuses = error
        battles = [scene.asked(f"Hello {n}?") for n in range(12)]
        for view in battles:
            told = json.dumps(view.data())
            assert "gptq" not in told
            if run_id_of(2) in told:
                play = play_of(scene, view.battle_id)
                assert run_id_of(2) not in [s.variant.run_id for s in play.battle.sides]


# ---- what leaves the process ---------------------------------------------------------------

STEPS = st.lists(
    st.sampled_from(["ask", "draw", "finish", "alike", "empty", "fail", "vote", "undo", "skip"]),
    min_size=1,
    max_size=14,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_no_order_of_moves_tells_names_before_the_vote_or_counts_twice(scene, steps, seed):
    """Every run id, recipe, method, artifact, seed and count is looked for in all that is sent."""
    held(scene)
    rng = random.Random(seed)
    before = len(scene.votes.frame(counted=False))
    session = f"{ME} {seed} {steps}"
    battle = scene.arena.start(session, HERE, MODEL).battle_id
    secret = [v.name for v in variants(scene.store, MODEL)]
    secret += [part for name in secret for part in name.split("@")]
    secret += [run_id_of(at) for at in range(len(RECIPES))] + list(RECIPES)
    secret += ["gptq", "rtn", "smoothquant", "baseline", "bits", "token", "seed", "float32"]
    secret += ["propensity", "packed", "ttft", "artifact", "run_", HERE, session]
    outcomes = {
        "alike": lambda handle: handle.finish("x"),
        "empty": lambda handle: handle.finish(""),
        "fail": lambda handle: handle.fail(f"run {handle.run_id} died"),
    }
    votes = voids = 0
    for step in steps:
        last = scene.pool.handles[-2:]
        if step == "finish":
            for at, handle in enumerate(last):
                if not handle.view().ended:
                    handle.finish(f"answer {at}")
        elif step in outcomes:
            for handle in last:
                if not handle.view().ended:
                    outcomes[step](handle)
        try:
            view = {
                "ask": lambda: scene.arena.ask(battle, session, f"prompt {rng.random()}"),
                "draw": lambda: scene.arena.ask(battle, session, None),
                "vote": lambda: scene.arena.vote(battle, session, rng.choice(CHOICES)),
                "undo": lambda: scene.arena.retract(battle, session),
                "skip": lambda: scene.arena.skip(battle, session),
            }.get(step, lambda: scene.arena.view(battle, session))()
            votes += step == "vote" and "already" not in view.message
            voids += view.state == State.VOID and not voids
        except Refused as refusal:
            told = str(refusal)
            assert [word for word in secret if word in told] == []
            continue
        if not view.winner:
            told = json.dumps(view.data())
            assert [word for word in secret if word in told] == []
    humans = scene.votes.frame(counted=False)
    assert votes == len(humans) - before <= 1
    assert int(humans.iloc[before:]["retracted"].sum()) == voids


def test_what_keeps_a_side_from_loading_is_not_told(scene, monkeypatch):
    def refuse(run_id):
        raise ValueError(f"there is no run {run_id!r}")

    monkeypatch.setattr(scene.pool, "warm", refuse)
    assert scene.arena.start(ME, HERE, MODEL).state == "open"


def test_a_tie_that_cannot_be_recorded_stops_nobody(make, monkeypatch):
    scene = make(answer=alike("Hello?"))

    def full(vote):
        raise StoreError("no space is left")

    with monkeypatch.context() as patch:
        patch.setattr(scene.votes, "cast", full)
        assert scene.asked("Hello?").state == "same"
    scene.asked("Hello?")
    assert [row["kind"] for row in scene.rows()] == ["auto"]


def test_a_pair_changes_with_its_prompt_or_not_at_all(make):
    """No prompt is left for the second pair: the battle stays with what was answered."""
    scene = make(recipes=RECIPES[:3], prompts=PROMPTS[:4], answer=lambda run_id, said: "x")
    view = scene.asked()
    assert view.state == "same"
    sides = play_of(scene, view.battle_id).battle.sides
    assert [run_id for run_id, _, _ in scene.pool.asked[-2:]] == [s.variant.run_id for s in sides]


def test_what_is_shown_before_a_battle_names_no_variant(scene):
    for n in range(3):
        scene.arena.vote(scene.asked(f"p{n}").battle_id, ME, CHOICES[n])
    scene.later(60)
    told = json.dumps(
        [scene.arena.most_wanted(MODEL), scene.arena.categories(MODEL), scene.arena.why_not(MODEL)]
    )
    assert not re.search("gptq|rtn|smooth|baseline|@", told)


# ---- limits and memory ---------------------------------------------------------------------


def limits(text: str) -> Limits:
    return Limits.from_text(text, NO_LIMITS)


def test_votes_starts_and_typed_prompts_are_limited_and_repeats_cost_nothing(make):
    scene = make(limits=limits("votes=2/min,starts=4/min,prompts=3/min"))
    battles = [scene.asked(f"p{n}").battle_id for n in range(3)]
    with pytest.raises(TooMany, match="typed prompts"):
        scene.arena.ask(battles[0], ME, "one more")
    assert scene.arena.view(battles[0], ME).can_vote
    assert scene.arena.start(ME, HERE, MODEL).state == "open"
    with pytest.raises(TooMany, match="4/min is the limit of new battles"):
        scene.arena.start(ME, HERE, MODEL)
    for battle in battles[:2]:
        for _ in range(5):
            scene.arena.vote(battle, ME, "tie")
    with pytest.raises(TooMany, match="votes for one visitor; go on in 30 s"):
        scene.arena.vote(battles[2], ME, "tie")
    assert scene.arena.view(battles[2], ME).can_vote
    scene.later(30)
    assert scene.arena.vote(battles[2], ME, "tie").counts


def test_a_visitors_oldest_open_battle_makes_room(make):
    scene = make(limits=limits("battles=2"))
    battles = [scene.asked(f"p{n}").battle_id for n in range(3)]
    assert [scene.arena.view(b, ME).state for b in battles] == ["skipped", "ready", "ready"]
    scene.arena.vote(battles[1], ME, "tie")
    scene.asked("p4")
    assert scene.arena.view(battles[2], ME).state == "ready"


def test_an_address_has_so_many_open_battles_and_idle_ones_do_not_count(make):
    scene = make(limits=limits("address_battles=3"), idle_s=100.0)
    for n in range(3):
        scene.arena.start(f"s{n}", HERE, MODEL)
    with pytest.raises(Refused, match="3 battles are open at this address"):
        scene.arena.start("s3", HERE, MODEL)
    assert scene.arena.start("s3", "10.0.0.9", MODEL).state == "open"
    scene.later(101)
    assert scene.arena.start("s4", HERE, MODEL).state == "open"


def test_memory_is_bounded_and_what_was_counted_stays_so(make):
    scene = make(kept=5, visitors=3)
    voted = scene.asked("Hello?").battle_id
    scene.arena.vote(voted, ME, "tie")
    held(scene)
    lost = scene.asked("Hello?", "other").battle_id
    first = scene.pool.handles[-2:]
    for n in range(9):
        scene.arena.start(f"s{n}", HERE, MODEL)
    assert (len(scene.arena._plays), len(scene.arena._visitors)) == (5, 2)
    with pytest.raises(Refused, match="not known here any more; start a new one"):
        scene.arena.view(lost, "other")
    with pytest.raises(Refused, match="Your vote on this battle is counted"):
        scene.arena.vote(voted, ME, "tie")
    assert all(handle.stopped for handle in first)
    assert len(scene.rows()) == 1


# ---- ahead and standing --------------------------------------------------------------------


def test_the_next_battle_is_answered_while_the_voter_reads(make):
    scene = make(ahead=2)
    scene.asked("Hello?")
    assert len(scene.pool.asked) == 2 + 2 * 2
    (run_a, said, how_a), (run_b, _, how_b) = scene.pool.asked[2:4]
    view = scene.asked()
    assert [turn.prompt for turn in view.turns] == [said[0].content]
    assert scene.pool.asked[6:8] == [(run_a, said, how_a), (run_b, said, how_b)]  # as in the cache


def test_nothing_is_loaded_ahead_and_the_draw_stands_all_the_same(make):
    scene = make(ahead=1)
    scene.pool.load = "cold"
    scene.arena.prepare(MODEL)
    assert scene.pool.asked == []
    (draw,) = scene.arena._ahead[MODEL]
    scene.asked()
    assert scene.pool.asked[0][0] == draw.sides[0].variant.run_id


def test_a_draw_ahead_whose_run_was_deleted_is_not_used(make):
    scene = make(ahead=1, recipes=RECIPES[:3], stale_s=0.0)
    scene.arena.prepare(MODEL)
    (draw,) = scene.arena._ahead[MODEL]
    gone = draw.sides[0].variant.run_id
    scene.store.delete(gone)
    scene.asked()
    assert gone not in [run_id for run_id, _, _ in scene.pool.asked[-2:]]


def test_a_prompt_drawn_ahead_is_not_given_to_who_has_seen_it_or_asks_for_another_kind(make):
    scene = make(ahead=1, recipes=RECIPES[:2])
    scene.arena.prepare(MODEL)
    (draw,) = scene.arena._ahead[MODEL]
    kind = {"math": "chat", "chat": "math"}[draw.prompt.category]
    assert scene.asked(category=kind).turns[0].prompt.startswith(kind)
    (draw,) = scene.arena._ahead[MODEL]
    scene.arena._visitors.show(scene.arena._hash("new"), draw.prompt.turns[0])
    assert scene.asked(session="new").turns[0].prompt != draw.prompt.turns[0]


def test_ratings_come_with_the_names_once_there_are_votes(make):
    scene = make(recipes=RECIPES[:2], stale_s=0.0)
    assert scene.arena.most_wanted(MODEL).startswith("Nobody has voted yet")
    base = "demo/baseline@00fedcba"
    for n in range(30):
        view = scene.asked(f"p{n}")
        play = play_of(scene, view.battle_id)
        good = play.battle.sides[0].variant.is_baseline or n % 3 == 0
        voted = scene.arena.vote(view.battle_id, ME, "model_a" if good else "model_b")
        if n < 5:
            assert (voted.a.rating, voted.b.rating) == (None, None)  # too few votes to say
    ratings = {side.model: side.rating for side in (voted.a, voted.b)}
    assert ratings.pop(base) == pytest.approx(1000.0)
    assert ratings.popitem()[1] < 1000
    assert re.match(r"30 votes so far; (every pair|1 of 1 pairs)", scene.arena.most_wanted(MODEL))
