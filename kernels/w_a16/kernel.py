"""Triton: x [M, K] in 16 bits times integer weights of 2, 3, 4 or 8 bits, layout in layout.py.

The weights are the left operand of the tensor core (y^T = W x^T): few rows of x then pad to 8
columns, not to 16 rows. A field becomes a number by one lop3 that puts it into the mantissa of
1024 (fp16) or 128 (bf16), and one fma that takes that and the zero point off again; whole numbers
below 2048 (256) come out exact. Scales multiply the sums of a plane in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import TARGETS, Build
from kernels.split_k import finish, memory_for
from kernels.tables import configured
from kernels.w_a16.layout import FIELDS, LONGEST, ROWS, WORDS

NAME = "w_a16"
BLOCKS_EACH = 4  # blocks of threads that should be in flight on a multiprocessor, if they fit
STAGES = 3  # buffers of the pipeline, one of them in registers
SPLITS = (1, 2, 4, 8, 16)  # of the input channels: few, for each is a compilation
COLUMNS = (8, 16, 32, 64)  # rows of x in a tile
EXPAND_WARPS = 8  # with 4 some planes of 128 spill registers
MOST_COLUMNS = {
    2: 32,
    3: 16,
    4: 64,
    8: 64,
}  # more spill registers; before sm_90 half as many do


@triton.jit
def lowered(words, SHIFT: tl.constexpr):
    """Every int16 word shifted right, two in a register; what enters from the other is masked."""
    return tl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, 0, $2;",  # wrap: the amount comes twice in its register
        "=r,r,r",
        [words, tl.full([1, 1], SHIFT, tl.int16)],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def masked(words, MASK: tl.constexpr, OTHER):
    """(word & MASK) | OTHER in one instruction for two words."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xea;",
        "=r,r,r,r",
        [words, tl.full([1, 1], MASK, tl.int16), OTHER],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def byte_floats(words, FIELD: tl.constexpr):
    """2^23 + byte FIELD of every int16 word, fp32: the byte is put below 0x4b0000."""
    if FIELD == 0:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0x4b000000, 0x7440; prmt.b32 $1, $2, 0x4b000000, 0x7442;",
            "=&r,=r,r",
            [words],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0x4b000000, 0x7441; prmt.b32 $1, $2, 0x4b000000, 0x7443;",
            "=&r,=r,r",
            [words],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )


@triton.jit
def fused(raw, STEP: tl.constexpr, less):
    """raw [R, P] STEP + less [R], rounded once: for two numbers in one instruction."""
    return tl.fma(raw, tl.full([1, 1], STEP, raw.dtype), less[:, None])


@triton.jit
def magic(dtype: tl.constexpr):
    """The int16 that is 1024 in fp16, 128 in bf16: its mantissa counts in ones."""
    return tl.full([1, 1], 0x6400 if dtype == tl.float16 else 0x4300, tl.int16)


@triton.jit
def field_number(
    words,
    zero,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
    ASM: tl.constexpr,
):
    """Field FIELD of int16 words [R, P], less zero [R] -> [R, P] in dtype, whole numbers, exact."""
    if ASM and BITS == 8 and dtype == tl.bfloat16:  # a mantissa of 7 bits does not take the byte
        return (byte_floats(words, FIELD) - (8388608.0 + zero)[:, None]).to(dtype)
    elif ASM:
        ROOM: tl.constexpr = 10 if dtype == tl.float16 else 7  # bits of the mantissa
        PER: tl.constexpr = ROOM // BITS  # fields in reach without another shift
        SHIFT: tl.constexpr = FIELD // PER * PER * BITS
        AT: tl.constexpr = FIELD % PER * BITS  # the field counts in units of 2^AT
        if SHIFT:
            words = lowered(words, SHIFT)
        raw = masked(words, ((1 << BITS) - 1) << AT, magic(dtype)).to(dtype, bitcast=True)
        less = (-(1 << ROOM >> AT) - zero).to(dtype)
        return fused(raw, 1.0 / (1 << AT), less)
    else:
        code = (words >> (FIELD * BITS)) & ((1 << BITS) - 1)
        return (code.to(tl.float32) - zero[:, None]).to(dtype)


@triton.jit
def spare_number(first, second, third, zero, dtype: tl.constexpr, ASM: tl.constexpr):
    """The sixteenth 3-bit code: the top bit of each of three words, less zero [R] -> [R, P]."""
    if ASM:
        low = masked(lowered(first, 15), 1, magic(dtype))
        code = masked(lowered(third, 13), 4, masked(lowered(second, 14), 2, low))
        less = (-(1024.0 if dtype == tl.float16 else 128.0) - zero).to(dtype)
        return fused(code.to(dtype, bitcast=True), 1.0, less)
    else:
        code = ((first >> 15) & 1) | ((second >> 14) & 2) | ((third >> 13) & 4)
        return (code.to(tl.float32) - zero[:, None]).to(dtype)


@triton.jit
def plane_number(
    words,
    zero,
    FIELD: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
    ASM: tl.constexpr,
):
    """Plane FIELD of a block's words (three of them for 3 bits), less zero -> [R, P] in dtype."""
    if BITS == 3:
        if FIELD == 15:
            return spare_number(words[0], words[1], words[2], zero, dtype, ASM)
        else:
            return field_number(words[FIELD // 5], zero, FIELD % 5, 3, dtype, ASM)
    else:
        return field_number(words[0], zero, FIELD, BITS, dtype, ASM)


@triton.jit
def load_words(words, BITS: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """One block of one tile: [R, P] int16 each."""
    at = tl.arange(0, R)[:, None] * P + tl.arange(0, P)[None, :]
    if BITS == 3:
        return (
            tl.load(words + at),
            tl.load(words + R * P + at),
            tl.load(words + 2 * R * P + at),
        )
    else:
        return (tl.load(words + at),)


@triton.jit
def product_tiles(
    x,  # [M, K]
    words,  # layout.py
    scales,  # [G, n padded], any float
    zeros,  # [G, n padded] fp16, as 8 bits would spoil the layout of words; None: MIDDLE
    y,  # [M, N]
    partials,
    counters,
    M,
    N,
    K,
    padded,  # N, padded to tiles
    blocks,  # of words along K
    BITS: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,  # planes per group; 0: the whole row
    WHOLE: tl.constexpr,  # K fills its blocks
    MIDDLE: tl.constexpr,
    SPLITS: tl.constexpr,
    PLANES: tl.constexpr,  # in a block
    BLOCK_WORDS: tl.constexpr,  # int16 words of a block
    R: tl.constexpr,
    MB: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] (code[n, k] - zero) scale; one tile of R n and MB m."""
    tile, split, m_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile * R + tl.arange(0, R)
    m = m_tile * MB + tl.arange(0, MB)
    j = tl.arange(0, P)
    inside = m[None, :] < M
    rows = x + m[None, :].to(tl.int64) * K
    each = (blocks + SPLITS - 1) // SPLITS
    acc = tl.zeros((R, MB), tl.float32)
    zero = tl.full((R,), MIDDLE, tl.float32)
    if zeros is not None and GROUP == 0:
        zero = tl.load(zeros + n).to(tl.float32)
    for block in tl.range(split * each, min(split * each + each, blocks), num_stages=STAGES):
        held = load_words(words + (tile.to(tl.int64) * blocks + block) * BLOCK_WORDS, BITS, R, P)
        for i in tl.static_range(PLANES):
            plane = block * PLANES + i
            k = plane * P + j
            if WHOLE:
                part = tl.load(rows + k[:, None], mask=inside, other=0.0)
            else:
                part = tl.load(rows + k[:, None], mask=inside & (k[:, None] < K), other=0.0)
            if GROUP == 0:
                w = plane_number(held, zero, i, BITS, x.dtype.element_ty, ASM)
                acc = tl.dot(w, part, acc)
            else:
                at = plane // GROUP * padded + n  # n k / 16 numbers at most
                if zeros is not None:
                    zero = tl.load(zeros + at).to(tl.float32)
                w = plane_number(held, zero, i, BITS, x.dtype.element_ty, ASM)
                acc += tl.dot(w, part) * tl.load(scales + at).to(tl.float32)[:, None]
    if GROUP == 0:
        acc *= tl.load(scales + n).to(tl.float32)[:, None]
    finish(acc, y, partials, counters, M, N, SPLITS, R, MB)


@triton.jit
def expand_blocks(
    words,
    scales,
    zeros,
    w,  # [N, K]
    N,
    K,
    padded,
    blocks,
    BITS: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    MIDDLE: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    R: tl.constexpr,
    ASM: tl.constexpr,
):
    """w[n, k] = (code - zero) scale: one block of one tile, rounded once from fp32."""
    tile, block = tl.program_id(0), tl.program_id(1)
    n = tile * R + tl.arange(0, R)
    zero = tl.full((R,), MIDDLE, tl.float32)
    held = load_words(words + (tile.to(tl.int64) * blocks + block) * BLOCK_WORDS, BITS, R, P)
    for i in tl.static_range(PLANES):
        plane = block * PLANES + i
        k = plane * P + tl.arange(0, P)
        at = n
        if GROUP:
            at += plane // GROUP * padded
        if zeros is not None:
            zero = tl.load(zeros + at).to(tl.float32)
        whole = plane_number(held, zero, i, BITS, w.dtype.element_ty, ASM)
        value = whole.to(tl.float32) * tl.load(scales + at).to(tl.float32)[:, None]
        inside = (n[:, None] < N) & (k[None, :] < K)
        out = w + n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(out, value.to(w.dtype.element_ty), mask=inside)


def product(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    n: int,
    group: int,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """x [m, k] fp16 or bf16 -> [m, n]; `group` input channels to a scale, 0: the whole row."""
    (m, k), tiles, blocks = x.shape, *words.shape[:2]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    config = config or plan(x.device, m, n, k, bits, group, words.shape[-1])
    columns, splits = config["columns"], config["splits"]
    m_tiles = -(-m // columns)
    partials, counters = memory_for(splits, m_tiles, tiles, ROWS * columns, x.device)
    product_tiles[(tiles, splits, m_tiles)](
        x,
        words,
        scales,
        zeros,
        y,
        partials,
        counters,
        m,
        n,
        k,
        scales.shape[1],
        blocks,
        WHOLE=k == blocks * FIELDS[bits] * words.shape[-1],
        SPLITS=splits,
        MB=columns,
        STAGES=config["stages"],
        ASM=x.is_cuda,
        num_warps=config["warps"],
        **layout_constants(bits, words.shape[-1], group),
    )
    return y


def expand(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    out: Tensor,
) -> Tensor:
    """W_hat [n, k] into `out`, whose dtype it is rounded to."""
    (n, k), tiles, blocks = out.shape, *words.shape[:2]
    expand_blocks[(tiles, blocks)](
        words,
        scales,
        zeros,
        out,
        n,
        k,
        scales.shape[1],
        blocks,
        ASM=out.is_cuda and out.dtype != torch.float32,
        num_warps=EXPAND_WARPS,
        **layout_constants(bits, words.shape[-1], group),
    )
    return out


def layout_constants(bits: int, plane: int, group: int) -> dict[str, Any]:
    """What both kernels must know of the layout at compilation."""
    return {
        "BITS": bits,
        "P": plane,
        "GROUP": group // plane,
        "MIDDLE": 2 ** (bits - 1),
        "PLANES": FIELDS[bits],
        "BLOCK_WORDS": WORDS[bits] * ROWS * plane,
        "R": ROWS,
    }


def plan(
    device: torch.device, m: int, n: int, k: int, bits: int, group: int, plane: int
) -> Mapping[str, int]:
    """A measured configuration, or one that fits the GPU and fills it.

    columns: rows of x in a tile. splits: parts of the input channels, summed in the end.
    """
    if found := configured(NAME, device, m, n=n, k=k, bits=bits, group=group):
        return found
    gpu = gpu_of(device)
    fit = [
        c for c in COLUMNS if c <= gpu.columns(bits) and shared_bytes(bits, plane, c) < gpu.shared
    ]
    columns = next((c for c in fit if m <= c), max(fit, default=COLUMNS[0]))
    tiles = -(-n // ROWS) * -(-m // columns)
    blocks = -(-k // (FIELDS[bits] * plane))
    wanted = min(gpu.resident(shared_bytes(bits, plane, columns)) // tiles, blocks)
    splits = max(s for s in SPLITS if s <= max(wanted, 1))
    return {"columns": columns, "splits": splits, "warps": 4, "stages": STAGES}


def shared_bytes(bits: int, plane: int, columns: int) -> int:
    """Of shared memory for words and x, STAGES - 1 times; x once more where wgmma reads it."""
    x = FIELDS[bits] * plane * columns * 2
    words = WORDS[bits] * ROWS * plane * 2
    return (STAGES - 1) * (words + x) + (x if columns > 8 else 0)


@dataclass(frozen=True)
class Gpu:
    """What a plan depends on; an H200 where there is none, as in tests."""

    multiprocessors: int = 132
    shared: int = 227 << 10  # bytes that a block may have
    major: int = 9  # compute capability

    def columns(self, bits: int) -> int:
        """Most rows of x in a tile."""
        return MOST_COLUMNS[bits] if self.major >= 9 else max(COLUMNS[0], MOST_COLUMNS[bits] // 2)

    def resident(self, shared: int) -> int:
        """Blocks on the GPU at once that take so many bytes of shared memory each, and 1 KB more.

        Tiles of 64 rows of x, and of 32 by 2 bits, take 229 KB: one on a multiprocessor.
        """
        fit = (self.shared + 1024) // (shared + 1024)
        return self.multiprocessors * max(1, min(BLOCKS_EACH, fit))


@lru_cache(maxsize=16)
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a device."""
    if device.type != "cuda":
        return Gpu()
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_multiprocessor - 1024  # what a block may have of it
    return Gpu(found.multi_processor_count, shared, found.major)


def types(pointers: Mapping[str, str], integers: tuple[str, ...]) -> dict[str, str]:
    """Argument types: pointers to something, and whole numbers."""
    return {n: f"*{t}" for n, t in pointers.items()} | dict.fromkeys(integers, "i32")


def build(
    bits: int,
    element: str,
    columns: int = 8,
    budget: float = 0.0,
    targets: tuple[int, ...] = TARGETS,
    spills: int = 0,
) -> Build:
    """`product_tiles` for a layer of 4096 input channels in groups of 128, x "fp16" or "bf16"."""
    plane = LONGEST[bits]
    pointers = {
        "x": element,
        "words": "i16",
        "scales": "fp16",
        "zeros": "fp16",
        "y": element,
    }
    pointers |= {"partials": "fp32", "counters": "i32"}
    own = {"WHOLE": True, "SPLITS": 4, "MB": columns, "STAGES": STAGES, "ASM": True}
    return Build(
        name=f"w{bits}-{element}-m{columns}",
        kernel=product_tiles,
        types=types(pointers, ("M", "N", "K", "padded", "blocks")),
        constants={**layout_constants(bits, plane, 128), **own},
        divisible=("N", "K", "padded"),
        per_pass=ROWS * plane * FIELDS[bits],
        budget=budget,
        spills=spills,
        targets=targets,
        tensor_core="HMMA|HGMMA|UTCHMMA",
    )


def expand_build(bits: int, element: str) -> Build:
    """`expand_blocks` for the same."""
    pointers = {"words": "i16", "scales": "fp16", "zeros": "fp16", "w": element}
    return Build(
        name=f"expand-w{bits}-{element}",
        kernel=expand_blocks,
        types=types(pointers, ("N", "K", "padded", "blocks")),
        constants={**layout_constants(bits, LONGEST[bits], 128), "ASM": True},
        warps=EXPAND_WARPS,
        divisible=("N", "K", "padded"),
        targets=TARGETS if bits == 2 else (90,),  # the longest; no two differ by a tenth
    )


# Budgets: counted for sm_90, with zero points; a GPU that reads 4.3 TB/s and issues 33.5e12
# instructions a second has time for 7.8 a weight at 8 bits, 4.1 at 4, 3.2 at 3 and 2.2 at 2.
BUILDS = (
    build(4, "fp16", budget=2.0),
    build(4, "bf16", budget=2.3),
    build(3, "bf16", budget=2.6),
    build(2, "bf16", budget=1.9),
    build(8, "bf16", budget=3.6),
    build(4, "bf16", columns=32),
    build(4, "fp16", columns=64, targets=(90, 100)),
    build(3, "bf16", columns=16, targets=(90, 100)),
    build(2, "bf16", columns=32, targets=(90, 100)),
    build(8, "bf16", columns=64, targets=(90, 100), spills=3),  # of 1352 instructions
    *(expand_build(bits, "bf16") for bits in FIELDS),
)
