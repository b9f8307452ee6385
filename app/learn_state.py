"""What the Learn page shows, read from its URL: a matrix, its inputs, one recipe, a chosen cell."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import urlencode

import torch
from torch import Tensor

from app import form
from app.form import Widget
from backend.formats import FORMATS
from backend.methods import METHODS, Method
from backend.recipes import parse, render
from backend.registry import one_sentence

MOST_SIDE, MOST_TOKENS, MOST_SIZE = 12, 16, 1e6
KNOB = "k."  # before a knob's path in the URL, where `w`, `x` and `model` have other meanings
HIDDEN = frozenset({"layers"})  # knobs that say nothing about a single matrix
# Where a kind's defaults are made for whole models and not for a few numbers.
START: Mapping[str, Mapping[str, str]] = {"awq": {"clip": "false", "format.group": "0"}}
AFTER_EXACT = "rtn(bits=4,symmetric=true)+activations(bits=4,symmetric=true)"
FIRST = {"kind": "rtn", "k.format.bits": "2", "k.format.per_tensor": "true"}  # the worked example


@dataclass(frozen=True)
class Example:
    """A matrix to begin with, as text."""

    title: str
    w: str
    x: str
    about: str


@dataclass(frozen=True)
class State:
    """The page's URL, as text: nothing of it is checked yet."""

    w: str
    x: str
    kind: str
    knobs: Mapping[str, str] = field(default_factory=dict)
    then: str = ""
    cell: str = ""
    column: str = ""
    table: bool = False

    @classmethod
    def read(cls, query: Mapping[str, str]) -> State:
        """URL parameters -> state; without a kind the worked example's recipe."""
        query = {**({} if query.get("kind") else FIRST), **query}
        example = examples()[0]
        knobs = {n.removeprefix(KNOB): v for n, v in query.items() if n.startswith(KNOB)}
        return cls(
            w=query.get("w") or example.w,
            x=query.get("x") or example.x,
            kind=query["kind"],
            knobs=knobs,
            then=query.get("then", ""),
            cell=query.get("cell", ""),
            column=query.get("column", ""),
            table=bool(query.get("table")),
        )


@dataclass(frozen=True)
class Lesson:
    """A state that holds: every number finite, every knob allowed."""

    w: Tensor  # [N, K] fp32
    x: Tensor  # [T, K] fp32
    steps: tuple[Method, ...]

    @property
    def recipe(self) -> str:
        """The recipe's canonical text."""
        return render(self.steps)

    @property
    def method(self) -> Method:
        """The step the page is about."""
        return self.steps[0]


def lesson_of(state: State) -> Lesson:
    """ValueError in one sentence where the state does not hold."""
    w = matrix("W", state.w, MOST_SIDE, MOST_SIDE)
    x = matrix("x", state.x, MOST_TOKENS, MOST_SIDE)
    if x.shape[1] != w.shape[1]:
        raise ValueError(
            f"x has {x.shape[1]} numbers in a row and W {w.shape[1]} columns; they must be as many."
        )
    try:
        return Lesson(w, x, (method_of(state.kind, values_of(state)), *following(state)))
    except ValueError as error:
        raise ValueError(one_sentence(error)) from None


def following(state: State) -> tuple[Method, ...]:
    """The steps after the one the page is about: chosen, or what makes an exact step visible."""
    text = state.then.strip()
    if not text and METHODS.find(state.kind).exact:
        text = AFTER_EXACT
    return () if text == "none" else parse(text)


def values_of(state: State) -> dict[str, str]:
    """Texts of the knobs that were set, by a person or by `START`."""
    return {**START.get(state.kind, {}), **state.knobs}


def method_of(kind: str, values: Mapping[str, str]) -> Method:
    """Texts -> the method; only knobs its form has."""
    cls = METHODS.find(kind)
    known = {widget.path: widget for widget in form.widgets(cls, values)}
    kept = {path: text for path, text in values.items() if path in known}
    for path in [path for path in kept if "." in path]:  # a grid's knob needs its grid named
        outer = path.rpartition(".")[0]
        kept.setdefault(outer, known[outer].default)
    part = form.part_of(cls, kept)
    assert isinstance(part, Method)
    return part


def knobs_of(state: State) -> list[Widget]:
    """The form of the chosen kind."""
    found = form.widgets(METHODS.find(state.kind), values_of(state))
    return [widget for widget in found if widget.path not in HIDDEN]


# ---- changes, each a set of URL parameters -------------------------------------------------


def switched(state: State, kind: str, grid: str = "") -> dict[str, str]:
    """Another method, or another grid under `rtn`; knobs that it has too come along."""
    kept = carried(kind, grid, tuple(sorted(state.knobs.items())))
    cleared = dict.fromkeys((KNOB + path for path in state.knobs), "")
    knobs = {KNOB + path: text for path, text in kept.items()}
    return {**cleared, "kind": kind, "then": "", "column": "", **knobs}


@lru_cache(maxsize=1024)
def carried(kind: str, grid: str, knobs: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Of the knobs that are set, those that the kind can take, one after the other."""
    start = dict(START.get(kind, {}))
    kept = {"format": grid} if grid else {}
    paths = {widget.path for widget in form.widgets(METHODS.find(kind), start | kept)}
    for path, text in knobs:
        if path not in paths or path == "format" or path in HIDDEN:
            continue
        try:
            method_of(kind, {**start, **kept, path: text})
        except ValueError:
            continue
        kept[path] = text
    return kept


def taught(state: State, recipe: str) -> dict[str, str]:
    """A preset of the chosen kind: its knobs, and its other steps behind."""
    first, *rest = parse(recipe)
    cleared = dict.fromkeys((KNOB + path for path in state.knobs), "")
    knobs = {KNOB + path: text for path, text in form.set_values(first).items()}
    then = render(tuple(rest)) if rest else "none" if first.exact else ""
    return {**cleared, "kind": first.kind, "column": "", **knobs, "then": then}


def resized(state: State, rows: int, columns: int, tokens: int) -> dict[str, str]:
    """W and x larger (zeros) or smaller at their ends."""
    lesson = replace_numbers(cells(state.w), rows, columns)
    inputs = replace_numbers(cells(state.x), tokens, columns)
    return {"w": text_of(lesson), "x": text_of(inputs), "cell": "", "column": ""}


def replace_numbers(table: Sequence[Sequence[str]], rows: int, columns: int) -> list[list[str]]:
    """The table cut or filled up with zeros to a size."""
    return [
        [table[r][c] if r < len(table) and c < len(table[r]) else "0" for c in range(columns)]
        for r in range(rows)
    ]


def address(kind: str, knobs: Mapping[str, str]) -> str:
    """This page on one kind with these knobs."""
    return "/learn?" + urlencode(
        {"kind": kind} | {KNOB + path: text for path, text in knobs.items()}
    )


# ---- numbers and text ----------------------------------------------------------------------


def cells(text: str) -> list[list[str]]:
    """`9,0;0,4` or lines of numbers -> texts, row by row."""
    rows = re.split(r"[;\n]", text.strip())
    return [
        [cell.strip() for cell in (row.split(",") if "," in row else row.split() or [""])]
        for row in rows
    ]


def text_of(table: Sequence[Sequence[str]]) -> str:
    """The inverse of `cells`."""
    return ";".join(",".join(row) for row in table)


def numbers(w: Tensor) -> str:
    """A matrix as the URL holds it."""
    return text_of([[f"{value:.4g}" for value in row] for row in w.tolist()])


def matrix(name: str, text: str, most_rows: int, most_columns: int) -> Tensor:
    """Text -> [rows, columns] fp32; ValueError in one sentence that names the cell."""
    table = cells(text)
    widths = {len(row) for row in table}
    if len(table) > most_rows or max(widths) > most_columns:
        raise ValueError(
            f"{name} is {len(table)} x {max(widths)}; this page shows up to "
            f"{most_rows} x {most_columns}."
        )
    if len(widths) > 1:
        at = next(r for r, row in enumerate(table) if len(row) != len(table[0]))
        raise ValueError(
            f"{name}: row {at + 1} has {len(table[at])} numbers and row 1 has {len(table[0])}; "
            "every row needs as many."
        )
    rows = [
        [number(f"{name} row {r + 1}, column {c + 1}", cell) for c, cell in enumerate(row)]
        for r, row in enumerate(table)
    ]
    return torch.tensor(rows, dtype=torch.float32)


def number(place: str, text: str) -> float:
    """One cell."""
    if not text:
        raise ValueError(f"{place} is empty; write a number.")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{place}: {text[:20]!r} is not a number.") from None
    if not math.isfinite(value) or abs(value) > MOST_SIZE:
        raise ValueError(f"{place}: {text[:20]!r} is not a number between -1e6 and 1e6.")
    return value


@lru_cache(maxsize=1)
def examples() -> tuple[Example, ...]:
    """The matrices to begin with; the first is the page's own."""
    draw = torch.Generator().manual_seed(7)
    w = torch.randn(6, 8, generator=draw).mul(100).round().div(100)
    x = torch.randn(4, 8, generator=draw).mul(10).round().div(10)
    channel, token = x.clone(), x.clone()
    channel[:, 2] = torch.tensor([9.5, -12.0, 10.4, -8.6])
    token[1] = token[1] * 15
    return (
        Example("Worked example", "9,0,0;0,4,0;0,0,1", "1,2,3", "Three weights, three inputs."),
        Example("Gaussian", numbers(w), numbers(x), "Nothing stands out: rounding is easy."),
        Example(
            "Outlier channel",
            numbers(w),
            numbers(channel),
            "One input channel is ten times the others in every token, as in large models.",
        ),
        Example(
            "Outlier token",
            numbers(w),
            numbers(token),
            "One token is fifteen times the others, as the first token of a text often is.",
        ),
    )


def grids() -> list[str]:
    """Every registered grid."""
    return list(FORMATS.load())


def place_of(text: str, rows: int, columns: int) -> tuple[int, int] | None:
    """`1,2` -> (1, 2) where the matrix has such a cell."""
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if not found:
        return None
    row, column = int(found[1]), int(found[2])
    return (row, column) if row < rows and column < columns else None
