"""The rules of one battle, as values: every move gives a new battle, or Refused in one sentence.

    open -> answering -> ready -> voted -> void
            answering -> same, empty: nothing to judge, another prompt may be asked
            answering -> broken: an answer failed, the battle is over
    any of them before the vote -> skipped

Nothing here knows a model, a clock or a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from backend.dialogue import Message, encodable
from backend.registry import short_hash
from results_db.vote import Vote

UNDO_S = 10.0  # a vote may be withdrawn for so long
TURNS = 50  # of one conversation
CHARACTERS = 4000  # of one typed prompt
IDENTICAL = "identical"  # judge and flag of ties between equal answers

# Winner, as votes have it, with the keys that choose it.
KEYS = (
    ("model_a", ("ArrowLeft", "1")),
    ("model_b", ("ArrowRight", "2")),
    ("tie", ("ArrowDown", "3")),
    ("tie (bothbad)", ("ArrowUp", "4")),
)
CHOICES = tuple(winner for winner, _ in KEYS)


class Refused(ValueError):
    """A move that the rules do not allow; the text is one sentence for the voter."""


class State(StrEnum):
    """Where a battle stands."""

    OPEN = "open"  # waits for its first prompt
    ANSWERING = "answering"
    READY = "ready"  # both answers are complete: waits for the vote, or for another prompt
    SAME = "same"  # the conversations do not differ: waits for another prompt
    EMPTY = "empty"  # an answer has no text, or there is none: waits for another prompt
    BROKEN = "broken"
    SKIPPED = "skipped"
    VOTED = "voted"
    VOID = "void"  # its vote was withdrawn


ASKABLE = frozenset({State.OPEN, State.READY, State.SAME, State.EMPTY})
UNDECIDED = ASKABLE | {State.ANSWERING}  # it goes on if the voter wants

SAYS: dict[State, str] = {
    State.OPEN: "Type a prompt, or draw one.",
    State.ANSWERING: "Both answers appear together when both are complete.",
    State.READY: "Which answer is better?",
    State.SAME: "Both gave the same answer, a tie without your vote; ask something else.",
    State.EMPTY: "An answer is empty, so there is nothing to judge; ask something else.",
    State.BROKEN: "A model stopped while it answered, so this battle is over; start a new one. "
    "Every vote that was counted is kept.",
    State.SKIPPED: "This battle was skipped; start a new one.",
    State.VOTED: "Your vote is counted.",
    State.VOID: "Your vote was withdrawn and this battle is over; start a new one.",
}
NO_PROMPT = {
    State.ANSWERING: "Wait until both answers are complete.",
    State.VOTED: "This battle has its vote; start a new one.",
}
NOT_YET = "A vote needs two complete answers that differ."


@dataclass(frozen=True)
class Variant:
    """What one finished run made, as something to chat with."""

    name: str  # id in votes and ratings
    run_id: str
    recipe: str
    artifact_id: str = ""
    is_baseline: bool = False


@dataclass(frozen=True)
class Side:
    """One side of a battle."""

    variant: Variant
    seed: int


@dataclass(frozen=True)
class Conditions:
    """What both sides answer under, and what the vote records of it."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new: int = 256  # tokens of an answer
    system: str = ""


@dataclass(frozen=True)
class Reply:
    """One complete answer, and what the vote records of how it came about."""

    text: str
    tokens: int = 0
    finish: str = ""  # end | length | context
    dropped: int = 0  # oldest turns that the context had no room for
    packed: bool | None = None
    dtype: str = ""


@dataclass(frozen=True)
class Turn:
    """One prompt and, once both are complete, its two answers."""

    prompt: str
    replies: tuple[Reply, Reply] | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """Both texts, or none: nobody sees one side alone."""
        return tuple(reply.text for reply in self.replies or ())

    @property
    def same(self) -> bool:
        """True if a reader sees no difference: space around an answer is not shown."""
        return len({answer.strip() for answer in self.answers}) == 1

    @property
    def empty(self) -> bool:
        """True if one of the answers has no text."""
        return not all(answer.strip() for answer in self.answers)


@dataclass(frozen=True)
class Battle:
    """One battle as of its last move. Times are unix seconds."""

    battle_id: str
    voter: str  # hash of the session
    address: str  # hash
    model: str
    sides: tuple[Side, Side]  # A, B
    propensity: float | None  # with which this pair was drawn
    conditions: Conditions = Conditions()
    category: str = ""
    language: str = ""
    state: State = State.OPEN
    turns: tuple[Turn, ...] = ()
    drawn: bool = False  # every prompt in it is ours, not the voter's
    reason: str = ""  # why neither side could answer
    ready_at: float = 0.0
    winner: str = ""
    voted_at: float = 0.0
    flags: tuple[str, ...] = ()  # why the vote does not count

    def asked(self, prompt: str, *, drawn: bool = False, anew: bool = False) -> Battle:
        """The next turn begins, or with `anew` the first. `drawn`: it is our prompt."""
        if self.state not in ASKABLE:
            raise Refused(NO_PROMPT.get(self.state, SAYS[self.state]))
        turns = self.turns[:-1] if self.state is State.EMPTY else self.turns
        turns = () if anew else turns
        if len(turns) >= TURNS:
            raise Refused(f"A conversation has at most {TURNS} turns; vote or start a new battle.")
        drawn = drawn and (self.drawn or not turns)
        turns = (*turns, Turn(prompt if drawn else checked(prompt)))
        return replace(self, state=State.ANSWERING, turns=turns, drawn=drawn, reason="")

    def answered(self, replies: tuple[Reply, Reply], now: float) -> Battle:
        """Both answers of the turn are complete."""
        self._only(State.ANSWERING)
        turns = (*self.turns[:-1], replace(self.turns[-1], replies=replies))
        state = State.READY
        if turns[-1].empty:
            state = State.EMPTY
        elif all(turn.same for turn in turns):
            state = State.SAME
        return replace(self, state=state, turns=turns, ready_at=now)

    def unanswered(self, reason: str) -> Battle:
        """Neither side can answer this prompt, for one and the same reason."""
        self._only(State.ANSWERING)
        return replace(self, state=State.EMPTY, reason=reason)

    def broken(self) -> Battle:
        """An answer failed."""
        self._only(State.ANSWERING)
        return replace(self, state=State.BROKEN)

    def voted(self, winner: str, now: float, flags: tuple[str, ...] = ()) -> Battle:
        """The vote. The same vote again changes nothing, another one is refused."""
        if winner not in CHOICES:
            raise Refused(f"there is no choice {winner!r}; there are {', '.join(CHOICES)}")
        if self.state is State.VOTED and winner == self.winner:
            return self
        if self.state is State.VOTED:
            raise Refused("This battle has its vote, and the names are known; start a new one.")
        if self.state is not State.READY:
            raise Refused(NOT_YET if self.state in UNDECIDED else SAYS[self.state])
        return replace(self, state=State.VOTED, winner=winner, voted_at=now, flags=flags)

    def withdrawn(self, now: float) -> Battle:
        """The vote is taken back, within `UNDO_S`; there is no second one."""
        if self.state is State.VOID:
            return self
        if self.state is not State.VOTED:
            raise Refused("This battle has no vote to withdraw.")
        if now > self.voted_at + UNDO_S:
            raise Refused(f"A vote can be withdrawn for {UNDO_S:.0f} s, and they are over.")
        return replace(self, state=State.VOID)

    def skipped(self) -> Battle:
        """The voter leaves it undecided."""
        if self.state in (State.VOTED, State.VOID):
            raise Refused("This battle has its vote; start a new one.")
        return replace(self, state=State.SKIPPED)

    def _only(self, state: State) -> None:
        if self.state is not state:
            raise Refused(f"this battle is {self.state}, not {state}")

    @property
    def undecided(self) -> bool:
        """True while it can come to a vote."""
        return self.state in UNDECIDED

    @property
    def prompt(self) -> str:
        """Everything that was asked."""
        return "\n\n".join(turn.prompt for turn in self.turns)

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that was said, by anybody."""
        return tuple(text for turn in self.turns for text in (turn.prompt, *turn.answers))

    @property
    def pair(self) -> tuple[str, str]:
        """Names of the variants, whichever side they are on."""
        first, second = sorted(side.variant.name for side in self.sides)
        return first, second

    def replies(self, side: int) -> tuple[Reply, ...]:
        """The complete answers of one side."""
        return tuple(turn.replies[side] for turn in self.turns if turn.replies)

    def messages(self, side: int) -> tuple[Message, ...]:
        """What was said on one side so far."""
        system = self.conditions.system
        said = [Message("system", system)] if system else []
        for turn in self.turns:
            said.append(Message("user", turn.prompt))
            if turn.replies is not None:
                said.append(Message("assistant", turn.replies[side].text))
        return tuple(said)


def checked(prompt: str) -> str:
    """The prompt without space around it; Refused if nothing is left or it is too long."""
    text = prompt.strip()
    if not encodable(text):
        raise Refused("The prompt holds half a character; type it again.")
    if not text:
        raise Refused("The prompt is empty; type something, or draw one.")
    if len(text) > CHARACTERS:
        raise Refused(
            f"The prompt has {len(text):,} characters; at most {CHARACTERS:,} are allowed."
        )
    return text


def _facts(battle: Battle) -> dict[str, list[Any]]:
    """How the last answers came about: [A, B] of each fact."""
    last = [battle.replies(side)[-1] for side in (0, 1)]
    names = ("finish", "dropped", "packed", "dtype")
    return {name: [getattr(reply, name) for reply in last] for name in names}


def vote_of(battle: Battle, **changes: Any) -> Vote:
    """A battle that has its winner -> what the vote log keeps of it."""
    a, b = battle.sides
    vote = Vote(
        battle_id=battle.battle_id,
        model=battle.model,
        model_a=a.variant.name,
        model_b=b.variant.name,
        winner=battle.winner,
        kind="human",
        judge=battle.voter,
        tstamp=battle.voted_at,
        turn=len(battle.turns),
        language=battle.language,
        category=battle.category,
        prompt=battle.prompt,
        conversation_a=[message.data() for message in battle.messages(0)],
        conversation_b=[message.data() for message in battle.messages(1)],
        tokens_a=sum(reply.tokens for reply in battle.replies(0)),
        tokens_b=sum(reply.tokens for reply in battle.replies(1)),
        run_a=a.variant.run_id,
        run_b=b.variant.run_id,
        seed_a=a.seed,
        seed_b=b.seed,
        settings=asdict(battle.conditions) | {"drawn": battle.drawn} | _facts(battle),
        propensity=battle.propensity,
        address=battle.address,
        latency_s=max(0.0, battle.voted_at - battle.ready_at),
        flags=battle.flags,
    )
    return replace(vote, **changes)


def identical_of(battle: Battle, now: float) -> Vote:
    """A battle whose answers are the same -> the tie that needs no voter.

    Its id is made of pair, prompts and conditions, so the log takes it once, whoever asks.
    """
    asked = [turn.prompt for turn in battle.turns]
    return vote_of(
        replace(battle, winner="tie", voted_at=now, flags=(IDENTICAL,)),
        battle_id=identical_id(battle.pair, asked, battle.conditions),
        kind="auto",
        judge=IDENTICAL,
        address="",
        latency_s=None,
    )


def identical_id(pair: Sequence[str], asked: Sequence[str], conditions: Conditions) -> str:
    """The battle id of the one tie on these prompts. `pair` are names of variants."""
    return f"{IDENTICAL}-{short_hash([sorted(pair), list(asked), asdict(conditions)])}"


@dataclass(frozen=True)
class Shown:
    """One side after the vote."""

    model: str  # variant id
    run_id: str
    recipe: str
    rating: float | None = None  # missing: not enough votes


@dataclass(frozen=True)
class TurnView:
    """A turn as the voter sees it: two answers, or none while one of them is being written."""

    prompt: str
    answer_a: str = ""
    answer_b: str = ""


@dataclass(frozen=True)
class BattleView:
    """All that may leave this process of a battle. Before the vote nothing in it tells the sides
    apart but their answers: no names, runs, seeds, counts or times."""

    battle_id: str
    state: str
    message: str  # one sentence for the voter
    hint: str  # how far the answers are, of both together
    turns: tuple[TurnView, ...]
    can_vote: bool
    can_ask: bool
    suggestion: str = ""  # what the drawn prompt goes on with
    keys: tuple[tuple[str, tuple[str, ...]], ...] = KEYS
    winner: str = ""
    counts: bool = False  # the vote changes ratings
    flags: tuple[str, ...] = ()  # why it does not
    undo_until: float | None = None  # unix seconds
    a: Shown | None = None  # after the vote
    b: Shown | None = None

    def data(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def view_of(
    battle: Battle,
    *,
    message: str = "",
    hint: str = "",
    suggestion: str = "",
    ratings: Mapping[str, float] | None = None,
) -> BattleView:
    """A battle as its voter may see it now. `hint` and `suggestion` must not tell the sides."""
    view = BattleView(
        battle_id=battle.battle_id,
        state=str(battle.state),
        message=message or battle.reason or SAYS[battle.state],
        hint=hint if battle.state is State.ANSWERING else "",
        turns=tuple(TurnView(turn.prompt, *turn.answers) for turn in battle.turns),
        can_vote=battle.state is State.READY,
        can_ask=battle.state in ASKABLE,
        suggestion=suggestion if battle.state is State.READY else "",
    )
    if not battle.winner:
        return view
    a, b = (_shown(side.variant, ratings or {}) for side in battle.sides)
    return replace(
        view,
        winner=battle.winner,
        counts=battle.state is State.VOTED and not battle.flags,
        flags=battle.flags,
        undo_until=battle.voted_at + UNDO_S if battle.state is State.VOTED else None,
        a=a,
        b=b,
    )


def _shown(variant: Variant, ratings: Mapping[str, float]) -> Shown:
    return Shown(variant.name, variant.run_id, variant.recipe, ratings.get(variant.name))
