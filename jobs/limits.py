"""How often a visitor may do what: token buckets per session and per address.

A bucket of 60 per minute holds 60 at first and gains one a second: so many at once, and over any
time t at most 60 + t. Buckets live in memory, the least recently used are forgotten beyond
`KEPT`, and a forgotten one begins full.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

from jobs.battle import Refused

SPANS_S = {"s": 1.0, "min": 60.0, "hour": 3600.0, "day": 86400.0}
KEPT = 50_000  # buckets
SLACK = 1e-6  # unix seconds in a float are good to 2e-7
RATE = re.compile(r"(\d+)/(s|min|hour|day)")


class TooMany(Refused):
    """Refused for now: possible again in `wait_s` seconds."""

    def __init__(self, text: str, wait_s: float) -> None:
        super().__init__(text)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Rate:
    """At most `count` at once, and as many again in every `seconds`."""

    count: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.count}/{next(name for name, s in SPANS_S.items() if s == self.seconds)}"


Rates = tuple[Rate, ...]


def rates(text: str) -> Rates:
    """`60/min+600/hour` -> two rates; `none` -> no limit. ValueError in one sentence."""
    if text == "none":
        return ()
    found = [RATE.fullmatch(part) for part in text.split("+")]
    if not all(found):
        raise ValueError(
            f"limit {text!r}: write a count and a time, such as 60/min or 60/min+600/hour "
            f"(times: {', '.join(SPANS_S)}), or none"
        )
    return tuple(Rate(int(match[1]), SPANS_S[match[2]]) for match in found if match)


@dataclass(frozen=True)
class Limits:
    """Per session, and per network address for all its sessions together; () or 0 is no limit.

    The defaults suit one machine with its own user. A class of 40 behind one address needs the
    `address_` limits at 40 times what one of them does.
    """

    votes: Rates = field(default=rates("60/min+1000/hour+10000/day"))
    starts: Rates = field(default=rates("60/min+2000/hour"))
    prompts: Rates = field(default=rates("30/min+600/hour"))  # typed ones, each answered twice
    battles: int = 8  # open at once: beyond it, a session's oldest one is skipped
    address_votes: Rates = field(default=rates("3000/min+60000/hour"))
    address_starts: Rates = field(default=rates("3000/min+60000/hour"))
    address_prompts: Rates = field(default=rates("600/min+10000/hour"))
    address_battles: int = 1000  # open at once: beyond it, none can be started

    @classmethod
    def from_text(cls, text: str, base: Limits | None = None) -> Limits:
        """`votes=60/min+600/hour,battles=4` -> `base`, or the defaults, with those in place."""
        names = [f.name for f in fields(cls)]
        given: dict[str, Rates | int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = (word.strip() for word in part.partition("="))
            if name not in names:
                raise ValueError(f"unknown limit {name!r}; there are {', '.join(names)}")
            given[name] = _count(name, value) if name.endswith("battles") else rates(value)
        return replace(base or cls(), **given)  # type: ignore[arg-type]


def _count(name: str, value: str) -> int:
    if value == "none":
        return 0
    if not value.isdecimal():
        raise ValueError(f"limit {name}={value}: write a whole number, or none")
    return int(value)


# For a server that others can reach: what a fast reader does, and a small group per address.
PUBLIC = Limits.from_text(
    "votes=20/min+300/hour+1000/day,starts=30/min+400/hour,prompts=10/min+150/hour,battles=4,"
    "address_votes=60/min+1200/hour+5000/day,address_starts=90/min+1600/hour,"
    "address_prompts=30/min+600/hour,address_battles=40"
)

WORDS = {"votes": "votes", "starts": "new battles", "prompts": "typed prompts"}


class Buckets:
    """What is left of the limits, for every session and address. Safe from any thread."""

    def __init__(self, limits: Limits, clock: Callable[[], float], kept: int = KEPT) -> None:
        self.limits = limits
        self._clock = clock
        self._kept = kept
        self._lock = threading.Lock()
        self._levels: OrderedDict[tuple, tuple[float, float]] = OrderedDict()  # key -> level, time

    def take(self, action: str, session: str, address: str) -> None:
        """Count one `votes`, `starts` or `prompts`; TooMany, and nothing counted, over a limit."""
        now = self._clock()
        with self._lock:
            keyed = list(self._keys(action, session, address))
            levels = {key: self._level(key, rate, now) for key, rate in keyed}
            waits = [
                (rate.seconds / rate.count * (1 - levels[key]) if rate.count else rate.seconds, key)
                for key, rate in keyed
                if levels[key] < 1 - SLACK
            ]
            if waits:
                raise _too_many(action, *max(waits))
            for key, level in levels.items():
                self._levels[key] = (level - 1, now)
                self._levels.move_to_end(key)
            while len(self._levels) > self._kept:
                self._levels.popitem(last=False)

    def _keys(self, action: str, session: str, address: str) -> Iterator[tuple[tuple, Rate]]:
        for name, who in ((action, session), (f"address_{action}", address)):
            for rate in getattr(self.limits, name):
                yield (name, who, rate), rate

    def _level(self, key: tuple, rate: Rate, now: float) -> float:
        level, at = self._levels.get(key, (float(rate.count), now))
        return min(rate.count, level + max(0.0, now - at) * rate.count / rate.seconds)


def _too_many(action: str, wait_s: float, key: tuple) -> TooMany:
    name, _, rate = key
    who = "from this address" if name.startswith("address_") else "for one visitor"
    return TooMany(
        f"{rate} is the limit of {WORDS[action]} {who}; go on in {max(1, round(wait_s))} s",
        wait_s,
    )
