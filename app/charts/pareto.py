"""Quality against size, or any two measurements: points with intervals, and the front."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from app import look, rows
from app.charts import Chart
from app.context import Picks
from app.published_rows import NONE, Published
from results_db.compare import NORMAL_95, front_line
from results_db.store import Store

FADED = 0.45  # opacity of what another recipe beats
COLUMNS = (
    "run_id",
    "name",
    "family",
    "target",
    "packed",
    "is_baseline",
    "front",
    "selected",
    "x",
    "y",
    "x_half",
    "y_half",
    "hover",
)
WIDTH, HEIGHT = 720, 360  # pixels that labels are placed for; narrower screens hide them


def chart_rows(store: Store, picks: Picks) -> pd.DataFrame:
    """Points of the chart; `attrs` hold the axes, the conditions and how many were left out."""
    return points(rows.wide(store, picks.model), picks)


def points(wide: pd.DataFrame, picks: Picks) -> pd.DataFrame:
    """Wide rows -> one point each, of those that were measured under like conditions."""
    names = rows.default_axes(wide, picks)
    choice = rows.like(wide, [n for n in names if n], picks.set)
    shown = rows.kept(choice.rows, picks)
    x, y = (
        rows.axis(shown, n, s) for n, s in zip(names, (picks.xscale, picks.yscale), strict=True)
    )
    table = _points(shown, x, y, picks) if len(shown) else pd.DataFrame(columns=list(COLUMNS))
    if picks.front and len(table):
        table = table[table["front"] | table["is_baseline"]].reset_index(drop=True)
    table.attrs = {"x": x, "y": y, "choice": choice, "zoom": _zoom(picks), "drag": picks.drag}
    return table


def _points(shown: pd.DataFrame, x: rows.Axis, y: rows.Axis, picks: Picks) -> pd.DataFrame:
    shown = rows.with_front(shown, x, y)
    records = rows.records(shown)
    table = shown[["run_id", "name", "family", "target", "packed", "front", "is_baseline"]].copy()
    table["selected"] = shown["run_id"].isin(picks.runs)
    for at, axis in (("x", x), ("y", y)):
        table[at] = shown[axis.name].astype(float)
        table[f"{at}_half"] = _half(shown, axis.name)
    table["hover"] = [hover(record, (y, x)) for record in records]
    table["is_baseline"] = table["is_baseline"].astype(bool)
    return table[list(COLUMNS)].reset_index(drop=True)


def _half(shown: pd.DataFrame, name: str) -> pd.Series:
    """Half width of the 95 % interval; 0 where a value is exact."""
    error = shown.get(f"{name}__stderr", pd.Series(0.0, index=shown.index))
    return NORMAL_95 * pd.to_numeric(error).fillna(0.0).astype(float)


def _zoom(picks: Picks) -> tuple[float, ...]:
    try:
        zoom = tuple(float(part) for part in picks.zoom)
    except ValueError:  # an address typed by hand: show everything
        return ()
    return zoom if len(zoom) == 4 and all(map(math.isfinite, zoom)) else ()


def hover(record: Mapping[str, Any], axes: Sequence[rows.Axis]) -> str:
    """The box at a point: recipe, numbers with intervals and n, storage, device, notes."""
    lines = [f"<b>{html.escape(record['text'])}</b>"]
    for axis in axes:
        number = look.quantity(axis.name, record[axis.name], axis.unit)
        spread = look.interval(axis.name, record.get(f"{axis.name}__stderr"), axis.unit)
        n = record.get(f"{axis.name}__n")
        count = f" (n {look.whole(n)})" if n is not None and not pd.isna(n) and n > 1 else ""
        lines.append(f"{look.label(axis.name)}  <b>{number}</b> {spread}{count}".rstrip())
    place = (record.get(f"{axes[0].name}__{what}") for what in ("device", "dtype"))
    lines.append(", ".join(["packed" if record["packed"] else "simulated", *map(str, place)]))
    return "<br>".join([*lines, *_note_lines(str(record.get("notes_text") or ""))])


def _note_lines(text: str) -> list[str]:
    notes = [html.escape(n if len(n) < 72 else n[:70] + "…") for n in text.splitlines() if n]
    more = [f"{len(notes) - 2} more notes"] if len(notes) > 3 else []
    return [f"<i>{n}</i>" for n in (notes[:2] + more if more else notes)]


# ---- drawing -------------------------------------------------------------------------------


def draw(table: pd.DataFrame) -> go.Figure:
    """Points coloured by family, the stepped front, the 16-bit star with its guides."""
    if not len(table):
        return look.empty_figure("No run has both of these numbers yet.")
    x, y = table.attrs["x"], table.attrs["y"]
    traces = [*_front(table, x, y), *_families(table), *_baselines(table), *_rings(table)]
    traces = [*_crosses(table), *traces]
    fig = look.figure(traces)
    for at, axis, update in (("x", x, fig.update_xaxes), ("y", y, fig.update_yaxes)):
        ticks = _ticks(axis, _visible(table, at, axis))
        update(title_text=axis.title, type="log" if axis.log else "linear", **ticks)
    if table.attrs.get("drag") == "select":
        fig.update_layout(dragmode="select")
    _ranges(fig, table, x, y)
    _guides(fig, table)
    for label in front_labels(table, x, y):
        fig.add_annotation(label)
    return fig


def _visible(table: pd.DataFrame, at: str, axis: rows.Axis) -> pd.Series:
    """The values between which an axis runs: those zoomed to, else all."""
    zoom = table.attrs.get("zoom") or ()
    ends = zoom[:2] if at == "x" else zoom[2:]
    return pd.Series([10.0**end if axis.log else end for end in ends] if zoom else _all(table, at))


def laid_over(table: pd.DataFrame, published: Published, picks: Picks) -> pd.DataFrame:
    """The points with published values beside them; the axes make room for both."""
    axes = {}
    for at, scale in (("x", picks.xscale), ("y", picks.yscale)):
        axis = table.attrs[at]
        both = {axis.name: _both_kinds(table, published, at), f"{axis.name}__unit": axis.unit}
        log = rows.axis(pd.DataFrame(both), axis.name, scale).log
        axes[at] = replace(axis, log=log) if len(published.rows) else axis
    over = table.copy(deep=False)
    over.attrs = table.attrs | axes | {"published": published}
    return over


def _all(table: pd.DataFrame, at: str) -> pd.Series:
    """Values of an axis, the published ones included."""
    return _both_kinds(table, table.attrs.get("published", NONE), at)


def _both_kinds(table: pd.DataFrame, published: Published, at: str) -> pd.Series:
    values = [*table[at], *published.rows[at]]
    return pd.Series(values, dtype=float)


def _crosses(table: pd.DataFrame) -> Iterator[go.Scatter]:
    """Published values: small crosses in the colour of text, joined to nothing."""
    found = table.attrs.get("published", NONE).rows
    if len(found):
        style = {"symbol": "x-thin", "size": 8, "line": {"width": 1.5, "color": look.MUTED}}
        yield go.Scatter(
            x=found["x"],
            y=found["y"],
            name="published",
            mode="markers",
            text=found["hover"],
            hovertemplate="%{text}<extra></extra>",
            marker=style,
        )


def _ticks(axis: rows.Axis, values: pd.Series) -> dict[str, Any]:
    """Ticks a person would draw: per cents, bytes, and round numbers on short log axes."""
    at = log_ticks(values, BITS if axis.unit == "bits" else ROUND) if axis.log else []
    told = {"tickvals": at, "ticktext": [f"{v:g}" for v in at]}
    style: dict[str, Any] = told if len(at) > 2 else {}
    if axis.unit in ("fraction", "share", "accuracy"):
        return {"tickformat": ".0%"}
    if axis.unit == "bytes":
        at = byte_ticks(values, axis.log)
        return {"tickvals": at, "ticktext": [look.in_bytes(v) for v in at]} if len(at) > 1 else {}
    return style or ({"dtick": 1, "tickformat": "~g"} if axis.log else {})


def byte_ticks(values: pd.Series, log: bool) -> list[float]:
    """Round numbers of KiB, MiB or GiB: the units that tables use."""
    known = values[(values > 0) & values.map(math.isfinite)]
    if not len(known):
        return []
    unit = max(u for u in (1, 2**10, 2**20, 2**30) if u <= known.max())
    if log:
        return [unit * tick for tick in log_ticks(known / unit)]
    low, high = known.min() / unit, known.max() / unit
    size = 10.0 ** math.floor(math.log10((high - low) / 5 or high or 1))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= (high - low) / 5 or m == 10)
    count = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [unit * step * k for k in count]


ROUND = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
BITS = (1.0, 1.2, 1.6, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)  # 12 and 16 are of the second decade


def log_ticks(values: pd.Series, steps: Sequence[float] = ROUND) -> list[float]:
    """Round numbers over less than two decades of positive values; [] for more."""
    known = values[(values > 0) & values.map(math.isfinite)]
    if not len(known) or known.max() > 100 * known.min():
        return []
    low, high = 0.9 * known.min(), 1.1 * known.max()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in steps]
    return [t for t in ticks if low <= t <= high and (steps is not BITS or t == int(t) != 10)]


def _families(table: pd.DataFrame) -> Iterator[go.Scatter]:
    """Two traces per family: what is on the front, and, faded, what is beaten."""
    rivals = table[~table["is_baseline"]]
    for (family, front), group in rivals.groupby(["family", "front"], sort=True):
        colour = look.family_colour(str(family))
        yield _markers(group, str(family), colour, 1.0 if front else FADED)


def _markers(group: pd.DataFrame, name: str, colour: str, opacity: float) -> go.Scatter:
    shapes = [look.shape(t, p) for t, p in zip(group["target"], group["packed"], strict=True)]
    sizes = [14 if selected else 10 for selected in group["selected"]]
    return go.Scatter(
        x=group["x"],
        y=group["y"],
        name=name,
        mode="markers",
        customdata=group["run_id"],
        text=group["hover"],
        hovertemplate="%{text}<extra></extra>",
        opacity=1.0 if group["selected"].any() else opacity,
        marker={
            "color": colour,
            "symbol": shapes,
            "size": sizes,
            "line": {"width": 2, "color": colour},
            "opacity": _within_trace(group, opacity),
        },
        error_x=_bars(group["x_half"], colour),
        error_y=_bars(group["y_half"], colour),
    )


def _within_trace(group: pd.DataFrame, opacity: float) -> list[float]:
    """Fading is the trace's, so that bars fade too; with a selected point in it, each point's."""
    any_selected = bool(group["selected"].any())
    return [1.0 if s or not any_selected else opacity for s in group["selected"]]


def _bars(half: pd.Series, colour: str) -> dict[str, Any]:
    return {
        "array": half,
        "color": colour,
        "thickness": 1,
        "width": 0,
        "visible": bool((half > 0).any()),
    }


def _front(table: pd.DataFrame, x: rows.Axis, y: rows.Axis) -> list[go.Scatter]:
    rivals = table[~table["is_baseline"]]
    if len(rivals) < 2:
        return []
    better = [axis.better or "lower" for axis in (x, y)]
    line = front_line(rivals, "x", "y", *better)  # type: ignore[arg-type]
    style = {"color": look.MUTED, "width": 1.5}
    return [go.Scatter(x=line["x"], y=line["y"], mode="lines", hoverinfo="skip", line=style)]


def _baselines(table: pd.DataFrame) -> Iterator[go.Scatter]:
    base = table[table["is_baseline"]]
    if len(base):
        trace = _markers(base, "16-bit", look.INK, 1.0)
        trace.update(marker={"symbol": "star", "size": 15, "line": {"width": 0}})
        yield trace


def _rings(table: pd.DataFrame) -> Iterator[go.Scatter]:
    """A ring around what is selected."""
    chosen = table[table["selected"]]
    if len(chosen):
        ring = {"symbol": "circle-open", "size": 22, "color": look.INK, "line": {"width": 1.5}}
        yield go.Scatter(
            x=chosen["x"],
            y=chosen["y"],
            mode="markers",
            marker=ring,
            hoverinfo="skip",
            name="selected",
        )


def _guides(fig: go.Figure, table: pd.DataFrame) -> None:
    """Dashed lines through the last 16-bit run."""
    base = table[table["is_baseline"]].tail(1)
    for record in rows.records(base):
        style = {"color": look.MUTED, "width": 1, "dash": "dot"}
        fig.add_hline(y=record["y"], line=style, layer="below")
        fig.add_vline(x=record["x"], line=style, layer="below")


def _ranges(fig: go.Figure, table: pd.DataFrame, x: rows.Axis, y: rows.Axis) -> None:
    """What was zoomed to, else all points with room for their labels."""
    zoom = table.attrs.get("zoom") or ()
    free = tuple(span(_all(table, at), axis.log) for at, axis in _both(x, y))
    spans = (zoom[:2], zoom[2:]) if zoom else free
    fig.update_xaxes(range=list(spans[0]))
    fig.update_yaxes(range=list(spans[1]))


def _both(x: rows.Axis, y: rows.Axis) -> tuple[tuple[str, rows.Axis], tuple[str, rows.Axis]]:
    return ("x", x), ("y", y)


def span(values: pd.Series, log: bool) -> tuple[float, float]:
    """Range of an axis in its own coordinates (log10 on log axes), finite values and 8 % more."""
    values = _coordinates(values, log)
    values = values[values.map(math.isfinite)]
    if not len(values):
        return (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    return (low - room, high + room)


def _coordinates(values: pd.Series, log: bool) -> pd.Series:
    return values.map(lambda v: math.log10(v) if v > 0 else math.nan) if log else values


# ---- labels --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return not (
            self.right <= other.left
            or other.right <= self.left
            or self.bottom <= other.top
            or other.bottom <= self.top
        )


SIDES = (
    ("left", "bottom", 9, -6),
    ("left", "top", 9, 6),
    ("right", "bottom", -9, -6),
    ("right", "top", -9, 6),
    ("center", "bottom", 0, -11),
    ("center", "top", 0, 11),
)


def front_labels(table: pd.DataFrame, x: rows.Axis, y: rows.Axis) -> list[dict[str, Any]]:
    """Names beside the points of the front, where they cover neither a point nor each other."""
    at = _pixels(table, x, y)
    taken = [Box(px - 7, py - 7, px + 7, py + 7) for px, py in at]
    labels = []
    for index in table.index[table["front"] | table["is_baseline"]]:
        px, py = at[index]
        name = str(table.at[index, "name"])
        for side in SIDES:
            box = _label_box(px, py, name, side)
            if _inside(box) and not any(box.meets(other) for other in taken):
                taken.append(box)
                labels.append(_label(table.loc[index], name, side, x, y))
                break
    return labels


def _pixels(table: pd.DataFrame, x: rows.Axis, y: rows.Axis) -> list[tuple[float, float]]:
    ranges = [span(_all(table, at), axis.log) for at, axis in _both(x, y)]
    xs, ys = (_coordinates(table[at], axis.log) for at, axis in _both(x, y))
    (x0, x1), (y0, y1) = ranges
    return [
        (WIDTH * (a - x0) / (x1 - x0), HEIGHT * (y1 - b) / (y1 - y0))
        for a, b in zip(xs, ys, strict=True)
    ]


def _label_box(px: float, py: float, name: str, side: tuple[str, str, int, int]) -> Box:
    anchor, vertical, dx, dy = side
    width, height = 7.2 * len(name) + 4, 16
    left = {"left": px + dx, "right": px + dx - width, "center": px - width / 2}[anchor]
    top = py + dy - height if vertical == "bottom" else py + dy
    return Box(left, top, left + width, top + height)


def _inside(box: Box) -> bool:
    return box.left >= 0 and box.right <= WIDTH and box.top >= 0 and box.bottom <= HEIGHT


def _label(
    row: pd.Series, name: str, side: tuple[str, str, int, int], x: rows.Axis, y: rows.Axis
) -> dict[str, Any]:
    anchor, vertical, dx, dy = side
    return {
        "x": math.log10(row["x"]) if x.log else row["x"],
        "y": math.log10(row["y"]) if y.log else row["y"],
        "text": html.escape(name),
        "showarrow": False,
        "xanchor": anchor,
        "yanchor": vertical,
        "xshift": dx,
        "yshift": -dy,
        "font": {"size": 12, "color": look.INK},
        "name": "direct-label",
    }


# ---- in words ------------------------------------------------------------------------------


def say(table: pd.DataFrame) -> str:
    """The picture in a sentence."""
    if not len(table):
        return "No points yet."
    x, y = table.attrs["x"], table.attrs["y"]
    front = table[table["front"]].sort_values("x")
    names = ", ".join(
        f"{row['name']} ({look.quantity(x.name, row['x'], x.unit)}; "
        f"{look.quantity(y.name, row['y'], y.unit)})"
        for row in rows.records(front)
    )
    count = f"{len(table)} points" if len(table) > 1 else "1 point"
    on_front = f" On the front: {names}." if names else ""
    beside = len(table.attrs.get("published", NONE).rows)
    crosses = f" {beside} published values beside them, as crosses." if beside else ""
    return f"{count}, {look.label(y.name)} against {look.label(x.name)}.{on_front}{crosses}"


def columns(table: pd.DataFrame) -> Mapping[str, str]:
    """Headings of the chart as a table."""
    x, y = table.attrs["x"], table.attrs["y"]
    return {"name": "Recipe", "x": x.title, "y": y.title, "front": "On the front"}


CHART = Chart("Trade-off", "compare", chart_rows, draw, say, columns)
