"""The 16-bit model's predictions on the same tokens: computed side by side, or read from disk."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from backend.registry import short_hash

FREE_SHARE = 0.8  # of the free memory: the rest is for activations and logits
SPARE_DISK_BYTES = 1 << 30  # left free when log-probabilities are written
LOWEST_FP16 = -6.0e4


class Baseline(Protocol):
    """What a metric compares with."""

    how: str  # stored with the result

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> logits, or what differs from them by a constant per token, [B, T, V]."""
        ...

    def log_probs(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> ln p of every next token [B, T, V], fp32."""
        return self.logits(ids).float().log_softmax(-1)


class LiveBaseline(Baseline):
    """The 16-bit model in the same process, window by window: exact."""

    def __init__(self, logits: Callable[[Tensor], Tensor], how: str) -> None:
        self._logits = logits
        self.how = how

    def logits(self, ids: Tensor) -> Tensor:
        return self._logits(ids)


class StoredBaseline(Baseline):
    """Log-probabilities written once in fp16, one file per window, named by its tokens' hash."""

    how = "stored in fp16"

    def __init__(self, folder: Path, hash_of: Callable[[Tensor], str]) -> None:
        self.folder = folder
        self.hash_of = hash_of

    def file(self, window: Tensor) -> Path:
        """Where a window's [T, V] lies. window [T]."""
        return self.folder / f"{self.hash_of(window)}.npy"

    def logits(self, ids: Tensor) -> Tensor:
        return torch.stack([self._read(self.file(window)) for window in ids])

    def _read(self, file: Path) -> Tensor:
        if not file.is_file():
            raise ValueError(
                f"the 16-bit model does not fit beside the quantized one, and {file.name} of its "
                f"stored predictions is missing in {self.folder}; retry the run to write it again"
            )
        return torch.from_numpy(np.load(file)).float()

    def missing(self, ids: Tensor) -> Tensor:
        """The windows [m, T] among ids [n, T] that are not on disk."""
        return ids[[not self.file(window).is_file() for window in ids]]

    def write(self, ids: Tensor, log_probs: Tensor) -> None:
        """One batch: ids [B, T], log_probs [B, T, V]."""
        for window, rows in zip(ids, log_probs, strict=True):
            part = self.file(window).with_suffix(".part")
            with part.open("wb") as out:
                np.save(out, rows.clamp_min(LOWEST_FP16).half().cpu().numpy())
                out.flush()
                os.fsync(out.fileno())
            part.replace(self.file(window))


def trace_folder(home: Path, content: str, device: str, dtype: str) -> Path:
    """One folder per model, kind of device and compute dtype: their numbers differ."""
    return home / "baselines" / f"{content}-{short_hash([device.split(':')[0], dtype])}"


def check_disk(folder: Path, windows: int, length: int, vocabulary: int) -> None:
    """ValueError with the numbers unless fp16 log-probabilities of the windows fit on disk."""
    needed = windows * length * vocabulary * 2
    free = shutil.disk_usage(folder).free
    if needed + SPARE_DISK_BYTES > free:
        raise ValueError(
            f"divergence: the 16-bit model's log-probabilities of {windows} windows take "
            f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; measure fewer windows (limit)"
        )


@contextmanager
def locked(folder: Path, waiting: Callable[[], None], poll_s: float = 0.2) -> Iterator[None]:
    """Only one process writes a folder; `waiting` is called between tries and may raise."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(poll_s)
        yield


def free_bytes(device: str) -> int:
    """Memory a process may still take on this device."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return int(psutil.virtual_memory().available)


def fits(weight_bytes: int, copies: int, device: str) -> bool:
    """True if `copies` of a model of this size fit on the device now."""
    return copies * weight_bytes <= FREE_SHARE * free_bytes(device)
