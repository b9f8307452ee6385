"""A person in Chromium: the first tour on a real server, then looking closer, reloading, narrowing.

Fails on any console error and on any request that leaves this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import seeded

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_S = 300  # for points on a busy machine; an idle one needs a few seconds each
POINTS = """(least) => {
  const box = document.querySelector('.selects .plot');
  const count = box && box.data ? box.data.reduce((n, t) => n + (t.customdata || []).length, 0) : 0;
  return count >= least;
}"""
SCREEN = "document.documentElement.scrollWidth <= window.innerWidth"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Serving:
    """A server process on a home of its own."""

    def __init__(self, home: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.log = home / "server.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--home", str(home), "--port", "0"],
            env=environment,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.url = self._url()

    def _url(self) -> str:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for word in self.log.read_text().split():
                if word.startswith("http://"):
                    return word
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(f"the server did not start: {self.log.read_text()}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Iterator[str]:
    """A server on an empty home."""
    serving = Serving(tmp_path_factory.mktemp("home"))
    yield serving.url
    serving.stop()


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Iterator[str]:
    """A server on a home that has results already."""
    home = tmp_path_factory.mktemp("filled")
    seeded.fill(home)
    serving = Serving(home)
    yield serving.url
    serving.stop()


class Visitor:
    """A page that remembers what went wrong on it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url
        self.context = browser.new_context(reduced_motion="reduce", **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.trouble: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", self._request)
        self.page.on("response", self._response)

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.trouble.append(message.text)

    def _request(self, request: Any) -> None:
        where = urlparse(request.url)
        if where.scheme.startswith("http") and where.netloc != urlparse(self.url).netloc:
            self.trouble.append(f"a request to {request.url}")

    def _response(self, response: Any) -> None:
        if response.status >= 500:
            self.trouble.append(f"{response.status} from {response.url}")

    def open(self, path: str) -> Any:
        self.page.goto(self.url + path)
        self.page.wait_for_selector(".live:not(:empty)")
        self.page.wait_for_function("!document.querySelector('.skeleton')")
        return self.page

    def close(self) -> None:
        self.context.close()
        assert not self.trouble, self.trouble


@pytest.fixture
def visit(chromium) -> Iterator[Any]:
    """visit(url, width=1440, ...) -> Visitor; checked for trouble at the end."""
    visitors: list[Visitor] = []

    def make(url: str, width: int = 1440, **options: Any) -> Visitor:
        viewport = {"width": width, "height": 900}
        visitors.append(Visitor(chromium, url, viewport=viewport, **options))
        return visitors[-1]

    yield make
    for visitor in visitors:
        visitor.close()


def points(page: Any, least: int, patience_s: float = 60) -> None:
    """Wait until the chart shows at least so many points."""
    page.wait_for_function(POINTS, arg=least, timeout=patience_s * 1000)


def test_the_first_tour_fills_the_chart(fresh, visit):
    page = visit(fresh).open("/")
    page.get_by_role("button", name="First tour").click()
    page.get_by_text("runs so far").first.wait_for()
    points(page, 2, PATIENCE_S)

    row = page.locator("tr[data-run]").filter(has_text="RTN").first
    row.click()
    page.get_by_text("1 run selected").wait_for()
    page.locator("select[data-param=y]").select_option("mean_kld")
    page.wait_for_function("document.querySelector('.ytitle').textContent.includes('divergence')")
    assert "y=mean_kld" in page.url
    assert "runs=" in page.url

    page.reload()
    page.get_by_text("1 run selected").wait_for()
    points(page, 2)
    assert page.locator("select[data-param=y]").input_value() == "mean_kld"
    assert page.locator("tr[data-run][aria-selected=true]").count() == 1

    page.locator(".side").get_by_role("link", name="Open").first.click()
    page.get_by_role("heading", name="What decided it").wait_for()
    page.locator(".copy-line code").first.wait_for()
    page.go_back()
    page.get_by_text("1 run selected").wait_for()


def test_a_new_recipe_is_queued_and_cancelled(fresh, visit):
    page = visit(fresh).open("/new")
    page.get_by_role("button", name="GPTQ W4 g128", exact=False).first.click()
    page.locator(".lines li").first.wait_for()
    page.locator("#s0-damping").fill("0.05")
    page.wait_for_function("document.querySelector('.lines code').textContent.includes('0.05')")
    assert "0.05" in page.url
    page.locator("#recipes").evaluate("e => e.closest('details').open = true")
    page.locator("#recipes").fill("gptqq(bits=4)")
    page.locator(".lines .problem").wait_for()
    assert "did you mean" in page.locator(".lines .problem").inner_text()
    page.locator("#recipes").fill("rtn(bits=3|4,group=32)")
    page.get_by_role("button", name="Queue 2 runs").click()
    page.wait_for_url("**/jobs*")
    cancel = page.get_by_role("button", name="Cancel rtn(bits=4,group=32)")
    cancel.click()
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("goes on").wait_for()
    page.get_by_role("button", name="Cancel rtn(bits=4,group=32)").wait_for()


def test_a_point_answers_a_click_and_shift_adds(filled, visit):
    page = visit(filled).open("/?theme=dark")
    points(page, 12)
    at = page.evaluate(
        """() => { const box = document.querySelector('.selects .plot');
          return box.data.flatMap((t, curve) => (t.customdata || []).map((id, point) => {
            const r = box.querySelectorAll('.scatterlayer .trace')[curve]
                         .querySelectorAll('.point')[point].getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2]; })).slice(0, 2); }"""
    )
    page.mouse.click(*at[0])
    page.get_by_text("1 run selected").wait_for()
    page.keyboard.down("Shift")
    page.locator("tr[data-run][aria-selected=false]").first.click()
    page.keyboard.up("Shift")
    page.get_by_text("2 runs side by side").wait_for()
    page.go_back()
    page.get_by_text("1 run selected").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("Nothing selected").wait_for()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_dragging_over_the_chart_selects_what_is_inside(filled, visit):
    page = visit(filled).open("/")
    points(page, 12)
    page.get_by_role("button", name="Select area").click()
    page.wait_for_function("document.querySelector('.selects .plot').layout.dragmode === 'select'")
    area = page.locator(".selects .plot .nsewdrag").first.bounding_box()
    page.mouse.move(area["x"] + 2, area["y"] + 2)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] / 2, area["y"] + area["height"] - 2, steps=5)
    page.mouse.up()
    page.wait_for_function("location.search.includes('runs=')")
    page.get_by_text("runs side by side").wait_for()
    selected = page.url.split("runs=")[1].split("&")[0].split("~")
    assert 2 <= len(selected) < 12
    assert len(set(selected)) == len(selected)


def test_filters_search_sort_and_columns_live_in_the_url(filled, visit):
    page = visit(filled).open("/")
    points(page, 12)
    page.get_by_role("button", name="GPTQ", exact=True).click()
    page.wait_for_function("document.querySelectorAll('tr[data-run]').length === 4")
    page.keyboard.press("/")
    page.keyboard.type("w3")
    page.wait_for_function("document.querySelectorAll('tr[data-run]').length === 2")
    assert page.locator("[data-search]").evaluate("e => e === document.activeElement")
    assert "family=gptq" in page.url
    assert "search=w3" in page.url
    page.get_by_role("button", name="Perplexity", exact=True).click()
    page.wait_for_function("location.search.includes('sort=perplexity')")
    page.get_by_role("button", name="Show as table", exact=True).click()
    page.locator(".as-table td").first.wait_for()


def test_keys_move_between_pages_but_not_while_typing(filled, visit):
    page = visit(filled).open("/")
    page.keyboard.press("g")
    page.keyboard.press("j")
    page.wait_for_url("**/jobs*")
    page.locator(".job").first.wait_for()
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keys").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("gc")
    page.wait_for_function("location.search.includes('search=gc')")
    assert "/jobs" in page.url


def test_the_theme_is_switched_kept_and_carried_along(filled, visit):
    page = visit(filled, color_scheme="light").open("/")
    page.locator("#qa-theme").click()
    assert page.evaluate("document.body.classList.contains('dark')")
    page.get_by_role("link", name="Jobs").click()
    page.wait_for_url("**/jobs*theme=dark*")
    page.wait_for_function("document.body.classList.contains('dark')")


@pytest.mark.parametrize("width", [360, 390, 1920])
@pytest.mark.parametrize("path", ["/", "/new", "/jobs", "/run"])
def test_no_page_scrolls_sideways(path, width, filled, visit):
    visitor = visit(filled, width)
    page = visitor.open(path)
    if path == "/":
        points(page, 12)
    if path == "/run":
        visitor.open("/jobs?open=sweep:First tour")
        page.locator(".job-name a").first.click()
        page.get_by_role("heading", name="What decided it").wait_for()
    assert page.evaluate(SCREEN), page.evaluate("document.documentElement.scrollWidth")


def test_every_control_has_a_name(filled, visit):
    nameless = """() => [...document.querySelectorAll('button, a[href], input, select, textarea')]
      .filter((e) => e.offsetParent && !e.closest('[aria-hidden=true]'))
      .filter((e) => !(e.textContent.trim() || e.getAttribute('aria-label') || e.title
                       || (e.labels && e.labels.length)))
      .map((e) => e.outerHTML.slice(0, 120))"""
    visitor = visit(filled)
    for path in ("/", "/new?recipes=gptq(bits=4)&edit=0", "/jobs"):
        assert visitor.open(path).evaluate(nameless) == []
