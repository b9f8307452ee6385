"""Before a run is queued: the memory, disk and time it will take, from the model's config alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from backend.environment import cores, gpus

if TYPE_CHECKING:
    from backend.methods import Method
    from backend.model.families import Block
    from backend.model.identity import ModelFacts
    from backend.spec import RunSpec

PROGRAM_BYTES = 700 << 20  # Python with torch and transformers loaded
CORE_FLOPS = 30e9  # fp32 matrix products of one core; measured 25-45
GPU_FLOPS = 200e12  # bf16 matrix products of one recent GPU
HEADER_BYTES = 900  # of one saved linear: names, shapes, its format
UNSURE = 3.0  # the guess may be off by this factor, down and up
COLUMN_S = 1e-4  # of one column of one linear, however long: a few dozen small operations
START_S = 2.0  # of one stage: load, restore
TEXT_TOKENS = 250_000  # of an evaluation text whose windows are not limited
TASK_TOKENS = 200  # prompt and answers of one task item
CALIBRATED_PASSES = 2  # forward passes per block: statistics, then on to the next block


@dataclass(frozen=True)
class Estimate:
    """Of one run. `why_not` is a sentence with numbers where it cannot fit, else None."""

    memory_bytes: int  # peak on the device that computes
    host_bytes: int  # peak of main memory; the same on the CPU
    disk_bytes: int
    seconds: tuple[float, float]  # low, high
    why_not: str | None
    parts: Mapping[str, int] = field(default_factory=dict)  # of memory_bytes


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that memory and time depend on."""

    width: int  # of hidden states
    inner: int  # of the MLP, the widest input of a linear
    vocabulary: int


def estimate(
    spec: RunSpec, facts: ModelFacts, device: str = "cpu", home: Path | None = None
) -> Estimate:
    """What `spec` will take on `device`; `home` is where its files will lie."""
    shape = shape_of(facts.config)
    cuda = device.startswith("cuda")
    itemsize = compute_bytes(spec, cuda)
    host, parts = memory(spec, facts, shape, itemsize, cuda)
    disk = disk_bytes(spec, facts, itemsize)
    peak = sum(parts.values())
    why_not = misfit(peak, host, disk, cuda, home)
    return Estimate(peak, host, disk, seconds(spec, facts, shape, cuda), why_not, parts)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """From config.json."""
    width = int(config.get("hidden_size") or 4096)
    inner = config.get("intermediate_size") or config.get("ffn_dim") or 4 * width
    return Shape(width, int(inner), int(config.get("vocab_size") or 32000))


def compute_bytes(spec: RunSpec, cuda: bool) -> int:
    """Bytes of one number as it is computed with."""
    if spec.model.dtype != "auto":
        return 4 if spec.model.dtype == "float32" else 2
    return 2 if cuda or (spec.storage == "packed" and spec.steps) else 4


def memory(
    spec: RunSpec, facts: ModelFacts, shape: Shape, itemsize: int, cuda: bool
) -> tuple[int, dict[str, int]]:
    """Peak of main memory, and the parts of the peak on the device."""
    weights = facts.parameters * itemsize
    codes = facts.linear_parameters if spec.walks else 0  # one byte per code while simulated
    stream = stream_bytes(spec, shape, itemsize)
    hessians = hessian_bytes(spec, shape)
    logits = 3 * window_of(spec, facts) * shape.vocabulary * 4  # ours, the baseline's, fp32 copies
    if not cuda:
        parts = {
            "program": PROGRAM_BYTES,
            "weights": weights,
            "codes": codes,
            "hidden states": stream,
            "statistics": hessians,
            "logits": logits,
        }
        return sum(parts.values()), parts
    block = facts.layer_bytes * 3  # the block, its rounded copy and its codes
    quantizing = block + hessians + 64 * spec.calibration.length * shape.inner
    parts = {"weights": weights, "codes": codes, "logits": logits}
    if quantizing > sum(parts.values()):
        parts = {"one block": block, "statistics": quantizing - block}
    return PROGRAM_BYTES + weights + codes + stream, parts


def stream_bytes(spec: RunSpec, shape: Shape, itemsize: int) -> int:
    """Hidden states of all calibration tokens; three times with an original stream beside them."""
    if not spec.needs_calibration():
        return 0
    tokens = spec.calibration.samples * spec.calibration.length
    copies = 3 if any(step.prefix == "original" for step in spec.steps) else 1
    return copies * tokens * shape.width * itemsize


def hessian_bytes(spec: RunSpec, shape: Shape) -> int:
    """Three [K, K] of the block's width, one of the MLP's, and two copies while one is solved."""
    from backend.model.stats import Hessian

    if not any(Hessian in step.gathered() for step in spec.steps):
        return 0
    return 4 * (3 * shape.width**2 + 3 * shape.inner**2)


def window_of(spec: RunSpec, facts: ModelFacts) -> int:
    """Longest window of the text metrics, in tokens."""
    asked = [getattr(metric, "window", 0) or 2048 for metric in spec.metrics]
    return min(max(asked, default=2048), facts.context)


def disk_bytes(spec: RunSpec, facts: ModelFacts, itemsize: int) -> int:
    """Saved blocks: every linear as its own step stores it, kept ones as they compute."""
    if not spec.walks:
        return 0
    total = 0.0
    for matrix in matrices_of(facts):
        bits = [stored_bits(step, matrix) for step in spec.steps]
        total += matrix.weights * next((b for b in bits if b is not None), 8 * itemsize) / 8
        total += HEADER_BYTES
    return round(total)


def stored_bits(step: Method, matrix: Matrix) -> float | None:
    """Of a weight, scales and outliers included; None where the step leaves it as it is."""
    if step.exact or "weights" not in step.targets:
        return None
    found = step.on_linear(matrix.block, matrix.blocks, matrix.name)
    return None if found is None else found.stored_bits(matrix.n, matrix.k, matrix.in_attention)


@dataclass(frozen=True)
class Matrix:
    """One linear of one block, whose weights nobody has looked at."""

    block: Block
    blocks: int
    name: str
    n: int
    k: int

    @property
    def weights(self) -> int:
        """N times K."""
        return self.n * self.k

    @property
    def in_attention(self) -> bool:
        """Else in the feed-forward part."""
        return self.block.family.is_attention(self.name)


def matrices_of(facts: ModelFacts) -> list[Matrix]:
    """Every linear of every block, in order, sizes from the config."""
    from torch import nn

    from backend.model.families import Block, family_of

    family = family_of(facts.config)
    sizes = sizes_of(facts.config)
    return [
        Matrix(Block(index, nn.Module(), family), facts.blocks, name, *sizes[leaf])
        for index in range(facts.blocks)
        for name in chain(*family.waves)
        if (leaf := name.rpartition(".")[2]) in sizes
    ]


def sizes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """{last part of a linear's name: [N, K]}."""
    shape = shape_of(config)
    heads = int(config.get("num_attention_heads") or 1)
    head = int(config.get("head_dim") or shape.width // heads)
    queries, keys = heads * head, int(config.get("num_key_value_heads") or heads) * head
    sizes = {
        ("q_proj",): (queries, shape.width),
        ("k_proj", "v_proj"): (keys, shape.width),
        ("qkv_proj", "query_key_value"): (queries + 2 * keys, shape.width),
        ("o_proj", "out_proj", "dense"): (shape.width, queries),
        ("gate_proj", "up_proj", "fc1", "dense_h_to_4h"): (shape.inner, shape.width),
        ("gate_up_proj",): (2 * shape.inner, shape.width),
        ("down_proj", "fc2", "dense_4h_to_h"): (shape.width, shape.inner),
    }
    return {name: size for names, size in sizes.items() for name in names}


def seconds(spec: RunSpec, facts: ModelFacts, shape: Shape, cuda: bool) -> tuple[float, float]:
    """Low and high guess of the whole run."""
    rate = GPU_FLOPS if cuda else CORE_FLOPS * cores()
    work = 2.0 * facts.parameters * evaluated_tokens(spec, facts)
    matrices = matrices_of(facts) if spec.steps else []
    if spec.needs_calibration():
        tokens = spec.calibration.samples * spec.calibration.length
        work += 2.0 * facts.linear_parameters * tokens * passes_of(spec, matrices)
        if hessian_bytes(spec, shape):  # one for q, k and v, for o, for gate and up, and for down
            work += 2.0 * tokens * facts.blocks * (3 * shape.width**2 + shape.inner**2)
    solved = sum(spent_on(step, matrix, rate) for step in spec.steps for matrix in matrices)
    middle = START_S * len(spec.stages()) + work / rate + solved
    return middle / UNSURE, middle * UNSURE


def passes_of(spec: RunSpec, matrices: Sequence[Matrix]) -> float:
    """Forward passes of all calibration sequences through a block, the mean over the blocks."""
    blocks = {matrix.block.index: matrix for matrix in matrices}.values()
    size = (spec.calibration.samples, spec.calibration.length)
    asked = [
        lead.passes(*size)
        for step in spec.steps
        for matrix in blocks
        if (lead := step.on_block(matrix.block, matrix.blocks)) is not None
    ]
    return CALIBRATED_PASSES + sum(asked) / max(1, len(blocks))


def spent_on(step: Method, matrix: Matrix, rate: float) -> float:
    """Seconds that a step spends on the weights of one linear."""
    found = step.on_linear(matrix.block, matrix.blocks, matrix.name)
    if found is None:
        return 0.0
    return found.work(matrix.n, matrix.k) / rate + found.sweeps() * matrix.k * COLUMN_S


def evaluated_tokens(spec: RunSpec, facts: ModelFacts) -> int:
    """Tokens that the metrics run through the model."""
    total = 0
    for metric in spec.metrics:
        limit = getattr(metric, "limit", 0)
        if hasattr(metric, "window"):
            total += limit * window_of(spec, facts) if limit else TEXT_TOKENS
            total *= 2 if metric.needs_baseline else 1  # the 16-bit model runs beside it
        elif hasattr(metric, "read_tokens"):
            total += metric.read_tokens(facts.context)
        elif hasattr(metric, "shots"):
            total += (limit or 1000) * TASK_TOKENS * max(1, len(getattr(metric, "names", ())))
    return total


def misfit(peak: int, host: int, disk: int, cuda: bool, home: Path | None) -> str | None:
    """The first thing that does not fit, with both numbers."""
    if cuda:
        largest = max((gpu["memory_bytes"] or 0 for gpu in gpus()), default=0)
        if largest and peak > largest:
            return (
                f"it needs about {gigabytes(peak)} of GPU memory, the GPU has {gigabytes(largest)}"
            )
    if host > (there := main_memory()):
        return f"it needs about {gigabytes(host)} of memory, this machine has {gigabytes(there)}"
    if home is not None:
        free = shutil.disk_usage(existing(home)).free
        if disk > free:
            return f"it writes about {gigabytes(disk)}, {gigabytes(free)} are free in {home}"
    return None


def main_memory() -> int:
    """Bytes of main memory, or of this container's share of it."""
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.1f} GB"
