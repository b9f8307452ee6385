"""LLM.int8() as bitsandbytes computes it: its own quantizer and product, fp16 between."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from backend.formats.base import QTensor
from backend.methods import METHODS
from backend.methods.base import LinearMethod, Target
from backend.methods.llm_int8 import GRID, Int8Linear
from backend.model.stats import LayerStats


@METHODS.register
class BnbInt8(LinearMethod):
    """LLM.int8() by the library itself, to compare with ours: fp16 inputs, outlier weights int8.

    Dettmers et al. 2022, bitsandbytes' `int8_vectorwise_quant` and `matmul` with the settings of
    its `Linear8bitLt(has_fp16_weights=False)` in inference; on the CPU its generic torch kernels.
    It multiplies by 6.200124e-05 for 1/127^2, which is 6.200012e-05.
    """

    kind: ClassVar[str] = "bnb_int8"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights", "activations"})
    family: ClassVar[str] = "llm_int8"
    fixed_bits: ClassVar[float | None] = 8
    threshold: float = Field(
        6.0, ge=0, le=6e4, description="Inputs this large make their channel an outlier; 0: none."
    )

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> BnbInt8Linear:
        w = linear.weight.detach()  # [N, K]
        codes, peak, _ = library().functional.int8_vectorwise_quant(w.half())
        codes = (codes.to(torch.int16) + GRID.middle).to(torch.uint8)
        q = QTensor(codes, {"scale": peak[:, None].float() / 127}, GRID)
        settings: dict[str, Any] = {"columns": None, "exact": None, "dtype": w.dtype}
        return BnbInt8Linear(q, linear.bias, threshold=self.threshold, **settings)


class BnbInt8Linear(Int8Linear):
    """An Int8Linear whose product is bitsandbytes' own."""

    kind: ClassVar[str] = "bnb_int8"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        bnb = library()
        state = bnb.MatmulLtState()
        state.CB = (self.qtensor.codes.to(torch.int16) - GRID.middle).to(torch.int8)
        state.SCB = 127 * self.qtensor.params["scale"].flatten()
        state.threshold, state.has_fp16_weights, state.is_training = self.threshold, False, False
        bias = None if self.bias is None else self.bias.half()
        y: Tensor = bnb.matmul(x.half(), state.CB, bias=bias, state=state)
        return y.to(x.dtype)

    def why_not_packed(self) -> str:
        """Its product is the library's."""
        return "bitsandbytes multiplies by the codes as they are"


def library() -> Any:
    """bitsandbytes, or ValueError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("bnb_int8 needs bitsandbytes, which is not installed") from None
    return bitsandbytes


RECIPES = {"LLM.int8() (bitsandbytes)": "bnb_int8(threshold=6.0)"}
