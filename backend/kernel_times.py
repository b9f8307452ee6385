"""A bench job: every kernel that can be timed on a device, row by row as events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backend.pipeline import Cancelled
from backend.registry import nearest

if TYPE_CHECKING:
    import torch

    from backend.spec import BenchSpec
    from kernels.contest import Row

Emit = Callable[..., None]


def known() -> list[str]:
    """Names of everything that is timed."""
    from kernels.bench import known as names

    return names()


def check_names(names: Sequence[str]) -> None:
    """ValueError for a kernel that there is none of."""
    for name in names:
        if name not in known():
            raise ValueError(f"unknown kernel {name!r}{nearest(name, known())}")


def read_shapes(text: str) -> tuple[str, ...]:
    """`llama`, `published`, `quick`, or `4096x4096,14336x4096` -> shapes as a spec has them."""
    from kernels.bench import LLAMA, PUBLISHED

    named = {"llama": LLAMA, "published": PUBLISHED, "quick": ()}
    if text in named:
        return tuple(f"{n}x{k}" for n, k in named[text])
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class Wanted:
    """What a spec asks for, its blanks filled in."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]

    @staticmethod
    def of(spec: BenchSpec) -> Wanted:
        from kernels.bench import QUICK, QUICK_ROWS

        shapes = tuple(read_shape(text) for text in spec.shapes)
        return Wanted(spec.kernels or tuple(known()), shapes or QUICK, spec.rows or QUICK_ROWS)


def read_shape(text: str) -> tuple[int, int]:
    """`14336x4096` -> (n, k)."""
    n, _, k = text.partition("x")
    return int(n), int(k)


def measure(spec: BenchSpec, *, device: str, emit: Emit, should_stop: Callable[[], bool]) -> None:
    """All rows as events `kernel_time` and `ceiling`. Raises Cancelled between two weights."""
    import torch

    from backend.environment import environment

    place = torch.device(device)
    emit("env", env={**environment(), "threads": torch.get_num_threads()})
    about = {"device": device_name(place), "threads": torch.get_num_threads()}
    for fraction, item, rows in parts(Wanted.of(spec), place):
        if should_stop():
            raise Cancelled
        emit("progress", stage="time", block=None, blocks=None, item=item, fraction=fraction)
        for row in rows:
            emit_row(emit, {**row, **about})
    emit("progress", stage="time", block=None, blocks=None, item="", fraction=1.0)


def parts(wanted: Wanted, device: torch.device) -> Iterator[tuple[float, str, Iterator[Row]]]:
    """(share done, what comes, its rows) of each weight; the device's ceilings first."""
    from kernels.bench import parts as to_time
    from kernels.ceilings import ceilings

    todo = to_time(wanted.names, wanted.shapes, wanted.rows, device)
    if not todo:
        raise ValueError(
            f"none of {', '.join(wanted.names)} takes these shapes on {device.type}; choose others"
        )
    yield 0.0, "what the device can do at best", ceilings(device)
    for at, part in enumerate(todo, 1):
        yield at / (len(todo) + 1), part.about, part.rows()


def emit_row(emit: Emit, row: Row) -> None:
    """One row as an event; formats as JSON text, by which rows are told apart."""
    if "ceiling" in row:
        names = ("value", "unit", "device")
        emit("ceiling", name=row["ceiling"], **{name: row[name] for name in names})
        return
    forms = {name: json.dumps(row[name], sort_keys=True) for name in ("weight", "act")}
    emit("kernel_time", **{**row, **forms})


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the processor's."""
    import torch

    from backend.environment import cpu_name

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() or "CPU"


def line(row: Row) -> str:
    """A row of a job, as JSON data, for people."""
    from kernels.contest import line as told

    return told(row)
