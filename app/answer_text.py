"""Text that a model wrote as HTML: markdown without raw HTML, links or images; plain beyond a size.

A model's answer is somebody else's text. Nothing in it becomes a tag, an attribute or an address
that can be followed, and characters that would reorder or hide text are shown by their name.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererProtocol
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup, escape

from app.markup import tag

LONGEST_MARKDOWN = 16_000  # characters: the worst input of this length takes a quarter of a second
LONGEST_SHOWN = 200_000  # characters: what a browser lays out at once without stuttering
OUTLINE_BELOW = 3  # a heading in an answer ranks below the page's own three levels

# Embeddings, overrides and isolates make text read in another order than it was written.
REORDERING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROLS = "".join(map(chr, [*range(9), 11, 12, *range(14, 32), *range(127, 160)]))
UNSEEN = re.compile(f"[{REORDERING}{re.escape(CONTROLS)}\ud800-\udfff]")


def visible(text: str) -> str:
    """Control and reordering characters by name, lone surrogates as U+FFFD, one kind of newline."""
    return UNSEEN.sub(_named, text.replace("\r\n", "\n").replace("\r", "\n"))


def _named(found: re.Match[str]) -> str:
    code = ord(found.group())
    if 0xD800 <= code < 0xE000:
        return "\ufffd"
    return chr(0x2400 + code) if code < 32 else f"‹U+{code:04X}›"


def whole(text: str) -> str:
    """Text as it is, but for lone surrogates, which cannot be sent to a browser."""
    return text.encode("utf-8", "replace").decode()


def answer(text: str) -> Markup:
    """A whole answer: markdown up to a size, then plain, then cut off with a sentence."""
    if len(text) <= LONGEST_MARKDOWN:
        return markdown(text)
    shown = tag("div", plain(text[:LONGEST_SHOWN]), class_="plain", dir="auto")
    if len(text) <= LONGEST_SHOWN:
        return shown
    more = f"{len(text) - LONGEST_SHOWN:,} more characters are in the export, not on the page."
    return shown + tag("p", more, class_="muted")


def plain(text: str) -> Markup:
    """Text as it is, escaped."""
    return escape(visible(text))


@lru_cache(maxsize=256)
def markdown(text: str) -> Markup:
    """Markdown as HTML of a dozen tags, none of which loads, runs or leads anywhere."""
    return tag("div", Markup(PARSER.render(visible(text))), class_="md", dir="auto")


def parser() -> MarkdownIt:
    """CommonMark and tables, with line breaks kept as in chat; see `RULES` for what is drawn."""
    made = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": 20})
    # A reference definition draws nothing: what a model wrote would be missing from the page.
    made.enable(["table", "strikethrough"]).disable(["image", "reference"])
    for name, rule in RULES.items():
        made.add_render_rule(name, rule)
    return made


Tokens = Sequence[Token]
Environment = MutableMapping[str, Any]


def _heading(
    self: RendererProtocol, tokens: Tokens, at: int, options: OptionsDict, env: Environment
) -> str:
    level = min(6, int(tokens[at].tag[1]) + OUTLINE_BELOW)
    return f"<{'/' * (tokens[at].nesting < 0)}h{level}>"


def _code(
    self: RendererProtocol, tokens: Tokens, at: int, options: OptionsDict, env: Environment
) -> str:
    return str(tag("pre", tag("code", tokens[at].content), tabindex="0"))


def _link_opens(
    self: RendererProtocol, tokens: Tokens, at: int, options: OptionsDict, env: Environment
) -> str:
    return "<u>"


def _link_closes(
    self: RendererProtocol, tokens: Tokens, at: int, options: OptionsDict, env: Environment
) -> str:
    """The words of a link, then its address to read: following it is the reader's own act."""
    opening = next(i for i in range(at - 1, -1, -1) if tokens[i].type == "link_open")
    address = str(tokens[opening].attrGet("href") or "")
    words = "".join(token.content for token in tokens[opening + 1 : at])
    return "</u>" + ("" if words == address else str(tag("small", f" ({address})")))


RULES = {
    "heading_open": _heading,
    "heading_close": _heading,
    "fence": _code,
    "code_block": _code,
    "link_open": _link_opens,
    "link_close": _link_closes,
}
PARSER = parser()
