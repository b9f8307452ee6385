"""Entries of the vote log as rows of the database, and whether the two say the same."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

import pandas as pd

from results_db.events import Row
from results_db.store import Cursor, Store, insert
from results_db.style import Style, style_of
from results_db.vote import FIELDS, Message
from results_db.vote_log import VOTE, BrokenChain, Entry, Head, entries

JSONS = ("conversation_a", "conversation_b", "settings")
PLACES = "(SELECT seq, hash, ends FROM votes UNION ALL SELECT seq, hash, ends FROM retractions)"
STYLE = frozenset(f"{field.name}_{side}" for field in fields(Style) for side in "ab")
FEW = 2  # rows that go in faster one by one: 2 ms of processor time each against 5 ms for a table
BATCH = 500  # entries copied or compared at once


def copied(store: Store) -> Head:
    """Where in the file the copy ends."""
    rows = store.frame(f"SELECT seq, hash, ends FROM {PLACES} ORDER BY seq DESC LIMIT 1")
    return Head(int(rows["seq"][0]), rows["hash"][0], int(rows["ends"][0])) if len(rows) else Head()


def copy_file(store: Store, path: Path) -> None:
    """Copy what is whole of a log into a store without votes; the file's writer notices nothing."""
    with suppress(BrokenChain):
        for some in batches(entries(path)):
            store.write(partial(copy, entries=some))


def batches(items: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries, some at a time."""
    remaining = iter(items)
    while some := list(islice(remaining, BATCH)):
        yield some


def difference(store: Store, path: Path) -> str:
    """The first thing in which the copy differs from the file's beginning; "" if nothing does.

    The counts of style are left out: they are made from the text and not in the file.
    """
    end = copied(store)
    seen = 0
    with suppress(BrokenChain):  # the part before it is compared
        for some in batches(entries(path)):
            held = _held(store, some[0].seq, some[-1].seq)
            for entry in some[: max(0, end.seq - seen)]:
                column = _unlike(entry, held.get(entry.seq))
                if column:
                    return (
                        f"entry {entry.seq} has another {column} in the database than in the file"
                    )
            seen += len(some)
    if seen < end.seq:
        return f"the database has {end.seq} entries and the file has {seen} whole ones"
    rows = int(store.frame(f"SELECT count(*) AS n FROM {PLACES}")["n"][0])
    return "" if rows == end.seq else f"the database has {rows} rows for {end.seq} entries"


def copy(cursor: Cursor, entries: Sequence[Entry]) -> bool:
    """Add entries of the log to their tables."""
    _add(cursor, "votes", [_vote_row(entry) for entry in entries if entry.type == VOTE])
    _add(cursor, "retractions", [_retraction(entry) for entry in entries if entry.type != VOTE])
    return True


def _add(cursor: Cursor, table: str, rows: list[Row]) -> None:
    if len(rows) > FEW:
        insert(cursor, table, rows)
        return
    for row in rows:
        columns, values = ", ".join(row), ", ".join(f"${name}" for name in row)
        cursor.execute(f"INSERT INTO {table} ({columns}) VALUES ({values})", row)


def _vote_row(entry: Entry) -> Row:
    vote = entry.vote()
    row = {name: getattr(vote, name) for name in FIELDS}
    for name in JSONS:
        row[name] = json.dumps(row[name], ensure_ascii=False)
    row |= {"flags": ",".join(vote.flags), "cast_at": _time(vote.tstamp)}
    return row | _style("a", vote.conversation_a) | _style("b", vote.conversation_b) | _place(entry)


def _retraction(entry: Entry) -> Row:
    battle_id, tstamp = entry.data["battle_id"], entry.data["tstamp"]
    row = {"battle_id": battle_id, "tstamp": tstamp, "retracted_at": _time(tstamp)}
    return row | _place(entry)


def _style(side: str, conversation: Sequence[Message]) -> Row:
    """Columns of one side; none, which is NULL, where the text is not known."""
    if not conversation:
        return {}
    answers = [message["content"] for message in conversation if message["role"] == "assistant"]
    return {f"{name}_{side}": count for name, count in asdict(style_of(answers)).items()}


def _place(entry: Entry) -> Row:
    return {"seq": entry.seq, "hash": entry.hash, "ends": entry.ends}


def _time(tstamp: float) -> datetime:
    """UTC without a zone, as the database keeps it."""
    return datetime.fromtimestamp(tstamp, UTC).replace(tzinfo=None)


def _held(store: Store, first: int, last: int) -> dict[int, Row]:
    """Rows of both tables by entry."""
    held: dict[int, Row] = {}
    for table in ("votes", "retractions"):
        sql = f"FROM {table} WHERE seq BETWEEN $first AND $last"
        rows = store.frame(sql, first=first, last=last).to_dict("records")
        held |= {row["seq"]: row for row in cast(list[Row], rows)}
    return held


def _unlike(entry: Entry, held: Row | None) -> str:
    """The first column in which a row differs from its entry; "" if none does."""
    if held is None:
        return "place"
    wanted = _vote_row(entry) if entry.type == VOTE else _retraction(entry)
    for name, value in wanted.items():
        same = pd.isna(held.get(name)) if value is None else held.get(name) == value
        if not same and name not in STYLE:
            return name
    return ""
