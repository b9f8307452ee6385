"""Load test of the arena: 50 voters in a closed loop against a server in another process.

    python tests/jobs/arena_load.py                       its own server, answers at once
    python tests/jobs/arena_load.py --url http://127.0.0.1:7860 --model demo     a real one

Each voter starts a battle, has a prompt drawn, thinks, votes; some press twice, some take the
vote back. At the end every reply is held against the votes that the server kept: none may be
lost, doubled or another than was said. The last line is one JSON object; the exit code is 1 if a
vote went wrong or the 95th percentile of a vote is 300 ms or more.

A real server needs limits that let 50 voters at one address through:
`--limits votes=none,starts=none,address_votes=none,address_starts=none,address_battles=none`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WINNERS = ("model_a", "model_b", "tie", "tie (bothbad)")
GOAL_MS = 300.0
TWICE, BACK = 0.1, 0.05  # shares of votes that are pressed twice, and withdrawn


@dataclass
class Record:
    """What the voters were told."""

    said: dict[str, str] = field(default_factory=dict)  # battle -> winner that was counted
    withdrawn: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)  # no reply came: counted or not
    took_ms: dict[str, list[float]] = field(default_factory=dict)
    refusals: Counter[str] = field(default_factory=Counter)


class Voter:
    """One browser."""

    def __init__(self, url: str, args: argparse.Namespace, record: Record, seed: int) -> None:
        self.client = httpx.AsyncClient(base_url=url, timeout=30)
        self.args, self.record = args, record
        self.rng = random.Random(seed)

    async def post(self, move: str, **body: Any) -> dict[str, Any] | None:
        began = time.perf_counter()
        reply = await self.client.post(f"/api/arena/{move}", json=body)
        self.record.took_ms.setdefault(move, []).append(1e3 * (time.perf_counter() - began))
        if reply.status_code != 200:
            self.record.refusals[f"{move}: {reply.json().get('error', '?')[:80]}"] += 1
            return None
        return dict(reply.json())

    async def run(self, until: float) -> None:
        await asyncio.sleep(self.rng.random() * self.args.think)  # not all at once
        async with self.client:
            while time.monotonic() < until:
                if not await self.battle():
                    await asyncio.sleep(self.args.think)

    async def battle(self) -> bool:
        view = await self.post("start", model=self.args.model)
        view = view and await self.post("ask", battle=view["battle_id"])
        while view and view["state"] == "answering":
            await asyncio.sleep(0.3)
            view = await self.post("view", battle=view["battle_id"])
        if not view or not view["can_vote"]:
            return False
        await asyncio.sleep(self.args.think * self.rng.uniform(0.5, 1.5))
        await self.vote(view["battle_id"], self.rng.choice(WINNERS))
        return True

    async def vote(self, battle: str, winner: str) -> None:
        presses = 2 if self.rng.random() < TWICE else 1
        try:
            votes = (self.post("vote", battle=battle, winner=winner) for _ in range(presses))
            told = [view for view in await asyncio.gather(*votes) if view]
        except httpx.HTTPError as error:
            self.record.unknown.add(battle)
            self.record.refusals[f"vote: {type(error).__name__}"] += 1
            return
        if told:
            self.record.said[battle] = winner
        if told and self.rng.random() < BACK and await self.post("retract", battle=battle):
            self.record.withdrawn.add(battle)


async def load(url: str, args: argparse.Namespace) -> Record:
    """All voters at once."""
    record = Record()
    until = time.monotonic() + args.seconds
    voters = [Voter(url, args, record, seed) for seed in range(args.voters)]
    await asyncio.gather(*(voter.run(until) for voter in voters))
    return record


def kept(url: str, since: float) -> tuple[list[tuple[str, str]], list[str]]:
    """What the server kept since then: (battle, winner) of every vote, battles withdrawn."""
    votes = f"SELECT battle_id, winner FROM votes WHERE kind = 'human' AND tstamp >= {since}"
    back = f"SELECT battle_id FROM retractions WHERE tstamp >= {since}"
    rows, withdrawn = (sql(url, query) for query in (votes, back))
    return [(battle, winner) for battle, winner in rows], [battle for (battle,) in withdrawn]


def sql(url: str, query: str) -> list[list[Any]]:
    """All rows: the route gives 10,000 at most."""
    found: list[list[Any]] = []
    while True:
        page = f"{query} ORDER BY 1 LIMIT 5000 OFFSET {len(found)}"
        reply = httpx.post(f"{url}/api/sql", json={"sql": page}, timeout=60)
        reply.raise_for_status()
        found += reply.json()["rows"]
        if len(reply.json()["rows"]) < 5000:
            return found


def verdict(record: Record, votes: list[tuple[str, str]], withdrawn: list[str]) -> dict[str, Any]:
    """The numbers, and everything that went wrong."""
    times = Counter(battle for battle, _ in votes)
    winner = dict(votes)
    said = record.said
    told = {
        "votes": len(said),
        "withdrawn": len(record.withdrawn),
        "lost": sum(battle not in times for battle in said),
        "doubled": sum(count > 1 for count in times.values()),
        "other": sum(winner.get(battle, told) != told for battle, told in said.items()),
        "unasked": sum(battle not in said and battle not in record.unknown for battle in times),
        "undo_wrong": len(record.withdrawn.symmetric_difference(withdrawn)),
        "refusals": dict(record.refusals),
    }
    for move, took in sorted(record.took_ms.items()):
        told |= {f"{move}_{name}": value for name, value in quantiles(took).items()}
    return told


def quantiles(took_ms: list[float]) -> dict[str, float]:
    """Nearest-rank percentiles."""
    ordered = sorted(took_ms)
    return {f"p{p}_ms": round(ordered[-(-len(ordered) * p // 100) - 1], 1) for p in (50, 95, 99)}


# ---- a server of its own -------------------------------------------------------------------


def serve(home: Path, port: int, before: int) -> None:
    """The arena's routes over made-up runs; every answer is there at once, as from the cache."""
    import uvicorn

    sys.path.insert(0, str(ROOT))
    from arena_scene import NO_LIMITS, Scene

    from app.arena_routes import add_routes
    from app.server import sql_answer

    scene = Scene(home, limits=NO_LIMITS, ahead=1)
    scene.clock.__class__.__call__ = lambda self: time.time()
    scene.votes.cast_all(old_votes(scene, before))
    app = FastAPI()
    add_routes(app, scene.arena)

    @app.post("/api/sql")
    async def read(request: Request) -> Response:
        return sql_answer(scene.store, await request.body())

    @app.get("/healthz")
    def healthz() -> dict[str, bool]:
        return {"ok": True}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def old_votes(scene: Any, count: int) -> Iterator[Any]:
    """Votes of last year, so that the store is as full as an old one."""
    from jobs.draws import variants
    from results_db.vote import Vote

    names = [variant.name for variant in variants(scene.store, "demo")]
    rng = random.Random(0)
    for n in range(count):
        a, b = rng.sample(names, 2)
        yield Vote(f"old{n}", "demo", a, b, rng.choice(WINNERS), "human", f"v{n % 999}", float(n))


@contextmanager
def own_server(before: int) -> Iterator[tuple[str, Path]]:
    """A server in a process of its own, on a home that goes with it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        command = [sys.executable, __file__, "--serve", str(home), str(port), str(before)]
        with subprocess.Popen(command, cwd=ROOT) as process:
            try:
                url = f"http://127.0.0.1:{port}"
                wait_for(url, process)
                yield url, home
            finally:
                process.terminate()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until it answers."""
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise SystemExit("the server ended before it answered")


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="", help="a running server; without it, one of its own")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--voters", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--think", type=float, default=2.0, help="seconds, on average")
    parser.add_argument("--before", type=int, default=0, help="votes already there (own server)")
    args = parser.parse_args()
    if args.url:
        found = measured(args.url.rstrip("/"), args)
    else:
        with own_server(args.before) as (url, home):
            found = measured(url, args) | chain_of(home)
    print(json.dumps(found))
    wrong = [name for name in ("lost", "doubled", "other", "unasked", "undo_wrong") if found[name]]
    return int(bool(wrong) or found.get("vote_p95_ms", GOAL_MS) >= GOAL_MS)


def measured(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """The load, then what came of it."""
    since = time.time()
    record = asyncio.run(load(url, args))
    return verdict(record, *kept(url, since))


def chain_of(home: Path) -> dict[str, Any]:
    """The log of votes, read by this process and not by the one that wrote it."""
    sys.path.insert(0, str(ROOT))
    from results_db.vote_log import check

    found = check(home / "votes.jsonl")
    return {"chain_broken_at": found.broken_line, "logged": found.votes}


if __name__ == "__main__":
    sys.exit(main())
