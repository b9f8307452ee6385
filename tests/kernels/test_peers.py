"""Products of PyTorch and bitsandbytes: on a CPU, where they run there, against what they claim."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from kernels.base import Case, kernels
from kernels.integers import int_format
from kernels.peers import bnb_4bit, bnb_int8, int_mm, made, makers, peers, scaled_mm, tinygemm

INT8 = int_format(bits=8, symmetric=True)
INT8_CASE = Case(3, 96, 256, INT8, INT8)
NF4 = {"kind": "codebook", "table": "nf4", "group": 64, "double_quant": False}
NF4_CASE = Case(3, 96, 256, NF4)


def numbers(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, k] and w [n, k], bf16."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, case.k, generator=g).bfloat16() for rows in (case.m, case.n))


@pytest.mark.parametrize("name", sorted(kernels()))
def test_a_cpu_has_no_peers(name):
    for case in kernels()[name].cases:
        assert not list(peers(case, numbers(case)[1], torch.device("cpu")))


@pytest.mark.parametrize(
    ("weight", "act", "found"),
    [
        (int_format(bits=4, group=128), None, (tinygemm,)),
        (int_format(bits=4, group=128), INT8, ()),
        (int_format(bits=3, group=128), None, ()),
        (INT8, None, ()),
        (INT8, INT8, (int_mm, bnb_int8)),
        ({"kind": "minifloat", "type": "fp8_e4m3"}, {"kind": "minifloat"}, (scaled_mm,)),
        ({"kind": "minifloat", "type": "fp8_e4m3"}, None, ()),
        (NF4, None, (bnb_4bit,)),
        ({"kind": "llm_int8", "bits": 8}, None, (bnb_int8,)),
        ({"kind": "gguf", "type": "Q4_K"}, None, ()),
    ],
)
def test_peers_are_of_the_same_width(weight, act, found):
    assert makers(Case(1, 64, 64, weight, act)) == found


@pytest.mark.parametrize(("make", "case"), [(bnb_4bit, NF4_CASE), (bnb_int8, INT8_CASE)])
def test_without_the_library_there_is_no_peer(make, case, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert made(make, case, numbers(case)[1]) is None


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_4_bits_are_what_it_says(table, double):
    pytest.importorskip("bitsandbytes")
    case = replace(NF4_CASE, weight={**NF4, "table": table, "double_quant": double})
    x, w = numbers(case)
    peer = made(bnb_4bit, case, w)
    assert peer.error(x) < 8e-3  # a result in bf16
    scales = 96 * 256 // 64
    assert peer.bytes == 96 * 256 // 2 + (
        scales + 4 * -(-scales // 256) + 1024 if double else 4 * scales
    )
    (codes, state), (other, others) = peer.held, peer.clone(peer.held)
    assert codes.data_ptr() != other.data_ptr()
    assert state.absmax.data_ptr() != others.absmax.data_ptr()
    assert torch.equal(peer.product(x, peer.held), peer.product(x, (other, others)))


@pytest.mark.parametrize("group", [0, 48])
def test_blocks_that_bitsandbytes_does_not_have_are_no_peer(group):
    pytest.importorskip("bitsandbytes")
    case = replace(NF4_CASE, k=288, weight={**NF4, "group": group})
    assert made(bnb_4bit, case, numbers(case)[1]) is None


def test_int8_of_bitsandbytes_is_what_it_says(caplog):
    pytest.importorskip("bitsandbytes")
    x, w = numbers(INT8_CASE)
    peer = made(bnb_int8, INT8_CASE, w)
    assert peer.error(x) < 8e-3
    assert peer.bytes == 96 * 256 + 4 * 96
    assert peer.product(x, peer.held).dtype == torch.bfloat16
    assert peer.clone(peer.held)[0].CB.data_ptr() != peer.held[0].CB.data_ptr()
    assert not caplog.records  # it casts bf16 itself, and says so each time


def test_int8_of_pytorch_is_what_it_says():
    x, w = numbers(INT8_CASE)
    peer = made(int_mm, INT8_CASE, w)
    assert peer.error(x) < 8e-3
    assert peer.bytes == 96 * 256 + 4 * 96
