"""Made-up votes on the seeded runs: people prefer what lost less, with chance in between."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from app import leaderboard_rows
from results_db.store import Store
from results_db.votes import Vote, Votes

PROMPTS = [f"{what} number {n}?" for what in ("capital", "sum", "story") for n in range(4)]
WINNERS = ("model_a", "model_b", "tie", "tie (bothbad)")


def strengths(store: Store, model: str = "demo") -> dict[str, float]:
    """{variant: strength in nats}, from its perplexity."""
    table, _ = leaderboard_rows.variants(store, store.version, model)
    return {
        str(r["variant"]): -3.0 * math.log(float(r["perplexity"]) / 7.03)
        for r in table.to_dict("records")
    }


def cast(home: Path, store: Store, count: int = 600, judged: int = 200, seed: int = 0) -> Votes:
    """Human and judge votes on every seeded variant, a few of each kind that does not count."""
    votes = Votes(store, home / "votes.jsonl")
    known = strengths(store)
    votes.cast_all(made(known, count, "human", seed))
    votes.cast_all(made(known, judged, "judge", seed + 1))
    odd = list(made(known, 5, "human", seed + 2))
    for at, flags in enumerate([("leak",), ("leak",), ("duplicate",), ("late",)]):
        votes.cast(changed(odd[at], battle_id=f"odd-{at}", flags=flags))
    votes.cast(changed(odd[4], battle_id="back"))
    votes.retract("back", 1e9)
    return votes


def changed(vote: Vote, **fields: object) -> Vote:
    """A vote with some fields different."""
    return Vote(**{**vars(vote), **fields})  # type: ignore[arg-type]


def made(known: dict[str, float], count: int, kind: str, seed: int) -> Iterator[Vote]:
    """Votes by the Bradley-Terry model with a fifth of ties."""
    rng = random.Random(seed)
    pairs = list(itertools.permutations(known, 2))
    for number in range(count):
        a, b = rng.choice(pairs)
        yield Vote(
            battle_id=f"{kind}-{seed}-{number}",
            model="demo",
            model_a=a,
            model_b=b,
            winner=outcome(rng, known[a] - known[b]),
            kind=kind,
            judge="stand-in" if kind == "judge" else f"voter-{number % 9}",
            tstamp=1.7e9 + 60 * number,
            language="English" if number % 5 else "German",
            category=("facts", "sums", "stories")[number % 3],
            prompt=PROMPTS[number % len(PROMPTS)],
            conversation_a=talk(PROMPTS[number % len(PROMPTS)], 4 + number % 7),
            conversation_b=talk(PROMPTS[number % len(PROMPTS)], 3 + number % 5),
        )


def talk(prompt: str, words: int) -> Sequence[dict[str, str]]:
    """One exchange."""
    answer = "- " + " ".join(["word"] * words)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def outcome(rng: random.Random, gap: float) -> str:
    """Who wins when A is stronger by `gap` nats."""
    if rng.random() < 0.2:
        return rng.choice(WINNERS[2:])
    return WINNERS[0] if rng.random() < 1 / (1 + math.exp(-gap)) else WINNERS[1]


def imported(count: int = 60, seed: int = 5) -> Iterator[Vote]:
    """Battles of another arena between models that are not ours."""
    rng = random.Random(seed)
    models = ["alpha-7b", "beta-13b", "gamma-70b"]
    for number in range(count):
        a, b = rng.sample(models, 2)
        yield Vote(
            battle_id=f"import-{number}", model="", model_a=a, model_b=b,
            winner=outcome(rng, models.index(a) - models.index(b)), kind="import",
            judge=f"arena-user-{number % 7}", tstamp=1.6e9 + number, language="English",
        )  # fmt: skip


def many(store: Store, count: int, seed: int = 0) -> None:
    """`count` human votes straight into the database, for timings: the log would take minutes."""
    known = strengths(store)
    names, gaps = list(known), list(known.values())
    rng = random.Random(seed)
    a = rng.choices(range(len(names)), k=count)
    b = [(i + rng.randrange(1, len(names))) % len(names) for i in a]
    rows = pd.DataFrame(
        {
            "model_a": [names[i] for i in a],
            "model_b": [names[i] for i in b],
            "winner": [outcome(rng, gaps[i] - gaps[j]) for i, j in zip(a, b, strict=True)],
        }
    )
    store.write(lambda cursor: _insert(cursor, rows))


def _insert(cursor: object, rows: pd.DataFrame) -> bool:
    cursor.register("made", rows)  # type: ignore[attr-defined]
    cursor.execute(  # type: ignore[attr-defined]
        """
        INSERT INTO votes BY NAME
        SELECT row_number() OVER () + 1000000 AS seq, 'many-' || seq AS battle_id,
               'demo' AS model, model_a, model_b, winner, 'human' AS kind,
               'voter-' || (hash(seq) % 20000) AS judge,
               1.7e9 + seq AS tstamp, make_timestamp(((1.7e9 + seq) * 1e6)::BIGINT) AS cast_at,
               1 AS turn, true AS anony, 'English' AS language,
               ['facts', 'sums', 'stories'][1 + seq % 3] AS category,
               'prompt ' || (hash(seq + 1) % 5000) AS prompt,
               '[]' AS conversation_a, '[]' AS conversation_b,
               (10 + hash(seq) % 90)::BIGINT AS tokens_a,
               (10 + hash(seq + 3) % 90)::BIGINT AS tokens_b,
               0 AS headers_a, 0 AS headers_b, 0 AS lists_a, 0 AS lists_b, 0 AS bold_a, 0 AS bold_b,
               (50 + hash(seq) % 400)::BIGINT AS characters_a,
               (50 + hash(seq + 3) % 400)::BIGINT AS characters_b,
               '' AS run_a, '' AS run_b, 0 AS seed_a, 0 AS seed_b, '{}' AS settings,
               '' AS address, '' AS flags, '' AS hash, 0 AS ends
        FROM made
        """
    )
    return True
