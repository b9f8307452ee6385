"""What a worker can be given to work on. Nothing here loads a driver into this process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

# Two stages side by side, half the cores each: in small models threads mostly wait for each other
# (demo, 2 busy cores: a forward pass of 2,048 tokens takes 0.08 s on one thread, 1.4 s on two).
CPU_SLOTS = 2
NVIDIA = Path("/proc/driver/nvidia/gpus")  # one folder per card, where the driver is loaded


@dataclass(frozen=True)
class Slots:
    """How many stages run at once: so many on the CPU, and one on each GPU."""

    cpu: int = 1
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them


@dataclass(frozen=True)
class Place:
    """Where one stage runs."""

    device: str = "cpu"  # cpu or cuda
    gpu: str | None = None  # the card, as CUDA_VISIBLE_DEVICES names it
    threads: int = 0  # of PyTorch on the CPU; 0: as many as it likes
    share: int = 1  # CPU slots taken

    def data(self) -> dict[str, Any]:
        """JSON data, for a lock file or a request."""
        return asdict(self)


def here(cpu: int | None = None, visible: str | None = None) -> Slots:
    """This machine's slots. `visible` is CUDA_VISIBLE_DEVICES unless given."""
    cpu = min(CPU_SLOTS, cores()) if cpu is None else cpu
    listed = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    cards = count_cards()
    if listed is None:
        return Slots(cpu, tuple(str(card) for card in range(cards)))
    names = [name.strip() for name in listed.split(",")] if cards else []
    return Slots(cpu, tuple(name for name in names if name and name != "-1"))


@lru_cache(maxsize=1)
def count_cards() -> int:
    """NVIDIA cards: by the driver's folder, else (WSL, some containers) by nvidia-smi."""
    if NVIDIA.is_dir():
        return len(list(NVIDIA.iterdir()))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def cores() -> int:
    """Cores that this process may use, counted once where they run two threads each."""
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def settle(device: str, slots: Slots) -> str:
    """auto, cpu, cuda or cuda:N -> cpu, cuda or cuda:N. ValueError if this machine lacks it."""
    if device == "auto":
        return "cuda" if slots.gpus else "cpu"
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"device {device!r} is not one of auto, cpu, cuda, cuda:0, cuda:1, ...")
    if device != "cpu" and not slots.gpus:
        raise ValueError(f"device {device!r}: no NVIDIA GPU is visible here; use cpu or auto")
    if ":" in device and int(device.partition(":")[2]) >= len(slots.gpus):
        raise ValueError(f"device {device!r}: this machine shows {len(slots.gpus)} GPU(s)")
    return device


class Free:
    """What is free during one round of starting; once refused, a device stays closed.

    Closing keeps the order: a stage that needs the whole CPU is not overtaken for ever.
    """

    def __init__(self, slots: Slots, taken: Mapping[str, Place]) -> None:
        self.slots = slots
        used = {place.gpu for place in taken.values() if place.device != "cpu"}
        self.cpu = slots.cpu - sum(p.share for p in taken.values() if p.device == "cpu")
        self.gpus = [gpu for gpu in slots.gpus if gpu not in used]
        self.closed: set[str] = set()

    def claim(self, device: str, *, whole: bool = False) -> Place | None:
        """A place on the device, `whole`: with no other stage on the CPU. None: wait."""
        place = None
        if device not in self.closed:
            place = self._cpu(whole) if device == "cpu" else self._gpu(device)
        if place is None:
            self.closed.add(device)
        return place

    def _cpu(self, whole: bool) -> Place | None:
        share = self.slots.cpu if whole else 1
        if share > self.cpu:
            return None
        self.cpu -= share
        return Place("cpu", None, max(1, cores() * share // self.slots.cpu), share)

    def _gpu(self, device: str) -> Place | None:
        number = device.partition(":")[2]
        wanted = self.slots.gpus[int(number)] if number else next(iter(self.gpus), "")
        if wanted not in self.gpus:
            return None
        self.gpus.remove(wanted)
        return Place("cuda", wanted)
