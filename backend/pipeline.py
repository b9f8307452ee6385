"""The block walk: quantize a model one decoder block at a time, resumable after every block.

Hidden states live on the CPU and advance in place; one block at a time is on the device. What
each step may look at comes from its `wanted()`, `waves()` and `prefix`; no method is named here.

Measured on the way, per block:
  weight_sqnr   W against W_hat, W as it stood right before the step that replaced the linear
                (after smoothing, say).
  output_sqnr   the linear's output at the end against the replaced linear's output, on the inputs
                that reached it just before it was replaced.
  block_sqnr    the whole block's output against the untouched block's, on the same input, which
                carries the error of earlier blocks.
  cumulative_sqnr  the block's output in this walk against its output in the 16-bit model: the
                errors of this block and of all before it.
All in dB, from at most SAMPLE_TOKENS tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from backend.layer_rules import On
from backend.methods.base import BlockInput, Method, Seen
from backend.metrics.base import Measurement
from backend.model.families import Block, blocks_of
from backend.model.stats import LayerStats, Stat
from backend.statistics import BlockStatistics, Moment

SAMPLE_TOKENS = 512
BATCH_TOKENS = 2048  # of one forward pass through a block; at least one sequence


class Cancelled(Exception):
    """The run was cancelled."""


class Blocks(Protocol):
    """Where finished blocks are kept (model/checkpoint.py)."""

    def has(self, index: int) -> bool: ...
    def save(self, block: Block) -> None: ...
    def restore(self, block: Block) -> None: ...


@dataclass(frozen=True)
class Listener:
    """Where a walk reports to, and whether it should go on."""

    note: Callable[[int | None, str, str], None]  # block, module, text
    measure: Callable[[Measurement], None]
    progress: Callable[[int, int, str, float], None]  # block, blocks, item, share of the whole walk
    should_stop: Callable[[], bool]

    def check(self) -> None:
        """Raise Cancelled if the run was cancelled."""
        if self.should_stop():
            raise Cancelled


@torch.no_grad()
def quantize(
    model: nn.Module,
    steps: Sequence[Method],
    ids: Tensor | None,
    checkpoint: Blocks,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    note: Callable[[int | None, str, str], None] = lambda block, module, text: None,
    measure: Callable[[Measurement], None] = lambda measurement: None,
    progress: Callable[[int, int, str, float], None] = lambda block, blocks, item, share: None,
    should_stop: Callable[[], bool] = lambda: False,
    statistics: Path | None = None,
) -> None:
    """Apply `steps` to every block, in place. ids [n, T]: calibration tokens, None if none needed.

    `statistics`: folder for summaries of weights and inputs, None for none of them.
    Without a step that looks at inputs, only a few sequences are walked, for the measurements.
    """
    listener = Listener(note, measure, progress, should_stop)
    blocks = blocks_of(model)
    unfinished = [block.index for block in blocks if not checkpoint.has(block.index)]
    last = max(unfinished, default=-1)  # the last block that needs the stream
    for text in check_rules(steps, blocks) if unfinished else ():
        note(None, "", text)
    shown = ids if needs_inputs(steps) else sample_of(ids)
    if shown is None and needs_inputs(steps):
        kinds = ", ".join(step.kind for step in steps if step.gathered())
        raise ValueError(f"{kinds}: calibration tokens are needed, none were given")
    for number, step in enumerate(steps if unfinished else ()):
        seen = Seen({}, device=device, **seen_of(listener, None, seed_of(seed, -1, number)))
        step.before(model, ids if ids is not None else torch.empty(0, 0).long(), seen)
    streams = Streams(model, blocks, steps, shown if unfinished else None, device, listener)
    for block in blocks:
        listener.check()
        listener.progress(block.index, len(blocks), "", block.index / len(blocks))
        with block.on(device):
            exact = streams.exact_output(block) if block.index <= last else None
            inputs = streams.enter(block, block.index < last)
            if block.index in unfinished:
                summaries = BlockStatistics(block, statistics)
                work = BlockWork(block, len(blocks), inputs, listener, seed, exact, summaries)
                work.run(steps)
                summaries.save()
                checkpoint.save(block)
            else:
                checkpoint.restore(block)
            streams.leave(block, block.index < last)
    listener.progress(len(blocks), len(blocks), "", 1.0)


def needs_inputs(steps: Sequence[Method]) -> bool:
    """True if any step looks at calibration inputs."""
    return any(step.wanted() or step.prefix == "original" for step in every_variant(steps))


def every_variant(steps: Sequence[Method]) -> list[Method]:
    """The steps in all the ways that their layer rules let them act."""
    return [variant for step in steps for variant in step.variants()]


def check_rules(steps: Sequence[Method], blocks: Sequence[Block]) -> list[str]:
    """ValueError if a layer rule matches nothing; notes on what else decides nothing."""
    notes = []
    for step in steps:
        free = [(block, name) for block in blocks for name in block.linears()]
        for rule in step.layers:
            if not any(rule.matches(block, len(blocks), name) for block, name in free):
                why = why_idle(rule, blocks)
                if not why:
                    notes.append(f"{step.kind}: {rule} decides nothing: earlier rules match first")
                    continue
                raise ValueError(f"{step.kind}: {rule} matches nothing; {why}")
            notes += [
                f"{step.kind}: {pattern!r} of {rule} names no linear of this model"
                for pattern in rule.idle_patterns(blocks)
            ]
            free = [(b, name) for b, name in free if not rule.matches(b, len(blocks), name)]
    return notes


def why_idle(rule: On, blocks: Sequence[Block]) -> str:
    """What there is instead of the blocks or linears that a rule asks for; "" if it has some."""
    covered = [block for block in blocks if rule.covers(block.index, len(blocks))]
    if not covered:
        return f"this model has blocks 0 to {len(blocks) - 1}"
    if any(rule.names(block, name) for block in covered for name in block.linears()):
        return ""
    return f"a block of this model has attn, ffn, {', '.join(covered[0].linears())}"


def sample_of(ids: Tensor | None) -> Tensor | None:
    """As many whole sequences as SAMPLE_TOKENS tokens need."""
    if ids is None or not ids.numel():
        return None
    return ids[: -(-SAMPLE_TOKENS // ids.shape[1])]


def seed_of(seed: int, block: int, step: int) -> int:
    """Seed of one step in one block: the same whether or not the walk was interrupted before."""
    digest = sha256(f"{seed}/{block}/{step}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def seen_of(listener: Listener, block: int | None, seed: int) -> dict[str, Any]:
    """The callbacks of a Seen, told which block it is about."""

    def note(text: str, linear: str) -> None:
        listener.note(block, linear, text)

    return {
        "note": note,
        "measure": listener.measure,
        "should_stop": listener.should_stop,
        "seed": seed,
    }


class Stream:
    """Hidden states [n, T, D] on the CPU, and the keyword arguments each block gets with them.

    The arguments are recorded per block: sliding-window and full attention layers get other masks,
    and some families two sets of rotary tables. They hold for every batch, because all sequences
    have one length; equal tensors are stored once.
    """

    def __init__(
        self,
        hidden: Tensor,
        arguments: Sequence[Mapping[str, Any]],
        device: torch.device | str,
        listener: Listener,
    ) -> None:
        self.hidden = hidden
        self.arguments = arguments
        self.device = device
        self.listener = listener

    def copy(self) -> Stream:
        """Another stream from the same states. They share memory until `through` parts them."""
        return Stream(self.hidden, self.arguments, self.device, self.listener)

    def batches(self, index: int, limit: int | None = None) -> Iterator[BlockInput]:
        """Inputs of block `index`: (hidden [B, T, D] on the device, keyword arguments)."""
        arguments = on_device(self.arguments[index], self.device)
        count, length = self.hidden.shape[:2]
        size = max(1, BATCH_TOKENS // length)
        for start in range(0, min(count, limit or count), size):
            self.listener.check()
            stop = min(start + size, limit or count)
            yield self.hidden[start:stop].to(self.device), arguments

    def through(self, block: Block) -> Stream:
        """A new stream: these states after the block."""
        out = torch.empty_like(self.hidden)
        self._fill(out, block)
        return Stream(out, self.arguments, self.device, self.listener)

    def advance(self, block: Block) -> None:
        """These states after the block, in place."""
        self._fill(self.hidden, block)

    def _fill(self, out: Tensor, block: Block) -> None:
        start = 0
        for hidden, arguments in self.batches(block.index):
            out[start : start + len(hidden)] = output_of(block, hidden, arguments).to(out.device)
            start += len(hidden)


Inputs = dict[Literal["quantized", "original"], Stream | None]


class Streams:
    """The stream through quantized blocks and, where a step needs it, through the original ones."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        steps: Sequence[Method],
        ids: Tensor | None,
        device: torch.device | str,
        listener: Listener,
    ) -> None:
        self.quantized: Stream | None = None
        self.original: Stream | None = None
        self.exact: Stream | None = None  # the sample tokens in the 16-bit model
        if ids is None:
            return
        self.quantized = first_inputs(model, blocks, ids, device, listener)
        if any(step.prefix == "original" for step in every_variant(steps)):
            self.original = self.quantized.copy()
        sample = self.quantized.hidden[: sequences_of(self.quantized)]
        self.exact = Stream(sample, self.quantized.arguments, device, listener)

    def exact_output(self, block: Block) -> Tensor | None:
        """What the untouched block gives in the 16-bit model, for the sample tokens [t, D]."""
        if self.exact is None:
            return None
        self.exact = self.exact.through(block)
        return self.exact.hidden.flatten(0, 1)[:SAMPLE_TOKENS].float()

    def enter(self, block: Block, onward: bool) -> Inputs:
        """What the untouched block receives; `onward`: the original stream moves past it."""
        inputs: Inputs = {"quantized": self.quantized, "original": self.original}
        if self.original is not None and onward:
            self.original = self.original.through(block)
        return inputs

    def leave(self, block: Block, onward: bool) -> None:
        """The finished block; `onward`: the quantized stream moves past it."""
        if self.quantized is not None and onward:
            self.quantized.advance(block)


def output_of(block: Block, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Hidden states after a block [B, T, D]; some families return a tuple with them first."""
    out = block.module(hidden, **arguments)
    return out[0] if isinstance(out, tuple) else out


def on_device(value: Any, device: torch.device | str) -> Any:
    """Tensors inside nested arguments, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(on_device(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: on_device(item, device) for key, item in value.items()}
    return value


def first_inputs(
    model: Any,
    blocks: Sequence[Block],
    ids: Tensor,
    device: torch.device | str,
    listener: Listener,
) -> Stream:
    """ids [n, T] -> what block 0 receives, and every block's keyword arguments.

    Runs the model with blocks that pass their input on, so embeddings are all it computes.
    """
    recorded: list[dict[str, Any]] = [{} for _ in blocks]
    hidden = torch.empty(0)
    home = model.get_input_embeddings().weight.device
    for number, row in enumerate(ids):
        listener.check()
        with passing(blocks, recorded) as seen:
            model.base_model(input_ids=row[None].to(home), use_cache=False)
        if number == 0:
            arguments = [dict(entry) for entry in recorded]
            hidden = torch.empty(len(ids), *seen[0].shape[1:], dtype=seen[0].dtype)  # [n, T, D]
        hidden[number] = seen[0][0].cpu()
    return Stream(hidden, arguments, device, listener)


@contextmanager
def passing(
    blocks: Sequence[Block], recorded: Sequence[dict[str, Any]]
) -> Iterator[dict[int, Tensor]]:
    """Blocks hand their input on; it is kept in what this yields, arguments in `recorded`."""
    inputs: dict[int, Tensor] = {}

    def stand_in(index: int) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *extra: Any, **arguments: Any) -> Tensor:
            if extra:
                raise ValueError(
                    f"block {index} of this model takes positional arguments, which the walk over "
                    "blocks cannot replay"
                )
            inputs[index] = hidden
            recorded[index].update(arguments)
            return hidden

        return forward

    for block in blocks:
        block.module.forward = stand_in(block.index)
    try:
        yield inputs
    finally:
        for block in blocks:
            del block.module.forward


Part = tuple[Method, list[str]]  # a step and the linears that get it


@dataclass(frozen=True)
class StepWork:
    """One step on one block, its layer rules decided."""

    waves: list[list[str]]  # of linears that are not kept; an empty one concerns the block itself
    steps: dict[str, Method]  # linear -> the step it gets; kept ones are missing
    lead: Method | None  # acts on the block itself; None: the whole block is kept

    @classmethod
    def of(cls, step: Method, block: Block, blocks: int) -> StepWork:
        """Of block `block` of `blocks`; without rules every linear gets `step` itself."""
        found = {name: step.on_linear(block, blocks, name) for name in block.linears()}
        steps = {name: ruled for name, ruled in found.items() if ruled is not None}
        lead = step.on_block(block, blocks) or next(iter(steps.values()), None)
        waves = lead.waves(block) if lead is not None else []
        kept = [[name for name in wave if name in steps] for wave in waves]
        return cls([k for k, wave in zip(kept, waves, strict=True) if k or not wave], steps, lead)

    def parts(self, wave: list[str]) -> list[Part]:
        """A wave's linears, those that get one step together, in the order of the wave."""
        parts: list[Part] = [] if wave or self.lead is None else [(self.lead, [])]
        for name in wave:
            step = self.steps[name]
            same = next((names for other, names in parts if other == step), None)
            if same is None:
                parts.append((step, [name]))
            else:
                same.append(name)
        return parts


class BlockWork:
    """All steps on one block."""

    def __init__(
        self,
        block: Block,
        blocks: int,
        inputs: Inputs,
        listener: Listener,
        seed: int,
        exact: Tensor | None,
        statistics: BlockStatistics,
    ) -> None:
        self.block = block
        self.blocks = blocks
        self.inputs = inputs
        self.listener = listener
        self.seed = seed
        self.exact = exact  # [t, D] what the block gives in the 16-bit model
        self.statistics = statistics
        self.references: dict[str, tuple[Tensor, Tensor]] = {}  # linear -> inputs, outputs before

    def run(self, steps: Sequence[Method]) -> None:
        """Every step, wave by wave, then the measurements."""
        self.statistics.weights("before")
        before = self.sample_output("before")
        for number, step in enumerate(steps):
            work = StepWork.of(step, self.block, self.blocks)
            for done, wave in enumerate(work.waves):
                self.listener.check()
                share = (number + done / len(work.waves)) / len(steps)
                self.report(step.kind, share)
                self.apply(work, number, wave, share, 1 / len(work.waves) / len(steps))
        self.measure_outputs(before)
        self.statistics.weights("after")
        for measurement in self.statistics.measurements():
            self.listener.measure(measurement)

    def report(self, item: str, share: float) -> None:
        """Progress inside the block, 0 to 1, as a share of the whole walk."""
        whole = (self.block.index + share) / self.blocks
        self.listener.progress(self.block.index, self.blocks, item, whole)

    def apply(
        self, work: StepWork, number: int, wave: list[str], share: float, span: float
    ) -> None:
        """One wave of one step: its linears by the step each of them gets."""
        before = {name: module for name, module in self.block.linears().items() if name in wave}
        sample = self.sample_inputs(list(before))
        parts = work.parts(wave)
        stats = self.statistics_of(parts)
        for done, (step, names) in enumerate(parts):
            start, width = share + span * done / len(parts), span / len(parts)
            seen = self.seen(step, {name: stats[name] for name in names}, number, start, width)
            seen.steps = work.steps
            step.apply(self.block, seen)
            if "weights" in step.targets:
                self.measure_weights({name: before[name] for name in names if name in before})
        self.keep_references(before, sample)

    def statistics_of(self, parts: Sequence[Part]) -> dict[str, LayerStats]:
        """Statistics of a wave's linears, gathered at once where the same ones are wanted."""
        together: dict[tuple[Any, ...], list[str]] = {}
        for step, names in parts:
            together.setdefault((step.prefix, step.wanted()), []).extend(names)
        stats: dict[str, LayerStats] = {}
        for (prefix, wanted), names in together.items():
            stats |= gather(self.block, self.inputs[prefix], wanted, names, self.listener)
        return stats

    def seen(
        self, step: Method, stats: Mapping[str, LayerStats], number: int, start: float, width: float
    ) -> Seen:
        """What a step is shown; its progress runs from `start` over `width` of the block."""
        stream = self.inputs[step.prefix]
        return Seen(
            stats,
            (lambda: stream.batches(self.block.index)) if stream is not None else None,
            progress=lambda fraction: self.report(step.kind, start + width * fraction),
            **seen_of(
                self.listener, self.block.index, seed_of(self.seed, self.block.index, number)
            ),
        )

    def sample_output(self, moment: Moment) -> Tensor | None:
        """Output of the block as it is, for the first tokens of the quantized stream [t, D]."""
        stream = self.inputs["quantized"]
        if stream is None:
            return None
        hidden, arguments = next(stream.batches(self.block.index, sequences_of(stream)))
        with watching(self.block, self.statistics.linears(), self.statistics.see(moment)):
            out = output_of(self.block, hidden, arguments)
        return out.flatten(0, 1)[:SAMPLE_TOKENS].float()

    def sample_inputs(self, names: list[str]) -> dict[str, Tensor]:
        """Inputs [t, K] of the linears whose reference is not known yet."""
        stream = self.inputs["quantized"]
        wanted = [name for name in names if name not in self.references]
        if stream is None or not wanted:
            return {}
        rows: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> None:
            rows[name] = x.reshape(-1, x.shape[-1])[:SAMPLE_TOKENS].clone()

        with watching(self.block, wanted, keep):
            hidden, arguments = next(stream.batches(self.block.index, sequences_of(stream)))
            output_of(self.block, hidden, arguments)
        return rows

    def keep_references(
        self, before: Mapping[str, nn.Module], sample: Mapping[str, Tensor]
    ) -> None:
        """What replaced linears gave before, on their sampled inputs."""
        for name, x in sample.items():
            if self.block.get(name) is not before[name]:
                self.references[name] = (x, before[name](x).float())

    def measure_weights(self, before: Mapping[str, nn.Module]) -> None:
        """weight_sqnr of the linears that a weight step replaced."""
        for name, old in before.items():
            new = self.block.get(name)
            weight = getattr(new, "weight", None)
            same = isinstance(weight, Tensor) and weight.shape == old.weight.shape
            if new is not old and same and isinstance(weight, Tensor):
                assert isinstance(old.weight, Tensor)
                self.send("weight_sqnr", name, old.weight, weight, weight.numel())

    def measure_outputs(self, before: Tensor | None) -> None:
        """output_sqnr of every replaced linear, block_sqnr and cumulative_sqnr of the block."""
        for name, (x, y) in self.references.items():
            self.send("output_sqnr", name, y, self.block.get(name)(x), len(x))
        after = self.sample_output("after")
        for name, exact in (("block_sqnr", before), ("cumulative_sqnr", self.exact)):
            if exact is not None and after is not None:
                self.send(name, "", exact.to(after.device), after, len(after))

    def send(self, name: str, module: str, exact: Tensor, rounded: Tensor, n: int) -> None:
        """One SQNR measurement of this block."""
        value = sqnr(exact, rounded)
        layer = (self.block.index, module)
        self.listener.measure(Measurement(name, value, "dB", "higher", n=n, layer=layer))


def sequences_of(stream: Stream) -> int:
    """Whole sequences within SAMPLE_TOKENS tokens, at least one."""
    return max(1, SAMPLE_TOKENS // stream.hidden.shape[1])


def sqnr(exact: Tensor, rounded: Tensor) -> float:
    """10 log10(sum exact^2 / sum (exact - rounded)^2) in dB, sums in fp64; inf if equal."""
    exact = exact.float()
    noise = (exact - rounded.float()).square().sum(dtype=torch.float64)
    signal = exact.square().sum(dtype=torch.float64)
    return float(10 * (signal / noise).log10()) if noise else math.inf


@contextmanager
def watching(
    block: Block, names: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Calls see(name, x) whenever one of the named linears receives x."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, given: see(name, given[0])

    handles = [block.get(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gather(
    block: Block,
    stream: Stream | None,
    needs: Sequence[type[Stat]],
    wave: Sequence[str],
    listener: Listener,
) -> dict[str, LayerStats]:
    """Statistics of a wave's linears; those that receive the same tensor share one set of them."""

    def note_of(name: str) -> Callable[[str], None]:
        return lambda text: listener.note(block.index, name, text)

    if not needs or not wave or stream is None:
        return {name: LayerStats({}, note_of(name)) for name in wave}
    gathered = Gathering(block, needs)
    for hidden, arguments in stream.batches(block.index):
        gathered.see(hidden, arguments, wave)
    silent = [name for name in wave if name not in gathered.stats]
    if silent:
        raise ValueError(f"block {block.index} never calls {silent[0]}; it cannot be calibrated")
    return {name: LayerStats(gathered.stats[name], note_of(name)) for name in wave}


class Gathering:
    """Feeds statistics from the inputs of linears, batch by batch."""

    def __init__(self, block: Block, needs: Sequence[type[Stat]]) -> None:
        self.block = block
        self.needs = needs
        self.stats: dict[str, dict[type[Stat], Stat]] = {}
        self.leader: dict[str, str] = {}  # linear -> the first one that received its tensor

    def see(self, hidden: Tensor, arguments: Mapping[str, Any], wave: Sequence[str]) -> None:
        """One batch through the block."""
        received: list[tuple[str, Tensor]] = []  # holds the tensors, so identity cannot be reused

        def keep(name: str, x: Tensor) -> None:
            if name not in self.leader:
                first = next((other for other, seen in received if seen is x), name)
                self.leader[name] = first
                self.stats[name] = self.stats.get(first) or self.fresh(x)
            if self.leader[name] == name:
                received.append((name, x))
                for stat in self.stats[name].values():
                    # OPT's fc1 gets [B T, K]; the Hessian counts sequences, so B is put back.
                    stat.update(x.reshape(*hidden.shape[:2], -1) if x.dim() == 2 else x)

        with watching(self.block, wave, keep):
            output_of(self.block, hidden, arguments)

    def fresh(self, x: Tensor) -> dict[type[Stat], Stat]:
        """Empty statistics for inputs like x."""
        return {need: need(x.shape[-1], x.device) for need in self.needs}
