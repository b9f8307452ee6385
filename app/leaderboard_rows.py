"""Rows of the leaderboard: what votes say of every variant, joined with what was measured.

Everything here is a function of the store and of what a person chose to see, kept until the store
moves, because the table, five charts and every open page ask for the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pandas as pd

from app import leaderboard_votes, rows
from app.context import Picks
from app.leaderboard_votes import RATED, TESTED, Chosen, Rated
from results_db.fragility import Fragility, fragility
from results_db.gaps import votes_needed
from results_db.pairs import battle_counts, predicted_wins, win_fractions
from results_db.pairs import vote_mix as mix_of
from results_db.store import Store
from results_db.variants import shown, variant_names
from results_db.voters import position_bias

PUBLISHED, IMPORTED = "published", "imported"  # tabs
ANCHORED = 1000.0  # rating of the 16-bit model
UNRATED = 1 << 30  # group of variants without votes: after all others
KEPT = 12  # boards at once
ALIKE = ("metric_id", "version", "device", "dtype")  # what the numbers of one column share
OUTCOMES = ("won", "tie", "bad", "lost")
ABOUT = ("name", "text", "family", "target", "bits", "packed", "is_baseline", "run_id", "state")
PAIRS = ("row", "column", "row_name", "column_name", "wins", "losses", "ties", "battles",
         "win_fraction", "predicted")  # fmt: skip


@dataclass(frozen=True)
class Board:
    """All that the page shows of one model, or of imported battles."""

    model: str
    rows: pd.DataFrame  # ABOUT, RATED, the judge's and measured columns; rated first
    measured: list[str]  # names of the measured columns
    people: Rated
    judge: Rated | None
    picks: Picks  # what was asked for, without what only sorts and hides
    kinds: Mapping[str, int]  # votes that count, by kind of voter
    categories: Sequence[str]
    languages: Sequence[str]
    left_out: Mapping[str, int]  # why votes do not count -> how many
    anomalous: Sequence[str] | None  # voters; None: too many votes to test them unasked
    voters: int  # how many cast these votes
    needed: pd.DataFrame  # model_a, model_b, needed: votes to come until told apart
    fragile: Fragility | None  # the fewest votes that hold up the first place
    agreement: Mapping[str, float] = field(default_factory=dict)  # of judge and people

    @property
    def votes(self) -> int:
        """Votes behind the people's columns."""
        return self.people.votes

    def name(self, variant: str) -> str:
        """A variant as people read it."""
        return names_of(self.rows).get(variant) or shown(variant)


def with_model(picks: Picks, model: str) -> Picks:
    """Picks that name their model."""
    return picks if picks.model else replace(picks, model=model)


def board(store: Store, picks: Picks) -> Board:
    """The leaderboard for these picks; the same object until the store or the picks change."""
    wanted = Picks(
        model="" if picks.tab == IMPORTED else picks.model,
        tab=picks.tab,
        voters=picks.voters,
        category=picks.category,
        language=picks.language,
        clean=picks.clean,
        style=picks.style,
        interval=picks.interval,
        elo=picks.elo,
    )
    return _board(store, store.version, wanted)


@lru_cache(maxsize=KEPT)
def _board(store: Store, version: int, picks: Picks) -> Board:
    measured, names = variants(store, version, picks.model)
    base = measured["variant"][measured["is_baseline"].astype(bool)]
    anchor = (str(base.iloc[-1]), ANCHORED) if len(base) else None
    chosen = Chosen(store, picks.model, kinds_of(picks), picks.category, picks.language,
                    known=tuple(measured["variant"]))  # fmt: skip
    kinds = leaderboard_votes.counted_kinds(chosen)
    total = sum(kinds.get(kind, 0) for kind in chosen.kinds)
    odd = None
    if picks.clean or total <= TESTED:
        odd = leaderboard_votes.flagged_voters(chosen, version, total)
    counted = replace(chosen, without=odd or ()) if picks.clean else chosen
    people = leaderboard_votes.rated_by(counted, anchor, picks.interval, picks.style)
    judge = None
    if kinds.get("judge") and "judge" not in picks.voters and picks.tab != IMPORTED:
        judged = replace(chosen, kinds=("judge",))
        judge = leaderboard_votes.rated_by(judged, anchor, picks.interval, picks.style)
    table = joined(measured, people, judge)
    if picks.elo:
        elo = leaderboard_votes.online_elo(counted, anchor)
        table = table.assign(elo=table["variant"].map(elo))
    return Board(
        model=picks.model,
        rows=table,
        measured=names,
        people=people,
        judge=judge,
        picks=picks,
        kinds=kinds,
        categories=leaderboard_votes.words_in(chosen, "category"),
        languages=leaderboard_votes.words_in(chosen, "language"),
        left_out=leaderboard_votes.left_out(chosen),
        anomalous=odd,
        voters=leaderboard_votes.voters_of(counted),
        needed=votes_needed(people.estimate),
        fragile=None if picks.style else fragility(people.cells),
        agreement=leaderboard_votes.agreement(chosen) if judge else {},
    )


def kinds_of(picks: Picks) -> tuple[str, ...]:
    """Kinds of voters behind the people's columns."""
    return ("import",) if picks.tab == IMPORTED else picks.voters or ("human",)


# ---- from measurements ---------------------------------------------------------------------


@lru_cache(maxsize=KEPT)
def variants(store: Store, version: int, model: str) -> tuple[pd.DataFrame, list[str]]:
    """One row per finished variant of a model, and the names of its measurements.

    A column holds numbers measured alike; where a variant has the number only under other
    conditions it is blank, and `<name>__why` says so.
    """
    wide = rows.wide(store, model) if model else rows.wide(store, "").head(0)
    wide = wide[wide["state"] == "done"].reset_index(drop=True)
    names = variant_names(store)
    ids = [names.get(run_id, run_id) for run_id in wide["run_id"]]
    wide = wide.assign(variant=pd.Series(ids, index=wide.index, dtype=object))
    known = [name for name in rows.measured(wide) if wide[name].notna().any()]
    kept = ["variant", *ABOUT, "notes", "notes_text"]
    table = wide.drop_duplicates("variant", keep="last")[kept].set_index("variant")
    columns = [table, *(_column(wide, name, list(table.index)) for name in known)]
    return pd.concat(columns, axis=1).reset_index(), known


def _column(wide: pd.DataFrame, name: str, order: Sequence[str]) -> pd.DataFrame:
    """One measurement of every variant, as most of them were measured."""
    found = wide[wide[name].notna()]
    keys = found[[f"{name}__{what}" for what in ALIKE]].astype(str).agg(" ".join, axis=1)
    usual = keys.value_counts(sort=True).index[0]
    own = [c for c in wide.columns if c == name or c.startswith(f"{name}__")]
    chosen = found[keys == usual].drop_duplicates("variant", keep="last").set_index("variant")[own]
    others = set(found["variant"]) - set(chosen.index)
    device, dtype = usual.split(" ")[2:4]
    why = f"Measured under other conditions than the rest of this column ({device}, {dtype})."
    return chosen.reindex(order).assign(
        **{f"{name}__why": [why if variant in others else "" for variant in order]}
    )


def joined(measured: pd.DataFrame, people: Rated, judge: Rated | None) -> pd.DataFrame:
    """Everything known per variant; rated ones first, group by group, best first."""
    table = measured.merge(_unmeasured(measured, people, judge), how="outer")
    table = table.merge(people.table, on="variant", how="left")
    said = judge.table if judge else people.table.head(0)
    renamed = {c: f"judge_{c}" for c in ("rating", "low", "high", "votes", "few")}
    table = table.merge(said[["variant", *renamed]].rename(columns=renamed), how="left")
    table["elo"] = float("nan")
    table["group"] = table["group"].fillna(UNRATED).astype(int)
    for name in ("few", "judge_few", "is_baseline", "packed"):
        table[name] = table[name].fillna(False).astype(bool)
    for name in ("votes", "judge_votes", "notes"):
        table[name] = table[name].fillna(0).astype(int)
    keys = ["group", "rating", "is_baseline"]
    table = table.sort_values(keys, ascending=[True, False, False], kind="stable")
    return table.assign(name=told_apart(table)).reset_index(drop=True)


def _unmeasured(measured: pd.DataFrame, people: Rated, judge: Rated | None) -> pd.DataFrame:
    """Variants that only votes know: imported ones, and those whose run is gone."""
    voted = [*people.table["variant"], *(judge.table["variant"] if judge else ())]
    only = [v for v in dict.fromkeys(voted) if v not in set(measured["variant"])]
    about = [
        {
            "variant": variant,
            "name": shown(variant).partition("/")[2] if "@" in variant else variant,
            "text": shown(variant),
            "family": "",
            "target": "weights",
            "bits": "",
            "packed": True,
            "is_baseline": False,
            "run_id": "",
            "state": "gone",
            "notes": 0,
            "notes_text": "",
        }
        for variant in only
    ]
    columns = ["variant", *ABOUT, "notes", "notes_text"]
    return pd.DataFrame(about, columns=columns).astype({"is_baseline": bool, "packed": bool})


def told_apart(table: pd.DataFrame) -> pd.Series:
    """Names; where two variants share one, with the beginning of what made each."""
    twice = table["name"].duplicated(keep=False)
    ends = table["variant"].map(lambda variant: variant.rpartition("@")[2][:6])
    return table["name"].where(~twice, table["name"] + " @" + ends)


def names_of(table: pd.DataFrame) -> dict[str, str]:
    """{variant: its name}."""
    return dict(zip(table["variant"], table["name"], strict=True))


# ---- for the charts ------------------------------------------------------------------------


def rated(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per variant with votes, best first within each group."""
    table = board(store, picks).rows
    columns = ["name", "text", "family", "target", "packed", "is_baseline"]
    found = table[table["rating"].notna()]
    return found[["variant", *columns, *RATED[1:]]].reset_index(drop=True)


def pairs(store: Store, picks: Picks) -> pd.DataFrame:
    """One row per ordered pair of rated variants, rows and columns by rating."""
    found = board(store, picks)
    table = found.rows[found.rows["rating"].notna()]
    order, names, cells = list(table["variant"]), names_of(table), found.people.cells
    scale = table.rename(columns={"variant": "model", "group": "component"})
    met, decided = battle_counts(cells, order), battle_counts(cells, order, ties=False)
    share = win_fractions(cells, order)
    square = _long({"battles": met, "decided": decided, "win_fraction": share,
                    "predicted": predicted_wins(scale, order)}, order)  # fmt: skip
    square["wins"] = (square["win_fraction"] * square["decided"]).fillna(0).round()
    square["losses"] = square["decided"] - square["wins"]
    square["ties"] = square["battles"] - square["decided"]
    for side in ("row", "column"):
        square[f"{side}_name"] = square[side].map(names)
    return square[list(PAIRS)]


def _long(matrices: Mapping[str, pd.DataFrame], order: Sequence[str]) -> pd.DataFrame:
    """Matrices over the same variants -> one row per cell."""
    square = pd.MultiIndex.from_product([order, order], names=["row", "column"])
    values = {name: matrix.to_numpy().reshape(-1) for name, matrix in matrices.items()}
    return pd.DataFrame(values, index=square).reset_index()


def vote_mix(store: Store, picks: Picks) -> pd.DataFrame:
    """How votes ended, of the left answer (with the p of a fair side) and of every variant."""
    found = board(store, picks)
    if not found.votes:
        return pd.DataFrame(columns=["name", *OUTCOMES, "p"])
    cells, order = found.people.cells, found.rows["variant"][found.rows["rating"].notna()]
    mix = mix_of(cells, list(order))
    each = mix[mix["side"] == "both"].reset_index(drop=True)
    shares = {"won": "win", "tie": "tie", "bad": "bothbad", "lost": "loss"}
    counts = {name: (each[share] * each["votes"]).round() for name, share in shares.items()}
    lines = pd.DataFrame({"name": order.map(found.name).reset_index(drop=True), **counts})
    left = cells.groupby("winner")["count"].sum().reindex(WINNERS, fill_value=0)
    sides = pd.DataFrame([["Left answer (A)", *left]], columns=["name", *OUTCOMES])
    both = pd.concat([sides.assign(p=position_bias(cells)["p_value"]), lines], ignore_index=True)
    return both.astype(dict.fromkeys(OUTCOMES, float))


WINNERS = ("model_a", "tie", "tie (bothbad)", "model_b")  # as OUTCOMES, seen from the left
