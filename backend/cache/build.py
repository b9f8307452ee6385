"""Caches: makes the key-value caches of a model from a pipeline's KV step."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from backend.cache.attention import cache_of, offer_packed, take_place
from backend.cache.growth import Part, total_bytes
from backend.cache.layer import RoundedLayer, Side
from backend.cache.rotary import Turns
from backend.methods import Method
from backend.model.families import Block, blocks_of, cache_shape
from backend.pipeline import check_rules

PLAIN_BYTES = 2  # of a number that is not rounded: 16 bits, whatever computes here
LEAST_FILL = 64  # tokens of a cache that is filled to measure it


class Caches:
    """Fresh caches for a model, their layers as the KV step of `steps` makes them.

    Layers that hold a window of the newest tokens only stay as they are, in 16 bits.
    """

    def __init__(self, model: nn.Module, steps: Sequence[Method], *, packed: bool) -> None:
        self.model: Any = model
        self.packed = packed
        self.step = next((step for step in steps if "kv_cache" in step.targets), None)
        self.notes: list[str] = []
        self.mixes_tokens = False  # True: padding in a batch would change real tokens
        self._counted: dict[str, list[int]] = {}
        self._fresh = False
        if self.step is None:
            return
        self.step.check_cache(model)
        self.blocks = blocks_of(model)
        self.notes += check_rules([self.step], self.blocks)
        made = self.layers()
        if not any(isinstance(layer, RoundedLayer) for layer in made):
            raise ValueError(
                f"{self.step.kind}: nothing is rounded: every block of this model holds a window "
                "of its tokens only (sliding windows) or is kept by a rule"
            )
        plain = [i for i, layer in enumerate(made) if not isinstance(layer, RoundedLayer)]
        if plain:
            self.notes.append(
                f"{self.step.kind}: keys and values of {len(plain)} of {len(made)} blocks stay in "
                f"16 bits (blocks {', '.join(map(str, plain))})"
            )
        self.mixes_tokens = any(
            layer.mixes_tokens for layer in made if isinstance(layer, RoundedLayer)
        )
        if any(side.codec and side.codec.mixes_tokens for side in self.sides(made)):
            self.notes.append(
                f"{self.step.kind}: tokens that share a scale are rounded together, so a text read "
                "in one pass is predicted with some knowledge of the rest of each group"
            )
        self._watch()
        if packed and (reason := take_place(model)):
            self.notes.append(
                f"{self.step.kind}: each new token unpacks all keys and values to 16 bits: {reason}"
            )

    @property
    def rounds(self) -> bool:
        """True if there is a KV step."""
        return self.step is not None

    def new(self, *, scoring: bool = False) -> Cache:
        """An empty cache. `scoring`: for one pass over a text, which reads rounded tokens always.

        Such a pass never decodes; with the prompt read exactly it would measure the 16-bit model.
        """
        if self.step is None:
            return DynamicCache(config=self.model.config)
        layers = self.layers()
        for layer in layers:
            if scoring and isinstance(layer, RoundedLayer):
                layer.prefill = "quant"
        return Cache(layers=layers)

    def layers(self, packed: bool | None = None) -> list[Any]:
        """A layer for each block, packed as the run's are unless told otherwise."""
        packed = self.packed if packed is None else packed
        assert self.step is not None
        stock = DynamicCache(config=self.model.config).layers
        turns = Turns()
        made: list[Any] = []
        for block, plain in zip(self.blocks, stock, strict=True):
            step = self.step.on_block(block, len(self.blocks))
            rounded = None
            if step is not None and type(plain) is DynamicLayer:
                rounded = step.cache_layer(block.index, block.fit(), packed=packed)
            if isinstance(rounded, RoundedLayer) and rounded.turns is not None:
                leads = not any(isinstance(m, RoundedLayer) and m.turns is not None for m in made)
                rounded.share_turns(turns if turns_keys(block) else None, leads)
            made.append(plain if rounded is None else rounded)
        return made

    @staticmethod
    def sides(layers: Sequence[Any]) -> list[Side]:
        """Keys and values of the layers that round them."""
        return [side for layer in layers if isinstance(layer, RoundedLayer) for side in layer.sides]

    # -- what is said of a run -------------------------------------------------------------------

    def start_count(self) -> None:
        """What is counted from now on replaces what was; nothing counted keeps it.

        A metric may take its numbers from another's passes over the same text.
        """
        self._fresh = True

    def count(self, cache: Cache) -> None:
        """Add a cache that was used to the shares of rounded tokens."""
        if self._fresh:
            self._counted, self._fresh = {}, False
        for layer in cache.layers:
            if isinstance(layer, RoundedLayer):
                found = (layer.get_seq_length(), *layer.rounded_tokens())
                held = self._counted.setdefault(layer.prefill, [0, 0, 0])
                self._counted[layer.prefill] = [a + b for a, b in zip(held, found, strict=True)]

    def told(self) -> dict[str, Any]:
        """By what prompts read, quant or fp: the shares of keys and values that were rounded."""
        return {
            prefill: {"keys": keys / total, "values": values / total}
            for prefill, (total, keys, values) in self._counted.items()
            if total
        }

    # -- hooks -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Refuse padding that would be rounded with real tokens; show layers their positions."""
        if self.mixes_tokens:
            self.model.register_forward_pre_hook(refuse_padding, with_kwargs=True)
        for block in self.blocks:
            attention = block.get(block.family.attention)
            attention.register_forward_pre_hook(bring_turns(block.index), with_kwargs=True)
            attention.register_forward_pre_hook(offer_packed(block.index), with_kwargs=True)


def refuse_padding(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """ValueError for a batch with padding and a cache whose tokens share scales."""
    cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
    layers = [] if cache is None else cache.layers
    if not any(isinstance(layer, RoundedLayer) and layer.mixes_tokens for layer in layers):
        return
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
        raise ValueError(
            "padding tokens would be rounded together with real ones in this cache; give sequences "
            "of one length, or one at a time"
        )


def bring_turns(index: int) -> Any:
    """A hook that hands the rotary tables of a pass to the cache layer of one block."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, tables = cache_of(kwargs), kwargs.get("position_embeddings")
        if cache is None or tables is None or index >= len(cache.layers):
            return
        layer = cache.layers[index]
        if isinstance(layer, RoundedLayer) and layer.turns is not None:
            cos, sin = tables
            layer.turns.extend(cos, sin, layer.get_seq_length() + cos.shape[1])

    return hook


def turns_keys(block: Block) -> bool:
    """True if a block's attention applies rotary positions; some leave single blocks without."""
    attention = block.get(block.family.attention)
    return bool(getattr(attention, "use_rope", True))


def has_rotary(model: nn.Module) -> bool:
    """True if the model turns its keys by their positions."""
    return any(name.endswith("rotary_emb") for name, _ in model.named_modules())


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its key-value cache: transformers renames it in 5.40."""
    taken = inspect.signature(model.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


# -- bytes ---------------------------------------------------------------------------------------


def cache_bytes(caches: Caches, tokens: int) -> float:
    """Bytes of one packed sequence of `tokens` tokens in all layers, by formula."""
    return float(total_bytes(cache_parts(caches), tokens))


def cache_parts(caches: Caches) -> list[Part]:
    """What the bytes of a packed cache are made of; layers that are kept alike make one part."""
    heads, width = cache_shape(caches.model.config)
    stock = DynamicCache(config=caches.model.config).layers
    layers = caches.layers() if caches.rounds else stock
    alike = Counter(part for layer in layers for part in layer_parts(layer, heads, width))
    return [replace(part, layers=count) for part, count in alike.items()]


def layer_parts(layer: Any, heads: int, width: int) -> list[Part]:
    """Keys and values of one layer; a sliding window holds as many tokens as it is long."""
    plain = float(heads * width * PLAIN_BYTES)
    if not isinstance(layer, RoundedLayer):
        window = getattr(layer, "sliding_window", None) or 0
        return 2 * [Part(plain, plain, window=int(window))]
    return [
        Part(plain, plain)
        if side.codec is None
        else Part(
            plain,
            side.codec.bits_per_token(heads, width) / 8,
            block=side.codec.block,
            residual=side.residual,
            sinks=side.sinks,
        )
        for side in layer.sides
    ]


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that one more token takes in the rounded part of a cache, all layers."""

    formula: float
    measured: float  # growth of a packed cache that was filled
    tokens: int  # it grew by


def token_bytes(caches: Caches) -> TokenBytes:
    """What a packed cache grows by per token, far from its start: by formula and measured."""
    heads, width = cache_shape(caches.model.config)
    layers = caches.layers(packed=True)
    tokens = 2 * period_of(layers)
    formula = measured = 0.0
    device = next(caches.model.parameters()).device
    source = torch.Generator().manual_seed(0)
    for layer in layers:
        parts = layer_parts(layer, heads, width)
        formula += total_bytes(parts, 2 * tokens) - total_bytes(parts, tokens)
        held = []
        for _ in range(2):
            states = torch.randn(2, 1, heads, tokens, width, generator=source).to(device)
            layer.update(*(typical(layer, at, x).bfloat16() for at, x in enumerate(states)))
            held.append(resident_bytes(layer))
        measured += held[1] - held[0]
        layer.reset()
    return TokenBytes(formula / tokens, measured / tokens, tokens)


def typical(layer: Any, at: int, x: Tensor) -> Tensor:
    """Normal numbers x [B, H, t, D] -> such as the keys (0) or values (1) of a layer may be."""
    codec = layer.sides[at].codec if isinstance(layer, RoundedLayer) else None
    return x if codec is None else codec.typical(x)


def period_of(layers: Sequence[Any]) -> int:
    """Tokens after which every layer has rounded as many of the last as before."""
    sides = Caches.sides(layers)
    steps = [max(side.residual, side.codec.block) for side in sides if side.codec is not None]
    return math.lcm(*steps, LEAST_FILL)


def resident_bytes(layer: Any) -> int:
    """Bytes that a cache layer of any kind holds now."""
    if isinstance(layer, RoundedLayer):
        return layer.resident_bytes()
    return sum(t.numel() * t.element_size() for t in (layer.keys, layer.values) if t is not None)
