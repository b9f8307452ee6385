"""Bytes that a token must move, counted by hand; bandwidth; energy counters and their absence."""

from __future__ import annotations

import pytest
import torch

from backend import bandwidth, energy
from backend.metrics import METRICS
from backend.run import Run
from backend.spec import ModelRef, RunSpec


def run_of(model, tokenizer):
    return Run(RunSpec(model=ModelRef(id="-")), model, tokenizer)


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_every_weight_once_and_one_row_of_untied_embeddings(
    make_model, tokenizer, tied
):
    model = make_model("llama", tie_word_embeddings=tied)
    table = model.get_input_embeddings().weight
    everything = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    found = bandwidth.token_traffic(run_of(model, tokenizer), 10)
    unread = 0 if tied else (table.shape[0] - 1) * table.shape[1] * table.element_size()
    assert found["weights"] == sum(everything.values()) - unread
    config = model.config
    per_token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2
    assert found["cache"] == 10 * per_token


def test_a_gpu_has_its_data_sheet_and_anything_else_a_measurement(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 NVL")
    assert bandwidth.peak_of("cuda:0") == (4.8e12, "data sheet of NVIDIA H200")
    monkeypatch.setitem(bandwidth.READ_BYTES, "cpu", 1 << 20)
    bandwidth.read_bandwidth.cache_clear()
    peak = bandwidth.peak_of("cpu")
    bandwidth.read_bandwidth.cache_clear()
    assert peak.value > 1e8
    assert peak.basis.startswith("measured")


def test_bandwidth_use_is_bytes_over_time_over_the_peak(make_model, tokenizer, monkeypatch):
    from backend.metrics.speed import Generation

    monkeypatch.setattr("backend.metrics.speed.peak_of", lambda d: bandwidth.Peak(1e9, "given"))
    traffic = {"weights": 9e6, "cache": 1e6}
    monkeypatch.setattr("backend.metrics.speed.token_traffic", lambda run, context: traffic)
    metric = METRICS.build({"kind": "speed"})
    timed = [Generation(1.0, (0.02, 0.02)), Generation(1.0, (0.02, 0.02)), Generation(1.0, (0.04,))]
    found = metric.bandwidth_use(run_of(make_model("llama"), tokenizer), timed, {})
    assert found.value == pytest.approx(0.5)
    assert found.detail["weight_bytes"] == 9e6


def test_energy_is_the_difference_of_the_counters_and_survives_their_wrap(tmp_path, monkeypatch):
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):  # the last is a part of 0
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("100000000\n")
        (tmp_path / name / "energy_uj").write_text("90000000\n")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    meter = energy.Energy("cpu")
    (tmp_path / "intel-rapl:0/energy_uj").write_text("95000000\n")
    assert meter.used() == pytest.approx(5)
    (tmp_path / "intel-rapl:0/energy_uj").write_text("1000000\n")
    (tmp_path / "intel-rapl:1/energy_uj").write_text("1000000\n")
    assert meter.used() == pytest.approx(2 - 180 + 200)


def test_without_a_counter_there_is_a_reason_and_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    meter = energy.Energy("cpu")
    assert meter.used() is None
    assert meter.why_not == "the processor reports no energy"
