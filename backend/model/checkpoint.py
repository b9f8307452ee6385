"""Finished blocks on disk: one safetensors file each, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from backend.methods import METHODS
from backend.model.families import FIT, Block
from backend.model.quant_linear import LINEARS, LinearLike

HEADER = "quantarena"  # metadata key: {module path: {kind, config}}


class Checkpoint:
    """`folder`/000.safetensors, 001...: a block's replaced linears and its other tensors.

    Names: "linear/<module path>/<tensor>" and "block/<parameter>". The header's metadata says how
    to build each linear. A file that cannot be read counts as absent, so its block is done again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, index: int) -> Path:
        """File of one block."""
        return self.folder / f"{index:03d}.safetensors"

    def has(self, index: int) -> bool:
        """True if the block's file is there and whole."""
        try:
            with safe_open(self.path(index), framework="pt") as file:
                return HEADER in (file.metadata() or {})
        except (OSError, SafetensorError):
            return False

    def save(self, block: Block) -> None:
        """Write .part, fsync, rename: after a power loss the file is whole or absent."""
        tensors, linears = state_of(block)
        content = save(tensors, metadata={HEADER: json.dumps(linears)})
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.path(block.index).with_suffix(".part")
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path(block.index))
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"cannot write {len(content):,} bytes of block {block.index} to {self.folder}: "
                f"{error.strerror}",
            ) from None
        sync_folder(self.folder)

    def restore(self, block: Block) -> None:
        """Put the saved linears and tensors into the block, on its device, in its compute dtype."""
        METHODS.load()  # methods bring their own kinds of linears
        with safe_open(self.path(block.index), framework="pt") as file:
            linears = json.loads(file.metadata()[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, entry in linears.items():
            prefix = f"linear/{name}/"
            block.replace(name, rebuilt(block, name, entry, under(tensors, prefix)))
        block.keep_fit(**under(tensors, f"block/{FIT}."))
        own = block.module.state_dict()
        with torch.no_grad():
            for name, value in under(tensors, "block/").items():
                own[name].copy_(value)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def rebuilt(
    block: Block, name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> LinearLike:
    """One saved linear, where the linear that stands there now computes."""
    if entry["kind"] not in LINEARS:
        raise ValueError(
            f"block {block.index} was saved with a {entry['kind']!r} linear at {name}, which no "
            "installed method brings"
        )
    weight = block.get(name).weight
    assert isinstance(weight, Tensor)
    made = LINEARS[entry["kind"]].from_state(tensors, entry["config"], weight.dtype)
    return made.to(weight.device)


def state_of(block: Block) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything a block is: tensors by name, and {module path: {kind, config}}."""
    tensors: dict[str, Tensor] = {}
    linears: dict[str, Any] = {}
    for name, module in block.linears().items():
        if isinstance(module, LinearLike):
            state, config = module.to_state()
            tensors |= {f"linear/{name}/{key}": value for key, value in state.items()}
            linears[name] = {"kind": module.kind, "config": config}
    replaced = tuple(f"{name}." for name in linears)
    for name, value in block.module.state_dict().items():
        if not name.startswith(replaced):
            tensors[f"block/{name}"] = value
    # Clones: safetensors refuses tensors that share memory, views of fused ones for example.
    return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, linears


def sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
