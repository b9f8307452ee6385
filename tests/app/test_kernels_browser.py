"""A person in Chromium reads the Kernels page, Compare's memory card and a run's needles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import seeded
from test_browser import CHROMIUM, SCREEN, Serving, chromium, visit
from test_kv_views import fill as fill_caches

__all__ = ["chromium", "visit"]  # fixtures

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

DRAWN = """(card) => [...document.querySelectorAll(card + ' .plot')]
  .every((p) => p.dataset.drawn && p.querySelector('.main-svg').clientWidth <= p.clientWidth + 1)"""


@pytest.fixture(scope="module")
def serving(tmp_path_factory) -> Iterator[tuple[str, str]]:
    home = tmp_path_factory.mktemp("kernels")
    runs = seeded.fill(home)
    seeded.bench(home)
    server = Serving(home)
    yield server.url, runs[-1]
    server.stop()


@pytest.fixture(scope="module")
def caching(tmp_path_factory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("caches")
    fill_caches(home)
    server = Serving(home)
    yield server.url
    server.stop()


@pytest.mark.parametrize("width", [360, 1440])
def test_the_kernels_page_fits_and_its_choices_are_in_the_address(width, serving, visit):
    page = visit(serving[0], width).open("/kernels?theme=dark")
    page.get_by_role("heading", name="INT4 g128 (int_cpu) is 4.0 times as fast").wait_for()
    page.wait_for_function(DRAWN, arg=".kernel-card")
    assert page.evaluate(SCREEN)
    page.get_by_label("Shape that the charts show").select_option("4096x4096")
    page.get_by_text("Quickest for weights of 4\u2009096").wait_for()
    assert "shape=4096x4096" in page.url
    page.get_by_role("button", name="Roofline: show as table").click()
    page.get_by_role("columnheader", name="FLOP per byte").wait_for()
    assert "tables=roofline" in page.url
    page.reload()
    page.get_by_role("columnheader", name="FLOP per byte").wait_for()


@pytest.fixture
def empty(tmp_path) -> Iterator[str]:
    server = Serving(tmp_path)
    yield server.url
    server.stop()


def test_an_empty_page_has_a_button_and_no_empty_cards(empty, visit):
    page = visit(empty, 360).open("/kernels")
    page.get_by_role("button", name="Time kernels here").wait_for()
    page.get_by_role("heading", name="In print").wait_for()
    assert not [c for c in page.locator(".card").all() if c.is_visible() and not c.inner_text()]
    assert page.evaluate(SCREEN)


@pytest.mark.parametrize("width", [360, 1440])
def test_a_budget_is_typed_and_kept_in_the_address(width, caching, visit):
    page = visit(caching, width).open("/")
    page.get_by_role("heading", name="Memory against context").wait_for()
    page.wait_for_function(DRAWN, arg=".memory-card")
    assert page.evaluate(SCREEN)
    page.get_by_label("Memory budget, such as 4 GiB").fill("9 MiB")
    page.keyboard.press("Enter")
    page.get_by_text("In 9.00 MiB, ").wait_for()
    assert "budget=9" in page.url
    page.get_by_label("Memory budget, such as 4 GiB").fill("plenty")
    page.keyboard.press("Enter")
    page.get_by_text("“plenty” is no amount of memory").wait_for()
    page.get_by_role("heading", name="Weight bits, KV bits and context").wait_for()
    page.get_by_role("caption").first.wait_for()


@pytest.mark.parametrize("width", [360, 1440])
def test_needles_of_a_run_and_their_difference_to_another(width, serving, visit):
    url, run_id = serving
    page = visit(url, width).open(f"/run?id={run_id}")
    page.get_by_role("heading", name="Needle in a haystack").wait_for()
    page.wait_for_function(DRAWN, arg=".lessons-card")
    choice = page.get_by_label("Difference of the needles to another run")
    choice.select_option(index=1)
    page.get_by_text("blue where this run finds more").wait_for()
    assert "against=" in page.url
    assert page.evaluate(SCREEN)
