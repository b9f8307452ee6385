"""Recipes taken apart and in words: what is quantized, to how many bits, by which family."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from backend.formats import FORMATS
from backend.methods import METHODS
from backend.recipes import DEFAULT_FORMAT, parse, presets, render
from backend.registry import Part

Step = Mapping[str, Any]  # one step as JSON

NAMES = {
    "rtn": "RTN",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "smoothquant": "SmoothQuant",
    "hqq": "HQQ",
    "llm_int8": "LLM.int8()",
    "bnb_int8": "LLM.int8() (bitsandbytes)",
    "sdr": "SDR",
    "bcq": "BCQ",
    "nf4": "NF4",
    "fp4": "FP4",
    "fp8_e4m3": "E4M3",
    "fp8_e5m2": "E5M2",
    "fp4_e2m1": "E2M1",
}
WORDS = {
    "act_order": "act order",
    "static_groups": "static groups",
    "true_sequential": "true sequential",
    "symmetric": "sym",
    "mse": "MSE clip",
    "per_tensor": "per tensor",
    "double_quant": "double quant",
}
VARIETIES = ("type", "table")  # which number format of its kind: told always, by value alone
# Left out of short names: they seldom tell two recipes of one chart apart.
QUIET_KNOBS = frozenset(
    {
        "scale_dtype",
        "live_damping",
        "fresh_groups",
        "convention",
        "act_order",
        "static_groups",
        "chosen_by",
        "solver",
    }
)


@dataclass(frozen=True)
class Recipe:
    """What charts need to know of a pipeline."""

    text: str  # canonical: "gptq(bits=4,group=64)"
    name: str  # short: "GPTQ W4 g64"
    long_name: str  # with every knob that is not at its default
    family: str
    target: str  # "weights", "weights + activations", ...
    bits: str  # of the weights' codes; "16" where they are not quantized
    act_bits: str


BASELINE = Recipe("baseline", "16-bit", "16-bit", "baseline", "", "16", "16")


@lru_cache(maxsize=4096)
def recipe_of(spec: str) -> Recipe:
    """Text of spec.json -> its recipe; kinds that are gone are read as plain data."""
    steps: list[Step] = list(json.loads(spec).get("steps") or [])
    return recipe_of_steps(steps) if steps else BASELINE


def recipe_of_steps(steps: Sequence[Step]) -> Recipe:
    """Steps as JSON -> the recipe in words."""
    targets: set[str] = set().union(*(_targets(step) for step in steps))
    preset = preset_names().get(_identity(steps))
    return Recipe(
        text=_text(steps),
        name=preset or _name(steps, QUIET_KNOBS),
        long_name=_name(steps, frozenset()),
        family=_family(steps[0]["kind"]),
        target=" + ".join(t for t in ("weights", "activations", "kv_cache") if t in targets),
        bits=_bits(steps, "weights"),
        act_bits=_bits(steps, "activations"),
    )


@lru_cache(maxsize=1)
def preset_names() -> Mapping[str, str]:
    """{identity of its steps: name of the preset}."""
    return {_identity([s.data() for s in parse(text)]): name for name, text in presets().items()}


def _identity(steps: Sequence[Step]) -> str:
    return json.dumps(list(steps), sort_keys=True)


def _targets(step: Step) -> frozenset[str]:
    cls = METHODS.load().get(step["kind"])
    if cls is None or cls.exact:  # smoothing rewrites weights and activations, it rounds neither
        return frozenset()
    return frozenset(cls.targets)


def _family(kind: str) -> str:
    cls = METHODS.load().get(kind)
    return (cls.family if cls else "") or kind


def _bits(steps: Sequence[Step], target: str) -> str:
    found = [bits for step in steps if target in _targets(step) and (bits := _code_bits(step))]
    return f"{found[-1]:g}" if found else "16"


def _code_bits(step: Step) -> float | None:
    """Bits of a code: a knob of the step's format or of the step itself, or the format's own."""
    grid = step.get("format") or step
    if "bits" in grid or grid is step:
        method = METHODS.load().get(step["kind"])
        bits: float | None = grid.get("bits", method and method.fixed_bits)
        return bits
    try:
        return FORMATS.build(grid).code_bits()
    except ValueError:  # a format of another version
        return None


def _text(steps: Sequence[Step]) -> str:
    try:
        return render(tuple(METHODS.build(told(step)) for step in steps))
    except ValueError:  # a kind or knob of another version: the names still say what it was
        return "+".join(step["kind"] for step in steps)


def told(step: Step) -> dict[str, Any]:
    """A step without the knobs that stand at their defaults; bits and group are always told."""
    defaults = METHODS.build({"kind": step["kind"]}).data()
    grid = step.get("format")
    always = ("kind", "bits") + (("group",) if step.get("group") else ())
    kept = {k: v for k, v in step.items() if k in always or (k != "format" and v != defaults[k])}
    return kept | ({"format": _told_format(grid)} if grid else {})


def _told_format(grid: Step) -> dict[str, Any]:
    defaults = FORMATS.build({"kind": grid["kind"]}).data()
    always = ("kind", "bits", *VARIETIES) + (("group",) if grid.get("group") else ())
    return {k: v for k, v in grid.items() if k in always or v != defaults.get(k)}


def kind_name(kind: str) -> str:
    """`gptq` -> GPTQ, `activations` -> Activations."""
    return NAMES.get(kind) or kind.replace("_", " ").capitalize()


def _name(steps: Sequence[Step], quiet: frozenset[str]) -> str:
    """Kinds, then W4A8, then groups and the knobs that are set."""
    weights, acts = _bits(steps, "weights"), _bits(steps, "activations")
    kinds = [kind_name(s["kind"]) for s in steps if s["kind"] != "activations"]
    code = f"W{weights}" + (f"A{acts}" if acts != "16" else "") if weights != "16" else f"A{acts}"
    knobs = [word for step in steps for word in _knob_words(step, quiet)]
    return " ".join([*kinds, *([code] if code != "A16" else []), *dict.fromkeys(knobs)])


def _knob_words(step: Step, quiet: frozenset[str]) -> list[str]:
    try:
        kept = told(step)
    except (ValueError, KeyError):  # written by another version: say only what is plain
        return []
    grid = kept.pop("format", {})
    size = grid.get("group") or step.get("group")
    group = [f"g{size}"] if size else []
    skip = quiet | {"kind", "bits", "group", *VARIETIES}
    return (
        _grid_words(grid)
        + group
        + [_knob(n, v) for n, v in {**grid, **kept}.items() if n not in skip]
    )


def _grid_words(grid: Step) -> list[str]:
    """What the grid is called: nothing for plain integers, the variety or else the kind."""
    if not grid or grid["kind"] == DEFAULT_FORMAT:
        return []
    names = [str(grid[name]) for name in VARIETIES if name in grid] or [grid["kind"]]
    return [NAMES.get(name, name.replace("_", " ")) for name in names]


def _knob(name: str, value: Any) -> str:
    word = WORDS.get(name, name.replace("_", " "))
    if isinstance(value, bool):
        return word if value else f"no {word}"
    return f"{word} {value:g}" if isinstance(value, float) else f"{word} {value}"


def split_outside(text: str, between: str) -> list[str]:
    """Parts of `text` between the signs that stand outside brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == between and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def text_of_steps(steps: Sequence[Part]) -> str:
    """Steps -> their canonical text."""
    return recipe_of_steps([step.data() for step in steps]).text if steps else BASELINE.text
