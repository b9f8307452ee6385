"""What kernels for the "int" format share: its JSON read, groups, and activations to codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels.base import Case, Json, beside_words

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}


def refuse(weight: Json, act: Json | None, kinds: Sequence[str] = ("int",)) -> str | None:
    """Why a weight or activation format is not one these kernels can read, None if it is."""
    if weight["kind"] not in kinds:
        return f"it multiplies by 'int' weights, not {weight['kind']!r}"
    if beside := beside_words(weight):
        return f"it keeps nothing beside the codes, and these have {beside}"
    if act is None:
        return None
    if act["kind"] != "int":
        return f"it rounds activations to 'int', not {act['kind']!r}"
    if act["group"]:
        return f"it has one activation scale per token, not per {act['group']} channels"
    if act["mse"]:
        return "a clip search for every token takes longer than the product; set mse=false"
    return None


def group_of(weight: Json, k: int) -> int:
    """Input channels per scale; a whole row is one group."""
    return int(weight["group"]) or k


def zeros(params: Mapping[str, Tensor], weight: Json) -> Tensor:
    """What value 0 has for a code, fp32 [n, G] or [1, 1]: stored, or the middle if symmetric."""
    if "zero" in params:
        return params["zero"].float()
    return torch.full_like(params["scale"], 2.0 ** (weight["bits"] - 1), dtype=torch.float32)


def dequantized(codes: Tensor, params: Mapping[str, Tensor], weight: Json) -> Tensor:
    """codes [n, k] -> W_hat [n, k] fp32, as the format defines it; the last group may be short."""
    n, k = codes.shape
    group = group_of(weight, k)
    column = torch.arange(k, device=codes.device) // group  # [k]
    count = -(-k // group)
    scale = params["scale"].float().expand(n, count)[:, column]
    zero = zeros(params, weight).expand(n, count)[:, column]
    return (codes.float() - zero) * scale


def activation_codes(x: Tensor, act: Json) -> tuple[Tensor, Tensor, Tensor]:
    """x [m, k] -> codes [m, k] fp32 whole numbers, scale [m, 1] and zero [m, 1] fp32.

    The int format's own rule: range with 0 in it, [-1, 1] if all 0, halves to even, all in fp32.
    """
    x = x.float()
    top, middle = 2 ** act["bits"] - 1, 2 ** (act["bits"] - 1)
    rows = x.reshape(1, -1) if act["per_tensor"] else x
    # aminmax does both at once, several times slower: it is not vectorised along rows.
    low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    if act["symmetric"]:
        steps = {"restricted": middle - 1, "offset": top / 2, "full": middle}
        scale = stored(torch.maximum(-low, high) / steps[act["convention"]], act["scale_dtype"])
        zero = torch.full_like(scale, middle)
    else:
        scale = stored((high - low) / top, act["scale_dtype"])
        zero = (-low / scale).round().clamp(0, top)
    codes = (x / scale).round_().add_(zero).clamp_(0, top)
    return codes, scale.expand(len(x), 1), zero.expand(len(x), 1)


def stored(scale: Tensor, dtype: str) -> Tensor:
    """fp32 scale rounded to the dtype it is stored in, never 0 and never infinite; fp32 again."""
    kept = DTYPES[dtype]
    return scale.clamp(SMALLEST[dtype], torch.finfo(kept).max).to(kept).float()


def rounded_activations(x: Tensor, act: Json | None) -> Tensor:
    """x [m, k] -> [m, k] fp32 on the activation grid, as it is without one."""
    if act is None:
        return x.float()
    codes, scale, zero = activation_codes(x, act)
    return (codes - zero) * scale


def int_format(**knobs: object) -> Json:
    """The int format's JSON for cases and tests: defaults but for `knobs`."""
    plain = {
        "kind": "int",
        "group": 0,
        "bits": 4,
        "symmetric": False,
        "convention": "restricted",
        "per_tensor": False,
        "scale_dtype": "float32",
        "mse": False,
    }
    return {**plain, **knobs}


def random_weight(case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes [n, k] uint8 and parameters of a random weight."""
    top = 2 ** case.weight["bits"] - 1
    codes = torch.randint(0, top + 1, (case.n, case.k), generator=generator, dtype=torch.uint8)
    group = group_of(case.weight, case.k)
    shape = (1, 1) if case.weight.get("per_tensor") else (case.n, -(-case.k // group))
    params = {"scale": 0.01 + 0.01 * torch.rand(shape, generator=generator)}
    if case.weight["kind"] == "affine":
        params["zero"] = top * torch.rand(shape, generator=generator)
    elif not case.weight["symmetric"]:
        params["zero"] = torch.randint(0, top + 1, shape, generator=generator, dtype=torch.uint8)
    return codes, params
