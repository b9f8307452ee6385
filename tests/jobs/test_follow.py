"""From outside: following runs, taking over, rebuilding the database, the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from scene import ROOT, Home, Lent, chain, score, wait_for

from jobs.__main__ import main
from jobs.events import State, append, read
from jobs.follow import StandIn, follow
from jobs.home import DATABASE, Ownership, owned
from jobs.rebuild import rebuild
from jobs.supervisor import Supervisor
from results_db.store import Store


def watch(place: Home, *run_ids: str) -> Iterator[tuple[str, dict]]:
    assert place.shared is not None
    lent = Lent(place.shared)
    return follow(place.path, run_ids, queue=place.queue, launcher=lambda home: lent)


def rows(place: Home) -> dict:
    store = Store(place.path / DATABASE)
    try:
        return {name: table.to_pylist() for name, table in store.snapshot().items()}
    finally:
        store.close()


def test_who_follows_a_home_without_a_server_does_the_work(place):
    run_id = place.submit(chain(), metrics=[score()])
    seen = [event for of, event in watch(place, run_id) if of == run_id]
    assert seen == read(place.folder(run_id))[0]
    assert seen[-1]["state"] == "done"
    assert not owned(place.path)
    stored = rows(place)
    (run,) = [row for row in stored["runs"] if row["run_id"] == run_id]
    assert (run["state"], run["seen_bytes"]) == (
        "done",
        (place.folder(run_id) / "events.jsonl").stat().st_size,
    )
    assert len([row for row in stored["items"] if row["run_id"] == run_id]) == 32


def test_who_follows_a_home_with_a_server_only_watches(place):
    run_id = place.submit(chain())
    stop = threading.Event()
    run = Supervisor(place.queue, place.store, launcher=Lent(place.shared))
    with Ownership(place.path):
        thread = threading.Thread(target=run.run_until, args=(stop,))
        thread.start()
        try:
            assert [e["type"] for _, e in watch(place, run_id)][-1] == "state"
        finally:
            stop.set()
            thread.join()
    assert place.state(run_id) is State.DONE
    assert not (place.path / DATABASE).exists()


OWN = """
import sys, time
from pathlib import Path
from jobs.home import Ownership
owner = Ownership(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(3600)
"""


def test_who_follows_takes_over_when_the_server_dies(place):
    run_id = place.submit(chain())
    with subprocess.Popen(
        [sys.executable, "-c", OWN, str(place.path)], cwd=ROOT, stdout=subprocess.PIPE
    ) as server:
        try:
            assert server.stdout.readline() == b"ready\n"
            events = watch(place, run_id)
            assert next(events)[1]["type"] == "submitted"
            assert next(events)[1]["state"] == "queued"
        finally:
            os.kill(server.pid, signal.SIGKILL)
    assert list(events)[-1][1]["state"] == "done"


def test_a_database_of_newer_code_is_one_sentence_for_who_follows(place):
    store = Store(place.path / DATABASE)
    store.write(lambda cursor: bool(cursor.execute("UPDATE schema_version SET version = 999")))
    store.close()
    run_id = place.submit(chain())
    with pytest.raises(ValueError, match="999"):
        list(watch(place, run_id))
    assert not owned(place.path)


def test_leaving_early_lets_go_of_the_home(place):
    run_id = place.submit(chain(act="once:wait"))
    events = watch(place, run_id)
    next(events)
    assert owned(place.path)
    events.close()
    assert not owned(place.path)


def test_a_stand_in_that_never_stepped_in_can_leave(place):
    StandIn(place.queue).leave()


def test_rebuild_gives_the_same_database(place):
    first = place.submit(chain(), metrics=[score()])
    second = place.submit(chain(name="b", act="fail"), metrics=[score()])
    list(watch(place, *[view.run_id for view in place.queue.runs()]))
    before = rows(place)
    report = rebuild(place.path)
    assert "3 runs copied" in report
    assert "is kept as" in report
    after = rows(place)
    assert after.keys() == before.keys()
    for name in before.keys() - {"schema_version"}:
        assert after[name] == before[name]
    assert {row["run_id"] for row in after["runs"]} > {first, second}


def test_rebuild_sets_a_broken_database_aside(place):
    place.submit(chain(), metrics=[score()])
    (place.path / DATABASE).write_bytes(b"this is no database" * 1000)
    assert "2 runs copied" in rebuild(place.path)
    assert len(rows(place)["runs"]) == 2


def test_rebuild_beside_a_server_is_refused(place):
    with Ownership(place.path), pytest.raises(ValueError, match="in use"):
        rebuild(place.path)


def test_the_command_line_lists_cancels_and_retries(place, capsys):
    run_id = place.submit(chain(), label="my run")
    home = ["--home", str(place.path)]
    assert main([*home, "list"]) == 0
    assert "queued" in capsys.readouterr().out
    assert main([*home, "cancel", run_id]) == 0
    append(place.folder(run_id), "state", state="cancelled")
    assert main([*home, "list"]) == 0
    shown = capsys.readouterr().out
    assert "cancelled" in shown
    assert "my run" in shown
    assert main([*home, "retry", run_id]) == 0
    assert place.state(run_id) is State.QUEUED
    assert main([*home, "rebuild"]) == 0
    assert "1 runs copied" in capsys.readouterr().out


def test_the_command_line_answers_bad_input_with_one_sentence(place, tmp_path, capsys):
    home = ["--home", str(place.path)]
    bad = tmp_path / "bad.json"
    for given in (
        ["cancel", "nobody"],
        ["submit", str(tmp_path / "missing.json")],
        ["submit", str(bad)],
    ):
        bad.write_text(json.dumps({"model": {"id": "demo"}, "steps": [{"kind": "gptqq"}]}))
        assert main([*home, *given]) == 2
        error = capsys.readouterr().err
        assert error.startswith("jobs: ")
        assert "Traceback" not in error
    assert wait_for(lambda: place.queue.runs() == [])
