"""The bench checks before it times, and reports spread."""

from __future__ import annotations

import torch

from kernels import bench, timing
from kernels.base import Case, kernels
from kernels.integers import int_format


def test_summary_is_median_and_fifths():
    found = timing.summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median_ms, found.p20_ms, found.p80_ms, found.runs) == (3.0, 1.8, 4.2, 5)
    assert not found.steady
    assert timing.summary([1.0] * 5).steady


def test_every_function_gets_every_round():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    found = timing.interleaved({n: lambda n=n: count(n) for n in calls}, rounds=4)
    assert calls == {"a": 5, "b": 5}  # one of them a warm-up
    assert {t.runs for t in found.values()} == {4}


CASE = Case(2, 64, 128, int_format(bits=4, group=32))


def test_a_right_kernel_is_timed_against_bf16():
    row = bench.measure(kernels()["int_cpu"], CASE, torch.device("cpu"))
    assert row["correct"]
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["ratio_to_bf16"] > 0
    assert "x bf16" in bench.line(row)


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    kernel = kernels()["int_cpu"]
    right = kernel.matmul
    monkeypatch.setattr(kernel, "matmul", lambda x, packed: 2 * right(x, packed), raising=False)
    row = bench.measure(kernel, CASE, torch.device("cpu"))
    assert not row["correct"]
    assert row["median_ms"] is None
    assert "not timed" in bench.line(row)
