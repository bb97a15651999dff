"""Which parameters a `Regularizer` holds, under which names, and which penalty each of them carries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import UninitializedParameter

from fused_reg._marks import marks_on
from fused_reg._partitioned import check_whole
from fused_reg._strengths import Penalty, as_penalty

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# The names under which torch's wrappers hold the module that they wrap. They are no part of a parameter's name.
_ALWAYS_A_WRAPPER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)

_BIAS = re.compile(r"(^|_)bias(_|$)")


@dataclass
class Candidate:
    """A parameter, all of its names (a tied one has several), and the innermost marks that speak about it."""

    param: Tensor
    names: list[str]
    mark: Penalty | None = None

    def matches(self, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in self.names)


@dataclass
class Choice:
    """The arguments of a `Regularizer` that choose, checked."""

    default: Penalty
    weights_only: bool = False
    include: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    rules: list[tuple[str, Penalty]] = field(default_factory=list)

    def of(self, candidates: Sequence[Candidate]) -> list[tuple[Candidate, Penalty]]:
        """Those chosen, each with its penalty: of the first rule that matches, else of its mark, else the default."""
        for argument, patterns in (
            ("include", self.include or []),
            ("exclude", self.exclude),
            ("rules", [pattern for pattern, _ in self.rules]),
        ):
            for pattern in patterns:
                check_matches("Regularizer", argument, pattern, candidates)
        if self.default.is_empty and not self.rules and not any(c.mark for c in candidates):
            raise ValueError(
                "Regularizer: l1, l2, l2_norm, rules or marks by `regularized` must give a strength, got none"
            )
        if self.include == []:
            raise ValueError("Regularizer: include must have a pattern, got an empty list; leave it out for all")
        meant = [c for c in candidates if self._is_meant(c)]
        # Before weights_only looks at their dimensions, of which a piece has one.
        check_whole("Regularizer", [c.param for c in meant], [c.names[0] for c in meant])
        chosen = [(c, penalty) for c in meant if (penalty := self._penalty_of(c)) is not None]
        if not chosen:
            raise ValueError("Regularizer: include, exclude, weights_only and rules must leave a parameter, got none")
        if not self.default.is_empty and all(penalty is not self.default for _, penalty in chosen):
            raise ValueError(
                "Regularizer: l1, l2 or l2_norm must apply to a parameter, but rules or marks by `regularized` speak "
                "about all of them"
            )
        return chosen

    def _is_meant(self, candidate: Candidate) -> bool:
        included = self.include is None or any(map(candidate.matches, self.include))
        return included and not any(map(candidate.matches, self.exclude))

    def _penalty_of(self, candidate: Candidate) -> Penalty | None:
        if self.weights_only and (candidate.param.ndim < 2 or all(map(is_bias, candidate.names))):
            return None
        rule = next((penalty for pattern, penalty in self.rules if candidate.matches(pattern)), None)
        penalty = rule or candidate.mark or self.default
        return None if penalty.is_empty else penalty


def check_matches(function: str, argument: str, pattern: str, candidates: Iterable[Any]) -> None:
    """A pattern that matches nothing is a slip of the pen: the penalty would silently be absent."""
    if not isinstance(pattern, str):
        raise TypeError(f"{function}: {argument} must be a pattern of names, got {type(pattern).__name__}")
    if not any(c.matches(pattern) for c in candidates):
        raise ValueError(f"{function}: {argument} must match the name of a parameter, got {pattern!r}")


def is_bias(name: str) -> bool:
    """Whether the name says bias: ``bias``, ``in_proj_bias``, ``bias_ih_l0``, ``parametrizations.bias.original``."""
    parts = name.split(".")
    own = parts[parts.index("parametrizations") + 1] if "parametrizations" in parts[:-1] else parts[-1]
    return _BIAS.search(own) is not None


def as_patterns(argument: str, patterns: str | Iterable[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    if not isinstance(patterns, Iterable):
        raise TypeError(f"Regularizer: {argument} must be a pattern or a list of them, got {type(patterns).__name__}")
    found = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(
                f"Regularizer: {argument} must be a pattern or a list of them, got {type(pattern).__name__}"
            )
    return found


def as_rules(rules: Iterable[tuple[str, Mapping[str, Any]]] | None) -> list[tuple[str, Penalty]]:
    allowed = [f.name for f in fields(Penalty)]
    checked_rules = []
    for i, rule in enumerate(rules or ()):
        if not (isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[0], str)) or not isinstance(
            rule[1], Mapping
        ):
            raise TypeError(f"Regularizer: rules[{i}] must be a pair (pattern, dict(l1=...)), got {rule!r}")
        pattern, given = rule
        unknown = [key for key in given if key not in allowed]
        if unknown:
            raise ValueError(f"Regularizer: rules[{i}] must have keys of {', '.join(allowed)}, got {unknown[0]!r}")
        penalty = as_penalty(f"Regularizer: rules[{i}] {pattern!r}: ", **given)
        if penalty.is_empty:
            raise ValueError(f"Regularizer: rules[{i}] must give l1, l2 or l2_norm, got {dict(given)!r}")
        checked_rules.append((pattern, penalty))
    return checked_rules


def candidates_of(params: Any) -> list[Candidate]:
    """The parameters, read once, each once, with their names."""
    named = _named(params)
    found: dict[int, Candidate] = {}
    taken: dict[str, Tensor] = {}
    for name, param, mark in named:
        _check_tensor(name, param)
        if taken.setdefault(name, param) is not param:
            raise ValueError(f"Regularizer: params must have a name each, got {name!r} for two tensors")
        candidate = found.setdefault(id(param), Candidate(param, []))
        if name not in candidate.names:
            candidate.names.append(name)
        candidate.mark = candidate.mark or mark
    if not found:
        raise ValueError(
            "Regularizer: params must hold a parameter, got none; a generator that something else has read is empty"
        )
    usable = [c for c in found.values() if not isinstance(params, Module) or _can_train(c)]
    if not usable:
        raise ValueError("Regularizer: params must hold a dense floating point parameter, got none")
    return usable


def _named(params: Any) -> Iterator[tuple[str, Tensor, Penalty | None]]:
    if isinstance(params, Module):
        yield from _walk(params, "", ())
        return
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, Mapping):
        raise TypeError(
            f"Regularizer: params must be tensors or pairs, got {type(params).__name__}; pass its `.items()`"
        )
    if not isinstance(params, Iterable):
        raise TypeError(
            "Regularizer: params must be a module, an iterable of tensors or of (name, tensor) pairs, "
            f"got {type(params).__name__}"
        )
    for i, item in enumerate(params):
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            yield item[0], item[1], None
        else:
            yield str(i), item, None


def _walk(module: Module, path: str, marks: tuple[Any, ...]) -> Iterator[tuple[str, Tensor, Penalty | None]]:
    """In the order of ``named_parameters``, tied ones at each of their places."""
    marks = (*marks_on(module), *marks)  # innermost first
    for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
        bias = is_bias(path + name)
        yield path + name, param, next((mark.penalty for mark in marks if mark.bias or not bias), None)
    for name, child in module._modules.items():
        if child is not None:
            wrapped = name in _ALWAYS_A_WRAPPER or (name == "module" and isinstance(module, _WRAPPERS))
            yield from _walk(child, path if wrapped else f"{path}{name}.", marks)


def _can_train(candidate: Candidate) -> bool:
    """Not so: the frozen integers of a quantized layer. A module may hold such parameters; nothing will train them."""
    return candidate.param.requires_grad or candidate.param.dtype in _DTYPES


def _check_tensor(name: str, param: Any) -> None:
    where = f"Regularizer: params[{name!r}]"
    if isinstance(param, UninitializedParameter):
        raise TypeError(
            f"{where} must be initialized, got {type(param).__name__}; run the module once so that it knows its shapes"
        )
    if not isinstance(param, Tensor):
        raise TypeError(f"{where} must be a tensor, got {type(param).__name__}")
    if not isinstance(param, Parameter) and not param.requires_grad:
        raise ValueError(f"{where} must be a parameter, got a tensor without grad; pass it itself, not its `.data`")
    if not param.is_leaf:
        raise ValueError(f"{where} must be a leaf, as a parameter is, got the result of {param.grad_fn}")
    if param.requires_grad and (param.dtype not in _DTYPES or param.is_nested):
        raise TypeError(f"{where} must be one tensor of float32, float64, bfloat16 or float16, got {param.dtype}")
    if param.requires_grad and param.layout is not torch.strided:
        raise TypeError(f"{where} must be dense (torch.strided), got {param.layout}")
