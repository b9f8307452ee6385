"""The style of an answer: how long it is and how much markdown it holds, counted and compared."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FENCED = re.compile(
    r"""^[ ]{0,3}(?P<fence>`{3,}|~{3,})[^`\n]*(?:\n|\Z)   # opened on a line of its own
        .*?
        (?:^[ ]{0,3}(?P=fence)[`~]*[ \t]*$|\Z)            # closed by as many marks, or never
    """,
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
SPAN = re.compile(r"```[^`]*```")  # three marks within a line are code too
HEADER = re.compile(r"^ {0,3}#{1,6}(?=\s)", re.MULTILINE)
ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d+\.)(?=\s)", re.MULTILINE)
BOLD = re.compile(r"\*\*(?=\S)[^*\n]+(?<=\S)\*\*|__(?=\S)[^_\n]+(?<=\S)__")

# Feature -> what is counted per side; of the length, tokens if every battle has them.
FEATURES: Mapping[str, tuple[str, ...]] = {
    "length": ("tokens", "characters"),
    "headers": ("headers",),
    "lists": ("lists",),
    "bold": ("bold",),
}


@dataclass(frozen=True)
class Style:
    """Counts over all answers of one side of a battle."""

    headers: int
    lists: int
    bold: int
    characters: int


@dataclass(frozen=True)
class StyleControl:
    """Which differences in style the ratings are freed of, and how they enter the fit.

    A difference is (a - b) / (a + b + `plus`), 0 where that is 0 / 0, divided by its root mean
    square. It is not centred: a mean taken off would act as a hidden bonus for side A, and
    exchanging the sides of all battles would change the ratings.
    """

    features: tuple[str, ...] = tuple(FEATURES)
    plus: int = 0
    centred: bool = False
    l2_per_vote: float = 1e-3  # l2 / 2 * coefficient^2 is added to the loss, with l2 =
    l2: float = 0.0  # l2_per_vote * votes + l2
    l2_ratings: float = 0.0  # the same on the ratings, in nats


# FastChat's form; its ratings are log10 of strengths, so that L2 of 0.5 on them is this in nats.
FASTCHAT = StyleControl(
    plus=1, centred=True, l2_per_vote=0.0, l2=0.5, l2_ratings=0.5 / math.log(10) ** 2
)


def style_of(answers: Sequence[str]) -> Style:
    """All answers of one side -> counts of markdown outside fenced code, and of characters."""
    prose = [SPAN.sub("", FENCED.sub("", answer)) for answer in answers]
    return Style(
        headers=_count(HEADER, prose),
        lists=_count(ITEM, prose),
        bold=_count(BOLD, prose),
        characters=sum(map(len, answers)),
    )


def differences(battles: pd.DataFrame, control: StyleControl) -> Floats:
    """Style of side A against side B, scaled: [feature, battle].

    Read from `tokens_a`, `headers_a`, `lists_a`, `bold_a` and their like for B, else counted in
    `conversation_a` and `conversation_b`.
    """
    if unknown := [name for name in control.features if name not in FEATURES]:
        raise ValueError(f"No style feature {unknown[0]!r}; there are {', '.join(FEATURES)}.")
    counted = _with_counts(battles, control.features)
    rows = [_difference(counted, FEATURES[name], control) for name in control.features]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(battles))


def _count(pattern: re.Pattern[str], texts: Sequence[str]) -> int:
    return sum(len(pattern.findall(text)) for text in texts)


def _with_counts(battles: pd.DataFrame, features: Sequence[str]) -> pd.DataFrame:
    """The battles with a complete column per feature and side, counted in the texts if need be."""
    if all(_column(battles, FEATURES[name]) for name in features):
        return battles
    if not {"conversation_a", "conversation_b"} <= set(battles):
        lacking = [name for name in features if not _column(battles, FEATURES[name])]
        columns = ", ".join(f"{FEATURES[name][-1]}_a and _b" for name in lacking)
        raise ValueError(
            f"Style control needs the columns {columns}, filled for every battle, or the texts in "
            "conversation_a and conversation_b."
        )
    sides = [_counts(battles[f"conversation_{side}"]).add_suffix(f"_{side}") for side in "ab"]
    kept = [c for c in ("tokens_a", "tokens_b") if c in battles]
    return pd.concat([battles[kept], *sides], axis=1)


def _counts(conversations: pd.Series) -> pd.DataFrame:
    found = [vars(style_of(_answers(messages))) for messages in conversations]
    return pd.DataFrame(found, columns=list(Style.__annotations__), index=conversations.index)


def _answers(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(m["content"]) for m in messages if m["role"] == "assistant"]


def _column(battles: pd.DataFrame, choices: Sequence[str]) -> str | None:
    """The first of the counts that both sides of every battle have."""
    for name in choices:
        sides = [f"{name}_a", f"{name}_b"]
        if set(sides) <= set(battles) and not battles[sides].isna().to_numpy().any():
            return name
    return None


def _difference(battles: pd.DataFrame, choices: Sequence[str], control: StyleControl) -> Floats:
    name = _column(battles, choices)
    a, b = (battles[f"{name}_{side}"].to_numpy(dtype=np.float64) for side in "ab")
    total = a + b + control.plus
    share = np.divide(a - b, total, out=np.zeros(len(a)), where=total != 0)
    if control.centred:
        share = share - share.mean() if len(share) else share
    size = np.sqrt(np.mean(share**2)) if len(share) else 0.0
    return share / size if size > 0 else share
