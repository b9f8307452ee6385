"""Activations as SDR integers, in plain torch: the format's own rule, all in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels.base import Json
from kernels.integers import stored

MANTISSA = 4  # significant bits of an FP8 e4m3 number
POSITIONS = 14  # shifts 0 to 14 of them fit beside each other, from 2^-9 to 2^5


def peak_of(act: Json) -> int:
    """Largest integer before low bits are cut."""
    return int(2 ** (act["base_bits"] - 1) - 1)


def scales(x: Tensor, act: Json) -> Tensor:
    """x [m, k] fp32 -> scale [m, 1], never 0 and never infinite."""
    peak = x.abs().amax(1, keepdim=True)
    peak = peak.amax(0, keepdim=True).expand(peak.shape) if act["per_tensor"] else peak
    return stored(peak.masked_fill(peak == 0, 1) / peak_of(act), act["scale_dtype"])


def cut(q: Tensor, act: Json) -> Tensor:
    """Whole numbers q [m, k] fp32 -> those left by SDR, fp32: a code times 2^shift each."""
    m, k = q.shape
    group = act["group"] or k
    units = functional.pad(q, (0, -k % group)).view(m, -1, group)
    width = torch.frexp(units.abs().amax(-1, keepdim=True)).exponent  # bit length, 0 for 0
    shift = (width + 1 - act["bits"]).clamp_min(0)
    top = 2 ** (act["bits"] - 1) - 1
    low = -top if act["saturation"] == "symmetric" else -top - 1
    codes = torch.ldexp(units, -shift).round_().clamp_(low, top)  # halves to even
    return torch.ldexp(codes, shift).view(m, -1)[:, :k]


def integers(x: Tensor, act: Json) -> tuple[Tensor, Tensor]:
    """x [m, k] -> whole numbers [m, k] fp32 below 2^(base_bits-1), or that negative; scale."""
    x = x.float()
    scale, peak = scales(x, act), peak_of(act)
    return cut((x / scale).round_().clamp_(-peak, peak), act), scale


def bytes_of(q: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of 16 bits fp32 -> high and low int8, q = 256 high + low."""
    whole = q.int()
    low = ((whole + 128) & 255) - 128
    return ((whole - low) >> 8).to(torch.int8), low.to(torch.int8)


def one_byte(act: Json) -> bool:
    """True if the integers fit in a byte each, and one product of bytes is enough."""
    return bool(act["base_bits"] <= 8)


def fits_fp8(form: Json) -> bool:
    """True if every value of this SDR format is an e4m3 number, up to one power of two for all."""
    return form["bits"] - 1 <= MANTISSA and form["base_bits"] - form["bits"] <= POSITIONS


def sdr_format(**knobs: object) -> Json:
    """The SDR format's JSON for cases and tests: defaults but for `knobs`."""
    plain = {
        "kind": "sdr",
        "base_bits": 8,
        "bits": 4,
        "group": 16,
        "saturation": "released",
        "per_tensor": False,
        "scale_dtype": "float32",
    }
    return {**plain, **knobs}
