"""What exists is documented: every part, page, chart and command."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from app.__main__ import parser
from backend.formats import FORMATS
from backend.methods import METHODS
from backend.metrics import METRICS

DOCS = Path(__file__).parent.parent / "docs"


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command of the command line."""
    actions = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices)


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_and_a_row(name):
    command = commands()[name]
    assert f"`quantarena {name}" in (DOCS / "command-line.md").read_text()
    for action in command._actions:
        assert action.help or action.option_strings in ([], ["--seed"], ["--storage"]), action


@pytest.mark.parametrize("kind", [*METHODS.load(), *FORMATS.load()])
def test_every_method_and_format_has_a_section(kind):
    assert f"`{kind}`" in (DOCS / "methods.md").read_text()


@pytest.mark.parametrize("kind", sorted(METRICS.load()))
def test_every_metric_has_a_row(kind):
    assert f"`{kind}`" in (DOCS / "metrics.md").read_text()


def test_no_document_links_to_a_file_that_is_not_there():
    import re

    root = DOCS.parent
    for page in [*root.glob("*.md"), *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
