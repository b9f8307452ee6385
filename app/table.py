"""The table under the chart: every measured run, deltas to its baseline, sortable, selectable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from app import look, rows
from app.context import Picks
from app.markup import join, search_box, tag
from results_db.queries import with_baseline

ALWAYS = ("bits_per_weight", "weight_bytes", "perplexity", "mean_kld", "same_top", "decode_tps")
WITHOUT_DELTA = frozenset({"bits_per_weight", "kv_bytes_per_token"})
MOST = 300  # rows sent at once; search narrows the rest down


def runs_table(wide: pd.DataFrame, view: pd.DataFrame, picks: Picks) -> Markup:
    """Search, columns and downloads above; the table in its own scrolling frame."""
    names = shown_columns(wide, picks)
    compared = rows.with_bases(with_baseline(rows.kept(wide, picks), names), names)
    table = ordered(compared, picks)
    if picks.front:
        on = set(view["run_id"][view["front"]]) if len(view) else set()
        table = table[table["run_id"].isin(on) | table["is_baseline"].astype(bool)]
    drawn = set(view["run_id"]) if len(view) else set()
    lines = [_line(r, names, picks, drawn) for r in rows.records(table.head(MOST))]
    body = tag("table", _head(wide, names, picks), tag("tbody", lines), class_="runs")
    parts = [_tools(wide, names, picks), tag("div", body, class_="scroll", tabindex="0")]
    if len(table) > MOST:
        parts.append(tag("p", f"The first {MOST} of {len(table)} rows; search to see others."))
    if not len(table):
        parts.append(tag("p", "No run passes these filters.", class_="muted"))
    return join(parts)


def shown_columns(wide: pd.DataFrame, picks: Picks) -> list[str]:
    """Measurements with a column: the picked ones, else the well-known that are measured."""
    names = rows.measured(wide)
    picked = [name for name in picks.columns if name in names]
    if picked:
        return [name for name in names if name in picked]
    usual = [name for name in names if name in ALWAYS]
    tasks = [
        name
        for name in names
        if name not in look.LABELS and rows.condition(wide, name, "unit") in TASK_UNITS
    ]
    return usual + tasks[:1] or names[:5]


TASK_UNITS = ("fraction", "share", "accuracy")


def ordered(table: pd.DataFrame, picks: Picks) -> pd.DataFrame:
    """Sorted as picked; missing values last; by default the baseline first, then by size."""
    column = picks.sort.removeprefix("-")
    if column in table.columns:
        return table.sort_values(
            column, ascending=not picks.sort.startswith("-"), na_position="last", kind="stable"
        )
    size = next((name for name in rows.SIZE if name in table.columns), None)
    keys = ["is_baseline", *([size] if size else [])]
    return table.sort_values(keys, ascending=[False] * len(keys), kind="stable")


# ---- above the table -----------------------------------------------------------------------


def _tools(wide: pd.DataFrame, names: Sequence[str], picks: Picks) -> Markup:
    search = search_box("Search runs", value=picks.search, data_param="search")
    links = [
        tag(
            "a",
            kind.upper(),
            href=f"/download/runs.{kind}{picks.query()}",
            class_="tool",
            download=True,
            title=f"Download these rows as {kind}",
        )
        for kind in ("csv", "parquet", "json")
    ]
    tools = tag("span", _column_menu(wide, names), links, class_="tools")
    return tag("div", search, tools, class_="table-tools")


def _column_menu(wide: pd.DataFrame, names: Sequence[str]) -> Markup:
    """A list of all measurements; each entry is the URL with that column in or out."""
    entries = []
    for name in rows.measured(wide):
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
    summary = tag("summary", "Columns", class_="tool")
    return tag(
        "details", summary, tag("div", entries, class_="menu"), data_menu=True, data_key="columns"
    )


# ---- head ----------------------------------------------------------------------------------


def _head(wide: pd.DataFrame, names: Sequence[str], picks: Picks) -> Markup:
    cells = [_heading("Recipe", "name", picks, numeric=False)]
    for name in names:
        unit = look.heading_unit(name, rows.condition(wide, name, "unit"))
        cells.append(_heading(look.label(name, short=True), name, picks, unit=unit))
        if has_delta(name):
            cells.append(
                _heading(
                    "Δ",
                    f"{name}__delta",
                    picks,
                    title=f"{look.label(name)} compared with the 16-bit model",
                )
            )
    cells += [
        _heading("Stored", "storage", picks, numeric=False),
        _heading("On", "device", picks, numeric=False, sort=False),
        _heading("Notes", "notes", picks),
    ]
    return tag("thead", tag("tr", cells))


def has_delta(name: str) -> bool:
    """True where a difference to the 16-bit model says something of its own."""
    return (
        name not in WITHOUT_DELTA
        and not name.endswith("_kld")
        and name not in ("kld_p99", "rms_dp", "ppl_ratio", "same_top")
    )


def _heading(
    text: str,
    column: str,
    picks: Picks,
    *,
    numeric: bool = True,
    unit: str = "",
    title: str = "",
    sort: bool = True,
) -> Markup:
    words = join([text, tag("small", unit) if unit else None], " ")
    now = picks.sort.removeprefix("-") == column
    falling = picks.sort.startswith("-")
    after = "" if now and falling else f"-{column}" if now else column
    arrow = tag("i", "↓" if falling else "↑", aria_hidden="true") if now else None
    inner = tag("button", words, arrow, data_set={"sort": after}) if sort else tag("span", words)
    order = ("descending" if falling else "ascending") if now else None
    kind = "number" if numeric else None
    return tag("th", inner, class_=kind, title=title or None, aria_sort=order, scope="col")


# ---- rows ----------------------------------------------------------------------------------


def _line(record: Mapping[str, Any], names: Sequence[str], picks: Picks, drawn: set[str]) -> Markup:
    run_id = str(record["run_id"])
    cells = [_recipe_cell(record)]
    for name in names:
        cells.append(number_cell(record, name))
        if has_delta(name):
            cells.append(delta_cell(record, name))
    cells += [_stored(record), _place(record, names), _notes(record)]
    classes = join(["away" if run_id not in drawn else None], " ")
    return tag(
        "tr",
        cells,
        data_run=run_id,
        data_key=run_id + _where(record, names),
        tabindex="0",
        class_=classes or None,
        aria_selected="true" if run_id in picks.runs else "false",
        title=None if run_id in drawn else "Not on the chart: other conditions or no value there",
    )


def _recipe_cell(record: Mapping[str, Any]) -> Markup:
    baseline = bool(record["is_baseline"])
    dot = look.mark(record["target"], record["packed"], record["family"], baseline)
    name = tag("a", record["name"], href=f"/run?id={record['run_id']}", data_carry=True)
    text = record["text"] if not baseline else "the unquantized model"
    return tag("th", tag("span", dot, name), scope="row", class_="recipe", title=text)


def number_cell(record: Mapping[str, Any], name: str) -> Markup:
    """A value with its interval behind it; an en dash says on hover why there is none."""
    unit = str(record.get(f"{name}__unit") or "")
    value = record.get(name)
    if value is None or pd.isna(value):
        return tag("td", look.MISSING, class_="number missing", title=missing(record, name))
    spread = look.interval(name, record.get(f"{name}__stderr"), unit)
    n = record.get(f"{name}__n")
    count = f"n = {look.whole(n)}" if n is not None and not pd.isna(n) else None
    number = look.quantity(name, value, unit)
    return tag(
        "td",
        number,
        tag("small", spread, class_="pm") if spread else None,
        class_="number",
        title=count,
    )


def missing(record: Mapping[str, Any], name: str) -> str:
    """Why a run has no number of this name."""
    if record["state"] == "running":
        return "Not measured yet: the run is still going."
    if record["state"] in ("failed", "cancelled"):
        return f"Not measured: the run was {record['state']}."
    if name in ("ttft_ms", "tpot_ms", "decode_tps", "peak_memory_bytes") and not record["packed"]:
        return "Speed and memory of a simulated model would say nothing about the real one."
    return "Not among this run's metrics."


def delta_cell(record: Mapping[str, Any], name: str) -> Markup:
    """Difference to the 16-bit run under the same conditions; coloured if clearly apart."""
    base, value = record.get(f"{name}__base"), record.get(name)
    if record["is_baseline"] or base is None or pd.isna(base) or pd.isna(value):
        return tag("td", class_="number delta")
    text = look.delta(name, float(value), base, str(record.get(f"{name}__unit") or ""))
    return tag("td", text, class_=f"number delta {verdict(record, name)}".strip())


def verdict(record: Mapping[str, Any], name: str) -> str:
    """`better` or `worse` where the interval of the difference, taken as unpaired, excludes 0."""
    errors = [record.get(f"{name}__{what}") for what in ("stderr", "base_stderr")]
    known = [float(e) for e in errors if e is not None and not pd.isna(e)]
    gap = float(record[name]) - float(record[f"{name}__base"])
    if not abs(gap) > look.NORMAL_95 * math.hypot(*known):
        return ""
    improved = (gap < 0) == (record.get(f"{name}__better") != "higher")
    return "better" if improved else "worse"


def _stored(record: Mapping[str, Any]) -> Markup:
    return tag("td", "16-bit" if record["is_baseline"] else record["storage"])


def _where(record: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        device = record.get(f"{name}__device")
        if isinstance(device, str) and device:
            return f"{device}, {record[f'{name}__dtype']}"
    return ""


def _place(record: Mapping[str, Any], names: Sequence[str]) -> Markup:
    return tag("td", _where(record, names), class_="muted")


def _notes(record: Mapping[str, Any]) -> Markup:
    count = int(record["notes"] or 0)
    text = str(record["notes_text"] or "")
    return tag("td", count if count else "", class_="number", title=text or None)
