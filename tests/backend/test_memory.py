"""Peak memory of the block walk: it grows with the block, not with the number of blocks."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from backend.pipeline import quantize
from backend.recipes import parse

RECIPES = [
    "gptq(bits=4,group=64)",
    "awq(bits=4,group=64)",
    "smoothquant+rtn(bits=8)+activations(bits=8)",
    "hqq(bits=4,group=64)",
]
SHORT, LONG = 2, 16  # blocks
TOKENS = 64  # of one sequence
FEW, MANY = 32, 128  # sequences; FEW fill one batch of the walk


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors alive that were made inside the context, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Nowhere:
    """A checkpoint that keeps nothing."""

    def has(self, index: int) -> bool:
        return False

    def save(self, block: Any) -> None:
        pass


def llama(blocks: int) -> nn.Module:
    """A random Llama whose blocks are like the bundled model's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def walked(recipe: str, blocks: int, sequences: int = 8) -> tuple[int, int]:
    """(peak, what is left at the end) in bytes that the walk adds to the model's own."""
    model = llama(blocks)
    ids = torch.randint(0, 256, (sequences, TOKENS), generator=torch.Generator().manual_seed(0))
    with LiveBytes() as live:
        quantize(model, parse(recipe), ids, Nowhere())  # type: ignore[arg-type]
        return live.peak, live.now


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_peak_does_not_grow_with_the_number_of_blocks(recipe):
    short, long = walked(recipe, SHORT), walked(recipe, LONG)
    kept = (long[1] - short[1]) / (LONG - SHORT)  # rounded weights and codes of one block
    assert kept > 0
    assert long[0] - short[0] <= 1.05 * kept * (LONG - SHORT)


@pytest.mark.parametrize("recipe", RECIPES)
def test_more_calibration_adds_at_most_three_copies_of_its_hidden_states(recipe):
    few, many = walked(recipe, SHORT, FEW), walked(recipe, SHORT, MANY)
    stream = (MANY - FEW) * TOKENS * 128 * 4  # bytes of the hidden states
    assert many[0] - few[0] <= 3.5 * stream  # ours, and the original one's inputs and outputs
