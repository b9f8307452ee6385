"""Triton: LLM.int8() as kernels.w8_a8 multiplies, outlier channels as a last step of each tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kernels.aot import Build
from kernels.quantize import Grid
from kernels.w8_a8 import kernel as w8_a8
from kernels.w8_a8.kernel import (
    CORES,
    FEW_PLAIN,
    FEW_TYPES,
    MANY_PLAIN,
    TYPES,
    WHOLE,
    few,
    many,
)

GRID = Grid(bits=8, steps=127.0, scale_dtype="float32")


def product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    keep: Tensor,
    index: Tensor,
    outliers: Tensor,
    scaled: bool,
    config: Mapping[str, Any] | None = None,
) -> Tensor:
    """x [m, k] -> [m, n]; the tensors are those of the class's `pack`."""
    weight = w8_a8.Weight(codes, scale, keep=keep)
    if len(index):
        weight = replace(weight, index=index, outliers=outliers, scaled=scaled)
    return w8_a8.product(x, weight, GRID, "llm_int8", config)


CODES = {"outliers": "*i8"}
FEW = {**FEW_PLAIN, "PEAK": True, "C": 32}
MANY = {**MANY_PLAIN, "BN": 128, "C": 32}


def few_build(name: str, types: Mapping[str, str], **constants: object) -> Build:
    """Tokens rounded inside the one launch."""
    return Build(
        name,
        few,
        {**FEW_TYPES, **types},
        {**FEW, **constants},
        stages=4,
        divisible=WHOLE,
        per_pass=64 * 128,
        budget=7.8,
        tensor_core=CORES,
    )


def many_build(name: str, types: Mapping[str, str], **constants: object) -> Build:
    """Many tokens; the loop over 16-bit columns may be the longer one, so none is counted."""
    return Build(
        name,
        many,
        {**TYPES, **types},
        {**MANY, **constants},
        warps=8,
        divisible=WHOLE,
        tensor_core=CORES,
    )


BUILDS = (
    few_build("few_exact", {}),
    few_build("few_codes", CODES, SCALED=True),
    many_build("many_exact", {}),
    many_build("many_codes", CODES, SCALED=True),
)
