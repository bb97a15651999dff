"""Reference weights and importances: what users pass, and what is said when it is wrong."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module
from torch.utils.weak import WeakIdKeyDictionary

from fused_reg import _devices
from fused_reg._arguments import are_run, is_dtensor, is_known
from fused_reg._terms import NUMBERS, PLACES, TERMS, Strengths

#: One tensor for each parameter, of its shape and dtype.
Tensors: TypeAlias = "Iterable[Tensor] | Tensor"

#: The importances whose values were looked at, and what these were a version of.
_looked_at: Any = WeakIdKeyDictionary()


def as_relative(
    function: str,
    params: Sequence[Tensor],
    strengths: Strengths,
    toward: Tensors | None,
    importance: Tensors | None,
) -> Strengths:
    """The strengths with these, checked."""
    if toward is None and importance is None:
        return strengths
    return relative(
        f"{function}: ",
        params,
        strengths,
        as_tensors(f"{function}: ", "toward", toward, len(params)),
        as_tensors(f"{function}: ", "importance", importance, len(params)),
    )


def relative(
    where: str, params: Sequence[Tensor], strengths: Strengths, toward: Sequence[Tensor], importance: Sequence[Tensor]
) -> Strengths:
    """The same of lists, which may be empty."""
    if importance and strengths.has_norms():
        if strengths.constraint() == "max_norm":
            raise ValueError(f"{where}importance must come without max_norm, which is of all elements of a group")
        raise ValueError(
            f"{where}importance must come without l2_norm, which has one strength for all elements of a group"
        )
    whole = [expanded(x, p) for p, x in zip(params, importance, strict=True)] if importance else []
    for name, given in (("toward", toward), ("importance", whole)):
        for i, (p, x) in enumerate(zip(params, given, strict=True) if given else ()):
            if isinstance(p, Tensor) and not p.is_nested:  # others are named where the list's way is chosen
                check_like(f"{where}{name}[{i}]", x, p, f"params[{i}]")
    for i, x in enumerate(importance):
        check_importance(f"{where}importance[{i}]", x)
    strengths = behind_checks(strengths, importance, [f"{where}importance[{i}]" for i, _ in enumerate(importance)])
    return strengths.relative([x.detach() for x in toward], [x.detach() for x in whole])


def as_tensors(where: str, name: str, given: Any, count: int) -> list[Tensor]:
    """What is given, read once: one for each of so many parameters; none where it is None."""
    if given is None:
        return []
    where = f"{where}{name}"
    if isinstance(given, Mapping | Module | str) or not isinstance(given, Tensor | Iterable):
        hint = "; a Regularizer takes names" if isinstance(given, Mapping) else ""
        raise TypeError(f"{where} must be tensors, one for each parameter, got {type(given).__name__}{hint}")
    tensors = [given] if isinstance(given, Tensor) else list(given)
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{where}[{i}] must be a tensor, got {type(x).__name__}")
    if len(tensors) != count:
        raise ValueError(f"{where} must have one tensor per parameter ({count}), got {len(tensors)}")
    return tensors


def expanded(x: Any, p: Tensor) -> Any:
    """An importance of rows, (rows, 1, ...), or of other slices, as one of every element: a view."""
    if not isinstance(x, Tensor) or not isinstance(p, Tensor) or p.is_nested or is_dtensor(x):
        return x
    fits = x.ndim == p.ndim and all(n in (1, m) for n, m in zip(x.shape, p.shape, strict=True))
    return x.expand(p.shape) if fits and x.shape != p.shape else x


def followed(x: Tensor, p: Tensor) -> Tensor:
    """A reference of a parameter that may have been converted since: a copy that is, unless there are no values."""
    if not _devices.has_data(p) or (x.dtype is p.dtype and x.device == p.device):
        return x
    if is_dtensor(x) or 0 not in x.stride():
        return x.to(p.device, p.dtype)
    rows = x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]  # one of each that are the same
    return rows.to(p.device, p.dtype).expand(x.shape)


def check_like(name: str, x: Any, p: Any, of: str) -> None:
    """Raises unless a tensor is as its parameter, whose elements it stands beside, and not this itself."""
    if is_dtensor(x) != is_dtensor(p) or (
        is_dtensor(x) and (x.placements != p.placements or x.device_mesh != p.device_mesh)
    ):
        got = f"a DTensor of {x.placements}" if is_dtensor(x) else "a plain tensor"
        like = f"a DTensor of {p.placements}" if is_dtensor(p) else "a plain tensor"
        raise ValueError(f"{name} must be {like}, as {of}, got {got}; use `distribute_tensor` or `.full_tensor()`")
    for what, own, wanted in (
        ("shape", tuple(x.shape), tuple(p.shape)),
        ("dtype", x.dtype, p.dtype),
        ("device", x.device, p.device),
        ("layout", x.layout, p.layout),
    ):
        if own != wanted:
            raise ValueError(f"{name} must have the {what} of {of} ({wanted}), got {own}")
    has_memory = not is_compiling() and x.layout is torch.strided and are_run((x, p))
    if x is p or (has_memory and 0 != x.data_ptr() == p.data_ptr()):
        raise ValueError(f"{name} must not be {of} itself, whose changes it would follow; use `.detach().clone()`")


def check_apart(written: Iterable[tuple[str, Tensor]], read: Iterable[tuple[str, Tensor]]) -> None:
    """Raises where a reference is in memory that steps write to, of tensors without gaps; the operators find out about
    others when they are to write."""
    spans: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, x in written:
        if (span := _span_of(x)) is not None:
            spans.setdefault(x.device, []).append((*span, name))
    for own in spans.values():
        own.sort()
    for name, x in read:
        if (span := _span_of(x)) is not None and (own := spans.get(x.device, [])):
            begin, end = span
            _, last, of = own[bisect_left(own, (end,)) - 1]
            if own[0][0] < end and last > begin:
                raise ValueError(
                    f"{name} must not share memory with {of}, whose changes it would follow; use `.detach().clone()`"
                )


def _span_of(x: Tensor) -> tuple[int, int] | None:
    """Where the bytes are of a tensor without gaps."""
    if not are_run((x,)) or x.layout is not torch.strided or x.numel() == 0 or x.data_ptr() == 0:
        return None
    dims = [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0]
    count = sum((size - 1) * stride for size, stride in dims) + 1
    has_gaps = count != math.prod(size for size, _ in dims)
    return None if has_gaps else (x.data_ptr(), x.data_ptr() + count * x.element_size())


def check_importance(name: str, x: Any) -> None:
    """Raises where an importance that the host has is negative, infinite or NaN. Each is looked at once, and again when
    it was written to."""
    local = x.to_local() if is_dtensor(x) else x
    if not is_known(local):
        return
    version = None if x.is_inference() else x._version
    if version is not None and _looked_at.get(x) == version:
        return
    is_good = (local >= 0) & (local < torch.inf)
    if not bool(is_good.all()):
        raise ValueError(f"{name} must be finite and >= 0, got {local[~is_good][0].item()}")
    _looked_at[x] = version


def behind_checks(strengths: Strengths, factors: Sequence[Tensor], names: Sequence[str]) -> Strengths:
    """The same; in compiled code, which has no values yet, behind an operator that looks at these factors."""
    if not is_compiling() or not factors or not _devices.is_at_hand(factors[0]):
        return strengths
    columns = dict(zip(NUMBERS, strengths.columns(), strict=True))
    kinds = [kind for kind in TERMS if strengths.counts[PLACES[kind]] != 0]
    kinds.sort(key=lambda kind: not isinstance(columns[kind], Tensor))
    if kinds:
        column = columns[kinds[0]]
        if not isinstance(column, Tensor):
            column = torch.tensor(column if len(column) > 1 else column[0], dtype=torch.float64)
        own: list[Any] = list(factors)
        one = torch.ops.fused_reg.one_if_valid([x.to_local() if is_dtensor(x) else x for x in own], names)
        strengths = strengths.having(**{kinds[0]: one * column})
    return strengths


def _one_if_valid(factors: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """1, by which a strength is multiplied, so that no compiler leaves it out."""
    for name, x in zip(names, factors, strict=True):
        check_importance(name, x)
    return torch.ones((), dtype=torch.float64, device=factors[0].device)


torch.library.define("fused_reg::one_if_valid", "(Tensor[] factors, str[] names) -> Tensor")
torch.library.impl("fused_reg::one_if_valid", "CompositeExplicitAutograd", _one_if_valid)


def of_places(given: Sequence[Tensor], places: Iterable[int]) -> list[Tensor]:
    """Those of the parameters at these places of a list."""
    return [given[i] for i in places] if given else []


def with_one_more(given: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """These, if there are any, for a list that ends with an empty tensor."""
    return [*given, torch.empty_like(like)] if given else []
