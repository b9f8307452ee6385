"""Keys and values of a model on calibration tokens, and the gradients of its loss by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from backend.cache.build import bring_turns, cache_argument, turns_keys
from backend.cache.layer import RoundedLayer, Side
from backend.cache.rotary import rotate, unrotate
from backend.model.families import Block, blocks_of


@dataclass
class Samples:
    """Of one block: keys, before or after rotary positions, and values, each [n, T, C].

    `*_slope`: the gradient of the mean cross-entropy by them, None where none was asked for.
    """

    keys: Tensor
    values: Tensor
    key_slope: Tensor | None = None
    value_slope: Tensor | None = None


class Watch(RoundedLayer):
    """A cache layer that keeps nothing but the keys and values of the last pass, as they are."""

    def __init__(self, slopes: bool) -> None:
        super().__init__(Side(pre_rope=True), Side())
        self.slopes = slopes
        self.states: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states = (key_states, value_states)
        for x in states if self.slopes else ():
            if not x.requires_grad:  # those of the first block: weights have no gradient
                x.requires_grad_()
        if self.states is None:  # else the block is computed again for its gradients
            self.states = states
        return states


def watch(
    model: nn.Module,
    blocks: Sequence[Block],
    ids: Tensor,
    *,
    slopes: bool,
    pre_rope: bool,
    wanted: Sequence[int],
    go_on: Callable[[], bool] = lambda: True,
) -> dict[int, Samples]:
    """ids [n, T] through the 16-bit model -> samples of the wanted blocks, on the CPU.

    One sequence at a time; with slopes every block is computed twice instead of kept, so that
    memory holds the inner numbers of one block only. Ends early, with fewer sequences, once
    `go_on` says so.
    """
    home = model.get_input_embeddings().weight.device  # type: ignore[operator]
    rows: dict[int, list[tuple[Tensor, ...]]] = {index: [] for index in wanted}
    with torch.set_grad_enabled(slopes), ready(model, blocks, slopes):
        for row in ids:
            if not go_on():
                break
            layers = [Watch(slopes) for _ in blocks]
            given = {cache_argument(model): Cache(layers=[*layers])}
            logits = model(input_ids=row[None].to(home), use_cache=True, **given).logits[0]
            states = [x for index in wanted for x in layers[index].states or ()]
            grads: Sequence[Tensor] = ()
            if slopes:
                grads = torch.autograd.grad(
                    cross_entropy(logits[:-1].float(), row[1:].to(home)), states
                )
            for at, index in enumerate(wanted):
                turns = layers[index].turns if pre_rope and turns_keys(blocks[index]) else None
                pair = slice(2 * at, 2 * at + 2)
                rows[index].append(settled(states[pair], grads[pair], turns))
    return {
        index: Samples(*(torch.stack(x) for x in zip(*r, strict=True)))
        for index, r in rows.items()
        if r
    }


def settled(
    states: Sequence[Tensor], grads: Sequence[Tensor], turns: Any | None
) -> tuple[Tensor, ...]:
    """Keys and values [1, H, T, D] and their gradients -> each [T, C] in its type, on the CPU."""
    keys, *others = (x.detach() for x in (*states, *grads))
    found = [keys, *others]
    if turns is not None and turns.cos is not None:
        cos, sin = turns.of(0, keys.shape[2])
        found[0] = unrotate(keys, cos, sin)
        if grads:  # by the keys before they turn: the transposed turn
            found[2] = rotate(found[2].float(), cos.float(), -sin.float())
    return tuple(x[0].transpose(0, 1).flatten(1).to(keys.dtype).cpu() for x in found)


@contextmanager
def ready(model: nn.Module, blocks: Sequence[Block], slopes: bool) -> Iterator[None]:
    """The model with layers told their positions; under slopes with no gradients of its weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [
        block.get(block.family.attention).register_forward_pre_hook(
            bring_turns(block.index), with_kwargs=True
        )
        for block in blocks
    ]
    if slopes:
        for block in blocks:
            again = partial(checkpoint, block.module.forward, use_reentrant=False)
            block.module.forward = again
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
        for hook in hooks:
            hook.remove()
        for block in blocks if slopes else ():
            del block.module.forward


def passed(model: nn.Module, ids: Tensor) -> dict[int, tuple[Tensor | None, Tensor, Tensor]]:
    """ids [1, T] through the model -> {block: keys before and after RoPE, values}, each [T, C].

    Keys before RoPE are None where there is none. Of blocks that cache every token.
    """
    config: Any = model.config
    stock = DynamicCache(config=config).layers
    layers = [Watch(slopes=False) if type(plain) is DynamicLayer else plain for plain in stock]
    home = model.get_input_embeddings().weight.device  # type: ignore[operator]
    blocks = blocks_of(model)
    with torch.no_grad(), ready(model, blocks, slopes=False):
        given = {cache_argument(model): Cache(layers=layers)}
        model(input_ids=ids.to(home), use_cache=True, **given)
    found = {}
    for block, layer in zip(blocks, layers, strict=False):  # last blocks may share others' caches
        if not isinstance(layer, Watch) or layer.states is None:
            continue
        keys, values = settled(layer.states, (), None)
        turns = layer.turns if turns_keys(block) else None
        turned = turns is not None and turns.cos is not None
        before = settled(layer.states, (), turns)[0] if turned else None
        found[block.index] = (before, keys, values)
    return found
