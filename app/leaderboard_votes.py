"""What votes say: ratings of the votes chosen, and everything that qualifies them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pandas as pd

from results_db import ratings
from results_db.estimate import Anchor, Estimate, estimate
from results_db.pairs import average_win_rates
from results_db.store import Store
from results_db.style import FEATURES
from results_db.vote_table import COUNTS, EXCLUDING, IS_VOID, VoteTable
from results_db.voters import anomalous_voters

KEPT = 12  # sets of votes at once
TESTED = 20_000  # votes up to which anomalous voters are looked for unasked
SETTLED = 200  # changes of a larger log after which they are looked for again
BATTLE = ("model_a", "model_b", "winner")
STYLES = tuple(f"{name}_{side}" for names in FEATURES.values() for name in names for side in "ab")
LENGTH = ("tokens_a", "tokens_b")  # not every answer's are known; its characters are
RATED = ("variant", "rating", "low", "high", "rank", "votes", "few", "group", "win_rate")


@dataclass(frozen=True)
class Chosen:
    """The votes that count here: of which model, by which kinds of voters, on which prompts."""

    store: Store
    model: str  # "" for battles of others
    kinds: tuple[str, ...]
    category: str = ""
    language: str = ""
    without: tuple[str, ...] = ()  # voters
    known: tuple[str, ...] = ()  # ids of our variants

    def cells(self) -> pd.DataFrame:
        """How often each pair, by side, ended how."""
        return self._recognised(VoteTable(self.store).cells(**self._where()))

    def battles(self, *columns: str) -> pd.DataFrame:
        """Single votes in order of time, text as categories."""
        wanted = (*BATTLE, *columns)
        table = VoteTable(self.store)
        return self._recognised(table.frame(columns=wanted, coded=True, **self._where()))

    def filters(self) -> dict[str, Any]:
        """Parameters of queries on `votes`: model, category, language, kinds."""
        return {
            "model": self.model,
            "category": self.category,
            "language": self.language,
            "kinds": list(self.kinds),
        }

    def _where(self) -> dict[str, Any]:
        return {**self.filters(), "exclude_judges": self.without}

    def _recognised(self, battles: pd.DataFrame) -> pd.DataFrame:
        """With our own id for what ends in the same artifact: a recipe has several texts."""
        ours = {variant.rpartition("@")[2]: variant for variant in self.known}
        voted = {*battles["model_a"].unique(), *battles["model_b"].unique()}
        alias = {v: ours[end] for v in voted if (end := v.rpartition("@")[2]) in ours and "@" in v}
        alias = {theirs: own for theirs, own in alias.items() if theirs != own}
        sides = ("model_a", "model_b") if alias else ()
        return battles.assign(**{s: battles[s].map(lambda v: alias.get(v, v)) for s in sides})


# A condition on votes `v` for the parameters of `Chosen.filters`.
WHERE = """
    ($model = '' OR v.model = $model) AND v.kind = ANY($kinds::VARCHAR[])
    AND ($category = '' OR v.category = $category)
    AND ($language = '' OR v.language = $language)
"""


@dataclass(frozen=True)
class Rated:
    """Ratings from the votes of some kinds of voters."""

    table: pd.DataFrame  # RATED columns, best first within each group
    cells: pd.DataFrame  # model_a, model_b, winner, count
    estimate: Estimate

    @property
    def votes(self) -> int:
        """How many votes the ratings rest on."""
        return int(self.cells["count"].sum())

    @property
    def regularised(self) -> bool:
        """A finite rating exists only thanks to virtual ties."""
        return bool(self.estimate.fit.regularised.any())

    @property
    def groups(self) -> int:
        """Sets of variants that no battle links."""
        return int(self.table["group"].nunique())

    @property
    def separated(self) -> bool:
        """Some intervals lie apart, so that ranks mean something."""
        return bool((self.table["rank"] > 1).any())


def rated_by(chosen: Chosen, anchor: Anchor | None, interval: str, style: bool) -> Rated:
    """Ratings from the votes chosen; with `style` from those whose answers are known."""
    battles = styled(chosen) if style else chosen.cells()
    cells = _together(battles) if style else battles
    present = {*cells["model_a"], *cells["model_b"]}
    found = estimate(
        battles,
        anchor=anchor if anchor and anchor[0] in present else None,
        interval="bootstrap" if interval == "bootstrap" else "sandwich",
        style=style,
    )
    table = ratings.table(found)
    table.attrs = {}
    table = table.rename(
        columns={"model": "variant", "battles": "votes", "component": "group", "few_votes": "few"}
    )
    table["win_rate"] = table["variant"].map(average_win_rates(cells))
    return Rated(table[list(RATED)], cells, found)


def _together(battles: pd.DataFrame) -> pd.DataFrame:
    """Single votes as `Chosen.cells` has them."""
    counted = battles.groupby(list(BATTLE), observed=True).size().rename("count").reset_index()
    return counted.astype(dict.fromkeys(BATTLE, "str"))


def styled(chosen: Chosen) -> pd.DataFrame:
    """Single votes with the style of both answers, for those votes that have it."""
    battles = chosen.battles(*STYLES)
    return battles.dropna(subset=[name for name in STYLES if name not in LENGTH])


def online_elo(chosen: Chosen, anchor: Anchor | None) -> dict[str, float]:
    """Rating of each variant after the last vote, votes taken one by one in time order."""
    battles = chosen.battles("tstamp")
    present = {*battles["model_a"].unique(), *battles["model_b"].unique()}
    fixed = anchor if anchor and anchor[0] in present else None
    found = ratings.elo(battles, anchor=fixed, rounds=0)
    return dict(zip(found["model"], found["rating"], strict=True))


def counted_kinds(chosen: Chosen) -> dict[str, int]:
    """{kind of voter: votes that count}, of the model and the prompts chosen."""
    kinds = ("human", "judge", "auto", "import")
    found = {kind: int(replace(chosen, kinds=(kind,)).cells()["count"].sum()) for kind in kinds}
    return {kind: count for kind, count in found.items() if count}


def words_in(chosen: Chosen, column: str) -> list[str]:
    """Categories or languages of the votes there are, whichever are chosen now."""
    sql = f"""
        SELECT DISTINCT {column} AS name FROM votes
        WHERE {column} <> '' AND ($model = '' OR model = $model) AND (kind = 'import') = $imported
        ORDER BY 1
    """
    imported = "import" in chosen.kinds
    return list(chosen.store.frame(sql, model=chosen.model, imported=imported)["name"])


def voters_of(chosen: Chosen) -> int:
    """How many different voters there are, of those that are counted."""
    sql = f"""
        SELECT count(DISTINCT judge) AS voters FROM votes v
        WHERE {WHERE} AND NOT list_contains($without::VARCHAR[], v.judge)
    """
    values = {**chosen.filters(), "without": list(chosen.without)}
    return int(chosen.store.frame(sql, **values)["voters"].iloc[0])


def left_out(chosen: Chosen) -> dict[str, int]:
    """{why votes do not count: how many}, each vote under its first reason."""
    sql = f"""
        SELECT CASE WHEN {IS_VOID} THEN 'retracted' WHEN NOT v.anony THEN 'named'
                    WHEN v.model_a = v.model_b THEN 'itself' ELSE v.flags END AS why,
               count(*) AS votes
        FROM votes v WHERE {WHERE} GROUP BY 1 ORDER BY 2 DESC
    """
    found = chosen.store.frame(sql, **chosen.filters())
    counts: dict[str, int] = {}
    for flags, votes in zip(found["why"], found["votes"], strict=True):
        words = str(flags).split(",")
        why = next((w for w in ("retracted", "named", "itself", *EXCLUDING) if w in words), "")
        if why:
            counts[why] = counts.get(why, 0) + int(votes)
    return counts


def flagged_voters(chosen: Chosen, version: int, votes: int) -> tuple[str, ...]:
    """Voters unlike the others on the same pairs; in a large log as it was a while ago."""
    chosen = replace(chosen, category="", language="", without=())
    return _flagged(chosen, version if votes <= TESTED else version // SETTLED)


@lru_cache(maxsize=KEPT)
def _flagged(chosen: Chosen, version: int) -> tuple[str, ...]:
    found = anomalous_voters(chosen.battles("judge", "tstamp"))
    return tuple(found["judge"][found["flagged"]])


def agreement(chosen: Chosen) -> dict[str, float]:
    """How often people and judge say the same of the same pair and prompt.

    `all` counts every pair of votes, a tie being one outcome; `decided` only those in which both
    prefer a side. Each comes with the number of items (pair and prompt) it rests on.
    """
    sql = f"""
        WITH seen AS (
            SELECT least(model_a, model_b) || chr(31) || greatest(model_a, model_b)
                   || chr(31) || prompt AS item, kind = 'judge' AS judge,
                   CASE WHEN winner IN ('tie', 'tie (bothbad)') THEN 0
                        WHEN (winner = 'model_a') = (model_a < model_b) THEN 1 ELSE -1 END AS said,
                   count(*) AS votes
            FROM votes v WHERE {WHERE} AND v.prompt <> '' AND {COUNTS} GROUP BY ALL
        )
        SELECT h.item, h.said = j.said AS same, h.said <> 0 AND j.said <> 0 AS decided,
               h.votes * j.votes AS votes
        FROM seen h JOIN seen j ON h.item = j.item AND j.judge AND NOT h.judge
    """
    both = replace(chosen, kinds=("human", "judge"))
    found = chosen.store.frame(sql, excluding=list(EXCLUDING), **both.filters())
    if not len(found):
        return {}
    said = {"all": found, "decided": found[found["decided"]]}
    shares = {
        name: float((part["votes"] * part["same"]).sum() / part["votes"].sum())
        for name, part in said.items()
        if len(part)
    }
    return shares | {f"{name}_items": float(p["item"].nunique()) for name, p in said.items()}
