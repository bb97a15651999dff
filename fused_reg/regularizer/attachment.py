"""A `Regularizer` in an optimizer's step hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer

from fused_reg import _devices
from fused_reg._partitioned import check_whole
from fused_reg._warnings import warn
from fused_reg.regularizer import strays
from fused_reg.regularizer.calls import Part
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.lasting import check_lasting
from fused_reg.regularizer.nesting import Nesting
from fused_reg.regularizer.repeats import Repeat
from fused_reg.regularizer.share import Share
from fused_reg.regularizer.steps import Closure, closure_of, exchanged, found_infinity, is_inert, with_penalty
from fused_reg.regularizer.table import Table

if TYPE_CHECKING:
    from fused_reg.regularizer.attachments import Attachments

#: The gradient before the step, or the proximal step after it: with the learning rate, or with that of each element.
Mode = Literal["grad", "prox", "preconditioned"]
#: What the modes are as the option of an optimizer of ours.
_PROX = {"grad": False, "prox": True, "preconditioned": "preconditioned"}
_MUST_RIDE = (
    'attach: mode "preconditioned" must be the only penalty in the pass of an optimizer of fused_reg.optim: l1 and l2 '
    "of its own must be 0, the step must be its own, and with include_unused=True all parameters must have a gradient"
)
#: The two hooks as a compiled step calls them: as they are. Decorators would make the package's import take twice as
#: long, and each step longer.
_outside_of_graphs: list[Any] = []
_requires_grad = attrgetter("requires_grad")


class Attachment:
    """What :meth:`.Regularizer.attach` returns; :meth:`remove` detaches, as does leaving a ``with`` block.

    The optimizer's hooks keep it alive. It keeps no optimizer alive. A copy of it is detached.
    """

    def __init__(
        self,
        table: Table,
        all_of_them: Attachments,
        optimizer: Optimizer,
        mode: Mode,
        include_unused: bool,
        lazy_rows: bool,
    ) -> None:
        self._table = table
        self._all = all_of_them
        self._optimizer: weakref.ref[Optimizer] | None = weakref.ref(optimizer)
        self._mode = mode
        self._include_unused = include_unused
        self._lazy_rows = lazy_rows
        self._rows: dict[int, Tensor] = {}  # in the place of parameters with sparse gradients, in this step
        self._hooks: list[Any] = []
        self._frozen: list[Tensor] | None = None  # what no optimizer holds, and may train later; None: not looked yet
        self._taken_over = ""  # the name of a parameter that a later attachment handles
        self.entered = 0  # steps, as `strays` counts them
        self._is_taken = False  # the step, by itself or by one within it
        self._is_inert = False
        self._awaits_closure = False
        self._is_open = False  # an optimizer without gradients in .grad has the objective
        self._before_inert: Tensor | None = None  # the penalty
        self._used: list[bool] | None = None  # by which parameters a proximal step takes; None: all
        self._value: Any = None  # a tensor, or what has one by `total`
        self._has_ridden = False  # whether the optimizer has taken the penalty into its own pass
        self._rest: tuple[list[Tensor], Part | None] = [], None  # what has no gradient, in the last such pass
        self._last: Repeat | None = None  # how the last step was, if that was a simple one
        self._said: set[str] = set()
        self.handler = strays.Handler(weakref.ref(self))
        self._share = Share(table, mode)
        self._follow(optimizer)
        if mode != "grad":
            self._share.check_rates(optimizer)
            check_lasting(optimizer, self._share.params)
        if mode == "preconditioned" and not getattr(optimizer, "can_host", bool)():
            raise ValueError(_MUST_RIDE)
        self._nesting = Nesting(optimizer)
        if not _outside_of_graphs:
            _outside_of_graphs.extend(map(torch.compiler.disable, (Attachment._before, Attachment._after)))
        self._hooks += [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        watched = [e for e in self.entries if e.param.requires_grad and e.param.is_leaf]
        self._watches = [strays.Watch(entry, self) for entry in watched]
        if (add := getattr(optimizer, "add_attached", None)) is not None:
            add(self)

    @property
    def value(self) -> Tensor:
        """The penalty of the parameters that the optimizer holds, 0-dim, on their device, without a graph or a
        synchronization. With mode "grad" that of the last step, before it changed them (with a closure: of its last
        evaluation; with ``lazy_rows`` of the rows that the batch had). With mode "prox", which needs no value for its
        step, and before the first step, the penalty now: each look is a pass over the parameters. In the pass of an
        optimizer of :mod:`fused_reg.optim`: in every mode before the step; of DTensors it is reduced when it is looked
        at, and every process must look."""
        if self._value is None:
            if (optimizer := self.optimizer) is not None and self.is_active:
                self._follow(optimizer)
            return self._share.penalty()
        value: Tensor = self._value if isinstance(self._value, Tensor) else self._value.total()
        return value

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

    @property
    def entries(self) -> list[Entry]:
        """What it handles."""
        return self._share.entries

    def check_aimed(self, function: str, entries: Sequence[Entry]) -> None:
        """Raises where it handles some of these, which have zeros or shall have, and its mode has none."""
        own = {id(entry.param) for entry in self.entries}
        self._share.check_aimed(function, [entry for entry in entries if id(entry.param) in own])

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

    def _end_watch(self) -> None:
        while self._watches:
            self._watches.pop().hook.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        gone = dict.fromkeys(("_optimizer", "_all", "_nesting", "handler"))
        value = None if self._value is None else self.value
        return {**vars(self), **gone, "_hooks": [], "_watches": [], "_value": value, "_rest": ([], None), "_last": None}

    def __repr__(self) -> str:
        optimizer = self.optimizer
        state = "active" if self.is_active else "taken over" if self._taken_over else "detached"
        count = len(self.entries)
        return (
            f"Attachment({self._mode!r}, {'no optimizer' if optimizer is None else type(optimizer).__name__}, "
            f"{count} parameter{'s' * (count != 1)}, {state})"
        )

    def warn_once(self, about: str, message: str) -> None:
        if about not in self._said:
            self._said.add(about)
            warn(message)

    def look_within(self, other: Optimizer) -> None:
        """At the first step of another optimizer that holds the same parameters, within a step of this one."""
        first = next((e for e in self.entries if e.param.grad is not None), None)
        is_held = first is not None and any(p is first.param for group in other.param_groups for p in group["params"])
        if is_held and self._nesting.has_lost(self._share.params):
            self.warn_once(
                "lost",
                f"attach: a step of {type(self.optimizer).__name__} changes gradients after the penalty has entered "
                f"and before {type(other).__name__} within it steps; attach to each optimizer that it holds instead",
            )

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_dynamo_compiling():
            return _outside_of_graphs[0](self, optimizer, args, kwargs)
        closure = closure_of(args, kwargs) if kwargs or len(args) > 1 else None
        depth = self._nesting.enter(optimizer, _outside_of_graphs[0], self._share.params)
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
        self._has_ridden = self._is_open = self._is_inert = False
        self._before_inert = None
        self._awaits_closure = closure is not None
        last, self._last = self._last, None
        if last is not None and closure is None and self._repeats(last, optimizer):
            return None
        self._follow(optimizer)
        if self._mode != "grad":
            self._share.check_rates(optimizer)
            self._table.check_aims()
            self._share.check_fits()
            if closure is None:
                self._use()
        self._is_inert = is_inert(optimizer)
        if closure is None and self._is_inert:
            self._remember()
            return None
        # At a step, because another optimizer may be attached before the first.
        if self._frozen is None or any(map(_requires_grad, self._frozen)):
            self._end_watch()
            self._frozen = self._all.warn_of_missing(self._table)
        if closure is not None:
            return exchanged(args, kwargs, closure, self._penalized(closure, optimizer))
        rides = self._rides(optimizer)
        is_first = depth == 1 or not self._nesting.has_penalty(self._share.params)
        if self._mode == "grad" and not rides and is_first:
            self._accumulate(optimizer)
            if depth == 1 and not self._include_unused and not self._rows:
                self._last = Repeat(self._share, optimizer)
        return None

    def _repeats(self, last: Repeat, optimizer: Optimizer) -> bool:
        """Whether the step that begins has its penalty by now, as the last one had."""
        if any(map(_requires_grad, self._frozen or ())) or (value := last.run(optimizer, self._follow)) is None:
            return False
        self._value, self._last = value, last
        self._nesting.added(self._share.params)
        return True

    def _rides(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer of ours takes the penalty into the pass of the step that begins."""
        host = getattr(optimizer, "host", None)
        has_all = not self._include_unused or all(p.grad is not None for p in self._share.params)
        is_taken = False
        if host is not None and has_all:
            check_whole("Regularizer", self._share.params, [entry.name for entry in self.entries])
            self._share.part.check()
            is_taken = bool(host(self._share.guest(self, _PROX[self._mode])))
        if self._mode == "preconditioned" and not is_taken:
            raise ValueError(_MUST_RIDE)
        return is_taken

    def has_ridden(self, penalty: Any) -> None:
        """The penalty before the step; None if that was none."""
        self._has_ridden = True
        if penalty is not None:
            self._value = penalty

    def rest_of(self, params: list[Tensor]) -> list[Callable[[], Tensor]]:
        """The penalty, as of now, of those of these parameters that have one; they are the same list at every step."""
        if self._rest[0] is not params:
            self._rest = params, self._share.rest(params)
        if (part := self._rest[1]) is None:
            return []
        with torch.no_grad():
            value = part.penalty()
        return [lambda: value]

    def step_in_turn(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        """The same where the kernels take no step."""
        if self._mode == "preconditioned":
            raise NotImplementedError('attach: mode "preconditioned" must have parameters that the kernels take')
        if self._mode == "grad":
            self._accumulate(optimizer)
        else:
            with torch.no_grad():
                self._value = self._share.part_of(self._rows).penalty()
        step()
        if self._mode != "grad":
            self._shrink(optimizer)
        self._has_ridden = True

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
            if self._mode != "grad":
                self._use()
                if not is_inert_now:
                    self._rides(optimizer)
            elif is_open and self._is_open:
                return with_penalty(objective, self._share.part.objective())
            elif not is_inert_now:
                return with_penalty(objective, self._accumulate(optimizer))
            return objective

        return penalized

    def _follow(self, optimizer: Optimizer) -> None:
        if not self._share.has_changed(optimizer):
            return
        if self._hooks:
            self._share.read(optimizer, self._all.handled(but=self))
            strays.handle(self, self._all)
        else:  # it begins, and takes over what others handle
            self._share.read(optimizer, ())
        self._frozen = None
        for entry, i in zip(self.entries, self._share.group_of, strict=True):
            decay = optimizer.param_groups[i].get("weight_decay", 0)
            has_both = decay is not None and not isinstance(decay, Tensor) and decay > 0 and entry.has("l2")
            if has_both and entry.toward is None:
                self.warn_once(
                    "decay",
                    f"attach: L2 counts twice for {entry.name!r}: l2 of the regularizer, and weight_decay={decay} in "
                    f"the optimizer's group {i}; set one of them to 0",
                )

    def _use(self) -> None:
        self._used = None if self._include_unused else self._share.in_step()
        self._rows = self._share.touched() if self._lazy_rows else {}

    def _remember(self) -> None:
        """The penalty before what may be no step. Afterwards it tells."""
        if self._before_inert is None and not _devices.is_captured(self._share.params[0]):
            self._before_inert = self._share.penalty()

    def _accumulate(self, optimizer: Optimizer) -> Tensor:
        """The gradient; returns what belongs to the objective: the penalty, negative where that is maximized."""
        scale = optimizer.__dict__.get("grad_scale")  # GradScaler leaves scaled gradients to fused optimizers
        self._rows = self._share.touched() if self._lazy_rows else {}
        value, objective = self._share.accumulate_grad_(self._rows, scale, skip_missing=not self._include_unused)
        found_inf = found_infinity(optimizer)
        if found_inf is not None and self._value is not None:  # a step that will be skipped leaves the last value
            value = torch.where(found_inf.to(value.device) == 0, value, self.value)
        self._value = value
        self._nesting.added(self._share.params)
        return objective

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_dynamo_compiling():
            _outside_of_graphs[1](self, optimizer, args, kwargs)
            return
        depth, levels = self._nesting.leave(optimizer, _outside_of_graphs[1]), self._nesting.levels
        if depth == levels:
            self._is_taken |= self._has_stepped(optimizer)
        if depth > 1:
            return
        if not self._is_taken:
            if not self._nesting.has_missed(self._share.params):
                return
            self._use()
            if self._mode == "grad":
                self.warn_once(
                    "base class",
                    f"attach: a step of {type(optimizer).__name__} changed {self.entries[0].name!r} without the step "
                    "of its base class, in which the penalty enters, and so without it; call accumulate_grad_() before "
                    "such a step",
                )
        found_inf = found_infinity(optimizer)
        if self._mode != "grad":
            if not self._has_ridden:
                self._shrink(optimizer)
            self._share.project_(self._used, found_inf)
        # Several optimizers count once; a graph would repeat one step's numbers, and its user counts.
        if self._all.is_first(self) and not _devices.is_captured(self._share.params[0]):
            self._table.count(found_inf)

    def _shrink(self, optimizer: Optimizer) -> None:
        self._share.prox_(self._rows, self._share.rates(optimizer, found_infinity(optimizer)), self._used)

    def _has_stepped(self, optimizer: Optimizer) -> bool:
        """Whether the step that ends was one."""
        if self._awaits_closure and not self._is_inert:
            self._use()
            if self._mode == "grad":
                self.warn_once(
                    "closure",
                    f"attach: a step of {type(optimizer).__name__} did not call its closure, and had no penalty, which "
                    "follows the closure; call step() without one",
                )
        if self._is_inert:  # and none indeed, if the weights are as before, or the penalty could not enter
            before = self._before_inert
            if before is None or not ((now := self._share.penalty()) < before or before < now):
                return False
            self._used = None
            if not self._is_open:
                self.warn_once(
                    "no gradient",
                    f"attach: a step of {type(optimizer).__name__} changed parameters that have no gradient in .grad, "
                    "where the penalty enters, and had no penalty; add regularizer() to the loss instead",
                )
                return False
        if self._is_open and self._mode == "grad":
            self._value = self._before_inert
        return True
