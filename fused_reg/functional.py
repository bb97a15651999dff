"""The public functions that write nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.compiler import is_compiling
from typing_extensions import Unpack

from fused_reg import _ops, _routes
from fused_reg._arguments import Strength, as_list, as_strengths
from fused_reg._references import Tensors, as_relative
from fused_reg._terms import Terms, takes_terms

_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


@takes_terms
def fused_penalty(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    toward: Tensors | None = None,
    importance: Tensors | None = None,
    **terms: Unpack[Terms[Strength]],
) -> Tensor:
    r"""The L1/L2 penalty of a list of parameters, differentiable, in one pass over their memory.

    .. math::
        \text{penalty} = \sum_t \Big( {value} \Big)

    It equals ``sum(l1 * p.abs().sum() + l2 * (p ** 2).sum() + l2_norm * torch.norm(p) for p in params)``. The gradient
    of the first two terms has the bits of that loop's (float32 and float64), and the value is exact to one rounding.

    **The L2 convention** is ``l2 * sum(w ** 2)``, as in Keras: ``torch.optim.SGD(weight_decay=wd)`` is ``l2 = wd / 2``.

    Args:
        params: an iterable of tensors of any shape (``model.parameters()``, a list, ``dict.values()``), or one tensor;
            float32, float64, bfloat16 or float16, also mixed. It is read once. With DTensors (``fully_shard``, tensor
            parallel) the penalty is that of the whole, and every process that has a shard must call.
        l1: the strength of the sum of absolute values (lasso): a finite float >= 0, a 0-dim tensor, or a sequence or
            1-D tensor with one per parameter. A tensor that requires grad gets its gradient; the values of tensors on
            a GPU, and in compiled code, are not checked.
        l2: the strength of the sum of squares (ridge), likewise. Both together are the elastic net.
            A strength not given is 0, and a strength of 0.0 drops its term. If none is given the penalty is the plain
            sum of squares (``l2=1``), for the caller to scale.
        terms: {text}
        toward: reference weights, one tensor for each parameter, of its shape and dtype: every term is of
            ``w - toward`` (L2-SP, FedProx). Constants, which a step of an optimizer must not change: clones.
        importance: a tensor for each parameter likewise, finite and >= 0, by which its strength is multiplied element
            by element (with ``toward`` elastic weight consolidation; adaptive lasso; 0 as a mask). Dimensions may be 1:
            ``(rows, 1)`` is a factor for each row. Not with ``l2_norm``. See :doc:`/guides/reference_weights`.

    Returns:
        A 0-dim tensor on the first parameter's device, float64 if any parameter is float64, else float32. Parameters
        that do not require grad count in the value.

    Raises:
        TypeError: a parameter is not a dense tensor of a supported dtype, or a strength is not a number.
        ValueError: a strength is negative, infinite or NaN, or there is not one per parameter; an unknown group;
            slices without ``l2_norm``, or ``beta`` without ``smooth_l1``; ``toward`` or ``importance`` is not of the
            shape, dtype and device of its parameter, or an importance is negative, infinite or NaN; a generator that
            something else has read; a parameter of which this process has a piece that looks like a plain tensor
            (FSDP1, DeepSpeed ZeRO-3).

    Warns:
        UserWarning: no parameter requires grad (``.data``, ``.detach()``, all frozen) where a graph was expected: call
            it under ``torch.no_grad()`` for the value; an iterator gives no parameter.

    Example:
        >>> import torch
        >>> from fused_reg import fused_penalty
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, -3.0)
        >>> task_loss = model(torch.ones(1, 2)).sum()
        >>> loss = task_loss + fused_penalty(model.parameters(), l1=0.1, l2=0.01)
        >>> loss.backward()
        >>> loss
        tensor(-5.2200, grad_fn=<AddBackward0>)
        >>> model.weight.grad  # 1 - 0.1 - 0.01 * 6
        tensor([[0.8400, 0.8400]])
        >>> with torch.no_grad():
        ...     fused_penalty(torch.tensor([[3.0, 4.0], [0.0, 5.0]]), l2_norm=0.1, group="row")
        tensor(1.)

    Source: Tibshirani 1996 (L1), Hoerl and Kennard 1970 (L2), Zou and Hastie 2005 (elastic net), Yuan and Lin 2006
    (group lasso).
    """
    tensors = as_list("fused_penalty", params)
    is_plain = not terms and toward is None and importance is None
    if is_plain and not is_compiling() and (plain := _ops.plain_value(tensors, l1, l2)) is not None:
        return plain
    strengths = as_strengths("fused_penalty", tensors, l1, l2, terms)
    if not is_plain:
        strengths = as_relative("fused_penalty", tensors, strengths, toward, importance)
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    if is_compiling():
        # A number that is 0 has dropped its term.
        are_positive = (l1 is None or type(l1) is float) and (l2 is None or type(l2) is float)
        return _routes.penalty(tensors, strengths, are_positive)
    value = _routes.penalty(tensors, strengths)
    if not value.requires_grad and torch.is_grad_enabled() and not _transforms_active():
        warnings.warn(
            "fused_penalty: no parameter requires grad, so that the penalty trains nothing; pass the parameters "
            "themselves, not `.data`, and for the value alone call it under torch.no_grad()",
            stacklevel=2,
        )
    return value


@takes_terms
def value_and_grad(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    toward: Tensors | None = None,
    importance: Tensors | None = None,
    **terms: Unpack[Terms[Strength]],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""The penalty and its gradient in every parameter, in one pass (with ``l2_norm`` two) and outside of autograd.

    .. math::
        \frac{\partial\,\text{penalty}}{\partial w_{t,i}} = {gradient}

    of the penalty that :func:`fused_penalty` defines.

    Args:
        params: as for :func:`fused_penalty`; ``requires_grad`` does not matter.
        l1: as for :func:`fused_penalty`, but taken as a constant.
        l2: as for :func:`fused_penalty`, but taken as a constant.
        terms: as for :func:`fused_penalty`, but taken as constants.
        toward: as for :func:`fused_penalty`.
        importance: likewise.

    Returns:
        The penalty, as :func:`fused_penalty` returns it, and a tuple with one gradient per parameter, of the
        parameter's shape, dtype, device and (where these are dense) strides. Nothing of it requires grad.

    Raises:
        TypeError: as :func:`fused_penalty`.
        ValueError: as :func:`fused_penalty`.

    Example:
        >>> import torch, fused_reg
        >>> w = torch.tensor([1.0, -2.0, 0.0])
        >>> value, (grad,) = fused_reg.value_and_grad(w, l1=0.5, l2=1.0)
        >>> value, grad
        (tensor(6.5000), tensor([ 2.5000, -4.5000,  0.0000]))

    Source: as :func:`fused_penalty`; the subgradient of the absolute value at 0 is 0, as in torch.
    """
    tensors = as_list("value_and_grad", params)
    strengths = as_strengths("value_and_grad", tensors, l1, l2, terms)
    strengths = as_relative("value_and_grad", tensors, strengths, toward, importance)
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device="cpu"), ()
    return _routes.value_and_grad(tensors, strengths)
