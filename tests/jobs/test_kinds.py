"""Jobs of several kinds share one queue, one event, ingest and progress path."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
from scene import ROOT, chain, score, spec
from stand_in_kind import COUNT, CountSpec, install

from backend.spec import MineSpec, ModelRef, RunSpec
from jobs import kinds
from jobs.__main__ import line
from jobs.devices import Place
from jobs.events import State, append, read
from jobs.kinds.mine import chosen
from jobs.queue import Queue
from jobs.results import report
from jobs.supervisor import Copy, in_order
from jobs.worker import DONE, FAILED, Stop, work
from results_db import queries
from results_db.store import Store

MODEL = ModelRef(id="demo", content="c0")


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in kind is known here for one test."""
    monkeypatch.setitem(install(), COUNT.name, COUNT)


def count(**knobs: Any) -> CountSpec:
    return CountSpec(model=MODEL, **knobs)


def counted(folder: Any) -> list[str]:
    return [event["text"] for event in read(folder)[0] if event["type"] == "note"]


# -- what a kind is


@pytest.mark.parametrize("name", sorted(kinds.load()))
def test_every_kind_is_complete(name):
    kind = kinds.find(name)
    assert kind.name == name
    assert type(kind).__doc__
    try:
        bare = kind.validate({"kind": name, "model": {"id": "demo", "content": "c0"}})
    except ValueError:
        pytest.skip("its spec needs more than a model")
    assert bare.kind == name
    assert kinds.validate(json.loads(json.dumps(bare.model_dump(mode="json")))) == bare
    assert list(kind.kin(bare, "cpu")) == bare.stages()
    assert set(kind.alone(bare)) <= set(bare.stages())
    assert "\n" not in kind.title(bare)
    for garbage in ({}, {"kind": name}, {"kind": name, "model": {"id": ""}}, {"x": 1}):
        with pytest.raises(ValueError):
            kind.validate(garbage)


def test_a_spec_without_a_kind_is_a_run():
    data = spec(chain(), metrics=[score()]).model_dump(mode="json")
    assert data.pop("kind") == "run"
    assert kinds.validate(data) == spec(chain(), metrics=[score()])
    with pytest.raises(ValueError, match=r"unknown kind of job 'paint'; there are: .*run"):
        kinds.validate({"kind": "paint", "model": {"id": "demo"}})
    with pytest.raises(ValueError, match="this is a list"):
        kinds.validate([])  # type: ignore[arg-type]


def test_the_kind_changed_no_identity_of_a_run():
    """Ids of runs as the first version computed them: homes of then keep working."""
    plain = RunSpec(model=MODEL)
    assert (plain.artifact_id(), plain.fingerprint()) == ("343168d157af", "d6c31cef07c4")
    assert list(plain.model_dump(mode="json")) == [
        *("kind", "model", "steps", "metrics", "calibration", "storage", "seed")
    ]


def test_kinds_are_known_without_torch():
    code = "import sys; from jobs import kinds; kinds.load(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -- in the queue


def test_a_job_of_another_kind_is_queued_listed_and_found_again(place):
    first = place.queue.submit(count(), label="mine", priority=2)
    assert place.queue.submit(count()) == first != place.queue.submit(count(numbers=5))
    view = place.queue.view(first)
    assert (view.kind, view.recipe, view.label) == ("test_count", "Count to 4", "mine")
    assert (view.stages, view.alone, view.fraction) == (("count", "time"), ("time",), 0)
    assert view.spec == count()
    assert "Count to 4" not in line(view)  # its label says more
    assert "Count to 5" in line(place.queue.runs()[1])
    assert len(place.queue.runs()) == 2  # no baseline came along


def test_an_unknown_kind_is_listed_and_does_nothing(place):
    run_id = place.queue.submit(count())
    path = place.folder(run_id) / "spec.json"
    path.write_text(path.read_text().replace("test_count", "from_the_future"))
    view = Queue(place.path).view(run_id)
    assert isinstance(view.spec, dict)
    assert (view.kind, view.stages, view.alone) == ("from_the_future", (), ())
    assert work(place.folder(run_id), Place()) == FAILED
    assert "unknown kind of job" in place.queue.view(run_id).error["message"]


def test_other_kinds_do_not_overtake_runs_that_begin_a_chart(place):
    late = place.queue.submit(count())
    plain = place.submit(metrics=[score()])
    quantized = place.submit(chain())
    assert [v.run_id for v in in_order(place.queue.runs())] == [plain, late, quantized]


def test_a_job_waits_for_what_its_kind_says(place):
    other = place.submit(chain())
    waiting = place.queue.view(place.queue.submit(count(after=(other,))))
    assert waiting.waits == (other,)
    append(place.folder(other), "state", state=State.FAILED)
    append(place.folder(waiting.run_id), "state", state=State.FAILED)
    place.queue.retry(waiting.run_id)
    assert {view.state for view in place.queue.runs()} == {State.QUEUED}


# -- at work


def test_stages_progress_and_resume_are_the_same_for_every_kind(place):
    run_id = place.queue.submit(count(numbers=6, act="once:fail", at=3))
    folder = place.folder(run_id)
    assert work(folder, Place()) == FAILED
    assert place.queue.view(run_id).error["message"].startswith("RuntimeError: a deliberate")
    place.queue.retry(run_id)
    assert work(folder, Place()) == DONE
    assert counted(folder) == list("012345")  # nothing twice
    view = place.queue.view(run_id)
    assert (view.done, view.state, view.fraction) == (("count",), State.RUNNING, 0.5)
    assert work(folder, Place()) == DONE
    assert place.state(run_id) is State.DONE
    assert report(place.queue, run_id)["recipe"] == "Count to 6"


def test_cancel_stops_a_job_of_any_kind_and_retry_goes_on(place):
    run_id = place.queue.submit(count())
    looks = iter([False, True])

    class After(Stop):
        def __call__(self) -> bool:
            return next(looks)

    (place.folder(run_id) / "cancel").touch()
    assert work(place.folder(run_id), Place(), After(place.folder(run_id))) == DONE
    assert (place.state(run_id), counted(place.folder(run_id))) == (State.CANCELLED, ["0"])
    place.queue.retry(run_id)
    assert work(place.folder(run_id), Place()) == DONE
    assert counted(place.folder(run_id)) == list("0123")


def test_what_has_changed_since_is_not_continued(place, monkeypatch):
    run_id = place.queue.submit(count())
    monkeypatch.setattr(CountSpec, "version", 2)
    assert work(place.folder(run_id), Place()) == FAILED
    assert "this test_count has changed" in place.queue.view(run_id).error["message"]


def test_a_supervisor_does_jobs_of_all_kinds_and_survives_their_deaths(place):
    run = place.supervisor()
    dying = place.queue.submit(count(act="once:kill"))
    plain = place.submit(chain(), metrics=[score()])
    everyone = [view.run_id for view in place.queue.runs()]
    place.finish(run, *everyone)
    assert {place.state(run_id) for run_id in everyone} == {State.DONE}
    assert [e["exit"] for e in read(place.folder(dying))[0] if e["type"] == "died"] == [-9]
    assert counted(place.folder(dying)) == list("0123")
    shares = {
        event["stage"]: event["share"]
        for event in read(place.folder(dying))[0]
        if event["type"] == "stage" and event["status"] == "started"
    }
    assert shares == {"count": 1, "time": place.queue.slots.cpu}
    assert plain in place.store.events
    assert dying in place.store.events


def test_the_database_tells_kinds_apart(place, tmp_path):
    jobs = [place.queue.submit(count()), place.submit(chain(), metrics=[score()])]
    for run_id in jobs:
        while not place.state(run_id).ended:
            assert work(place.folder(run_id), Place()) == DONE
    old = place.folder(jobs[1]) / "spec.json"
    data = json.loads(old.read_text())
    del data["kind"]
    old.write_text(json.dumps(data))
    with closing(Store(tmp_path / "results.duckdb")) as store:
        Copy(Queue(place.path), store).all()
        kept = store.frame("SELECT run_id, kind FROM runs WHERE state = 'done'")
        assert dict(kept.itertuples(index=False)) == {jobs[0]: "test_count", jobs[1]: "run"}
        assert jobs[0] not in set(queries.runs(store)["run_id"])
        assert set(queries.wide(store)["run_id"]) == {jobs[1]}
        assert queries.notes(store, jobs[0])["text"].tolist() == list("0123")


# -- mining: which runs it asks


def view_of(run_id: str, *steps: dict, state: State = State.DONE, **knobs: Any) -> Any:
    made = spec(*steps, **knobs)
    return SimpleNamespace(
        run_id=run_id, kind="run", spec=made, state=state, artifact_id=made.artifact_id()
    )


def views() -> list[Any]:
    """Runs of one home."""
    one, other = chain(name="a"), chain(name="b")
    return [
        view_of("r1", metrics=[score()]),
        view_of("r2", one),
        view_of("r3", one, metrics=[score()]),
        view_of("r4", other, state=State.FAILED),
        view_of("r5", chain(name="c"), state=State.QUEUED),
        view_of("r6", other, model={"id": "demo", "content": "other"}),
        view_of("r7", metrics=[score(name="x")]),
        SimpleNamespace(run_id="r8", kind="test_count", spec=count(), state=State.DONE),
        SimpleNamespace(run_id="r9", kind="future", spec={"model": {}}, state=State.DONE),
    ]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ([], ["r1", "r2"]),  # one run of each artifact, the first
        (["r3"], ["r1", "r3"]),  # the 16-bit run comes along
        (["r5", "r2"], ["r1", "r5", "r2"]),  # not done yet: the job waits
        (["r2", "r7"], ["r7", "r2"]),
    ],
)
def test_mining_asks_the_runs_of_its_model(asked, found):
    assert chosen(views(), asked, MODEL) == found


@pytest.mark.parametrize(
    ("there", "asked", "complaint"),
    [
        (9, ["r4"], "run r4 is failed; retry it first"),
        (9, ["r6"], "no run of this model"),
        (9, ["r8"], "no run of this model"),
        (9, ["r0"], "there is no run 'r0'"),
        (9, ["r1"], "no quantized run of demo is finished"),
        (1, [], "no quantized run of demo is finished"),
        (0, [], "no quantized run of demo is finished"),
    ],
)
def test_mining_refuses_runs_that_cannot_be_asked(there, asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        chosen(views()[:there], asked, MODEL)


def test_mining_without_a_16_bit_run_goes_without_its_row():
    assert chosen(views()[1:3], [], MODEL) == ["r2"]


def test_a_mine_spec_is_checked():
    good = {"kind": "mine", "model": {"id": "demo"}, "runs": ["20261125-010203-abcdef"]}
    made = kinds.validate(good)
    assert isinstance(made, MineSpec)
    assert made.sampling().max_new == 256
    for bad, complaint in (
        ({"runs": ["../../etc"]}, "pattern"),
        ({"prompts": ["a", "a"]}, "named twice"),
        ({"max_new": 0}, "max_new"),
        ({"temperature": 99}, "temperature"),
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises(ValueError, match=complaint):
            kinds.validate(good | bad)
    assert made.fingerprint() != made.model_copy(update={"seed": 1}).fingerprint()
