"""Where a model's variants stand in the votes of people, for the page of the arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jobs.battle import Variant
from results_db.estimate import estimate
from results_db.gaps import votes_needed
from results_db.ratings import MEAN, table
from results_db.votes import Votes


@dataclass(frozen=True)
class Standing:
    """Ratings by variant, and how open the order still is. Names nobody."""

    votes: int = 0
    ratings: dict[str, float] = field(default_factory=dict)  # of those with enough votes
    open: int = 0  # pairs that are not told apart
    pairs: int = 0
    nearest: float = np.inf  # fewest further votes on one pair that would tell it apart

    def line(self) -> str:
        """What a vote can still change, in one sentence."""
        if not self.votes:
            return "Nobody has voted yet: every vote changes the ratings."
        so_far = f"{self.votes:,} vote{'s' if self.votes != 1 else ''} so far"
        if not self.open:
            return f"{so_far}; every pair is told apart, so more votes change little."
        words = f"{so_far}; {self.open} of {self.pairs} pairs are not told apart"
        if not np.isfinite(self.nearest):
            return f"{words}."
        return f"{words}, and about {self.nearest:,.0f} more votes would settle the nearest."


def standing(votes: Votes, model: str, variants: Sequence[Variant]) -> Standing:
    """From the votes that count, the 16-bit baseline at 1000."""
    pairs = len(variants) * (len(variants) - 1) // 2
    cells = votes.cells(model=model)
    if not len(cells):
        return Standing(open=pairs, pairs=pairs)
    base = next((v.name for v in variants if v.is_baseline), None)
    found = estimate(cells, anchor=(base, MEAN) if base else None)
    rated = table(found)
    known = rated[~rated["few_votes"].astype(bool)]
    names = {variant.name for variant in variants}
    needed = votes_needed(found)
    needed = needed[needed["model_a"].isin(names) & needed["model_b"].isin(names)]
    further = needed["needed"].to_numpy(dtype=float)
    return Standing(
        votes=int(cells["count"].sum()),
        ratings=dict(zip(known["model"], known["rating"].astype(float), strict=True)),
        open=pairs - int((further == 0).sum()),
        pairs=pairs,
        nearest=min(further[further > 0], default=np.inf),
    )
