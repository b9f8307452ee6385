"""Magnitude pruning against sorting, and how pruned weights are stored."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from backend import recipes
from backend.formats import FORMATS
from backend.formats.int_group import IntGroup
from backend.layer import quantize_layer
from backend.methods.pruning import least, least_of_buckets
from backend.model.quant_linear import LINEARS, PLAIN_BITS
from backend.model.sparse_linear import SparseLinear, keep_from_places, place_bits, places_of


def weights(n: int = 24, k: int = 64, seed: int = 0) -> Tensor:
    """[n, k] fp32 that fp16 holds exactly, no two of one size."""
    make = torch.Generator().manual_seed(seed)
    sizes = torch.randperm(n * k, generator=make) + 1.0
    signs = torch.randint(0, 2, (n * k,), generator=make) * 2 - 1
    return (sizes * signs).view(n, k) / 1024


def step(**knobs: Any) -> dict[str, Any]:
    """A magnitude step."""
    return {"kind": "magnitude", **knobs}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.99])
def test_exactly_the_smallest_weights_go(share):
    w = weights()
    pruned = quantize_layer(step(sparsity=share), w).weight
    gone = pruned == 0
    assert int(gone.sum()) == round(share * w.numel())
    assert w[gone].abs().max() < w[~gone].abs().min()
    assert torch.equal(pruned[~gone], w[~gone])


def test_none_and_all():
    w = weights()
    nothing = quantize_layer(step(sparsity=0.0), w)
    assert torch.equal(nothing.weight, w)
    assert nothing.bits == PLAIN_BITS
    everything = quantize_layer(step(sparsity=1.0), w)
    assert not everything.weight.any()
    assert everything.bits_per_weight == 1  # the mask


@pytest.mark.parametrize(("pattern", "gone", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_every_bucket_loses_its_smallest(pattern, gone, of):
    w = weights(12, 64)
    pruned = quantize_layer(step(pattern=pattern), w).weight.view(12, -1, of)
    expected = w.view(12, -1, of).clone()
    for bucket in expected.view(-1, of):
        bucket[bucket.abs().argsort()[:gone]] = 0
    assert torch.equal(pruned, expected)
    assert ((pruned == 0).sum(-1) == gone).all()


def test_of_equals_the_first_go():
    assert least(torch.ones(2, 3), 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert least_of_buckets(torch.ones(1, 4), 2, 4).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("rest", range(1, 4))
def test_a_short_last_bucket_counts_what_it_lacks_as_gone(rest):
    w = weights(6, 8 + rest)
    pruned = quantize_layer(step(pattern="2:4"), w)
    kept = (pruned.weight[:, 8:] != 0).sum(1)
    assert (kept == min(rest, 2)).all()
    assert pruned.bits["index"] == 1


def test_what_stays_is_rounded_on_the_grid_of_the_full_matrix():
    w = weights()
    layer = quantize_layer(step(bits=3, group=16, symmetric=True), w)
    full = IntGroup(bits=3, group=16, symmetric=True, scale_dtype="float16").fake(w)
    gone = w.abs() < w.abs().median() + 1e-6
    assert torch.equal(layer.weight, full.masked_fill(gone, 0))


@pytest.mark.parametrize(
    ("knobs", "bits"),
    [
        ({}, 0.5 * 16 + 1),  # a mask
        ({"sparsity": 0.75}, 0.25 * 16 + 1),
        ({"pattern": "2:4"}, 0.5 * 16 + 0.5 * 2),  # two bits for each place
        ({"pattern": "4:8"}, 0.5 * 16 + 1),  # places would take 1.5
        ({"bits": 4}, 0.5 * 4 + 1 + (16 + 4) / 256),
        ({"bits": 4, "pattern": "2:4", "group": 64}, 3 + (16 + 4) / 64),
        ({"bits": 3, "symmetric": True, "sparsity": 0.5, "group": 32}, 2.5 + 16 / 32),
        ({"value_dtype": "float32"}, 0.5 * 32 + 1),
    ],
)
def test_bits_are_the_bytes_on_disk(knobs, bits):
    layer = quantize_layer(step(**knobs), weights(64, 256))
    tensors, _ = layer.module.to_state()
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values()) / (64 * 256)
    assert layer.bits_per_weight == pytest.approx(stored, rel=0.01)
    assert layer.bits_per_weight == pytest.approx(bits, rel=1e-6)


STORED = [
    {},
    {"pattern": "2:4"},
    {"pattern": "4:8"},
    {"sparsity": 0.9, "bits": 5},
    {"sparsity": 1.0, "bits": 4},
    {"sparsity": 1.0},
    {"pattern": "2:4", "bits": 4, "group": 16},
    {"value_dtype": "bfloat16"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [64, 37])
@pytest.mark.parametrize("knobs", STORED, ids=str)
def test_pruned_linears_survive_saving(knobs, k, dtype):
    w = torch.randn(9, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = quantize_layer(step(**knobs), w).module
    act = FORMATS.build({"kind": "int", "bits": 8, "symmetric": True})
    for linear in (layer, layer.with_act(act)):
        tensors, config = linear.to_state()
        again = LINEARS["sparse_linear"].from_state(tensors, json.loads(json.dumps(config)), dtype)
        assert isinstance(again, SparseLinear)
        assert torch.equal(again.weight, linear.weight)
        assert again.weight.dtype == dtype
        assert torch.equal(again.keep, linear.keep)
        assert again.bits() == linear.bits()
        assert again.act == linear.act
        x = torch.randn(3, k, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert torch.equal(again(x), linear(x))


def test_places_say_where_the_weights_were():
    keep = least_of_buckets(weights(5, 32).abs(), 2, 4)
    assert place_bits(4) == 2
    assert place_bits(8) == 3
    assert torch.equal(keep_from_places(places_of(keep, 4), 5, 32, 4), keep)


def test_rounded_inputs_leave_the_zeros_and_come_once():
    layer = quantize_layer(step(pattern="2:4"), weights()).module
    act = FORMATS.build({"kind": "int", "bits": 8, "symmetric": True})
    both = layer.with_act(act)
    assert torch.equal(both.weight, layer.weight)
    assert both.bits() == layer.bits()
    with pytest.raises(ValueError, match="already rounded to int"):
        both.with_act(act)


def test_a_pruned_linear_is_packed_but_for_its_activations():
    layer = quantize_layer(step(bits=4), weights()).module
    assert layer.kernel_for("cpu").name == "sparse_24"
    act = FORMATS.build({"kind": "int", "bits": 8, "symmetric": True})
    with pytest.raises(ValueError, match="activations in 16 bits"):
        layer.with_act(act).kernel_for("cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('magnitude(pattern="2:4",sparsity=0.7)', "2:4 makes 50% of the weights 0, not 70%"),
        ("magnitude(bits=12)", "bits are 2 to 8, or 16"),
        ("magnitude(group=64)", "need bits of 2 to 8"),
        ("magnitude(symmetric=true)", "need bits of 2 to 8"),
        ("magnitude(sparsity=1.5)", "less than or equal to 1"),
        ('magnitude(pattern="3:4")', "pattern"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        recipes.parse(text)
    assert "\n" not in str(caught.value)
