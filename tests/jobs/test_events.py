"""Lines, torn lines, and the fold over them."""

from __future__ import annotations

import errno
import math
import os

import pytest

from jobs.events import EVENTS, MAX_LINE, MAX_TEXT, State, append, read, state_of
from jobs.view import Folded, fold, overall, remaining

STAGES = ("quantize", "evaluate")
ODD = "line ends of Unicode \u2028 \x85, ü, and half a pair \ud800"


def test_what_is_appended_is_read_back_from_any_offset(tmp_path):
    append(tmp_path, "note", text="first\nline")
    first, middle = read(tmp_path)
    append(tmp_path, "note", text=ODD)
    second, end = read(tmp_path, middle)
    assert [event["text"] for event in (*first, *second)] == ["first\nline", ODD]
    assert read(tmp_path)[0] == first + second
    assert read(tmp_path, end) == ([], end)
    assert end == (tmp_path / EVENTS).stat().st_size


def test_a_run_without_events_is_queued(tmp_path):
    assert read(tmp_path) == ([], 0)
    assert state_of(tmp_path) is State.QUEUED


def test_a_torn_last_line_waits_for_its_rest(tmp_path):
    append(tmp_path, "note", text="whole")
    _, offset = read(tmp_path)
    line = b'{"t": 1, "type": "state", "state": "done"}\n'
    for cut in range(1, len(line)):
        with (tmp_path / EVENTS).open("ab") as file:
            file.truncate(offset)
            file.write(line[:cut])
        assert read(tmp_path, offset) == ([], offset)
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(line[cut:])
    assert [event["state"] for event in read(tmp_path, offset)[0]] == ["done"]


def test_a_writer_that_follows_a_torn_line_loses_only_that_line(tmp_path):
    append(tmp_path, "note", text="before")
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(b'{"t": 1, "type": "no')
    append(tmp_path, "note", text="after")
    assert [event["text"] for event in read(tmp_path)[0]] == ["before", "after"]


def test_a_long_text_is_cut_and_keeps_both_ends(tmp_path):
    append(tmp_path, "state", state="failed", error={"traceback": "start" + "x" * 10**6 + "cause"})
    text = read(tmp_path)[0][0]["error"]["traceback"]
    assert len(text) < MAX_TEXT + 100
    assert text.startswith("start")
    assert text.endswith("cause")


def test_an_event_that_is_still_too_long_is_refused(tmp_path):
    with pytest.raises(ValueError, match="items/"):
        append(tmp_path, "note", texts=["x" * MAX_TEXT] * (MAX_LINE // MAX_TEXT))
    assert read(tmp_path) == ([], 0)


def test_numbers_that_json_lacks_become_words(tmp_path):
    append(tmp_path, "measurement", value=math.nan, detail={"worst": [-math.inf, 1.5]})
    event = read(tmp_path)[0][0]
    assert (event["value"], event["detail"]) == ("nan", {"worst": ["-inf", 1.5]})


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path, monkeypatch):
    append(tmp_path, "note", text="whole")
    before = (tmp_path / EVENTS).read_bytes()
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        with pytest.raises(OSError) as refused:
            append(tmp_path, "note", text="half")
    assert refused.value.errno == errno.ENOSPC
    assert (tmp_path / EVENTS).read_bytes() == before


def event(type: str, t: float, **data: object) -> dict:
    return {"t": t, "type": type, **data}


STORY = [
    event("submitted", 0),
    event("state", 0, state="queued"),
    event("state", 10, state="running"),
    event("stage", 11, stage="quantize", status="started"),
    event("progress", 13, block=1, blocks=4, item="q_proj", fraction=0.25),
    event("died", 15, stage="quantize", exit=-9),
    event("stage", 20, stage="quantize", status="started"),
    event("stage", 26, stage="quantize", status="done"),
    event("stage", 30, stage="evaluate", status="started"),
    event("progress", 32, fraction=0.5, item="perplexity"),
    event("surprise", 33),
]


def test_the_fold_tells_the_story():
    run = fold(Folded(), STORY)
    assert (run.state, run.stage, run.done) == (State.RUNNING, "evaluate", ("quantize",))
    assert (run.submitted, run.started, run.finished) == (0, 10, None)
    assert run.seconds == {"quantize": 4 + 6}
    assert (run.fraction, run.item, run.block) == (0.5, "perplexity", None)
    assert run.deaths == 0  # those of a finished stage are forgiven
    assert fold(fold(Folded(), STORY[:5]), STORY[5:]) == run
    assert fold(Folded(), STORY[:6]).deaths == 1
    assert not fold(Folded(), STORY[:6]).open


def test_a_retry_forgets_the_error_and_keeps_what_is_done():
    failed = fold(Folded(), [*STORY, event("state", 40, state="failed", error={"message": "no"})])
    assert (failed.error, failed.finished, failed.open) == ({"message": "no"}, 40, False)
    again = fold(failed, [event("state", 50, state="queued")])
    assert (again.state, again.error, again.done) == (State.QUEUED, None, ("quantize",))


def test_fraction_and_time_left_weigh_stages_by_what_they_took_before():
    run = fold(Folded(), STORY)
    assert overall(run, STAGES, {}) == 0.75
    assert overall(run, STAGES, {"quantize": 30, "evaluate": 10}) == pytest.approx(35 / 40)
    assert remaining(run, STAGES, {}, now=36) == pytest.approx(6)  # half done after 6 s
    assert remaining(run, (*STAGES, "speed"), {}, now=36) is None
    assert remaining(run, (*STAGES, "speed"), {"speed": 4}, now=36) == pytest.approx(10)


def test_a_stage_without_progress_is_judged_by_its_kind():
    run = fold(Folded(), STORY[:7])
    assert remaining(run, STAGES, {"quantize": 12, "evaluate": 3}, now=25) == pytest.approx(10)
    assert remaining(Folded(), STAGES, {"quantize": 12, "evaluate": 3}, now=25) == 15
    done = fold(run, [event("state", 30, state="done")])
    assert remaining(done, STAGES, {}, now=31) is None
    assert overall(done, STAGES, {}) == 1


def test_a_stage_that_resumes_is_judged_by_its_pace_since_then():
    story = [
        event("stage", 0, stage="mine", status="started"),
        event("progress", 30, fraction=0.6),
        event("died", 31, stage="mine", exit=-9),
        event("stage", 100, stage="mine", status="started"),
        event("progress", 101, fraction=0.6),
    ]
    run = fold(Folded(), story)
    assert remaining(run, ("mine",), {}, now=101) is None  # it has done nothing yet
    run = fold(run, [event("progress", 110, fraction=0.8)])
    assert remaining(run, ("mine",), {}, now=110) == pytest.approx(10)  # a fifth in 10 s
