"""Which configuration of a kernel is fastest: measured rows shipped as kernels/NAME/table.json.

{"rows": [{"device": "NVIDIA H200", "triton": "3.7.1", "m": 16, "n": 4096, "k": 4096, "bits": 4,
           "group": 128, "config": {"splits": 4, "warps": 4, "stages": 3}, "median_us": 4.6}]}

Nothing is tuned while a model answers: a shape without a row takes its kernel's heuristic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # m is looked up as the next of these, the last beyond


def bucket(m: int) -> int:
    """The measured m that stands for this one."""
    return next((b for b in ROWS if m <= b), ROWS[-1])


@lru_cache(maxsize=64)
def table(name: str) -> dict[tuple[object, ...], Mapping[str, Any]]:
    """The configurations of kernels/<name>/table.json by device and key."""
    path = Path(__file__).parent / name / "table.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row_key(row["device"], row): row["config"] for row in rows}


def row_key(device: str, row: Mapping[str, Any]) -> tuple[object, ...]:
    """What a row is found by: all that it says but the triton version, times and configuration."""
    told = {k: v for k, v in row.items() if k not in ("device", "triton", "config", "median_us")}
    return (device, *sorted(told.items()))


def configured(name: str, device: torch.device, m: int, **key: object) -> Mapping[str, Any] | None:
    """The measured configuration of a shape on this GPU, None where it was not measured."""
    known = table(name)
    if not known:
        return None
    return known.get(row_key(device_name(device), {**key, "m": bucket(m)}))


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)
