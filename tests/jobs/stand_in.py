"""What the process tests run instead of models: parts that do as they are told, and no more."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from backend.methods import Method
from backend.metrics import Metric
from backend.pipeline import Cancelled
from backend.spec import RunSpec


class Chain(Method):
    """Write blocks, each the hash of the one before; misbehave in one of them."""

    kind: ClassVar[str] = "test_chain"
    targets: ClassVar = frozenset({"weights"})
    blocks: int = 3
    at: int = 1  # block in which `act` happens
    act: str = ""
    name: str = ""  # only to tell runs apart


class Score(Metric):
    """One number, after misbehaving."""

    kind: ClassVar[str] = "test_score"
    act: str = ""
    name: str = ""


class Compared(Metric):
    """Needs the baseline."""

    kind: ClassVar[str] = "test_compared"
    needs_baseline: ClassVar[bool] = True


class Timing(Metric):
    """Measured alone."""

    kind: ClassVar[str] = "test_timing"
    alone: ClassVar[bool] = True


def execute(
    spec: RunSpec,
    stage: str,
    folder: Path,
    *,
    device: str,
    home: Path,
    emit: Callable[..., None],
    should_stop: Callable[[], bool],
) -> None:
    """Same signature as the real one."""
    work = Work(folder, emit, should_stop)
    if stage == "quantize":
        chain: Any = spec.steps[0]
        work.chain(chain)
        return
    for metric in spec.metrics_of(stage):
        work.act(getattr(metric, "act", ""))
        work.measure(metric)


class Work:
    """One stage."""

    def __init__(self, folder: Path, emit: Callable[..., None], stop: Callable[[], bool]) -> None:
        self.folder, self.emit, self.stop = folder, emit, stop

    def chain(self, chain: Chain) -> None:
        before = b"seed"
        (self.folder / "blocks").mkdir(exist_ok=True)
        for index in range(chain.blocks):
            if self.stop():
                raise Cancelled
            path = self.folder / "blocks" / f"{index:03}.safetensors"
            if not path.exists():
                part = path.with_suffix(".part")
                part.write_bytes(sha256(before).digest())
                self.act(chain.act if index == chain.at else "")
                part.rename(path)
            before = path.read_bytes()
            share = (index + 1) / chain.blocks
            place = {"stage": "quantize", "block": index + 1, "blocks": chain.blocks}
            self.emit("progress", **place, item=chain.kind, fraction=share)

    def measure(self, metric: Any) -> None:
        items = self.folder / "items"
        items.mkdir(exist_ok=True)
        blocks = sorted((self.folder / "blocks").glob("*.safetensors"))
        digest = sha256(b"".join(path.read_bytes() for path in blocks)).digest()
        (items / f"{metric.digest()}.csv").write_text("\n".join(map(str, digest)))
        known = {"metric_id": metric.digest(), "metric": metric.kind, "version": 1}
        number = {"name": metric.kind, "value": sum(digest), "unit": "", "better": "lower", "n": 32}
        where = {"device": "cpu", "dtype": "float32", "items_file": f"items/{metric.digest()}.csv"}
        self.emit("measurement", **known, **number, **where)

    def act(self, what: str) -> None:
        """`once:` in front: only the first time."""
        if what.startswith("once:"):
            mark = self.folder / "acted"
            what = "" if mark.exists() else what.removeprefix("once:")
            mark.touch()
        if what:
            ACTS[what](self)

    def exit(self) -> None:
        os._exit(9)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def leave_child(self) -> None:
        """Die while a forked child lives on and keeps the lock."""
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(9)

    def memory(self) -> None:
        raise MemoryError

    def disk(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(self) -> None:
        raise RuntimeError("a deliberate failure\n" + "x" * 100_000)

    def refuse(self) -> None:
        raise ValueError("group 7 does not divide 64")

    def wait(self) -> None:
        """Until somebody opens the gate, or cancels."""
        while not (self.folder / "gate").exists():
            if self.stop():
                raise Cancelled
            time.sleep(0.01)

    def stubborn(self) -> None:
        """Deaf to cancel and to SIGTERM."""
        (self.folder / "deaf").touch()
        while True:
            time.sleep(0.01)


ACTS: dict[str, Callable[[Work], None]] = {
    name: getattr(Work, name)
    for name in (
        "exit", "kill", "leave_child", "memory", "disk", "fail", "refuse", "wait", "stubborn"
    )
}  # fmt: skip

KINDS = {"method": [Chain], "metric": [Score, Compared, Timing]}
