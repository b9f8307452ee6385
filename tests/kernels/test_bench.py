"""The bench checks before it times, and reports spread."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import bench, ceilings, timing
from kernels.base import Case, kernels
from kernels.integers import int_format


def test_summary_is_median_and_fifths():
    found = timing.summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median_ms, found.p20_ms, found.p80_ms, found.runs) == (3.0, 1.8, 4.2, 5)
    assert not found.steady
    assert timing.summary([1.0] * 5).steady


def test_every_function_gets_every_round_and_its_number():
    calls = {"a": [], "b": []}
    found = timing.interleaved({n: calls[n].append for n in calls}, rounds=4)
    assert calls == {"a": [0, 0, 1, 2, 3], "b": [0, 0, 1, 2, 3]}  # the first is a warm-up
    assert {t.runs for t in found.values()} == {4}


CASE = Case(1, 64, 128, int_format(bits=4, group=32))


def steady(monkeypatch, is_steady=True):
    spread = 0.0 if is_steady else 9.0
    times = timing.Timing(2.0, 2.0, 2.0 + spread, 30)
    monkeypatch.setattr(bench, "interleaved", lambda calls: dict.fromkeys(calls, times))


def test_a_right_kernel_is_timed_against_bf16(monkeypatch):
    steady(monkeypatch)
    dense, row = bench.measure(kernels()["int_cpu"], CASE, (2,), torch.device("cpu"))
    assert (dense["kernel"], dense["ratio_to_bf16"], dense["weight_bytes"]) == ("bf16", 1, 16384)
    assert row["correct"]
    assert row["m"] == 2
    assert row["median_ms"] == 2.0
    assert row["ratio_to_bf16"] == 1
    assert "1.00x bf16" in bench.line(row)


def test_times_are_really_taken(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    _, row = bench.measure(kernels()["int_cpu"], CASE, (1,), torch.device("cpu"))
    assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]


def test_an_unsteady_time_is_compared_with_nothing(monkeypatch):
    steady(monkeypatch, is_steady=False)
    _, row = bench.measure(kernels()["int_cpu"], CASE, (1,), torch.device("cpu"))
    assert row["ratio_to_bf16"] is None
    assert row["steady"] is False
    assert "unsteady: no result" in bench.line(row)


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    kernel = kernels()["int_cpu"]
    right = kernel.matmul
    monkeypatch.setattr(kernel, "matmul", lambda x, packed: 2 * right(x, packed), raising=False)
    (row,) = bench.measure(kernel, CASE, (2,), torch.device("cpu"))
    assert not row["correct"]
    assert row["median_ms"] is None
    assert "not timed" in bench.line(row)


def test_copies_go_past_the_cache_and_take_turns():
    made = bench.copies(torch.zeros(4), torch.Tensor.clone, 50_000_000, torch.device("cpu"))
    assert len({t.data_ptr() for t in made}) == 3
    seen = []
    call = timing.InTurn(lambda x, held: seen.append(held), None, ["a", "b"])
    for number in range(3):
        call(number)
    assert seen == ["a", "b", "a"]


@pytest.mark.parametrize("name", sorted(kernels()))
def test_every_kernel_has_something_to_time_where_it_runs(name):
    kernel = kernels()[name]
    devices = [torch.device(kind) for kind in ("cpu", "cuda")]
    found = [case for device in devices for case in bench.settings(kernel, device)]
    assert found
    for case in found:
        assert bench.words(case.weight, case.act)
        codes, params = kernel.example(replace(case, n=32, k=256), torch.Generator())
        assert codes.shape[0] == 32
        assert all(isinstance(value, torch.Tensor) for value in params.values())


def test_ceilings_are_above_zero_and_name_their_units(monkeypatch):
    monkeypatch.setitem(ceilings.SIDE, "cpu", 64)
    monkeypatch.setitem(ceilings.READ, "cpu", 1 << 16)
    rows = list(ceilings.ceilings(torch.device("cpu")))
    assert [(r["ceiling"], r["unit"]) for r in rows] == [
        ("read", "GB/s"),
        ("bf16 product", "TFLOP/s"),
    ]
    assert all(r["value"] > 0 for r in rows)
    assert "GB/s" in bench.line(rows[0])
