"""Submitting: what becomes a run, what does not, and which baseline comes along."""

from __future__ import annotations

import errno
import json
import os
import threading

import pytest
from scene import Home, begin, chain, score, spec

from jobs import devices, folders
from jobs.devices import Free, Place, Slots
from jobs.events import State, append, read
from jobs.queue import Queue
from jobs.supervisor import in_order

COMPARED = {"kind": "test_compared"}
TIMING = {"kind": "test_timing"}


def finish(place: Home, run_id: str, state: State = State.DONE) -> None:
    append(place.folder(run_id), "state", state=state)


def test_a_submitted_run_is_a_folder_with_everything_in_it(place):
    run_id = place.submit(chain(), metrics=[score()], label="mine", recipe="chain", priority=2)
    folder = place.path / "runs" / run_id
    assert folders.RUN_ID.fullmatch(run_id)
    assert json.loads((folder / "spec.json").read_text())["steps"][0]["kind"] == "test_chain"
    job = json.loads((folder / "job.json").read_text())
    assert (job["label"], job["priority"], job["device"]) == ("mine", 2, "cpu")
    submitted, queued = read(folder)[0]
    assert submitted["type"] == "submitted"
    assert submitted["fingerprint"] == spec(chain(), metrics=[score()]).fingerprint()
    assert submitted["targets"] == ["weights"]
    assert queued["state"] == "queued"
    view = place.queue.view(run_id)
    assert (view.label, view.recipe, view.stages) == ("mine", "chain", ("quantize", "evaluate"))
    assert view.spec == spec(chain(), metrics=[score()])


def test_the_same_spec_is_the_same_run_until_it_went_wrong(place):
    first = place.submit(chain(), metrics=[score()])
    assert place.submit(chain(), metrics=[score()], label="other words") == first
    assert place.submit(chain(name="b"), metrics=[score()]) != first
    finish(place, first)
    assert place.submit(chain(), metrics=[score()]) == first
    assert place.state(first) is State.DONE


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
def test_submitting_what_went_wrong_retries_it(place, state):
    first = place.submit(chain())
    finish(place, first, state)
    assert place.submit(chain()) == first
    assert place.state(first) is State.QUEUED


def test_submissions_of_one_spec_from_many_threads_meet(place):
    found = []
    threads = [threading.Thread(target=lambda: found.append(place.submit(chain()))) for _ in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_the_baseline_comes_along_once_and_is_waited_for_only_if_needed(place):
    plain = place.submit(chain(), metrics=[score()])
    baseline, mine = place.queue.runs()
    assert mine.run_id == plain
    assert (baseline.recipe, baseline.stages) == ("baseline", ("evaluate",))
    assert mine.waits == ()
    place.submit(chain(name="b"), metrics=[score()])
    assert len(place.queue.runs()) == 3


def test_a_metric_that_compares_waits_for_the_baseline_that_has_it(place):
    place.submit(chain(), metrics=[score()])
    compared = place.queue.view(place.submit(chain(), metrics=[score(), COMPARED]))
    lacking = place.queue.view(*compared.waits)
    assert [metric.kind for metric in lacking.spec.metrics] == ["test_compared"]
    assert len(place.queue.runs()) == 4
    again = place.queue.view(place.submit(chain(name="b"), metrics=[score(), COMPARED]))
    assert again.waits == compared.waits
    assert len(place.queue.runs()) == 5


def test_a_failed_baseline_is_retried_by_the_next_run_that_needs_it(place):
    first = place.queue.view(place.submit(chain(), metrics=[COMPARED]))
    finish(place, *first.waits, State.FAILED)
    second = place.queue.view(place.submit(chain(name="b"), metrics=[COMPARED]))
    assert second.waits == first.waits
    assert place.state(*second.waits) is State.QUEUED


def test_a_baseline_brings_no_baseline(place):
    run_id = place.submit(metrics=[score(), COMPARED])
    assert [view.run_id for view in place.queue.runs()] == [run_id]
    place.submit(chain(), metrics=[score()])
    assert len(place.queue.runs()) == 2


def test_after_is_one_more_run_to_wait_for(place):
    first = place.submit(chain())
    second = place.queue.view(place.submit(chain(name="b"), after=first))
    assert (second.after, second.waits) == (first, (first,))
    with pytest.raises(ValueError, match="no run"):
        place.submit(chain(name="c"), after="20200101-000000-abcdef")


def test_a_run_that_cannot_fit_leaves_nothing(place):
    def refuse(spec: object, device: str, home: object) -> None:
        raise ValueError("needs 40 GB and there are 16 GB")

    queue = Queue(place.path, slots=Slots(), resolve=lambda spec: spec, preflight=refuse)
    with pytest.raises(ValueError, match="40 GB"):
        queue.submit(spec(chain(), metrics=[score()]))
    assert os.listdir(place.path / "runs") == []


@pytest.mark.parametrize("call", range(6))
def test_a_full_disk_at_any_write_leaves_nothing_and_says_so(place, monkeypatch, call):
    calls = iter(range(100))

    def full(fd: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = os.write

    def checked(fd: int, data: bytes) -> int:
        full(fd)
        return write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(os, "write", checked)
        with pytest.raises(ValueError, match=r"no space is left .* nothing was submitted"):
            place.submit(chain(), metrics=[score()])
    assert os.listdir(place.path / "runs") == []
    assert place.queue.runs() == []


def test_a_retry_on_a_full_disk_says_so_and_changes_nothing(place, monkeypatch):
    run_id = place.submit(chain())
    finish(place, run_id, State.FAILED)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ValueError, match="was not queued again"):
            place.queue.retry(run_id)
    assert place.state(run_id) is State.FAILED


def test_ids_are_checked_before_they_become_paths(place):
    (place.path / "secret").mkdir()
    for bad in ("../secret", "", ".", "20200101-000000-abcdef", "x/../../secret"):
        for ask in (place.queue.view, place.queue.cancel, place.queue.log, place.queue.retry):
            with pytest.raises(ValueError, match="there is no run"):
                ask(bad)


def test_two_homes_do_not_meet(tmp_path):
    one, two = Home(tmp_path / "one"), Home(tmp_path / "two")
    first = one.submit(chain())
    assert two.queue.runs() == []
    assert two.submit(chain()) != first
    assert len(one.queue.runs()) == 1


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(place):
    run_id = place.submit(chain())
    broken = place.path / "runs" / "20200101-000000-abcdef"
    broken.mkdir()
    (broken / "job.json").write_text("{")
    assert [view.run_id for view in place.queue.runs()] == [run_id]
    with pytest.raises(ValueError, match="cannot be read"):
        place.queue.view(broken.name)


def test_a_spec_of_an_unknown_method_is_still_listed(place):
    run_id = place.submit(chain())
    path = place.folder(run_id) / "spec.json"
    path.write_text(path.read_text().replace("test_chain", "from_the_future"))
    view = Queue(place.path).view(run_id)
    assert isinstance(view.spec, dict)
    assert (view.state, view.stages) == (State.QUEUED, ())


def test_a_cancelled_run_that_waits_is_cancelled_at_once_and_can_be_taken_back(place):
    run_id = place.submit(chain())
    place.queue.cancel(run_id)
    assert place.state(run_id) is State.CANCELLED
    place.queue.uncancel(run_id)
    assert place.state(run_id) is State.QUEUED
    place.queue.cancel(run_id)
    finish(place, run_id, State.CANCELLED)  # as the supervisor writes it down
    place.queue.uncancel(run_id)
    assert place.state(run_id) is State.QUEUED


def test_what_has_ended_is_neither_cancelled_nor_retried(place):
    run_id = place.submit(chain())
    finish(place, run_id)
    place.queue.cancel(run_id)
    place.queue.retry(run_id)
    assert place.state(run_id) is State.DONE
    assert not (place.folder(run_id) / "cancel").exists()


def test_a_retry_also_retries_what_the_run_waits_for(place):
    mine = place.queue.view(place.submit(chain(), metrics=[COMPARED]))
    finish(place, *mine.waits, State.FAILED)
    finish(place, mine.run_id, State.FAILED)
    place.queue.retry(mine.run_id)
    assert [view.state for view in place.queue.runs()] == [State.QUEUED] * 2


def test_order_is_urgency_then_begun_then_baseline_then_submission(place):
    slow = place.submit(chain(name="slow"))
    urgent = place.submit(chain(name="urgent"), metrics=[COMPARED], priority=5)
    (baseline,) = place.queue.view(urgent).waits
    begun = place.submit(chain(name="begun"))
    begin(place.folder(begun))
    assert [v.run_id for v in in_order(place.queue.runs())] == [baseline, urgent, begun, slow]


def test_an_old_baseline_is_as_urgent_as_the_run_that_needs_it(place):
    place.submit(chain(), metrics=[COMPARED])
    other = place.submit(chain(name="other"), priority=1)
    late = place.queue.view(place.submit(chain(name="late"), metrics=[COMPARED], priority=9))
    order = [view.run_id for view in in_order(place.queue.runs())]
    assert order[:3] == [*late.waits, late.run_id, other]


def test_time_left_comes_from_runs_that_took_the_same_way(place):
    first = place.submit(chain(), metrics=[score()])
    for stage in ("quantize", "evaluate"):
        append(place.folder(first), "stage", stage=stage, status="started")
        append(place.folder(first), "stage", stage=stage, status="done")
    timed = place.queue.view(place.submit(chain(name="a"), metrics=[score(), TIMING]))
    assert timed.eta_s is None  # nobody has timed anything yet
    second = place.queue.view(place.submit(chain(name="b"), metrics=[score()]))
    assert second.eta_s == pytest.approx(place.queue.view(first).seconds)
    assert second.eta_s > 0


def test_the_log_is_its_last_lines(place):
    run_id = place.submit(chain())
    assert place.queue.log(run_id) == ""
    (place.folder(run_id) / "log.txt").write_text("".join(f"line {i}\n" for i in range(50_000)))
    assert place.queue.log(run_id, 2) == "line 49998\nline 49999"


def test_devices_are_named_or_refused():
    gpus = Slots(1, ("0", "3"))
    assert [devices.settle(d, gpus) for d in ("auto", "cpu", "cuda:1")] == ["cuda", "cpu", "cuda:1"]
    assert devices.settle("auto", Slots()) == "cpu"
    for device, slots in (("cuda", Slots()), ("tpu", gpus), ("cuda:2", gpus), ("cuda:x", gpus)):
        with pytest.raises(ValueError, match="device"):
            devices.settle(device, slots)


def test_one_stage_for_each_slot_and_a_timing_has_the_cpu_alone():
    slots = Slots(2, ("0", "3"))
    free = Free(slots, {"r": Place("cuda", "0")})
    assert free.claim("cuda:1").gpu == "3"
    assert free.claim("cuda") is None
    assert free.claim("cpu").share == 1
    assert free.claim("cpu", whole=True) is None
    assert free.claim("cpu") is None  # the timing in front is not overtaken
    assert Free(slots, {}).claim("cpu", whole=True).share == 2
