"""A person in Chromium looks into a cell of the heat map: with the mouse, by the selects, back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_browser import CHROMIUM, SCREEN, Serving, chromium, visit
from test_run_statistics import MODULE, fill

__all__ = ["chromium", "visit"]  # fixtures

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

CELL = """([x, y]) => { const box = document.querySelector('.layers-plot .plot');
  const r = box.querySelector('.nsewdrag').getBoundingClientRect(), f = box._fullLayout;
  return [r.x + f.xaxis.d2p(x), r.y + f.yaxis.d2p(y)]; }"""
DRAWN = """(count) => [...document.querySelectorAll('.values-card .plot')]
  .filter((p) => p.dataset.drawn && p.clientWidth).length === count"""
FITS = """[...document.querySelectorAll('.values-card .plot')]
  .every((p) => p.querySelector('.main-svg').getBoundingClientRect().width <= p.clientWidth + 1)"""


@pytest.fixture(scope="module")
def serving(tmp_path_factory, llama_folder) -> Iterator[tuple[str, str]]:
    home = tmp_path_factory.mktemp("statistics")
    run_id = fill(home, llama_folder)
    server = Serving(home)
    yield server.url, run_id
    server.stop()


@pytest.mark.parametrize("width", [360, 1440])
def test_a_cell_opens_and_closes(width, serving, visit):
    url, run_id = serving
    page = visit(url, width).open(f"/run?id={run_id}&theme=dark")
    page.wait_for_function("document.querySelector('.layers-plot .plot').dataset.drawn")
    assert not page.locator(".values-card .values-plots").is_visible()
    page.locator(".layers-plot .plot").first.scroll_into_view_if_needed()
    page.mouse.click(*page.evaluate(CELL, [f"{MODULE.split('.')[-1]}", "block 1"]))
    page.get_by_role("heading", name=f"{MODULE} of block 1").wait_for()
    page.wait_for_function(DRAWN, arg=6)
    assert f"block=1&module={MODULE}" in page.url
    assert page.evaluate(FITS)
    assert page.evaluate(SCREEN)

    page.get_by_label("Matrix", exact=True).select_option("mlp.down_proj")
    page.get_by_role("heading", name="mlp.down_proj of block 1").wait_for()
    page.go_back()
    page.get_by_role("heading", name=f"{MODULE} of block 1").wait_for()
    page.get_by_role("button", name="Close").click()
    page.get_by_text("Click a cell above").wait_for()
    assert "module" not in page.url
    assert not page.locator(".values-card .values-plots").is_visible()
