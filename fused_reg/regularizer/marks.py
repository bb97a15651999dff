"""`regularized`: a layer says at its definition which penalty its parameters carry."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import Module
from typing_extensions import Unpack

from fused_reg._terms import ANY_TERM, SHAPES, MoreTerms, check_shape, group_text, takes_terms
from fused_reg.regularizer.names import Place, dims, is_bias, walk
from fused_reg.regularizer.penalties import GivenZeros, Penalty, as_penalty, checked_keys
from fused_reg.regularizer.strengths import Given, ZeroShare

M = TypeVar("M", bound=Module)

# A plain attribute: deepcopy, pickle, torch.compile and fully_shard keep it, and state_dict does not see it.
_ATTRIBUTE = "_fused_reg_mark"

#: How many marks have been set, the number of the last one.
count = 0


def see(number: int) -> None:
    """That a process has had so many, from which something was unpickled: what is set from now on is later."""
    global count
    count = max(count, number)


class Mark:
    """What a module says about the parameters in it. These have a note of it, so that it is found again where a
    conversion puts them into another module. (No weak reference: torch cannot swap a tensor that has one.)"""

    def __init__(self, module: Module, penalty: Penalty, bias: Penalty) -> None:
        self.number = count
        self.penalty = penalty  # of the weights
        self.bias = bias
        self.is_replaced = False
        self._module: weakref.ref[Module] = weakref.ref(module)

    def note_on(self, params: Iterable[Tensor]) -> None:
        for param in params:
            vars(param)[_ATTRIBUTE] = _Note(self)

    def __getstate__(self) -> dict[str, Any]:
        module = self._module()
        noted = [p for p in module.parameters() if _noted_on(p) is self] if module is not None else []
        return {**vars(self), "_module": module, "noted": noted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies of the module's parameters have the note, too."""
        see(state["number"])
        self.note_on(state.pop("noted"))
        module = state.pop("_module")
        vars(self).update(state, _module=weakref.ref(module) if module is not None else lambda: None)

    @property
    def has_both(self) -> bool:
        """Whether weights and biases have strengths of their own."""
        return self.penalty is not self.bias and not self.penalty.is_empty and not self.bias.is_empty

    def penalty_of(self, name: str) -> Penalty:
        """That of the parameter at the place of this name."""
        return self.bias if is_bias(name) else self.penalty

    def speaks_about(self, place: Place, is_of_the_module: bool) -> bool:
        is_meant = is_bias(place.name) or is_of_the_module or dims(place.param) >= 2
        return is_meant and not self.penalty_of(place.name).is_empty


class _Note:
    """A mark, as an attribute of a parameter that is pickled as nothing: a file of tensors stays one."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which `torch.load(weights_only=True)` takes


class _Name(str):
    """The name of a module's class, which is shown with the mark by ``print(module)``, and compares as it is."""

    mark: str

    def __call__(self) -> _Name:
        return self

    def __add__(self, other: str) -> str:
        return f"{self}[{self.mark}]{other}"


@takes_terms
def regularized(
    module: M,
    l1: Given = None,
    l2: Given = None,
    l2_norm: Given = None,
    *,
    zeros: ZeroShare | None = None,
    bias: bool | Mapping[str, Any] = False,
    **terms: Unpack[MoreTerms[Given]],
) -> M:
    r"""Marks a module: its weights carry this penalty, whichever :class:`Regularizer` is built from a net that has it.

    .. math:: {value}

    for each of its weights, as ``kernel_regularizer`` does in Keras. The mark alone changes nothing in training;
    ``Regularizer(net)`` finds it. The mark is an attribute of the module, which ``print`` shows: copies, pickles,
    ``torch.compile`` and ``fully_shard`` keep it, and the ``state_dict`` is as before. Its parameters keep it where a
    conversion puts them into another module (``convert_sync_batchnorm``, ``torch.fx``).

    Weights are what ``weights_only`` of a :class:`Regularizer` means, parameters of two dimensions or more whose names
    do not say bias; and of the very module that is marked all but the biases: the weight of a normalization layer
    counts where that layer is marked, and not where it is inside. (The arguments of a :class:`Regularizer` itself are
    for all parameters, as ``weight_decay`` is.)

    ``group`` may also be ``"output"`` or ``"input"``, as of a :class:`Regularizer`.

    Args:
        module: any module; its submodules' weights are meant as well. A mark inside of it is stronger: the innermost
            that speaks about a parameter wins. Marking a module again replaces its mark.
        l1: the strength of the sum of absolute values: a finite float >= 0, a 0-dim tensor, or a schedule (a function
            of the number of steps taken).
        l2: the strength of the sum of squares, likewise. ``l2 * sum(w ** 2)``, as in Keras.
        l2_norm: the strength of the sum of norms, likewise.
        terms: {text}
        zeros: a share of zeros as the aim of proximal steps, as of a :class:`Regularizer`: the weights in this module
            reach it together, and a copy of the module by itself.
        bias: what the biases carry: True, the same as the weights; a dictionary, ``dict(l2=1e-3)``, strengths of their
            own, with the names of the arguments above as keys; False, nothing.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` is no module, a strength no number, or ``bias`` neither bool nor dictionary.
        ValueError: no strength is given, or one is negative, infinite or NaN; an unknown group, or one without
            ``l2_norm``; an unknown key of ``bias``.

    Example:
        >>> import torch
        >>> from fused_reg import Regularizer, regularized
        >>> layer = regularized(torch.nn.Linear(2, 2), l1=0.5)
        >>> net = torch.nn.Sequential(layer, torch.nn.Linear(2, 1))
        >>> _ = torch.nn.init.constant_(net[0].weight, -3.0)
        >>> Regularizer(net)()  # 0.5 * 4 * 3
        tensor(6., grad_fn=<...>)
        >>> layer
        Linear[l1=0.5](in_features=2, out_features=2, bias=True)
        >>> regularized(torch.nn.Linear(2, 2), l1=0.5, bias=dict(l2=0.1))
        Linear[l1=0.5, bias: l2=0.1](in_features=2, out_features=2, bias=True)

    Source: the ``kernel_regularizer`` and ``bias_regularizer`` of Keras layers.
    """
    global count
    if not isinstance(module, Module):
        raise TypeError(f"regularized: module must be a torch.nn.Module, got {type(module).__name__}")
    penalty = as_penalty("regularized", l1=l1, l2=l2, l2_norm=l2_norm, zeros=zeros, **terms)
    of_biases = _as_bias(bias, penalty)
    if penalty.is_empty and of_biases.is_empty:
        raise ValueError(f"regularized: {ANY_TERM} must give a strength, got none")
    holder: Module = getattr(module, "_orig_mod", module)  # what torch.compile wraps holds the attributes
    count += 1
    mark = Mark(holder, penalty, of_biases)
    for old in marks_on(holder):
        old.is_replaced = True
    setattr(holder, _ATTRIBUTE, mark)
    mark.note_on(place.param for place in walk(holder) if next(_speaking(place), None) is mark)
    if type(holder)._get_name is Module._get_name:
        name = _Name(type(holder).__name__)
        own = [] if of_biases.is_empty else ["bias"] if bias is True else [f"bias: {', '.join(_described(of_biases))}"]
        name.mark = ", ".join([*_described(penalty), *own])
        vars(holder)["_get_name"] = name
    return module


def _as_bias(given: Any, penalty: Penalty) -> Penalty:
    """The penalty of biases, beside that of the weights; and both checked."""
    _check_shapes("regularized: ", penalty)
    if isinstance(given, bool):
        return penalty if given else Penalty(dict.fromkeys(penalty.given))
    if not isinstance(given, Mapping):
        raise TypeError(f"regularized: bias must be True, False or dict(l1=...), got {given!r}")
    found = as_penalty("regularized", "bias: ", **checked_keys("regularized: bias", given))
    if found.is_empty:
        raise ValueError(f"regularized: bias must give {ANY_TERM}, got {dict(given)!r}")
    _check_shapes("regularized: bias: ", found)
    return found


def _check_shapes(where: str, penalty: Penalty) -> None:
    for name in SHAPES:
        given = penalty.group if name == "group" else penalty.given[name]
        check_shape(where, name, given, penalty.given)


def _described(penalty: Penalty) -> list[str]:
    given = {kind: x.given if isinstance(x, GivenZeros) else x for kind, x in penalty.given.items() if x is not None}
    words = [
        f"{k}={s:g}" if isinstance(s, float) else f'{k}="{s}"' if isinstance(s, str) else f"{k}: {type(s).__name__}"
        for k, s in given.items()
    ]
    return words if penalty.group == "tensor" else [*words, group_text(penalty.group)]


def marks_on(module: Module) -> tuple[Mark, ...]:
    """The mark of the module itself, if it has one. Wrappers that look attributes up in what they wrap do not count."""
    mark = vars(module).get(_ATTRIBUTE)
    return (mark,) if isinstance(mark, Mark) else ()


def marks_of(places: Sequence[Place], known: Mapping[str, Mark], new: Collection[Mark]) -> dict[str, Mark]:
    """By the places of a parameter the innermost marks that speak about it; where the module that had its mark is gone,
    that mark, unless a new one speaks. ``known`` are those of these names before."""
    param, names = places[0].param, [place.name for place in places]
    lost = _noted_on(param)
    if lost is None and all(next(_speaking(place), None) not in new for place in places):
        lost = next((known[name] for name in names if name in known), None)
    around = (m for place in places for module, _ in place.around for m in marks_on(module))
    if lost is not None and not lost.is_replaced and lost not in around:
        return {names[0]: lost}
    found = {place.name: next(_speaking(place), None) for place in places}
    return {name: mark for name, mark in found.items() if mark is not None}


def _noted_on(param: Tensor) -> Mark | None:
    note = vars(param).get(_ATTRIBUTE)
    return note.mark if isinstance(note, _Note) else None


def _speaking(place: Place) -> Iterator[Mark]:
    return (m for module, own in place.around for m in marks_on(module) if m.speaks_about(place, own))
