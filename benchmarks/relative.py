"""The contenders of penalties with reference weights (`toward`), with strengths by element (`importance`), and with
both: ours, the loop that a user writes, and plain operations over as many bytes."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_reg
from benchmarks import checks
from benchmarks import contenders as c
from benchmarks.checks import MODES, Errors, Problem, Strengths, Tensors
from benchmarks.contenders import LOOP, Contender, Peer, Work
from fused_reg import reference

_L1, _L2 = (c.ELASTIC_NET[name] for name in ("l1", "l2"))
# One step moves the weights enough to be checked; the timed one leaves them, or they would be others before long.
_CHECKED_STEP, _TIMED_STEP = 100.0, 1e-9


class Use(NamedTuple):
    """What such a penalty is taken for, and a user's loop: of a parameter w, its reference t and its importance f."""

    strengths: Strengths
    given: Sequence[str]
    penalty: Callable[[Tensor, Tensor, Tensor], Tensor]
    prox: Callable[[Tensor, Tensor, Tensor, float], Any]


def _soft(w: Tensor, threshold: Tensor) -> Tensor:
    return w.sign() * (w.abs() - threshold).clamp_(min=0)


#: By the family of their rows.
USES = {
    "toward (L2-SP)": Use(
        {"l2": _L2},
        ("toward",),
        lambda w, t, f: _L2 * ((w - t) ** 2).sum(),
        lambda w, t, f, step: w.lerp_(t, 2 * step * _L2 / (1 + 2 * step * _L2)),
    ),
    "importance (adaptive lasso)": Use(
        {"l1": _L1},
        ("importance",),
        lambda w, t, f: _L1 * (f * w.abs()).sum(),
        lambda w, t, f, step: w.copy_(_soft(w, step * _L1 * f)),
    ),
    "toward and importance (EWC)": Use(
        {"l2": _L2},
        ("toward", "importance"),
        lambda w, t, f: _L2 * (f * (w - t) ** 2).sum(),
        lambda w, t, f, step: w.addcmul_(f, t, value=2 * step * _L2).div_(1 + 2 * step * _L2 * f),
    ),
    "toward and importance, L1 and L2": Use(
        c.ELASTIC_NET,
        ("toward", "importance"),
        lambda w, t, f: (f * (_L1 * (w - t).abs() + _L2 * (w - t) ** 2)).sum(),
        lambda w, t, f, step: w.copy_(t + _soft(w - t, step * _L1 * f) / (1 + 2 * step * _L2 * f)),
    ),
}


class References:
    """Of the parameters of a problem; they lie in memory as these do."""

    def __init__(self, params: Tensors) -> None:
        generator = torch.Generator(params[0].device).manual_seed(3)
        scales = {"toward": 0.05, "importance": 1.0}  # about those of weights, and of strengths that are relative
        self.all = {name: [_other(p, scale, generator) for p in params] for name, scale in scales.items()}
        torch._foreach_abs_(self.all["importance"])

    def given(self, use: Use) -> dict[str, list[Tensor]]:
        return {name: self.all[name] for name in use.given}

    def each(self, params: Tensors) -> Iterator[tuple[Tensor, ...]]:
        return zip(params, *self.all.values(), strict=True)

    def pieces(self, use: Use, *lists: Tensors) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
        """Corresponding pieces of lists, with those of their references in float64."""
        for tensors in zip(*lists, *self.given(use).values(), strict=True):
            for parts in checks.pieces(*tensors):
                wide = [part.double() for part in parts[len(lists) :]]
                yield parts[: len(lists)], dict(zip(use.given, wide, strict=True))


def _other(p: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
    return copy.deepcopy(p.detach()).copy_(drawn.mul_(scale))


def relative_penalties(problem: Problem, mode: str, peers: Sequence[Peer] = ()) -> Iterator[Contender]:
    """Of each use ours, the loop and the limits; all have the same references."""
    references, memory = References(problem.params), Memory(problem.params)
    weights = [copy.deepcopy(p.detach()) for p in problem.params] if mode == "relative_prox" else []
    for family, use in USES.items():
        passes = MODES[mode].passes + len(use.given)
        for name, role in ((MODES[mode].ours, "ours"), (LOOP, "peer")):
            if weights:
                make = partial(_prox_work, problem.params, weights, role, use, references)
            else:
                make = partial(_grad_work, problem.params, mode, role, use, references)
            yield Contender(name, role, make, family, passes)
        yield from memory.limits(mode, family, passes)


def _grad_work(params: Tensors, mode: str, role: str, use: Use, references: References) -> Work:
    """The loop has its gradients in `.grad`, and ours where they are added to what is there."""
    is_ours, is_present = role == "ours", MODES[mode].grad == "present"
    function = fused_reg.accumulate_grad_ if is_present else fused_reg.value_and_grad

    def by_loop() -> Tensor:
        value = sum(use.penalty(*own) for own in references.each(params))
        value.backward()
        return value.detach()

    once = partial(function, params, **use.strengths, **references.given(use)) if is_ours else by_loop
    has_grad = is_present or not is_ours

    def call() -> None:
        once()
        if not is_present:  # the one who allocated them pays for freeing them
            c.clear(params)

    def verify() -> Errors:
        base = c.set_gradients(params, mode)
        result = once()
        value, grads = (result, c.gradients(params)) if has_grad else result
        values = []

        def compared() -> Iterator[tuple[Tensor, Tensor]]:
            for (part, grad, *before), own in references.pieces(use, params, grads, *([base] if base else [])):
                exact, (expected,) = reference.value_and_grad(part.double(), **use.strengths, **own)
                values.append(exact.item())
                yield grad, sum(before, expected)

        dtype, error = params[0].dtype, checks.largest_relative(compared())
        checks.demand("roundings" if is_ours else "elements", dtype, error, "gradient")
        off = abs(value.item() / math.fsum(values) - 1)
        if not is_present:
            c.clear(params)
        return checks.demand("contract" if is_ours else "value", dtype, off, "value"), error

    return Work(call, verify)


def _prox_work(params: Tensors, weights: Tensors, role: str, use: Use, references: References) -> Work:
    """All step one copy of the parameters."""
    restart = partial(torch._foreach_copy_, weights, [p.detach() for p in params])

    def by_loop(step: float) -> None:
        for own in references.each(weights):
            use.prox(*own, step)

    ours = partial(fused_reg.prox_, weights, **use.strengths, **references.given(use))
    prox = ours if role == "ours" else by_loop

    def compared() -> Iterator[tuple[Tensor, Tensor]]:
        for (before, after), own in references.pieces(use, params, weights):
            expected = before.to(torch.float64, copy=True)
            reference.prox_(expected, **use.strengths, **own, step=_CHECKED_STEP)
            yield after, expected

    def verify() -> Errors:
        restart()
        prox(step=_CHECKED_STEP)
        try:
            error = checks.largest_relative(compared())
            checks.demand("roundings" if role == "ours" else "elements", weights[0].dtype, error, "weight")
        finally:
            restart()
        return None, error

    return Work(partial(prox, step=_TIMED_STEP), verify)


COPY = "y.copy_(x), as many bytes"
_ALPHA = 1e-9  # so small that what is added to leaves y as it is, through all calls


class Operation(NamedTuple):
    """Of tensors a, b and c, to y; and what is in y then if it was 0."""

    name: str
    op: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    exact: Callable[[Tensor, Tensor, Tensor], Tensor]


_SUB = Operation("torch.sub(a, b, out=y)", lambda a, b, c, y: torch.sub(a, b, out=y), lambda a, b, c: a - b)
_ADDCMUL = Operation(
    "torch.addcmul(a, b, c, out=y)", lambda a, b, c, y: torch.addcmul(a, b, c, out=y), lambda a, b, c: a + b * c
)
_ADD_ = Operation("y.add_(a, alpha=s)", lambda a, b, c, y: y.add_(a, alpha=_ALPHA), lambda a, b, c: _ALPHA * a)
_ADDCMUL_ = Operation(
    "y.addcmul_(a, b, value=s)", lambda a, b, c, y: y.addcmul_(a, b, value=_ALPHA), lambda a, b, c: _ALPHA * a * b
)

#: By the mode and the bytes moved, the operation of torch that reads and writes as many tensors, likewise to another or
#: in place. Where five are moved there is none.
OPERATIONS = {
    ("relative_grad", 3): _SUB,
    ("relative_grad", 4): _ADDCMUL,
    ("relative_present", 4): _ADDCMUL_,
    ("relative_prox", 3): _ADD_,
    ("relative_prox", 4): _ADDCMUL_,
}


class Memory:
    """What the limits read and write: as many elements as the parameters have, in one tensor, several times."""

    def __init__(self, params: Tensors) -> None:
        self._flat = torch.cat([p.detach().reshape(-1) for p in params])
        self._x, self._y = self._flat[:0], self._flat[:0]

    def limits(self, mode: str, family: str, passes: int) -> Iterator[Contender]:
        """A copy of half as many elements as are moved, to which ratios are; and the operation, if there is one."""
        yield Contender(COPY, "limit", partial(self._copy, passes), family, passes, is_reference_limit=True)
        if (operation := OPERATIONS.get((mode, passes))) is not None:
            yield Contender(operation.name, "limit", partial(self._operation, operation), family, passes)

    def _copy(self, passes: int) -> Work:
        x, y = self._of(passes * len(self._flat) // 2)
        return _checked(lambda: y.copy_(x), y, lambda x: x, x)

    def _operation(self, operation: Operation) -> Work:
        n = len(self._flat)
        x, y = self._of(3 * n)
        parts = x.view(3, n).unbind()
        return _checked(partial(operation.op, *parts, y[:n]), y[:n], operation.exact, *parts)

    def _of(self, size: int) -> tuple[Tensor, Tensor]:
        if not len(self._x):
            self._x = torch.cat([self._flat, 2 * self._flat, 3 * self._flat])
            self._y = torch.empty_like(self._x)
        return self._x[:size], self._y[:size]


def _checked(call: Callable[[], Tensor], y: Tensor, exact: Callable[..., Tensor], *given: Tensor) -> Work:
    def verify() -> Errors:
        y.zero_()
        call()
        pairs = ((own, exact(*(part.double() for part in parts))) for own, *parts in checks.pieces(y, *given))
        return None, checks.demand("elements", y.dtype, checks.largest_relative(pairs), "element")

    return Work(call, verify)
