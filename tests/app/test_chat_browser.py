"""A person chats in Chromium: answers side by side, stop, where they part, hostile text, links.

The models are stand-ins that answer when a test says so. Fails on any console error and on any
request that leaves this machine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
import seeded
import test_browser
import uvicorn
from chat_stand_in import StandIn, token_of

from app import server, sides
from app.context import Context

pytestmark, chromium, visit = test_browser.pytestmark, test_browser.chromium, test_browser.visit
SCREEN = test_browser.SCREEN

BASE = ["The", " place", " is", " third", "."]
OTHER = ["The", " place", " is", " second", ",", " I", " think", "."]
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    " [click](javascript:window.hacked=3) ",
    "![pixel](https://evil.example/pixel.png)",
    "\n\n```html\n</code></pre><svg onload='window.hacked = 4'>\n```\n\n",
    "\u202egnp.exe\u2066",
    '"><button data-act=\'{"do":"stop"}\'>x</button>',
    "x" * 5000,
]


class Site:
    """A server in this process whose models a test speaks for."""

    def __init__(self, home: Path) -> None:
        seeded.fill(home)
        self.store, queue = seeded.store_of(home), seeded.queue_of(home)
        known = sides.variants(self.store, "demo")
        self.base, self.other = (side.run_id for side in sides.chosen(known, ()))
        self.runs = [side.run_id for side in known]
        self.pool = StandIn({})
        ctx = Context(self.store, queue, home, (), "127.0.0.1", "", queue, chat=self.pool)
        self._ready = threading.Event()
        listener = server.listening("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(server.build_app(ctx), log_level="warning")
        self._server = server.Telling(config, self._ready.set)
        run = self._server.run
        self._thread = threading.Thread(target=run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        assert self._ready.wait(120)

    def says(self, base: list[str], other: list[str], *, slow: bool = False) -> None:
        """What the two sides answer from now on; every further side says what the second does."""
        self.pool.__init__(dict.fromkeys(self.runs, other) | {self.base: base}, slow=slow)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self.store.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("home"))
    yield made
    made.stop()


def ask(page: Any, text: str = "Which place?") -> None:
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")


def answered(page: Any, count: int = 2) -> None:
    """Wait until the last prompt has its answers."""
    page.wait_for_function(
        """(count) => { const last = [...document.querySelectorAll('.turn')].at(-1);
          return last && last.querySelectorAll('.answer .told').length === count
            && !document.querySelector('.answer.busy'); }""",
        arg=count,
    )


def test_answers_stream_side_by_side_and_stop(site, visit):
    site.says(BASE, OTHER, slow=True)
    page = visit(site.url).open("/chat")
    ask(page)
    page.keyboard.type("a draft")  # before or after the server has taken the prompt
    page.wait_for_function("document.querySelectorAll('.answer.busy').length === 2")
    page.wait_for_function("document.getElementById('prompt').value === 'a draft'")
    site.pool.grow(2)
    for at in range(2):
        page.locator(".answer .md").nth(at).get_by_text("The place").wait_for()
    site.pool.grow(1)
    page.locator(".answer .md").nth(1).get_by_text("The place is").wait_for()
    assert page.locator("#prompt").input_value() == "a draft"
    assert page.evaluate("document.activeElement.id") == "prompt"

    page.get_by_role("button", name="Stop", exact=True).click()
    answered(page)
    site.pool.grow(9)
    assert "stopped" in page.locator(".answer .told").nth(1).inner_text()
    assert "second" not in page.locator(".answer").nth(1).inner_text()
    assert page.locator("#prompt").input_value() == "a draft"
    page.get_by_role("button", name="Send").wait_for()


def test_one_side_stops_alone_and_the_next_prompt_goes_to_both(site, visit):
    site.says(BASE, OTHER, slow=True)
    page = visit(site.url).open("/chat")
    ask(page)
    page.wait_for_function("document.querySelectorAll('.answer.busy').length === 2")
    site.pool.grow(1)
    page.locator(".answer").nth(1).locator("button", has_text="Stop").click()
    page.wait_for_function("document.querySelectorAll('.answer.busy').length === 1")
    site.pool.grow(9)
    answered(page)
    assert "third" in page.locator(".answer").nth(0).inner_text()
    ask(page, "And then?")
    page.wait_for_function("document.querySelectorAll('.answer.busy').length === 2")
    site.pool.grow(9)
    answered(page)
    assert page.locator(".turn").count() == 2
    assert parse_qs(urlparse(page.url).query)["q"] == ["Which place?~And then?"]


def test_where_they_part_is_shown_and_continued_another_way(site, visit):
    site.says(BASE, OTHER)
    page = visit(site.url).open("/chat")
    ask(page)
    answered(page)
    page.keyboard.press("Escape")
    page.keyboard.press("p")
    page.locator(".answer").nth(1).locator(".tok.k4").first.wait_for()
    assert "part=1" in page.url
    assert (
        "Token 4 is “ second” where 16-bit says “ third”"
        in page.locator(".parting").nth(1).inner_text()
    )
    split = page.locator(".answer").nth(1).locator(".tok.parts")
    assert split.inner_text() == " second"
    split.hover()
    card = page.locator(".token-card")
    card.get_by_text("16-bit model").wait_for()
    assert card.locator("li").count() == 4
    assert "70 %" in card.inner_text()
    card.get_by_role("button", name="Continue from here with").click()
    page.locator(".fork").wait_for()
    assert site.pool.asked[-1][3][-1] == token_of(" third")
    page.get_by_role("button", name="Undo: back").click()
    page.wait_for_function("!document.querySelector('.fork')")
    assert " second" in page.locator(".answer").nth(1).inner_text()


def test_tokens_are_reached_and_continued_by_keyboard(site, visit):
    site.says(BASE, OTHER)
    page = visit(site.url).open("/chat?part=1")
    ask(page)
    answered(page)
    page.locator(".answer").nth(1).locator(".tok.k4").first.wait_for()
    page.locator(".answer").nth(1).locator(".tok[tabindex='0']").focus()
    page.locator(".token-card").get_by_text("Token 4").wait_for()
    page.keyboard.press("ArrowRight")
    page.locator(".token-card").get_by_text("Token 5").wait_for()
    assert page.evaluate("document.activeElement.textContent") == ","
    assert "divergence 5 nats" in page.locator("#qa-announce").inner_text()
    page.keyboard.press("Enter")
    assert page.evaluate("!!document.activeElement.closest('.token-card')")
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('.token-card')")
    assert page.evaluate("document.activeElement.textContent") == ","
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.locator(".fork").wait_for()
    assert len(site.pool.asked[-1][3]) == 5


def test_hostile_answers_are_only_text(site, visit):
    site.says(HOSTILE, HOSTILE)
    page = visit(site.url, 390).open("/chat")
    ask(page, HOSTILE[0] + HOSTILE[1])
    answered(page)
    page.get_by_role("button", name="Where they part").click()
    page.locator(".tokens .tok.k0").first.wait_for()
    page.locator(".tok[data-at='1']").first.click()
    page.locator(".token-card").wait_for()
    places, bad_tags = ":is(.said, .question, .token-card)", ":is(script, img, svg, iframe, a)"
    bad = f"{places} {bad_tags}"
    assert page.locator(bad).count() == 0
    assert page.evaluate("window.hacked") is None
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Where they part").click()
    page.locator(".md").first.wait_for()
    assert page.locator(bad).count() == 0
    assert page.locator(".answer [data-act]").count() == 0
    assert "‹U+202E›" in page.locator(".md").first.inner_text()
    assert page.evaluate(SCREEN), page.evaluate("document.documentElement.scrollWidth")


def test_a_reload_keeps_the_conversation_and_a_link_asks_it_again(site, visit):
    site.says(BASE, OTHER)
    page = visit(site.url).open("/chat?temperature=0.5&seed=3")
    ask(page, "one ~ two")
    answered(page)
    page.reload()
    answered(page)
    assert "temperature 0.5, top-p 1, seed 3" in page.locator(".question").inner_text()
    address = urlparse(page.url)
    page.locator("details.more > summary").click()
    page.get_by_role("button", name="Copy link").click()
    page.get_by_text("it offers to ask the same again").wait_for()
    link = urlparse(page.locator("[data-link]").get_attribute("data-copy"))
    assert set(parse_qs(link.query)) == {"temperature", "seed", "q"}

    theirs = visit(site.url).open(f"{address.path}?{address.query}")
    theirs.get_by_text("This link carries this prompt").wait_for()
    assert theirs.locator(".answer").count() == 0
    theirs.get_by_role("button", name="Ask this prompt").click()
    answered(theirs)
    assert site.pool.asked[-1][1][-1].content == "one ~ two"
    assert site.pool.asked[-1][2].seed == 3


def test_a_new_chat_begins_empty_and_back_returns(site, visit):
    site.says(BASE, OTHER)
    page = visit(site.url).open("/chat")
    ask(page)
    answered(page)
    page.locator("details.more > summary").click()
    page.get_by_role("button", name="New chat").click()
    page.get_by_text("Every variant gets the same prompt").wait_for()
    page.go_back()
    answered(page)


def test_the_conversation_is_saved_as_a_file(site, visit):
    site.says(BASE, OTHER)
    page = visit(site.url).open("/chat")
    ask(page)
    answered(page)
    page.locator("details.more > summary").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as JSON").click()
    assert download.value.suggested_filename == "quantarena-chat.json"
    data = json.loads(Path(download.value.path()).read_text())
    assert data["turns"][0]["answers"][0]["text"] == "".join(BASE)


def test_a_suggestion_fills_the_box_and_variants_are_exchanged(site, visit):
    site.says(BASE, OTHER)
    page = visit(site.url).open("/chat")
    page.locator(".begin .chip").first.click()
    assert page.locator("#prompt").input_value()
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.wait_for_function("document.querySelectorAll('.side-card').length === 2")
    assert [site.pool.warmed.get(timeout=60) for _ in range(2)] == [site.base, site.other]
    page.get_by_role("combobox", name="Add a variant").select_option(index=1)
    page.wait_for_function("document.querySelectorAll('.side-card').length === 3")
    page.get_by_role("button", name="Remove 16-bit").click()
    page.wait_for_function("document.querySelectorAll('.side-card').length === 2")
    assert site.base not in page.url


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_four_sides_fit_every_width(width, site, visit):
    site.says(BASE, OTHER)
    page = visit(site.url, width).open(f"/chat?part=1&runs={'~'.join(site.runs[:4])}")
    ask(page, "word " * 300)
    answered(page, 4)
    page.locator(".tokens .tok.k4").first.wait_for()
    assert page.evaluate(SCREEN), page.evaluate("document.documentElement.scrollWidth")
    box = page.locator(".ask").bounding_box()
    assert box["y"] + box["height"] <= 900, "the prompt box is in the window"


def test_every_control_has_a_name(site, visit):
    site.says(BASE, OTHER)
    page = visit(site.url).open("/chat?part=1")
    ask(page)
    answered(page)
    page.locator("details.settings > summary").click()
    page.locator(".tokens .tok.k4").first.hover()
    page.locator(".token-card").wait_for()
    nameless = """() => {
      const controls = 'button, a[href], input, select, textarea, [role=button]';
      return [...document.querySelectorAll(controls)]
        .filter((e) => e.offsetParent && !e.closest('[aria-hidden=true]'))
        .filter((e) => !(e.textContent.trim() || e.getAttribute('aria-label') || e.title
                         || (e.labels && e.labels.length)))
        .map((e) => e.outerHTML.slice(0, 120)); }"""
    assert page.evaluate(nameless) == []
