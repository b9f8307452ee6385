"""SmoothQuant: moves outliers from activations into weights, through the norm before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from backend.formats.int_group import IntGroup
from backend.methods import METHODS
from backend.methods.base import ELEMENTWISE, Method, Seen, Target, names_in
from backend.metrics.base import Measurement
from backend.model.stats import AbsMax, SpreadSample, Stat

if TYPE_CHECKING:
    from backend.model.families import Block, NormFeed

FLOOR = 1e-5  # of weight peaks and of scales, as in the released smooth_ln_fcs


@METHODS.register
class SmoothQuant(Method):
    """Shrink outlier activation channels and grow their weights to match; outputs stay the same.

    Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models", section 4: s = peak(X)^alpha / peak(W)^(1 - alpha) per input channel, divided
    out of the norm in front. Rounds nothing: put a weight step and activations after it. Channels
    never active in calibration keep s = 1, where the released code has s = 1e-5 and a norm weight
    100,000 times too large for fp16.
    """

    kind: ClassVar[str] = "smoothquant"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights"})
    needs: ClassVar = (AbsMax, SpreadSample)
    prefix: ClassVar[Literal["quantized", "original"]] = "original"
    exact: ClassVar[bool] = True
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="How much of the outliers moves to the weights: 0 evens out weights, 1 "
        "activations; 0.5 for OPT, 0.8-0.9 for Llama 2 and Mistral in the authors' repository.",
    )
    search: int = Field(
        0,
        ge=0,
        le=100,
        description="Try alpha = 0, 1/search, ... 1 on every norm and keep the one whose rounded "
        "output errs least; 20 is a good grid, 0 takes `alpha` as it is.",
    )
    search_bits: int = Field(
        8,
        ge=2,
        le=8,
        description="What the search rounds weights (per row) and inputs (per token) to, "
        "symmetric; set it to the bits of the steps that follow.",
    )
    power_of_two: bool = Field(
        False,
        description="Round the scales to powers of two: folding is then exact in 16 bits too.",
    )

    def waves(self, block: Block) -> list[list[str]]:
        """One wave: every linear that reads a norm."""
        return [names_in(feed.readers for feed in feeds_of(block))]

    def wanted(self) -> tuple[type[Stat], ...]:
        """Extremes, and a sample of the inputs to search on."""
        return self.needs if self.search else (AbsMax,)

    def work(self, n: int, k: int) -> float:
        """Per alpha tried, weights rounded and the sample multiplied by them."""
        tried = self.search + 1 if self.search else 0
        return (ELEMENTWISE + 2.0 * SpreadSample.limit) * n * k * tried

    def apply(self, block: Block, seen: Seen) -> None:
        for feed in feeds_of(block):
            readers = [plain_linear(block, name) for name in feed.readers]
            peak = torch.stack([seen.stats[name][AbsMax].peak for name in feed.readers]).amax(0)
            alpha = self.searched(block, feed, peak, seen) if self.search else self.alpha
            scale = self.scales(peak, readers, alpha)  # [K]
            fold(block.get(feed.norm), readers, scale, block.family.norm_offset)

    def searched(self, block: Block, feed: NormFeed, peak: Tensor, seen: Seen) -> float:
        """The alpha of one norm; reported with the curve of the search."""
        readers = [plain_linear(block, name) for name in feed.readers]
        x = seen.stats[feed.readers[0]][SpreadSample].rows  # [T, K]
        if not len(x):
            raise ValueError("smoothquant: the alpha search needs calibration inputs; none given")
        alphas = [i / self.search for i in range(self.search + 1)]
        losses = [self.loss(x, readers, self.scales(peak, readers, alpha)) for alpha in alphas]
        best = alphas[min(range(len(losses)), key=losses.__getitem__)]
        detail = {"losses": losses, "readers": list(feed.readers)}
        layer = (block.index, feed.norm)
        seen.measure(Measurement("alpha", best, "", "lower", len(x), layer=layer, detail=detail))
        return best

    def loss(self, x: Tensor, readers: list[nn.Linear], scale: Tensor) -> float:
        """Squared error of all readers' outputs, inputs x [T, K] / scale and weights rounded."""
        grid = IntGroup(bits=self.search_bits, symmetric=True)  # a scale per token and per row
        weights = [linear.weight.detach().float() for linear in readers]  # [N, K]
        x, scale = x.to(weights[0]), scale.to(weights[0])
        rounded = grid.fake(x / scale)
        errors = [rounded @ grid.fake(w * scale).T - x @ w.T for w in weights]  # [T, N]
        return sum(error.square().sum(dtype=torch.float64).item() for error in errors)

    def scales(self, peak: Tensor, readers: list[nn.Linear], alpha: float | None = None) -> Tensor:
        """peak [K] of the inputs, their readers -> s [K] fp32, to divide the inputs by."""
        alpha = self.alpha if alpha is None else alpha
        peaks = [linear.weight.detach().float().abs().amax(0) for linear in readers]
        largest = torch.stack(peaks).amax(0).clamp_min(FLOOR)  # [K]
        peak = peak.to(largest)
        scale = (peak**alpha / largest ** (1 - alpha)).clamp_min(FLOOR)
        if self.power_of_two:
            scale = scale.log2().round().exp2()
        return scale.masked_fill(peak == 0, 1)


def feeds_of(block: Block) -> tuple[NormFeed, ...]:
    """The norms of a block that can carry a scale, or ValueError with the family's reason."""
    if not block.family.norm_feeds:
        reason = block.family.why_no_feeds or "no norm feeds its linears alone"
        raise ValueError(f"smoothquant: block {block.index} cannot be smoothed: {reason}")
    return block.family.norm_feeds


def plain_linear(block: Block, name: str) -> nn.Linear:
    """The named linear, which must not be quantized yet."""
    linear = block.get(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"smoothquant: {name} of block {block.index} is already quantized; put smoothquant "
            "before the weight step"
        )
    return linear


def fold(norm: nn.Module, readers: list[nn.Linear], scale: Tensor, offset: float) -> None:
    """Divide what `norm` gives by scale [K] and multiply its readers' columns by it, in place.

    The norm multiplies by offset + weight. Products are taken in fp64 and rounded once.
    """
    s = scale.double()
    with torch.no_grad():
        gain = norm.get_parameter("weight")
        gain.copy_((gain.double() + offset) / s - offset)
        if getattr(norm, "bias", None) is not None:
            bias = norm.get_parameter("bias")
            bias.copy_(bias.double() / s)
        for linear in readers:
            linear.weight.copy_(linear.weight.double() * s)


RECIPES = {
    "SmoothQuant W8A8": "smoothquant+rtn(bits=8,symmetric=true,scale_dtype=float16)"
    "+activations(bits=8,symmetric=true)",
    **{
        f"SmoothQuant W8A8, alpha 0.{alpha}": f"smoothquant(alpha=0.{alpha})"
        "+rtn(bits=8,symmetric=true,scale_dtype=float16)+activations(bits=8,symmetric=true)"
        for alpha in range(35, 95, 5)
        if alpha != 50  # the default
    },
    "SmoothQuant W8A8 (O1)": "smoothquant+rtn(bits=8,symmetric=true,per_tensor=true)"
    "+activations(bits=8,symmetric=true)",
    "SmoothQuant W8A8 (O2)": "smoothquant+rtn(bits=8,symmetric=true,per_tensor=true)"
    "+activations(bits=8,symmetric=true,per_tensor=true)",
    "SmoothQuant W8A8 (O3)": "smoothquant+rtn(bits=8,symmetric=true,per_tensor=true)"
    "+activations(bits=8,symmetric=true,per_tensor=true,static=true)",
    "SmoothQuant W6A6": "smoothquant+rtn(bits=6,symmetric=true,scale_dtype=float16)"
    "+activations(bits=6,symmetric=true)",
    "SmoothQuant W8A8, alpha searched": "smoothquant(search=20)"
    "+rtn(bits=8,symmetric=true,scale_dtype=float16)+activations(bits=8,symmetric=true)",
    "SmoothQuant W6A6, alpha searched": "smoothquant(search=20,search_bits=6)"
    "+rtn(bits=6,symmetric=true,scale_dtype=float16)+activations(bits=6,symmetric=true)",
    "SmoothQuant GPTQ W4A8": "smoothquant+gptq(bits=4,group=128,scale_dtype=float16,"
    "act_order=true,static_groups=true,live_damping=true)+activations(bits=8,symmetric=true)",
}
