"""Keys and values of a run's model: which channels stand out, before and after RoPE.

Read from the run's folder (backend/kv_statistics.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import Markup

from app import look
from app.context import Picks
from app.layer_values import channel_title, channels_of, log_axis, outstanding, text, titled
from app.markup import join, tag
from app.widgets import chart_value
from backend.kv_statistics import WHATS, Cached, What, read

PLOTS = 2  # keys, values
COLOURS: dict[What, str] = {
    "keys before RoPE": look.ORANGE,
    "keys": look.BLUE,
    "values": look.GREEN,
}
WORDS: dict[What, str] = {
    "keys before RoPE": "keys before RoPE",
    "keys": "keys after RoPE",
    "values": "values",
}
ABOUT = (
    "As attention makes them on {tokens} tokens of the bundled text, before a cache rounds them. "
    "A channel that stands out widens the scale of every token that it is rounded with; rotary "
    "positions (RoPE) mix channels in pairs, so that keys before them may be easier to round."
)


def parts(folder: Path, picks: Picks) -> list[str]:
    """Head, PLOTS pictures and the numbers of all blocks; "" of a run that has none."""
    found = read(folder)
    if not found:
        return [""] * (PLOTS + 2)
    own = next((c for c in found if str(c.block) == picks.kvblock), worst(found))
    pictures = [
        chart_value(peaks(own, whats), f"Largest magnitude per channel of the {name}.")
        for whats, name in ((WHATS[:2], "keys"), (WHATS[2:], "values"))
    ]
    return [heading(found, own), *pictures, numbers(found, own)]


def worst(found: Sequence[Cached]) -> Cached:
    """The block whose keys have the channel that stands out most."""
    return max(found, key=lambda c: stands_out(c, "keys") or 0.0)


def stands_out(cached: Cached, what: What) -> float | None:
    """Largest channel over the median one; None where that says nothing."""
    summary = cached.summaries.get(what)
    times = outstanding(summary) if summary else math.nan
    return times if math.isfinite(times) else None


def heading(found: Sequence[Cached], own: Cached) -> Markup:
    """Title, the choice of a block, and what stands out."""
    options = [
        tag("option", f"block {c.block}", value=c.block, selected=c.block == own.block or None)
        for c in found
    ]
    select = tag("select", options, data_param="kvblock", aria_label="Block of keys and values")
    top = tag("div", tag("h2", "Keys and values"), select, class_="axis-row")
    return join([top, tag("p", say(own), class_="muted")])


def say(own: Cached) -> str:
    """How far the largest channel of keys and of values stands out."""
    told = [
        f"{look.significant(times, 3)} in {WORDS[what]}"
        for what in WHATS
        if (times := stands_out(own, what)) is not None
    ]
    if not told:
        return f"Most channels of block {own.block} are empty."
    return f"Largest channel over the median one in block {own.block}: {', '.join(told)}."


def peaks(own: Cached, whats: Sequence[What]) -> go.Figure:
    """Largest magnitude of every channel, all heads side by side."""
    summaries = {what: own.summaries[what] for what in whats if what in own.summaries}
    lines = []
    for what, summary in summaries.items():
        values = [float(f"{v:.4g}") if v > 0 else None for v in summary.peaks.tolist()]
        hover = f"channel %{{x}}, {WORDS[what]}<br><b>%{{y:.3g}}</b><extra></extra>"
        style = {"color": COLOURS[what], "width": 1.5, "shape": "hvh"}
        x, name = channels_of(summary), WORDS[what]
        lines.append(
            go.Scatter(x=x, y=values, name=name, mode="lines", line=style, hovertemplate=hover)
        )
    fig = titled(lines, f"{whats[-1].capitalize()}: largest magnitude per channel")
    last = summaries[whats[-1]]
    fig.update_xaxes(title={"text": channel_title(last).removeprefix("input ")})
    fig.update_yaxes(title={"text": "magnitude"}, **log_axis([y for line in lines for y in line.y]))
    for head in range(1, own.heads):
        at = head * last.numbers["channels"] / own.heads
        fig.add_vline(x=at, line={"color": look.MUTED, "width": 1, "dash": "dot"}, layer="below")
    return fig


def numbers(found: Sequence[Cached], own: Cached) -> Markup:
    """A line per block: how far channels stand out, and kurtosis."""
    shown = [what for what in WHATS if any(what in c.summaries for c in found)]
    heads = ["Block", *(f"{WORDS[w].capitalize()}: largest / median channel" for w in shown)]
    heads += [f"{WORDS[w].capitalize()}: excess kurtosis" for w in shown]
    heads = [h.replace("rope", "RoPE") for h in heads]
    top = tag("tr", [tag("th", h, scope="col", class_="number" if at else None)
                     for at, h in enumerate(heads)])  # fmt: skip
    lines = [line(cached, shown, cached.block == own.block) for cached in found]
    table = tag("table", tag("thead", top), tag("tbody", lines), class_="kv-values")
    first = next(iter(own.summaries.values()))
    tokens = look.whole(first.numbers["values"] / first.numbers["channels"])
    divided = " Dotted lines divide heads." if own.heads > 1 else ""
    return join(
        [
            tag("div", table, class_="scroll"),
            tag("p", ABOUT.format(tokens=tokens), divided, class_="muted"),
        ]
    )


def line(cached: Cached, shown: Sequence[What], chosen: bool) -> Markup:
    """One block; a click shows its channels."""
    times = [stands_out(cached, what) for what in shown]
    kurtosis = [
        cached.summaries[what].numbers["kurtosis"] if what in cached.summaries else math.nan
        for what in shown
    ]
    texts = [text(value) if value is not None else look.MISSING for value in [*times, *kurtosis]]
    link = tag("button", f"block {cached.block}", class_="link", data_set={"kvblock": cached.block})
    cells = [tag("td", t, class_="number") for t in texts]
    return tag("tr", tag("th", link, scope="row"), cells, class_="chosen" if chosen else None)
