"""Who is loaded, who waits, and who has to leave: the state that all threads of the pool share."""

from __future__ import annotations

import itertools
import socket
import threading
from collections import deque
from contextlib import suppress

from jobs.chat_jobs import Job, Mode
from jobs.chat_runs import ChatRun, gigabytes
from jobs.chat_types import LoadState, PoolState

PATIENCE = 8  # answers that may overtake one for which there is no memory yet
MOST_WAITING = 200  # answers, on one model
CLOSED = "the chat was closed"


class Variant:
    """One run in the pool, loaded or not. Under the pool's lock, all of it."""

    def __init__(self, run: ChatRun, dtype: str) -> None:
        self.run = run
        self.dtype = dtype  # asked for; "": what the run computes in
        self.state: LoadState = "cold"
        self.why = ""
        self.bytes = 0  # counted against the budget while there is or may be a process
        self.mode: Mode | None = None  # also after its process has gone
        self.used = 0  # grows with every use of any variant
        self.waiting: deque[Job] = deque()
        self.current: Job | None = None
        self.to_stop: list[int] = []  # answers whose process is to be told
        self.leaving = False  # its process was told to end
        self.reserving = 0  # waits for memory since this number; 0: it does not
        self.threaded = False  # a thread works for it
        self.bell: socket.socket | None = None

    def ring(self) -> None:
        """Wake its thread."""
        if self.bell is not None:
            with suppress(OSError):  # full of rings: it will wake
                self.bell.send(b"!")

    def first(self) -> float:
        """Number of the next answer; infinite if none waits."""
        return self.waiting[0].id if self.waiting else float("inf")

    def idle(self) -> bool:
        """True if it is loaded and works on nothing."""
        return self.state == "ready" and self.current is None and not self.leaving

    def position(self) -> int:
        """Answers that would come before a new one."""
        return len(self.waiting) + (self.current is not None)

    def seen(self) -> PoolState:
        """As the pool shows it."""
        mode = self.mode
        return PoolState(
            state=self.state,
            why=self.why,
            bytes=self.bytes,
            packed=None if mode is None else mode.packed,
            dtype="" if mode is None else mode.dtype,
            position=self.position(),
            notes=() if mode is None else mode.notes,
        )

    def reset(self, why: str) -> None:
        """Its process is gone; `why` it could not be loaded, if that is so."""
        self.state, self.why = ("failed", why) if why else ("cold", "")
        self.bytes, self.leaving, self.reserving, self.current = 0, False, 0, None
        self.to_stop.clear()

    def place(self) -> None:
        """Tell everybody who waits how many come before."""
        ahead = int(self.current is not None)
        for at, job in enumerate(self.waiting):
            job.place(at + ahead, self.state != "ready")


class Room:
    """All variants, and the memory they share. Whatever changes here changes under `lock`."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.lock = threading.RLock()
        self.variants: dict[tuple[str, str], Variant] = {}
        self.closed = False
        self._changed = threading.Condition(self.lock)
        self._numbers = itertools.count(1)

    def number(self) -> int:
        """The next of all numbers: of answers, of uses, of processes."""
        return next(self._numbers)

    def variant(self, run: ChatRun, dtype: str = "") -> Variant:
        """The run in the pool, new if need be."""
        with self.lock:
            return self.variants.setdefault((run.run_id, dtype), Variant(run, dtype))

    def settle(self) -> None:
        """Something changed: everybody looks again."""
        with self.lock:
            self._changed.notify_all()
            for variant in self.variants.values():
                variant.ring()

    # Answers

    def submit(self, variant: Variant, job: Job) -> None:
        """Put a job at the end of the variant's queue. ValueError if that is too long."""
        with self.lock:
            if self.closed:
                job.fail(CLOSED)
                return
            if len(variant.waiting) >= MOST_WAITING:
                raise ValueError(f"{MOST_WAITING} answers wait for this model; try again later")
            job.id = self.number()
            variant.waiting.append(job)
            variant.place()

    def withdraw(self, variant: Variant, job: Job) -> bool:
        """Take a job out of the queue -> whether it was still there."""
        with self.lock:
            if job not in variant.waiting:
                return False
            variant.waiting.remove(job)
            variant.place()
            self.settle()
            return True

    def begin(self, variant: Variant) -> Job | None:
        """The variant's next job, which is its current one from now on; None if it must wait.

        It must when another variant has waited for memory while PATIENCE answers overtook it.
        """
        with self.lock:
            held = any(
                other.reserving and other.first() + PATIENCE < variant.first()
                for other in self.variants.values()
            )
            if not variant.idle() or not variant.waiting or held:
                return None
            variant.current = variant.waiting.popleft()
            variant.used = self.number()
            variant.place()
            return variant.current

    def end(self, variant: Variant) -> None:
        """The current job is over."""
        with self.lock:
            variant.current = None
            variant.place()
            self.settle()

    def fail(self, variant: Variant, why: str) -> None:
        """Everybody who waits for the variant hears why it is in vain."""
        with self.lock:
            for job in variant.waiting:
                job.fail(why)
            variant.waiting.clear()

    def close(self) -> None:
        """Nothing begins any more, and every process is told to leave."""
        with self.lock:
            self.closed = True
            for variant in self.variants.values():
                variant.leaving = True
                self.fail(variant, CLOSED)
            self.settle()

    # Memory

    def reserve(self, variant: Variant, size: int) -> bool:
        """Wait until `size` bytes are free in the budget, and take them; False once closed.

        Whose next answer was asked for first gets memory first, so that nobody waits for ever.
        """
        self.check_fits(size)
        with self.lock:
            variant.reserving = self.number()
            while not self.closed and not self._granted(variant, size):
                self._changed.wait()
            variant.reserving = 0
            variant.bytes = 0 if self.closed else size
            self.settle()
            return not self.closed

    def resize(self, variant: Variant, size: int) -> None:
        """The variant takes this much now; where that is too much for all, idle ones leave."""
        with self.lock:
            variant.bytes = size
            self._evict(variant, size)
            self.settle()

    def check_fits(self, size: int) -> None:
        """ValueError with the numbers if a process of this size can never be."""
        if size > self.budget_bytes:
            raise ValueError(
                f"this model needs about {gigabytes(size)} of memory and the chat may use "
                f"{gigabytes(self.budget_bytes)}; free some memory or chat with a smaller one"
            )

    def _granted(self, variant: Variant, size: int) -> bool:
        """True if it is the variant's turn and there is room; else room is being made."""
        asking = [v for v in self.variants.values() if v.reserving]
        if min(asking, key=lambda v: (v.first(), v.reserving)) is not variant:
            return False
        self._evict(variant, size)
        return self._left(variant, size) >= 0

    def _left(self, variant: Variant, size: int) -> int:
        """Bytes left of the budget if the variant takes `size`."""
        others = sum(v.bytes for v in self.variants.values() if v is not variant)
        return self.budget_bytes - size - others

    def _evict(self, variant: Variant, size: int) -> None:
        """Tell the least recently used idle ones to leave, until enough have been told."""
        others = [other for other in self.variants.values() if other is not variant]
        coming = sum(other.bytes for other in others if other.leaving)
        missing = -self._left(variant, size) - coming
        for other in sorted((v for v in others if v.idle()), key=lambda v: v.used):
            spared = other.waiting and other.first() <= variant.first() + PATIENCE
            if missing > 0 and not spared:
                other.leaving = True
                other.ring()
                missing -= other.bytes
