"""Results without the server: reports from run folders, queries wherever the database is."""

from __future__ import annotations

import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.events import read
from jobs.home import DATABASE, Ownership, Server, owned, server
from jobs.queue import Queue
from jobs.supervisor import Copy

if TYPE_CHECKING:
    from results_db.store import Store

REPORTED = ("name", "value", "unit", "better", "n", "stderr", "detail")


def report(queue: Queue, run_id: str) -> dict[str, Any]:
    """One run as `quantarena run --json` writes it (docs/command-line.md)."""
    view = queue.view(run_id)
    measured: dict[str, dict[str, Any]] = {}
    notes: dict[str, None] = {}
    for event in read(queue.folder(run_id))[0]:
        if event["type"] == "measurement" and not event.get("layer"):
            measured[event["name"]] = {key: event.get(key) for key in REPORTED}
        elif event["type"] == "note":
            notes[note_text(event)] = None
    spec = view.spec
    return {
        "recipe": view.recipe,
        "state": str(view.state),
        "fingerprint": view.fingerprint,
        "storage": spec["storage"] if isinstance(spec, dict) else spec.storage,
        "measurements": list(measured.values()),
        "notes": list(notes),
        **({"error": view.error} if view.error else {}),
    }


def note_text(event: dict[str, Any]) -> str:
    """A note with the place it is about, where it has one."""
    block, module = event.get("block"), event.get("module")
    where = " ".join(filter(None, [f"block {block}" if block is not None else "", module]))
    return f"{where}: {event['text']}" if where else str(event["text"])


@contextmanager
def reading_store(home: Path) -> Iterator[Store]:
    """The home's results; while another process owns the database, a copy made of the runs."""
    from results_db.store import Store

    if owned(home):
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / DATABASE)
            try:
                Copy(Queue(home), store, {}).all()
                yield store
            finally:
                store.close()
        return
    with Ownership(home):
        store = Store(home / DATABASE)
        try:
            Copy(Queue(home), store, {}).all()
            yield store
        finally:
            store.close()


def query(home: Path, sql: str) -> tuple[list[str], list[Sequence[Any]]]:
    """One read-only query -> (columns, rows); the server answers when it holds the database."""
    running = server(home)
    if running:
        return ask(running, sql)
    with reading_store(home) as store:
        answer = json.loads(store.query(sql).to_json(orient="split", date_format="iso"))
    return answer["columns"], answer["data"]


def ask(running: Server, sql: str) -> tuple[list[str], list[Sequence[Any]]]:
    """POST the query to the server that owns the database."""
    request = urllib.request.Request(
        f"{running.url.rstrip('/')}/api/sql",
        data=json.dumps({"sql": sql}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {running.token}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        body = error.read().decode(errors="replace")
        try:
            message = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError):
            message = f"the server answered {error.code}"
        raise ValueError(message) from None
    return answer["columns"], answer["rows"]
