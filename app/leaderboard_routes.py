"""The leaderboard's tables and the battles behind them, as files."""

from __future__ import annotations

import pandas as pd
from fastapi import FastAPI, Request, Response

from app import downloads, leaderboard_rows, leaderboard_table, published_table, rows
from app.context import Context, Picks
from results_db.battles_io import export_battles
from results_db.votes import FILE

KINDS = ("human", "judge", "auto", "import")
PEOPLE = ("rating", "low", "high", "rank", "votes", "few", "group", "win_rate")
JUDGE = ("judge_rating", "judge_low", "judge_high", "judge_votes")
CONDITIONS = ("stderr", "n", "unit", "device", "dtype")


def add_routes(app: FastAPI, ctx: Context) -> None:
    """/download/leaderboard, /download/published and /download/battles; csv, parquet or json."""

    @app.get("/download/leaderboard.{kind}")
    def leaderboard(kind: str, request: Request) -> Response:
        if kind not in downloads.WRITERS:
            return downloads.unknown(kind)
        return downloads.table(table(ctx, Picks.read(request.query_params)), "leaderboard", kind)

    @app.get("/download/published.{kind}")
    def published(kind: str, request: Request) -> Response:
        if kind not in downloads.WRITERS:
            return downloads.unknown(kind)
        chosen = published_table.chosen(Picks.read(request.query_params))
        return downloads.table(chosen, "published", kind)

    @app.get("/download/battles.{kind}")
    def battles(kind: str) -> Response:
        if kind not in downloads.WRITERS:
            return downloads.unknown(kind)
        log = ctx.home / FILE
        return downloads.written("battles", kind, lambda file: export_battles(log, file, KINDS))


def table(ctx: Context, picks: Picks) -> pd.DataFrame:
    """The rows that are shown, in their order, with every column group that is switched on."""
    known = rows.models(ctx.store)
    picks = leaderboard_rows.with_model(picks, known[0] if known else "")
    board = leaderboard_rows.board(ctx.store, picks)
    shown = leaderboard_table.shown(board, picks)
    names = leaderboard_table.measured_columns(board, picks)
    columns = ["name", "variant", "family", "bits", "packed", "run_id"]
    for group in leaderboard_table.groups_of(board):
        if group in picks.hide:
            continue
        columns += {
            "people": [*PEOPLE, *(["elo"] if picks.elo else [])],
            "judge": list(JUDGE),
        }.get(group, _with_conditions(leaderboard_table.split(names, group)))
    return shown[[name for name in columns if name in shown]].reset_index(drop=True)


def _with_conditions(names: list[str]) -> list[str]:
    return [column for n in names for column in (n, *(f"{n}__{what}" for what in CONDITIONS))]
