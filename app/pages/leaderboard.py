"""Leaderboard: what people, judges and metrics say of every variant, and how surely."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import gradio as gr
import pandas as pd
from markupsafe import Markup

from app import leaderboard_rows, leaderboard_words, look, rows
from app.charts import Chart, battle_counts, predicted_wins, ratings, vote_mix, win_fraction
from app.context import Context, Picks
from app.leaderboard_rows import IMPORTED, PUBLISHED, Board
from app.leaderboard_table import board_table
from app.markup import join, tag
from app.pages.compare import chip_group, switch_chip
from app.published_table import about, published_tab
from app.recipe_words import kind_name
from app.widgets import chart_value, connect, live, plotly_chart, query, skeleton

TITLE, PATH, ORDER, KEY = "Leaderboard", "/leaderboard", 6, "l"
CHARTS: Mapping[str, Chart] = {
    "ratings": ratings.CHART,
    "win_fraction": win_fraction.CHART,
    "predicted_wins": predicted_wins.CHART,
    "battle_counts": battle_counts.CHART,
    "vote_mix": vote_mix.CHART,
}
VOTERS = {"human": "People", "judge": "Judge", "auto": "Identical answers"}
MOST_LINES = 400  # of a chart shown as a table


def build(ctx: Context) -> None:
    """Tabs, sentence and filters; the table; the charts of pairs below."""
    with gr.Column(elem_classes="page leaderboard", elem_id="content"):
        head = live(skeleton(150), elem_classes="head")
        table = live(skeleton(420), elem_classes="card table-card")
        drawn: list[gr.HTML] = []
        with gr.Column(elem_classes="board-charts"):
            for name in CHARTS:
                with gr.Column(elem_classes=f"card chart-card board-chart {name}"):
                    drawn += [live(""), plotly_chart(), live("")]

    pace = Pace()

    def draw(request: gr.Request) -> list[Any]:
        started = time.monotonic()
        parts = list(screen(ctx, Picks.read(query(request))))
        pace.drawn(time.monotonic(), time.monotonic() - started)
        return parts

    def stamp(request: gr.Request) -> Hashable:
        return pace.follow(ctx.store.version, time.monotonic())

    connect(draw, [head, table, *drawn], stamp=stamp)


class Pace:
    """When an open page follows the votes: one that took long to draw does so less often."""

    def __init__(self, rest: float = 20) -> None:
        """`rest`: times as long as the last drawing took, until the next."""
        self._rest = rest
        self._held: Hashable = None
        self._next = 0.0

    def drawn(self, now: float, took_s: float) -> None:
        """A drawing ended at `now`."""
        self._next = now + self._rest * took_s

    def follow(self, version: Hashable, now: float) -> Hashable:
        """The version to show: the newest, or the one shown so far while it is too early."""
        if now >= self._next:
            self._held = version
        return self._held


def screen(ctx: Context, picks: Picks) -> Iterable[str]:
    """The page's parts for one set of picks: head, table, then three parts per chart."""
    if picks.tab == PUBLISHED:
        return head_of_published(picks), published_tab(picks), *[""] * (3 * len(CHARTS))
    known = rows.models(ctx.store)
    picks = leaderboard_rows.with_model(picks, known[0] if known else "")
    board = leaderboard_rows.board(ctx.store, picks)
    if not len(board.rows):
        return head_of_nothing(picks), "", *[""] * (3 * len(CHARTS))
    charts = chart_parts(ctx, picks) if board.votes else [""] * (3 * len(CHARTS))
    return head(board, picks), board_table(board, picks), *charts


# ---- head ----------------------------------------------------------------------------------


def tabs(picks: Picks) -> Markup:
    """Measured here, imported, published: never mixed."""
    titles = {"": "Variants", IMPORTED: "Imported battles", PUBLISHED: "Published results"}
    cleared = dict.fromkeys(("search", "sort", "family", "category", "language"), "")
    made = [
        tag(
            "button",
            title,
            aria_pressed=str(picks.tab == name).lower(),
            data_set={**cleared, "tab": name},
            class_="tab",
        )
        for name, title in titles.items()
    ]
    return tag("div", made, role="group", aria_label="Where numbers come from", class_="tabs")


def head(board: Board, picks: Picks) -> Markup:
    """Tabs, the sentence, what it rests on, filters."""
    title = tag("h1", leaderboard_words.headline(board), class_="headline", aria_live="polite")
    parts: list[Markup | None] = [tabs(picks), title]
    if not board.votes and picks.tab != IMPORTED:
        parts.append(to_arena())
    parts.append(facts(board))
    parts.append(filters(board, picks))
    if picks.tab != IMPORTED:
        parts.append(to_judge(board))
    return join(parts)


def to_arena() -> Markup:
    """The button that fills the people's columns."""
    words = "Ratings appear here once people have voted in blind battles."
    button = tag("a", "Vote in the arena", href="/arena", class_="button primary", data_carry=True)
    return tag("div", tag("p", words), button, class_="row to-arena")


def to_judge(board: Board) -> Markup:
    """The way to the judge's own page."""
    words = "What judges said, and a new judge" if board.judge else "Let a language model judge"
    return tag("p", tag("a", words, href="/judge", data_carry=True), class_="facts")


def facts(board: Board) -> Markup | None:
    """Every condition of the ratings, one sentence each."""
    lines = [tag("li", line) for line in leaderboard_words.facts(board)]
    return tag("ul", lines, class_="facts board-facts") if lines else None


def head_of_published(picks: Picks) -> Markup:
    """What the published tab is."""
    title = tag("h1", "Published results, measured elsewhere", class_="headline")
    return join([tabs(picks), title, tag("p", about(), class_="facts")])


def head_of_nothing(picks: Picks) -> Markup:
    """Before the first run or the first imported battle."""
    if picks.tab == IMPORTED:
        title = "No battles were imported yet."
        words = tag(
            "p",
            "Battles of other arenas appear here, apart from your own: ",
            tag("code", "quantarena import-votes FILE"),
            " reads CSV, JSON and Parquet.",
        )
        return join([tabs(picks), tag("h1", title), words])
    title = "Variants appear here with everything known about them: votes, metrics, size."
    links = [
        tag("a", "Measure the first variants", href="/", class_="button primary", data_carry=True),
        tag("a", "The arena", href="/arena", data_carry=True),
    ]
    words = tag("p", "There is no finished run of this model yet, so nothing can be compared.")
    return join([tabs(picks), tag("h1", title), words, tag("p", links, class_="row")])


def filters(board: Board, picks: Picks) -> Markup:
    """Which votes count, how they are rated, which rows are shown."""
    families = sorted(set(board.rows["family"]) - {"baseline", ""})
    selects = [
        _select("category", "All categories", "Category", board.categories, picks.category),
        _select("language", "All languages", "Language", board.languages, picks.language),
        _select("interval", "Sandwich intervals", "Intervals", ["bootstrap"], picks.interval,
                {"bootstrap": "Bootstrap intervals"}) if board.votes else None,
    ]  # fmt: skip
    voters = None if picks.tab == IMPORTED else _voter_chips(board, picks)
    anomalous = "Leave out anomalous voters"
    offered = board.votes and (board.anomalous is None or len(board.anomalous))
    switches = [
        switch_chip(anomalous, "clean", picks.clean) if offered or picks.clean else None,
        switch_chip("Same style", "style", picks.style) if board.votes else None,
        switch_chip("Online Elo", "elo", picks.elo) if board.votes else None,
    ]
    names = ("category", "language", "interval", "voters", "clean", "style", "elo", "family")
    used = any(getattr(picks, name) for name in names)
    clear = tag("button", "Clear", class_="link", data_set=dict.fromkeys(names, ""))
    return tag(
        "div",
        tag("span", selects, class_="chips") if any(selects) else None,
        voters,
        tag("span", switches, class_="chips") if any(switches) else None,
        chip_group("Method", "family", families, picks.family, kind_name),
        clear if used else None,
        class_="filters",
    )


def _select(
    name: str,
    everything: str,
    title: str,
    values: Sequence[str],
    now: str,
    words: Mapping[str, str] | None = None,
) -> Markup | None:
    values = [*values, *([now] if now and now not in values else [])]
    if not values:
        return None
    shown = words or {}
    options = [tag("option", shown.get(v, v), value=v, selected=v == now) for v in values]
    first = tag("option", everything, value="", selected=not now)
    return tag("select", first, options, data_param=name, aria_label=title)


def _voter_chips(board: Board, picks: Picks) -> Markup | None:
    kinds = [kind for kind in VOTERS if kind in board.kinds or kind in picks.voters]
    if kinds in ([], ["human"]):
        return None
    on = picks.voters or ("human",)
    chips = []
    for kind in kinds:
        rest = [k for k in on if k != kind] if kind in on else [*on, kind]
        chosen = "" if rest in ([], ["human"]) else "~".join(rest)
        chips.append(
            tag(
                "button",
                VOTERS[kind],
                tag("small", look.whole(board.kinds.get(kind, 0))),
                class_="chip",
                aria_pressed=str(kind in on).lower(),
                data_set={"voters": chosen},
            )
        )
    title = tag("span", "Rated by", class_="chip-title")
    return tag("span", title, chips, class_="chips", role="group", aria_label="Rated by")


# ---- charts --------------------------------------------------------------------------------


def chart_parts(ctx: Context, picks: Picks) -> list[str]:
    """Title with its switches, figure, sentence or table; of every chart."""
    parts: list[str] = []
    for name, chart in CHARTS.items():
        table = chart.rows(ctx.store, picks)
        as_table = name in picks.tables
        parts.append(chart_title(name, chart, as_table, picks))
        parts.append("" if as_table else chart_value(chart.draw(table), chart.say(table)))
        said = tag("p", chart.say(table), class_="muted chart-said")
        parts.append(join([said, chart_lines(chart, table)]) if as_table else said)
    return parts


def chart_title(name: str, chart: Chart, as_table: bool, picks: Picks) -> Markup:
    """The chart's name and what can be done with it."""
    ties = None
    if name == "battle_counts":
        without = picks.ties == "without"
        ties = tag("button", "Without ties", class_="tool", aria_pressed=str(without).lower(),
                   data_set={"ties": "" if without else "without"})  # fmt: skip
    switch = tag(
        "button",
        "Show as chart" if as_table else "Show as table",
        class_="tool",
        aria_pressed=str(as_table).lower(),
        aria_label=f"{chart.title}: show as {'chart' if as_table else 'table'}",
        data_toggle={"name": "tables", "value": name},
    )
    tools = tag("span", ties, switch, class_="tools")
    return tag("div", tag("h2", chart.title), tools, class_="between")


def chart_lines(chart: Chart, table: pd.DataFrame) -> Markup:
    """A chart's rows as a plain table."""
    headings = chart.columns(table)
    if "row" in table:
        table = table[(table["row"] != table["column"]) & table["value"].notna()]
    lines = [
        tag("tr", [_cell(record, name) for name in headings])
        for record in rows.records(table.head(MOST_LINES))
    ]
    numeric = {name for name in headings if not pd.api.types.is_string_dtype(table[name])}
    titles = [
        tag("th", text, scope="col", class_="number" if name in numeric else None)
        for name, text in headings.items()
    ]
    head = tag("thead", tag("tr", titles))
    more = len(table) - MOST_LINES
    rest = tag("p", f"{more} more rows are in the download.", class_="muted") if more > 0 else None
    return tag("div", tag("table", head, tag("tbody", lines)), rest, class_="scroll as-table")


def _cell(record: Mapping[str, Any], name: str) -> Markup:
    value = record[name]
    if isinstance(value, str):
        return tag("td", value)
    if value is None or pd.isna(value):
        return tag("td", look.MISSING, class_="number missing", title="Nothing to count.")
    share = name == "value"
    return tag("td", look.percent(value) if share else f"{value:.0f}", class_="number")
