"""Comparing measurements: the Pareto front, what is unlike, and paired differences."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Better = Literal["lower", "higher"]
Floats = NDArray[np.float64]

NORMAL_95 = 1.959964  # half width of a 95 % interval, in standard errors

# Times depend on how the weights are stored; qualities do not.
TIME_UNITS = frozenset({"s", "ms", "us", "µs", "tokens/s", "tok/s"})

DIFFERENCES = {
    "data": "on different data",
    "metric_id": "with different settings",
    "n": "over different numbers of items",
    "device": "on different devices",
    "dtype": "in different dtypes",
    "version": "by different versions of the metric",
    "storage": "with different storage",
}


def on_front(
    rows: pd.DataFrame, x: str, y: str, x_better: Better = "lower", y_better: Better = "lower"
) -> pd.Series:
    """Which rows no other row beats: at least as good in both columns and better in one.

    Equal points are on the front together; a row with a missing value never is.
    """
    cost_x, cost_y = _cost(rows[x], x_better), _cost(rows[y], y_better)
    known = ~(np.isnan(cost_x) | np.isnan(cost_y))
    points = pd.DataFrame({"x": cost_x[known], "y": cost_y[known]})
    lowest = points.groupby("x")["y"].min()  # by rising x: the best y at each
    before = lowest.cummin().shift()
    ahead = lowest[before.isna() | (lowest < before)]
    front = np.zeros(len(rows), dtype=bool)
    front[known] = points["x"].map(ahead).eq(points["y"])
    return pd.Series(front, index=rows.index)


def near_front(
    rows: pd.DataFrame, x: str, y: str, x_better: Better = "lower", y_better: Better = "lower"
) -> pd.Series:
    """Which rows no other row clearly beats, given the standard errors; holds the front.

    Clearly: in each column the difference exceeds its 95 % interval, or both values are exact
    and not worse; and one column is better. `<x>__stderr`, `<y>__stderr` are read where they
    exist; a missing one means exact. Errors are taken as independent, which for runs on the
    same items is cautious.
    """
    columns = ((x, x_better), (y, y_better))
    gaps, noises = zip(*(_gaps(rows, name, better) for name, better in columns), strict=True)
    surely = [gap >= NORMAL_95 * noise for gap, noise in zip(gaps, noises, strict=True)]
    beaten = surely[0] & surely[1] & ((gaps[0] > 0) | (gaps[1] > 0))  # [row, by which]
    known = rows[x].notna() & rows[y].notna()
    return known & ~pd.Series(beaten.any(axis=1), index=rows.index)


def front_line(
    rows: pd.DataFrame, x: str, y: str, x_better: Better = "lower", y_better: Better = "lower"
) -> pd.DataFrame:
    """Corners of the stepped line through the front, from the best x to the best y.

    Each step goes to the next point's x at the old y first: what is attainable there.
    """
    front = rows.loc[on_front(rows, x, y, x_better, y_better), [x, y]].drop_duplicates()
    front = front.sort_values(x, ascending=x_better == "lower")
    corners = pd.DataFrame({x: front[x], y: front[y].shift()}).iloc[1:]
    line = pd.concat([corners, front])  # stable: at each x the corner comes before the point
    return line.sort_values(x, ascending=x_better == "lower", kind="stable", ignore_index=True)


def unlike(rows: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """One sentence for each condition under which the `names` of these `wide` rows differ."""
    return [
        f"{name} was measured {DIFFERENCES[condition]}: {_tally(values)}."
        for name in names
        if name in rows
        for condition, values in _conditions(rows[rows[name].notna()], name)
        if values.nunique() > 1
    ]


def paired(a_items: ArrayLike, b_items: ArrayLike) -> tuple[float, float]:
    """Scores of the same items under a and b -> mean of b - a and its standard error.

    The error is the deviation of the differences (n - 1) over sqrt(n); NaN for a single item.
    """
    a, b = np.asarray(a_items, dtype=np.float64), np.asarray(b_items, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(
            f"Paired scores need the same items on both sides, and these have the shapes "
            f"{a.shape} and {b.shape}."
        )
    change = b - a
    spread = change.std(ddof=1) if change.size > 1 else np.nan
    return float(change.mean()), float(spread / np.sqrt(change.size))


def _cost(values: pd.Series, better: Better) -> Floats:
    """Values turned so that less is better, fp64."""
    signs = {"lower": 1.0, "higher": -1.0}
    if better not in signs:
        raise ValueError(f"better is {better!r}; it can be 'lower' or 'higher'.")
    return signs[better] * values.to_numpy(dtype=np.float64, na_value=np.nan)


def _gaps(rows: pd.DataFrame, name: str, better: Better) -> tuple[Floats, Floats]:
    """By how much each row costs more than each other, and that difference's standard error."""
    cost = _cost(rows[name], better)
    error = rows.get(f"{name}__stderr", pd.Series(0.0, index=rows.index))
    variance = np.nan_to_num(error.to_numpy(dtype=np.float64, na_value=np.nan)) ** 2
    with np.errstate(invalid="ignore"):  # inf - inf: equal costs
        gap = np.where(cost[:, None] == cost, 0.0, cost[:, None] - cost)  # [row, other]
    return gap, np.sqrt(variance[:, None] + variance)


def _conditions(rows: pd.DataFrame, name: str) -> list[tuple[str, pd.Series]]:
    """Conditions of `name` that matter for it, each with its value on every row."""
    found = {c: rows[f"{name}__{c}"].astype("str").fillna("unknown") for c in DIFFERENCES}
    if found["data"].nunique() > 1:
        del found["metric_id"]  # other data is another metric_id: say it once
    if rows[f"{name}__unit"].isin(TIME_UNITS).any():
        # The 16-bit model runs the same way however its run was labelled.
        found["storage"] = found["storage"].mask(rows["is_baseline"], "packed")
    else:
        del found["storage"]
    return list(found.items())


def _tally(values: pd.Series) -> str:
    """How often each value comes, the most frequent first: "cpu (3 runs), cuda (1 run)"."""
    counts = values.value_counts()
    return ", ".join(f"{v} ({k} run{'s' if k > 1 else ''})" for v, k in counts.items())
