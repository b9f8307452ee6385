"""The arena over HTTP, and the load test's own bookkeeping."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from arena_load import Record, quantiles, verdict
from arena_scene import NO_LIMITS, RECIPES, Scene, run_id_of
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.arena_routes import LONGEST_BODY, add_routes
from app.context import SESSION_NAME
from jobs.limits import Limits


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path / "home", limits=Limits.from_text("votes=2/min", NO_LIMITS))
    yield made
    made.close()


@pytest.fixture
def app(scene: Scene) -> FastAPI:
    made = FastAPI()
    add_routes(made, scene.arena)
    return made


def test_a_battle_over_http_tells_no_name_before_the_vote(app, scene):
    browser = TestClient(app)
    sent: list[str] = []

    def post(move: str, **body):
        reply = browser.post(f"/api/arena/{move}", json=body)
        assert reply.status_code == 200, reply.text
        sent.append(f"{reply.headers} {reply.text}")
        return reply.json()

    battle = post("start", model="demo", category="math")["battle_id"]
    assert post("ask", battle=battle)["turns"][0]["prompt"].startswith("math")
    post("ask", battle=battle, prompt="And then?")
    assert post("view", battle=battle)["can_vote"]
    secret = [run_id_of(at) for at in range(4)] + list(RECIPES)
    secret += ["gptq", "rtn", "smooth", "baseline", "seed", "propensity"]
    assert [word for word in secret if word in " ".join(sent)] == []
    voted = post("vote", battle=battle, winner="model_b")
    assert (voted["state"], voted["counts"]) == ("voted", True)
    assert voted["a"]["run_id"] in secret
    assert post("retract", battle=battle)["state"] == "void"
    other = post("start", model="demo")["battle_id"]
    assert post("skip", battle=other)["state"] == "skipped"


def test_a_session_is_made_once_and_is_not_for_scripts(app):
    browser = TestClient(app)
    first = browser.post("/api/arena/start", json={"model": "demo"})
    cookie = first.headers["set-cookie"]
    assert cookie.startswith(f"{SESSION_NAME}=")
    assert "HttpOnly" in cookie
    again = browser.post("/api/arena/start", json={"model": "demo"})
    assert "set-cookie" not in again.headers
    stranger = TestClient(app).post("/api/arena/view", json={"battle": first.json()["battle_id"]})
    assert (stranger.status_code, "another visitor" in stranger.json()["error"]) == (409, True)


@pytest.mark.parametrize(
    ("move", "body", "code", "says"),
    [
        ("start", b"not json", 400, "send JSON"),
        ("start", b"[1]", 400, "not a list"),
        ("start", b"[" * 60_000, 400, "send JSON"),
        ("start", b"{}", 400, "'model' must be a text"),
        ("start", b'{"model": "demo", "category": 3}', 400, "'category' must be a text"),
        ("start", b'{"model": "unknown"}', 409, "needs two variants"),
        ("ask", b'{"battle": "x", "prompt": 7}', 400, "'prompt' must be a text"),
        ("vote", b'{"battle": "x", "winner": "tie"}', 409, "not known here any more"),
        ("vote", b" " * (LONGEST_BODY + 1), 400, "65,536 are allowed"),
    ],
)
def test_what_cannot_be_is_one_sentence(app, move, body, code, says):
    reply = TestClient(app).post(f"/api/arena/{move}", content=body)
    assert (reply.status_code, list(reply.json())) == (code, ["error"])
    assert says in reply.json()["error"]


def test_another_site_cannot_vote_for_its_visitors(app):
    browser = TestClient(app)
    body = {"model": "demo"}
    elsewhere = browser.post(
        "/api/arena/start", json=body, headers={"origin": "https://elsewhere.example"}
    )
    assert elsewhere.status_code == 403
    here = browser.post("/api/arena/start", json=body, headers={"origin": "http://testserver"})
    assert here.status_code == 200


def test_limits_say_when_to_come_again(app, scene):
    browser = TestClient(app)
    replies = []
    for n in range(3):
        battle = browser.post("/api/arena/start", json={"model": "demo"}).json()["battle_id"]
        browser.post("/api/arena/ask", json={"battle": battle, "prompt": f"p{n}"})
        vote = {"battle": battle, "winner": "tie"}
        replies.append(browser.post("/api/arena/vote", json=vote))
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[-1].headers["retry-after"] == "30"


def test_the_load_test_sees_what_goes_wrong():
    record = Record(said={"a": "tie", "b": "model_a", "c": "model_b"}, withdrawn={"a"})
    record.unknown = {"e"}
    fine = [("a", "tie"), ("b", "model_a"), ("c", "model_b"), ("e", "tie")]
    wrong = ("lost", "doubled", "other", "unasked", "undo_wrong")

    def faults(votes, withdrawn=("a",)) -> dict:
        found = verdict(record, votes, list(withdrawn))
        return {name: found[name] for name in wrong if found[name]}

    assert faults(fine) == {}
    assert faults(fine[1:]) == {"lost": 1}
    assert faults([*fine, fine[0]]) == {"doubled": 1}
    assert faults([("a", "tie"), ("b", "tie"), ("c", "model_b")]) == {"other": 1}
    assert faults([*fine, ("d", "tie")]) == {"unasked": 1}
    assert faults(fine, ()) == faults(fine, ("a", "b")) == {"undo_wrong": 1}
    assert quantiles(list(range(1, 101))) == {"p50_ms": 50, "p95_ms": 95, "p99_ms": 99}
