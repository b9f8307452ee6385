"""The chat page's parts as HTML: sides, prompts, answers and what is told under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from markupsafe import Markup

from app import answer_text, look, token_view
from app.chats import Attempt, Conversation, Turn, can_go_on
from app.markup import join, tag
from app.sides import MOST, Variant, base_of
from jobs.chat_types import AnswerView, PoolState, Sampling, Scores, divergence_index

COPIED = 64_000  # characters: longer answers are in the export
LOADED = {"cold": "not loaded", "loading": "loading", "ready": "ready", "failed": "failed"}
FINISH = {
    "": "",
    "end": "by itself",
    "length": "at the limit",
    "context": "context full",
    "stopped": "stopped",
}
NO_BASE = "there is no 16-bit answer beside it"
SIMULATED = "simulated: slower than the real thing by construction"


@dataclass(frozen=True)
class Scene:
    """What address and server say together."""

    known: Sequence[Variant]
    sides: Sequence[Variant]
    states: Mapping[str, PoolState]
    chat: Conversation | None
    part: bool = False  # tokens instead of text
    turn: int = -1  # of which prompt

    @property
    def runs(self) -> list[str]:
        """Run ids of the sides, in order."""
        return [side.run_id for side in self.sides]

    @property
    def turns(self) -> list[Turn]:
        """The prompts so far."""
        return self.chat.turns if self.chat else []

    @property
    def in_tokens(self) -> int:
        """Index of the turn that is shown in tokens; -1 without one."""
        count = len(self.turns)
        return (self.turn if 0 <= self.turn < count else count - 1) if self.part else -1

    def base(self, side: Variant) -> Variant | None:
        """The 16-bit run of a side."""
        return base_of(side, self.known)

    def base_view(self, side: Variant, turn: Turn) -> AnswerView | None:
        """The answer of the 16-bit model, if it stands beside this one."""
        base = self.base(side)
        attempt = turn.of(base.run_id) if base and base.run_id in self.runs else None
        return attempt.view if attempt and base is not side else None


# ---- sides ---------------------------------------------------------------------------------


def heads(scene: Scene) -> Markup:
    """One card per side: which variant, what it is, whether it is loaded."""
    cards = [head(scene, side, at) for at, side in enumerate(scene.sides)]
    return tag("div", cards, class_=f"columns n{len(scene.sides)}")


def head(scene: Scene, side: Variant, at: int) -> Markup:
    """One side: its variant, to be exchanged or removed."""
    label = f"Variant in pane {at + 1}"
    others = [run for run in scene.runs if run != side.run_id]
    picker = tag(
        "select",
        [option(v, v is side) for v in scene.known],
        aria_label=label,
        data_field={"do": "swap", "at": at},
    )
    close = tag(
        "button",
        "×",
        class_="mini",
        aria_label=f"Remove {side.name}",
        data_set={"runs": "~".join(others)},
    )
    state = scene.states.get(side.run_id) or PoolState()
    where = f"/run?id={side.run_id}"
    link = tag("a", about(side, state), href=where, data_carry=True, title="Open the run")
    line = tag("div", side.mark, picker, close if len(scene.sides) > 2 else None, class_="pick")
    return tag("div", line, tag("p", link, loaded(state), class_="about"), class_="side-card")


def about(side: Variant, state: PoolState) -> str:
    """`3.25 bits per weight, packed`: as it is loaded here, else as it was measured."""
    if side.baseline:
        return "16 bits per weight"
    packed = side.packed if state.packed is None else state.packed
    return f"{side.bits:.2f} bits per weight, {'packed' if packed else 'simulated'}"


def option(variant: Variant, on: bool) -> Markup:
    """A variant in a list."""
    words = variant.name if variant.baseline else f"{variant.name} · {variant.bits:.2f} bits"
    return tag("option", words, value=variant.run_id, selected=on)


def loaded(state: PoolState) -> Markup:
    """Whether the model is in memory."""
    size = f", {look.in_bytes(state.bytes)}" if state.state == "ready" and state.bytes else ""
    words = LOADED[state.state] + size
    why = " ".join(state.notes) or None
    word = tag("span", tag("i"), words, class_=f"loaded {state.state}", title=why)
    if state.state != "failed":
        return word
    again = tag("button", "Load again", class_="link", data_act={"do": "warm"})
    return join([word, tag("span", state.why, " ", again, class_="problem")])


def add_side(scene: Scene) -> Markup | None:
    """A list of the variants that are not shown."""
    rest = [v for v in scene.known if v.run_id not in scene.runs]
    if not rest or len(scene.sides) >= MOST:
        return None
    none = tag("option", "Add a variant…", value="", selected=True)
    options = [none, *(option(v, False) for v in rest)]
    return tag("select", options, data_field={"do": "add"}, aria_label="Add a variant")


# ---- turns ---------------------------------------------------------------------------------


def turns(scene: Scene, start: int, end: int) -> Markup:
    """Prompts from `start` to before `end`, each with every side's answer."""
    return join(
        turn_part(scene, turn, at) for at, turn in enumerate(scene.turns) if start <= at < end
    )


def turn_part(scene: Scene, turn: Turn, at: int) -> Markup:
    """A prompt over its answers."""
    answers = [answer_part(scene, turn, at, side) for side in scene.sides]
    in_tokens = at == scene.in_tokens
    return tag(
        "section",
        asked(scene, turn, at),
        token_view.legend() if in_tokens else None,
        tag("div", answers, class_=f"columns n{len(scene.sides)}"),
        class_="turn",
        data_key=f"turn-{at}",
        aria_label=f"Prompt {at + 1}",
    )


def asked(scene: Scene, turn: Turn, at: int) -> Markup:
    """The prompt, and how it was sampled where that is not the default."""
    how = sampling_words(turn.sampling)
    colour = None
    if scene.part and at != scene.in_tokens:
        colour = tag("button", "Show its tokens", class_="link", data_set={"turn": str(at + 1)})
    small = tag("p", how, " " if how else None, colour, class_="how") if how or colour else None
    words = tag("div", answer_text.plain(turn.prompt), class_="plain", dir="auto")
    return tag("div", tag("h2", "You asked", class_="unseen"), words, small, class_="question")


def sampling_words(sampling: Sampling) -> str:
    """`temperature 0.8, top-p 0.9, seed 3`; "" for greedy."""
    if not sampling.temperature:
        return ""
    return f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, seed {sampling.seed}"


# ---- answers -------------------------------------------------------------------------------


def answer_part(scene: Scene, turn: Turn, at: int, side: Variant) -> Markup:
    """One side's answer, what is told of it, and what can be done with it."""
    attempt = turn.of(side.run_id)
    last = at == len(scene.turns) - 1
    busy = attempt is not None and not attempt.view.ended
    body = answered(scene, turn, at, side, attempt, last) if attempt else not_asked(scene, side)
    return tag(
        "article",
        tag("h3", side.mark, " ", side.name, class_="who"),
        body,
        class_=f"answer{' busy' * busy}",
        data_key=side.run_id,
        aria_label=f"Answer of {side.name}",
    )


def answered(
    scene: Scene, turn: Turn, at: int, side: Variant, attempt: Attempt, last: bool
) -> Markup:
    """What there is of an answer."""
    view = attempt.view
    return join(
        [
            fork_line(attempt, last),
            said(scene, turn, attempt, side, at),
            told(view, scene.base_view(side, turn), side)
            if view.pieces or not view.ended
            else None,
            remarks(view),
            tools(attempt, side, last, len(turn.attempts[side.run_id])),
        ]
    )


def not_asked(scene: Scene, side: Variant) -> Markup:
    """In place of an answer that does not exist."""
    why = scene.chat.waits(side.run_id) if scene.chat else None
    if why is None:
        above = [made.view.state for turn in scene.turns if (made := turn.of(side.run_id))]
        words = "Not asked: its answer above failed." if "failed" in above else "Comes next."
        return tag("p", words, class_="waiting")
    button = tag("button", "Ask", class_="tool", data_act={"do": "retry", "run": side.run_id})
    return tag("p", why or "Not asked.", " ", button, class_="waiting")


def fork_line(attempt: Attempt, last: bool) -> Markup | None:
    """Which token was exchanged, and the way back."""
    fork = attempt.fork
    if fork is None:
        return None
    undo = tag(
        "button",
        "Undo",
        class_="link",
        data_act={"do": "unfork", "run": attempt.run_id},
        aria_label="Undo: back to the answer before",
    )
    new, old = token_view.quoted(fork.text), token_view.quoted(fork.instead)
    words = f"Continued from token {fork.at + 1} with {new} instead of {old}."
    return tag("p", tag("span", words), undo if last else None, class_="fork")


def said(scene: Scene, turn: Turn, attempt: Attempt, side: Variant, at: int) -> Markup:
    """The text as it stands, as markdown or token by token."""
    view = attempt.view
    if view.state == "failed":
        return tag("div", tag("p", view.error, class_="problem"), class_="said", role="alert")
    if not view.pieces:
        return tag("div", tag("p", waiting(view), class_="waiting"), class_="said")
    if at == scene.in_tokens:
        return tag("div", in_tokens(scene, turn, attempt, side), class_="said")
    return tag("div", answer_text.answer(view.text), class_="said")


def waiting(view: AnswerView) -> str:
    """What an answer without a token waits for."""
    if view.state == "queued" and view.position:
        return f"In line: {view.position} answer{'s' * (view.position > 1)} of this model first."
    return {
        "queued": "Next in line.",
        "loading": "Loading the model…",
        "running": "Reading the prompt…",
        "stopped": "Stopped before the first token.",
    }.get(view.state, "An empty answer.")


def in_tokens(scene: Scene, turn: Turn, attempt: Attempt, side: Variant) -> Markup:
    """Tokens with tints, and a sentence about them."""
    view, base_view = attempt.view, scene.base_view(side, turn)
    scores, why = divergence(scene, attempt, side)
    last = turn is scene.turns[-1]
    at = token_view.parts_at(view, base_view)
    marks: dict[int, list[str]] = {} if at is None else {at: []}
    if side.baseline:
        marks = partings(scene, turn, view, side)
    body = token_view.tokens(
        view,
        scores,
        base_view,
        marks,
        baseline=side.baseline,
        label=f"Answer of {side.name}",
        run_id=side.run_id,
        can_fork=last and view.ended,
    )
    about = None if side.baseline else token_view.summary(view, scores, base_view)
    return join([body, tag("p", about, " ", tag("span", why) if why else None, class_="parting")])


def partings(scene: Scene, turn: Turn, base: AnswerView, side: Variant) -> dict[int, list[str]]:
    """Index in the 16-bit answer -> names of the variants that part from it there."""
    found: dict[int, list[str]] = {}
    for other in scene.sides:
        attempt = turn.of(other.run_id)
        if other is side or attempt is None or scene.base(other) is not side:
            continue
        at = token_view.parts_at(attempt.view, base)
        if at is not None and at < len(base.pieces):
            found.setdefault(at, []).append(other.name)
    return found


def divergence(scene: Scene, attempt: Attempt, side: Variant) -> tuple[Scores | None, str]:
    """Scores along an answer, or why there are none."""
    base = scene.base(side)
    if base is None:
        return None, "Colours need a finished 16-bit run of this model; make one on New run."
    future = scene.chat.score(attempt, base.run_id) if scene.chat else None
    if side.baseline:
        words = "The 16-bit model itself: what the others are compared with."
        return (outcome(future)[0] if future and future.done() else None), words
    if future is None:
        return None, "Colours come when the answer has ended." if not attempt.view.ended else ""
    if not future.done():
        return None, "Comparing with the 16-bit model…"
    return outcome(future)


def outcome(future: Future[Scores]) -> tuple[Scores | None, str]:
    """What came of comparing, one way or the other."""
    if future.cancelled():
        return None, "The comparison was cancelled."
    error = future.exception()
    if error is None:
        return future.result(), ""
    told_why = str(error) if isinstance(error, ValueError | OSError) else type(error).__name__
    return None, f"The comparison failed: {told_why}"


def told(view: AnswerView, base: AnswerView | None, side: Variant) -> Markup:
    """Numbers under an answer: speed only where it says something."""
    pairs = [
        ("Tokens", counted(view)),
        ("Ended", shown(FINISH[view.finish], "it has not ended" * (not view.ended))),
        ("Speed", speed(view)),
        ("First token", first_token(view)),
        ("Repeated", repeated(view)),
    ]
    if not side.baseline:
        pairs.append(("As 16-bit for", shared(view, base)))
    return tag(
        "dl",
        [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs],
        class_="told",
    )


def counted(view: AnswerView) -> str:
    """How many tokens; after a fork, how many of them were kept."""
    return f"{len(view.pieces)}" + (f", {view.given} kept" if view.given else "")


def shown(text: str, why_not: str = "") -> Markup:
    """A value, or a dash that says why there is none."""
    if text:
        return tag("span", text)
    return tag("span", look.MISSING, class_="missing", title=why_not or None)


def speed(view: AnswerView) -> Markup:
    """Tokens per second after the first."""
    value = f"{look.whole(view.speed)} tokens/s" if view.ended and view.speed else ""
    return shown(value, view.why_no_speed)


def first_token(view: AnswerView) -> Markup:
    """Time to the first token, where the model computes as it would be deployed."""
    if view.packed is False:
        return shown("", SIMULATED)
    return shown("" if view.ttft_s is None else f"{look.significant(view.ttft_s, 2)} s")


def repeated(view: AnswerView) -> Markup:
    """Share of 4-token sequences that occurred before."""
    rate = view.repetition
    if rate is None:
        return shown("", "four tokens are needed")
    return tag("span", f"{100 * rate:.0f} %", title="4-token sequences that occurred before")


def shared(view: AnswerView, base: AnswerView | None) -> Markup:
    """Tokens before it differs from the 16-bit answer (the divergence index)."""
    if base is None:
        return shown("", NO_BASE)
    at = divergence_index(view.tokens, base.tokens)
    parted = token_view.parts_at(view, base) is not None
    words = f"{at} token{'s' * (at != 1)}"
    if not parted:
        words = f"all {at}" if view.ended and base.ended else f"{at} so far"
    return tag("span", words, title="Divergence index: tokens before the first that differs")


def remarks(view: AnswerView) -> Markup | None:
    """Dropped turns, a missing template, and whatever else was not as asked."""
    lines = []
    if view.dropped:
        turns_word = "turn was" if view.dropped == 1 else f"{view.dropped} turns were"
        lines.append(f"The oldest {turns_word} left out: the context has no room for more.")
    if view.cached:
        lines.append("Answered before with these settings; the times are from then.")
    lines += view.notes
    return tag("ul", [tag("li", line) for line in lines], class_="remarks") if lines else None


def tools(attempt: Attempt, side: Variant, last: bool, versions: int) -> Markup:
    """Stop while it runs; then copy, or ask again."""
    view, run = attempt.view, side.run_id
    if not view.ended:
        halt = button("Stop", f"Stop {side.name}", {"do": "stop", "run": run})
        return tag("div", halt, class_="tools")
    made = []
    if view.text and len(view.text) <= COPIED:
        text = answer_text.whole(view.text)
        name = f"Copy the answer of {side.name}"
        made.append(
            tag("button", "Copy", class_="tool", data_copy=text, data_key="Copy", aria_label=name)
        )
    if last and can_go_on(view):
        made.append(button("Continue", f"Let {side.name} go on", {"do": "extend", "run": run}))
    if view.state == "failed" or (last and view.state == "stopped" and versions == 1):
        made.append(button("Ask again", f"Ask {side.name} again", {"do": "retry", "run": run}))
    return tag("div", made, class_="tools")


def button(words: str, name: str, move: Mapping[str, str]) -> Markup:
    """A small button; its key keeps it from turning into another one under the finger."""
    return tag("button", words, class_="tool", data_act=dict(move), data_key=words, aria_label=name)


def status(scene: Scene) -> str:
    """For ears: how far the last prompt is."""
    if not scene.turns:
        return ""
    made = [scene.turns[-1].of(run) for run in scene.runs]
    views = [attempt.view for attempt in made if attempt]
    going = sum(not view.ended for view in views)
    if going:
        return f"{going} of {len(scene.runs)} answers under way."
    return "All answers have ended." if len(views) == len(scene.runs) else ""
