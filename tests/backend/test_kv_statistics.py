"""What is kept of keys and values: a channel that stands out is found, before and after RoPE."""

from __future__ import annotations

import pytest
import torch

from backend import kv_statistics
from backend.kv_statistics import FILE, WHATS, read, summaries_of
from backend.recipes import parse
from backend.run import Run
from backend.spec import RunSpec

IDS = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(1))


def states_by_hand(model, block: int) -> dict[str, torch.Tensor]:
    """Keys before and after RoPE and values [T, C], from transformers' own cache and hooks."""
    seen = {}
    attention = model.model.layers[block].self_attn
    hook = attention.k_proj.register_forward_hook(lambda m, a, out: seen.update(before=out[0]))
    with torch.no_grad():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    hook.remove()
    layer = cache.layers[block]
    flat = [x[0].transpose(0, 1).flatten(1) for x in (layer.keys, layer.values)]
    return {"keys before RoPE": seen["before"], "keys": flat[0], "values": flat[1]}


def test_peaks_are_those_of_the_projections_and_of_transformers_own_cache(make_model):
    model = make_model()
    model.model.layers[1].self_attn.k_proj.weight[5] *= 40
    found = summaries_of(model, IDS)
    assert set(found) == {f"{what}/{block}" for what in WHATS for block in range(3)}
    for block in range(3):
        for what, states in states_by_hand(model, block).items():
            peaks = found[f"{what}/{block}"].peaks
            torch.testing.assert_close(peaks, states.abs().amax(0), rtol=1e-4, atol=1e-5)
    before = found["keys before RoPE/1"].peaks
    after = found["keys/1"].peaks
    assert int(before.argmax()) == 5
    assert before[5] > 10 * before.median()
    assert set(after.topk(2).indices.tolist()) == {5, 13}  # RoPE turns channels 5 and 5 + 16 / 2


def test_the_model_is_as_before(make_model):
    model = make_model()
    with torch.no_grad():
        first = model(input_ids=IDS).logits
    summaries_of(model, IDS)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, first)


def test_models_without_rope_have_no_keys_before_it(make_model):
    found = summaries_of(make_model("opt"), IDS)
    assert {name.partition("/")[0] for name in found} == {"keys", "values"}


def test_blocks_with_sliding_windows_are_left_out(make_model):
    found = summaries_of(make_model("gemma3_text"), IDS)
    assert {int(name.rpartition("/")[2]) for name in found} == {1}


@pytest.mark.parametrize("recipe", ["baseline", "kivi(group=8,residual=16)"])
def test_a_file_comes_back_and_is_the_same_whatever_rounds_the_cache(
    recipe, make_model, tokenizer, tmp_path
):
    steps = () if recipe == "baseline" else parse(recipe)
    run = Run(RunSpec(model={"id": "tiny"}, steps=steps), make_model(), tokenizer)
    kv_statistics.record(run, tmp_path)
    blocks = read(tmp_path)
    assert [cached.block for cached in blocks] == [0, 1, 2]
    plain = summaries_of(make_model(), kv_statistics.sample(run))
    for cached in blocks:
        assert cached.heads == 2
        assert tuple(cached.summaries) == WHATS
        for what, summary in cached.summaries.items():
            expected = plain[f"{what}/{cached.block}"]
            assert summary.peaks.tolist() == pytest.approx(expected.peaks.tolist())
            assert summary.numbers["kurtosis"] == pytest.approx(expected.numbers["kurtosis"])
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_what_cannot_be_read_is_nothing(tmp_path):
    assert read(tmp_path) == []
    (tmp_path / FILE).write_bytes(b"torn")
    assert read(tmp_path) == []


@pytest.mark.parametrize(("recipe", "looks"), [("baseline", True), ("kivi", True), ("rtn", False)])
def test_evaluation_looks_at_baselines_and_at_recipes_that_round_the_cache(
    recipe, looks, llama_folder, text_file, home, tmp_path
):
    from backend.execute import execute
    from backend.model.identity import resolve

    text = {"kind": "perplexity", "dataset": f"file:{text_file}", "window": 64, "limit": 1}
    steps = () if recipe == "baseline" else parse(recipe)
    spec = resolve(RunSpec(model={"id": str(llama_folder)}, steps=steps, metrics=(text,)))
    for stage in spec.stages():
        execute(
            spec,
            stage,
            tmp_path,
            device="cpu",
            home=home,
            emit=lambda kind, **data: None,
            should_stop=lambda: False,
        )
    assert bool(read(tmp_path)) == looks
