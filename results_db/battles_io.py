"""Battles in the field's usual columns, in and out: CSV, Parquet, JSON and JSON lines.

In CSV a text that a spreadsheet would take for a formula, because it begins with = + - or @ (with
or without apostrophes before it), gets an apostrophe in front when written and loses one when
read. Conversations are JSON there. Rows are numbered from 1, without the header.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import parquet

from results_db.database import first_line
from results_db.events import Row
from results_db.export import FORMULA
from results_db.vote import WINNERS, Message, Vote
from results_db.vote_log import VOTE, entries
from results_db.votes import EXCLUDING, Votes

T = TypeVar("T")

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("model_a", pa.string()),
        ("model_b", pa.string()),
        ("winner", pa.string()),
        ("judge", pa.string()),
        ("turn", pa.int64()),
        ("anony", pa.bool_()),
        ("language", pa.string()),
        ("tstamp", pa.float64()),
        ("conversation_a", MESSAGES),
        ("conversation_b", MESSAGES),
    ]
)
COLUMNS = tuple(SCHEMA.names)
CONVERSATIONS = ("conversation_a", "conversation_b")
NAMES = ("model_a", "model_b", "judge", "language")
REQUIRED = tuple(name for name in COLUMNS if name not in CONVERSATIONS)

PEOPLE = ("human", "import")  # kinds of votes that are written if nothing else is asked for
MAX_FILE = 4 << 30  # bytes
MAX_JSON = 512 << 20  # bytes of one JSON list, which is read whole
MAX_ROWS = 5_000_000
MAX_NAME = 300  # characters of a name
MAX_TEXT = 1 << 20  # characters of one row, as JSON
CHUNK = 500  # rows

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
WINNER_WORDS = {name: name for name in WINNERS} | {"both_bad": WINNERS[3], "bothbad": WINNERS[3]}
TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@dataclass(frozen=True)
class Imported:
    """How an import went."""

    rows: int
    added: int  # the others were there already, or twice in the file


def import_battles(votes: Votes, file: Path) -> Imported:
    """Add the battles in a file to the votes, as kind "import".

    Nothing is added where any row is wrong: ValueError in one sentence, with its number. A battle
    has its id from what the row says, so that the same row adds nothing the second time.
    """
    rows = sum(1 for _ in read_battles(file))
    return Imported(rows, votes.cast_all(read_battles(file)))


def export_battles(log: Path, file: Path, kinds: Sequence[str] = PEOPLE) -> int:
    """Write the votes of a log that were not taken back and have no excluding flag -> how many.

    The file appears whole or not at all.
    """
    write = _of_kind(WRITERS, file)
    void = {entry.data["battle_id"] for entry in entries(log) if entry.type != VOTE}
    part = file.with_name(file.name + ".part")
    try:
        written = write(part, _counted(log, void, kinds))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return written


def read_battles(file: Path) -> Iterator[Vote]:
    """The rows of a file as votes; ValueError in one sentence, with the row's number."""
    read = _of_kind(READERS, file)
    _check_size(file, MAX_FILE)
    number = 0
    with _refusing(file):
        for number, row in enumerate(read(file), 1):
            if number > MAX_ROWS:
                raise ValueError(f"it has more than the {MAX_ROWS:,} rows that are read")
            try:
                yield vote_of(row)
            except (TypeError, ValueError) as error:
                raise ValueError(f"row {number}: {error}") from error
        if not number:
            raise ValueError("it holds no battles")


def vote_of(row: Mapping[str, Any]) -> Vote:
    """One row in the field's columns -> a vote. ValueError says what is wrong with it."""
    _check_columns(row)
    fields: Row = {name: _name(name, row[name]) for name in NAMES}
    fields["winner"] = _winner(row["winner"])
    fields["turn"] = _turn(row["turn"])
    fields["anony"] = _anony(row["anony"])
    fields["tstamp"] = _tstamp(row["tstamp"])
    for name in CONVERSATIONS:
        fields[name] = _conversation(name, row.get(name))
    text = json.dumps([fields[name] for name in COLUMNS])
    if len(text) > MAX_TEXT:
        raise ValueError(f"it has {len(text):,} characters, over the {MAX_TEXT:,} that are read")
    battle_id = "import-" + hashlib.sha256(text.encode()).hexdigest()[:32]
    prompt = next((m["content"] for m in fields["conversation_a"] if m["role"] == "user"), "")
    return Vote(battle_id=battle_id, model="", kind="import", prompt=prompt, **fields)


def _check_columns(names: Container[str]) -> None:
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ValueError(f"there is no {missing[0]!r}; a battle has {', '.join(REQUIRED)}")


def _name(name: str, value: Any) -> str:
    """Text of one line; nothing is the empty text, and a number, as some judges have, its digits"""
    text = "" if value is None else str(value) if type(value) is int else value
    if not isinstance(text, str):
        raise ValueError(f"{name} is {value!r:.100} and not a text")
    if CONTROL.search(text) or len(text) > MAX_NAME:
        raise ValueError(f"{name} is {text!r:.100}, not one line of at most {MAX_NAME} characters")
    return text


def _winner(value: Any) -> str:
    if not isinstance(value, str) or value not in WINNER_WORDS:
        raise ValueError(f"winner is {value!r:.100} and not one of {', '.join(WINNERS)}")
    return WINNER_WORDS[value]


def _turn(value: Any) -> int:
    with suppress(OverflowError, TypeError, ValueError):
        if float(value) == int(float(value)):
            return int(float(value))
    raise ValueError(f"turn is {value!r:.100} and not a whole number")


def _anony(value: Any) -> bool:
    truth = TRUTH.get(str(value).strip().lower())
    if truth is None:
        raise ValueError(f"anony is {value!r:.100} and not true or false")
    return truth


def _tstamp(value: Any) -> float:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    with suppress(OverflowError, TypeError, ValueError):
        return float(value)
    raise ValueError(f"tstamp is {value!r:.100} and not a time in unix seconds")


def _conversation(name: str, value: Any) -> list[Message]:
    """Messages with nothing but role and content. In CSV they come as JSON, or not at all."""
    found = [] if value in (None, "") else value
    if isinstance(found, str):
        with suppress(ValueError):
            found = json.loads(found)
    if not isinstance(found, list) or not all(_is_message(message) for message in found):
        raise ValueError(f"{name} is {value!r:.100} and not a list of role and content")
    return [{"role": message["role"], "content": message["content"]} for message in found]


def _is_message(value: Any) -> bool:
    parts = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None,)
    return all(isinstance(part, str) for part in parts)


def _of_kind(table: Mapping[str, T], file: Path) -> T:
    found = table.get(file.suffix.lower())
    if found is None:
        raise ValueError(f"{file.name} must end in one of {', '.join(table)}")
    return found


def _check_size(file: Path, limit: int) -> None:
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if file.stat().st_size > limit:
        raise ValueError(f"{file.name} is over the {limit >> 20} MiB that are read")


@contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """What is wrong inside a file, as one sentence that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}: it is not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError(f"{file.name}: it is nested too deeply") from error
    except (csv.Error, pa.ArrowException, ValueError) as error:
        raise ValueError(f"{file.name}: {first_line(error)}") from error


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_TEXT)  # of the whole process; the default is 128 Ki
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, strict=True)
        _check_columns(rows.fieldnames or ())
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"line {rows.line_num} has not as many cells as the first line")
            yield row | {name: _without_guard(row[name]) for name in NAMES}


def _read_parquet(file: Path) -> Iterator[Row]:
    with parquet.ParquetFile(file) as table:
        _check_columns(table.schema_arrow.names)
        wanted = [name for name in table.schema_arrow.names if name in COLUMNS]
        for batch in table.iter_batches(CHUNK, columns=wanted):
            yield from batch.to_pylist()


def _read_json(file: Path) -> Iterator[Row]:
    _check_size(file, MAX_JSON)
    found = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(found, list):
        raise ValueError("it is not a list of battles")
    yield from map(_object, found)


def _read_jsonl(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as text:
        for number in count(1):
            line = text.readline(2 * MAX_TEXT)
            if not line:
                return
            if line.strip():
                yield _object(_parsed(line, number))


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from error


def _object(found: Any) -> Row:
    if not isinstance(found, dict):
        raise ValueError(f"it has {found!r:.100} where a battle should be")
    return found


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
}


def _counted(log: Path, void: Container[str], kinds: Container[str]) -> Iterator[Row]:
    """Rows of the votes that may be counted elsewhere."""
    for entry in entries(log):
        if entry.type == VOTE and entry.data["battle_id"] not in void:
            vote = entry.vote()
            if vote.kind in kinds and not set(vote.flags) & set(EXCLUDING):
                yield _row(vote)


def _row(vote: Vote) -> Row:
    row = {name: getattr(vote, name) for name in COLUMNS}
    for name in CONVERSATIONS:
        row[name] = [{"role": m["role"], "content": m["content"]} for m in row[name]]
    return row


def _write_csv(file: Path, rows: Iterable[Row]) -> int:
    written = 0
    with file.open("w", encoding="utf-8", newline="") as text:
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        for row in rows:
            names = {name: _with_guard(row[name]) for name in NAMES}
            texts = {name: json.dumps(row[name], ensure_ascii=False) for name in CONVERSATIONS}
            table.writerow(row | names | texts)
            written += 1
    return written


def _write_parquet(file: Path, rows: Iterable[Row]) -> int:
    written = 0
    remaining = iter(rows)
    with parquet.ParquetWriter(file, SCHEMA, compression="zstd") as table:
        while some := list(islice(remaining, CHUNK)):
            table.write_table(pa.Table.from_pylist(some, SCHEMA))
            written += len(some)
    return written


def _write_json(file: Path, rows: Iterable[Row]) -> int:
    """A list with one battle per line."""
    return _write_lines(file, rows, "[\n", ",\n", "\n]\n")


def _write_jsonl(file: Path, rows: Iterable[Row]) -> int:
    return _write_lines(file, rows, "", "\n", "\n")


def _write_lines(file: Path, rows: Iterable[Row], first: str, between: str, last: str) -> int:
    written = 0
    with file.open("w", encoding="utf-8") as text:
        text.write(first)
        for row in rows:
            text.write((between if written else "") + json.dumps(row, ensure_ascii=False))
            written += 1
        text.write(last)
    return written


WRITERS: dict[str, Callable[[Path, Iterable[Row]], int]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".json": _write_json,
    ".jsonl": _write_jsonl,
}


def _with_guard(text: str) -> str:
    return f"'{text}" if re.match(FORMULA, text) else text


def _without_guard(text: str) -> str:
    return text[1:] if text.startswith("'") and re.match(FORMULA, text) else text
