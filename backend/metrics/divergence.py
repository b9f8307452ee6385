"""How far the quantized model's predictions are from the 16-bit model's, token by token.

Definitions and uncertainties are those of llama.cpp's `perplexity --kl-divergence`, but exact:
no 16-bit storage and no cut at 16 nats, so no negative divergences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from backend.metrics import METRICS
from backend.metrics.base import Better, Measurement
from backend.metrics.perplexity import exp
from backend.metrics.text import TextMetric, nll_key, picked, row_chunks

if TYPE_CHECKING:
    from backend.run import Run

Array = NDArray[np.float64]
LEAST_TOKENS = 100  # llama.cpp prints no statistics below this
KLD_QUANTILES = (99.9, 99, 95, 90, 10, 5, 1, 0.1)
DP_QUANTILES = (99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1)
HEADLINES: dict[str, tuple[str, Better]] = {  # name -> unit, better
    "mean_kld": ("nats", "lower"),
    "median_kld": ("nats", "lower"),
    "kld_p99": ("nats", "lower"),
    "same_top": ("share", "higher"),
    "rms_dp": ("share", "lower"),
    "ppl_ratio": ("ratio", "lower"),
}


@dataclass(frozen=True)
class TokenScores:
    """Per scored token [n], fp64: all that the statistics need of two logit rows."""

    nll: Tensor  # -ln Q(y), quantized
    nll_base: Tensor  # -ln P(y), 16 bit
    kld: Tensor  # KL(P || Q) in nats
    dp: Tensor  # Q(y) - P(y)
    same: Tensor  # 1 where both would say the same token

    @staticmethod
    def join(parts: list[TokenScores]) -> TokenScores:
        """One after the other."""
        names = [f.name for f in fields(TokenScores)]
        return TokenScores(*(torch.cat([getattr(p, name) for p in parts]) for name in names))


@METRICS.register
class Divergence(TextMetric):
    """Divergence of the next-token distribution from the 16-bit model's on the same text.

    Reacts to damage long before task accuracy does. Yields the mean, median and 99th percentile
    of KL(16-bit || quantized), how often both prefer the same token, the root mean square change
    of the right token's probability, and the paired perplexity ratio.
    """

    kind: ClassVar[str] = "divergence"
    needs_baseline: ClassVar[bool] = True
    yields: ClassVar[tuple[str, ...]] = tuple(HEADLINES)
    limit: int = Field(32, ge=0, description="Windows measured; 0 is all of them.")

    def measure(self, run: Run) -> Iterator[Measurement]:
        baseline = run.baseline()
        parts, windows = [], []
        for batch in self.batches(run):
            scores = batch_scores(run, batch, baseline.logits(batch))
            parts.append(scores)
            windows += scores.kld.view(len(batch), -1).mean(1).tolist()
        scores = TokenScores.join(parts)
        detail = {"dataset": self.dataset, "bos": self.bos, "baseline": baseline.how}
        yield from measurements(scores, windows, detail)


def batch_scores(run: Run, ids: Tensor, base: Tensor) -> TokenScores:
    """One batch ids [B, T] against the baseline's logits [B, T, V]; on the CPU."""
    logits = run.logits(ids)  # [B, T, V]
    if logits.shape != base.shape:
        raise ValueError(
            f"divergence: the run predicts {logits.shape[-1]} tokens and its 16-bit model "
            f"{base.shape[-1]}; they need one vocabulary"
        )
    base, logits = (z[:, :-1].flatten(0, 1) for z in (base, logits))
    scores = compare(base, logits, ids[:, 1:].flatten())
    run.once(nll_key(run, ids), lambda: scores.nll)  # perplexity on these windows has its numbers
    return scores


def compare(base_logits: Tensor, quant_logits: Tensor, targets: Tensor) -> TokenScores:
    """Logits (or log-probabilities) [n, V] of both models, targets [n] -> scores on the CPU.

    fp32 inside, row chunks, so that no second [n, V] is ever made.
    """
    parts = []
    targets = targets.to(quant_logits.device)
    for rows in row_chunks(*quant_logits.shape):
        z, y = quant_logits[rows], targets[rows]
        parts.append(compare_rows(base_logits[rows].to(z.device).float(), z.float(), y))
    return TokenScores.join(parts)


def compare_rows(base: Tensor, quant: Tensor, targets: Tensor) -> TokenScores:
    """One chunk of fp32 rows; see compare."""
    log_p, log_q = base.log_softmax(1), quant.log_softmax(1)  # [c, V]
    kld = divergence_terms(log_p, log_q).sum(1, dtype=torch.float64).clamp_min(0)
    broken = base.isnan().any(1) | quant.isnan().any(1)
    nll, nll_base = picked(log_q, targets), picked(log_p, targets)
    dp = torch.exp(-nll) - torch.exp(-nll_base)
    same = (quant.argmax(1) == base.argmax(1)).double()
    same = torch.where(broken, torch.nan, same)
    kld = torch.where(broken, torch.nan, kld)
    return TokenScores(*(x.cpu() for x in (nll, nll_base, kld, dp, same)))


def divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """What each token [c, V] adds to KL(P || Q), none below 0.

    P (ln P - ln Q) + Q - P: the added Q - P sums to 0, and makes every term about P d^2 / 2 for a
    small difference d. Summing P d alone leaves 1e-7 of rounding, more than an 8-bit model's KLD.
    """
    p, d = log_p.exp(), log_p - log_q
    # P(v) = 0 adds no P d, also where Q(v) = 0 and the difference is inf - inf.
    large = torch.where(p > 0, p * d, 0.0) + (log_q.exp() - p)
    return torch.where(d.abs() < 1, p * (d + torch.expm1(-d)), large)


def divergence(base_logits: Tensor, quant_logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Statistics over n tokens: logits [n, V] of the 16-bit and the quantized model, targets [n].

    Shares are fractions, divergences nats; `<name>_err` is the uncertainty of `<name>`.
    """
    if base_logits.shape != quant_logits.shape or base_logits.shape[:1] != targets.shape:
        raise ValueError(
            f"divergence: logits {list(base_logits.shape)} and {list(quant_logits.shape)} with "
            f"targets {list(targets.shape)}; both logits are [n, V] and targets [n]"
        )
    if not len(targets):
        raise ValueError("divergence: no tokens to compare")
    return statistics(compare(base_logits, quant_logits, targets))


def statistics(scores: TokenScores) -> dict[str, float]:
    """Table 2.2 of the protocol: values, uncertainties and quantiles."""
    nll, base, kld, dp, same = (getattr(scores, f.name).numpy() for f in fields(scores))
    return {
        **perplexities(nll, base),
        "mean_kld": float(kld.mean()),
        "mean_kld_err": uncertainty(kld),
        "max_kld": float(kld.max()),
        "min_kld": float(kld.min()),
        "median_kld": quantile(kld, 50),
        **{percent("kld", q): quantile(kld, q) for q in KLD_QUANTILES},
        "mean_dp": float(dp.mean()),
        "mean_dp_err": uncertainty(dp),
        "rms_dp": (rms := float(np.sqrt(np.square(dp).mean()))),
        "rms_dp_err": 0.5 / rms * uncertainty(np.square(dp)) if rms else 0.0,
        "max_dp": float(dp.max()),
        "min_dp": float(dp.min()),
        **{percent("dp", q): quantile(dp, q) for q in DP_QUANTILES},
        "same_top": (share := float(same.mean())),
        "same_top_err": math.sqrt(max(share * (1 - share), 0) / max(len(same) - 1, 1)),
    }


def perplexities(nll: Array, base: Array) -> dict[str, float]:
    """Both perplexities and their paired ratio, difference and correlation.

    The uncertainty of ln(ratio) is that of the paired differences, which equals
    sqrt(u(nll)^2 + u(base)^2 - 2 cov) without its cancellation.
    """
    with np.errstate(invalid="ignore"):  # inf - inf of a broken model is nan and stays so
        difference = nll - base
        quant_ppl, base_ppl = exp(float(nll.mean())), exp(float(base.mean()))
        ln_ratio = float(difference.mean())
        return {
            "perplexity": quant_ppl,
            "perplexity_err": quant_ppl * uncertainty(nll),
            "perplexity_base": base_ppl,
            "perplexity_base_err": base_ppl * uncertainty(base),
            "correlation": correlation(nll, base),
            "ln_ppl_ratio": ln_ratio,
            "ln_ppl_ratio_err": (spread := uncertainty(difference)),
            "ppl_ratio": exp(ln_ratio),
            "ppl_ratio_err": exp(ln_ratio) * spread,
            "ppl_difference": quant_ppl - base_ppl,
            "ppl_difference_err": uncertainty(quant_ppl * nll - base_ppl * base),
        }


def uncertainty(x: Array, least: int = 10) -> float:
    """Standard error of the mean of x [n]; 0 for n <= `least` (llama.cpp)."""
    if len(x) <= max(least, 1):
        return 0.0
    with np.errstate(invalid="ignore"):
        return math.sqrt(np.square(x - x.mean()).mean() / (len(x) - 1))


def correlation(nll: Array, base: Array) -> float:
    """Of ln PPL of both; 1 for equal inputs, nan where one does not vary."""
    if np.array_equal(nll, base):
        return 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = nll - nll.mean(), base - base.mean()
        return float((a * b).mean() / np.sqrt(np.square(a).mean() * np.square(b).mean()))


def quantile(x: Array, q: float) -> float:
    """Linear interpolation at q/100 (n - 1)."""
    with np.errstate(invalid="ignore"):
        return float(np.percentile(x, q))


def percent(name: str, q: float) -> str:
    """("kld", 99.9) -> kld_p99_9."""
    return f"{name}_p{q:g}".replace(".", "_")


def measurements(
    scores: TokenScores, windows: list[float], detail: Mapping[str, Any]
) -> Iterator[Measurement]:
    """The headline numbers; every other statistic is in the detail of mean_kld."""
    n = len(scores.kld)
    found = statistics(scores)
    broken = int((~scores.kld.isfinite()).sum())
    enough = n >= LEAST_TOKENS
    why = {} if enough else {"reason": f"{n} tokens scored, statistics need {LEAST_TOKENS}"}
    common = {**detail, "windows": len(windows), "nonfinite": broken, **why}
    for name, (unit, better) in HEADLINES.items():
        first = name == "mean_kld"
        yield Measurement(
            name,
            found[name] if enough else None,
            unit,
            better,
            n=n,
            stderr=found.get(f"{name}_err") if enough else None,
            items=windows if first else None,
            detail={**common, "statistics": found} if first and enough else common,
        )
