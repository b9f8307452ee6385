"""What keys and values look like: which channels stand out, before and after rotary positions.

Of every block, on a few hundred tokens of the bundled text, as attention makes them and before a
cache rounds them: their largest magnitude per channel, histogram and kurtosis. One small file for
all blocks, `<run>/kv_statistics.safetensors`, its summaries named "<what>/<block>".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from backend.statistics import HEADER, TOKENS_SEEN, Summary, summarize, summary_in, write

if TYPE_CHECKING:
    from torch import Tensor, nn

    from backend.run import Run

FILE = "kv_statistics.safetensors"

What = Literal["keys before RoPE", "keys", "values"]
WHATS: tuple[What, ...] = ("keys before RoPE", "keys", "values")


@dataclass(frozen=True)
class Cached:
    """One block's statistics; arrays in numpy. A model without RoPE has no keys before it."""

    block: int
    heads: int
    summaries: Mapping[What, Summary]


# ---- recording -----------------------------------------------------------------------------


def record(run: Run, folder: Path) -> None:
    """Look at the keys and values of a run's model and keep what they look like in its folder."""
    from backend.model.families import cache_shape

    found = summaries_of(run.model, sample(run))
    if found:
        heads, _ = cache_shape(run.model.config)
        write(folder / FILE, found, {"heads": heads})


def sample(run: Run) -> Tensor:
    """Tokens of the bundled text [1, T]: the same for every run of a model."""
    from backend import data
    from backend.spec import Calibration

    length = min(TOKENS_SEEN, run.context)
    settings = Calibration(dataset="demo", samples=1, length=length)
    return data.calibration(run.tokenizer, settings)[0]


@torch.no_grad()
def summaries_of(model: nn.Module, ids: Tensor) -> dict[str, Summary]:
    """ids [1, T] through the model -> {"<what>/<block>": summary}.

    Blocks that keep no keys and values of all tokens, as with sliding windows, are left out.
    """
    from backend.cache.watch import passed

    found: dict[str, Summary] = {}
    for block, states in passed(model, ids).items():
        for what, state in zip(WHATS, states, strict=True):
            if state is not None:
                found[f"{what}/{block}"] = summarize(state)
    return found


# ---- reading -------------------------------------------------------------------------------


def read(folder: Path) -> list[Cached]:
    """Statistics of all blocks that have some, in order; [] where the file cannot be read."""
    try:
        with safe_open(folder / FILE, framework="np") as file:
            return list(_blocks(file, json.loads(file.metadata()[HEADER])))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return []


def _blocks(file: Any, header: Mapping[str, Any]) -> Iterator[Cached]:
    numbers = header["numbers"]
    for block in sorted({int(name.rpartition("/")[2]) for name in numbers}):
        names = {what: f"{what}/{block}" for what in WHATS}
        own = {w: summary_in(file, header, n) for w, n in names.items() if n in numbers}
        yield Cached(block, int(header["heads"]), own)
