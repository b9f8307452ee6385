"""The sentence above the chart, made from the numbers and their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from app import look, rows
from app.rows import Axis, Record

CLOSE = 0.01  # "as good as": within 1 % of the 16-bit value; wide intervals prove nothing


def headline(shown: pd.DataFrame, model: str, x: Axis, y: Axis) -> str:
    """What one would tell a colleague about these rows."""
    records = rows.records(shown)
    base = next((r for r in reversed(records) if r["is_baseline"]), None)
    rivals = [r for r in records if not r["is_baseline"] and r["state"] != "failed"]
    if not rivals:
        return f"On {model}, only the 16-bit model is measured so far." if base else ""
    if base is None:
        return f"{len(rivals)} recipes measured on {model}; no 16-bit run to compare with yet."
    near = [r for r in rivals if worse_by(r, base, y) <= CLOSE]
    first = _keeps(_cheapest(near, base, x, y), base, model, x, y) if near else ""
    first = first or _none_close(rivals, base, model, y)
    return f"{first}{_contest(rivals, base, y)}."


def worse_by(row: Record, base: Record, y: Axis) -> float:
    """Share of the baseline's value by which a row is worse; absolute where that value is 0."""
    change = row[y.name] - base[y.name]
    change = -change if y.better == "higher" else change
    return float(change / abs(base[y.name]) if base[y.name] else change)


def _cost(row: Record, axis: Axis) -> float:
    return float(-row[axis.name] if axis.better == "higher" else row[axis.name])


def _cheapest(near: Sequence[Record], base: Record, x: Axis, y: Axis) -> Record:
    """The smallest of them; of equally small ones the best."""
    return min(near, key=lambda row: (_cost(row, x), worse_by(row, base, y)))


def _keeps(row: Record, base: Record, model: str, x: Axis, y: Axis) -> str:
    what = look.inline(y.name)
    gap = worse_by(row, base, y)
    kept = f"stays within {look.percent(max(gap, 0.001))} of 16-bit {what}"
    if not base[y.name]:
        kept = f"has a {what} of {look.quantity(y.name, row[y.name], y.unit)}"
    return f"On {model}, {row['name']} {kept}{_at(row, base, x)}"


def _at(row: Record, base: Record, x: Axis) -> str:
    if x.unit == "bits":
        return f" at {look.quantity(x.name, row[x.name], x.unit)} bits per weight"
    if x.unit == "bytes" and base[x.name]:
        return f" at {100 * row[x.name] / base[x.name]:.0f} % of the size"
    return f" at {look.inline(x.name)} {look.quantity(x.name, row[x.name], x.unit)}"


def _none_close(rivals: Sequence[Record], base: Record, model: str, y: Axis) -> str:
    best = min(rivals, key=lambda r: worse_by(r, base, y))
    what = look.inline(y.name)
    return (
        f"On {model}, no recipe here stays within 1 % of 16-bit {what}; "
        f"{best['name']} comes closest ({_told(best, base, y)})"
    )


def _told(row: Record, base: Record, y: Axis) -> str:
    change = look.delta(y.name, row[y.name], base[y.name], y.unit)
    return change or look.quantity(y.name, row[y.name], y.unit)


def _contest(rivals: Sequence[Record], base: Record, y: Axis) -> str:
    """The clearest win at one bit width: "at 3 bits GPTQ W3 (+8 %) is clearly ahead of ..."."""
    wins = [win for bits in {r["bits"] for r in rivals} if (win := _win(rivals, bits, y))]
    if not wins:
        return ""
    best, other = max(wins, key=lambda w: worse_by(w[1], base, y) - worse_by(w[0], base, y))
    return (
        f"; at {best['bits']} bits {best['name']} ({_told(best, base, y)}) is clearly ahead of "
        f"{other['name']} ({_told(other, base, y)})"
    )


def _win(rivals: Sequence[Record], bits: str, y: Axis) -> tuple[Record, Record] | None:
    """Best of one width and the best of another family there, if their intervals are apart."""
    here = sorted((r for r in rivals if r["bits"] == bits), key=lambda r: _cost(r, y))
    other = next((r for r in here if r["family"] != here[0]["family"]), None) if here else None
    if other is None or not rows.apart(here[0], other, y.name):
        return None
    return here[0], other
