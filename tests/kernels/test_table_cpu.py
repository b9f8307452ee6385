"""table_cpu.c, and the rows it reads in plain torch, against every class's own definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import bcq, codebook, fp8, gguf, sdr, spqr, table_cpu
from kernels.base import Case
from kernels.table_cpu import PLAIN, Table, multiply, pack_rows, unpack_rows

needs_c = pytest.mark.skipif(not table_cpu.enough(), reason="no compiler, or no AVX-512 for bf16")
FORMS = (1, 2, 3, 4, 5, 6, 8)
CASES = [
    pytest.param(kernel.KERNEL, replace(case, m=m, n=min(case.n, 130), k=min(case.k, 1024)))
    for kernel in (bcq, codebook, fp8, gguf, sdr, spqr)
    for case, m in zip(kernel.KERNEL.cases, (1, 3, 9, 4, 17, 2) * 6, strict=False)
]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """new_empty gives NaN, so an element that is never written shows."""
    make = torch.Tensor.new_empty

    def empty(*args, **kwargs):
        made = make(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", empty)


@pytest.fixture(params=[1, 2])
def threads(request):
    """As many threads as that."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def error(y, exact):
    """||y - exact|| / ||exact||."""
    return float((y.double() - exact).norm() / exact.norm())


@given(st.sampled_from(FORMS), st.integers(1, 9), st.integers(1, 1100))
@settings(max_examples=60, deadline=None)
def test_packing_round_trip(form, n, k):
    rng = torch.Generator().manual_seed(n * k)
    codes = torch.randint(0, 2**form, (n, k), generator=rng, dtype=torch.uint8)
    words = pack_rows(codes, form)
    assert words.numel() * 8 == n * table_cpu.padded(k, form) * form
    assert torch.equal(unpack_rows(words, form, k), codes)


@needs_c
@pytest.mark.parametrize("group", [16, 32, 48, 64, 128, 0])
@pytest.mark.parametrize("form", FORMS)
def test_product_is_the_sum(form, group, threads):
    if form == 5 and group % 32:
        pytest.skip("5 bits fill a table that no other group can share")
    for m, n, k in ((1, 70, 20), (3, 33, 100), (4, 70, 600), (7, 65, 2500), (17, 130, 512)):
        rng = torch.Generator().manual_seed(form * k)
        codes = torch.randint(0, 2**form, (n, k), generator=rng, dtype=torch.uint8)
        of = torch.arange(k) // (group or k)
        scale = 0.01 + torch.rand(n, int(of[-1]) + 1, generator=rng)
        table = Table(pack_rows(codes, form), form, PLAIN, group, scale.shape[1], scale=scale)
        if form in (6, 8):
            w = (codes.float() - 2 ** (form - 1)) * scale[:, of]
        else:
            table.levels = torch.linspace(-1, 1.2, 2**form)
            table.more = (0.1 * torch.randn(scale.shape, generator=rng)).half()
            w = table.levels[codes.int()] * scale[:, of] + table.more.float()[:, of]
        x = torch.randn(m, k, generator=rng).bfloat16()
        # weights and results in bf16: 2^-9 of each at most, 2^-10 on average
        assert error(multiply(x, table, n), x.double() @ w.double().T) < 6e-3


@needs_c
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_every_class_gives_its_definition_with_c(kernel, case, threads, monkeypatch):
    codes, params = kernel.example(case, torch.Generator().manual_seed(0))
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(1))
    packed = kernel.pack(codes, params, case.weight, case.act)
    with monkeypatch.context() as patch:
        patch.setattr(table_cpu, "enough", lambda: False)
        tiles = kernel.pack(codes, params, case.weight, case.act)
    for dtype, limit in ((torch.bfloat16, 8e-3), (torch.float16, 2e-3), (torch.float32, 3e-4)):
        own = x.to(dtype)
        exact = kernel.reference(own, tiles).double()  # tests of the class hold it to the format
        assert error(kernel.reference(own, packed), exact) < 3e-4  # outliers are kept in fp16
        y = kernel.matmul(own, packed)
        assert y.dtype == dtype
        assert error(y, exact) < limit
        assert torch.equal(y, kernel.matmul(own, packed))


@needs_c
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_rows_are_read_without_c_too(kernel, case, monkeypatch):
    codes, params = kernel.example(case, torch.Generator().manual_seed(0))
    packed = kernel.pack(codes, params, case.weight, case.act)
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = kernel.reference(x, packed).double()
    monkeypatch.setattr(table_cpu, "enough", lambda: False)
    assert error(kernel.matmul(x, packed), exact) < 8e-3


@needs_c
def test_no_rows_of_x_and_no_channels_beyond():
    case = Case(1, 33, 65, codebook.codebook_format(group=32))
    codes, params = codebook.KERNEL.example(case, torch.Generator().manual_seed(0))
    packed = codebook.KERNEL.pack(codes, params, case.weight, None)
    assert codebook.KERNEL.matmul(torch.zeros(0, 65).bfloat16(), packed).shape == (0, 33)
    assert packed.tensors["words"].shape == (33, 64)  # 65 channels in blocks of 128, 4 bits each


@needs_c
def test_e4m3_numbers_and_scales_of_rows_tokens_and_groups(threads):
    n, k = 65, 300
    codes = torch.arange(n * k).view(n, k).to(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 3  # NaN
    rng = torch.Generator().manual_seed(0)
    row, token = torch.rand(n, generator=rng), torch.rand(9, generator=rng)
    numbers = codes.view(torch.float8_e4m3fn).double()
    x = torch.randn(9, k, generator=rng).bfloat16()
    words = pack_rows(codes, table_cpu.E4M3)
    plain = Table(words, table_cpu.E4M3, table_cpu.NONE, row_scale=row)
    scale = torch.rand(n, 10, generator=rng)
    grouped = replace(plain, kind=PLAIN, group=32, groups=10, scale=scale)
    spread = scale.repeat_interleave(32, 1)[:, :k]
    for m in (1, 2, 9):
        for table, w in ((plain, numbers), (grouped, numbers * spread)):
            exact = x[:m].double() @ w.T * row * token[:m, None]
            assert error(multiply(x[:m], table, n, token[:m].contiguous()), exact) < 6e-3
