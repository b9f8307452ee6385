"""Attention that reads a packed cache as it is: what transformers calls instead of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from backend.cache.layer import RoundedLayer
from backend.cache.tokens import Tokens
from kernels.kv_decode import decode
from kernels.kv_decode.layout import Held
from kernels.kv_decode.stretch import attend

NAME = "quantarena_packed_cache"  # in transformers' registries
STOCK = "sdpa"  # whose place it takes, masks included


def take_place(model: nn.Module) -> str:
    """Let the model's attention read packed caches -> "", or why it cannot in one sentence.

    Keys and values that are tensors go to the attention that was there.
    """
    chosen: Any = model
    if chosen.config._attn_implementation == NAME:
        return ""
    if reason := why_not(model):
        return reason
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])
    chosen.set_attn_implementation(NAME)
    return ""


def why_not(model: nn.Module) -> str:
    """Why attention cannot read packed keys and values, "" if it can."""
    config: Any = model.config
    text = config.get_text_config()
    if config._attn_implementation != STOCK:
        return f"attention is {config._attn_implementation!r}, and only {STOCK!r} can be replaced"
    if getattr(text, "attn_logit_softcapping", None):
        return "its attention caps scores (softcapping)"
    if any(isinstance(getattr(m, "sinks", None), nn.Parameter) for m in model.modules()):
        return "its attention has learned sinks"
    return ""


def cache_of(kwargs: dict[str, Any]) -> Cache | None:
    """The cache among the arguments of a model or an attention module."""
    return next((value for value in kwargs.values() if isinstance(value, Cache)), None)


def offer_packed(index: int) -> Any:
    """A hook of an attention module: says whether its cache layer may hand over packed tokens.

    For one new token, without gradients, and where nobody asks for attention's weights.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = cache_of(kwargs)
        if cache is None or index >= len(cache.layers):
            return
        layer, config = cache.layers[index], getattr(module, "config", None)
        if isinstance(layer, RoundedLayer):
            states = kwargs.get("hidden_states", args[0] if args else None)
            learns = states is not None and states.requires_grad
            weights = kwargs.get("output_attentions") or getattr(config, "output_attentions", False)
            ours = getattr(config, "_attn_implementation", None) == NAME
            layer.hands_over = bool(ours and not weights and not learns)

    return hook


def attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [B, Hq, t, D] -> [B, t, Hq, D]; key and value are tensors, or packed for one token."""
    if isinstance(key, Tensor):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **more
        )
    usual = attention_mask is None or attention_mask.dtype == torch.bool
    if not usual or more.get("position_bias") is not None or more.get("softcap") is not None:
        key, value = (side.read(0, side.count).to(query.dtype) for side in (key, value))
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **more
        )
    out = attend_packed(query[:, :, 0], key, value, attention_mask, scaling)
    return out.unsqueeze(1), None


def attend_packed(
    q: Tensor,
    keys: Held | Tokens,
    values: Held | Tokens,
    attention_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """q [B, Hq, D] -> [B, Hq, D]; mask [B or 1, 1, 1, n], True for what is read."""
    batch, _, width = q.shape
    mask = None
    if attention_mask is not None:
        mask = attention_mask[:, 0, 0, : keys.count].expand(batch, -1).contiguous()
    scaling = width**-0.5 if scaling is None else scaling
    if isinstance(keys, Held) and isinstance(values, Held):
        return decode(q, keys, values, mask, scaling=scaling)
    return attend(q, keys, values, mask, scaling)
