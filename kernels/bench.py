"""Check kernels against their references, then time them in turn with a bf16 product."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.base import Case, Kernel, Packed, kernels
from kernels.timing import Timing, interleaved

SHAPES = ((4096, 4096), (14336, 4096))  # n, k: the projections of an 8-billion-parameter Llama
ROWS = (1, 8, 64)
COLD_BYTES = 130_000_000  # weights rotate through this much, past any cache
MAX_ERROR = 1e-2  # max |y - reference| / max |reference|: bf16 rounding is 3e-3


def bench(names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the named kernels, on the GPU where there is one; printed as they come."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [row for name in names for row in rows_of(kernels()[name], device)]


def rows_of(kernel: Kernel, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row per width, shape and m that the kernel takes on this device."""
    settings = {
        (case.weight["bits"], json.dumps(case.act)): case for case in kernel.cases
    }  # one case a width: its other knobs matter little for speed
    for case in settings.values():
        for n, k in SHAPES:
            weight = {**case.weight, "group": 128 if case.weight["group"] else 0}
            if kernel.why_not(weight, case.act, device, n, k) is None:
                for m in ROWS:
                    row = measure(kernel, Case(m, n, k, weight, case.act), device)
                    print(line(row))
                    yield row


@torch.no_grad()
def measure(kernel: Kernel, case: Case, device: torch.device) -> dict[str, Any]:
    """One case: correctness first, then cold weights, in turn with a bf16 product."""
    copies = copies_of(case.n * case.k * case.weight["bits"] // 8)
    generator = torch.Generator().manual_seed(0)
    packed = kernel.pack(*example(kernel, case, device), case.weight, case.act)
    held = [packed, *(clone(packed) for _ in range(copies - 1))]
    x = torch.randn(case.m, case.k, generator=generator).to(device, torch.bfloat16)
    error = relative_error(kernel.matmul(x, packed), kernel.reference(x, packed))
    dense = [
        torch.randn(case.n, case.k, device=device, dtype=torch.bfloat16)
        for _ in range(copies_of(2 * case.n * case.k))
    ]
    turn = iter(range(10**9))
    times = interleaved(
        {
            "kernel": lambda: kernel.matmul(x, held[next(turn) % len(held)]),
            "bf16": lambda: functional.linear(x, dense[next(turn) % len(dense)]),
        },
        device=device.type,
    )
    return row_of(kernel, case, device, error, times)


def example(kernel: Kernel, case: Case, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Random codes [n, k] uint8 and parameters of a case, on a device."""
    codes, params = kernel.example(case, torch.Generator().manual_seed(0))
    return codes.to(device), {name: value.to(device) for name, value in params.items()}


def copies_of(weight_bytes: int) -> int:
    """How many weights to take turns with, so that each is cold when its turn comes."""
    return min(16, 1 + COLD_BYTES // max(weight_bytes, 1))


def clone(packed: Packed) -> Packed:
    """The same weights in memory of their own."""
    return replace(packed, tensors={name: t.clone() for name, t in packed.tensors.items()})


def relative_error(y: Tensor, reference: Tensor) -> float:
    """max |y - reference| / max |reference|."""
    return float((y.float() - reference).abs().max() / reference.abs().max())


def row_of(
    kernel: Kernel, case: Case, device: torch.device, error: float, times: dict[str, Timing]
) -> dict[str, Any]:
    """What is reported of one case; a wrong product has no speed."""
    correct = error <= MAX_ERROR
    mine, dense = times["kernel"], times["bf16"]
    steady = mine.steady and dense.steady
    return {
        "kernel": kernel.name,
        "device": device.type,
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "weight": dict(case.weight),
        "act": dict(case.act) if case.act else None,
        "max_rel_err": error,
        "correct": correct,
        "median_ms": mine.median_ms if correct else None,
        "p20_ms": mine.p20_ms if correct else None,
        "p80_ms": mine.p80_ms if correct else None,
        "ratio_to_bf16": dense.median_ms / mine.median_ms if correct else None,
        "steady": steady,
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    width = f"w{row['weight']['bits']}" + (f"a{row['act']['bits']}" if row["act"] else "a16")
    group = row["weight"]["group"]
    width += f" g{group}" if group else ""
    shape = f"m={row['m']} n={row['n']} k={row['k']}"
    if not row["correct"]:
        return f"{row['kernel']} {width} {shape}: wrong by {row['max_rel_err']:.2g}, not timed"
    spread = f"{row['median_ms']:.3f} ms ({row['p20_ms']:.3f}-{row['p80_ms']:.3f})"
    note = "" if row["steady"] else "  unsteady"
    return f"{row['kernel']} {width} {shape}: {spread}, {row['ratio_to_bf16']:.2f}x bf16{note}"


if __name__ == "__main__":
    print(json.dumps({"rows": bench(sys.argv[1:] or list(kernels()))}))
