"""Chat: the same question to two to four variants of a model, side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from markupsafe import Markup

from app import answer_text, chat_bar, chat_parts, first_tour
from app.chat_parts import Scene
from app.chats import LONGEST_PROMPT, Chats, Conversation
from app.context import LOOPBACK, Context, address_of, session_of
from app.markup import join, tag
from app.pages.compare import ghost_chart
from app.permalink import from_query, to_query
from app.sides import MOST, chosen, latest_model, model_of_run, variants
from app.transcript import as_json, as_markdown
from app.views import model_of
from app.widgets import connect, live, query, skeleton
from jobs.chat_types import PoolState, Sampling
from jobs.limits import PUBLIC, Buckets, Limits

TITLE, PATH, ORDER, KEY = "Chat", "/chat", 4, "h"
POLL_S = 0.25


def build(ctx: Context) -> None:
    """Sides on top, prompts and answers below them, the box at the foot of the window."""
    desk = Desk(ctx)
    with gr.Column(elem_classes="page chat", elem_id="content"):
        top = live(skeleton(40), elem_classes="head")
        heads = live(skeleton(90), elem_classes="heads")
        past = live("", elem_classes="turns")
        last = live(skeleton(200), elem_classes="turns last")
        with gr.Column(elem_classes="composer"):
            bar = live("")
            live(box())  # never drawn again: what is being typed stays

    def draw(request: gr.Request) -> list[Markup]:
        began = tag("i", hidden=True, data_drawn=time.time_ns() // 1000)
        return [began + part for part in desk.screen(request)]

    def act(data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
        return desk.perform(data, request)

    connect(draw, [top, heads, past, last, bar], stamp=desk.stamp, act=act, every_s=POLL_S)


@dataclass(frozen=True)
class Wanted:
    """What the URL says."""

    model: str
    runs: tuple[str, ...]
    chat: str
    prompts: tuple[str, ...]
    part: bool
    turn: int  # counted from 0; -1: the last
    sampling: Sampling
    problems: tuple[str, ...]  # settings that could not be taken as they were written

    @classmethod
    def read(cls, params: Mapping[str, str]) -> Wanted:
        sampling, problems = chat_bar.sampling_of(params)
        turn = params.get("turn", "")
        return cls(
            model=params.get("model", ""),
            runs=tuple(part for part in params.get("runs", "").split("~") if part),
            chat=params.get("chat", ""),
            prompts=tuple(from_query(params.get("q", ""))),
            part=params.get("part") == "1",
            turn=int(turn) - 1 if turn.isdecimal() and len(turn) < 4 else -1,
            sampling=sampling,
            problems=tuple(problems),
        )


class Desk:
    """What the page needs between two looks: conversations, and who asked how often."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.chats = Chats(ctx.chat) if ctx.chat is not None else None
        usual = Limits() if ctx.host in LOOPBACK else PUBLIC
        limits = getattr(ctx.arena, "limits", usual)  # the arena's, where it tells them
        self.buckets = Buckets(limits, time.monotonic)

    # What is seen

    def wanted(self, request: gr.Request) -> Wanted:
        """The URL; where it names no model, that of its runs, else the one that was run last."""
        wanted = Wanted.read(query(request))
        if wanted.model:
            return wanted
        known = (model_of_run(self.ctx.store, run) for run in wanted.runs)
        model = next(filter(None, known), "") or latest_model(self.ctx.store)
        return replace(wanted, model=model)

    def scene(self, request: gr.Request, wanted: Wanted) -> Scene:
        """Variants and conversation; answers that are to come next are started."""
        known = variants(self.ctx.store, wanted.model)
        sides = chosen(known, wanted.runs)
        chat = self.chats.find(session_of(request), wanted.chat) if self.chats else None
        if chat:
            chat.advance([side.run_id for side in sides])
        states = {side.run_id: self._state(side.run_id) for side in sides}
        return Scene(known, sides, states, chat, wanted.part, wanted.turn)

    def _state(self, run_id: str) -> PoolState:
        with suppress(ValueError):
            return self.ctx.chat.state(run_id) if self.ctx.chat is not None else PoolState()
        return PoolState()

    def stamp(self, request: gr.Request) -> Hashable:
        """Changes with every token of this conversation, and when a model was loaded."""
        scene = self.scene(request, self.wanted(request))
        states = tuple((s.state, s.bytes) for s in scene.states.values())
        said = scene.chat.stamp() if scene.chat else None
        going = () if scene.known else tuple((v.run_id, v.state) for v in self.ctx.runs.runs())
        return self.ctx.store.version, states, said, going

    def screen(self, request: gr.Request) -> list[Markup]:
        """The five parts of the page."""
        wanted = self.wanted(request)
        scene = self.scene(request, wanted)
        if self.chats is None or not scene.sides:
            why = empty(self.ctx, wanted.model) if self.chats else closed()
            return [why, *[Markup("")] * 4]
        count = len(scene.turns)
        return [
            top(scene, wanted),
            chat_parts.heads(scene),
            chat_parts.turns(scene, 0, count - 1),
            chat_parts.turns(scene, count - 1, count) if count else start(scene, wanted),
            chat_bar.bar(scene, wanted.sampling, wanted.problems, wanted.model),
        ]

    # What is done

    def perform(self, data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
        """One action of a visitor."""
        if data.get("do") == "tour":
            count = len(first_tour.start(self.ctx.change(request)))
            return {"toast": f"{count} runs queued; chat with them as they finish.", "go": "/jobs"}
        move = MOVES.get(str(data.get("do")))
        if move is None or self.chats is None:
            raise ValueError(f"this page cannot do {data.get('do')!r}")
        wanted = self.wanted(request)
        return move(Visit(self, self.chats, request, wanted, self.scene(request, wanted)), data)


@dataclass(frozen=True)
class Visit:
    """One action's surroundings: who asks, and what is on the screen."""

    desk: Desk
    chats: Chats
    request: gr.Request
    wanted: Wanted
    scene: Scene

    def count(self) -> None:
        """One more prompt of this visitor; TooMany in one sentence over the limit."""
        session = session_of(self.request)
        self.desk.buckets.take("prompts", session, address_of(self.request))

    @property
    def chat(self) -> Conversation:
        """The conversation on the screen; ValueError if there is none."""
        if self.scene.chat is None:
            raise ValueError("this conversation is no longer kept; ask again")
        return self.scene.chat

    def opened(self) -> Conversation:
        """The conversation of the address, new if need be."""
        session = session_of(self.request)
        if not session:
            raise ValueError(
                "your browser refuses this site's cookie, without which nobody else is kept out "
                "of your conversation"
            )
        return self.chats.open(session, self.wanted.chat)

    def side(self, data: Mapping[str, Any]) -> str:
        """The run id in an action, if it is on the screen."""
        run_id = str(data.get("run", ""))
        if run_id not in self.scene.runs:
            raise ValueError("this variant is no longer shown")
        return run_id


Answered = Mapping[str, Any]


def send(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """A prompt for every side."""
    chat = visit.opened()
    visit.count()
    chat.ask([str(data.get("text", ""))], visit.wanted.sampling, visit.scene.runs)
    said = to_query([turn.prompt for turn in chat.turns])
    return {"params": {"q": said, "turn": ""}, "replace": True, "fill": {"prompt": ""}}


def send_all(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """The prompts that the link carries, one after the other."""
    if not visit.wanted.prompts:
        raise ValueError("this link carries no prompts")
    chat = visit.opened()
    if chat.turns:
        raise ValueError("this conversation has begun already; start a new one")
    for _ in visit.wanted.prompts:
        visit.count()
    chat.ask(visit.wanted.prompts, visit.wanted.sampling, visit.scene.runs)
    return {}


def again(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """The last prompt once more: with other settings, or where chance plays a part."""
    turns, sampling = visit.chat.turns, visit.wanted.sampling
    changed: dict[str, str] = {}
    if turns and turns[-1].sampling == sampling:
        if not sampling.temperature:
            raise ValueError(
                "at temperature 0 the answers would be the same again; change a setting first"
            )
        sampling = replace(sampling, seed=(sampling.seed + 1) % chat_bar.LARGEST_SEED)
        changed = {"seed": str(sampling.seed)}
    visit.count()
    visit.chat.again(sampling, visit.scene.runs)
    return {"params": changed, "replace": True} if changed else {}


def stop(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """No more tokens, from one side or from all."""
    visit.chat.stop([visit.side(data)] if data.get("run") else None)
    return {}


def retry(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """Ask one side again."""
    visit.count()
    visit.chat.retry(visit.side(data))
    return {}


def warm(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """Somebody is about to ask: load what is shown."""
    for run_id in visit.scene.runs:
        visit.chats.pool.warm(run_id)
    return {}


def fork(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """Continue an answer with another token at one place."""
    run_id, at, token = visit.side(data), int(data.get("at", -1)), int(data.get("token", -1))
    text = known_token(visit, run_id, at, token)
    visit.count()
    visit.chat.fork(run_id, at, token, text)
    return {}


def known_token(visit: Visit, run_id: str, at: int, token: int) -> str:
    """Text of a token that the card of that place offers. ValueError for any other."""
    turn = visit.chat.turns[-1]
    side = next(side for side in visit.scene.sides if side.run_id == run_id)
    attempt, base = turn.of(run_id), visit.scene.base_view(side, turn)
    texts: dict[int, str] = {}
    if base and 0 <= at < len(base.pieces):
        texts[base.pieces[at].token] = base.pieces[at].text
    for future in attempt.scores.values() if attempt else ():
        scores, _ = chat_parts.outcome(future) if future.done() else (None, "")
        if scores and 0 <= at < len(scores.top):
            texts |= {t.token: t.text for t in (*scores.base_top[at], *scores.top[at])}
    if token not in texts:
        raise ValueError("that token is not offered here any more")
    return texts[token]


def extend(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """Let an answer go on that was cut off by its length."""
    run_id = visit.side(data)
    visit.count()
    visit.chat.extend(run_id)
    return {}


def unfork(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """Back to the answer before the exchanged token."""
    visit.chat.unfork(visit.side(data))
    return {}


def swap(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """Another variant in a pane; one that stands elsewhere changes places."""
    runs, at, value = list(visit.scene.runs), int(data.get("at", -1)), str(data.get("value", ""))
    if not 0 <= at < len(runs):
        raise ValueError("there is no such pane")
    if value in runs:
        runs[runs.index(value)] = runs[at]
    runs[at] = value
    return {"params": {"runs": "~".join(runs)}}


def add(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """One more pane."""
    runs = [*visit.scene.runs, str(data.get("value", ""))]
    return {"params": {"runs": "~".join(runs[:MOST])}}


def save(visit: Visit, data: Mapping[str, Any]) -> Answered:
    """The conversation as a file: the browser writes it."""
    kind = str(data.get("kind", ""))
    if kind not in WRITERS:
        raise ValueError(f"there is no format {kind!r}; there are {', '.join(WRITERS)}")
    if not visit.chat.turns:
        raise ValueError("nothing was said yet")
    text = WRITERS[kind](visit.wanted.model, visit.scene)
    return {"save": {"name": f"quantarena-chat.{kind}", "text": text}}


def json_text(model: str, scene: Scene) -> str:
    """The conversation as indented JSON."""
    return json.dumps(as_json(model, scene), indent=1, ensure_ascii=False)


WRITERS: dict[str, Callable[[str, Scene], str]] = {"json": json_text, "md": as_markdown}
MOVES: dict[str, Callable[[Visit, Mapping[str, Any]], Answered]] = {
    "send": send,
    "send_all": send_all,
    "again": again,
    "stop": stop,
    "retry": retry,
    "warm": warm,
    "fork": fork,
    "extend": extend,
    "unfork": unfork,
    "swap": swap,
    "add": add,
    "save": save,
}


# ---- around the conversation ---------------------------------------------------------------


def top(scene: Scene, wanted: Wanted) -> Markup:
    """What this is, and what of the link could not be shown."""
    count = len(scene.sides)
    words = {1: "One variant", 2: "Two variants", 3: "Three variants", 4: "Four variants"}[count]
    lines = []
    lost = [run for run in wanted.runs if run not in {v.run_id for v in scene.known}]
    if lost:
        lines.append(f"{len(lost)} of the runs in this link are not finished or not here.")
    if len(scene.known) < 2:
        lines.append("There is one finished run; make another to compare it with.")
    heading = tag("h1", f"{words} of {wanted.model}, the same question")
    title = tag("div", heading, chat_parts.add_side(scene), class_="between wrap")
    ears = tag("p", chat_parts.status(scene), class_="unseen", aria_live="polite")
    return join([title, *(tag("p", line, class_="warn") for line in lines), ears])


def start(scene: Scene, wanted: Wanted) -> Markup:
    """Before the first prompt: what a link asks, or what could be asked."""
    if wanted.prompts:
        asked = [tag("li", answer_text.plain(prompt), dir="auto") for prompt in wanted.prompts]
        plural = "these prompts" if len(asked) > 1 else "this prompt"
        button = tag(
            "button",
            f"Ask {plural}",
            class_="button primary",
            data_act={"do": "send_all"},
            data_opens=True,
        )
        listed = tag("ol", asked, class_="offered")
        return tag("div", tag("h2", f"This link carries {plural}"), listed, button, class_="begin")
    about = (
        "Every variant gets the same prompt, seed and settings, and answers beside the others. "
        "Begin with one of these, or write your own."
    )
    chips = chat_bar.chips(wanted.model)
    return tag("div", tag("p", about, class_="muted"), chips, class_="begin")


def box() -> Markup:
    """The prompt box. Which of its buttons are seen is decided by the styles."""
    field = tag(
        "textarea",
        id="prompt",
        rows="2",
        maxlength=LONGEST_PROMPT,
        placeholder="Ask all of them  ( / )",
        aria_label="Prompt for all variants",
        aria_describedby="prompt-keys",
        data_search=True,
        dir="auto",
    )
    send_button = tag("button", "Send", class_="button primary send", data_send=True)
    stop_button = tag("button", "Stop", class_="button stop", data_act={"do": "stop"})
    keys = tag("span", "Enter sends, Shift-Enter begins a line.", id="prompt-keys", class_="unseen")
    return tag("div", field, send_button, stop_button, keys, class_="ask")


def empty(ctx: Context, model: str) -> Markup:
    """No finished run yet."""
    going = [v for v in ctx.runs.runs() if not v.state.ended and model in ("", model_of(v))]
    if going:
        words = [
            tag("h1", "The first variant to chat with is being made."),
            tag("p", tag("a", "Watch it on Jobs", href="/jobs", data_carry=True)),
        ]
        return tag("div", ghost_chart(), tag("div", words, class_="words"), class_="empty-state")
    about = "Here the 16-bit model and its quantized variants answer the same question."
    tour = tag("button", "First tour", class_="button primary", data_act={"do": "tour"})
    own = tag("a", "Or set up your own run", href="/new", data_carry=True)
    facts = "It takes a finished run; the first tour makes twelve of the bundled model in minutes."
    words = [tag("h1", about), tag("p", facts), tag("p", tour, own, class_="row")]
    return tag("div", ghost_chart(), tag("div", words, class_="words"), class_="empty-state")


def closed() -> Markup:
    """This server cannot chat."""
    words = tag("div", tag("h1", "This server was started without chat."), class_="words")
    return tag("div", words, class_="empty-state single")
