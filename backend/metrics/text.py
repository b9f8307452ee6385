"""What perplexity and divergence share: windows of text, scored token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from backend.metrics.base import Metric

if TYPE_CHECKING:
    from backend.run import Run

CHUNK_ELEMENTS = 1 << 18  # logits of one row chunk: 1 MiB of fp32 stays in a core's cache


class TextMetric(Metric):
    """A metric over non-overlapping windows of one text; the first token of each is not scored."""

    dataset: str = Field("auto", description="demo, wikitext2, c4 or file:PATH; auto chooses.")
    window: int = Field(
        0, ge=0, le=131072, description="Tokens per window; 0 is the context, at most 2048."
    )
    limit: int = Field(0, ge=0, description="Windows measured; 0 is all of them.")
    bos: Literal["as_is", "each_window"] = Field(
        "as_is",
        description="each_window replaces every window's first token by BOS (Gemma needs it).",
    )

    def windows(self, run: Run) -> Tensor:
        """[n, window] token ids."""
        return run.once(f"windows {self.data()}", lambda: self._windows(run))

    def _windows(self, run: Run) -> Tensor:
        return self._with_bos(run, run.tokens(self.dataset, self.limit, self.window))

    def _with_bos(self, run: Run, ids: Tensor) -> Tensor:
        """Windows [n, window] as `bos` wants them to begin."""
        if self.bos == "each_window":
            bos = run.tokenizer.bos_token_id
            if bos is None:
                raise ValueError(f"{self.kind}: bos='each_window', but this tokenizer has no BOS")
            ids = ids.clone()
            ids[:, 0] = bos
        return ids

    def data_hash(self, run: Run) -> str:
        return run.hash(self.windows(run))

    def batches(self, run: Run) -> Iterator[Tensor]:
        """The windows in batches [B, window], telling the run how far it is."""
        ids = self.windows(run)
        for start in range(0, len(ids), size := run.batch_size(ids.shape[1])):
            run.progress(start, len(ids), f"window {start + 1} of {len(ids)}")
            yield ids[start : start + size]


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows so that a chunk [rows, columns] fits a core's cache."""
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of each target in nats. logits [n, V] of any dtype, targets [n] -> [n] fp64.

    fp32 inside whatever the model computes in: bf16 keeps 3 significant digits of a logit.
    """
    parts = [
        picked(logits[rows].float().log_softmax(1), targets[rows])
        for rows in row_chunks(*logits.shape)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def picked(log_probs: Tensor, targets: Tensor) -> Tensor:
    """NLL of the targets: log_probs [n, V], targets [n] -> [n] fp64."""
    return -log_probs.gather(1, targets[:, None]).squeeze(1).double()


def scored_nll(run: Run, ids: Tensor) -> Tensor:
    """NLL of every token of a batch that has one before it: ids [B, T] -> [B, T - 1] fp64, CPU.

    Kept by the run, so that metrics on the same windows run the model once; small, unlike logits.
    """

    def score() -> Tensor:
        logits = run.logits(ids)[:, :-1].flatten(0, 1)  # [B (T - 1), V]
        return token_nll(logits, ids[:, 1:].flatten().to(logits.device)).cpu()

    return run.once(nll_key(run, ids), score).view(len(ids), -1)


def nll_key(run: Run, ids: Tensor) -> str:
    """Under which a run keeps the NLL of a batch."""
    return f"nll {run.hash(ids)}"
