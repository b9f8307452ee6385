"""Make the database again from the run folders and the vote log."""

from __future__ import annotations

from pathlib import Path

from jobs.folders import run_ids
from jobs.home import DATABASE, Ownership
from jobs.queue import Queue
from jobs.supervisor import Copy


def rebuild(home: Path) -> str:
    """Set the old database aside, copy runs' events and votes into a new one -> what was done.

    ValueError in one sentence while another process owns the home.
    """
    from results_db.database import set_aside
    from results_db.store import Store
    from results_db.votes import FILE, Votes

    with Ownership(home):
        kept = set_aside(home / DATABASE)
        store = Store(home / DATABASE)
        try:
            copy = Copy(Queue(home), store)
            copy.all()
            votes = Votes(store, home / FILE)
        finally:
            store.close()
    lines = [f"{len(run_ids(home)) - len(copy.trouble)} runs copied into {home / DATABASE}"]
    lines += [f"{votes.version} votes and retractions copied"] if votes.version else []
    lines += [votes.problem] if votes.problem else []
    lines += [f"the old database is kept as {path}" for path in kept]
    lines += [f"run {run_id} is left out: {why}" for run_id, why in copy.trouble.items()]
    return "\n".join(lines)
