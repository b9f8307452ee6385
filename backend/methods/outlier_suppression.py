"""Outlier Suppression: norms give up their weights, fixed input ranges clip a few tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional

from backend.formats import FormatField
from backend.formats.base import Params
from backend.formats.int_group import IntGroup
from backend.methods import METHODS
from backend.methods.activations import like_per_token
from backend.methods.base import BlockInput, LinearMethod, Seen, Target
from backend.methods.smoothquant import fold
from backend.methods.zeroquant import Rounding
from backend.metrics.base import Measurement
from backend.model.quant_linear import QuantLinear
from backend.model.stats import AbsMax, LayerStats, Stat

if TYPE_CHECKING:
    from backend.model.families import Block

FLOOR = 1e-4  # of |gamma|: a LayerNorm's bias is divided by it
FEWEST_TOKENS = 100  # quantiles over fewer jump from token to token
DEPTH = ((8, 0.1), (6, 0.3), (0, 0.9))  # from so many bits on, shares of tokens tried down to 1 - d

Range = tuple[Tensor, Tensor]  # smallest and largest input kept, fp32 scalars


class TokenRange(Stat):
    """Smallest and largest entry of every token: `batches` of (low, high) [B, T] each."""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        super().__init__(k, device)
        self.batches: list[tuple[Tensor, Tensor]] = []

    def update(self, x: Tensor) -> None:
        x = x.view(1, *x.shape) if x.dim() == 2 else x
        self.batches.append((x.amin(-1).float(), x.amax(-1).float()))

    @property
    def fewest(self) -> int:
        """Tokens of the smallest batch."""
        return min((low.numel() for low, _ in self.batches), default=0)

    def clipped(self, share: float, keep_first: bool) -> Range:
        """Ends of the range that keeps whole the `share` of tokens with the smallest peaks.

        Per batch the largest of the token maxima that are at most the `share`-quantile of their
        magnitudes, and likewise below; then the mean over batches.
        """
        if not self.batches:
            raise ValueError("outlier_suppression: ranges need calibration inputs; none given")
        highs = [within(high, share, keep_first) for _, high in self.batches]
        lows = [-within(-low, share, keep_first) for low, _ in self.batches]
        return torch.stack(lows).mean(), torch.stack(highs).mean()


def within(peaks: Tensor, share: float, keep_first: bool) -> Tensor:
    """peaks [B, T] -> the largest that is at most the `share`-quantile of the magnitudes.

    With keep_first the first token of each sequence is left out of the quantile and covered whole.
    """
    rest = peaks[:, 1:] if keep_first and peaks.shape[1] > 1 else peaks
    # Between two tokens' peaks a quantile keeps the lower one, so none need be interpolated.
    at = math.floor(share * (rest.numel() - 1) + 1e-9)
    end = rest.abs().flatten().sort().values[at]
    largest = rest[rest <= end].max()
    return torch.maximum(largest, peaks[:, 0].max()) if keep_first else largest


@METHODS.register
class OutlierSuppression(LinearMethod):
    """Move norm weights into the linears behind them and clip inputs at the peaks of most tokens.

    Wei et al. 2022, "Outlier Suppression: Pushing the Limit of Low-bit Transformer Language
    Models", sections 4.1 (gamma migration) and 4.2 (token-wise clipping), for decoders whose
    norms feed linears alone: migration is then a fold. Weights are rounded to the nearest level,
    inputs to asymmetric integers with one fixed scale per linear. Where we differ from the
    released code: the share of tokens is searched block by block on the block's output, not once
    on the model's; it may leave the first token whole, which causal models use as a sink; the fine
    stage moves both ends of a range by shares of it, and its best epoch is kept.
    """

    kind: ClassVar[str] = "outlier_suppression"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights", "activations"})
    needs: ClassVar = (TokenRange,)
    by_module: ClassVar[bool] = False
    format: Annotated[FormatField, AfterValidator(like_per_token)] = Field(
        IntGroup(bits=8, symmetric=True),
        description="The grid of the weights; `int` is 8 bits and symmetric here unless told "
        "otherwise.",
    )
    bits_a: int = Field(8, ge=2, le=8, description="Bits of inputs, one fixed scale per linear.")
    migrate: bool = Field(
        True, description="Move each norm's weight into the linears that read the norm."
    )
    clip: bool = Field(
        True,
        description="Search the share of tokens that ranges keep whole (coarse stage); off: ranges "
        "cover them all, averaged over batches.",
    )
    clip_step: float = Field(
        0.01,
        ge=0.001,
        le=0.1,
        description="Step of the search, from 1 down to 0.9 (0.7 or 0.1 "
        "where inputs have under 8 or under 6 bits).",
    )
    keep_first: bool = Field(
        True, description="Never clip the first token of a sequence, the attention sink."
    )
    fine_epochs: int = Field(
        3, ge=0, le=20, description="Passes that train the ranges' ends (fine stage); 0: none."
    )
    fine_rate: float = Field(
        1e-3, gt=0, le=0.1, description="Share of an end that one training step moves it, at first."
    )
    search_tokens: int = Field(
        32768, ge=64, le=1 << 22, description="Most calibration tokens both stages look at."
    )

    def waves(self, block: Block) -> list[list[str]]:
        """First none: the norms give up their weights; then all linears, on what they read now."""
        return [[], list(block.linears())]

    def code_bits(self, target: Target) -> float | None:
        """Bits of an input; the format says those of a weight."""
        return self.bits_a if target == "activations" else None

    def passes(self, samples: int, length: int) -> float:
        """One per share of tokens tried; per epoch three to train and one to look at the loss."""
        searched = (len(self.shares()) if self.clip else 0) + 4 * self.fine_epochs
        return searched * min(1.0, self.search_tokens / (samples * length))

    def apply(self, block: Block, seen: Seen) -> None:
        if not seen.stats:
            if self.migrate:
                migrate(block)
            return
        linears = {name: plain_linear(block, name) for name in seen.stats}
        sample = self.sample(block, seen)
        for name, linear in linears.items():
            weight = self.format.quantize(linear.weight.detach().float())
            grid = self.input_grid()
            kept: dict[str, Any] = {"act": grid, "act_params": {}, "dtype": linear.weight.dtype}
            block.replace(name, QuantLinear(weight, linear.bias, **kept))
        rounded = Rounded(block, list(linears), self.input_grid(), sample)
        self.choose(rounded, seen)

    def input_grid(self) -> IntGroup:
        """The grid of inputs."""
        return IntGroup(bits=self.bits_a, symmetric=False)

    def sample(self, block: Block, seen: Seen) -> list[tuple[BlockInput, Tensor]]:
        """Inputs of the block and what it gives for them, fp32, on up to search_tokens tokens."""
        found: list[tuple[BlockInput, Tensor]] = []
        tokens = 0
        for hidden, arguments in seen.inputs() if self.clip or self.fine_epochs else ():
            size = hidden.shape[0] * hidden.shape[1]
            if found and tokens + size > self.search_tokens:
                break
            found.append(((hidden, arguments), output(block, hidden, arguments)))
            tokens += size
        return found

    def choose(self, rounded: Rounded, seen: Seen) -> None:
        """Both stages; the block ends with the ranges of the least loss."""
        stats = {name: seen.stats[name][TokenRange] for name in rounded.names}
        if min(s.fewest for s in stats.values()) < FEWEST_TOKENS:
            seen.note(f"ranges chosen on fewer than {FEWEST_TOKENS} tokens per batch")
        ranges = self.ranges(stats, 1.0)
        rounded.use(ranges)
        if not rounded.sample:
            if self.clip:
                seen.note("no block inputs to search with; ranges cover all tokens")
            return
        if self.clip:
            ranges = self.search(rounded, stats, seen)
        if self.fine_epochs:
            self.refine(rounded, ranges, seen)

    def ranges(self, stats: Mapping[str, TokenRange], share: float) -> dict[str, Range]:
        """The range of every linear's inputs at one share of tokens."""
        return {name: s.clipped(share, self.keep_first) for name, s in stats.items()}

    def shares(self) -> list[float]:
        """Shares of tokens tried, 1 first."""
        depth = next(depth for bits, depth in DEPTH if self.bits_a >= bits)
        return [1 - i * self.clip_step for i in range(math.ceil(depth / self.clip_step - 1e-9))]

    def search(
        self, rounded: Rounded, stats: Mapping[str, TokenRange], seen: Seen
    ) -> dict[str, Range]:
        """Coarse stage: the share of tokens that changes the block's output least."""
        losses: list[float] = []
        shares = self.shares()
        for done, share in enumerate(shares):
            rounded.use(self.ranges(stats, share))
            losses.append(rounded.loss())
            seen.progress((done + 1) / len(shares) / 2)
        at = min(range(len(losses)), key=losses.__getitem__)
        best = self.ranges(stats, shares[at])
        rounded.use(best)
        detail = {"shares": shares, "losses": losses}
        layer = (rounded.block.index, "")
        seen.measure(
            Measurement("clip_share", shares[at], "", "higher", layer=layer, detail=detail)
        )
        report("clip_gain", losses[at], losses[0], rounded, seen)
        return best

    def refine(self, rounded: Rounded, ranges: dict[str, Range], seen: Seen) -> None:
        """Fine stage: train both ends of every range; the best epoch, or the start, is kept."""
        first = least = rounded.loss()
        best = ranges
        learned = {name: LearnedRange(rounded.linear(name), ranges[name]) for name in ranges}
        factors = [module.factors for module in learned.values()]
        optimizer = torch.optim.Adam(factors, lr=self.fine_rate)
        steps, done = self.fine_epochs * len(rounded.sample), 0
        for epoch in range(self.fine_epochs):
            with rounded.standing_in(learned):
                for call, exact in rounded.sample:
                    share = (1 + math.cos(math.pi * done / steps)) / 2
                    optimizer.param_groups[0]["lr"] = self.fine_rate * share
                    with torch.enable_grad():
                        (output(rounded.block, *call) - exact).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    done += 1
            found = {name: module.ends() for name, module in learned.items()}
            rounded.use(found)
            loss = rounded.loss()
            if loss < least:
                best, least = found, loss
            seen.progress((1 + (epoch + 1) / self.fine_epochs) / 2)
        rounded.use(best)
        report("fine_gain", least, first, rounded, seen)


def migrate(block: Block) -> None:
    """Every norm that feeds linears alone gives its weight to them: its own becomes 1."""
    family = block.family
    if not family.norm_feeds and family.why_no_feeds:
        raise ValueError(
            f"outlier_suppression: the norms of block {block.index} cannot give up their weights: "
            f"{family.why_no_feeds}; set migrate=false"
        )
    for feed in family.norm_feeds:
        readers = [plain_linear(block, name) for name in feed.readers]
        norm = block.get(feed.norm)
        fold(norm, readers, gamma(norm, family.norm_offset), family.norm_offset)


def gamma(norm: nn.Module, offset: float) -> Tensor:
    """What a norm multiplies by [K], fp64, its sign kept and its magnitude at least FLOOR."""
    g = norm.get_parameter("weight").double() + offset
    return torch.where(g.abs() < FLOOR, torch.where(g < 0, -FLOOR, FLOOR), g)


def plain_linear(block: Block, name: str) -> nn.Linear:
    """The named linear, which must not be quantized yet."""
    linear = block.get(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"outlier_suppression: {name} of block {block.index} is already quantized by an "
            "earlier step; keep one weight step"
        )
    return linear


def output(block: Block, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """What a block gives [B, T, D], fp32."""
    out = block.module(hidden, **arguments)
    return (out[0] if isinstance(out, tuple) else out).float()


def report(name: str, loss: float, start: float, rounded: Rounded, seen: Seen) -> None:
    """What a stage left of the loss it began with."""
    gain = loss / start if start else 1.0
    layer = (rounded.block.index, "")
    detail = {"loss": loss, "start": start}
    seen.measure(Measurement(name, gain, "x", "lower", layer=layer, detail=detail))


@dataclass(frozen=True)
class Rounded:
    """A block with rounded weights, the ranges of whose inputs are being chosen."""

    block: Block
    names: Sequence[str]
    grid: IntGroup
    sample: Sequence[tuple[BlockInput, Tensor]]  # inputs and the original block's outputs

    def linear(self, name: str) -> QuantLinear:
        """One of its linears."""
        linear = self.block.get(name)
        assert isinstance(linear, QuantLinear)
        return linear

    def use(self, ranges: Mapping[str, Range]) -> None:
        """Round inputs to these ranges from now on."""
        for name, ends in ranges.items():
            self.linear(name).act_params = params_of(self.grid, ends)

    def loss(self) -> float:
        """Mean squared difference of its outputs from the original block's."""
        errors = [
            (output(self.block, *call) - exact).square().mean() for call, exact in self.sample
        ]
        return torch.stack(errors).mean().item()

    @contextmanager
    def standing_in(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """The block with other modules in place of its linears, for a while."""
        kept = {name: self.linear(name) for name in modules}
        try:
            for name, module in modules.items():
                self.block.replace(name, module)
            yield
        finally:
            for name, linear in kept.items():
                self.block.replace(name, linear)


def params_of(grid: IntGroup, ends: Range) -> Params:
    """Static parameters of a grid for inputs between two ends."""
    extremes = AbsMax(1, ends[0].device)
    extremes.low, extremes.high = ends[0].view(1), ends[1].view(1)
    return grid.calibrate(LayerStats({AbsMax: extremes}))


class LearnedRange(nn.Module):
    """A linear whose inputs are rounded between two ends that are trained (LSQ+).

    Both ends are `factors` [2] times what they began as; gradients pass straight through the
    rounding, so that an end feels what it clips and the steps it sets.
    """

    def __init__(self, linear: QuantLinear, ends: Range) -> None:
        super().__init__()
        assert isinstance(linear.act, IntGroup)
        self.linear, self.top = linear, linear.act.top
        self.start = torch.stack([ends[0].clamp_max(0), ends[1].clamp_min(0)])  # [2], 0 inside
        self.factors = nn.Parameter(torch.ones_like(self.start))

    def ends(self) -> Range:
        """The range as it is now; a factor never turns an end's sign."""
        low, high = (self.factors.detach().clamp_min(0) * self.start).unbind()
        return low, high

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        low, high = (self.factors.clamp_min(0) * self.start).unbind()
        scale = ((high - low) / self.top).clamp_min(torch.finfo(torch.float32).tiny)
        zero = Rounding.apply(-low / scale, torch.round)
        codes = (Rounding.apply(x.float() / scale, torch.round) + zero).clamp(0, self.top)
        y = ((codes - zero) * scale).to(x.dtype)
        return functional.linear(y, self.linear.weight, self.linear.bias)


WEIGHTS = "outlier_suppression(bits={0},symmetric=true,scale_dtype=float16,bits_a={0}{1})"
RECIPES = {
    "Outlier Suppression W8A8": WEIGHTS.format(8, ""),
    "Outlier Suppression W6A6": WEIGHTS.format(6, ""),
    "Outlier Suppression W4A4": WEIGHTS.format(4, ""),
    "Outlier Suppression W6A6 migration only": WEIGHTS.format(6, ",clip=false,fine_epochs=0"),
}
