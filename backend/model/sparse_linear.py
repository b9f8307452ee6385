"""SparseLinear: a linear some of whose weights are gone; only the others are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from backend.formats import FORMATS, Format, QTensor
from backend.formats.base import Params
from backend.model.quant_linear import QuantLinear, qtensor_from_state, qtensor_state
from kernels.packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    from kernels.base import Kernel


class SparseLinear(QuantLinear):
    """y = act(x) W_hat^T + b, W_hat 0 wherever `keep` [N, K] is False.

    Kept weights are codes of a grid or, without one, 16-bit numbers (`value_dtype`), stored row by
    row. Where they are: a bit for every weight; or, with `bucket` = m and as many weights in each m
    neighbours of a row, the place of each in its bucket, as sparse tensor cores read 2:4.
    """

    kind: ClassVar[str] = "sparse_linear"
    keep: Tensor

    def __init__(
        self,
        weight: QTensor | Tensor,
        keep: Tensor,
        bias: Tensor | None,
        *,
        bucket: int = 0,
        value_dtype: torch.dtype = torch.float16,
        act: Format | None = None,
        act_params: Params | None = None,
        dtype: torch.dtype,
    ) -> None:
        """weight [N, K] on a grid or dense; what it holds where `keep` is False is dropped."""
        if isinstance(weight, QTensor):
            weight = replace(weight, codes=weight.codes.masked_fill(~keep, 0))
            dense = weight.dequantize()
        else:
            most = torch.finfo(value_dtype).max
            dense = weight.detach().float().clamp(-most, most).to(value_dtype)
        dense = dense.masked_fill(~keep, 0)
        super().__init__(weight, bias, act=act, act_params=act_params, dtype=dtype, dense=dense)
        self.register_buffer("keep", keep, persistent=False)
        self.bucket, self.value_dtype = bucket, value_dtype
        self._bits = self._stored_bits()

    def _stored_bits(self) -> dict[str, float]:
        """Bits per weight, of kept and dropped ones alike."""
        kept = self.keep.sum().item() / max(self.keep.numel(), 1)
        width = torch.finfo(self.value_dtype).bits
        parts = self._bits if self.qtensor is not None else self._bits | {"codes": float(width)}
        index = kept * place_bits(self.bucket) if self.placed else 1.0
        return parts | {"codes": kept * parts["codes"], "index": parts["index"] + index}

    @property
    def placed(self) -> bool:
        """True if places in buckets are stored, which then take no more than a bit per weight."""
        return places_fit(self.keep, self.bucket)

    def with_act(self, act: Format, act_params: Params | None = None) -> SparseLinear:
        """The same weights, inputs rounded to `act`."""
        if self.act is not None:
            raise ValueError(
                f"activations are already rounded to {self.act.kind}; keep one activations step"
            )
        if self.packed:
            raise ValueError("a packed linear cannot change its activations; do it before packing")
        return SparseLinear(
            self.weight if self.qtensor is None else self.qtensor,
            self.keep,
            self.bias,
            bucket=self.bucket,
            value_dtype=self.value_dtype,
            act=act,
            act_params=act_params,
            dtype=self.weight.dtype,
        )

    def why_not_packed(self) -> str:
        """Why the weights cannot be packed, "" if a kernel may try; 16-bit ones can be, too."""
        reason = super().why_not_packed()
        return "" if self.qtensor is None and self.act_params is None else reason

    def packed_form(self) -> dict[str, Any]:
        """As QuantLinear, with the bucket; numbers that are not rounded are told by their dtype."""
        form: dict[str, Any] = {"kind": str(self.value_dtype).removeprefix("torch.")}
        form = form if self.qtensor is None else self.qtensor.format.data()
        return {**form, "beside": sorted(self.beside()), "bucket": self.bucket}

    def beside(self) -> dict[str, dict[str, Tensor]]:
        """As QuantLinear, and which weights are kept."""
        found = {} if self.qtensor is None else super().beside()
        return {**found, "keep": {"keep": self.keep}}

    def codes_to_pack(self) -> tuple[Tensor, Params]:
        """As QuantLinear; W_hat itself where its numbers are not rounded."""
        return (self.weight, {}) if self.qtensor is None else super().codes_to_pack()

    def pack(self, kernel: Kernel) -> None:
        """Hand the kept weights to `kernel` and drop all else."""
        super().pack(kernel)
        self.keep = None  # type: ignore[assignment]

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As QuantLinear, with kept values alone and where they are."""
        tensors, config = QuantLinear.to_state(self)
        if self.qtensor is None:
            tensors["weight"] = self.weight[self.keep].to(self.value_dtype).cpu()
        else:
            kept = replace(self.qtensor, codes=self.qtensor.codes[self.keep])
            state, config["qtensor"] = qtensor_state(kept)
            tensors |= {name: value.detach().cpu().contiguous() for name, value in state.items()}
        if self.placed:
            places = places_of(self.keep, self.bucket)
            tensors["places"] = pack_bits(places.cpu(), place_bits(self.bucket))
        else:
            tensors["mask"] = pack_bits(self.keep.to(torch.uint8).cpu(), 1)
        more = {"bucket": self.bucket, "value_dtype": str(self.value_dtype).removeprefix("torch.")}
        return tensors, config | more | {"kept": int(self.keep.sum())}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
    ) -> SparseLinear:
        n, k = config["shape"]
        if "places" in tensors:
            places = unpack_bits(tensors["places"], place_bits(config["bucket"]), config["kept"])
            keep = keep_from_places(places, n, k, config["bucket"])
        else:
            keep = unpack_bits(tensors["mask"], 1, n * k).view(n, k).bool()
        weight: QTensor | Tensor
        if "qtensor" in config:
            q = qtensor_from_state(tensors, config["qtensor"], [config["kept"]])
            codes = torch.zeros(n, k, dtype=torch.uint8)
            codes[keep] = q.codes
            weight = replace(q, codes=codes)
        else:
            weight = torch.zeros(n, k, dtype=tensors["weight"].dtype)
            weight[keep] = tensors["weight"]
        static = {name[4:]: value for name, value in tensors.items() if name.startswith("act.")}
        return cls(
            weight,
            keep,
            tensors.get("bias"),
            bucket=config["bucket"],
            value_dtype=getattr(torch, config["value_dtype"]),
            act=FORMATS.build(config["act"]) if config["act"] else None,
            act_params=static if config["static_act"] else None,
            dtype=dtype,
        )


def place_bits(bucket: int) -> int:
    """Bits that say which of `bucket` neighbours a weight is: 2 of 4, 3 of 8."""
    return max(bucket - 1, 1).bit_length()


def places_fit(keep: Tensor, bucket: int) -> bool:
    """True if every bucket of a row keeps as many and their places take no more than its mask."""
    n, k = keep.shape
    if not bucket or k % bucket:
        return False
    counts = keep.view(n, -1, bucket).sum(-1)
    first = int(counts.flatten()[0])
    return bool((counts == first).all()) and first * place_bits(bucket) <= bucket


def places_of(keep: Tensor, bucket: int) -> Tensor:
    """keep [N, K] -> the place of each kept weight in its bucket [kept] uint8, row by row."""
    return (keep.nonzero()[:, 1] % bucket).to(torch.uint8)


def keep_from_places(places: Tensor, n: int, k: int, bucket: int) -> Tensor:
    """The inverse of places_of: [N, K] bool."""
    keep = torch.zeros(n * k // bucket, bucket, dtype=torch.bool)
    return keep.scatter_(1, places.view(len(keep), -1).long(), True).view(n, k)
