"""`codebook` against bitsandbytes' outputs, closed forms and the errors of normal numbers."""

from __future__ import annotations

import pytest
import torch
from test_vectors import FOLDER, arrays, configs
from torch import Tensor

from backend import recipes
from backend.formats.base import QTensor
from backend.formats.codebook import BLOCK, Codebook, table
from backend.formats.int_group import IntGroup
from backend.layer import quantize_layer

with_vectors = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no test vectors at {FOLDER}")
FOUR_BIT = {name: how for name, how in configs("bnb_a").items() if "quant_type" in how}


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(fmt: Codebook | IntGroup, w: Tensor) -> float:
    """Squared error over squared weights."""
    return ((fmt.fake(w) - w).square().sum() / w.square().sum()).item()


def block_scales(q: QTensor) -> Tensor:
    """[N, G] fp32, as decoding uses them."""
    fmt, groups = q.format, q.params["scale"].shape[1]
    assert isinstance(fmt, Codebook)
    return torch.cat([fmt._scale(fmt.params_of(q.params, i)) for i in range(groups)], 1)


@with_vectors
@pytest.mark.parametrize("name", FOUR_BIT)
def test_bitsandbytes(name):
    how, data = FOUR_BIT[name], arrays("bnb_a")
    # bitsandbytes' blocks run over the flattened tensor: one long row where they do not divide it.
    ragged = name.startswith("ragged")
    w = data["in_W4_ragged"].view(1, -1) if ragged else data["in_W4"]
    fmt = {
        "kind": "codebook",
        "table": how["quant_type"],
        "group": how["blocksize"],
        "double_quant": how["double_quant"],
        "chosen_by": "released",
    }
    layer = quantize_layer({"kind": "rtn", "format": fmt}, w)
    q = layer.module.qtensor
    packed = data[f"{name}__packed"]  # the first element in the high half
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: w.numel()].view(w.shape)
    levels = q.format.levels
    assert (levels[q.codes.long()] != levels[codes.long()]).float().mean() <= 0.001
    out = data[f"{name}__out"].view(w.shape)
    torch.testing.assert_close(layer.weight, out, rtol=1e-5, atol=0)
    assert (layer.weight - w).square().mean().item() == pytest.approx(how["mse"], rel=1e-5)
    if not how["double_quant"]:
        assert torch.equal(q.params["scale"].flatten(), data[f"{name}__absmax"])
        return
    assert torch.equal(q.params["scale"].flatten(), data[f"{name}__absmax_q8"])
    torch.testing.assert_close(q.params["second"].flatten(), data[f"{name}__absmax2"])
    torch.testing.assert_close(q.params["offset"].flatten(), data[f"{name}__absmax_offset"])
    # The block of zeros gets a scale slightly below 0 there, 0 here; its weights are 0 either way.
    dequantized = data[f"{name}__absmax_dequant"].clamp_min(0)
    torch.testing.assert_close(block_scales(q).flatten(), dequantized, rtol=1e-5, atol=0)


@with_vectors
def test_tables_are_the_released_ones():
    data = arrays("bnb_a")
    # 0.9677083, the outermost quantile, is printed to seven digits: 2e-7.
    torch.testing.assert_close(table("nf4"), data["nf4__code"], rtol=0, atol=2e-7)
    assert torch.equal(table("fp4"), data["fp4__code"])
    assert torch.equal(table("dynamic8"), data["dynamic8bit__code"])


def test_tables_by_hand():
    nf4, fp4, dynamic = table("nf4"), table("fp4"), table("dynamic8")
    assert (nf4.diff() > 0).all()
    assert (nf4[0].item(), nf4[7].item(), nf4[15].item()) == (-1, 0, 1)
    assert nf4[1].item() == pytest.approx(-0.69619280, abs=2e-7)
    assert nf4[8].item() == pytest.approx(0.07958030, abs=2e-7)
    assert not torch.equal(nf4, -nf4.flip(0))  # 8 levels above 0, 7 below
    assert torch.equal(fp4[:8], -fp4[8:])
    assert (12 * fp4[:8]).tolist() == pytest.approx([0, 0.0625, 8, 12, 4, 6, 2, 3], rel=1e-6)
    assert dynamic.shape == (256,)
    assert (dynamic.diff() > 0).all()
    assert {0.0, 1.0} <= set(dynamic.tolist())


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_every_weight_takes_its_nearest_level(name):
    w = normal(24, 96)
    q = Codebook(table=name, group=32).quantize(w)
    units = w.view(24, 3, 32)
    levels = q.params["scale"][..., None, None] * table(name)  # [N, G, 1, 16]
    least = (units[..., None] - levels).abs().amin(-1)
    torch.testing.assert_close((q.dequantize() - w).abs(), least.view(w.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_peak_of_a_block_and_zero_are_exact(name, sign):
    w = normal(16, 128)
    w[:, 5] = 0
    where = torch.arange(16)
    w[where, 64 + where] = sign * 9 * w[where, 64 + where].abs().clamp_min(1)
    rounded = Codebook(table=name).fake(w)
    assert torch.equal(rounded[where, 64 + where], w[where, 64 + where])
    assert not rounded[:, 5].any()
    assert not Codebook(table=name, double_quant=True).fake(w)[:, 5].any()


def test_error_on_normal_numbers():
    """Targets of the project's method reference, section 0.8, at its 3 %."""
    w = normal(256, 4096)
    for group, error in ((32, 7.61e-3), (64, 8.43e-3), (128, 9.12e-3)):
        assert relative_error(Codebook(group=group), w) == pytest.approx(error, rel=0.03)
    nf4, fp4 = relative_error(Codebook(), w), relative_error(Codebook(table="fp4"), w)
    int4 = relative_error(IntGroup(symmetric=True, group=64), w)
    assert fp4 == pytest.approx(1.49e-2, rel=0.03)
    assert nf4 < int4 < fp4
    for chosen_by in ("stored", "released"):
        twice = relative_error(Codebook(double_quant=True, chosen_by=chosen_by), w)
        assert twice < 1.001 * nf4


def test_codes_chosen_by_the_stored_scale_err_less():
    w = normal(64, 512) * torch.logspace(-2, 0, 64)[:, None]
    stored, released = (
        relative_error(Codebook(double_quant=True, chosen_by=how), w)
        for how in ("stored", "released")
    )
    assert stored < released


def test_double_quantization_moves_a_scale_by_a_hundredth_of_its_block():
    w = normal(40, 1024) * torch.rand(40, 1, generator=torch.Generator().manual_seed(1))
    plain, twice = Codebook().quantize(w), Codebook(double_quant=True).quantize(w)
    assert twice.params["scale"].dtype == torch.uint8
    assert twice.params["second"].shape == (3, 1)  # 640 scales in blocks of 256
    second = twice.params["second"].flatten().repeat_interleave(BLOCK)[:640].view(40, 16)
    moved = (block_scales(twice) - plain.params["scale"]).abs()
    assert (moved <= 0.01 * second).all()
    assert (block_scales(twice) >= 0).all()


def test_bits_of_blocks_of_64():
    w = normal(1024, 1024)  # 16384 scales
    assert sum(Codebook().quantize(w).bits().values()) == 4.5
    assert sum(Codebook(scale_dtype="float16").quantize(w).bits().values()) == 4.25
    twice = Codebook(double_quant=True).quantize(w).bits()
    # and 32 bits of the mean
    assert sum(twice.values()) == 4 + 8 / 64 + 32 / (64 * 256) + 32 / w.numel()
    assert sum(twice.values()) == pytest.approx(4.127, abs=5e-4)


def test_without_double_quantization_rows_do_not_meet():
    w = normal(24, 100)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    for fmt in (Codebook(), Codebook(table="fp4", group=0)):
        assert torch.equal(fmt.fake(w[order]), fmt.fake(w)[order])


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("how", [{}, {"act_order": True}, {"act_order": True, "static": True}])
def test_gptq_rounds_to_codebooks(how, double_quant):
    """Less output error than rounding, and the stored codes are the weights that it meant."""
    w, x = normal(48, 256), normal(1024, 256, seed=1) @ (normal(256, 256, seed=2) / 16)
    fmt = {"kind": "codebook", "group": 64, "double_quant": double_quant}
    knobs = {"act_order": "act_order" in how, "static_groups": "static" in how}
    layer = quantize_layer({"kind": "gptq", "format": fmt, **knobs}, w, inputs=x)
    plain = quantize_layer({"kind": "rtn", "format": fmt}, w)
    ours, theirs = ((x @ (made.weight - w).T).square().sum() for made in (layer, plain))
    assert ours < 0.5 * theirs
    assert layer.notes == []
    q = layer.module.qtensor
    assert q.format.double_quant == double_quant
    # Static groups are those of rounding; on the others the scales follow the updated weights.
    if knobs["static_groups"]:
        assert torch.equal(block_scales(q), block_scales(plain.module.qtensor))
    torch.testing.assert_close(block_scales(q), block_scales(plain.module.qtensor), rtol=1, atol=0)


def test_gptq_rounds_to_a_codebook_per_row():
    w, x = normal(48, 96), normal(512, 96, seed=1) @ (normal(96, 96, seed=2) / 10)
    for double_quant in (False, True):
        fmt = {"kind": "codebook", "group": 0, "double_quant": double_quant}
        layer = quantize_layer({"kind": "gptq", "format": fmt}, w, inputs=x)
        plain = quantize_layer({"kind": "rtn", "format": fmt}, w)
        ours, theirs = ((x @ (made.weight - w).T).square().sum() for made in (layer, plain))
        assert ours < 0.7 * theirs


def test_bad_tables_get_one_sentence():
    with pytest.raises(ValueError, match="table = 'nf3'"):
        recipes.parse("rtn(format=codebook(table=nf3))")
    with pytest.raises(ValueError, match="no static activation scales"):
        quantize_layer(
            {"kind": "activations", "format": {"kind": "codebook", "group": 0}, "static": True},
            normal(8, 32),
            inputs=normal(16, 32),
        )
