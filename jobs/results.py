"""Results without the server: reports from run folders, queries wherever the database is."""

from __future__ import annotations

import json
import statistics
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.events import Event, plain, read
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
        "storage": spec.get("storage")
        if isinstance(spec, dict)
        else getattr(spec, "storage", None),
        "measurements": list(measured.values()),
        "notes": list(notes),
        **({"error": view.error} if view.error else {}),
    }


def mined(queue: Queue, job_id: str) -> list[dict[str, Any]]:
    """One entry per variant that a mining job asked, in its order (docs/command-line.md)."""
    rows: dict[str, dict[str, Event]] = {}
    for event in read(queue.folder(job_id))[0]:
        if event["type"] == "mined":
            rows.setdefault(event["run_id"], {})[event["prompt_id"]] = event
    recipes = {view.run_id: view.recipe for view in queue.runs()}
    return [
        {
            "run_id": run_id,
            "recipe": recipes.get(run_id, run_id),
            "prompts": len(found),
            "identical": mean(found.values(), "identical"),
            "departs": statistics.median(event["departs"] for event in found.values()),
            "kld": mean(found.values(), "kld"),
            "agreement": mean(found.values(), "agreement"),
        }
        for run_id, found in rows.items()
    ]


def kernel_times(queue: Queue, job_id: str) -> list[dict[str, Any]]:
    """Ceilings and times of a bench job as kernels/bench.py gave them, with the device's name."""
    rows = []
    for event in read(queue.folder(job_id))[0]:
        row = {name: value for name, value in event.items() if name not in ("type", "t", "name")}
        if event["type"] == "ceiling":
            rows.append({"ceiling": event["name"], **row})
        elif event["type"] == "kernel_time":
            rows.append({**row, "weight": json.loads(row["weight"]), "act": json.loads(row["act"])})
    return rows


def mean(rows: Iterable[Event], name: str) -> Any:
    """Of a number that each row has or lacks, as JSON data; None where all lack it."""
    values = [float(row[name]) for row in rows if row[name] is not None]
    return plain(statistics.fmean(values)) if values else None


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
