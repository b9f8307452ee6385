"""Memory traffic of decoding: bytes that must move for a token, and bytes a second there are."""

from __future__ import annotations

from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from backend.cache.build import cache_bytes
from backend.metrics.size import named_tensors, resident_of
from backend.model.families import blocks_of

if TYPE_CHECKING:
    from backend.run import Run

PEAKS = {  # data sheets, bytes per second; the longest name that fits decides
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA GeForce RTX 4090": 1.008e12,
    "NVIDIA GeForce RTX 3090": 0.936e12,
    "NVIDIA L40S": 0.864e12,
    "NVIDIA L4": 0.3e12,
}
READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # past every cache
READS = 7


class Peak(NamedTuple):
    """Bytes per second, and where the number is from."""

    value: float
    basis: str


def peak_of(device: str) -> Peak:
    """Of a GPU that has a data sheet here its number, of anything else what reading measures."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(torch.device(device))
        known = max((n for n in PEAKS if name.startswith(n)), key=len, default="")
        if known:
            return Peak(PEAKS[known], f"data sheet of {known}")
    return Peak(read_bandwidth(device), "measured: reading memory past the caches, best of 7")


@lru_cache(maxsize=8)
def read_bandwidth(device: str) -> float:
    """Bytes per second of a sum over a tensor that no cache holds; the best of READS."""
    kind = torch.device(device).type
    x = torch.zeros(READ_BYTES[kind] // 4, device=device).fill_(1e-3)
    wait(device)
    best = min(seconds(x, device) for _ in range(READS))
    return x.numel() * x.element_size() / best


def seconds(x: torch.Tensor, device: str) -> float:
    """Of one sum over x."""
    start = perf_counter()
    x.sum()
    wait(device)
    return perf_counter() - start


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(torch.device(device))


def token_traffic(run: Run, context: float) -> dict[str, float]:
    """Bytes that decoding one token must read, behind so many tokens: weights, and the cache.

    Weights as they are held now, tied ones once; of input embeddings that are nothing else, the
    one row that is used.
    """
    model: Any = run.model
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    weights = weight_bytes(model)
    if not tied:
        table = embeddings.weight
        weights -= (table.shape[0] - 1) * table.shape[1] * table.element_size()
    return {"weights": float(weights), "cache": cache_bytes(run.caches, round(context))}


def weight_bytes(model: nn.Module) -> int:
    """All that the model holds, every tensor once."""
    total, seen = 0, set()
    for block in blocks_of(model):
        for linear in block.linears().values():
            total += resident_of(linear)
            seen |= {id(t) for t in (*linear.parameters(), *linear.buffers())}
    for _, tensor in named_tensors(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.numel() * tensor.element_size()
    return total
