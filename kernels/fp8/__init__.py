"""E4M3 weights by E4M3 activations, scaled per token as they come, or by 16-bit activations.

On a GPU with E4M3 products many tokens go through torch._scaled_mm; everything else, older GPUs
and scales per group of input channels included, through Triton. A CPU with products of bf16 pairs
turns codes into bf16 in registers (kernels/table_cpu.py); others expand a tile of rows at a time
for every product, which saves memory, not time.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from kernels import ops
from kernels.base import Case, Json, Packed
from kernels.quantize import e4m3_rows_reference
from kernels.round_cpu import e4m3_rows
from kernels.table_cpu import E4M3, NONE, PLAIN, Table, takes
from kernels.table_cpu import multiply as by_table
from kernels.table_cpu import padded as whole_blocks
from kernels.w8_a8.layout import padded, unpadded
from kernels.workspace import WORKSPACES

TILE = 256  # rows of weights a CPU expands at a time: 2 MB in bf16 at 4096 channels
FEW = 64  # tokens the Triton kernel takes without rounding them; beyond, weights are expanded
NATIVE = (8, 9)  # the first compute capability that multiplies E4M3


def e4m3(**knobs: object) -> Json:
    """The minifloat format's JSON for cases: E4M3 with defaults but for `knobs`."""
    plain = {"kind": "minifloat", "group": 0, "type": "fp8_e4m3", "per_tensor": False}
    return {**plain, "scale_dtype": "float32", **knobs}


class Fp8:
    """y = act(x) W_hat^T with W_hat, or both, in E4M3."""

    name = "fp8"
    rank = 20
    reads = ("minifloat",)
    devices = ("cuda", "cpu")
    cases = (
        Case(1, 64, 64, e4m3(), e4m3()),
        Case(5, 33, 65, e4m3(), e4m3(per_tensor=True)),
        Case(17, 50, 256, e4m3(group=128), e4m3()),
        Case(3, 9, 96, e4m3(per_tensor=True), e4m3(per_tensor=True)),
        Case(1, 64, 64, e4m3()),
        Case(70, 40, 96, e4m3(group=32, scale_dtype="float16")),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        for form, what in ((weight, "multiplies by"), (act, "rounds activations to")):
            if form is None:
                continue
            if form["kind"] != "minifloat":
                return f"it {what} 'minifloat', not {form['kind']!r}"
            if form["type"] != "fp8_e4m3":
                return f"it {what} fp8_e4m3, not {form['type']}"
        if beside := weight.get("beside"):
            return f"it keeps nothing beside the codes, and these have {' and '.join(beside)}"
        if act and act["group"]:
            return f"it has one activation scale per token, not per {act['group']} channels"
        group = weight["group"]
        if group and (group % 32 or k % group):
            return f"groups of {group} are no multiple of 32 that divides {k} input channels"
        return None

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        """codes [n, width] uint8, the bits of torch.float8_e4m3fn; scale [n, groups] fp32."""
        n, k = codes.shape
        scale = params["scale"].float()
        scale = scale.expand(n, scale.shape[1]).contiguous()
        return Packed({"codes": padded(codes), "scale": scale}, n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        act, held = packed.act, packed.tensors
        y: Tensor = OP(
            x,
            held["codes"],
            held["scale"],
            packed.weight["group"] or packed.k,
            act is not None,
            act["scale_dtype"] if act else "float32",
            act["per_tensor"] if act else False,
        )
        return y

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        held = packed.tensors
        w = unpadded(held["codes"], packed.k).view(torch.float8_e4m3fn).float()
        w = w * spread(held["scale"], packed.weight["group"] or packed.k, packed.k)
        rows = x.float()
        if packed.act:
            told = packed.act["scale_dtype"], packed.act["per_tensor"]
            codes, scale = e4m3_rows_reference(x, packed.k, *told)
            rows = codes.view(torch.float8_e4m3fn).float() * scale[:, None]
        return rows @ w.T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Every E4M3 number but the NaNs; scales around 1e-4, as a weight of 0.05 has them."""
        magnitude = torch.randint(0, 0x7F, (case.n, case.k), generator=generator)
        sign = torch.randint(0, 2, (case.n, case.k), generator=generator) * 0x80
        groups = case.k // case.weight["group"] if case.weight["group"] else 1
        shape = (1, 1) if case.weight["per_tensor"] else (case.n, groups)
        scale = 1e-4 * (0.5 + torch.rand(shape, generator=generator))
        dtype = getattr(torch, case.weight["scale_dtype"])
        return (magnitude + sign).to(torch.uint8), {"scale": scale.to(dtype)}

    def container(self, weight: Json) -> str:
        return ""


def spread(scale: Tensor, group: int, k: int) -> Tensor:
    """scale [n, groups] -> of every channel [n, k], [n, 1] where a row has one."""
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(group, 1)[:, :k]


def _cpu(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    group: int,
    rounded: bool,
    scale_dtype: str,
    shared: bool,
) -> Tensor:
    """Weights expanded in bf16 for bf16 activations, else in fp32, into memory used again."""
    (m, k), (n, width) = x.shape, codes.shape
    if width == whole_blocks(k, E4M3) and takes(x):
        return _by_table(x, codes, scale, group, rounded, scale_dtype, shared)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    token_scale = None
    if rounded:
        rows, token_scale = e4m3_rows_reference(x, width, scale_dtype, shared)
        values = rows.view(torch.float8_e4m3fn).to(dtype)  # exact
    else:
        values = functional.pad(x, (0, width - k)).to(dtype)
    y = x.new_empty(m, n)
    for start in range(0, n, TILE):
        w = expanded(codes[start : start + TILE], dtype)  # [T, width]
        tile_scale = scale[start : start + TILE]
        if scale.shape[1] > 1:
            w[:, :k].view(len(w), -1, group).mul_(tile_scale[..., None])
        part = functional.linear(values, w).float()  # [m, T]
        part = part if scale.shape[1] > 1 else part.mul_(tile_scale.T)
        y[:, start : start + TILE] = part if token_scale is None else part * token_scale[:, None]
    return y


def _by_table(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    group: int,
    rounded: bool,
    scale_dtype: str,
    shared: bool,
) -> Tensor:
    """The same in C. Rounded activations are exact in bf16."""
    n, width = codes.shape
    one = scale.shape[1] == 1
    own = Table(codes, E4M3, NONE, row_scale=scale)
    if not one:
        own = Table(codes, E4M3, PLAIN, group, scale.shape[1], scale=scale)
    if not rounded:
        return by_table(x, own, n)
    if (done := e4m3_rows(x, scale_dtype, shared)) is not None:
        return by_table(done[0], own, n, done[1])
    rows, token_scale = e4m3_rows_reference(x, width, scale_dtype, shared)
    return by_table(expanded(rows, torch.bfloat16), own, n, token_scale.contiguous())


def expanded(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 codes [T, width] -> their numbers in bf16 or fp32, in memory that is used again.

    A shift moves exponent and mantissa to bf16's places, 2^-120 too small; torch's own conversion
    from float8 takes 7 times longer (docs/log.md).
    """
    bf16 = WORKSPACES.take("fp8_rows", codes.numel(), torch.bfloat16, codes.device)
    bf16 = bf16.view(codes.shape)
    bits = bf16.view(torch.int16)
    bits.copy_(codes.view(torch.int8))  # the sign spreads
    bits.bitwise_left_shift_(4).bitwise_and_(0x87F0 - 0x10000)
    bf16.mul_(2.0**120)
    if dtype == torch.bfloat16:
        return bf16
    wide = WORKSPACES.take("fp8_rows", codes.numel(), dtype, codes.device).view(codes.shape)
    return wide.copy_(bf16)


def _cuda(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    group: int,
    rounded: bool,
    scale_dtype: str,
    shared: bool,
) -> Tensor:
    from kernels.fp8.kernel import Rounding, product

    native = capability(x.device) >= NATIVE
    if len(x) > FEW and not rounded:
        return by_expanded(x, codes, scale, group)
    if len(x) > FEW and native and scaled_mm_takes(x, codes, scale):
        return by_scaled_mm(x, codes, scale, scale_dtype, shared)
    rounding = Rounding(scale_dtype, shared) if rounded else None
    return product(x, codes, scale, group, rounding, native)


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def scaled_mm_takes(x: Tensor, codes: Tensor, scale: Tensor) -> bool:
    """True if torch._scaled_mm has this product: scales per token and row, results in bf16."""
    return scale.shape[1] == 1 and len(codes) % 16 == 0 and x.dtype == torch.bfloat16


def by_scaled_mm(x: Tensor, codes: Tensor, scale: Tensor, scale_dtype: str, shared: bool) -> Tensor:
    """Tokens rounded in one launch, then the vendor's product."""
    from kernels.fp8.kernel import rounded_rows

    a, scales = rounded_rows(x.contiguous(), codes.shape[1], scale_dtype, shared)
    return torch._scaled_mm(
        a.view(torch.float8_e4m3fn),
        codes.view(torch.float8_e4m3fn).T,
        scale_a=scales[:, None],
        scale_b=scale.T,
        out_dtype=torch.bfloat16,
    )


def by_expanded(x: Tensor, codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """Weights expanded once into x's dtype, in memory used again, then the vendor's product."""
    w = WORKSPACES.take("expanded", codes.numel(), x.dtype, x.device).view(codes.shape)
    w.copy_(codes.view(torch.float8_e4m3fn))
    if scale.shape[1] == 1:
        w.mul_(scale)
    else:
        w[:, : x.shape[1]].view(len(w), -1, group).mul_(scale[..., None])
    return functional.linear(x, w[:, : x.shape[1]])


OP = ops.register(
    "fp8(Tensor x, Tensor codes, Tensor scale, int group, bool rounded, str scale_dtype, "
    "bool shared) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda x, codes, *rest: x.new_empty(x.shape[0], codes.shape[0]),
)

KERNEL = Fp8()
