"""Perplexity over overlapping windows: every token but the first few sees a long context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from backend import data
from backend.metrics import METRICS
from backend.metrics.base import Measurement
from backend.metrics.perplexity import exp, standard_error
from backend.metrics.text import TextMetric, scored_nll

if TYPE_CHECKING:
    from backend.run import Run


@METRICS.register
class SlidingPerplexity(TextMetric):
    """Perplexity of windows that overlap, the last `stride` tokens of each scored; lower is better.

    Window k covers tokens [k s, k s + S); the first is scored whole. s = S gives the perplexity of
    non-overlapping windows exactly; a smaller s gives lower values at S / s times the work, so the
    two have different names and never share an axis (Hugging Face's protocol).
    """

    kind: ClassVar[str] = "sliding_perplexity"
    yields: ClassVar[tuple[str, ...]] = ("sliding_perplexity",)

    stride: int = Field(
        256, ge=1, le=131072, description="Tokens from one window to the next, all of them scored."
    )

    def _windows(self, run: Run) -> Tensor:
        if data.drawn(self.dataset):
            raise ValueError(
                f"{self.kind} needs one continuous text; {self.dataset} is a collection of "
                "documents, for which there is perplexity"
            )
        if self.stride > self.window:
            raise ValueError(
                f"{self.kind}: a stride of {self.stride} would skip tokens between windows of "
                f"{self.window}; use at most {self.window}"
            )
        text = run.tokens(self.dataset, 0, self.stride).flatten()  # one window is checked before
        found = text.unfold(0, self.window, self.stride)
        return self._with_bos(run, found[: self.limit or None])

    def measure(self, run: Run) -> Iterator[Measurement]:
        nll = torch.cat([scored_nll(run, batch) for batch in self.batches(run)])  # [N, S - 1]
        yield sliding(nll, self.stride, {"dataset": self.dataset, "bos": self.bos})


def sliding(nll: Tensor, stride: int, detail: dict[str, object]) -> Measurement:
    """nll [windows, S - 1] of whole windows in nats, fp64 -> the measurement over scored tokens."""
    scored = [nll[0], *nll[1:, -stride:]]
    tokens = torch.cat(scored)
    means = torch.stack([window.mean() for window in scored])
    mean, stderr = float(tokens.mean()), standard_error(means)
    value = exp(mean)
    return Measurement(
        "sliding_perplexity",
        value,
        "",
        "lower",
        n=len(tokens),
        stderr=None if stderr is None else value * stderr,
        items=means.tolist(),
        detail={
            **detail,
            "window": nll.shape[1] + 1,
            "stride": stride,
            "windows": len(nll),
            "mean_nll": mean,
            "mean_nll_stderr": stderr,
            "nonfinite": int((~tokens.isfinite()).sum()),
        },
    )
