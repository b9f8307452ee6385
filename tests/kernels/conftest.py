"""Which path a CPU takes: with table_cpu.c, as this machine has it, or without."""

from __future__ import annotations

import pytest

from kernels import table_cpu


@pytest.fixture
def without_c(monkeypatch):
    """As where there is no compiler or no AVX-512: weights lie as on a GPU, plain torch expands."""
    monkeypatch.setattr(table_cpu, "enough", lambda: False)
