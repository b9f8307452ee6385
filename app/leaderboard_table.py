"""The table of the leaderboard: votes, metrics and cost of every variant in one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup

from app import look, rows
from app.context import Picks
from app.leaderboard_rows import Board
from app.leaderboard_words import together
from app.markup import join, search_box, tag
from app.table import number_cell
from app.table_parts import having, heading, links, ordered
from results_db.ratings import FEW_VOTES

MOST = 300  # rows sent at once; search narrows the rest down
GROUPS = {"people": "People", "judge": "Judge", "automatic": "Automatic", "cost": "Cost"}
COST = (
    "bits_per_weight",
    "weight_bytes",
    "kv_bytes_per_token",
    "peak_memory_bytes",
    "ttft_ms",
    "tpot_ms",
    "decode_tps",
    "mbu",
)
USUAL = ("perplexity", "mean_kld", "same_top")
TASK_UNITS = ("fraction", "share", "accuracy")
MOST_TASKS = 1  # columns of task scores shown unless others are picked


@dataclass(frozen=True)
class Scale:
    """Where a rating stands between the ends that all dots of the table share."""

    low: float
    high: float
    base: float | None

    def at(self, rating: float) -> float:
        """Per cent from the left, kept inside."""
        share = (rating - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)


def board_table(board: Board, picks: Picks) -> Markup:
    """Search, columns and downloads above; the table in its own scrolling frame."""
    table = shown(board, picks)
    names = measured_columns(board, picks)
    scale = scale_of(board)
    groups = [g for g in groups_of(board) if g not in picks.hide]
    lines = list(_lines(table.head(MOST), names, groups, scale, board, picks))
    head = _head(board, names, groups, scale, picks)
    body = tag("table", head, tag("tbody", lines), class_="board runs")
    frame = tag(
        "div", body, class_="scroll", tabindex="0", role="region", aria_label="Leaderboard table"
    )
    parts = [_tools(board, names, picks), frame]
    if len(table) > MOST:
        parts.append(tag("p", f"The first {MOST} of {len(table)} rows; search to see others."))
    if not len(table):
        parts.append(tag("p", "No variant passes these filters.", class_="muted pad"))
    return join(parts)


def shown(board: Board, picks: Picks) -> pd.DataFrame:
    """Rows that pass the filters, sorted as picked; missing values last."""
    table = board.rows
    for chosen, column in ((picks.family, "family"), (picks.bits, "bits")):
        if chosen:
            table = table[table[column].isin(chosen) | table["is_baseline"].astype(bool)]
    return ordered(having(table, ("name", "text", "variant"), picks.search), picks.sort)


def groups_of(board: Board) -> list[str]:
    """Column groups that have something to show here."""
    automatic = ["automatic", "cost"] if board.measured else []
    return ["people", *(["judge"] if board.judge else []), *automatic]


def measured_columns(board: Board, picks: Picks) -> list[str]:
    """Measurements with a column: the picked ones, else the well-known that are measured."""
    names = board.measured
    if picked := [name for name in names if name in picks.columns]:
        return picked
    tasks = [n for n in names if n not in look.LABELS and _unit(board, n) in TASK_UNITS]
    kept = {*USUAL, *COST, *tasks[:MOST_TASKS]}
    return [name for name in names if name in kept]


def _unit(board: Board, name: str) -> str:
    return rows.condition(board.rows, name, "unit")


def split(names: Iterable[str], group: str) -> list[str]:
    """Of measurement names, those of the automatic or of the cost columns."""
    return [name for name in names if (name in COST) == (group == "cost")]


def scale_of(board: Board) -> Scale | None:
    """One scale for the dots of people and judge; None without a rating."""
    table = board.rows
    ends = [table[c].dropna() for c in ("low", "high", "judge_low", "judge_high") if c in table]
    values = pd.concat(ends) if ends else pd.Series(dtype=float)
    if not len(values):
        return None
    base = table[table["is_baseline"].astype(bool)]["rating"].dropna()
    low, high = float(values.min()), float(values.max())
    room = 0.04 * (high - low) or 10.0
    return Scale(low - room, high + room, float(base.iloc[0]) if len(base) else None)


# ---- above the table -----------------------------------------------------------------------


def _tools(board: Board, names: Sequence[str], picks: Picks) -> Markup:
    search = search_box("Search variants", value=picks.search, data_param="search")
    switches = [
        tag(
            "button",
            GROUPS[group],
            class_="chip",
            aria_pressed="false" if group in picks.hide else "true",
            data_toggle={"name": "hide", "value": group},
            title=f"Columns: {GROUPS[group].lower()}",
        )
        for group in groups_of(board)
    ]
    chips = tag(
        "span",
        tag("span", "Columns", class_="chip-title"),
        switches,
        class_="chips",
        role="group",
        aria_label="Column groups",
    )
    menu = _column_menu(board, names) if board.measured else None
    left = tag("span", search, chips, class_="board-filters")
    files = links("leaderboard", "this table", picks.query())
    return tag("div", left, tag("span", menu, files, class_="tools"), class_="table-tools")


def _column_menu(board: Board, names: Sequence[str]) -> Markup:
    entries = []
    for name in board.measured:
        rest = [n for n in names if n != name] if name in names else [*names, name]
        box = tag(
            "input", type="checkbox", checked=name in names, tabindex="-1", aria_hidden="true"
        )
        entries.append(
            tag(
                "button",
                box,
                look.label(name),
                class_="entry",
                data_set={"columns": "~".join(rest)},
                aria_pressed=str(name in names).lower(),
            )
        )
    summary = tag("summary", "Metrics", class_="tool")
    return tag(
        "details", summary, tag("div", entries, class_="menu"), data_menu=True, data_key="metrics"
    )


# ---- head ----------------------------------------------------------------------------------


def _head(
    board: Board, names: Sequence[str], groups: Sequence[str], scale: Scale | None, picks: Picks
) -> Markup:
    bands = [tag("th", class_="name")]
    cells = [heading("name", "Variant", "name", picks)]
    for group in groups:
        made = _headings(board, group, names, scale, picks)
        if made:
            title = together(board).replace("the ", "") if group == "people" else GROUPS[group]
            band = tag("span", title[0].upper() + title[1:])
            bands.append(tag("th", band, colspan=len(made), scope="colgroup", class_="band"))
            cells += made
    if board.measured:
        bands.append(tag("th"))
        cells.append(heading("notes", "Notes", "number", picks))
    return tag("thead", tag("tr", bands, class_="bands"), tag("tr", cells))


def _headings(
    board: Board, group: str, names: Sequence[str], scale: Scale | None, picks: Picks
) -> list[Markup]:
    if group == "people":
        elo = [heading("elo", "Online Elo", "number", picks)] if picks.elo else []
        return [
            heading("rank", "Rank", "number", picks),
            _scale_heading("rating", scale, picks),
            heading("rating", "Rating", "number", picks),
            heading("votes", "Votes", "number", picks),
            heading("win_rate", "Mean win rate", "number", picks),
            *elo,
        ]
    if group == "judge":
        return [
            _scale_heading("judge_rating", scale, picks),
            heading("judge_rating", "Rating", "number", picks),
            heading("judge_votes", "Votes", "number", picks),
        ]
    return [heading(name, _title(board, name), "number", picks) for name in split(names, group)]


def _title(board: Board, name: str) -> str:
    unit = look.heading_unit(name, _unit(board, name))
    arrow = {"lower": " ↓", "higher": " ↑"}.get(rows.condition(board.rows, name, "better"), "")
    return f"{look.label(name, short=True)}{f', {unit}' if unit else ''}{arrow}"


def _scale_heading(column: str, scale: Scale | None, picks: Picks) -> Markup:
    if scale is None:
        return tag("th", scope="col", class_="spread", aria_label="Rating as a dot")
    ends = [tag("span", f"{end:.0f}") for end in (scale.low, scale.high)]
    middle = None
    if scale.base is not None and 35 < scale.at(scale.base) < 65:
        style = f"left:{scale.at(scale.base)}%"
        middle = tag("span", f"{scale.base:.0f}", class_="at-base", style=style)
    axis = tag("span", ends[0], middle, ends[1], class_="scale-ends", aria_hidden="true")
    return tag("th", axis, scope="col", class_="spread", aria_label="Rating with 95 % interval")


# ---- rows ----------------------------------------------------------------------------------


def _lines(
    table: pd.DataFrame,
    names: Sequence[str],
    groups: Sequence[str],
    scale: Scale | None,
    board: Board,
    picks: Picks,
) -> Iterable[Markup]:
    """Rows; a line between tiers and a band between groups while they are in order of rating."""
    group = None
    cuts = set() if picks.sort else tiers(table)
    for at, record in enumerate(rows.records(table)):
        if not picks.sort and at and record["group"] != group:
            yield _band(record)
        group = record["group"]
        yield _line(record, names, groups, scale, board, picks, at in cuts)


def tiers(table: pd.DataFrame) -> set[int]:
    """Places in order of rating where every rank from there on is above all ranks before it."""
    cuts, ranks, groups = set(), list(table["rank"]), list(table["group"])
    for at in range(1, len(ranks)):
        here = [i for i, group in enumerate(groups) if group == groups[at]]
        above, below = ([ranks[i] for i in here if (i < at) == side] for side in (True, False))
        if above and max(above) < min(below):
            cuts.add(at)
    return cuts


def _band(record: rows.Record) -> Markup:
    rated = record["rating"] == record["rating"]
    words = (
        "Not comparable with those above: no battle links them."
        if rated
        else "No votes that count yet."
    )
    return tag("tr", tag("td", words, colspan=40), class_="apart")


def _line(
    record: rows.Record,
    names: Sequence[str],
    groups: Sequence[str],
    scale: Scale | None,
    board: Board,
    picks: Picks,
    tier: bool,
) -> Markup:
    cells = [_name_cell(record)]
    for group in groups:
        cells += _cells(record, group, names, scale, board, picks)
    if board.measured:
        count, text = int(record["notes"] or 0), str(record["notes_text"] or "")
        cells.append(tag("td", count if count else "", class_="number", title=text or None))
    classes = " ".join(c for c, on in (("few", record["few"]), ("tier", tier)) if on)
    return tag("tr", cells, data_key=record["variant"], class_=classes or None)


def _name_cell(record: rows.Record) -> Markup:
    baseline = bool(record["is_baseline"])
    mark = look.mark(record["target"], record["packed"], record["family"], baseline)
    name = record["name"]
    if record["run_id"]:
        name = tag("a", name, href=f"/run?id={record['run_id']}", data_carry=True)
    few = tag("small", "few votes", class_="few-mark") if record["few"] else None
    text = "the unquantized model" if baseline else record["text"]
    inside = tag("span", mark, name, few)
    return tag("th", inside, scope="row", class_="recipe name", title=text)


def _cells(
    record: rows.Record,
    group: str,
    names: Sequence[str],
    scale: Scale | None,
    board: Board,
    picks: Picks,
) -> list[Markup]:
    if group == "people":
        elo = [_plain(record["elo"], ".0f", "No votes.")] if picks.elo else []
        return [
            _rank(record, board),
            _spread(record, "", scale),
            _rating(record, "", board),
            _votes(record["votes"]),
            _plain(record["win_rate"], ".0%", "No decided battle."),
            *elo,
        ]
    if group == "judge":
        return [
            _spread(record, "judge_", scale),
            _rating(record, "judge_", board),
            _votes(record["judge_votes"]),
        ]
    return [_measured(record, name) for name in split(names, group)]


def _missing(why: str) -> Markup:
    return tag("td", look.MISSING, class_="number missing", title=why)


def _plain(value: float, form: str, why: str) -> Markup:
    if value is None or pd.isna(value):
        return _missing(why)
    return tag("td", format(value, form).replace("%", " %"), class_="number")


def _votes(count: float) -> Markup:
    return tag("td", look.whole(0 if pd.isna(count) else count), class_="number")


def _rank(record: rows.Record, board: Board) -> Markup:
    if pd.isna(record["rank"]):
        return _missing("No votes that count.")
    if record["few"]:
        return _missing(f"Fewer than {FEW_VOTES} votes: no rank.")
    if not board.people.separated:
        return _missing("All intervals overlap: the votes do not order these variants.")
    return tag(
        "td",
        f"{record['rank']:.0f}",
        class_="number rank",
        title="1 more than the number of variants whose interval lies above this one",
    )


def _rating(record: rows.Record, who: str, board: Board) -> Markup:
    rating = record[f"{who}rating"]
    if pd.isna(rating):
        return _missing("No votes that count.")
    down, up = rating - record[f"{who}low"], record[f"{who}high"] - rating
    spread = f"±{up:.0f}" if abs(up - down) < 1 else f"−{down:.0f} +{up:.0f}"
    spread = spread if max(up, down) >= 0.5 else "fixed"
    mark = None
    if not who and board.people.regularised:
        mark = tag("sup", "r", title="Regularised: see the note above the table")
    return tag(
        "td", f"{rating:.0f}".replace("-", "−"), mark, tag("small", spread, class_="pm"),
        class_="number",
    )  # fmt: skip


def _spread(record: rows.Record, who: str, scale: Scale | None) -> Markup:
    """A dot and its interval, drawn where the numbers put them."""
    rating = record[f"{who}rating"]
    if scale is None or pd.isna(rating):
        return tag("td", class_="spread")
    low, high = record[f"{who}low"], record[f"{who}high"]
    left, right = scale.at(low), scale.at(high)
    colour = look.INK if record["is_baseline"] else look.family_colour(str(record["family"]))
    base = None
    if scale.base is not None:
        base = tag("i", class_="base", style=f"left:{scale.at(scale.base)}%")
    bar = tag("i", class_="bar-95", style=f"left:{left}%;width:{right - left:.2f}%")
    dot = tag("i", class_="dot-at", style=f"left:{scale.at(rating)}%")
    said = f"rating {rating:.0f}, 95 % interval {low:.0f} to {high:.0f}"
    drawing = tag(
        "span", base, bar, dot, class_="track", style=f"--c:{colour}", role="img", aria_label=said
    )
    return tag("td", drawing, class_="spread", title=said)


def _measured(record: rows.Record, name: str) -> Markup:
    """A measured number; an en dash says on hover why there is none."""
    why = record.get(f"{name}__why")
    if isinstance(why, str) and why:
        return _missing(why)
    return number_cell(record, name)
