"""Unequal levels for keys and values, outliers apart: KVQuant's codebooks, how they are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.cache.codec import Codec, Codes, pack_rows, unpack_rows
from kernels.packing import packed_bytes

HALF = torch.finfo(torch.float16)
TINY = torch.finfo(torch.float32).tiny
INDEX_BITS, VALUE_BITS = 16, 16  # of an outlier: its channel and its value
COUNT_BITS = 16  # of how many outliers the keys of a token have
RANGE_BITS = 32  # offset and half range of the values of a token


@dataclass(frozen=True)
class Levels:
    """Levels of numbers that were brought to [-1, 1]."""

    chosen: Tensor  # [2^bits] fp32, ascending: the nearest gives the code
    restored: Tensor  # [2^bits] fp32: what a code stands for; other than `chosen` under Q-Norm

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return (len(self.chosen) - 1).bit_length()

    def codes(self, z: Tensor) -> Tensor:
        """z [...] -> codes of the nearest levels [...] uint8; a middle takes the lower."""
        middles = (self.chosen[1:] + self.chosen[:-1]) / 2
        return torch.bucketize(z, middles.to(z.device)).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """codes [...] -> [...] fp32."""
        return self.restored.to(codes.device)[codes.long()]


@dataclass(frozen=True)
class Codebook:
    """Levels within a range for each channel; what lies outside is kept exactly if `sparse`."""

    levels: Levels
    lower: Tensor  # [C] fp32
    upper: Tensor  # [C] fp32
    sparse: bool = True

    def outliers(self, x: Tensor) -> Tensor:
        """x [..., C] -> True for what is kept exactly."""
        if not self.sparse:
            return torch.zeros_like(x, dtype=torch.bool)
        return (x < self.lower.to(x.device)) | (x > self.upper.to(x.device))

    def codes(self, x: Tensor) -> Tensor:
        """x [..., C] fp32 -> codes [..., C] uint8."""
        offset, half = self._range(x.device)
        return self.levels.codes((x - offset) / half.clamp_min(TINY))

    def values(self, codes: Tensor) -> Tensor:
        """codes [..., C] -> [..., C] fp32, outliers not among them."""
        offset, half = self._range(codes.device)
        return self.levels.values(codes) * half + offset

    def fake(self, x: Tensor) -> Tensor:
        """x [..., C] -> rounded, outliers exact, same shape and dtype."""
        rounded = self.values(self.codes(x.float())).to(x.dtype)
        return torch.where(self.outliers(x), x, rounded)

    def _range(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Offset and half range [C]."""
        lower, upper = self.lower.to(device), self.upper.to(device)
        return (upper + lower) / 2, (upper - lower) / 2


class PackedTokens(Codec):
    """Codes of all heads of a token as one stream of bits; parameters and outliers as they are."""

    levels: Levels

    def pack(self, codes: Codes) -> Codes:
        self._heads = codes["codes"].shape[1]
        flat = flatten(codes["codes"])  # [B, t, C]
        return {**codes, "codes": pack_rows(flat, self.levels.bits).unsqueeze(1)}

    def unpack(self, packed: Codes) -> Codes:
        flat = unpack_rows(packed["codes"].squeeze(1), self.levels.bits, self._channels(packed))
        return {**packed, "codes": unflatten(flat, self._heads)}

    def _channels(self, packed: Codes) -> int:
        """All channels of a token."""
        raise NotImplementedError(f"{type(self).__name__} does not say how many channels it has")


class KeyCodec(PackedTokens):
    """Keys by a fixed range per channel. Outliers lie in one list, token by token.

    `counts` [B, 1, t] says how many a token has; `index` [n] int16 are their channels, `exact` [n]
    fp16 their values, in the order of tokens, then sequences, then channels, so that later tokens
    come last.
    """

    def __init__(self, codebook: Codebook, share: float) -> None:
        self.codebook = codebook
        self.levels = codebook.levels
        self.share = share  # of keys that are outliers, expected

    def encode(self, x: Tensor) -> Codes:
        flat = flatten(x).float()  # [B, t, C]
        outside = self.codebook.outliers(flat)
        _, _, channel = outside.transpose(0, 1).nonzero(as_tuple=True)
        return {
            "codes": unflatten(self.codebook.codes(flat), x.shape[1]),
            "counts": outside.sum(-1, dtype=torch.int16).unsqueeze(1),
            "index": channel.to(torch.int16),
            "exact": half(flat.transpose(0, 1)[outside.transpose(0, 1)]),
        }

    def decode(self, codes: Codes) -> Tensor:
        values = self.codebook.values(flatten(codes["codes"]))  # [B, t, C]
        token, row = owners(codes["counts"])
        values[row, token, codes["index"].long()] = codes["exact"].float()
        return unflatten(values, codes["codes"].shape[1])

    def join(self, parts: Sequence[Codes]) -> Codes:
        along = {"codes": 2, "counts": 2, "index": 0, "exact": 0}
        return {name: torch.cat([part[name] for part in parts], at) for name, at in along.items()}

    def part(self, packed: Codes, start: int, stop: int) -> Codes:
        counts = packed["counts"]
        first = int(counts[:, :, :start].sum())
        last = first + int(counts[:, :, start:stop].sum())
        return {
            "codes": packed["codes"][:, :, start:stop],
            "counts": counts[:, :, start:stop],
            "index": packed["index"][first:last],
            "exact": packed["exact"][first:last],
        }

    def select(self, packed: Codes, rows: Tensor) -> Codes:
        counts = packed["counts"].squeeze(1).long()  # [B, t]
        ends = counts.T.flatten().cumsum(0).view(counts.shape[::-1])  # [t, B]
        starts = (ends - counts.T)[:, rows].flatten()  # of each kept token and sequence
        held = counts.T[:, rows].flatten()
        within = torch.arange(int(held.sum()), device=held.device)
        within -= (held.cumsum(0) - held).repeat_interleave(held)
        place = starts.repeat_interleave(held) + within
        return {
            "codes": packed["codes"].index_select(0, rows),
            "counts": packed["counts"].index_select(0, rows),
            "index": packed["index"][place],
            "exact": packed["exact"][place],
        }

    def typical(self, x: Tensor) -> Tensor:
        """As many outside the ranges as in the calibration."""
        flat = flatten(x).float()
        inside = max(1, round((1 - self.share) * flat.numel()))
        reach = flat.abs().flatten().kthvalue(inside).values
        lower, upper = self.codebook.lower.to(x.device), self.codebook.upper.to(x.device)
        return unflatten((upper + lower + flat / reach * (upper - lower)) / 2, x.shape[1])

    def bits_per_token(self, heads: int, dim: int) -> float:
        channels = heads * dim
        outliers = self.share * channels * (INDEX_BITS + VALUE_BITS)
        return 8 * packed_bytes(channels, self.levels.bits) + outliers + COUNT_BITS

    def _channels(self, packed: Codes) -> int:
        return len(self.codebook.lower)


class ValueCodec(PackedTokens):
    """Values by the range of each token, all heads together; its largest and smallest are exact.

    As many outliers in every token: `index` and `exact` are [B, 1, t, 2n].
    """

    def __init__(self, levels: Levels, outliers: float) -> None:
        self.levels = levels
        self.outliers = outliers  # share of a token's values

    def encode(self, x: Tensor) -> Codes:
        flat = flatten(x).float()  # [B, t, C]
        self._width = flat.shape[-1]
        offset, reach, index = inner_range(flat, self.outliers)
        offset, reach = half(offset), half(reach)
        z = (flat - offset.float()) / reach.float().clamp_min(TINY)
        return {
            "codes": unflatten(self.levels.codes(z), x.shape[1]),
            "offset": offset.unsqueeze(1),
            "reach": reach.unsqueeze(1),
            "index": index.to(torch.int16).unsqueeze(1),
            "exact": half(flat.gather(-1, index)).unsqueeze(1),
        }

    def decode(self, codes: Codes) -> Tensor:
        inner = {name: value.squeeze(1) for name, value in codes.items() if name != "codes"}
        values = self.levels.values(flatten(codes["codes"])) * inner["reach"].float()
        values += inner["offset"].float()
        values.scatter_(-1, inner["index"].long(), inner["exact"].float())
        return unflatten(values, codes["codes"].shape[1])

    def bits_per_token(self, heads: int, dim: int) -> float:
        channels = heads * dim
        outliers = 2 * per_side(self.outliers, channels) * (INDEX_BITS + VALUE_BITS)
        return 8 * packed_bytes(channels, self.levels.bits) + outliers + RANGE_BITS

    def _channels(self, packed: Codes) -> int:
        return self._width


def per_side(share: float, channels: int) -> int:
    """Outliers at each end of a token of so many channels: half the share, at least one if any.

    As many as lie at or outside linearly interpolated percentiles.
    """
    return math.ceil(round(share / 2 * channels, 6))


def inner_range(x: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., C] -> offset, half range [..., 1] of all but outliers; where those are [..., 2n]."""
    n = per_side(share, x.shape[-1])
    high, above = x.topk(n + 1, dim=-1)
    low, below = x.topk(n + 1, dim=-1, largest=False)
    low, high = low[..., n:], high[..., n:]
    index = torch.cat([below[..., :n], above[..., :n]], -1)
    return (high + low) / 2, (high - low) / 2, index


def owners(counts: Tensor) -> tuple[Tensor, Tensor]:
    """counts [B, 1, t] -> token and sequence of every outlier in a list [n], token by token."""
    batch, _, tokens = counts.shape
    place = torch.arange(tokens * batch, device=counts.device)
    place = place.repeat_interleave(counts.squeeze(1).T.flatten().long())
    return place // batch, place % batch


def flatten(x: Tensor) -> Tensor:
    """[B, H, t, D] -> [B, t, C], channels as projections give them."""
    return x.transpose(1, 2).flatten(2)


def unflatten(x: Tensor, heads: int) -> Tensor:
    """[B, t, C] -> [B, H, t, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def half(x: Tensor) -> Tensor:
    """fp32 -> fp16, never infinite: bf16 reaches further."""
    return x.clamp(-HALF.max, HALF.max).half()
