"""Activations: rounds the input of every linear with any format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator
from torch import nn

from backend.formats import Format, FormatField
from backend.formats.int_group import IntGroup
from backend.methods import METHODS
from backend.methods.base import Method, Seen, Target
from backend.model.quant_linear import QuantLinear
from backend.model.stats import AbsMax, Stat

if TYPE_CHECKING:
    from backend.model.families import Block

PER_TOKEN = IntGroup(bits=8, symmetric=True)


def like_per_token(grid: Format) -> Format:
    """Knobs of an `int` grid that were not given: 8 bits and symmetric, as without a format."""
    if not isinstance(grid, IntGroup):
        return grid
    given = grid.model_fields_set
    knobs = {f: getattr(grid if f in given else PER_TOKEN, f) for f in IntGroup.model_fields}
    return IntGroup.model_construct(set(given), **knobs)


@METHODS.register
class Activations(Method):
    """Round the inputs of every linear, each token by its own scale unless told otherwise.

    The activation half of W8A8 and W4A8 schemes; per token and per tensor, dynamic and static, as
    in SmoothQuant (Xiao et al. 2023), table 2. Put it after the weight step.
    """

    kind: ClassVar[str] = "activations"
    targets: ClassVar[frozenset[Target]] = frozenset({"activations"})
    needs: ClassVar = (AbsMax,)
    by_module: ClassVar[bool] = True
    format: Annotated[FormatField, AfterValidator(like_per_token)] = Field(
        PER_TOKEN,
        description="The grid of the inputs, viewed as [tokens, channels]; `int` is 8 bits and "
        "symmetric here unless told otherwise.",
    )
    static: bool = Field(
        False,
        description="One scale per linear, fixed from the extremes of the calibration inputs; "
        "off: taken from each input as it comes.",
    )

    @model_validator(mode="after")
    def _static_has_one_scale(self) -> Self:
        if self.static and (reason := self.format.why_not_static()):
            raise ValueError(f"activations: {reason}")
        return self

    def wanted(self) -> tuple[type[Stat], ...]:
        """Calibration extremes for static scales, else nothing."""
        return self.needs if self.static else ()

    def apply(self, block: Block, seen: Seen) -> None:
        for name, stats in seen.stats.items():
            params = self.format.calibrate(stats) if self.static else None
            linear = block.get(name)
            if isinstance(linear, QuantLinear):
                block.replace(name, linear.with_act(self.format, params))
            elif isinstance(linear, nn.Linear):
                block.replace(name, QuantLinear.from_linear(linear, self.format, params))
            else:
                raise ValueError(
                    f"activations: {name} of block {block.index} is a {type(linear).__name__}, "
                    "which rounds its inputs its own way or not at all"
                )


RECIPES = {
    "A8": "activations(bits=8,symmetric=true)",
    "W8A8": "rtn(bits=8,symmetric=true,scale_dtype=float16)+activations(bits=8,symmetric=true)",
    "W8A8 per tensor": "rtn(bits=8,symmetric=true,per_tensor=true)"
    "+activations(bits=8,symmetric=true,per_tensor=true)",
    "W8A8 static": "rtn(bits=8,symmetric=true,per_tensor=true)"
    "+activations(bits=8,symmetric=true,per_tensor=true,static=true)",
    "W6A6": "rtn(bits=6,symmetric=true,scale_dtype=float16)+activations(bits=6,symmetric=true)",
    "W4A8": "rtn(bits=4,group=128,scale_dtype=float16)+activations(bits=8,symmetric=true)",
}
