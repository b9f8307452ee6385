"""Imported by a warm process: real work, that waits once after its first block to be killed."""

from __future__ import annotations

import time
from typing import Any

from backend.model.checkpoint import Checkpoint

save = Checkpoint.save


def save_and_wait(self: Checkpoint, block: Any) -> None:
    save(self, block)
    mark = self.folder.parent / "acted"
    if "wait" in str(self.folder.parent.parent.parent) and not mark.exists():
        mark.touch()
        time.sleep(3600)


Checkpoint.save = save_and_wait  # type: ignore[method-assign]
