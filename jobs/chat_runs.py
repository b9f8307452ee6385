"""What can be chatted with: finished runs, and the memory that each needs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from jobs import folders
from jobs.events import State, state_of

HEX = re.compile(r"[0-9a-f]{6,64}")
# Of one process beside its weights, what it shares with the warm process left out.
OWN_BYTES = 150 << 20
CODE_BYTES = 1  # of one weight's code, until a kernel has packed it
BUDGET_SHARE = 0.5  # of the memory that is free, unless the user says how much


@dataclass(frozen=True)
class ChatRun:
    """A finished run, as its folder describes it."""

    run_id: str
    folder: Path
    artifact_id: str
    model: dict[str, Any]  # id, revision, dtype, content
    is_baseline: bool


def find_run(home: Path, run_id: str) -> ChatRun:
    """The run. ValueError in one sentence if there is none or it is not done."""
    folder = folders.folder_of(home, run_id)
    state = state_of(folder)
    if state is not State.DONE:
        raise ValueError(f"run {run_id} is {state}; only a finished run can answer")
    try:
        job = json.loads((folder / folders.JOB).read_text(encoding="utf-8"))
        spec = json.loads((folder / folders.SPEC).read_text(encoding="utf-8"))
        artifact_id, model = str(job["artifact_id"]), dict(spec["model"])
        steps, kind = spec.get("steps", ()), spec.get("kind", "run")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"the files of run {run_id} cannot be read") from None
    if kind != "run" or not HEX.fullmatch(artifact_id):
        raise ValueError(f"run {run_id} made no model, so there is nothing to chat with")
    return ChatRun(run_id, folder, artifact_id, model, not steps)


@dataclass(frozen=True)
class Need:
    """Bytes one process takes at its peak, while it loads."""

    packed: int
    simulated: int  # where a linear has no kernel; the same for the 16-bit model


def needed(run: ChatRun, device: str, dtype: str = "") -> Need:
    """From the headers of the model's files. ValueError if they cannot be read."""
    from backend.model.identity import folder_of, read_headers
    from backend.spec import ModelRef

    weights = read_headers(folder_of(ModelRef.model_validate(run.model))).shapes.values()
    count = sum(map(math.prod, weights))
    wide = 2 if device.startswith("cuda") else 4  # what simulated models compute in
    if run.is_baseline:
        peak = OWN_BYTES + count * (4 if dtype == "float32" else 2)
        return Need(peak, peak)
    return Need(OWN_BYTES + count * (2 + CODE_BYTES), OWN_BYTES + count * (wide + CODE_BYTES))


def budget(device: str) -> int:
    """Half of the memory that is free here, or of the GPU's."""
    if device.startswith("cuda"):
        from backend.environment import gpus

        return round(BUDGET_SHARE * max((card["memory_bytes"] or 0 for card in gpus()), default=0))
    from backend.estimate import main_memory

    free = min(int(psutil.virtual_memory().available), main_memory())
    return round(BUDGET_SHARE * free)


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB"
