"""GGUF: what llama.cpp's quantizer makes of a model, type mixes and importance matrix included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from backend.formats.gguf import GGUF, TYPES
from backend.methods import METHODS
from backend.methods.base import LinearMethod, Method, Target, suited
from backend.model.families import Block
from backend.model.quant_linear import LinearLike, QuantLinear
from backend.model.stats import LayerStats, Stat

Mix = Literal[
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_1",
    "Q5_0",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_1",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
    "Q2_K_S",
]
# Linears that mixes treat apart, by the last part of their names.
ROLES = {
    "v_proj": "v",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "o_proj": "out",
    "out_proj": "out",
    "dense": "out",
    "down_proj": "down",
    "fc2": "down",
    "dense_4h_to_h": "down",
}


@dataclass(frozen=True)
class Spot:
    """Where a linear is, as far as mixes care."""

    index: int  # of its block
    count: int  # of blocks
    shared: int  # query heads per value head
    imatrix: bool


Where = Callable[[Spot], bool]
Cases = tuple[tuple[Where, str], ...]


def everywhere(at: Spot) -> bool:
    return True


def more(at: Spot) -> bool:
    """`use_more_bits`: the first and last eighth, and every third block between."""
    eighth = at.count // 8
    between = (at.index - eighth) % 3 == 2 and at.index >= eighth
    return at.index < eighth or at.index >= 7 * at.count // 8 or between


def first(blocks: int) -> Where:
    return lambda at: at.index < blocks


def share(part: int, imatrix: bool | None = None) -> Where:
    """The first 1/part of the blocks, with or without an importance matrix or (None) both."""
    return lambda at: at.index < at.count // part and imatrix in (None, at.imatrix)


def widely_shared(at: Spot) -> bool:
    """Values so small, under grouped-query attention, that bits for them cost little."""
    return at.shared >= 4


IQ4: dict[str, Cases] = {
    "v": ((widely_shared, "Q5_K"),),
    "down": ((share(8, imatrix=False), "Q5_K"),),
}
# {mix: {role: ((where, type), ...)}}, the first that holds; else the mix's main type. After
# llama_tensor_get_type_impl in llama-quant.cpp, without its rules for Falcon, experts and 70B.
MIXES: dict[str, dict[str, Cases]] = {
    "Q5_K_M": {"v": ((more, "Q6_K"),), "down": ((more, "Q6_K"),), "qkv": ((everywhere, "Q6_K"),)},
    "Q4_K_M": {"v": ((more, "Q6_K"),), "down": ((more, "Q6_K"),), "qkv": ((everywhere, "Q5_K"),)},
    "Q4_K_S": {"v": ((first(4), "Q5_K"),), "down": ((share(8), "Q5_K"),)},
    "Q3_K_L": {
        "v": ((everywhere, "Q5_K"),),
        "down": ((everywhere, "Q5_K"),),
        "out": ((everywhere, "Q5_K"),),
        "qkv": ((everywhere, "Q4_K"),),
    },
    "Q3_K_M": {
        "v": ((first(2), "Q5_K"), (everywhere, "Q4_K")),
        "down": ((share(16), "Q5_K"), (everywhere, "Q4_K")),
        "out": ((everywhere, "Q4_K"),),
        "qkv": ((everywhere, "Q4_K"),),
    },
    "Q2_K": {
        "v": ((widely_shared, "Q4_K"), (everywhere, "Q3_K")),
        "down": ((everywhere, "Q3_K"),),
        "out": ((everywhere, "Q3_K"),),
    },
    "Q2_K_S": {"v": ((widely_shared, "Q4_K"),), "down": ((share(8), "Q4_K"),)},
    "Q5_0": {"down": ((share(8, imatrix=True), "Q5_1"),)},
    "Q4_0": {"down": ((share(8, imatrix=True), "Q4_1"),)},
    "IQ4_NL": IQ4,
    "IQ4_XS": IQ4,
}


class MeanSquare(Stat):
    """Mean square of every input channel, `value` [K] fp32: llama.cpp's importance matrix."""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        super().__init__(k, device)
        self.total = torch.zeros(k, dtype=torch.float64, device=self.device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, self.k).float()
        self.total += rows.square().sum(0, dtype=torch.float64).to(self.device)
        self.tokens += len(rows)

    @property
    def value(self) -> Tensor:
        return (self.total / max(self.tokens, 1)).float()


@METHODS.register
class GGUFQuantize(LinearMethod):
    """Round to the block types of a llama.cpp file: one type, or the mix its name stands for.

    Gerganov and Kawrakow, llama.cpp (llama-quant.cpp for mixes and fallbacks, ggml-quants.c for the
    types, here format `gguf`). With `imatrix` a weight's squared error counts by the mean square of
    its input channel in the original model; without, no data is looked at. Embeddings and head stay
    in 16 bits; in files of these names they do not.
    """

    kind: ClassVar[str] = "gguf"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights"})
    needs: ClassVar = (MeanSquare,)
    mix: Mix = Field(
        "Q4_K_M",
        description="Types of the linears, as llama-quantize names them; _S, _M and _L and some "
        "others give values, attention outputs and down projections more bits.",
    )
    imatrix: bool = Field(
        False, description="Weigh errors by the mean square of their input channel."
    )
    pure: bool = Field(False, description="The mix's main type for every linear.")

    @property
    def prefix(self) -> Literal["quantized", "original"]:  # type: ignore[override]
        """The original model's inputs are what an importance matrix is made of."""
        return "original" if self.imatrix else "quantized"

    @property
    def format(self) -> GGUF:
        """The mix's main type."""
        return GGUF(type=main_type(self.mix))  # type: ignore[arg-type]

    def code_bits(self, target: Target) -> float | None:
        """Of the main type."""
        return self.format.code_bits() if target == "weights" else 16

    def wanted(self) -> tuple[type[Stat], ...]:
        """Mean squares for an importance matrix, else nothing."""
        return self.needs if self.imatrix else ()

    def on_linear(self, block: Block, blocks: int, linear: str) -> Method | None:
        """Layer rules first, then the mix: the step with one type for this linear."""
        step = super().on_linear(block, blocks, linear)
        if not isinstance(step, GGUFQuantize) or step.pure:
            return step
        spot = Spot(block.index, blocks, sharing(block), step.imatrix)
        role = ROLES.get(linear.rpartition(".")[2], "")
        cases = MIXES.get(step.mix, {}).get(role, ())
        name = next((name for where, name in cases if where(spot)), main_type(step.mix))
        return step.model_copy(update={"mix": PURE[name], "pure": True})

    def quantize(self, linear: nn.Linear, stats: LayerStats) -> QuantLinear:
        grid = suited(self.format, linear, stats)
        if grid is None:
            return QuantLinear.from_linear(linear)
        importance = self.importance(stats) if self.imatrix else None
        weight = grid.quantize(linear.weight.detach(), importance)
        return QuantLinear(weight, linear.bias, dtype=linear.weight.dtype)

    def importance(self, stats: LayerStats) -> Tensor | None:
        """[K]; None, with a note, where calibration only saw zeros or what is not a number."""
        value = stats[MeanSquare].value
        if value.isfinite().all() and value.any():
            return value
        stats.note("calibration inputs are all 0 or not finite; rounded without importance")
        return None


def main_type(mix: str) -> str:
    """`Q4_K_M` -> Q4_K: the type of what a mix does not treat apart."""
    return mix if mix in TYPES else mix[:-2]


MIX_NAMES: tuple[str, ...] = get_args(Mix)
# {type: the mix of which it is the main type}
PURE = {name: name if name in MIX_NAMES else f"{name}_S" for name in TYPES}


def sharing(block: Block) -> int:
    """Query heads per value head, from the sizes of their linears; 1 where they are fused."""
    rows = {
        name.rpartition(".")[2]: linear.out_features
        for name, linear in block.linears().items()
        if isinstance(linear, nn.Linear | LinearLike)
    }
    return rows["q_proj"] // rows["v_proj"] if {"q_proj", "v_proj"} <= rows.keys() else 1


IMPORTANCE_HELPS = ("Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q2_K")
RECIPES = {f"GGUF {mix}": f"gguf(mix={mix})" for mix in MIX_NAMES} | {
    f"GGUF {mix} imatrix": f"gguf(mix={mix},imatrix=true)" for mix in IMPORTANCE_HELPS
}
