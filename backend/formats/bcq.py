"""BCQ: weights as signed sums of a few scales (LUT-GEMM)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from backend.formats import FORMATS
from backend.formats.base import Format, GroupField, Params, QTensor
from backend.formats.int_group import DTYPES, IntGroup

CHUNK = 2**21  # numbers fitted at once: bounds memory, changes nothing
RIDGE = 1e-6  # of a group's mass: scales whose signs agree everywhere stay where they are
FLOOR = 1e-6  # added to denominators by the released quantize_bcq.py
TINY = torch.finfo(torch.float64).tiny


@FORMATS.register
class BCQ(Format):
    """Signed sums of a few scales: w = a_1 b_1 + ... + a_k b_k, each b_i +1 or -1.

    Binary-coding quantization; Xu et al. 2018, "Alternating Multi-bit Quantization for Recurrent
    Neural Networks", algorithms 1 and 2, as used by LUT-GEMM (Park et al. 2024, section 3). Greedy
    signs first; then, `rounds` times, least squares for the scales and the nearest of the 2^bits
    sums for every weight. Levels are symmetric around 0, and the largest lies below the largest
    weight: BCQ clips. Bit i of a code is the sign of a_i. Decoded values may carry an `offset`,
    which uniform integers need (`from_uniform`).
    """

    kind: ClassVar[str] = "bcq"
    bits: int = Field(4, ge=1, le=8, description="Scales in the sum, and signs of each weight.")
    group: GroupField = 0
    rounds: int = Field(
        15,
        ge=0,
        le=50,
        description="Rounds of least squares and nearest sum after the greedy start: 0 is greedy, "
        "1 what LUT-GEMM's code calls refined greedy, more are alternating.",
    )
    refit: bool = Field(
        False,
        description="Solve for all scales again after each greedy sign, then take the nearest "
        "sums: refined greedy as in Guo et al. 2017.",
    )
    solver: Literal["released", "exact"] = Field(
        "released",
        description="Least squares. released: conjugate gradients with 1e-6 added to denominators, "
        "as in LUT-GEMM's code, which stop short where weights are small; exact: solved.",
    )
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="What a scale is stored as; it is rounded before codes are chosen."
    )

    def code_bits(self) -> float:
        return float(self.bits)

    def fit(self, w: Tensor, base: Params, importance: Tensor | None = None) -> Params:
        """w [N, g] -> alpha [N, 1, bits]; importance weighs the squared errors."""
        w = w.float().contiguous()
        mass = torch.ones(()) if importance is None else importance.float()
        mass = mass.to(w.device).expand_as(w)
        rows = max(1, CHUNK // (w.shape[1] + 2**self.bits))
        parts = zip(w.split(rows), mass.split(rows), strict=True)
        alpha = torch.cat([self._fit(*part) for part in parts])
        dtype = DTYPES[self.scale_dtype]
        most = torch.finfo(dtype).max
        return {"alpha": alpha.clamp(-most, most).to(dtype)[:, None]}

    def encode(self, w: Tensor, p: Params, at: int = 0) -> Tensor:
        w = w.float().contiguous()
        levels, order = self._levels(p).expand(len(w), -1).sort(dim=-1, stable=True)
        rank = torch.searchsorted(between(levels), w)  # [N, c]
        codes = order.gather(1, rank)
        if self.rounds == 0 and not self.refit:
            # Greedy signs need not find a level that they made again, so levels keep their codes.
            codes = torch.where(levels.gather(1, rank) == w, codes, self._greedy_codes(w, p))
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor, p: Params, at: int = 0) -> Tensor:
        levels = self._levels(p).expand(len(codes), -1)  # [N, 2^bits]
        return levels.gather(1, codes.long())

    def param_bits(self, params: Params) -> dict[str, float]:
        width = {name: value.element_size() * 8 for name, value in params.items()}
        offset = width["offset"] * params["offset"].numel() if "offset" in params else 0
        return {"scales": float(width["alpha"] * params["alpha"].numel()), "zeros": float(offset)}

    def quantize(self, w: Tensor, importance: Tensor | None = None) -> QTensor:
        """All whole groups at once; the same numbers as group by group."""
        n, k = w.shape
        whole = k - k % self.group if self.group else 0
        if not whole or importance is not None:
            return super().quantize(w, importance)
        units = w[:, :whole].float().reshape(-1, self.group)  # [N G, g]
        p = self.fit(units, {})
        codes, alpha = self.encode(units, p).view(n, whole), p["alpha"].view(n, -1, self.bits)
        if whole < k:
            rest = super().quantize(w[:, whole:])
            codes = torch.cat([codes, rest.codes], 1)
            alpha = torch.cat([alpha, rest.params["alpha"]], 1)
        return QTensor(codes, {"alpha": alpha}, self)

    @classmethod
    def from_uniform(cls, q: QTensor) -> QTensor:
        """Codes of `int` -> the same codes as signs, with scales and an offset: values to 1e-7.

        s (q - z), q = sum 2^i u_i, is sum a_i (2 u_i - 1) + o with a_i = s 2^(i-1) and
        o = s ((2^bits - 1) / 2 - z) (LUT-GEMM, section 3.2).
        """
        if not isinstance(q.format, IntGroup):
            raise ValueError(f"bcq: only int codes are signed sums, not {q.format.kind} codes")
        bits, scale = q.format.bits, q.params["scale"].float()  # [N, G]
        zero = q.params["zero"].float() if "zero" in q.params else q.format.middle
        alpha = scale[..., None] * 2.0 ** torch.arange(-1, bits - 1, device=scale.device)
        params = {"alpha": alpha, "offset": scale * (q.format.top / 2 - zero)}
        return replace(q, params=params, format=cls(bits=bits, group=q.format.group))

    def _fit(self, w: Tensor, mass: Tensor) -> Tensor:
        """w, mass [M, g] -> alpha [M, bits] fp32, largest first after the first round."""
        alpha, codes = self._greedy(w, mass)
        if not self.rounds:
            return alpha.float()
        sums, runs = sums_by_code(w, mass, codes, self.bits), Runs(w, mass)
        for left in reversed(range(self.rounds)):
            alpha = self._solve(alpha, *sums).abs().sort(-1, descending=True).values
            if left:
                sums = runs.sums(*sorted_levels(alpha.float()))
        return alpha.float()

    def _greedy(self, w: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """w, mass [M, g] -> alpha [M, bits] fp64 and codes [M, g], sign after sign of the rest."""
        total = mass.sum(-1, dtype=torch.float64).clamp_min(TINY)  # [M]
        alpha = torch.zeros(len(w), self.bits, dtype=torch.float64, device=w.device)
        codes = torch.zeros_like(w, dtype=torch.int64)
        rest = w
        for i in range(self.bits):
            alpha[:, i] = (rest.abs() * mass).sum(-1, dtype=torch.float64) / total
            codes += (rest >= 0).long() << i  # +1 at 0, where the released sign is 0
            if self.refit:
                found = alpha[:, : i + 1]
                found.copy_(self._solve(found, *sums_by_code(w, mass, codes, i + 1)))
                rest = w - levels_of(found.float()).gather(1, codes)
            else:
                rest = less(rest, alpha[:, i : i + 1].float())
        return alpha, codes

    def _solve(self, alpha: Tensor, total: Tensor, moment: Tensor) -> Tensor:
        """Scales [M, k] of least squared error for given signs, found from `alpha` [M, k]."""
        signs = signs_of(alpha.shape[1], alpha.device).double()  # [2^k, k]
        pairs = signs[:, :, None] * signs[:, None]  # [2^k, k, k]
        gram = torch.tensordot(total, pairs, 1)  # B^T B [M, k, k]
        left = moment @ signs - times(gram, alpha)  # B^T (w - B alpha)
        if self.solver == "exact":
            return alpha + ridge_step(gram, left)
        return alpha + gradient_steps(gram, left)

    def _levels(self, p: Params) -> Tensor:
        """The value of every code, [N, 2^bits] fp32."""
        levels = levels_of(p["alpha"].float().squeeze(1))
        return levels + p["offset"].float() if "offset" in p else levels

    def _greedy_codes(self, w: Tensor, p: Params) -> Tensor:
        """w [N, c] -> codes [N, c] int64 by the sign of what each scale leaves."""
        rest = w - p["offset"].float() if "offset" in p else w
        codes = torch.zeros_like(w, dtype=torch.int64)
        for i in range(self.bits):
            codes += (rest >= 0).long() << i
            rest = less(rest, p["alpha"][..., i].float())
        return codes


def signs_of(bits: int, device: torch.device) -> Tensor:
    """[2^bits, bits] fp32: +1 where the bit of the code is set, else -1."""
    codes = torch.arange(2**bits, device=device)[:, None]
    return ((codes >> torch.arange(bits, device=device)) & 1).float() * 2 - 1


def less(rest: Tensor, a: Tensor) -> Tensor:
    """rest [M, g] after a [M, 1] was taken off with the sign of each."""
    return torch.where(rest >= 0, rest - a, rest + a)


def levels_of(alpha: Tensor) -> Tensor:
    """alpha [M, k] fp32 -> the sum of every code [M, 2^k], always added in one order."""
    signs = signs_of(alpha.shape[1], alpha.device)
    levels = alpha[:, :1] * signs[:, 0]
    for i in range(1, alpha.shape[1]):
        levels = levels + alpha[:, i : i + 1] * signs[:, i]
    return levels


def sorted_levels(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """alpha [M, k] fp32 -> sums [M, 2^k] from low to high and the code of each."""
    levels, codes = levels_of(alpha).sort(dim=-1, stable=True)
    return levels, codes


def between(levels: Tensor) -> Tensor:
    """Levels [M, L] from low to high -> the largest number that goes to each but the last."""
    low, high = levels[:, :-1], levels[:, 1:]
    middle = low * 0.5 + high * 0.5
    return torch.where(middle < high, middle, low)  # between neighbouring floats there is none


def sums_by_code(w: Tensor, mass: Tensor, codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Of the weights [M, g] with each code: their mass and mass x value, [M, 2^bits] fp64."""
    empty = torch.zeros(len(w), 2**bits, dtype=torch.float64, device=w.device)
    total = empty.scatter_add(1, codes, mass.double())
    return total, empty.scatter_add(1, codes, mass.double() * w.double())


class Runs:
    """Rows sorted once, so that the sums over any run of neighbouring values are two look-ups.

    Weights that go to one level are such a run: a round of fitting costs 2^bits look-ups a group
    instead of a pass over its weights.
    """

    def __init__(self, w: Tensor, mass: Tensor) -> None:
        self.values, order = w.sort(-1)  # [M, g]
        mass = mass.gather(-1, order).double()
        self.total = running_sum(mass)
        self.moment = running_sum(mass * self.values.double())

    def sums(self, levels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """sums_by_code of the nearest levels; levels and their codes [M, L] from low to high."""
        stops = torch.searchsorted(self.values, between(levels), right=True)  # [M, L-1]
        first = torch.zeros_like(codes[:, :1])
        edges = torch.cat([first, stops, first + self.values.shape[1]], 1)  # [M, L+1]
        total, moment = (s.gather(1, edges).diff(dim=1) for s in (self.total, self.moment))
        empty = torch.zeros_like(total)
        return empty.scatter(1, codes, total), empty.scatter(1, codes, moment)


def running_sum(x: Tensor) -> Tensor:
    """[M, g] -> [M, g+1]: sums of the first 0, 1, ... g entries."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """[M, k, k], [M, k] -> [M, k]."""
    return (matrix @ vector[..., None])[..., 0]


def ridge_step(gram: Tensor, left: Tensor) -> Tensor:
    """The step [M, k] that solves gram @ step = left.

    A ridge on the step, not on the scales, cannot raise the error, even where signs that agree
    everywhere make gram singular.
    """
    mass = gram.diagonal(dim1=1, dim2=2).mean(-1)  # [M], all of the diagonal alike
    ridge = (RIDGE * mass).clamp_min(TINY)[:, None, None] * torch.eye(
        gram.shape[1], dtype=gram.dtype, device=gram.device
    )
    return torch.linalg.solve(gram + ridge, left)


def gradient_steps(gram: Tensor, left: Tensor) -> Tensor:
    """About the same step [M, k]: k conjugate gradients, as the released code takes them."""
    step, way, size = torch.zeros_like(left), left, left.square().sum(-1, keepdim=True)
    for _ in range(left.shape[1]):
        push = times(gram, way)
        length = size / ((way * push).sum(-1, keepdim=True) + FLOOR)
        step, left = step + length * way, left - length * push
        before, size = size, left.square().sum(-1, keepdim=True)
        way = left + size / (before + FLOOR) * way
    return step


RECIPES = {
    f"LUT-GEMM W{bits}{' g128' if group else ''}": "rtn(format=bcq("
    f"bits={bits},group={group},rounds=30,solver=exact,scale_dtype=float16))"
    for bits in (4, 3)
    for group in (0, 128)
} | {
    "BCQ W4 g128 greedy": "rtn(format=bcq(bits=4,group=128,rounds=0,scale_dtype=float16))",
    "BCQ W4 g128 refined greedy": "rtn(format=bcq("
    "bits=4,group=128,rounds=0,refit=true,solver=exact,scale_dtype=float16))",
    "BCQ W3 g64": "rtn(format=bcq(bits=3,group=64,rounds=30,solver=exact,scale_dtype=float16))",
    "BCQ W2 g64": "rtn(format=bcq(bits=2,group=64,rounds=30,solver=exact,scale_dtype=float16))",
    "BCQ W2 g32": "rtn(format=bcq(bits=2,group=32,rounds=30,solver=exact,scale_dtype=float16))",
}
