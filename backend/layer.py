"""Steps on one weight, on a norm and its readers, or on one block: for tests and the Learn page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from backend.methods import METHODS, Method, Seen
from backend.methods.smoothquant import SmoothQuant, fold
from backend.metrics.base import Measurement
from backend.model.families import Block, Family, blocks_of, family_of
from backend.model.quant_linear import PLAIN_BITS, LinearLike
from backend.model.stats import LayerStats, gather_layer
from backend.pipeline import BlockWork, Inputs, Listener, Stream, passing
from backend.statistics import BlockStatistics

NAME = "linear"
ALONE = Family(layers="", embed=(), head="", norm_feeds=(), waves=((NAME,),))
Step = Mapping[str, Any] | Method
B = TypeVar("B", Block, nn.Module)


@dataclass(frozen=True)
class QuantizedLayer:
    """What a step made of one linear; called with x [..., K] it gives [..., N]."""

    module: nn.Module
    notes: list[str] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        """[N, K] fp32, what the layer now multiplies by."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().float()

    @property
    def bits(self) -> dict[str, float]:
        """Bits per weight: codes, scales, zeros, outliers, index."""
        return self.module.bits() if isinstance(self.module, LinearLike) else dict(PLAIN_BITS)

    @property
    def bits_per_weight(self) -> float:
        """Sum of `bits`."""
        return sum(self.bits.values())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x)
        return result


@torch.no_grad()
def quantize_layer(
    step: Step, weight: Tensor, inputs: Tensor | None = None, *, seed: int = 0
) -> QuantizedLayer:
    """One step on one linear without bias.

    weight [N, K]; inputs [T, K], or [B, T, K] for B sequences, None for methods that look at no
    data. The caller's tensors stay as they are.
    """
    method = built(step)
    if method.layers:
        raise ValueError(
            f"{method.kind}: one linear has no layers to choose from; leave out layers"
        )
    check_shapes(method, weight, inputs)
    block = Block(0, nn.ModuleDict({NAME: linear_of(weight)}), ALONE)
    notes: list[str] = []
    for wave in method.waves(block):
        stats = LayerStats(note=notes.append)
        if inputs is not None:
            stats = gather_layer(method.wanted(), [inputs], weight.shape[1], notes.append)
        seen = Seen(dict.fromkeys(wave, stats), note=lambda text, _: notes.append(text), seed=seed)
        method.apply(block, seen)
    return QuantizedLayer(block.get(NAME), notes)


@torch.no_grad()
def smooth(norm: nn.Module, linears: Sequence[nn.Linear], act_max: Tensor, step: Step) -> Tensor:
    """Move a scale [K] from what `norm` gives into the linears that read it, in place -> the scale.

    act_max [K]: largest magnitude of each channel of the norm's output.
    """
    method = built(step)
    if not isinstance(method, SmoothQuant):
        raise ValueError(f"{method.kind} takes no scale out of a norm; use smoothquant")
    if method.search:
        raise ValueError("smoothquant: a search needs inputs, not their extremes; give alpha alone")
    for linear in linears:
        if act_max.shape != (linear.in_features,):
            raise ValueError(
                f"{method.kind}: act_max must be [{linear.in_features}], one per input channel of "
                f"the linears, got shape {list(act_max.shape)}"
            )
    scale = method.scales(act_max.float(), list(linears))
    fold(norm, list(linears), scale, norm_offset(norm, len(scale)))
    return scale


def norm_offset(norm: nn.Module, k: int) -> float:
    """What a norm over k channels adds to its weight before multiplying: 1 for Gemma's, else 0."""
    weight = norm.get_parameter("weight")
    x = torch.linspace(-1, 2, k, dtype=weight.dtype, device=weight.device)[None]
    rest = {name: torch.zeros_like(value) for name, value in norm.named_parameters()}
    zero, one = (
        torch.func.functional_call(norm, rest | {"weight": torch.full_like(weight, gain)}, x)
        for gain in (0.0, 1.0)
    )
    return round((zero.abs().max() / (one - zero).abs().max()).item(), 3)


@torch.no_grad()
def quantize_block(
    steps: Sequence[Step],
    block: B,
    inputs: Tensor,
    arguments: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
    measure: Callable[[Measurement], None] = lambda measurement: None,
) -> B:
    """Steps on a copy of one decoder block; the caller's stays as it is.

    inputs [B, T, D] hidden states; `arguments` what the model hands the block beside them (mask,
    rotary tables), made from the block's own config at positions 0..T-1 where they are not given.
    """
    methods = [built(step) for step in steps]
    if inputs.dim() != 3:
        raise ValueError(f"inputs of a block must be [B, T, D], got shape {list(inputs.shape)}")
    work = deepcopy(block)
    config = None if isinstance(work, Block) and arguments is not None else config_of(work)
    inner = work if isinstance(work, Block) else Block(0, work, family_of(config))
    if arguments is None:
        arguments = arguments_of(config, inner.module, inputs)
    listener = Listener(
        lambda index, name, text: note(f"{name}: {text}" if name else text),
        measure,
        lambda *share: None,
        lambda: False,
    )
    stream = Stream(inputs, [arguments] * (inner.index + 1), inputs.device, listener)
    streams: Inputs = {"quantized": stream, "original": stream}
    summaries = BlockStatistics(inner, None)
    walk = BlockWork(inner, inner.index + 1, streams, listener, seed, None, summaries)
    walk.run(methods)
    return work


def config_of(block: Block | nn.Module) -> Any:
    """The model config that a decoder block was built from."""
    module = block.module if isinstance(block, Block) else block
    found = (getattr(part, "config", None) for part in module.modules())
    config = next((config for config in found if config is not None), None)
    if config is None:
        raise ValueError(f"a {type(module).__name__} does not say which model config it is from")
    return config


def arguments_of(config: Any, block: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """What a model of this config hands the block beside inputs [B, T, D]; explicit masks."""
    indices = (getattr(part, "layer_idx", None) for part in block.modules())
    index = next((index for index in indices if index is not None), 0)
    config = deepcopy(config)
    small = {"vocab_size": 1, "pad_token_id": None, "intermediate_size": 1, "ffn_dim": 1}
    for name in small.keys() & set(config.to_dict()):
        setattr(config, name, small[name])
    config.num_hidden_layers = index + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: index + 1]
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=inputs.dtype
    )
    blocks = blocks_of(model)
    recorded: list[dict[str, Any]] = [{} for _ in blocks]
    with passing(blocks, recorded):
        model.to(inputs.device).base_model(inputs_embeds=inputs[:1], use_cache=False)
    return recorded[index]


def built(step: Step) -> Method:
    """A step from its JSON data, or itself."""
    return step if isinstance(step, Method) else METHODS.build(step)


def check_shapes(method: Method, weight: Tensor, inputs: Tensor | None) -> None:
    """ValueError unless the method acts on a weight [N, K] and inputs end in K."""
    if not method.in_blocks:
        raise ValueError(f"{method.kind} rounds cached keys and values, no linear")
    if weight.dim() != 2:
        raise ValueError(f"{method.kind}: weight must be [N, K], got shape {list(weight.shape)}")
    if inputs is not None and (inputs.dim() not in (2, 3) or inputs.shape[-1] != weight.shape[1]):
        raise ValueError(
            f"{method.kind}: inputs must be [T, {weight.shape[1]}] or [B, T, {weight.shape[1]}], "
            f"got shape {list(inputs.shape)}"
        )


def linear_of(weight: Tensor) -> nn.Linear:
    """An nn.Linear without bias that multiplies by a copy of weight [N, K]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return linear
