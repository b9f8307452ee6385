"""The block walk: streams, prefixes, waves, shared statistics, resume, checkpoints."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from backend.formats import FORMATS
from backend.methods import METHODS
from backend.methods.base import Method
from backend.model.checkpoint import Checkpoint
from backend.model.families import blocks_of
from backend.model.quant_linear import QuantLinear
from backend.model.stats import Hessian, TokenSample
from backend.pipeline import Cancelled, quantize, seed_of, sqnr
from backend.recipes import parse

GPTQ = "gptq(bits=3)"
FULL = "smoothquant(alpha=0.5)+gptq(bits=4,true_sequential=true)+activations(bits=8)"


@pytest.fixture
def ids():
    return torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(1))


class Watch(Method):
    """Looks at inputs and keeps them; changes nothing."""

    kind: ClassVar[str] = "watch"
    targets: ClassVar = frozenset({"weights"})
    needs: ClassVar = (Hessian, TokenSample)
    prefix: ClassVar = "quantized"
    seen: ClassVar[dict] = {}

    def waves(self, block):
        names = list(block.linears())
        return [names[:3], names[3:]]

    def apply(self, block, seen):
        for name, stats in seen.stats.items():
            type(self).seen[block.index, name] = stats
        type(self).seen[block.index, "seed"] = seen.seed
        type(self).seen[block.index, "inputs"] = torch.cat([h for h, _ in seen.inputs()])


class WatchOriginal(Watch):
    """The same on the original model's states."""

    kind: ClassVar[str] = "watch_original"
    prefix: ClassVar = "original"
    seen: ClassVar[dict] = {}


class Stop(Method):
    """Raises in one block."""

    kind: ClassVar[str] = "stop"
    targets: ClassVar = frozenset({"weights"})
    at: int = 1

    def apply(self, block, seen):
        if block.index == self.at:
            raise RuntimeError("stopped")


def no_blocks(tmp_path):
    return Checkpoint(tmp_path / "blocks")


@torch.no_grad()
def inputs_of(model, ids, block, name):
    """What one linear receives in the whole model [n T, K], sequence by sequence."""
    got = []
    handle = (
        blocks_of(model)[block]
        .get(name)
        .register_forward_pre_hook(
            lambda module, given: got.append(given[0].reshape(-1, given[0].shape[-1]))
        )
    )
    for row in ids:
        model(input_ids=row[None], use_cache=False)
    handle.remove()
    return torch.cat(got)


def test_statistics_are_those_of_the_whole_models_forward_pass(make_model, ids, tmp_path):
    Watch.seen = {}
    quantize(make_model("llama"), (Watch(),), ids, no_blocks(tmp_path))
    for block, name in ((0, "self_attn.q_proj"), (2, "mlp.down_proj")):
        x = inputs_of(make_model("llama"), ids, block, name)
        expected = 2 / len(ids) * x.T @ x
        matrix = Watch.seen[block, name][Hessian].matrix
        assert (matrix - expected).abs().max() <= 1e-4 * expected.abs().max()
        rows = Watch.seen[block, name][TokenSample].rows
        assert torch.allclose(rows, x[:512], atol=1e-5)


def test_linears_with_one_input_share_one_hessian(make_model, ids, tmp_path):
    Watch.seen = {}
    quantize(make_model("llama"), (Watch(),), ids, no_blocks(tmp_path))
    q, k, v = (Watch.seen[0, f"self_attn.{n}_proj"][Hessian] for n in "qkv")
    assert q is k is v
    assert Watch.seen[0, "mlp.gate_proj"][Hessian] is Watch.seen[0, "mlp.up_proj"][Hessian]
    assert Watch.seen[0, "mlp.down_proj"][Hessian] is not q
    assert q.tokens == ids.numel()


def test_sequences_count_once_where_a_block_flattens_its_tokens(make_model, tmp_path):
    long = torch.randint(0, 256, (9, 250), generator=torch.Generator().manual_seed(2))
    Watch.seen = {}
    quantize(make_model("opt"), (Watch(),), long, no_blocks(tmp_path))  # batches of 8 and 1
    x = inputs_of(make_model("opt"), long, 0, "fc1")
    expected = 2 / 9 * x.T @ x
    assert Watch.seen[0, "fc1"][Hessian].sequences == 9
    matrix = Watch.seen[0, "fc1"][Hessian].matrix
    assert (matrix - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_prefixes_see_the_quantized_and_the_original_model(make_model, ids, tmp_path):
    Watch.seen, WatchOriginal.seen = {}, {}
    model = make_model("llama")
    steps = (Watch(), WatchOriginal(), *parse("rtn(bits=2)"))
    quantize(model, steps, ids, no_blocks(tmp_path))
    plain = inputs_of(make_model("llama"), ids, 2, "self_attn.q_proj")
    rounded = inputs_of(model, ids, 2, "self_attn.q_proj")
    assert not torch.allclose(plain, rounded, atol=0.05)
    name = (2, "self_attn.q_proj")
    assert torch.allclose(WatchOriginal.seen[name][TokenSample].rows, plain, atol=1e-5)
    assert torch.allclose(Watch.seen[name][TokenSample].rows, rounded, atol=1e-5)
    assert Watch.seen[0, "inputs"].shape == (6, 32, 64)
    assert torch.equal(Watch.seen[0, "inputs"], WatchOriginal.seen[0, "inputs"])


def test_later_waves_see_earlier_ones_rounded(make_model, ids, tmp_path):
    """Block 0 only, so that all differences come from inside the block."""
    together, in_order = make_model("llama"), make_model("llama")
    quantize(together, parse(GPTQ), ids, no_blocks(tmp_path / "a"))
    quantize(in_order, parse("gptq(bits=3,true_sequential=true)"), ids, no_blocks(tmp_path / "b"))
    first, second = blocks_of(together)[0], blocks_of(in_order)[0]
    same = {n: torch.equal(first.get(n).weight, second.get(n).weight) for n in first.linears()}
    assert [n for n, equal in same.items() if equal] == [f"self_attn.{n}_proj" for n in "qkv"]


def test_the_walk_agrees_with_quantizing_in_place(make_model, ids, tmp_path):
    model = make_model("llama")
    quantize(model, parse("rtn(bits=3,group=32)"), None, no_blocks(tmp_path))
    by_hand = make_model("llama")
    fmt = FORMATS.build({"kind": "int", "bits": 3, "group": 32})
    for block in blocks_of(by_hand):
        for linear in block.linears().values():
            linear.weight.copy_(fmt.quantize(linear.weight).dequantize())
    assert torch.equal(model(input_ids=ids).logits, by_hand(input_ids=ids).logits)


def test_steps_that_need_inputs_say_so(make_model, tmp_path):
    with pytest.raises(ValueError, match="gptq: calibration tokens are needed, none were given"):
        quantize(make_model("llama"), parse(GPTQ), None, no_blocks(tmp_path))


@pytest.mark.parametrize("recipe", [GPTQ, FULL])
def test_resuming_gives_the_same_bits(make_model, ids, tmp_path, recipe):
    whole, kept = make_model("llama"), no_blocks(tmp_path / "whole")
    quantize(whole, parse(recipe), ids, kept)
    saved = no_blocks(tmp_path / "stopped")
    with pytest.raises(RuntimeError, match="stopped"):
        quantize(make_model("llama"), (*parse(recipe), Stop(at=2)), ids, saved)
    assert [saved.has(i) for i in range(3)] == [True, True, False]
    saved.path(1).write_bytes(b"torn")  # as good as absent
    resumed = make_model("llama")
    quantize(resumed, parse(recipe), ids, saved)
    assert torch.equal(resumed(input_ids=ids).logits, whole(input_ids=ids).logits)
    for index in range(3):
        assert saved.path(index).read_bytes() == kept.path(index).read_bytes()


def test_cancelling_stops_between_batches_and_keeps_whole_blocks(make_model, ids, tmp_path):
    calls = []
    with pytest.raises(Cancelled):
        quantize(
            make_model("llama"),
            parse(GPTQ),
            ids,
            saved := no_blocks(tmp_path),
            progress=lambda block, *rest: calls.append(block),
            should_stop=lambda: bool(calls) and calls[-1] == 1,
        )
    assert [saved.has(i) for i in range(3)] == [True, False, False]
    assert not list(saved.folder.glob("*.part"))


def test_seeds_depend_on_run_block_and_step_alone(make_model, ids, tmp_path):
    Watch.seen = {}
    quantize(make_model("llama"), (Watch(),), ids, no_blocks(tmp_path), seed=7)
    assert Watch.seen[1, "seed"] == seed_of(7, 1, 0)
    seeds = {seed_of(s, b, n) for s in range(3) for b in range(5) for n in range(4)}
    assert len(seeds) == 60


def test_progress_grows_to_one_and_notes_carry_their_place(make_model, ids, tmp_path):
    shares, notes = [], []
    dead = make_model("llama")
    for linear in blocks_of(dead)[1].linears().values():
        linear.weight.zero_()  # block 1 adds nothing; its down_proj sees only zeros
    quantize(
        dead,
        parse(GPTQ),
        ids,
        no_blocks(tmp_path),
        progress=lambda block, blocks, item, share: shares.append(share),
        note=lambda block, module, text: notes.append((block, module)),
    )
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    assert (1, "mlp.down_proj") in notes


def measured(model, recipe, ids, folder):
    found = {}

    def keep(m):
        found[m.name, *m.layer] = m

    quantize(model, parse(recipe), ids, Checkpoint(folder), measure=keep)
    return found


def test_signal_to_noise_by_hand(make_model, ids, tmp_path):
    model = make_model("llama")
    found = measured(model, "rtn(bits=4)", ids, tmp_path)
    exact = blocks_of(make_model("llama"))[1].get("mlp.up_proj").weight.double()
    noise = (exact - blocks_of(model)[1].get("mlp.up_proj").weight.double()).square().sum()
    by_hand = 10 * torch.log10(exact.square().sum() / noise)
    got = found["weight_sqnr", 1, "mlp.up_proj"]
    assert got.value == pytest.approx(float(by_hand), abs=1e-4)
    assert (got.unit, got.better, got.n) == ("dB", "higher", exact.numel())
    x = inputs_of(make_model("llama"), ids, 0, "self_attn.o_proj")[:512].double()
    old = blocks_of(make_model("llama"))[0].get("self_attn.q_proj")
    x = inputs_of(make_model("llama"), ids, 0, "self_attn.q_proj")[:512].double()
    y = x @ old.weight.double().T
    noise = (y - x @ blocks_of(model)[0].get("self_attn.q_proj").weight.double().T).square().sum()
    by_hand = float(10 * torch.log10(y.square().sum() / noise))
    assert found["output_sqnr", 0, "self_attn.q_proj"].value == pytest.approx(by_hand, abs=1e-3)
    assert {b for name, b, _ in found if name == "block_sqnr"} == {0, 1, 2}


def test_more_bits_measure_better_and_activations_count(make_model, ids, tmp_path):
    few = measured(make_model("llama"), "rtn(bits=3)", ids, tmp_path / "3")
    many = measured(make_model("llama"), "rtn(bits=8)", ids, tmp_path / "8")
    assert all(many[key].value > few[key].value for key in few)
    acts = measured(make_model("llama"), "activations(bits=4)", ids, tmp_path / "a")
    assert not [key for key in acts if key[0] == "weight_sqnr"]
    assert acts["output_sqnr", 0, "mlp.down_proj"].value < 40


def test_smoothing_alone_changes_no_output(make_model, ids, tmp_path):
    found = measured(make_model("llama"), "smoothquant", ids, tmp_path)
    names = ("block_sqnr", "cumulative_sqnr")
    assert set(found) == {(name, i, "") for name in names for i in range(3)}
    assert min(m.value for m in found.values()) > 100  # fp32 rounding


def test_sqnr_of_equal_tensors_is_infinite():
    assert sqnr(torch.ones(3), torch.ones(3)) == float("inf")
    assert sqnr(torch.tensor([10.0]), torch.tensor([9.0])) == pytest.approx(20)


@pytest.mark.parametrize("kind", sorted(METHODS.load()))
def test_every_method_survives_save_and_restore(kind, make_model, ids, tmp_path):
    model = make_model("llama")
    method = METHODS.load()[kind]()
    quantize(model, (method,), ids, saved := no_blocks(tmp_path))
    again = make_model("llama")
    for block in blocks_of(again):
        saved.restore(block)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["opt", "gemma3_text", "gpt_neox", "phi3"])
def test_other_families_walk_and_restore(family, make_model, ids, tmp_path):
    model = make_model(family)
    quantize(model, parse(FULL), ids, saved := no_blocks(tmp_path))
    again = make_model(family)
    for block in blocks_of(again):
        saved.restore(block)
        assert all(isinstance(m, QuantLinear) for m in block.linears().values())
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_block_restores_into_another_dtype(make_model, ids, tmp_path):
    quantize(make_model("llama"), parse(FULL), ids, saved := no_blocks(tmp_path))
    again = make_model("llama", dtype="bfloat16")
    for block in blocks_of(again):
        saved.restore(block)
    assert {p.dtype for p in again.model.layers.parameters()} == {torch.bfloat16}
    assert again(input_ids=ids).logits.isfinite().all()


def test_a_full_disk_leaves_nothing_behind(make_model, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("backend.model.checkpoint.os.fsync", full)
    saved = no_blocks(tmp_path)
    with pytest.raises(OSError, match=r"cannot write [\d,]+ bytes of block 0 .*No space left"):
        saved.save(blocks_of(make_model("llama"))[0])
    assert list(saved.folder.iterdir()) == []


def test_a_linear_of_an_unknown_kind_is_named(make_model, tmp_path, monkeypatch):
    block = blocks_of(make_model("llama"))[0]
    block.replace("mlp.up_proj", QuantLinear.from_linear(block.get("mlp.up_proj")))
    saved = no_blocks(tmp_path)
    saved.save(block)
    monkeypatch.setattr("backend.model.checkpoint.LINEARS", {})
    with pytest.raises(
        ValueError, match=r"'quant_linear' linear at mlp.up_proj, which no installed"
    ):
        saved.restore(block)


def test_a_model_with_positional_arguments_is_refused(make_model, ids, tmp_path, monkeypatch):
    model = make_model("llama")
    layer = model.model.layers[0]
    monkeypatch.setattr(
        type(layer), "__call__", lambda self, h, *a, **k: nn.Module.__call__(self, h, h, **k)
    )
    with pytest.raises(ValueError, match="takes positional arguments"):
        quantize(model, parse(GPTQ), ids, no_blocks(tmp_path))
