"""Which configuration of a kernel is fastest: measured rows shipped as kernels/NAME/table.json.

{"rows": [{"device": "NVIDIA H200", "triton": "3.7.1", "m": 16, "n": 4096, "k": 4096, "bits": 4,
           "group": 128, "config": {"splits": 4, "warps": 4, "stages": 3}, "median_us": 4.6}]}

Nothing is tuned while a model answers: a shape without a row takes its kernel's heuristic. Rows of
the Triton that runs come first; one of another version is taken only for a shape that this version
has no row of: compilers differ in registers, and what was fastest is seldom slow in the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # m is looked up as the next of these, the last beyond
BESIDE = ("device", "triton", "config", "median_us")  # of a row, all but its key
Table = Mapping[tuple[object, ...], Mapping[str, Any]]


def bucket(m: int) -> int:
    """The measured m that stands for this one."""
    return next((b for b in ROWS if m <= b), ROWS[-1])


@lru_cache(maxsize=64)
def table(name: str, version: str) -> Table:
    """The configurations of kernels/<name>/table.json for a version of Triton."""
    path = Path(__file__).parent / name / "table.json"
    return by_key(json.loads(path.read_text())["rows"] if path.exists() else [], version)


def by_key(rows: Iterable[Mapping[str, Any]], version: str) -> Table:
    """Configurations by device and key: the last row of `version`, else the last of another."""
    ordered = sorted(rows, key=lambda row: row["triton"] == version)
    return {row_key(row["device"], row): row["config"] for row in ordered}


def row_key(device: str, row: Mapping[str, Any]) -> tuple[object, ...]:
    """What a row is found by: all that it says but the triton version, times and configuration."""
    return (device, *sorted((k, v) for k, v in row.items() if k not in BESIDE))


def configured(name: str, device: torch.device, m: int, **key: object) -> Mapping[str, Any] | None:
    """The measured configuration of a shape on this GPU; None where none was measured, or no GPU.

    Numbers of a key that say more than a shape are those that change the code: bits, a mode.
    """
    if device.type != "cuda":
        return None  # Triton's interpreter, in tests
    known = table(name, triton_version())
    if not known:
        return None
    return known.get(row_key(device_name(device), {**key, "m": bucket(m)}))


@lru_cache(maxsize=1)
def triton_version() -> str:
    """Of the Triton that compiles; it is imported by the kernels that ask."""
    import triton

    return str(triton.__version__)


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)
