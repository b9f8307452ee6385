"""Triton kernels of decode attention on packed keys and values: a split over tokens, a merge.

A program takes one key-value head and a range of tokens. Rows r of its tiles are pairs (query
head r // G, group of channels r % G), so that what pads a tile to the 16 rows of a tensor core
holds the groups, whose scales differ: rows of scores are scaled and then added over the groups,
rows of weights are scaled and then multiply all channels, of which each row keeps its group's.

Byte j of a token's row holds the codes of channels j * F .. j * F + F - 1, F = 8 / bits: field f of
all bytes is a plane [.., D / F]. Order matters neither to a dot product over channels nor to sums
over tokens, so nothing is ever interleaved again but the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import TARGETS, Build
from kernels.kv_decode.layout import Held
from kernels.workspace import WORKSPACES

CTAS_PER_SM = 16  # of one warp each, so that enough loads are in flight
MOST_SPLITS = 128
TILES = (32, 16)  # tokens of a pass: they divide the blocks that share a scale
ROWS = 16  # of a tensor core's tile
REST = tl.constexpr(32)  # tokens of a program where not both sides are codes
CHUNK = tl.constexpr(16)  # channels that it takes at once
LANES, SUMS = 32, 64  # of a warp; sums that a lane holds
STAGES = 2  # three would spill: a lane holds as many sums and 32 numbers of q
LOG2E = 1.4426950408889634
COUNTS = (
    "heads",
    "group",
    "sinks",
    "count",
    "key_rounded",
    "value_rounded",
    "key_units",
    "value_units",
    "key_zeros",
    "value_zeros",
    "full",
    "code_splits",
    "share",
)  # they change while a text grows, and none is worth compiling for
UNIT = tl.constexpr(2.0**24)  # code 1 as fp16 bits is 2^-24
Q_TOP = tl.constexpr(16.0)  # the largest of q: times a scale up to 4000 it fits fp16
P_LOG = tl.constexpr(6.0)  # weights are up to 2^6: times a scale down to 1e-6 more than 0


@triton.constexpr_function
def unpack_asm(bits, index):
    """Field `index` of four bytes -> four 16-bit words: a shift, a mask and zeros in between."""
    mask = 0x01010101 * ((1 << bits) - 1)
    return f"""{{ .reg .b32 t; shr.b32 t, $2, {bits * index}; and.b32 t, t, {mask};
    prmt.b32 $0, t, 0, 0x4140; prmt.b32 $1, t, 0, 0x4342; }}"""


@triton.jit
def field(x, BITS: tl.constexpr, INDEX: tl.constexpr, ASM: tl.constexpr):
    """x [...] uint8 -> code INDEX of each byte, low bits first, over UNIT, fp16 and exact.

    A code's own bits are a subnormal number, which tensor cores take as any other: nothing is
    converted.
    """
    if ASM:
        return tl.inline_asm_elementwise(
            unpack_asm(BITS, INDEX), "=&r,=&r,r", [x], dtype=tl.float16, is_pure=True, pack=4
        )
    code = (x >> (BITS * INDEX)) & ((1 << BITS) - 1)
    return code.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def low_of(scale, offset, at, element, zeros, mask, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """The value of code 0, fp32: a stored minimum `at`, or -scale times the zero.

    That is the middle code of symmetric grids, or `element` of the packed row at byte `zeros`.
    """
    if OFFSET == "middle":
        return scale * (-(2.0 ** (BITS - 1)))
    if OFFSET == "zero":
        byte = tl.load(offset + zeros + element * BITS // 8, mask=mask, other=0).to(tl.int32)
        return -scale * ((byte >> (element * BITS % 8)) & ((1 << BITS) - 1)).to(tl.float32)
    return tl.load(offset + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def numbers(
    u,
    d,
    codes,
    scale,
    offset,
    first,
    newest,
    rounded,
    sinks,
    count,
    zero_row,
    heads,
    h,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Tokens u and channels d, broadcast against each other, of whatever kind, as fp32."""
    old = (u < 0) & (u >= -sinks)
    new = (u >= rounded) & (u < count)
    x = tl.load(first + (u + sinks) * D + d, mask=old, other=0).to(tl.float32)
    x += tl.load(newest + (u - rounded) * D + d, mask=new, other=0).to(tl.float32)
    if BITS > 0:
        coded = (u >= 0) & (u < rounded)
        unit = u // BLOCK
        row = (unit.to(tl.int64) * heads + h) * BLOCK + u % BLOCK
        raw = tl.load(codes + row * (D * BITS // 8) + d * BITS // 8, mask=coded, other=0)
        code = (raw.to(tl.int32) >> (d * BITS % 8)) & ((1 << BITS) - 1)
        each = D if BLOCK > 1 else GROUPS  # scales of a token or block, a head
        param = d // (D // each)
        at = unit.to(tl.int64) * each + param
        s = tl.load(scale + at, mask=coded, other=0).to(tl.float32)
        zeros = unit.to(tl.int64) * zero_row
        low = low_of(s, offset, at, h * each + param, zeros, coded, BITS, OFFSET)
        x = tl.where(coded, code.to(tl.float32) * s + low, x)
    return x


@triton.jit
def coded_scores(
    scores,
    q,
    INDEX: tl.constexpr,
    codes,
    scale,
    start,
    heads,
    h,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Adds one plane of q [R, P] times the codes of keys start.. to scores [R, TILE].

    Scales of a channel over a block of tokens fold into q.
    """
    F: tl.constexpr = 8 // BITS
    ROW: tl.constexpr = D * BITS // 8  # bytes of one token of one head
    j = tl.arange(0, D // F)
    u = start + tl.arange(0, TILE)
    if BLOCK > 1:
        block = (start // BLOCK).to(tl.int64)
        row = codes + (block * heads + h) * BLOCK * ROW
        at = (start % BLOCK + tl.arange(0, TILE))[None, :] * ROW + j[:, None]
        raw = tl.load(row + at)
        s = tl.load(scale + block * D + j * F + INDEX)
        q = q * s.to(q.dtype)[None, :]
    else:
        at = (u.to(tl.int64)[None, :] * heads + h) * ROW + j[:, None]
        raw = tl.load(codes + at)
    k = field(raw, BITS, INDEX, ASM).to(q.dtype)
    return tl.dot(q, k, scores, input_precision="ieee")


@triton.jit
def coded_sum(
    total,
    p,
    seen,
    INDEX: tl.constexpr,
    codes,
    scale,
    offset,
    start,
    heads,
    h,
    zero_row,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    TILE: tl.constexpr,
    ASM: tl.constexpr,
):
    """total [R, P] plus weights p [R, TILE] times one plane of the values start..

    p has the scales of single tokens in it, and their lows are added elsewhere; scale and low of a
    channel over a block multiply the product and the sum of the weights, seen [R].
    """
    F: tl.constexpr = 8 // BITS
    ROW: tl.constexpr = D * BITS // 8
    j = tl.arange(0, D // F)
    u = start + tl.arange(0, TILE)
    if BLOCK > 1:
        block = (start // BLOCK).to(tl.int64)
        d = j * F + INDEX
        s = tl.load(scale + block * D + d).to(tl.float32)
        zeros = block * zero_row
        low = low_of(s, offset, block * D + d, h * D + d, zeros, True, BITS, OFFSET)
        total += seen[:, None] * low[None, :]
        row = codes + (block * heads + h) * BLOCK * ROW
        at = (start % BLOCK + tl.arange(0, TILE))[:, None] * ROW + j[None, :]
        raw = tl.load(row + at)
        v = field(raw, BITS, INDEX, ASM).to(p.dtype)
        return total + tl.dot(p, v, input_precision="ieee") * (s * UNIT)[None, :]
    at = (u.to(tl.int64)[:, None] * heads + h) * ROW + j[None, :]
    raw = tl.load(codes + at)
    v = field(raw, BITS, INDEX, ASM).to(p.dtype)
    return tl.dot(p, v, total, input_precision="ieee")


@triton.jit
def coded_part(
    q,
    key_codes,
    key_scale,
    key_offset,
    value_codes,
    value_scale,
    value_offset,
    mask,
    part,
    stats,
    factor,
    heads,
    h,
    group,
    key_zeros,
    value_zeros,
    begin,
    end,
    D: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    MASKED: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    TYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Passes begin .. end - 1 of TILE tokens, of which keys and values are codes."""
    KF: tl.constexpr = 8 // KEY_BITS
    VF: tl.constexpr = 8 // VALUE_BITS
    KP: tl.constexpr = D // KF
    VP: tl.constexpr = D // VF
    G: tl.constexpr = KEY_GROUPS if KEY_GROUPS > VALUE_GROUPS else VALUE_GROUPS
    M: tl.constexpr = R // G
    r = tl.arange(0, R)
    mine, g = r // G, r % G
    there = mine < group
    # q, brought below Q_TOP whatever its type, so that fp16 holds it times a scale
    d = tl.arange(0, D)
    m = tl.arange(0, M)
    whole = tl.load(q + m[:, None] * D + d[None, :], mask=(m < group)[:, None], other=0)
    whole = whole.to(tl.float32)  # [M, D]
    most = tl.maximum(tl.max(tl.abs(whole), 1), 1e-30) / Q_TOP
    whole = (whole / most[:, None]).to(TYPE)
    spread = tl.reshape(tl.broadcast_to(most[:, None], [M, G]), [R])
    kc = tl.arange(0, KP) * KF
    at = q + mine[:, None] * D + kc[None, :]
    mix = there[:, None]
    if KEY_GROUPS > 1:  # of each row the channels of its group only
        mix = mix & ((kc // (D // KEY_GROUPS))[None, :] == g[:, None])
    qs = ()
    sums = tl.zeros((R,), tl.float32)
    for i in tl.static_range(KF):
        plane = (tl.load(at + i, mask=mix, other=0).to(tl.float32) / spread[:, None]).to(TYPE)
        qs += (plane,)  # type: ignore[assignment]
        sums += tl.sum(plane.to(tl.float32), 1)
    spread *= factor

    top = tl.full((R,), -1e30, tl.float32)
    mass = tl.zeros((R,), tl.float32)
    lows = tl.zeros((R, TILE), tl.float32)  # summed over tokens at the end: fewer shuffles
    totals = ()
    for _ in tl.static_range(VF):
        totals += (tl.zeros((R, VP), tl.float32),)  # type: ignore[assignment]
    for at_pass in tl.range(begin, end):
        start = at_pass * TILE
        u = start + tl.arange(0, TILE)
        token = u.to(tl.int64)[None, :]
        s = tl.zeros((R, TILE), tl.float32)
        for i in tl.static_range(KF):
            s = coded_scores(
                s,
                qs[i],
                i,
                key_codes,
                key_scale,
                start,
                heads,
                h,
                D,
                KEY_BITS,
                KEY_BLOCK,
                TILE,
                ASM,
            )
        if KEY_BLOCK > 1:
            block = (start // KEY_BLOCK).to(tl.int64)
            w = tl.load(key_scale + block * D + d).to(tl.float32)
            low = low_of(
                w,
                key_offset,
                block * D + d,
                h * D + d,
                block * key_zeros,
                True,
                KEY_BITS,
                KEY_OFFSET,
            )
            below = tl.sum(whole.to(tl.float32) * low[None, :], 1)  # [M]
            s = s * UNIT + tl.reshape(tl.broadcast_to(below[:, None], [M, G]), [R])[:, None]
        else:
            kg = (g % KEY_GROUPS)[:, None]
            place = token * KEY_GROUPS + kg
            w = tl.load(key_scale + place).to(tl.float32)
            low = low_of(
                w,
                key_offset,
                place,
                h * KEY_GROUPS + kg,
                token * key_zeros,
                True,
                KEY_BITS,
                KEY_OFFSET,
            )
            s = s * (w * UNIT) + sums[:, None] * low
        if KEY_GROUPS > 1:  # each row had the channels of its group only
            s = tl.sum(tl.reshape(s, [M, G, TILE]), 1)
            s = tl.reshape(tl.broadcast_to(s[:, None, :], [M, G, TILE]), [R, TILE])
        s *= spread[:, None]
        if MASKED:
            kept = tl.load(mask + u) != 0
            s = tl.where(kept[None, :], s, -1e30)
        higher = tl.maximum(top, tl.max(s, 1) - P_LOG)
        shrink = tl.exp2(top - higher)
        top = higher
        p = tl.exp2(s - higher[:, None])
        if MASKED:  # a row may have seen nothing yet
            p = tl.where(s > -1e29, p, 0.0)
        seen = tl.sum(p, 1)
        mass = mass * shrink + seen
        shrunk = ()
        for i in tl.static_range(VF):
            shrunk += (totals[i] * shrink[:, None],)  # type: ignore[assignment]
        if VALUE_BLOCK > 1:
            folded = p.to(TYPE)
        else:
            vg = (g % VALUE_GROUPS)[:, None]
            place = token * VALUE_GROUPS + vg
            w = tl.load(value_scale + place).to(tl.float32)
            low = low_of(
                w,
                value_offset,
                place,
                h * VALUE_GROUPS + vg,
                token * value_zeros,
                True,
                VALUE_BITS,
                VALUE_OFFSET,
            )
            lows = lows * shrink[:, None] + p * low
            folded = (p * w).to(TYPE)
        added = ()
        for i in tl.static_range(VF):
            total = coded_sum(
                shrunk[i],
                folded,
                seen,
                i,
                value_codes,
                value_scale,
                value_offset,
                start,
                heads,
                h,
                value_zeros,
                D,
                VALUE_BITS,
                VALUE_BLOCK,
                VALUE_OFFSET,
                TILE,
                ASM,
            )
            added += (total,)  # type: ignore[assignment]
        totals = added

    below = tl.sum(lows, 1)[:, None]
    unit = 1.0 if VALUE_BLOCK > 1 else UNIT
    j = tl.arange(0, VP)
    own = there[:, None] & ((j // (VP // VALUE_GROUPS))[None, :] == g[:, None])
    out = part + mine[:, None] * D + (j * VF)[None, :]
    for i in tl.static_range(VF):
        tl.store(out + i, totals[i] * unit + below, mask=own)
    tl.store(stats + 2 * mine, top, mask=there & (g == 0))
    tl.store(stats + 2 * mine + 1, mass, mask=there & (g == 0))


@triton.jit
def rest_part(
    q,
    key_codes,
    key_scale,
    key_offset,
    key_first,
    key_newest,
    value_codes,
    value_scale,
    value_offset,
    value_first,
    value_newest,
    mask,
    part,
    stats,
    factor,
    heads,
    h,
    group,
    sinks,
    count,
    key_rounded,
    value_rounded,
    key_zeros,
    value_zeros,
    done,
    begin,
    D: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """REST of the sinks and of tokens done.., each side 16 bits or codes; few, so it is simple."""
    e, m = begin + tl.arange(0, REST), tl.arange(0, ROWS)
    u = tl.where(e < sinks, e - sinks, done + e - sinks)
    s = tl.zeros((ROWS, REST), tl.float32)
    for start in tl.range(0, D, CHUNK, num_stages=1):
        d = start + tl.arange(0, CHUNK)
        asks = tl.load(q + m[:, None] * D + d[None, :], mask=(m < group)[:, None], other=0)
        k = numbers(
            u[None, :],
            d[:, None],
            key_codes,
            key_scale,
            key_offset,
            key_first,
            key_newest,
            key_rounded,
            sinks,
            count,
            key_zeros,
            heads,
            h,
            D,
            KEY_BITS,
            KEY_BLOCK,
            KEY_GROUPS,
            KEY_OFFSET,
        )
        s = tl.dot(asks, k.to(asks.dtype), s, input_precision="ieee")
    seen = u < count
    if MASKED:
        seen = seen & (tl.load(mask + u, mask=seen, other=0) != 0)
    s = tl.where(seen[None, :], s * factor, -1e30)
    top = tl.max(s, 1)
    p = tl.where(seen[None, :], tl.exp2(s - top[:, None]), 0.0)
    tl.store(stats + 2 * m, top, mask=m < group)
    tl.store(stats + 2 * m + 1, tl.sum(p, 1), mask=m < group)
    p = p.to(q.dtype.element_ty)
    for start in tl.range(0, D, CHUNK, num_stages=1):
        d = start + tl.arange(0, CHUNK)
        v = numbers(
            u[:, None],
            d[None, :],
            value_codes,
            value_scale,
            value_offset,
            value_first,
            value_newest,
            value_rounded,
            sinks,
            count,
            value_zeros,
            heads,
            h,
            D,
            VALUE_BITS,
            VALUE_BLOCK,
            VALUE_GROUPS,
            VALUE_OFFSET,
        )
        total = tl.dot(p, v.to(p.dtype), input_precision="ieee")
        tl.store(part + m[:, None] * D + d[None, :], total, mask=(m < group)[:, None])


@triton.jit(do_not_specialize=COUNTS)
def _split_kernel(
    q,
    key_codes,
    key_scale,
    key_offset,
    key_first,
    key_newest,
    value_codes,
    value_scale,
    value_offset,
    value_first,
    value_newest,
    mask,
    part,
    stats,
    factor,
    heads,
    group,
    sinks,
    count,
    key_rounded,
    value_rounded,
    key_units,
    value_units,
    key_zeros,
    value_zeros,
    full,
    code_splits,
    share,
    D: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    MASKED: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    TYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Attention of the query heads of one key-value head over a part of the tokens.

    Tokens count from the first after the sinks. The first programs of a head take `share` passes
    each of the `full` ones whose tokens are codes on both sides, the others the rest.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, h = pair // heads, (pair % heads).to(tl.int32)
    KEY_PARAMS: tl.constexpr = D if KEY_BLOCK > 1 else KEY_GROUPS  # of a token or block, a head
    VALUE_PARAMS: tl.constexpr = D if VALUE_BLOCK > 1 else VALUE_GROUPS
    key_codes += batch * key_units * heads * KEY_BLOCK * (D * KEY_BITS // 8)
    value_codes += batch * value_units * heads * VALUE_BLOCK * (D * VALUE_BITS // 8)
    key_scale += pair * key_units * KEY_PARAMS
    value_scale += pair * value_units * VALUE_PARAMS
    if KEY_OFFSET == "zero":
        key_offset += batch * key_units * key_zeros
    else:
        key_offset += pair * key_units * KEY_PARAMS
    if VALUE_OFFSET == "zero":
        value_offset += batch * value_units * value_zeros
    else:
        value_offset += pair * value_units * VALUE_PARAMS
    key_first += pair * sinks * D
    value_first += pair * sinks * D
    key_newest += pair * (count - key_rounded) * D
    value_newest += pair * (count - value_rounded) * D
    mask += batch * (count + sinks)
    place = (pair * tl.num_programs(1) + split) * group
    if KEY_BITS > 0 and VALUE_BITS > 0 and split < code_splits:
        coded_part(
            q + pair * group * D,
            key_codes,
            key_scale,
            key_offset,
            value_codes,
            value_scale,
            value_offset,
            mask + sinks,
            part + place * D,
            stats + 2 * place,
            factor,
            heads,
            h,
            group,
            key_zeros,
            value_zeros,
            split * share,
            tl.minimum(split * share + share, full),
            D,
            KEY_BITS,
            KEY_BLOCK,
            KEY_GROUPS,
            KEY_OFFSET,
            VALUE_BITS,
            VALUE_BLOCK,
            VALUE_GROUPS,
            VALUE_OFFSET,
            MASKED,
            R,
            TILE,
            TYPE,
            ASM,
        )
    else:
        rest_part(
            q + pair * group * D,
            key_codes,
            key_scale,
            key_offset,
            key_first,
            key_newest,
            value_codes,
            value_scale,
            value_offset,
            value_first,
            value_newest,
            mask + sinks,
            part + place * D,
            stats + 2 * place,
            factor,
            heads,
            h,
            group,
            sinks,
            count,
            key_rounded,
            value_rounded,
            key_zeros,
            value_zeros,
            full * TILE,
            (split - code_splits) * REST,
            D,
            KEY_BITS,
            KEY_BLOCK,
            KEY_GROUPS,
            KEY_OFFSET,
            VALUE_BITS,
            VALUE_BLOCK,
            VALUE_GROUPS,
            VALUE_OFFSET,
            MASKED,
            ROWS,
        )


@triton.jit(do_not_specialize=("group", "splits"))
def _merge_kernel(part, stats, out, group, splits, D: tl.constexpr, SPLITS: tl.constexpr):
    """Partial sums [pairs, splits, group, D] and their (top, mass) -> out [pairs * group, D]."""
    row = tl.program_id(0).to(tl.int64)
    pair, mine = row // group, row % group
    i, d = tl.arange(0, SPLITS), tl.arange(0, D)
    there = i < splits
    at = (pair * splits + i) * group + mine  # [SPLITS]
    top = tl.load(stats + 2 * at, mask=there, other=-1e30)
    mass = tl.load(stats + 2 * at + 1, mask=there, other=0)
    weight = tl.where(there, tl.exp2(top - tl.max(top, 0)), 0.0)
    total = tl.sum(weight * mass, 0)
    sums = tl.zeros((D,), tl.float32)
    for s in range(splits):
        one = (pair * splits + s) * group + mine
        w = tl.exp2(tl.load(stats + 2 * one) - tl.max(top, 0))
        sums += w * tl.load(part + one * D + d)
    tl.store(out + row * D + d, (sums / tl.maximum(total, 1e-30)).to(out.dtype.element_ty))


def attention(q: Tensor, keys: Held, values: Held, mask: Tensor | None, scaling: float) -> Tensor:
    """q [B, Hq, D] on what is held -> [B, Hq, D]. mask [B, n] bool: what is read; None is all."""
    batch, query_heads, dim = q.shape
    heads, sinks = keys.newest.shape[1], keys.sinks
    group = query_heads // heads
    tile = next(t for t in TILES if not keys.block % t or keys.block == 1)
    tile = next(t for t in TILES if t <= tile and (not values.block % t or values.block == 1))
    count = keys.count - sinks
    full = min(keys.rounded, values.rounded) // tile
    if not keys.bits or not values.bits:
        full = 0
    share = -(-full // splits_for(batch * heads, full, q.device))
    code_splits = -(-full // share) if full else 0
    splits = code_splits + -(-(count - full * tile + sinks) // REST.value)
    row_groups = max(keys.groups(dim), values.groups(dim))
    rows = max(ROWS, triton.next_power_of_2(group) * row_groups)
    part = WORKSPACES.take(
        "kv_decode parts", batch * query_heads * splits * dim, torch.float32, q.device
    )
    stats = WORKSPACES.take(
        "kv_decode stats", batch * query_heads * splits * 2, torch.float32, q.device
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    told = [
        x.contiguous() if x is not None else q
        for side in (keys, values)
        for x in (side.codes, side.scale, side.offset, side.first, side.newest)
    ]
    seen = q if mask is None else mask.contiguous().view(torch.uint8)
    _split_kernel[(batch * heads, splits)](
        q.contiguous(),
        *told,
        seen,
        part,
        stats,
        scaling * LOG2E,
        heads,
        group,
        sinks,
        count,
        keys.rounded,
        values.rounded,
        keys.units,
        values.units,
        keys.zero_bytes,
        values.zero_bytes,
        full,
        code_splits,
        share,
        D=dim,
        KEY_BITS=keys.bits,
        KEY_BLOCK=keys.block,
        KEY_GROUPS=keys.groups(dim),
        KEY_OFFSET=keys.offset_kind,
        VALUE_BITS=values.bits,
        VALUE_BLOCK=values.block,
        VALUE_GROUPS=values.groups(dim),
        VALUE_OFFSET=values.offset_kind,
        MASKED=mask is not None,
        R=rows,
        ROWS=max(ROWS, triton.next_power_of_2(group)),
        TILE=tile,
        TYPE=tl.float32 if q.dtype == torch.float32 else tl.float16,
        ASM=q.is_cuda,
        num_warps=warps_for(rows, dim, keys.groups(dim), values.block),
        num_stages=STAGES,
    )
    _merge_kernel[(batch * query_heads,)](
        part, stats, out, group, splits, D=dim, SPLITS=triton.next_power_of_2(splits), num_warps=4
    )
    return out


def warps_for(rows: int, dim: int, key_groups: int, value_block: int) -> int:
    """One, which shares no work, where a lane then holds 64 sums at most; more rows share them.

    Two where scales of keys' groups or of values' channels would take its registers.
    """
    least = 1 if key_groups == 1 and value_block == 1 else 2
    return max(least, rows * dim // (LANES * SUMS))


def splits_for(pairs: int, passes: int, device: torch.device) -> int:
    """Parts that the tokens of each head are cut into, so that every multiprocessor is busy."""
    processors = 4
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MOST_SPLITS, passes, processors * CTAS_PER_SM // pairs))


TYPES = {
    "q": "*bf16",
    "key_codes": "*u8",
    "key_scale": "*fp16",
    "key_offset": "*fp16",
    "key_first": "*bf16",
    "key_newest": "*bf16",
    "value_codes": "*u8",
    "value_scale": "*fp16",
    "value_offset": "*fp16",
    "value_first": "*bf16",
    "value_newest": "*bf16",
    "mask": "*u8",
    "part": "*fp32",
    "stats": "*fp32",
    "factor": "fp32",
    **dict.fromkeys(COUNTS, "i32"),
}


def build(
    name: str,
    bits: int,
    block: int,
    offset: str,
    groups: int,
    budget: float = 0,
    targets: tuple[int, ...] = TARGETS,
    **constants: object,
) -> Build:
    """Heads of 128 channels, keys per channel of `block` tokens, or per token; values per token.

    Budget: what the read bandwidth of an H200 leaves for a code with its share of scales.
    """
    given: dict[str, Any] = {
        "D": 128,
        "KEY_BITS": bits,
        "KEY_BLOCK": block,
        "KEY_GROUPS": groups if block == 1 else 1,
        "KEY_OFFSET": offset,
        "VALUE_BITS": bits,
        "VALUE_BLOCK": 1,
        "VALUE_GROUPS": groups,
        "VALUE_OFFSET": offset,
        "MASKED": False,
        "R": 16,
        "ROWS": 16,
        "TILE": 32,
        "TYPE": tl.float16,
        "ASM": True,
        **constants,
    }
    packed = {"key_offset": given["KEY_OFFSET"], "value_offset": given["VALUE_OFFSET"]}
    zeros = {side: "*u8" for side, kind in packed.items() if kind == "zero"}
    return Build(
        name,
        _split_kernel,
        {**TYPES, **zeros},
        given,
        warps=warps_for(given["R"], 128, given["KEY_GROUPS"], given["VALUE_BLOCK"]),
        stages=STAGES,
        per_pass=2 * 32 * 128 if given["KEY_BITS"] else 0,
        budget=budget,
        tensor_core="HMMA",
        targets=targets,
    )


BUILDS = (
    build("kivi 2", 2, 32, "low", 4),
    build("kivi 4", 4, 32, "low", 4, 4.9),
    build("int 8 per token", 8, 1, "middle", 1, 7.8),
    build("int 4 per token", 4, 1, "zero", 4),
    replace(  # spilled by Triton 3.6; none are by 3.7
        build("kivi 4, 8 query heads", 4, 32, "low", 4, targets=(90,), R=32), spills=60
    ),
    build("int 4 per channel", 4, 32, "zero", 1, targets=(90,), VALUE_BLOCK=32, MASKED=True),
    build("values alone", 4, 1, "low", 4, targets=(90,), KEY_BITS=0, KEY_OFFSET="none"),
    Build(
        "merge",
        _merge_kernel,
        {"part": "*fp32", "stats": "*fp32", "out": "*bf16", "group": "i32", "splits": "i32"},
        {"D": 128, "SPLITS": 128},
    ),
)
