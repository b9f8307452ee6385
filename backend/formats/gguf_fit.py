"""How GGUF blocks find their scales: searches over roundings, weighted least squares for each.

All tensors are [..., g] fp32, one scale for each last axis; `mass` are the weights of the squared
errors. From the definitions of llama.cpp's quantizers (ggml-quants.c: make_qx, make_qkx, make_qp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SWEEPS = 5  # most passes of coordinate descent over the codes of a group


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def signed_peak(x: Tensor) -> Tensor:
    """x [..., g] -> its entry of largest magnitude [..., 1], the first of equals."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def in_range(low: int, high: int) -> Callable[[Tensor], Tensor]:
    """Rounding to whole numbers low..high, halves to even."""
    return lambda x: x.round().clamp_(low, high)


def best_scale(
    x: Tensor, mass: Tensor, inverses: Iterable[Tensor], level: Callable[[Tensor], Tensor]
) -> Tensor:
    """x [..., g] -> the scale [..., 1] of least mass-weighted squared error among roundings.

    Each inverse scale [..., 1] gives levels l = level(x * inverse), for which the best scale is
    sum(m x l) / sum(m l^2); its error is sum(m x^2) - sum(m x l)^2 / sum(m l^2).
    """
    scale = torch.zeros_like(x[..., :1])
    best = torch.zeros_like(scale)
    weighted = mass * x
    for inverse in inverses:
        levels = level(x * inverse)
        product = (weighted * levels).sum(-1, keepdim=True)
        square = (mass * levels * levels).sum(-1, keepdim=True)
        gain = quotient(product * product, square)
        better = gain > best
        scale = torch.where(better, quotient(product, square), scale)
        best = torch.where(better, gain, best)
    return scale


def symmetric_scale(x: Tensor, mass: Tensor, top: int) -> Tensor:
    """x [..., g] -> scale [..., 1] of levels -top..top-1, its sign that of -peak."""
    inverse = quotient(torch.ones(()), signed_peak(x))
    tried = (-(top + 0.1 * k) * inverse for k in sorted(range(-9, 10), key=abs))
    return best_scale(x, mass, tried, in_range(-top, top - 1))


def table_scale(x: Tensor, mass: Tensor, level: Callable[[Tensor], Tensor], first: float) -> Tensor:
    """x [..., g] -> scale [..., 1] for unequal levels, of which `first` is the outermost."""
    inverse = quotient(torch.ones(()), signed_peak(x))
    tried = ((first + k) * inverse for k in sorted(range(-7, 8), key=abs))
    return best_scale(x, mass, tried, level)


def positive_scale(x: Tensor, mass: Tensor, top: int) -> Tensor:
    """x [..., g], never negative -> scale [..., 1] of levels 0..top."""
    inverse = quotient(torch.ones(()), x.amax(-1, keepdim=True))
    tried = ((top + 0.1 * k) * inverse for k in sorted(range(-4, 5), key=abs))
    scale = best_scale(x, mass, tried, in_range(0, top))
    return swept_scale(x, mass, scale, 0, top)


def swept_scale(x: Tensor, mass: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The scale after coordinate descent: one code at a time, while the error falls.

    Element i's new code is x_i divided by the best scale of all the others.
    """
    codes = quotient(x, scale).round_().clamp_(low, high)
    product = (mass * x * codes).sum(-1)
    square = (mass * codes * codes).sum(-1)
    for _ in range(SWEEPS):
        changed = False
        for i in range(x.shape[-1]):
            xi, mi, old = x[..., i], mass[..., i], codes[..., i]
            rest, rest_square = product - mi * xi * old, square - mi * old * old
            new = quotient(xi * rest_square, rest).round_().clamp_(low, high)
            with_new, square_new = rest + mi * xi * new, rest_square + mi * new * new
            # gain = product^2 / square, compared without dividing; 0 codes have no gain
            better = (with_new.square() * square > product.square() * square_new) & (square_new > 0)
            better &= (rest != 0) & (new != old)
            changed = changed or bool(better.any())
            codes[..., i] = torch.where(better, new, old)
            product = torch.where(better, with_new, product)
            square = torch.where(better, square_new, square)
        if not changed:
            break
    return quotient(product, square)[..., None]


@dataclass(frozen=True)
class RangeSearch:
    """Which inverse scales (start + step k + top) / (max - min) are tried, k = 0..count."""

    start: float
    step: float
    count: int
    power: int = 2  # of the errors


def offset_scale(x: Tensor, mass: Tensor, top: int, search: RangeSearch) -> tuple[Tensor, Tensor]:
    """x [..., g] -> scale and offset [..., 1], offset <= 0, of values scale * (0..top) + offset.

    The range always holds 0. For each rounding, scale and offset solve the 2 x 2 least squares.
    """
    low = x.amin(-1, keepdim=True).clamp_max(0)
    span = (x.amax(-1, keepdim=True) - low).clamp_min(0)
    scale, offset = span / top, low
    x_low = x - low
    total, moment = mass.sum(-1, keepdim=True), (mass * x).sum(-1, keepdim=True)
    weighted = mass * x
    rounded = in_range(0, top)

    def error(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        miss = torch.addcmul(offset - x, codes, scale)
        miss = miss.abs_() if search.power == 1 else miss.square_()
        return (miss * mass).sum(-1, keepdim=True)

    inverse = quotient(torch.ones(()), span)
    least = error(rounded(x_low * (top * inverse)), scale, offset)
    for k in range(search.count + 1):
        codes = rounded(x_low * ((search.start + search.step * k + top) * inverse))
        mass_codes = mass * codes
        first, square = mass_codes.sum(-1, keepdim=True), (mass_codes * codes).sum(-1, keepdim=True)
        product = (weighted * codes).sum(-1, keepdim=True)
        det = total * square - first * first
        new_scale = quotient(total * product - moment * first, det)
        new_offset = quotient(square * moment - first * product, det)
        above = new_offset > 0
        new_scale = torch.where(above, quotient(product, square), new_scale)
        new_offset = new_offset.clamp_max(0)
        found = error(codes, new_scale, new_offset)
        better = (det > 0) & (found < least)
        scale = torch.where(better, new_scale, scale)
        offset = torch.where(better, new_offset, offset)
        least = torch.where(better, found, least)
    return scale, offset
