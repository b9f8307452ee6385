"""Check kernels against their references, then time them in turn with a bf16 product.

`python -m kernels.bench [NAME...]` needs torch alone (and triton on a GPU). Weights are cold:
copies of them take turns, past any cache. On a GPU calls are replayed from CUDA graphs, and timed
with their launches beside that. A wrong product has no time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.base import Case, Json, Kernel, Packed, kernels
from kernels.ceilings import ceilings
from kernels.peers import peers
from kernels.timing import Call, InTurn, Timing, interleaved, replayed

Row = dict[str, Any]
Shape = tuple[int, int]  # n, k

LLAMA: tuple[Shape, ...] = ((4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336))
PUBLISHED: tuple[Shape, ...] = (  # of LUT-GEMM's table
    *((512, 2048), (1024, 4096), (2048, 8192), (4096, 16384)),
    *((7168, 28672), (8192, 32768), (12288, 49152)),
)
QUICK: tuple[Shape, ...] = ((4096, 4096), (14336, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_ROWS = (1, 8, 64)
COLD_BYTES = {"cpu": 130_000_000, "cuda": 256_000_000}  # weights rotate through this much
MOST_COPIES = {"cpu": 32, "cuda": 256}  # on the CPU more would not get a turn
MAX_ERROR = 1e-2  # max |y - reference| / max |reference|: bf16 rounding is 3e-3
TELLING = ("kind", "type", "table", "double_quant", "bits", "beside", "bucket", "outliers")
ATTEMPTS = 3  # at steady times
DENSE = "bf16"  # the product that all are compared with
GROUP = 128  # of an int format with groups, as published tables have it


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
        for kernel in (kernels()[name] for name in names)
        for case in settings(kernel, device)
        for n, k in shapes
        if kernel.why_not(case.weight, case.act, device, n, k) is None
    ]


def bench(
    names: Sequence[str],
    shapes: Sequence[Shape] = QUICK,
    rows: Sequence[int] = QUICK_ROWS,
    device: torch.device | None = None,
) -> Iterator[Row]:
    """Rows of the named kernels, one by one; first the device's ceilings."""
    device = device or here()
    yield from ceilings(device)
    for kernel, case in plan(names, shapes, device):
        yield from measure(kernel, case, rows, device)


@torch.no_grad()
def measure(kernel: Kernel, case: Case, rows: Sequence[int], device: torch.device) -> Iterator[Row]:
    """One weight at every m: correctness first, then times in turn with the bf16 product's."""
    packed = kernel.pack(*example(kernel, case, device), case.weight, case.act)
    held = copies(packed, clone, packed.nbytes(), device)
    w = torch.randn(case.n, case.k, device=device, dtype=torch.bfloat16)
    dense = copies(w, Tensor.clone, 2 * w.numel(), device)
    for m in rows:
        at = replace(case, m=m)
        source = torch.Generator().manual_seed(m)
        x = torch.randn(m, case.k, generator=source).to(device, torch.bfloat16)
        error = relative_error(kernel.matmul(x, packed), kernel.reference(x, packed))
        if not error <= MAX_ERROR:
            yield row(kernel.name, at, device, error, packed.nbytes(), None, None)
            continue
        calls: dict[str, Call] = {
            kernel.name: InTurn(kernel.matmul, x, held),
            DENSE: InTurn(functional.linear, x, dense),
        }
        others = {peer.name: peer for peer in peers(at, w, device)}
        for name, peer in others.items():
            taken = copies(peer.held, peer.clone, peer.bytes, device)
            calls[name] = InTurn(peer.product, x, taken)
        times, launched = timed(calls, device)
        bf16 = times.pop(DENSE)
        plain = replace(at, weight={"kind": DENSE}, act=None)
        yield row(DENSE, plain, device, 0.0, 2 * w.numel(), bf16, bf16)
        for name, own in times.items():
            known = name == kernel.name
            told = row(
                name,
                at,
                device,
                error if known else others[name].error(x),
                packed.nbytes() if known else others[name].bytes,
                own,
                bf16,
            )
            yield told | {"eager_ms": launched[name].median_ms if launched else None}


def timed(
    calls: Mapping[str, Call], device: torch.device
) -> tuple[dict[str, Timing], dict[str, Timing] | None]:
    """Times from graphs, and with launches, on a GPU; on the CPU there is one kind.

    Again where they are unsteady, and after some attempts as they are.
    """
    measure = interleaved if device.type == "cpu" else replayed
    for _ in range(ATTEMPTS):
        times = measure(calls)
        if all(own.steady for own in times.values()):
            break
    return times, None if device.type == "cpu" else interleaved(calls, device=device.type)


def example(kernel: Kernel, case: Case, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Random codes [n, k] uint8 and parameters of a case, on a device."""
    codes, params = kernel.example(case, torch.Generator().manual_seed(0))
    return codes.to(device), {name: value.to(device) for name, value in params.items()}


def copies(one: Any, clone: Any, size: int, device: torch.device) -> list[Any]:
    """So many that each is cold when its turn comes."""
    count = min(MOST_COPIES[device.type], 1 + COLD_BYTES[device.type] // max(size, 1))
    return [one, *(clone(one) for _ in range(count - 1))]


def clone(packed: Packed) -> Packed:
    """The same weights in memory of their own."""
    return replace(packed, tensors={name: t.clone() for name, t in packed.tensors.items()})


def relative_error(y: Tensor, reference: Tensor) -> float:
    """max |y - reference| / max |reference|."""
    return float((y.float() - reference).abs().max() / reference.abs().max())


def row(
    name: str,
    case: Case,
    device: torch.device,
    error: float,
    size: int,
    own: Timing | None,
    dense: Timing | None,
) -> Row:
    """What is reported of one product; `size`: bytes of its weights as they are held.

    A wrong product has no time, and an unsteady time is compared with nothing.
    """
    steady = own.steady and dense.steady if own and dense else None
    return {
        "kernel": name,
        "device": device.type,
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "weight": dict(case.weight),
        "act": dict(case.act) if case.act else None,
        "weight_bytes": size,
        "max_rel_err": error,
        "correct": error <= MAX_ERROR,
        "median_ms": own.median_ms if own else None,
        "p20_ms": own.p20_ms if own else None,
        "p80_ms": own.p80_ms if own else None,
        "ratio_to_bf16": dense.median_ms / own.median_ms if own and dense and steady else None,
        "steady": steady,
        "eager_ms": None,
    }


def line(told: Row) -> str:
    """One row for people."""
    if "ceiling" in told:
        return f"{told['ceiling']}: {told['value']:.4g} {told['unit']}"
    at = f"m={told['m']} n={told['n']} k={told['k']}"
    about = f"{told['kernel']} {words(told['weight'], told['act'])} {at}"
    if not told["correct"]:
        return f"{about}: wrong by {told['max_rel_err']:.2g}, not timed"
    spread = f"{told['median_ms']:.3f} ms ({told['p20_ms']:.3f}-{told['p80_ms']:.3f})"
    if not told["steady"]:
        return f"{about}: {spread}, unsteady: no result"
    return f"{about}: {spread}, {told['ratio_to_bf16']:.2f}x bf16"


def words(weight: Json, act: Json | None) -> str:
    """`int4 g128, int8 activations`."""
    told = form_words(weight)
    group = f" g{weight['group']}" if weight.get("group") else ""
    beside = "".join(f", {name}" for name in weight.get("beside", ()))
    rounds = f", {form_words(act)} activations" if act else ""
    return told + group + beside + rounds


def form_words(form: Json) -> str:
    """`int4`, `nf4 double`, `Q8_0`, `llm_int8 int8 outliers`: a format without its group."""
    named = form.get("type") or form.get("table")
    told = str(named) if named else f"{form['kind']}{form.get('bits', '')}"
    if form["kind"] == "llm_int8":
        told = f"{form['kind']} {form['outliers']} outliers"
    return told + (" double" if form.get("double_quant") else "")


if __name__ == "__main__":
    found = []
    for told in bench(sys.argv[1:] or list(kernels())):
        print(line(told), flush=True)
        found.append(told)
    print(json.dumps({"rows": found}))
