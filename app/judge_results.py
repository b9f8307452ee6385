"""What a judge job found, as HTML: grades, games, win rates, position bias, agreement, verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pandas as pd
from markupsafe import Markup

from app import look
from app.markup import join, search_box, tag
from results_db import judging, verdicts
from results_db.compare import NORMAL_95
from results_db.store import Store

PAGE = 20  # verdicts on one page
SHOWN = 4_000  # characters of one text; the download has all of it
NamesOf = Callable[[str], str]
NO_NUMBER = "Too few comparisons for a number, or none."


@dataclass(frozen=True)
class Found:
    """Everything counted of one job."""

    grades: pd.DataFrame
    differences: Mapping[str, judging.Difference]  # of each variant from the first
    categories: pd.DataFrame
    games: pd.DataFrame
    win_rates: pd.DataFrame
    bias: judging.PositionReport | None
    agreement: judging.Agreement | None

    @property
    def anything(self) -> bool:
        """Some verdict is there."""
        return bool(len(self.grades) or len(self.games))


@lru_cache(maxsize=8)
def found(store: Store, version: int, job: str, first: str) -> Found:
    """Counted once per change of the store: every open page asks."""
    graded, games = verdicts.judgments(store, job), verdicts.games(store, job)
    others = [m for m in graded["model"].unique() if m != first] if len(graded) else []
    return Found(
        grades=judging.grades(graded) if len(graded) else pd.DataFrame(),
        differences={m: judging.grade_difference(graded, first, m) for m in others},
        categories=judging.category_means(graded) if len(graded) else pd.DataFrame(),
        games=verdicts.win_table(store, job) if len(games) else pd.DataFrame(),
        win_rates=verdicts.win_rates(store, job) if len(games) else pd.DataFrame(),
        bias=verdicts.bias(store, job) if len(games) else None,
        agreement=verdicts.agreement_of(store, job) if len(games) else None,
    )


def results(told: Found, first: str, name: NamesOf) -> Markup:
    """Tables of what was counted so far."""
    parts = [
        grade_part(told, first, name),
        category_part(told.categories, name),
        game_part(told.games, name),
        rate_part(told.win_rates, name),
        order_part(told.bias),
        people_part(told.agreement),
    ]
    return join([tag("section", part, class_="card pad") for part in parts if part])


# ---- tables --------------------------------------------------------------------------------


def grade_part(told: Found, first: str, name: NamesOf) -> Markup | None:
    """Grades per variant with intervals, and paired differences from the first."""
    if not len(told.grades):
        return None
    turns = [column for column in told.grades if str(column).startswith("turn_")]
    titles = ["Variant", "Grade, 1 to 10", f"Difference from {name(first)}"]
    titles += [f"Turn {str(turn).removeprefix('turn_')}" for turn in turns]
    titles += ["Questions", "Failed"]
    rows = [
        [
            name(row["model"]),
            with_interval(row["overall"], row["stderr"], "{:.2f}"),
            difference(told.differences.get(row["model"])),
            *(cell(row[str(turn)], "{:.2f}") for turn in turns),
            cell(row["questions"], "{:.0f}"),
            cell(row["failed"], "{:.0f}"),
        ]
        for row in records(told.grades)
    ]
    about = (
        "Mean of all grades, higher is better, with its 95 % interval over questions. The "
        "difference is taken question by question, which is far surer than two means; it is bold "
        "where its interval leaves out 0."
    )
    return join([tag("h2", "Grades"), tag("p", about, class_="hint"), table(titles, rows)])


def difference(found_: judging.Difference | None) -> Markup:
    """`-0.42 ±0.31`, bold where 0 is outside."""
    if found_ is None or math.isnan(found_.mean):
        return missing("This is what the others are compared with, or there is no common question.")
    apart = abs(found_.mean) > NORMAL_95 * found_.stderr > 0
    value = with_interval(found_.mean, found_.stderr, "{:+.2f}")
    return tag("b", value) if apart else value


def category_part(means: pd.DataFrame, name: NamesOf) -> Markup | None:
    """Mean grade in each category."""
    if means.shape[1] < 2:
        return None
    rows = [
        [name(str(model)), *(cell(value, "{:.2f}") for value in values)]
        for model, values in zip(means.index, means.to_numpy(), strict=True)
    ]
    titles = ["Variant", *map(str, means.columns)]
    return join([tag("h2", "Grades by category"), table(titles, rows)])


def game_part(games: pd.DataFrame, name: NamesOf) -> Markup | None:
    """Wins, losses and ties after both orders were put together."""
    if not len(games):
        return None
    counts = ["wins", "losses", "ties", "errors"]
    rows = [
        [
            name(row["model"]),
            cell(row["adjusted"], "{:.1%}"),
            cell(row["win_rate"], "{:.1%}"),
            *(cell(row[n], "{:.0f}") for n in counts),
        ]
        for row in records(games)
    ]
    titles = ["Variant", "Wins, ties as half", "Wins alone", *(n.capitalize() for n in counts)]
    about = "A win is one that both orders agree on; where they do not, it is a tie."
    return join([tag("h2", "Games"), tag("p", about, class_="hint"), table(titles, rows)])


def rate_part(rates: pd.DataFrame, name: NamesOf) -> Markup | None:
    """AlpacaEval's win rates of each pair, raw and freed of length."""
    if not len(rates):
        return None
    rows = [
        [
            name(row["model_2"]),
            name(row["model_1"]),
            with_interval(row["win_rate"], row["stderr"], "{:.1f}"),
            with_interval(row["length_controlled"], row["length_controlled_stderr"], "{:.1f}"),
            cell(row["n"], "{:.0f}"),
            cell(row["dropped"], "{:.0f}"),
        ]
        for row in records(rates)
    ]
    titles = ["Variant", "Against", "Win rate, %", "Length-controlled, %", "Comparisons", "Dropped"]
    notes = dict.fromkeys(note for row in records(rates) for note in row["notes"] or ())
    about = (
        "50 means equal. Length-controlled is the rate if both answers were equally long: judges "
        "are known to prefer long ones."
    )
    listed = tag("ul", [tag("li", note) for note in notes], class_="hint") if notes else None
    title = tag("h2", "Win rates")
    return join([title, tag("p", about, class_="hint"), table(titles, rows), listed])


def order_part(bias: judging.PositionReport | None) -> Markup | None:
    """What the order shown did to the verdicts."""
    if bias is None or not bias.games:
        return None
    shares = {
        "Both orders agree": bias.consistent,
        "The first shown won both times": bias.first_bias,
        "The second shown won both times": bias.second_bias,
    }
    rows = [[words, bar(share), cell(share, "{:.1%}")] for words, share in shares.items()]
    failed = f" {bias.errors} pairs had a failed verdict and are left out." if bias.errors else ""
    about = f"Of {look.whole(bias.games)} pairs of answers that were judged in both orders.{failed}"
    body = table(["Position", "", "Share"], rows)
    return join([tag("h2", "Position bias"), tag("p", about, class_="hint"), body])


def people_part(found_: judging.Agreement | None) -> Markup | None:
    """How often judge and people say the same."""
    if found_ is None:
        return None
    title = tag("h2", "Judge and people")
    if not found_.all_n:
        words = "No person has voted on these pairs and prompts yet, so nothing can be compared."
        return join([title, tag("p", words, class_="muted")])
    rows = [
        ["All votes, a tie is a verdict (guessing: 33 %)", cell(found_.all, "{:.1%}"),
         cell(found_.all_n, "{:.0f}")],
        ["Both prefer a side (guessing: 50 %)", cell(found_.decisive, "{:.1%}"),
         cell(found_.decisive_n, "{:.0f}")],
    ]  # fmt: skip
    return join([title, table(["Agreement on the same pair and prompt", "Share", "n"], rows)])


# ---- verdicts ------------------------------------------------------------------------------


def verdict_part(
    store: Store, job: str, search: str, failed: bool, page: int, name: NamesOf
) -> Markup:
    """Every verdict as it was given, searched and by pages."""
    rows, total = verdicts.said(
        store, job, search=search, failed=failed, offset=PAGE * (page - 1), limit=PAGE
    )
    if not total and page > 1:
        page = 1
        rows, total = verdicts.said(store, job, search=search, failed=failed, limit=PAGE)
    only = tag(
        "button",
        "Failed only",
        class_="chip",
        aria_pressed=str(failed).lower(),
        data_set={"failed": "" if failed else "1", "page": ""},
    )
    box = search_box("Search verdicts", value=search, data_param="search")
    head = tag("div", tag("h2", "Verdicts"), tag("span", only, box, class_="row"),
               class_="between wrap")  # fmt: skip
    cards = [verdict_card(row, name) for row in records(rows)]
    nothing = tag("p", "No verdict is like that.", class_="muted") if not total else None
    return tag("section", head, nothing, cards, pager(page, total, PAGE, "verdicts"),
               class_="card pad verdicts")  # fmt: skip


def verdict_card(row: Mapping[str, Any], name: NamesOf) -> Markup:
    """One verdict: about whom, what, and why; the texts folded below."""
    turn = int(row["turn"])
    about = f"{row['question']}, turn {turn}" if turn > 1 else str(row["question"])
    small = [f"{row['category']}", *(flag for flag in str(row["flags"]).split(",") if flag)]
    texts = [("Question", row["prompt"]), (f"Answer of {name(row['model_a'])}", row["answer_a"])]
    if row["run_b"]:
        texts.append((f"Answer of {name(row['model_b'])}", row["answer_b"]))
    folded = [join([tag("h4", title), tag("pre", cut(text))]) for title, text in texts]
    key = "-".join(str(row[k]) for k in ("question", "turn", "run_a", "run_b", "swapped"))
    return tag(
        "article",
        tag("div", tag("b", about), tag("span", outcome(row, name), class_="outcome"),
            class_="between wrap"),
        tag("p", tag("small", " · ".join(small))),
        tag("pre", cut(row["text"])) if row["text"] else tag("p", unsaid(row), class_="muted"),
        tag("details", tag("summary", "Question and answers"), folded, data_key=f"texts-{key}"),
        class_="verdict",
        data_key=f"verdict-{key}",
    )  # fmt: skip


def outcome(row: Mapping[str, Any], name: NamesOf) -> str:
    """What the verdict comes to, in words."""
    if row["failed"]:
        return f"failed: {row['failed']}"
    one, two = name(row["model_a"]), name(row["model_b"])
    if not row["run_b"]:
        return f"{one}: {row['score']:g} of 10"
    order = f", {two} shown first" if row["swapped"] else f", {one} shown first"
    preference = float(row["preference"])
    if preference == 1.5:
        return f"tie{order}"
    winner = one if preference < 1.5 else two
    sure = abs(preference - 1.5) + 0.5
    return f"{winner} is better{f' ({sure:.0%})' if sure < 1 else ''}{order}"


def unsaid(row: Mapping[str, Any]) -> str:
    """Why there are no words of the judge."""
    flags = str(row["flags"])
    if "identical" in flags:
        return "The answers are identical, so nobody was asked."
    if "empty" in flags:
        return "An answer is empty, so nobody was asked."
    return "The judge said nothing."


def cut(text: Any) -> str:
    """At most SHOWN characters."""
    whole = str(text or "")
    return whole if len(whole) <= SHOWN else f"{whole[:SHOWN]}\n[{len(whole) - SHOWN} more]"


# ---- parts of tables -----------------------------------------------------------------------


def pager(page: int, total: int, size: int, what: str) -> Markup | None:
    """Which rows these are, with the way to the others."""
    if not total:
        return None
    last = max(1, -(-total // size))
    first, end = size * (page - 1) + 1, min(size * page, total)
    words = f"{look.whole(first)} to {look.whole(end)} of {look.whole(total)} {what}"
    steps = [
        tag("button", title, class_="tool", data_set={"page": "" if to == 1 else str(to)},
            aria_label=f"{title} page", aria_disabled=None if 1 <= to <= last else "true",
            disabled=not 1 <= to <= last)
        for title, to in (("Previous", page - 1), ("Next", page + 1))
    ]  # fmt: skip
    return tag("div", tag("small", words), tag("span", steps, class_="row"), class_="between pager")


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    """A table whose first column names the row; numbers to the right."""
    head = [
        tag("th", title, scope="col", class_="number" if at else None)
        for at, title in enumerate(titles)
    ]
    lines = [
        tag("tr", tag("th", row[0], scope="row"), [tag("td", c, class_="number") for c in row[1:]])
        for row in rows
    ]
    body = tag("table", tag("thead", tag("tr", head)), tag("tbody", lines))
    return tag("div", body, class_="scroll")


def with_interval(value: float | None, stderr: float | None, how: str) -> Markup:
    """`7.42 ±0.31`; a dash where there is no number."""
    if value is None or pd.isna(value):
        return missing(NO_NUMBER)
    half = None if stderr is None or pd.isna(stderr) else NORMAL_95 * float(stderr)
    plain = how.replace("+", "")
    return join([how.format(value), tag("small", f" ±{plain.format(half)}") if half else None])


def cell(value: float | None, how: str) -> Any:
    """A number, or a dash that says why there is none."""
    return missing(NO_NUMBER) if value is None or pd.isna(value) else how.format(value)


def missing(why: str) -> Markup:
    """A dash with its reason."""
    return tag("span", look.MISSING, title=why, class_="missing")


def bar(share: float) -> Markup:
    """A share as a bar."""
    return tag("span", tag("i", style=f"width:{100 * share:.1f}%"), class_="meter")


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain dictionaries."""
    return [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]
