"""Measured configurations: which row a shape takes, and that the interpreter takes none."""

from __future__ import annotations

import torch

from kernels import tables


def row(version, m=16, splits=1, **key):
    return {
        "device": "NVIDIA H200",
        "triton": version,
        "m": m,
        **key,
        "config": {"splits": splits},
        "median_us": 4.6,
    }


def test_the_row_of_this_version_wins_wherever_it_stands():
    rows = [row("3.6.0", splits=2, n=64), row("3.7.1", splits=4, n=64), row("3.5.0", n=64)]
    key = tables.row_key("NVIDIA H200", rows[0])
    assert tables.by_key(rows, "3.7.1") == {key: {"splits": 4}}
    assert tables.by_key(rows, "3.6.0") == {key: {"splits": 2}}
    assert tables.by_key(rows, "3.8.0") == {key: {"splits": 1}}  # the last of another version


def test_only_what_changes_the_code_is_told_apart():
    plain, rounded = (row("3.7.1", n=64, rounded=r) for r in (False, True))
    assert len(tables.by_key([plain, rounded], "3.7.1")) == 2
    assert tables.row_key("a", {**plain, "median_us": 9}) == tables.row_key("a", plain)


def test_m_is_looked_up_as_the_next_that_was_measured():
    assert [tables.bucket(m) for m in (1, 3, 16, 17, 256, 9000)] == [1, 4, 16, 32, 256, 256]


def test_a_shipped_table_does_not_reach_the_interpreter(monkeypatch):
    monkeypatch.setattr(tables, "table", lambda *_: {None: {}})
    assert tables.configured("w_a16", torch.device("cpu"), 1, n=64, k=64) is None
