"""How things look: colours and marks, numbers as text, icons, and the template of every figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import plotly.graph_objects as go
from markupsafe import Markup

from app.markup import tag

# Okabe-Ito. One colour per family for ever: a new family takes the next free one, at the end.
GREY, BLUE, ORANGE, GREEN, VERMILION = "#8a8a8a", "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW = "#56B4E9", "#CC79A7", "#B8A800"  # the yellow darkened: visible on white
FAMILY_COLOURS = {
    "rtn": GREY,
    "gptq": BLUE,
    "awq": ORANGE,
    "smoothquant": GREEN,
    "llm_int8": VERMILION,
    "activations": SKY,
    "spqr": PURPLE,
    "kv_cache": YELLOW,
}
SPARE_COLOURS = (PURPLE, SKY, VERMILION, ORANGE, GREEN, YELLOW)

SHAPES = {
    "weights": "circle",
    "weights + activations": "square",
    "activations": "square",
    "kv_cache": "triangle-up",
}
OTHER_SHAPE = "diamond"

# Colours of the theme: app.js replaces var(--name) by what app.css says, in both themes.
INK, MUTED, LINE, SURFACE = "var(--ink)", "var(--muted)", "var(--line)", "var(--surface)"


def family_colour(family: str) -> str:
    """Colour of a method family; unknown families share the spare ones, always the same way."""
    spare = SPARE_COLOURS[sum(family.encode()) % len(SPARE_COLOURS)]
    return FAMILY_COLOURS.get(family, spare)


def shape(target: str, packed: bool) -> str:
    """Plotly's symbol: what is quantized gives the shape, simulated is hollow."""
    return SHAPES.get(target, OTHER_SHAPE) + ("" if packed else "-open")


# ---- numbers -------------------------------------------------------------------------------

MISSING = "–"
NORMAL_95 = 1.96  # half width of a 95 % interval, in standard errors


def significant(value: float, digits: int) -> str:
    """1234.5 -> "1234" at 4 digits; scientific outside 1e-3 .. 1e6."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -3 or size >= 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - size, 0)}f}"


def divergence(value: float) -> str:
    """3 digits, scientific below 1e-3."""
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else significant(value, 3)


def in_bytes(value: float) -> str:
    """Bytes as B, KiB, MiB, GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{significant(value, 3)} {unit}"


def duration(seconds: float) -> str:
    """Seconds as "0.8 s", "42 s", "3 min 10 s", "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def whole(value: float) -> str:
    """Rounded, with thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u2009")


def percent(value: float) -> str:
    """A share as per cent, one decimal."""
    return f"{100 * value:.1f} %"


Format = Callable[[float], str]

BY_UNIT: dict[str, Format] = {
    "bytes": in_bytes,
    "bits": lambda value: f"{value:.2f}",
    "nats": divergence,
    "ms": lambda value: significant(value, 3),
    "s": duration,
    "tokens/s": whole,
    "J": lambda value: f"{significant(value, 3)} J",
    "fraction": percent,
    "share": percent,
    "accuracy": percent,
    "dB": lambda value: f"{value:.1f}",
}
BY_NAME: dict[str, Format] = {
    "perplexity": lambda value: significant(value, 4),
    "ppl_ratio": lambda value: f"{value:.3f}",
    "same_top": percent,
    "rms_dp": percent,
    "mbu": percent,
}
SHARES = frozenset({"same_top", "rms_dp", "mbu"})

LABELS = {  # in the order of columns and pickers
    "bits_per_weight": "Bits per weight",
    "weight_bytes": "Weight size",
    "compression": "Compression",
    "perplexity": "Perplexity",
    "mean_kld": "Mean KL divergence",
    "median_kld": "Median KL divergence",
    "kld_p99": "KL divergence, 99th percentile",
    "same_top": "Same top token",
    "rms_dp": "RMS probability shift",
    "ppl_ratio": "Perplexity ratio",
    "needle": "Needles found",
    "kv_bytes_per_token": "KV cache per token",
    "ttft_ms": "Time to first token",
    "tpot_ms": "Time per token",
    "decode_tps": "Decoding speed",
    "peak_memory_bytes": "Peak memory",
    "mbu": "Bandwidth use",
    "energy_per_token": "Energy per token",
    "kernel_kld": "Packed against simulated",
    "weight_sqnr": "Weight SQNR",
    "output_sqnr": "Output SQNR",
    "weight_kurtosis_before": "Excess kurtosis of weights, before",
    "weight_kurtosis_after": "Excess kurtosis of weights, after",
    "input_kurtosis_before": "Excess kurtosis of inputs, before",
    "input_kurtosis_after": "Excess kurtosis of inputs, after",
    "awq_loss": "AWQ search loss / plain",
    "clipped_weights": "Clipped weights",
}
SHORT = {
    "mean_kld": "Mean KLD",
    "median_kld": "Median KLD",
    "kld_p99": "KLD p99",
    "same_top": "Same top",
    "rms_dp": "RMS Δp",
    "ppl_ratio": "PPL ratio",
    "bits_per_weight": "Bits/weight",
    "weight_bytes": "Size",
    "kv_bytes_per_token": "KV/token",
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "decode_tps": "Decode",
    "peak_memory_bytes": "Peak memory",
}
SHOWN_UNITS = {"nats": "nats", "ms": "ms", "tokens/s": "tokens/s", "dB": "dB", "bits": "bits"}


def heading_unit(name: str, unit: str) -> str:
    """The unit as a column's heading needs it: not where each number carries it already."""
    return SHOWN_UNITS.get(unit, "") if unit not in ("bits", "nats") else ""


def label(name: str, short: bool = False) -> str:
    """A measurement's name as people read it."""
    known = (SHORT.get(name) if short else None) or LABELS.get(name)
    task, _, measure = name.partition("/")
    measure = {"acc": "accuracy"}.get(measure.removesuffix(",none"), measure)
    return known or f"{task} {measure}".replace("_", " ").strip()


def inline(name: str) -> str:
    """The label inside a sentence: `mean KL divergence`, but `RMS probability shift`."""
    text = label(name)
    return text[0].lower() + text[1:] if text[1:2].islower() else text


def quantity(name: str, value: float | None, unit: str = "") -> str:
    """A number in the form its kind is read in; missing is an en dash."""
    if value is None or value != value:
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = formatter(name, unit)(value)
    return text.replace("-", "−") if not text.count("e-") else text


def formatter(name: str, unit: str) -> Format:
    """The way to write values of a measurement."""
    return BY_NAME.get(name) or BY_UNIT.get(unit) or (lambda value: significant(value, 4))


def is_share(name: str, unit: str) -> bool:
    """True for what is read in per cent; its differences are points, not per cent of per cent."""
    return name in SHARES or unit in ("fraction", "share", "accuracy")


def interval(name: str, stderr: float | None, unit: str = "") -> str:
    """Half width of the 95 % interval, as "±0.031"; "" where unknown or zero."""
    if stderr is None or stderr != stderr or stderr <= 0 or math.isinf(stderr):
        return ""
    half = NORMAL_95 * stderr
    if is_share(name, unit):
        return f"±{100 * half:.1f}"
    return "±" + (in_bytes(half) if unit == "bytes" else significant(half, 2))


def delta(name: str, value: float, base: float, unit: str = "") -> str:
    """Signed difference to the baseline: per cent of it, or points for shares."""
    if any(v is None or v != v or math.isinf(v) for v in (value, base)):
        return ""
    if is_share(name, unit):
        points = round(100 * (value - base), 1)
        return f"{points:+.1f} pt".replace("-", "−") if points else "0 pt"
    if base == 0:
        return ""
    return signed_percent(value / base - 1)


def signed_percent(change: float) -> str:
    """+0.042 -> "+4.2 %"; multiples from tenfold on, as "×31"."""
    if change >= 9:
        return f"×{change + 1:.0f}" if change < 1e4 else f"×{change + 1:.0e}".replace("e+0", "e")
    digits = 0 if abs(change) >= 0.0995 else 1 if abs(change) >= 0.01 else 2
    return f"{100 * change:+.{digits}f} %".replace("-", "−")


# ---- marks and icons -----------------------------------------------------------------------


@dataclass(frozen=True)
class StateLook:
    """How a run's state is told: word and icon carry it, colour only helps."""

    word: str
    path: str


STATES = {
    "queued": StateLook("queued", "M8 2.5a5.5 5.5 0 1 1 0 11a5.5 5.5 0 1 1 0-11M8 5v3l2 1.5"),
    "running": StateLook("running", "M5 3.5v9l7-4.5z"),
    "done": StateLook("done", "M3 8.5l3.5 3.5L13 4.5"),
    "failed": StateLook("failed", "M4 4l8 8M12 4l-8 8"),
    "cancelled": StateLook("cancelled", "M8 2.5a5.5 5.5 0 1 1 0 11a5.5 5.5 0 1 1 0-11M4 12L12 4"),
}


def icon(path: str, title: str = "") -> Markup:
    """A 16-pixel line icon; hidden from screen readers unless it has a title."""
    return tag(
        "svg",
        tag("title", title) if title else None,
        tag("path", d=path),
        viewBox="0 0 16 16",
        class_="icon",
        aria_hidden=None if title else "true",
        role="img" if title else None,
    )


def state_mark(state: str) -> Markup:
    """Icon and word of a run's state."""
    look = STATES.get(state, StateLook(state, ""))
    return tag("span", icon(look.path), look.word, class_=f"state state-{state}")


MARK_PATHS = {
    "circle": "M6 1.5a4.5 4.5 0 1 1 0 9a4.5 4.5 0 1 1 0-9",
    "square": "M2 2h8v8H2z",
    "triangle-up": "M6 1.5L11 10H1z",
    "diamond": "M6 0.8L11.2 6L6 11.2L0.8 6z",
    "star": "M6 .6l1.6 3.6 3.9.4-2.9 2.6.8 3.9L6 9.1 2.6 11.1l.8-3.9L.5 4.6l3.9-.4z",
}


def mark(target: str, packed: bool, family: str, baseline: bool = False) -> Markup:
    """The chart's mark of a run, small, for tables and legends."""
    colour = INK if baseline else family_colour(family)
    name = "star" if baseline else SHAPES.get(target, OTHER_SHAPE)
    fill = colour if packed or baseline else "none"
    style = f"fill:{fill};stroke:{colour}"
    path = tag("path", d=MARK_PATHS[name], style=style)
    return tag("svg", path, viewBox="0 0 12 12", class_="mark", aria_hidden="true")


# ---- figures -------------------------------------------------------------------------------

FONT = '"IBM Plex Sans", system-ui, sans-serif'


def axis_style() -> dict[str, object]:
    """Quiet axes: thin grid, no box, ticks outside."""
    return {
        "gridcolor": "var(--grid)",
        "linecolor": LINE,
        "zerolinecolor": "var(--grid)",
        "tickfont": {"color": MUTED, "size": 12},
        "title": {"font": {"color": INK, "size": 13}, "standoff": 10},
        "ticks": "outside",
        "tickcolor": LINE,
        "ticklen": 4,
        "automargin": True,
    }


def template() -> go.layout.Template:
    """The one Plotly template: theme colours stay names until the browser knows the theme."""
    return go.layout.Template(
        layout={
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "color": INK, "size": 13},
            "xaxis": axis_style(),
            "yaxis": axis_style(),
            "margin": {"l": 64, "r": 24, "t": 16, "b": 52},
            "hoverlabel": {
                "bgcolor": SURFACE,
                "bordercolor": LINE,
                "font": {"family": FONT, "color": INK, "size": 13},
                "align": "left",
            },
            "legend": {"font": {"color": MUTED, "size": 12}, "bgcolor": "rgba(0,0,0,0)"},
            "hovermode": "closest",
            "dragmode": "zoom",
        }
    )


def figure(data: Iterable[object] = ()) -> go.Figure:
    """A figure in our template."""
    return go.Figure(data=list(data), layout={"template": template(), "showlegend": False})


def empty_figure(text: str) -> go.Figure:
    """A figure that says why there is nothing to see."""
    fig = figure()
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False)
    note = {"text": text, "showarrow": False, "x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
    fig.add_annotation(font={"color": MUTED, "size": 14}, **note)
    return fig
