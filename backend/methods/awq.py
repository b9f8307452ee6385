"""AWQ: scales up the weights that large activations read, then rounds with searched clipping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from backend.formats import Format, FormatField
from backend.formats.int_group import IntGroup
from backend.methods import METHODS
from backend.methods.base import ELEMENTWISE, LinearMethod, Seen, Target
from backend.methods.smoothquant import fold
from backend.metrics.base import Measurement
from backend.model.quant_linear import QuantLinear
from backend.model.stats import LayerStats, SpreadSample

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from backend.model.families import Block, LinearFeed, NormFeed

FLOOR = 1e-4  # of a scale before normalising, as in the released auto_scale.py
FEWEST_TOKENS = 16  # a clip range chosen on fewer says more about them than about the weights
# Their outputs meet in attention logits, which clipping would hurt: the released code skips them.
LOGITS = ("q_proj", "k_proj", "qkv_proj", "query_key_value")


@METHODS.register
class AWQ(LinearMethod):
    """Enlarge the weights behind large activations before rounding, then clip ranges by search.

    Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
    Acceleration", section 3.2: s = mean|x|^r per input channel, r searched, divided out of
    whatever produces x; then the clip search of the released auto_clip.py. Where that code differs
    from ours: its quantizer's range need not hold 0, which destroys one-sided groups; it skips
    value and output projections of different widths; it looks at every (T // 512)-th token.
    """

    kind: ClassVar[str] = "awq"
    version: ClassVar[int] = 2  # 1 searched on four times as many tokens
    targets: ClassVar[frozenset[Target]] = frozenset({"weights"})
    needs: ClassVar = (SpreadSample,)
    prefix: ClassVar[Literal["quantized", "original"]] = "original"
    of_block: ClassVar[frozenset[str]] = frozenset({"ratios", "shared_heads", "search_tokens"})
    format: FormatField = Field(
        IntGroup(group=128), description="The grid that weights are rounded to."
    )
    ratios: int = Field(
        20,
        ge=1,
        le=100,
        description="Exponents r tried: 0, 1/ratios, ... below 1; 1 scales nothing.",
    )
    shared_heads: bool = Field(
        True,
        description="With grouped-query attention, one scale for all query heads that read a value "
        "channel; off: leave the output projection unscaled there, as the released code does.",
    )
    search_tokens: int = Field(
        16384,
        ge=64,
        le=1 << 22,
        description="Most calibration tokens the scale search looks at; its time grows with them.",
    )
    clip: bool = Field(
        True, description="Search the clip range of every group; query and key weights stay whole."
    )
    clip_steps: int = Field(
        20, ge=2, le=100, description="Steps from the group's peak to 0 in the clip search."
    )
    clip_shrink: float = Field(
        0.5, gt=0, le=1, description="Share of those steps tried: 0.5 clips to 55 % at most."
    )

    def waves(self, block: Block) -> list[list[str]]:
        """First none: the block is scaled; then all linears, on inputs that carry the scales."""
        return [[], list(block.linears())]

    def passes(self, samples: int, length: int) -> float:
        """One per place to look, then attention and MLP once per ratio, on the search's tokens."""
        return (4 + self.ratios) * min(1.0, self.search_tokens / (samples * length))

    def work(self, n: int, k: int) -> float:
        """Rounding anew for every ratio and every clip step."""
        clipped = self.clip_shrink * self.clip_steps if self.clip else 0
        return ELEMENTWISE * n * k * (1 + self.ratios + clipped)

    def apply(self, block: Block, seen: Seen) -> None:
        if not seen.stats:
            self.scale_block(block, seen)
            return
        for done, (name, stats) in enumerate(seen.stats.items()):
            linear = plain_linear(block, name)
            step = self.fitting(linear, stats)
            if step is None:
                block.replace(name, QuantLinear.from_linear(linear))
            else:
                whole = name.rpartition(".")[2] in LOGITS
                limit = None if whole else step.limits(linear, stats)
                report_clipped(block, name, limit, seen)
                block.replace(name, step.rounded(linear, limit))
            seen.progress((done + 1) / len(seen.stats))

    def rounded(self, linear: nn.Linear, limit: Tensor | None = None) -> QuantLinear:
        """The linear on the grid, its weights clamped to +-limit [N, K] first."""
        w = linear.weight.detach().float()
        w = w if limit is None else w.clamp(-limit, limit)
        return QuantLinear(self.format.quantize(w), linear.bias, dtype=linear.weight.dtype)

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> QuantLinear:
        """Clip, then round: without a block around it a linear has nothing to carry a scale."""
        return self.rounded(linear, self.limits(linear, stats))

    def limits(self, linear: nn.Linear, stats: LayerStats) -> Tensor | None:
        """The largest magnitude that each weight may keep [N, K]; None: nothing is clipped."""
        if not self.clip:
            return None
        x = stats[SpreadSample].rows  # [T, K]
        if len(x) < FEWEST_TOKENS:
            raise ValueError(
                f"{self.kind}: the clip search needs at least {FEWEST_TOKENS} calibration tokens, "
                f"got {len(x)}; show it more or set clip=false"
            )
        if len(x) < SpreadSample.limit:
            stats.note(f"clip ranges chosen on {len(x)} tokens, fewer than {SpreadSample.limit}")
        limit = clip_limits(
            linear.weight.detach().float(),
            x.to(linear.weight.device),
            self.format,
            steps=self.clip_steps,
            tried=max(1, int(self.clip_shrink * self.clip_steps)),
        )
        return spread(limit, self.format, linear.in_features)

    def scale_block(self, block: Block, seen: Seen) -> None:
        """Search every scale on the original weights, then fold them all."""
        for name in block.linears():
            plain_linear(block, name)
        places = self.places(block, seen)
        scales = []
        for done, place in enumerate(places):
            scales.append(self.search(block, place, seen))
            seen.progress((done + 1) / len(places))
        for place, scale in zip(places, scales, strict=True):
            place.fold(block, scale)

    def places(self, block: Block, seen: Seen) -> list[Place]:
        """Where this block can carry a scale, in the order it computes them; a note where not."""
        found: list[Place] = [Place.of_norm(feed) for feed in block.family.norm_feeds]
        for feed in block.family.linear_feeds:
            place = Place.of_linear(block, feed)
            if place.copies == 1 or self.shared_heads:
                found.append(place)
        scaled = {name for place in found for name in place.readers}
        for name in block.linears():
            if name not in scaled:
                seen.note("nothing in front of it can carry a scale; rounded without one", name)
        order = [name for wave in block.family.waves for name in wave]
        return sorted(found, key=lambda place: order.index(place.readers[0]))

    def search(self, block: Block, place: Place, seen: Seen) -> Tensor:
        """The scale s [C] of one place that changes its inspected module's output least."""
        sight = look(block, place, seen, self.search_tokens)
        if not sight.tokens:
            raise ValueError(f"{self.kind}: the scale search needs calibration inputs; none given")
        mean = place.shared(sight.mean())  # [C]
        named = zip(place.readers, sight.readers, strict=True)
        grids = [self.grid_of(name, seen, linear.in_features) for name, linear in named]
        losses, best, least = [], torch.ones_like(mean), float("inf")
        for i in range(self.ratios):
            scale = scale_of(mean, i / self.ratios)
            loss = sight.loss(scaled(sight.readers, grids, place.repeated(scale)))
            losses.append(loss)
            if loss < least:
                best, least = scale, loss
        self.report(block, place, losses, seen)
        return best

    def grid_of(self, name: str, seen: Seen, k: int) -> Format | None:
        """The grid of a linear with k inputs under the layer rules; None: it is kept."""
        step = seen.step_of(name, self)
        return None if step is None else step.format.suited(k)  # type: ignore[attr-defined]

    def report(self, block: Block, place: Place, losses: list[float], seen: Seen) -> None:
        """The search's curve, and what it gained over plain rounding."""
        at = min(range(len(losses)), key=losses.__getitem__)
        gain = losses[at] / losses[0] if losses[0] else 1.0
        detail = {"losses": losses, "ratio": at / self.ratios, "readers": list(place.readers)}
        layer = (block.index, place.readers[0])
        seen.measure(Measurement("awq_loss", gain, "x", "lower", layer=layer, detail=detail))


@dataclass(frozen=True)
class Place:
    """A producer that can be divided by a scale and the linears that are multiplied by it."""

    source: str
    readers: tuple[str, ...]
    inspected: str  # the module whose output the search compares
    norm: bool
    copies: int = 1  # input channels of the reader per channel of the source
    head: int = 1  # neighbouring channels that are repeated together

    @classmethod
    def of_norm(cls, feed: NormFeed) -> Place:
        """Inspects what the readers stand in, attention or MLP; a lone fc1 itself."""
        parent = feed.readers[0].rpartition(".")[0]
        return cls(feed.norm, feed.readers, parent or feed.readers[0], norm=True)

    @classmethod
    def of_linear(cls, block: Block, feed: LinearFeed) -> Place:
        """Inspects the reader itself; its channels are copies with grouped-query attention."""
        rows = int(block.get(feed.source).out_features)  # type: ignore[arg-type]
        channels = int(block.get(feed.reader).in_features)  # type: ignore[arg-type]
        copies, head = max(1, channels // rows), 1
        if copies > 1:
            head = int(block.get(feed.source.rpartition(".")[0]).head_dim)  # type: ignore[arg-type]
        return cls(feed.source, (feed.reader,), feed.reader, False, copies, head)

    def shared(self, mean: Tensor) -> Tensor:
        """[K] per channel of the reader -> [K / copies] per channel of the source."""
        return mean.view(-1, self.copies, self.head).mean(1).flatten()

    def repeated(self, scale: Tensor) -> Tensor:
        """[K / copies] -> [K]: query heads are neighbours where they read one value head."""
        heads = scale.view(-1, 1, self.head)
        return heads.expand(-1, self.copies, -1).flatten()

    def fold(self, block: Block, scale: Tensor) -> None:
        """Divide the producer by scale [C] and multiply the readers' columns, in place."""
        readers = [plain_linear(block, name) for name in self.readers]
        if self.norm:
            fold(block.get(self.source), readers, scale, block.family.norm_offset)
            return
        source, s = plain_linear(block, self.source), scale.double()
        for value in (source.weight, source.bias):
            if value is not None:
                rows = value[-len(s) :]  # [C, K] or [C]
                rows.copy_(rows.double() / s.view(-1, *[1] * (rows.dim() - 1)))
        weight = readers[0].weight
        weight.copy_(weight.double() * self.repeated(s))


def plain_linear(block: Block, name: str) -> nn.Linear:
    """The named linear, which must not be quantized yet."""
    linear = block.get(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"awq: {name} of block {block.index} is already quantized by an earlier step; keep one "
            "weight step and put activations after it"
        )
    return linear


def report_clipped(block: Block, name: str, limit: Tensor | None, seen: Seen) -> None:
    """The share of a linear's weights that lie over their limit [N, K]."""
    if limit is None:
        return
    weight = plain_linear(block, name).weight
    share = (weight.float().abs() > limit).float().mean().item()
    n, layer = weight.numel(), (block.index, name)
    seen.measure(Measurement("clipped_weights", share, "fraction", "lower", n=n, layer=layer))


def scale_of(mean: Tensor, ratio: float) -> Tensor:
    """mean|x| [C] -> s = mean^ratio [C], its largest times its smallest being 1."""
    s = (mean**ratio).clamp_min(FLOOR)
    return s / (s.max() * s.min()).sqrt()


Call = tuple[tuple[Any, ...], Mapping[str, Any]]  # positional and keyword arguments of a module


class Sight:
    """What the search of one place sees: mean|x| of its readers, and the loss of other weights."""

    def __init__(self, block: Block, place: Place) -> None:
        self.readers = [plain_linear(block, name) for name in place.readers]
        self.tokens = 0
        self._sum = torch.zeros(())

    def watch(self) -> list[RemovableHandle]:
        """Hooks that see the block's next passes."""
        return [self.readers[0].register_forward_pre_hook(self._see)]

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = rows_of(args)
        self.tokens += len(rows)
        self._sum = self._sum + rows.abs().sum(0)

    def mean(self) -> Tensor:
        """mean|x| [K]."""
        return self._sum / self.tokens

    def loss(self, weights: Sequence[Tensor]) -> float:
        """Mean squared change of the inspected output, were the readers' weights these; fp32."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")


class LoneSight(Sight):
    """The reader itself is inspected. Its output being linear in its weights, |X E^T|^2 is
    trace(E X^T X E^T): the [K, K] matrix of all tokens stands for them in every loss.
    """

    def __init__(self, block: Block, place: Place) -> None:
        super().__init__(block, place)
        self._products = torch.zeros(())

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        super()._see(module, args)
        rows = rows_of(args)
        self._products = self._products + rows.T @ rows  # [K, K]

    def loss(self, weights: Sequence[Tensor]) -> float:
        (linear,), (w,) = self.readers, weights
        error = w.float() - linear.weight.float()  # [N, K]
        return ((error @ self._products * error).sum() / (self.tokens * len(error))).item()


class ModuleSight(Sight):
    """Attention or MLP is inspected: its calls are kept and made again with other weights."""

    def __init__(self, block: Block, place: Place) -> None:
        super().__init__(block, place)
        self.inspected = block.get(place.inspected)
        self._calls: list[tuple[Call, Tensor]] = []  # and the exact output

    def watch(self) -> list[RemovableHandle]:
        keep = self.inspected.register_forward_hook(self._keep, with_kwargs=True)
        return [*super().watch(), keep]

    def _keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        self._calls.append(((args, kwargs), first(out)))

    def loss(self, weights: Sequence[Tensor]) -> float:
        with standing_in(self.readers, weights):
            errors = [
                (first(self.inspected(*args, **kwargs)).float() - exact.float()).square().sum()
                for (args, kwargs), exact in self._calls
            ]
        total = sum(exact.numel() for _, exact in self._calls)
        return (torch.stack(errors).sum() / total).item()


def look(block: Block, place: Place, seen: Seen, most: int) -> Sight:
    """What a place's search sees on up to `most` tokens, in whole batches, at least one."""
    sight = (LoneSight if place.readers == (place.inspected,) else ModuleSight)(block, place)
    hooks = sight.watch()
    try:
        for hidden, arguments in seen.inputs():
            if sight.tokens and sight.tokens + hidden.shape[0] * hidden.shape[1] > most:
                break
            block.module(hidden, **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return sight


def rows_of(args: tuple[Any, ...]) -> Tensor:
    """What a linear is given [..., K] -> [tokens, K], fp32."""
    x: Tensor = args[0]
    return x.float().flatten(0, -2)


def first(out: Any) -> Tensor:
    """What a module gives; attention returns a tuple with it first."""
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


def scaled(
    readers: Sequence[nn.Linear], grids: Sequence[Format | None], scale: Tensor
) -> list[Tensor]:
    """Q(W s) / s of every reader on its grid, W where it has none; scale [K]."""
    return [
        w if grid is None else (grid.fake(w.float() * scale) / scale).to(w.dtype)
        for w, grid in zip((linear.weight.data for linear in readers), grids, strict=True)
    ]


@contextmanager
def standing_in(readers: Sequence[nn.Linear], weights: Sequence[Tensor]) -> Iterator[None]:
    """The readers with other weights."""
    kept = [linear.weight.data for linear in readers]
    try:
        for linear, w in zip(readers, weights, strict=True):
            linear.weight.data = w
        yield
    finally:
        for linear, w in zip(readers, kept, strict=True):
            linear.weight.data = w


def clip_limits(w: Tensor, x: Tensor, fmt: Format, *, steps: int, tried: int) -> Tensor:
    """w [N, K], x [T, K] -> the largest magnitude [N, G] each group keeps.

    Of (1 - i / steps) times the group's peak, i < tried, the one whose partial products
    x_group w_group^T, clamped and rounded, differ least from the exact ones in the mean square
    over tokens; the widest of equals. |x d^T|^2 is |R d^T|^2 with x = QR: R has g rows, not T.
    """
    groups = fmt.groups(w.shape[1])
    factors = [torch.linalg.qr(x[:, a:b], mode="r").R.T for a, b in groups]  # [g, min(T, g)]
    peak = torch.stack([w[:, a:b].abs().amax(1) for a, b in groups], 1)  # [N, G]
    best, least = peak, torch.full_like(peak, torch.inf)
    for i in range(tried):
        limit = peak * (1 - i / steps)
        bound = spread(limit, fmt, w.shape[1])
        error = fmt.fake(w.clamp(-bound, bound)) - w  # [N, K]
        parts = [
            (error[:, a:b] @ factor).square().sum(1)
            for (a, b), factor in zip(groups, factors, strict=True)
        ]
        loss = torch.stack(parts, 1)  # [N, G]
        best = torch.where(loss < least, limit, best)
        least = torch.minimum(loss, least)
    return best


def spread(limit: Tensor, fmt: Format, k: int) -> Tensor:
    """One number per group [N, G] -> one per column [N, K]."""
    widths = torch.tensor([stop - start for start, stop in fmt.groups(k)], device=limit.device)
    return limit.repeat_interleave(widths, 1)


RECIPES = {
    "AWQ W4": "awq(bits=4,group=0,scale_dtype=float16)",
    "AWQ W4 g128": "awq(bits=4,group=128,scale_dtype=float16)",
    "AWQ W4 g64": "awq(bits=4,group=64,scale_dtype=float16)",
    "AWQ W3 g128": "awq(bits=3,group=128,scale_dtype=float16)",
}
