"""KIVI: keys rounded per channel, values per token, the newest tokens in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from backend.cache.codec import GridCodec
from backend.formats.kivi import Kivi as Grid
from backend.methods import METHODS
from backend.methods.base import Method, Target
from backend.methods.kv_cache import check_blocks, check_tokens

if TYPE_CHECKING:
    from backend.cache.layer import RoundedLayer
    from backend.model.families import Block


@METHODS.register
class Kivi(Method):
    """Round keys per channel and values per token, keep the newest tokens in 16 bits; no data.

    Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache". A few
    channels of the keys are large, and per channel they do not spoil the others; values have no
    such channels. Keys wait in 16 bits until `residual` of them are rounded at once; of the values
    the newest `residual` always stay. The token of a step is read before it is rounded.
    """

    kind: ClassVar[str] = "kivi"
    targets: ClassVar[frozenset[Target]] = frozenset({"kv_cache"})
    in_blocks: ClassVar[bool] = False
    bits: int = Field(2, ge=2, le=4, description="Bits of one code; published are 2 and 4.")
    group: int = Field(
        32, ge=8, le=4096, description="Tokens (keys) or channels (values) per scale."
    )
    residual: int = Field(
        128, ge=8, le=131072, description="Newest tokens in 16 bits, a multiple of the group."
    )
    prefill: Literal["fp", "quant"] = Field(
        "fp",
        description="What a prompt's own attention reads before an answer. fp: exact keys and "
        "values, as published; quant: the rounded ones. Scoring a text reads the rounded ones.",
    )
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", description="What scales and minima are stored as."
    )

    @model_validator(mode="after")
    def _residual_is_whole_groups(self) -> Self:
        check_blocks(self.kind, self.residual, self.group)
        return self

    def waves(self, block: Block) -> list[list[str]]:
        return []

    def code_bits(self, target: Target) -> float | None:
        return float(self.bits) if target == "kv_cache" else 16.0

    def check_cache(self, model: nn.Module) -> None:
        check_tokens(self.kind, model, {"group": self.group, "residual": self.residual})

    def cache_layer(
        self, index: int, fit: Mapping[str, Tensor] | None = None, *, packed: bool = False
    ) -> RoundedLayer:
        from backend.cache.layer import RoundedLayer, Side

        keys = Side(GridCodec(self.grid("channel"), "channel"), residual=self.residual)
        values = Side(GridCodec(self.grid("token"), "token"), residual=self.residual)
        return RoundedLayer(keys, values, packed=packed, prefill=self.prefill, late=True)

    def grid(self, axis: Literal["token", "channel"]) -> Grid:
        """The number format of keys (per channel) or values (per token)."""
        return Grid(bits=self.bits, group=self.group, axis=axis, scale_dtype=self.scale_dtype)


RECIPES = {
    "KIVI-2": "kivi(bits=2)",
    "KIVI-4": "kivi(bits=4)",
    "KIVI-2, rounded prompt": "kivi(bits=2,prefill=quant)",
    "KIVI-4, rounded prompt": "kivi(bits=4,prefill=quant)",
}
