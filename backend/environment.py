"""What a result was made with: versions, processor, GPU, commit. Touches no device."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "triton", "bitsandbytes", "lm-eval", "quantarena")
SOURCE = Path(__file__).parent.parent


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """JSON data by name; what is not there is None."""
    sha, dirty = commit()
    cards = gpus()
    return {
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "commit": sha,
        "dirty": dirty,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": cores(),
        "gpu": ", ".join(card["name"] for card in cards) or None,
        "driver": cards[0]["driver"] if cards else None,
    }


def installed(package: str) -> str | None:
    """Version of an installed package; asks the metadata, imports nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> tuple[str | None, bool | None]:
    """The checkout's commit and whether it has uncommitted changes; None outside a checkout."""
    if not (SOURCE / ".git").exists():
        return None, None
    git = ("git", "-C", str(SOURCE))
    sha = answer(*git, "rev-parse", "HEAD")
    return sha, None if sha is None else bool(answer(*git, "status", "--porcelain"))


def cpu_name() -> str | None:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), None)


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[dict[str, Any]]:
    """Name, driver and memory of every NVIDIA GPU, asked of the driver's own tool."""
    fields = "name,driver_version,memory.total"
    rows = answer("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    found = []
    for row in (rows or "").splitlines():
        name, driver, memory = (part.strip() for part in row.split(","))
        size = int(memory) << 20 if memory.isdigit() else None
        found.append({"name": name, "driver": driver, "memory_bytes": size})
    return found


def answer(*command: str) -> str | None:
    """Output of a short command; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip() if done.returncode == 0 else None
