"""SpQR: codes of 2-4 bits, scales and zero points of a few bits, and exact outliers, in one launch.

Groups whose columns are scattered (act order) are gathered first, weights when they are packed and
inputs in every product. An outlier is kept as what it has beyond the value of its own code, so that
it is added to a product in which nothing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels import ops
from kernels.base import Case, Json, Packed
from kernels.spqr import rows as by_row
from kernels.spqr.layout import (
    ROWS,
    UNIT,
    column_order,
    expanded,
    levels,
    pack,
    row_of,
)
from kernels.table_cpu import is_rows, ready
from kernels.workspace import WORKSPACES

TILES = 8  # tiles of rows expanded at once on the CPU
KNOWN = {"column_group", "outliers"}  # of what may be beside the codes
HALF_MAX = torch.finfo(torch.float16).max


def spqr_format(**knobs: object) -> Json:
    """The spqr format's JSON for cases and tests: defaults but for `knobs`."""
    plain = {
        "kind": "spqr",
        "bits": 3,
        "group": 16,
        "scale_bits": 3,
        "zero_bits": 3,
        "stat_group": 16,
        "round_zero": False,
        "scale_dtype": "float16",
    }
    return {**plain, **knobs}


BOTH = ["column_group", "outliers"]


class SpQRKernel:
    """y = x W_hat^T, W_hat on a bilevel grid with outliers."""

    name = "spqr"
    rank = 30
    reads = ("spqr",)
    devices = ("cuda", "cpu")
    cases = (
        Case(1, 4096, 4096, spqr_format(beside=BOTH)),
        Case(3, 70, 100, spqr_format(beside=BOTH)),
        Case(1, 33, 64, spqr_format(bits=4, beside=["outliers"])),
        Case(9, 20, 600, spqr_format(bits=2, group=32, stat_group=8)),
        Case(2, 65, 48, spqr_format(group=0, round_zero=True, beside=["outliers"])),
        Case(17, 40, 130, spqr_format(bits=4, group=48, scale_bits=4, scale_dtype="float32")),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if weight["kind"] != "spqr":
            return f"it multiplies by 'spqr' weights, not {weight['kind']!r}"
        if act is not None:
            return "it takes inputs in 16 bits"
        if more := set(weight.get("beside", ())) - KNOWN:
            return f"it keeps no {' and '.join(sorted(more))} beside the codes"
        if weight["bits"] not in (2, 3, 4):
            return f"its codes have 2, 3 or 4 bits, not {weight['bits']}"
        if weight["group"] % UNIT:
            return f"its groups are multiples of {UNIT} channels, not {weight['group']}"
        zero_bits = weight["bits"] if weight["round_zero"] else weight["zero_bits"]
        if not all(bits and bits <= 4 for bits in (weight["scale_bits"], zero_bits)):
            return "its scales and zero points have codes of at most 4 bits"
        return None

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        """words, stats and ends as in layout.py, order and unit; ptr, column and delta."""
        n, k = codes.shape
        if ready(codes.device) and by_row.fits(weight, n, k):
            return Packed(by_row.pack(codes, params, weight), n, k, weight, act)
        order = column_order(params.get("column_group"), k).to(codes.device)
        tensors = pack(codes, params, weight, order)
        tensors |= {"order": order, "unit": params["unit"].float().flatten()}
        if "row_ptr" in params:
            row, column = row_of(params["row_ptr"]), params["column"].long()
            index = params.get("column_group")
            group = weight["group"] or k
            at = column // group if index is None else index.long()[column]
            scale, origin = levels(tensors["stats"][:n], tensors["ends"], 0, weight["stat_group"])
            dense = (codes[row, column].float() - origin[row, at]) * scale[row, at]
            delta = params["value"].float() / tensors["unit"] - dense
            tensors["ptr"] = params["row_ptr"].to(torch.int32)
            tensors["column"] = params["column"].contiguous()
            tensors["delta"] = delta.clamp(-HALF_MAX, HALF_MAX).half()
        return Packed(tensors, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        held, form = packed.tensors, packed.weight
        names = ("words", "stats", "ends", "order", "unit")
        outliers = (held.get(name) for name in ("ptr", "column", "delta"))
        numbers = [form["bits"], form["group"], form["stat_group"]]
        return OP(x.contiguous(), *(held[name] for name in names), *outliers, packed.n, numbers)

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        return x.float() @ dense(packed).T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        form, n, k = case.weight, case.n, case.k
        count, sets = -(-k // (form["group"] or k)), -(-n // min(form["stat_group"], n))
        kind = torch.float32 if form["scale_dtype"] == "float32" else torch.float16
        zero_bits = form["bits"] if form["round_zero"] else form["zero_bits"]

        def whole(bits: int, *shape: int) -> Tensor:
            return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)

        def uniform(low: float, high: float) -> Tensor:
            part = torch.rand(sets, count, generator=generator)
            return (low + (high - low) * part).to(kind)

        params = {
            "unit": torch.full((1, 1), 2.0**-10),
            "scale": whole(form["scale_bits"], n, count),
            "scale_low": uniform(4, 8),
            "scale_step": uniform(0.5, 1),
            "origin": whole(zero_bits, n, count),
        }
        if not form["round_zero"]:
            top = 2 ** form["bits"]
            params |= {"origin_low": uniform(0, top / 2), "origin_step": uniform(0, top / 16)}
        if "column_group" in form.get("beside", ()):
            index = torch.arange(k) // (form["group"] or k)
            params["column_group"] = index[torch.randperm(k, generator=generator)].to(torch.int32)
        if "outliers" in form.get("beside", ()):
            params |= example_outliers(n, k, generator)
        return whole(form["bits"], n, k), params

    def container(self, weight: Json) -> str:
        return "a scale's and a zero point's code share a byte, and rows come in tiles of 64"


def example_outliers(n: int, k: int, generator: torch.Generator) -> dict[str, Tensor]:
    """One weight in a hundred, and at least one, as CSR."""
    place = torch.randperm(n * k, generator=generator)[: max(1, n * k // 100)].sort().values
    counts = torch.bincount(place // k, minlength=n)
    return {
        "row_ptr": functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        "column": (place % k).to(torch.uint16),
        "value": (0.3 * torch.randn(len(place), generator=generator)).half(),
    }


def dense(packed: Packed) -> Tensor:
    """W_hat [n, k] fp32 from the packed tensors."""
    held, n, k = packed.tensors, packed.n, packed.k
    if is_rows(held["words"]):
        w = by_row.dense(held, packed.weight, slice(0, n), k)
        return by_row.placed(w, held, k) * held["unit"]
    w = expanded(held, 0, held["words"].shape[0], packed.weight, k)[:n]
    out = w.new_zeros(n, k + 1)
    out[:, held["order"].long()] = w
    if "ptr" in held:
        rows, columns = row_of(held["ptr"]), held["column"].long()
        out[rows, columns] += held["delta"].float()
    return out[:, :k] * held["unit"]


# ---- the op --------------------------------------------------------------------------------


def held_from(*tensors: Tensor | None) -> dict[str, Tensor]:
    """The op's tensors by name, those that are there."""
    names = ("words", "stats", "ends", "order", "unit", "ptr", "column", "delta")
    return {name: t for name, t in zip(names, tensors, strict=True) if t is not None}


def form_from(numbers: list[int]) -> dict[str, Any]:
    """The op's numbers by name."""
    return dict(zip(("bits", "group", "stat_group"), numbers, strict=True))


def cuda(x: Tensor, *rest: Any) -> Tensor:
    """By Triton, or W_hat expanded by it: for many rows, and in 32 bits, which has no product."""
    from kernels.spqr.kernel import product

    *tensors, n, numbers = rest
    return product(x, held_from(*tensors), n, form_from(numbers))


def cpu(x: Tensor, *rest: Any) -> Tensor:
    """Some tiles of rows at a time, expanded in x's dtype; then the outliers of all rows."""
    *tensors, n, numbers = rest
    held, form = held_from(*tensors), form_from(numbers)
    m, k = x.shape
    if is_rows(held["words"]):
        return by_row.multiply(x, held, form, n)
    moved = functional.pad(x, (0, 1))[:, held["order"].long()]
    y = torch.empty(m, n, device=x.device)
    tiles = held["words"].shape[0]
    for first in range(0, tiles, TILES):
        stop = min(first + TILES, tiles)
        w = expanded(held, first, stop, form, k)
        wide = WORKSPACES.take("spqr", w.numel(), x.dtype, x.device).view(w.shape)
        rows = slice(first * ROWS, min(stop * ROWS, n))
        y[:, rows] = functional.linear(moved, wide.copy_(w))[:, : rows.stop - rows.start]
    if "ptr" in held:
        parts = x[:, held["column"].long()].float() * held["delta"].float()
        y.index_add_(1, row_of(held["ptr"]), parts)
    return y.mul_(held["unit"]).to(x.dtype)


def fake(x: Tensor, *rest: Any) -> Tensor:
    """An empty result."""
    return x.new_empty(x.shape[0], rest[-2])


OP = ops.register(
    "spqr(Tensor x, Tensor words, Tensor stats, Tensor ends, Tensor order, Tensor unit, "
    "Tensor? ptr, Tensor? column, Tensor? delta, int n, int[] numbers) -> Tensor",
    cpu=cpu,
    cuda=cuda,
    fake=fake,
)

KERNEL = SpQRKernel()
