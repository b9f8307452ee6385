"""GGUF: bytes against the `gguf` package, searches against plain ranges, mixes, importance."""

from __future__ import annotations

from itertools import chain
from typing import Any

import gguf.quants
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn

from backend import recipes
from backend.formats import FORMATS
from backend.formats.gguf import GGUF, TABLE, TYPES, nearest_codes, nearest_level, place
from backend.formats.gguf_bytes import bits_per_weight, from_bytes, to_bytes
from backend.formats.gguf_fit import offset_scale, positive_scale, swept_scale, symmetric_scale
from backend.layer import quantize_layer
from backend.methods.gguf import MIX_NAMES, MIXES, GGUFQuantize, MeanSquare, Spot, more
from backend.model.families import LLAMA, Block, blocks_of
from backend.pipeline import quantize

every_type = pytest.mark.parametrize("name", TYPES)
LEGACY = [name for name in TYPES if not TYPES[name].scale_bits and name != "IQ4_NL"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> Tensor:
    """[40, 768]: rows of magnitudes 1e-4 to 1e3, a zero, a constant and two one-sided ones."""
    w = normal(40, 768) * torch.logspace(-4, 3, 40)[:, None]
    w[3], w[9] = 0, 0.75
    w[5], w[7] = w[5].abs(), -w[7].abs()
    return w


def theirs(data: Tensor, name: str) -> Tensor:
    """The package's own dequantizer: rows of bytes -> fp32."""
    with np.errstate(all="ignore"):  # random fp16 scales may be infinite
        return torch.from_numpy(gguf.quants.dequantize(data.numpy(), GGMLQuantizationType[name]))


def errors(name: str, w: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared errors [N, K]."""
    return (GGUF(type=name).quantize(w, importance).dequantize() - w).square()


@every_type
def test_encoded_bytes_decode_to_our_values(name):
    q = GGUF(type=name).quantize(weights())
    assert torch.equal(theirs(to_bytes(q), name), q.dequantize())


@every_type
def test_any_bytes_decode_to_the_same_values_and_back(name):
    """Every bit of a block, scales and all, has the place that the package reads it from."""
    make = torch.Generator().manual_seed(0)
    block = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    data = torch.randint(0, 256, (64, 3 * block), dtype=torch.uint8, generator=make)
    q = from_bytes(data, GGUF(type=name))
    assert torch.equal(to_bytes(q), data)
    expected = theirs(data, name)
    finite = expected.isfinite()
    assert finite.float().mean() > 0.8
    assert torch.equal(q.dequantize()[finite], expected[finite])


@every_type
def test_sizes_are_those_of_the_file(name):
    size, count = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert size == GGUF(type=name).group
    assert bits_per_weight(name) == 8 * count / size
    q = GGUF(type=name).quantize(weights())
    assert to_bytes(q).numel() * 8 / q.codes.numel() == sum(q.bits().values())


@pytest.mark.parametrize("name", LEGACY)
def test_bytes_of_plain_types_are_the_packages_own(name):
    """All fp16 scales normal numbers: see test_tiny_blocks for what ours does better."""
    w = weights()[12:]
    expected = gguf.quants.quantize(w.numpy(), GGMLQuantizationType[name])
    assert np.array_equal(to_bytes(GGUF(type=name).quantize(w)).numpy(), expected)


def test_tiny_blocks_follow_the_stored_scale():
    """Where fp16 has few digits left, codes chosen by the unrounded scale miss by whole steps."""
    w = normal(16, 768) * 1e-4
    plain = torch.from_numpy(
        gguf.quants.dequantize(
            gguf.quants.quantize(w.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
        )
    )
    ours = errors("Q8_0", w).sum()
    assert ours < 0.5 * (plain - w).square().sum()


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_a_second_encoding_changes_nothing(name):
    once = GGUF(type=name).quantize(weights()[12:])  # fp16 scales with all their digits
    again = GGUF(type=name).quantize(once.dequantize())
    assert torch.equal(to_bytes(again), to_bytes(once))


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_the_largest_weight_of_a_block_is_exact(name):
    w = normal(16, 320)
    q = GGUF(type=name).quantize(w)
    blocks, values = w.view(-1, 32), q.dequantize().view(-1, 32)
    at = blocks.abs().argmax(1, keepdim=True)
    peak, found = blocks.gather(1, at), values.gather(1, at)
    assert ((found - peak).abs() <= 2**-11 * peak.abs()).all()  # half a unit of fp16
    assert (q.codes.view(-1, 32).gather(1, at) == 0).all()


def test_an_equally_large_weight_of_the_other_sign_is_cut_by_a_step():
    w = torch.zeros(1, 32)
    w[0, 4], w[0, 5] = 8.0, -8.0
    assert GGUF(type="Q4_0").quantize(w).dequantize()[0, 4:6].tolist() == [8.0, -7.0]


# Relative squared error on 256 x 4096 standard normal numbers (the project's method reference,
# table 0.8, from llama.cpp's definitions). Tolerance 3 %, 5 % at 2 bits, as stated there.
ORACLE = {
    "Q8_0": 2.86e-5,
    "Q6_K": 3.14e-4,
    "Q5_K": 1.31e-3,
    "Q5_1": 1.43e-3,
    "Q5_0": 1.82e-3,
    "Q4_K": 5.14e-3,
    "IQ4_NL": 5.80e-3,
    "IQ4_XS": 5.89e-3,
    "Q4_1": 6.12e-3,
    "Q4_0": 7.37e-3,
    "Q3_K": 2.27e-2,
    "Q2_K": 8.87e-2,
}


def test_error_on_normal_numbers_and_its_order():
    w = normal(128, 4096, seed=5)
    found = {name: (errors(name, w).sum() / w.square().sum()).item() for name in ORACLE}
    for name, expected in ORACLE.items():
        assert found[name] == pytest.approx(expected, rel=0.05 if name == "Q2_K" else 0.03), name
    assert list(found.values()) == sorted(found.values())


def uneven(k: int) -> Tensor:
    """[k]: mean squares of inputs, a few channels far above the others, some never active."""
    value = torch.rand(k, generator=torch.Generator().manual_seed(1)) ** 6 * 10
    value[5::97] *= 100
    value[3::50] = 0
    return value


@every_type
def test_importance_lowers_the_error_it_weighs(name):
    w, importance = normal(64, 1024), uneven(1024)
    plain = (errors(name, w) * importance).sum()
    weighed = (errors(name, w, importance) * importance).sum()
    assert weighed <= plain
    assert name == "Q8_0" or weighed < 0.95 * plain


@every_type
def test_blocks_without_importance_are_not_lost(name):
    """Inputs that calibration never saw active: rounded as if all counted alike."""
    w, importance = normal(16, 512), uneven(512)
    importance[:256] = 0
    lost = (errors(name, w, importance)[:, :256]).sum() / w[:, :256].square().sum()
    assert lost < 2 * ORACLE[name]


def test_importance_of_ones_is_another_search():
    w = normal(32, 512)
    q, plain = GGUF(type="Q4_K").quantize(w, torch.ones(512)), GGUF(type="Q4_K").quantize(w)
    assert not torch.equal(to_bytes(q), to_bytes(plain))


def test_importance_changes_nothing_about_the_layout():
    w = normal(8, 512)
    for name in TYPES:
        q, plain = GGUF(type=name).quantize(w, uneven(512)), GGUF(type=name).quantize(w)
        assert to_bytes(q).shape == to_bytes(plain).shape
        assert q.bits() == plain.bits()
        assert torch.equal(theirs(to_bytes(q), name), q.dequantize())


@every_type
def test_scale_of_the_weights_does_not_matter(name):
    """Powers of two within fp16's normal range go through untouched."""
    w, fmt = normal(8, 512), GGUF(type=name)
    for power in (-2, 6):
        q = fmt.quantize(w * 2.0**power, uneven(512))
        assert torch.equal(q.dequantize(), fmt.quantize(w, uneven(512)).dequantize() * 2.0**power)


@every_type
def test_huge_and_tiny_weights_stay_finite(name):
    w = normal(24, 512) * torch.logspace(-30, 30, 24)[:, None]
    for importance in (None, uneven(512)):
        assert GGUF(type=name).quantize(w, importance).dequantize().isfinite().all()


def test_searches_beat_the_plain_peak_and_range():
    x = normal(200, 32)
    mass = x.square()

    def missed(scale: Tensor, low: int, high: int) -> Tensor:
        value = scale * (x / scale).round().clamp(low, high)
        return (mass * (value - x).square()).sum(1)

    peak = x.gather(1, x.abs().argmax(1, keepdim=True))
    start = peak / -4
    assert (missed(symmetric_scale(x, mass, 4), -4, 3) <= missed(start, -4, 3) * 1.0001).all()
    swept = missed(swept_scale(x, mass, start, -4, 3), -4, 3)
    assert swept.sum() < missed(start, -4, 3).sum()
    search = TYPES["Q4_K"].search
    assert search is not None
    scale, offset = offset_scale(x, mass, 15, search)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step = (high - low) / 15

    def ranged(scale: Tensor, offset: Tensor) -> Tensor:
        value = scale * ((x - offset) / scale).round().clamp(0, 15) + offset
        return (mass * (value - x).square()).sum(1)

    assert (offset <= 0).all()
    assert (ranged(scale, offset) <= ranged(step, low) * 1.0001).all()


def test_positive_scales_are_near_the_best_of_a_fine_grid():
    x = normal(100, 8).abs()
    mass = normal(100, 8, seed=1).abs()

    def missed(scale: Tensor) -> Tensor:
        return (mass * (scale * (x / scale).round().clamp(0, 15) - x).square()).sum(1)

    grid = x.amax(1, keepdim=True) / 15 * torch.linspace(0.7, 1.3, 600)
    best = torch.stack([missed(column[:, None]) for column in grid.T]).amin(0)
    found = missed(positive_scale(x, mass, 15))
    assert found.sum() < 1.5 * best.sum()
    assert found.sum() < 0.8 * missed(x.amax(1, keepdim=True) / 15).sum()


def test_nearest_levels_equal_brute_force():
    levels = torch.tensor(TABLE, dtype=torch.float32)
    x = torch.cat([torch.linspace(-140, 130, 9001), torch.tensor([-1e30, 1e30, 0.0])])
    brute = (x[:, None] - levels).abs().min(1).values
    assert torch.equal((nearest_level(x) - x).abs(), brute)
    assert torch.equal(levels[nearest_codes()[place(x)].long()], nearest_level(x))


@pytest.mark.parametrize(
    ("name", "k", "other"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q2_K", 128, "Q4_0"),
        ("Q3_K", 96, "Q4_0"),
        ("Q4_K", 128, "Q5_0"),
        ("Q5_K", 128, "Q5_1"),
        ("Q6_K", 128, "Q8_0"),
        ("IQ4_XS", 288, "IQ4_NL"),
        ("Q4_K", 100, None),
        ("Q8_0", 100, None),
    ],
)
@pytest.mark.parametrize("kind", ["rtn", "gguf"])
def test_rows_that_blocks_do_not_divide_take_another_type(kind, name, k, other):
    step: dict[str, Any] = {"kind": "rtn", "format": {"kind": "gguf", "type": name}}
    if kind == "gguf":
        mix = name if name in MIX_NAMES else f"{name}_S"
        step = {"kind": "gguf", "mix": mix}
    w = normal(8, k)
    layer = quantize_layer(step, w)
    if other is None:
        assert torch.equal(layer.weight, w)
        assert layer.bits_per_weight == 16
    else:
        assert torch.equal(layer.weight, GGUF(type=other).fake(w))
        assert layer.bits_per_weight == bits_per_weight(other)
    assert len(layer.notes) == (other != name)
    if other != name:
        assert f"type={other}" in layer.notes[0] or (other is None and "16 bits" in layer.notes[0])


def test_a_file_cannot_hold_a_short_block():
    q = GGUF(type="Q4_K").quantize(normal(4, 300))  # without a method around it: a short last block
    assert q.dequantize().shape == (4, 300)
    with pytest.raises(ValueError, match="do not divide rows of 300"):
        to_bytes(q)
    with pytest.raises(ValueError, match="only gguf"):
        to_bytes(FORMATS.build({"kind": "int"}).quantize(normal(4, 32)))


def test_gptq_takes_blocks_as_its_grid():
    """Scales are fitted when the sweep reaches a block and stay; the bytes are a file's."""
    w, x = normal(32, 512), normal(300, 512, seed=2) @ normal(512, 512, seed=3) / 512**0.5
    for name in ("Q4_0", "Q4_K", "Q3_K"):
        grid = {"kind": "gguf", "type": name}
        plain = quantize_layer({"kind": "rtn", "format": grid}, w)
        layer = quantize_layer({"kind": "gptq", "format": grid}, w, inputs=x)
        assert (layer(x) - x @ w.T).square().sum() < 0.8 * (plain(x) - x @ w.T).square().sum()
        q = layer.module.qtensor
        assert torch.equal(theirs(to_bytes(q), name), layer.weight)


def test_mean_square_is_the_mean_over_all_tokens():
    x = normal(5, 7, 16)
    stat = MeanSquare(16)
    stat.update(x[:2])
    stat.update(x[2:])
    torch.testing.assert_close(stat.value, x.square().mean((0, 1)))


def test_an_importance_matrix_lowers_the_output_error():
    w, x = normal(64, 512), normal(600, 512, seed=2) * uneven(512).sqrt()
    for mix in ("Q4_K_M", "Q2_K", "Q4_0"):
        step = {"kind": "gguf", "mix": mix, "pure": True}
        missed = [
            (quantize_layer(step | {"imatrix": use}, w, inputs=x)(x) - x @ w.T).square().sum()
            for use in (False, True)
        ]
        assert missed[1] < 0.9 * missed[0], mix


def test_without_an_importance_matrix_no_data_is_needed():
    assert GGUFQuantize().wanted() == ()
    assert GGUFQuantize().prefix == "quantized"
    assert GGUFQuantize(imatrix=True).prefix == "original"
    with pytest.raises(ValueError, match="needs calibration inputs"):
        quantize_layer({"kind": "gguf", "imatrix": True}, normal(8, 256))


def test_silent_inputs_are_a_note():
    layer = quantize_layer({"kind": "gguf", "imatrix": True}, normal(8, 256), torch.zeros(20, 256))
    assert "without importance" in layer.notes[0]
    assert torch.equal(layer.weight, GGUF(type="Q4_K").fake(normal(8, 256)))


class Little(nn.Module):
    """The linears of a Llama block, 256 wide, with `shared` query heads per value head."""

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, rows in (("q", 64), ("k", 64 // shared), ("v", 64 // shared), ("o", 64)):
            self.self_attn.add_module(f"{name}_proj", nn.Linear(256, rows))
        for name in ("gate", "up", "down"):
            self.mlp.add_module(f"{name}_proj", nn.Linear(256, 64))


def types_of(mix: str, blocks: int, shared: int = 1, **knobs: Any) -> dict[str, list[str]]:
    """{linear: type in each block}."""
    module, step = Little(shared), GGUFQuantize(mix=mix, **knobs)  # type: ignore[arg-type]
    found: dict[str, list[str]] = {}
    for index in range(blocks):
        block = Block(index, module, LLAMA)
        for name in block.linears():
            part = step.on_linear(block, blocks, name)
            assert isinstance(part, GGUFQuantize)
            found.setdefault(name.rpartition(".")[2], []).append(part.format.type)
    return found


def test_more_bits_in_the_first_and_last_eighth_and_every_third_block():
    chosen = [i for i in range(32) if more(Spot(i, 32, 1, False))]
    assert chosen == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_mixes_are_those_of_llama_cpp():
    medium = types_of("Q4_K_M", 32)
    assert medium["v_proj"] == medium["down_proj"]
    assert medium["v_proj"].count("Q6_K") == 16
    assert set(medium["q_proj"] + medium["o_proj"] + medium["up_proj"]) == {"Q4_K"}
    small = types_of("Q4_K_S", 32)
    assert small["v_proj"] == small["down_proj"] == ["Q5_K"] * 4 + ["Q4_K"] * 28
    three = types_of("Q3_K_M", 32)
    assert three["v_proj"] == three["down_proj"] == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert set(three["o_proj"]) == {"Q4_K"}
    assert set(three["gate_proj"]) == {"Q3_K"}
    two, grouped = types_of("Q2_K", 8), types_of("Q2_K", 8, shared=4)
    assert set(two["v_proj"] + two["o_proj"] + two["down_proj"]) == {"Q3_K"}
    assert set(grouped["v_proj"]) == {"Q4_K"}
    assert set(two["q_proj"]) == {"Q2_K"}
    assert set(types_of("Q6_K", 8)["v_proj"]) == {"Q6_K"}
    legacy = types_of("Q4_0", 16, imatrix=True)
    assert legacy["down_proj"] == ["Q4_1"] * 2 + ["Q4_0"] * 14
    for mix in MIXES:
        assert set(chain(*types_of(mix, 16, pure=True).values())) == {
            GGUFQuantize(mix=mix).format.type  # type: ignore[arg-type]
        }


def test_published_bits_of_a_mix():
    """Llama-3-8B's linears as Q4_K_M: 4.83 bits a weight, from the shares of its linears."""
    sizes = {"q": 4096, "k": 1024, "v": 1024, "o": 4096, "gate": 14336, "up": 14336}
    rows = {f"{name}_proj": rows * 4096 for name, rows in sizes.items()} | {
        "down_proj": 4096 * 14336
    }
    types = types_of("Q4_K_M", 32, shared=4)
    bits = sum(bits_per_weight(t) * rows[name] for name in rows for t in types[name])
    # half of v and down_proj at 6.5625 bits, the rest at 4.5
    share = (rows["v_proj"] + rows["down_proj"]) / sum(rows.values()) / 2
    assert bits / 32 / sum(rows.values()) == pytest.approx(4.5 + share * (6.5625 - 4.5))


class Forgetful:
    """A checkpoint that keeps nothing."""

    def has(self, index: int) -> bool:
        return False

    def save(self, block: Block) -> None: ...

    def restore(self, block: Block) -> None:
        raise AssertionError("nothing was saved")


def test_rules_come_before_the_mix(make_model):
    text = "gguf(mix=Q8_0,layers=[on(modules=down_proj,mix=Q4_0),on(modules=up_proj,keep=true)])"
    model, ids = make_model("llama"), torch.zeros(2, 16, dtype=torch.long)
    quantize(model, recipes.parse(text), ids, Forgetful())
    for block in blocks_of(model):
        linears = block.linears()
        assert isinstance(linears["mlp.up_proj"], nn.Linear)
        assert linears["mlp.down_proj"].qtensor.format.type == "Q4_0"
        assert linears["self_attn.q_proj"].qtensor.format.type == "Q8_0"


def test_bad_names_get_one_sentence():
    with pytest.raises(ValueError, match="gguf: mix = 'Q7_K'"):
        recipes.parse("gguf(mix=Q7_K)")
    with pytest.raises(ValueError, match="gguf: type = 'Q4_K_M'"):
        recipes.parse("rtn(format=gguf(type=Q4_K_M))")
