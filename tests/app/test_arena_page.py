"""A voter in Chromium: a blind battle by keyboard, and what the browser is sent before the vote."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import seeded
import test_browser
import uvicorn

from app import server
from app.context import SESSION_NAME, Context
from app.pages import arena as page_module
from jobs.limits import Limits

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
from arena_scene import Scene, own_words

sync_api = test_browser.sync_api
pytestmark, chromium, visit = test_browser.pytestmark, test_browser.chromium, test_browser.visit
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


class Site:
    """A server in this process over a scene whose answers are at hand."""

    def __init__(self, home: Path, **scene: Any) -> None:
        self.scene = Scene(home, **scene)
        self.scene.clock = time.time
        self.scene.arena = self.scene.new_arena()
        queue = seeded.queue_of(home)
        here = (self.scene.store, queue, home, (), "127.0.0.1", "", queue, self.scene.votes, None)
        self.context = Context(*here, self.scene.arena)
        ready = threading.Event()
        listener = server.listening("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(server.build_app(self.context), log_level="warning")
        self._server = server.Telling(config, ready.set)
        where = {"sockets": [listener]}
        self._thread = threading.Thread(target=self._server.run, kwargs=where, daemon=True)
        self._thread.start()
        assert ready.wait(120)

    def names(self) -> set[str]:
        """Whatever would tell a voter who answers."""
        runs = self.scene.store.frame("SELECT run_id, recipe, artifact_id FROM runs")
        told = {text for row in runs.itertuples(index=False) for text in row} - {"baseline"}
        return told | {"demo/baseline"}

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self.scene.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("home"))
    yield made
    made.stop()


def listened(page: Any) -> list[Any]:
    """Every response from now on."""
    heard: list[Any] = []
    page.on("response", lambda response: heard.append(response))
    return heard


def bodies(heard: list[Any]) -> str:
    """The text of all pages and data; not of streams, which Gradio keeps open for heartbeats."""
    texts = []
    for response in list(heard):
        kind = response.headers.get("content-type", "")
        if "json" in kind or "html" in kind:
            with suppress(sync_api.Error):  # a redirect has no body
                texts.append(response.text())
    return "\n".join(texts)


def ready(page: Any) -> None:
    page.wait_for_selector(".vote:not([aria-disabled])")


def test_a_blind_battle_by_keyboard(site, visit):
    page = visit(site.url).page
    heard = listened(page)
    page.goto(site.url + "/arena?model=demo")
    page.get_by_role("button", name="Draw a prompt").click()
    ready(page)
    before = bodies(heard)
    assert "question" in before  # the prompt came by what is searched here
    before += page.content()
    told = [name for name in site.names() if name in before]
    assert not told
    battle = page.url.split("battle=")[1].split("&")[0]

    page.locator("#arena-prompt").focus()
    page.keyboard.type("12")  # digits in a text field are no votes
    assert not site.scene.rows()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("[data-next]")
    assert "You preferred B. Counted." in page.locator("h1").inner_text()
    (row,) = site.scene.rows()
    assert (row["battle_id"], row["winner"], row["anony"]) == (battle, "model_b", True)
    shown = page.locator(".revealed a").all_inner_texts()
    assert len(shown) == 2

    page.wait_for_function("document.activeElement.matches('[data-next]')")
    page.reload()  # the same battle, still counted once
    page.wait_for_selector("[data-next]")
    page.keyboard.press("1")
    page.keyboard.press("n")
    page.wait_for_function(f"!location.search.includes('{battle}')")
    ready(page)
    assert len(site.scene.rows()) == 1


def test_a_vote_is_taken_back_and_the_battle_is_void(site, visit):
    page = visit(site.url).open("/arena?model=demo")
    page.locator("#arena-prompt").fill("Who are you?")
    page.keyboard.press("Enter")
    ready(page)
    battle = page.url.split("battle=")[1].split("&")[0]
    page.keyboard.press("3")
    page.wait_for_selector("[data-undo]")
    page.keyboard.press("u")
    page.get_by_text("withdrawn").first.wait_for()
    assert not page.locator(".vote").count()
    assert battle not in set(site.scene.votes.frame(kinds=("human",))["battle_id"])
    page.get_by_role("button", name="Next battle").click()
    ready(page)


def test_talking_on_before_the_vote(site, visit):
    page = visit(site.url, width=360).open("/arena?model=demo&theme=dark")
    page.get_by_role("button", name="Draw a prompt").click()
    ready(page)
    page.locator("#arena-prompt").fill("And then?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_function("document.querySelectorAll('.asked').length === 2")
    ready(page)
    assert page.evaluate(test_browser.SCREEN)
    page.get_by_role("button", name="Both are bad").click()
    page.wait_for_selector("[data-next]")
    assert site.scene.rows()[-1]["turn"] == 2


def test_help_lists_the_keys(site, visit):
    page = visit(site.url).open("/arena?model=demo")
    page.keyboard.press("?")
    words = page.locator("#qa-help").inner_text()
    assert "A is better" in words
    assert "Both are bad" in words


@pytest.fixture
def hostile(tmp_path) -> Iterator[Site]:
    made = Site(tmp_path / "home", answer=lambda run_id, said: own_words(run_id, said) + HOSTILE)
    yield made
    made.stop()


def test_what_a_model_says_is_text(hostile, visit):
    page = visit(hostile.url).open("/arena?model=demo")
    page.locator("#arena-prompt").fill(HOSTILE)
    page.keyboard.press("Enter")
    ready(page)
    assert page.evaluate("window.hacked") is None
    assert not page.locator(".battle script, .battle img").count()
    assert HOSTILE in page.locator(".asked").inner_text()


def visitor(**params: str) -> Any:
    """A request of a browser that has its cookie."""
    return SimpleNamespace(
        query_params=params,
        cookies={SESSION_NAME: "me"},
        headers={"host": "127.0.0.1"},
        client=SimpleNamespace(host="127.0.0.1"),
    )


def move(ctx: Context, request: Any, **data: Any) -> Any:
    return page_module.perform(ctx, data, request)


def test_moves_without_a_browser(tmp_path):
    scene = Scene(tmp_path / "home", limits=Limits.from_text("starts=2/min"))
    queue = seeded.queue_of(tmp_path)
    ctx = Context(
        scene.store, queue, tmp_path, (), "127.0.0.1", "", queue, scene.votes, None, scene.arena
    )
    request = visitor(model="demo")
    assert "Draw a prompt" in page_module.screen(ctx, request)
    battle = move(ctx, request, do="start", prompt="Hello?")["params"]["battle"]
    here = visitor(model="demo", battle=battle)
    assert "Hello?" in page_module.screen(ctx, here)
    with pytest.raises(ValueError, match="cannot do"):
        move(ctx, here, do="dance", battle=battle)
    with pytest.raises(ValueError, match="no choice"):
        move(ctx, here, do="vote", battle=battle, winner="me")
    assert move(ctx, here, do="vote", battle=battle, winner="model_a") == {}
    stranger = visitor(model="demo", battle=battle)
    stranger.cookies = {SESSION_NAME: "somebody else"}
    assert "not yours" in page_module.screen(ctx, stranger)
    with pytest.raises(ValueError, match="another visitor"):
        move(ctx, stranger, do="undo", battle=battle)
    move(ctx, request, do="start")
    with pytest.raises(ValueError):
        move(ctx, request, do="start")
    nobody = visitor(model="demo")
    nobody.cookies = {}
    with pytest.raises(ValueError, match="cookie"):
        move(ctx, nobody, do="start")
    scene.close()


def test_a_model_with_one_variant_says_what_to_do(tmp_path):
    scene = Scene(tmp_path / "home", recipes=("baseline",))
    queue = seeded.queue_of(tmp_path)
    ctx = Context(
        scene.store, queue, tmp_path, (), "127.0.0.1", "", queue, scene.votes, None, scene.arena
    )
    assert "First tour" in page_module.screen(ctx, visitor(model="demo"))
    scene.close()


def test_no_name_is_in_the_battle_that_the_page_is_made_from(tmp_path):
    scene = Scene(tmp_path / "home")
    view = scene.asked("Hello?")
    text = json.dumps(view.data())
    runs = scene.store.frame("SELECT run_id, recipe, artifact_id FROM runs")
    assert not [word for row in runs.itertuples(index=False) for word in row if word in text]
    scene.close()
