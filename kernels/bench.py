"""Check kernels against their references, then time them in turn with a bf16 product.

`python -m kernels.bench [NAME...]` needs torch alone (and triton on a GPU). Weights are cold:
copies of them take turns, past any cache. On a GPU calls are replayed from CUDA graphs, and timed
with their launches beside that. A wrong product has no time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.base import Case, Json, Kernel, Packed, kernels
from kernels.ceilings import ceilings
from kernels.contest import DENSE, Contender, Row, contest, line, relative_error, words
from kernels.kv_decode import bench as attention
from kernels.peers import peers
from kernels.timing import InTurn, copies

Shape = tuple[int, int]  # n, k

LLAMA: tuple[Shape, ...] = ((4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336))
PUBLISHED: tuple[Shape, ...] = (  # of LUT-GEMM's table
    *((512, 2048), (1024, 4096), (2048, 8192), (4096, 16384)),
    *((7168, 28672), (8192, 32768), (12288, 49152)),
)
QUICK: tuple[Shape, ...] = ((4096, 4096), (14336, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_ROWS = (1, 8, 64)
TELLING = ("kind", "type", "table", "double_quant", "bits", "beside", "bucket", "outliers")
GROUP = 128  # of an int format with groups, as published tables have it


@dataclass(frozen=True)
class Part:
    """Rows that are timed together."""

    about: str  # for people
    rows: Callable[[], Iterator[Row]]


def known() -> list[str]:
    """Names of everything that is timed: the kernels of products, and decode attention."""
    return [*kernels(), attention.NAME]


def here() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settings(kernel: Kernel, device: torch.device) -> list[Case]:
    """One case for each kind and width of weights and activations that the kernel has here.

    Its other knobs matter little for speed.
    """
    found: dict[tuple[Any, ...], Case] = {}
    for case in kernel.cases:
        weight = dict(case.weight)
        if weight["kind"] == "int":
            weight["group"] = GROUP if weight["group"] else 0
        key = (*identity(weight), *identity(case.act or {}), bool(weight.get("group")))
        whole = replace(case, weight=weight)
        if kernel.why_not(weight, case.act, device, *QUICK[0]) is None:
            found.setdefault(key, whole)
    return list(found.values())


def identity(form: Json) -> tuple[Any, ...]:
    """What tells formats apart for speed."""
    return tuple(str(form.get(name, "")) for name in TELLING)


def plan(names: Sequence[str], shapes: Sequence[Shape], device: torch.device) -> list[
    tuple[Kernel, Case]
]:  # fmt: skip
    """Every weight to be timed, each at all m."""
    return [
        (kernel, replace(case, n=n, k=k))
        for kernel in (kernels()[name] for name in names if name in kernels())
        for case in settings(kernel, device)
        for n, k in shapes
        if kernel.why_not(case.weight, case.act, device, n, k) is None
    ]


def parts(
    names: Sequence[str], shapes: Sequence[Shape], rows: Sequence[int], device: torch.device
) -> list[Part]:
    """Everything to be timed. Attention has sizes of its own: shapes are those of weights."""
    weights = [
        Part(
            f"{kernel.name}, {words(case.weight, case.act)}, {case.n} x {case.k}",
            partial(measure, kernel, case, rows, device),
        )
        for kernel, case in plan(names, shapes, device)
    ]
    caches = attention.PLACES[device.type] if attention.NAME in names else ()
    return weights + [
        Part(f"{attention.NAME}, {m} x {n} tokens", partial(attention.measure, m, n, device))
        for m, n in caches
    ]


def bench(
    names: Sequence[str],
    shapes: Sequence[Shape] = QUICK,
    rows: Sequence[int] = QUICK_ROWS,
    device: torch.device | None = None,
) -> Iterator[Row]:
    """Rows of what is named, one by one; first the device's ceilings."""
    device = device or here()
    yield from ceilings(device)
    for part in parts(names, shapes, rows, device):
        yield from part.rows()


@torch.no_grad()
def measure(kernel: Kernel, case: Case, rows: Sequence[int], device: torch.device) -> Iterator[Row]:
    """One weight at every m: correctness first, then times in turn with the bf16 product's."""
    packed = kernel.pack(*example(kernel, case, device), case.weight, case.act)
    held = copies(packed, clone, packed.nbytes(), device)
    w = torch.randn(case.n, case.k, device=device, dtype=torch.bfloat16)
    dense = copies(w, Tensor.clone, 2 * w.numel(), device)
    for m in rows:
        at = replace(case, m=m)
        plain = replace(at, weight={"kind": DENSE}, act=None)
        source = torch.Generator().manual_seed(m)
        x = torch.randn(m, case.k, generator=source).to(device, torch.bfloat16)
        error = relative_error(kernel.matmul(x, packed), kernel.reference(x, packed))
        own = InTurn(kernel.matmul, x, held)
        rivals = [Contender(kernel.name, at, own, packed.nbytes(), error)]
        for peer in peers(at, w, device):
            taken = copies(peer.held, peer.clone, peer.bytes, device)
            call = InTurn(peer.product, x, taken)
            rivals.append(Contender(peer.name, at, call, peer.bytes, peer.error(x)))
        linear = InTurn(functional.linear, x, dense)
        yield from contest(Contender(DENSE, plain, linear, 2 * w.numel()), rivals, device)


def example(kernel: Kernel, case: Case, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Random codes [n, k] uint8 and parameters of a case, on a device."""
    codes, params = kernel.example(case, torch.Generator().manual_seed(0))
    return codes.to(device), {name: value.to(device) for name, value in params.items()}


def clone(packed: Packed) -> Packed:
    """The same weights in memory of their own."""
    return replace(packed, tensors={name: t.clone() for name, t in packed.tensors.items()})


if __name__ == "__main__":
    found = []
    for told in bench(sys.argv[1:] or known()):
        print(line(told), flush=True)
        found.append(told)
    print(json.dumps({"rows": found}))
