"""One worker at a time, in this process: what it writes and how it leaves."""

from __future__ import annotations

import logging
import os

import pytest
from scene import chain, score

from jobs import failure, folders, locks, worker
from jobs.devices import Place
from jobs.events import State, append, read
from jobs.worker import BUSY, DONE, FAILED, STOPPED, Emitter, Stop, work

TIMING = {"kind": "test_timing"}


def events(folder, type):
    return [event for event in read(folder)[0] if event["type"] == type]


def test_each_call_does_one_stage_and_the_last_says_done(place):
    run_id = place.submit(chain(), metrics=[score(), TIMING])
    folder = place.folder(run_id)
    for stage in ("quantize", "evaluate", "test_timing"):
        assert place.state(run_id) is not State.DONE
        assert work(folder, Place()) == DONE
        assert place.queue.view(run_id).done[-1] == stage
    assert place.state(run_id) is State.DONE
    assert len(events(folder, "state")) == 3  # queued, running, done
    assert work(folder, Place()) == DONE
    assert len(events(folder, "stage")) == 6


def test_a_run_that_another_process_works_on_is_left_alone(place):
    folder = place.folder(place.submit(chain()))
    lock = locks.take(folder / folders.LOCK, locks.myself())
    before = read(folder)
    assert work(folder, Place()) == BUSY
    assert read(folder) == before
    os.close(lock)
    assert work(folder, Place()) == DONE


@pytest.mark.parametrize(
    ("act", "kind", "message", "todo"),
    [
        ("memory", "MemoryError", "Out of memory", "fewer"),
        ("disk", "OSError", "disk is full", "Free some disk space"),
        ("refuse", "ValueError", "group 7 does not divide 64", "submit again"),
        ("fail", "RuntimeError", "a deliberate failure", "log.txt"),
    ],
)
def test_a_failure_says_what_and_what_next(place, caplog, act, kind, message, todo):
    run_id = place.submit(chain(act=act))
    folder = place.folder(run_id)
    with caplog.at_level(logging.ERROR):
        assert work(folder, Place()) == FAILED
    error = place.queue.view(run_id).error
    assert error["type"] == kind
    assert message in error["message"]
    assert todo in error["todo"]
    assert "stand_in.py" in error["traceback"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 600
    assert list(folder.rglob("*.part")) == []  # on a full disk they hold the room for the event
    assert list(folder.rglob("*.safetensors"))  # and what was finished is kept
    assert "failed" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        type("OutOfMemoryError", (RuntimeError,), {})("x"),
    ],
)
def test_other_libraries_run_out_of_memory_in_their_own_words(error):
    assert "Out of memory" in failure.explain(error, "quantize")["message"]


def test_a_full_disk_inside_another_library_is_recognised():
    error = RuntimeError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    assert "disk is full" in failure.explain(error, "quantize")["message"]


@pytest.mark.parametrize("cause", ["CUDA out of memory.", "No space left on device", "odd shapes"])
def test_only_a_complaint_about_what_was_asked_is_bad_input(cause):
    error = ValueError(f"the weights cannot be loaded: {cause}")
    assert failure.explain(error, "evaluate")["bad_input"] == (cause == "odd shapes")


def test_cancel_stops_between_blocks_and_retry_continues(place):
    run_id = place.submit(chain(blocks=4))
    folder = place.folder(run_id)
    stop = Stop(folder)
    looks = iter([False, False, True])
    stop.told = False
    (folder / folders.CANCEL).touch()

    class After(Stop):
        def __call__(self) -> bool:
            return next(looks, False)

    assert work(folder, Place(), After(folder)) == DONE
    assert place.state(run_id) is State.CANCELLED
    assert len(list((folder / "blocks").glob("*.safetensors"))) == 2
    place.queue.retry(run_id)
    assert work(folder, Place()) == DONE
    assert place.state(run_id) is State.DONE
    assert len(list((folder / "blocks").glob("*.safetensors"))) == 4


def test_a_stop_that_nobody_asked_for_is_not_the_end(place):
    run_id = place.submit(chain())
    stop = Stop(place.folder(run_id))
    stop._tell(15, None)
    assert work(place.folder(run_id), Place(), stop) == STOPPED
    assert place.state(run_id) is State.RUNNING
    assert work(place.folder(run_id), Place()) == DONE
    assert place.queue.view(run_id).deaths == 0


def test_a_cancel_taken_back_in_time_changes_nothing(place):
    run_id = place.submit(chain())
    stop = Stop(place.folder(run_id))
    (place.folder(run_id) / folders.CANCEL).touch()
    stop._tell(15, None)
    assert stop()
    place.queue.uncancel(run_id)
    assert not stop()


def test_blocks_of_another_version_are_not_continued(place, monkeypatch):
    run_id = place.submit(chain())
    monkeypatch.setattr("stand_in.Chain.version", 2)
    assert work(place.folder(run_id), Place()) == FAILED
    assert "submit it again" in place.queue.view(run_id).error["message"]


def test_progress_is_written_at_most_every_tenth_of_a_second(tmp_path):
    now = [0.0]
    emit = Emitter(tmp_path, clock=lambda: now[0])
    for step in range(100):
        now[0] = step / 100
        emit("progress", stage="quantize", fraction=step / 100)
        emit("note", text="x")
    emit("progress", stage="quantize", fraction=1.0)
    shown = events(tmp_path, "progress")
    assert 10 <= len(shown) <= 12
    assert shown[-1]["fraction"] == 1
    assert shown[5]["eta_s"] == pytest.approx(1 - shown[5]["fraction"])
    assert len(events(tmp_path, "note")) == 100


def test_a_worker_that_starts_again_clears_what_was_half_written(place):
    folder = place.folder(place.submit(chain(blocks=1)))
    (folder / "blocks").mkdir()
    (folder / "blocks" / "007.part").write_bytes(b"half")
    assert work(folder, Place()) == DONE
    assert [path.name for path in (folder / "blocks").iterdir()] == ["000.safetensors"]


def test_the_command_refuses_what_is_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        worker.main([str(tmp_path)])
    assert left.value.code == 2
    assert "not a run folder" in capsys.readouterr().err


def test_append_from_two_writers_keeps_lines_whole(tmp_path):
    pids = []
    for writer in range(3):
        pid = os.fork()
        if pid == 0:
            for number in range(200):
                append(tmp_path, "note", writer=writer, number=number, text="x" * 500)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    found, _ = read(tmp_path)
    assert len(found) == 600
    assert len({(event["writer"], event["number"]) for event in found}) == 600
