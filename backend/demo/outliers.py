"""`demo-outliers`: the bundled model with activation outliers like those of large models."""

import random

from torch import nn

# norm of a block -> the linears of that block that read its output
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def plant_outliers(model: nn.Module, *, channels: int = 4, power: int = 6, seed: int = 0) -> None:
    """Make `channels` hidden channels 2**power times larger after every norm, in place.

    The columns that read them shrink by as much. Powers of two only move the exponent, so the
    output stays the same to the last bit (in fp16 as long as no shrunk weight is below 6e-5).
    """
    width = model.get_parameter("model.layers.0.input_layernorm.weight").numel()
    if not 0 < channels <= width:
        raise ValueError(f"channels: {channels} given, the model has 1 to {width}")
    chosen = sorted(random.Random(seed).sample(range(width), channels))
    for block in model.get_submodule("model.layers").children():
        for norm, readers in READERS.items():
            block.get_parameter(f"{norm}.weight").data[chosen] *= 2.0**power
            for reader in readers:
                block.get_parameter(f"{reader}.weight").data[:, chosen] *= 2.0**-power
