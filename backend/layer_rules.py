"""Layer rules: in which blocks and linears a step acts otherwise, or not at all.

`gptq(bits=4,layers=[on(modules=attn,bits=8),on(blocks="first,last",keep=true)])`. For each linear
the first rule that matches decides; where none does, the step acts as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from backend.registry import Part, made, tuples

if TYPE_CHECKING:
    from backend.model.families import Block

ENDS = {"first": 0, "last": -1}
SPAN = re.compile(r"(first|last|-?\d+)(?:\.\.(first|last|-?\d+))?")


def listed(value: Any) -> Any:
    """A whole number, a list or a loose text as the text that means the same: [0, -1] -> "0,-1"."""
    if isinstance(value, list | tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, str):
        return ",".join(split(value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class On(Part):
    """Blocks and linears that a step treats otherwise: kept in 16 bits, or with other knobs.

    Every further key is a knob of the step or of its format.
    """

    model_config = ConfigDict(extra="allow")
    kind: ClassVar[str] = "on"
    blocks: Annotated[str, BeforeValidator(listed)] = Field(
        "",
        description='Which blocks: "0..3", "0,-1", first, last; negative numbers count from the '
        "end; empty is all.",
    )
    modules: Annotated[str, BeforeValidator(listed)] = Field(
        "",
        description="Which linears: attn, ffn, a name or part of one (down_proj, self_attn), "
        "several with commas, * for any letters; empty is all.",
    )
    keep: bool = Field(False, description="Leave them as they are, weights in 16 bits.")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {k: v.data() if isinstance(v, Part) else tuples(v) for k, v in data.items()}

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        for span in split(self.blocks):
            check_span(span)
        if "layers" in self.knobs:
            raise ValueError("on: a rule has no rules of its own; leave out layers")
        if self.keep and self.knobs:
            knob = next(iter(self.knobs))
            raise ValueError(f"on: keep=true changes nothing else; leave out {knob}")
        return self

    def __str__(self) -> str:
        """As a recipe writes it."""
        from backend.recipes import render_part

        return render_part(self)

    @property
    def knobs(self) -> dict[str, Any]:
        """What the step's knobs, and those of its format, become here."""
        return dict(self.model_extra or {})

    def covers(self, index: int, count: int) -> bool:
        """True for block `index` of `count`."""
        spans = split(self.blocks)
        return not spans or any(low <= index <= high for low, high in ends(spans, count))

    def names(self, block: Block, linear: str) -> bool:
        """True for the linear of this dotted name in a block."""
        patterns = split(self.modules)
        return not patterns or any(fits(pattern, block, linear) for pattern in patterns)

    def matches(self, block: Block, count: int, linear: str) -> bool:
        """True for a linear of one of `count` blocks."""
        return self.covers(block.index, count) and self.names(block, linear)

    def idle_patterns(self, blocks: Iterable[Block]) -> list[str]:
        """The module patterns that fit no linear of these blocks."""
        linears = [(block, name) for block in blocks for name in block.linears()]
        return [p for p in split(self.modules) if not any(fits(p, *linear) for linear in linears)]


def split(text: str) -> list[str]:
    """`a, b` -> ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def number(end: str) -> int:
    """`first`, `last` or a number -> a block's number, negative from the end."""
    return ENDS[end] if end in ENDS else int(end)


def check_span(span: str) -> None:
    """ValueError unless a person can mean something by it."""
    found = SPAN.fullmatch(span)
    if not found:
        raise ValueError(
            f'on: cannot read blocks {span!r}; write "0..3", "0,-1", first or last, in quotes'
        )
    low, high = number(found[1]), number(found[2] or found[1])
    if low > high and (low < 0) == (high < 0):
        raise ValueError(f"on: blocks {span} are none; write {high}..{low}")


def ends(spans: Iterable[str], count: int) -> list[tuple[int, int]]:
    """Spans -> first and last block of each, counted from 0."""
    found = [[number(end) for end in span.split("..")] for span in spans]
    counted = [[end + count if end < 0 else end for end in pair] for pair in found]
    return [(pair[0], pair[-1]) for pair in counted]


def fits(pattern: str, block: Block, linear: str) -> bool:
    """True if the pattern is the name, a run of its dotted parts, or its half of the block."""
    parts = linear.split(".")
    places = range(len(parts) + 1)
    runs = {".".join(parts[start:stop]) for start in places for stop in places if start < stop}
    half = "attn" if block.family.is_attention(linear) else "ffn"
    return pattern == half or any(fnmatchcase(run, pattern) for run in runs)


def rule_of(value: Any) -> Any:
    """JSON data or the bare word `on` -> the rule; a rule stays."""
    if value == On.kind:
        return On()
    if not isinstance(value, Mapping):
        return value
    if value.get("kind", On.kind) != On.kind:
        raise ValueError(f"layers: a rule is on(...), not {value['kind']}(...)")
    return made(On, value)


def several(value: Any) -> Any:
    """One rule as a list of one."""
    return (value,) if isinstance(value, Mapping | On) or value == On.kind else value


Rule = Annotated[On, BeforeValidator(rule_of)]
Rules = Annotated[tuple[Rule, ...], BeforeValidator(several)]
