"""A part's fields as widgets, widgets as text, text as the part: one way there and back.

Every value travels as text, the way a person types it. A field that holds a part becomes a choice
of its kind, followed by that kind's own fields under dotted names: `format`, `format.bits`.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import product
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from app.recipe_words import split_outside
from backend.formats import FORMATS
from backend.layer_rules import On, rule_of
from backend.methods import METHODS
from backend.metrics import METRICS
from backend.recipes import DEFAULT_FORMAT, Reader, parse
from backend.registry import Part, Registry

Kind = Literal["whole", "number", "switch", "choice", "text", "list", "part", "rules"]
REGISTRIES: tuple[Registry[Any], ...] = (FORMATS, METHODS, METRICS)


@dataclass(frozen=True)
class Widget:
    """What a form needs to know of one field."""

    path: str  # "format.bits"
    kind: Kind
    default: str  # as text; "" where the field must be filled in or may be empty
    help: str = ""
    low: float | None = None  # bounds, both allowed unless `open_low`
    high: float | None = None
    open_low: bool = False
    choices: tuple[str, ...] = ()
    nullable: bool = False
    item: Any = field(default=None, compare=False)  # type of a list's items

    @property
    def label(self) -> str:
        """`damping`, `true sequential`."""
        return self.path.rsplit(".", 1)[-1].replace("_", " ")

    @property
    def bounds(self) -> str:
        """`2 to 8`, `above 0`, "" without bounds."""
        low = None if self.low is None else f"{self.low:g}"
        high = None if self.high is None else f"{self.high:g}"
        if low and high:
            return f"{low} to {high}"
        return (
            f"{'above' if self.open_low else 'from'} {low}"
            if low
            else f"up to {high}"
            if high
            else ""
        )


def widgets(cls: type[Part], values: Mapping[str, str] | None = None) -> list[Widget]:
    """The form of a part; `values` decide which kind each inner part has, defaults otherwise."""
    return list(_widgets(cls, "", values or {}))


def _widgets(cls: type[Part], prefix: str, values: Mapping[str, str]) -> Iterator[Widget]:
    for name in sorted(cls.model_fields, key="layers".__eq__):  # the rules last
        info = cls.model_fields[name]
        widget = _widget(prefix + name, info)
        yield widget
        if widget.kind == "part":
            registry = registry_of(info.annotation)
            kind = values.get(widget.path) or widget.default
            yield from _with_defaults(registry.find(kind), info, prefix + name + ".", values)


def _with_defaults(
    cls: type[Part], info: FieldInfo, prefix: str, values: Mapping[str, str]
) -> Iterator[Widget]:
    """Widgets of an inner part; its defaults are those of the outer field where kinds agree."""
    outer = info.get_default(call_default_factory=True)
    own = values_of(outer) if isinstance(outer, cls) else {}
    for widget in _widgets(cls, prefix, values):
        path = widget.path.removeprefix(prefix)
        known = widget.__dict__ | {"default": own.get(path, widget.default)}
        yield Widget(**known)


def _widget(path: str, info: FieldInfo) -> Widget:
    kind, choices, nullable, item = _kind(info.annotation)
    low, high, open_low = _bounds(info)
    default = "" if info.is_required() else text_of(info.get_default(call_default_factory=True))
    if kind == "part" and not default:
        default = DEFAULT_FORMAT
    help_text = info.description or ""
    return Widget(path, kind, default, help_text, low, high, open_low, choices, nullable, item)


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...], bool, Any]:
    """Type -> (widget kind, choices, whether empty is allowed, type of list items)."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inside[0])
    if origin in (Union, types.UnionType):
        kept = [a for a in inside if a is not type(None)]
        if len(kept) == 1:
            kind, choices, _, item = _kind(kept[0])
            return kind, choices, True, item
    if origin is Literal:
        return "choice", tuple(str(value) for value in inside), False, None
    if inside and get_origin(inside[0]) is Annotated and get_args(inside[0])[0] is On:
        return "rules", (), False, None
    if origin in (tuple, list):
        return "list", (), False, inside[0] if inside else str
    if isinstance(annotation, type) and issubclass(annotation, Part):
        registry = registry_of(annotation)
        return "part", tuple(registry.load()), False, None
    return PLAIN.get(annotation, "text"), (), False, None


PLAIN: dict[Any, Kind] = {bool: "switch", int: "whole", float: "number", str: "text"}


def registry_of(annotation: Any) -> Registry[Any]:
    """The registry whose parts a field holds."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    for registry in REGISTRIES:
        if any(issubclass(cls, annotation) for cls in registry.load().values()):
            return registry
    raise ValueError(f"no registry holds parts of type {annotation!r}")


def _bounds(info: FieldInfo) -> tuple[float | None, float | None, bool]:
    """(lowest, highest, lowest excluded); bounds may hide inside Annotated types."""
    low: float | None = None
    high: float | None = None
    open_low = False
    for limit in (*info.metadata, *_nested_metadata(info.annotation)):
        if isinstance(limit, annotated_types.Ge):
            low = float(limit.ge)  # type: ignore[arg-type]
        elif isinstance(limit, annotated_types.Gt):
            low, open_low = float(limit.gt), True  # type: ignore[arg-type]
        elif isinstance(limit, annotated_types.Le):
            high = float(limit.le)  # type: ignore[arg-type]
        elif isinstance(limit, annotated_types.Lt):
            high = float(limit.lt)  # type: ignore[arg-type]
    return low, high, open_low


def _nested_metadata(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return [*metadata, *_nested_metadata(inner)]
    return []


# ---- values and text -----------------------------------------------------------------------


def text_of(value: Any) -> str:
    """A value as a field shows it: true, 0.01, a, b; "" for None; a part's kind."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Part):
        return str(value) if isinstance(value, On) else value.kind
    if isinstance(value, tuple | list):
        return ", ".join(map(text_of, value))
    return repr(value) if isinstance(value, float) else str(value)


def values_of(part: Part, prefix: str = "") -> dict[str, str]:
    """Every field of a part as text, inner parts under dotted names."""
    values: dict[str, str] = {}
    for name in type(part).model_fields:
        value = getattr(part, name)
        values[prefix + name] = text_of(value)
        if isinstance(value, Part):
            values |= values_of(value, f"{prefix}{name}.")
    return values


def part_of(cls: type[Part], values: Mapping[str, str]) -> Part:
    """Texts -> the part. ValueError in one sentence, naming the field."""
    return registry_of(cls).build({"kind": cls.kind, **_data(cls, "", values)})


def _data(cls: type[Part], prefix: str, values: Mapping[str, str]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, info in cls.model_fields.items():
        widget = _widget(prefix + name, info)
        if widget.path not in values:
            continue
        if widget.kind == "part":
            inner = registry_of(info.annotation).find(values[widget.path])
            data[name] = {"kind": inner.kind, **_data(inner, widget.path + ".", values)}
        else:
            data[name] = value_of(widget, values[widget.path])
    return data


def value_of(widget: Widget, text: str) -> Any:
    """One field's text -> its value. ValueError in one sentence."""
    text = text.strip()
    if not text and widget.nullable:
        return None
    if widget.kind == "list":
        kind, choices, _, _ = _kind(widget.item)
        item = Widget(widget.path, kind, "", choices=choices)
        return tuple(value_of(item, part) for part in text.split(",") if part.strip())
    return READERS.get(widget.kind, lambda w, t: t)(widget, text)


def _whole(widget: Widget, text: str) -> int:
    if not re.fullmatch(r"[-+]?\d+", text):
        raise ValueError(f"{widget.label} takes a whole number, not {text!r}")
    return int(text)


def _number(widget: Widget, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{widget.label} takes a number, not {text!r}") from None


def _switch(widget: Widget, text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{widget.label} is true or false, not {text!r}")
    return text == "true"


def read_rules(text: str) -> tuple[On, ...]:
    """`on(modules=attn,bits=8), on(blocks=0,keep=true)` -> the rules. ValueError if one is none."""
    rules = tuple(rule_of(data) for data in Reader(f"[{text}]").value())
    if strange := [rule for rule in rules if not isinstance(rule, On)]:
        raise ValueError(f"layers: a rule is on(...), not {strange[0]!r}")
    return rules


def rule_texts(text: str) -> list[str]:
    """The same, each rule still as text."""
    return [part.strip() for part in split_outside(text, ",") if part.strip()]


READERS = {
    "whole": _whole,
    "number": _number,
    "switch": _switch,
    "rules": lambda widget, text: read_rules(text),
}


# ---- sweeps --------------------------------------------------------------------------------

MOST = 400  # runs of one line; more is a slip of the finger
Alternatives = dict[str, list[str]]  # path -> the values to try, in order


RANGE = re.compile(
    r"""(?P<quoted>"[^"]*"|'[^']*')|(?<![\w.])(\d+(?:\.\d+)?)\.\.(\d+(?:\.\d+)?)(?:\.\.(\d+(?:\.\d+)?))?(?![\w.])"""
)


def expand(line: str) -> list[str]:
    """`rtn(bits=2|3,group=32|64)` -> the four pipelines; the last value changes fastest.

    `2..4` stands for 2|3|4, and `0.4..0.6..0.1` for 0.4|0.5|0.6.
    """
    return list(_expand(spelled_out(line, "|"), [MOST]))


def spelled_out(text: str, between: str) -> str:
    """The text with every range outside quotes as its values. ValueError if a range is empty."""
    return RANGE.sub(
        lambda found: found["quoted"] or between.join(_values(*found.groups()[1:])), text
    )


def _values(first: str, last: str, step: str | None) -> list[str]:
    """`4`, `8`, `2` -> 4, 6, 8. Decimal: 0.1 thrice is 0.3 here."""
    start, end, by = Decimal(first), Decimal(last), Decimal(step or 1)
    if end < start or not by:
        raise ValueError(f"the range {first}..{last} is empty; write it as {last}..{first}")
    if (end - start) / by >= MOST:
        raise ValueError(f"the range {first}..{last} has more than {MOST} values")
    return [str(start + by * i) for i in range(int((end - start) / by) + 1)]


def _expand(line: str, left: list[int]) -> Iterator[str]:
    at = line.find("|")
    if at < 0:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError(f"this sweep makes more than {MOST} runs; give fewer values")
        yield line
        return
    start, end = _option_range(line, at)
    for option in split_outside(line[start:end], "|"):
        if not option.strip():
            raise ValueError(f"a value is missing beside | in {line[start:end]!r}")
        yield from _expand(line[:start] + option.strip() + line[end:], left)


def _option_range(line: str, at: int) -> tuple[int, int]:
    """The stretch around `|` at `at`: from its `=` to the `,` or `)` that ends the value."""
    start, depth = at, 0
    while start > 0 and not (depth == 0 and line[start - 1] in "=(,+"):
        depth += (line[start - 1] in ")]") - (line[start - 1] in "([")
        start -= 1
    end, depth = at, 0
    while end < len(line) and not (depth == 0 and line[end] in ",)+"):
        depth += (line[end] in "([") - (line[end] in ")]")
        end += 1
    return start, end


@dataclass(frozen=True)
class StepDraft:
    """A step being edited: its kind, and for each field that was set the values to try."""

    kind: str
    values: Alternatives

    @property
    def cls(self) -> type[Part]:
        return METHODS.find(self.kind)

    def is_part(self, path: str) -> bool:
        """True if the field holds a part: its value is a kind."""
        info = self.cls.model_fields.get(path)
        return info is not None and _kind(info.annotation)[0] == "part"

    def widgets(self) -> list[Widget]:
        return widgets(self.cls, {path: values[0] for path, values in self.values.items()})


def read_line(line: str) -> list[StepDraft]:
    """A pipeline's text, sweeps included -> its steps. ValueError in one sentence."""
    pipelines = [parse(text) for text in expand(line)]
    shapes = {tuple(step.kind for step in pipeline) for pipeline in pipelines}
    if len(shapes) > 1:
        raise ValueError("the pipelines of this line have different steps; write one line each")
    drafts = [_merged(steps) for steps in zip(*pipelines, strict=True)]
    for draft in drafts:
        kinds = next((v for p, v in draft.values.items() if len(v) > 1 and draft.is_part(p)), None)
        if kinds:
            raise ValueError(f"this line tries {' and '.join(kinds)}; the builder edits one kind")
    return drafts


def _merged(steps: Sequence[Part]) -> StepDraft:
    """The same step of every pipeline of a sweep -> one draft."""
    found: Alternatives = {}
    for step in steps:
        for path, text in set_values(step).items():
            if text not in found.setdefault(path, []):
                found[path].append(text)
    return StepDraft(steps[0].kind, found)


def set_values(part: Part, prefix: str = "") -> dict[str, str]:
    """Like values_of, of the fields that were written."""
    values: dict[str, str] = {}
    for name in type(part).model_fields:
        if name in part.model_fields_set:
            value = getattr(part, name)
            values[prefix + name] = text_of(value)
            if isinstance(value, Part):
                values |= set_values(value, f"{prefix}{name}.")
    return values


def write_line(steps: Sequence[StepDraft]) -> str:
    """Steps -> the pipeline's text, several values joined by |."""
    return "+".join(_write_step(step) for step in steps)


def _write_step(step: StepDraft) -> str:
    by_path = {widget.path: widget for widget in step.widgets()}
    own = [w for p, w in by_path.items() if p in step.values and "." not in p and w.kind != "part"]
    pairs = _write_format(step, by_path) + [_pair(w.path, step.values[w.path], w) for w in own]
    return f"{step.kind}({','.join(pairs)})" if pairs else step.kind


def _write_format(step: StepDraft, by_path: Mapping[str, Widget]) -> list[str]:
    """Fields of a format stand beside the step's own unless it is not the usual kind."""
    pairs: list[str] = []
    for path, widget in by_path.items():
        if widget.kind != "part" or path not in step.values:
            continue
        inner = [p for p in by_path if p.startswith(path + ".") and p in step.values]
        written = [_pair(p.removeprefix(path + "."), step.values[p], by_path[p]) for p in inner]
        clash = {p.removeprefix(path + ".") for p in inner} & set(step.cls.model_fields)
        kind = step.values[path][0]
        if path == "format" and kind == DEFAULT_FORMAT and not clash:
            pairs += written
        else:
            pairs.append(f"{path}={kind}({','.join(written)})")
    return pairs


def _pair(name: str, values: Sequence[str], widget: Widget) -> str:
    return f"{name}={'|'.join(recipe_text(widget, value) for value in values)}"


def recipe_text(widget: Widget, text: str) -> str:
    """A field's text as a recipe writes it: words bare, other text quoted, lists in brackets."""
    if not text and widget.nullable:
        return "null"
    if widget.kind == "rules":
        return f"[{','.join(rule_texts(text))}]"
    if widget.kind == "list":
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return f"[{','.join(_bare(part) for part in parts)}]"
    return _bare(text) if widget.kind in ("text", "choice") else text


def _bare(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][\w.\-]*|[-+]?\d+(\.\d+)?", text)
    return text if plain else json.dumps(text)


def with_value(step: StepDraft, path: str, text: str) -> StepDraft:
    """The step with one field set; `2, 3, 4` or `2..4` in a plain field is a sweep.

    ValueError if a value does not fit.
    """
    widget = next((w for w in step.widgets() if w.path == path), None)
    if widget is None:
        raise ValueError(f"{step.kind} has no field {path!r}")
    one = widget.kind in ("list", "text", "rules")
    parts = [text] if one else spelled_out(text, ",").split(",")
    texts = [part.strip() for part in parts if part.strip()] or [""]
    for part in texts:
        value_of(widget, part)
    values = {p: v for p, v in step.values.items() if not p.startswith(path + ".")}
    is_default = texts == [widget.default] and path not in ("format.bits", "format.group")
    outer = (
        {path.rsplit(".", 1)[0]: step.values.get("format", [DEFAULT_FORMAT])} if "." in path else {}
    )
    kept = {p: v for p, v in values.items() if p != path}
    return StepDraft(step.kind, outer | (kept if is_default else kept | {path: texts}))


def combinations(steps: Sequence[StepDraft]) -> int:
    """How many runs a line makes."""
    return len(list(product(*(range(len(v)) for step in steps for v in step.values.values()))))


def read_metric(text: str) -> Part:
    """`perplexity(limit=32)` -> the metric. ValueError in one sentence."""
    reader = Reader(text)
    return METRICS.build(reader.call())


def metric_with(text: str, path: str, value: str) -> str:
    """A metric's text with one knob set; knobs at their defaults are left out."""
    part = read_metric(text)
    by_path = {widget.path: widget for widget in widgets(type(part))}
    if path not in by_path:
        raise ValueError(f"{part.kind} has no field {path!r}")
    value_of(by_path[path], value)
    values = values_of(part) | {path: value.strip()}
    changed = [
        f"{p}={recipe_text(by_path[p], v)}" for p, v in values.items() if v != by_path[p].default
    ]
    text = f"{part.kind}({','.join(changed)})" if changed else part.kind
    read_metric(text)
    return text
