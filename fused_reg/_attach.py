"""A `Regularizer` in an optimizer's step hooks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from itertools import compress
from types import CodeType, TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_reg import _strays
from fused_reg._nesting import Nesting
from fused_reg._parts import Part
from fused_reg._steps import found_infinity, has_closure, is_inert
from fused_reg._strengths import KINDS, identity, is_absent, tensor_of
from fused_reg._table import Entry, Table
from fused_reg._watch import Watch

if TYPE_CHECKING:
    from fused_reg._attachments import Attachments

#: The gradient before the step, or the proximal step after it.
Mode = Literal["grad", "prox"]


class Attachment:
    """What :meth:`.Regularizer.attach` returns; :meth:`remove` detaches, as does leaving a ``with`` block.

    The optimizer's hooks keep it alive. It keeps no optimizer alive. A copy of it is detached.
    """

    def __init__(self, table: Table, all_of_them: Attachments, optimizer: Optimizer, mode: Mode) -> None:
        self._table = table
        self._all = all_of_them
        self._optimizer: weakref.ref[Optimizer] | None = weakref.ref(optimizer)
        self._mode = mode
        self._hooks: list[Any] = []
        self._seen: tuple[Any, ...] = ()  # what `_follow` found when it last looked
        self._is_checked = False  # what it found then, by `warn_of_missing`
        self._taken_over = ""  # the name of a parameter that a later attachment handles
        self.entered = 0  # steps, as `_strays` counts them
        self._is_inert = False
        self._is_taken = False  # the step, by itself or by one within it
        self._parts: list[tuple[float, Part]] = []  # with the sign of the gradient
        self._group_of: list[int] = []  # the optimizer's, for each entry
        self._groups: list[int] = []
        self._value: Tensor | None = None
        self._warned = False
        self._follow(optimizer)
        self._nesting = Nesting(optimizer)
        # A compiled step calls them as they are. A decorator would make the package's import take twice as long.
        outside_of_graphs: Any = torch.compiler.disable
        before, after = outside_of_graphs(self._before), outside_of_graphs(self._after)
        self._codes: tuple[CodeType, CodeType] = before.__code__, after.__code__
        self._hooks += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        self._watch = Watch(self)

    @property
    def value(self) -> Tensor | None:
        """The penalty of the parameters that the optimizer holds, 0-dim, on their device, without a graph or a
        synchronization. With mode "grad" that of the last step, before it changed them (None before the first step;
        with a closure: of its last evaluation). With mode "prox" the penalty now: each look is a pass over the
        parameters, because the proximal step itself needs no value."""
        if self._mode == "grad":
            return self._value
        with torch.no_grad():
            return self._parts[0][1].penalty()

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer; None when it is gone, and for a copy."""
        return None if self._optimizer is None else self._optimizer()

    @property
    def is_active(self) -> bool:
        """Whether the hooks are still there, and no later attachment has taken a parameter over."""
        return bool(self._hooks) and self.optimizer is not None and not self._taken_over

    @property
    def is_stepping(self) -> bool:
        """Whether a step of the optimizer runs."""
        return self._nesting.depth > 0

    def remove(self) -> None:
        """Takes the hooks away. A second call does nothing."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._watch.end()
            _strays.forget(weakref.ref(self))

    def end(self, name: str) -> None:
        """Another attachment has taken this parameter over. A step of this one is an error from now on."""
        self._taken_over = name
        self._watch.end()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        gone = dict.fromkeys(("_codes", "_optimizer", "_all", "_nesting", "_watch"))
        return {**vars(self), **gone, "_hooks": [], "_seen": ()}

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
        return [entry for _, part in self._parts for entry in part.entries]

    def _params(self) -> Iterator[Tensor]:
        return (entry.param for _, part in self._parts for entry in part.entries)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        depth = self._nesting.enter(optimizer, self._codes[0], self._params)
        if depth == 1:
            self._is_taken = False
            if self._taken_over and (has_closure(args, kwargs) or not is_inert(optimizer)):
                raise ValueError(
                    f"attach: {self._taken_over!r} must be stepped by the optimizer that was attached last, but an "
                    f"earlier {type(optimizer).__name__} steps; attach it again, or call remove() of its attachment"
                )
        if depth != self._nesting.levels:
            return None
        self.entered += 1
        self._is_inert = is_inert(optimizer)
        self._follow(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            if not self._is_inert:
                self._check()
                if self._mode == "grad" and not self._nesting.has_penalty(self._params):
                    self._accumulate(optimizer)
            return None
        self._check()
        is_first = True

        def with_penalty() -> Any:
            """The step is inert if it is after each evaluation."""
            nonlocal is_first
            loss = closure()
            self._follow(optimizer)
            now = is_inert(optimizer)
            self._is_inert, is_first = now and (is_first or self._is_inert), False
            if self._mode == "prox" or now:
                return loss
            penalty = self._accumulate(optimizer)
            return None if loss is None else loss + penalty.to(loss.device if isinstance(loss, Tensor) else "cpu")

        if len(args) > 1:
            return (args[0], with_penalty, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_penalty}

    def _accumulate(self, optimizer: Optimizer) -> Tensor:
        """The gradient; returns what belongs to the objective: the penalty, negative where that is maximized."""
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler leaves scaled gradients to fused optimizers
        scale = 1.0 if scale is None else scale
        (sign, part), *more = self._parts
        if sign == 1 and not more:
            objective = value = part.accumulate_grad_(scale)
        else:
            for _, part in self._parts:
                part.check_accumulation(scale)
            values = [part.accumulate_grad_(sign * scale) for sign, part in self._parts]
            value = sum(values[1:], values[0])
            objective = sign * values[0] + sum(sign * v for (sign, _), v in zip(more, values[1:], strict=True))
        found_inf = found_infinity(optimizer)
        if found_inf is not None and self._value is not None:  # a step that will be skipped leaves the last value
            value = torch.where(found_inf.to(value.device) == 0, value, self._value)
        self._value = value
        self._nesting.added(self._params)
        return objective

    def _check(self) -> None:
        """At a step, because another optimizer may be attached before the first."""
        self._watch.end()
        if not self._is_checked:
            self._is_checked = True
            self._all.warn_of_missing(self._table)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        depth, levels = self._nesting.leave(optimizer, self._codes[1]), self._nesting.levels
        self._is_taken |= depth == levels and not self._is_inert
        if depth > 1:
            return
        if not self._is_taken and self._nesting.has_missed(self._params):
            self._is_taken = True
            if self._mode == "grad":
                self._warn_of_missed_step(optimizer)
        if not self._is_taken:
            return
        if self._mode == "prox":
            self._parts[0][1].prox_(self._steps(optimizer))
        if next(iter(self._all), None) is self and not self._is_captured():  # several optimizers count once
            self._table.count(found_infinity(optimizer))

    def _is_captured(self) -> bool:
        """In a CUDA graph, which would fill in this step's strengths at every replay. The user advances after each."""
        return self._parts[0][1].entries[0].param.is_cuda and torch.cuda.is_current_stream_capturing()

    def _steps(self, optimizer: Optimizer) -> float | Tensor | list[float | Tensor]:
        """The learning rate, or one for each entry; 0 where a fused optimizer has skipped its step, which the host does
        not know."""
        given = [group["lr"] for group in optimizer.param_groups]
        rates = [rate.reshape(()) if isinstance(rate, Tensor) else float(rate) for rate in given]
        found_inf = found_infinity(optimizer)
        if found_inf is not None:
            taken = (found_inf == 0).double()
            rates = [taken * rate for rate in rates]
        first = rates[self._group_of[0]]
        if all(identity(rates[i]) == identity(first) for i in self._groups):
            return first
        return [rates[i] for i in self._group_of]

    def _follow(self, optimizer: Optimizer) -> None:
        """Finds the regularizer's parameters among the optimizer's, which may have changed since, as strengths may."""
        seen = (
            self._table.version,
            [
                (group.get("maximize", False), group.get("weight_decay"), *map(id, group["params"]))
                for group in optimizer.param_groups
            ],
        )
        if seen == self._seen:
            return
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        entries = [e for e in self._table.entries if id(e.param) in group_of]
        if not entries:
            raise ValueError("attach: optimizer must hold a parameter of the regularizer, got one that holds none")
        elsewhere = self._all.handled(but=self) if self._hooks else {}  # an attachment that begins takes them over
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
        if self._mode == "prox":
            for i in {group_of[id(e.param)] for e in entries}:
                if not isinstance(rate := optimizer.param_groups[i].get("lr"), float | int | Tensor):
                    raise ValueError(f'attach: mode "prox" must find a learning rate in each group, got lr={rate!r}')
        maximized = [bool(group.get("maximize")) for group in optimizer.param_groups]
        self._parts = self._split(entries, [maximized[group_of[id(e.param)]] for e in entries])
        self._group_of = [group_of[id(e.param)] for e in entries]
        self._groups = sorted(set(self._group_of))
        self._seen, self._is_checked = seen, False
        if self._hooks:
            self._all.register(self)
        self._warn_of_weight_decay(optimizer, entries)

    def _split(self, entries: list[Entry], maximized: list[bool]) -> list[tuple[float, Part]]:
        """A gradient that the optimizer will negate (``maximize=True``) is subtracted: a penalty always shrinks."""
        if self._mode == "prox" or not any(maximized):
            return [(1.0, Part(self._table, entries))]
        signed = [(1.0, [not m for m in maximized]), (-1.0, maximized)]
        return [(sign, Part(self._table, list(compress(entries, chosen)))) for sign, chosen in signed if any(chosen)]

    def _warn_of_missed_step(self, optimizer: Optimizer) -> None:
        warnings.warn(
            f"attach: a step of {type(optimizer).__name__} changed {self.entries[0].name!r} without the step of its "
            "base class, in which the penalty enters, and so without it; call accumulate_grad_() before such a step",
            UserWarning,
            stacklevel=5,
        )

    def _warn_of_weight_decay(self, optimizer: Optimizer, entries: list[Entry]) -> None:
        for entry, i in zip(entries, self._group_of, strict=True):
            decay = optimizer.param_groups[i].get("weight_decay", 0)
            if not self._warned and decay is not None and not isinstance(decay, Tensor) and decay > 0:
                if is_absent(entry.l2):
                    continue
                self._warned = True
                warnings.warn(
                    f"attach: L2 counts twice for {entry.name!r}: l2 of the regularizer, and weight_decay={decay} in "
                    f"the optimizer's group {i}; set one of them to 0",
                    UserWarning,
                    stacklevel=6,
                )
