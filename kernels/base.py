"""Kernel: multiplies by packed weights. `find` asks every kernel beside this file if it can."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

OLDEST = 8  # compute capability: bf16 on tensor cores, asynchronous copies

# A format's `data()`: its kind and every knob. "beside" names what else the weights have, if they
# have more than codes and parameters; `pack` finds it in params: "column_group" [k]; "outliers" as
# row_ptr [n + 1], column and value; "keep" [n, k] bool.
Json = Mapping[str, Any]
BESIDE = {
    "column_group": "columns that act order scatters over groups",
    "outliers": "outliers kept apart",
    "keep": "weights that are gone",
}


@dataclass(frozen=True)
class Case:
    """One product that a kernel claims: x [m, k] times W^T, W [n, k]. For tests and bench."""

    m: int
    n: int
    k: int
    weight: Json
    act: Json | None = None


@dataclass(frozen=True)
class Packed:
    """The weights [n, k] of one linear as a kernel keeps them, and the formats they came from."""

    tensors: Mapping[str, Tensor]
    n: int
    k: int
    weight: Json
    act: Json | None = None

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, device: torch.device) -> Packed:
        """The same on another device of the same kind: layouts are chosen by kind."""
        held = next(iter(self.tensors.values())).device.type
        if torch.device(device).type != held:
            raise ValueError(
                f"these weights were packed for {held}; load the run on {device} and pack there"
            )
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})


class Kernel(Protocol):
    """kernels/<name>/__init__.py exposes one as KERNEL. Shapes: x [m, k], W [n, k], y [m, n]."""

    name: str
    rank: int  # of several that can, the lowest is taken
    reads: tuple[str, ...]  # kinds of weights
    devices: tuple[str, ...]  # types of devices that it runs on
    cases: tuple[Case, ...]  # odd shapes included

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        """One sentence why it cannot multiply by such a weight, None if it can."""
        ...

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        """codes [n, k] uint8, params [n, G] or [1, 1] -> what `matmul` reads."""
        ...

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        """x [m, k] -> [m, n], in x's dtype."""
        ...

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        """The same from the packed tensors in plain torch, [m, n] fp32: the truth in tests."""
        ...

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Random codes [n, k] uint8 and parameters of a case, on the CPU: for tests and bench."""
        ...

    def container(self, weight: Json) -> str:
        """Why codes take more bits in memory than their format's, "" if they do not."""
        ...


def beside_words(weight: Json) -> str:
    """What the weights have beside codes and parameters, "" if nothing."""
    return " and ".join(BESIDE[name] for name in weight.get("beside", ()))


@lru_cache(maxsize=1)
def kernels() -> dict[str, Kernel]:
    """Every kernel by name, best rank first; a folder without a product has no KERNEL."""
    import kernels as package

    found: dict[str, Kernel] = {}
    for module in pkgutil.iter_modules(package.__path__, "kernels."):
        if module.ispkg:
            kernel = getattr(importlib.import_module(module.name), "KERNEL", None)
            if kernel is not None:
                found[kernel.name] = kernel
    return dict(sorted(found.items(), key=lambda item: (item[1].rank, item[0])))


def find(weight: Json, act: Json | None, device: torch.device | str, n: int, k: int) -> Kernel:
    """The best kernel for such a weight [n, k] on a device, or ValueError with every reason.

    Reasons of those that are about such weights on such a device at all.
    """
    place, reasons = torch.device(device), []
    if place.type == "cuda" and (reason := no_gpu(place)):
        raise ValueError(f"no kernel can run on {place}: {reason}")
    for kernel in kernels().values():
        reason = kernel.why_not(weight, act, place, n, k)
        if reason is None:
            return kernel
        if about(kernel, weight, place):
            reasons.append(f"{kernel.name}: {reason}")
    what = f"no kernel multiplies by these {weight['kind']!r} weights on {place.type}"
    raise ValueError(": ".join([what, "; ".join(reasons)]) if reasons else what)


def about(kernel: Kernel, weight: Json, device: torch.device) -> bool:
    """True if a kernel takes weights of this kind, with what they have beside them, here."""
    whole = set(getattr(kernel, "needs", ())) <= set(weight.get("beside", ()))
    return whole and weight["kind"] in kernel.reads and device.type in kernel.devices


@lru_cache(maxsize=16)
def no_gpu(device: torch.device) -> str | None:
    """Why kernels by Triton cannot run on a device, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < OLDEST:
            return f"it needs compute capability {OLDEST}.0, and this GPU has {major}.{minor}"
    return None
