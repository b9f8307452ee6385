"""Rounded caches: codecs of every format, the layer's promises, models, padding, bytes, runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from backend.cache.build import Caches, cache_argument, cache_bytes, has_rotary, token_bytes
from backend.cache.codec import Codec, Codes, GridCodec, why_not
from backend.cache.layer import RoundedLayer, Side
from backend.cache.rotary import Turns, rotate, unrotate
from backend.chat import open_run
from backend.formats import FORMATS
from backend.formats.int_group import IntGroup
from backend.methods import METHODS
from backend.methods.kv_cache import KVCache
from backend.metrics import METRICS
from backend.model.checkpoint import Checkpoint
from backend.model.families import blocks_of
from backend.recipes import parse, presets
from backend.run import Run
from backend.spec import RunSpec

GRIDS = {
    kind: grid
    for kind, cls in FORMATS.load().items()
    if not why_not(grid := cls(**({"group": 8} if "group" in cls.model_fields else {})), "token")
    and grid.suited(20) == grid
}
AXES = ("token", "channel")
FOUR = "int(bits=4,group=8,scale_dtype=float16)"
PER_CHANNEL = f"kv_cache(key={FOUR},value={FOUR},key_axis=channel)"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(n: int = 1, length: int = 40, seed: int = 3) -> Tensor:
    return torch.randint(256, (n, length), generator=torch.Generator().manual_seed(seed))


def codec_of(kind: str, axis: str) -> GridCodec:
    grid = GRIDS[kind]
    if "axis" in type(grid).model_fields:
        grid = grid.model_copy(update={"axis": axis})
    return GridCodec(grid, axis)


def run_of(model: Any, tokenizer: Any, recipe: str, storage: str = "simulated") -> Run:
    spec = RunSpec(model={"id": "tiny"}, steps=parse(recipe), storage=storage)
    return Run(spec, model, tokenizer)


def passed(model: Any, tokens: Tensor, cache: Any = None, **more: Any) -> Tensor:
    """Logits of one forward pass with a cache."""
    given = {} if cache is None else {cache_argument(model): cache}
    with torch.inference_mode():
        return model(input_ids=tokens, **given, **more).logits


# -- codecs --------------------------------------------------------------------------------------


def test_most_formats_can_round_a_cache():
    assert {"int", "minifloat", "sdr", "kivi", "affine"} <= set(GRIDS)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", sorted(GRIDS))
def test_a_codec_gives_what_the_format_gives(kind, axis):
    codec, x = codec_of(kind, axis), normal(2, 3, 16, 20)
    found = codec.decode(codec.encode(x))
    rows = x if axis == "token" else x.transpose(-1, -2).reshape(2, 3, 20, 2, 8)
    plain = codec.grid.model_copy(update={"axis": "token"} if kind == "kivi" else {})
    expected = plain.fake(rows)
    if axis == "channel":
        expected = expected.reshape(2, 3, 20, 16).transpose(-1, -2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dim", [16, 20, 32])  # 20: groups of 8 and 4
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", sorted(GRIDS))
def test_packed_codes_come_back_and_take_the_bytes_they_say(kind, axis, dim):
    codec = codec_of(kind, axis)
    codes = codec.encode(normal(2, 3, 24, dim))
    packed = codec.pack(codes)
    again = codec.unpack(packed)
    assert all(torch.equal(again[name], codes[name]) for name in codes)
    size = sum(t.untyped_storage().nbytes() for t in packed.values())
    assert size * 8 == 2 * 24 * codec.bits_per_token(3, dim)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", sorted(GRIDS))
def test_codes_join_part_and_select(kind, axis):
    codec, x = codec_of(kind, axis), normal(3, 2, 48, 16)
    whole = codec.pack(codec.encode(x))
    parts = [codec.pack(codec.encode(x[:, :, at : at + 16])) for at in (0, 16, 32)]
    joined = codec.join(parts)
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    values = codec.decode(codec.unpack(whole))
    blocks = 16 // codec.block
    part = codec.decode(codec.unpack(codec.part(whole, blocks, 2 * blocks)))
    assert torch.equal(part, values[:, :, 16:32])
    chosen = codec.select(whole, torch.tensor([2, 0]))
    assert torch.equal(codec.decode(codec.unpack(chosen)), values[[2, 0]])


def test_effective_bits_of_an_8b_model():
    """8 heads of 128; the table of the KV reference, a 16-bit scale for each row of SDR added."""

    def bits(**grid: Any) -> float:
        axis = grid.get("axis", "token")
        return GridCodec(FORMATS.build(grid), axis).bits_per_token(8, 128) / 1024

    assert bits(kind="int", bits=8, symmetric=True, scale_dtype="float16") == 8.125
    assert bits(kind="minifloat", scale_dtype="float16") == 8.125
    for axis in AXES:
        for code in (2, 4):
            grid = {"kind": "kivi", "bits": code, "axis": axis, "scale_dtype": "float16"}
            assert bits(**grid) == code + 1
    for group, published in ((8, 4.375), (16, 4.1875), (32, 4.09375)):
        grid = {"kind": "sdr", "bits": 4, "group": group, "scale_dtype": "float16"}
        assert bits(**grid) == published + 16 / 128


def test_blocks_that_must_divide_a_head_are_checked(make_model, tokenizer):
    with pytest.raises(ValueError, match="do not divide the 16 channels of a head"):
        run_of(make_model(), tokenizer, "kv_cache(key=gguf(type=Q8_0))")
    run = run_of(make_model(head_dim=32), tokenizer, "kv_cache(key=gguf(type=Q8_0))", "packed")
    assert run.logits(ids()).isfinite().all()


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"key": {"kind": "int", "per_tensor": True}}, "many tokens share"),
        ({"key": "codebook"}, "many tokens share"),
        ({"key": "int", "key_axis": "channel"}, "set group=32"),
        ({"value": {"kind": "kivi", "axis": "channel"}}, "its axis is channel"),
        ({"key": {"kind": "int", "group": 32}, "key_axis": "channel", "residual": 8}, "use 32"),
        ({"key": "itn"}, "did you mean 'int'"),
    ],
)
def test_what_cannot_round_a_cache_gets_one_sentence(knobs, says):
    with pytest.raises(ValueError, match=says) as error:
        METHODS.build({"kind": "kv_cache", **knobs})
    assert "\n" not in str(error.value)


# -- the layer -----------------------------------------------------------------------------------


def side(axis: str = "token", bits: int = 4, **knobs: Any) -> Side:
    return Side(GridCodec(IntGroup(bits=bits, group=8, scale_dtype="float16"), axis), **knobs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_lengths_and_masks_follow_the_tokens(axis, packed):
    layer = RoundedLayer(side(axis), side(), packed=packed)
    count = 0
    for t in (13, 1, 1, 5):
        assert layer.get_mask_sizes(t) == (count + t, 0)
        keys, values = layer.update(normal(2, 3, t, 16), normal(2, 3, t, 16))
        count += t
        assert keys.shape == values.shape == (2, 3, count, 16)
        assert layer.get_seq_length() == count
    assert layer.get_max_length() == -1


@pytest.mark.parametrize("axis", AXES)
def test_packed_is_simulated(axis):
    one, two = (RoundedLayer(side(axis), side(), packed=packed) for packed in (False, True))
    for t in (21, 1, 1, 1, 9):
        k, v = normal(2, 3, t, 16, seed=t).bfloat16(), normal(2, 3, t, 16, seed=t + 1).bfloat16()
        for a, b in zip(one.update(k, v), two.update(k, v), strict=True):
            assert a.dtype == torch.bfloat16
            assert torch.equal(a, b)


def test_a_long_packed_cache_is_read_in_stretches():
    one, two = (RoundedLayer(side("channel"), side(), packed=packed) for packed in (False, True))
    k = normal(1, 1, 2500, 8)
    assert torch.equal(one.update(k, k)[0], two.update(k, k)[0])
    assert torch.equal(one.update(k, k)[1], two.update(k, k)[1])


@pytest.mark.parametrize("packed", [False, True])
def test_token_by_token_is_all_at_once(packed):
    k, v = normal(1, 2, 20, 16), normal(1, 2, 20, 16, seed=1)
    whole = RoundedLayer(side(sinks=2), side(residual=4), packed=packed).update(k, v)
    layer = RoundedLayer(side(sinks=2), side(residual=4), packed=packed)
    for start, stop in ((0, 7), *((i, i + 1) for i in range(7, 20))):
        parts = layer.update(k[:, :, start:stop], v[:, :, start:stop])
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


@pytest.mark.parametrize("axis", AXES)
def test_a_sequence_alone_is_the_sequence_in_a_batch(axis):
    k = normal(4, 2, 24, 16)
    together = RoundedLayer(side(axis), side()).update(k, k)
    alone = RoundedLayer(side(axis), side()).update(k[2:3], k[2:3])
    assert torch.equal(together[0][2:3], alone[0])
    assert torch.equal(together[1][2:3], alone[1])


def test_sinks_and_the_newest_are_exact():
    k = normal(2, 2, 30, 16)
    keys, values = RoundedLayer(side(sinks=3), side(residual=5)).update(k, k)
    assert torch.equal(keys[:, :, :3], k[:, :, :3])
    assert (keys[:, :, 3:] != k[:, :, 3:]).float().mean() > 0.5
    assert torch.equal(values[:, :, -5:], k[:, :, -5:])
    assert (values[:, :, :-5] != k[:, :, :-5]).float().mean() > 0.5


def test_a_change_of_a_token_changes_no_earlier_one():
    k, changed = normal(1, 2, 24, 16), normal(1, 2, 24, 16)
    changed[:, :, 9] *= 5
    before, after = (RoundedLayer(side(), side()).update(x, x)[0] for x in (k, changed))
    assert (before != after).any(-1).any(1)[0].nonzero().flatten().tolist() == [9]


def test_more_bits_err_less():
    k = normal(1, 2, 64, 64)
    errors = [
        (RoundedLayer(side(bits=b), Side()).update(k, k)[0] - k).square().mean().item()
        for b in (2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[2]


@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_reordered_repeated_and_selected(packed):
    k = normal(3, 2, 22, 16)
    rows = {
        "reorder_cache": (torch.tensor([2, 2, 0]), [2, 2, 0]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
        "batch_select_indices": (torch.tensor([False, True, True]), [1, 2]),
    }
    for name, (given, expected) in rows.items():
        layer = RoundedLayer(side("channel", sinks=1), side(residual=3), packed=packed)
        seen = layer.update(k, k)
        getattr(layer, name)(given)
        new = normal(len(expected), 2, 1, 16)
        keys, values = layer.update(new, new)
        assert torch.equal(keys[:, :, :22], seen[0][expected]), name
        assert torch.equal(values[:, :, :18], seen[1][expected][:, :, :18]), name


def test_what_a_rounded_cache_cannot_do_is_said():
    layer = RoundedLayer(side(), side())
    layer.update(normal(1, 1, 4, 8), normal(1, 1, 4, 8))
    layer.crop(0)
    with pytest.raises(ValueError, match="speculative decoding"):
        layer.crop(-2)
    with pytest.raises(ValueError, match="without offloading"):
        layer.offload()


def test_resident_bytes_are_really_smaller():
    k = normal(1, 8, 512, 128).bfloat16()
    plain = 2 * k.numel() * 2
    sizes = {}
    for packed in (False, True):
        layer = RoundedLayer(side("channel"), side(), packed=packed)
        layer.update(k, k)
        sizes[packed] = layer.resident_bytes()
    assert sizes[False] == plain
    assert sizes[True] == plain * (4 + 16 / 8 + 4 / 8) / 16


# -- rotary positions ----------------------------------------------------------------------------


def tables(t: int, width: int = 16, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    angles = torch.arange(t)[:, None] / 100.0 ** (torch.arange(width // 2) / (width // 2))
    angles = torch.cat([angles, angles], -1)[None]  # [1, t, width]
    return scale * angles.cos(), scale * angles.sin()


def test_rotation_is_transformers_and_its_inverse_undoes_it():
    k, (cos, sin) = normal(2, 3, 12, 16), tables(12)
    expected, _ = apply_rotary_pos_emb(k, k, cos, sin)
    torch.testing.assert_close(rotate(k, cos[:, None], sin[:, None]), expected)
    for scale, width in ((1.0, 16), (0.7, 16), (1.0, 8)):  # of all channels, scaled, of the first 8
        c, s = (x[:, None] for x in tables(12, width, scale))
        torch.testing.assert_close(unrotate(rotate(k, c, s), c, s), k, rtol=1e-5, atol=1e-6)


class Watching(Codec):
    """Rounds nothing and keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def encode(self, x: Tensor) -> Codes:
        self.shown.append(x.float())
        return {"x": x.float()}

    def decode(self, codes: Codes) -> Tensor:
        return codes["x"]

    def bits_per_token(self, heads: int, dim: int) -> float:
        return 32.0 * heads * dim


@pytest.fixture
def pre_rope(monkeypatch):
    """kv_cache with codecs that watch keys before rotary positions; {block index: codec}."""
    codecs: dict[int, Watching] = {}

    def cache_layer(self, index, fit=None, *, packed=False):
        codec = codecs.setdefault(index, Watching())
        return RoundedLayer(Side(codec, pre_rope=True), Side(), packed=packed)

    monkeypatch.setattr(KVCache, "cache_layer", cache_layer)
    return codecs


@pytest.mark.parametrize("storage", ["simulated", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "smollm3"])
def test_keys_before_rotary_positions_are_what_the_projection_gave(
    family, storage, make_model, tokenizer, pre_rope
):
    model = make_model(family)
    plain = passed(model, ids())
    run = run_of(model, tokenizer, "kv_cache", storage)
    given = []
    if family in ("llama", "smollm3"):  # the others normalise keys or compute q, k and v in one
        attention = blocks_of(model)[0].get("self_attn.k_proj")
        attention.register_forward_hook(lambda module, args, out: given.append(out))
    cache = run.caches.new()
    first = passed(model, ids()[:, :30], cache)
    rest = [passed(model, ids()[:, at : at + 1], cache) for at in range(30, 40)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), plain, rtol=1e-4, atol=1e-4)
    assert len(pre_rope[0].shown) == 11
    for out, shown in zip(given, pre_rope[0].shown, strict=bool(given)):
        torch.testing.assert_close(shown.transpose(1, 2).flatten(2), out, rtol=1e-4, atol=1e-5)


def test_turns_are_taken_once_per_pass():
    turns, (cos, sin) = Turns(), tables(6)
    for _ in range(3):  # three layers
        turns.extend(cos[:, :4], sin[:, :4], 4)
    for _ in range(3):
        turns.extend(cos[:, 4:], sin[:, 4:], 6)
    assert torch.equal(turns.of(0, 6)[0], cos[:, None])
    assert turns.resident_bytes() == 2 * 6 * 16 * 4
    turns.reset()
    assert turns.resident_bytes() == 0


def test_models_without_rotary_positions_are_known(make_model):
    assert has_rotary(make_model("llama"))
    assert not has_rotary(make_model("opt"))


# -- models --------------------------------------------------------------------------------------


class Exact(KVCache):
    """kv_cache that leaves everything in 16 bits."""

    def cache_layer(self, index, fit=None, *, packed=False):
        return RoundedLayer(Side(), Side(), packed=packed)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "opt", "phi3", "qwen3"])
def test_sixteen_bits_are_transformers_own_cache(family, make_model):
    model = make_model(family)
    caches = Caches(model, [Exact()], packed=False)
    own, stock = caches.new(), DynamicCache(config=model.config)
    for start, stop in ((0, 20), (20, 21), (21, 22), (22, 30)):
        step = ids(2)[:, start:stop]
        assert torch.equal(passed(model, step, own), passed(model, step, stock))


def test_sixteen_bit_generation_is_transformers_own(make_model):
    model = make_model()
    caches = Caches(model, [Exact()], packed=False)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(generated(model, ids(2), caches.new(), **how), model.generate(ids(2), **how))
    beams = how | {"num_beams": 3}
    found = generated(model, ids(2), caches.new(), **beams)
    assert torch.equal(found, model.generate(ids(2), **beams))


def generated(model: Any, tokens: Tensor, cache: Any, **how: Any) -> Tensor:
    return model.generate(tokens, **{cache_argument(model): cache}, **how)


def test_only_layers_that_hold_all_tokens_are_rounded(make_model, tokenizer):
    run = run_of(make_model("gemma3_text"), tokenizer, "kv_cache")
    kinds = [isinstance(layer, RoundedLayer) for layer in run.caches.new().layers]
    assert kinds == [False, True, False]
    assert any("2 of 3 blocks stay in 16 bits (blocks 0, 2)" in note for note in run.caches.notes)
    assert run.logits(ids()).isfinite().all()
    with pytest.raises(ValueError, match="sliding windows"):
        run_of(make_model("mistral"), tokenizer, "kv_cache")


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Left-padded tokens and their mask."""
    longest = max(len(row) for row in rows)
    tokens = torch.stack([torch.cat([torch.full((longest - len(r),), 258), r]) for r in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(r)).long() for r in rows])
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("recipe", ["kv_cache", f"kv_cache(key={FOUR},value={FOUR})"])
def test_padding_changes_nothing_per_token(recipe, make_model, tokenizer):
    run = run_of(make_model(), tokenizer, recipe)
    rows = [ids(length=n, seed=n)[0] for n in (9, 17, 12)]
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    together = run.model.generate(
        **padded(rows), **{cache_argument(run.model): run.caches.new()}, **how
    )
    for row, answer in zip(rows, together, strict=True):
        alone = generated(run.model, row[None], run.caches.new(), **how)
        assert answer[-12:].tolist() == alone[0, -12:].tolist()
    assert run.batch_size(16, padded=True) > 1


@pytest.mark.parametrize("recipe", [PER_CHANNEL, "kivi(group=8,residual=8)"])
def test_padding_that_would_be_rounded_with_tokens_is_refused(recipe, make_model, tokenizer):
    run = run_of(make_model(), tokenizer, recipe)
    rows = [ids(length=n, seed=n)[0] for n in (9, 17)]
    with pytest.raises(ValueError, match="padding tokens would be rounded together"):
        run.model.generate(
            **padded(rows), **{cache_argument(run.model): run.caches.new()}, max_new_tokens=2
        )
    same = padded([ids(length=17, seed=n)[0] for n in (1, 2)])
    run.model.generate(**same, **{cache_argument(run.model): run.caches.new()}, max_new_tokens=2)
    passed(run.model, **{"tokens": padded(rows)["input_ids"]})  # without the cache: as ever
    assert run.batch_size(16, padded=True) == 1
    assert run.batch_size(16) > 1


def test_texts_of_one_length_can_be_scored_together(make_model, tokenizer):
    for recipe in (PER_CHANNEL, "kivi(group=8,residual=8)", "kv_cache"):
        run = run_of(make_model(), tokenizer, recipe)
        together = run.logits(ids(3))
        alone = torch.cat([run.logits(row[None]) for row in ids(3)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_blocks_longer_than_the_context_are_refused(make_model, tokenizer):
    grid = "int(bits=4,group=512)"
    with pytest.raises(ValueError, match="key group of 512 tokens never fills"):
        run_of(make_model(), tokenizer, f"kv_cache(key={grid},value={grid},key_axis=channel)")
    with pytest.raises(ValueError, match="residual of 300 tokens never fills"):
        run_of(make_model(), tokenizer, "kv_cache(residual=300)")


def test_one_pass_shows_the_error(make_model, tokenizer):
    plain = run_of(make_model(), tokenizer, "baseline").logits(ids())
    for recipe in ("kv_cache", "kv_cache(prefill=fp)", "kv_cache(which=keys)", PER_CHANNEL):
        run = run_of(make_model(), tokenizer, recipe)
        assert not torch.equal(run.logits(ids()), plain), recipe
        assert run.caches.told()["quant"]["keys"] > 0.9
    exact = run_of(make_model(), tokenizer, "kv_cache(prefill=fp)").caches.new()
    assert torch.equal(passed(make_model(), ids(), exact), plain)


def test_the_last_logits_are_those_of_all(make_model, tokenizer):
    run = run_of(make_model(), tokenizer, "kv_cache")
    torch.testing.assert_close(run.logits(ids(), keep=3), run.logits(ids())[:, -3:])


def test_greedy_generation_equals_full_passes_per_token(make_model, tokenizer):
    """A token is rounded by itself, so decoding reads what one pass over the text reads."""
    run = run_of(make_model(), tokenizer, f"kv_cache(key={FOUR},value={FOUR})", "packed")
    whole = ids(length=12)
    for _ in range(12):
        whole = torch.cat([whole, run.logits(whole)[:, -1].argmax(-1, keepdim=True)], 1)
    assert list(run.generate(ids(length=12), max_new=12, ignore_end=True)) == whole[0, 12:].tolist()
    shares = run.caches.told()["quant"]
    assert shares == {"keys": 1, "values": 1}


# -- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(n for n, text in presets().items() if "kv_cache(" in text))
def test_measured_bytes_are_those_of_the_formula(name, make_model, tokenizer):
    (step,) = (s for s in parse(presets()[name]) if "kv_cache" in s.targets)
    model = make_model(head_dim=64)
    found = token_bytes(Caches(model, [step], packed=False))
    assert found.measured == pytest.approx(found.formula, rel=0.02)
    assert found.measured < 3 * 2 * 2 * 64 * 2


def test_size_says_what_a_token_takes(make_model, tokenizer):
    size = METRICS.build({"kind": "size"})

    def of(recipe: str) -> Any:
        run = run_of(make_model(), tokenizer, recipe)
        return {m.name: m for m in size.measure(run)}["kv_bytes_per_token"]

    plain = of("baseline")
    assert plain.value == 3 * 2 * 2 * 16 * 2
    eight = of("kv_cache")
    assert eight.value == 3 * 2 * 2 * (16 + 2)
    assert eight.detail["formula_bytes"] == eight.value
    assert eight.detail["compression"] == plain.value / eight.value
    assert eight.detail["context_bytes"] == 256 * eight.value
    assert eight.detail["plain_context_bytes"] == 256 * plain.value
    keys = of("kv_cache(which=keys)")
    assert keys.value == (plain.value + eight.value) / 2


def test_a_window_holds_no_more_than_it_is_long(make_model, tokenizer):
    run = run_of(make_model("gemma3_text"), tokenizer, "kv_cache")
    token = 2 * 2 * 16 * 2  # one layer, 16 bits
    assert cache_bytes(run.caches, 100) == 2 * 8 * token + 100 * 2 * 2 * (16 + 2)
    plain = run_of(make_model(), tokenizer, "baseline")
    assert cache_bytes(plain.caches, 100) == 100 * 3 * token


# -- runs ----------------------------------------------------------------------------------------


def test_what_acts_in_the_cache_only_needs_no_walk():
    def stages(recipe: str) -> list[str]:
        metrics = ({"kind": "perplexity"},)
        return RunSpec(model={"id": "demo"}, steps=parse(recipe), metrics=metrics).stages()

    assert stages("kv_cache") == stages("KIVI-2") == stages("baseline") == ["evaluate"]
    assert stages("rtn+kv_cache") == ["quantize", "evaluate"]
    spec = RunSpec(model={"id": "demo"}, steps=parse("rtn+activations+kv_cache"))
    assert spec.targets() == ["activations", "kv_cache", "weights"]
    assert not RunSpec(model={"id": "demo"}, steps=parse("kv_cache")).is_baseline


@pytest.mark.parametrize("storage", ["simulated", "packed"])
def test_a_run_that_rounds_the_cache_opens_and_chats(storage, llama_folder, tmp_path):
    spec = RunSpec(model={"id": str(llama_folder)}, steps=parse("kv_cache"), storage=storage)
    run = Run.open(spec)
    assert run.caches.packed == (storage == "packed")
    assert len(list(run.generate(ids(), max_new=5, ignore_end=True))) == 5
    opened = open_run(spec, tmp_path / "no blocks")
    assert opened.packed
    assert opened.run.caches.rounds


def test_weights_activations_and_cache_in_four_bits(make_model, tokenizer, tmp_path):
    from backend.pipeline import quantize

    recipe = "QRazor W4A4KV4 g8"
    model = make_model()
    quantize(model, parse(recipe), None, Checkpoint(tmp_path))
    run = run_of(model, tokenizer, recipe)
    cached = run.logits(ids())
    assert cached.isfinite().all()
    assert not torch.equal(cached, passed(model, ids()))  # the cache adds its own error
    again = make_model()
    for block in blocks_of(again):
        Checkpoint(tmp_path).restore(block)
    assert torch.equal(run_of(again, tokenizer, recipe).logits(ids()), cached)


def test_what_a_step_fitted_for_the_cache_is_saved_with_its_block(make_model, tmp_path):
    model = make_model(dtype="bfloat16")
    block = blocks_of(model)[1]
    block.keep_fit(table=normal(4), threshold=normal(2, 3).half())
    Checkpoint(tmp_path).save(block)
    other = blocks_of(make_model(dtype="bfloat16"))[1]
    assert other.fit() == {}
    Checkpoint(tmp_path).restore(other)
    assert torch.equal(other.fit()["table"], block.fit()["table"])
    assert other.fit()["threshold"].dtype == torch.float16
    assert torch.equal(blocks_of(model)[1].fit()["table"], normal(4))


def test_lm_eval_reads_rounded_tokens():
    """Scored tasks in one pass, generated ones token by token; padded batches go one by one."""
    from backend.metrics.tasks import tracked
    from backend.model.identity import resolve

    spec = resolve(RunSpec(model={"id": "demo"}, steps=parse("kivi(bits=2,residual=32)")))
    run = Run.open(spec)
    metric = METRICS.build({"kind": "tasks", "limit": 22})
    found = {m.name: m.value for m in metric.measure(run)}
    assert 0 <= found["demo/acc"] <= 1
    assert run.caches.told()
    lm = tracked(run, 1)
    assert lm.batch_size == 1
    lm._model_generate(ids(length=70) % 100 + 100, max_length=80, stop=[])
    assert run.caches.told()["fp"]["keys"] > 0.3


def test_results_say_how_much_was_rounded(llama_folder, text_file, home, tmp_path):
    """A whole run: no blocks, one stage, the shares beside every number."""
    from backend.execute import execute
    from backend.model.identity import resolve

    text = {"kind": "perplexity", "dataset": f"file:{text_file}", "window": 64, "limit": 2}
    steps = parse("kivi(group=8,residual=16)")
    spec = resolve(
        RunSpec(model={"id": str(llama_folder)}, steps=steps, metrics=(text, {"kind": "size"}))
    )
    events: list[dict[str, Any]] = []

    def emit(kind: str, **data: Any) -> None:
        events.append({"type": kind, **data})

    for stage in spec.stages():
        execute(
            spec, stage, tmp_path, device="cpu", home=home, emit=emit, should_stop=lambda: False
        )
    found = {e["name"]: e for e in events if e["type"] == "measurement"}
    shares = found["perplexity"]["detail"]["cache_rounded"]
    assert shares == {"quant": {"keys": 1.0, "values": 0.75}}
    assert found["kv_bytes_per_token"]["value"] == 3 * 2 * 2 * 16 * 0.75
    assert any("rounded together" in e["text"] for e in events if e["type"] == "note")
    assert not (tmp_path / "blocks").exists()


@pytest.fixture(scope="module")
def losses():
    """Perplexity of the bundled model on one window, by recipe."""
    from backend.model.identity import resolve

    text = METRICS.build({"kind": "perplexity", "dataset": "demo", "window": 1024, "limit": 1})
    found = {}
    for recipe in ("baseline", "KV8", "KV4", "KV2", "KIVI-4", "KIVI-2", "kivi(bits=2,residual=32)"):
        run = Run.open(resolve(RunSpec(model={"id": "demo"}, steps=parse(recipe))))
        (measured,) = text.measure(run)
        found[recipe] = measured.value
    return found


def test_orderings_on_the_bundled_model(losses):
    assert losses["baseline"] < losses["KV4"] < losses["KV2"]
    assert losses["KV8"] == pytest.approx(losses["baseline"], rel=0.005)
    assert losses["KV8"] < losses["KV4"]
    assert losses["KIVI-4"] < losses["KIVI-2"] < losses["KV2"] / 1.5  # keys per channel
    assert losses["KIVI-2"] < 1.02 * losses["kivi(bits=2,residual=32)"]
