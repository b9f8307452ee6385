"""Opening results.duckdb: one process, a known version, nothing read from outside."""

import os
import re
from datetime import UTC, datetime
from pathlib import Path

import duckdb

MIGRATIONS = Path(__file__).parent / "migrations"


class StoreError(ValueError):
    """What the store refuses, in one sentence for the person at the screen."""


def first_line(error: Exception) -> str:
    """DuckDB's own sentence, without the query it prints below."""
    return str(error).strip().partition("\n")[0]


def connect(path: Path) -> duckdb.DuckDBPyConnection:
    """Open the database at `path`, made or brought up to date where needed, and seal it."""
    try:
        connection = duckdb.connect(str(path), config=_config())
    except duckdb.Error as error:
        raise StoreError(_why_closed(path, first_line(error))) from error
    try:
        _seal(connection, path)
        migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def migrate(connection: duckdb.DuckDBPyConnection, folder: Path = MIGRATIONS) -> None:
    """Apply the numbered files that this database has not seen, each in its own transaction."""
    known = {int(file.name[:3]): file for file in sorted(folder.glob("[0-9][0-9][0-9]_*.sql"))}
    current = version_of(connection)
    newest = max(known, default=0)
    if current > newest:
        raise StoreError(
            f"The database has schema version {current} and this program knows up to {newest}; "
            "use the newer program that wrote it, or another home."
        )
    for number in sorted(n for n in known if n > current):
        _apply(connection, number, known[number].read_text(encoding="utf-8"))
    if current < newest:
        # Replaying CREATE and ALTER from the log after a crash has failed in DuckDB before.
        connection.execute("CHECKPOINT")


def version_of(connection: duckdb.DuckDBPyConnection) -> int:
    """The number of the last migration applied; 0 for an empty database."""
    table = "SELECT 1 FROM duckdb_tables() WHERE table_name = 'schema_version'"
    if not connection.execute(table).fetchone():
        return 0
    row = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()
    assert row is not None
    return row[0]


def set_aside(path: Path) -> list[Path]:
    """Rename a broken database and its log, never deleting either -> the new paths."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    kept = []
    for file in (path, path.with_name(path.name + ".wal")):
        if file.exists():
            kept.append(file.rename(file.with_name(f"{file.name}.broken-{stamp}")))
    return kept


def _config() -> dict[str, str | bool | int | float | list[str]]:
    return {
        "threads": min(4, os.cpu_count() or 1),
        "memory_limit": "1GB",  # the machine's memory belongs to the models
        "max_temp_directory_size": "4GB",  # a stranger's sort must not fill the disk
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "enable_external_access": False,  # also: FROM name never reads a variable of the caller
    }


def _seal(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Refuse a second Store in this process, then forbid any further change of settings."""
    locked = connection.execute("SELECT current_setting('lock_configuration')").fetchone()
    if locked == (True,):
        raise StoreError(f"{path} is already open in this process; share that Store.")
    connection.execute("SET lock_configuration = true")


def _apply(connection: duckdb.DuckDBPyConnection, number: int, sql: str) -> None:
    connection.execute("BEGIN")
    try:
        connection.execute(sql)
        now = datetime.now(UTC).replace(tzinfo=None)
        connection.execute("INSERT INTO schema_version VALUES (?, ?)", [number, now])
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _why_closed(path: Path, reason: str) -> str:
    if "Could not set lock" in reason:
        holder = re.search(r"\(PID \d+\)", reason)
        return (
            f"{path} is open in another process{' ' + holder[0] if holder else ''}; "
            "stop that one, or give this one another --home."
        )
    return (
        f"{path} cannot be opened ({reason.rstrip('.!')}); it was left as it is, "
        "run `quantarena rebuild` to set it aside and make it again from the run folders."
    )
