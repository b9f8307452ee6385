"""Outputs of the original authors' code, kept beside the repository; skipped where they are not.

Tolerances are those that come with the vectors: how far the authors' own code moves in fp64.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from backend.formats.int_group import IntGroup
from backend.layer import quantize_layer
from backend.methods import Seen
from backend.methods.smoothquant import SmoothQuant
from backend.model.families import Block, Family, NormFeed
from backend.model.stats import AbsMax, LayerStats

FOLDER = Path(__file__).parents[3] / "shared" / "vectors"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no test vectors at {FOLDER}")


@cache
def arrays(case: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{case}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@cache
def configs(case: str) -> dict[str, Any]:
    path = FOLDER / f"{case}.json"
    return json.loads(path.read_text())["configs"] if path.is_file() else {}


# The AWQ quantizer (range without 0, clamped zero) is not `int`; it belongs to the method `awq`.
UNIFORM = [name for name in configs("uniform_a") if not name.lower().startswith("awq")]


def uniform_grid(name: str) -> IntGroup:
    """W_b4_sym_g32_mse_orig -> the format it describes."""
    _, bits, sign, unit, *more = name.split("_")
    return IntGroup(
        bits=int(bits[1:]),
        group=32 if "g32" in (unit, *more) else 0,
        symmetric=sign == "sym",
        convention="offset" if "orig" in more else "restricted",
        per_tensor=unit == "tensor",
        mse="mse" in more,
    )


def uniform_input(name: str) -> Tensor:
    """The matrix [N, K] whose rows or groups share a scale; columns of X where they do."""
    x = arrays("uniform_a")[f"in_{name[0]}"]
    return x.T.contiguous() if name.endswith("channel") else x


def one_per_row(scale: Tensor, w: Tensor, group: int) -> Tensor:
    """Stored scales, in whichever shape the authors had -> [N, G] or [1, 1]."""
    units = w.shape[1] // group if group else 1
    return scale.reshape(-1, units) if scale.numel() > 1 else scale.reshape(1, 1)


def one_sided(w: Tensor, units: int) -> Tensor:
    """[N, G] units without negative values, all-zero ones aside."""
    w = w.view(w.shape[0], -1, units)
    return (w >= 0).all(-1) & (w > 0).any(-1)


def norms(w: Tensor, dq: Tensor, units: int) -> Tensor:
    """Sum of |error|^2.4 of each unit [N, G]."""
    return (dq - w).double().abs().pow(2.4).view(w.shape[0], -1, units).sum(-1)


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform(name):
    fmt, w, data = uniform_grid(name), uniform_input(name), arrays("uniform_a")
    q, units = fmt.quantize(w), fmt.group or w.shape[1]
    theirs = one_per_row(data[f"{name}__scale"], w, fmt.group)
    dq = data[f"{name}__dq"].T if name.endswith("channel") else data[f"{name}__dq"]
    scale = q.params["scale"].expand_as(theirs)
    other = (scale / theirs - 1).abs() > 1e-6  # [N, G] units with another scale
    if fmt.mse:  # where the search ended elsewhere, it ended within 1e-3 of theirs, or below
        ours = norms(w, q.dequantize(), units)
        assert (ours[other] <= 1.001 * norms(w, dq, units)[other]).all()
    elif fmt.convention == "offset":
        # The released code halves the scale of units without negative values but keeps their zero
        # in the middle of the codes, so that all above half the peak saturates. Ours does not.
        assert torch.equal(other, one_sided(w, units))
        torch.testing.assert_close(scale[other], 2 * theirs[other], rtol=1e-6, atol=0)
    else:
        assert not other.any()
    if not fmt.symmetric and not fmt.mse:
        zero = one_per_row(data[f"{name}__zero"], w, fmt.group)
        assert torch.equal(q.params["zero"].float().expand_as(zero), zero)
    step = theirs.masked_fill(other, torch.inf).expand(w.shape[0], -1)
    step = step.repeat_interleave(units, 1)  # [N, K]
    difference = (q.dequantize() - dq).abs()
    off = (difference > 1e-5 * dq.abs()) & step.isfinite()
    assert off.float().mean() <= 0.002
    assert (difference <= 1.001 * step).all()


def gptq_step(name: str, how: dict[str, Any]) -> dict[str, Any]:
    """The step of one stored configuration."""
    return {
        "kind": "gptq",
        "format": {
            "kind": "int",
            "bits": how["bits"],
            "group": max(how["groupsize"], 0),
            "symmetric": how["sym"],
            "convention": "offset" if name.endswith("orig") else "restricted",
        },
        "act_order": how["act_order"],
        "static_groups": how["static_groups"],
        "block": how["blocksize"],
        "damping": how["percdamp"],
    }


@pytest.mark.parametrize("name", configs("gptq_a"))
def test_gptq(name):
    how, data = configs("gptq_a")[name], arrays("gptq_a")
    w, x = data["in_W"], data["in_X"][: how["tokens_used"]]
    layer = quantize_layer(gptq_step(name, how), w, inputs=x)
    q = layer.module.qtensor
    torch.testing.assert_close(q.params["scale"], data[f"{name}__scale"], rtol=1e-5, atol=0)
    step = q.params["scale"][:, q.group_of_column()]
    mismatch = ((layer.weight - data[f"{name}__Wq"]).abs() > 0.1 * step).float().mean()
    assert mismatch <= 0.01
    error = (x.double() @ (w - layer.weight).double().T).square().sum().item()
    assert error == pytest.approx(how["sq_err_gptq"], rel=0.005)
    assert not layer.weight[:, data["in_dead_column"]].any()


@pytest.mark.parametrize("name", configs("gptq_a"))
def test_rtn(name):
    how, data = configs("gptq_a")[name], arrays("gptq_a")
    step = {"kind": "rtn", "format": gptq_step(name, how)["format"]}
    layer = quantize_layer(step, data["in_W"])
    torch.testing.assert_close(layer.weight, data[how["rtn_array"]], rtol=0, atol=1e-6)
    x = data["in_X"][: how["tokens_used"]].double()
    error = (x @ (data["in_W"] - layer.weight).double().T).square().sum().item()
    assert error == pytest.approx(how["sq_err_rtn"], rel=0.005)


def smooth_norm(kind: str) -> nn.Module:
    """The norm in front of the three linears, with its stored weights."""
    data = arrays("smoothquant_a")
    norm: nn.Module = {
        "layernorm": lambda: nn.LayerNorm(64, eps=1e-5),
        "rmsnorm": lambda: LlamaRMSNorm(64, eps=1e-6),
        "gemma3": lambda: Gemma3RMSNorm(64, eps=1e-6),
    }[kind]()
    stored = data["in_gemma3_norm_weight" if kind == "gemma3" else "in_norm_weight"]
    with torch.no_grad():
        norm.weight.copy_(stored)
        if kind == "layernorm":
            norm.bias.copy_(data["in_norm_bias"])
    return norm


def smooth_block(kind: str) -> Block:
    """Norm and linears as one decoder block."""
    parts: dict[str, nn.Module] = {"norm": smooth_norm(kind)}
    for name in ("fc0", "fc1", "fc2"):
        weight = arrays("smoothquant_a")[f"in_{name}"]
        parts[name] = nn.Linear(*weight.T.shape, bias=False)
        parts[name].weight = nn.Parameter(weight.clone())
    feed = NormFeed("norm", ("fc0", "fc1", "fc2"))
    offset = 1.0 if kind == "gemma3" else 0.0
    family = Family("", (), "", (feed,), (feed.readers,), norm_offset=offset)
    return Block(0, nn.ModuleDict(parts), family)


@torch.no_grad()
@pytest.mark.parametrize("name", configs("smoothquant_a"))
def test_smoothquant(name):
    how, data = configs("smoothquant_a")[name], arrays("smoothquant_a")
    block = smooth_block(how["norm"])
    x = block.get("norm")(data["in_hidden"])
    before = {fc: block.get(fc)(x) for fc in block.linears()}
    stats = LayerStats({AbsMax: AbsMax(64)})
    stats.update(x)
    peak = data[f"{how['norm']}__act_scales"]
    torch.testing.assert_close(stats[AbsMax].peak, peak, rtol=1e-6, atol=1e-7)
    step = SmoothQuant(alpha=how["alpha"])
    step.apply(block, Seen(dict.fromkeys(block.linears(), stats)))

    # s = 1 instead of 1e-5 where nothing was active: the released floor overflows fp16 norms.
    live = torch.ones(64, dtype=torch.bool)
    live[data["in_zero_activation_channel"].long()] = False
    for fc in block.linears():
        stored = data[f"{name}__{fc}"]
        torch.testing.assert_close(
            block.get(fc).weight[:, live], stored[:, live], rtol=1e-5, atol=0
        )
        torch.testing.assert_close(block.get(fc).weight[:, ~live], data[f"in_{fc}"][:, ~live])
        x = block.get("norm")(data["in_hidden"])
        torch.testing.assert_close(block.get(fc)(x), before[fc], rtol=0, atol=1e-5)

    norm, offset = block.get("norm"), block.family.norm_offset
    stored = data[f"{name}__norm_weight"] + offset
    # The released Gemma 3 branch clamps (1 + w) / s from below and so loses negative channels.
    kept = live & (stored > 1.01e-5) if offset else live
    torch.testing.assert_close(norm.weight[kept] + offset, stored[kept], rtol=1e-5, atol=1e-7)
    if f"{name}__norm_bias" in data:
        stored = data[f"{name}__norm_bias"]
        torch.testing.assert_close(norm.bias[live], stored[live], rtol=1e-5, atol=0)
