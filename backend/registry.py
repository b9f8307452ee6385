"""Parts: frozen configurations that are their own verbs, and the registries that find them."""

from __future__ import annotations

import difflib
import importlib
import json
import pkgutil
import traceback
from collections.abc import Mapping
from hashlib import sha256
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)


class Part(BaseModel):
    """A configuration: its fields are knobs, its methods are verbs, its JSON carries `kind`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    kind: ClassVar[str]
    version: ClassVar[int] = 1  # raise when the same knobs give other numbers

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"kind": self.kind, **handler(self)}

    def data(self) -> dict[str, Any]:
        """Plain JSON data, every knob spelled out: what is stored, hashed and sent to kernels."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """12 hex digits over the knobs and the version of this part and of the parts inside it."""
        return short_hash([self.data(), versions(self)])

    @classmethod
    def summary(cls) -> str:
        """First paragraph of the class's docstring: the one-line help of pages and command line."""
        return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def versions(part: Part) -> list[list[Any]]:
    """[[kind, version], ...] of a part and of every part among its fields."""
    found: list[list[Any]] = [[part.kind, part.version]]
    for name in type(part).model_fields:
        value = getattr(part, name)
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Part):
                found += versions(inner)
    return found


def short_hash(data: Any) -> str:
    """12 hex digits over JSON data; the order of keys does not matter."""
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


T = TypeVar("T", bound=Part)


class Registry(Generic[T]):
    """The parts of one kind: every module of `package` is imported once and registers its own."""

    def __init__(self, package: str, noun: str) -> None:
        self.package = package
        self.noun = noun
        self.broken: dict[str, str] = {}  # module -> traceback of files that failed to import
        self._kinds: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator. Two classes with one kind are an error."""
        other = self._kinds.get(cls.kind)
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise ValueError(f"{self.noun} kind {cls.kind!r} is already {other.__module__}")
        self._kinds[cls.kind] = cls
        return cls

    def load(self) -> Mapping[str, type[T]]:
        """{kind: class} of every part found; files that fail to import are kept in `broken`."""
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__, self.package + "."):
                try:
                    importlib.import_module(module.name)
                except Exception:  # a broken file must not take the others down; shown in the UI
                    self.broken[module.name] = traceback.format_exc()
        return MappingProxyType(dict(sorted(self._kinds.items())))

    def find(self, kind: str) -> type[T]:
        """The class of one kind, or ValueError with the nearest name."""
        kinds = self.load()
        if kind not in kinds:
            raise ValueError(f"unknown {self.noun} {kind!r}{nearest(kind, kinds)}")
        return kinds[kind]

    def build(self, data: Mapping[str, Any]) -> T:
        """{"kind": "gptq", "damping": 0.01} -> GPTQ(damping=0.01)."""
        if "kind" not in data:
            raise ValueError(f"a {self.noun} needs a 'kind', one of: {', '.join(self.load())}")
        return made(self.find(str(data["kind"])), data)

    def coerce(self, value: Any) -> Any:
        """For pydantic fields: JSON data becomes a part, a part stays."""
        return self.build(value) if isinstance(value, Mapping) else value


def made(cls: type[T], data: Mapping[str, Any]) -> T:
    """Knobs as JSON data -> the part. ValueError in one sentence."""
    knobs = {name: tuples(value) for name, value in data.items() if name != "kind"}
    try:
        return cls.model_validate(knobs)
    except ValidationError as error:
        raise ValueError(sentence(cls, error)) from None


def tuples(value: Any) -> Any:
    """JSON lists as the tuples that strict frozen models ask for."""
    if isinstance(value, list | tuple):
        return tuple(tuples(item) for item in value)
    return value


def nearest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    """`; did you mean 'gptq'?` or the list of what there is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(known)}" if known else ""


def one_sentence(error: Exception) -> str:
    """What an error says, on one line; of pydantic's reports the first complaint."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    place = ".".join(str(step) for step in first["loc"])
    return message if first["type"] == "value_error" else f"{place}: {message}"


def sentence(cls: type[Part], error: ValidationError) -> str:
    """Pydantic's report as one sentence: knob, what was given, what is allowed."""
    first = error.errors()[0]
    name = ".".join(str(step) for step in first["loc"]) or cls.kind
    if first["type"] == "extra_forbidden":
        return f"{cls.kind}: unknown knob {name!r}{nearest(name, list(cls.model_fields))}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message if message.startswith(cls.kind) else f"{cls.kind}: {message}"
    return f"{cls.kind}: {name} = {first['input']!r}: {message[0].lower()}{message[1:]}"
