"""A `Regularizer` in an optimizer's step hooks."""

from __future__ import annotations

import weakref
from operator import is_
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer

from fused_reg._warnings import warn
from fused_reg.regularizer import strays
from fused_reg.regularizer.calls import Part
from fused_reg.regularizer.lasting import check_lasting
from fused_reg.regularizer.nesting import Nesting
from fused_reg.regularizer.rates import check_rates, rate_of
from fused_reg.regularizer.steps import Closure, closure_of, exchanged, found_infinity, is_inert, with_penalty
from fused_reg.regularizer.strays import Watch
from fused_reg.regularizer.strengths import KINDS, identity, is_absent, tensor_of
from fused_reg.regularizer.table import Entry, Table

if TYPE_CHECKING:
    from fused_reg.regularizer.attachments import Attachments

#: The gradient before the step, or the proximal step after it.
Mode = Literal["grad", "prox"]
#: The two hooks as a compiled step calls them: as they are. Decorators would make the package's import take twice as
#: long, and each step longer.
_outside_of_graphs: list[Any] = []


class Attachment:
    """What :meth:`.Regularizer.attach` returns; :meth:`remove` detaches, as does leaving a ``with`` block.

    The optimizer's hooks keep it alive. It keeps no optimizer alive. A copy of it is detached.
    """

    def __init__(
        self, table: Table, all_of_them: Attachments, optimizer: Optimizer, mode: Mode, include_unused: bool
    ) -> None:
        self._table = table
        self._all = all_of_them
        self._optimizer: weakref.ref[Optimizer] | None = weakref.ref(optimizer)
        self._mode = mode
        self._include_unused = include_unused
        self._hooks: list[Any] = []
        self._options: list[Any] = []  # what `_follow` found in the optimizer when it last looked
        self._seen: list[Tensor] = []
        self._is_checked: bool  # what it found then, by `warn_of_missing`
        self._frozen: list[Tensor] = []  # what no optimizer held then, and may train later
        self._taken_over = ""  # the name of a parameter that a later attachment handles
        self.entered = 0  # steps, as `_strays` counts them
        self._is_taken = False  # the step, by itself or by one within it
        self._is_inert = False
        self._awaits_closure = False
        self._is_open = False  # an optimizer without gradients in .grad has the objective
        self._before_inert: Tensor | None = None  # the penalty
        self._part: Part
        self._shrinking: Part  # with mode "prox" the same without the parameters that the step leaves alone
        self._used: list[bool] | None = None  # which those are not
        self._group_of: list[int]  # the optimizer's, for each entry
        self._groups: list[int]
        self._value: Tensor | None = None
        self._said: set[str] = set()
        self.handler = strays.Handler(weakref.ref(self))
        self._follow(optimizer)
        if mode == "prox":
            check_rates(optimizer.param_groups, self._groups)
            check_lasting(optimizer, self._part.params)
        self._nesting = Nesting(optimizer)
        if not _outside_of_graphs:
            _outside_of_graphs.extend(map(torch.compiler.disable, (Attachment._before, Attachment._after)))
        self._hooks += [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        self._watches = [Watch(e, self) for e in self.entries if e.param.requires_grad and e.param.is_leaf]

    @property
    def value(self) -> Tensor:
        """The penalty of the parameters that the optimizer holds, 0-dim, on their device, without a graph or a
        synchronization. With mode "grad" that of the last step, before it changed them (with a closure: of its last
        evaluation). With mode "prox", which needs no value for its step, and before the first step, the penalty now:
        each look is a pass over the parameters."""
        if self._value is not None:
            return self._value
        return self._penalty()

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer; None when it is gone, and for a copy."""
        return None if self._optimizer is None else self._optimizer()

    @property
    def is_active(self) -> bool:
        """Whether the hooks are still there, and no later attachment has taken a parameter over."""
        optimizer = self.optimizer
        return (
            optimizer is not None
            and bool(self._hooks)
            and self._hooks[0].id in vars(optimizer)["_optimizer_step_pre_hooks"]  # not so if it was initialized again
            and not self._taken_over
        )

    @property
    def is_stepping(self) -> bool:
        """Whether a step of the optimizer runs."""
        return self._nesting.depth > 0

    def look_within(self, other: Optimizer) -> None:
        """At the first step of another optimizer that holds the same parameters, within a step of this one."""
        first = next((e for e in self.entries if e.param.grad is not None), None)
        is_held = first is not None and any(p is first.param for group in other.param_groups for p in group["params"])
        if is_held and self._nesting.has_lost(self._part.params):
            self.warn_once(
                "lost",
                f"attach: a step of {type(self.optimizer).__name__} changes gradients after the penalty has entered "
                f"and before {type(other).__name__} within it steps; attach to each optimizer that it holds instead",
            )

    def remove(self) -> None:
        """Takes the hooks away. A second call does nothing."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._end_watch()
            self.handler.is_over = True

    def end(self, name: str) -> None:
        """Another attachment has taken this parameter over. A step of this one is an error from now on."""
        self._taken_over = name
        self._end_watch()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        gone = dict.fromkeys(("_optimizer", "_all", "_nesting", "handler"))
        return {**vars(self), **gone, "_hooks": [], "_watches": [], "_options": [], "_seen": []}

    def __repr__(self) -> str:
        optimizer = self.optimizer
        state = "active" if self.is_active else "taken over" if self._taken_over else "detached"
        count = len(self.entries)
        return (
            f"Attachment({self._mode!r}, {'no optimizer' if optimizer is None else type(optimizer).__name__}, "
            f"{count} parameter{'s' * (count != 1)}, {state})"
        )

    @property
    def entries(self) -> list[Entry]:
        """What it handles."""
        return self._part.entries

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_dynamo_compiling():
            return _outside_of_graphs[0](self, optimizer, args, kwargs)
        closure = closure_of(args, kwargs) if kwargs or len(args) > 1 else None
        depth = self._nesting.enter(optimizer, _outside_of_graphs[0], self._part.params)
        if depth == 1:
            self._is_taken = False
            if self._taken_over and (closure is not None or not is_inert(optimizer)):
                raise ValueError(
                    f"attach: {self._taken_over!r} must be stepped by the optimizer that was attached last, but an "
                    f"earlier {type(optimizer).__name__} steps; attach it again, or call remove() of its attachment"
                )
        if depth != self._nesting.levels:
            return None
        self.entered += 1
        self._follow(optimizer)
        if self._mode == "prox":
            check_rates(optimizer.param_groups, self._groups)
            self._used = self._in_step()
        self._is_inert = is_inert(optimizer)
        self._is_open, self._before_inert = False, None
        self._awaits_closure = closure is not None
        if closure is None and self._is_inert:
            self._remember()
            return None
        if self._frozen or not self._is_checked:
            self._check()
        if closure is not None:
            return exchanged(args, kwargs, closure, self._penalized(closure, optimizer))
        if self._mode == "grad" and (depth == 1 or not self._nesting.has_penalty(self._part.params)):
            self._accumulate(optimizer)
        return None

    def _penalized(self, closure: Closure, optimizer: Optimizer) -> Closure:
        def penalized(*args: Any, **kwargs: Any) -> Any:
            """The step is inert if it is after each evaluation."""
            objective = closure(*args, **kwargs)
            self._follow(optimizer)
            is_inert_now = is_inert(optimizer)
            self._is_inert = is_inert_now and (self._awaits_closure or self._is_inert)
            self._awaits_closure = False
            if is_inert_now:
                self._remember()
            # Of an objective that nobody has differentiated the optimizer takes the gradient itself, or needs none.
            is_open = isinstance(objective, Tensor) and (objective.requires_grad or not torch.is_grad_enabled())
            if is_open and not self._is_open:
                self._is_open = all(p.grad is None for group in optimizer.param_groups for p in group["params"])
            if self._mode == "prox":
                self._used = self._in_step()
            elif is_open and self._is_open:
                return with_penalty(objective, self._part.objective())
            elif not is_inert_now:
                return with_penalty(objective, self._accumulate(optimizer))
            return objective

        return penalized

    def _in_step(self) -> list[bool] | None:
        if self._include_unused:
            return None
        return [p.grad is not None and p.requires_grad for p in self._part.params]

    def _remember(self) -> None:
        """The penalty before what may be no step. Afterwards it tells."""
        if self._before_inert is None and not self._is_captured():
            self._before_inert = self._penalty()

    def _is_none(self, optimizer: Optimizer) -> bool:
        """Whether an inert step was none indeed: the weights are as before, or the penalty could not enter."""
        before = self._before_inert
        if before is None or not ((now := self._penalty()) < before or before < now):
            return True
        if not self._is_open:
            self.warn_once(
                "no gradient",
                f"attach: a step of {type(optimizer).__name__} changed parameters that have no gradient in .grad, "
                "where the penalty enters, and had no penalty; add regularizer() to the loss instead",
            )
        self._used = None
        return not self._is_open

    def _penalty(self) -> Tensor:
        with torch.no_grad():
            return self._part.penalty()

    def _accumulate(self, optimizer: Optimizer) -> Tensor:
        """The gradient; returns what belongs to the objective: the penalty, negative where that is maximized."""
        scale = optimizer.__dict__.get("grad_scale")  # GradScaler leaves scaled gradients to fused optimizers
        value, objective = self._part.accumulate_grad_(scale, skip_missing=not self._include_unused)
        found_inf = found_infinity(optimizer)
        if found_inf is not None and self._value is not None:  # a step that will be skipped leaves the last value
            value = torch.where(found_inf.to(value.device) == 0, value, self._value)
        self._value = value
        self._nesting.added(self._part.params)
        return objective

    def _check(self) -> None:
        """At a step, because another optimizer may be attached before the first."""
        self._end_watch()
        if not self._is_checked or any(p.requires_grad for p in self._frozen):
            self._is_checked = True
            self._frozen = self._all.warn_of_missing(self._table)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_dynamo_compiling():
            _outside_of_graphs[1](self, optimizer, args, kwargs)
            return
        depth, levels = self._nesting.leave(optimizer, _outside_of_graphs[1]), self._nesting.levels
        if depth == levels:
            self._is_taken |= self._has_stepped(optimizer)
        if depth > 1:
            return
        if not self._is_taken and self._nesting.has_missed(self._part.params):
            self._is_taken = True
            self._used = self._in_step()
            if self._mode == "grad":
                self.warn_once(
                    "base class",
                    f"attach: a step of {type(optimizer).__name__} changed {self.entries[0].name!r} without the step "
                    "of its base class, in which the penalty enters, and so without it; call accumulate_grad_() before "
                    "such a step",
                )
        if not self._is_taken:
            return
        found_inf = found_infinity(optimizer)
        if self._mode == "prox":
            self._shrinking.prox_(self._steps(optimizer, found_inf), self._used)
        if self._all.is_first(self) and not self._is_captured():  # several optimizers count once
            self._table.count(found_inf)

    def _has_stepped(self, optimizer: Optimizer) -> bool:
        """Whether the step that ends was one."""
        if self._mode == "grad" and self._awaits_closure and not self._is_inert:
            self.warn_once(
                "closure",
                f"attach: a step of {type(optimizer).__name__} did not call its closure, and had no penalty, which "
                "follows the closure; call step() without one",
            )
        if self._is_inert and self._is_none(optimizer):
            return False
        if self._is_open and self._mode == "grad":
            self._value = self._before_inert
        return True

    def _is_captured(self) -> bool:
        """In a CUDA graph, which would fill in this step's strengths at every replay. The user advances after each."""
        return self._part.params[0].is_cuda and torch.cuda.is_current_stream_capturing()

    def _steps(self, optimizer: Optimizer, found_inf: Tensor | None) -> float | Tensor | list[float | Tensor]:
        """The learning rate, or one for each entry; 0 where a fused optimizer has skipped its step, which the host does
        not know."""
        rates = [rate_of(optimizer.param_groups[i]) for i in self._groups]
        if found_inf is not None:
            taken = (found_inf == 0).double()
            rates = [taken * rate for rate in rates]
        if len({identity(rate) for rate in rates}) == 1:
            return rates[0]
        of_group = dict(zip(self._groups, rates, strict=True))
        return [of_group[i] for i in self._group_of]

    def _follow(self, optimizer: Optimizer) -> None:
        """Finds the regularizer's parameters among the optimizer's, which may have changed since, as strengths may."""
        self._table.follow()
        options: list[Any] = [self._table.version]
        params: list[Tensor] = []
        for group in optimizer.param_groups:
            options += group.get("maximize"), group.get("weight_decay"), len(group["params"])
            params += group["params"]
        if options == self._options and all(map(is_, params, self._seen)):
            return
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        entries = [e for e in self._table.entries if id(e.param) in group_of]
        if not entries:
            raise ValueError("attach: optimizer must hold a parameter of the regularizer, got one that holds none")
        elsewhere = self._all.handled(but=self) if self._hooks else set()  # one that begins takes them over
        for entry in entries:
            if id(entry.param) in elsewhere:
                raise ValueError(
                    f"attach: a parameter must be handled once, but another attachment handles {entry.name!r} already"
                )
            for kind, tensor in zip(KINDS, map(tensor_of, entry.strengths), strict=True):
                if tensor is not None and tensor.requires_grad:
                    raise ValueError(
                        f"attach: {kind} of {entry.name!r} must be a constant, got a tensor that requires grad, and an "
                        "attached penalty gives it none; add regularizer() to the loss"
                    )
        self._group_of = [group_of[id(e.param)] for e in entries]
        self._groups = sorted(set(self._group_of))
        if self._mode == "prox":
            self._part, self._shrinking = Part(self._table, entries), Part(self._table, entries)
        else:
            maximized = [bool(group.get("maximize")) for group in optimizer.param_groups]
            self._part = Part(self._table, entries, [maximized[i] for i in self._group_of])
        self._options, self._seen, self._is_checked = options, params, False
        if self._hooks:
            self._all.register(self)
        self._warn_of_weight_decay(optimizer, entries)

    def warn_once(self, about: str, message: str) -> None:
        if about not in self._said:
            self._said.add(about)
            warn(message)

    def _end_watch(self) -> None:
        while self._watches:
            self._watches.pop().hook.remove()

    def _warn_of_weight_decay(self, optimizer: Optimizer, entries: list[Entry]) -> None:
        for entry, i in zip(entries, self._group_of, strict=True):
            decay = optimizer.param_groups[i].get("weight_decay", 0)
            if decay is None or isinstance(decay, Tensor) or not decay > 0 or is_absent(entry.l2):
                continue
            self.warn_once(
                "decay",
                f"attach: L2 counts twice for {entry.name!r}: l2 of the regularizer, and weight_decay={decay} in "
                f"the optimizer's group {i}; set one of them to 0",
            )
