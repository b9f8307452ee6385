"""Arena: two anonymous variants answer, a person says which is better, then the names are shown."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import gradio as gr
import pandas as pd
from markupsafe import Markup

from app import answer_text, look, rows
from app.context import Context, address_of, session_of
from app.markup import join, tag
from app.recipe_words import BASELINE, Recipe
from app.views import recipe_in
from app.widgets import connect, live, query, skeleton
from jobs.arena import Arena
from jobs.battle import CHARACTERS, UNDO_S, BattleView, Refused, Shown, State, TurnView

TITLE, PATH, ORDER, KEY = "Arena", "/arena", 5, "a"
POLL_S = 0.3
CHOICES = (  # winner as votes have it, words, keys
    ("model_a", "A is better", ("←", "1")),
    ("model_b", "B is better", ("→", "2")),
    ("tie", "Tie", ("↓", "3")),
    ("tie (bothbad)", "Both are bad", ("↑", "4")),
)
VERDICTS = {
    "model_a": "You preferred A.",
    "model_b": "You preferred B.",
    "tie": "You called it a tie.",
    "tie (bothbad)": "You found both bad.",
}
NOT_COUNTED = {
    "leak": "an answer or the prompt names a method or model, so it was not blind",
    "duplicate": "you have judged this pair on this prompt before",
}


def build(ctx: Context) -> None:
    """One battle at a time; the URL says which."""
    with gr.Column(elem_classes="page arena", elem_id="content"):
        body = live(skeleton(560))

    def draw(request: gr.Request) -> list[Markup]:
        return [screen(ctx, request)]

    def act(data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
        return perform(ctx, data, request)

    def stamp(request: gr.Request) -> Hashable:
        view = shown(ctx, request)
        fresh = view is not None and view.undo_until is not None and time.time() < view.undo_until
        return view, fresh, None if view else ctx.store.version

    connect(draw, [body], stamp=stamp, act=act, every_s=POLL_S)


def engine(ctx: Context) -> Arena:
    """The arena of this server."""
    if ctx.arena is None:
        raise ValueError("This server has no arena.")
    return ctx.arena


def model_of(ctx: Context, params: Mapping[str, str]) -> str:
    """The model of the page: the URL's, else the one that was run last."""
    known = rows.models(ctx.store)
    return params.get("model") or (known[0] if known else "")


def shown(ctx: Context, request: gr.Request) -> BattleView | None:
    """The battle in the URL, if it is this browser's and not forgotten."""
    battle = query(request).get("battle", "")
    try:
        return engine(ctx).view(battle, session_of(request)) if battle else None
    except Refused:
        return None


# ---- moves ---------------------------------------------------------------------------------


def perform(ctx: Context, data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
    """One move of the voter."""
    arena, me, move = engine(ctx), session_of(request), str(data.get("do", ""))
    battle = str(data.get("battle", ""))
    if move == "start":
        return start(ctx, data, request)
    if move == "ask":
        arena.ask(battle, me, str(data.get("prompt", "")))
        return {}
    if move == "draw":
        arena.ask(battle, me, None)
        return {}
    if move == "skip":
        arena.skip(battle, me)
        return start(ctx, {}, request)
    if move == "vote":
        arena.vote(battle, me, str(data.get("winner", "")))
        return {}
    if move == "undo":
        arena.retract(battle, me)
        return {"toast": "Your vote is withdrawn. This battle is over and counts for nobody."}
    raise ValueError(f"this page cannot do {move!r}")


def start(ctx: Context, data: Mapping[str, Any], request: gr.Request) -> Mapping[str, Any]:
    """A new battle, with the voter's prompt or a drawn one."""
    arena, me, params = engine(ctx), session_of(request), query(request)
    if not me:
        raise ValueError("Your browser refuses this site's cookie, without which nobody can vote.")
    view = arena.start(
        me,
        address_of(request),
        model_of(ctx, params),
        category=params.get("category", ""),
        language=params.get("language", ""),
    )
    arena.ask(view.battle_id, me, str(data["prompt"]) if data.get("prompt") else None)
    return {"params": {"battle": view.battle_id}}


# ---- screens -------------------------------------------------------------------------------


def screen(ctx: Context, request: gr.Request) -> Markup:
    """The battle, or how to begin one."""
    params = query(request)
    model = model_of(ctx, params)
    why_not = engine(ctx).why_not(model)
    if why_not:
        return nobody(why_not)
    view = shown(ctx, request)
    if view is None:
        lost = "That battle is over or not yours; here is a new one." if "battle" in params else ""
        return welcome(ctx, model, params, lost)
    return join([head(view), panes(ctx, view), foot(ctx, view, model)])


def nobody(why: str) -> Markup:
    """Too few variants to compare."""
    words = tag(
        "div",
        tag("h1", "Two variants of one model answer here, and you say blind which is better."),
        tag("p", why),
        tag("p", tag("a", "First tour", href="/", class_="button primary", data_carry=True)),
        class_="words",
    )
    return tag("div", words, class_="empty-state single")


def welcome(ctx: Context, model: str, params: Mapping[str, str], lost: str) -> Markup:
    """What this is, and two ways to begin."""
    arena = engine(ctx)
    if ctx.chat is not None:
        ctx.chat.open()  # its imports take the seconds until somebody has read this
    return tag(
        "div",
        tag("p", lost, class_="hint") if lost else None,
        tag("h1", f"Two variants of {model} answer the same prompt. Which answer is better?"),
        tag(
            "p",
            "You see no names until you have voted. Prompts are drawn from those on which the two "
            "answer differently; your own are welcome.",
            class_="muted",
        ),
        tag(
            "div",
            tag("button", "Draw a prompt", class_="button primary", data_act={"do": "start"}),
            category_menu(arena.categories(model), params.get("category", "")),
            class_="row",
        ),
        prompt_box({"do": "start"}, "…or type a prompt of your own", "Ask both"),
        tag("p", arena.most_wanted(model), class_="hint"),
        tag(
            "p",
            tag("a", "Ratings so far", href=f"/leaderboard?model={quote(model)}"),
            " · ",
            tag("a", "Find prompts that tell them apart", href=f"/mined?model={quote(model)}"),
        ),
        class_="welcome card pad",
    )


def category_menu(categories: list[str], chosen: str) -> Markup | None:
    """Which kind of prompt is drawn."""
    if not categories:
        return None
    options = [
        tag("option", name or "any kind", value=name, selected=name == chosen)
        for name in ("", *categories)
    ]
    menu = tag("select", options, data_param="category", aria_label="Kind of prompt")
    return tag("label", "of ", menu, class_="muted")


def prompt_box(data: Mapping[str, Any], words: str, button: str, *, off: bool = False) -> Markup:
    """A text field whose Enter sends; Shift-Enter breaks the line."""
    field = tag(
        "textarea",
        id="arena-prompt",
        rows=2,
        maxlength=CHARACTERS,
        placeholder=words,
        aria_label="Prompt for both",
        disabled=off,
    )
    send = tag("button", button, class_="button", data_ask=dict(data), aria_disabled=off or None)
    return tag("div", field, send, class_="ask-row")


def head(view: BattleView) -> Markup:
    """One sentence on where the battle stands; after the vote, what it was and what it did."""
    if not view.winner:
        message = view.hint or view.message
        return tag("h1", message, class_="headline", aria_live="polite")
    if view.state == State.VOID:
        return tag("h1", view.message, class_="headline", aria_live="polite")
    counted = "Counted." if view.counts else "Recorded, but it does not count"
    why = "" if view.counts else ": " + "; ".join(NOT_COUNTED.get(f, f) for f in view.flags) + "."
    return tag(
        "h1", f"{VERDICTS[view.winner]} {counted}{why}", class_="headline", aria_live="polite"
    )


def panes(ctx: Context, view: BattleView) -> Markup:
    """Both conversations side by side, turn by turn so that they stay level."""
    names = [pane_head(ctx, letter, side) for letter, side in (("A", view.a), ("B", view.b))]
    turns = [turn(part, view) for part in view.turns]
    return tag("section", tag("div", names, class_="duel names"), turns, class_="battle card")


def pane_head(ctx: Context, letter: str, side: Shown | None) -> Markup:
    """`A`, and after the vote who it was."""
    if side is None:
        return tag("div", tag("b", letter, class_="side-letter"))
    rating = "" if side.rating is None else f" · rating {side.rating:.0f}"
    link = tag("a", words_of(ctx, side).name, href=f"/run?id={quote(side.run_id)}", data_carry=True)
    return tag(
        "div", tag("b", letter, class_="side-letter"), link, tag("small", rating), class_="revealed"
    )


def turn(part: TurnView, view: BattleView) -> Markup:
    """A prompt and its two answers."""
    waiting = not (part.answer_a or part.answer_b) and view.state == State.ANSWERING
    answers = [
        tag(
            "article",
            tag("div", class_="skeleton lines") if waiting else answer_text.answer(text),
            aria_label=f"Answer {letter}",
            data_letter=letter,
            aria_busy="true" if waiting else None,
        )
        for letter, text in (("A", part.answer_a), ("B", part.answer_b))
    ]
    asked = tag("p", answer_text.plain(part.prompt), class_="asked", dir="auto")
    return join([asked, tag("div", answers, class_="duel")])


def foot(ctx: Context, view: BattleView, model: str) -> Markup:
    """What can be done now: vote and go on talking, or see the names and go to the next battle."""
    if view.winner or view.state in (State.BROKEN, State.SKIPPED, State.VOID):
        return after(ctx, view, model)
    battle = {"battle": view.battle_id}
    buttons = [
        tag(
            "button",
            tag("span", words),
            tag("span", [tag("kbd", key) for key in keys]),
            class_="button vote",
            data_choice=winner,
            data_act={"do": "vote", "winner": winner, **battle},
            aria_disabled=not view.can_vote or None,
        )
        for winner, words, keys in CHOICES
    ]
    others = tag(
        "span",
        tag(
            "button",
            "Draw another prompt",
            class_="tool",
            data_act={"do": "draw", **battle},
            aria_disabled=not view.can_ask or None,
        ),
        tag("button", "Skip", class_="tool", data_act={"do": "skip", **battle}, data_skip=True),
        class_="tools",
    )
    box = prompt_box({"do": "ask", **battle}, "Go on talking to both", "Ask", off=not view.can_ask)
    return tag(
        "div", tag("div", buttons, class_="votes", role="group", aria_label="Vote"), box, others
    )


def after(ctx: Context, view: BattleView, model: str) -> Markup:
    """Facts about both, undo while it lasts, and the next battle."""
    facts = [
        tag("p", tag("b", f"{letter} "), fact(ctx, side))
        for letter, side in (("A", view.a), ("B", view.b))
        if side is not None
    ]
    undo = None
    if view.undo_until is not None and time.time() < view.undo_until:
        undo = tag(
            "button",
            tag("span", "Take it back"),
            tag("span", f"{UNDO_S:.0f} s", class_="left"),
            class_="tool",
            data_act={"do": "undo", "battle": view.battle_id},
            data_undo=True,
            data_until=f"{view.undo_until:.2f}",
        )
    following = tag(
        "button",
        "Next battle ",
        tag("kbd", "n"),
        class_="button primary",
        data_act={"do": "start"},
        data_next=True,
        data_battle=view.battle_id,
    )
    return tag(
        "div",
        tag("div", facts, class_="facts-after") if facts else None,
        tag("div", following, undo, class_="row"),
        tag("p", engine(ctx).most_wanted(model), class_="hint"),
        class_="after",
    )


def words_of(ctx: Context, side: Shown) -> Recipe:
    """The recipe in words."""
    try:
        return recipe_in(ctx.runs.view(side.run_id))
    except ValueError:  # its folder was removed
        return replace(BASELINE, name=side.recipe, long_name=side.recipe)


def fact(ctx: Context, side: Shown) -> str:
    """One line on a variant: its recipe in full, and its bits where they were measured."""
    words = words_of(ctx, side).long_name
    wide = rows.wide(ctx.store, side.model.partition("/")[0])
    known = wide[wide["run_id"] == side.run_id] if "bits_per_weight" in wide else wide[:0]
    if not len(known) or pd.isna(known["bits_per_weight"].iloc[0]):
        return words
    bits = look.quantity("bits_per_weight", float(known["bits_per_weight"].iloc[0]), "bits")
    return f"{words}, {bits} bits per weight"
