"""Integer weights on the CPU through PyTorch's own low-bit operations, groups included.

2-4 bits: `_weight_int4pack_mm_for_cpu`. 5-8 bits: `_weight_int8pack_mm`. Both are private and
must get bf16 inputs (fp32 takes a reference path, 50 times slower). They expand the weights again
for every few rows of x. Where product.c compiles, 8 bits take it always and 4 bits above a few
rows; else, above many rows, a tile of weights is expanded to bf16 and multiplied.
Activations in integers enter as whole numbers, which bf16 holds exactly, and are scaled after the
product. Times: docs/log.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from kernels import ops
from kernels.base import Case, Json, Packed
from kernels.integers import (
    activation_codes,
    group_of,
    int_format,
    random_weight,
    refuse,
    rounded_activations,
    zeros,
)
from kernels.native import library
from kernels.workspace import WORKSPACES

FEW4 = 64  # rows of x up to which scales meet sums and not weights in product.c
SINGLE = 2048  # groups of one row whose sums product.c keeps without room given
ROWS4 = 128  # rows of x up to which it beats expanding: 0.2 ms each, against 18
ROWS8 = 16  # the same for 8 bits: 0.21 ms each, against 2.5
TILE = 1024  # rows of W expanded at once: larger fresh buffers cost page faults
GROUPS4 = (128, 64, 32)  # what the 4-bit operation takes
BLOCK = 64  # n is padded to it, so that every block of the 4-bit layout is whole
LANE = 32  # k is padded to it for 8 bits: at other lengths the operation reads past the end


class IntCpu:
    """y = act(x) W_hat^T, W_hat in 2-8 bit integer codes, act(x) in as many or in 16 bits."""

    name = "int_cpu"
    rank = 20
    reads = ("int", "affine")
    devices = ("cpu",)
    cases = (
        Case(1, 64, 64, int_format(bits=4, group=32)),
        Case(3, 100, 192, int_format(bits=4, group=64, symmetric=True)),
        Case(129, 33, 256, int_format(bits=4, group=128)),
        Case(5, 48, 128, int_format(bits=3, group=32)),
        Case(130, 7, 64, int_format(bits=2, group=32, symmetric=True)),
        Case(2, 96, 96, int_format(bits=4)),
        Case(1, 65, 64, int_format(bits=8, symmetric=True)),
        Case(17, 31, 50, int_format(bits=8)),
        Case(4, 40, 96, int_format(bits=6, group=32)),
        Case(40, 24, 128, int_format(bits=8, group=64, symmetric=True)),
        Case(3, 20, 64, int_format(bits=4, per_tensor=True)),
        Case(3, 48, 96, int_format(bits=4, group=32), int_format(bits=8, symmetric=True)),
        Case(18, 33, 64, int_format(bits=8, group=32), int_format(bits=8)),
        Case(3, 65, 128, {"kind": "affine", "bits": 4, "group": 64}),
        Case(12, 30, 96, {"kind": "affine", "bits": 2, "group": 32}),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if device.type != "cpu":
            return "it runs on the CPU"
        if reason := refuse(weight, act, self.reads):
            return reason
        if weight["kind"] == "affine" and weight["bits"] > 4:
            return "with zero points that are real numbers it takes 2 to 4 bits"
        return misfit4(weight, k) if weight["bits"] <= 4 else misfit8(weight, k)

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        pack = pack4 if weight["bits"] <= 4 else pack8
        n, k = codes.shape
        return Packed(pack(codes, params, weight), n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        product = matmul4 if packed.weight["bits"] <= 4 else matmul8
        if packed.act is None:
            return product(x.to(torch.bfloat16).contiguous(), packed).to(x.dtype)
        codes, scale, zero = activation_codes(x, packed.act)
        whole = (codes - zero).to(torch.bfloat16)  # within +-255: exact
        return (product(whole, packed).float() * scale).to(x.dtype)

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        w = dense4(packed) if packed.weight["bits"] <= 4 else dense8(packed)
        return rounded_activations(x, packed.act) @ w[: packed.n, : packed.k].T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return random_weight(case, generator)

    def container(self, weight: Json) -> str:
        width = 4 if weight["bits"] <= 4 else 8
        if weight["bits"] == width:
            return ""
        return f"{weight['bits']}-bit codes are kept in {width}-bit fields, as PyTorch's op reads"


def fitting_group(weight: Json, k: int) -> int:
    """The op's group for a weight format: its own, or a part of the row that divides it; 0 none."""
    if weight["group"] == 0 or weight.get("per_tensor"):
        return next((g for g in GROUPS4 if k % g == 0), 0)
    return weight["group"] if weight["group"] in GROUPS4 and k % weight["group"] == 0 else 0


def misfit4(weight: Json, k: int) -> str | None:
    """Why the 4-bit operation cannot take this weight."""
    if fitting_group(weight, k):
        return None if works4() else "this build of PyTorch has no working 4-bit CPU operation"
    fits = [g for g in GROUPS4 if k % g == 0]
    advice = f"use one of {fits}" if fits else "no group does"
    what = f"group {weight['group']}" if weight["group"] else "a split of whole rows"
    return f"{what} does not fit {k} input channels in groups of 32, 64 or 128; {advice}"


def misfit8(weight: Json, k: int) -> str | None:
    """Why the 8-bit operation cannot take this weight."""
    group = weight["group"]
    if group and (group % LANE or k % group):
        return f"group {group} must divide the {k} input channels and be a multiple of {LANE}"
    return None if works8() else "this build of PyTorch has no working 8-bit CPU operation"


def pack4(codes: Tensor, params: Mapping[str, Tensor], weight: Json) -> dict[str, Tensor]:
    """codes [n, k] -> the op's int4 layout and scale_zero [G, n, 2] bf16: w = (q - 8) s + z.

    Codes of fewer bits are shifted so that the code of 0 is 8 wherever it fits, which keeps z
    exactly 0 for whole zero points; else z, at most 8 steps, is rounded to bf16: by 0.031 of a step
    at most.
    """
    n, k = codes.shape
    group = fitting_group(weight, k)
    scale = params["scale"].float().expand(n, k // group_of(weight, k))
    zero = zeros(params, weight).expand(scale.shape)
    repeat = (k // group) // scale.shape[1]
    scale, zero = scale.repeat_interleave(repeat, 1), zero.repeat_interleave(repeat, 1)  # [n, G]
    top = 2 ** weight["bits"] - 1
    near = zero.round()
    shift = torch.where((near <= 8) & (top - near + 8 <= 15), 8 - near, 0)  # [n, G]
    q = codes.view(n, -1, group).int() + shift[..., None].int()
    offset = (8 - zero - shift) * scale
    pad = -n % BLOCK
    q = functional.pad(q.view(n, k), (0, 0, 0, pad)).contiguous()
    pair = torch.stack([scale.T, offset.T], -1).to(torch.bfloat16)  # [G, n, 2]
    pair = functional.pad(pair, (0, 0, 0, pad)).contiguous()
    return {"q": torch._convert_weight_to_int4pack_for_cpu(q, 1), "scale_zero": pair}


def matmul4(x: Tensor, packed: Packed) -> Tensor:
    """x [m, k] bf16 -> [m, n] bf16."""
    return INT4(x, packed.tensors["q"], packed.tensors["scale_zero"], packed.n)


def product4(x: Tensor, q: Tensor, pair: Tensor, n: int) -> Tensor:
    """x [m, k] bf16, q and scale_zero as of pack4 -> [m, n] bf16: the fastest way for m rows."""
    m, k = x.shape
    rows, groups = len(q), len(pair)
    if (c := native()) is not None:
        few, room = m <= FEW4, None
        if m > 1 or groups > SINGLE:  # x arranged, and sums of its groups
            size = m * (k + 2 * groups)
            room = WORKSPACES.take("arranged rows", size, x.dtype, x.device).data_ptr()
        y = x.new_empty(m, rows)
        c.product4(
            *(x.data_ptr(), room, q.data_ptr(), pair.data_ptr(), few),
            *(m, rows, k, k // groups, y.data_ptr(), torch.get_num_threads()),
        )
        return y if rows == n else y[:, :n].contiguous()
    if m <= ROWS4:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, q, k // len(pair), pair)
    else:
        y = x.new_empty(m, q.shape[0])
        for start in range(0, q.shape[0], TILE):
            part = slice(start, start + TILE)
            y[:, part] = x @ expand4(q[part], pair[:, part], torch.bfloat16)
    return y[:, :n].contiguous()


def fake4(x: Tensor, q: Tensor, pair: Tensor, n: int) -> Tensor:
    """[m, n] like x."""
    return x.new_empty(x.shape[0], n)


INT4 = ops.register(
    "int4_cpu(Tensor x, Tensor q, Tensor scale_zero, int n) -> Tensor", cpu=product4, fake=fake4
)


@lru_cache(maxsize=1)
def native() -> ctypes.CDLL | None:
    """product.c, None where it does not compile or PyTorch's 4-bit layout is another."""
    if layout4() != (BLOCK, None):
        return None
    compiled = library(Path(__file__).with_name("product.c"))
    if compiled is not None:
        place, size = ctypes.c_void_p, ctypes.c_long
        compiled.product4.argtypes = [
            *(place, place, place, place, ctypes.c_int),
            *(size, size, size, size, place, ctypes.c_int),
        ]
        compiled.product8.argtypes = [place] * 5 + [size] * 4 + [place, ctypes.c_int]
        compiled.product4.restype = compiled.product8.restype = None
    return compiled


def places(*tensors: Tensor | None) -> list[int | None]:
    """Where tensors lie in memory, for C."""
    return [None if t is None else t.data_ptr() for t in tensors]


def spare(x: Tensor) -> Tensor:
    """Memory for another x."""
    return WORKSPACES.take("arranged rows", x.numel(), x.dtype, x.device)


def ends(y: Tensor) -> tuple[int, int]:
    """What every product in C takes last: its result, and how many threads share the work."""
    return y.data_ptr(), torch.get_num_threads()


def dense4(packed: Packed) -> Tensor:
    """W_hat [n padded, k] fp32 from the packed tensors."""
    return expand4(packed.tensors["q"], packed.tensors["scale_zero"], torch.float32).T


def expand4(q: Tensor, pair: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of the int4 layout [rows, k / 2], scale_zero [G, rows, 2] -> W_hat^T [k, rows]."""
    rows, half_k = q.shape
    width, order = layout4()
    lanes = width // 2
    data = q.view(rows // width, 2 * half_k, lanes).transpose(0, 1)  # [k, blocks, lanes]
    tile = torch.empty(2 * half_k, rows // width, width, dtype=dtype)
    tile[:, :, :lanes] = data & 15
    tile[:, :, lanes:] = data >> 4
    if order is not None:
        tile = tile[:, :, order]
    w = tile.view(pair.shape[0], -1, rows)  # [G, g, rows]
    scale, offset = (part.contiguous() for part in pair[:, None].unbind(-1))  # [G, 1, rows]
    return w.sub_(8).mul_(scale).add_(offset).view(2 * half_k, rows)


@lru_cache(maxsize=1)
def layout4() -> tuple[int, Tensor | None]:
    """The op's layout on this CPU: rows per block, and where row i of a block lies (None: at i).

    A block holds, for each input channel, one byte per pair of rows. Found by packing numbers:
    the layout differs between AVX-512, AVX2 and others, and is nowhere promised.
    """

    def halves(codes: Tensor) -> Tensor:
        return torch._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1).flatten()

    column = torch.arange(2).expand(BLOCK, 2)
    row = torch.arange(BLOCK)[:, None].expand(BLOCK, 2)
    lanes = int((halves(column) & 15).argmax())  # bytes before channel 1 begins
    low, high = halves(row % 16)[:lanes].long(), halves(row // 16)[:lanes].long()
    held = torch.cat([low & 15, low >> 4]) + 16 * torch.cat([high & 15, high >> 4])
    place = held.argsort()
    return 2 * lanes, None if torch.equal(place, torch.arange(2 * lanes)) else place


def pack8(codes: Tensor, params: Mapping[str, Tensor], weight: Json) -> dict[str, Tensor]:
    """codes [n, k] -> int8 q around the middle; scale [G, n] fp32, and shift [G, n].

    w = (q + shift) s with shift = middle - zero, which is 0 and left out for symmetric grids.
    Scales stay fp32: in bf16 their rounding would be a third of the 8-bit rounding itself.
    q is "blocks" [n / 64, k, 64] where product.c reads them, n padded; else "groups" [G, n, g].
    """
    n, k = codes.shape
    middle = 2 ** (weight["bits"] - 1)
    groups = k // weight["group"] if weight["group"] else 1
    rows = -n % BLOCK if native() is not None else 0
    q = (codes.int() - middle).to(torch.int8)
    q = functional.pad(q, (0, -k % LANE, 0, rows))
    packed = {"scale": by_group(params["scale"].float(), n, groups, rows)}
    if "zero" in params:
        packed["shift"] = by_group(middle - zeros(params, weight), n, groups, rows)
    if native() is not None:
        packed["blocks"] = q.view(-1, BLOCK, q.shape[1]).transpose(1, 2).contiguous()
    else:
        packed["groups"] = q.view(n, groups, -1).transpose(0, 1).contiguous()
    return packed


def by_group(values: Tensor, n: int, groups: int, rows: int) -> Tensor:
    """values [n, G] or fewer -> [G, n + rows]."""
    return functional.pad(values.expand(n, groups).T, (0, rows)).contiguous()


def matmul8(x: Tensor, packed: Packed) -> Tensor:
    """x [m, k] bf16 -> [m, n] bf16."""
    held = packed.tensors
    x = functional.pad(x, (0, -packed.k % LANE))
    scale, shift = held["scale"], held.get("shift")
    return INT8(x, held.get("blocks"), held.get("groups"), scale, shift, packed.n)


def product8(
    x: Tensor,
    blocks: Tensor | None,
    groups: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    n: int,
) -> Tensor:
    """x [m, k] bf16, the rest as of pack8, one of blocks and groups -> [m, n] bf16."""
    m, k = x.shape
    if blocks is not None and (c := native()) is not None:
        y = x.new_empty(m, scale.shape[1])
        held = places(x, spare(x), blocks, scale, shift)
        c.product8(*held, m, scale.shape[1], k, k // len(scale), *ends(y))
        return y[:, :n].contiguous()
    assert groups is not None
    few = m <= ROWS8 or len(scale) == 1
    y = grouped8(x, groups, scale, shift) if few else expanded8(x, groups, scale, shift)
    return y.to(x.dtype)


def fake8(
    x: Tensor,
    blocks: Tensor | None,
    groups: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    n: int,
) -> Tensor:
    """[m, n] like x."""
    return x.new_empty(x.shape[0], n)


INT8 = ops.register(
    "int8_cpu(Tensor x, Tensor? blocks, Tensor? groups, Tensor scale, Tensor? shift, int n)"
    " -> Tensor",
    cpu=product8,
    fake=fake8,
)


def grouped8(x: Tensor, q: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Few rows, or one group: codes times x [m, k], scaled after the product -> [m, n] fp32."""
    parts = x.view(len(x), len(q), -1).transpose(0, 1).contiguous()  # [G, m, g]
    out = None
    for i, part in enumerate(parts):
        y = ungrouped8(part, q[i]).float()
        if shift is not None:
            y.addcmul_(part.float().sum(1, keepdim=True), shift[i])
        out = y.mul_(scale[i]) if out is None else out.addcmul_(y, scale[i])
    assert out is not None
    return out


def ungrouped8(x: Tensor, q: Tensor) -> Tensor:
    """x [m, g] bf16, q [n, g] int8 -> x q^T [m, n] bf16."""
    if len(x) <= ROWS8:
        return torch._weight_int8pack_mm(x, q, torch.ones(len(q), dtype=torch.bfloat16))
    out = x.new_empty(len(x), len(q))
    for start in range(0, len(q), TILE):
        tile = q[start : start + TILE].to(torch.bfloat16)  # whole numbers to 128: exact
        out[:, start : start + TILE] = functional.linear(x, tile)
    return out


def expanded8(x: Tensor, q: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Many rows of x [m, k] and many groups: W_hat in bf16, tile by tile -> [m, n] bf16."""
    n = q.shape[1]
    out = x.new_empty(len(x), n)
    for start in range(0, n, TILE):
        rows = slice(start, start + TILE)
        tile = q[:, rows].to(torch.bfloat16)  # [G, rows, g]
        if shift is not None:
            tile += shift[:, rows, None].to(torch.bfloat16)  # whole numbers to 256: exact
        tile *= scale[:, rows, None].to(torch.bfloat16)
        out[:, rows] = functional.linear(x, tile.transpose(0, 1).flatten(1))
    return out


def dense8(packed: Packed) -> Tensor:
    """W_hat [n padded, k padded] fp32 from the packed tensors."""
    held = packed.tensors
    scale, shift = held["scale"], held.get("shift")
    if "blocks" in held:
        rows = held["blocks"].transpose(1, 2).flatten(0, 1)  # [n, k]
        q = rows.view(len(rows), len(scale), -1).transpose(0, 1).float()  # [G, n, g]
    else:
        q = held["groups"].float()
    w = (q if shift is None else q + shift[..., None]) * scale[..., None]
    return w.transpose(0, 1).flatten(1)


def close(y: Tensor, exact: Tensor) -> bool:
    """True within bf16 rounding of sums: 2 % of the largest value."""
    return bool((y.float() - exact).abs().max() <= 0.02 * exact.abs().max())


@lru_cache(maxsize=1)
def works4() -> bool:
    """True if the 4-bit operation exists and multiplies right, and its layout is understood."""
    return probe(int_format(bits=4, group=32), 15)


@lru_cache(maxsize=1)
def works8() -> bool:
    """True if the 8-bit operation exists and multiplies right."""
    return probe(int_format(bits=8), 255)


def probe(weight: Json, top: int) -> bool:
    """One small product, against codes and scales in plain torch."""
    n, k = 64, 64
    codes = ((torch.arange(n * k) * 37) % (top + 1)).view(n, k).to(torch.uint8)
    groups = 2 if weight["group"] else 1
    params = {"scale": torch.full((n, groups), 0.5), "zero": torch.full((n, groups), 8).byte()}
    x = torch.linspace(-1, 1, 2 * k).view(2, k).to(torch.bfloat16)
    exact = x.float() @ ((codes.float() - 8) * 0.5).T
    kernel = IntCpu()
    try:
        packed = kernel.pack(codes, params, weight, None)
        answers = kernel.matmul(x, packed), kernel.reference(x, packed)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False  # the reason reaches the user through why_not
    return all(close(y, exact) for y in answers)


KERNEL = IntCpu()
