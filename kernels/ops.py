"""Kernels as torch ops, `quantarena::NAME`: one name on every device, traceable and compilable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Library.define and impl, not the custom_op decorator: 3.6 against 9.8 us a call on a CPU.
LIBRARY = torch.library.Library("quantarena", "DEF")


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """An op such as "twice(Tensor x, int n) -> Tensor" -> what calls it.

    `cpu` and `cuda` take the schema's arguments; `cuda` imports Triton only when called, and is
    left out where another op serves GPUs. `fake` makes an empty tensor of the result's shape, type
    and device.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"quantarena::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.quantarena, name).default  # the overload: no lookup at every call
