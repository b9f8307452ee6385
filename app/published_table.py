"""The published tab: every printed number with its source, apart from what was measured here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from markupsafe import Markup

from app import look, rows
from app.context import Picks
from app.markup import join, search_box, tag
from app.published_rows import name_of
from app.table_parts import having, heading, links, ordered
from backend import published

MOST = 300  # rows sent at once; filters narrow the rest down
FILTERS = {
    "printed": ("model", "Model"),
    "method": ("method", "Method"),
    "metric": ("metric", "Metric"),
}
SEARCHED = ("model", "method", "settings", "metric", "table", "source", "read_in", "note")
METRICS = {
    "wikitext2_ppl": "Perplexity, WikiText-2",
    "c4_ppl": "Perplexity, C4",
    "ptb_ppl": "Perplexity, PTB",
    "ppl": "Perplexity",
    "csqa_avg": "CSQA, mean of 6 tasks",
    "csqa_avg_4task": "CSQA, mean of 4 tasks",
    "csqa_avg_5task": "CSQA, mean of 5 tasks",
    "gsm8k_em": "GSM8K exact match",
    "mmlu_acc": "MMLU accuracy",
    "niah_match": "Needle found",
    "niah_accuracy": "Needles found",
    "arena_elo": "Arena Elo",
    "alpaca_eval_win_rate": "AlpacaEval win rate",
    "truthfulqa_bleu_acc": "TruthfulQA BLEU accuracy",
    "avg_acc": "Mean accuracy",
    "time_per_token_ms": "Time per token",
    "time_per_token_s": "Time per token",
}
CAPITALS = {"acc": "accuracy", "glue": "GLUE", "boolq": "BoolQ", "piqa": "PIQA", "arc": "ARC",
            "gpu": "GPU", "gb": "", "ms": ""}  # fmt: skip


def chosen(picks: Picks) -> pd.DataFrame:
    """Published rows that pass the filters and have every word searched for, sorted as picked."""
    table = published.results()
    for name, (column, _) in FILTERS.items():
        if value := getattr(picks, name):
            table = table[table[column] == value]
    table = table.assign(
        recipe=[name_of(r) for r in rows.records(table)],
        measure=table["metric"].map(metric_name),
    )
    table = having(table, (*SEARCHED, "recipe", "measure"), picks.search)
    return ordered(table, picks.sort).reset_index(drop=True)


def metric_name(metric: str) -> str:
    """`arc_easy_acc` -> `ARC easy accuracy`."""
    words = [CAPITALS.get(word, word) for word in metric.split("_")]
    text = " ".join(word for word in words if word)
    return METRICS.get(metric) or text[:1].upper() + text[1:]


def published_tab(picks: Picks) -> Markup:
    """What this is, filters, and the table in its own scrolling frame."""
    table = chosen(picks)
    lines = [_line(record) for record in rows.records(table.head(MOST))]
    body = tag("table", _head(picks), tag("tbody", lines), class_="board published-table")
    parts = [_tools(picks), tag("div", body, class_="scroll", tabindex="0", role="region",
                                aria_label="Published results")]  # fmt: skip
    if not len(table):
        parts.append(tag("p", "No published number passes these filters.", class_="muted pad"))
    elif len(table) > MOST:
        more = f"The first {MOST} of {look.whole(len(table))} numbers; filter to see others."
        parts.append(tag("p", more, class_="muted pad"))
    return join(parts)


def about() -> str:
    """What the tab holds, and how far it can be trusted."""
    table = published.results()
    return (
        f"{look.whole(len(table))} numbers from {table['source'].nunique()} sources, as printed. "
        "They were measured elsewhere, on other set-ups, so compare orderings first and then "
        "distances to the 16-bit row. Nothing here is mixed with what was measured here."
    )


def _tools(picks: Picks) -> Markup:
    search = search_box("Search published results", value=picks.search, data_param="search")
    fields = [_select(name, title, column, picks) for name, (column, title) in FILTERS.items()]
    used = any(getattr(picks, name) for name in FILTERS) or picks.search
    cleared = dict.fromkeys((*FILTERS, "search"), "")
    clear = tag("button", "Clear", class_="link", data_set=cleared) if used else None
    files = links("published", "these numbers", picks.query())
    left = tag("span", search, fields, clear, class_="board-filters")
    return tag("div", left, tag("span", files, class_="tools"), class_="table-tools")


def _select(name: str, title: str, column: str, picks: Picks) -> Markup:
    values: Iterable[str] = [v for v in published.results()[column].value_counts().index if v]
    words = metric_name if column == "metric" else str
    shown = sorted(values, key=lambda value: words(value).lower())
    now = getattr(picks, name)
    options = [tag("option", words(v), value=v, selected=v == now) for v in shown]
    first = tag("option", f"All {title.lower()}s", value="", selected=not now)
    return tag("select", first, options, data_param=name, aria_label=title)


COLUMNS: Sequence[tuple[str, str, str]] = (
    ("model", "Model", ""),
    ("recipe", "Method", ""),
    ("measure", "Metric", ""),
    ("value", "Value", "number"),
    ("effective_bits", "Effective bits", "number"),
    ("settings", "Settings", ""),
    ("source", "Source", ""),
)


def _head(picks: Picks) -> Markup:
    return tag("thead", tag("tr", [heading(*column, picks) for column in COLUMNS]))


def _line(record: rows.Record) -> Markup:
    value = f"{record['value']:.10g}"
    arrow = "↑" if record["better"] == "higher" else "↓"
    bits = record["effective_bits"]
    printed_in = join([record["table"], record["read_in"]], "; read in ")
    return tag(
        "tr",
        tag("th", record["model"], scope="row"),
        tag("td", record["recipe"]),
        tag("td", record["measure"], " ", _better(arrow, str(record["better"]))),
        tag("td", value, " ", tag("small", record["unit"]), class_="number"),
        tag("td", "" if pd.isna(bits) else f"{bits:.2f}", class_="number"),
        tag("td", record["settings"], _note(str(record["note"])), class_="wordy"),
        tag("td", record["source"], tag("small", printed_in), class_="wordy"),
    )


def _better(arrow: str, better: str) -> Markup:
    return tag("small", arrow, title=f"{better} is better", aria_label=f"({better} is better)",
               role="img")  # fmt: skip


def _note(note: str) -> Markup | None:
    return tag("small", note) if note else None
