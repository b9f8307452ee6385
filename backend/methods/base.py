"""Method: one step of a pipeline. LinearMethod: the common case, each linear on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from backend.metrics.base import Measurement
from backend.model.stats import LayerStats, Stat
from backend.registry import Part

if TYPE_CHECKING:
    from backend.model.families import Block

Target = Literal["weights", "activations", "kv_cache"]
BlockInput = tuple[Tensor, Mapping[str, Any]]  # hidden states [B, T, D], keywords of the block


class Seen:
    """What the driver shows a method for one wave of one block."""

    def __init__(
        self,
        stats: Mapping[str, LayerStats],
        inputs: Callable[[], Iterator[BlockInput]] | None = None,
        *,
        note: Callable[[str, str], None] | None = None,
        progress: Callable[[float], None] | None = None,
        measure: Callable[[Measurement], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        seed: int = 0,
    ) -> None:
        self.stats = stats  # linear name -> its statistics
        self._inputs = inputs
        self._note = note
        self._progress = progress
        self._measure = measure
        self._should_stop = should_stop
        self.seed = seed  # of this (run, block, step)

    def inputs(self) -> Iterator[BlockInput]:
        """The block's inputs again, batch by batch."""
        return self._inputs() if self._inputs else iter(())

    def note(self, text: str, linear: str = "") -> None:
        """A fallback or skip: stored with the result and shown on the chart."""
        if self._note:
            self._note(text, linear)

    def progress(self, fraction: float) -> None:
        """Inside long work, 0 to 1."""
        if self._progress:
            self._progress(fraction)

    def measure(self, measurement: Measurement) -> None:
        """A curve or a per-layer value found on the way."""
        if self._measure:
            self._measure(measurement)

    def should_stop(self) -> bool:
        """True once the run was cancelled."""
        return bool(self._should_stop and self._should_stop())

    def generator(self) -> torch.Generator:
        """Random numbers that depend on the run's seed, the block and the step alone."""
        return torch.Generator().manual_seed(self.seed)


class Method(Part):
    """One step: rewrites a block in place and leaves it runnable."""

    targets: ClassVar[frozenset[Target]]
    needs: ClassVar[tuple[type[Stat], ...]] = ()  # gathered before apply
    prefix: ClassVar[Literal["quantized", "original"]] = "quantized"  # whose outputs feed the stats
    exact: ClassVar[bool] = False  # True: rewrites the block, changes no output
    family: ClassVar[str] = ""  # colour on charts; "" is the kind itself
    fixed_bits: ClassVar[float | None] = None  # of a code, where no knob and no format says

    def waves(self, block: Block) -> list[list[str]]:
        """Names of linears, wave by wave; later waves see the earlier ones already rewritten."""
        return [list(block.linears())]

    def wanted(self) -> tuple[type[Stat], ...]:
        """The statistics these knobs need; all of `needs` unless a method narrows it."""
        return self.needs

    def before(self, model: nn.Module, ids: Tensor, seen: Seen) -> None:
        """Once for the whole model before the walk; ids [n, T]."""

    def apply(self, block: Block, seen: Seen) -> None:
        """Rewrite the wave's linears (`seen.stats` names them) or the block around them."""
        raise NotImplementedError(f"{self.kind} does nothing to a block")


class LinearMethod(Method):
    """Each linear on its own: `quantize` one, the base class does the block.

    Most have a `format`; where grid and algorithm are one thing, the knobs are the method's own.
    """

    def apply(self, block: Block, seen: Seen) -> None:
        for done, (name, stats) in enumerate(seen.stats.items()):
            linear = block.linears()[name]
            if not isinstance(linear, nn.Linear):
                raise ValueError(
                    f"{self.kind}: {name} of block {block.index} is already quantized by an "
                    "earlier step; keep one weight step and put activations after it"
                )
            block.replace(name, self.quantize(linear, stats))
            seen.progress((done + 1) / len(seen.stats))

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> nn.Module:
        """One linear -> its replacement (QuantLinear or another LinearLike)."""
        raise NotImplementedError(f"{self.kind} does not quantize a linear")


def names_in(waves: Iterable[Iterable[str]]) -> list[str]:
    """All names of all waves in order."""
    return [name for wave in waves for name in wave]
