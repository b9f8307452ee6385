"""Method: one step of a pipeline. LinearMethod: the common case, each linear on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from backend.formats import FORMATS, Format
from backend.layer_rules import On, Rules
from backend.metrics.base import Measurement
from backend.model.quant_linear import QuantLinear
from backend.model.stats import Hessian, LayerStats, Stat
from backend.registry import Part, made, nearest

if TYPE_CHECKING:
    from transformers.cache_utils import CacheLayerMixin

    from backend.model.families import Block

Target = Literal["weights", "activations", "kv_cache"]
ELEMENTWISE = 800.0  # operations of a product in the time that rounding one weight takes
SAMPLE_ROWS = 16  # SpQR's second level shares a range over so many
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
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)  # where `before` may put the whole model
        self.stats = stats  # linear name -> its statistics
        self.steps: Mapping[str, Method] | None = None  # under layer rules, of every linear
        self._inputs = inputs
        self._note = note
        self._progress = progress
        self._measure = measure
        self._should_stop = should_stop
        self.seed = seed  # of this (run, block, step)

    def step_of(self, linear: str, other: Method) -> Method | None:
        """The step that a linear of the block gets under its layer rules; None: it is kept.

        `other` where there are no rules.
        """
        return other if self.steps is None else self.steps.get(linear)

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
    in_blocks: ClassVar[bool] = True  # False: leaves blocks alone, acts in the cache only
    fits: ClassVar[bool] = (
        False  # True: `before` looks at calibration tokens and keeps what it fits
    )
    by_module: ClassVar[bool] = False  # True: `apply` treats each linear of a wave on its own
    of_block: ClassVar[frozenset[str]] = frozenset()  # knobs that no rule for modules can change
    layers: Rules = Field(
        (),
        description="Rules for some blocks or linears; of those that match, the first decides: "
        'on(modules=attn,bits=8), on(blocks="first,last",keep=true).',
    )

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As every part; without rules a step is written as if there were none to give."""
        data = {"kind": self.kind, **handler(self)}
        return data if self.layers else {k: v for k, v in data.items() if k != "layers"}

    @model_validator(mode="after")
    def _rules_fit(self) -> Self:
        for rule in self.layers:
            try:
                self.check_rule(rule)
                self.under(rule)
            except ValueError as error:
                reason = str(error).removeprefix(f"{self.kind}: ")
                raise ValueError(f"{self.kind}: {rule}: {reason}") from None
        return self

    def check_rule(self, rule: On) -> None:
        """ValueError if this step cannot tell linears apart as the rule asks."""
        if not rule.modules:
            return
        if not self.by_module:
            raise ValueError(f"{self.kind} works on a block as a whole; leave out modules")
        if fixed := [name for name in rule.knobs if name in self.of_block]:
            raise ValueError(f"{fixed[0]} holds for a block as a whole; leave out modules")

    def under(self, rule: On) -> Method | None:
        """The step where this rule decides; None where it keeps what is there."""
        if rule.keep:
            return None
        data = {k: v for k, v in self.data().items() if k != "layers"}
        knobs = beside_format(type(self), rule.knobs, data.get("format"), On.model_fields)
        return made(type(self), data | knobs)

    def plain(self) -> Method:
        """The step where no rule decides."""
        return self.model_copy(update={"layers": ()}) if self.layers else self

    def variants(self) -> tuple[Method, ...]:
        """The step in all the ways it acts: plain, then under each rule that does not keep."""
        ruled = (self.under(rule) for rule in self.layers)
        return (self.plain(), *(step for step in ruled if step is not None))

    def on_linear(self, block: Block, blocks: int, linear: str) -> Method | None:
        """The step as a linear of one of `blocks` blocks gets it; None: it is kept."""
        for rule in self.layers:
            if rule.matches(block, blocks, linear):
                return self.under(rule)
        return self.plain()

    def on_block(self, block: Block, blocks: int) -> Method | None:
        """The step as norms and the block itself get it: rules for modules leave them alone."""
        for rule in self.layers:
            if not rule.modules and rule.covers(block.index, blocks):
                return self.under(rule)
        return self.plain()

    def waves(self, block: Block) -> list[list[str]]:
        """Names of linears, wave by wave; later waves see the earlier ones already rewritten."""
        return [list(block.linears())]

    def code_bits(self, target: Target) -> float | None:
        """Bits of one code of a target where no `format` and no `bits` says; 16: left alone."""
        return self.fixed_bits

    def rounded_targets(self) -> frozenset[Target]:
        """The targets that these knobs, or those of a layer rule, do not leave in 16 bits."""
        return frozenset(t for s in self.variants() for t in s.targets if s.code_bits(t) != 16)

    def wanted(self) -> tuple[type[Stat], ...]:
        """The statistics these knobs need; all of `needs` unless a method narrows it."""
        return self.needs

    def gathered(self) -> tuple[type[Stat], ...]:
        """The statistics needed anywhere, under whatever rule."""
        return tuple(dict.fromkeys(stat for step in self.variants() for stat in step.wanted()))

    def passes(self, samples: int, length: int) -> float:
        """Forward passes over all calibration sequences that `apply` takes, for estimates."""
        return 0.0

    def work(self, n: int, k: int) -> float:
        """Operations on the weights [N, K] of one linear, counted as those of large products.

        For estimates. Solving with a Hessian updates what is left after every few columns.
        """
        if "weights" not in self.targets:
            return 0.0
        return ELEMENTWISE * n * k + (4.0 * n * k * k if Hessian in self.wanted() else 0.0)

    def sweeps(self) -> float:
        """How often the columns of a linear are worked on one by one, for estimates."""
        return 1.0 if Hessian in self.wanted() else 0.0

    def stored_bits(self, n: int, k: int, attention: bool) -> float:
        """Bits on disk of one weight of a linear [N, K], all told. For estimates."""
        grid: Format | None = getattr(self, "format", None)
        if grid is None:
            return self.code_bits("weights") or 16.0
        fitting = grid.suited(k)
        return 16.0 if fitting is None else grid_bits(fitting, k)

    def before(self, model: nn.Module, ids: Tensor, seen: Seen) -> None:
        """Once for the whole model before the walk; ids [n, T]."""

    def apply(self, block: Block, seen: Seen) -> None:
        """Rewrite the wave's linears (`seen.stats` names them) or the block around them."""
        raise NotImplementedError(f"{self.kind} does nothing to a block")

    def check_cache(self, model: nn.Module) -> None:
        """ValueError if the model's keys and values cannot be rounded this way."""

    def cache_layer(
        self, index: int, fit: Mapping[str, Tensor] | None = None, *, packed: bool = False
    ) -> CacheLayerMixin | None:
        """A new, empty cache layer for block `index`; None: transformers' own, in 16 bits.

        `fit`: what the step kept for this block when it was calibrated (Block.keep_fit).
        """
        return None


@lru_cache(maxsize=256)
def grid_bits(grid: Format, k: int) -> float:
    """Bits per weight that a grid takes on rows of k weights: those of a few random ones."""
    rows = torch.randn(SAMPLE_ROWS, k, generator=torch.Generator().manual_seed(0))
    return sum(grid.quantize(rows).bits().values())


class LinearMethod(Method):
    """Each linear on its own: `quantize` one, the base class does the block.

    Most have a `format`; where grid and algorithm are one thing, the knobs are the method's own.
    """

    by_module: ClassVar[bool] = True

    def apply(self, block: Block, seen: Seen) -> None:
        for done, (name, stats) in enumerate(seen.stats.items()):
            linear = block.linears()[name]
            if not isinstance(linear, nn.Linear):
                raise ValueError(
                    f"{self.kind}: {name} of block {block.index} is already quantized by an "
                    "earlier step; keep one weight step and put activations after it"
                )
            step = self.fitting(linear, stats)
            if step is None:
                block.replace(name, QuantLinear.from_linear(linear))
            else:
                block.replace(name, step.quantize(linear, stats))
            seen.progress((done + 1) / len(seen.stats))

    def fitting(self, linear: nn.Linear, stats: LayerStats) -> Self | None:
        """This step on the format that rows of this width can have; None: 16 bits."""
        if "format" not in type(self).model_fields:
            return self
        own: Format = self.format  # type: ignore[attr-defined]
        grid = suited(own, linear, stats)
        if grid is None or grid is own:
            return None if grid is None else self
        return self.model_copy(update={"format": grid})

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> nn.Module:
        """One linear -> its replacement (QuantLinear or another LinearLike)."""
        raise NotImplementedError(f"{self.kind} does not quantize a linear")


def suited(grid: Format, linear: nn.Linear, stats: LayerStats) -> Format | None:
    """What `grid` becomes on the rows of a linear, with a note if that is another one.

    None: nothing like it fits.
    """
    found = grid.suited(linear.in_features)
    if found != grid:
        instead = "16 bits" if found is None else named(found)
        stats.note(
            f"{named(grid)}: blocks of {grid.group} do not divide {linear.in_features} input "
            f"channels; {instead} instead"
        )
    return found


def named(grid: Format) -> str:
    """`gguf(type=Q4_K)`: a format by its kind and knobs."""
    knobs = ",".join(f"{name}={getattr(grid, name)}" for name in type(grid).model_fields)
    return f"{grid.kind}({knobs})"


def beside_format(
    cls: type[Method],
    knobs: Mapping[str, Any],
    grid: str | Mapping[str, Any] | None,
    others: Iterable[str] = (),
) -> dict[str, Any]:
    """Knobs of a step and of its format in one -> the step's own, and its format's JSON.

    `grid` is the format where the knobs name none; None for a step without a format. `others` are
    keys that may stand beside the knobs, for the hint on a misspelt one.
    """
    own = {name: value for name, value in knobs.items() if name != "format"}
    if "format" not in cls.model_fields:
        if unknown := [name for name in knobs if name not in cls.model_fields]:
            known = [*others, *cls.model_fields]
            raise ValueError(f"{cls.kind}: unknown knob {unknown[0]!r}{nearest(unknown[0], known)}")
        return own
    given = knobs.get("format", grid)
    inner = {"kind": given} if isinstance(given, str) else dict(given or {})
    fields = FORMATS.find(str(inner.get("kind"))).model_fields
    for name in [name for name in own if name not in cls.model_fields]:
        if name not in fields:
            known = [*others, *fields, *cls.model_fields]
            raise ValueError(f"{cls.kind}: unknown knob {name!r}{nearest(name, known)}")
        inner[name] = own.pop(name)
    return own | {"format": inner}


def names_in(waves: Iterable[Iterable[str]]) -> list[str]:
    """All names of all waves in order."""
    return [name for wave in waves for name in wave]
