"""Formulas with the numbers on screen: of one weight, from its code to the output it goes into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from app.learn_maths import Applied
from backend.formats.base import Format, Params
from backend.lesson import Walk

Line = tuple[str, str]  # the formula, and the same with numbers
MOST_TERMS = 8  # of a sum written out


def plain(value: float) -> str:
    """A number as short as it can be read: 9, 4.5, −0.333, 1.2e-5."""
    if value == int(value) and abs(value) < 1e6:
        text = str(int(value))
    elif abs(value) < 1e-3 or abs(value) >= 1e6:
        text = f"{value:.2e}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−") if "e" not in text else text.replace("-", "−", value < 0)


def inside(value: float) -> str:
    """A number inside a formula: negative ones in brackets."""
    return f"({plain(value)})" if value < 0 else plain(value)


def source(done: Applied, walk: Walk | None) -> Tensor:
    """[N, K] what was rounded: W, with a scale moved in, or as GPTQ had made it by then."""
    if walk is None:
        return done.lesson.w * done.scale
    found = torch.empty_like(done.lesson.w)
    for step, column in enumerate(walk.order):
        found[:, column] = walk.before(step)[:, step]
    return found


def of_cell(done: Applied, walk: Walk | None, row: int, column: int) -> list[Line]:
    """Every formula from one weight to its error."""
    w, lines = done.lesson.w[row, column].item(), of_method(done, column)
    rounded = source(done, walk)[row, column].item()
    if walk is not None and rounded != w:
        lines.append(("w as the columns before left it", f"{plain(w)} became {plain(rounded)}"))
    elif done.moved:
        s = done.scale[column].item()
        lines.append(("w s", f"{inside(w)} · {plain(s)} = {plain(rounded)}"))
    if done.q is not None:
        code, p = int(done.q.codes[row, column]), done.params_at(row, column)
        kind = done.q.format.kind
        lines += FORMATS_IN_NUMBERS.get(kind, any_grid)(done.q.format, p, rounded, code)
    w_hat = done.w_hat[row, column].item()
    if done.moved:
        lines.append(("ŵ = value / s", f"= {plain(w_hat)}"))
    lines.append(("error = ŵ − w", f"{inside(w_hat)} − {inside(w)} = {plain(w_hat - w)}"))
    return lines


def of_output(done: Applied, row: int) -> list[Line]:
    """One output of the first token: exact and rounded."""
    x = done.lesson.x[0]
    exact, got = done.exact[0, row].item(), done.y[0, row].item()
    x_hat = x if done.x_hat is None else done.x_hat[0]
    return [
        ("y = Σ w x", f"{terms(done.lesson.w[row], x)} = {plain(exact)}"),
        ("ŷ = Σ ŵ x̂" if done.x_hat is not None else "ŷ = Σ ŵ x",
         f"{terms(done.w_hat[row], x_hat)} = {plain(got)}"),
        ("error = ŷ − y", f"{inside(got)} − {inside(exact)} = {plain(got - exact)}"),
    ]  # fmt: skip


def terms(w: Tensor, x: Tensor) -> str:
    """`9·1 + 0·2`, cut after a few."""
    pairs = [f"{inside(a)}·{inside(b)}" for a, b in zip(w.tolist(), x.tolist(), strict=True)]
    return " + ".join(pairs[:MOST_TERMS]) + (" + …" if len(pairs) > MOST_TERMS else "")


# ---- by method: how the column's scale came about ------------------------------------------


def of_method(done: Applied, column: int) -> list[Line]:
    """What the method does before anything is rounded."""
    found = METHODS_IN_NUMBERS.get(done.lesson.method.kind)
    return found(done, column) if found else []


def of_smoothquant(done: Applied, column: int) -> list[Line]:
    if getattr(done.lesson.method, "search", 0):  # then alpha is another one in each layer
        return [("s = max|x|^α / max|w|^(1 − α), α searched", plain(done.scale[column].item()))]
    alpha = done.lesson.method.alpha  # type: ignore[attr-defined]
    x = done.lesson.x[:, column].abs().max().item()
    w = done.lesson.w[:, column].abs().max().item()
    s = plain(done.scale[column].item())
    numbers = f"{plain(x)}^{alpha:g} / {plain(w)}^{1 - alpha:g} = {s}"
    return [("s = max|x|^α / max|w|^(1 − α)", numbers)]


def of_awq(done: Applied, column: int) -> list[Line]:
    if not done.losses:
        return []
    r = done.losses.index(min(done.losses)) / len(done.losses)
    mean = done.lesson.x[:, column].abs().mean().item()
    return [
        ("r of least output error", f"= {r:g} of {len(done.losses)} tried"),
        ("s = mean|x|^r, normalised", f"{plain(mean)}^{r:g} → {plain(done.scale[column].item())}"),
    ]


METHODS_IN_NUMBERS: Mapping[str, Callable[[Applied, int], list[Line]]] = {
    "smoothquant": of_smoothquant,
    "awq": of_awq,
}


# ---- by format: (format, parameters of the weight's group, weight, code) -> lines ----------


def scalar(p: Params, name: str, other: float = 0.0) -> float:
    """A parameter of one group."""
    return p[name].float().flatten()[0].item() if name in p else other


def value_of(fmt: Format, p: Params, code: int) -> float:
    """What a code stands for, by the format itself."""
    shaped = {name: value.unsqueeze(0) for name, value in p.items()}
    shaped = {n: v if v.dim() > 1 else v.unsqueeze(0) for n, v in shaped.items()}
    return fmt.decode(torch.tensor([[code]], dtype=torch.uint8), shaped)[0, 0].item()


def any_grid(fmt: Any, p: Params, w: float, code: int) -> list[Line]:
    """A format without lines of its own: the code and what it stands for."""
    try:
        return [(f"value of code {code}", f"= {plain(value_of(fmt, p, code))}")]
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError):
        return [("code", str(code))]


def of_integers(fmt: Any, p: Params, w: float, code: int) -> list[Line]:
    """`int`: scale, code, value."""
    s, top = scalar(p, "scale"), fmt.top
    z = scalar(p, "zero", fmt.middle if fmt.symmetric else 0)
    nearest = f"clamp(round({inside(w)} / {plain(s)}) + {plain(z)}, 0, {top})"
    would = min(max(round(w / s) + int(z), 0), top)
    note = "" if would == code else f" (nearest: {would})"
    return [
        (of_scale(fmt), f"= {plain(s)}" + ("" if fmt.symmetric else f", z = {plain(z)}")),
        (f"code = clamp(round(w / s) + z, 0, {top})", f"{nearest} = {code}{note}"),
        ("ŵ = s (code − z)", f"{plain(s)} · ({code} − {plain(z)}) = {plain(s * (code - z))}"),
    ]


def of_scale(fmt: Any) -> str:
    """The rule of `int`'s scale."""
    if not fmt.symmetric:
        return f"s = (max − min) / {fmt.top}"
    steps = {"restricted": f"{fmt.middle - 1}", "offset": f"{fmt.top / 2:g}", "full": fmt.middle}
    return f"s = max|w| / {steps[fmt.convention]}"


def of_affine(fmt: Any, p: Params, w: float, code: int) -> list[Line]:
    """Integers whose zero point is a real number."""
    s, z = scalar(p, "scale"), scalar(p, "zero")
    return [
        ("s, z", f"{plain(s)}, {plain(z)}"),
        (f"code = clamp(round(w / s + z), 0, {fmt.top})",
         f"clamp(round({inside(w)} / {plain(s)} + {inside(z)}), 0, {fmt.top}) = {code}"),
        ("ŵ = s (code − z)", f"{plain(s)} · ({code} − {inside(z)}) = {plain(s * (code - z))}"),
    ]  # fmt: skip


def of_scaled_levels(fmt: Any, p: Params, w: float, code: int) -> list[Line]:
    """`minifloat` and `codebook`: a scale times the level of the code."""
    value = value_of(fmt, p, code)
    s = scalar(p, "scale")
    if not s or not p["scale"].is_floating_point():  # scales that are codes themselves
        return any_grid(fmt, p, w, code)
    return [
        ("w / s", f"{inside(w)} / {plain(s)} = {plain(w / s)}"),
        (f"level of code {code}, the nearest", f"= {plain(value / s)}"),
        ("ŵ = s · level", f"{plain(s)} · {inside(value / s)} = {plain(value)}"),
    ]


def of_sdr(fmt: Any, p: Params, w: float, code: int) -> list[Line]:
    """Base integer, shift, leading bits."""
    s, t, signed = scalar(p, "scale"), int(scalar(p, "shift")), code - fmt.middle
    q, value = (round(w / s) if s else 0), s * signed * 2**t
    return [
        (f"q = round(w / s), {fmt.base_bits} bits",
         f"round({inside(w)} / {plain(s)}) = {plain(q)}"),
        ("code = round(q / 2^t), t of the group", f"round({inside(q)} / 2^{t}) = {plain(signed)}"),
        ("ŵ = s · code · 2^t", f"{plain(s)} · {inside(signed)} · {2**t} = {plain(value)}"),
    ]  # fmt: skip


def of_bcq(fmt: Any, p: Params, w: float, code: int) -> list[Line]:
    """A signed sum of scales."""
    alpha = p["alpha"].float().flatten().tolist()
    signs = [1 if code >> i & 1 else -1 for i in range(len(alpha))]
    summed = sum(a * b for a, b in zip(alpha, signs, strict=True)) + scalar(p, "offset")
    pairs = zip(alpha, signs, strict=True)
    parts = " ".join(f"{'+' if b > 0 else '−'} {plain(a)}" for a, b in pairs)
    return [
        ("nearest of the sums of ± a_i", f"to {plain(w)}: code {code:0{len(alpha)}b}"),
        ("ŵ = Σ a_i b_i", f"{parts} = {plain(summed)}"),
    ]


FORMATS_IN_NUMBERS: Mapping[str, Callable[[Any, Params, float, int], list[Line]]] = {
    "int": of_integers,
    "affine": of_affine,
    "minifloat": of_scaled_levels,
    "codebook": of_scaled_levels,
    "sdr": of_sdr,
    "bcq": of_bcq,
}


def of_gptq(walk: Walk, step: int, row: int) -> list[Line]:
    """One column of GPTQ for one row: its error, and the next column's correction."""
    before, u = walk.before(step), walk.factor
    w, q = before[row, step].item(), walk.rounded[row, step].item()
    e, pivot = walk.errors[row, step].item(), u[step, step].item()
    lines = [
        ("e = (w − ŵ) / U_cc", f"({plain(w)} − {inside(q)}) / {plain(pivot)} = {plain(e)}"),
    ]
    if step + 1 < len(walk.order):
        following, weight = before[row, step + 1].item(), u[step, step + 1].item()
        after = following - e * weight
        lines.append(
            ("w_next ← w_next − e U_c,next",
             f"{plain(following)} − {inside(e)} · {inside(weight)} = {plain(after)}")
        )  # fmt: skip
    return lines
