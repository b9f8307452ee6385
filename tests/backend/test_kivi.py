"""KIVI: its grid against the authors' outputs, and the order in which a cache rounds tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.cache.build import cache_argument, cache_bytes, token_bytes
from backend.cache.codec import unpack_rows
from backend.cache.layer import RoundedLayer
from backend.formats import FORMATS
from backend.methods.kivi import Kivi
from backend.model.families import blocks_of
from backend.recipes import parse
from backend.run import Run
from backend.spec import RunSpec

FOLDER = Path(__file__).parents[3] / "shared" / "vectors"
SMALL = "kivi(bits=2,group=8,residual=8)"


def grid(**knobs):
    return FORMATS.build({"kind": "kivi", **knobs})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the authors' outputs ------------------------------------------------------------------------


@cache
def arrays() -> dict[str, Tensor]:
    if not FOLDER.is_dir():
        pytest.skip(f"no test vectors at {FOLDER}")
    with np.load(FOLDER / "kivi_a.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


AXES = {"K": "channel", "V": "token"}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["K", "V"])
def test_values_in_fp32_are_the_authors(name, bits):
    expected = arrays()[f"{name}_b{bits}_g32_f32__dq"]
    found = grid(bits=bits, group=32, axis=AXES[name]).fake(arrays()[f"in_{name}"])
    wrong = (found - expected).abs() > 1e-5
    assert wrong.float().mean() <= 0.0002  # codes on a tie


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["K", "V"])
def test_values_in_fp16_are_the_authors(name, bits):
    """They compute in fp16 throughout, we in fp32 on a scale and minimum stored in fp16.

    Five roundings apart (range, scale, product, sum and the result), each 2^-11 of the group's
    largest magnitude: near 0, a sum of large numbers, the relative error has no bound.
    """
    vectors = arrays()
    expected = vectors[f"{name}_b{bits}_g32_f16__dq"].float()
    along = 2 if name == "K" else 3
    step, low = (
        vectors[f"{name}_b{bits}_g32_f16__{part}"].float().repeat_interleave(32, along)
        for part in ("scale", "min")
    )
    fmt = grid(bits=bits, group=32, axis=AXES[name], scale_dtype="float16")
    error = (fmt.fake(vectors[f"in_{name}"].half()).float() - expected).abs()
    moved = error > 0.5 * step
    assert moved.float().mean() <= 0.005
    peak = torch.maximum(low.abs(), (low + (2**bits - 1) * step).abs())
    assert (error <= 5 * 2**-11 * peak + moved * step).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_scales_minima_and_codes_are_the_authors(bits):
    x = arrays()["in_V"]
    q = grid(bits=bits, group=32).quantize(x.flatten(0, 2))
    key = f"V_b{bits}_g32_f32__"
    torch.testing.assert_close(q.params["scale"].view(1, 2, 128, 2), arrays()[key + "scale"])
    assert torch.equal(q.params["low"].view(1, 2, 128, 2), arrays()[key + "min"])
    packed = arrays()[key + "packed"]  # element j of a word in bits bits*j: low first, as ours
    codes = unpack_rows(packed.view(torch.uint8), bits, 64)
    wrong = q.codes.view(1, 2, 128, 64) != codes
    assert wrong.float().mean() <= 0.0002


def test_one_channel_of_the_whole_sequence_is_the_authors_fake_quantizer():
    for bits in (2, 4):
        expected = arrays()[f"fakeK_wholechannel_b{bits}"]  # [1, T, H D]
        found = grid(bits=bits, group=0, axis="channel").fake(arrays()["in_K"])
        wrong = (found.transpose(1, 2).flatten(2) - expected).abs() > 1e-5
        assert wrong.float().mean() <= 0.0002


# -- the grid ------------------------------------------------------------------------------------


def test_by_hand():
    x = torch.tensor([[1.0, 2.0, 2.4, 4.0]])  # step 1 from 1
    assert grid(bits=2, group=4).fake(x).tolist() == [[1, 2, 2, 4]]
    assert grid(bits=2, group=4, axis="channel").fake(x.T).T.tolist() == [[1, 2, 2, 4]]


def test_constant_groups_are_exact():
    assert torch.equal(grid().fake(torch.full((2, 64), 1.5)), torch.full((2, 64), 1.5))


def test_errors_are_half_a_step_at_most_and_fall_with_bits():
    x = normal(64, 128)
    errors = []
    for bits in (2, 3, 4, 8):
        fmt = grid(bits=bits)
        step = fmt.quantize(x).params["scale"].repeat_interleave(32, 1)
        error = (fmt.fake(x) - x).abs()
        assert (error <= 0.5001 * step + 1e-6).all()
        errors.append(error.square().mean().item())
    assert errors == sorted(errors, reverse=True)


def test_along_tokens_is_the_same_on_the_transposed_matrix():
    x = normal(2, 3, 40, 16)  # 40 tokens: a short last group
    turned = grid(group=32).fake(x.transpose(2, 3)).transpose(2, 3)
    assert torch.equal(grid(group=32, axis="channel").fake(x), turned)


# -- the order of rounding -----------------------------------------------------------------------


def layer_of(residual: int = 8, **knobs) -> RoundedLayer:
    return Kivi(group=8, residual=residual, **knobs).cache_layer(0)


def fed(layer: RoundedLayer, keys: Tensor, values: Tensor, *lengths: int):
    """What attention reads at each update of so many tokens."""
    at = 0
    for length in lengths:
        yield layer.update(keys[:, :, at : at + length], values[:, :, at : at + length])
        at += length


def test_golden_sequence():
    """(n, keys rounded, keys left, values rounded, values left) for R = 8 after 43 tokens."""
    layer = layer_of()
    k, v = normal(1, 2, 80, 8), normal(1, 2, 80, 8, seed=1)
    found = []
    for _ in fed(layer, k, v, 43, *[1] * 6):
        keys, values = layer.stores
        found.append((layer.get_seq_length(), keys.rounded, keys.rest, values.rounded, values.rest))
    assert found == [
        (43, 40, 3, 35, 8),
        (44, 40, 4, 36, 8),
        (45, 40, 5, 37, 8),
        (46, 40, 6, 38, 8),
        (47, 40, 7, 39, 8),
        (48, 48, 0, 40, 8),
        (49, 48, 1, 41, 8),
    ]


def test_counts_always_add_up():
    layer = layer_of(residual=16)
    for _ in fed(layer, normal(1, 2, 60, 8), normal(1, 2, 60, 8), 7, 20, *[1] * 30):
        keys, values = layer.stores
        assert keys.rounded % 16 == 0
        assert keys.rounded + keys.rest == values.rounded + values.rest == layer.get_seq_length()
        assert values.rest == min(16, layer.get_seq_length())


def test_a_token_is_exact_at_its_own_step_and_rounded_after_it():
    layer = layer_of(prefill="fp")
    k, v = normal(1, 2, 33, 8), normal(1, 2, 33, 8, seed=1)
    seen = list(fed(layer, k, v, 31, 1, 1))
    keys, values = seen[1]  # the 32nd token completes a block
    assert torch.equal(keys[:, :, 24:], k[:, :, 24:32])
    assert torch.equal(values[:, :, 23:], v[:, :, 23:32])  # the window and the new one
    keys, values = seen[2]
    assert not torch.equal(keys[:, :, 24:32], k[:, :, 24:32])
    expected = grid(group=8, axis="channel", scale_dtype="float16").fake(k[:, :, 24:32])
    assert torch.equal(keys[:, :, 24:32], expected)
    assert torch.equal(values[:, :, 24:], v[:, :, 24:])
    rounded = grid(group=8, scale_dtype="float16").fake(v[:, :, :24])
    assert torch.equal(values[:, :, :24], rounded)


def test_codes_depend_on_their_own_block_or_token_only():
    k, v = normal(1, 2, 64, 16), normal(1, 2, 64, 16, seed=1)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, 20] += 3
    changed_v[:, :, 20] += 3
    one, two = layer_of(prefill="quant"), layer_of(prefill="quant")
    (ak, av), (bk, bv) = one.update(k, v), two.update(changed_k, changed_v)
    keys = (ak != bk).any(-1).any(1)[0].nonzero().flatten().tolist()
    values = (av != bv).any(-1).any(1)[0].nonzero().flatten().tolist()
    assert set(keys) <= set(range(16, 24))
    assert values == [20]


def test_what_a_prompt_reads():
    k, v = normal(1, 2, 64, 16), normal(1, 2, 64, 16, seed=1)
    exact = layer_of(prefill="fp").update(k, v)
    assert torch.equal(exact[0], k)
    assert torch.equal(exact[1], v)
    assert not torch.equal(layer_of(prefill="quant").update(k, v)[0], k)
    short = layer_of(prefill="quant", residual=128).update(k, v)
    assert torch.equal(short[0], k)  # fewer tokens than the residual: nothing is rounded
    assert torch.equal(short[1], v)


# -- in a model ----------------------------------------------------------------------------------


def run_of(model, tokenizer, recipe: str, storage: str = "simulated") -> Run:
    return Run(
        RunSpec(model={"id": "tiny"}, steps=parse(recipe), storage=storage), model, tokenizer
    )


def given(run: Run, cache) -> dict:
    """The cache under the name that the model's forward has for it."""
    return {cache_argument(run.model): cache}


def ids(n: int = 1, length: int = 60) -> Tensor:
    return torch.randint(256, (n, length), generator=torch.Generator().manual_seed(3))


def test_scoring_reads_rounded_tokens_and_short_texts_are_the_16_bit_models(make_model, tokenizer):
    plain = run_of(make_model(), tokenizer, "baseline")
    run = run_of(make_model(), tokenizer, SMALL)
    assert not torch.equal(run.logits(ids()), plain.logits(ids()))
    assert torch.equal(run.logits(ids(length=7)), plain.logits(ids(length=7)))
    assert run.caches.told()["quant"]["keys"] < 1


def test_a_prompt_is_exact_in_generation_and_later_tokens_differ(make_model, tokenizer):
    plain = run_of(make_model(), tokenizer, "baseline")
    run = run_of(make_model(), tokenizer, SMALL)
    text = ids()
    cache = run.caches.new()
    first = run.model(text, **given(run, cache)).logits
    assert torch.equal(first, plain.logits(text))
    token = first[:, -1:].argmax(-1)
    second = run.model(token, **given(run, cache)).logits
    assert not torch.allclose(second, plain.logits(torch.cat([text, token], 1))[:, -1:], atol=1e-4)


@pytest.mark.parametrize("prefill", ["fp", "quant"])
def test_packed_generation_is_simulated_generation(prefill, make_model, tokenizer):
    """Over more than three blocks of keys, token by token."""
    recipe = SMALL.replace(")", f",prefill={prefill})")
    answers = [
        list(run_of(make_model(), tokenizer, recipe, storage).generate(ids(), max_new=40, **FREE))
        for storage in ("simulated", "packed")
    ]
    plain = run_of(make_model(), tokenizer, "baseline").generate(ids(), max_new=40, **FREE)
    assert answers[0] == answers[1]
    assert answers[0] != list(plain)


FREE = {"ignore_end": True}


def test_a_cache_can_be_used_again(make_model, tokenizer):
    run = run_of(make_model(), tokenizer, SMALL, "packed")
    cache = run.caches.new()
    with torch.inference_mode():
        one = run.model(ids(), **given(run, cache)).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        two = run.model(ids(), **given(run, cache)).logits
    assert torch.equal(one, two)


def test_bytes_are_those_of_the_formula(make_model, tokenizer):
    run = run_of(make_model(), tokenizer, SMALL)
    heads, width, layers = 2, 16, 3
    per_token = layers * heads * width * 2 * (2 / 8 + 4 / 8)  # codes; 16-bit scale and minimum in 8
    found = token_bytes(run.caches)
    assert found.formula == found.measured == per_token
    whole = layers * heads * width * (40 * 0.75 + 2 * 3 + 35 * 0.75 + 2 * 8)
    assert cache_bytes(run.caches, 43) == whole
    cache = run_of(make_model(dtype="bfloat16"), tokenizer, SMALL, "packed").caches.new()
    k = normal(1, heads, 43, width).bfloat16()
    for layer in cache.layers:
        layer.update(k, k)
    assert sum(layer.resident_bytes() for layer in cache.layers) == whole


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("kivi(residual=16)", "residual 16 is no multiple of the 32 tokens"),
        ("kivi(group=64,residual=96)", "use 64"),
        ("kivi(bits=8)", "less than or equal to 4"),
        ("kivi+kv_cache", "cached once"),
    ],
)
def test_bad_knobs_get_one_sentence(recipe, says):
    with pytest.raises(ValueError, match=says):
        RunSpec(model={"id": "tiny"}, steps=parse(recipe))


def test_a_residual_longer_than_the_context_is_refused(make_model, tokenizer):
    with pytest.raises(ValueError, match="never fills in a context of 256"):
        run_of(make_model(), tokenizer, "kivi(residual=512)")


def test_a_block_can_be_kept_and_another_have_more_bits(make_model, tokenizer):
    recipe = SMALL.replace(")", ",layers=[on(blocks=0,keep=true),on(blocks=2,bits=4)])")
    layers = run_of(make_model(), tokenizer, recipe).caches.new().layers
    assert not isinstance(layers[0], RoundedLayer)
    bits = [layer.sides[0].codec.grid.bits for layer in layers[1:]]
    assert bits == [2, 4]
    assert len(blocks_of(make_model())) == 3
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        run_of(make_model(), tokenizer, SMALL.replace(")", ",layers=[on(blocks=7,bits=4)])"))
