"""Memory against context on Compare: how much context each KV recipe leaves room for."""

from __future__ import annotations

from urllib.parse import urlencode

import pandas as pd
from markupsafe import Markup

from app import look, rows
from app.charts import memory
from app.context import Picks
from app.markup import join, tag
from app.widgets import chart_value
from results_db.store import Store

NAME = "memory"  # in the URL's list of charts shown as tables
FIRST = "KV8\nKV4\nKIVI-4\nKIVI-2\nKVQuant-3bit-1%"
METRICS = "perplexity(limit=16)\nsize"
WAITING = (
    "How much context fits into memory is drawn here once a recipe that rounds the key-value "
    "cache is measured."
)
ABOUT = (
    "One sequence, weights and cache only, nothing of what computing needs beside them. Weights "
    "are as measured; cache bytes follow the formula that each run checked against a packed cache, "
    "newest and first tokens in 16 bits counted as such, at the fullest on the way to a length."
)


def parts(store: Store, picks: Picks) -> list[str]:
    """Head, chart, and the table or what the chart leaves out."""
    table = memory.chart_rows(store, picks)
    if table["is_baseline"].all():
        return [join([tag("h2", memory.CHART.title), waiting(table, picks)]), "", ""]
    if NAME in picks.tables:
        return [head(table, picks), "", join([as_table(table), about(table)])]
    chart = chart_value(memory.draw(table), memory.say(table))
    return [head(table, picks), chart, about(table)]


def waiting(table: pd.DataFrame, picks: Picks) -> Markup:
    """Before the first KV recipe: what will be here and the link that fills it."""
    link = tag(
        "a", "Measure KV recipes", href=new_run(picks.model, FIRST, METRICS), class_="button"
    )
    lines = [tag("p", WAITING, class_="muted"), old(table), tag("p", link)]
    return tag("div", lines, class_="card-empty")


def new_run(model: str, recipes: str, metrics: str) -> str:
    """Address of New run with recipes and metrics filled in."""
    fields = {"model": model, "recipes": recipes, "metrics": metrics}
    return "/new?" + urlencode({name: text for name, text in fields.items() if text})


def head(table: pd.DataFrame, picks: Picks) -> Markup:
    """Title, the budget, the sentence, and what fits of each recipe, its line beside it."""
    as_table_now = NAME in picks.tables
    field = tag(
        "input",
        type="text",
        value=picks.budget,
        placeholder=look.in_bytes(table.attrs["budget"]),
        data_param="budget",
        aria_label="Memory budget, such as 4 GiB",
        size=12,
    )
    switch = tag(
        "button",
        "Show as chart" if as_table_now else "Show as table",
        class_="tool",
        aria_pressed=str(as_table_now).lower(),
        aria_label=f"{memory.CHART.title}: show as {'chart' if as_table_now else 'table'}",
        data_toggle={"name": "tables", "value": NAME},
    )
    tools = tag("span", tag("label", "Budget ", field), switch, class_="tools")
    top = tag("div", tag("h2", memory.CHART.title), tools, class_="axis-row")
    said = tag("p", memory.say(table), aria_live="polite")
    return join([top, said, budget_words(table, picks), fitting(table)])


def budget_words(table: pd.DataFrame, picks: Picks) -> Markup | None:
    """Where the budget comes from, unless it was asked for."""
    if table.attrs["unreadable"]:
        sentence = f"“{picks.budget}” is no amount of memory; write it like 4 GiB or 512 MiB."
        return tag("p", sentence, class_="warn")
    if table.attrs["asked"] or not table["is_baseline"].any() or not table.attrs["context"]:
        return None
    own = memory.tokens(table.attrs["context"])
    return tag(
        "p", f"The budget is what the 16-bit model takes at its own context, {own}.", class_="muted"
    )


def fitting(table: pd.DataFrame) -> Markup:
    """The longest context of every recipe that is drawn: the legend of the chart, too."""
    items = [
        tag("li", sample(*style), record["name"], " ", tag("b", memory.whole(record["longest"])))
        for record, style in memory.drawn(table)
    ]
    title = tag("span", "Tokens that fit:", class_="muted")
    return tag("div", title, tag("ul", items, class_="marks families"), class_="fitting")


def sample(colour: str, dash: str) -> Markup:
    """A piece of a line."""
    style = f"stroke:{colour};stroke-width:2;stroke-dasharray:{memory.DASHES[dash]}"
    path = tag(
        "path", d="M0 3H28", style=style if memory.DASHES[dash] else style.rpartition(";")[0]
    )
    return tag("svg", path, viewBox="0 0 28 6", class_="line-sample", aria_hidden="true")


def about(table: pd.DataFrame) -> Markup:
    """What is counted, and what the lines do not show."""
    own, hidden = table.attrs["context"], len(table) - memory.MOST_LINES
    notes = [ABOUT]
    if own and (table["longest"] > own).any():
        notes.append(
            f"The model itself reads at most {memory.tokens(own)} (dotted line): beyond that, the "
            "lines are about memory alone."
        )
    if hidden > 0:
        notes.append(f"{hidden} more recipes are in the table; filters above choose among them.")
    return join([tag("p", " ".join(notes), class_="muted"), old(table)])


def old(table: pd.DataFrame) -> Markup | None:
    """Runs that were measured before their caches were described."""
    count = table.attrs["old"]
    if not count:
        return None
    runs = "1 run was" if count == 1 else f"{count} runs were"
    it = "it" if count == 1 else "them"
    sentence = f"{runs} measured by an earlier version; measure {it} again to see {it} here."
    return tag("p", sentence, class_="muted")


def as_table(table: pd.DataFrame) -> Markup:
    """A line per recipe; each opens its run."""
    own = table.attrs["context"]
    more = f"At {look.whole(own)} tokens" if own else "At 1 token"
    heads = [*memory.columns(table).values(), more]
    cells = [
        tag("th", text, scope="col", class_="number" if at else None)
        for at, text in enumerate(heads)
    ]
    lines = [line(record, max(own, 1)) for record in rows.records(table)]
    body = tag("table", tag("thead", tag("tr", cells)), tag("tbody", lines))
    return tag("div", body, class_="scroll as-table")


def line(record: rows.Record, own: int) -> Markup:
    """One recipe: what fits, and what it takes."""
    sizes = (record["weights"], record["per_token"], memory.total(record, own))
    texts = [memory.whole(record["longest"]), *map(look.in_bytes, sizes)]
    link = tag("a", record["name"], href=f"/run?id={record['run_id']}", data_carry=True)
    numbers = [tag("td", text, class_="number") for text in texts]
    return tag("tr", tag("th", link, scope="row"), numbers)
