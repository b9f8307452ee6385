"""KVQuant: keys before rotary positions per channel, values per token, on learned levels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from backend.cache.nonuniform import Codebook, KeyCodec, Levels, ValueCodec, inner_range, per_side
from backend.formats.codebook import normal_float
from backend.methods import METHODS
from backend.methods.base import Method, Seen, Target
from backend.model.families import Block, blocks_of, cache_shape

if TYPE_CHECKING:
    from backend.cache.layer import RoundedLayer
    from backend.cache.watch import Samples

Table = Literal["kmeans", "normal", "uniform"]
TINY = torch.finfo(torch.float64).tiny
ROUNDS = 50  # of k-means, as in the released code
EDGES = 512  # equal steps, and as many equal counts, that may part clusters at the start
RIDGE = 1e-9  # of the mean weight, for all: clusters without weight have a mean too
FIT_BYTES = 64  # of one number of a block while its levels are fitted: sorting, sums in fp64


@METHODS.register
class KVQuant(Method):
    """Round keys before rotary positions and values to levels found by k-means; outliers exact.

    Hooper et al. 2024, "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache
    Quantization". Keys have a fixed range per channel, from calibration, values the range of each
    token. One table of levels per block for keys and one for values: k-means of the calibration
    numbers brought to [-1, 1], weighted by squared gradients of the loss (the diagonal of the
    Fisher information). Outliers on both sides and the first tokens stay in 16 bits.
    """

    kind: ClassVar[str] = "kvquant"
    targets: ClassVar[frozenset[Target]] = frozenset({"kv_cache"})
    in_blocks: ClassVar[bool] = False
    fits: ClassVar[bool] = True
    bits: int = Field(3, ge=2, le=4, description="Bits of one code; 2^bits levels.")
    outliers: float = Field(
        0.01,
        ge=0,
        le=0.2,
        description="Share kept in 16 bits: keys outside their channel's percentiles, a token's "
        "largest and smallest values. 0 is none.",
    )
    sinks: int = Field(
        1, ge=0, le=1024, description="First tokens of a sequence in 16 bits, not calibrated on."
    )
    table: Table = Field(
        "kmeans",
        description="Levels. kmeans: learned; normal: quantiles of the normal distribution; "
        "uniform: equal steps.",
    )
    fisher: Literal["released", "scaled", "off"] = Field(
        "released",
        description="Weights in k-means. released: squared gradients, as in the released code; "
        "scaled: those times the squared range, which is the error of the keys themselves; off: "
        "all alike, without a backward pass.",
    )
    norm: bool = Field(
        False,
        description="Q-Norm: shift and stretch the levels read back, so that mean and deviation "
        "of calibration numbers survive. For 2 bits.",
    )
    rope: Literal["pre", "post"] = Field(
        "pre", description="Keys are rounded before or after rotary positions."
    )
    prefill: Literal["quant", "fp"] = Field(
        "quant",
        description="What a prompt's own attention reads before an answer: rounded or exact keys "
        "and values. Scoring a text reads the rounded ones.",
    )

    def waves(self, block: Block) -> list[list[str]]:
        return []

    def code_bits(self, target: Target) -> float | None:
        return float(self.bits) if target == "kv_cache" else 16.0

    @property
    def slopes(self) -> bool:
        """True if the levels need gradients."""
        return self.table == "kmeans" and self.fisher != "off"

    def passes(self, samples: int, length: int) -> float:
        return 3.0 if self.slopes else 1.0  # forward, forward again, backward

    def check_cache(self, model: nn.Module) -> None:
        from backend.cache.build import has_rotary

        if self.rope == "pre" and not has_rotary(model):
            raise ValueError(
                "kvquant: this model has no rotary positions, before which keys could be rounded; "
                "use rope=post"
            )
        heads, width = cache_shape(model.config)
        if 2 * per_side(self.outliers, heads * width) >= heads * width - 1:
            raise ValueError(
                f"kvquant: outliers {self.outliers:g} of the {heads * width} values of a token "
                "leave none to round; use fewer"
            )

    def before(self, model: nn.Module, ids: Tensor, seen: Seen) -> None:
        """Levels and ranges of every block, from the model as it comes."""
        self.check_cache(model)
        if not ids.numel() or ids.shape[1] <= max(1, self.sinks):
            raise ValueError(
                f"kvquant: calibration sequences of {ids.shape[-1]} tokens leave none to learn "
                f"levels from after the first {max(1, self.sinks)}; use longer ones"
            )
        blocks = blocks_of(model)
        ruled = {block.index: self.on_block(block, len(blocks)) for block in blocks}
        steps = {index: step for index, step in ruled.items() if isinstance(step, KVQuant)}
        slopes = any(step.slopes for step in steps.values())
        device = roomy(model, ids, slopes, seen)
        at_once = blocks_at_once(model, ids, slopes)
        home = model.get_input_embeddings().weight.device  # type: ignore[operator]
        model.to(device)
        try:
            for kind in ("pre", "post"):
                wanted = [index for index, step in steps.items() if step.rope == kind]
                for start in range(0, len(wanted), at_once):
                    part = wanted[start : start + at_once]
                    self._fit(model, blocks, ids, {i: steps[i] for i in part}, seen)
        finally:
            model.to(home)

    def _fit(
        self,
        model: nn.Module,
        blocks: list[Block],
        ids: Tensor,
        steps: Mapping[int, KVQuant],
        seen: Seen,
    ) -> None:
        """One pass over the calibration tokens for some blocks, all of one `rope`."""
        from backend.cache.watch import watch

        first = next(iter(steps.values()))
        found = watch(
            model,
            blocks,
            ids,
            slopes=any(step.slopes for step in steps.values()),
            pre_rope=first.rope == "pre",
            wanted=list(steps),
            go_on=lambda: not seen.should_stop(),
        )
        for index, step in steps.items():
            if seen.should_stop():
                return
            fit = step.fitted(found.pop(index))
            blocks[index].keep_fit(**fit)
            for name in ("key", "value"):
                distinct = len(fit[f"{name}_levels"].unique())
                if distinct < 2**step.bits:
                    seen.note(f"block {index}: only {distinct} distinct levels of {name}s")

    def fitted(self, samples: Samples) -> dict[str, Tensor]:
        """Samples of one block -> tables and ranges, fp32, by name."""
        keys, values = self._after_sinks(samples.keys), self._after_sinks(samples.values)
        how: dict[str, Any] = {
            "table": self.table,
            "scaled": self.fisher == "scaled",
            "norm": self.norm,
        }
        book = fit_codebook(keys, self._weights(samples.key_slope), self.bits, self.outliers, **how)
        levels = fit_values(
            values, self._weights(samples.value_slope), self.bits, self.outliers, **how
        )
        return {
            "key_levels": book.levels.chosen,
            "key_restored": book.levels.restored.clone(),  # a tensor is kept once
            "key_lower": book.lower,
            "key_upper": book.upper,
            "value_levels": levels.chosen,
            "value_restored": levels.restored.clone(),
        }

    def _after_sinks(self, x: Tensor) -> Tensor:
        """[n, T, C] -> [n (T - sinks), C] fp32.

        Sinks set no range either, as in the paper; the released code spares k-means alone.
        """
        return x[:, self.sinks :].flatten(0, 1).float()

    def _weights(self, slope: Tensor | None) -> Tensor | None:
        """Gradients [n, T, C] -> weights of k-means, squares."""
        if slope is None or not self.slopes:
            return None
        return self._after_sinks(slope).square()

    def cache_layer(
        self, index: int, fit: Mapping[str, Tensor] | None = None, *, packed: bool = False
    ) -> RoundedLayer:
        from backend.cache.layer import RoundedLayer, Side

        if not fit or len(fit["key_levels"]) != 2**self.bits:
            raise ValueError(
                f"kvquant: block {index} has no table of {2**self.bits} levels; quantize the run "
                "first"
            )
        levels = Levels(fit["key_levels"], fit["key_restored"])
        book = Codebook(levels, fit["key_lower"], fit["key_upper"], self.outliers > 0)
        keys = KeyCodec(book, self.outliers)
        values = ValueCodec(Levels(fit["value_levels"], fit["value_restored"]), self.outliers)
        return RoundedLayer(
            Side(keys, sinks=self.sinks, pre_rope=self.rope == "pre"),
            Side(values, sinks=self.sinks),
            packed=packed,
            prefill=self.prefill,
        )


# -- fitting -------------------------------------------------------------------------------------


def fit_codebook(
    x: Tensor,
    fisher: Tensor | None,
    bits: int,
    outliers: float,
    *,
    table: Table = "kmeans",
    scaled: bool = False,
    norm: bool = False,
) -> Codebook:
    """x [tokens, channels], weights alike or None -> one table for all channels, a range for each.

    `outliers`: the share outside the range, half on each side; 0 makes the range reach all.
    """
    if x.dim() != 2 or not len(x):
        raise ValueError(f"a codebook is fitted to [tokens, channels], not to {list(x.shape)}")
    x = x.float()
    lower, upper = percentiles(x, outliers)
    half = (upper - lower) / 2  # [C]
    z = (x - (upper + lower) / 2) / half.clamp_min(torch.finfo(torch.float32).tiny)
    inside = (x >= lower) & (x <= upper)
    weight = None if fisher is None else fisher.float() * (half.square() if scaled else 1.0)
    levels = fit_levels(z[inside], None if weight is None else weight[inside], bits, table, norm)
    return Codebook(levels, lower, upper, outliers > 0)


def fit_values(
    x: Tensor,
    fisher: Tensor | None,
    bits: int,
    outliers: float,
    *,
    table: Table = "kmeans",
    scaled: bool = False,
    norm: bool = False,
) -> Levels:
    """x [tokens, channels], weights alike or None -> one table for tokens in their own range.

    The range is that of the token once its outliers are gone, as when it is cached; the released
    calibration takes percentiles, which on few channels lie far from it.
    """
    x = x.float()
    offset, half, index = inner_range(x, outliers)
    z = (x - offset) / half.clamp_min(torch.finfo(torch.float32).tiny)
    inside = torch.ones_like(x, dtype=torch.bool).scatter_(-1, index, False)
    weight = None if fisher is None else fisher.float() * (half.square() if scaled else 1.0)
    return fit_levels(z[inside], None if weight is None else weight[inside], bits, table, norm)


def percentiles(x: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    """x [tokens, C] -> lower, upper [C]: half the share of each channel lies outside each.

    Interpolated linearly.
    """
    rows = x.T.contiguous()  # [C, tokens]
    return percentile(rows, outliers / 2), percentile(rows, 1 - outliers / 2)


def percentile(rows: Tensor, share: float) -> Tensor:
    """rows [C, n] -> [C] fp32, below which that share of each row lies; torch.quantile sorts."""
    place = share * (rows.shape[1] - 1)
    below = math.floor(place)
    above = min(below + 1, rows.shape[1] - 1)
    low, high = (rows.kthvalue(rank + 1, 1).values.double() for rank in (below, above))
    return (low + (high - low) * (place - below)).float()


def fit_levels(z: Tensor, weight: Tensor | None, bits: int, table: Table, norm: bool) -> Levels:
    """z [n] within [-1, 1], weights [n] or None -> levels; with `norm` those of Q-Norm."""
    if table == "kmeans":
        chosen = kmeans(z, weight, 2**bits)
    else:
        tables = {"normal": normal_float(bits), "uniform": torch.linspace(-1, 1, 2**bits).tolist()}
        chosen = torch.tensor(tables[table], device=z.device)
    levels = Levels(chosen, chosen)
    if not norm:
        return levels
    rounded = levels.values(levels.codes(z))
    stretch = z.double().std() / rounded.double().std().clamp_min(RIDGE)
    shift = z.double().mean() - rounded.double().mean() * stretch
    return Levels(chosen, (chosen * stretch + shift).float())


def kmeans(z: Tensor, weight: Tensor | None, clusters: int) -> Tensor:
    """z [n], weights [n] or None -> means [clusters] fp32, ascending, of least weighted squares.

    Lloyd's rounds on sorted numbers, from the best partition at EDGES equal steps and counts. No
    random start, so no seed; the released code takes one k-means++ start of scikit-learn.
    """
    z, order = z.sort()
    wide = z.double()
    mass = torch.ones_like(z) if weight is None else weight[order]
    mass = mass.double() / mass.double().mean().clamp_min(TINY) + RIDGE
    sums = torch.stack([mass, mass * wide, mass * wide.square()])  # [3, n]
    sums = nn.functional.pad(sums.cumsum(1), (1, 0))  # [3, n + 1], of all before
    steps = torch.linspace(float(z[0]), float(z[-1]), EDGES + 1, device=z.device)
    counts = torch.linspace(0, len(z), EDGES + 1, device=z.device).long()
    edges = torch.cat([torch.searchsorted(z, steps), counts]).unique()  # 0 and n among them
    cuts = edges[best_cuts(sums[:, edges], min(clusters, len(edges) - 1))]
    levels = means(sums, cuts)
    for _ in range(ROUNDS):
        middles = (levels[1:] + levels[:-1]) / 2
        inner = torch.searchsorted(wide, middles)
        moved = torch.cat([cuts[:1], inner, cuts[-1:]])
        if torch.equal(moved, cuts) or bool((moved[1:] == moved[:-1]).any()):
            break
        cuts, levels = moved, means(sums, moved)
    spare = levels[-1:].expand(clusters - len(levels))  # fewer distinct numbers than levels
    return torch.cat([levels, spare]).float()


def means(sums: Tensor, cuts: Tensor) -> Tensor:
    """Sums of mass and mass times number before each place, cuts [k + 1] -> means [k] fp64."""
    mass, first, _ = sums[:, cuts].diff(dim=1)
    return first / mass


def best_cuts(sums: Tensor, clusters: int) -> Tensor:
    """Sums [3, M + 1] before each edge -> the edges [clusters + 1] of least squares within.

    Dynamic programming over all edges, one cluster more at a time.
    """
    mass, first, second = sums[:, None, :] - sums[:, :, None]  # [M + 1, M + 1], from row to column
    cost = second - first.square() / mass
    cost = cost.clamp_min(0).masked_fill(mass <= 0, torch.inf)
    best, choices = cost[0], []
    for _ in range(clusters - 1):
        best, last = (best[:, None] + cost).min(0)
        choices.append(last)
    cuts = [sums.shape[1] - 1]
    for last in reversed(choices):
        cuts.append(int(last[cuts[-1]]))
    return torch.tensor([0, *reversed(cuts)], device=sums.device)


# -- memory --------------------------------------------------------------------------------------


def roomy(model: nn.Module, ids: Tensor, slopes: bool, seen: Seen) -> torch.device:
    """The device of the run if a pass fits there, else the CPU. ValueError if neither can."""
    from backend.baseline import free_bytes

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    inner = pass_bytes(model, ids.shape[1], slopes)
    if seen.device.type != "cpu":
        if weights + inner <= free_bytes(str(seen.device)):
            return seen.device
        seen.note("calibrated on the CPU: the whole model does not fit on the device")
    free = free_bytes("cpu")
    if inner > free:
        raise ValueError(
            f"kvquant: a pass over {ids.shape[1]} tokens takes about {inner / 2**30:.1f} GiB "
            f"beside the model and {free / 2**30:.1f} GiB are free; use shorter calibration "
            "sequences" + (" or fisher=off" if slopes else "")
        )
    return torch.device("cpu")


def pass_bytes(model: nn.Module, length: int, slopes: bool) -> int:
    """What one sequence takes beside the weights, about; with slopes all that backward needs."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    width, vocabulary = int(config.hidden_size), int(config.vocab_size)
    inner = 4 * int(getattr(config, "intermediate_size", None) or 4 * width) + 16 * width
    scores = length * int(config.num_attention_heads)  # of a token, where attention forms them
    size = next(model.parameters()).element_size()
    borders = len(blocks_of(model)) * width if slopes else 0
    logits = vocabulary * 4 * (3 if slopes else 1)
    return length * (size * (borders + inner + 2 * scores) + logits)


def blocks_at_once(model: nn.Module, ids: Tensor, slopes: bool) -> int:
    """Blocks whose samples fit in main memory together. ValueError if those of one do not."""
    from backend.baseline import free_bytes

    heads, width = cache_shape(model.config)
    numbers = ids.numel() * heads * width
    size = next(model.parameters()).element_size()
    each = numbers * size * (4 if slopes else 2)
    free, fitting = free_bytes("cpu"), numbers * FIT_BYTES
    count = (free - fitting) // (2 * each)  # twice: rows, then all of them in one
    if count < 1:
        raise ValueError(
            f"kvquant: {ids.numel()} calibration tokens take {(2 * each + fitting) / 2**30:.1f} "
            f"GiB in one block and {free / 2**30:.1f} GiB are free; use fewer samples"
        )
    return int(count)


RECIPES = {
    **{f"KVQuant-{bits}bit-1%": f"kvquant(bits={bits})" for bits in (4, 3, 2)},
    **{
        f"KVQuant-{bits}bit-1%, exact prompt": f"kvquant(bits={bits},prefill=fp)"
        for bits in (4, 3, 2)
    },
}
