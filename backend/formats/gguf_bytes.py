"""The bytes of GGUF blocks: where llama.cpp's files keep every bit of codes and scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.formats.base import Params, QTensor
from backend.formats.gguf import GGUF, TYPES


@dataclass(frozen=True)
class Plane:
    """`width` bits of each code: codes seen as [rows, parts, bytes], `parts` share a byte."""

    rows: int
    parts: int
    bytes: int
    width: int

    @property
    def size(self) -> int:
        """Bytes of the plane in one block."""
        return self.rows * self.bytes

    def pack(self, codes: Tensor) -> Tensor:
        """codes [M, rows parts bytes] -> [M, rows bytes] uint8; part i at bit i * width."""
        parts = (codes & (2**self.width - 1)).view(-1, self.rows, self.parts, self.bytes)
        return (parts << self._shifts(codes)).sum(2, dtype=torch.uint8).flatten(1)

    def unpack(self, data: Tensor) -> Tensor:
        """The inverse: [M, rows bytes] uint8 -> [M, rows parts bytes]."""
        parts = data.view(-1, self.rows, 1, self.bytes) >> self._shifts(data)
        return (parts & (2**self.width - 1)).flatten(1)

    def _shifts(self, like: Tensor) -> Tensor:
        shifts = torch.arange(self.parts, dtype=torch.uint8, device=like.device) * self.width
        return shifts[:, None]


HALVES = Plane(1, 2, 16, 4)  # element j low, j + 16 high
BITS = Plane(1, 8, 32, 1)  # bit e // 32 of byte e % 32
CRUMBS = Plane(2, 4, 32, 2)  # in each half, four elements 32 apart
# Lowest bits of the codes first; together as wide as a code.
PLANES: dict[str, tuple[Plane, ...]] = {
    "Q8_0": (Plane(32, 1, 1, 8),),
    "Q4_0": (HALVES,),
    "Q4_1": (HALVES,),
    "Q5_0": (HALVES, Plane(4, 8, 1, 1)),
    "Q5_1": (HALVES, Plane(4, 8, 1, 1)),
    "Q2_K": (CRUMBS,),
    "Q3_K": (CRUMBS, BITS),
    "Q4_K": (Plane(4, 2, 32, 4),),
    "Q5_K": (Plane(4, 2, 32, 4), BITS),
    "Q6_K": (Plane(2, 2, 64, 4), CRUMBS),
    "IQ4_NL": (HALVES,),
    "IQ4_XS": (Plane(8, 2, 16, 4),),
}
# Fields of a block in the order of ggml-common.h.
FIELDS = {
    "Q8_0": "d low",
    "Q4_0": "d low",
    "Q4_1": "d zero_d low",
    "Q5_0": "d high low",
    "Q5_1": "d zero_d high low",
    "Q2_K": "scales low d zero_d",
    "Q3_K": "high low scales d",
    "Q4_K": "d zero_d scales low",
    "Q5_K": "d zero_d scales high low",
    "Q6_K": "low high scales d",
    "IQ4_NL": "d low",
    "IQ4_XS": "d scales low",
}
SCALE_BYTES = {"Q2_K": 16, "Q3_K": 12, "Q4_K": 12, "Q5_K": 12, "Q6_K": 16, "IQ4_XS": 6}
Q3_SCALES = (Plane(1, 2, 8, 4), Plane(1, 4, 4, 2))  # low nibbles, then the upper two bits
XS_SCALES = (Plane(2, 4, 1, 2), Plane(4, 2, 1, 4))  # the upper two bits, then low nibbles


def to_bytes(q: QTensor) -> Tensor:
    """A weight on a `gguf` grid -> the rows of its tensor in a file, [N, bytes] uint8."""
    form = q.format
    if not isinstance(form, GGUF):
        raise ValueError(f"only gguf weights have gguf bytes, not {form.kind} ones")
    n, k = q.codes.shape
    if k % form.group:
        raise ValueError(
            f"{form.type}: blocks of {form.group} do not divide rows of {k}; a file takes another"
        )
    codes = q.codes.reshape(-1, form.group)  # [M, block]
    if form.type == "Q8_0":
        codes = codes ^ 128  # code - 128 as a signed byte
    made: dict[str, Tensor] = {"low": PLANES[form.type][0].pack(codes)}
    if len(PLANES[form.type]) > 1:
        low, high = PLANES[form.type]
        made["high"] = high.pack(codes >> low.width)
    for name in {"d", "zero_d"} & q.params.keys():
        made[name] = q.params[name].reshape(-1, 1).contiguous().view(torch.uint8)
    if form.type in SCALE_BYTES:
        made["scales"] = pack_scales(form.type, q.params)
    blocks = [made[name] for name in FIELDS[form.type].split()]
    return torch.cat(blocks, 1).view(n, -1)


def from_bytes(data: Tensor, form: GGUF) -> QTensor:
    """Rows of a tensor in a file, [N, bytes] uint8 -> codes and parameters: inverse of to_bytes."""
    n = len(data)
    sizes = field_sizes(form.type)
    blocks = data.reshape(-1, sum(sizes.values()))  # [M, bytes of a block]
    found = dict(zip(sizes, blocks.split(list(sizes.values()), 1), strict=True))
    found = {name: value.contiguous() for name, value in found.items()}
    planes = PLANES[form.type]
    codes = planes[0].unpack(found["low"])
    if len(planes) > 1:
        codes = codes | (planes[1].unpack(found["high"]) << planes[0].width)
    if form.type == "Q8_0":
        codes = codes ^ 128
    names = {"d", "zero_d"} & found.keys()
    params: Params = {name: found[name].view(torch.float16).view(n, -1) for name in names}
    if "scales" in found:
        for name, value in unpack_scales(form.type, found["scales"]).items():
            params[name] = value.view(n, -1, value.shape[1])
    return QTensor(codes.view(n, -1), params, form)


def field_sizes(kind: str) -> dict[str, int]:
    """{field: bytes} of one block in order."""
    low, *high = PLANES[kind]
    sizes = {"low": low.size, "high": high[0].size if high else 0, "d": 2, "zero_d": 2}
    sizes |= {"scales": SCALE_BYTES.get(kind, 0)}
    return {name: sizes[name] for name in FIELDS[kind].split()}


def pack_scales(kind: str, params: Params) -> Tensor:
    """Small integers of all blocks -> [M, bytes] uint8."""
    scale = params["scale"].reshape(-1, params["scale"].shape[2])  # [M, S]
    if kind == "Q6_K":
        return scale.contiguous().view(torch.uint8)
    if kind == "Q3_K":
        low, high = Q3_SCALES
        return torch.cat([low.pack(scale), high.pack(scale >> 4)], 1)
    if kind == "IQ4_XS":
        high, low = XS_SCALES
        return torch.cat([high.pack(scale >> 4), low.pack(scale)], 1)
    zero = params["zero_scale"].reshape(scale.shape)
    if kind == "Q2_K":
        return scale | zero << 4
    # Q4_K, Q5_K: six bits of the first four; the other four lend their top two bits to those.
    first, zero_first, last, zero_last = scale[:, :4], zero[:, :4], scale[:, 4:], zero[:, 4:]
    top, zero_top = last >> 4 << 6, zero_last >> 4 << 6
    return torch.cat([first | top, zero_first | zero_top, last & 15 | zero_last << 4], 1)


def unpack_scales(kind: str, data: Tensor) -> Params:
    """[M, bytes] uint8 -> small integers [M, S], the inverse of pack_scales."""
    if kind == "Q6_K":
        return {"scale": data.view(torch.int8)}
    if kind == "Q3_K":
        low, high = Q3_SCALES
        return {"scale": low.unpack(data[:, :8]) | high.unpack(data[:, 8:]) << 4}
    if kind == "IQ4_XS":
        high, low = XS_SCALES
        return {"scale": high.unpack(data[:, :2]) << 4 | low.unpack(data[:, 2:])}
    if kind == "Q2_K":
        return {"scale": data & 15, "zero_scale": data >> 4}
    first, zero_first, last = data.split(4, 1)
    scale = torch.cat([first & 63, last & 15 | first >> 6 << 4], 1)
    zero = torch.cat([zero_first & 63, last >> 4 | zero_first >> 6 << 4], 1)
    return {"scale": scale, "zero_scale": zero}


def bits_per_weight(kind: str) -> float:
    """What a whole block takes, by its bytes."""
    return 8 * sum(field_sizes(kind).values()) / TYPES[kind].block
