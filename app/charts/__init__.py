"""Charts: one file each in this folder, found by themselves. `rows` reads, `draw` is pure."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from app.context import Picks
from results_db.store import Store


@dataclass(frozen=True)
class Chart:
    """What one picture shows: as a figure, as a sentence and as a table."""

    title: str
    page: str  # name of the module in app/pages that shows it
    rows: Callable[[Store, Picks], pd.DataFrame]
    draw: Callable[[pd.DataFrame], go.Figure]
    say: Callable[[pd.DataFrame], str]  # for those who cannot see it
    columns: Callable[[pd.DataFrame], Mapping[str, str]]  # column -> heading of the table


def find() -> dict[str, Chart]:
    """{module name: its CHART} of every file in this folder."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").CHART for name in names}
