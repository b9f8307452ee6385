"""HQQ: a search for the zero point of every group that fits the bulk of the weights, no data."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from backend.formats import QTensor
from backend.formats.affine import Affine
from backend.formats.base import GroupField
from backend.methods import METHODS
from backend.methods.base import LinearMethod, Target, grid_bits
from backend.model.quant_linear import QuantLinear
from backend.model.stats import LayerStats


@METHODS.register
class HQQ(LinearMethod):
    """Move each group's zero point until most weights fit, letting outliers err; looks at no data.

    Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": alternate
    between a sparse error (a shrinkage for the p-norm, p < 1) and the zero point in closed form.
    Groups are input channels of one row (`axis=1` of the released code). That code returns the zero
    point computed after the best step and sets scales of narrow groups to 1; ours keeps the best
    step and every scale.
    """

    kind: ClassVar[str] = "hqq"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights"})
    bits: int = Field(4, ge=1, le=8, description="Bits of one code.")
    group: GroupField = Field(
        64, description="Input channels that share scale and zero point; 0 is one pair per row."
    )
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", description="What scale and zero point are stored as."
    )
    iters: int = Field(20, ge=0, le=200, description="Most steps; 0 rounds on the range's ends.")
    p: float = Field(
        0.7, gt=0, le=1, description="Exponent of the error's norm; smaller minds outliers less."
    )
    beta: float = Field(
        10.0,
        gt=0,
        le=1e6,
        description="Errors above beta^(-1/(2-p)), in units of the weights, count as outliers: "
        "0.17 at first, which few weights' errors reach.",
    )
    kappa: float = Field(1.01, ge=1, le=10, description="Factor of beta from step to step.")
    round_zero: bool = Field(
        False,
        description="Start from whole zero points, as the released code does at 4 bits; weights "
        "near 0 then err less, which counts where they meet large activations.",
    )

    @property
    def grid(self) -> Affine:
        """The grid these knobs describe."""
        return Affine(bits=self.bits, group=self.group, scale_dtype=self.scale_dtype)

    def stored_bits(self, n: int, k: int, attention: bool) -> float:
        """Those of its grid."""
        return grid_bits(self.grid, k)

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> QuantLinear:
        w = linear.weight.detach().float()  # [N, K]
        grid, codes, fitted = self.grid, [], []
        for units in whole_and_rest(w, self.group):  # [N, G, g]
            p = grid.fit(units, {})
            p["zero"] = self.solve(units, p["scale"].float(), p["zero"])
            codes.append(grid.encode(units, p).flatten(1))
            fitted.append({name: value.squeeze(-1) for name, value in p.items()})
        q = QTensor(torch.cat(codes, 1), grid.stack(fitted), grid)
        return QuantLinear(q, linear.bias, dtype=linear.weight.dtype)

    def solve(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """w [N, G, g], scale and zero [N, G, 1] -> the zero, as stored, of least mean |error|."""
        grid, beta, least = self.grid, self.beta, torch.inf
        zero = zero.round() if self.round_zero else zero
        best = zero
        for _ in range(self.iters + 1):
            codes = (w / scale + zero.float()).round_().clamp_(0, grid.top)
            error = w - scale * (codes - zero.float())
            loss = error.abs().mean().item()
            if loss >= least:
                break
            best, least = zero, loss
            bulk = w - shrink(error, self.p, beta)
            zero = grid.stored((codes - bulk / scale).mean(-1, keepdim=True))
            beta *= self.kappa
        return best


def shrink(error: Tensor, p: float, beta: float) -> Tensor:
    """The part of each error that counts as sparse: sign(e) max(0, |e| - |e|^(p-1) / beta)."""
    size = error.abs()
    return error.sign() * (size - size.pow(p - 1) / beta).clamp_min_(0)


def whole_and_rest(w: Tensor, group: int) -> list[Tensor]:
    """w [N, K] -> its whole groups [N, G, group] and the shorter last one [N, 1, rest], if any."""
    n, k = w.shape
    step = group or max(k, 1)
    whole = k - k % step
    parts = [w[:, :whole].reshape(n, -1, step), w[:, whole:].reshape(n, 1, -1)]
    return [part for part in parts if part.numel()]


RECIPES = {
    "HQQ W8 g64": "hqq(bits=8,group=64)",
    "HQQ W4 g64": "hqq(bits=4,group=64,round_zero=true)",
    "HQQ W4 g128": "hqq(bits=4,group=128,round_zero=true)",
    "HQQ W3 g64": "hqq(bits=3,group=64)",
    "HQQ W2 g64": "hqq(bits=2,group=64)",
    "HQQ W2 g16": "hqq(bits=2,group=16)",
}
