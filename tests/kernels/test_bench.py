"""The bench checks before it times, and reports spread."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import bench, ceilings, contest, kv_decode, timing
from kernels.base import Case, kernels
from kernels.integers import int_format
from kernels.kv_decode import bench as attention


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
    monkeypatch.setattr(timing, "interleaved", lambda calls: dict.fromkeys(calls, times))


def test_a_right_kernel_is_timed_against_bf16(monkeypatch):
    steady(monkeypatch)
    dense, row = bench.measure(kernels()["int_cpu"], CASE, (2,), torch.device("cpu"))
    assert (dense["kernel"], dense["ratio_to_bf16"], dense["weight_bytes"]) == ("bf16", 1, 16384)
    assert row["correct"]
    assert row["m"] == 2
    assert row["median_ms"] == 2.0
    assert row["ratio_to_bf16"] == 1
    assert "1.00x bf16" in contest.line(row)


def test_times_are_really_taken(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    _, row = bench.measure(kernels()["int_cpu"], CASE, (1,), torch.device("cpu"))
    assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]


def test_an_unsteady_time_is_compared_with_nothing(monkeypatch):
    steady(monkeypatch, is_steady=False)
    _, row = bench.measure(kernels()["int_cpu"], CASE, (1,), torch.device("cpu"))
    assert row["ratio_to_bf16"] is None
    assert row["steady"] is False
    assert "unsteady: no result" in contest.line(row)


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    kernel = kernels()["int_cpu"]
    right = kernel.matmul
    monkeypatch.setattr(kernel, "matmul", lambda x, packed: 2 * right(x, packed), raising=False)
    (row,) = bench.measure(kernel, CASE, (2,), torch.device("cpu"))
    assert not row["correct"]
    assert row["median_ms"] is None
    assert "not timed" in contest.line(row)


ATTENTION = [f"kv_decode {name}" for name in ("kivi2 g32", "kivi4 g32", "int8", "int4 g32")]
CACHED = {"batch": 2, "tokens": 160, "device": torch.device("cpu")}


def test_attention_on_packed_caches_is_timed_against_bf16(monkeypatch):
    steady(monkeypatch)
    dense, *rows = attention.measure(**CACHED)
    assert (dense["kernel"], dense["weight"]) == ("sdpa", {"kind": "bf16"})
    assert dense["weight_bytes"] == 2 * 160 * 2048 * 2
    assert [contest.line(row).split(" m=")[0] for row in rows] == ATTENTION
    for row in [dense, *rows]:
        assert (row["m"], row["n"], row["k"]) == (2, 160, 2048)
        assert row["correct"]
        assert row["ratio_to_bf16"] == 1
    assert all(row["weight_bytes"] < dense["weight_bytes"] for row in rows)


def test_wrong_attention_gets_no_time(monkeypatch):
    steady(monkeypatch)
    right = attention.decode
    monkeypatch.setattr(attention, "decode", lambda *a, **how: 2 * right(*a, **how))
    rows = list(attention.measure(**CACHED))
    assert [row["median_ms"] for row in rows] == [None] * len(attention.CACHES)
    assert not any(row["correct"] for row in rows)


@pytest.mark.parametrize("form", attention.CACHES, ids=contest.words)
def test_bf16_attention_is_what_the_packed_one_is_checked_against(form):
    cache = attention.example(form, 2, 160, torch.Generator().manual_seed(0))
    q = torch.randn(2, 32, 128, generator=torch.Generator().manual_seed(1))
    both = torch.stack([side.read(0, 160).float() for side in cache])  # [2, B, H, n, D]
    expected = kv_decode.reference(q, *cache, scaling=128**-0.5)
    assert contest.relative_error(attention.in_bf16(q, both), expected) < 1e-5
    gqa = torch.nn.functional.scaled_dot_product_attention(
        q.double().unsqueeze(2), *both.double(), enable_gqa=True
    )
    torch.testing.assert_close(expected, gqa.squeeze(2))  # float64 both


@pytest.mark.parametrize("form", attention.CACHES, ids=contest.words)
def test_caches_of_the_bench_take_the_triton_kernel(form):
    for places in attention.PLACES.values():
        assert all((tokens - form["newest"]) % 32 == 0 for _, tokens in places)
    cache = attention.example(form, 1, 160, torch.Generator())
    assert kv_decode.why_not_triton(*cache) is None
    assert all(side.count == 160 for side in cache)
    for axis in (form["keys"], "token"):
        assert kv_decode.why_not_held(form, axis, attention.DIM) is None


def test_parts_are_weights_and_caches_in_order(monkeypatch):
    device = torch.device("cpu")
    abouts = [p.about for p in bench.parts(["int_cpu"], [(64, 128)], (1,), device)]
    assert abouts[0] == "int_cpu, int4 g128, 64 x 128"
    assert not any("kv_decode" in about for about in abouts)
    (part,) = bench.parts(["kv_decode"], [], (), device)[:1]
    assert part.about == "kv_decode, 1 x 1024 tokens"
    assert set(kernels()) < set(bench.known())
    monkeypatch.setitem(attention.PLACES, "cpu", ((1, 160),))
    monkeypatch.setattr(bench, "ceilings", lambda device: iter(()))
    monkeypatch.setattr(timing, "ROUNDS", 2)
    rows = list(bench.bench(["kv_decode"], device=device))
    assert [row["kernel"] for row in rows] == ["sdpa", *["kv_decode"] * 4]
    assert all(row["median_ms"] > 0 for row in rows)


def test_copies_go_past_the_cache_and_take_turns():
    made = timing.copies(torch.zeros(4), torch.Tensor.clone, 50_000_000, torch.device("cpu"))
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
        assert contest.words(case.weight, case.act)
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
    assert "GB/s" in contest.line(rows[0])
