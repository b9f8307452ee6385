"""What the values of a block looked like before and after: small summaries kept beside a run.

Of every linear: its weights as they stood when the walk reached the block ("before") and after all
steps ("after"), and its inputs on the walk's sample tokens, before they are rounded, in the
untouched block and in the finished one. The forward passes are those of `block_sqnr`.

A file per block, `<folder>/000.safetensors`, written whole before the block's checkpoint: whoever
finds a finished block finds its statistics, also after a kill. Tensors are named
"<what>/<module>/<moment>/<part>"; the metadata holds the numbers and who shares inputs with whom.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from backend.metrics.base import Measurement
from backend.model.families import Block

BINS = 129  # of a histogram; odd, so that zero is the middle of a bin
CHANNELS = 256  # at most so many channel maxima are kept; more are max-pooled
TOKENS = 64  # of the token x channel surface
TOKENS_SEEN = 256  # of the walk's sample, for everything else about inputs
VALUES = 1 << 20  # at most about so many of a matrix go into its histogram and kurtosis
HEADER = "statistics"  # metadata key

Moment = Literal["before", "after"]
What = Literal["weights", "inputs"]
MOMENTS: tuple[Moment, ...] = ("before", "after")
WHATS: tuple[What, ...] = ("weights", "inputs")


@dataclass(frozen=True)
class Summary:
    """What is kept of a matrix [rows, K], a channel being a column."""

    numbers: Mapping[str, float]  # channels, pool, values, reach, std, kurtosis, not_finite
    peaks: Any  # [<= CHANNELS] largest magnitude per channel, or per `pool` channels
    counts: Any  # [BINS] of values, over -reach .. reach
    surface: Any = None  # [<= TOKENS, <= CHANNELS] magnitudes of the first rows


@torch.no_grad()
def summarize(matrix: Tensor, tokens: int = 0) -> Summary:
    """matrix [rows, K] -> its summary; with `tokens` also the surface of so many rows."""
    rows, k = matrix.shape
    pool = -(-k // CHANNELS)
    sample = matrix[:: max(1, rows * k // VALUES)].float()  # whole rows, evenly spread
    finite = sample.isfinite()
    sample = sample.where(finite, 0)
    reach = float(sample.abs().max())
    std, kurtosis = spread(sample)
    numbers = {
        "channels": k,
        "pool": pool,
        "values": sample.numel(),
        "reach": reach,
        "std": std,
        "kurtosis": kurtosis,
        "not_finite": int((~finite).sum()),
    }
    counts = torch.histc(sample, BINS, -reach, reach) if reach else at_zero(sample)
    peaks = pooled(matrix.abs().amax(0, keepdim=True).float(), pool)[0]
    surface = pooled(matrix[:tokens].abs().float(), pool) if tokens else None
    return Summary(numbers, peaks, counts, surface)


def spread(sample: Tensor) -> tuple[float, float]:
    """Standard deviation and excess kurtosis, E[(x - m)^4] / std^4 - 3: 0 for a normal, nan at 0.

    Divided by the largest magnitude first: fourth powers of large activations overflow fp32.
    """
    scale = float(sample.abs().max()) or 1.0
    x = sample / scale
    squared = (x - x.mean(dtype=torch.float64).float()).square_()
    variance = float(squared.mean(dtype=torch.float64))
    fourth = float(squared.square_().mean(dtype=torch.float64))
    return scale * variance**0.5, fourth / variance**2 - 3 if variance else float("nan")


def at_zero(sample: Tensor) -> Tensor:
    """The histogram of a matrix of zeros [BINS]."""
    counts = torch.zeros(BINS)
    counts[BINS // 2] = sample.numel()
    return counts


def pooled(magnitudes: Tensor, pool: int) -> Tensor:
    """Largest of every `pool` neighbouring channels, [rows, K] -> [rows, ceil(K / pool)]."""
    missing = -magnitudes.shape[1] % pool
    return functional.pad(magnitudes, (0, missing)).unflatten(1, (-1, pool)).amax(-1)


class BlockStatistics:
    """Fills up while one block is walked; without a folder nothing is gathered."""

    def __init__(self, block: Block, folder: Path | None) -> None:
        self.block = block
        self.folder = folder
        self.found: dict[tuple[What, str, Moment], Summary] = {}
        self.leader: dict[str, str] = {}  # linear -> the first one that received its tensor
        self._last: tuple[str, Tensor] | None = None

    def linears(self) -> list[str]:
        """The linears whose inputs are wanted."""
        return list(self.block.linears()) if self.folder else []

    def weights(self, moment: Moment) -> None:
        """Weights of every linear as they stand now."""
        for name in self.linears():
            weight = getattr(self.block.get(name), "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:
                self.found["weights", name, moment] = summarize(weight)

    def see(self, moment: Moment) -> Callable[[str, Tensor], None]:
        """What to call with the name and the inputs of a linear; only its first inputs count."""

        def keep(name: str, x: Tensor) -> None:
            if self.of("inputs", name, moment):
                return
            if self._last and self._last[1] is x:
                self.leader[name] = self._last[0]
                return
            self.leader[name], self._last = name, (name, x)
            rows = x.reshape(-1, x.shape[-1])[:TOKENS_SEEN]
            self.found["inputs", name, moment] = summarize(rows, TOKENS)

        return keep

    def of(self, what: What, name: str, moment: Moment) -> Summary | None:
        """One summary; linears that share an input share its summary."""
        owner = self.leader.get(name, name) if what == "inputs" else name
        return self.found.get((what, owner, moment))

    def measurements(self) -> Iterator[Measurement]:
        """Excess kurtosis of weights and inputs: what makes a matrix hard to round."""
        for name in self.linears():
            for what, moment in product(WHATS, MOMENTS):
                if summary := self.of(what, name, moment):
                    kind = f"{what.removesuffix('s')}_kurtosis_{moment}"
                    value, n = summary.numbers["kurtosis"], int(summary.numbers["values"])
                    layer = (self.block.index, name)
                    yield Measurement(kind, value, "", "lower", n=n, layer=layer)

    def save(self) -> None:
        """Write .part, then rename."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"modules": self.linears(), "inputs_of": self.leader}
        found = {"/".join(key): summary for key, summary in self.found.items()}
        write(path_of(self.folder, self.block.index), found, about)


def write(target: Path, found: Mapping[str, Summary], about: Mapping[str, Any]) -> None:
    """Summaries under their names, and what else is known, as one file: .part, then renamed."""
    numbers = {name: dict(summary.numbers) for name, summary in found.items()}
    header = json.dumps({**about, "numbers": numbers})
    part = target.with_suffix(".part")
    part.write_bytes(save(tensors_of(found), metadata={HEADER: header}))
    part.replace(target)


def tensors_of(found: Mapping[str, Summary]) -> dict[str, Tensor]:
    """The arrays of summaries, each under its summary's name."""
    tensors: dict[str, Tensor] = {}
    for name, summary in found.items():
        tensors[f"{name}/peaks"] = summary.peaks.float()
        tensors[f"{name}/counts"] = summary.counts.to(torch.int32)
        if summary.surface is not None:  # fp16 of shares: magnitudes may be over 65,504
            top = summary.surface.amax().clamp_min(torch.finfo(torch.float32).tiny)
            tensors[f"{name}/surface"] = (summary.surface / top).half()
            tensors[f"{name}/top"] = top.reshape(1)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


# ---- reading -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """One linear's statistics: {(what, moment): summary}, arrays in numpy."""

    block: int
    module: str
    summaries: Mapping[tuple[What, Moment], Summary]


def path_of(folder: Path, block: int) -> Path:
    """File of one block."""
    return folder / f"{block:03d}.safetensors"


def blocks_in(folder: Path) -> list[int]:
    """Blocks that have statistics, in order."""
    return sorted(int(path.stem) for path in folder.glob("[0-9]*.safetensors"))


def modules_in(folder: Path, block: int) -> list[str]:
    """Linears of a block; [] where its file is absent or cannot be read."""
    try:
        with safe_open(path_of(folder, block), framework="np") as file:
            return list(json.loads(file.metadata()[HEADER])["modules"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return []


def read(folder: Path, block: int, module: str) -> Linear | None:
    """Statistics of one linear; None where there are none or they cannot be read."""
    try:
        with safe_open(path_of(folder, block), framework="np") as file:
            header = json.loads(file.metadata()[HEADER])
            found = dict(_summaries(file, header, module))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return Linear(block, module, found) if found else None


def _summaries(
    file: Any, header: Mapping[str, Any], module: str
) -> Iterator[tuple[tuple[What, Moment], Summary]]:
    for what, moment in product(WHATS, MOMENTS):
        owner = header["inputs_of"].get(module, module) if what == "inputs" else module
        key = f"{what}/{owner}/{moment}"
        if key in header["numbers"]:
            yield (what, moment), summary_in(file, header, key)


def summary_in(file: Any, header: Mapping[str, Any], name: str) -> Summary:
    """One summary of an open file."""
    surface = None
    if f"{name}/surface" in set(file.keys()):
        top = file.get_tensor(f"{name}/top")[0]
        surface = file.get_tensor(f"{name}/surface").astype(np.float32) * top
    peaks, counts = (file.get_tensor(f"{name}/{part}") for part in ("peaks", "counts"))
    return Summary(header["numbers"][name], peaks, counts, surface)
