"""What calibration gathers at the input of a linear, batch by batch, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor


class Stat:
    """A running statistic over the inputs x [tokens, K] of one linear."""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.k = k
        self.device = torch.device(device)

    def update(self, x: Tensor) -> None:
        """Take in one batch [B, T, K] or [T, K]."""
        raise NotImplementedError(f"{type(self).__name__} gathers nothing")


class AbsMax(Stat):
    """Per-channel extremes: `low`, `high` [K] and `peak` [K], the largest magnitude."""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        super().__init__(k, device)
        self.low = torch.full((k,), torch.inf, device=self.device)
        self.high = torch.full((k,), -torch.inf, device=self.device)

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, self.k).float()
        self.low = torch.minimum(self.low, rows.amin(0).to(self.device))
        self.high = torch.maximum(self.high, rows.amax(0).to(self.device))

    @property
    def peak(self) -> Tensor:
        """[K] fp32, 0 where nothing was seen."""
        return torch.maximum(self.low.abs(), self.high.abs()).nan_to_num(0, 0, 0)


class Hessian(Stat):
    """H = (2 / n) sum x x^T over n batches' sequences, `matrix` [K, K] fp32 (GPTQ, section 3)."""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        super().__init__(k, device)
        self.matrix = torch.zeros(k, k, device=self.device)
        self.sequences = 0
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        batch = x.shape[0] if x.dim() == 3 else 1
        rows = x.reshape(-1, self.k).float().to(self.device)
        self.matrix *= self.sequences / (self.sequences + batch)
        self.sequences += batch
        self.tokens += rows.shape[0]
        rows = rows * (2 / self.sequences) ** 0.5
        self.matrix += rows.T @ rows


class TokenSample(Stat):
    """The first `limit` input rows as they came, `rows` [<= limit, K] fp32."""

    limit = 512

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        super().__init__(k, device)
        self.rows = torch.empty(0, k, device=self.device)

    def update(self, x: Tensor) -> None:
        room = self.limit - self.rows.shape[0]
        if room > 0:
            fresh = x.reshape(-1, self.k)[:room].float().to(self.device)
            self.rows = torch.cat([self.rows, fresh])


class SpreadSample(Stat):
    """Input rows spread evenly over all that came: `limit` of them, or up to twice that.

    Every `stride`-th row is kept; the stride doubles whenever more than 2 limit are held.
    """

    limit = 512

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        super().__init__(k, device)
        self.rows = torch.empty(0, k, device=self.device)
        self.stride = 1
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, self.k)
        fresh = rows[-self.tokens % self.stride :: self.stride].float().to(self.device)
        self.tokens += len(rows)
        self.rows = torch.cat([self.rows, fresh])
        while len(self.rows) >= 2 * self.limit:
            self.rows = self.rows[::2].clone()
            self.stride *= 2


S = TypeVar("S", bound=Stat)


class LayerStats:
    """The statistics of one linear, by class, and a place for notes: stats[Hessian].matrix."""

    def __init__(
        self,
        stats: Mapping[type[Stat], Stat] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._stats = dict(stats or {})
        self.note: Callable[[str], None] = note or (lambda text: None)

    def __getitem__(self, kind: type[S]) -> S:
        if kind not in self._stats:
            raise ValueError(f"this step needs calibration inputs ({kind.__name__}); none given")
        return self._stats[kind]  # type: ignore[return-value]

    def __contains__(self, kind: type[Stat]) -> bool:
        return kind in self._stats

    def update(self, x: Tensor) -> None:
        """Feed one batch to every statistic."""
        for stat in self._stats.values():
            stat.update(x)


def gather_layer(
    needs: Iterable[type[Stat]], batches: Iterable[Tensor], k: int, note: Callable[[str], None]
) -> LayerStats:
    """Statistics of one linear from its input batches, each [B, T, K] or [T, K]."""
    stats = LayerStats({need: need(k) for need in needs}, note)
    for batch in batches:
        stats.update(batch)
    return stats
