"""Prompts in an address: short conversations travel with a link and can be asked again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

LONGEST = 1_500  # characters as the URL holds them; some programs cut links beyond 2,000
PART = re.compile(r"(?:[^~\\]|\\.)+", re.DOTALL)
SIGN = re.compile(r"\\(.)", re.DOTALL)


def to_query(prompts: Sequence[str]) -> str:
    """Prompts as one URL parameter, `~` between them; "" where they are too long for a link."""
    text = "~".join(re.sub(r"([~\\])", r"\\\1", prompt) for prompt in prompts)
    return text if len(quote(text)) <= LONGEST else ""


def from_query(text: str) -> list[str]:
    """The parameter -> prompts."""
    return [SIGN.sub(r"\1", part) for part in PART.findall(text)]
