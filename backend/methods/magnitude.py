"""Magnitude pruning: the control of every pruning method."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from backend.formats import QTensor
from backend.methods import METHODS
from backend.methods.pruning import Pruning
from backend.model.quant_linear import QuantLinear
from backend.model.stats import LayerStats


@METHODS.register
class Magnitude(Pruning):
    """Set the smallest weights of every linear to 0; looks at no data.

    Zhu and Gupta 2017, "To Prune, or Not to Prune", applied once and layer by layer, as in the
    baseline of SparseGPT (Frantar and Alistarh 2023, table 1). Biases stay.
    """

    kind: ClassVar[str] = "magnitude"

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> QuantLinear:
        w = linear.weight.detach()  # [N, K]
        weight: QTensor | Tensor = w if self.grid is None else self.grid.quantize(w)
        keep = ~self.choose(w.float().abs()) if self.sparsity else None
        return self.finished(linear, weight, keep)


RECIPES = {
    "Magnitude 50%": "magnitude(sparsity=0.5)",
    "Magnitude 60%": "magnitude(sparsity=0.6)",
    "Magnitude 70%": "magnitude(sparsity=0.7)",
    "Magnitude 2:4": 'magnitude(pattern="2:4")',
    "Magnitude 4:8": 'magnitude(pattern="4:8")',
    "Magnitude 50% W4": "magnitude(sparsity=0.5,bits=4)",
}
