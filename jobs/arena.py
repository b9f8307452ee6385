"""The blind arena: battles of two anonymous variants, drawn, asked, shown, voted on and withdrawn.

The rules of one battle are in jobs/battle.py. This is where battles live: in memory, at most
`Settings.kept` of them, the least recently touched forgotten first, so a page that was left open
for days finds its battle gone. A vote never depends on that: it is in the log of votes, on the
disk, before `vote` returns.

No method waits for an answer. Answers are written by the pool, and whoever looks at a battle next
(`view`, every third of a second while a page waits) moves it on.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from backend.dialogue import Message, Sampling
from jobs import draws
from jobs.battle import (
    Battle,
    BattleView,
    Conditions,
    Refused,
    Reply,
    Side,
    State,
    identical_of,
    view_of,
    vote_of,
)
from jobs.chat_types import AnswerView
from jobs.draws import Asked, Draw, Draws
from jobs.leaks import leak
from jobs.limits import Buckets, Limits
from jobs.plays import Answer, Play, Plays, Visitors
from jobs.recent import Recent
from jobs.standing import Standing, standing
from results_db.store import Store
from results_db.votes import Votes, hashed, home_key

log = logging.getLogger(__name__)

GONE = (
    "This battle is not known here any more; start a new one. If the page had said that your vote "
    "is counted, it is."
)
COUNTED = "Your vote on this battle is counted; start a new one."
AGAIN = "Your vote is already counted."
ELSEWHERE = "This battle has its vote; start a new one."
ANOTHER = "The last prompt told nothing, so another is tried. "
MARKS = {
    "leak": "Your vote is kept but does not count: the conversation says {word!r}, which may tell "
    "who answers.",
    "duplicate": "Your vote is kept but does not count: you voted on this pair and prompt before.",
}
PAIR_KEPT = 4  # redraws of a prompt, after which the pair is drawn again too
GRACE_S = 1.0  # after one side failed, for the other to fail for the same reason
WARNING = "The conversation says {word!r}, which may tell who answers: a vote will not count."


class Pool(Protocol):
    """What is used of the chat pool."""

    def warm(self, run_id: str) -> None: ...
    def state(self, run_id: str) -> Any: ...
    def generate(
        self,
        run_id: str,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        prefix: Sequence[int] = (),
    ) -> Any: ...


@dataclass(frozen=True)
class Settings:
    """What an arena is run with, beside the limits."""

    conditions: Conditions = field(default_factory=Conditions)
    epsilon: float = 0.1  # share of pairs that are drawn uniformly
    redraws: int = 8  # of a drawn prompt to which both answer alike
    ahead: int = 1  # battles per model that are drawn, and answered if warm, before anyone asks
    kept: int = 4000  # battles in memory
    visitors: int = 20_000  # whose seen prompts are in memory; older ones are read from the votes
    idle_s: float = 1800.0  # an open battle untouched for so long is not held against a visitor
    stale_s: float = 3.0  # counts of votes, runs and ratings may be so old


class Arena:
    """All battles of a home. Safe from any thread."""

    def __init__(
        self,
        home: Path,
        store: Store,
        votes: Votes,
        pool: Pool,
        limits: Limits,
        *,
        settings: Settings = Settings(),
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        prompts: Callable[[str], Sequence[Asked]] | None = None,
    ) -> None:
        """`prompts` gives the pool of a model; None: what comes along and the home's own."""
        self.settings = settings
        self._key = home_key(home)
        self._store, self._votes, self._pool = store, votes, pool
        self._clock = clock
        self.limits = limits
        self._buckets = Buckets(limits, clock)
        self._rng = rng or random.Random()
        self._draws = Draws(
            store,
            votes,
            conditions=settings.conditions,
            epsilon=settings.epsilon,
            stale_s=settings.stale_s,
            clock=clock,
            rng=self._rng,
            prompts=prompts or partial(draws.pool, home),
        )
        self._standing = Recent[Standing](settings.stale_s, clock)
        self._plays = Plays(settings.kept, clock)
        self._visitors = Visitors(store, settings.visitors)
        self._ahead_lock = threading.Lock()
        self._ahead: dict[str, deque[Draw]] = {}

    # What a page shows before a battle

    def why_not(self, model: str) -> str:
        """Why no battle of this model can start, and what to do; "" if one can."""
        return draws.why_not(model, self._draws.variants(model) if model else [])

    def categories(self, model: str) -> list[str]:
        """Kinds of prompts that `start` can be held to."""
        return sorted({asked.category for asked in self._draws.pool(model)} - {""})

    def languages(self, model: str) -> list[str]:
        """Languages of prompts that `start` can be held to."""
        return sorted({asked.language for asked in self._draws.pool(model)} - {""})

    def most_wanted(self, model: str) -> str:
        """What further votes would change, in one sentence that names nobody."""
        return self._stand(model).line()

    # Moves of a voter

    def start(
        self, session: str, address: str, model: str, *, category: str = "", language: str = ""
    ) -> BattleView:
        """Draw a pair for this visitor. Refused in one sentence if that cannot be."""
        if not session:
            raise Refused("A battle needs a session; allow this site's cookie.")
        missing = self.why_not(model)
        if missing:
            raise Refused(missing)
        voter, where = self._hash(session), self._hash(address)
        self._buckets.take("starts", voter, where)
        self._make_room(voter, where)
        draw = self._next(model)
        battle = Battle(
            battle_id=secrets.token_hex(8),
            voter=voter,
            address=where,
            model=model,
            sides=draw.sides,
            propensity=draw.propensity,
            conditions=self.settings.conditions,
        )
        prompt = draw.prompt if draw.prompt and draw.prompt.fits(category, language) else None
        play = Play(battle, prompt, category, language)
        self._plays.keep(play)
        self._warm(draw)
        return self._view(play)

    def ask(self, battle_id: str, session: str, prompt: str | None = None) -> BattleView:
        """Put a prompt to both sides; None draws one, in the place of what was asked so far."""
        play = self._find(battle_id, session)
        with play.lock:
            self._advance(play)
            if prompt is None:
                self._ask_drawn(play)
            else:
                self._ask_typed(play, prompt)
            self._advance(play)
        return self._look(play)

    def view(self, battle_id: str, session: str) -> BattleView:
        """The battle as its voter may see it now."""
        play = self._find(battle_id, session)
        with play.lock:
            self._advance(play)
        return self._look(play)

    def vote(self, battle_id: str, session: str, winner: str) -> BattleView:
        """Count a vote: on the disk when this returns. The same vote again changes nothing."""
        play = self._find(battle_id, session)
        with play.lock:
            self._advance(play)
            before = play.battle
            after = before.voted(winner, self._clock())
            if after is before:
                return self._view(play, AGAIN)
            self._buckets.take("votes", before.voter, before.address)
            play.battle = self._cast(play, after)
        return self._view(play)

    def retract(self, battle_id: str, session: str) -> BattleView:
        """Withdraw the vote, soon after it: the battle is void and has no second vote."""
        play = self._find(battle_id, session)
        with play.lock:
            now = self._clock()
            after = play.battle.withdrawn(now)
            if after is not play.battle:
                self._votes.retract(battle_id, now)
                play.battle = after
        return self._view(play)

    def skip(self, battle_id: str, session: str) -> BattleView:
        """Leave the battle undecided."""
        play = self._find(battle_id, session)
        with play.lock:
            play.battle = play.battle.skipped()
            play.stop()
        return self._view(play)

    # Work that no voter waits for

    def prepare(self, model: str) -> None:
        """Draw the next battles of a model; have them answered where both models are warm.

        Which pair comes next does not depend on what is warm: that would make the drawn pairs
        other than the probabilities kept with the votes say.
        """
        while not self.why_not(model):
            with self._ahead_lock:
                waiting = self._ahead.setdefault(model, deque())
                if len(waiting) >= self.settings.ahead:
                    return
            draw = self._draws.draw(model)
            try:
                draw = replace(draw, prompt=self._draws.prompt(model, draw.sides))
                self._answer_ahead(draw)
            except ValueError:
                pass  # whoever gets this draw is told
            with self._ahead_lock:
                waiting.append(draw)

    def record_ties(self, model: str) -> int:
        """Cast the automatic ties that mining found, each once for ever -> how many were new.

        Cheap where mining found nothing more since the last call.
        """
        return self._votes.cast_all(self._draws.mined_ties(model, self._clock()))

    # How moves are made

    def _ask_typed(self, play: Play, prompt: str) -> None:
        follows = bool(prompt) and prompt == play.suggestion()
        asked = play.battle.asked(prompt, drawn=follows)
        if not follows:
            self._buckets.take("prompts", asked.voter, asked.address)
        if len(asked.turns) == 1:  # a drawn prompt may have stood there before
            asked = replace(asked, category="", language="")
        play.redraws = 0
        self._begin(play, asked)

    def _ask_drawn(self, play: Play) -> None:
        play.battle.asked("", drawn=True, anew=True)  # raises if nothing can be asked now
        if play.battle.turns:
            self._buckets.take("starts", play.battle.voter, play.battle.address)
        play.redraws = self.settings.redraws
        first = play.prompt if not play.battle.turns else None
        if first is None or self._visitors.saw(play.battle.voter, first.turns[0]):
            first = self._drawn(play, play.battle.sides)
        self._begin_drawn(play, first)

    def _begin_drawn(self, play: Play, prompt: Asked) -> None:
        play.prompt = prompt
        battle = play.battle.asked(prompt.turns[0], drawn=True, anew=True)
        self._begin(play, replace(battle, category=prompt.category, language=prompt.language))

    def _begin(self, play: Play, battle: Battle) -> None:
        """Have the last turn answered on both sides."""
        self._visitors.show(battle.voter, battle.turns[0].prompt)
        play.battle, play.word, play.failed_at, play.answers = battle, "", 0.0, []
        errors = []
        for at, side in enumerate(battle.sides):
            try:
                play.answers.append(self._generate(side, battle.messages(at)))
            except ValueError as error:
                errors.append(str(error))
        if errors:
            self._fail(play, errors)

    def _generate(self, side: Side, messages: Sequence[Message]) -> Answer:
        c = self.settings.conditions
        sampling = Sampling(c.temperature, c.top_p, c.max_new, side.seed)
        answer: Answer = self._pool.generate(side.variant.run_id, messages, sampling)
        return answer

    def _advance(self, play: Play) -> None:
        """Take in answers that are complete. Under the battle's lock."""
        while play.battle.state is State.ANSWERING:
            views = [answer.view() for answer in play.answers]
            failed = [view for view in views if view.state in ("failed", "stopped")]
            play.failed_at = play.failed_at or (self._clock() if failed else 0.0)
            if len(failed) == 2 or (failed and self._clock() >= play.failed_at + GRACE_S):
                self._fail(play, [view.error for view in failed])
            if not all(view.state == "done" for view in views):
                return
            a, b = map(reply_of, views)
            play.battle, play.answers = play.battle.answered((a, b), self._clock()), []
            if play.battle.state is State.SAME:
                self._record_tie(play.battle)
            if play.battle.state is State.READY:
                play.word = leak(play.battle.texts)
            elif play.battle.drawn and play.redraws:
                self._redraw(play)

    def _fail(self, play: Play, errors: Sequence[str]) -> None:
        """Both failed alike: the prompt is at fault. Else a side is, and is not told which."""
        play.stop()
        names = [n for s in play.battle.sides for n in (s.variant.name, s.variant.run_id)]
        alike = len(errors) == 2 and errors[0] == errors[1] != "" and not leak(errors[:1])
        if alike and not any(name in errors[0] for name in names):
            play.battle = play.battle.unanswered(sentence(errors[0]))
        else:
            play.battle = play.battle.broken()

    def _record_tie(self, battle: Battle) -> None:
        """Cast the tie of two equal answers; the voter goes on even where that cannot be."""
        try:
            self._votes.cast(identical_of(battle, self._clock()))
        except ValueError:
            log.exception("an automatic tie was not recorded")

    def _redraw(self, play: Play) -> None:
        """Another prompt in the place of one that told nothing."""
        play.redraws -= 1
        sides, propensity = play.battle.sides, play.battle.propensity
        if (self.settings.redraws - play.redraws) % PAIR_KEPT == 0:  # whom nobody has seen yet
            draw = self._draws.draw(play.battle.model)
            self._warm(draw)
            sides, propensity = draw.sides, draw.propensity
        try:
            prompt = self._drawn(play, sides)
        except Refused:
            return
        play.battle = replace(play.battle, sides=sides, propensity=propensity)
        self._begin_drawn(play, prompt)

    def _drawn(self, play: Play, sides: tuple[Side, Side]) -> Asked:
        """A prompt that is new to the voter, or at least not judged yet with this pair."""
        voter, pair = play.battle.voter, (sides[0].variant.name, sides[1].variant.name)
        now = {turn.prompt for turn in play.battle.turns}
        return self._draws.prompt(
            play.battle.model,
            sides,
            category=play.category,
            language=play.language,
            avoid=(
                lambda text: text in now or self._visitors.saw(voter, text),
                lambda text: text in now or self._visitors.judged(voter, pair, text),
            ),
        )

    def _cast(self, play: Play, battle: Battle) -> Battle:
        """Put a vote into the log -> the battle with the flags that it got."""
        what = (battle.voter, battle.pair, battle.turns[0].prompt)
        first = self._visitors.judge(*what)
        told = {"leak": bool(play.word), "duplicate": not first}
        flagged = replace(battle, flags=tuple(name for name, is_so in told.items() if is_so))
        try:
            if not self._votes.cast(vote_of(flagged)):
                raise Refused(ELSEWHERE)
        except BaseException:
            if first:
                self._visitors.take_back(*what)
            raise
        return flagged

    # What is kept

    def _find(self, battle_id: str, session: str) -> Play:
        """A visitor's own battle. Refused if it is another's or is not known."""
        voter = self._hash(session)
        play = self._plays.find(battle_id, voter)
        if play is None:
            raise Refused(COUNTED if self._logged(battle_id, voter) else GONE)
        return play

    def _logged(self, battle_id: str, voter: str) -> bool:
        """True if the log has this voter's vote on a battle that memory has lost."""
        sql = "SELECT 1 FROM votes WHERE battle_id = $battle_id AND judge = $voter"
        return len(self._store.frame(sql, battle_id=battle_id, voter=voter)) > 0

    def _make_room(self, voter: str, address: str) -> None:
        """Skip the visitor's oldest open battle, or refuse an address that has too many."""
        limits = self._buckets.limits
        undecided = self._plays.undecided(self._clock() - self.settings.idle_s)
        own = [play for play in undecided if play.battle.voter == voter]
        surplus = own[: max(0, len(own) + 1 - limits.battles)] if limits.battles else []
        for play in surplus:
            play.skip()
        there = sum(play.battle.address == address for play in undecided) - len(surplus)
        if limits.address_battles and there >= limits.address_battles:
            raise Refused(
                f"{there} battles are open at this address, as many as it may have; finish or "
                "skip some."
            )

    def _next(self, model: str) -> Draw:
        """The draw that was made ahead, if its runs are still there, else a new one."""
        with self._ahead_lock:
            waiting = self._ahead.get(model)
            draw = waiting.popleft() if waiting else None
        known = {variant.name for variant in self._draws.variants(model)}
        if draw and all(side.variant.name in known for side in draw.sides):
            return draw
        return self._draws.draw(model)

    def _warm(self, draw: Draw) -> None:
        """Begin to load both. What stands in the way is told, without a name, by the answers."""
        for side in draw.sides:
            with suppress(ValueError):
                self._pool.warm(side.variant.run_id)

    def _answer_ahead(self, draw: Draw) -> None:
        if draw.prompt and all(
            self._pool.state(side.variant.run_id).state == "ready" for side in draw.sides
        ):
            said = Message("user", draw.prompt.turns[0])
            system = self.settings.conditions.system
            messages = [*([Message("system", system)] if system else []), said]
            for side in draw.sides:
                self._generate(side, messages)

    # What is shown

    def _look(self, play: Play) -> BattleView:
        """The view; while the voter reads, the next battle is made ready."""
        view = self._view(play)
        if view.can_vote:
            self.prepare(play.battle.model)
        return view

    def _view(self, play: Play, message: str = "") -> BattleView:
        battle = play.battle
        ratings = self._stand(battle.model).ratings if battle.winner else {}
        return view_of(
            battle,
            message=message or said_of(battle, play.word),
            hint=self._hint(play) if battle.state is State.ANSWERING else "",
            suggestion=play.suggestion(),
            ratings=ratings,
        )

    def _hint(self, play: Play) -> str:
        """How far the answers are, of both together."""
        views = [answer.view() for answer in play.answers]
        redrawn = play.battle.drawn and play.redraws < self.settings.redraws
        before = max((view.position for view in views if not view.ended), default=0)
        if any(view.state == "loading" for view in views):
            now = "The models are being loaded."
        elif before:
            now = f"Waiting: {before} other answer{'s' if before > 1 else ''} first."
        else:
            now = "Both answers are being written."
        return (ANOTHER if redrawn else "") + now

    def _stand(self, model: str) -> Standing:
        return self._standing.get(
            model, lambda: standing(self._votes, model, self._draws.variants(model))
        )

    def _hash(self, text: str) -> str:
        return hashed(self._key, text)


def said_of(battle: Battle, word: str) -> str:
    """A sentence about what the conversation holds; "" leaves it to the battle's state."""
    if battle.state is State.READY and word:
        return WARNING.format(word=word)
    if battle.state is State.VOTED and battle.flags:
        return MARKS[battle.flags[0]].format(word=word)
    return ""


def reply_of(view: AnswerView) -> Reply:
    """A complete answer, as battles keep it."""
    return Reply(view.text, view.new_tokens, view.finish, view.dropped, view.packed, view.dtype)


def sentence(error: str) -> str:
    """An error as a sentence of its own."""
    text = " ".join(error.split()).rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."
