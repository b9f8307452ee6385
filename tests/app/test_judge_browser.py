"""The Judge page in Chromium: from an endpoint's address to what the judge said."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from test_browser import CHROMIUM, SCREEN, Serving, chromium, visit

sys.path.insert(0, str(Path(__file__).parents[1] / "backend"))

from judge_server import judge_server

from app.__main__ import main

__all__ = ["chromium", "visit"]  # fixtures

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[str]:
    """A server on a home with two runs of the bundled model."""
    home = tmp_path_factory.mktemp("judged")
    recipe = ["--recipe", "rtn(bits=2)", "--metrics", "size", "--device", "cpu"]
    assert main(["run", "--model", "demo", *recipe, "--home", str(home)]) == 0
    serving = Serving(home)
    yield serving.url
    serving.stop()


def test_a_judge_is_asked_from_the_page(made, visit):
    with judge_server("Fine <i>enough</i>. Rating: [[7]]") as server:
        page = visit(made).open(f"/judge?model=demo&limit=3&max_new=8&url={quote(server.url)}")
        page.get_by_label("Model", exact=True).and_(page.locator("#j-name")).fill("stand-in")
        page.locator("#j-key").select_option("none")
        page.get_by_role("button", name="Start judging").click()
        page.get_by_text("stand-in is asked up to").wait_for()
        assert not server.requests
        page.get_by_role("button", name="Yes, start").click()
        page.wait_for_url("**/judge?id=*")
        page.locator(".verdict").first.wait_for(timeout=120_000)
        page.get_by_role("heading", name="Grades", exact=True).wait_for()
        page.locator(".state", has_text="done").wait_for(timeout=120_000)
        assert "Fine <i>enough</i>" in page.locator(".verdict pre").first.inner_text()
        assert page.locator(".verdict pre i").count() == 0
        page.keyboard.press("/")
        page.keyboard.type("no such words")
        page.get_by_text("No verdict is like that").wait_for()
        page.set_viewport_size({"width": 360, "height": 800})
        page.wait_for_function(SCREEN)
