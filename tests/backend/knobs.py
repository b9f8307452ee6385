"""Every part with each of its knobs moved: what the conformance tests loop over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from backend.registry import Part


def knob_values(annotation: Any, rules: list[Any]) -> list[Any]:
    """Values a knob may take: all words, both truths, both ends of a range."""
    if annotation is bool:
        return [False, True]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation in (int, float):
        ends = [getattr(rule, side, None) for rule in rules for side in ("ge", "le")]
        return [annotation(end) for end in ends if end is not None]
    return []


def variants(cls: type[Part], fixed: Mapping[str, Any] | None = None) -> Iterator[Part]:
    """The part as it comes, then with each knob moved alone; `fixed` knobs stay."""
    knobs: list[dict[str, Any]] = [{}]
    for name, field in cls.model_fields.items():
        if name not in (fixed or {}):
            knobs += [{name: value} for value in knob_values(field.annotation, field.metadata)]
    for knob in knobs:
        try:
            yield cls(**{**(fixed or {}), **knob})
        except ValueError:  # knobs that exclude each other say so themselves
            continue
