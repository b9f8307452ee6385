"""SDR weights of four bits (QRazor) times inputs in 16 bits, or in SDR of eight or four bits.

Every weight is a whole number of one byte, every rounded input one of two, and products of bytes
have exact 32-bit sums: nothing is rounded before the scales of row and token. Codes stay in half a
byte, shifts in another for every 16 weights or fewer; a tile is expanded when it is needed, on the
GPU in registers, on the CPU in registers too (kernels/table_cpu.py) or into a shared buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels import ops
from kernels.base import Case, Json, Packed
from kernels.round_cpu import sdr_rows
from kernels.sdr.activations import bytes_of, integers, one_byte, sdr_format
from kernels.sdr.layout import MIDDLE, Layout, flat, ordered, pack, tiled, unit_of, unpack
from kernels.table_cpu import (
    SHIFT,
    Table,
    fits,
    is_rows,
    pack_rows,
    padded,
    ready,
    takes,
    unpack_rows,
)
from kernels.table_cpu import multiply as by_table
from kernels.workspace import WORKSPACES

CELLS = 2**21  # weights expanded at once on the CPU
FEW = 16  # rows of x up to which PyTorch's int8 weight-only product is the fastest one
MOST = 2**17  # inputs: so many products of two bytes, 2^14 at most, have a 32-bit sum
LEVELS = torch.arange(16.0) - MIDDLE  # of codes in half a byte
W4 = sdr_format(scale_dtype="float16")


def act_of(bits: int, group: int = 16) -> Json:
    """QRazor's inputs: 16 bits per tensor, cut to `bits`."""
    return sdr_format(base_bits=16, bits=bits, group=group, per_tensor=True)


class SDRKernel:
    """y = act(x) W_hat^T, W_hat in SDR of at most 8 bits cut to at most 4."""

    name = "sdr"
    rank = 30
    reads = ("sdr",)
    devices = ("cuda", "cpu")
    cases = (
        Case(1, 4096, 4096, W4),
        Case(1, 4096, 4096, W4, act_of(8)),
        Case(1, 4096, 4096, W4, act_of(4)),
        Case(3, 70, 100, W4),
        Case(5, 33, 65, {**W4, "group": 8}, act_of(8, 8)),
        Case(17, 64, 256, {**W4, "group": 32}, act_of(4, 32)),
        Case(2, 65, 130, {**W4, "group": 12}, act_of(4, 0)),
        Case(9, 20, 48, {**W4, "group": 0, "per_tensor": True}, act_of(8, 24)),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if weight["kind"] != "sdr":
            return f"it multiplies by 'sdr' weights, not {weight['kind']!r}"
        if beside := weight.get("beside"):
            return f"it keeps nothing beside the codes, and these have {' and '.join(beside)}"
        if weight["bits"] > 4 or weight["base_bits"] > 8:
            return (
                f"its weights are 8 bits cut to 4 at most, not {weight['base_bits']} cut to "
                f"{weight['bits']}"
            )
        if unit_of(weight["group"]) % 4:
            return f"groups of {weight['group']} weights are no multiple of 4"
        if act is not None and act["kind"] != "sdr":
            return f"it rounds activations to 'sdr', not {act['kind']!r}"
        if k >= MOST:
            return f"sums of {k} products of bytes do not fit in 32 bits"
        if device.type == "cpu" and act is not None and not works():
            return "this build of PyTorch has no exact int8 product on this CPU"
        return None

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        """words and shifts as layout.py has them, scale [n] fp32."""
        n, k = codes.shape
        lay = layout_of(weight, act, n, k, codes.device)
        shift = params.get("shift")
        if shift is None:  # bits = base_bits: nothing is cut
            shift = torch.zeros(n, 1, dtype=torch.uint8, device=codes.device)
        if ready(codes.device) and fits(weight["group"]):
            around = codes + (MIDDLE - 2 ** (weight["bits"] - 1))
            even = functional.pad(shift, (0, shift.shape[1] % 2))
            tensors = {
                "words": pack_rows(around, 4),
                "shifts": even[:, ::2] | even[:, 1::2] << 4,
                "scale": params["scale"].float().expand(n, 1).flatten().contiguous(),
            }
            return Packed(tensors, n, k, {**weight, "shifts": shift.shape[1]}, act)
        group = weight["group"] or lay.padded
        times = group // lay.unit
        shift = shift.repeat_interleave(times, 1)[:, : -(-k // lay.unit)]  # [n, units]
        around = codes + (MIDDLE - 2 ** (weight["bits"] - 1))
        words, shifts = pack(around, shift, lay)
        scale = params["scale"].float().expand(n, 1).flatten().contiguous()
        tensors = {"words": words, "shifts": shifts, "scale": scale}
        return Packed(tensors, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        held, act = packed.tensors, packed.act
        numbers = [0, 0, 0] if act is None else [act["bits"], act["base_bits"], act["group"]]
        symmetric = act is not None and act["saturation"] == "symmetric"
        per_tensor = act is not None and act["per_tensor"]
        dtype = "" if act is None else act["scale_dtype"]
        unit = unit_of(packed.weight["group"])
        if is_rows(held["words"]):
            unit = group_of(packed.weight, packed.k)
        return OP(
            x,
            held["words"],
            held["shifts"],
            held["scale"],
            unit,
            numbers,
            symmetric,
            per_tensor,
            dtype,
        )

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        w = dense(packed)
        if packed.act is None:
            return x.float() @ w.T
        q, scale = integers(x, packed.act)
        return (q @ w.T) * scale

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        form, n, k = case.weight, case.n, case.k
        top = 2 ** form["bits"] - 1
        codes = torch.randint(0, top + 1, (n, k), generator=generator, dtype=torch.uint8)
        shape = (1, 1) if form["per_tensor"] else (n, 1)
        params = {"scale": 0.0005 + 0.0005 * torch.rand(shape, generator=generator)}
        if form["base_bits"] > form["bits"]:
            most = form["base_bits"] - form["bits"]
            count = -(-k // (form["group"] or k))
            shifts = torch.randint(0, most + 1, (n, count), generator=generator)
            params["shift"] = shifts.to(torch.uint8)
        return codes, params

    def container(self, weight: Json) -> str:
        unit = unit_of(weight["group"])
        return f"codes and shifts are kept in 4 bits, with a shift for every {unit} weights"


def layout_of(weight: Json, act: Json | None, n: int, k: int, device: torch.device) -> Layout:
    """How such a weight lies in a device's memory."""
    unit = unit_of(weight["group"])
    if device.type == "cpu":
        return flat(n, k, unit)
    return tiled(n, k, unit, 4 if act is None else 2)


def dense(packed: Packed) -> Tensor:
    """W_hat [n, k] fp32 from the packed tensors."""
    held = packed.tensors
    if is_rows(held["words"]):
        group = group_of(packed.weight, packed.k)
        w = whole_rows(held["words"], held["shifts"], packed.k, group).float()
        return w * held["scale"][:, None]
    lay = layout_of(packed.weight, packed.act, packed.n, packed.k, held["words"].device)
    codes, shift = unpack(held["words"], held["shifts"], lay)
    return torch.ldexp(codes.float() - MIDDLE, shift.int()) * held["scale"][:, None]


def group_of(weight: Json, k: int) -> int:
    """Weights per stored shift in table_cpu's rows."""
    return int(weight["group"] or k) if weight["shifts"] > 1 else k


def whole_rows(words: Tensor, shifts: Tensor, k: int, group: int) -> Tensor:
    """W_hat [n, k] int8 over its scale, from table_cpu's rows; shifts are two to a byte."""
    spread = torch.stack([shifts & 15, shifts >> 4], 2).flatten(1)
    codes = unpack_rows(words, 4, k).view(torch.int8) - MIDDLE
    return codes << spread[:, torch.arange(k) // group].view(torch.int8)


# ---- the op --------------------------------------------------------------------------------


def act_from(numbers: list[int], symmetric: bool, per_tensor: bool, dtype: str) -> Json | None:
    """The op's arguments -> the format of the inputs."""
    if not numbers[0]:
        return None
    bits, base_bits, group = numbers
    return sdr_format(
        bits=bits,
        base_bits=base_bits,
        group=group,
        saturation="symmetric" if symmetric else "released",
        per_tensor=per_tensor,
        scale_dtype=dtype,
    )


def cuda(
    x: Tensor,
    words: Tensor,
    shifts: Tensor,
    scale: Tensor,
    unit: int,
    numbers: list[int],
    symmetric: bool,
    per_tensor: bool,
    dtype: str,
) -> Tensor:
    """By Triton."""
    from kernels.sdr.kernel import product

    act = act_from(numbers, symmetric, per_tensor, dtype)
    lay = tiled(len(scale), x.shape[1], unit, 4 if act is None else 2)
    return product(x, words, shifts, scale, act, lay)


def cpu(
    x: Tensor,
    words: Tensor,
    shifts: Tensor,
    scale: Tensor,
    unit: int,
    numbers: list[int],
    symmetric: bool,
    per_tensor: bool,
    dtype: str,
) -> Tensor:
    """A tile of rows at a time, expanded to bytes; sums of bytes in 32 bits.

    In bf16, which holds eight bits exactly as inputs and weights do, sums in fp32 are three times
    faster and no less exact than a result in bf16 is.
    """
    act = act_from(numbers, symmetric, per_tensor, dtype)
    n = len(scale)
    if is_rows(words):
        return by_rows(x, words, shifts, scale, unit, act)
    lay = flat(n, x.shape[1], unit)
    out = x.new_empty(len(x), n)
    q, x_scale = (x, None) if act is None else integers(x, act)
    q = ordered(q, lay)
    parts: tuple[Tensor, ...] = (q.to(x.dtype),)
    if act is not None and x.dtype != torch.bfloat16:
        parts = (q.to(torch.int8),) if one_byte(act) else bytes_of(q)
    step = max(1, CELLS // lay.padded)
    for start in range(0, n, step):
        stop = min(start + step, n)
        tile = expanded(words[start:stop], shifts[start:stop], lay)
        y = sums(parts, tile)
        y *= scale[start:stop]
        out[:, start:stop] = y if x_scale is None else y.mul_(x_scale)
    return out


def by_rows(
    x: Tensor, words: Tensor, shifts: Tensor, scale: Tensor, group: int, act: Json | None
) -> Tensor:
    """The same of table_cpu's rows: in C for bf16, which holds inputs of 8 bits exactly."""
    k, n = x.shape[1], len(scale)
    table = Table(words, 4, SHIFT, group, -(-k // group), LEVELS, shifts, row_scale=scale)
    if takes(x):
        rounded = (x, None) if act is None else sdr_rows(x, act)
        if rounded is not None:
            return by_table(rounded[0], table, n, rounded[1])
    q, x_scale = (x, None) if act is None else integers(x, act)
    parts: tuple[Tensor, ...] = (q.to(x.dtype),)
    if act is not None and x.dtype != torch.bfloat16:
        parts = (q.to(torch.int8),) if one_byte(act) else bytes_of(q)
    width = padded(k, 4)
    parts = tuple(functional.pad(part, (0, width - k)) for part in parts)
    out = x.new_empty(len(x), n)
    step = max(1, CELLS // width)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        tile = functional.pad(whole_rows(words[rows], shifts[rows], k, group), (0, width - k))
        y = sums(parts, tile).mul_(scale[rows])
        out[:, rows] = y if x_scale is None else y.mul_(x_scale)
    return out


def sums(parts: tuple[Tensor, ...], tile: Tensor) -> Tensor:
    """Inputs [m, padded], or their high and low bytes, times a tile [rows, padded] int8 -> fp32."""
    if parts[0].dtype != torch.int8:
        return half_sums(parts[0], tile).float()
    total, *rest = (torch._int_mm(part, tile.T).float() for part in parts)
    return total.mul_(256).add_(rest[0]) if rest else total


def half_sums(x: Tensor, tile: Tensor) -> Tensor:
    """x [m, padded] times a tile of whole numbers [rows, padded] int8, in x's dtype."""
    if x.dtype == torch.bfloat16 and len(x) <= FEW and not tile.shape[1] % 32:
        ones = torch.ones(len(tile), dtype=torch.bfloat16)
        return torch._weight_int8pack_mm(x, tile, ones)
    wide = WORKSPACES.take("sdr wide", tile.numel(), x.dtype, x.device).view(tile.shape)
    return functional.linear(x, wide.copy_(tile))


def expanded(words: Tensor, shifts: Tensor, lay: Layout) -> Tensor:
    """Rows of flat words and shifts -> whole numbers [rows, padded] int8, in a shared buffer."""
    rows, half = len(words), lay.unit // 2
    size = rows * lay.padded
    held = WORKSPACES.take("sdr tile", size, torch.uint8, words.device)
    cells = held.view(rows, lay.halves, lay.unit, lay.plane)
    flat_words = words.view(rows, lay.halves, half, lay.plane)
    torch.bitwise_and(flat_words, 15, out=cells[:, :, :half])
    torch.bitwise_right_shift(flat_words, 4, out=cells[:, :, half:])
    pairs = shifts.view(rows, 1, lay.plane)
    spread = torch.cat([pairs & 15, pairs >> 4], 1).view(torch.int8)[:, :, None]
    return cells.view(torch.int8).sub_(MIDDLE).bitwise_left_shift_(spread).view(rows, lay.padded)


def fake(x: Tensor, words: Tensor, shifts: Tensor, scale: Tensor, *how: object) -> Tensor:
    """An empty result."""
    return x.new_empty(x.shape[0], scale.shape[0])


OP = ops.register(
    "sdr(Tensor x, Tensor words, Tensor shifts, Tensor scale, int unit, int[] numbers, "
    "bool symmetric, bool per_tensor, str dtype) -> Tensor",
    cpu=cpu,
    cuda=cuda,
    fake=fake,
)


@lru_cache(maxsize=1)
def works() -> bool:
    """True if the product of bytes exists and is exact at the extremes."""
    w = torch.tensor([[127] * 64, [-128] * 64], dtype=torch.int8)
    exact = w.double() @ w.double().T
    try:
        return torch.equal(torch._int_mm(w, w.T).double(), exact)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False  # the reason reaches the user through why_not


KERNEL = SDRKernel()
