"""What the next battle is between, and what is asked in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from jobs.battle import IDENTICAL, Conditions, Refused, Side, Variant, identical_id
from jobs.recent import Recent
from results_db import mined
from results_db.pairs import draw_pair, pair_scores
from results_db.store import Store
from results_db.variants import shown, variant_names
from results_db.votes import Vote, Votes

SEEDS = 4  # per variant and prompt: few, so that a sampled answer is met again in the cache
TELLING = 40  # mined prompts that a pair's next one is drawn from
MINED_S = 20.0  # what mining found may be so old: it is much to read, and changes seldom
COUNTED = ("human", "auto")  # kinds of votes that say what is known of a pair

# The first finished run that made an artifact is the one to talk to. Only runs of the newest
# content of the model: a checkpoint that was replaced is another model.
VARIANTS = """
    WITH done AS (
        SELECT run_id, artifact_id, model_content, submitted,
               coalesce(json_array_length(spec, '$.steps'), 0) = 0 AS is_baseline
        FROM runs
        WHERE state = 'done' AND kind = 'run' AND model = $model AND artifact_id IS NOT NULL
    )
    SELECT run_id, artifact_id, is_baseline FROM done
    WHERE model_content IS NOT DISTINCT FROM (SELECT arg_max(model_content, run_id) FROM done)
    QUALIFY row_number() OVER (PARTITION BY artifact_id ORDER BY submitted, run_id) = 1
    ORDER BY submitted, run_id
"""
ARTIFACTS = "SELECT run_id, artifact_id FROM runs WHERE model = $model AND kind = 'run'"


@dataclass(frozen=True)
class Asked:
    """A prompt of ours: its first turn, and what it goes on with."""

    category: str
    language: str
    turns: tuple[str, ...]

    def fits(self, category: str, language: str) -> bool:
        """True if it is of that category and language; "" is any."""
        return category in ("", self.category) and language in ("", self.language)


def anything(prompt: str) -> bool:
    """The test that no prompt fails."""
    return False


@dataclass(frozen=True)
class Draw:
    """A battle to come: its sides as shown, how likely the pair was, and a prompt if it has one."""

    sides: tuple[Side, Side]
    propensity: float
    prompt: Asked | None = None


def pool(home: Path, model: str) -> list[Asked]:
    """The prompts that come with the program, and those of the home."""
    from backend import prompts

    return [Asked(p.category, p.language, p.turns) for p in prompts.pool(model, home)]


def variants(store: Store, model: str) -> list[Variant]:
    """One per artifact among the finished runs of a model, the 16-bit baseline included."""
    names = variant_names(store)
    made = []
    for run_id, artifact_id, is_baseline in store.frame(VARIANTS, model=model).itertuples(
        index=False
    ):
        recipe = shown(names[run_id]).removeprefix(f"{model}/")
        made.append(Variant(names[run_id], run_id, recipe, artifact_id, bool(is_baseline)))
    return made


def why_not(model: str, known: Sequence[Variant]) -> str:
    """What a battle lacks and what to do about it, in one sentence; "" if it lacks nothing."""
    if not model:
        return "No model was run yet; start the first tour, or a run of your own."
    if len(known) < 2:
        there = "one finished run" if known else "no finished run"
        return (
            f"A battle needs two variants of a model and {model} has {there}; start a run with a "
            "recipe, and the 16-bit baseline comes along."
        )
    return ""


class Draws:
    """Draws for every model of a store. Safe from any thread."""

    def __init__(
        self,
        store: Store,
        votes: Votes,
        *,
        conditions: Conditions,
        epsilon: float,
        stale_s: float,
        clock: Callable[[], float],
        rng: random.Random,
        prompts: Callable[[str], Sequence[Asked]],
    ) -> None:
        self._store, self._votes = store, votes
        self._conditions = conditions
        self._epsilon = epsilon
        self._rng = rng
        self._told: dict[str, Mapping[tuple[str, str], frozenset[str]]] = {}
        self._pool = Recent[Sequence[Asked]](stale_s, clock)
        self._prompts = prompts
        self._variants = Recent[list[Variant]](stale_s, clock)
        self._scores = Recent[pd.DataFrame](stale_s, clock)
        self._telling = Recent[list[Asked]](MINED_S, clock)
        self._identical = Recent[Mapping[tuple[str, str], frozenset[str]]](MINED_S, clock)

    def variants(self, model: str) -> list[Variant]:
        """What may be drawn of a model."""
        return self._variants.get(model, lambda: variants(self._store, model))

    def draw(self, model: str) -> Draw:
        """A pair by expected information, its sides by a fair coin, a seed for each side."""
        known = self.variants(model)
        missing = why_not(model, known)
        if missing:
            raise Refused(missing)
        by_name = {variant.name: variant for variant in known}
        scores = self._scores.get((model, *by_name), lambda: self._scored(model, list(by_name)))
        # A generator of its own: numpy's are not safe to share between threads, `random`'s is.
        drawn = draw_pair(np.random.default_rng(self._rng.getrandbits(64)), scores)
        a, b = (
            Side(by_name[name], self._rng.randrange(SEEDS))
            for name in (drawn.model_a, drawn.model_b)
        )
        return Draw((a, b), drawn.propensity)

    def _scored(self, model: str, names: list[str]) -> pd.DataFrame:
        cells = self._votes.cells(model=model, kinds=COUNTED)
        return pair_scores(cells, names, epsilon=self._epsilon)

    def prompt(
        self,
        model: str,
        sides: tuple[Side, Side],
        *,
        category: str = "",
        language: str = "",
        avoid: Iterable[Callable[[str], bool]] = (anything,),
    ) -> Asked:
        """One that tells the sides apart, else one of the pool.

        `avoid` are tests of a prompt's first turn, the strictest first: where every prompt fails
        one of them, the next decides. Refused if all fail the last.
        """
        one, other = sorted(side.variant.name for side in sides)
        alike = self._alike(model).get((one, other), frozenset())
        for bad in avoid:
            for choice in (self.telling(model, sides), self.pool(model)):
                left = [
                    asked
                    for asked in choice
                    if asked.fits(category, language)
                    and asked.turns[0] not in alike
                    and not bad(asked.turns[0])
                ]
                if left:
                    return self._rng.choice(left)
        kind = " ".join(filter(None, (language, category)))
        raise Refused(
            f"No {kind + ' ' if kind else ''}prompt is left that is new to you and tells these "
            "two apart; type one of your own, or start a new battle."
        )

    def pool(self, model: str) -> Sequence[Asked]:
        """Every prompt there is for a model."""
        return self._pool.get(model, lambda: self._prompts(model))

    def telling(self, model: str, sides: tuple[Side, Side]) -> list[Asked]:
        """Mined prompts to which the two answer differently, the most telling ones."""
        run_a, run_b = sorted(side.variant.run_id for side in sides)

        def read() -> list[Asked]:
            found = mined.telling(self._store, model, run_a, run_b, TELLING, self._settings())
            whole = {asked.turns[0]: asked for asked in self.pool(model)}
            rows = found[["category", "language", "prompt"]].itertuples(index=False)
            return [
                whole.get(prompt, Asked(category or "", language or "", (prompt,)))
                for category, language, prompt in rows
            ]

        return self._telling.get((model, run_a, run_b), read)

    def mined_ties(self, model: str, now: float) -> list[Vote]:
        """The ties that mining found since the last call, as votes that the log takes once.

        Of greedy answers alone: sampled ones may be the same by chance.
        """
        alike, told = self._alike(model), self._told.get(model, {})
        if self._conditions.temperature > 0 or alike == told:
            return []
        self._told[model] = alike
        settings = asdict(self._conditions)
        return [
            Vote(
                battle_id=identical_id(pair, [prompt], self._conditions),
                model=model,
                model_a=pair[0],
                model_b=pair[1],
                winner="tie",
                kind="auto",
                judge=IDENTICAL,
                tstamp=now,
                prompt=prompt,
                settings=settings,
                flags=(IDENTICAL,),
            )
            for pair, prompts in alike.items()
            for prompt in sorted(prompts - told.get(pair, frozenset()))
        ]

    def _alike(self, model: str) -> Mapping[tuple[str, str], frozenset[str]]:
        """{names of a pair: mined prompts to which the two give the same answer}."""
        return self._identical.get(model, lambda: self._read_identical(model))

    def _read_identical(self, model: str) -> Mapping[tuple[str, str], frozenset[str]]:
        by_artifact = {v.artifact_id: v.name for v in self.variants(model)}
        rows = self._store.frame(ARTIFACTS, model=model).itertuples(index=False)
        by_run = {run_id: by_artifact[it] for run_id, it in rows if it in by_artifact}
        found = mined.identical_pairs(self._store, model, settings=self._settings())
        alike: dict[tuple[str, str], set[str]] = {}
        for a, b, prompt in found[["run_a", "run_b", "prompt"]].itertuples(index=False):
            if a in by_run and b in by_run:
                one, other = sorted((by_run[a], by_run[b]))
                alike.setdefault((one, other), set()).add(prompt)
        return {pair: frozenset(prompts) for pair, prompts in alike.items()}

    def _settings(self) -> dict[str, float]:
        """How mined answers must have been sampled to be those of a battle."""
        used = asdict(self._conditions)
        return {name: used[name] for name in ("temperature", "top_p", "max_new")}
