"""The supervisor with real processes: start, crash, cancel, adopt, store."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import psutil
import pytest
from scene import Home, chain, score, wait_for

from jobs import folders, locks, supervisor
from jobs.devices import Slots, cores
from jobs.events import State, append, read
from jobs.supervisor import Supervisor, expand

COMPARED = {"kind": "test_compared"}
TIMING = {"kind": "test_timing"}


def blocks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "blocks").iterdir()}


def measured(folder: Path) -> dict[str, float]:
    found = [event for event in read(folder)[0] if event["type"] == "measurement"]
    return {event["name"]: event["value"] for event in found}


def at_gate(place: Home, run_id: str) -> bool:
    return (place.folder(run_id) / "acted").exists() and bool(place.holder(run_id))


def test_runs_go_from_queued_to_stored_in_order(place):
    run = place.supervisor()
    low = place.submit(chain(name="low"), metrics=[score(), TIMING])
    high = place.submit(chain(name="high"), metrics=[score(), COMPARED], priority=3)
    everyone = [view.run_id for view in place.queue.runs()]
    assert len(everyone) == 4  # two baselines: the second has what the first lacks
    place.finish(run, *everyone)
    views = {view.run_id: view for view in place.queue.runs()}
    assert {view.state for view in views.values()} == {State.DONE}
    assert views[high].waits[0] in views
    assert views[views[high].waits[0]].finished <= views[high].started <= views[low].started
    assert views[low].fraction == 1
    for run_id in everyone:
        folder = place.folder(run_id)
        assert place.store.offsets[run_id] == (folder / "events.jsonl").stat().st_size
        stored = [event["type"] for event in place.store.events[run_id]]
        assert stored == [event["type"] for event in read(folder)[0]]
    items = [e["items"] for e in place.store.events[low] if e["type"] == "measurement"]
    assert [len(numbers) for numbers in items] == [32, 32]


def test_a_stage_costs_a_fork_and_no_more(place, record_property, capsys):
    """Recorded, not judged: time is not a result on a busy machine."""
    run = place.supervisor()
    place.finish(run, place.submit(chain(blocks=1, name="warms up")))
    timed = place.submit(chain(blocks=1), metrics=[score()])
    place.finish(run, timed)
    view = place.queue.view(timed)
    overhead_s = view.finished - view.started - view.seconds
    between_s = overhead_s / len(view.stages)
    record_property("overhead_s_per_stage", between_s)
    with capsys.disabled():
        print(f"\noverhead per stage: {between_s * 1000:.0f} ms")
    assert view.seconds >= 0


@pytest.mark.parametrize(("act", "exit"), [("exit", 9), ("kill", -9)])
def test_a_crash_costs_the_stage_and_not_the_run(place, act, exit):
    run = place.supervisor()
    crashed = place.submit(chain(act=f"once:{act}", name="x"), metrics=[score()])
    place.finish(run, crashed)
    assert place.state(crashed) is State.DONE
    (death,) = [e for e in read(place.folder(crashed))[0] if e["type"] == "died"]
    assert (death["stage"], death["exit"]) == ("quantize", exit)
    whole = place.submit(chain(name="y"), metrics=[score()])
    place.finish(run, whole)
    assert blocks(place.folder(crashed)) == blocks(place.folder(whole))
    assert measured(place.folder(crashed)) == measured(place.folder(whole))


def test_a_stage_that_always_crashes_fails_the_run_with_a_pointer_to_the_log(place):
    run = place.supervisor(max_deaths=2)
    run_id = place.submit(chain(act="kill"))
    place.finish(run, run_id)
    error = place.queue.view(run_id).error
    assert "2 times" in error["message"]
    assert "SIGKILL" in error["message"]
    assert "log.txt" in error["todo"]
    assert "memory" in error["todo"]
    deaths = [e for e in read(place.folder(run_id))[0] if e["type"] == "died"]
    assert len(deaths) == 2
    assert "stage quantize" in place.queue.log(run_id)


def test_out_of_memory_fails_one_run_and_the_next_goes_on(place):
    run = place.supervisor()
    hungry = place.submit(chain(act="memory"))
    modest = place.submit(chain(name="modest"))
    place.finish(run, hungry, modest)
    assert "Out of memory" in place.queue.view(hungry).error["message"]
    assert place.state(modest) is State.DONE


def test_kill_minus_nine_in_the_middle_resumes_bit_for_bit(place):
    run = place.supervisor()
    stopped = place.submit(chain(act="once:wait", at=2, blocks=5), metrics=[score()])
    place.tick_until(run, lambda: at_gate(place, stopped))
    before = blocks(place.folder(stopped))
    assert sorted(name for name in before if name.endswith("s")) == [
        "000.safetensors",
        "001.safetensors",
    ]
    os.kill(place.holder(stopped)["pid"], signal.SIGKILL)
    place.finish(run, stopped)
    whole = place.submit(chain(blocks=5), metrics=[score()])
    place.finish(run, whole)
    assert place.state(stopped) is State.DONE
    assert blocks(place.folder(stopped)) == blocks(place.folder(whole))
    assert measured(place.folder(stopped)) == measured(place.folder(whole))


def test_a_forked_child_that_outlives_its_worker_is_ended(place):
    run = place.supervisor()
    run_id = place.submit(chain(act="once:leave_child"))
    place.finish(run, run_id)
    assert place.state(run_id) is State.DONE
    assert len([e for e in read(place.folder(run_id))[0] if e["type"] == "died"]) == 1


def test_cancel_of_a_running_stage_frees_its_process(place):
    run = place.supervisor()
    run_id = place.submit(chain(act="once:wait"))
    place.tick_until(run, lambda: at_gate(place, run_id))
    pid = place.holder(run_id)["pid"]
    place.queue.cancel(run_id)
    assert place.queue.view(run_id).cancelling
    place.finish(run, run_id)
    assert place.state(run_id) is State.CANCELLED
    assert wait_for(lambda: not psutil.pid_exists(pid))
    place.queue.retry(run_id)
    place.finish(run, run_id)
    assert place.state(run_id) is State.DONE


def test_a_worker_deaf_to_cancel_is_killed_after_its_grace(place):
    now = [0.0]
    run = place.supervisor(grace_s=5, clock=lambda: now[0])
    run_id = place.submit(chain(act="stubborn"))
    place.tick_until(run, lambda: (place.folder(run_id) / "deaf").exists())
    place.queue.cancel(run_id)
    for now[0] in (1.0, 5.9):
        run.tick()
        assert locks.living(place.holder(run_id))
    now[0] = 6.1
    place.finish(run, run_id)
    assert place.state(run_id) is State.CANCELLED
    assert not (place.folder(run_id) / "cancel").exists()


def test_cancel_of_a_waiting_run_never_starts_it(place):
    run_id = place.submit(chain())
    place.queue.cancel(run_id)
    run = place.supervisor()
    run.tick()
    assert place.state(run_id) is State.CANCELLED
    types = [event["type"] for event in place.store.events[run_id]]
    assert types == ["submitted", "state", "state"]


def test_a_cancel_taken_back_while_it_runs_lets_it_finish(place):
    run = place.supervisor()
    run_id = place.submit(chain(act="once:wait"))
    place.tick_until(run, lambda: at_gate(place, run_id))
    place.queue.cancel(run_id)
    place.queue.uncancel(run_id)
    (place.folder(run_id) / "gate").touch()
    place.finish(run, run_id)
    assert place.state(run_id) is State.DONE


def test_a_new_server_adopts_the_worker_of_the_old_one(place):
    old = place.supervisor(own=True)
    run_id = place.submit(chain(act="once:wait"), metrics=[score()])
    place.tick_until(old, lambda: at_gate(place, run_id))
    holder = place.holder(run_id)
    old.launcher.close()  # as when the process dies: the socket closes and nobody listens
    new = place.supervisor(slots=Slots(1))
    other = place.submit(chain(name="other"))
    for _ in range(5):
        new.tick()
    assert place.holder(run_id) == holder
    assert place.state(other) is State.QUEUED  # the one slot is taken
    (place.folder(run_id) / "gate").touch()
    everyone = [view.run_id for view in place.queue.runs()]
    place.finish(new, *everyone)
    assert {view.state for view in place.queue.runs()} == {State.DONE}
    assert [e for e in read(place.folder(run_id))[0] if e["type"] == "died"] == []


def test_a_killed_worker_of_the_old_server_is_noticed_without_a_report(place):
    old = place.supervisor(own=True)
    run_id = place.submit(chain(act="once:wait"))
    place.tick_until(old, lambda: at_gate(place, run_id))
    old.launcher.close()
    os.killpg(place.holder(run_id)["group"], signal.SIGKILL)
    new = place.supervisor()
    place.finish(new, run_id)
    (death,) = [e for e in read(place.folder(run_id))[0] if e["type"] == "died"]
    assert death["exit"] is None
    assert place.state(run_id) is State.DONE


def test_a_warm_process_that_dies_is_replaced_and_its_workers_live_on(place):
    run = place.supervisor(own=True)
    run_id = place.submit(chain(act="once:wait"), metrics=[score()])
    place.tick_until(run, lambda: at_gate(place, run_id))
    holder = place.holder(run_id)
    os.kill(run.launcher._process.pid, signal.SIGKILL)
    for _ in range(5):
        run.tick()
        run.launcher.wait(0.02)
    assert place.holder(run_id) == holder
    (place.folder(run_id) / "gate").touch()
    place.finish(run, run_id)
    assert place.state(run_id) is State.DONE
    assert place.queue.view(run_id).deaths == 0


def test_the_warm_process_ends_with_its_parent_and_its_last_worker(place):
    run = place.supervisor(own=True)
    run_id = place.submit(chain(act="once:wait"))
    place.tick_until(run, lambda: at_gate(place, run_id))
    process = run.launcher._process
    run.launcher.close()
    assert process.poll() is None
    (place.folder(run_id) / "gate").touch()
    assert process.wait(30) == 0
    assert place.queue.view(run_id).done == ("quantize",)


def test_no_zombies_and_no_stray_process(place):
    run = place.supervisor()
    runs = [place.submit(chain(act=act, name=act)) for act in ("", "once:kill", "once:exit")]
    place.finish(run, *runs)
    warm = psutil.Process(run.launcher._process.pid)
    assert wait_for(lambda: warm.children() == [])
    assert [p for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE] == []


def test_a_warm_process_that_cannot_start_fails_the_run_with_its_log(place, monkeypatch):
    run = place.supervisor(own=True)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    run_id = place.submit(chain())
    place.finish(run, run_id)
    assert "warm.log" in place.queue.view(run_id).error["todo"]


def test_a_run_whose_baseline_went_wrong_says_so_and_both_can_be_retried(place):
    run = place.supervisor()
    bad = score(act="once:refuse")
    mine = place.submit(chain(), metrics=[bad, COMPARED])
    (baseline,) = place.queue.view(mine).waits
    place.finish(run, baseline, mine)
    error = place.queue.view(mine).error
    assert baseline in error["message"]
    assert "failed" in error["message"]
    assert "retry continues both" in error["todo"]
    place.queue.retry(mine)
    (place.folder(mine) / "acted").touch()
    place.finish(run, baseline, mine)
    assert place.state(mine) is State.DONE


def test_two_slots_run_two_stages_but_never_beside_a_timing(place):
    run = place.supervisor(slots=Slots(2))
    first = place.submit(chain(act="once:wait", name="1"))
    second = place.submit(chain(act="once:wait", name="2"))
    place.tick_until(run, lambda: at_gate(place, first) and at_gate(place, second))
    threads = [locks.content(place.folder(r) / "lock")["place"]["threads"] for r in (first, second)]
    assert threads == [max(1, cores() // 2)] * 2
    timing = place.submit(metrics=[TIMING], priority=9)
    (place.folder(first) / "gate").touch()
    place.tick_until(run, lambda: place.state(first) is State.DONE)
    for _ in range(5):
        run.tick()
    assert place.state(timing) is State.QUEUED
    (place.folder(second) / "gate").touch()
    place.finish(run, first, second, timing)
    assert place.state(timing) is State.DONE


def test_a_full_disk_delays_the_run_and_the_queue_goes_on(place, monkeypatch):
    run = place.supervisor(max_deaths=3)
    run_id = place.submit(chain(act="once:kill"))
    with monkeypatch.context() as patch:

        def full(*given: object, **data: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(supervisor, "append", full)
        place.tick_until(run, lambda: run_id in run.trouble)
        assert "No space" in run.trouble[run_id]
        run.tick()
    place.finish(run, run_id)
    assert place.state(run_id) is State.DONE
    assert len([e for e in read(place.folder(run_id))[0] if e["type"] == "died"]) == 1
    assert run.trouble == {}


def test_run_until_survives_a_round_that_goes_wrong(place, monkeypatch):
    run = place.supervisor()
    rounds = []
    stop = threading.Event()

    def tick() -> None:
        rounds.append(1)
        if len(rounds) == 3:
            stop.set()
        raise OSError("the network share is away")

    monkeypatch.setattr(run, "tick", tick)
    monkeypatch.setattr(supervisor, "PAUSE_S", 0.001)
    run.run_until(stop)
    assert len(rounds) == 3


def test_one_run_that_the_store_refuses_does_not_stop_the_others(place):
    first, second = place.submit(chain(name="1")), place.submit(chain(name="2"))
    good = place.store.ingest

    def ingest(run_id: str, *given: object) -> None:
        if run_id == first:
            raise ValueError("the event makes no sense")
        good(run_id, *given)

    place.store.ingest = ingest
    run = Supervisor(place.queue, place.store, slots=Slots(0), launcher=Idle())
    run.tick()
    run.tick()
    assert place.store.offset(second) > 0
    assert "makes no sense" in run.trouble[first]
    place.store.ingest = good
    append(place.folder(first), "note", text="more")
    run.tick()
    assert place.store.offset(first) > 0


class Idle:
    """Starts nothing."""

    def open(self) -> None:
        """Always ready."""

    def start(self, folder: object, place: object) -> None:
        raise AssertionError("nothing was to start")

    def ended(self) -> list:
        return []

    def wait(self, seconds: float) -> None:
        """No time passes."""

    def close(self) -> None:
        """Nothing is open."""


def test_items_that_are_missing_or_outside_become_a_note(tmp_path):
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "a.csv").write_text("1\n2.5\nnan\n")
    event = {"t": 1, "type": "measurement", "name": "perplexity"}
    (good,) = expand(tmp_path, [event | {"items_file": "items/a.csv"}])
    assert good["items"][:2] == [1, 2.5]
    (tmp_path.parent / "secret.csv").write_text("42")
    for named in ("items/gone.csv", "../secret.csv"):
        event_, note = expand(tmp_path, [event | {"items_file": named}])
        assert "items" not in event_
        assert note["type"] == "note"
        assert named in note["text"]
    assert folders.run_ids(tmp_path) == []


def test_a_worker_started_by_hand_is_respected(place):
    run_id = place.submit(chain())
    lock = locks.take(place.folder(run_id) / folders.LOCK, locks.myself())
    run = Supervisor(place.queue, place.store, launcher=Idle())
    run.tick()
    os.close(lock)
    assert wait_for(lambda: not locks.held(place.folder(run_id) / folders.LOCK))
    with pytest.raises(AssertionError, match="nothing was to start"):
        run.tick()
