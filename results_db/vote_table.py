"""Votes as the database has them: rows, counts, and what can be chosen among them."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from results_db.store import Store
from results_db.vote_rows import JSONS

EXCLUDING = ("leak", "late", "duplicate", "unfinished")  # flags of votes that no rating counts

IS_VOID = "v.battle_id IN (SELECT battle_id FROM retractions)"
# What ratings count. A battle of a variant with itself says nothing about variants.
COUNTS = f"""
    v.anony AND v.model_a <> v.model_b
    AND (v.flags = '' OR NOT list_has_any(string_split(v.flags, ','), $excluding))
    AND NOT {IS_VOID}
"""


class VoteTable:
    """The votes in a store, to read."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def frame(
        self,
        *,
        model: str = "",
        kinds: Sequence[str] = ("human",),
        category: str = "",
        language: str = "",
        counted: bool = True,
        exclude_judges: Sequence[str] = (),
        text: bool = False,
        columns: Sequence[str] = (),
        coded: bool = False,
    ) -> pd.DataFrame:
        """Votes as rows by time, with `retracted`; those that ratings count, or all of them.

        With `text` also the prompt, both conversations and the settings; with `columns` only
        these, and with `coded` text as categories, which for many votes is most of the time saved.
        """
        where, values = _where(model, kinds, category, language, counted, exclude_judges)
        hidden = ", ".join(("hash", "ends", *(() if text else ("prompt", *JSONS))))
        wanted = ", ".join(map(_quoted, columns)) or "*"
        sql = f"""
            WITH chosen AS (
                SELECT v.* EXCLUDE ({hidden}), {IS_VOID} AS retracted FROM votes v WHERE {where}
            )
            SELECT {wanted} FROM chosen ORDER BY tstamp, seq
        """
        rows = (self._store.coded if coded else self._store.frame)(sql, **values)
        return rows.assign(**{n: rows[n].map(json.loads) for n in JSONS if n in rows})

    def cells(
        self,
        *,
        model: str = "",
        kinds: Sequence[str] = ("human",),
        category: str = "",
        language: str = "",
        counted: bool = True,
        exclude_judges: Sequence[str] = (),
    ) -> pd.DataFrame:
        """How often each pair, by side, ended how: model_a, model_b, winner, count."""
        where, values = _where(model, kinds, category, language, counted, exclude_judges)
        sql = f"""
            SELECT model_a, model_b, winner, count(*) AS count
            FROM votes v WHERE {where} GROUP BY ALL ORDER BY ALL
        """
        return self._store.frame(sql, **values)

    def models(self) -> list[str]:
        """Base models with votes of any kind."""
        return self._known("model", "")

    def categories(self, model: str = "") -> list[str]:
        """Categories of the votes on a model's variants, or of all."""
        return self._known("category", model)

    def languages(self, model: str = "") -> list[str]:
        """Languages of the votes on a model's variants, or of all."""
        return self._known("language", model)

    def _known(self, column: str, model: str) -> list[str]:
        sql = f"""
            SELECT DISTINCT {column} AS name FROM votes
            WHERE {column} <> '' AND ($model = '' OR model = $model) ORDER BY 1
        """
        return self._store.frame(sql, model=model)["name"].tolist()


def _where(
    model: str,
    kinds: Sequence[str],
    category: str,
    language: str,
    counted: bool,
    exclude_judges: Sequence[str],
) -> tuple[str, dict[str, Any]]:
    """A condition on votes `v`, and the values of its parameters. A part not asked for is absent:
    as part of an OR it would keep DuckDB from joining, which is most of the time."""
    values: dict[str, Any] = {"kinds": list(kinds)}
    parts = ["v.kind = ANY($kinds::VARCHAR[])"]
    for name, value in (("model", model), ("category", category), ("language", language)):
        if value:
            parts.append(f"v.{name} = ${name}")
            values[name] = value
    if exclude_judges:
        parts.append("v.judge NOT IN (SELECT unnest($exclude_judges::VARCHAR[]))")
        values["exclude_judges"] = list(exclude_judges)
    if counted:
        parts.append(COUNTS)
        values["excluding"] = list(EXCLUDING)
    return " AND ".join(parts), values


def _quoted(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'
