"""Bit packing: codes of 1-8 bits to bytes and back, for files and kernels. Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """codes [...] uint8 below 2^bits -> [bytes] uint8, one dense stream, low bit first.

    Eight codes fill exactly `bits` bytes, so every width is handled as rows of eight.
    """
    check_bits(bits)
    flat = codes.flatten()
    if bits == 8:
        return flat.clone()
    if flat.numel() and int(flat.max()) >> bits:
        raise ValueError(f"code {int(flat.max())} does not fit in {bits} bits")
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)  # [R, 8]
    out = rows.new_zeros(rows.shape[0], bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        out[:, byte] |= rows[:, i] << shift  # uint8 shifts drop what leaves the byte
        if shift + bits > 8:
            out[:, byte + 1] |= rows[:, i] >> (8 - shift)
    return out.flatten()[: packed_bytes(flat.numel(), bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """[bytes] uint8 -> codes [count] uint8: the inverse of pack_bits."""
    check_bits(bits)
    if packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, "
            f"got {packed.numel()}"
        )
    if bits == 8:
        return packed.clone()
    rows = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)  # [R, bits]
    out = rows.new_empty(rows.shape[0], 8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = rows[:, byte] >> shift
        if shift + bits > 8:
            code = code | (rows[:, byte + 1] << (8 - shift))
        out[:, i] = code & ((1 << bits) - 1)
    return out.flatten()[:count].contiguous()


def check_bits(bits: int) -> None:
    """ValueError unless 1 <= bits <= 8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes are packed at 1 to 8 bits, not {bits}")
