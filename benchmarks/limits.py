"""What the machine's memory allows each mode, measured over the same bytes as the penalty."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.checks import Errors, Oracle
from benchmarks.race import Contender
from benchmarks.rows import PASSES, Mode

# Of all elements in one tensor; tensor by tensor; into memory allocated for it, and into the same memory every time.
SUM_FLAT = "x.sum(), one tensor"
SUM_LIST = "x.sum(), list"
COPY_FLAT = "y.copy_(x), one tensor"
COPY_FRESH = "y.copy_(x), fresh y"
COPY_WARM = "y.copy_(x), warm y"
ADD_FLAT = "g.add_(x, alpha=a), one tensor"
ADD = "g.add_(x, alpha=a)"
MUL_FLAT = "x.mul_(a), one tensor"
MUL = "x.mul_(a)"

#: What bounds the modes without autograd; the first is what ratios are to. By the kind of device: on a GPU a list
#: tensor by tensor is bound by its launches, and memory comes warm from PyTorch's allocator.
LIMITS: dict[str, dict[Mode, tuple[str, ...]]] = {
    "cpu": {
        "value": (SUM_FLAT, SUM_LIST),
        "value_and_grad": (COPY_FRESH, COPY_WARM),
        "present": (ADD_FLAT, ADD),
        "prox": (MUL_FLAT, MUL),
    },
    "cuda": {"value": (SUM_FLAT,), "value_and_grad": (COPY_FLAT,), "present": (ADD_FLAT,), "prox": (MUL_FLAT,)},
}

# Near enough to 1 for the weights to stay what they are, through all calls.
_FACTOR = 1 - 1e-7


def limits(oracle: Oracle, mode: Mode, flat: bool) -> list[Contender]:
    """The limits of a mode that computes a penalty; if `flat`, of all elements in one tensor only."""
    if mode == "value":
        return [sum_flat(oracle)] if flat else [sum_flat(oracle), _sum_list(oracle)]
    if mode == "present":
        return [addition_flat(oracle)] if flat else [addition_flat(oracle), _addition(oracle)]
    if mode == "prox":
        return [_product_flat(oracle)] if flat else [_product_flat(oracle), _product(oracle)]
    return [_copy_flat(oracle)] if flat else _copies(oracle)


def sum_flat(oracle: Oracle) -> Contender:
    """One read of all elements."""
    flat = _flat(oracle)
    return _limit(oracle, SUM_FLAT, "value", flat.sum, lambda: oracle.check_sum(flat.sum()), reference=True)


def _sum_list(oracle: Oracle) -> Contender:
    tensors = _detached(oracle)

    def sum_list() -> list[Tensor]:
        return [t.sum() for t in tensors]

    def verify() -> Errors:
        return oracle.check_sum(torch.stack(sum_list()).double().sum())

    return _limit(oracle, SUM_LIST, "value", sum_list, verify)


def _copies(oracle: Oracle) -> list[Contender]:
    tensors = _detached(oracle)
    warm = [torch.empty_like(t) for t in tensors]

    def copy_fresh() -> list[Tensor]:
        return [torch.empty_like(t).copy_(t) for t in tensors]

    def copy_warm() -> list[Tensor]:
        return [y.copy_(t) for y, t in zip(warm, tensors, strict=True)]

    check = oracle.check_copy
    return [
        _limit(oracle, COPY_FRESH, "fresh", copy_fresh, lambda: check(copy_fresh()), reference=True),
        _limit(oracle, COPY_WARM, "fresh", copy_warm, lambda: check(copy_warm())),
    ]


def _copy_flat(oracle: Oracle) -> Contender:
    flat = _flat(oracle)
    target = torch.empty_like(flat)

    def copy() -> Tensor:
        return target.copy_(flat)

    return _limit(oracle, COPY_FLAT, "fresh", copy, lambda: oracle.check_copy(_like(oracle, copy())), reference=True)


def _addition(oracle: Oracle) -> Contender:
    tensors = _detached(oracle)
    sums = [torch.zeros_like(t) for t in tensors]
    alpha = 2 * oracle.strengths.l2

    def add() -> None:
        for g, t in zip(sums, tensors, strict=True):
            g.add_(t, alpha=alpha)

    def verify() -> Errors:
        before = [g.clone() for g in sums]
        add()
        return oracle.check_addition(sums, before, alpha)

    return _limit(oracle, ADD, "present", add, verify)


def addition_flat(oracle: Oracle) -> Contender:
    """Two reads of all elements, and a write."""
    flat = _flat(oracle)
    total = torch.zeros_like(flat)
    alpha = 2 * oracle.strengths.l2

    def add() -> Tensor:
        return total.add_(flat, alpha=alpha)

    def verify() -> Errors:
        before = total.clone()
        return oracle.check_addition(_like(oracle, add()), _like(oracle, before), alpha)

    return _limit(oracle, ADD_FLAT, "present", add, verify, reference=True)


def _product(oracle: Oracle) -> Contender:
    tensors = [t.clone() for t in _detached(oracle)]

    def multiply() -> None:
        for t in tensors:
            t.mul_(_FACTOR)

    def verify() -> Errors:
        for t, source in zip(tensors, _detached(oracle), strict=True):
            t.copy_(source)
        multiply()
        return oracle.check_product(tensors, _FACTOR)

    return _limit(oracle, MUL, "prox", multiply, verify)


def _product_flat(oracle: Oracle) -> Contender:
    flat = _flat(oracle)

    def verify() -> Errors:
        flat.copy_(_flat(oracle))
        return oracle.check_product(_like(oracle, flat.mul_(_FACTOR)), _FACTOR)

    return _limit(oracle, MUL_FLAT, "prox", lambda: flat.mul_(_FACTOR), verify, reference=True)


def _detached(oracle: Oracle) -> list[Tensor]:
    return [p.detach() for p in oracle.params]


def _flat(oracle: Oracle) -> Tensor:
    """All elements in one tensor."""
    return torch.cat([t.reshape(-1) for t in _detached(oracle)])


def _like(oracle: Oracle, flat: Tensor) -> list[Tensor]:
    """The parts of a flat tensor that correspond to the parameters."""
    parts = flat.split([p.numel() for p in oracle.params])
    return [part.view(p.shape) for part, p in zip(parts, oracle.params, strict=True)]


def _limit(
    oracle: Oracle,
    name: str,
    mode: Mode,
    call: Callable[[], object],
    verify: Callable[[], Errors],
    reference: bool = False,
) -> Contender:
    return Contender(
        name=name,
        role="limit",
        bytes=PASSES[mode] * sum(p.nbytes for p in oracle.params),
        call=call,
        verify=verify,
        is_reference_limit=reference,
    )
