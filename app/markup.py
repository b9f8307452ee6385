"""HTML as values: everything that is not already markup is escaped."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup, escape

VOID = frozenset({"br", "hr", "img", "input", "link"})


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """One element. `class_` and `for_` lose the underscore, other underscores become hyphens.

    None and False leave an attribute out, True writes it bare, a mapping is written as JSON.
    Children may be text, markup, numbers, None, or iterables of these.
    """
    opening = Markup("<{}{}>").format(Markup(name), _attributes(attributes))
    return (
        opening if name in VOID else opening + join(children) + Markup("</{}>").format(Markup(name))
    )


def join(children: Iterable[Any], between: str = "") -> Markup:
    """Children one after the other, flattened and escaped."""
    return Markup(between).join(_flat(children))


def search_box(words: str, *, label: str = "", **attributes: Any) -> Markup:
    """A field that filters what is on the page; `/` jumps to it."""
    return tag(
        "input",
        type="search",
        placeholder=f"{words}  ( / )",
        aria_label=label or words,
        data_search=True,
        class_="search",
        **attributes,
    )


def _flat(children: Iterable[Any]) -> Iterable[Markup]:
    for child in children:
        if child is None or child is False:
            continue
        if isinstance(child, str) or not isinstance(child, Iterable):
            yield escape(child)
        else:
            yield from _flat(child)


def _attributes(attributes: Mapping[str, Any]) -> Markup:
    return Markup("").join(
        _attribute(name.rstrip("_").replace("_", "-"), value)
        for name, value in attributes.items()
        if value is not None and value is not False
    )


def _attribute(name: str, value: Any) -> Markup:
    if value is True:
        return Markup(" {}").format(Markup(name))
    text = json.dumps(value) if isinstance(value, dict | list) else value
    return Markup(' {}="{}"').format(Markup(name), text)
