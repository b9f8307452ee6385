"""`minifloat` against torch's own 8-bit types, an enumeration of every number, and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend import recipes
from backend.formats.int_group import IntGroup
from backend.formats.minifloat import LAYOUTS, Minifloat, values_of
from backend.layer import quantize_layer
from backend.model.stats import AbsMax, LayerStats

TYPES = sorted(LAYOUTS)
TORCH = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# Smallest normal number, share of it that is a subnormal step, bits of mantissa.
NORMAL = {"fp8_e4m3": (2.0**-6, 3), "fp8_e5m2": (2.0**-14, 2), "fp4_e2m1": (1.0, 1)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def finite(name: str) -> Tensor:
    """Codes of the finite numbers of a type."""
    layout = LAYOUTS[name]
    magnitude = torch.arange(layout.top + 1)
    return torch.cat([magnitude, magnitude + layout.sign])


@pytest.mark.parametrize("name", sorted(TORCH))
def test_every_code_means_what_torch_says(name):
    codes = finite(name)
    assert len(codes) == {"fp8_e4m3": 254, "fp8_e5m2": 248}[name]
    theirs = codes.to(torch.uint8).view(TORCH[name]).float()
    assert torch.equal(values_of(LAYOUTS[name])[codes], theirs)
    assert Minifloat(type=name).largest == torch.finfo(TORCH[name]).max


def test_fp4_by_hand():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert values_of(LAYOUTS["fp4_e2m1"]).tolist() == values + [-v for v in values]
    fmt = Minifloat(type="fp4_e2m1", group=4)
    q = fmt.quantize(torch.tensor([[12.0, -5.0, 1.1, 0.4]]))  # scale 2: 6, -2.5, 0.55, 0.2
    assert q.params["scale"].tolist() == [[2.0]]
    assert q.codes.tolist() == [[7, 8 + 4, 1, 0]]  # -2.5 is a tie: to the even mantissa of 2
    assert q.dequantize().tolist() == [[12.0, -4.0, 1.0, 0.0]]


@pytest.mark.parametrize("name", TYPES)
def test_all_finite_codes_come_back(name):
    fmt, codes = Minifloat(type=name), finite(name)
    again = fmt.cast(values_of(LAYOUTS[name])[codes]).long()
    again[codes == LAYOUTS[name].sign] = LAYOUTS[name].sign  # -0 is stored as 0
    assert torch.equal(again, codes)


@pytest.mark.parametrize("name", sorted(TORCH))
def test_casts_are_those_of_torch(name):
    """All of fp32's exponents, ties and neighbours of ties; torch is given no overflow."""
    fmt, layout = Minifloat(type=name), LAYOUTS[name]
    levels = values_of(layout)[: layout.top + 1]
    ties = (levels[1:] + levels[:-1]) / 2
    near = [ties.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    wide = normal(4096) * torch.logspace(-20, 0, 4096, base=10) * fmt.largest
    x = torch.cat([levels, ties, *near, wide.clamp(-fmt.largest, fmt.largest)])
    x = torch.cat([x, -x])
    ours = values_of(layout)[fmt.cast(x).long()]
    assert torch.equal(ours, x.to(TORCH[name]).float())


@pytest.mark.parametrize("name", TYPES)
def test_casts_take_the_nearest_number(name):
    levels = values_of(LAYOUTS[name]).unique()
    x = normal(2000) * levels.max() / 3
    ours = values_of(LAYOUTS[name])[Minifloat(type=name).cast(x).long()]
    least = (x[:, None] - levels).abs().amin(1)
    assert torch.equal((ours - x).abs(), least)


@pytest.mark.parametrize("name", TYPES)
def test_what_lies_past_the_range_takes_its_end(name):
    fmt = Minifloat(type=name)
    x = torch.tensor([1.0001, 2, 1e6, torch.inf]) * fmt.largest
    for sign in (1, -1):
        values = values_of(fmt.layout)[fmt.cast(sign * x).long()]
        assert (values == sign * fmt.largest).all()


@pytest.mark.parametrize("name", TYPES)
def test_errors_are_relative_above_the_subnormals_and_absolute_below(name):
    w = normal(16, 512) * torch.logspace(-8, 0, 512)
    q = Minifloat(type=name).quantize(w)
    smallest, mantissa = NORMAL[name]
    error, scale = (q.dequantize() - w).abs(), q.params["scale"].expand_as(w)
    usual = w.abs() >= smallest * scale
    # Half of the last place of 1.000; 1e-6: quotient and product are rounded to fp32.
    assert (error[usual] <= w.abs()[usual] * (2.0 ** -(mantissa + 1) + 1e-6)).all()
    step = smallest * 2.0**-mantissa * scale
    assert (error[~usual] <= 0.5001 * step[~usual]).all()


def test_large_and_small_finite_numbers_stay_finite():
    w = normal(6, 32) * torch.tensor([1e-44, 1e-38, 1e-30, 1.0, 1e30, 1e37])[:, None]
    for name in TYPES:
        for dtype in ("float32", "float16", "bfloat16"):
            assert Minifloat(type=name, scale_dtype=dtype).fake(w).isfinite().all()


def test_outliers_of_a_token_cost_its_other_channels_less_than_in_int8():
    x = normal(64, 512)
    rest = x.clone()
    x[:, 7] *= 1000
    rest[:, 7] = 0
    errors = []
    for fmt in (Minifloat(), IntGroup(bits=8, symmetric=True)):
        off = fmt.fake(x) - x
        off[:, 7] = 0
        errors.append((off.square().sum() / rest.square().sum()).item())
    assert errors[0] < 0.1 * errors[1]


def test_error_on_normal_numbers():
    """Target of the project's method reference, section 0.8, at its 3 %."""
    w = normal(256, 4096)
    error = ((Minifloat().fake(w) - w).square().sum() / w.square().sum()).item()
    assert error == pytest.approx(7.0e-4, rel=0.03)
    exact = ((IntGroup(bits=8).fake(w) - w).square().sum() / w.square().sum()).item()
    assert error > 8 * exact  # without outliers, integers are the finer grid


def test_scales_cover_tensor_row_and_group():
    w = normal(8, 96)
    tensor = Minifloat(per_tensor=True).quantize(w)
    assert torch.equal(tensor.params["scale"], w.abs().max().view(1, 1) / 448)
    row = Minifloat().quantize(w)
    torch.testing.assert_close(row.params["scale"], w.abs().amax(1, keepdim=True) / 448)
    group = Minifloat(group=64).quantize(w)
    assert group.params["scale"].shape == (8, 2)
    assert sum(row.bits().values()) == 8 + 32 / 96
    assert sum(Minifloat(type="fp4_e2m1", group=32).quantize(w).bits().values()) == 5
    with pytest.raises(ValueError, match="group 16"):
        Minifloat(per_tensor=True, group=16)


def stats_of(x: Tensor) -> LayerStats:
    """What calibration gathers of x."""
    stats = LayerStats({AbsMax: AbsMax(x.shape[-1])})
    stats.update(x)
    return stats


def test_static_scales_clip_at_the_calibration_peak():
    x = normal(50, 32)
    step = {"kind": "activations", "format": {"kind": "minifloat", "per_tensor": True}}
    layer = quantize_layer({**step, "static": True}, torch.eye(32), inputs=x)
    torch.testing.assert_close(layer(x), Minifloat(per_tensor=True).fake(x))
    assert layer(100 * x).abs().max().item() == pytest.approx(x.abs().max().item(), rel=1e-5)
    with pytest.raises(ValueError, match="finite"):
        Minifloat().calibrate(stats_of(torch.tensor([[1.0, torch.inf]])))
    with pytest.raises(ValueError, match="group=0"):
        Minifloat(group=16).calibrate(stats_of(x))
    with pytest.raises(ValueError, match="group=0"):
        recipes.parse("activations(format=minifloat(group=16),static=true)")


def test_tokens_do_not_meet():
    layer = quantize_layer({"kind": "activations", "format": {"kind": "minifloat"}}, torch.eye(32))
    x = normal(20, 32)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("name", TYPES)
def test_gptq_rounds_to_minifloats(name, group):
    """Less output error than rounding, for every type."""
    w, x = normal(48, 128), normal(1024, 128, seed=1) @ (normal(128, 128, seed=2) / 11)
    fmt = {"kind": "minifloat", "type": name, "group": group}
    layer = quantize_layer({"kind": "gptq", "format": fmt}, w, inputs=x)
    plain = quantize_layer({"kind": "rtn", "format": fmt}, w)
    ours, theirs = ((x @ (made.weight - w).T).square().sum() for made in (layer, plain))
    assert ours < 0.6 * theirs
    assert layer.notes == []
    assert layer.bits == plain.bits
