"""The specification, in plain torch and independent of the kernels: the functions of the package with the same
signatures, computed in float64, and the loop that people write by hand.

Tests and benchmarks compare with it. The package itself takes `penalty_of` where no kernel has what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_reg._arguments import Strength
from fused_reg._terms import CONSTRAINTS, DEFAULTS, KINDS, ROWS, TERMS, Group, Terms, takes_terms

#: Of each term what its strength is a factor of, for a parameter and the other arguments of its terms.
_SUMS: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "l1": lambda w, given: _sum(w.abs(), given),
    "l2": lambda w, given: _sum(w.square(), given),
    "l2_norm": lambda w, given: _norms(w, given["group"]).sum(),
    "smooth_l1": lambda w, given: _sum(_smooth_l1(w, given["beta"]), given),
    "mcp": lambda w, given: _sum(_mcp(w, given["mcp"], given["mcp_gamma"]), given),
    "scad": lambda w, given: _sum(_scad(w, given["scad"], given["scad_a"]), given),
}


def penalty_of(p: Tensor, given: dict[str, Any]) -> Tensor:
    """That of one parameter in float64, for all arguments of the terms, with ``toward`` and ``importance``."""
    w = _difference(p.double(), given)
    value = _nothing(w)
    for term in TERMS:
        if _is_present(given[term]):
            value = value + given[term] * _SUMS[term](w, given)
    return value


def _sum(x: Tensor, given: dict[str, Any]) -> Tensor:
    importance = given["importance"]
    return x.sum() if importance is None else (importance.to(x.dtype) * x).sum()


def _nothing(w: Tensor) -> Tensor:
    """0, whose gradient is 0: the value without a term."""
    return w.flatten()[:0].sum()


def _difference(w: Tensor, given: dict[str, Any]) -> Tensor:
    return w if given["toward"] is None else w - given["toward"].to(w.dtype)


def _smooth_l1(w: Tensor, beta: float | Tensor) -> Tensor:
    width = torch.as_tensor(beta, dtype=w.dtype, device=w.device)
    slope = 0.5 / torch.where(width > 0, width, 1)
    return torch.where(w.abs() < width, w * w * slope, w.abs() - width / 2)


def _mcp(w: Tensor, strength: float | Tensor, gamma: float | Tensor) -> Tensor:
    """Zhang 2010, equation 2.1, divided by the strength."""
    return _bent(w, 0.0, torch.as_tensor(strength * gamma, dtype=w.dtype, device=w.device))


def _scad(w: Tensor, strength: float | Tensor, a: float | Tensor) -> Tensor:
    """The integral of Fan and Li 2001, equation 2.7, divided by the strength."""
    return _bent(w, *(torch.as_tensor(x, dtype=w.dtype, device=w.device) for x in (strength, strength * a)))


def _bent(w: Tensor, knee: float | Tensor, end: Tensor) -> Tensor:
    """The magnitude up to the knee, a parabola from there to the end, and constant beyond."""
    size = torch.minimum(w.abs(), end)
    return size - (size - knee).clamp(min=0).square() / (2 * torch.where(end > knee, end - knee, 1))


def _with_terms(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None,
    l2: Strength | None,
    terms: Terms[Strength],
    toward: Iterable[Tensor] | Tensor | None,
    importance: Iterable[Tensor] | Tensor | None,
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Each parameter with its own arguments of each term, its reference weights and importances."""
    tensors = [params] if isinstance(params, Tensor) else list(params)
    given: dict[str, Any] = {"l1": l1, "l2": l2, **terms}
    if unknown := given.keys() - {row.name for row in ROWS}:
        raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}")
    if all(given.get(term) is None for term in (*TERMS, *CONSTRAINTS)):
        given["l2"] = 1.0
    columns = [_per_parameter(given.get(kind), default, len(tensors)) for kind, default in DEFAULTS.items()]
    rest = {"group": "tensor"} | {key: x for key, x in given.items() if key not in DEFAULTS}
    found = [(p, dict(zip(DEFAULTS, own, strict=True)) | rest) for p, *own in zip(tensors, *columns, strict=True)]
    for name, xs in (("toward", toward), ("importance", importance)):
        each: Any = [None] * len(tensors) if xs is None else [xs] if isinstance(xs, Tensor) else xs
        for (_, own), x in zip(found, each, strict=True):
            own[name] = x
    return found


def _per_parameter(strength: Strength | None, default: float, count: int) -> list[float | Tensor]:
    if strength is None:
        return [default] * count
    if isinstance(strength, Sequence):
        return list(strength)
    if getattr(strength, "ndim", 0) == 1:  # a tensor or a NumPy array
        return [strength[i] for i in range(count)]  # type: ignore[index]
    return [strength] * count


def _is_present(strength: float | Tensor) -> bool:
    return isinstance(strength, Tensor) or strength != 0


def _smooth_l1_prox(w: Tensor, height: float | Tensor, beta: float | Tensor) -> Tensor:
    """For a gradient of at most this height."""
    width = torch.as_tensor(beta + height, dtype=w.dtype, device=w.device)
    within = w * beta / torch.where(width > 0, width, 1)
    return torch.where(w.abs() <= width, within, w - torch.sign(w) * height)


def _mcp_prox(w: Tensor, step: float | Tensor, strength: float | Tensor, gamma: float | Tensor) -> Tensor:
    """The best of the points where the minimum can be: the corner, on the curve, and beyond, where it is flat."""
    on_curve = (w.abs() - step * strength) / torch.as_tensor(1 - step / gamma, dtype=w.dtype, device=w.device)
    end = torch.as_tensor(strength * gamma, dtype=w.dtype, device=w.device)
    inside = on_curve.nan_to_num(posinf=0.0, neginf=0.0).clamp(min=0).minimum(end)
    found = [torch.zeros_like(w), inside, w.abs()]
    costs = [(x - w.abs()) ** 2 / 2 + step * strength * _mcp(x, strength, gamma) for x in found]
    best = torch.stack(costs).argmin(0, keepdim=True)
    x = torch.sign(w) * torch.stack(found).gather(0, best)[0]
    return torch.where(w.isfinite(), x, w)


def _scad_prox(w: Tensor, step: float | Tensor, strength: float | Tensor, a: float | Tensor) -> Tensor:
    """Likewise: the soft threshold up to the knee, on the curve, and beyond."""
    knee, end = (torch.as_tensor(x, dtype=w.dtype, device=w.device) for x in (strength, strength * a))
    soft = (w.abs() - step * knee).clamp(min=0).minimum(knee)
    ratio = torch.as_tensor(step / (a - 1), dtype=w.dtype, device=w.device)
    on_curve = (w.abs() - ratio * end) / (1 - ratio)
    curved = on_curve.nan_to_num(posinf=0.0, neginf=0.0).maximum(knee).minimum(end)
    found = [soft, curved, w.abs()]
    costs = [(x - w.abs()) ** 2 / 2 + step * strength * _scad(x, strength, a) for x in found]
    best = torch.stack(costs).argmin(0, keepdim=True)
    x = torch.sign(w) * torch.stack(found).gather(0, best)[0]
    return torch.where(w.isfinite(), x, w)


def _like(x: float | Tensor, other: Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=other.dtype, device=other.device)


def _in_runs(w: Tensor, group: Group) -> Tensor:
    """With a dimension for what is in a run of rows, columns or elements."""
    if not isinstance(group, tuple):
        return w
    kind, n = group
    if kind == "block":
        return w.reshape(-1, n)
    dim = {"row": 0, "column": 1}[kind]
    return w if w.ndim <= dim else w.reshape(*w.shape[:dim], w.shape[dim] // n, n, *w.shape[dim + 1 :])


def _norms(w: Tensor, group: Group) -> Tensor:
    """The norm of each group, in a shape that broadcasts with ``_in_runs(w, group)``."""
    w = _in_runs(w, group)
    kind = group[0] if isinstance(group, tuple) else group
    kept = {"tensor": -1, "row": 0, "column": 1, "block": 0}[kind]
    others = [d for d in range(w.ndim) if d != kept]
    norms: Tensor = torch.linalg.vector_norm(w, dim=others, keepdim=True) if others else w.abs()
    return norms


@takes_terms
def fused_penalty(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    toward: Iterable[Tensor] | Tensor | None = None,
    importance: Iterable[Tensor] | Tensor | None = None,
    **terms: Unpack[Terms[Strength]],
) -> Tensor:
    r"""The penalty, every element in float64, rounded once at the end.

    .. math::
        \text{penalty} = \sum_t \Big( {value} \Big)

    Args:
        params: as for :func:`fused_reg.fused_penalty`.
        l1: likewise.
        l2: likewise.
        terms: likewise.
        toward: likewise.
        importance: likewise.

    Returns:
        A differentiable 0-dim tensor, float64 if any parameter is float64, else float32.

    Example:
        >>> import torch
        >>> from fused_reg import reference
        >>> reference.fused_penalty([torch.tensor([1.0, -2.0])], l1=0.5, l2=1.0)
        tensor(6.5000)
        >>> reference.fused_penalty([torch.tensor([3.0, -4.0])], l2_norm=2.0)
        tensor(10.)
    """
    total: Tensor | None = None
    dtype = torch.float32
    for name in CONSTRAINTS:
        if terms.get(name) is not None:
            raise ValueError(f"{name} has no value")
    for p, given in _with_terms(params, l1, l2, terms, toward, importance):
        dtype = torch.promote_types(dtype, p.dtype)
        value = penalty_of(p, given)
        total = value if total is None else total + value.to(total.device)
    return torch.zeros(()) if total is None else total.to(dtype)


@takes_terms
def value_and_grad(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    toward: Iterable[Tensor] | Tensor | None = None,
    importance: Iterable[Tensor] | Tensor | None = None,
    **terms: Unpack[Terms[Strength]],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The penalty and its gradient in every parameter, by autograd through :func:`fused_penalty`.

    Args:
        params: as for :func:`fused_reg.value_and_grad`.
        l1: likewise.
        l2: likewise.
        terms: likewise.
        toward: likewise.
        importance: likewise.

    Returns:
        The value, and a tuple with one gradient per parameter, computed in float64 and rounded once.

    Example:
        >>> import torch
        >>> from fused_reg import reference
        >>> reference.value_and_grad([torch.tensor([1.0, -2.0])], l1=0.5, l2=1.0)
        (tensor(6.5000), (tensor([ 2.5000, -4.5000]),))
    """
    tensors = [params] if isinstance(params, Tensor) else list(params)
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in tensors]
        value = fused_penalty(leaves, l1, l2, toward=toward, importance=importance, **terms)
        grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True) if leaves else ()
    return value.detach(), grads


@takes_terms
@torch.no_grad()
def accumulate_grad_(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    scale: float | Tensor = 1.0,
    toward: Iterable[Tensor] | Tensor | None = None,
    importance: Iterable[Tensor] | Tensor | None = None,
    **terms: Unpack[Terms[Strength]],
) -> Tensor:
    """``p.grad += scale * d(penalty)/dp`` for every parameter that requires grad, each sum in float64.

    Args:
        params: as for :func:`fused_reg.accumulate_grad_`.
        l1: likewise.
        l2: likewise.
        terms: likewise.
        toward: likewise.
        importance: likewise.
        scale: likewise.

    Returns:
        The penalty, not scaled.

    Example:
        >>> import torch
        >>> from fused_reg import reference
        >>> p = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> p.grad = torch.ones(2)
        >>> reference.accumulate_grad_(p, l1=0.5, l2=1.0), p.grad
        (tensor(6.5000), tensor([ 3.5000, -3.5000]))
    """
    tensors = [params] if isinstance(params, Tensor) else list(params)
    with torch.enable_grad():
        leaves = [p.detach().double().requires_grad_() for p in tensors]
        value = fused_penalty(leaves, l1, l2, toward=toward, importance=importance, **terms)
        grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True) if leaves else ()
    dtype = torch.float32
    for p, grad in zip(tensors, grads, strict=True):
        dtype = torch.promote_types(dtype, p.dtype)
        if p.requires_grad:
            before = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = torch.empty_like(before).copy_(before.double() + scale * grad)
    return value.detach().to(dtype)


@takes_terms
@torch.no_grad()
def prox_(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    step: Strength,
    toward: Iterable[Tensor] | Tensor | None = None,
    importance: Iterable[Tensor] | Tensor | None = None,
    **terms: Unpack[Terms[Strength]],
) -> None:
    r"""The proximal operator of ``step * penalty``, in place, computed in float64: the answer ``x`` minimizes

    .. math:: \tfrac12 \lVert x - w \rVert^2 + \text{step} \cdot \text{penalty}(x)

    Args:
        params: as for :func:`fused_reg.prox_`.
        l1: likewise.
        l2: likewise.
        terms: likewise.
        toward: likewise.
        importance: likewise.
        step: likewise.

    Example:
        >>> import torch
        >>> from fused_reg import reference
        >>> p = torch.tensor([1.0, -2.0, 0.25])
        >>> reference.prox_(p, l1=1.0, l2=0.5, step=0.5)
        >>> p
        tensor([ 0.3333, -1.0000,  0.0000])
    """
    own = _with_terms(params, l1, l2, terms, toward, importance)
    for (p, given), eta in zip(own, _per_parameter(step, 0.0, len(own)), strict=True):
        a, b, c, d, beta, mcp, mcp_gamma, scad, scad_a, lower, upper, max_norm = (given[kind] for kind in KINDS)
        rate = eta if given["importance"] is None else eta * given["importance"].double()
        w = _difference(p.double(), given)
        soft = torch.where(w.abs() <= rate * a, 0.0, w - torch.sign(w) * rate * a)
        soft = torch.where(w.isnan(), w, soft)
        norms, threshold = _norms(soft, given["group"]), eta * c
        block = torch.where(norms <= threshold, 0.0, 1 - threshold / norms) if threshold != 0 else 1.0
        soft = (_in_runs(soft, given["group"]) * block).reshape(p.shape)
        rest = rate / (1 + 2 * rate * b)
        x = _smooth_l1_prox(soft / (1 + 2 * rate * b), rest * d, beta)
        x = _mcp_prox(x, rest, mcp, mcp_gamma) if _is_present(mcp) else x
        x = _scad_prox(x, rest, scad, scad_a) if _is_present(scad) else x
        moves = torch.as_tensor(rate != 0, device=x.device)  # a step of 0 moves nothing
        x = torch.where(moves, torch.maximum(torch.minimum(x, _like(upper, x)), _like(lower, x)), x)
        norms = _norms(x, given["group"])
        scale = torch.where(moves & (norms > max_norm), max_norm / norms, 1.0)
        x = (_in_runs(x, given["group"]) * scale).reshape(p.shape)
        x = x if given["toward"] is None else x + given["toward"].double()
        p.copy_(x).add_(0.0)  # a zero is +0, also one that comes from the last rounding


@takes_terms
def loop(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    toward: Iterable[Tensor] | Tensor | None = None,
    importance: Iterable[Tensor] | Tensor | None = None,
    **terms: Unpack[Terms[Strength]],
) -> Tensor:
    """The loop that people write by hand, in the parameters' own dtypes. Its gradient is the contract's, bit for bit
    where ``l2_norm`` is absent.

    Args:
        params: as for :func:`fused_reg.fused_penalty`; not empty.
        l1: likewise.
        l2: likewise.
        terms: likewise.
        toward: likewise.
        importance: likewise.

    Returns:
        A differentiable 0-dim tensor of the parameters' promoted dtype. Its value has the rounding of its sums.

    Example:
        >>> import torch
        >>> from fused_reg import reference
        >>> reference.loop([torch.tensor([1.0, -2.0])], l1=0.5, l2=1.0)
        tensor(6.5000)
    """
    total: Any = 0
    own = _with_terms(params, l1, l2, terms, toward, importance)
    for p, given in own:
        for term in TERMS:
            if _is_present(given[term]):
                total = total + given[term] * _SUMS[term](_difference(p, given), given)
    return total if isinstance(total, Tensor) else cast(Tensor, sum(_nothing(p) for p, _ in own))
