"""Memory that products reuse: one buffer per device and purpose, grown and never given back.

A captured CUDA graph keeps the addresses it saw, so a buffer that grows leaves its old memory
alive. Products on one device therefore run one after another, in one stream at a time.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Workspaces(threading.local):
    """Buffers of one thread; models in other threads have their own."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype, torch.device], list[Tensor]] = {}

    def take(self, purpose: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[count] elements, left as they are by the last product; zeros when new."""
        grown = self.held.setdefault((purpose, dtype, device), [])
        if not grown or grown[-1].numel() < count:
            with torch.inference_mode(False):  # else it could be written to within that mode alone
                grown.append(torch.zeros(count, dtype=dtype, device=device))
            if device.type == "cpu":
                del grown[:-1]  # no graph remembers it
        return grown[-1][:count]


WORKSPACES = Workspaces()
