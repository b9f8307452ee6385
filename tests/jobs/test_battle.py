"""The rules of one battle: every order of moves, what is refused, and what leaves the process."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.battle import (
    CHARACTERS,
    CHOICES,
    KEYS,
    TURNS,
    UNDO_S,
    Battle,
    Conditions,
    Refused,
    Reply,
    Side,
    State,
    Variant,
    identical_id,
    identical_of,
    view_of,
    vote_of,
)
from results_db.vote import WINNERS

A = Variant("demo/gptq(bits=3)@aaaaaaaa", "20261124-120000-aaaaaa", "gptq(bits=3)", "a" * 12)
B = Variant("demo/baseline@bbbbbbbb", "20261124-120000-bbbbbb", "baseline", "b" * 12, True)
PAIRS = {
    "differ": ("one", "other"),
    "same": ("one", "one \n"),
    "empty": ("one", "  \n"),
    "both empty": ("", ""),
}


def opened(**changes) -> Battle:
    sides = (Side(A, 3), Side(B, 1))
    made = Battle("ba77le", "v0te4", "addre55", "demo", sides, 0.25)
    return replace(made, **changes)


def replies(kind: str = "differ", tokens: int = 7) -> tuple[Reply, Reply]:
    one, other = PAIRS[kind]
    return Reply(one, tokens, "end", packed=True), Reply(other, 2 * tokens, "length", packed=False)


def ready() -> Battle:
    return opened().asked("Hello?").answered(replies(), now=100.0)


MOVES = st.lists(
    st.one_of(
        st.just(("ask",)),
        st.sampled_from([("answer", kind) for kind in PAIRS]),
        st.just(("break",)),
        st.sampled_from([("vote", winner) for winner in CHOICES]),
        st.just(("withdraw",)),
        st.just(("skip",)),
        st.sampled_from([("wait", 1.0), ("wait", UNDO_S + 1)]),
    ),
    max_size=25,
)


def make(battle: Battle, move: tuple, now: float) -> Battle:
    kind, *given_ = move
    moves = {
        "ask": lambda: battle.asked("and then?"),
        "answer": lambda: battle.answered(replies(given_[0]), now),
        "break": battle.broken,
        "vote": lambda: battle.voted(given_[0], now),
        "withdraw": lambda: battle.withdrawn(now),
        "skip": battle.skipped,
        "wait": lambda: battle,
    }
    return moves[kind]()


@settings(max_examples=500, deadline=None)
@given(MOVES)
def test_whatever_the_order_there_is_one_vote_at_most_and_only_on_two_answers(moves):
    """Against a record of what was let through, read from the front."""
    battle, now, done, refusals = opened(), 0.0, [], []
    for move in moves:
        now += move[1] if move[0] == "wait" else 0.0
        try:
            after = make(battle, move, now)
        except Refused as refusal:
            refusals.append(str(refusal))
            continue
        if after is not battle:
            done.append((move, now))
        elif move[0] == "vote":
            assert battle.winner == move[1]
        battle = after
    votes = [at for at, (move, _) in enumerate(done) if move[0] == "vote"]
    assert len(votes) <= 1
    over = [at for at, (move, _) in enumerate(done) if move[0] in ("break", "skip")]
    for at in votes:
        before = [move for move, _ in done[:at]]
        assert before[-1][0] == "answer"
        assert before[-1][1] in ("differ", "same")
        turns = [move[1] for move in before if move[0] == "answer" and "empty" not in move[1]]
        assert "differ" in turns
        assert not over
        assert [move[0] for move, _ in done[at + 1 :]] in ([], ["withdraw"])
        for _, when in done[at + 1 :]:
            assert when - done[at][1] <= UNDO_S
    assert all(text.endswith((".", "tie (bothbad)", "answering")) for text in refusals)
    withdrawn = [move for move, _ in done if move[0] == "withdraw"]
    expected = State.VOID if withdrawn else State.VOTED if votes else battle.state
    assert battle.state is expected
    assert (battle.winner in CHOICES) == bool(votes)


def test_a_vote_waits_for_both_answers():
    battle = opened()
    with pytest.raises(Refused, match="two complete answers"):
        battle.voted("model_a", 1.0)
    with pytest.raises(Refused, match="two complete answers"):
        battle.asked("Hello?").voted("model_a", 1.0)
    again = ready().asked("More?")
    with pytest.raises(Refused, match="two complete answers"):
        again.voted("model_a", 1.0)
    assert again.answered(replies(), 2.0).voted("tie", 3.0).state is State.VOTED


def test_the_same_vote_again_is_the_same_battle_and_another_is_refused():
    voted = ready().voted("model_b", 105.0)
    assert voted.voted("model_b", 500.0) is voted
    for other in set(CHOICES) - {"model_b"}:
        with pytest.raises(Refused, match="names are known"):
            voted.voted(other, 106.0)
    with pytest.raises(Refused, match="has its vote"):
        voted.asked("one more?")
    with pytest.raises(Refused, match="has its vote"):
        voted.skipped()


def test_withdrawing_takes_ten_seconds_and_voids_for_ever():
    voted = ready().voted("tie", 105.0)
    with pytest.raises(Refused, match="10 s"):
        voted.withdrawn(105.0 + UNDO_S + 0.01)
    void = voted.withdrawn(105.0 + UNDO_S)
    assert void.state is State.VOID
    assert void.withdrawn(999.0) is void
    for move in (lambda: void.voted("tie", 106.0), lambda: void.asked("?"), void.skipped):
        with pytest.raises(Refused):
            move()
    with pytest.raises(Refused, match="no vote"):
        ready().withdrawn(101.0)


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        (["differ"], State.READY),
        (["same"], State.SAME),
        (["empty"], State.EMPTY),
        (["both empty"], State.EMPTY),
        (["same", "same"], State.SAME),
        (["same", "differ"], State.READY),
        (["differ", "same"], State.READY),
        (["differ", "empty"], State.EMPTY),
        (["empty", "differ"], State.READY),
        (["empty", "same"], State.SAME),
    ],
)
def test_what_can_be_judged_is_a_conversation_that_differs_and_is_whole(kinds, state):
    battle = opened()
    for kind in kinds:
        battle = battle.asked(kind).answered(replies(kind), 1.0)
    assert battle.state is state
    assert view_of(battle).can_vote == (state is State.READY)


def test_an_empty_answer_leaves_the_conversation():
    battle = ready().asked("nothing?").answered(replies("empty"), 1.0).asked("something?")
    assert [turn.prompt for turn in battle.turns] == ["Hello?", "something?"]


def test_prompts_are_checked():
    for prompt, says in (("", "empty"), (" \n ", "empty"), ("x" * (CHARACTERS + 1), "4,001")):
        with pytest.raises(Refused, match=says):
            opened().asked(prompt)
    with pytest.raises(Refused, match="half a character"):
        opened().asked("\ud800")
    assert opened().asked(" x " + "y" * (CHARACTERS - 2)).turns[0].prompt[:2] == "x "
    with pytest.raises(Refused, match="Wait until both"):
        opened().asked("a").asked("b")


def test_a_conversation_has_fifty_turns():
    battle = opened()
    for _ in range(TURNS):
        battle = battle.asked("on").answered(replies(), 1.0)
    with pytest.raises(Refused, match="at most 50 turns"):
        battle.asked("on")
    assert battle.voted("tie", 2.0).winner == "tie"


def test_a_drawn_prompt_stays_drawn_until_the_voter_types():
    drawn = opened().asked("ours", drawn=True, anew=True).answered(replies(), 1.0)
    assert drawn.drawn
    assert drawn.asked("ours too", drawn=True).drawn
    assert not drawn.asked("mine").drawn
    mine = opened().asked("mine").answered(replies(), 1.0)
    assert not mine.asked("ours", drawn=True).drawn
    assert mine.asked("ours", drawn=True, anew=True).drawn


def test_each_side_hears_its_own_answers():
    battle = opened(conditions=Conditions(system="Be brief.")).asked("Hello?")
    battle = battle.answered(replies(), 1.0).asked("More?")
    said = [(m.role, m.content) for m in battle.messages(1)]
    assert said == [
        ("system", "Be brief."),
        ("user", "Hello?"),
        ("assistant", "other"),
        ("user", "More?"),
    ]


def test_the_vote_keeps_all_that_was_decided():
    battle = ready().asked("More?").answered(replies(tokens=5), 110.0)
    vote = vote_of(battle.voted("model_a", 117.5, flags=("leak",)))
    assert (vote.model_a, vote.model_b, vote.run_a, vote.run_b) == (
        *(A.name, B.name),
        *(A.run_id, B.run_id),
    )
    assert (vote.winner, vote.kind, vote.judge, vote.tstamp) == ("model_a", "human", "v0te4", 117.5)
    assert (vote.turn, vote.prompt, vote.anony, vote.flags) == (
        *(2, "Hello?\n\nMore?", True),
        ("leak",),
    )
    assert (vote.tokens_a, vote.tokens_b, vote.seed_a, vote.seed_b) == (12, 24, 3, 1)
    assert (vote.propensity, vote.latency_s, vote.address) == (0.25, 7.5, "addre55")
    assert [m["content"] for m in vote.conversation_b] == ["Hello?", "other", "More?", "other"]
    assert vote.settings["max_new"] == 256
    assert vote.settings["finish"] == ["end", "length"]
    assert vote.settings["packed"] == [True, False]


def test_a_tie_of_equal_answers_has_one_id_whichever_the_sides():
    same = opened().asked("Hello?").answered(replies("same"), 1.0)
    swapped = replace(same, battle_id="other", voter="else", sides=same.sides[::-1])
    first, second = identical_of(same, 2.0), identical_of(swapped, 3.0)
    assert first.battle_id == second.battle_id
    assert (first.kind, first.judge, first.winner, first.flags) == (
        *("auto", "identical", "tie"),
        ("identical",),
    )
    assert (first.address, first.latency_s) == ("", None)
    ids = {
        identical_id(*given_)
        for given_ in (
            (same.pair, ["Hello?"], Conditions()),
            (same.pair[::-1], ["Hello?"], Conditions()),
            (same.pair, ["Hello!"], Conditions()),
            (same.pair, ["Hello?", "More?"], Conditions()),
            (same.pair, ["Hello?"], Conditions(max_new=64)),
            (("x", "y"), ["Hello?"], Conditions()),
        )
    }
    assert len(ids) == 5


def states() -> list[Battle]:
    """A battle in every state."""
    voted = ready().voted("model_a", 105.0)
    answering = opened().asked("Hello?")
    return [
        *(opened(), answering, ready(), answering.broken(), ready().skipped()),
        *(answering.answered(replies("same"), 1.0), answering.answered(replies("empty"), 1.0)),
        *(answering.unanswered("Too long."), voted, voted.withdrawn(106.0)),
    ]


@pytest.mark.parametrize("battle", states(), ids=lambda b: str(b.state))
def test_a_view_tells_the_sides_only_after_the_vote(battle):
    view = view_of(battle, hint="Both", ratings={A.name: 987.0})
    told = json.dumps(view.data())
    secret = [A.name, B.name, A.run_id, B.run_id, A.recipe, "baseline", "gptq", "0.25", "v0te4"]
    secret += ["addre55", "aaaaaa", "bbbbbb", "987", '"seed', "token", "propensity", "packed"]
    if battle.winner:
        assert (view.a.model, view.a.rating, view.b.run_id) == (A.name, 987.0, B.run_id)
        assert view.b.rating is None
    else:
        assert [word for word in secret if word in told] == []
        assert (view.a, view.b, view.undo_until, view.counts) == (None, None, None, False)
    assert view.message.endswith((".", "?"))
    assert (view.hint != "") == (battle.state is State.ANSWERING)
    assert hash(view) == hash(view_of(battle, hint="Both", ratings={A.name: 987.0}))


def test_states_are_all_covered():
    assert {battle.state for battle in states()} == set(State)


def test_half_a_pair_of_answers_is_never_shown():
    answering = view_of(opened().asked("Hello?"))
    assert [(t.prompt, t.answer_a, t.answer_b) for t in answering.turns] == [("Hello?", "", "")]
    shown = view_of(ready())
    assert [(t.answer_a, t.answer_b) for t in shown.turns] == [("one", "other")]


def test_undo_is_offered_while_it_lasts_and_a_void_vote_counts_for_nothing():
    voted = ready().voted("model_a", 105.0)
    assert (view_of(voted).undo_until, view_of(voted).counts) == (115.0, True)
    assert not view_of(replace(voted, flags=("leak",))).counts
    void = view_of(voted.withdrawn(106.0))
    assert (void.undo_until, void.counts, void.winner) == (None, False, "model_a")


def test_choices_are_those_of_the_vote_log_and_no_key_has_two_meanings():
    assert CHOICES == WINNERS
    keys = [key for _, keys_ in KEYS for key in keys_]
    assert len(set(keys)) == len(keys) == 8
