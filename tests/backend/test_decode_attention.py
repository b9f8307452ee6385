"""Decoding on a packed cache: as its simulated twin answers, without ever making it dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backend.cache.attention import NAME, attend_packed, why_not
from backend.cache.build import cache_argument, cache_bytes
from backend.cache.layer import RoundedLayer
from backend.cache.tokens import Tokens
from backend.methods import Seen
from backend.model.identity import resolve
from backend.recipes import parse, presets
from backend.run import Run
from backend.spec import RunSpec
from kernels.kv_decode.layout import Held
from kernels.kv_decode.stretch import STRETCH

KIVI = "kivi(bits=2,group=8,residual=16)"
EIGHT = "kv_cache"
ZEROS = "kv_cache(key=int(bits=4,group=8,scale_dtype=float16),value=int(bits=4,group=8))"
PER_CHANNEL = ZEROS.replace("))", "),key_axis=channel,value_axis=channel)")
THREE = ZEROS.replace("bits=4", "bits=3")
HALF = "kv_cache(which=keys,residual=4)"
RECIPES = (KIVI, EIGHT, ZEROS, PER_CHANNEL, THREE, HALF, "kv_cache(key=sdr(bits=4,group=8))")


def ids(n: int = 1, length: int = 40, seed: int = 3) -> Tensor:
    return torch.randint(256, (n, length), generator=torch.Generator().manual_seed(seed))


def run_of(model: Any, tokenizer: Any, recipe: Any, storage: str = "packed") -> Run:
    """recipe: a text, or steps."""
    steps = parse(recipe) if isinstance(recipe, str) else recipe
    spec = RunSpec(model={"id": "tiny"}, steps=steps, storage=storage)
    return Run(spec, model, tokenizer)


def decoded(run: Run, tokens: Tensor, prompt: int, cache: Any = None) -> Tensor:
    """Logits of tokens [B, T] after a prompt, one at a time [B, T - prompt, V]."""
    cache = run.caches.new() if cache is None else cache
    given = {cache_argument(run.model): cache}
    with torch.inference_mode():
        run.model(tokens[:, :prompt], **given)
        steps = [
            run.model(tokens[:, at : at + 1], **given).logits
            for at in range(prompt, tokens.shape[1])
        ]
    return torch.cat(steps, 1)


@pytest.fixture
def handed(monkeypatch):
    """What attention got packed, in order."""
    seen: list[tuple[Any, Any]] = []

    def watching(q, keys, values, mask, scaling):
        seen.append((keys, values))
        return attend_packed(q, keys, values, mask, scaling)

    monkeypatch.setattr("backend.cache.attention.attend_packed", watching)
    monkeypatch.setitem(STRETCH, "cpu", 12)  # cuts blocks
    return seen


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that anything makes, but views."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, x.numel() * x.element_size())
        return out


# -- the same answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_packed_decoding_is_simulated_decoding(recipe, make_model, tokenizer, handed):
    """Orders of summation differ: 1e-4 of logits of order one, in fp32."""
    tokens = ids(2, 60)
    simulated = decoded(run_of(make_model(), tokenizer, recipe, "simulated"), tokens, 30)
    assert not handed
    packed = decoded(run_of(make_model(), tokenizer, recipe), tokens, 30)
    assert len(handed) == 30 * 3
    torch.testing.assert_close(packed, simulated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt_neox", "opt", "smollm3", "gemma3_text"])
@pytest.mark.parametrize("recipe", [KIVI, ZEROS])
def test_models_of_many_kinds(family, recipe, make_model, tokenizer, handed):
    tokens = ids(1, 50)
    simulated = decoded(run_of(make_model(family), tokenizer, recipe, "simulated"), tokens, 30)
    packed = decoded(run_of(make_model(family), tokenizer, recipe), tokens, 30)
    assert handed
    torch.testing.assert_close(packed, simulated, rtol=1e-4, atol=2e-4)


def test_codes_that_fold_are_handed_as_codes(make_model, tokenizer, handed):
    for recipe, kinds in ((KIVI, (Held, Held)), (THREE, (Tokens, Tokens)), (HALF, (Held, Held))):
        handed.clear()
        decoded(run_of(make_model(), tokenizer, recipe), ids(), 38)
        assert tuple(type(side) for side in handed[-1]) == kinds, recipe
    keys, values = handed[-1]
    assert keys.rounded == 36
    assert values.rounded == 0


def test_padded_batches_are_sequences_alone(make_model, tokenizer, handed):
    run = run_of(make_model(), tokenizer, ZEROS)
    rows = [ids(length=n, seed=n)[0] for n in (9, 17, 12)]
    tokens = torch.stack([torch.cat([torch.full((17 - len(r),), 258), r]) for r in rows])
    mask = (tokens != 258).long()
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}

    def answers(tokens: Tensor, mask: Tensor) -> Tensor:
        given = {cache_argument(run.model): run.caches.new()}
        return run.model.generate(tokens, attention_mask=mask, **given, **how)[:, -12:]

    together = answers(tokens, mask)
    assert len(handed) == 3 * 11
    for row, answer in zip(rows, together, strict=True):
        alone = answers(row[None], torch.ones(1, len(row), dtype=torch.long))
        assert answer.tolist() == alone[0].tolist()


def test_beams_are_those_of_the_simulated_cache(make_model, tokenizer, handed):
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    found = []
    for storage in ("simulated", "packed"):
        run = run_of(make_model(), tokenizer, KIVI, storage)
        given = {cache_argument(run.model): run.caches.new()}
        found.append(run.model.generate(ids(2), **given, **how, num_beams=3))
    assert handed
    assert torch.equal(*found)


# -- nothing dense -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [KIVI, EIGHT, THREE, PER_CHANNEL])
def test_nothing_as_large_as_the_dense_keys_is_made(recipe, make_model, tokenizer, monkeypatch):
    """240 tokens of 2 heads of 16 channels; the largest else is a stretch, logits, or codes."""
    monkeypatch.setitem(STRETCH, "cpu", 64)
    run = run_of(make_model(dtype="bfloat16"), tokenizer, recipe)
    cache = run.caches.new()
    tokens = ids(length=243)
    decoded(run, tokens[:, :242], 240, cache)
    given = {cache_argument(run.model): cache}
    with torch.inference_mode(), Largest() as packed:
        run.model(tokens[:, -1:], **given)
    cache = run_of(make_model(dtype="bfloat16"), tokenizer, recipe, "simulated").caches.new()
    decoded(run, tokens[:, :242], 240, cache)
    given = {cache_argument(run.model): cache}
    with torch.inference_mode(), Largest() as simulated:
        run.model(tokens[:, -1:], **given)
    dense = 2 * 16 * 243 * 2  # bf16
    assert simulated.most == dense
    assert packed.most <= 2 * 16 * 64 * 4 < 0.6 * dense  # a stretch in fp32


def test_a_step_keeps_what_the_formula_says(make_model, tokenizer):
    run = run_of(make_model(dtype="bfloat16"), tokenizer, KIVI)
    cache = run.caches.new()
    decoded(run, ids(length=100), 61, cache)
    held = sum(layer.resident_bytes() for layer in cache.layers)
    assert held == pytest.approx(cache_bytes(run.caches, 100), rel=0.02)


# -- where it is not taken -----------------------------------------------------------------------


def test_what_has_no_place_for_it_says_why_and_decodes_as_ever(make_model, tokenizer, handed):
    tokens = ids(1, 50)
    packed = run_of(make_model("gemma2"), tokenizer, EIGHT)
    assert any("unpacks all keys and values" in note for note in packed.caches.notes)
    simulated = run_of(make_model("gemma2"), tokenizer, EIGHT, "simulated")
    assert torch.equal(decoded(packed, tokens, 30), decoded(simulated, tokens, 30))
    assert not handed
    eager = make_model()
    eager.set_attn_implementation("eager")
    assert why_not(eager) == "attention is 'eager', and only 'sdpa' can be replaced"
    capped = make_model()
    capped.config.attn_logit_softcapping = 30.0
    assert "caps scores" in why_not(capped)
    sunk = make_model()
    sunk.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert "learned sinks" in why_not(sunk)


def test_simulated_runs_keep_their_attention(make_model, tokenizer):
    model = make_model()
    run_of(model, tokenizer, KIVI, "simulated")
    assert model.config._attn_implementation == "sdpa"
    run_of(model, tokenizer, KIVI)
    run_of(model, tokenizer, KIVI)  # once more changes nothing
    assert model.config._attn_implementation == NAME
    plain = make_model()
    with torch.inference_mode():
        assert torch.equal(model(ids()).logits, plain(ids()).logits)


def test_masks_that_add_and_weights_that_are_asked_for_get_dense_keys(
    make_model, tokenizer, handed
):
    run = run_of(make_model(), tokenizer, EIGHT)
    expected = decoded(run, ids(), 39)
    handed.clear()
    cache = run.caches.new()
    given = {cache_argument(run.model): cache}
    with torch.inference_mode():
        run.model(ids()[:, :39], **given)
        adding = torch.zeros(1, 1, 1, 40)
        found = run.model(ids()[:, 39:], attention_mask=adding, **given).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    run.model.config._attn_implementation_internal = "sdpa"  # someone set it back
    torch.testing.assert_close(decoded(run, ids(), 39), expected, rtol=1e-4, atol=1e-4)
    assert not handed


def test_gradients_take_the_dense_way(make_model, tokenizer, handed):
    run = run_of(make_model(), tokenizer, EIGHT)
    cache = run.caches.new()
    embedded = run.model.get_input_embeddings()(ids()).requires_grad_()
    given = {cache_argument(run.model): cache}
    run.model(inputs_embeds=embedded[:, :39], **given)
    run.model(inputs_embeds=embedded[:, 39:], **given).logits.sum().backward()
    assert embedded.grad is not None
    assert not handed


# -- the bundled model ---------------------------------------------------------------------------


def demo(recipe: str, storage: str, dtype: torch.dtype) -> Run:
    """The bundled model in one type whatever the storage, so that only that differs."""
    spec = resolve(RunSpec(model={"id": "demo"}, steps=parse(recipe), storage=storage))
    return Run.open(spec, dtype=dtype)


@pytest.mark.parametrize("recipe", ["KIVI-2", "KV4"])
def test_the_bundled_model_answers_alike_token_by_token(recipe):
    """60 tokens, in which KIVI rounds 128 keys at once."""
    runs = [demo(recipe, storage, torch.float32) for storage in ("simulated", "packed")]
    text = runs[0].tokens("demo", 1, 340)
    answers = [list(run.generate(text, max_new=60, ignore_end=True)) for run in runs]
    assert answers[0] == answers[1]
    whole = torch.cat([text, torch.tensor([answers[0]])], 1)
    one, two = (decoded(run, whole, 340) for run in runs)
    assert (one - two).abs().max() < 1e-3 * one.abs().max()


@pytest.mark.parametrize("recipe", ["KVQuant-2bit-1%", "KVQuant-3bit-1%, exact prompt"])
def test_unequal_levels_and_outliers_are_read_in_stretches(recipe, handed):
    """Keys before rotary positions, a sink, outliers in one list."""
    (step,) = parse(recipe)
    plain = demo("baseline", "simulated", torch.float32)
    text = plain.tokens("demo", 5, 100)
    step.before(plain.model, text[1:], Seen({}))
    logits = []
    for storage in ("simulated", "packed"):
        run = run_of(plain.model, plain.tokenizer, [step], storage)
        logits.append(decoded(run, text[:1], 80))
    assert len(handed) == 20 * 4
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()


CACHED = sorted(
    n for n, text in presets().items() if any("kv_cache" in s.targets for s in parse(text))
)


@pytest.mark.parametrize("name", CACHED)
def test_resident_bytes_are_those_of_the_formula(name):
    """A text of 700 tokens in the bundled model; outliers of KVQuant's keys vary with the text."""
    steps = [step for step in parse(name) if "kv_cache" in step.targets]
    plain = demo("baseline", "simulated", torch.bfloat16)
    text = plain.tokens("demo", 5, 700)
    for step in steps:
        step.before(plain.model, text[1:], Seen({}))
    run = run_of(plain.model, plain.tokenizer, steps)
    cache = run.caches.new()
    decoded(run, text[:1], 690, cache)
    assert all(isinstance(layer, RoundedLayer) for layer in cache.layers)
    held = sum(layer.resident_bytes() for layer in cache.layers)
    assert held == pytest.approx(cache_bytes(run.caches, 700), rel=0.02)
    assert held < 0.65 * cache_bytes(plain.caches, 700)
