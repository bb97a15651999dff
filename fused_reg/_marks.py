"""`regularized`: a layer says at its definition which penalty its parameters carry."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch.nn import Module

from fused_reg._arguments import Group
from fused_reg._strengths import Given, Penalty, as_penalty

M = TypeVar("M", bound=Module)

# A plain attribute: deepcopy, pickle, torch.compile and fully_shard keep it, and state_dict does not see it.
_ATTRIBUTE = "_fused_reg_mark"


class Mark(NamedTuple):
    """What a module says about the parameters in it."""

    penalty: Penalty
    bias: bool


def regularized(
    module: M,
    l1: Given = None,
    l2: Given = None,
    l2_norm: Given = None,
    *,
    group: Group = "tensor",
    bias: bool = False,
) -> M:
    r"""Marks a module: its weights carry this penalty, whichever :class:`Regularizer` is built from a net that has it.

    .. math:: l1 \sum_i |w_i| + l2 \sum_i w_i^2 + l2\_norm \sum_g \lVert w_g \rVert_2

    for each of its parameters, as ``kernel_regularizer`` does in Keras. The mark alone changes nothing in training;
    ``Regularizer(net)`` finds it. The mark is an attribute of the module: copies, pickles, ``torch.compile`` and
    ``fully_shard`` keep it, and the ``state_dict`` is as before.

    Args:
        module: any module; its submodules' parameters are meant as well. A mark inside of it is stronger: the innermost
            that speaks about a parameter wins. Marking a module again replaces its mark.
        l1: the strength of the sum of absolute values: a finite float >= 0, a 0-dim tensor, or a schedule (a function
            of the number of steps taken).
        l2: the strength of the sum of squares, likewise. ``l2 * sum(w ** 2)``, as in Keras.
        l2_norm: the strength of the sum of norms, likewise.
        group: what the norms are of: ``"tensor"`` or ``"row"``, as for :func:`fused_penalty`.
        bias: also the biases. Without it all parameters are meant whose names do not say bias; the weight of a
            normalization layer is, if that layer is marked.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` is no module, or a strength no number.
        ValueError: no strength is given, or one is negative, infinite or NaN; an unknown group.

    Example:
        >>> import torch
        >>> from fused_reg import Regularizer, regularized
        >>> layer = regularized(torch.nn.Linear(2, 2), l1=0.5)
        >>> net = torch.nn.Sequential(layer, torch.nn.Linear(2, 1))
        >>> _ = torch.nn.init.constant_(net[0].weight, -3.0)
        >>> Regularizer(net)()  # 0.5 * 4 * 3
        tensor(6., grad_fn=<...>)

    Source: the ``kernel_regularizer`` and ``bias_regularizer`` of Keras layers.
    """
    if not isinstance(module, Module):
        raise TypeError(f"regularized: module must be a torch.nn.Module, got {type(module).__name__}")
    penalty = as_penalty("regularized: ", l1=l1, l2=l2, l2_norm=l2_norm, group=group)
    if penalty.is_empty:
        raise ValueError("regularized: l1, l2 or l2_norm must give a strength, got none")
    setattr(module, _ATTRIBUTE, Mark(penalty, bias))
    return module


def marks_on(module: Module) -> tuple[Mark, ...]:
    """The mark of the module itself, if it has one. Wrappers that look attributes up in what they wrap do not count."""
    mark = vars(module).get(_ATTRIBUTE)
    return (mark,) if isinstance(mark, Mark) else ()
