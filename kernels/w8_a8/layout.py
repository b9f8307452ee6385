"""Rows of bytes as int8 products read them: input channels padded to whole blocks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

BLOCK = 64  # input channels; a row then starts at a multiple of 16 bytes, a tensor core's load


def padded(codes: Tensor) -> Tensor:
    """codes [n, k] -> [n, width], width the next multiple of BLOCK; 0 past k adds nothing."""
    return functional.pad(codes, (0, -codes.shape[1] % BLOCK)).contiguous()


def unpadded(codes: Tensor, k: int) -> Tensor:
    """The inverse of `padded`."""
    return codes[:, :k]
