"""Every table of the database as files that other programs read."""

import json
import math
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import compute, csv, parquet

from results_db.store import Store

JSON_COLUMNS = frozenset(
    {"spec", "env", "error", "detail", "conversation_a", "conversation_b", "settings"}
)

# Texts that a spreadsheet takes for a formula, and those that only a guard in front keeps from it.
FORMULA = r"^'*[=+\-@\t\r＝＋－＠]"


def export(store: Store, folder: Path, format: str) -> list[Path]:
    """Write every table, as it is at one moment, to `<folder>/<table>.<format>` -> those files.

    Each file appears whole or not at all; one of the same name is replaced.
    """
    if format not in WRITERS:
        raise ValueError(f"There is no export format {format!r}; there are {', '.join(WRITERS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, table in store.snapshot().items():
        file = folder / f"{name}.{format}"
        part = file.with_name(file.name + ".part")
        WRITERS[format](table, part)
        os.replace(part, file)
        written.append(file)
    return written


def _write_csv(table: pa.Table, file: Path) -> None:
    """Missing is an empty field, a measured NaN is the word nan, no text is a formula."""
    columns = [_guarded(c) if pa.types.is_string(c.type) else c for c in table.columns]
    csv.write_csv(pa.table(columns, names=table.column_names), file)


def _guarded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same texts with an apostrophe before formulas: prompts are written by strangers."""
    prefixed = compute.binary_join_element_wise("'", column, "")
    return compute.if_else(compute.match_substring_regex(column, FORMULA), prefixed, column)


def _write_json(table: pa.Table, file: Path) -> None:
    """A list with one record per line."""
    lines = (json.dumps(_record(row), ensure_ascii=False) for row in table.to_pylist())
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _write_parquet(table: pa.Table, file: Path) -> None:
    parquet.write_table(table, file, compression="zstd")


def _record(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(name, value) for name, value in row.items()}


def _value(name: str, value: Any) -> Any:
    """JSON columns opened, times in ISO 8601 with Z, NaN and infinity as the events write them."""
    if isinstance(value, datetime):
        return value.isoformat() + "Z"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.loads(value) if name in JSON_COLUMNS and value is not None else value


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "csv": _write_csv,
    "json": _write_json,
    "parquet": _write_parquet,
}
