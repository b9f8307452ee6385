"""Every family on a tiny random model: names, walk, norm feeds; and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backend.model.families import FAMILIES, Block, blocks_of, family_of
from backend.model.quant_linear import QuantLinear
from backend.pipeline import Listener, first_inputs, output_of

SILENT = Listener(lambda *a: None, lambda m: None, lambda *a: None, lambda: False)
FED = [kind for kind, family in FAMILIES.items() if family.norm_feeds]


@pytest.fixture
def ids():
    """[5, 24] with windows longer than the tiny models' sliding window of 8."""
    return torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_table_names_every_linear_once(kind, make_model):
    model = make_model(kind)
    blocks = blocks_of(model)
    assert [block.index for block in blocks] == [0, 1, 2]
    family = blocks[0].family
    for path in (*family.embed, family.head, family.layers):
        model.get_submodule(path)
    for block in blocks:
        plain = {n for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
        assert sorted(name for wave in family.waves for name in wave) == sorted(plain)
        assert set(block.linears()) == plain


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@torch.no_grad()
def test_walking_the_blocks_gives_the_models_own_logits(kind, make_model, ids):
    model = make_model(kind)
    blocks = blocks_of(model)
    stream = first_inputs(model, blocks, ids, "cpu", SILENT)
    last: dict[str, torch.Tensor] = {}

    def keep(module, given, out):
        last["hidden"] = out[0] if isinstance(out, tuple) else out

    handle = blocks[-1].module.register_forward_hook(keep)
    model(input_ids=ids, use_cache=False)
    handle.remove()
    for block in blocks:
        stream.advance(block)
    # Batches of the walk are cut differently from the model's own, so sums may round differently.
    assert torch.allclose(stream.hidden, last["hidden"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_of_other_types_get_their_own_arguments(make_model, ids):
    model = make_model("gemma3_text")
    arguments = first_inputs(model, blocks_of(model), ids, "cpu", SILENT).arguments
    rotary = [a["position_embeddings"][0] for a in arguments]
    assert torch.equal(rotary[0], rotary[2])
    assert not torch.equal(rotary[0], rotary[1])
    assert arguments[0]["attention_mask"] is not None  # 24 tokens, a window of 8
    assert arguments[0]["attention_mask"] is arguments[2]["attention_mask"]


@pytest.mark.parametrize("kind", sorted(FED))
@torch.no_grad()
def test_scales_move_from_norms_to_readers_without_changing_logits(kind, make_model, ids):
    model = make_model(kind).double()
    before = model(input_ids=ids).logits
    for block in blocks_of(model):
        for number, feed in enumerate(block.family.norm_feeds):
            scale = torch.rand(64, dtype=torch.float64) + 0.5 + number
            norm, offset = block.get(feed.norm), block.family.norm_offset
            norm.weight.copy_((offset + norm.weight) / scale - offset)
            if getattr(norm, "bias", None) is not None:
                norm.bias.div_(scale)
            for name in feed.readers:
                block.get(name).weight.mul_(scale)
    after = model(input_ids=ids).logits
    # Gemma's norms compute in fp32 whatever the model, so their outputs keep 24 bits.
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_families_without_feeds_say_why(make_model):
    assert "feed the residual" in FAMILIES["olmo2"].why_no_feeds
    post_norm = make_model("opt", do_layer_norm_before=False)  # as OPT-350m
    family = blocks_of(post_norm)[0].family
    assert family.norm_feeds == ()
    assert "post-norm" in family.why_no_feeds
    assert family_of({"model_type": "opt", "layer_norm_elementwise_affine": False}).why_no_feeds
    assert family_of({"model_type": "opt"}).norm_feeds


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "lama"}, "'lama' has no entry in the table of families.*mean 'llama'"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "fused 3-D parameters"),
        ({"model_type": "qwen2_moe", "num_experts": 60}, "mixture of experts"),
        ({"model_type": "gemma3", "text_config": {"x": 1}}, "reads more than text"),
        ({}, "model type '' has no entry"),
    ],
)
def test_other_models_are_refused_with_what_is_missing(config, says):
    with pytest.raises(ValueError, match=says):
        family_of(config)


def test_fused_parameters_inside_a_known_type_are_refused(make_model):
    model = make_model("llama")
    model.model.layers[1].mlp.experts = nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match=r"mlp.experts of block 1 is a fused parameter.*4, 8, 8"):
        blocks_of(model)


def test_a_block_finds_and_replaces_its_linears(make_model):
    block = blocks_of(make_model("llama"))[0]
    old = block.get("mlp.up_proj")
    block.replace("mlp.up_proj", QuantLinear.from_linear(old))
    assert isinstance(block.get("mlp.up_proj"), QuantLinear)
    assert list(block.linears())[5] == "mlp.up_proj"
    assert not block.get("mlp.up_proj").training


def test_linears_inside_a_stand_in_are_not_listed():
    class Inside(QuantLinear):
        kind = ""

        def __init__(self):
            super().__init__(torch.zeros(2, 3), None, dtype=torch.float32)
            self.low_rank = nn.Linear(3, 2)

    outer = nn.Module()
    outer.first = Inside()
    outer.second = nn.Linear(2, 2)
    assert list(Block(0, outer, FAMILIES["llama"]).linears()) == ["first", "second"]


def test_a_block_goes_to_the_device_and_comes_back_even_after_an_error(make_model):
    moves = []

    class Mobile(nn.Linear):
        def to(self, device):
            moves.append(str(device))
            return self

    block = Block(0, Mobile(2, 2), FAMILIES["llama"])
    with pytest.raises(RuntimeError, match="inside"), block.on("cuda:1"):
        raise RuntimeError("inside")
    assert moves == ["cuda:1", "cpu"]


def test_output_of_takes_the_first_of_a_tuple():
    class Pair(nn.Module):
        def forward(self, hidden):
            return hidden + 1, "cache"

    block = Block(0, Pair(), FAMILIES["llama"])
    assert torch.equal(output_of(block, torch.zeros(1), {}), torch.ones(1))
