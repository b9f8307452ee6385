"""The arena over plain HTTP, for programs and load tests: POST JSON, get the battle as JSON."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.context import SESSION_NAME, address_of, from_elsewhere, session_of
from jobs.arena import Arena
from jobs.battle import BattleView, Refused
from jobs.limits import TooMany

LONGEST_BODY = 64 << 10  # bytes
YEAR_S = 31_536_000

Body = Mapping[str, Any]
Move = Callable[[Arena, Body, str, str], BattleView]  # body, session, address


def start(arena: Arena, body: Body, session: str, address: str) -> BattleView:
    """{"model", "category"?, "language"?}"""
    kind = {name: text(body, name, "") for name in ("category", "language")}
    return arena.start(session, address, text(body, "model"), **kind)


def ask(arena: Arena, body: Body, session: str, address: str) -> BattleView:
    """{"battle", "prompt"?}; without a prompt one is drawn."""
    prompt = None if body.get("prompt") is None else text(body, "prompt")
    return arena.ask(text(body, "battle"), session, prompt)


def view(arena: Arena, body: Body, session: str, address: str) -> BattleView:
    """{"battle"}"""
    return arena.view(text(body, "battle"), session)


def vote(arena: Arena, body: Body, session: str, address: str) -> BattleView:
    """{"battle", "winner"}"""
    return arena.vote(text(body, "battle"), session, text(body, "winner"))


def retract(arena: Arena, body: Body, session: str, address: str) -> BattleView:
    """{"battle"}"""
    return arena.retract(text(body, "battle"), session)


def skip(arena: Arena, body: Body, session: str, address: str) -> BattleView:
    """{"battle"}"""
    return arena.skip(text(body, "battle"), session)


MOVES: Mapping[str, Move] = {
    move.__name__: move for move in (start, ask, view, vote, retract, skip)
}


def add_routes(app: FastAPI, arena: Arena) -> None:
    """POST /api/arena/{start,ask,view,vote,retract,skip}; a caller without a session gets one."""
    for name, move in MOVES.items():
        app.post(f"/api/arena/{name}")(handler(arena, move))


def handler(arena: Arena, move: Move) -> Callable[[Request], Any]:
    """One move as a route. The work is done in a thread: a vote waits for the disk."""

    async def handle(request: Request) -> Response:
        if from_elsewhere(request):
            return JSONResponse({"error": "votes are cast from this site's own pages"}, 403)
        session = session_of(request) or secrets.token_urlsafe(16)
        address = address_of(request)
        try:
            body = read(await request.body())
            found = await run_in_threadpool(move, arena, body, session, address)
        except ValueError as error:
            return refusal(error)
        answer = JSONResponse(found.data(), headers={"Cache-Control": "no-store"})
        if not session_of(request):
            answer.set_cookie(SESSION_NAME, session, YEAR_S, httponly=True, samesite="lax")
        return answer

    return handle


def read(body: bytes) -> Body:
    """The JSON object of a request. ValueError in one sentence if it is none."""
    if len(body) > LONGEST_BODY:
        raise ValueError(f"the request has {len(body):,} bytes; {LONGEST_BODY:,} are allowed")
    try:
        data = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise ValueError('send JSON: {"battle": "...", "winner": "model_a"}') from None
    if not isinstance(data, Mapping):
        raise ValueError(f"send a JSON object, not a {type(data).__name__}")
    return data


def text(body: Body, name: str, otherwise: str | None = None) -> str:
    """A field that must be text."""
    value = body.get(name, otherwise)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a text")
    return value


def refusal(error: ValueError) -> JSONResponse:
    """The sentence, and what kind of refusal it is: 429 for a limit, 409 for a rule, else 400."""
    data = {"error": str(error)}
    if isinstance(error, TooMany):
        headers = {"Retry-After": str(max(1, round(error.wait_s)))}
        return JSONResponse(data, status_code=429, headers=headers)
    return JSONResponse(data, status_code=409 if isinstance(error, Refused) else 400)
