"""How large the quantized model is: bits per weight, bytes by part, cache bytes per token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from backend.cache.build import cache_bytes, cache_parts, token_bytes
from backend.metrics import METRICS
from backend.metrics.base import Measurement, Metric
from backend.model.families import blocks_of, cache_shape
from backend.model.quant_linear import PLAIN_BITS, LinearLike, QuantLinear

if TYPE_CHECKING:
    from backend.run import Run

PLAIN_BYTES = 2  # of everything no step touches: 16 bits, whatever dtype computes here


@dataclass(frozen=True)
class Sizes:
    """Of one model. `parts` in bytes: codes, scales, zeros, outliers, index, bias, norms, ..."""

    parts: Mapping[str, float]
    linear_weights: int  # weights of the block linears
    resident_bytes: int  # what this process holds for weights now
    notes: tuple[str, ...]  # where a packed container is wider than its codes

    LINEAR_PARTS: ClassVar[tuple[str, ...]] = tuple(PLAIN_BITS)

    @property
    def bits_per_weight(self) -> float:
        """Over the block linears."""
        held = sum(self.parts.get(name, 0) for name in self.LINEAR_PARTS)
        return 8 * held / max(self.linear_weights, 1)

    @property
    def stored_bytes(self) -> int:
        """All parts: what the weights take on disk."""
        return round(sum(self.parts.values()))

    @property
    def plain_bytes(self) -> int:
        """The same model in 16 bits."""
        rest = sum(self.parts.get(name, 0) for name in ("bias", "norms", "embeddings and head"))
        return PLAIN_BYTES * self.linear_weights + round(rest)


@METRICS.register
class Size(Metric):
    """Bits per weight of the block linears, bytes of the whole model, cache bytes per token.

    Scales, zeros, outliers and indices count. Tied weights count once. A simulated model computes
    with dense weights, so its bytes are those its codes take on disk; a packed model's are what
    it holds in memory.
    """

    kind: ClassVar[str] = "size"
    yields: ClassVar[tuple[str, ...]] = (
        "bits_per_weight",
        "weight_bytes",
        "compression",
        "kv_bytes_per_token",
    )

    def measure(self, run: Run) -> Iterator[Measurement]:
        sizes = sizes_of(run.model)
        packed = run.spec.storage == "packed" and not run.spec.is_baseline
        held = sizes.resident_bytes if packed else sizes.stored_bytes
        detail = {
            "parts": {name: round(value) for name, value in sizes.parts.items() if value},
            "stored_bytes": sizes.stored_bytes,
            "resident_bytes": sizes.resident_bytes,
            "basis": basis(run, packed),
            "notes": list(sizes.notes),
        }
        yield Measurement(
            "bits_per_weight", sizes.bits_per_weight, "bits", "lower", detail=bits_detail(sizes)
        )
        yield Measurement("weight_bytes", held, "bytes", "lower", detail=detail)
        plain = sizes.plain_bytes
        yield Measurement("compression", plain / held, "x", "higher", detail={"plain_bytes": plain})
        yield kv_measurement(run)


def sizes_of(model: nn.Module) -> Sizes:
    """Every tensor of the model counted once."""
    parts: dict[str, float] = defaultdict(float)
    weights = resident = 0
    notes: list[str] = []
    seen: set[int] = set()
    for block in blocks_of(model):
        for linear in block.linears().values():
            n, k = linear.out_features, linear.in_features
            weights += int(n) * int(k)  # type: ignore[arg-type]
            add_linear(parts, linear)
            resident += resident_of(linear)
            notes.append(linear.resident_note() if isinstance(linear, QuantLinear) else "")
            seen |= {id(t) for t in tensors(linear)}
    for name, tensor in named_tensors(model):
        if id(tensor) not in seen:  # tied weights are one tensor under two names
            seen.add(id(tensor))
            parts[part_of(name, tensor.dim())] += tensor.numel() * PLAIN_BYTES
            resident += tensor.numel() * tensor.element_size()
    return Sizes(dict(parts), weights, resident, tuple(sorted({n for n in notes if n})))


def add_linear(parts: dict[str, float], linear: nn.Module) -> None:
    """Bytes of one block linear, by part, onto the totals."""
    bits = linear.bits() if isinstance(linear, LinearLike) else PLAIN_BITS
    count = int(linear.in_features) * int(linear.out_features)  # type: ignore[arg-type]
    for name, per_weight in bits.items():
        parts[name] += per_weight * count / 8
    bias = getattr(linear, "bias", None)
    if bias is not None:
        parts["bias"] += bias.numel() * PLAIN_BYTES
    for value in (getattr(linear, "act_params", None) or {}).values():
        parts["activation scales"] += value.numel() * value.element_size()


def resident_of(linear: nn.Module) -> int:
    """Bytes a block linear holds in memory now."""
    if isinstance(linear, LinearLike):
        return linear.resident_bytes()
    return sum(t.numel() * t.element_size() for t in tensors(linear))


def tensors(module: nn.Module) -> Iterator[Any]:
    """Parameters and buffers of a module."""
    yield from module.parameters()
    yield from module.buffers()


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Stored parameters and buffers with their names; rotary tables are computed, not stored."""
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    yield from ((name, tensor) for name, tensor in model.named_buffers() if name in stored)


def part_of(name: str, dims: int) -> str:
    """What a tensor outside the block linears is: one-dimensional ones are norms or biases."""
    if dims >= 2:
        return "embeddings and head"
    return "bias" if name.endswith("bias") else "norms"


def bits_detail(sizes: Sizes) -> dict[str, Any]:
    """Bits per weight by part."""
    per_weight = {
        name: 8 * sizes.parts.get(name, 0) / max(sizes.linear_weights, 1)
        for name in sizes.LINEAR_PARTS
    }
    return {"bits": per_weight, "weights": sizes.linear_weights}


def basis(run: Run, packed: bool) -> str:
    """What weight_bytes counts, in words."""
    if packed:
        return "resident: the packed buffers this process holds"
    if run.spec.is_baseline:
        return "16-bit weights, whatever type computes here"
    return "stored: what the codes take on disk; a simulated model holds dense weights instead"


def kv_measurement(run: Run) -> Measurement:
    """Bytes that a token adds to the cache far from its start, in all layers.

    Of a recipe with a KV step: what a packed cache really grew by while it was filled, whatever
    storage the run has; a simulated cache holds rounded numbers in the type that computes.
    `cache_parts` in the detail says what any context takes (backend/cache/growth.py).
    """
    plain, context = plain_kv_bytes(run), run.context
    parts = [asdict(part) for part in cache_parts(run.caches)]
    detail: dict[str, Any] = {"plain_bytes": plain, "context": context, "cache_parts": parts}
    if not run.caches.rounds:
        return Measurement("kv_bytes_per_token", plain, "bytes", "lower", detail=detail)
    found = token_bytes(run.caches)
    detail |= {
        "basis": "measured: growth of a packed cache",
        "formula_bytes": found.formula,
        "measured_tokens": found.tokens,
        "compression": plain / found.measured,
        "bits_per_number": 8 * PLAIN_BYTES * found.measured / plain,
        "context_bytes": cache_bytes(run.caches, context),
        "plain_context_bytes": plain * context,
    }
    return Measurement("kv_bytes_per_token", found.measured, "bytes", "lower", detail=detail)


def plain_kv_bytes(run: Run) -> int:
    """Bytes a token adds to a 16-bit key-value cache: 2 tensors per layer."""
    config: Any = run.model.config
    heads, width = cache_shape(config)
    return 2 * int(config.get_text_config().num_hidden_layers) * heads * width * PLAIN_BYTES
