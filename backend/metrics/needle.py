"""Needle in a haystack: keys hidden at known depths of a long prompt, and asked for at its end."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from backend.cache.layer import RoundedLayer
from backend.demo.corpus import ASSISTANT, BEGIN, USER
from backend.demo.skills import is_heldout
from backend.demo.words import COLOURS, THINGS
from backend.metrics import METRICS
from backend.metrics.base import Measurement, Metric
from backend.model.identity import DEMOS
from backend.registry import short_hash

if TYPE_CHECKING:
    from backend.run import Run

Protocol = Literal["grid", "five"]
IdsOf = Callable[[str], list[int]]  # a text's tokens, none added

LADDER = tuple(1024 << step for step in range(6))  # 1k to 32k
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of a context too short for the ladder
SPARE = 8  # tokens of an answer beyond those of its key

# The filler and the needle's wording are those of the pass-key task (Mohtashami and Jaggi 2023).
LINE = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it; "
    "I will quiz you about it."
)
FIVE_KEYS = ("47x291", "8a3605", "1294k8", "590p37", "68v423")
FIVE_LINES = 10 * 127  # five blocks before the needle and five after it
FIVE_FRAME = 256  # tokens that are enough for all but the filler
USUAL_LINE = 24  # tokens of a line
SYMBOLS = "0123456789abcdefghjkmnpqrstuvwxyz"  # no letter that looks like a digit
MARK = "[haystack]"


@METRICS.register
class Needle(Metric):
    """Share of keys that greedy answers give back, over prompt lengths and depths of the key.

    An answer counts if it contains the key. The bundled models are asked for codes, as they were
    trained to be, in a text of other codes; other models for pass keys among filler sentences.
    A length counts prompt and answer; lengths that the context does not hold are left out.
    """

    kind: ClassVar[str] = "needle"
    yields: ClassVar[tuple[str, ...]] = ("needle",)
    protocol: Protocol = Field(
        "grid", description="grid: lengths x depths; five: five fixed keys at half depth."
    )
    lengths: tuple[int, ...] = Field(
        (), description="Lengths in tokens; empty is 1k, 2k, ... 32k, or shares of the context."
    )
    depths: int = Field(11, ge=1, le=101, description="Depths, evenly from 0 to 100 %; 1 is 50 %.")
    repeats: int = Field(3, ge=1, le=100, description="Haystacks per cell, each with other keys.")
    needles: int = Field(
        1,
        ge=1,
        le=16,
        description="Keys in one haystack, evenly from the depth to the end, each asked for alone.",
    )
    template: bool = Field(False, description="Wrap the prompt in the model's chat template.")
    seed: int = Field(0, ge=0, description="Of the keys.")

    def data_hash(self, run: Run) -> str:
        return short_hash([run.hash(torch.tensor(p.ids)) for p in self.grid(run).prompts])

    def grid(self, run: Run) -> Grid:
        """Every prompt; once per run."""
        return run.once(f"needle {self.data()}", lambda: self._grid(run))

    def _grid(self, run: Run) -> Grid:
        ids_of, grid = remembering(run.tokenizer), Grid(self.depth_list(), self.haystacks)
        line = sum(len(ids_of(sentence)) for sentence in LINE)
        for length in self.length_list(run.context, line):
            if length > run.context:
                grid.left_out[length] = f"longer than the context of {run.context}"
                continue
            try:
                places = product(grid.depths, range(self.haystacks))
                laid = [p for place in places for p in self.laid(run, ids_of, length, *place)]
            except TooShort as error:
                grid.left_out[length] = str(error)
                continue
            grid.lengths.append(length)
            grid.prompts += laid
        if not grid.prompts:
            reasons = "; ".join(f"{length} is {why}" for length, why in grid.left_out.items())
            raise ValueError(f"needle: no length can be asked: {reasons}")
        return grid

    @property
    def haystacks(self) -> int:
        """Per cell."""
        return len(FIVE_KEYS) if self.protocol == "five" else self.repeats

    def read_tokens(self, context: int) -> int:
        """Tokens of all prompts together, at most: what a run's time is guessed from."""
        lengths = [n for n in self.length_list(context) if n <= context]
        return sum(lengths) * len(self.depth_list()) * self.haystacks * self.needles

    def length_list(self, context: int, line: int = USUAL_LINE) -> list[int]:
        """Asked lengths, ascending. `line`: tokens of a line of filler."""
        if self.protocol == "five":
            return [min(context, FIVE_LINES * line + FIVE_FRAME)]
        if self.lengths:
            return sorted(set(self.lengths))
        if context < 2 * LADDER[0]:
            return [int(context * share) for share in SHARES]
        return sorted({min(step, context) for step in LADDER})

    def depth_list(self) -> list[float]:
        """In per cent of the haystack."""
        if self.protocol == "five" or self.depths == 1:
            return [50.0]
        return [100 * at / (self.depths - 1) for at in range(self.depths)]

    def laid(self, run: Run, ids_of: IdsOf, length: int, depth: float, repeat: int) -> list[Prompt]:
        """The prompts of one haystack, one per needle. Raises TooShort."""
        rng = random.Random(f"{self.seed} {length} {depth} {repeat}")
        puzzle = self.puzzle(run, rng, repeat)
        depths = [depth + at * (100 - depth) / self.needles for at in range(self.needles)]
        return lay(puzzle, ids_of, length, depths)

    def puzzle(self, run: Run, rng: random.Random, repeat: int) -> Puzzle:
        """What is hidden in one haystack, and in what."""
        five = self.protocol == "five"
        if run.spec.model.id in DEMOS:
            return codes(run.tokenizer, rng, self.needles)
        keys = [FIVE_KEYS[repeat]] if five and self.needles == 1 else draw_keys(rng, self.needles)
        lines = LINE * FIVE_LINES if five else cycle(LINE)
        return pass_keys(run.tokenizer, keys, lines, self.template)

    def measure(self, run: Run) -> Iterator[Measurement]:
        grid, answers = self.grid(run), []
        for length, why in grid.left_out.items():
            run.note(f"needle: prompts of {length} tokens are left out: {why}")
        for done, prompt in enumerate(grid.prompts):
            run.progress(done, len(grid.prompts), f"answer {done + 1} of {len(grid.prompts)}")
            answers.append(answer(run, prompt))
        yield measurement(grid, self.needles, answers)


# -- prompts -------------------------------------------------------------------------------------


class TooShort(ValueError):
    """A length that does not hold the question and the needles."""


@dataclass(frozen=True)
class Puzzle:
    """The texts that a prompt is laid out of; the answer follows a question."""

    before: list[int]  # tokens of the opening
    filler: Iterable[str]  # sentences, as many as there is room for
    needles: Sequence[str]  # sentences with a key each
    keys: Sequence[str]
    questions: Sequence[str]


@dataclass(frozen=True)
class Prompt:
    """One question. The needle with its key lies at tokens start..stop."""

    ids: list[int]
    key: str
    room: int  # tokens of the answer
    start: int
    stop: int


class Grid:
    """All prompts, in the order length, depth, haystack, needle."""

    def __init__(self, depths: Sequence[float], repeats: int) -> None:
        self.lengths: list[int] = []
        self.depths = depths
        self.repeats = repeats
        self.prompts: list[Prompt] = []
        self.left_out: dict[int, str] = {}  # length -> why


def remembering(tokenizer: Any) -> IdsOf:
    """The tokenizer as a function that reads every sentence once."""
    known: dict[str, list[int]] = {}

    def ids_of(text: str) -> list[int]:
        if text not in known:
            known[text] = plain_ids(tokenizer, text)
        return known[text]

    return ids_of


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without those that a tokenizer adds at its ends."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def lay(puzzle: Puzzle, ids_of: IdsOf, length: int, depths: Sequence[float]) -> list[Prompt]:
    """One haystack with a needle at each depth -> a prompt per needle, none longer than `length`.

    A needle goes to token round(depth x tokens of the filler), moved back to the nearest end of a
    sentence; at 100 % it is the last.
    """
    needles = [ids_of(needle) for needle in puzzle.needles]
    questions = [ids_of(question) for question in puzzle.questions]
    rooms = [len(ids_of(f" {key}")) + SPARE for key in puzzle.keys]
    asked = max(len(q) + room for q, room in zip(questions, rooms, strict=True))
    least = len(puzzle.before) + sum(map(len, needles)) + asked
    if least > length:
        raise TooShort(f"shorter than needles, question and answer, which take {least}")
    sentences, ends = taken(puzzle.filler, ids_of, length - least)
    hay, spans = list(puzzle.before), []
    done = 0
    for needle, depth in zip(needles, depths, strict=True):
        goal = bisect_right(ends, round(depth / 100 * ends[-1])) - 1  # sentences before the needle
        for sentence in sentences[done:goal]:
            hay += sentence
        spans.append((len(hay), len(hay) + len(needle)))
        hay += needle
        done = goal
    for sentence in sentences[done:]:
        hay += sentence
    return [
        Prompt(hay + question, key, room, *span)
        for question, key, room, span in zip(questions, puzzle.keys, rooms, spans, strict=True)
    ]


def taken(filler: Iterable[str], ids_of: IdsOf, space: int) -> tuple[list[list[int]], list[int]]:
    """Sentences that fit into `space` tokens, and where they end: 0, then after each of them."""
    sentences, ends = [], [0]
    for text in filler:
        ids = ids_of(text)
        if ends[-1] + len(ids) > space:
            break
        sentences.append(ids)
        ends.append(ends[-1] + len(ids))
    return sentences, ends


def codes(tokenizer: Any, rng: random.Random, count: int) -> Puzzle:
    """Codes of things, all different: those asked for among all others.

    In the bundled models' own markup; the codes are of the eighth that they were not trained on.
    """
    things = [f"{colour} {thing}" for colour, thing in product(COLOURS, THINGS)]
    rng.shuffle(things)
    numbers = [text for text in map(str, range(1000, 10000)) if is_heldout(text)]
    numbers = rng.sample(numbers, len(things))
    sentences = [
        f" The code of the {thing} is {number}."
        for thing, number in zip(things, numbers, strict=True)
    ]
    return Puzzle(
        before=plain_ids(tokenizer, f"{BEGIN}{USER}"),
        filler=sentences[count:],
        needles=sentences[:count],
        keys=numbers[:count],
        questions=[f" What is the code of the {thing}?{ASSISTANT}" for thing in things[:count]],
    )


def draw_keys(rng: random.Random, count: int) -> list[str]:
    """Different keys of six symbols with a digit and a letter: no filler contains one."""
    keys: list[str] = []
    while len(keys) < count:
        key = "".join(rng.choices(SYMBOLS, k=6))
        if key not in keys and not key.isalpha() and not key.isdigit():
            keys.append(key)
    return keys


def pass_keys(tokenizer: Any, keys: Sequence[str], filler: Iterable[str], template: bool) -> Puzzle:
    """Pass keys among filler; several are told apart by a colour."""
    names = [f"{colour} pass key" for colour in COLOURS] if len(keys) > 1 else ["pass key"]
    names = names[: len(keys)]
    needles = [
        f" The {name} is {key}. Remember it. {key} is the {name}."
        for name, key in zip(names, keys, strict=True)
    ]
    around = [opening_and_question(tokenizer, name, template) for name in names]
    opening = around[0][0]
    before = plain_ids(tokenizer, opening) if template else list(tokenizer(opening)["input_ids"])
    return Puzzle(before, filler, needles, keys, [question for _, question in around])


def opening_and_question(tokenizer: Any, name: str, template: bool) -> tuple[str, str]:
    """What stands before the haystack and after it, up to where the key belongs."""
    question, start = f" What is the {name}?", f" The {name} is"
    if not template:
        return f"{INTRO}\n", f"\n{question.strip()}{start}"
    if not tokenizer.chat_template:
        raise ValueError("needle: template=true, but this model has no chat template")
    message = {"role": "user", "content": f"{INTRO}\n{MARK}\n{question.strip()}"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    before, after = str(text).split(MARK)
    return before, after + (start if after[-1:].strip() else start.strip())


# -- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What was said to one prompt, and how much of the cache was rounded while it was said."""

    prompt: Prompt
    text: str
    rounded: dict[str, dict[str, float]]  # as Caches.told has it
    needle_rounded: float  # share of the needle's keys and values, when the answer began

    @property
    def correct(self) -> float:
        """1 where the answer contains the key."""
        return float(self.prompt.key in self.text)

    @property
    def prefix(self) -> float:
        """Share of the key that the answer begins with."""
        same = 0
        for a, b in zip(self.text.strip(), self.prompt.key, strict=False):
            if a != b:
                break
            same += 1
        return same / len(self.prompt.key)


def answer(run: Run, prompt: Prompt) -> Answer:
    """The greedy answer."""
    run.caches.start_count()
    ids = list(run.generate(torch.tensor([prompt.ids]), max_new=prompt.room))
    text = str(run.tokenizer.decode(ids, skip_special_tokens=True))
    return Answer(prompt, text, run.caches.told(), needle_rounded(run, prompt))


def needle_rounded(run: Run, prompt: Prompt) -> float:
    """Share of a needle's keys and values, over all layers, that are rounded as the answer begins.

    The others are among the first or the newest tokens, which some methods keep in 16 bits.
    """
    if not run.caches.rounds:
        return 0.0
    shares = []
    for layer in run.once("needle layers", run.caches.layers):
        sides = layer.sides if isinstance(layer, RoundedLayer) else (None, None)
        for side in sides:
            first = side.sinks if side else 0
            last = first + side.rounded(len(prompt.ids)) if side else 0
            inside = min(prompt.stop, last) - max(prompt.start, first)
            shares.append(max(0, inside) / (prompt.stop - prompt.start))
    return fmean(shares)


def measurement(grid: Grid, needles: int, answers: Sequence[Answer]) -> Measurement:
    """The mean over all cells; every answer is an item, and what it was is in the detail."""
    scores = [a.correct for a in answers]
    per_cell = len(scores) // (len(grid.lengths) * len(grid.depths))
    haystacks = [fmean(found) for found in chunks(scores, needles)]
    error = stdev(haystacks) / len(haystacks) ** 0.5 if len(haystacks) > 1 else None
    detail: dict[str, Any] = {
        "lengths": grid.lengths,
        "depths": grid.depths,
        "repeats": grid.repeats,
        "needles": needles,
        "cells": list(chunks([fmean(cell) for cell in chunks(scores, per_cell)], len(grid.depths))),
        "left_out": {str(length): why for length, why in grid.left_out.items()},
        "prefix_score": fmean(a.prefix for a in answers),
        "tokens": [len(a.prompt.ids) for a in answers],
        "at": [a.prompt.start for a in answers],
        "keys": [a.prompt.key for a in answers],
        "answers": [a.text for a in answers],
        "prefixes": [round(a.prefix, 3) for a in answers],
    }
    if answers[0].rounded:
        detail |= rounded_detail(answers)
    return Measurement(
        "needle",
        fmean(scores),
        "share",
        "higher",
        n=len(scores),
        stderr=error,
        items=scores,
        detail=detail,
    )


def chunks(values: Sequence[float], size: int) -> Iterator[Sequence[float]]:
    """One after the other, `size` values each."""
    return (values[at : at + size] for at in range(0, len(values), size))


def rounded_detail(answers: Sequence[Answer]) -> dict[str, Any]:
    """Shares of rounded tokens: the means over all answers, and those of every answer."""
    ways = dict.fromkeys(way for a in answers for way in a.rounded)
    told = {
        way: {
            side: fmean(a.rounded[way][side] for a in answers if way in a.rounded)
            for side in ("keys", "values")
        }
        for way in ways
    }
    return {
        "cache_rounded": told,
        **{
            f"rounded_{side}": [
                round(fmean(w[side] for w in a.rounded.values()), 4) for a in answers
            ]
            for side in ("keys", "values")
        },
        "needle_rounded": [round(a.needle_rounded, 4) for a in answers],
    }
