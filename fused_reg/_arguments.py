"""Checks what users pass, and words what is wrong with it.

The path of a correct call is short: dtypes and memory are checked by the operators (``csrc/checks.h``), and only a list
of which a survey in C++ finds something unusual is looked at here, one parameter after the other.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fused_reg import _devices
from fused_reg._iterators import read
from fused_reg._terms import (
    ABSENT,
    APART,
    BOUNDS,
    CONSTRAINTS,
    DEFAULTS,
    NUMBERS,
    OF_GROUPS,
    PLACES,
    SHAPES,
    STEP,
    TERM_OF,
    Column,
    Strengths,
    check_group,
    check_runs,
    check_shape,
    group_code,
)

#: One strength for all parameters (a finite float >= 0, or a 0-dim tensor), or one per parameter.
Strength: TypeAlias = "float | Tensor | Sequence[float | Tensor]"

FORWARD_MODE = (
    "forward-mode differentiation is not supported; use backward, torch.func.grad or jacrev (twice for a Hessian)"
)
_PARAMETER_CONTAINERS = (torch.nn.ParameterList, torch.nn.ParameterDict)

#: Of tensors that are no subclass: neither what a compiler traces with nor DTensors.
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))

SUM_OF_SQUARES = Strengths.of([(), (1.0,)])


def as_list(function: str, params: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """The parameters, read once. What they are is checked later, where their way is chosen and by the operators."""
    if type(params) is list:  # first: short calls feel the rest
        tensors = params.copy()
    elif isinstance(params, Tensor):
        tensors = [params]
    elif isinstance(params, torch.nn.Module) and not isinstance(params, _PARAMETER_CONTAINERS):
        raise TypeError(
            f"{function}: params must be tensors, got the module {type(params).__name__}; pass its `.parameters()`"
        )
    elif isinstance(params, Iterable) or hasattr(params, "__getitem__"):
        tensors = read(function, params)
    else:
        raise TypeError(f"{function}: params must be a tensor or an iterable of tensors, got {_described(params)}")
    for i, p in enumerate(tensors if forward_ad._current_level >= 0 else ()):
        _check_no_tangent(f"{function}: params[{i}]", p)
    return tensors


def _check_no_tangent(name: str, tensor: Any) -> None:
    if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(f"{name} must not have a tangent: {FORWARD_MODE}")


def as_strengths(
    function: str,
    params: Sequence[Tensor],
    l1: Strength | None,
    l2: Strength | None,
    terms: Mapping[str, Any],
    step: Column | None = None,
    may_constrain: bool = False,
) -> Strengths:
    """The strengths, checked, for these parameters; ``step``: of a proximal operator, checked before;
    ``may_constrain``: it is for one, whose step comes later."""
    may_constrain = may_constrain or step is not None
    step = () if step is None else step
    if not terms:  # first, for short calls
        if l1 is None and l2 is None:
            return SUM_OF_SQUARES.with_step(step)
        if not is_compiling() and type(l1) in _PLAIN and type(l2) in _PLAIN and type(step) is tuple and not step:
            return _constants(function, l1, l2)
        return Strengths.of((as_column(function, "l1", l1, params), as_column(function, "l2", l2, params), (), step))
    columns: list[Column] = [()] * len(NUMBERS)
    is_given = l1 is not None or l2 is not None
    for name, strength in terms.items():
        if name == "group":
            check_group(f"{function}: ", strength)
        if name in SHAPES:
            check_shape(f"{function}: ", name, strength, terms)
        elif name not in PLACES:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")  # as Python says it
        elif strength is not None:
            if name in CONSTRAINTS and not may_constrain:
                raise ValueError(f"{function}: {no_value(name)}")
            columns[PLACES[name]] = as_column(function, name, strength, params)
            is_given = True
    if not is_given:
        return SUM_OF_SQUARES.with_step(step)
    if l1 is not None:
        columns[0] = as_column(function, "l1", l1, params)
    if l2 is not None:
        columns[1] = as_column(function, "l2", l2, params)
    columns[STEP] = step
    for kind, place, term in _SHAPES:
        given, is_there = terms.get(kind), _is_there(columns[term])
        if is_there or given is not None:
            column = as_column(function, kind, DEFAULTS[kind] if given is None else given, params)
            check_constant(f"{function}: {kind}", column)
            columns[place] = column if is_there else ()
    if may_constrain:
        for kind in CONSTRAINTS:
            check_constant(f"{function}: {kind}", columns[PLACES[kind]])
        if _is_there(columns[_LOWER]) or _is_there(columns[_UPPER]):  # both of them, or none
            for place, kind in ((_LOWER, "lower"), (_UPPER, "upper")):
                columns[place] = columns[place] if _is_there(columns[place]) else (DEFAULTS[kind],)
    has_norms = any(_is_there(columns[PLACES[term]]) for term in OF_GROUPS)
    return Strengths.of(columns, _group_of(function, params, terms) if has_norms else 0)


def _group_of(function: str, params: Sequence[Tensor], terms: Mapping[str, Any]) -> int:
    group = terms.get("group", "tensor")
    for i, p in enumerate(params if isinstance(group, tuple) else ()):
        if (type(p) in PLAIN_TYPES and p.layout is torch.strided) or is_dtensor(p):  # the operators look at others
            check_runs(f"{function}: params[{i}]", p, group)
    return group_code(group)


_PLAIN = (float, type(None))
_LOWER, _UPPER = PLACES["lower"], PLACES["upper"]


def no_value(constraint: str) -> str:
    return (
        f"{constraint} must be for proximal steps (prox_, attach with mode='prox'), because a constraint has no value "
        "and no gradient"
    )


@lru_cache(maxsize=256)
def _constants(function: str, l1: float | None, l2: float | None) -> Strengths:
    """Kept from call to call: to make them takes as long as the pass over a few short tensors."""
    return Strengths.of((as_column(function, "l1", l1, ()), as_column(function, "l2", l2, ())))


def _is_there(column: Column) -> bool:
    """A strength that is 0 for all is none; in a list or tensor it may be the next call's."""
    return type(column) is not tuple or column != ()


#: The numbers that are no strengths, their places, and those of their terms.
_SHAPES = [(kind, PLACES[kind], PLACES[TERM_OF[kind]]) for kind in TERM_OF if kind in SHAPES]


def check_constant(name: str, number: object) -> None:
    if isinstance(number, Tensor) and number.requires_grad:
        raise ValueError(f"{name} must be a constant, got a tensor that requires grad; use `.detach()`")


def as_step(function: str, step: Strength, params: Sequence[Tensor]) -> Column:
    """The step of a proximal operator, checked: like a strength, one or one per parameter."""
    if step is None:
        raise TypeError(
            f"{function}: step must be a float, a 0-dim tensor or a sequence with one per parameter, got None"
        )
    return as_column(function, "step", step, params)


def as_scale(function: str, scale: float | Tensor, params: Sequence[Tensor]) -> tuple[float, Tensor | None]:
    """A factor of gradients, checked: a finite float, or a 0-dim tensor."""
    if isinstance(scale, Tensor):
        _check_plain(f"{function}: scale", scale)
        if scale.ndim != 0 or not scale.is_floating_point():
            raise ValueError(
                f"{function}: scale must be a float or a 0-dim floating point tensor, got {scale.dtype} of shape "
                f"{tuple(scale.shape)}"
            )
        return 1.0, scale
    if not is_number(scale):
        raise TypeError(f"{function}: scale must be a float or a 0-dim tensor, got {type(scale).__name__}")
    factor = _as_float(scale)
    if not -math.inf < factor < math.inf:
        raise ValueError(f"{function}: scale must be finite, got {factor}")
    return (1.0, _in_graph(factor, params)) if is_compiling() else (factor, None)


def check_numbers(params: list[Tensor], numbers: Mapping[str, Tensor | None]) -> None:
    """Raises unless every number is on the CPU, finite and >= 0, or where one of the parameters is."""
    devices = {p.device for p in params}
    check_values(numbers)
    for name, number in numbers.items():
        if number is not None and not _devices.is_at_hand(number) and number.device not in devices:
            raise ValueError(
                f"{name} must be on the CPU or on the parameters' device ({', '.join(sorted(map(str, devices)))}), "
                f"got {number.device}"
            )


def check_values(numbers: Mapping[str, Tensor | None]) -> None:
    """What the kernels check of the numbers that they read on the CPU, where they read some late or none."""
    for name, number in numbers.items():
        if number is None or name == "scale" or not is_known(number):
            continue
        kind = name.rpartition(" ")[2]  # behind the name of a function
        for i, value in enumerate(number.detach().reshape(-1).tolist()):
            if not is_allowed(kind, value):
                place = f"[{i}]" if number.ndim > 0 else ""
                raise ValueError(f"{name}{place} must be {_rule(kind)}, got {value}")


def is_allowed(kind: str, value: float) -> bool:
    """Whether a number of some kind may be this."""
    if kind in CONSTRAINTS:
        return not math.isnan(value) if kind not in BOUNDS else value > BOUNDS[kind]
    bound = BOUNDS.get(kind)
    return (value >= 0 if bound is None else bound < value) and value < math.inf


def _rule(kind: str) -> str:
    if kind in CONSTRAINTS:
        return "a number, not NaN" if kind not in BOUNDS else f"> {BOUNDS[kind]:g}"
    return f"finite and > {BOUNDS[kind]:g}" if kind in BOUNDS else "finite and >= 0"


_APART = [(PLACES[one], PLACES[other]) for one, other in APART]


def check_closed_form(where: str, strengths: Strengths, count: int) -> None:
    """Raises where a parameter has terms that together have no proximal operator in closed form, or may have: what the
    host does not know counts."""
    counts = strengths.counts
    for one, other in _APART:
        if counts[one] and counts[other]:
            columns = strengths.columns()
            both = zip(
                *(_on_host(columns[place], count, ABSENT[NUMBERS[place]]) for place in (one, other)), strict=True
            )
            if (i := next((i for i, are_there in enumerate(both) if all(are_there)), None)) is not None:
                raise ValueError(
                    f"{where}{NUMBERS[one]} and {NUMBERS[other]} of one parameter have no proximal operator in closed "
                    f"form, got both for params[{i}]"
                )

    if counts[_LOWER]:
        columns = strengths.columns()
        bounds = zip(*(_numbers(columns[place], count, math.nan) for place in (_LOWER, _UPPER)), strict=True)
        for i, (lower, upper) in enumerate(bounds):
            if lower >= upper:
                raise ValueError(f"{where}lower must be less than upper, got {lower} and {upper} for params[{i}]")


def _on_host(column: Column, count: int, absent: float) -> list[bool]:
    """Of each parameter whether a number is there, also where the host does not know it."""
    return [x != absent for x in _numbers(column, count, math.nan)]


def _numbers(column: Column, count: int, unknown: float) -> list[float]:
    """Those of each parameter."""
    if isinstance(column, Tensor):
        column = tuple(column.detach().reshape(-1).tolist()) if is_known(column) else (unknown,)
    return [*column] * (count if len(column) == 1 else 1)


def is_known(number: Tensor) -> bool:
    """Whether a look at its value waits for nothing and finds one."""
    return _devices.is_at_hand(number) and not is_compiling() and are_run((number,))


def are_run(tensors: Iterable[Tensor]) -> bool:
    """Whether these have values: not so what a compiler, or ``torch.func``, traces with."""
    return (
        PLAIN_TYPES.issuperset(map(type, tensors))
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def as_column(function: str, name: str, strength: Strength | None, params: Sequence[Tensor]) -> Column:
    if strength is None:
        return ()
    # First, because short calls feel the rest.
    if type(strength) is float and 0 < strength < math.inf and name not in _OWN_RULE:
        return _in_graph(strength, params) if is_compiling() else (strength,)
    if isinstance(strength, Tensor):
        return _tensor_strength(function, name, strength, len(params))
    if is_number(strength):
        value = as_number(f"{function}: {name}", strength, name)
        if value == ABSENT.get(name, 0):
            return ()
        return _in_graph(value, params) if is_compiling() else (value,)
    if not _is_sequence(strength):
        hint = "; give its value, or the schedule to a Regularizer" if callable(strength) else ""
        raise TypeError(
            f"{function}: {name} must be a float, a 0-dim tensor or a sequence with one per parameter, "
            f"got {type(strength).__name__}{hint}"
        )
    items: list[Any] = list(strength)
    if len(items) != len(params):
        raise ValueError(f"{function}: {name} must have one strength per parameter ({len(params)}), got {len(items)}")
    checked = [_item_strength(function, f"{name}[{i}]", item, name) for i, item in enumerate(items)]
    tensors = [item for item in checked if isinstance(item, Tensor)]
    if not tensors:
        return tuple(item for item in checked if not isinstance(item, Tensor))
    device = _devices.joint(tensors)
    return torch.stack([_as_float64(item, device) for item in checked])


_OWN_RULE = {*BOUNDS, *CONSTRAINTS}


def _in_graph(number: float, params: Sequence[Tensor]) -> Tensor:
    """A number as a tensor: in compiled code a float is a constant, and every other one would compile it again."""
    device = params[0].device if params and isinstance(params[0], Tensor) else _devices.HOST
    one = torch.ones((), dtype=torch.float64, device=device)
    return one * number  # the compiler makes an input of a float only where it meets a tensor in arithmetic


def _as_float64(item: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(item, Tensor):
        return item.to(device, torch.float64)
    return torch.full((), item, dtype=torch.float64, device=device)  # no copy that a GPU would wait for


def _item_strength(function: str, name: str, item: Any, kind: str) -> float | Tensor:
    if isinstance(item, Tensor):
        if not item.is_nested and item.ndim != 0:
            hint = "; use `.reshape(())`" if item.numel() == 1 else ""
            raise ValueError(f"{function}: {name} must be 0-dim, got shape {tuple(item.shape)}{hint}")
        return _tensor_strength(function, name, item, 1)
    if is_number(item):
        return as_number(f"{function}: {name}", item, kind)
    raise TypeError(f"{function}: {name} must be a float or a 0-dim tensor, got {type(item).__name__}")


def _tensor_strength(function: str, name: str, strength: Tensor, count: int) -> Tensor:
    _check_plain(f"{function}: {name}", strength)
    # Its value is not looked at: on a GPU a look would wait for the device, and on the CPU the kernels check it.
    if strength.layout is not torch.strided or strength.is_nested:
        kind = "a nested tensor" if strength.is_nested else strength.layout
        raise TypeError(f"{function}: {name} must be dense (torch.strided), got {kind}")
    if forward_ad._current_level >= 0:
        _check_no_tangent(f"{function}: {name}", strength)
    if not strength.is_floating_point():
        raise TypeError(f"{function}: {name} must be floating point, got {strength.dtype}")
    if strength.ndim != 0 and strength.shape != (count,):
        hint = "; use `.reshape(())`" if strength.numel() == 1 else ""
        raise ValueError(
            f"{function}: {name} must be 0-dim or have one strength per parameter ({count}), "
            f"got shape {tuple(strength.shape)}{hint}"
        )
    return strength


def value_dtype(params: Iterable[Tensor]) -> torch.dtype:
    """That of the penalty of a list."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32


def is_dtensor(p: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def _check_plain(name: str, tensor: Tensor) -> None:
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} must be a plain tensor, the same on every process, got a DTensor; use `.full_tensor()`"
        )


def as_number(name: str, strength: Any, kind: str = "") -> float:
    """A number of some kind, as a strength, checked; ``name`` begins the message of an error."""
    value = _as_float(strength)
    if not is_allowed(kind, value):
        raise ValueError(f"{name} must be {_rule(kind)}, got {strength}")
    return value


def _as_float(x: Any) -> float:
    try:
        return float(x)
    except OverflowError:
        return math.inf


def is_number(x: Any) -> TypeGuard[float]:
    return type(x) is float or (isinstance(x, Real) and not isinstance(x, bool))


def _is_sequence(x: Any) -> TypeGuard[Sequence[Any]]:
    if isinstance(x, Sequence):
        return not isinstance(x, str | bytes | bytearray)
    return getattr(x, "ndim", 0) == 1 and hasattr(x, "tolist")  # a NumPy array


def check_params(where: str, params: Sequence[Any]) -> None:
    """Raises where a parameter is nothing that an operator takes, but for its dtype."""
    for i, p in enumerate(params):
        name = f"{where}params[{i}]"
        if isinstance(p, UninitializedParameter | UninitializedBuffer):
            raise TypeError(
                f"{name} must be initialized, got {type(p).__name__}; run the module once so that it knows its shapes"
            )
        if not isinstance(p, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_described(p)}")
        if p.is_nested:
            raise TypeError(f"{name} must be one dense tensor, got a nested tensor")
        if p.is_quantized:  # it never reaches the operators' own checks
            raise TypeError(f"{name} must be floating point, got {p.dtype}")
        if p.layout is not torch.strided:
            raise TypeError(f"{name} must be dense (torch.strided), got {p.layout}")
        if type(p).__torch_dispatch__ is Tensor.__torch_dispatch__:  # else it may be on a device by name only
            check_device(name, p.device)


def check_device(name: str, device: torch.device) -> None:
    """Raises where a device has no kernels."""
    if refused := _devices.refused(name, device):
        raise refused


def relabelled(error: Exception, labels: Sequence[str]) -> Exception:
    """The error with ``params[label]`` for ``params[3]``, where these are the labels of a call's parameters."""
    text = str(error)
    for i, label in reversed([*enumerate(labels)]):  # a label is no earlier place
        text = text.replace(f"params[{i}]", f"params[{label}]")
    return type(error)(text)


def _described(p: object) -> str:
    if isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str):
        return "a (name, tensor) pair; drop the names, as `.parameters()` does"
    if isinstance(p, str):
        return "str; pass `.values()` of a dictionary"
    if isinstance(p, torch.nn.Module):
        return f"the module {type(p).__name__}; pass its `.parameters()`"
    if callable(p) and hasattr(p, "__name__"):
        return f"{type(p).__name__} {p.__name__}; call it: `{p.__name__}()`"
    return type(p).__name__
