"""The contenders of the proximal step, in place: ours, and the soft thresholds that people write."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import fused_reg
from benchmarks.cases import MODES
from benchmarks.checks import Errors, Strengths, Tensors, WrongResultError, demand, largest_relative, pieces
from benchmarks.contenders import ELASTIC_NET, LOOP, NORMS, OURS, Contender, Problem, Work
from fused_reg import reference

# One step moves the weights far enough to be checked; the one that is timed leaves them as they are, or they would
# be zeros before long.
_CHECKED_STEP, _TIMED_STEP = 100.0, 1e-9

# Of the elements that are exactly zero: those whose threshold is a rounding away may differ.
_ZEROS_TOLERANCE = 1e-4


def _loop(weights: Tensors, l1: float, l2: float, l2_norm: float = 0.0, group: str = "", *, step: float) -> None:
    for w in weights:
        w.copy_(w.sign() * (w.abs() - step * l1).clamp_(min=0))
        if group:
            groups = w.view(len(w), -1) if group == "row" else w.view(1, -1)
            groups.mul_((1 - step * l2_norm / groups.norm(dim=1, keepdim=True)).clamp_(min=0))
        w.div_(1 + 2 * step * l2)


def _softshrink(weights: Tensors, l1: float, l2: float, *, step: float) -> None:
    for w in weights:
        w.copy_(torch.nn.functional.softshrink(w, step * l1)).div_(1 + 2 * step * l2)


def prox_steps(problem: Problem) -> Iterator[Contender]:
    """Ours and the peers, without norms and with those of each kind of group; all step one copy of the parameters."""
    weights = [p.detach().clone() for p in problem.params]
    for family in ("", *problem.families):
        strengths = ELASTIC_NET | NORMS.get(family, {})
        steps = [(OURS, "ours", fused_reg.prox_), (LOOP, "peer", _loop), ("loop, softshrink", "peer", _softshrink)]
        for name, role, prox in steps[: 2 if family else 3]:
            make = partial(_work, problem.params, weights, role, partial(prox, weights, **strengths), strengths)
            yield Contender(
                name, role, make, family, MODES["prox"].passes + bool(family)
            )  # norms are known after a pass


def _work(source: Tensors, weights: Tensors, role: str, prox: Callable[..., object], strengths: Strengths) -> Work:
    def restart() -> None:
        for w, p in zip(weights, source, strict=True):
            w.copy_(p.detach())

    def stepped() -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece of the weights with what the reference makes of the parameter's."""
        for tensors in zip(source, weights, strict=True):
            for before, after in pieces(*tensors, group=strengths.get("group")):
                expected = before.to(torch.float64, copy=True)
                reference.prox_(expected, **strengths, step=_CHECKED_STEP)
                yield after, expected

    def verify() -> Errors:
        restart()
        prox(step=_CHECKED_STEP)
        try:
            error = largest_relative(stepped())
            demand("roundings" if role == "ours" else "elements", weights[0].dtype, error, "weight")
            more_zeros = sum(int((after == 0).sum() - (exact == 0).sum()) for after, exact in stepped())
            if role == "ours" and abs(more_zeros) > _ZEROS_TOLERANCE * sum(w.numel() for w in weights):
                raise WrongResultError(f"{more_zeros} weights too many are exactly zero")
        finally:
            restart()
        return Errors(gradient_error=error)

    return Work(partial(prox, step=_TIMED_STEP), verify)
