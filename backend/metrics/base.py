"""Metric: measures a run. Measurement: one number with its conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from backend.registry import Part

if TYPE_CHECKING:
    from backend.run import Run

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Measurement:
    """One number. `value` None is a missing one, `detail["reason"]` says why."""

    name: str
    value: float | None
    unit: str
    better: Better
    n: int = 1
    stderr: float | None = None
    items: Sequence[float] | None = None  # per window or document: feeds paired tests
    layer: tuple[int, str] | None = None  # (block, module) of a per-layer value
    detail: Mapping[str, Any] = field(default_factory=dict)


class Metric(Part):
    """A way to measure a run; its fields decide the number, so they make up its identity."""

    alone: ClassVar[bool] = False  # True: measured in a process of its own (time, memory)
    storage: ClassVar[Literal["any", "packed"]] = "any"
    needs_baseline: ClassVar[bool] = False  # True: compares with the 16-bit model
    yields: ClassVar[tuple[str, ...]] = ()  # names of its measurements, where known beforehand

    def data_hash(self, run: Run) -> str:
        """Hash of the data measured on; "" where there is none. Part of the metric's identity."""
        return ""

    def measure(self, run: Run) -> Iterator[Measurement]:
        """Yield the numbers; call run.progress between items."""
        raise NotImplementedError(f"{self.kind} measures nothing")
