"""Contest: products timed in turn with the dense one they replace, as rows and in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.base import Case, Json
from kernels.timing import Call, Timing, timed

Row = dict[str, Any]

DENSE = "bf16"  # what all are compared with
MAX_ERROR = 1e-2  # max |y - reference| / max |reference|: bf16 rounding is 3e-3


@dataclass(frozen=True)
class Contender:
    """One product."""

    name: str
    case: Case
    call: Call
    size: int  # bytes of its weights as they are held
    error: float = 0.0  # max |y - reference| / max |reference|

    @property
    def right(self) -> bool:
        """False for one too far off, and for one that is no number."""
        return self.error <= MAX_ERROR


def contest(dense: Contender, rivals: Sequence[Contender], device: torch.device) -> Iterator[Row]:
    """A row of each: wrong ones without a time, then the dense product and the right ones."""
    yield from (row(rival, device) for rival in rivals if not rival.right)
    timed_ones = [dense, *(rival for rival in rivals if rival.right)]
    if len(timed_ones) == 1:
        return
    times, launched = timed({str(at): one.call for at, one in enumerate(timed_ones)}, device)
    for at, one in enumerate(timed_ones):
        yield row(one, device, times[str(at)], times["0"], launched.get(str(at)))


def row(
    one: Contender,
    device: torch.device,
    own: Timing | None = None,
    dense: Timing | None = None,
    launched: Timing | None = None,
) -> Row:
    """What is reported of one product. An unsteady time is compared with nothing.

    launched: the time with its launch, where `own` is without.
    """
    case = one.case
    steady = own.steady and dense.steady if own and dense else None
    return {
        "kernel": one.name,
        "device": device.type,
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "weight": dict(case.weight),
        "act": dict(case.act) if case.act else None,
        "weight_bytes": one.size,
        "max_rel_err": one.error,
        "correct": one.right,
        "median_ms": own.median_ms if own else None,
        "p20_ms": own.p20_ms if own else None,
        "p80_ms": own.p80_ms if own else None,
        "ratio_to_bf16": dense.median_ms / own.median_ms if own and dense and steady else None,
        "steady": steady,
        "eager_ms": launched.median_ms if launched else None,
    }


def relative_error(y: Tensor, reference: Tensor) -> float:
    """max |y - reference| / max |reference|."""
    return float((y.float() - reference).abs().max() / reference.abs().max())


def line(told: Row) -> str:
    """One row for people."""
    if "ceiling" in told:
        return f"{told['ceiling']}: {told['value']:.4g} {told['unit']}"
    at = f"m={told['m']} n={told['n']} k={told['k']}"
    about = f"{told['kernel']} {words(told['weight'], told['act'])} {at}"
    if not told["correct"]:
        return f"{about}: wrong by {told['max_rel_err']:.2g}, not timed"
    spread = f"{told['median_ms']:.3f} ms ({told['p20_ms']:.3f}-{told['p80_ms']:.3f})"
    if not told["steady"]:
        return f"{about}: {spread}, unsteady: no result"
    return f"{about}: {spread}, {told['ratio_to_bf16']:.2f}x bf16"


def words(weight: Json, act: Json | None = None) -> str:
    """`int4 g128, int8 activations`."""
    told = form_words(weight)
    group = f" g{weight['group']}" if weight.get("group") else ""
    beside = "".join(f", {name}" for name in weight.get("beside", ()))
    rounds = f", {form_words(act)} activations" if act else ""
    return told + group + beside + rounds


def form_words(form: Json) -> str:
    """`int4`, `nf4 double`, `Q8_0`, `llm_int8 int8 outliers`: a format without its group."""
    named = form.get("type") or form.get("table")
    told = str(named) if named else f"{form['kind']}{form.get('bits', '')}"
    if form["kind"] == "llm_int8":
        told = f"{form['kind']} {form['outliers']} outliers"
    return told + (" double" if form.get("double_quant") else "")
