"""The chat pool: queues, memory, crashes and the cache, with puppets for processes."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from puppets import DEADLINE_S, GREEDY, Stage, ask, make_run, texts
from scene import wait_for

from jobs.chat import Answer, ChatPool
from jobs.chat_room import PATIENCE
from jobs.chat_runs import Need
from jobs.chat_types import AnswerView, Message, Piece, Sampling, divergence_index, repetition_rate


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def open_pool(tmp_path: Path, stage: Stage) -> Iterator[Callable[..., ChatPool]]:
    """open_pool(budget_bytes=100): runs take 40 while they load, as simulated ones 60."""
    made: list[ChatPool] = []

    def make(budget_bytes: int = 1000, packed: int = 40, simulated: int = 60) -> ChatPool:
        need = Need(packed, simulated)
        made.append(
            ChatPool(tmp_path, budget_bytes=budget_bytes, launcher=stage, need=lambda *given: need)
        )
        return made[-1]

    yield make
    stage.open(*stage.gates)
    for pool in made:
        pool.close()


@pytest.fixture
def pool(open_pool) -> ChatPool:
    return open_pool()


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """The 16-bit run and three others."""
    return [make_run(tmp_path, number) for number in range(4)]


def ready(pool: ChatPool, *run_ids: str) -> None:
    """Load them, one after the other."""
    for run_id in run_ids:
        pool.warm(run_id)
        wait_for(lambda run_id=run_id: pool.state(run_id).state == "ready")


def running(answer: Answer) -> AnswerView:
    """Once its first token is there."""
    view = answer.view()
    while not view.pieces:
        assert not view.ended, view.error
        view = answer.wait_change(view.version, DEADLINE_S)
    return view


# -- answers -------------------------------------------------------------------------------------


def test_an_answer_is_what_its_process_said(pool, runs):
    answer = pool.generate(runs[1], ask("one two"), GREEDY, prefix=[7, 9])
    view = answer.wait(DEADLINE_S)
    assert (view.state, view.finish, view.error) == ("done", "end", "")
    assert view.pieces == (Piece(7, "|"), Piece(9, "|"), Piece(0, " one"), Piece(1, " two"))
    assert view.text == "|| one two"
    assert (view.given, view.new_tokens, view.tokens) == (2, 2, (7, 9, 0, 1))
    assert (view.packed, view.dtype, view.speed) == (True, "bfloat16", 1.0)
    state = pool.state(runs[1])
    assert (state.state, state.packed, state.dtype, state.position) == (
        "ready",
        True,
        "bfloat16",
        0,
    )


def test_twenty_questions_to_one_model_are_answered_in_order(pool, runs, stage):
    stage.gates |= {f"q{n}" for n in range(20)}
    answers = [pool.generate(runs[1], ask(f"q{n}"), GREEDY) for n in range(20)]
    assert [answer.view().position for answer in answers] == list(range(20))
    for served, answer in enumerate(answers):
        running(answer)
        waiting = answers[served + 1 :]
        assert [other.view().state for other in waiting] == ["queued"] * len(waiting)
        assert [other.view().position for other in waiting] == list(range(1, len(waiting) + 1))
        assert pool.state(runs[1]).position == len(waiting) + 1
        stage.open(f"q{served}")
        assert answer.wait(DEADLINE_S).text == f" q{served}"
    assert stage.asked() == [f"q{n}" for n in range(20)]
    assert stage.started == [runs[1]]


def test_two_models_answer_at_once(pool, runs, stage):
    stage.gates |= {"a", "b"}
    one, two = pool.generate(runs[1], ask("a"), GREEDY), pool.generate(runs[2], ask("b"), GREEDY)
    assert (running(one).state, running(two).state) == ("running", "running")
    stage.open("b")
    assert two.wait(DEADLINE_S).state == "done"
    assert one.view().state == "running"


def test_nobody_waits_for_a_model_that_loads(pool, runs, stage):
    stage.gates.add("load")
    pool.warm(runs[1])
    answers = [pool.generate(runs[1], ask(f"q{n}"), GREEDY) for n in range(3)]
    assert [answer.view().state for answer in answers] == ["loading"] * 3
    assert pool.state(runs[1]).state == "loading"
    assert not answers[0].wait(0).ended
    stage.open("load")
    assert texts(answers) == [" q0", " q1", " q2"]


def test_a_running_answer_can_be_stopped(pool, runs, stage):
    stage.gates.add("two")
    answer, after = (pool.generate(runs[1], ask(t), GREEDY) for t in ("one two three", "next"))
    running(answer)
    answer.stop()
    view = answer.wait(DEADLINE_S)
    assert (view.state, view.finish, view.text) == ("stopped", "stopped", " one two")
    answer.stop()
    assert texts([after]) == [" next"]
    assert answer.view() == view


def test_a_waiting_answer_can_be_stopped(pool, runs, stage):
    stage.gates.add("a")
    first, second, third = (pool.generate(runs[1], ask(t), GREEDY) for t in "abc")
    running(first)
    second.stop()
    assert (second.view().state, third.view().position) == ("stopped", 1)
    stage.open("a")
    assert texts([first, third]) == [" a", " c"]
    assert stage.asked() == ["a", "c"]


def test_questions_that_cannot_be_answered_are_refused(pool, runs):
    with pytest.raises(ValueError, match="ends with a message of the user"):
        pool.generate(runs[1], [Message("assistant", "hi")], GREEDY)
    with pytest.raises(ValueError, match="4,097 tokens is not continued"):
        pool.generate(runs[1], ask("a"), GREEDY, prefix=[1] * 4097)


def test_a_queue_has_an_end(pool, runs, stage):
    stage.gates.add("load")
    for n in range(200):
        pool.generate(runs[1], ask(f"q{n}"), GREEDY)
    with pytest.raises(ValueError, match="200 answers wait"):
        pool.generate(runs[1], ask("one more"), GREEDY)


def test_questions_from_many_threads_are_all_answered_once(pool, runs, stage):
    answers: list[Answer] = []

    def ask_some(who: int) -> None:
        for n in range(10):
            answers.append(pool.generate(runs[1 + who % 3], ask(f"t{who} q{n}"), GREEDY))

    threads = [threading.Thread(target=ask_some, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = sorted(f" t{who} q{n}" for who in range(8) for n in range(10))
    assert sorted(texts(answers)) == wanted
    assert sorted(f" {said}" for said in stage.asked()) == wanted


# -- what is wrong with a run --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "spec", "why"),
    [
        (1, {"state": "running"}, "is running; only a finished run can answer"),
        (1, {"state": "failed"}, "is failed; only a finished run can answer"),
        (1, {"kind": "mine"}, "made no model"),
        (1, {"model": None}, "cannot be read"),
        (None, {}, "there is no run"),
    ],
)
def test_a_run_that_cannot_answer_says_why(pool, tmp_path, stage, number, spec, why):
    run_id = make_run(tmp_path, number, **spec) if number else "20261124-120000-abcdef"
    view = pool.generate(run_id, ask("a"), GREEDY).wait(DEADLINE_S)
    assert view.state == "failed"
    assert why in view.error
    pool.warm(run_id)
    assert (pool.state(run_id).state, pool.state(run_id).why) == ("failed", view.error)
    assert stage.started == []


def test_a_run_that_is_done_later_can_answer_then(pool, tmp_path):
    run_id = make_run(tmp_path, 1, state="running")
    assert pool.generate(run_id, ask("a"), GREEDY).view().state == "failed"
    with (tmp_path / "runs" / run_id / "events.jsonl").open("a") as events:
        events.write(json.dumps({"t": 1, "type": "state", "state": "done"}) + "\n")
    assert texts([pool.generate(run_id, ask("a"), GREEDY)]) == [" a"]
    assert pool.state(run_id).state == "ready"


def test_a_model_that_cannot_be_loaded_fails_all_who_wait_and_is_tried_again(pool, runs, stage):
    stage.gates.add("load")
    stage.troubles[runs[1]] = "block 0 is missing"
    answers = [pool.generate(runs[1], ask(f"q{n}"), GREEDY) for n in range(3)]
    stage.open("load")
    assert {answer.wait(DEADLINE_S).error for answer in answers} == {"block 0 is missing"}
    wait_for(lambda: pool.state(runs[1]).state == "failed")
    assert pool.state(runs[1]).why == "block 0 is missing"
    assert texts([pool.generate(runs[1], ask("again"), GREEDY)]) == [" again"]
    assert pool.state(runs[1]).why == ""


# -- crashes -------------------------------------------------------------------------------------


def test_a_crash_costs_one_answer(pool, runs, stage):
    stage.gates |= {"a", "x"}
    crashed, *after = [pool.generate(runs[1], ask(t), GREEDY) for t in "abc"]
    other = pool.generate(runs[2], ask("x"), GREEDY)
    running(crashed)
    running(other)
    stage.living[runs[1]].die(-signal.SIGKILL)
    view = crashed.wait(DEADLINE_S)
    assert (view.state, view.text) == ("failed", " a")
    assert "SIGKILL" in view.error
    assert "memory" in view.error
    assert texts(after) == [" b", " c"]
    assert sorted(stage.started) == [runs[1], runs[1], runs[2]]
    stage.open("x")
    assert other.wait(DEADLINE_S).state == "done"


def test_an_idle_process_that_dies_is_started_for_the_next_question(pool, runs, stage):
    ready(pool, runs[1])
    stage.living[runs[1]].die(1)
    wait_for(lambda: pool.state(runs[1]).state == "cold")
    assert texts([pool.generate(runs[1], ask("a"), GREEDY)]) == [" a"]


def test_a_death_while_loading_is_a_failure_to_load(pool, runs, stage):
    stage.gates.add("load")
    answer = pool.generate(runs[1], ask("a"), GREEDY)
    stage.until(lambda: runs[1] in stage.living and stage.heard)
    stage.living[runs[1]].die(-signal.SIGKILL)
    assert "SIGKILL" in answer.wait(DEADLINE_S).error
    wait_for(lambda: pool.state(runs[1]).state == "failed")
    assert len(stage.started) == 1


def test_a_process_that_breaks_gets_no_other_question(pool, runs, stage):
    stage.gates.add("break")  # it has said that it ends and has not yet
    answers = [pool.generate(runs[1], ask(text), GREEDY) for text in ("break", "a")]
    assert answers[0].wait(DEADLINE_S).error == "it broke"
    assert texts(answers[1:]) == [" a"]
    assert stage.started == [runs[1]] * 2


def test_an_event_that_is_not_understood_costs_its_answer(pool, runs):
    answers = [pool.generate(runs[1], ask(text), GREEDY) for text in ("garble", "a")]
    view = answers[0].wait(DEADLINE_S)
    assert (view.state, "not understood" in view.error) == ("failed", True)
    assert texts(answers[1:]) == [" a"]


# -- memory --------------------------------------------------------------------------------------


def loaded(pool: ChatPool, runs: list[str]) -> list[int]:
    return [at for at, run_id in enumerate(runs) if pool.state(run_id).state == "ready"]


def test_the_least_recently_used_leaves(open_pool, runs, stage):
    pool = open_pool(budget_bytes=100)
    stage.sizes = dict.fromkeys(runs, 40)
    ready(pool, runs[1], runs[2])
    assert texts([pool.generate(runs[1], ask("a"), GREEDY)]) == [" a"]
    ready(pool, runs[3])
    assert loaded(pool, runs) == [1, 3]
    assert pool.state(runs[2]).state == "cold"
    assert texts([pool.generate(runs[2], ask("b"), GREEDY)]) == [" b"]
    assert loaded(pool, runs) == [2, 3]


def test_what_a_process_takes_is_measured(open_pool, runs, stage):
    pool = open_pool(budget_bytes=100)
    stage.sizes = dict.fromkeys(runs, 20)
    ready(pool, *runs[:4])  # 20 + 20 + 20 + 40 while the last one loads
    assert loaded(pool, runs) == [0, 1, 2, 3]
    assert [pool.state(run_id).bytes for run_id in runs] == [20] * 4
    stage.sizes[runs[3]] = 70
    assert texts([pool.generate(runs[3], ask("grow"), GREEDY)]) == [" grow"]
    wait_for(lambda: loaded(pool, runs) == [2, 3])


def test_a_busy_process_is_never_sent_away(open_pool, runs, stage):
    pool = open_pool(budget_bytes=60)
    stage.sizes = dict.fromkeys(runs, 40)
    stage.gates.add("long")
    busy = pool.generate(runs[1], ask("long"), GREEDY)
    running(busy)
    waiting = pool.generate(runs[2], ask("b"), GREEDY)
    pool.warm(runs[3])
    assert waiting.view().state == "loading"
    assert stage.started == [runs[1]]
    stage.open("long")
    assert texts([busy, waiting]) == [" long", " b"]
    wait_for(lambda: loaded(pool, runs) == [3])  # it was only wanted warm, so it came last


def test_a_model_larger_than_the_budget_is_refused_with_the_numbers(open_pool, runs, stage):
    pool = open_pool(budget_bytes=10**9, packed=2 * 10**9)
    view = pool.generate(runs[1], ask("a"), GREEDY).wait(DEADLINE_S)
    assert view.state == "failed"
    assert "2.00 GB" in view.error
    assert "1.00 GB" in view.error
    assert stage.started == []


def test_a_model_that_turns_out_larger_makes_room_or_is_refused(open_pool, runs, stage):
    pool = open_pool(budget_bytes=100, packed=40, simulated=90)
    stage.sizes = dict.fromkeys(runs, 30)
    ready(pool, runs[1])
    stage.troubles[runs[2]] = "grows"
    ready(pool, runs[2])
    wait_for(lambda: loaded(pool, runs) == [2])
    small = open_pool(budget_bytes=80, packed=40, simulated=90)
    stage.troubles[runs[3]] = "grows"
    assert "GB" in small.generate(runs[3], ask("a"), GREEDY).wait(DEADLINE_S).error


def test_a_long_queue_does_not_keep_another_model_out_for_ever(open_pool, runs, stage):
    pool = open_pool(budget_bytes=60)
    stage.sizes = dict.fromkeys(runs, 40)
    stage.gates.add("q0")
    long = [pool.generate(runs[1], ask(f"q{n}"), GREEDY) for n in range(3)]
    running(long[0])
    other = pool.generate(runs[2], ask("other"), GREEDY)
    long += [pool.generate(runs[1], ask(f"q{n}"), GREEDY) for n in range(3, 3 * PATIENCE)]
    stage.open("q0")
    assert texts([*long, other])[-1] == " other"
    order = stage.asked()
    assert 3 <= order.index("other") <= 3 + PATIENCE
    assert [said for said in order if said != "other"] == [f"q{n}" for n in range(3 * PATIENCE)]
    assert stage.started == [runs[1], runs[2], runs[1]]


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_whatever_is_asked_all_is_answered_within_the_budget(tmp_path_factory, data):
    home, stage = tmp_path_factory.mktemp("home"), Stage()
    runs = [make_run(home, number) for number in range(4)]
    stage.sizes = {run_id: data.draw(st.integers(10, 40)) for run_id in runs}
    need = Need(40, 40)
    pool = ChatPool(home, budget_bytes=90, launcher=stage, need=lambda *given: need)
    used: list[int] = []
    resize = pool._room.settle

    def settle() -> None:
        used.append(sum(variant.bytes for variant in pool._room.variants.values()))
        resize()

    pool._room.settle = settle  # type: ignore[method-assign]
    asked = data.draw(st.lists(st.integers(0, 3), max_size=20))
    answers = [pool.generate(runs[which], ask(f"q{at}"), GREEDY) for at, which in enumerate(asked)]
    assert texts(answers) == [f" q{at}" for at in range(len(asked))]
    for which, run_id in enumerate(runs):
        mine = [f"q{at}" for at, chosen in enumerate(asked) if chosen == which]
        assert stage.asked(run_id) == mine
    assert max(used, default=0) <= 90
    pool.close()


# -- the cache -----------------------------------------------------------------------------------


def test_a_question_asked_again_is_answered_at_once(pool, open_pool, runs, stage):
    first = pool.generate(runs[1], ask("a b"), GREEDY).wait(DEADLINE_S)
    again = pool.generate(runs[1], ask("a b"), GREEDY).view()
    assert (again.state, again.cached, first.cached) == ("done", True, False)
    assert (again.pieces, again.text, again.seconds) == (first.pieces, first.text, first.seconds)
    later = open_pool()  # after the server was started again
    assert later.generate(runs[1], ask("a b"), GREEDY).view().cached
    assert stage.asked() == ["a b"]
    assert texts([later.generate(runs[1], ask("a b"), Sampling(max_new=9))]) == [" a b"]
    assert stage.asked() == ["a b", "a b"]


def test_the_same_question_twice_in_a_queue_is_answered_once(pool, runs, stage):
    stage.gates.add("load")
    answers = [pool.generate(runs[1], ask("a"), GREEDY) for _ in range(3)]
    stage.open("load")
    assert texts(answers) == [" a"] * 3
    assert [answer.view().cached for answer in answers] == [False, True, True]
    assert stage.asked() == ["a"]


def test_a_stopped_answer_is_not_kept(pool, runs, stage):
    stage.gates.add("a")
    answer = pool.generate(runs[1], ask("a b"), GREEDY)
    running(answer)
    answer.stop()
    answer.wait(DEADLINE_S)
    stage.open("a")
    assert texts([pool.generate(runs[1], ask("a b"), GREEDY)]) == [" a b"]


# -- scores --------------------------------------------------------------------------------------


def scored(stage: Stage) -> list[tuple[str, bool, bool, str]]:
    """(run, writes, reads, dtype) of each pass."""
    return [
        (run_id, bool(c["write"]), bool(c["read"]), c["dtype"])
        for run_id, c in stage.heard
        if c["do"] == "score"
    ]


def test_scoring_takes_one_pass_of_each_model(pool, runs, stage, tmp_path):
    found = pool.score(runs[1], runs[0], ask("a"), [3])
    assert (found.tokens, found.kld, found.mean_base_nll) == ((3,), (0.5,), 2.0)
    assert scored(stage) == [(runs[1], True, False, ""), (runs[0], False, True, "bfloat16")]
    assert list((tmp_path / "chat").glob("score-*")) == []


def test_the_16_bit_model_is_scored_against_itself(pool, runs, stage):
    pool.score(runs[0], runs[0], ask("a"), [3])
    assert scored(stage) == [(runs[0], False, False, "")]


def test_both_models_compute_in_one_dtype(pool, runs, stage):
    stage.dtypes[runs[1]] = "float32"
    pool.score(runs[1], runs[0], ask("a"), [3])
    assert scored(stage) == [
        (runs[1], True, False, ""),
        (runs[0], False, True, "float32"),
        (runs[0], False, True, "float32"),
    ]
    loads = [c["dtype"] for run, c in stage.heard if c["do"] == "load" and run == runs[0]]
    assert loads == ["", "float32"]


def test_scores_are_refused_in_one_sentence(pool, runs, stage, tmp_path):
    other = make_run(tmp_path, 0x100000, steps=[], model={"id": "other"})
    for base, tokens, why in (
        (runs[2], [1], "is not the 16-bit model"),
        (other, [1], "is not the 16-bit model"),
        (runs[0], [], "without tokens"),
    ):
        with pytest.raises(ValueError, match=why):
            pool.score(runs[1], base, ask("a"), tokens)
    stage.gates.add("score")
    with pytest.raises(ValueError, match="took too long"):
        pool.score(runs[1], runs[0], ask("a"), [1], timeout=0)
    stage.open("score")
    assert pool.score(runs[1], runs[0], ask("a"), range(600)).tokens == tuple(range(512))


# -- the end -------------------------------------------------------------------------------------


def test_closing_fails_what_is_not_answered_and_ends_every_process(pool, runs, stage):
    stage.gates.add("a")
    answers = [pool.generate(runs[1], ask(t), GREEDY) for t in "ab"]
    running(answers[0])
    ready(pool, runs[2])
    pool.close()
    assert {answer.wait(DEADLINE_S).error for answer in answers} == {"the chat was closed"}
    assert stage.living == {}
    assert pool.generate(runs[2], ask("c"), GREEDY).view().error == "the chat was closed"


# -- token lists ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_divergence_index_is_the_length_of_the_common_beginning(one, other):
    at = divergence_index(one, other)
    assert one[:at] == other[:at]
    assert at in (len(one), len(other)) or one[at] != other[at]
    assert divergence_index(one, one) == len(one)
    assert divergence_index(one, other) == divergence_index(other, one)


def test_repetition_counts_what_came_before():
    assert repetition_rate([1, 2, 3, 4] * 50) == 1 - 4 / 197  # more than 0.9
    assert repetition_rate(range(100)) == 0
    assert repetition_rate([1, 1, 1, 1, 1]) == 0.5
    assert repetition_rate([1, 2, 3]) is None


def test_speed_is_only_for_packed_models():
    pieces = (Piece(1, "a"), Piece(2, "b"), Piece(3, "c"))
    told = {"state": "done", "pieces": pieces, "ttft_s": 1.0, "seconds": 2.0}
    packed = AnswerView(**told, packed=True)
    assert (packed.speed, packed.why_no_speed) == (2.0, "")
    simulated = AnswerView(**told, packed=False)
    assert simulated.speed is None
    assert simulated.why_no_speed.startswith("simulated")
    short = AnswerView(**told, packed=True, given=2)
    assert (short.speed, short.why_no_speed) == (None, "fewer than two new tokens")
