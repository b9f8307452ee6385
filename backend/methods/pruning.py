"""Which weights go: patterns of zeros, and what the pruning methods share."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from backend.formats import Format, QTensor
from backend.formats.base import GroupField
from backend.formats.int_group import DTYPES, IntGroup
from backend.methods.base import LinearMethod, Target, grid_bits
from backend.model.quant_linear import QuantLinear
from backend.model.sparse_linear import SparseLinear

BUCKETS = {"2:4": (2, 4), "4:8": (4, 8)}  # pattern -> weights that go, of how many neighbours


class Pruning(LinearMethod):
    """Sets weights to 0 in a pattern and, with fewer bits, rounds the others."""

    targets: ClassVar[frozenset[Target]] = frozenset({"weights"})
    sparsity: float = Field(0.5, ge=0, le=1, description="Share of the weights that become 0.")
    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        "unstructured",
        description="Where they may lie. 2:4, 4:8: half of every 4 or 8 neighbours in a row, as "
        "sparse tensor cores want it; unstructured: anywhere.",
    )
    bits: int = Field(
        16,
        ge=2,
        le=16,
        description="Bits of a weight that stays: 2 to 8 round it to whole levels that include 0, "
        "fitted on the full matrix; 16 does not round.",
    )
    group: GroupField = 0
    symmetric: bool = Field(
        False, description="Levels symmetric around 0, no zero point; for bits below 16."
    )
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float16", description="What a scale is stored as, with bits below 16."
    )
    value_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="What a weight that stays is stored as, with bits = 16."
    )

    @model_validator(mode="after")
    def _patterns_fix_the_share(self) -> Self:
        if self.pattern in BUCKETS:
            gone, of = BUCKETS[self.pattern]
            if self.sparsity != gone / of:
                raise ValueError(
                    f"{self.kind}: {self.pattern} makes {gone / of:.0%} of the weights 0, not "
                    f"{self.sparsity:.0%}; leave sparsity out or take pattern=unstructured"
                )
        return self

    @model_validator(mode="after")
    def _bits_of_integers(self) -> Self:
        if 8 < self.bits < 16:
            raise ValueError(f"{self.kind}: bits are 2 to 8, or 16 without rounding: {self.bits}")
        if self.bits == 16 and (self.group or self.symmetric):
            raise ValueError(f"{self.kind}: group and symmetric need bits of 2 to 8")
        return self

    @property
    def grid(self) -> Format | None:
        """What the weights that stay are rounded to; None where they are not."""
        if self.bits == 16:
            return None
        return IntGroup(
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
        )

    @property
    def bucket(self) -> tuple[int, int]:
        """Weights that go and of how many neighbours; (0, 0) without a pattern."""
        return BUCKETS.get(self.pattern, (0, 0))

    def stored_bits(self, n: int, k: int, attention: bool) -> float:
        """The weights that stay, at their width, and a bit for every place."""
        kept = DTYPES[self.value_dtype].itemsize * 8 if self.grid is None else self.bits
        scales = 0.0 if self.grid is None else grid_bits(self.grid, k) - self.bits
        return (1 - self.sparsity) * kept + scales + 1

    def choose(self, score: Tensor) -> Tensor:
        """score [N, c], small ones go -> what goes [N, c] bool."""
        gone, of = self.bucket
        return least_of_buckets(score, gone, of) if of else least(score, self.sparsity)

    def finished(
        self, linear: nn.Linear, weight: QTensor | Tensor, keep: Tensor | None
    ) -> QuantLinear:
        """A linear with the weights [N, K] where keep [N, K], 0 elsewhere; all without `keep`."""
        dtype = linear.weight.dtype
        if keep is None:
            return QuantLinear(weight, linear.bias, dtype=dtype)
        return SparseLinear(
            weight,
            keep,
            linear.bias,
            bucket=self.bucket[1],
            value_dtype=DTYPES[self.value_dtype],
            dtype=dtype,
        )


def least(score: Tensor, share: float) -> Tensor:
    """score [N, c] -> True at the round(share N c) smallest, the first of equals.

    SparseGPT's code takes all up to a threshold instead, one more than asked: at 0 it still prunes.
    """
    flat = score.flatten()
    count = round(share * len(flat))
    gone = torch.zeros(len(flat), dtype=torch.bool, device=score.device)
    gone[flat.argsort(stable=True)[:count]] = True
    return gone.view_as(score)


def least_of_buckets(score: Tensor, gone: int, of: int) -> Tensor:
    """score [N, c] -> True at the `gone` smallest of every `of` neighbours, the first of equals.

    A short last bucket keeps as many as a whole one if it can: what it lacks counts as gone.
    """
    n, c = score.shape
    padded = nn.functional.pad(score, (0, -c % of), value=-1)  # below every score
    order = padded.view(n, -1, of).argsort(dim=-1, stable=True)[..., :gone]
    mask = torch.zeros_like(padded, dtype=torch.bool).view(n, -1, of)
    return mask.scatter_(-1, order, True).flatten(1)[:, :c]
