"""The public functions that write to the parameters or to their gradients, outside of autograd."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor
from torch.compiler import is_compiling
from typing_extensions import Unpack

from fused_reg import _routes
from fused_reg._arguments import Strength, as_list, as_scale, as_step, as_strengths
from fused_reg._references import Tensors, as_relative
from fused_reg._terms import Terms, takes_terms


@takes_terms
def accumulate_grad_(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    scale: float | Tensor = 1.0,
    toward: Tensors | None = None,
    importance: Tensors | None = None,
    **terms: Unpack[Terms[Strength]],
) -> Tensor:
    r"""Adds the gradient of the penalty to ``.grad``, and returns the penalty: one pass (with ``l2_norm`` two).

    .. math::
        \text{grad}_t \mathrel{+}= \text{scale} \cdot \frac{\partial\,\text{penalty}}{\partial w_t}

    for every parameter that requires grad, with the penalty of :func:`fused_penalty`. After the loss's own backward it
    equals ``(loss + scale * penalty).backward()``, without a graph and without the engine's second pass over ``.grad``.

    Args:
        params: as for :func:`fused_penalty`; leaves. A ``.grad`` that is None is written fresh. A parameter that does
            not require grad keeps its ``.grad``, and counts in the penalty.
        l1: as for :func:`fused_penalty`, but taken as a constant.
        l2: as for :func:`fused_penalty`, but taken as a constant.
        terms: as for :func:`fused_penalty`, but taken as constants.
        scale: a finite float, or a 0-dim tensor on the CPU or on the parameters' device: a loss scale (``GradScaler``),
            or 1 / the number of accumulation steps.
        toward: as for :func:`fused_penalty`; not in the memory of a gradient.
        importance: likewise.

    It moves every element, also those whose gradient a hook masks (frozen rows of an embedding), as ``weight_decay``
    does: see :doc:`/guides/proximal`.

    Returns:
        The penalty, not scaled, as :func:`fused_penalty` returns it, without a graph.

    Raises:
        TypeError: as :func:`fused_penalty`; a ``.grad`` is sparse, or of a dtype that parameters cannot have.
        ValueError: as :func:`fused_penalty`; parameters or gradients share memory; a parameter is not a leaf.
            Nothing has been written then.

    Warns:
        UserWarning: no parameter requires grad, so that nothing is added; an iterator gives no parameter.

    Example:
        >>> import torch, fused_reg
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, -3.0)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> fused_reg.accumulate_grad_(model.parameters(), l1=0.1, l2=0.01)
        tensor(0.7800)
        >>> model.weight.grad  # 1 - 0.1 - 0.01 * 6
        tensor([[0.8400, 0.8400]])

    Source: as :func:`fused_penalty`.
    """
    name = "accumulate_grad_"
    tensors = as_list(name, params)
    strengths = as_strengths(name, tensors, l1, l2, terms)
    strengths = as_relative(name, tensors, strengths, toward, importance)
    value = _routes.accumulate_grad_(tensors, strengths, as_scale(name, scale, tensors))
    if tensors and not is_compiling() and not any(p.requires_grad for p in tensors):
        warnings.warn(
            f"{name}: no parameter requires grad, so that nothing was added; pass the parameters themselves, not "
            "`.data`, and for the value alone take fused_penalty under torch.no_grad()",
            stacklevel=2,
        )
    return value


@takes_terms
def prox_(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    step: Strength,
    toward: Tensors | None = None,
    importance: Tensors | None = None,
    **terms: Unpack[Terms[Strength]],
) -> None:
    r"""The proximal operator of ``step * penalty``, in place: it makes weights *exactly* zero.

    .. math::
        w \leftarrow \operatorname*{arg\,min}_x \tfrac12 \lVert x - w \rVert_2^2 + \text{step} \cdot \text{penalty}(x)

    In closed form, with :math:`s_i = \operatorname{sgn}(w_i) \max(0, |w_i| - \text{step}\, l1)` (soft threshold),

    .. math::
        w_i \leftarrow \frac{s_i}{1 + 2\, \text{step}\, l2}
        \max\Big(0, 1 - \frac{\text{step}\, l2\_norm}{\lVert s_g \rVert_2}\Big)

    Proximal gradient descent (ISTA) is a gradient step on the loss alone, then ``prox_`` with the learning rate:
    ``optimizer.step(); prox_(params, l1, step=lr)``. The gradient of L1 in a loss jumps over zero; this stays there.

    Args:
        params: as for :func:`fused_penalty`; all of them are written, whether they require grad or not.
        l1: as for :func:`fused_penalty`: the soft threshold.
        l2: as for :func:`fused_penalty`: shrinks, and makes nothing zero.
        terms: as for :func:`fused_penalty`: {prox}
        step: a finite float >= 0, a 0-dim tensor, or a sequence with one per parameter: the learning rate.
        toward: as for :func:`fused_penalty`: what is shrunk is ``w - toward``, and what is zero then has the bits of
            ``toward``; not in the memory of a parameter.
        importance: likewise. Each element has its own ``step * importance``; where that is 0, it keeps its bits.

    Raises:
        TypeError: as :func:`fused_penalty`.
        ValueError: as :func:`fused_penalty`; parameters share memory; in grad mode, a tensor is the result of an
            operation, whose graph would not know of the step (a view of a parameter writes to the parameter). Nothing
            has been written then.

    Every element is shrunk, also a row of an embedding that the batch has not touched (``sparse=True``) or whose
    gradient a hook masks. NaN stays NaN, and makes its group NaN under ``l2_norm``.

    Example:
        >>> import torch, fused_reg
        >>> w = torch.tensor([1.0, -2.0, 0.25])
        >>> fused_reg.prox_(w, l1=1.0, l2=0.5, step=0.5)
        >>> w
        tensor([ 0.3333, -1.0000,  0.0000])

    Source: Parikh and Boyd 2014, "Proximal Algorithms", sections 2.2, 6.5.2 and 6.5.4; Yu 2013, "On decomposing the
    proximal map", for the order of the two thresholds; Breheny and Huang 2011, "Coordinate descent algorithms for
    nonconvex penalized regression", for the firm threshold.
    """
    name = "prox_"
    tensors = as_list(name, params)
    strengths = as_strengths(name, tensors, l1, l2, terms, as_step(name, step, tensors))
    _routes.prox_(tensors, as_relative(name, tensors, strengths, toward, importance))
