"""Format: a grid of numbers. QTensor: a matrix rounded to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from backend.registry import Part

if TYPE_CHECKING:
    from backend.model.stats import LayerStats

Params = dict[str, Tensor]  # per group, row or tensor, already in the dtype they are stored in
Granularity = Literal["tensor", "row", "group"]
GroupField = Annotated[
    int, Field(ge=0, le=65536, description="Input channels per scale; 0 is one scale per row.")
]


class Format(Part):
    """A grid: how codes become numbers and how numbers find their code. fp32 inside.

    One set of parameters covers a `group` of input channels of one row (or one whole row, or the
    whole tensor). Shapes: w [N, K], codes [N, K] uint8, parameters [N, 1] per group of one row,
    [1, 1] per tensor.
    """

    row_local: ClassVar[bool] = True  # False: rows share parameters
    if TYPE_CHECKING:  # each format declares it, after `bits`: recipe text follows that order
        group: int

    @property
    def granularity(self) -> Granularity:
        """What one set of parameters covers."""
        return "group" if self.group else "row"

    def code_bits(self) -> float:
        """Bits of one code."""
        raise NotImplementedError(f"{self.kind} does not say how wide its codes are")

    def prepare(self, w: Tensor) -> Params:
        """w [N, K] -> what needs the whole matrix (base scales, second levels); often {}."""
        return {}

    def fit(self, w: Tensor, base: Params, importance: Tensor | None = None) -> Params:
        """One group w [N, g] -> its parameters, in storage dtype."""
        raise NotImplementedError(f"{self.kind} cannot fit a group")

    def encode(self, w: Tensor, p: Params, at: int = 0) -> Tensor:
        """Columns `at`.. of a group, w [N, c] -> codes [N, c] uint8."""
        raise NotImplementedError(f"{self.kind} cannot encode")

    def decode(self, codes: Tensor, p: Params, at: int = 0) -> Tensor:
        """Columns `at`.. of a group, codes [N, c] -> values [N, c] fp32."""
        raise NotImplementedError(f"{self.kind} cannot decode")

    def calibrate(self, stats: LayerStats) -> Params:
        """Static activation parameters from calibration statistics."""
        raise ValueError(f"{self.kind} has no static activation scales; use dynamic ones")

    def why_not_static(self) -> str:
        """Why `calibrate` has no static activation parameters to give, "" where it has."""
        if not self.group:
            return ""
        return (
            f"static takes one scale per linear, not per {self.group} channels; set group=0 or "
            "static=false"
        )

    def param_bits(self, params: Params) -> dict[str, float]:
        """Parameters of a whole matrix -> bits stored for "scales" and "zeros" (totals)."""
        bits = {"scales": 0.0, "zeros": 0.0}
        for name, value in params.items():
            part = "zeros" if name.startswith("zero") else "scales"
            bits[part] += value.numel() * value.element_size() * 8
        return bits

    def stack(self, fitted: list[Params]) -> Params:
        """Parameters of each group, as `fit` gave them -> of the whole matrix, as stored."""
        return stack_groups(fitted)

    def params_of(self, params: Params, index: int) -> Params:
        """Parameters of the whole matrix, fitted or from `prepare` -> those of one group."""
        return group_params(params, index)

    def groups(self, k: int) -> list[tuple[int, int]]:
        """[(start, stop), ...] of the groups of k columns; a short last group is allowed."""
        step = self.group or max(k, 1)
        return [(i, min(i + step, k)) for i in range(0, k, step)]

    def suited(self, k: int) -> Format | None:
        """What rows of k weights are rounded to: this, unless groups must divide them.

        None: nothing like it fits, they stay in 16 bits.
        """
        return self

    def quantize(self, w: Tensor, importance: Tensor | None = None) -> QTensor:
        """w [N, K] -> codes and parameters, group by group; importance [K] or [N, K]."""
        w = w.float()
        base = self.prepare(w)
        codes, fitted = [], []
        for index, (start, stop) in enumerate(self.groups(w.shape[1])):
            weight = importance[..., start:stop] if importance is not None else None
            p = self.fit(w[:, start:stop], self.params_of(base, index), weight)
            codes.append(self.encode(w[:, start:stop], p))
            fitted.append(p)
        return QTensor(torch.cat(codes, 1), self.stack(fitted), self)

    def fake(self, x: Tensor) -> Tensor:
        """Round x [..., K] to the grid and back, same shape and dtype."""
        return self.quantize(x.reshape(-1, x.shape[-1])).dequantize().view(x.shape).to(x.dtype)

    def fake_static(self, x: Tensor, params: Params) -> Tensor:
        """Round x [..., K] with what `calibrate` gave, [1, G] each, same shape and dtype."""
        rows = x.reshape(-1, x.shape[-1]).float()  # [M, K]
        parts = []
        for index, (start, stop) in enumerate(self.groups(rows.shape[1])):
            p = self.params_of(params, index)
            parts.append(self.decode(self.encode(rows[:, start:stop], p), p))
        return torch.cat(parts, 1).view(x.shape).to(x.dtype)


@dataclass(frozen=True)
class Sparse:
    """Outliers kept apart: CSR rows of exact values that replace the codes there."""

    row_ptr: Tensor  # [N + 1] int32 or int64
    column: Tensor  # [nnz] uint16 or int64
    value: Tensor  # [nnz] fp16 or fp32


@dataclass(frozen=True)
class QTensor:
    """A matrix on a grid. codes [N, K] uint8, one code per element in memory.

    `params[name]` is [N, G] (or [1, 1] per tensor), column j belonging to group j. With
    `column_group` [K] the group of each column is looked up (act order), else it is k // group.
    """

    codes: Tensor
    params: Params
    format: Format
    column_group: Tensor | None = None
    sparse: Sparse | None = None

    def group_of_column(self) -> Tensor:
        """[K] int64: the parameter column of each weight column."""
        if self.column_group is not None:
            return self.column_group.long()
        k = self.codes.shape[1]
        step = self.format.group or max(k, 1)
        return torch.arange(k, device=self.codes.device) // step

    def dequantize(self) -> Tensor:
        """[N, K] fp32."""
        w = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        groups = self.group_of_column()
        regular = self.column_group is None
        for index, (start, stop) in enumerate(self.format.groups(w.shape[1])):
            p = self.format.params_of(self.params, index)
            if regular:
                w[:, start:stop] = self.format.decode(self.codes[:, start:stop], p)
                continue
            where = (groups == index).nonzero().flatten()
            w[:, where] = self.format.decode(self.codes[:, where], p)
        if self.sparse is not None:
            counts = self.sparse.row_ptr.long().diff()
            rows = torch.repeat_interleave(torch.arange(len(counts), device=w.device), counts)
            w[rows, self.sparse.column.long()] = self.sparse.value.float()
        return w

    def bits(self) -> dict[str, float]:
        """Bits per weight by part; their sum is the effective width."""
        n, k = self.codes.shape
        total = {"codes": self.format.code_bits() * n * k, **self.format.param_bits(self.params)}
        outliers = index = 0.0
        if self.sparse is not None:  # 16-bit value and column each, a 32-bit pointer per row
            outliers, index = 32.0 * self.sparse.column.numel(), 32.0 * (n + 1)
        if self.column_group is not None:
            index += 32.0 * k
        total |= {"outliers": outliers, "index": index}
        return {name: value / (n * k) for name, value in total.items()}


def stack_groups(fitted: list[Params]) -> Params:
    """Parameters of each group [N, 1] -> of the whole matrix [N, G]."""
    return {name: torch.cat([p[name] for p in fitted], 1) for name in fitted[0]} if fitted else {}


def group_params(params: Mapping[str, Tensor], index: int) -> Params:
    """Parameters of group `index`, [N, 1] each; [1, 1] ones cover every group."""
    return {
        name: value if value.shape[1] == 1 else value[:, index : index + 1]
        for name, value in params.items()
    }
