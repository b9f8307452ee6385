"""QuantLinear: a linear whose weights, activations or both are on a grid, simulated or packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.formats import FORMATS, Format, QTensor
from backend.formats.base import Params, Sparse
from kernels.base import find
from kernels.packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    from kernels.base import Kernel, Packed

LINEARS: dict[str, type[LinearLike]] = {}  # kind -> class, for checkpoints
PLAIN_BITS = {"codes": 16.0, "scales": 0.0, "zeros": 0.0, "outliers": 0.0, "index": 0.0}


class LinearLike(nn.Module):
    """What may stand in a block for an nn.Linear; subclasses are restored by their `kind`."""

    kind: ClassVar[str] = ""
    in_features: int
    out_features: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind:
            LINEARS[cls.kind] = cls

    def bits(self) -> dict[str, float]:
        """Bits per weight: codes, scales, zeros, outliers, index."""
        raise NotImplementedError(f"{type(self).__name__} does not say how many bits it takes")

    def mixes_rows(self) -> bool:
        """True if what one token gives depends on the other tokens of the same call."""
        return False

    def resident_bytes(self) -> int:
        """Bytes of memory this linear holds as it is now."""
        tensors = [*self.parameters(), *self.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON config from which `from_state` makes an equal module."""
        raise NotImplementedError(f"{type(self).__name__} cannot be saved")

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
    ) -> LinearLike:
        """The inverse of `to_state`, computing in `dtype`."""
        raise NotImplementedError(f"{cls.__name__} cannot be restored")


class QuantLinear(LinearLike):
    """y = act(x) W_hat^T + b. Simulated: W_hat is dense. Packed: a kernel multiplies by the codes.

    `weight` is W_hat [N, K] in the compute dtype (None once packed); `qtensor` holds the codes
    (None where the weights stay in 16 bits). The codes travel with the module between devices but
    never change dtype.
    """

    kind: ClassVar[str] = "quant_linear"
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: QTensor | Tensor,
        bias: Tensor | None,
        *,
        act: Format | None = None,
        act_params: Params | None = None,
        dtype: torch.dtype,
        dense: Tensor | None = None,
    ) -> None:
        """`dense` is W_hat [N, K] where the caller has it already; else it is dequantized here."""
        super().__init__()
        self.qtensor = weight if isinstance(weight, QTensor) else None
        if dense is None:
            dense = weight.dequantize() if isinstance(weight, QTensor) else weight.detach()
        self.out_features, self.in_features = dense.shape
        self.register_buffer("weight", dense.to(dtype), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self.act = act
        self.act_params = act_params
        self.kernel: Kernel | None = None
        self.packed_weight: Packed | None = None
        self.container = ""
        self._bits = dict(PLAIN_BITS) if self.qtensor is None else self.qtensor.bits()
        self.requires_grad_(False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, act: Format | None = None, act_params: Params | None = None
    ) -> Self:
        """A plain linear with its weights as they are, its inputs rounded to `act`."""
        dtype = linear.weight.dtype
        return cls(linear.weight, linear.bias, act=act, act_params=act_params, dtype=dtype)

    def with_act(self, act: Format, act_params: Params | None = None) -> QuantLinear:
        """The same weights, inputs rounded to `act`: an activations step after a weight step."""
        if self.act is not None:
            raise ValueError(
                f"activations are already rounded to {self.act.kind}; keep one activations step"
            )
        if self.packed:
            raise ValueError("a packed linear cannot change its activations; do it before packing")
        source = self.weight if self.qtensor is None else self.qtensor
        kept: dict[str, Any] = {"dtype": self.weight.dtype, "dense": self.weight}
        return QuantLinear(source, self.bias, act=act, act_params=act_params, **kept)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.kernel is not None:
            rows = x.reshape(-1, self.in_features)
            assert self.packed_weight is not None
            y = self.kernel.matmul(rows, self.packed_weight)  # [M, N]
            y = y if self.bias is None else y + self.bias
            return y.view(*x.shape[:-1], self.out_features)
        if self.act is not None:
            x = rounded(x, self.act, self.act_params)
        return functional.linear(x, self.weight, self.bias)

    def bits(self) -> dict[str, float]:
        """Bits per weight of what is stored: codes, scales, zeros, outliers, index."""
        return dict(self._bits)

    def mixes_rows(self) -> bool:
        """True if one dynamic scale covers a whole input."""
        if self.act is None or self.act_params is not None:
            return False
        return self.act.granularity == "tensor"

    @property
    def packed(self) -> bool:
        """True once a kernel holds the weights."""
        return self.kernel is not None

    def why_not_packed(self) -> str:
        """Why the weights cannot be packed, "" if a kernel may try."""
        if self.qtensor is None:
            return "its weights are not quantized"
        if self.act_params is not None:
            return "no kernel here takes static activation scales"
        return ""

    def kernel_for(self, device: torch.device | str) -> Kernel:
        """The kernel that can hold this linear on a device, or ValueError with every reason."""
        if reason := self.why_not_packed():
            raise ValueError(reason)
        act = None if self.act is None else self.act.data()
        return find(self.packed_form(), act, device, self.out_features, self.in_features)

    def packed_form(self) -> dict[str, Any]:
        """What kernels are told: the format, and under "beside" what the weights have beside it."""
        assert self.qtensor is not None
        form = self.qtensor.format.data()
        if form["kind"] in ("int", "affine") and form["group"] >= self.in_features:
            form["group"] = 0  # the same: one group is the whole row
        beside = sorted(self.beside())
        return {**form, **({"beside": beside} if beside else {})}

    def beside(self) -> dict[str, dict[str, Tensor]]:
        """What the weights have beside codes and parameters, by its name in `packed_form`."""
        assert self.qtensor is not None
        found = {}
        if (index := self.qtensor.column_group) is not None:
            found["column_group"] = {"column_group": index}
        if (sparse := self.qtensor.sparse) is not None:
            names = ("row_ptr", "column", "value")
            found["outliers"] = {name: getattr(sparse, name) for name in names}
        return found

    def codes_to_pack(self) -> tuple[Tensor, Params]:
        """Codes [N, K] and parameters where W_hat is."""
        assert self.qtensor is not None
        q = moved(self.qtensor, self.weight.device)
        return q.codes, q.params

    def pack(self, kernel: Kernel) -> None:
        """Hand the weights to `kernel` and drop W_hat and the codes."""
        if reason := self.why_not_packed():
            raise ValueError(f"cannot pack: {reason}; use storage='simulated'")
        codes, params = self.codes_to_pack()
        act = None if self.act is None else self.act.data()
        form = self.packed_form()
        device = self.weight.device
        held = {k: t.to(device) for part in self.beside().values() for k, t in part.items()}
        self.packed_weight = kernel.pack(codes, {**params, **held}, form, act)
        self.kernel = kernel
        self.container = kernel.container(form)
        self.qtensor = None
        self.weight = None  # type: ignore[assignment]

    def resident_bytes(self) -> int:
        """Bytes held: packed buffers and bias, or W_hat and the codes (one byte each) beside it."""
        held = tensors_of(self.qtensor) + list((self.act_params or {}).values())
        packed = 0 if self.packed_weight is None else self.packed_weight.nbytes()
        return super().resident_bytes() + packed + sum(t.numel() * t.element_size() for t in held)

    def resident_note(self) -> str:
        """Why resident bits differ from the bits of a code; "" where they do not."""
        return self.container if self.packed else ""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the codes and parameters along with the buffers; their dtype never changes."""
        super()._apply(fn, recurse)
        # An empty tensor tells where fn moves things without casting what must stay exact.
        device = fn(torch.empty(0, device=self._device())).device
        if self.qtensor is not None:
            self.qtensor = moved(self.qtensor, device)
        if self.act_params is not None:
            self.act_params = {k: v.to(device) for k, v in self.act_params.items()}
        if self.packed_weight is not None:
            self.packed_weight = self.packed_weight.to(device)
        return self

    def _device(self) -> torch.device:
        if self.packed_weight is None:
            return self.weight.device
        return next(iter(self.packed_weight.tensors.values())).device

    def to_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Codes packed at their own width, parameters as they are, and the formats' JSON."""
        if self.packed:
            raise ValueError("a packed linear has dropped its codes; save it before packing")
        tensors: dict[str, Tensor] = {}
        config: dict[str, Any] = {
            "shape": [self.out_features, self.in_features],
            "act": None if self.act is None else self.act.data(),
            "static_act": self.act_params is not None,
        }
        if self.qtensor is None:
            tensors["weight"] = self.weight
        else:
            state, config["qtensor"] = qtensor_state(self.qtensor)
            tensors |= state
        if self.bias is not None:
            tensors["bias"] = self.bias
        tensors |= {f"act.{name}": value for name, value in (self.act_params or {}).items()}
        return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, config

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
    ) -> QuantLinear:
        weight: QTensor | Tensor
        if "qtensor" in config:
            weight = qtensor_from_state(tensors, config["qtensor"], config["shape"])
        else:
            weight = tensors["weight"]
        act = FORMATS.build(config["act"]) if config["act"] else None
        static = {k.removeprefix("act."): v for k, v in tensors.items() if k.startswith("act.")}
        act_params = static if config["static_act"] else None
        return cls(weight, tensors.get("bias"), act=act, act_params=act_params, dtype=dtype)

    def extra_repr(self) -> str:
        grid = "16 bit" if self.qtensor is None else self.qtensor.format.kind
        return f"in={self.in_features}, out={self.out_features}, {grid}, packed={self.packed}"


def rounded(x: Tensor, act: Format, params: Params | None) -> Tensor:
    """x [..., K] rounded to `act`: per token as it comes, or with fixed `params`."""
    return act.fake(x) if params is None else act.fake_static(x, params)


def tensors_of(q: QTensor | None) -> list[Tensor]:
    """Every tensor of a QTensor."""
    if q is None:
        return []
    index = [] if q.column_group is None else [q.column_group]
    outliers = [] if q.sparse is None else [q.sparse.row_ptr, q.sparse.column, q.sparse.value]
    return [q.codes, *q.params.values(), *index, *outliers]


def moved(q: QTensor, device: torch.device) -> QTensor:
    """The same QTensor on another device."""
    params = {name: value.to(device) for name, value in q.params.items()}
    index = None if q.column_group is None else q.column_group.to(device)
    sparse = q.sparse
    if sparse is not None:
        sparse = Sparse(*(t.to(device) for t in (sparse.row_ptr, sparse.column, sparse.value)))
    return QTensor(q.codes.to(device), params, q.format, index, sparse)


def stored_width(codes: Tensor, format_bits: float) -> int:
    """Bits per code on disk: the format's width, or what its largest code needs."""
    largest = int(codes.max()).bit_length() if codes.numel() else 1
    return max(1, largest, min(8, math.ceil(format_bits)))


def qtensor_state(q: QTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors for disk, codes and uint8 parameters bit-packed, and how to read them."""
    width = stored_width(q.codes, q.format.code_bits())
    tensors = {"codes": pack_bits(q.codes, width)}
    config: dict[str, Any] = {"format": q.format.data(), "width": width, "params": {}}
    for name, value in q.params.items():
        packed = value.dtype == torch.uint8
        floor = q.format.code_bits() if name.startswith("zero") else 1  # zeros count as codes do
        bits = stored_width(value, floor) if packed else 0
        tensors[f"params.{name}"] = pack_bits(value, bits) if packed else value
        config["params"][name] = {"shape": list(value.shape), "width": bits}
    if q.column_group is not None:
        tensors["column_group"] = q.column_group
    if q.sparse is not None:
        for name in ("row_ptr", "column", "value"):
            tensors[f"sparse.{name}"] = getattr(q.sparse, name)
    return tensors, config


def qtensor_from_state(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], shape: list[int]
) -> QTensor:
    """The inverse of qtensor_state."""
    codes = unpack_bits(tensors["codes"], config["width"], math.prod(shape)).view(*shape)
    params = {}
    for name, how in config["params"].items():
        value = tensors[f"params.{name}"]
        if how["width"]:
            value = unpack_bits(value, how["width"], math.prod(how["shape"]))
        params[name] = value.view(*how["shape"])
    sparse = None
    if "sparse.row_ptr" in tensors:
        sparse = Sparse(*(tensors[f"sparse.{name}"] for name in ("row_ptr", "column", "value")))
    return QTensor(
        codes, params, FORMATS.build(config["format"]), tensors.get("column_group"), sparse
    )
