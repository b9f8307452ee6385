"""What searchable, sortable tables share: headings that sort, search, links to files."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from markupsafe import Markup

from app.context import Picks
from app.downloads import WRITERS
from app.markup import tag


def heading(column: str, text: str, kind: str, picks: Picks) -> Markup:
    """A column's heading; clicking it sorts rising, then falling, then not at all."""
    now, falling = picks.sort.removeprefix("-") == column, picks.sort.startswith("-")
    after = "" if now and falling else f"-{column}" if now else column
    arrow = tag("i", "↓" if falling else "↑", aria_hidden="true") if now else None
    order = ("descending" if falling else "ascending") if now else None
    button = tag("button", text, arrow, data_set={"sort": after})
    return tag("th", button, class_=kind or None, aria_sort=order, scope="col")


def ordered(table: pd.DataFrame, sort: str) -> pd.DataFrame:
    """Sorted by the column picked, with - in front for falling; missing values last."""
    column = sort.removeprefix("-")
    if column not in table.columns:
        return table
    rising = not sort.startswith("-")
    return table.sort_values(column, ascending=rising, na_position="last", kind="stable")


def having(table: pd.DataFrame, columns: Sequence[str], search: str) -> pd.DataFrame:
    """Rows that have every word of `search` somewhere in these columns."""
    words = search.lower().split()
    if not words:
        return table
    texts = [" ".join(map(str, values)).lower() for values in table[list(columns)].to_numpy()]
    return table[[all(word in text for word in words) for text in texts]]


def links(name: str, words: str, query: str = "") -> list[Markup]:
    """One link per format of /download/<name>."""
    return [
        tag(
            "a",
            kind.upper(),
            href=f"/download/{name}.{kind}{query}",
            class_="tool",
            download=True,
            title=f"Download {words} as {kind}",
        )
        for kind in WRITERS
    ]
