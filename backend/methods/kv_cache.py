"""Plain rounding of the key-value cache with any format: the control group of KV methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from backend.cache.codec import Axis, GridCodec, why_not
from backend.formats import FORMATS, Format
from backend.formats.int_group import IntGroup
from backend.formats.sdr import activations, weights
from backend.methods import METHODS
from backend.methods.base import Method, Target
from backend.model.families import cache_shape

if TYPE_CHECKING:
    from backend.cache.layer import RoundedLayer
    from backend.model.families import Block


def grid_of(value: Any) -> Any:
    """A format by its name, as JSON or built."""
    return FORMATS.coerce({"kind": value} if isinstance(value, str) else value)


GridField = Annotated[SerializeAsAny[Format], BeforeValidator(grid_of)]
EIGHT_BITS = IntGroup(bits=8, symmetric=True, scale_dtype="float16")


@METHODS.register
class KVCache(Method):
    """Round cached keys and values to nearest with any format, per token or per channel; no data.

    The control group for KIVI (Liu et al. 2024, section 3, tables 1 and 2) and its kin. Per token,
    a row is one token of one head, rounded once, as it comes. Per channel, a row is `group` tokens
    of one channel, which wait in 16 bits until there are that many. Keys are rounded as they are
    cached, after rotary positions.
    """

    kind: ClassVar[str] = "kv_cache"
    targets: ClassVar[frozenset[Target]] = frozenset({"kv_cache"})
    in_blocks: ClassVar[bool] = False
    key: GridField = Field(EIGHT_BITS, description="The grid of keys.")
    value: GridField = Field(EIGHT_BITS, description="The grid of values.")
    which: Literal["both", "keys", "values"] = Field(
        "both", description="Which of them are rounded; the others stay in 16 bits."
    )
    key_axis: Axis = Field(
        "token", description="What shares a scale. token: channels; channel: tokens."
    )
    value_axis: Axis = Field(
        "token", description="What shares a scale. token: channels; channel: tokens."
    )
    residual: int = Field(
        0, ge=0, le=131072, description="Newest tokens in 16 bits; 0 is none, but for whole blocks."
    )
    prefill: Literal["quant", "fp"] = Field(
        "quant",
        description="What a prompt's own attention reads before an answer: rounded or exact keys "
        "and values. Scoring a text reads the rounded ones.",
    )

    @model_validator(mode="after")
    def _formats_fit(self) -> Self:
        for name, grid, axis in self.grids():
            if grid is None:
                continue  # not rounded, so it may be anything
            if reason := why_not(grid, axis):
                raise ValueError(f"kv_cache: {name}: {reason}")
            if axis == "channel" and self.residual:
                check_blocks(self.kind, self.residual, grid.group)
        return self

    def grids(self) -> tuple[tuple[str, Format | None, Axis], ...]:
        """Name, format and axis of keys and values; None where they are not rounded."""
        key = None if self.which == "values" else self.key
        value = None if self.which == "keys" else self.value
        return ("key", key, self.key_axis), ("value", value, self.value_axis)

    def waves(self, block: Block) -> list[list[str]]:
        return []

    def code_bits(self, target: Target) -> float | None:
        if target != "kv_cache":
            return 16.0
        bits = [16.0 if grid is None else grid.code_bits() for _, grid, _ in self.grids()]
        return sum(bits) / len(bits)

    def check_cache(self, model: nn.Module) -> None:
        _, width = cache_shape(model.config)
        tokens = {"residual": self.residual}
        for name, grid, axis in self.grids():
            if grid is None:
                continue
            if axis == "channel":
                tokens[f"{name} group"] = grid.group
            elif grid.suited(width) != grid:
                raise ValueError(
                    f"kv_cache: {name}: blocks of {grid.group} do not divide the {width} channels "
                    f"of a head; {grid.kind} cannot round them"
                )
        check_tokens(self.kind, model, tokens)

    def cache_layer(
        self, index: int, fit: Mapping[str, Tensor] | None = None, *, packed: bool = False
    ) -> RoundedLayer:
        from backend.cache.layer import RoundedLayer, Side

        keys, values = (
            Side(None if grid is None else GridCodec(grid, axis), residual=self.residual)
            for _, grid, axis in self.grids()
        )
        return RoundedLayer(keys, values, packed=packed, prefill=self.prefill)


def check_blocks(kind: str, residual: int, group: int) -> None:
    """ValueError unless tokens in 16 bits make whole blocks of those rounded together."""
    if residual % group:
        raise ValueError(
            f"{kind}: residual {residual} is no multiple of the {group} tokens that are rounded "
            f"together; use {max(group, residual - residual % group)}"
        )


def check_tokens(kind: str, model: nn.Module, tokens: Mapping[str, int]) -> None:
    """ValueError if some number of tokens exceeds the model's context: nothing would be rounded."""
    config: Any = model.config
    context = int(config.get_text_config().max_position_embeddings)
    for name, count in tokens.items():
        if count > context:
            raise ValueError(
                f"{kind}: {name} of {count} tokens never fills in a context of {context}; "
                "choose a smaller one"
            )


def plain(bits: int, group: int = 0) -> str:
    """Keys and values in one grid, per token; the published control groups are symmetric at 8."""
    shape = f",group={group}" if group else ",symmetric=true"
    grid = f"int(bits={bits}{shape},scale_dtype=float16)"
    return f"kv_cache(key={grid},value={grid})"


def razored(group: int) -> str:
    """QRazor's cache: 8-bit integers cut to 4 in groups.

    A scale for each token and head: the published tables have one per tensor, rounded anew from
    16 bits at every step, which no cache that is really 4 bits wide can do.
    """
    grid = f"sdr(bits=4,group={group},scale_dtype=float16)"
    return f"kv_cache(key={grid},value={grid})"


E4M3 = "minifloat(type=fp8_e4m3,scale_dtype=float16)"
RECIPES = {
    "KV8": plain(8),
    "KV4": plain(4, 32),
    "KV3": plain(3, 32),
    "KV2": plain(2, 32),
    "KV8 FP8": f"kv_cache(key={E4M3},value={E4M3})",
    "KV4 per channel": "kv_cache(key=int(bits=4,group=32,scale_dtype=float16),"
    "value=int(bits=4,group=32,scale_dtype=float16),key_axis=channel,value_axis=channel)",
    "KV2 per channel": "kv_cache(key=int(bits=2,group=32,scale_dtype=float16),"
    "value=int(bits=2,group=32,scale_dtype=float16),key_axis=channel,value_axis=channel)",
    **{f"QRazor W4KV4 g{g}": f"{weights(g)}+{razored(g)}" for g in (8, 16, 32)},
    **{
        f"QRazor W4A4KV4 g{g}": f"{weights(g)}+{activations(4, g)}+{razored(g)}"
        for g in (8, 16, 32)
    },
}
