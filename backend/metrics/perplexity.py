"""Perplexity as GPTQ's authors measure it: non-overlapping windows, no cache between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from backend.metrics import METRICS
from backend.metrics.base import Measurement
from backend.metrics.text import TextMetric, scored_nll

if TYPE_CHECKING:
    from backend.run import Run


@METRICS.register
class Perplexity(TextMetric):
    """exp of the mean negative log-likelihood per token of a held-out text; lower is better.

    The text is tokenized once as one string and cut into windows; each is one forward pass, its
    first token is not scored, the tail is dropped, and all windows weigh the same.
    """

    kind: ClassVar[str] = "perplexity"
    yields: ClassVar[tuple[str, ...]] = ("perplexity",)

    def measure(self, run: Run) -> Iterator[Measurement]:
        nll = torch.cat([scored_nll(run, batch) for batch in self.batches(run)])  # [N, S - 1]
        yield perplexity(nll, {"dataset": self.dataset, "bos": self.bos})


def perplexity(nll: Tensor, detail: dict[str, object]) -> Measurement:
    """nll [windows, scored tokens] in nats, fp64 -> the measurement with its uncertainty."""
    means = nll.mean(1)  # [N]
    mean, stderr = float(means.mean()), standard_error(means)
    value = exp(mean)
    return Measurement(
        "perplexity",
        value,
        "",
        "lower",
        n=nll.numel(),
        stderr=None if stderr is None else value * stderr,
        items=means.tolist(),
        detail={
            **detail,
            "window": nll.shape[1] + 1,
            "windows": len(nll),
            "mean_nll": mean,
            "mean_nll_stderr": stderr,
            "nonfinite": int((~nll.isfinite()).sum()),
        },
    )


def standard_error(means: Tensor) -> float | None:
    """Standard error of the mean of window means [N]; None where one window shows no spread.

    Over windows, not tokens: the tokens of one window are correlated, and the token-level formula
    would call the mean more certain than it is.
    """
    return float(means.std(unbiased=True)) / math.sqrt(len(means)) if len(means) > 1 else None


def exp(x: float) -> float:
    """e^x, inf where a float cannot hold it."""
    return math.inf if x > 709 else math.exp(x)
