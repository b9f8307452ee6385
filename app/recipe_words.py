"""Recipes taken apart and in words: what is quantized, to how many bits, by which family."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from backend.formats import FORMATS
from backend.formats.gguf import TYPES as BLOCK_TYPES
from backend.layer_rules import On
from backend.methods import METHODS
from backend.methods.base import Target
from backend.recipes import DEFAULT_FORMAT, parse, presets, render
from backend.registry import Part

Step = Mapping[str, Any]  # one step as JSON

NAMES = {
    "rtn": "RTN",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "smoothquant": "SmoothQuant",
    "spqr": "SpQR",
    "hqq": "HQQ",
    "gguf": "GGUF",
    "llm_int8": "LLM.int8()",
    "bnb_int8": "LLM.int8() (bitsandbytes)",
    "kv_cache": "KV cache",
    "kivi": "KIVI",
    "kvquant": "KVQuant",
    "obq": "OBQ",
    "sparsegpt": "SparseGPT",
    "zeroquant": "ZeroQuant",
    "outlier_suppression": "Outlier Suppression",
    "sdr": "SDR",
    "bcq": "BCQ",
    "nf4": "NF4",
    "fp4": "FP4",
    "fp8_e4m3": "E4M3",
    "fp8_e5m2": "E5M2",
    "fp4_e2m1": "E2M1",
    **{name: name for name in BLOCK_TYPES},
}
WORDS = {
    "act_order": "act order",
    "static_groups": "static groups",
    "true_sequential": "true sequential",
    "symmetric": "sym",
    "mse": "MSE clip",
    "per_tensor": "per tensor",
    "double_quant": "double quant",
    "lkd_steps": "LKD steps",
    "lkd_rate": "LKD rate",
}
HALVES = {"attn": "attention", "ffn": "FFN"}
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
        "bits_ffn",
        "bits_a",
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
    kv_bits: str  # of cached keys and values


BASELINE = Recipe("baseline", "16-bit", "16-bit", "baseline", "", "16", "16", "16")


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
        kv_bits=_bits(steps, "kv_cache"),
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
    return frozenset(t for t in cls.targets if _own_bits(step, t) != 16)


def _family(kind: str) -> str:
    cls = METHODS.load().get(kind)
    return (cls.family if cls else "") or kind


def _bits(steps: Sequence[Step], target: Target) -> str:
    rounding = [step for step in steps if target in _targets(step)]
    found = [bits for step in rounding if (bits := _code_bits(step, target))]
    return f"{found[-1]:g}" if found else "16"


def _own_bits(step: Step, target: Target) -> float | None:
    """Bits of a code as the method says them; None where its format or a knob `bits` does."""
    try:
        return METHODS.build(step).code_bits(target)
    except ValueError:  # a kind or knob of another version
        cls = METHODS.load().get(step["kind"])
        return cls.fixed_bits if cls else None


def _code_bits(step: Step, target: Target) -> float | None:
    """Bits of a code: the method's word, a knob of its format or its own, the format's own."""
    if own := _own_bits(step, target):
        return own
    grid = step.get("format") or step
    if "bits" in grid or grid is step:
        bits: float | None = grid.get("bits")
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
    kept = {
        k: _told_format(v) if isinstance(v, Mapping) else v
        for k, v in step.items()
        if k in always or (k != "format" and v != defaults.get(k))
    }
    return kept | ({"format": _told_format(grid)} if grid else {})


def _told_format(grid: Step) -> dict[str, Any]:
    defaults = FORMATS.build({"kind": grid["kind"]}).data()
    always = ("kind", "bits", *VARIETIES) + (("group",) if grid.get("group") else ())
    return {k: v for k, v in grid.items() if k in always or v != defaults.get(k)}


def kind_name(kind: str) -> str:
    """`gptq` -> GPTQ, `activations` -> Activations."""
    return NAMES.get(kind) or kind.replace("_", " ").capitalize()


def target_words(target: str) -> str:
    """`weights + kv_cache` -> weights + KV cache."""
    return target.replace("kv_cache", "KV cache")


def _name(steps: Sequence[Step], quiet: frozenset[str]) -> str:
    """Kinds, then W4A8, then groups and the knobs that are set."""
    weights, acts = _bits(steps, "weights"), _bits(steps, "activations")
    kinds = [kind_name(s["kind"]) for s in steps if s["kind"] != "activations"]
    code = f"W{weights}" + (f"A{acts}" if acts != "16" else "") if weights != "16" else f"A{acts}"
    cached = _bits(steps, "kv_cache")
    if cached != "16":
        code = ("" if code == "A16" else code) + f"KV{cached}"
    knobs = [word for step in steps for word in _knob_words(step, quiet)]
    name = " ".join([*kinds, *([code] if code != "A16" else []), *dict.fromkeys(knobs)])
    rules = [rule_words(rule) for step in steps for rule in step.get("layers") or ()]
    return ", ".join([name, *dict.fromkeys(rules)])


def rule_words(rule: Step) -> str:
    """A layer rule: `attention in 8 bits`, `first and last block in 16 bits`."""
    where = [w for w in (_blocks_words(rule["blocks"]), _linear_words(rule["modules"])) if w]
    return f"{' '.join(where) or 'all'} {_rule_effect(rule)}"


def _linear_words(modules: str) -> str:
    names = [HALVES.get(name.strip(), name.strip()) for name in modules.split(",") if name.strip()]
    return " + ".join(names)


def _blocks_words(blocks: str) -> str:
    spans = [span.strip() for span in blocks.split(",") if span.strip()]
    if not spans:
        return ""
    if all(span in ("first", "last") for span in spans):
        return f"{' and '.join(spans)} block"
    return f"block{'s' * (len(spans) > 1 or '..' in spans[0])} {', '.join(spans)}"


def _rule_effect(rule: Step) -> str:
    """What a rule does where it holds."""
    if rule["keep"]:
        return "in 16 bits"
    knobs = {k: v for k, v in rule.items() if k not in ("kind", *On.model_fields)}
    grid = knobs.pop("format", None)
    grid = {"kind": grid} if isinstance(grid, str) else grid or {}
    values = {k: v for k, v in {**grid, **knobs}.items() if k != "kind"}
    bits, size = values.pop("bits", None), values.pop("group", None)
    varieties = [str(values.pop(name)) for name in VARIETIES if name in values]
    words = [NAMES.get(name, name.replace("_", " ")) for name in varieties]
    if grid and not words and grid["kind"] != DEFAULT_FORMAT:
        words.append(kind_name(grid["kind"]))
    words += [f"{bits:g} bits"] if bits is not None else []
    words += [f"g{size}" if size else "no groups"] if size is not None else []
    words += [_knob(name, value) for name, value in values.items()]
    return f"in {' '.join(words)}" if words else "as the step stands"


def _knob_words(step: Step, quiet: frozenset[str]) -> list[str]:
    try:
        kept = told(step)
    except (ValueError, KeyError):  # written by another version: say only what is plain
        return []
    grid = kept.pop("format", {})
    size = grid.get("group") or step.get("group")
    group = [f"g{size}"] if size else []
    skip = quiet | {"kind", "bits", "group", "layers", *VARIETIES}
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
    if isinstance(value, Mapping):  # a format that is not the step's only one
        inside = [*_grid_words(value), *(["INT"] if value["kind"] == DEFAULT_FORMAT else [])]
        inside += [f"{value['bits']:g} bits"] if "bits" in value else []
        return " ".join([word, *inside, *([f"g{value['group']}"] if value.get("group") else [])])
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
