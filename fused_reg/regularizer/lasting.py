"""Whether a proximal step lasts in an optimizer. Where weights are a function of its state (dual averaging,
schedule-free, master copies) the next step undoes it; and where ``lr`` is not the rate of a step, nothing says how far
to shrink.

No attribute tells. So it is tried: two copies of the optimizer take the same steps with small parameters of their own,
and those of one are shrunk once. What is left of the difference in the end is what lasts.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fused_reg import _devices
from fused_reg._warnings import warn
from fused_reg.in_place import prox_
from fused_reg.regularizer.share import rate_of
from fused_reg.regularizer.wrapped import held, optimizers_in

_STEPS = 40
_SHRUNK_AFTER = 8  # FTRL keeps more of what is done after its very first step
_LARGEST = 8  # elements along each dimension
_RATE = 0.01
_LEFT = 0.4  # the least share that must be left in the end (Lookahead keeps a half)
_LEFT_OF_HALF = 0.8  # and of what was left half-way (slow averages)
_LEAST_MOVE = 1e-4  # in units of lr: gradients are of size 1, and so are weights

_Copy: TypeAlias = "tuple[Any, list[Parameter]]"


def check_wrapper(wrapper: Any, optimizer: Optimizer, regularized: Sequence[Tensor]) -> None:
    """Raises where what is around an optimizer undoes its proximal steps. One that has other objects (a trainer, an
    accelerator) passes steps on, and is not copied."""
    plain = ("builtins", "collections", "torch")
    own = [x for x in vars(wrapper).values() if not isinstance(x, Optimizer) and not callable(x)]
    if all(type(x).__module__.partition(".")[0] in plain for x in own):
        check_lasting(wrapper, [p for p in regularized if id(p) in held(optimizer)], is_wrapper=True)


def check_lasting(optimizer: Optimizer, regularized: Sequence[Tensor], is_wrapper: bool = False) -> None:
    """Raises where a proximal step does not last, and warns where it cannot be tried. torch's and ours are known."""
    kind = type(optimizer)
    is_known = kind.__module__.startswith(("torch.", "fused_reg."))
    is_known &= kind.__name__ != "Adafactor"  # whose rate is lr times a norm
    if is_known or not any(p.numel() for p in regularized):
        return
    reasons = []
    # First as at its beginning, but some make their state before the first step; and some take none without a closure.
    for as_it_is, with_closure in product((False, True), repeat=2):
        try:
            lasts, move = _tried(optimizer, regularized, as_it_is, with_closure)
        except Exception as error:  # whatever the code of others raises, of which nothing can be asked before
            reasons.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        if not lasts:
            raise ValueError(
                'attach: mode "prox" must be given an optimizer that goes on from the weights that it finds, got '
                f"{kind.__name__}, whose weights are a function of its state, so that it undoes a proximal step; "
                'mode "grad" is right there'
            )
        # Groups of Prodigy and D-Adaptation have a d, which may begin as large as one likes.
        if move < _LEAST_MOVE or any("d" in group for group in optimizer.param_groups):
            raise ValueError(
                f'attach: mode "prox" must be given an optimizer that steps by lr, got {kind.__name__}, whose steps '
                'have another rate (as lr * d of Prodigy and D-Adaptation); mode "grad" is right there'
            )
        return
    if is_wrapper:
        return
    warn(
        f"attach: could not try whether {kind.__name__} keeps what a proximal step does ({reasons[0]}); it does not "
        'where weights are a function of its state (schedule-free, dual averaging), and mode "grad" is right there',
    )


def _tried(
    optimizer: Optimizer, regularized: Sequence[Tensor], as_it_is: bool, with_closure: bool
) -> tuple[bool, float]:
    """Whether a difference lasts, and how far the weights moved, in units of lr. Nothing of the optimizer changes."""
    with torch.inference_mode(False), _devices.kept_random_states(regularized), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = [_copy_of(optimizer, {id(p) for p in regularized}, as_it_is) for _ in range(2)]
        (_, own), (_, shrunk) = pair
        before = [p.detach().clone() for p in own]
        for copied, _ in pair:
            if callable(train := getattr(type(copied), "train", None)):  # of schedule-free optimizers
                train(copied)
        for k in range(_STEPS):
            grads = [_wave(p, k) for p in own]
            for copied, params in pair:
                _step(copied, params, grads, with_closure)
            if k == _SHRUNK_AFTER:
                prox_(shrunk, 0.5, step=1.0)
                first = _distances(own, shrunk)
            if k == _STEPS // 2:
                half, moves = _distances(own, shrunk), _distances(own, before, norm=torch.inf)
        last = _distances(own, shrunk)
    if not (torch.stack([first, half, last, moves]).isfinite().all() and moves.all()):
        raise RuntimeError(f"weights that moved by {moves.tolist()}")
    lasts = (last > _LEFT * first) & (last > _LEFT_OF_HALF * half)
    return bool(lasts.all()), float(moves.min()) / _RATE


def _copy_of(optimizer: Any, regularized: set[int], as_it_is: bool) -> _Copy:
    """The optimizer with a parameter of its own for each kind of the regularized ones in each group."""
    copied = object.__new__(type(optimizer))
    state: dict[Any, Any] = defaultdict(dict)
    groups: list[dict[str, Any]] = []
    memo: dict[int, Any] = {id(optimizer): copied, id(optimizer.param_groups): groups, id(optimizer.state): state}
    for inner in optimizers_in(optimizer).values():  # whose parameters have stand-ins of other sizes
        if held(inner) <= held(optimizer):
            memo.setdefault(id(inner.state), defaultdict(dict))
    sources: list[tuple[Tensor, Parameter]] = []
    for group in optimizer.param_groups:
        own: dict[Any, Parameter] = {}
        for p in group["params"]:
            if id(p) in regularized and p.numel() > 0 and (p.ndim, p.dtype) not in own:
                own[p.ndim, p.dtype] = _stand_in(p)
                sources.append((p, own[p.ndim, p.dtype]))
        memo |= {id(p): own[p.ndim, p.dtype] for p in group["params"] if (p.ndim, p.dtype) in own}
        if own:
            memo[id(group)] = fresh = {"params": list(own.values())}
            memo[id(group["params"])] = fresh["params"]
            groups.append(fresh)
    for group in optimizer.param_groups:
        for p in group["params"]:
            memo.setdefault(id(p), sources[0][1])
        if id(group) in memo:
            options = dict(group)
            if not as_it_is:  # some count their steps in their groups
                options.update((k, x) for k, x in getattr(optimizer, "defaults", {}).items() if k in group)
            memo[id(group)] |= {k: deepcopy(x, memo) for k, x in options.items() if k != "params"}
            lr = rate_of(group)
            memo[id(group)]["lr"] = torch.full_like(lr, _RATE) if isinstance(lr, Tensor) else _RATE
            if group.get("weight_decay"):
                memo[id(group)]["weight_decay"] = 0.0
    if as_it_is:
        state.update({key: deepcopy(x, memo) for key, x in optimizer.state.items() if not isinstance(key, Tensor)})
        for p, own_p in sources:
            state[own_p] = {key: _cut(x, p, memo) for key, x in optimizer.state.get(p, {}).items()}
    for name, value in vars(optimizer).items():
        if name.startswith("_optimizer_"):  # hooks
            vars(copied)[name] = OrderedDict()
        elif not (callable(value) and hasattr(type(optimizer), name)):  # the step that a scheduler has wrapped
            vars(copied)[name] = deepcopy(value, memo)
    return copied, [own_p for _, own_p in sources]


def _stand_in(p: Tensor) -> Parameter:
    shape = [min(n, _LARGEST) for n in p.shape]
    sizes = torch.linspace(1.25, 0, torch.Size(shape).numel(), device="cpu")  # at 0 the least move is seen
    signs = torch.arange(len(sizes), device="cpu") % 2 * 2 - 1
    return Parameter((sizes * signs).reshape(shape).to(p.device, p.dtype))


def _cut(x: Any, p: Tensor, memo: dict[int, Any]) -> Any:
    """What a state has for a parameter, for its stand-in."""
    if isinstance(x, Tensor) and x.shape == p.shape:
        return x.detach()[tuple(slice(_LARGEST) for _ in p.shape)].clone()
    return deepcopy(x, memo)


def _wave(p: Tensor, k: int) -> Tensor:
    """The gradient of a step: of size 1, and 0 in the mean of steps."""
    wave = torch.arange(p.numel(), device="cpu").add(k).mul(7 * k + 1).cos().mul(1.4)
    return wave.reshape(p.shape).to(p.device, p.dtype)


def _step(optimizer: Any, params: Sequence[Parameter], grads: Sequence[Tensor], with_closure: bool) -> None:
    def closure() -> Tensor:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        return torch.ones(())

    closure()
    step: Callable[..., Any] = type(optimizer).step
    step(optimizer, closure) if with_closure else step(optimizer)


def _distances(params: Sequence[Tensor], others: Sequence[Tensor], norm: float = 2) -> Tensor:
    pairs: Iterator[tuple[Tensor, Tensor]] = zip(params, others, strict=True)
    return torch.stack([torch.linalg.vector_norm((p - q).detach().double(), norm).cpu() for p, q in pairs])
