"""Recipes: preset names and the text form of pipelines.

`gptq(bits=4,group=128)+activations(bits=8)`. Grammar: step(key=value,...)+...; a value is a number,
true, false, null, word, "text", part(key=value,...) or [value,...]. A step
that takes a format accepts the fields of format `int` directly.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from typing import Any

from backend.formats import FORMATS, Format
from backend.methods import METHODS, Method
from backend.methods.base import beside_format
from backend.registry import Part, nearest

DEFAULT_FORMAT = "int"
TOKEN = re.compile(
    r'\s*([A-Za-z_][\w.\-]*|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|"(?:[^"\\]|\\.)*"|[()\[\],=+])'
)

WORDS = {"true": True, "false": False, "null": None, "none": None}


class Reader:
    """Cursor over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, at = text, [], 0
        while text[at:].strip():
            match = TOKEN.match(text, at)
            if match is None:
                raise ValueError(f"recipe {text!r}: cannot read {text[at:].strip()[:12]!r}")
            self.tokens.append(match.group(1))
            at = match.end()
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            want = f"{expected!r}" if expected else "more"
            raise ValueError(
                f"recipe {self.text!r}: expected {want} "
                f"{'at the end' if not token else f'before {token!r}'}"
            )
        self.at += 1
        return token

    def call(self) -> dict[str, Any]:
        """word or word(key=value,...) -> {"kind": word, key: value}."""
        kind = self.take()
        if not re.match(r"[A-Za-z_]", kind):
            raise ValueError(f"recipe {self.text!r}: expected a name, got {kind!r}")
        data: dict[str, Any] = {"kind": kind}
        if self.peek() != "(":
            return data
        self.take("(")
        while self.peek() != ")":
            key = self.take()
            self.take("=")
            if key in data:
                raise ValueError(f"recipe {self.text!r}: {key!r} is given twice")
            data[key] = self.value()
            if self.peek() != ")":
                self.take(",")
        self.take(")")
        return data

    def value(self) -> Any:
        token = self.peek()
        if token == "[":
            self.take()
            items = []
            while self.peek() != "]":
                items.append(self.value())
                if self.peek() != "]":
                    self.take(",")
            self.take("]")
            return tuple(items)
        if token.startswith('"'):
            return json.loads(self.take())
        if re.match(r"[A-Za-z_]", token):
            data = self.call()
            if len(data) > 1 or (self.tokens[self.at - 1] == ")"):
                return data
            return WORDS.get(data["kind"].lower(), data["kind"])
        return json.loads(self.take().lstrip("+")) if token else self.take()


def parse(text: str) -> tuple[Method, ...]:
    """A preset's name or a pipeline's text -> its steps. ValueError in one sentence."""
    text = presets().get(text.strip(), text).strip()
    if text == "baseline" or not text:
        return ()
    if not re.match(r"^[\w]+\s*(\(|\+|$)", text):
        raise ValueError(f"unknown recipe {text!r}{nearest(text, [*presets(), *METHODS.load()])}")
    reader = Reader(text)
    steps = [step(reader.call(), text)]
    while reader.peek():
        reader.take("+")
        steps.append(step(reader.call(), text))
    return tuple(steps)


def read_calls(text: str) -> list[dict[str, Any]]:
    """`perplexity,tasks(limit=50)` -> [{"kind": "perplexity"}, {"kind": "tasks", "limit": 50}]."""
    reader = Reader(text)
    calls = [reader.call()] if reader.peek() else []
    while reader.peek():
        reader.take(",")
        calls.append(reader.call())
    return calls


def step(data: Mapping[str, Any], text: str) -> Method:
    """{"kind": "gptq", "bits": 4, ...} -> the method, format fields put into its format."""
    if data["kind"] not in METHODS.load():
        known = [*METHODS.load(), *presets()]
        raise ValueError(
            f"unknown recipe {text!r}: no step {data['kind']!r}{nearest(data['kind'], known)}"
        )
    cls = METHODS.find(data["kind"])
    if "format" not in cls.model_fields:
        return METHODS.build(data)
    knobs = {name: value for name, value in data.items() if name != "kind"}
    built = beside_format(cls, knobs, DEFAULT_FORMAT)
    if "format" not in data and len(built["format"]) == 1:  # nothing said of it: the step's own
        del built["format"]
    return METHODS.build({"kind": cls.kind, **built})


def render(steps: tuple[Method, ...]) -> str:
    """Steps -> canonical text: format fields first, in declaration order, what the user set."""
    return "+".join(render_part(s) for s in steps) or "baseline"


def render_part(part: Part) -> str:
    """One part -> kind(key=value,...): its format first, its layer rules last."""
    pairs: list[str] = []
    names = set_fields(part)
    if not part.model_extra:  # in a rule, blocks and linears come first
        names.sort(key=lambda name: (name == "layers") - (name == "format"))
    for name in names:
        value = getattr(part, name)
        if name == "format" and isinstance(value, Format) and value.kind == DEFAULT_FORMAT:
            pairs += [f"{f}={render_value(getattr(value, f))}" for f in set_fields(value)]
        else:
            pairs.append(f"{name}={render_value(value)}")
    return call_of(part.kind, pairs)


def set_fields(part: Part) -> list[str]:
    """Fields the user wrote, in declaration order; those of a rule's step after its own."""
    own = [f for f in type(part).model_fields if f in part.model_fields_set]
    return own + list(part.model_extra or {})


def call_of(kind: str, pairs: list[str]) -> str:
    """`rtn`, `rtn(bits=4,group=128)`."""
    return f"{kind}({','.join(pairs)})" if pairs else kind


def render_value(value: Any) -> str:
    """A knob's value as recipe text."""
    if isinstance(value, Part):
        return render_part(value)
    if isinstance(value, Mapping):  # a part as JSON, in a layer rule
        pairs = [f"{key}={render_value(inner)}" for key, inner in value.items() if key != "kind"]
        return call_of(value["kind"], pairs)
    if isinstance(value, tuple):
        return f"[{','.join(render_value(v) for v in value)}]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w.\-]*", value) and not reserved(value):
        return value
    return json.dumps(value)


def reserved(word: str) -> bool:
    """True for words that a recipe reads as something else than text."""
    return word.lower() in WORDS


def presets() -> dict[str, str]:
    """{name: pipeline text} from the RECIPES of every method's and format's file."""
    found: dict[str, str] = {}
    for registry in (METHODS, FORMATS):
        for cls in registry.load().values():
            found |= getattr(importlib.import_module(cls.__module__), "RECIPES", {})
    return found
