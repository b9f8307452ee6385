"""Summaries of weights and inputs: closed forms, bounds on size, and what survives a kill."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from backend import statistics
from backend.model.checkpoint import Checkpoint
from backend.model.families import blocks_of
from backend.pipeline import Cancelled, quantize
from backend.recipes import parse
from backend.statistics import BINS, CHANNELS, Linear, read, summarize

SMOOTH = "smoothquant+rtn(bits=8,symmetric=true)+activations(bits=8,symmetric=true)"


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(0))


def test_numbers_of_a_small_matrix_are_those_of_numpy():
    matrix = torch.randn(97, 13, generator=torch.Generator().manual_seed(1)) ** 3
    found, own = summarize(matrix), matrix.double().numpy()
    centred = own - own.mean()
    assert found.numbers["std"] == pytest.approx(own.std(), rel=1e-5)
    kurtosis = (centred**4).mean() / own.var() ** 2 - 3
    assert found.numbers["kurtosis"] == pytest.approx(kurtosis, rel=1e-4)
    assert found.peaks.tolist() == matrix.abs().amax(0).tolist()
    reach = matrix.abs().max().item()
    by_numpy = np.histogram(matrix.numpy(), BINS, (-reach, reach))[0]
    assert np.abs(found.counts.numpy() - by_numpy).sum() <= 4  # values on an edge, in fp32


def test_a_uniform_and_a_two_valued_matrix_have_their_textbook_kurtosis():
    uniform = torch.linspace(-1, 1, 100_000).view(1000, 100)
    assert summarize(uniform).numbers["kurtosis"] == pytest.approx(-1.2, abs=1e-3)
    signs = torch.tensor([[1.0, -1.0]]).repeat(50, 1)
    assert summarize(signs).numbers["kurtosis"] == pytest.approx(-2, abs=1e-6)


def test_zeros_and_huge_and_infinite_values_are_no_error():
    zeros = summarize(torch.zeros(8, 5))
    assert int(zeros.counts[BINS // 2]) == int(zeros.counts.sum()) == 40
    assert math.isnan(zeros.numbers["kurtosis"])
    huge = summarize(torch.randn(64, 8, generator=torch.Generator().manual_seed(2)) * 1e30)
    assert math.isfinite(huge.numbers["kurtosis"])
    broken = torch.ones(4, 4)
    broken[0, 0], broken[1, 1] = math.inf, math.nan
    assert summarize(broken).numbers["not_finite"] == 2
    assert int(summarize(broken).counts.sum()) == 16


@pytest.mark.parametrize("k", [1, 255, 256, 257, 1000, 14336])
def test_pools_are_neighbours_and_keep_the_largest(k):
    matrix = torch.rand(3, k, generator=torch.Generator().manual_seed(k))
    found = summarize(matrix, tokens=2)
    pool = int(found.numbers["pool"])
    by_hand = [matrix[:, at : at + pool].max().item() for at in range(0, k, pool)]
    assert found.peaks.tolist() == by_hand
    assert len(by_hand) <= CHANNELS
    assert found.surface.shape == (2, len(by_hand))


def linear_of(folder, block: int, name: str) -> Linear:
    found = read(folder, block, name)
    assert found is not None
    return found


def test_smoothing_shows_in_the_inputs_and_nothing_else_is_lost(make_model, ids, tmp_path):
    model = make_model("llama")
    model.model.layers[1].input_layernorm.weight.data[5] *= 60
    before = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    measured = []
    quantize(
        model,
        parse(SMOOTH),
        ids,
        Checkpoint(tmp_path / "blocks"),
        measure=measured.append,
        statistics=tmp_path / "s",
    )
    assert statistics.blocks_in(tmp_path / "s") == [0, 1, 2]
    found = linear_of(tmp_path / "s", 1, "self_attn.q_proj").summaries
    assert set(found) == {(w, m) for w in ("weights", "inputs") for m in ("before", "after")}
    np.testing.assert_array_equal(found["weights", "before"].peaks, before.abs().amax(0).numpy())
    then, now = found["inputs", "before"].peaks, found["inputs", "after"].peaks
    assert then.argmax() == 5
    assert then[5] > 15 * np.median(then)
    assert now.max() < 8 * np.median(now)
    shared = linear_of(tmp_path / "s", 1, "self_attn.v_proj").summaries
    np.testing.assert_array_equal(shared["inputs", "after"].peaks, now)
    surface = found["inputs", "before"].surface
    assert surface.shape == (statistics.TOKENS, 64)
    assert (surface.max(0) <= then * 1.001 + 1e-6).all()  # the first of the 192 tokens in `then`
    assert surface.max() > 0.5 * then.max()
    kurtosis = {m.name: m.value for m in measured if m.layer == (1, "self_attn.q_proj")}
    assert kurtosis["input_kurtosis_before"] > 3 * abs(kurtosis["input_kurtosis_after"])


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox", "phi3", "gemma2"])
def test_every_linear_of_every_family_has_all_four(kind, make_model, ids, tmp_path):
    model = make_model(kind)
    quantize(model, parse("rtn(bits=4)"), ids, Checkpoint(tmp_path / "b"), statistics=tmp_path)
    for block in blocks_of(model):
        assert statistics.modules_in(tmp_path, block.index) == list(block.linears())
        for name in block.linears():
            assert len(linear_of(tmp_path, block.index, name).summaries) == 4, name


def test_without_tokens_there_are_weights_only(make_model, tmp_path):
    quantize(
        make_model("llama"),
        parse("rtn(bits=4)"),
        None,
        Checkpoint(tmp_path / "b"),
        statistics=tmp_path,
    )
    found = linear_of(tmp_path, 0, "mlp.up_proj").summaries
    assert set(found) == {("weights", "before"), ("weights", "after")}


def test_gathering_changes_no_number(make_model, ids, tmp_path):
    plain, watched = make_model("llama"), make_model("llama")
    quantize(plain, parse(SMOOTH), ids, Checkpoint(tmp_path / "a"))
    quantize(watched, parse(SMOOTH), ids, Checkpoint(tmp_path / "b"), statistics=tmp_path / "s")
    assert torch.equal(plain(ids).logits, watched(ids).logits)


def test_a_resumed_walk_keeps_what_was_there_and_equals_an_unbroken_one(make_model, ids, tmp_path):
    whole, first = [], []
    quantize(
        make_model("llama"),
        parse(SMOOTH),
        ids,
        Checkpoint(tmp_path / "a"),
        statistics=tmp_path / "whole",
        measure=whole.append,
    )
    stop = [False]
    with pytest.raises(Cancelled):
        quantize(
            make_model("llama"),
            parse(SMOOTH),
            ids,
            Checkpoint(tmp_path / "b"),
            statistics=tmp_path / "parts",
            measure=first.append,
            progress=lambda block, *_: stop.__setitem__(0, block == 2),
            should_stop=lambda: stop[0],
        )
    assert statistics.blocks_in(tmp_path / "parts") == [0, 1]
    stamp = statistics.path_of(tmp_path / "parts", 0).stat().st_mtime_ns
    quantize(
        make_model("llama"),
        parse(SMOOTH),
        ids,
        Checkpoint(tmp_path / "b"),
        statistics=tmp_path / "parts",
        measure=first.append,
    )
    assert statistics.path_of(tmp_path / "parts", 0).stat().st_mtime_ns == stamp
    for block in range(3):
        names = (statistics.path_of(tmp_path / part, block) for part in ("whole", "parts"))
        one, other = (path.read_bytes() for path in names)
        assert one == other

    def cumulative(measured):
        return {m.layer: m.value for m in measured if m.name == "cumulative_sqnr"}

    assert cumulative(first) == cumulative(whole)


def test_cumulative_error_is_the_distance_to_the_16_bit_model(make_model, ids, tmp_path):
    plain, model, measured = make_model("llama"), make_model("llama"), []
    one = ids[:1]
    quantize(model, parse("rtn(bits=3)"), one, Checkpoint(tmp_path), measure=measured.append)
    exact = plain(one, output_hidden_states=True).hidden_states[1]  # after block 0
    rounded = model(one, output_hidden_states=True).hidden_states[1]
    noise = 10 * math.log10(exact.square().sum() / (exact - rounded).square().sum())
    found = {m.layer[0]: m.value for m in measured if m.name == "cumulative_sqnr"}
    assert found[0] == pytest.approx(noise, abs=1e-2)
    assert set(found) == {0, 1, 2}


def test_files_of_a_wide_block_stay_small(make_model, ids, tmp_path):
    model = make_model("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=1)
    long = ids.repeat(1, 4)
    quantize(model, parse("rtn(bits=4)"), long, Checkpoint(tmp_path / "b"), statistics=tmp_path)
    assert statistics.path_of(tmp_path, 0).stat().st_size < 20e6 / 32


def test_what_cannot_be_read_is_none(tmp_path):
    assert statistics.blocks_in(tmp_path / "nowhere") == []
    (tmp_path / "000.safetensors").write_bytes(b"torn")
    assert read(tmp_path, 0, "x") is None
    assert statistics.modules_in(tmp_path, 0) == []
    assert read(tmp_path, 7, "x") is None
