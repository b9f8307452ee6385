"""ZeroQuant: integers in groups of weights and per token; block after block distilled (LKD)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from backend.formats import Format
from backend.formats.base import GroupField, Params, QTensor
from backend.formats.int_group import IntGroup
from backend.layer_rules import On
from backend.methods import METHODS
from backend.methods.base import LinearMethod, Seen, Target, grid_bits
from backend.metrics.base import Measurement
from backend.model.quant_linear import QuantLinear, qtensor_from_state
from backend.model.stats import Stat

if TYPE_CHECKING:
    from backend.model.families import Block
    from kernels.base import Kernel

HELD_OUT = 8  # one calibration sequence in so many is never trained on
CHECKS = 20  # of the held-out loss, spread over the steps


class BlockInputs(Stat):
    """Keeps nothing: asks for calibration sequences, which LKD reads as the block's own inputs."""

    def update(self, x: Tensor) -> None:
        pass


@METHODS.register
class ZeroQuant(LinearMethod):
    """Round weights in groups and inputs per token; distil each block from the original (LKD).

    Yao et al. 2022, "ZeroQuant: Efficient and Affordable Post-Training Quantization for
    Large-Scale Transformers", sections 4.1 and 4.2. Grids as in DeepSpeed's SymQuantizer:
    symmetric, scale = peak / 2^(b-1), the positive peak clipped by a step. LKD trains a block's
    fp32 weights to give the original block's outputs on the original model's inputs, gradients
    passing straight through the rounding. Where we differ from the released code: a group of
    zeros stays zero; groups that do not divide end short; the loss is divided by the variance of
    the teacher's output; the step of least held-out loss is kept; Adam without its weight decay,
    1e-5 times these learning rates being under half a unit in the last place of fp32.
    """

    kind: ClassVar[str] = "zeroquant"
    targets: ClassVar[frozenset[Target]] = frozenset({"weights", "activations"})
    needs: ClassVar = (BlockInputs,)
    of_block: ClassVar[frozenset[str]] = frozenset(
        {"lkd_steps", "lkd_rate", "lkd_schedule", "lkd_batch", "lkd_patience"}
    )
    bits_attn: int = Field(8, ge=2, le=8, description="Bits of attention weights.")
    bits_ffn: int = Field(4, ge=2, le=8, description="Bits of feed-forward weights.")
    bits_a: int = Field(
        8, ge=2, le=16, description="Bits of inputs, a scale per token; 16 leaves them alone."
    )
    symmetric_a: bool = Field(
        True, description="Levels of inputs symmetric around 0; off: from each token's own range."
    )
    groups: int = Field(
        0,
        ge=0,
        le=1 << 24,
        description="Number of groups of a matrix, cut row after row into pieces of one size, "
        "which may span rows; 0: as `group` says. The papers' parameter; 4096 in the tables.",
    )
    group: GroupField = 0
    lkd_steps: int = Field(
        0, ge=0, le=2000, description="Most training steps per block; 0: none, and no data."
    )
    lkd_rate: float = Field(
        5e-6, gt=0, le=1e-2, description="Learning rate: about the most a weight moves per step."
    )
    lkd_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate over the steps; linear and cosine end at 0."
    )
    lkd_batch: int = Field(4, ge=1, le=256, description="Sequences per training step.")
    lkd_patience: int = Field(
        3, ge=1, le=CHECKS, description="Checks of the held-out loss without a new best, then stop."
    )

    @model_validator(mode="after")
    def _knobs_agree(self) -> Self:
        if self.groups and self.group:
            raise ValueError(
                f"zeroquant: groups={self.groups} counts the groups of a matrix, group={self.group}"
                " is their size along a row; give one of them"
            )
        if 8 < self.bits_a < 16:
            raise ValueError(
                f"zeroquant: bits_a={self.bits_a}: inputs take 2 to 8 bits, or 16 to stay as they "
                "are"
            )
        return self

    @property
    def prefix(self) -> Literal["quantized", "original"]:  # type: ignore[override]
        """The teacher's inputs where it teaches; without LKD nothing is looked at."""
        return "original" if self.lkd_steps else "quantized"

    def check_rule(self, rule: On) -> None:
        """As for every method; other knobs for some linears only where nothing is distilled."""
        super().check_rule(rule)
        distilled = self.lkd_steps or any(other.knobs.get("lkd_steps") for other in self.layers)
        if rule.modules and not rule.keep and distilled:
            raise ValueError("LKD trains a block as a whole; leave out modules or LKD")

    def wanted(self) -> tuple[type[Stat], ...]:
        """Calibration sequences for LKD, else nothing."""
        return self.needs if self.lkd_steps else ()

    def code_bits(self, target: Target) -> float | None:
        """Bits of a feed-forward weight, which most weights are, or of an input."""
        return {"weights": self.bits_ffn, "activations": self.bits_a}.get(target)

    def passes(self, samples: int, length: int) -> float:
        """Teacher, student and two for the gradient per sequence trained on; two per check."""
        if not self.lkd_steps:
            return 0.0
        return 4 * self.lkd_steps * self.lkd_batch / samples + 2 * CHECKS / HELD_OUT

    def stored_bits(self, n: int, k: int, attention: bool) -> float:
        """Codes of its half of the block, and scales."""
        bits = self.bits_attn if attention else self.bits_ffn
        view, grid = self.layout(torch.Size((n, k)), bits)
        return grid_bits(grid, min(view[1], 8 * grid.group or view[1]))

    def apply(self, block: Block, seen: Seen) -> None:
        chosen = {name: plain_linear(block, name) for name in seen.stats}
        trained = self.distil(block, list(chosen), seen) if self.lkd_steps else chosen
        if seen.should_stop():  # the walk ends before it keeps this block
            return
        for name, linear in chosen.items():
            bits = self.bits_of(block, name)
            rounded = self.rounded(trained[name], bits, linear.weight.dtype)
            if rounded.qtensor is not None and ragged(rounded.qtensor, self.groups):
                size = rounded.qtensor.format.group
                count = linear.weight.numel()
                seen.note(
                    f"{self.groups} groups do not divide {count} weights; groups of {size}, the "
                    "last one shorter",
                    name,
                )
            block.replace(name, rounded)

    def bits_of(self, block: Block, name: str) -> int:
        """Bits of the weights of a linear."""
        return self.bits_attn if block.family.is_attention(name) else self.bits_ffn

    def rounded(self, linear: nn.Module, bits: int, dtype: torch.dtype) -> QuantLinear:
        """A linear with fp32 or 16-bit weights -> on its grid, computing in `dtype`."""
        w = linear.get_parameter("weight").detach().float()  # [N, K]
        view, grid = self.layout(w.shape, bits)
        q = grid.quantize(w.reshape(view))
        bias = getattr(linear, "bias", None)
        act = self.input_grid()
        if view == w.shape:
            return QuantLinear(q, bias, act=act, dtype=dtype)
        dense = q.dequantize().view(w.shape)
        return PieceLinear(q, bias, act=act, dtype=dtype, dense=dense)

    def layout(self, shape: torch.Size, bits: int) -> tuple[torch.Size, IntGroup]:
        """Weight [N, K] -> the shape it is viewed in [P, M] and the grid of that view.

        A view of whole rows where the pieces fit into them; else a piece per row of the view;
        else, where the last piece is shorter, all weights in one row.
        """
        view, group = shape, self.group
        if self.groups:
            count, k = shape.numel(), shape[1]
            size = -(-count // self.groups)
            if k % size == 0:
                group = size if size < k else 0
            elif count % size == 0:
                view = torch.Size((count // size, size))
            else:
                view, group = torch.Size((1, count)), size
        return view, IntGroup(
            bits=bits, group=group, symmetric=True, convention="full", scale_dtype="float16"
        )

    def input_grid(self) -> IntGroup | None:
        """The grid of inputs, a scale per token."""
        if self.bits_a == 16:
            return None
        return IntGroup(bits=self.bits_a, symmetric=self.symmetric_a, convention="full")

    # -- LKD -------------------------------------------------------------------------------------

    def distil(self, block: Block, names: list[str], seen: Seen) -> dict[str, nn.Module]:
        """Train the block's weights -> fp32 linears by name; biases and norms change in place."""
        lesson = self.lesson(block, names, seen)
        curve = self.train(lesson, seen)
        report(curve, block.index, seen)
        linears = {name: lesson.student.get_submodule(name) for name in names}
        own = dict(block.module.named_parameters())
        for name, value in lesson.student.named_parameters():
            if name.rpartition(".")[0] not in names and value.requires_grad:
                own[name].copy_(value.detach())
        return linears

    def lesson(self, block: Block, names: list[str], seen: Seen) -> Lesson:
        """Teacher, student and sequences of one block."""
        batches = list(seen.inputs())
        if not batches:
            raise ValueError(
                f"{self.kind}: LKD needs a block and its calibration inputs, and none came; set "
                "lkd_steps=0"
            )
        hidden = torch.cat([hidden.cpu() for hidden, _ in batches])  # [n, T, D]
        kept = max(1, len(hidden) // HELD_OUT)
        held_out, rest = hidden[-kept:], hidden[:-kept]
        if not len(rest):
            seen.note("one calibration sequence: LKD was checked on what it was trained on")
            rest = held_out
        teacher = deepcopy(block.module).float()
        student = deepcopy(teacher).requires_grad_(True)
        for name in block.linears():
            if name in names:
                self.enrol(student, name, self.bits_of(block, name))
            else:
                student.get_submodule(name).requires_grad_(False)
        return Lesson(teacher, student, rest, held_out, in_fp32(batches[0][1]))

    def enrol(self, student: nn.Module, name: str, bits: int) -> None:
        """Put a rounding linear with the same fp32 weights in the place of a plain one."""
        linear = student.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        view, grid = self.layout(linear.weight.shape, bits)
        parent, _, leaf = name.rpartition(".")
        learner = RoundingLinear(linear, view, grid, self.input_grid())
        setattr(student.get_submodule(parent), leaf, learner)

    def train(self, lesson: Lesson, seen: Seen) -> list[Check]:
        """Train the student; it ends with the weights of the least held-out loss -> the curve."""
        learned = [p for p in lesson.student.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learned, lr=self.lkd_rate)
        rate = SCHEDULES[self.lkd_schedule]
        curve = [Check(0, lesson.held_out_loss(), math.nan)]
        best, stale, losses = copies(learned), 0, []
        every = max(1, self.lkd_steps // CHECKS)
        for step, rows in enumerate(lesson.batches(self.lkd_batch, seen.generator()), 1):
            if step > self.lkd_steps or stale == self.lkd_patience or seen.should_stop():
                break
            optimizer.param_groups[0]["lr"] = self.lkd_rate * rate((step - 1) / self.lkd_steps)
            with torch.enable_grad():
                loss = lesson.loss(rows)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step % every and step < self.lkd_steps:
                continue
            least = min(check.held_out for check in curve)
            curve.append(Check(step, lesson.held_out_loss(), sum(losses) / len(losses)))
            stale, losses = stale + 1, []
            if curve[-1].held_out < least:
                best, stale = copies(learned), 0
            seen.progress(step / self.lkd_steps)
        for parameter, value in zip(learned, best, strict=True):
            parameter.copy_(value)
        return curve


def plain_linear(block: Block, name: str) -> nn.Linear:
    """The named linear, which must not be quantized yet."""
    linear = block.get(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"zeroquant: {name} of block {block.index} is already quantized by an earlier step; "
            "keep one weight step and put activations after it"
        )
    return linear


def ragged(q: QTensor, groups: int) -> bool:
    """Whether a matrix cut into `groups` pieces ends with a shorter one."""
    return bool(groups and q.format.group and q.codes.shape[1] % q.format.group)


# ---- linears -------------------------------------------------------------------------------


PACKED_GROUPS = (128, 64, 32, 16)  # of which kernels take some


class PieceLinear(QuantLinear):
    """A QuantLinear whose groups span rows: codes [P, M], the weights row after row."""

    kind: ClassVar[str] = "zeroquant"

    def with_act(self, act: Format, act_params: Params | None = None) -> PieceLinear:
        """The same weights, inputs rounded to `act`."""
        if self.act is not None:
            raise ValueError(
                f"activations are already rounded to {self.act.kind}; keep one activations step"
            )
        assert self.qtensor is not None
        kept: dict[str, Any] = {"dtype": self.weight.dtype, "dense": self.weight}
        return PieceLinear(self.qtensor, self.bias, act=act, act_params=act_params, **kept)

    def why_not_packed(self) -> str:
        """Kernels have groups within rows; one that spans rows must fall into such pieces."""
        if not self.common_group():
            return (
                "its groups span rows and end within groups of 16 channels, which no kernel here "
                "takes; give group= instead of groups="
            )
        return super().why_not_packed()

    def common_group(self) -> int:
        """Input channels that divide both a piece and a row, as kernels like them; 0 if none do."""
        assert self.qtensor is not None
        common = math.gcd(
            self.qtensor.format.group or self.qtensor.codes.shape[1], self.in_features
        )
        return next((group for group in PACKED_GROUPS if common % group == 0), 0)

    def by_rows(self) -> QTensor:
        """The same numbers as [N, K], in shorter groups that repeat the scales of their pieces."""
        q, group = self.qtensor, self.common_group()
        assert q is not None
        shape = self.out_features, self.in_features
        size = q.format.group or q.codes.shape[1]
        piece = torch.arange(0, math.prod(shape), group, device=q.codes.device) // size
        params = {name: t.flatten()[piece].view(shape[0], -1) for name, t in q.params.items()}
        return QTensor(q.codes.view(shape), params, q.format.model_copy(update={"group": group}))

    def packed_form(self) -> dict[str, Any]:
        """The format of what `pack` hands over."""
        return self.by_rows().format.data()

    def pack(self, kernel: Kernel) -> None:
        """Hand rows with groups of their own to `kernel`."""
        if not self.why_not_packed():
            self.qtensor = self.by_rows()
        super().pack(kernel)

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As QuantLinear, with the shape of the codes."""
        tensors, config = super().to_state()
        assert self.qtensor is not None
        return tensors, config | {"pieces": list(self.qtensor.codes.shape)}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
    ) -> PieceLinear:
        plain = QuantLinear.from_state(tensors, {**config, "shape": config["pieces"]}, dtype)
        return cls(
            qtensor_from_state(tensors, config["qtensor"], config["pieces"]),
            plain.bias,
            act=plain.act,
            act_params=plain.act_params,
            dtype=dtype,
            dense=plain.weight.view(config["shape"]),
        )


class Rounding(torch.autograd.Function):
    """fn(x), whose gradient is taken to be that of x: the straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        return fn(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class RoundingLinear(nn.Module):
    """y = act(x) W_hat^T + b, W_hat made from the fp32 weights [N, K] in every call."""

    def __init__(
        self, linear: nn.Linear, view: torch.Size, grid: IntGroup, act: IntGroup | None
    ) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.view, self.grid, self.act = view, grid, act

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.act is not None:
            x = Rounding.apply(x, self.act.fake)
        return functional.linear(x, Rounding.apply(self.weight, self.fake), self.bias)

    def fake(self, w: Tensor) -> Tensor:
        """w [N, K] rounded."""
        return self.grid.fake(w.reshape(self.view)).view(w.shape)


# ---- training ------------------------------------------------------------------------------


SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps done -> of the rate
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass(frozen=True)
class Check:
    """Losses at one step: held out, and the mean over the training steps since the last check."""

    step: int
    held_out: float
    training: float  # nan before the first step


class Lesson:
    """One block as teacher and student, both fp32, and the sequences they are shown.

    Both receive the same masks and positions. Sequences stay on the CPU, [n, T, D]; the teacher
    answers anew each time, for its answers would be twice as large as they.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        sequences: Tensor,
        held_out: Tensor,
        arguments: Mapping[str, Any],
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.sequences = sequences
        self.held_out = held_out
        self.arguments = arguments
        self.device = next(teacher.parameters()).device
        self.variance = self.output_variance()

    def answer(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What a block gives for hidden [B, T, D]."""
        out = block(hidden.to(self.device).float(), **self.arguments)
        return out[0] if isinstance(out, tuple) else out

    def output_variance(self) -> float:
        """Of all elements of the teacher's held-out outputs; 1 where they are all equal."""
        variances = [self.answer(self.teacher, row[None]).var() for row in self.held_out]
        return torch.stack(variances).mean().item() or 1.0

    def loss(self, hidden: Tensor) -> Tensor:
        """Mean squared difference of the two outputs, as a share of the teacher's variance."""
        with torch.no_grad():
            exact = self.answer(self.teacher, hidden)
        return functional.mse_loss(self.answer(self.student, hidden), exact) / self.variance

    def held_out_loss(self) -> float:
        """Mean loss of the sequences that are not trained on."""
        with torch.no_grad():
            return torch.stack([self.loss(row[None]) for row in self.held_out]).mean().item()

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """[B, T, D] without end, every sequence once before any comes again."""
        while True:
            order = torch.randperm(len(self.sequences), generator=generator)
            for rows in order.split(size):
                yield self.sequences[rows]


def in_fp32(value: Any) -> Any:
    """Floating-point tensors inside nested arguments, in fp32: masks must match the student."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(in_fp32(item) for item in value)
    if isinstance(value, Mapping):
        return {key: in_fp32(item) for key, item in value.items()}
    return value


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Values as they are now."""
    return [parameter.detach().clone() for parameter in parameters]


def report(curve: list[Check], index: int, seen: Seen) -> None:
    """Every check as a per-layer value of its own, and what the whole training gained."""
    for check in curve:
        layer = (index, f"step {check.step:04d}")
        seen.measure(Measurement("lkd_loss", check.held_out, "x", "lower", layer=layer))
    best = min(curve, key=lambda check: check.held_out)
    first = curve[0].held_out
    detail = {
        "step": best.step,
        "steps": [check.step for check in curve],
        "held_out": [check.held_out for check in curve],
        "training": [check.training for check in curve],
    }
    gain = best.held_out / first if first else 1.0
    seen.measure(Measurement("lkd_gain", gain, "x", "lower", layer=(index, ""), detail=detail))
    if len(curve) > 1 and best.step == 0:
        seen.note("LKD lowered the held-out loss at no step; the weights are rounded as they were")


TABLES = "zeroquant(bits_attn={},bits_ffn={},bits_a={},groups=4096{})"
LAST = ",layers=[on(blocks=last,lkd_steps={},lkd_rate={})]"
RECIPES = {
    "ZeroQuant W8A8": TABLES.format(8, 8, 8, ""),
    "ZeroQuant W4/8A16": TABLES.format(8, 4, 16, ""),
    "ZeroQuant W4/8A8": TABLES.format(8, 4, 8, ""),
    "ZeroQuant W4A4": TABLES.format(4, 4, 4, ""),
    "ZeroQuant W4/8A16 LKD": TABLES.format(8, 4, 16, ",lkd_steps=100"),
    "ZeroQuant W4/8A8 LKD": TABLES.format(8, 4, 8, ",lkd_steps=100"),
    "ZeroQuant W4/8A8 g128": "zeroquant(bits_attn=8,bits_ffn=4,bits_a=8,group=128)",
    "ZeroQuant W4/8A8 g128 LKD": "zeroquant(bits_attn=8,bits_ffn=4,bits_a=8,group=128,"
    "lkd_steps=100)",
    **{
        f"ZeroQuant W4/8A16 LKD last layer, {steps} steps": TABLES.format(
            8, 4, 16, LAST.format(steps, "5e-06")
        )
        for steps in (100, 200, 400, 600)
    },
    **{
        f"ZeroQuant W4A4 LKD last layer, {steps} steps": TABLES.format(
            4, 4, 4, LAST.format(steps, "1e-06")
        )
        for steps in (100, 200, 400)
    },
}
