"""Battles for the tests: written out, or drawn from known strengths."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

WON, LOST, TIE, BAD = "model_a", "model_b", "tie", "tie (bothbad)"
SWAP = {WON: LOST, LOST: WON, TIE: TIE, BAD: BAD}


def battles(*rows: tuple) -> pd.DataFrame:
    """("A", "B", WON, 3), ... -> one row per vote, in this order; the number may be left out."""
    votes = [row[:3] for row in rows for _ in range(row[3] if len(row) > 3 else 1)]
    frame = pd.DataFrame(votes, columns=["model_a", "model_b", "winner"])
    return frame.assign(tstamp=np.arange(len(frame), dtype=float), anony=True)


def drawn(strength: Sequence[float], n: int, seed: int, ties: float = 0.0) -> pd.DataFrame:
    """`n` votes between models m0, m1, ... with these strengths in nats, sides at random.

    A share `ties` of the votes is made ties, of both kinds, whatever the strengths.
    """
    rng = np.random.default_rng(seed)
    m = len(strength)
    a = rng.integers(m, size=n)
    b = (a + rng.integers(1, m, size=n)) % m
    gap = np.asarray(strength)[a] - np.asarray(strength)[b]
    winner = np.where(rng.random(n) < 1 / (1 + np.exp(-gap)), WON, LOST).astype(object)
    tied = rng.random(n) < ties
    winner[tied] = rng.choice([TIE, BAD], tied.sum())
    names = np.array([f"m{i}" for i in range(m)], dtype=object)
    return pd.DataFrame(
        {
            "model_a": names[a],
            "model_b": names[b],
            "winner": winner,
            "tstamp": rng.permutation(n).astype(float),
            "anony": True,
        }
    )


def swapped(frame: pd.DataFrame) -> pd.DataFrame:
    """The same votes with the sides exchanged, style counts too."""
    names = {c: c[:-2] + {"_a": "_b", "_b": "_a"}[c[-2:]] for c in frame if c[-2:] in ("_a", "_b")}
    turned = frame.rename(columns=names)[frame.columns]
    return turned.assign(winner=frame["winner"].map(SWAP))


def grouped(frame: pd.DataFrame) -> pd.DataFrame:
    """The same votes as cells with a `count`."""
    return frame.groupby(["model_a", "model_b", "winner"]).size().rename("count").reset_index()


def column(table: pd.DataFrame, name: str = "rating") -> dict[str, float]:
    """Model -> one column of a table."""
    return dict(zip(table["model"], table[name], strict=True))


# Four players with known estimates: strengths exp(xi) 0.640, 1.043, 0.660, 2.270.
FOUR = battles(
    ("A", "B", WON, 2), ("A", "B", LOST, 3), ("A", "D", WON, 1), ("A", "D", LOST, 4),
    ("B", "C", WON, 5), ("B", "C", LOST, 3), ("C", "D", WON, 1), ("C", "D", LOST, 3),
)  # fmt: skip
TWO = battles(("A", "B", WON, 10), ("A", "B", TIE, 3), ("A", "B", BAD, 2), ("A", "B", LOST, 3))
