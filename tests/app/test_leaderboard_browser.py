"""The leaderboard in Chromium: filters and permalink, column groups, charts as tables, tabs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import seeded
import seeded_votes
from test_browser import CHROMIUM, SCREEN, Serving, Visitor, chromium, visit

__all__ = ["chromium", "visit"]  # fixtures

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
ROWS = "document.querySelectorAll('.board tbody tr[data-key]').length"
DRAWN = "document.querySelectorAll('.board-chart .js-plotly-plot').length >= 5"


@pytest.fixture(scope="module")
def voted(tmp_path_factory) -> Iterator[str]:
    """A server on a home with results and votes."""
    home = tmp_path_factory.mktemp("voted")
    seeded.fill(home)
    store = seeded.store_of(home)
    votes = seeded_votes.cast(home, store)
    votes.cast_all(seeded_votes.imported())
    store.close()
    serving = Serving(home)
    yield serving.url
    serving.stop()


def opened(visitor: Visitor, path: str = "/leaderboard") -> Any:
    page = visitor.open(path)
    page.wait_for_selector(".board tbody tr")
    return page


def headline(page: Any) -> str:
    return str(page.locator(".headline").inner_text())


def test_filters_make_a_permalink(voted, visit):
    page = opened(visit(voted))
    everything = headline(page)
    page.locator("select[data-param=category]").select_option("facts")
    page.wait_for_function("document.querySelector('.board-facts b').textContent === '200 votes'")
    page.get_by_role("button", name="Same style").click()
    page.wait_for_function("location.search.includes('style=1')")
    page.get_by_text("Same style: as if").wait_for()
    page.locator("select[data-param=interval]").select_option("bootstrap")
    page.get_by_text("bootstrap, 500 rounds").wait_for()
    page.get_by_role("group", name="Column groups").get_by_role("button", name="Cost").click()
    page.wait_for_function("!document.querySelector('.board').textContent.includes('Bits/weight')")
    page.keyboard.press("/")
    page.keyboard.type("gptq")
    page.wait_for_function(f"{ROWS} === 3")
    page.get_by_role("button", name="Perplexity").click()
    page.wait_for_function("location.search.includes('sort=perplexity')")
    page.locator("th[aria-sort=ascending]", has_text="Perplexity").wait_for()
    shown = page.locator(".board tbody").inner_text()
    address = page.url
    for part in ("category=facts", "style=1", "interval=bootstrap", "hide=cost", "search=gptq"):
        assert part in address

    other = opened(visit(voted), address.removeprefix(voted))
    other.wait_for_function(f"{ROWS} === 3")
    assert other.locator(".board tbody").inner_text() == shown
    assert other.locator("select[data-param=category]").input_value() == "facts"
    assert headline(other) == headline(page)
    for _ in range(12):  # back to where it began, one step per choice
        if "category" not in page.url:
            break
        page.go_back()
    page.wait_for_function("document.querySelector('.board-facts b').textContent === '600 votes'")
    assert headline(page) == everything


def test_charts_are_drawn_and_turn_into_tables(voted, visit):
    page = opened(visit(voted))
    page.wait_for_function(DRAWN)
    labels = page.locator(".board-chart .plot").evaluate_all(
        "boxes => boxes.map((box) => box.getAttribute('aria-label'))"
    )
    assert all(label.endswith(".") for label in labels)
    page.get_by_role("button", name="Win fraction: show as table").click()
    page.locator(".win_fraction .as-table td").first.wait_for()
    assert "tables=win_fraction" in page.url
    assert not page.locator(".win_fraction .plot").is_visible()
    page.get_by_role("button", name="Without ties").click()
    page.wait_for_function("location.search.includes('ties=without')")


def test_tabs_keep_published_and_imported_apart(voted, visit):
    page = opened(visit(voted))
    page.get_by_role("button", name="Published results").click()
    page.get_by_role("heading", name="Published results, measured elsewhere").wait_for()
    assert page.url.endswith("tab=published")
    page.locator("select[data-param=printed]").select_option("OPT-125M")
    page.wait_for_function("document.querySelectorAll('.published-table tbody tr').length === 15")
    assert not page.locator(".board-chart").first.is_visible()
    page.get_by_role("button", name="Imported battles").click()
    page.get_by_text("gamma-70b").first.wait_for()
    assert "Perplexity" not in page.locator(".board").inner_text()
    page.go_back()
    page.get_by_role("heading", name="Published results, measured elsewhere").wait_for()


def test_files_come_as_links(voted, visit):
    page = opened(visit(voted), "/leaderboard?search=gptq")
    page.wait_for_function(f"{ROWS} === 3")
    with page.expect_download() as waiting:
        page.locator(".table-tools").get_by_role("link", name="CSV").click()
    lines = waiting.value.path().read_text().splitlines()
    assert len(lines) == 1 + 3
    with page.expect_download() as waiting:
        page.locator(".board-facts").get_by_role("link", name="JSON").click()
    assert waiting.value.suggested_filename == "quantarena-battles.json"


@pytest.mark.parametrize("width", [360, 768, 1920])
@pytest.mark.parametrize("path", ["/leaderboard", "/leaderboard?tab=published"])
def test_the_page_never_scrolls_sideways(voted, visit, path, width):
    page = opened(visit(voted, width), path)
    if path == "/leaderboard":
        page.wait_for_function(DRAWN)
    assert page.evaluate(SCREEN), page.evaluate("document.documentElement.scrollWidth")


def test_keys_lead_here_and_every_control_has_a_name(voted, visit):
    visitor = visit(voted)
    page = visitor.open("/jobs")
    page.keyboard.press("g")
    page.keyboard.press("l")
    page.wait_for_url("**/leaderboard*")
    page.wait_for_selector(".board tbody tr")
    nameless = """() => [...document.querySelectorAll('button, a[href], input, select')]
      .filter((e) => e.offsetParent && !e.closest('[aria-hidden=true]'))
      .filter((e) => !(e.textContent.trim() || e.getAttribute('aria-label') || e.title
                       || (e.labels && e.labels.length)))
      .map((e) => e.outerHTML.slice(0, 120))"""
    assert page.evaluate(nameless) == []
