"""LLM.int8(): 8-bit products with a scale per token and per row, outlier channels in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from backend.formats.base import Format, Params, QTensor
from backend.formats.int_group import IntGroup
from backend.methods import METHODS
from backend.methods.base import LinearMethod, Target
from backend.model.quant_linear import QuantLinear, qtensor_from_state
from backend.model.stats import AbsMax, LayerStats, Stat

if TYPE_CHECKING:
    from kernels.base import Kernel

GRID = IntGroup(bits=8, symmetric=True)  # one scale per row, peak / 127


@METHODS.register
class LLMInt8(LinearMethod):
    """Multiply in int8, token by row, and leave the few input channels with outliers in 16 bits.

    Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
    sections 3.1 and 3.2. The paper keeps the outlier channels' weights in 16 bits; bitsandbytes
    has freed them by then and multiplies by the dequantized int8 ones, as does our default.
    Which channels are outliers depends on all tokens of one call, unless the list is static.
    """

    kind: ClassVar[str] = "llm_int8"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights", "activations"})
    needs: ClassVar = (AbsMax,)
    fixed_bits: ClassVar[float | None] = 8
    threshold: float = Field(
        6.0, ge=0, le=1e6, description="Inputs this large make their channel an outlier; 0: none."
    )
    outliers: Literal["int8", "exact"] = Field(
        "int8",
        description="Weights of outlier channels. int8: dequantized codes, as in bitsandbytes; "
        "exact: the 16-bit originals, as in the paper. A dynamic list then keeps all of them.",
    )
    static: bool = Field(
        False, description="Fix the list of outlier channels from calibration; off: in every call."
    )

    @model_validator(mode="after")
    def _a_list_needs_a_threshold(self) -> Self:
        if self.static and not self.threshold:
            raise ValueError("llm_int8: threshold 0 lists no outliers; set static=false")
        return self

    def wanted(self) -> tuple[type[Stat], ...]:
        """Calibration peaks for a static list, else nothing."""
        return self.needs if self.static else ()

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> Int8Linear:
        w = linear.weight.detach()  # [N, K]
        columns = None
        if self.static:
            columns = (stats[AbsMax].peak >= self.threshold).nonzero().flatten().to(w.device)
        exact = None
        if self.outliers == "exact" and self.threshold:
            exact = w.clone() if columns is None else w[:, columns]
        codes, scale = int8_rows(w.float())
        return Int8Linear(
            QTensor((codes + GRID.middle).to(torch.uint8), {"scale": scale}, GRID),
            linear.bias,
            threshold=self.threshold,
            columns=columns,
            exact=exact,
            dtype=w.dtype,
        )


class Int8Linear(QuantLinear):
    """y = s_x s_w (X_q W_q^T) + X_C W_C^T + b, C the outlier columns; fp32 inside.

    `columns` [C] is the static list, None where each call makes its own; `exact` holds the 16-bit
    weights of those columns [N, C], or of all [N, K] without a list, None where W_C is int8 too.
    """

    kind: ClassVar[str] = "llm_int8"
    qtensor: QTensor
    columns: Tensor | None
    exact: Tensor | None

    def __init__(
        self,
        weight: QTensor,
        bias: Tensor | None,
        *,
        threshold: float,
        columns: Tensor | None,
        exact: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(weight, bias, dtype=dtype)
        self.threshold = threshold
        self.register_buffer("columns", None if columns is None else columns.to(torch.int32))
        self.register_buffer("exact", None if exact is None else exact.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.packed:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features).float()  # [T, K]
        codes, scale, columns = vector_wise(rows, self.threshold, self.columns)
        weights = self.qtensor.codes.float() - GRID.middle  # [N, K]; sums of products are exact
        y = (codes @ weights.T) * scale * self.qtensor.params["scale"].T  # [T, N]
        if len(columns):
            y += rows[:, columns] @ self.outlier_weight(columns).T
        if self.bias is not None:
            y += self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def outlier_weight(self, columns: Tensor) -> Tensor:
        """[N, C] fp32, what outliers are multiplied by."""
        if self.exact is None:
            codes = self.qtensor.codes[:, columns]
            return GRID.decode(codes, self.qtensor.params)
        return (self.exact if self.columns is not None else self.exact[:, columns]).float()

    def bits(self) -> dict[str, float]:
        """Codes, fp32 row scales, 16-bit weights kept beside them, a 32-bit index per column."""
        if self.packed:
            return super().bits()
        count = self.out_features * self.in_features
        kept = 0 if self.exact is None else 16 * self.exact.numel()
        index = 0 if self.columns is None else 32 * self.columns.numel()
        return super().bits() | {"outliers": kept / count, "index": index / count}

    def mixes_rows(self) -> bool:
        """True without a static list: an outlier of one token takes its channel from all."""
        return not self.packed and self.columns is None and self.threshold > 0

    def with_act(self, act: Format, act_params: Params | None = None) -> NoReturn:
        """Refused: the inputs are rounded here already."""
        raise ValueError("activations are already rounded to int8 by llm_int8; drop that step")

    def why_not_packed(self) -> str:
        """A kernel needs to know the outlier channels beforehand."""
        if self.mixes_rows():
            return "its outlier channels are found anew in every call; fix them with static=true"
        return ""

    def packed_form(self) -> dict[str, Any]:
        """The codes' format, and whether outliers' weights are codes too; kernels.llm_int8."""
        kept = "int8" if self.exact is None else "exact"
        channels = 0 if self.columns is None else self.columns.numel()
        return {**GRID.data(), "kind": "llm_int8", "outliers": kept, "channels": channels}

    def beside(self) -> dict[str, dict[str, Tensor]]:
        """The list, empty where the threshold is 0, and the 16-bit weights of its columns."""
        codes = self.qtensor.codes
        columns = codes.new_empty(0, dtype=torch.int32) if self.columns is None else self.columns
        exact = {} if self.exact is None else {"exact": self.exact}
        return {"outliers": {"columns": columns, **exact}}

    def pack(self, kernel: Kernel) -> None:
        """As QuantLinear; the list and its weights go to the kernel too."""
        stored = self.bits()
        super().pack(kernel)
        self._bits = stored
        self.columns = self.exact = None

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As QuantLinear, with the threshold, the list and the exact weights."""
        tensors, config = super().to_state()
        for name in ("columns", "exact"):
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value.cpu().contiguous()
        return tensors, config | {"threshold": self.threshold}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
    ) -> Int8Linear:
        return cls(
            qtensor_from_state(tensors, config["qtensor"], config["shape"]),
            tensors.get("bias"),
            threshold=config["threshold"],
            columns=tensors.get("columns"),
            exact=tensors.get("exact"),
            dtype=dtype,
        )


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] fp32 -> whole codes -127..127 [T, K] fp32, scales [T, 1]; a row of zeros: 0, 1/127.

    Times 127 / peak as in bitsandbytes: dividing by peak / 127 breaks ties another way.
    """
    peak = x.abs().amax(1, keepdim=True)
    peak = peak.masked_fill(peak == 0, 1)
    return (x * (127 / peak)).round_(), peak / 127


def vector_wise(
    x: Tensor, threshold: float, columns: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, K] -> whole codes -127..127 [T, K] fp32, scales [T, 1], outlier columns [C] int64.

    Without a list, entries of at least `threshold` (0: none) stay out of their token's scale and
    take their whole column out of the product; with one, the listed columns do both.
    """
    if columns is not None:
        columns = columns.long()
        small = x.index_fill(1, columns, 0)
    else:
        large = x.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
        columns = large.any(0).nonzero().flatten()
        small = x.masked_fill(large, 0)
    codes, scale = int8_rows(small)
    return codes.index_fill_(1, columns, 0), scale, columns


RECIPES = {
    "LLM.int8()": "llm_int8(threshold=6.0)",
    "LLM.int8() (16-bit outlier weights)": "llm_int8(threshold=6.0,outliers=exact)",
    "LLM.int8() (static outlier list)": "llm_int8(threshold=6.0,outliers=exact,static=true)",
}
