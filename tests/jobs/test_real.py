"""A real model through real workers: killed in the middle, and left in peace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scene import DEADLINE_S, HERE, ROOT, Home, Lent

from backend.spec import RunSpec
from jobs import warm
from jobs.devices import Slots
from jobs.events import State, read
from jobs.launch import WarmLauncher
from jobs.queue import Queue
from jobs.supervisor import Supervisor
from results_db.store import Store

GPTQ = {"kind": "gptq", "format": {"kind": "int", "bits": 4, "group": 32}}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmLauncher]:
    """The warm process as the server has it, and the gate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        launcher = WarmLauncher(tmp_path_factory.mktemp("warm"), (*warm.PRELOAD, "gated"))
        launcher.open()
    yield launcher
    launcher.close()


class Real(Home):
    """A home with the real queue and store."""

    def __init__(self, path: Path, launcher: WarmLauncher) -> None:
        super().__init__(path, launcher)
        self.queue = Queue(path, slots=Slots())
        self.store = Store(path / "results.duckdb")
        self.run = Supervisor(self.queue, self.store, launcher=Lent(launcher))


@pytest.fixture
def homes(tmp_path: Path, real: WarmLauncher) -> Iterator[tuple[Real, Real]]:
    """Two homes; workers of the first wait after their first block."""
    both = Real(tmp_path / "wait", real), Real(tmp_path / "whole", real)
    yield both
    for home in both:
        home.close()
        home.store.close()


def numbers(home: Home, run_id: str) -> list[tuple]:
    found = [event for event in read(home.folder(run_id))[0] if event["type"] == "measurement"]
    last = {(e["name"], tuple(e["layer"] or ())): e["value"] for e in found}
    return sorted(last.items())


def files(home: Home, run_id: str, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.folder(run_id).glob(pattern)}


def test_a_killed_run_ends_with_the_same_bits_as_one_left_in_peace(
    homes, llama_folder, text_file, capsys
):
    killed, whole = homes
    text = f"file:{text_file}"
    spec = RunSpec.model_validate(
        {
            "model": {"id": str(llama_folder)},
            "steps": [GPTQ],
            "metrics": [
                {"kind": "perplexity", "dataset": text, "window": 128, "limit": 20},
                {"kind": "divergence", "dataset": text, "window": 128, "limit": 8},
                {"kind": "size"},
            ],
            "calibration": {"dataset": text, "samples": 8, "length": 64},
        }
    )
    ids = [home.queue.submit(spec) for home in homes]
    killed.tick_until(killed.run, lambda: killed.at_gate(ids[0]))
    os.kill(killed.holder(ids[0])["pid"], signal.SIGKILL)
    for home, run_id in zip(homes, ids, strict=True):
        home.finish(home.run, run_id, *home.queue.view(run_id).waits)
        assert home.state(run_id) is State.DONE, home.report()
    assert killed.queue.view(ids[0]).error is None
    died = [e for e in read(killed.folder(ids[0]))[0] if e["type"] == "died"]
    assert [event["exit"] for event in died] == [-9]
    for pattern in ("blocks/*", "items/*"):
        assert files(killed, ids[0], pattern) == files(whole, ids[1], pattern) != {}
    assert numbers(killed, ids[0]) == numbers(whole, ids[1])
    stored = whole.store.frame("SELECT count(*) AS n FROM measurements WHERE name = 'perplexity'")
    assert stored.n[0] == 2  # the run and its baseline
    gaps = overhead_s(whole, ids[1])
    with capsys.disabled():
        print(f"\nfork to work: {max(gaps) * 1000:.0f} ms at most over {len(gaps)} stages")


def overhead_s(home: Home, run_id: str) -> list[float]:
    """Seconds from the end of a stage to the begin of the next: supervisor, fork, lock."""
    marks = [e for e in read(home.folder(run_id))[0] if e["type"] == "stage"]
    return [b["t"] - a["t"] for a, b in zip(marks[1::2], marks[2::2], strict=False)]


def test_a_worker_works_alone(tmp_path, llama_folder):
    home = Home(tmp_path)
    home.queue = Queue(tmp_path, slots=Slots())
    ref = {"id": str(llama_folder)}
    run_id = home.queue.submit(
        RunSpec.model_validate({"model": ref, "metrics": [{"kind": "size"}]})
    )
    folder = home.folder(run_id)
    command = [sys.executable, "-m", "jobs.worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), home.report()
    assert home.state(run_id) is State.DONE
    assert "weight_bytes" in {name for (name, _), _ in numbers(home, run_id)}
    assert "stage evaluate" in home.queue.log(run_id)
