"""Fixtures of the job tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import stand_in
from scene import HERE, PRELOAD, Home

import backend.execute
from backend.methods import METHODS
from backend.metrics import METRICS
from jobs.launch import WarmLauncher


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in parts are known here for one test, and to the warm process it starts."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    for registry, noun in ((METHODS, "method"), (METRICS, "metric")):
        registry.load()
        for cls in stand_in.KINDS[noun]:
            monkeypatch.setitem(registry._kinds, cls.kind, cls)
    monkeypatch.setattr(backend.execute, "execute", stand_in.execute)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmLauncher]:
    """One warm process for all tests that do not end theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        launcher = WarmLauncher(tmp_path_factory.mktemp("warm"), PRELOAD)
        launcher.open()
    yield launcher
    launcher.close()


@pytest.fixture
def place(tmp_path: Path, warm: WarmLauncher) -> Iterator[Home]:
    """A home; its processes end with the test."""
    made = Home(tmp_path / "home", warm)
    yield made
    made.close()
