"""What the penalty of a group of an optimizer is of: its parameters, with their reference weights and importances."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from fused_reg._fits import Fits
from fused_reg._references import Tensors, as_tensors, check_apart, check_importance, check_like, followed, relative
from fused_reg._terms import Strengths
from fused_reg._warnings import warn

#: ``"start"``: the weights as they are when the group is added.
Toward: TypeAlias = "Tensors | Literal['start']"

REFERENCES = ("toward", "importance")


class Penalized(NamedTuple):
    """A parameter, and what it has beside the strengths of its group. All of a group have the same of it."""

    param: Tensor
    toward: Tensor | None
    importance: Tensor | None


def penalized(group: Mapping[str, Any]) -> list[Penalized]:
    """Those of a group."""
    params = group["params"]
    nothing = (None,) * len(params)
    given = (group[name] if group[name] is not None else nothing for name in REFERENCES)
    return [Penalized(*each) for each in zip(params, *given, strict=True)]


def params_of(own: Iterable[Penalized]) -> list[Tensor]:
    return [x.param for x in own]


def references_of(own: Sequence[Penalized]) -> dict[str, Any]:
    """As arguments of a function."""
    return {name: [getattr(x, name) for x in own] for name in REFERENCES if own and getattr(own[0], name) is not None}


def fits_of(where: str, groups: Iterable[Mapping[str, Any]], written: Iterable[Mapping[str, Any]]) -> Fits:
    """Of the references of an optimizer's groups, as `read_references` has left them; ``written``: all its groups.
    Raises where a reference is in the memory of a parameter."""
    given = [
        (name, i, p, x)
        for group in groups
        for name in REFERENCES
        for i, (p, x) in enumerate(zip(group["params"], group[name] or (), strict=False))
    ]
    params = ((f"params[{i}]", p) for group in written for i, p in enumerate(group["params"]) if p.requires_grad)
    check_apart(params, [(f"{where}{name}[{i}]", x) for name, i, _, x in given])
    return Fits(
        [(p, partial(check_like, f"{where}{name}[{i}]", x, p, f"params[{i}]")) for name, i, p, x in given],
        [(p, x, partial(check_importance, f"{where}{n}[{i}]", x)) for n, i, p, x in given if n == "importance"],
    )


def in_one_group(where: str, params: Any, given: Mapping[str, Any]) -> Any:
    """The parameters that a constructor gets, as a group that has these lists."""
    lists = {name: x for name, x in given.items() if x is not None and not isinstance(x, str)}
    if not lists or isinstance(params, Tensor) or not (params := list(params)):
        return params
    if isinstance(params[0], dict):
        raise ValueError(f"{where}{next(iter(lists))} must be an option of each group, where params are groups")
    return [{"params": params, **lists}]


def read_references(where: str, group: dict[str, Any], is_loaded: bool = False) -> None:
    """Keeps those of a group as tuples, whose content does not change. What is kept, or of a state, follows parameters
    that are converted. Raises where one is wrong."""
    params = group["params"]
    if isinstance(toward := group["toward"], str):
        if toward != "start":
            raise ValueError(f'{where}toward must be tensors, one for each parameter, or "start", got {toward!r}')
        group["toward"] = tuple(p.detach().clone() for p in params)
    lists = [as_tensors(where, name, group[name], len(params)) for name in REFERENCES]
    are_kept = [is_loaded or type(group[name]) is tuple for name in REFERENCES]
    now = [
        [followed(x, p) for x, p in zip(xs, params, strict=True)] if xs and is_kept else xs
        for xs, is_kept in zip(lists, are_kept, strict=True)
    ]
    own = relative(where, params, Strengths(), *now).references() if any(now) else ((), ())
    is_converted = not is_loaded and any(x is not y for x, y in zip(chain(*now), chain(*lists), strict=True))
    for name, xs, is_kept in zip(REFERENCES, own, are_kept, strict=True):
        if is_loaded or is_converted or not is_kept:
            group[name] = xs or None
    if is_converted:
        warn(f"{where}toward and importance are converted copies from now on, because their parameters were converted")
