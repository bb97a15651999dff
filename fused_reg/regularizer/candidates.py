"""The parameters that a `Regularizer` may choose from, their names, and the marks that speak about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import UninitializedParameter

from fused_reg._terms import OF_LAYERS, Group, LayerGroup, group_text
from fused_reg.regularizer.keys import Named
from fused_reg.regularizer.layers import Slices, slices_of
from fused_reg.regularizer.marks import Mark, marks_of, marks_on
from fused_reg.regularizer.names import Place, dims, is_bias, walk

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Candidate(Named):
    """A parameter, all of its names and types (a tied one has several, a wrapped or converted one those of before), and
    the innermost marks that speak about it, by its places."""

    param: Tensor
    names: list[str]
    types: dict[str, tuple[type, ...]] = field(default_factory=dict)
    marks: dict[str, Mark] = field(default_factory=dict)
    can_train: bool = True
    is_lent: bool = False  # in the place of a parameter, as within a functional call
    slices: dict[str, Slices | None] = field(default_factory=dict)  # by its places; None: of an unknown layer

    @property
    def is_weight(self) -> bool:
        """Whether ``weights_only`` leaves it."""
        return dims(self.param) >= 2 and not self.is_bias

    @property
    def is_bias(self) -> bool:
        return all(map(is_bias, self.names))

    def knows(self, group: LayerGroup) -> bool:
        """Whether it has one kind of slices that this names."""
        return group not in OF_LAYERS or (len(found := self._named(group)) == 1 and None not in found)

    def runs_of(self, group: LayerGroup) -> int:
        """In how many runs of its rows the slices are that this names."""
        return next((found[1] for found in self._named(group) if found is not None), 1) if self.knows(group) else 1

    def group_of(self, function: str, group: LayerGroup) -> Group:
        """The slices that this names."""
        if self.knows(group):
            return next((found[0] for found in self._named(group) if found is not None), cast(Group, group))
        where, found = f"{function}: {group_text(group)} of {self.names[0]!r}", self._named(group)
        hint = 'give it group="row", "column" or "tensor" by a rule'
        if not self.slices:
            raise ValueError(f"{where} needs the layer, got a list of tensors; pass the model")
        if len(found) > 1:
            raise ValueError(f"{where} must be of one kind, but its layers differ, as it is tied; {hint}")
        layer = self.types[next(iter(self.slices))][0].__name__
        raise ValueError(f"{where} must be slices of a layer that is known, got {layer}; {hint}")

    def _named(self, group: LayerGroup) -> list[tuple[Group, int] | None]:
        """What this is in each of its layers, each once: slices, and of how many runs of rows."""
        if group not in OF_LAYERS:
            return []
        found: list[tuple[Group, int] | None] = []
        for own in self.slices.values():
            slices = None if own is None else own.output if group == "output" else own.input
            found.append(None if slices is None else (slices, own.runs if own and slices == "column" else 1))
        return list(dict.fromkeys(found))

    def has_later_mark(self, number: int, kind: str, said: Any) -> bool:
        """Whether a strength is what a mark says that was set after so many."""
        later = ((name, mark) for name, mark in self.marks.items() if mark.number > number)
        return said is not None and any(mark.penalty_of(name).given[kind] is said for name, mark in later)

    def remember(self, name: str, types: tuple[type, ...]) -> None:
        """A name and the types around it there, of before."""
        if name not in self.names:
            self.names.append(name)
        if types:
            self.types[name] = tuple(dict.fromkeys((*self.types.get(name, ()), *types)))

    def check(self) -> None:
        """Raises unless it is a parameter that can be regularized."""
        param, where = self.param, f"Regularizer: params[{self.names[0]!r}]"
        out = f" leave it out with exclude={self.names[0]!r}"
        if isinstance(param, UninitializedParameter):
            raise TypeError(
                f"{where} must be initialized, got {type(param).__name__}; run the module once so that it knows its "
                f"shapes, or{out}"
            )
        if not isinstance(param, Parameter) and not param.requires_grad and not self.is_lent:
            raise ValueError(f"{where} must be a parameter, got a tensor without grad; pass it itself, not its `.data`")
        if not param.is_leaf:
            raise ValueError(f"{where} must be a leaf, as a parameter is, got the result of {param.grad_fn}")
        if param.requires_grad and (param.dtype not in _DTYPES or param.is_nested):
            got = "a nested tensor" if param.is_nested else param.dtype
            raise TypeError(f"{where} must be one tensor of float32, float64, bfloat16 or float16, got {got};{out}")
        if param.requires_grad and param.layout is not torch.strided:
            raise TypeError(f"{where} must be dense (torch.strided), got {param.layout};{out}")


def candidates_of(params: Any, known: Mapping[str, Mark], content: Mapping[tuple[int, str], Any]) -> list[Candidate]:
    """The parameters, read once, each once, with their names. Of a module: ``known`` are the marks by the names of
    before, ``content`` what is in its places, where others may be shown for a while."""
    found: dict[int, Candidate] = {}
    if isinstance(params, Module):
        places: dict[int, list[Place]] = {}
        for place in walk(params):
            param = content[id(place.module), place.key]
            places.setdefault(id(param), []).append(place._replace(param=param))
        present = set(marked_modules(params))
        new = present - set(known.values())
        known = {name: mark for name, mark in known.items() if mark not in present}  # of modules that are gone
        # Without the parts of wrappers, unless two parameters have one name then.
        names_of = {(place.name, i) for i, own in places.items() for place in own}
        is_short = len({name for name, _ in names_of}) == len(names_of)
        for i, own in places.items():
            param = own[0].param
            names = [place.name if is_short else place.full_name for place in own]
            types = {n: tuple(type(m) for m, _ in place.around) for n, place in zip(names, own, strict=True)}
            slices = {
                n: slices_of([m for m, is_its in place.around if is_its], dims(param))
                for n, place in zip(names, own, strict=True)
            }
            names += [name for place in own for name in (place.full_name, *place.plain_names)]
            # Not so: the frozen integers of a quantized layer. A module may hold them; nothing will train them.
            can_train = param.requires_grad or param.dtype in _DTYPES
            own_marks, is_lent = marks_of(own, known, new), not isinstance(param, Parameter)
            found[i] = Candidate(param, list(dict.fromkeys(names)), types, own_marks, can_train, is_lent, slices)
        if found and not any(c.can_train for c in found.values()):
            raise ValueError("Regularizer: params must hold a dense floating point parameter, got none")
    else:
        for name, param in _named(params):
            names = found.setdefault(id(param), Candidate(param, [])).names
            names += [] if name in names else [name]
    if not found:
        hint = "" if isinstance(params, Module) else "; a generator that something else has read is empty"
        raise ValueError(f"Regularizer: params must hold a parameter, got none{hint}")
    return list(found.values())


def _named(params: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, Mapping):
        raise TypeError(
            f"Regularizer: params must be tensors or pairs, got {type(params).__name__}; pass its `.items()`"
        )
    if not isinstance(params, Iterable):
        raise TypeError(
            "Regularizer: params must be a module, an iterable of tensors or of (name, tensor) pairs, got "
            + (type(params).__name__ + "; call it" * callable(params))
        )
    taken: dict[str, Tensor] = {}
    for i, item in enumerate(params):
        is_pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        name, param = item if is_pair else (str(i), item)
        if not isinstance(param, Tensor):
            raise TypeError(f"Regularizer: params[{name!r}] must be a tensor, got {type(param).__name__}")
        if taken.setdefault(name, param) is not param:
            raise ValueError(f"Regularizer: params must have a name each, got {name!r} for two tensors")
        yield name, param


def marked_modules(module: Module) -> dict[Mark, str]:
    """The marks in a module, by the modules that have them, in words."""
    return {
        mark: f"{path or 'the module'} ({type(child).__name__})"
        for path, child in module.named_modules()
        for mark in marks_on(child)
    }
