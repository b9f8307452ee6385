"""Where they part: an answer token by token, coloured by divergence from the 16-bit model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from app import look
from app.answer_text import visible
from app.markup import join, tag
from jobs.chat_types import AnswerView, Scores, TopToken, divergence_index

# Nats, where the next stronger tint and underline begins.
LEVELS = (0.01, 0.1, 0.5, 2.0)
SHOWN_TOKENS = 2_000  # of one answer
# Not made by `tag`, which takes three times as long: there are thousands of them, drawn anew often.
SPAN = Markup('<span class="{}" data-at="{}" tabindex="{}" role="button" title="{}">{}</span>')


def level(kld: float) -> int:
    """0 for next to no divergence, up to 4."""
    return sum(kld >= bound for bound in LEVELS)


def legend() -> Markup:
    """What tint and underline mean."""
    bounds = [f"{bound:g}" for bound in LEVELS]
    words = [f"under {bounds[0]}"]
    words += [f"{low} to {high}" for low, high in pairwise(bounds)]
    words += [f"{bounds[-1]} and more"]
    swatches = [
        tag("span", tag("span", "abc", class_=f"tok k{at}", aria_hidden="true"), word)
        for at, word in enumerate(words)
    ]
    sample = tag("span", "abc", class_="tok parts", aria_hidden="true")
    first = tag("span", sample, "where they part")
    title = "KL divergence from the 16-bit model at this token, in nats:"
    return tag("div", tag("b", title), swatches, first, class_="legend")


def parts_at(view: AnswerView, base: AnswerView | None) -> int | None:
    """Index of the first token that differs from the 16-bit answer; None while or if none does."""
    if base is None:
        return None
    at = divergence_index(view.tokens, base.tokens)
    shorter_goes_on = at == len(view.pieces) and not view.ended
    longer_goes_on = at == len(base.pieces) and not base.ended
    same = at == len(view.pieces) == len(base.pieces)
    return None if same or shorter_goes_on or longer_goes_on else at


def tokens(
    view: AnswerView,
    scores: Scores | None,
    base: AnswerView | None,
    marks: Mapping[int, Sequence[str]],
    *,
    baseline: bool,
    label: str,
    run_id: str,
    can_fork: bool,
) -> Markup:
    """The answer as tokens. `marks`: index -> names of the variants that part there."""
    pieces = view.pieces[:SHOWN_TOKENS]
    stop = min(marks, default=0)
    shades = None if baseline else scores
    spans = [
        SPAN.format(
            _class(shades, at, at in marks),
            at,
            0 if at == stop else -1,
            parted(marks.get(at, ())),
            _shown(piece.text),
        )
        for at, piece in enumerate(pieces)
    ]
    end = end_mark(view, base) if len(pieces) == len(view.pieces) else cut(view)
    return tag(
        "div",
        spans,
        end,
        class_="tokens",
        role="group",
        aria_label=f"{label}, token by token; arrow keys move, Enter opens",
        dir="auto",
        data_run=run_id,
        data_fork=can_fork,
        data_tokens=details(view, scores, base, baseline),
    )


def parted(names: Sequence[str]) -> str:
    """Which variants leave the 16-bit answer at a token; "" for none."""
    return f"{' and '.join(names)} part{'s' * (len(names) == 1)} here" if names else ""


def _class(scores: Scores | None, at: int, parts: bool) -> str:
    scored = scores is not None and at < len(scores.kld)
    shade = f" k{level(scores.kld[at])}" if scores is not None and scored else ""
    return f"tok{shade}{' parts' * parts}"


def _shown(text: str) -> str:
    """Text of a token: line breaks are seen, and a token without text still has a place."""
    return visible(text).replace("\n", "↵\n") or "·"


def end_mark(view: AnswerView, base: AnswerView | None) -> Markup | None:
    """Said where the answer ends and the 16-bit one goes on."""
    if base is None or not view.ended or parts_at(view, base) != len(view.pieces):
        return None
    more = base.pieces[len(view.pieces)].text
    title = f"ends here; 16-bit goes on with {quoted(more)}"
    return tag("span", "■", class_="tok parts end", title=title)


def cut(view: AnswerView) -> Markup:
    """Said where an answer is too long to be shown as tokens."""
    return tag("span", f" … {len(view.pieces) - SHOWN_TOKENS:,} more tokens", class_="muted")


def details(
    view: AnswerView, scores: Scores | None, base: AnswerView | None, baseline: bool
) -> str:
    """What a token's card shows, as compact JSON: texts once, then numbers that point at them."""
    texts: dict[str, int] = {}

    def number(text: str) -> int:
        return texts.setdefault(_shown(text), len(texts))

    def listed(top: Sequence[TopToken]) -> list[Any]:
        return [[t.token, number(t.text), rounded(t.probability)] for t in top]

    own = [[p.token, number(p.text)] for p in view.pieces[:SHOWN_TOKENS]]
    data: dict[str, Any] = {"own": own}
    at = parts_at(view, base)
    if base is not None and at is not None and at < min(len(own), len(base.pieces)):
        other = base.pieces[at]
        data["parts"] = [at, other.token, number(other.text)]
    if scores is not None:
        kept = slice(0, SHOWN_TOKENS)
        data["base"] = [listed(top) for top in scores.base_top[kept]]
        if not baseline:
            data["kld"] = [rounded(value) for value in scores.kld[kept]]
            data["top"] = [listed(top) for top in scores.top[kept]]
    return json.dumps({**data, "texts": list(texts)}, separators=(",", ":"), ensure_ascii=False)


def rounded(value: float) -> float | None:
    """Three digits are told; what is no number has none."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def summary(view: AnswerView, scores: Scores | None, base: AnswerView | None) -> Markup:
    """One sentence: where it parts, and how far from the 16-bit model it is along the way."""
    said = []
    at = parts_at(view, base)
    if base is not None and at is not None and at < min(len(view.pieces), len(base.pieces)):
        own, other = (quoted(v.pieces[at].text) for v in (view, base))
        said.append(f"Token {at + 1} is {own} where 16-bit says {other}.")
    elif base is not None and at is None and view.ended and base.ended:
        said.append("The same tokens as the 16-bit answer.")
    if scores is not None and scores.kld:
        top = max(range(len(scores.kld)), key=lambda i: scores.kld[i])
        said.append(
            f"KL divergence {look.divergence(scores.mean_kld)} nats per token, highest "
            f"{look.divergence(scores.kld[top])} at token {top + 1}."
        )
        if len(scores.kld) < len(view.pieces):
            said.append(f"Only the first {len(scores.kld)} tokens are compared.")
        said += scores.notes
    return join([tag("span", sentence) for sentence in said], " ")


def quoted(text: str) -> str:
    """A token in quotation marks, its line breaks seen."""
    return f"“{visible(text).replace(chr(10), '↵')}”"
