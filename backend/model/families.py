"""One table: where blocks, linears, norms and their readers live in each model type. And Block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from backend.model.quant_linear import LinearLike
from backend.registry import nearest

FIT = "kv_fit"  # name of a module in a block: its buffers are what KV steps fitted


@dataclass(frozen=True)
class NormFeed:
    """A norm and every linear that reads its output, by names inside the block."""

    norm: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class LinearFeed:
    """Two linears, the input of `reader` being linear in the last output rows of `source`.

    Scaling such a row scales its input channel; where a value row is read by several query heads,
    all their channels.
    """

    source: str
    reader: str


@dataclass(frozen=True)
class Family:
    """Where things are in one model type. Paths are dotted, from the model or from the block."""

    layers: str
    embed: tuple[str, ...]
    head: str
    norm_feeds: tuple[NormFeed, ...]  # a scale of the norm can move into its readers, nothing else
    waves: tuple[tuple[str, ...], ...]  # linears in the order in which a block computes them
    norm_offset: float = 0.0  # the norm multiplies by offset + weight (Gemma: 1)
    why_no_feeds: str = ""  # the reason where norm_feeds is empty
    linear_feeds: tuple[LinearFeed, ...] = ()  # rows of one linear can carry a scale of the next
    attention: str = "self_attn"  # holds attention's linears; all others are the feed-forward part

    def is_attention(self, linear: str) -> bool:
        """True for a linear of the attention, by its dotted name in the block."""
        return linear.startswith(self.attention + ".")


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
LLAMA = Family(
    layers="model.layers",
    embed=("model.embed_tokens",),
    head="lm_head",
    norm_feeds=(NormFeed("input_layernorm", QKV), NormFeed("post_attention_layernorm", GATE_UP)),
    waves=(QKV, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",)),
    linear_feeds=(
        LinearFeed("self_attn.v_proj", "self_attn.o_proj"),
        LinearFeed("mlp.up_proj", "mlp.down_proj"),
    ),
)
GEMMA = replace(LLAMA, norm_offset=1.0)
# Gemma 2 and 3 normalise the outputs of attention and MLP too; those norms feed the residual.
GEMMA2 = replace(
    GEMMA,
    norm_feeds=(NormFeed("input_layernorm", QKV), NormFeed("pre_feedforward_layernorm", GATE_UP)),
)
OLMO2 = replace(
    LLAMA,
    norm_feeds=(),
    why_no_feeds="its norms stand after attention and MLP and feed the residual",
)
PHI3 = replace(
    LLAMA,
    norm_feeds=(
        NormFeed("input_layernorm", ("self_attn.qkv_proj",)),
        NormFeed("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
    waves=(
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ),
    linear_feeds=(LinearFeed("mlp.gate_up_proj", "mlp.down_proj"),),
)
OPT = Family(
    layers="model.decoder.layers",
    embed=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    head="lm_head",
    norm_feeds=(NormFeed("self_attn_layer_norm", QKV), NormFeed("final_layer_norm", ("fc1",))),
    waves=(QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    linear_feeds=(LinearFeed("self_attn.v_proj", "self_attn.out_proj"), LinearFeed("fc1", "fc2")),
)
GPT_NEOX = Family(
    attention="attention",
    layers="gpt_neox.layers",
    embed=("gpt_neox.embed_in",),
    head="lm_head",
    norm_feeds=(
        NormFeed("input_layernorm", ("attention.query_key_value",)),
        NormFeed("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ),
    waves=(
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
)

FAMILIES: dict[str, Family] = {  # by config.model_type
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "granite": LLAMA,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "opt": OPT,
    "gpt_neox": GPT_NEOX,
}
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def family_of(config: Any) -> Family:
    """A config (object or config.json's dict) -> its family. ValueError names what is missing."""
    get = config.get if isinstance(config, dict) else partial(attribute, config)
    kind = get("model_type") or ""
    if any((get(key) or 0) > 1 for key in EXPERT_KEYS):
        raise ValueError(
            f"model type {kind!r} is a mixture of experts: its experts are fused 3-D parameters, "
            "and only nn.Linear modules can be quantized"
        )
    if get("text_config") and kind not in FAMILIES:
        raise ValueError(
            f"model type {kind!r} reads more than text; only its text part could be quantized, and "
            "that needs a checkpoint of its own"
        )
    if kind not in FAMILIES:
        raise ValueError(
            f"model type {kind!r} has no entry in the table of families, which says where its "
            f"blocks, norms and linears are{nearest(kind, list(FAMILIES))}"
        )
    return narrowed(FAMILIES[kind], get)


def attribute(config: Any, key: str, other: Any = None) -> Any:
    """A config object's value, or `other`."""
    return getattr(config, key, other)


def narrowed(family: Family, get: Any) -> Family:
    """The family without the feeds that cannot carry a scale in this config."""
    if (get("activation_function") or "relu") != "relu":  # OPT's kin with GELU: not homogeneous
        feeds = tuple(feed for feed in family.linear_feeds if feed.source != "fc1")
        family = replace(family, linear_feeds=feeds)
    if get("do_layer_norm_before", True) is False:  # OPT-350m
        reason = "its norms stand after attention and MLP and feed the residual (post-norm)"
        return replace(family, norm_feeds=(), why_no_feeds=reason)
    if get("layer_norm_elementwise_affine", True) is False:
        return replace(family, norm_feeds=(), why_no_feeds="its norms have no weights")
    return family


class Block:
    """One decoder block of a model and the names in it."""

    def __init__(self, index: int, module: nn.Module, family: Family) -> None:
        self.index = index
        self.module = module
        self.family = family

    def linears(self) -> dict[str, nn.Module]:
        """Every nn.Linear and what stands for one, by dotted name, in order of definition."""
        found: dict[str, nn.Module] = {}
        for name, module in self.module.named_modules():
            inside = any(name.startswith(outer + ".") for outer in found)
            if isinstance(module, nn.Linear | LinearLike) and not inside:
                found[name] = module
        return found

    def get(self, name: str) -> nn.Module:
        """The module of this dotted name."""
        return self.module.get_submodule(name)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` where `name` was."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(parent), leaf, module.eval())

    def keep_fit(self, **tensors: torch.Tensor) -> None:
        """Tensors that a step fitted for this block's cache; saved with it, moved with it."""
        if not hasattr(self.module, FIT):
            self.module.add_module(FIT, nn.Module())
        for name, value in tensors.items():
            self.get(FIT).register_buffer(name, value)

    def fit(self) -> dict[str, torch.Tensor]:
        """What `keep_fit` kept."""
        return dict(self.get(FIT).named_buffers()) if hasattr(self.module, FIT) else {}

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[None]:
        """The block on `device`, and back where it was afterwards."""
        home = next(chain(self.module.parameters(), self.module.buffers())).device
        self.module.to(device)
        try:
            yield
        finally:
            self.module.to(home)


def blocks_of(model: nn.Module) -> list[Block]:
    """The decoder blocks of a causal language model, in order."""
    family = family_of(model.config)
    layers = model.get_submodule(family.layers)
    blocks = [Block(index, module, family) for index, module in enumerate(layers.children())]
    for block in blocks:
        for name, value in block.module.named_parameters():
            if value.dim() > 2:
                raise ValueError(
                    f"{name} of block {block.index} is a fused parameter of shape "
                    f"{list(value.shape)}; only nn.Linear modules can be quantized"
                )
    return blocks


def cache_shape(config: Any) -> tuple[int, int]:
    """Key-value heads and their width, from a model's config."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(heads), int(width)
