"""Triton: x [M, K] times weights that are signed sums of scales; layout in layout.py.

    w = sum_b alpha_b (2 bit_b - 1) + offset,  so of each plane of input channels
    y += sum_b (2 alpha_b / span) v_b x + (offset - sum_b alpha_b (1 + 2 low / span)) sum x

v_b holds low + span bit_b, what one AND or AND-OR makes of the word. The sum of x is a product
with ones: it costs less than a sum across lanes. Weights are the left operand (y^T = W x^T): eight
rows of x then pad to 8 columns, not 16 rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels import tables
from kernels.aot import TARGETS, Build
from kernels.bcq.layout import FIELDS, LONGEST, ROWS, group_starts, numbers, sum_ends
from kernels.split_k import finish, memory_for, splits_for
from kernels.workspace import WORKSPACES

EXPAND_ABOVE = 32  # rows of x from which W is expanded once: tensor cores do every plane's product
EXPAND_WARPS = 8  # with 4, 3 bits spill 207 registers
COLUMNS = 8  # rows of x at once: with 16 the registers of every plane's slices spill
# Instructions per weight at which reading, not issuing, is the limit (H200, 4.3 TB/s), and the
# sum of x counted in.
BUDGETS = {2: 2.2, 3: 3.3, 4: 4.4}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def chosen(words, MASK: tl.constexpr, BESIDE: tl.constexpr, T: tl.constexpr, ASM: tl.constexpr):
    """int16 words [R, P] -> (word & MASK) | BESIDE as numbers in T, two words an instruction."""
    if ASM:
        words = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xea;",
            "=r,r,r,r",
            [words, tl.full([1, 1], MASK, tl.int16), tl.full([1, 1], BESIDE, tl.int16)],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        words = (words & MASK) | BESIDE
    return words.to(T, bitcast=True)


@triton.jit
def load_words(
    words,
    part_of_n,
    block,
    blocks,
    WORDS: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
):
    """One block of R rows, all in one tile: a tuple of WORDS [R, P] int16."""
    row = part_of_n * R + tl.arange(0, R)
    start = ((row // 64).to(tl.int64) * blocks + block) * (WORDS * 64 * P) + row % 64 * P
    at = words + start[:, None] + tl.arange(0, P)[None, :]
    size: tl.constexpr = 64 * P
    if WORDS == 1:
        return (tl.load(at),)
    if WORDS == 2:
        return tl.load(at), tl.load(at + size)
    return tl.load(at), tl.load(at + size), tl.load(at + 2 * size)


@triton.jit
def load_scales(alphas, BITS: tl.constexpr):
    """[R] pointers to the first scale of a group of each row -> a tuple of BITS [R] fp32."""
    first = tl.load(alphas).to(tl.float32)
    if BITS == 1:
        return (first,)
    second = tl.load(alphas + 1).to(tl.float32)
    if BITS == 2:
        return first, second
    third = tl.load(alphas + 2).to(tl.float32)
    if BITS == 3:
        return first, second, third
    return first, second, third, tl.load(alphas + 3).to(tl.float32)


@triton.jit
def product(
    x,  # [M, K]
    words,  # [tiles, blocks, BITS F / 16, 64, P] int16
    alphas,  # [G, n padded, BITS], any float
    offsets,  # [G, n padded], any float; None: 0
    y,  # [M, N]
    partials,
    counters,
    M,
    N,
    K,
    padded,  # N, padded to tiles
    blocks,  # of words along K
    BITS: tl.constexpr,
    F: tl.constexpr,  # planes in a block
    P: tl.constexpr,
    GROUP: tl.constexpr,  # planes per group; 0: the whole row
    WHOLE: tl.constexpr,  # K fills its blocks
    STARTS: tl.constexpr,  # group_starts
    ENDS: tl.constexpr,  # sum_ends
    NUMBERS: tl.constexpr,  # for each of 16 bits: mask, bits beside it, step, less
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    MB: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] W[n, k]; one tile of 64 n and MB m, one part of K."""
    part_of_n, split, m_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    T: tl.constexpr = x.dtype.element_ty
    n = part_of_n * R + tl.arange(0, R)
    m = m_tile * MB + tl.arange(0, MB)
    inside = m[None, :] < M
    rows = x + m[None, :].to(tl.int64) * K
    each = (blocks + SPLITS - 1) // SPLITS
    ones = tl.full((R, P), 1.0, T)
    acc = tl.zeros((R, MB), tl.float32)
    for block in tl.range(split * each, min(split * each + each, blocks), num_stages=STAGES):
        held = load_words(words, part_of_n, block, blocks, BITS * F // 16, R, P)
        sums = tl.zeros((R, MB), tl.float32)
        for i in tl.static_range(F):
            plane = block * F + i
            k = plane * P + tl.arange(0, P)
            if WHOLE:
                part = tl.load(rows + k[:, None], mask=inside, other=0.0)
            else:
                part = tl.load(rows + k[:, None], mask=inside & (k[:, None] < K), other=0.0)
            if STARTS[i]:
                group = plane // GROUP if GROUP else 0
                if not WHOLE and GROUP:  # planes of padding are beyond the last group
                    group = tl.minimum(group, (K - 1) // (GROUP * P))
                scale = load_scales(alphas + group * padded * BITS + n * BITS, BITS)
                total = scale[0]
                for b in tl.static_range(1, BITS):
                    total += scale[b]
                offset = tl.zeros((R,), tl.float32)
                if offsets is not None:
                    offset = tl.load(offsets + group * padded + n).to(tl.float32)
            sums = tl.dot(ones, part, sums)
            if ENDS[i]:
                less = offset
                if F == 16:  # one bit of all words
                    less -= NUMBERS[i][3] * total
                else:
                    for b in tl.static_range(BITS):
                        if NUMBERS[(b * F + i) % 16][3] != 0.0:
                            less -= NUMBERS[(b * F + i) % 16][3] * scale[b]
                acc += sums * less[:, None]
                sums = tl.zeros((R, MB), tl.float32)
            for b in tl.static_range(BITS):
                v = chosen(
                    held[(b * F + i) // 16],
                    NUMBERS[(b * F + i) % 16][0],
                    NUMBERS[(b * F + i) % 16][1],
                    T,
                    ASM,
                )
                acc += tl.dot(v, part) * (NUMBERS[(b * F + i) % 16][2] * scale[b])[:, None]
    finish(acc, y, partials, counters, M, N, SPLITS, R, MB)


@triton.jit
def expand(
    words,
    alphas,
    offsets,
    w,  # [N, K]
    N,
    K,
    padded,
    blocks,
    BITS: tl.constexpr,
    F: tl.constexpr,  # planes in a block
    P: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
):
    """w[n, k] = sum_b alpha_b (2 bit_b - 1) + offset, added in the format's order; one block."""
    tile, block = tl.program_id(0), tl.program_id(1)
    n = tile * R + tl.arange(0, R)
    held = load_words(words, tile, block, blocks, BITS * F // 16, R, P)
    for i in tl.static_range(F):
        plane = block * F + i
        k = plane * P + tl.arange(0, P)
        group = tl.minimum(plane // GROUP, (K - 1) // (GROUP * P)) if GROUP else 0
        scale = load_scales(alphas + (group * padded + n) * BITS, BITS)
        value = tl.zeros((R, P), tl.float32)
        for b in tl.static_range(BITS):
            set_ = (held[(b * F + i) // 16] >> ((b * F + i) % 16)) & 1 != 0
            value += tl.where(set_, scale[b][:, None], -scale[b][:, None])
        if offsets is not None:
            value += tl.load(offsets + group * padded + n).to(tl.float32)[:, None]
        inside = (n[:, None] < N) & (k[None, :] < K)
        out = w + n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(out, value.to(w.dtype.element_ty), mask=inside)


def multiply(
    x: Tensor, words: Tensor, alphas: Tensor, offsets: Tensor | None, n: int, group: int
) -> Tensor:
    """x [m, k] fp16 or bf16 -> [m, n] in x's dtype, by the path that suits m."""
    if len(x) > EXPAND_ABOVE or x.dtype not in NAMES:
        return functional.linear(x, expanded(x, words, alphas, offsets, n, group))
    return multiply_packed(x, words, alphas, offsets, n, group)


def multiply_packed(
    x: Tensor,
    words: Tensor,
    alphas: Tensor,
    offsets: Tensor | None,
    n: int,
    group: int,
    splits: int = 0,
) -> Tensor:
    """x [m, k] times the packed weights -> [m, n]; `splits` of K, 0: chosen."""
    x = x.contiguous()
    m, k = x.shape
    y = x.new_empty(m, n)
    tiles, blocks, _, rows, plane = words.shape
    bits = alphas.shape[2]
    m_tiles = triton.cdiv(m, COLUMNS)
    config = configuration(x.device, m, n=n, k=k, bits=bits, group=group)
    splits = splits or config.get("splits") or splits_for(tiles * m_tiles, blocks, x.device)
    partials, counters = memory_for(splits, m_tiles, tiles, COLUMNS * rows, x.device)
    product[(tiles, splits, m_tiles)](
        x,
        words,
        alphas,
        offsets,
        y,
        partials,
        counters,
        m,
        n,
        k,
        alphas.shape[1],
        blocks,
        BITS=bits,
        F=FIELDS[bits],
        P=plane,
        GROUP=group // plane,
        WHOLE=k == blocks * FIELDS[bits] * plane,
        STARTS=group_starts(bits, group, plane),
        ENDS=sum_ends(x.dtype, bits, group, plane),
        NUMBERS=numbers(x.dtype),
        SPLITS=splits,
        R=rows,
        MB=COLUMNS,
        STAGES=config.get("stages", 2),
        ASM=x.is_cuda,
        num_warps=config.get("warps", 4),
    )
    return y


def expanded(
    x: Tensor, words: Tensor, alphas: Tensor, offsets: Tensor | None, n: int, group: int
) -> Tensor:
    """W_hat [n, k] in x's dtype, in memory that the next product takes again."""
    k = x.shape[1]
    tiles, blocks, _, rows, plane = words.shape
    bits = alphas.shape[2]
    w = WORKSPACES.take("expanded", n * k, x.dtype, x.device).view(n, k)
    expand[(tiles, blocks)](
        words,
        alphas,
        offsets,
        w,
        n,
        k,
        alphas.shape[1],
        blocks,
        BITS=bits,
        F=FIELDS[bits],
        P=plane,
        GROUP=group // plane,
        R=rows,
        num_warps=EXPAND_WARPS,
    )
    return w


def configuration(device: torch.device, m: int, **key: int) -> dict[str, Any]:
    """The measured configuration of a shape, {} where none was measured."""
    return dict(tables.configured("bcq", device, m, **key) or {})


def build(bits: int, dtype: torch.dtype) -> Build:
    """`product` as a layer of 4096 input channels in groups of 128 would run it."""
    element, plane = NAMES[dtype], LONGEST[bits]
    pointers = {"x": element, "words": "i16", "alphas": "fp16", "y": element}
    pointers |= {"partials": "fp32", "counters": "i32"}
    integers = ("M", "N", "K", "padded", "blocks")
    constants: dict[str, object] = {
        "offsets": None,
        "BITS": bits,
        "F": FIELDS[bits],
        "P": plane,
        "GROUP": 128 // plane,
        "WHOLE": True,
        "STARTS": group_starts(bits, 128, plane),
        "ENDS": sum_ends(dtype, bits, 128, plane),
        "NUMBERS": numbers(dtype),
        "SPLITS": 4,
        "R": ROWS,
        "MB": COLUMNS,
        "STAGES": 2,
        "ASM": True,
    }
    return Build(
        name=f"bcq{bits}-{element}",
        kernel=product,
        types={n: f"*{t}" for n, t in pointers.items()} | dict.fromkeys(integers, "i32"),
        constants=constants,
        divisible=("N", "K", "padded"),
        per_pass=ROWS * plane * FIELDS[bits],
        budget=BUDGETS[bits],
        spills=24 if bits > 2 else 0,  # of 1800 instructions: sixteen slices of x lie ready
        tensor_core="HMMA|HGMMA|UTCHMMA",
    )


def build_expand(bits: int) -> Build:
    """`expand` to bf16."""
    pointers = {"words": "*i16", "alphas": "*fp16", "w": "*bf16"}
    return Build(
        name=f"expand{bits}",
        kernel=expand,
        types=pointers | dict.fromkeys(("N", "K", "padded", "blocks"), "i32"),
        constants={
            "offsets": None,
            "BITS": bits,
            "F": FIELDS[bits],
            "P": LONGEST[bits],
            "GROUP": 128 // LONGEST[bits],
            "R": ROWS,
        },
        warps=EXPAND_WARPS,
        targets=TARGETS if bits == 3 else (90,),  # the longest; no two differ by a tenth
        divisible=("N", "K", "padded"),
    )


BUILDS = (
    *(build(bits, torch.bfloat16) for bits in (2, 3, 4)),
    replace(build(4, torch.float16), targets=(90,)),  # within 2 % of bf16
    *(build_expand(bits) for bits in (1, 2, 3, 4)),
)
