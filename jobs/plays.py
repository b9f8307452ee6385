"""What the arena keeps in memory: battles in play, and what their voters have seen. Bounded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from backend.registry import short_hash
from jobs.battle import Battle, Refused
from jobs.chat_types import AnswerView
from jobs.draws import Asked
from results_db.store import Store

NOT_YOURS = "This battle belongs to another visitor; start one of your own."
# The first prompt of every vote of one voter.
HISTORY = """
    SELECT model_a, model_b, coalesce(CASE conversation_a->>'$[0].role'
        WHEN 'system' THEN conversation_a->>'$[1].content' ELSE conversation_a->>'$[0].content'
    END, prompt) FROM votes WHERE judge = $voter AND kind = 'human'
"""


class Answer(Protocol):
    """What is used of an answer under way."""

    def view(self) -> AnswerView: ...
    def stop(self) -> None: ...


class Play:
    """One battle in memory: its value, and the answers that are being written."""

    def __init__(self, battle: Battle, prompt: Asked | None, category: str, language: str) -> None:
        self.lock = threading.Lock()  # one move at a time
        self.battle = battle
        self.prompt = prompt  # drawn: to be asked first, or the one that is asked
        self.category, self.language = category, language  # that prompts are drawn from
        self.answers: list[Answer] = []  # of the turn that is being answered
        self.failed_at = 0.0  # when one of them did
        self.redraws = 0  # still allowed
        self.word = ""  # that tells who answers
        self.touched = 0.0

    def stop(self) -> None:
        """No more tokens for this battle."""
        for answer in self.answers:
            answer.stop()

    def skip(self) -> None:
        """End it, if it is still undecided."""
        with self.lock:
            if self.battle.undecided:
                self.battle = self.battle.skipped()
                self.stop()

    def suggestion(self) -> str:
        """What the drawn prompt goes on with; "" at its end, or where the voter typed."""
        at = len(self.battle.turns)
        turns = self.prompt.turns if self.prompt and self.battle.drawn else ()
        return turns[at] if at < len(turns) else ""


class Plays:
    """The battles that are known, at most `kept`: the least recently touched go first."""

    def __init__(self, kept: int, clock: Callable[[], float]) -> None:
        self._kept = kept
        self._clock = clock
        self._lock = threading.Lock()
        self._plays: OrderedDict[str, Play] = OrderedDict()

    def __len__(self) -> int:
        return len(self._plays)

    def keep(self, play: Play) -> None:
        """Know a new battle; forget the oldest ones beyond `kept`."""
        gone = []
        with self._lock:
            play.touched = self._clock()
            self._plays[play.battle.battle_id] = play
            while len(self._plays) > self._kept:
                gone.append(self._plays.popitem(last=False)[1])
        for old in gone:
            old.stop()

    def find(self, battle_id: str, voter: str) -> Play | None:
        """A voter's own battle, None if it is not known. Refused if it is another's."""
        with self._lock:
            play = self._plays.get(battle_id)
            if play is None:
                return None
            if play.battle.voter != voter:
                raise Refused(NOT_YOURS)
            self._plays.move_to_end(battle_id)
            play.touched = self._clock()
            return play

    def undecided(self, since: float) -> list[Play]:
        """Battles that can come to a vote and were touched since then, the oldest first."""
        with self._lock:
            plays = list(self._plays.values())
        return [play for play in plays if play.battle.undecided and play.touched >= since]


@dataclass
class Seen:
    """Hashes of the first prompts that a voter was shown, and of those judged, with their pair.

    The first prompt alone: its answers, once seen with their names, give the sides away.
    """

    prompts: set[str] = field(default_factory=set)
    judged: set[str] = field(default_factory=set)


class Visitors:
    """What each voter has seen. Of voters that memory has lost, the votes tell."""

    def __init__(self, store: Store, kept: int) -> None:
        self._store = store
        self._kept = kept
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, Seen] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def show(self, voter: str, prompt: str) -> None:
        """The voter sees this prompt."""
        seen = self._of(voter)
        with self._lock:
            seen.prompts.add(short_hash(prompt))

    def saw(self, voter: str, prompt: str) -> bool:
        """True if the voter was shown this prompt."""
        return short_hash(prompt) in self._of(voter).prompts

    def judged(self, voter: str, pair: tuple[str, str], prompt: str) -> bool:
        """True if the voter has voted on this pair and prompt, withdrawn votes included."""
        return _key(pair, prompt) in self._of(voter).judged

    def judge(self, voter: str, pair: tuple[str, str], prompt: str) -> bool:
        """The voter votes on this pair and prompt -> whether that is the first time."""
        seen, key = self._of(voter), _key(pair, prompt)
        with self._lock:
            first = key not in seen.judged
            seen.judged.add(key)
        return first

    def take_back(self, voter: str, pair: tuple[str, str], prompt: str) -> None:
        """That vote could not be written."""
        seen = self._of(voter)
        with self._lock:
            seen.judged.discard(_key(pair, prompt))

    def _of(self, voter: str) -> Seen:
        with self._lock:
            known = self._seen.get(voter)
            if known:
                self._seen.move_to_end(voter)
                return known
        found = Seen()
        for one, other, prompt in self._store.frame(HISTORY, voter=voter).itertuples(index=False):
            found.prompts.add(short_hash(prompt))
            found.judged.add(_key((one, other), prompt))
        with self._lock:
            known = self._seen.setdefault(voter, found)
            while len(self._seen) > self._kept:
                self._seen.popitem(last=False)
        return known


def _key(pair: tuple[str, str], prompt: str) -> str:
    return short_hash([sorted(pair), prompt])
