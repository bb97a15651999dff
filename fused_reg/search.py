"""Where a search for strengths begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_reg import _ops
from fused_reg._arguments import as_list, is_dtensor
from fused_reg._terms import Group, Strengths, check_group, check_runs, group_code


def largest_strength(
    params: Iterable[Tensor] | Tensor, loss: Callable[[], Tensor], *, group: Group | None = None
) -> float:
    r"""The largest strength that is of use: from it on, all of these parameters stay zero.

    .. math::
        l1_{\max} = \max_{t,\, i} \Big| \frac{\partial L}{\partial w_{t,i}} \Big|_{w = 0}, \qquad
        l2\_norm_{\max} = \max_{t,\, g} \Big\lVert \frac{\partial L}{\partial w_{t,g}} \Big\rVert_2 \Big|_{w = 0}

    for the loss L without the penalty, with all of ``params`` at zero and whatever else it depends on as it is now. At
    zero a proximal step moves nothing exactly if no gradient is larger than the strength, whatever the learning rate
    and also with an ``l2`` beside it. Where L is convex in ``params`` (a linear model, a network's last layer), zero is
    then the minimum of loss and penalty; search from here downwards, as ``max * torch.logspace(0, -3, 20)``. glmnet
    fits what it does not penalize, the intercept, first: do so too.

    In a deep network it is of one layer at a time: with all weights zero most gradients are zero as well, and the
    answer means little.

    Args:
        params: what shall be penalized, as of :func:`fused_penalty`; of a regularizer
            ``[p for _, p in regularizer.named_parameters()]``.
        loss: a function without arguments that gives the loss from them, a tensor of one element. It is called once,
            while they are zero; they are as before afterwards, and ``.grad`` is left alone. What else a call changes
            (the statistics of batch normalization) is changed.
        group: None: the strength of ``l1``; ``'tensor'``, ``'row'``, ``('row', n)`` and so on: that of ``l2_norm`` with
            this ``group``.

    Returns:
        The strength, in the unit of the loss per unit of the weights. 0 if no gradient leads away from zero.

    Raises:
        TypeError: ``loss`` is no function, or gives no tensor; a parameter is a DTensor (search before sharding).
        ValueError: there are no parameters; one does not require grad; an unknown group; the loss is not of one
            element, or uses none of them; a gradient at zero is infinite or NaN.

    Example:
        >>> import torch
        >>> from fused_reg import largest_strength
        >>> w = torch.tensor([5.0, 5.0], requires_grad=True)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([3.0, -2.0])
        >>> def loss():  # its gradients at zero: -3 and 4
        ...     return ((x @ w - y) ** 2).sum() / 2
        >>> largest_strength([w], loss)
        4.0

    Source: Friedman, Hastie and Tibshirani 2010, "Regularization Paths for Generalized Linear Models via Coordinate
    Descent", section 2.5 (``lambda.max`` of glmnet); for groups Yuan and Lin 2006, proposition 1.
    """
    if not callable(loss):
        raise TypeError(f"largest_strength: loss must be a function without arguments, got {type(loss).__name__}")
    if group is not None:
        check_group("largest_strength: ", group)
    tensors = as_list("largest_strength", params)
    if not tensors:
        raise ValueError("largest_strength: params must hold a tensor, got none")
    for i, p in enumerate(tensors):
        if is_dtensor(p):
            raise TypeError(
                f"largest_strength: params[{i}] must be a plain tensor, got a DTensor; search before sharding"
            )
        if not p.requires_grad:
            raise ValueError(f"largest_strength: params[{i}] must require grad, got one that does not")
        if group is not None:
            check_runs(f"largest_strength: params[{i}]", p, group)
    with _at_zero(tensors), torch.enable_grad():
        value = loss()
        if not isinstance(value, Tensor):
            raise TypeError(f"largest_strength: loss must give a tensor, got {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"largest_strength: loss must give one element, got shape {tuple(value.shape)}")
        grads = torch.autograd.grad(value, tensors, allow_unused=True) if value.requires_grad else [None]
    if all(grad is None for grad in grads):
        raise ValueError("largest_strength: loss must depend on params, got one that uses none of them")
    largest = 0.0
    for i, grad in enumerate(grads):
        if grad is not None and grad.numel() > 0:
            sizes = grad.abs() if group is None else _ops.norms([grad], *Strengths(group=group_code(group)))
            found = float(sizes.max())
            if not found < float("inf"):
                raise ValueError(f"largest_strength: the gradient of params[{i}] at zero must be finite, got {found}")
            largest = max(largest, found)
    return largest


@contextmanager
def _at_zero(tensors: Sequence[Tensor]) -> Iterator[None]:
    """By ``.data``: the values come back, so that their versions, which attached regularizers see, need not change."""
    before = [p.data.clone() for p in tensors]
    for p in tensors:
        p.data.zero_()
    try:
        yield
    finally:
        for p, values in zip(tensors, before, strict=True):
            p.data.copy_(values)
