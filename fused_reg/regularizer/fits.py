"""What stands beside the parameters of a `Regularizer`, as it has to fit them at every use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from fused_reg._arguments import as_number, check_closed_form, is_known, relabelled
from fused_reg._fits import Fits
from fused_reg._partitioned import check_whole
from fused_reg._references import check_importance, check_like
from fused_reg._terms import APART, NUMBERS, OF_GROUPS, Column, Strengths, check_runs
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.groups import check_weights
from fused_reg.regularizer.strengths import Held, is_absent, known, number, tensor_of


def fits_of(entries: Sequence[Entry]) -> Fits:
    """References, weights of groups, and runs, which must fill a parameter."""
    has_runs = [isinstance(e.group, tuple) and e.has_norms() for e in entries]
    shaped = [
        e
        for e, is_run in zip(entries, has_runs, strict=True)
        if is_run or any(x is not None for x in (e.toward, e.importance, e.weights))
    ]
    factors = [(e, x) for e in entries for x in (e.importance, e.weights) if x is not None]
    return Fits(
        [(e.param, partial(_check_shape, e)) for e in shaped],
        [(e.param, x, partial(_check_factor, e, x)) for e, x in factors],
    )


def fits_of_strengths(entries: Sequence[Entry]) -> Fits:
    """Strengths of proximal steps in tensors, which the operators look at when they take them. Those that schedules
    fill are numbers that fit, but perhaps not beside one another."""
    held = [(e, kind, tensor_of(x)) for e in entries for kind, x in e.strengths.items() if _may_misfit(e, kind)]
    return Fits(values=[(e.param, x, partial(_check_strength, e, kind, x)) for e, kind, x in held if x is not None])


def check_beside(function: str, entry: Entry, strengths: Mapping[str, Held]) -> None:
    """Raises where strengths that it has, or is about to have, are none beside one another or beside its importance,
    as far as the host knows."""
    for kind in OF_GROUPS:
        if entry.importance is not None and not is_absent(kind, strengths[kind]):
            raise ValueError(
                f"{function}: {kind} of {entry.name!r} must come without importance, which has a strength for each "
                "element and not for a group"
            )
    lower, upper = (known(strengths[kind]) for kind in ("lower", "upper"))
    if lower is not None and upper is not None and lower >= upper:
        raise ValueError(f"{function}: lower of {entry.name!r} must be less than upper, got {lower} and {upper}")


def _may_misfit(entry: Entry, kind: str) -> bool:
    pairs = [pair for pair in (*APART, ("lower", "upper")) if kind in pair]
    has_both = any(all(not is_absent(k, entry.strengths[k]) for k in pair) for pair in pairs)
    return has_both or isinstance(entry.strengths[kind], Tensor)


def _check_shape(entry: Entry) -> None:
    check_whole("Regularizer", [entry.param], [entry.name])
    where = f"params[{entry.name!r}]"
    for kind, x in entry.references():
        if x is not None:
            check_like(f"Regularizer: {kind}[{entry.name!r}]", x, entry.param, where)
    if entry.has_norms():
        check_runs(f"Regularizer: {where}", entry.param, entry.group)
    if entry.weights is not None:
        _check_factor(entry, entry.weights)


def _check_factor(entry: Entry, x: Tensor) -> None:
    if x is entry.weights:
        check_weights(f"Regularizer: group_weights[{entry.name!r}]", x, entry)
    else:
        check_importance(f"Regularizer: importance[{entry.name!r}]", x)


def _check_strength(entry: Entry, kind: str, strength: Tensor) -> None:
    if is_known(strength):
        as_number(f"Regularizer: {kind} of {entry.name!r}", strength.detach().item(), kind)
    columns = [_column(entry.strengths[name]) if name in entry.strengths else () for name in NUMBERS]
    try:
        check_closed_form("Regularizer: ", Strengths.of(columns), 1)
    except ValueError as error:
        raise relabelled(error, [repr(entry.name)]) from error


def _column(strength: Held) -> Column:
    tensor = tensor_of(strength)
    return (number(strength),) if tensor is None else tensor
