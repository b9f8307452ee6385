"""Watching runs from outside: what `quantarena run` prints comes from here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.events import Event, read
from jobs.home import DATABASE, Ownership, owned
from jobs.launch import Launcher
from jobs.queue import Queue
from jobs.supervisor import Supervisor
from jobs.view import Folded, fold

if TYPE_CHECKING:
    from results_db.store import Store

PAUSE_S = 0.1  # between two looks at the events


def follow(
    home: Path,
    run_ids: Sequence[str],
    *,
    queue: Queue | None = None,
    launcher: Callable[[Path], Launcher] | None = None,
) -> Iterator[tuple[str, Event]]:
    """Events of the runs as they come, until every one of them has ended.

    Where no process owns the home, this one does, and supervises, until then.
    """
    queue = queue or Queue(home)
    watched = {run_id: (queue.folder(run_id), Folded(), 0) for run_id in dict.fromkeys(run_ids)}
    stand_in = StandIn(queue, launcher)
    try:
        while watched:
            stand_in.step_in()
            for run_id, (folder, before, offset) in list(watched.items()):
                events, offset = read(folder, offset)
                run = fold(before, events)
                watched[run_id] = (folder, run, offset)
                if run.state.ended:
                    del watched[run_id]
                yield from ((run_id, event) for event in events)
            if watched:
                time.sleep(PAUSE_S)
    finally:
        stand_in.leave()


class StandIn:
    """A supervisor in a thread, from when nobody else owns the home."""

    def __init__(self, queue: Queue, launcher: Callable[[Path], Launcher] | None = None) -> None:
        self.queue = queue
        self._launcher = launcher
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def step_in(self) -> None:
        """Own and supervise the home, if nobody does: at the start, or when a server has died."""
        if self._thread is not None or owned(self.queue.home):
            return
        try:
            owner = Ownership(self.queue.home)
        except ValueError:
            return  # another process was faster; it supervises
        try:
            store = open_store(self.queue.home)
        except BaseException:
            owner.release()
            raise
        # A daemon: an error elsewhere in this program must not leave it waiting for the queue.
        self._thread = threading.Thread(
            target=self._supervise, args=(owner, store), name="supervisor", daemon=True
        )
        self._thread.start()

    def leave(self) -> None:
        """Store what came last and let go of the home."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _supervise(self, owner: Ownership, store: Store) -> None:
        launcher = self._launcher(self.queue.home) if self._launcher else None
        supervisor = Supervisor(self.queue, store, launcher=launcher)
        try:
            supervisor.run_until(self._stop)
        finally:
            supervisor.close()
            store.close()
            owner.release()


def open_store(home: Path) -> Store:
    """The home's database, which only its owner may open. ValueError says why it cannot be."""
    from results_db.store import Store

    return Store(home / DATABASE)
