"""Round to nearest: the baseline for every weight method."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from backend.formats import FormatField
from backend.formats.int_group import IntGroup
from backend.methods import METHODS
from backend.methods.base import LinearMethod, Target
from backend.model.quant_linear import QuantLinear
from backend.model.stats import LayerStats


@METHODS.register
class RTN(LinearMethod):
    """Round every weight to the nearest level of a grid; looks at no data.

    The baseline of all papers; formulas as in Nagel et al. 2021, "A White Paper on Neural Network
    Quantization", section 2.
    """

    kind: ClassVar[str] = "rtn"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights"})
    format: FormatField = Field(IntGroup(), description="The grid that weights are rounded to.")

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> QuantLinear:
        weight = self.format.quantize(linear.weight.detach())
        return QuantLinear(weight, linear.bias, dtype=linear.weight.dtype)


RECIPES = {
    "RTN W8": "rtn(bits=8,scale_dtype=float16)",
    "RTN W8 g128": "rtn(bits=8,group=128,scale_dtype=float16)",
    "RTN W4": "rtn(bits=4,scale_dtype=float16)",
    "RTN W4 g128": "rtn(bits=4,group=128,scale_dtype=float16)",
    "RTN W4 g64": "rtn(bits=4,group=64,scale_dtype=float16)",
    "RTN W4 g32": "rtn(bits=4,group=32,scale_dtype=float16)",
    "RTN W4 g128, attention in 8 bits": "rtn(bits=4,group=128,scale_dtype=float16,"
    "layers=[on(modules=attn,bits=8)])",
    "RTN W4 g128, first and last block in 16 bits": "rtn(bits=4,group=128,scale_dtype=float16,"
    'layers=[on(blocks="first,last",keep=true)])',
    "RTN W4 g128 sym": "rtn(bits=4,group=128,symmetric=true,scale_dtype=float16)",
    "RTN W4 g128 MSE clip": "rtn(bits=4,group=128,scale_dtype=float16,mse=true)",
    "RTN W3": "rtn(bits=3,scale_dtype=float16)",
    "RTN W3 g128": "rtn(bits=3,group=128,scale_dtype=float16)",
    "RTN W3 g64": "rtn(bits=3,group=64,scale_dtype=float16)",
    "RTN W2": "rtn(bits=2,scale_dtype=float16)",
    "RTN W2 g64": "rtn(bits=2,group=64,scale_dtype=float16)",
}
