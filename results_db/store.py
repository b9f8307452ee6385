"""The one owner of results.duckdb. Reads from any thread; writes take turns."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa

from results_db.database import StoreError, connect, first_line
from results_db.events import KEYS, Row, fold, from_spec, new_run

__all__ = ["Store", "StoreError"]

RUN_TABLES = (
    *("items", "layers", "measurements", "notes", "runs"),
    *("judged_answers", "mined", "verdicts", "kernel_times", "ceilings"),
)
VECTOR = 2048  # rows in one of DuckDB's result vectors

Cursor = duckdb.DuckDBPyConnection


class Store:
    """A copy, in one file, of what the run folders say."""

    def __init__(self, path: Path) -> None:
        """Open or make the database at `path`; StoreError says why where that cannot be."""
        self.path = path
        self._connection = connect(path)
        self._writing = threading.Lock()
        self._version = 0

    @property
    def version(self) -> int:
        """Grows with every change that a reader could see."""
        return self._version

    def close(self) -> None:
        """Write everything into the one file and let go of it, after any write under way."""
        with self._writing:
            self._connection.close()

    def offset(self, run_id: str) -> int:
        """Bytes of the run's events that are already in the database."""
        with self._read() as cursor:
            run = _run(cursor, run_id)
        return run["seen_bytes"] if run else 0

    def ingest(
        self, run_id: str, spec: str, events: Sequence[Mapping[str, Any]], offset: int
    ) -> None:
        """Store what `events` say and that they end at byte `offset`: both or neither.

        Events are a run's file in order, so a batch that ends before what was already copied
        holds nothing new, and one that overlaps it says the same again.
        """
        self.write(lambda cursor: _ingest(cursor, run_id, spec, events, offset))

    def delete(self, run_id: str) -> None:
        """Forget a run: all its rows, and how far its events were read."""
        self.write(lambda cursor: _delete(cursor, run_id))

    def frame(self, sql: str, **params: Any) -> pd.DataFrame:
        """Rows of our own query; `$name` in it stands for the argument `name`."""
        with self._read() as cursor:
            return cursor.execute(sql, params).df()

    def coded(self, sql: str, **params: Any) -> pd.DataFrame:
        """Like `frame`, with text as categories in their order: a million rows of few different
        texts come three times as fast."""
        with self._read() as cursor:
            rows = cursor.sql(sql, params=params).to_arrow_table()
        columns = [_dictionary(column) for column in rows.columns]
        frame = pa.table(columns, names=rows.column_names).to_pandas()
        words = frame.select_dtypes("category").columns
        ordered = {
            n: frame[n].cat.reorder_categories(sorted(frame[n].cat.categories)) for n in words
        }
        return frame.assign(**ordered)

    def query(self, sql: str, *, seconds: float = 10, rows: int = 10_000) -> pd.DataFrame:
        """The first `rows` rows of a stranger's query: one SELECT that ends within `seconds`."""
        with self._read() as cursor:
            timer = threading.Timer(seconds, cursor.interrupt)
            timer.daemon = True
            try:
                _check_select(cursor, sql)
                timer.start()
                return cursor.execute(sql).fetch_df_chunk(rows // VECTOR + 1).head(rows)
            except duckdb.InterruptException as error:
                raise StoreError(
                    f"The query took longer than {seconds:g} s; narrow it or add a LIMIT."
                ) from error
            except duckdb.Error as error:
                raise StoreError(first_line(error)) from error
            finally:
                timer.cancel()

    def snapshot(self) -> dict[str, pa.Table]:
        """Every table as it was at one moment, with NULL and NaN told apart."""
        with self._read() as cursor:
            names = [name for (name,) in cursor.execute("SHOW TABLES").fetchall()]
            return {n: cursor.sql(f"FROM {n} ORDER BY ALL").to_arrow_table() for n in names}

    def write(self, change: Callable[[Cursor], bool]) -> None:
        """Make one change, whole or not at all; it says whether a reader could see it."""
        with self._writing, closing(self._connection.cursor()) as cursor:
            cursor.execute("BEGIN")
            visible = change(cursor)  # an exception closes the cursor, which rolls back
            cursor.execute("COMMIT")
            # After the commit: who sees the new version must find the new rows.
            self._version += visible

    @contextmanager
    def _read(self) -> Iterator[Cursor]:
        with closing(self._connection.cursor()) as cursor:
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            yield cursor


def _ingest(
    cursor: Cursor, run_id: str, spec: str, events: Sequence[Mapping[str, Any]], offset: int
) -> bool:
    old = _run(cursor, run_id)
    if old and offset < old["seen_bytes"]:
        return False
    batch = fold((old or new_run(run_id, spec)) | from_spec(spec), events)
    changed = _save_run(cursor, old, batch.run | {"seen_bytes": offset})
    for table, rows in batch.tables.items():
        fresh = _replace(cursor, table, run_id, list(rows.values()))
        changed |= bool(fresh)
        if table == "measurements":
            _replace_items(cursor, [(row, batch.items[_key(row)]) for row in fresh])
    return changed


def _delete(cursor: Cursor, run_id: str) -> bool:
    known = _run(cursor, run_id) is not None
    for table in RUN_TABLES:
        cursor.execute(f"DELETE FROM {table} WHERE {_owner(table)} = ?", [run_id])
    return known


def _check_select(cursor: Cursor, sql: str) -> None:
    kinds = [statement.type for statement in cursor.extract_statements(sql)]
    if kinds != [duckdb.StatementType.SELECT]:
        given = ", ".join(kind.name for kind in kinds) or "nothing"
        raise StoreError(f"One SELECT statement is allowed here, and this is {given}.")


def _run(cursor: Cursor, run_id: str) -> Row | None:
    found = cursor.execute("SELECT * FROM runs WHERE run_id = ?", [run_id])
    names = [column[0] for column in found.description]
    rows = found.fetchall()  # fetchone would leave the cursor busy with the rest
    return dict(zip(names, rows[0], strict=True)) if rows else None


def _save_run(cursor: Cursor, old: Row | None, new: Row) -> bool:
    """Write the run's row where it differs -> whether more than the byte offset did."""
    if old is None:
        insert(cursor, "runs", [new])
        return True
    moved = [name for name, value in new.items() if value != old[name]]
    if moved:
        # No upsert: an update of columns outside the key leaves the index alone.
        columns = ", ".join(f"{name} = ${name}" for name in moved)
        values = {name: new[name] for name in [*moved, "run_id"]}
        cursor.execute(f"UPDATE runs SET {columns} WHERE run_id = $run_id", values)
    return bool(set(moved) - {"seen_bytes"})


def _replace(cursor: Cursor, table: str, run_id: str, rows: list[Row]) -> list[Row]:
    """Put `rows` in the place of those with their keys -> the rows not there already."""
    if not rows:
        return []
    given = _arrow(cursor, table, rows)
    fresh = _absent(cursor, table, run_id, given)
    if fresh.num_rows:
        cursor.register("fresh", fresh)
        cursor.execute(f"DELETE FROM {table} USING fresh WHERE {_same(table, KEYS[table])}")
        cursor.execute(f"INSERT INTO {table} BY NAME SELECT * FROM fresh")
        cursor.unregister("fresh")
    return fresh.to_pylist()


def _absent(cursor: Cursor, table: str, run_id: str, given: pa.Table) -> pa.Table:
    """Rows of `given` that the table does not hold in every column, in their order."""
    cursor.register("fresh", given)
    whole = _same(table, given.column_names)
    held = f"SELECT 1 FROM {table} WHERE {table}.{_owner(table)} = $run_id AND {whole}"
    sql = f"SELECT * FROM fresh WHERE NOT EXISTS ({held})"
    absent = cursor.sql(sql, params={"run_id": run_id}).to_arrow_table()
    cursor.unregister("fresh")
    return absent


def _replace_items(cursor: Cursor, measured: list[tuple[Row, list[float | None]]]) -> None:
    """Items of the measurements given; those of their earlier values go."""
    for row, values in measured:
        key = {name: row[name] for name in KEYS["measurements"]}
        where = " AND ".join(f"{name} = ${name}" for name in key)
        cursor.execute(f"DELETE FROM items WHERE {where}", key)
        insert(cursor, "items", [key | {"item": i, "value": v} for i, v in enumerate(values)])


def insert(cursor: Cursor, table: str, rows: list[Row]) -> None:
    """Add rows to a table, each column as the table has it."""
    if rows:
        cursor.register("fresh", _arrow(cursor, table, rows))
        cursor.execute(f"INSERT INTO {table} BY NAME SELECT * FROM fresh")
        cursor.unregister("fresh")


def _arrow(cursor: Cursor, table: str, rows: list[Row]) -> pa.Table:
    """Arrow, because pandas cannot tell a missing number from NaN. Typed as the table is."""
    return pa.Table.from_pylist(rows, cursor.sql(f"FROM {table} LIMIT 0").to_arrow_table().schema)


def _dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text as places in a list of the different texts; other columns as they are."""
    return column.dictionary_encode() if pa.types.is_string(column.type) else column


def _owner(table: str) -> str:
    """Column with the id of the job whose events a row comes from."""
    return KEYS.get(table, ("run_id",))[0]


def _key(row: Row) -> tuple:
    return tuple(row[name] for name in KEYS["measurements"])


def _same(table: str, columns: Sequence[str]) -> str:
    return " AND ".join(f"{table}.{c} IS NOT DISTINCT FROM fresh.{c}" for c in columns)
