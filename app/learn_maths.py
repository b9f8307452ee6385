"""What a recipe makes of one small matrix: codes, scales, errors, outputs, bits, loss curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from app import form
from app.learn_state import (
    MOST_SIDE,
    MOST_TOKENS,
    Lesson,
    State,
    following,
    matrix,
    method_of,
    values_of,
)
from backend.formats import QTensor
from backend.formats.base import Format, Params
from backend.formats.int_group import IntGroup
from backend.lesson import Walk, gptq_walk, rounded
from backend.methods import METHODS
from backend.recipes import parse, render
from backend.registry import one_sentence

CURVES: Mapping[str, str] = {"smoothquant": "alpha"}  # the knob a kind is about, else its bits
SEARCH = "awq_loss"  # a search over exponents 0, 1/n, ... that a method reports itself
STEPS = 20  # of a curve over 0..1


@dataclass(frozen=True)
class Applied:
    """A lesson's recipe applied. W_hat is what x is multiplied by in the end."""

    lesson: Lesson
    w_hat: Tensor  # [N, K]
    y: Tensor  # [T, N] of the rounded layer
    scale: Tensor  # [K] what the inputs were divided by, 1 where nothing moved
    q: QTensor | None
    x_hat: Tensor | None  # [T, K] the inputs as they were rounded, scale taken out again
    bits: Mapping[str, float]
    notes: tuple[str, ...]
    losses: tuple[float, ...] = field(default=())  # of a search over exponents 0, 1/n, ...

    @property
    def exact(self) -> Tensor:
        """y [T, N] without rounding."""
        return self.lesson.x @ self.lesson.w.T

    @property
    def moved(self) -> bool:
        """True if a scale went from the inputs into the weights."""
        return bool((self.scale != 1).any())

    @property
    def loss(self) -> float:
        """Mean squared error of the output."""
        return (self.y - self.exact).square().mean().item()

    @property
    def relative(self) -> float:
        """Error of the output against the output, both as root mean squares."""
        size = self.exact.square().mean().sqrt().item()
        return self.loss**0.5 / size if size else 0.0

    def params_at(self, row: int, column: int) -> Params:
        """The parameters that cover one weight, each a scalar or a short list."""
        if self.q is None:
            return {}
        group = int(self.q.group_of_column()[column])
        part = self.q.format.params_of(self.q.params, group)
        return {name: value[min(row, len(value) - 1)] for name, value in part.items()}


@lru_cache(maxsize=512)
def applied_text(w: str, x: str, recipe: str) -> Applied | str:
    """`apply` of texts that hold, remembered; what went wrong as a sentence."""
    lesson = Lesson(
        matrix("W", w, MOST_SIDE, MOST_SIDE), matrix("x", x, MOST_TOKENS, MOST_SIDE), parse(recipe)
    )
    try:
        return apply(lesson)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        return one_sentence(error)


def applied(state: State, lesson: Lesson) -> Applied:
    """The lesson's recipe on its matrix. ValueError in one sentence where it cannot be."""
    found = applied_text(state.w, state.x, lesson.recipe)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def apply(lesson: Lesson) -> Applied:
    """Every step on W, with x for calibration data."""
    made = rounded(lesson.steps, lesson.w, lesson.x)
    losses = next((m.detail["losses"] for m in made.measured if m.name == SEARCH and m.detail), ())
    return Applied(
        lesson=lesson,
        w_hat=made.weight,
        y=made.output,
        scale=made.scale,
        q=made.qtensor,
        x_hat=made.inputs,
        bits=made.bits,
        notes=made.notes,
        losses=tuple(losses),
    )


# ---- three ways by hand --------------------------------------------------------------------


@dataclass(frozen=True)
class ByHand:
    """One way to put W on a grid of few levels, worked out step by step."""

    title: str
    codes: Tensor  # [N, K]
    step: Tensor  # [K] what one level is worth in each column
    w_hat: Tensor
    y: Tensor  # [T, N]
    recipe: str  # that does it; "" where none should

    def loss(self, exact: Tensor) -> float:
        """Sum of squared errors of the output."""
        return (self.y - exact).square().sum().item()


def by_hand(w: Tensor, x: Tensor, bits: int) -> list[ByHand]:
    """Clip to whole numbers; scale W as a whole; scale columns by mean|x| first, as AWQ does."""
    grid = IntGroup(bits=bits, per_tensor=True)
    low = w.min().item() < 0
    one = {"scale": torch.ones(1, 1), "zero": torch.full((1, 1), grid.middle if low else 0)}
    s = x.abs().mean(0).clamp_min(1e-4)
    s = s / (s.max() * s.min()).sqrt()
    ways = [
        ("Clip", grid.encode(w, one), one, torch.ones_like(s), ""),
        ("Scale", *on_grid(grid, w), torch.ones_like(s), f"rtn(bits={bits},per_tensor=true)"),
        (
            "Scale by inputs",
            *on_grid(grid, w * s),
            s,
            f"awq(bits={bits},per_tensor=true,clip=false)",
        ),
    ]
    found = []
    for title, codes, p, moved, recipe in ways:
        w_hat = grid.decode(codes, p) / moved
        centred = codes.float() - p["zero"].float()
        step = p["scale"].float().view(1) / moved
        found.append(ByHand(title, centred, step, w_hat, x @ w_hat.T, recipe))
    return found


def on_grid(grid: Format, w: Tensor) -> tuple[Tensor, Params]:
    """w [N, K] -> codes and parameters."""
    q = grid.quantize(w)
    return q.codes, q.params


# ---- curves --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Mean squared output error over one knob, and where the page stands."""

    knob: str
    at: tuple[float, ...]
    loss: tuple[float, ...]
    now: float | None

    @property
    def best(self) -> float:
        """The knob's value of least loss."""
        return self.at[min(range(len(self.loss)), key=self.loss.__getitem__)]


def curve(state: State, done: Applied) -> Curve | None:
    """AWQ's own search, SmoothQuant's alpha, or bits; None where there is nothing to vary."""
    if done.losses:
        n = len(done.losses)
        at = tuple(i / n for i in range(n))
        return Curve("exponent r", at, done.losses, at[done.losses.index(min(done.losses))])
    values = values_of(state)
    paths = {w.path: w for w in form.widgets(METHODS.find(state.kind), values)}
    path = CURVES.get(state.kind) or next((p for p in ("format.bits", "bits") if p in paths), "")
    if not path:
        return None
    widget = paths[path]
    low, high = widget.low or 0, widget.high or 0
    tried = (
        [i / STEPS for i in range(STEPS + 1)]
        if widget.kind == "number"
        else [float(b) for b in range(int(low), int(high) + 1)]
    )
    found = [(at, sweep_point(state, path, at, widget.kind == "whole")) for at in tried]
    kept = [(at, loss) for at, loss in found if loss is not None]
    if len(kept) < 2:
        return None
    now = float(values.get(path, widget.default))
    name = path.rpartition(".")[2]
    return Curve(name, tuple(a for a, _ in kept), tuple(v for _, v in kept), now)


def sweep_point(state: State, path: str, at: float, whole: bool) -> float | None:
    """Loss with one knob at a value; None where the recipe does not hold there."""
    text = str(int(at)) if whole else repr(at)
    try:
        method = method_of(state.kind, {**values_of(state), path: text})
        recipe = render((method, *following(state)))
    except ValueError:
        return None
    found = applied_text(state.w, state.x, recipe)
    return None if isinstance(found, str) else found.loss


# ---- GPTQ, column by column ----------------------------------------------------------------


def walk_of(done: Applied) -> Walk | None:
    """How `gptq` came to its result; None for other methods and where it fell back."""
    if done.q is None or done.moved:
        return None
    return gptq_walk(done.lesson.method, done.lesson.w, done.lesson.x, done.w_hat)
