"""What a device can do at best, measured: bytes read a second, products a second, a launch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernels.timing import CALLS, captured, replay

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square product
READ = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes read, past every cache
BEST_OF = 7


@torch.no_grad()
def ceilings(device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows {"ceiling", "value", "unit", "device"}; random data, for zeros run at other clocks."""
    for name, unit, measure in (
        ("read", "GB/s", read),
        ("bf16 product", "TFLOP/s", product),
        ("launch in a graph", "us", launch),
    ):
        value = measure(device)
        if value is not None:
            yield {"ceiling": name, "value": value, "unit": unit, "device": device.type}


def read(device: torch.device) -> float:
    """GB/s of a sum over a tensor that no cache holds."""
    x = torch.rand(READ[device.type] // 4, device=device)
    return 4e-9 * x.numel() / best(x.sum, device)


def product(device: torch.device) -> float:
    """TFLOP/s of a square bf16 product."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2e-12 * side**3 / best(lambda: a @ b, device)


def launch(device: torch.device) -> float | None:
    """Microseconds of a kernel that does next to nothing, inside a CUDA graph; a GPU's alone."""
    if device.type == "cpu":
        return None
    x = torch.zeros(1, device=device)
    graph = captured(lambda number: x.add_(1))
    return 1e3 * min(replay(graph) for _ in range(BEST_OF)) / CALLS


def best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of BEST_OF calls, after one that warms up."""
    return min(seconds(call, device) for _ in range(BEST_OF + 1))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
