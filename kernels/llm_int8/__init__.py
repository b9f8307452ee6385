"""LLM.int8() with its outlier channels known beforehand: int8 and 16-bit products in one launch.

y = s_x s_w (X_q W_q^T) + X_C W_C^T, C the outlier channels: they have no part in a token's scale,
and their codes are 0. On a GPU up to a few tokens are rounded inside that launch, more of them in
one before it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kernels import byte_cpu, ops
from kernels.base import Case, Json, Packed
from kernels.w8_a8.layout import padded, unpadded

MIDDLE = 128  # code of 0
GRID = [255, MIDDLE, 127, 0, torch.finfo(torch.float32).max, 0, 0, 1]  # x: see byte_cpu.Grid
CHUNK = 32  # outlier channels a kernel takes at a time


def llm_int8(outliers: str = "int8", channels: int = 0) -> Json:
    """What the method's linear says of itself: 16-bit weights of outliers, or their codes."""
    form = {"kind": "llm_int8", "bits": 8, "group": 0, "per_tensor": False}
    return {**form, "outliers": outliers, "channels": channels}


class LLMInt8:
    """Codes of 8 bits, a scale per row, and the outlier channels' weights beside them."""

    name = "llm_int8"
    rank = 20
    reads = ("llm_int8",)
    devices = ("cuda", "cpu")
    cases = (
        Case(1, 64, 64, llm_int8("exact", 3)),
        Case(5, 33, 65, llm_int8("int8", 7)),
        Case(17, 50, 130, llm_int8("exact", 40)),
        Case(40, 20, 96, llm_int8()),
    )

    def why_not(
        self, weight: Json, act: Json | None, device: torch.device, n: int, k: int
    ) -> str | None:
        if weight["kind"] != "llm_int8":
            return f"it multiplies by 'llm_int8' weights, not {weight['kind']!r}"
        if act is not None:
            return "it rounds activations itself"
        if k * 2**14 >= 2**31:
            return f"sums over {k} input channels could overflow 32 bits"
        return None

    def pack(
        self, codes: Tensor, params: Mapping[str, Tensor], weight: Json, act: Json | None
    ) -> Packed:
        """As `arranged`, on a CPU for the product of bytes in C where there is one."""
        blocks = codes.device.type == "cpu" and byte_cpu.native() is not None
        n, k = codes.shape
        return Packed(arranged(codes, params, weight, blocks), n, k, weight, act)

    def matmul(self, x: Tensor, packed: Packed) -> Tensor:
        held = packed.tensors
        scaled = packed.weight["outliers"] == "int8"
        rest = (held["keep"], held["index"], held["outliers"], scaled)
        if "q" in held:
            return by_blocks(x, held["q"], held["scale"], packed.n, *rest)
        y: Tensor = OP(x, held["codes"], held["scale"], *rest)
        return y

    def reference(self, x: Tensor, packed: Packed) -> Tensor:
        held = packed.tensors
        rows, scale = read(held, packed.n, packed.k), held["scale"].flatten()[: packed.n]
        a, a_scale = rounded(x, held["keep"])
        y = a @ rows.T * a_scale * scale
        channels = held["index"][held["index"] >= 0].long()
        w = unpadded(held["outliers"], len(channels)).float()
        w = w * scale[:, None] if packed.weight["outliers"] == "int8" else w
        return y + x.float()[:, channels] @ w.T

    def example(self, case: Case, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        n, k, channels = case.n, case.k, case.weight["channels"]
        codes = torch.randint(1, 256, (n, k), generator=generator, dtype=torch.uint8)
        columns = torch.randperm(k, generator=generator)[:channels].sort().values
        scale = 0.01 + 0.01 * torch.rand(n, 1, generator=generator)
        params = {"scale": scale, "columns": columns.to(torch.int32)}
        if case.weight["outliers"] == "exact":
            params["exact"] = torch.randn(n, channels, generator=generator).bfloat16()
        return codes, params

    def container(self, weight: Json) -> str:
        return ""


def arranged(
    codes: Tensor, params: Mapping[str, Tensor], weight: Json, blocks: bool
) -> dict[str, Tensor]:
    """params: scale [n, 1], columns [C], exact [n, C] if outliers are exact.

    -> codes [n, width] int8 and scale [n], or q and scale as byte_cpu has them; keep [k] uint8, 0
    at outlier channels; index int32, the channels and -1 up to a multiple of CHUNK; outliers
    [n, that many], 0 past the last.
    """
    n, k = codes.shape
    q = (codes.to(torch.int16) - MIDDLE).to(torch.int8)
    columns = params["columns"].long()
    keep = torch.ones(k, dtype=torch.uint8, device=codes.device).index_fill_(0, columns, 0)
    beside = params["exact"] if weight["outliers"] == "exact" else q[:, columns]
    more = -len(columns) % CHUNK
    scale = params["scale"].float().expand(n, 1)
    held = {"codes": padded(q), "scale": scale.flatten().contiguous()}
    if blocks:
        whole = byte_cpu.pack(q, scale, None, half=False)
        held = {"q": whole["q"], "scale": whole["scale"]}
    return {
        **held,
        "keep": keep,
        "index": functional.pad(columns.to(torch.int32), (0, more), value=-1),
        "outliers": functional.pad(beside, (0, more)).contiguous(),
    }


def read(held: Mapping[str, Tensor], n: int, k: int) -> Tensor:
    """Whole codes [n, k] fp32."""
    if "q" in held:
        return byte_cpu.unblocked(held["q"])[:n, :k].float()
    return unpadded(held["codes"], k).float()


def _cpu(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    keep: Tensor,
    index: Tensor,
    outliers: Tensor,
    scaled: bool,
) -> Tensor:
    """The same sums, by PyTorch's product of int8 matrices."""
    a, a_scale = rounded(x, keep)
    sums = torch._int_mm(padded(a.to(torch.int8)), codes.T).float()
    return finished(x, sums * a_scale, scale, index, outliers, scaled)


def by_blocks(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    n: int,
    keep: Tensor,
    index: Tensor,
    outliers: Tensor,
    scaled: bool,
) -> Tensor:
    """The same sums in C, which adds the product of the outliers."""
    wide = x if x.dtype != torch.float16 else x.float()
    listed = wide[:, index.clamp_min(0).long()].float()
    beside = functional.linear(listed, outliers.float())
    if scaled:
        beside *= scale[0, :n]
    y = byte_cpu.OP(wide.contiguous(), q, scale, None, None, keep, beside, n, GRID)
    return y.to(x.dtype)


def rounded(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """x [m, k], keep [k] -> whole codes [m, k] fp32, 0 at outlier channels, and scales [m, 1]."""
    small = x.float() * keep
    peak = small.abs().amax(1, keepdim=True)
    peak = peak.masked_fill(peak == 0, 1)
    return small.mul_(127 / peak).round_(), peak / 127


def finished(
    x: Tensor, y: Tensor, scale: Tensor, index: Tensor, outliers: Tensor, scaled: bool
) -> Tensor:
    """y [m, n] without the rows' scales and outliers -> with them, in x's dtype."""
    listed = x[:, index.clamp_min(0).long()].float()  # past the last any channel, times 0
    if scaled:
        y = y.addmm_(listed, outliers.float().T).mul_(scale)
    else:
        y = y.mul_(scale).addmm_(listed, outliers.float().T)
    return y.to(x.dtype)


def _cuda(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    keep: Tensor,
    index: Tensor,
    outliers: Tensor,
    scaled: bool,
) -> Tensor:
    from kernels.llm_int8.kernel import product

    return product(x, codes, scale, keep, index, outliers, scaled)


OP = ops.register(
    "llm_int8(Tensor x, Tensor codes, Tensor scale, Tensor keep, Tensor index, Tensor outliers, "
    "bool scaled) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda x, codes, *rest: x.new_empty(x.shape[0], codes.shape[0]),
)

KERNEL = LLMInt8()
