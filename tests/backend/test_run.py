"""Run: logits, generation, batches, the 16-bit model beside it, and packing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from backend import baseline as baseline_module
from backend.baseline import StoredBaseline, check_disk, fits, locked, trace_folder
from backend.formats import FORMATS
from backend.metrics import METRICS
from backend.model.families import blocks_of
from backend.model.identity import resolve
from backend.model.quant_linear import QuantLinear
from backend.pipeline import Cancelled
from backend.recipes import parse
from backend.run import Run, choose
from backend.spec import RunSpec


def run_of(model, tokenizer, **knobs) -> Run:
    return Run(RunSpec(model={"id": "tiny"}), model, tokenizer, **knobs)


def text_spec(folder: Path, text: Path, *kinds: str, **knobs) -> RunSpec:
    metrics = [{"kind": k, "dataset": f"file:{text}", "window": 64, "limit": 6} for k in kinds]
    return resolve(RunSpec(model={"id": str(folder)}, metrics=metrics, **knobs))


@pytest.fixture
def run(make_model, tokenizer) -> Run:
    return run_of(make_model(), tokenizer)


# -- the model -----------------------------------------------------------------------------------


def test_logits_are_of_one_independent_pass(run):
    ids = torch.randint(256, (3, 17))
    logits = run.logits(ids)
    assert logits.shape == (3, 17, run.vocabulary)
    alone = torch.cat([run.logits(row[None]) for row in ids])
    assert (logits - alone).abs().max() < 1e-4
    assert not logits.requires_grad


def test_greedy_generation_equals_full_passes(run):
    ids = torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(3))
    whole = ids
    for _ in range(12):
        whole = torch.cat([whole, run.logits(whole)[:, -1].argmax(-1, keepdim=True)], 1)
    assert list(run.generate(ids, max_new=12, ignore_end=True)) == whole[0, 9:].tolist()


def test_generation_stops_before_an_end_token(run, monkeypatch):
    ids = torch.randint(256, (1, 9))
    free = list(run.generate(ids, max_new=8, ignore_end=True))
    monkeypatch.setattr(run, "end_tokens", lambda: {free[3]})
    assert list(run.generate(ids, max_new=8)) == free[: free.index(free[3])]


def test_generation_stops_where_the_context_is_full(run):
    ids = torch.randint(256, (1, run.context - 3))
    assert len(list(run.generate(ids, max_new=10, ignore_end=True))) == 3


def test_end_tokens_are_the_tokenizers_and_the_models(run):
    run.model.generation_config.eos_token_id = [7, 8]
    assert run.end_tokens() == {7, 8, run.tokenizer.eos_token_id}


def test_sampling_repeats_with_its_seed(run):
    ids = torch.randint(256, (1, 5))
    hot = {"max_new": 20, "temperature": 5.0, "ignore_end": True}
    one, two = (list(run.generate(ids, seed=seed, **hot)) for seed in (1, 2))
    assert one == list(run.generate(ids, seed=1, **hot))
    assert one != two


def test_a_tiny_nucleus_is_greedy_and_a_full_one_follows_the_chances():
    logits = torch.tensor([0.1, 0.7, 0.2]).log()
    source = torch.Generator().manual_seed(0)
    assert {choose(logits, 1.0, 0.01, source) for _ in range(50)} == {1}
    assert {choose(logits, 1.0, 0.75, source) for _ in range(200)} == {1, 2}
    drawn = [choose(logits, 1.0, 1.0, source) for _ in range(3000)]
    share = np.bincount(drawn, minlength=3) / 3000
    assert share == pytest.approx([0.1, 0.7, 0.2], abs=4 * math.sqrt(0.25 / 3000))


# -- batches -------------------------------------------------------------------------------------


def test_batches_are_powers_of_two_within_memory(run):
    sizes = [run.batch_size(length) for length in (1, 64, 200, 256)]
    assert all(size & (size - 1) == 0 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) >= 1
    assert max(sizes) <= 16


@pytest.mark.parametrize(
    ("act", "static", "independent"),
    [
        ({"bits": 8, "symmetric": True}, False, True),
        ({"bits": 8, "symmetric": True, "per_tensor": True}, False, False),
        ({"bits": 8, "symmetric": True, "per_tensor": True}, True, True),
    ],
)
def test_one_dynamic_scale_for_all_rows_means_one_sequence_at_a_time(run, act, static, independent):
    grid = FORMATS.build({"kind": "int", **act})
    params = {"scale": torch.full((1, 1), 0.05)} if static else None
    block = run.blocks()[0]
    name, linear = next(iter(block.linears().items()))
    block.replace(name, QuantLinear.from_linear(linear, grid, params))
    assert run.rows_independent() is independent
    assert (run.batch_size(16) > 1) is independent


# -- reporting -----------------------------------------------------------------------------------


def test_progress_is_passed_on_and_cancels(run):
    seen = []
    run.on_progress = lambda *given: seen.append(given)
    run.progress(1, 4, "window 1")
    assert seen == [(1, 4, "window 1")]
    run.should_stop = lambda: True
    with pytest.raises(Cancelled):
        run.progress(2, 4)


def test_things_are_made_once(run):
    made = []
    assert [run.once("key", lambda: made.append(1) or "value") for _ in range(3)] == ["value"] * 3
    assert made == [1]


def test_windows_longer_than_the_context_are_refused(run):
    with pytest.raises(ValueError, match="257 tokens do not fit"):
        run.tokens("demo", 1, 257)


# -- the 16-bit model ----------------------------------------------------------------------------


def test_a_model_with_unchanged_weights_equals_the_baseline_exactly(llama_folder, text_file):
    spec = text_spec(llama_folder, text_file, "divergence", steps=parse("rtn"))
    opened = Run.open(spec.baseline())
    opened.spec = spec  # not the run itself: another model in the same process
    for block in opened.blocks():
        for name, linear in block.linears().items():
            block.replace(name, QuantLinear.from_linear(linear))
    found = {m.name: m.value for m in spec.metrics[0].measure(opened)}
    assert opened.baseline().how == "side by side"
    assert found["mean_kld"] == found["rms_dp"] == 0
    assert found["ppl_ratio"] == found["same_top"] == 1


def test_the_baseline_of_the_16_bit_run_is_itself(llama_folder, text_file):
    run = Run.open(text_spec(llama_folder, text_file, "divergence"))
    assert run.baseline().how == "the run itself"
    ids = torch.randint(256, (1, 10))
    assert torch.equal(run.baseline().log_probs(ids), run.logits(ids).log_softmax(-1))


def test_stored_predictions_are_the_models_in_fp16(run, tmp_path):
    stored = StoredBaseline(tmp_path, run.hash)
    ids = torch.randint(256, (3, 12))
    stored.write(ids[:2], run.logits(ids[:2]).log_softmax(-1))
    assert torch.equal(stored.missing(ids), ids[2:])
    read = stored.logits(ids[:2])
    # fp16 keeps 11 bits: log-probabilities down to -16 are off by at most 2^-8
    assert (read - run.logits(ids[:2]).log_softmax(-1)).abs().max() <= 2**-8
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match=r"is missing in .*; retry"):
        stored.logits(ids)


def test_predictions_of_other_dtypes_and_devices_lie_elsewhere(tmp_path):
    folders = {
        trace_folder(tmp_path, content, device, dtype)
        for content in ("a", "b")
        for device in ("cpu", "cuda:0")
        for dtype in ("float32", "bfloat16")
    }
    assert len(folders) == 8
    assert trace_folder(tmp_path, "a", "cuda:0", "x") == trace_folder(tmp_path, "a", "cuda:1", "x")


def test_a_trace_that_does_not_fit_on_disk_is_refused_with_numbers(tmp_path):
    check_disk(tmp_path, 1, 8, 16)
    with pytest.raises(ValueError, match=r"take 26214\.4 GB and [\d.]+ GB are free"):
        check_disk(tmp_path, 100_000, 1024, 128_000)


def test_one_writer_at_a_time(tmp_path):
    tries = []

    def waiting() -> None:
        tries.append(1)
        if len(tries) == 3:
            raise Cancelled

    with locked(tmp_path / "x", waiting):
        with pytest.raises(Cancelled), locked(tmp_path / "x", waiting, poll_s=0):
            raise AssertionError("two writers in one folder")
    with locked(tmp_path / "x", waiting):
        assert len(tries) == 3


def test_fits_counts_copies_against_free_memory(monkeypatch):
    monkeypatch.setattr(baseline_module, "free_bytes", lambda device: 1000)
    assert fits(400, 2, "cpu")
    assert not fits(401, 2, "cpu")


# -- packing -------------------------------------------------------------------------------------


def test_a_missing_block_is_named(llama_folder, text_file, tmp_path):
    spec = text_spec(llama_folder, text_file, "perplexity", steps=parse("rtn"))
    with pytest.raises(ValueError, match="block 0 is missing"):
        Run.open(spec, blocks=tmp_path)


def test_perplexity_does_not_depend_on_the_batch(llama_folder, text_file, monkeypatch):
    spec = text_spec(llama_folder, text_file, "perplexity")
    values = []
    for size in (1, 4):
        run = Run.open(spec)
        monkeypatch.setattr(run, "batch_size", lambda length, size=size: size)
        (found,) = spec.metrics[0].measure(run)
        values.append(found.value)
        assert found.n == 6 * 63
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_metrics_on_the_same_windows_run_the_model_once(llama_folder, text_file, monkeypatch):
    spec = text_spec(llama_folder, text_file, "divergence", "perplexity")
    run, passes = Run.open(spec), []
    logits = run.logits
    monkeypatch.setattr(run, "logits", lambda ids: passes.append(len(ids)) or logits(ids))
    divergence, perplexity = spec.metrics
    found = {m.name: m for m in divergence.measure(run)}
    before = len(passes)
    (ppl,) = perplexity.measure(run)
    assert len(passes) == before
    statistics = found["mean_kld"].detail["statistics"]
    assert ppl.value == pytest.approx(statistics["perplexity"], rel=1e-12)


def test_bos_in_each_window_replaces_its_first_token(llama_folder, text_file):
    spec = text_spec(llama_folder, text_file, "perplexity")
    run = Run.open(spec)
    plain = spec.metrics[0].windows(run)
    metric = METRICS.build({**spec.metrics[0].data(), "bos": "each_window"})
    each = metric.windows(run)
    assert each[:, 0].tolist() == [run.tokenizer.bos_token_id] * 6
    assert torch.equal(each[:, 1:], plain[:, 1:])
    assert metric.data_hash(run) != spec.metrics[0].data_hash(run)
    run.tokenizer.bos_token = None
    again = METRICS.build({**metric.data(), "limit": 5})
    with pytest.raises(ValueError, match="no BOS"):
        again.windows(run)


def test_blocks_are_the_models(run):
    assert [block.index for block in run.blocks()] == [b.index for b in blocks_of(run.model)]
