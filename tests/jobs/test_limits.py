"""Token buckets against their definition, and limits as text."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.limits import PUBLIC, Buckets, Limits, Rate, TooMany, rates


class Clock:
    """A clock that a test moves."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def limits(text: str) -> Limits:
    """Nothing limited but what `text` says."""
    nothing = ",".join(f"{name}=none" for name in Limits.__dataclass_fields__)
    return Limits.from_text(text, Limits.from_text(nothing))


def taken(buckets: Buckets, session: str = "s", address: str = "a", action: str = "votes") -> bool:
    try:
        buckets.take(action, session, address)
    except TooMany:
        return False
    return True


def test_a_burst_of_the_whole_count_then_one_per_share_of_the_time():
    clock = Clock()
    buckets = Buckets(limits("votes=6/min"), clock)
    assert [taken(buckets) for _ in range(8)] == [True] * 6 + [False] * 2
    clock.now += 9.9
    assert not taken(buckets)
    clock.now += 0.1
    assert [taken(buckets), taken(buckets)] == [True, False]
    clock.now += 3600
    assert [taken(buckets) for _ in range(7)] == [True] * 6 + [False]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 120), max_size=60), st.integers(1, 5), st.integers(1, 20))
def test_no_stretch_of_time_holds_more_than_the_bucket_and_its_gain(waits, count, more):
    """At most count + t * count / 60 in any t seconds, and none refused without need."""
    clock = Clock(0.0)
    buckets = Buckets(limits(f"votes={count}/min+{more}/hour"), clock)
    when: list[float] = []
    for wait in waits:
        clock.now += wait / 4
        allowed = taken(buckets)
        over = [
            len([t for t in when if t >= start]) + 1 > n + (clock.now - start) * n / s + 1e-6
            for n, s in ((count, 60), (more, 3600))
            for start in [*when, clock.now]
        ]
        assert allowed == (not any(over))
        if allowed:
            when.append(clock.now)


def test_the_refusal_says_the_limit_and_when_to_go_on():
    clock = Clock()
    buckets = Buckets(limits("votes=100/min+2/hour"), clock)
    assert taken(buckets)
    assert taken(buckets)
    with pytest.raises(TooMany, match=r"2/hour is the limit of votes for one visitor.* 1800 s"):
        buckets.take("votes", "s", "a")
    clock.now += 1800
    assert taken(buckets)


def test_sessions_and_actions_apart_and_an_address_together():
    buckets = Buckets(limits("votes=2/min,address_votes=3/min,starts=1/min"), Clock())
    assert [taken(buckets, "first") for _ in range(3)] == [True, True, False]
    assert [taken(buckets, "second") for _ in range(2)] == [True, False]
    assert taken(buckets, "second", "other address")
    assert taken(buckets, "second", action="starts")
    with pytest.raises(TooMany, match="from this address"):
        buckets.take("votes", "third", "a")


def test_what_is_refused_is_not_counted_anywhere():
    clock = Clock()
    buckets = Buckets(limits("votes=1/min,address_votes=2/min"), clock)
    assert taken(buckets, "first")
    assert not any(taken(buckets, "first") for _ in range(50))
    assert taken(buckets, "second")


def test_a_class_of_forty_behind_one_address_when_configured():
    """Forty who vote every ten seconds for ten minutes: refused by PUBLIC, not by its own limits"""
    text = "address_votes=400/min+20000/hour"
    for given_limits, served in ((Limits.from_text(text, PUBLIC), True), (PUBLIC, False)):
        clock = Clock()
        buckets = Buckets(given_limits, clock)
        votes = []
        for _ in range(60):
            votes += [taken(buckets, f"pupil {n}") for n in range(40)]
            clock.now += 10
        assert all(votes) == served


def test_a_clock_set_back_neither_gives_nor_takes():
    clock = Clock()
    buckets = Buckets(limits("votes=2/min"), clock)
    assert taken(buckets)
    clock.now -= 3600
    assert [taken(buckets), taken(buckets)] == [True, False]


def test_memory_is_bounded_and_the_least_recent_begin_anew():
    buckets = Buckets(limits("votes=1/day"), Clock(), kept=10)
    for n in range(1000):
        assert taken(buckets, f"s{n}")
    assert len(buckets._levels) == 10
    assert not taken(buckets, "s999")
    assert taken(buckets, "s0")


def test_threads_together_get_no_more_than_one_would():
    buckets = Buckets(limits("votes=100/day"), Clock())
    got: list[bool] = []
    threads = [
        threading.Thread(target=lambda: got.extend(taken(buckets) for _ in range(50)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), sum(got)) == (400, 100)


def test_limits_as_text():
    made = Limits.from_text("votes=60/min+7/day, battles=3,address_starts=none,prompts=1/s")
    assert made.votes == (Rate(60, 60.0), Rate(7, 86400.0))
    assert (made.battles, made.address_starts, made.prompts) == (3, (), (Rate(1, 1.0),))
    assert made.starts == Limits().starts
    assert Limits.from_text("") == Limits()
    assert "+".join(map(str, made.votes)) == "60/min+7/day"
    assert rates("none") == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vote=60/min", "unknown limit 'vote'; there are votes, starts"),
        ("votes=60", "write a count and a time, such as 60/min"),
        ("votes=60/week", "times: s, min, hour, day"),
        ("votes", "write a count"),
        ("battles=1/min", "write a whole number"),
        ("battles=-1", "write a whole number"),
    ],
)
def test_a_wrong_limit_is_refused_in_one_sentence(text, says):
    with pytest.raises(ValueError, match=says):
        Limits.from_text(text)


def test_a_limit_of_nothing_refuses_everything():
    assert not taken(Buckets(limits("votes=0/min"), Clock()))
