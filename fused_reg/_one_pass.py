"""What the optimizers of `fused_reg.optim` have in common."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fused_reg import _devices
from fused_reg._arguments import value_dtype
from fused_reg._references import Tensors
from fused_reg._step_in_turn import InTurn
from fused_reg._step_penalty import Penalty, now, penalties_of
from fused_reg._step_plans import Formula, Plans, Prox, check_options, has_penalty
from fused_reg._step_references import REFERENCES, Toward, in_one_group, penalized, read_references
from fused_reg._warnings import warn
from fused_reg.distributed.collectives import total
from fused_reg.regularizer.share import Guest
from fused_reg.regularizer.steps import is_inert

_OWN: dict[str, Any] = {
    "l1": 0.0,
    "l2": 0.0,
    "prox": False,
    "toward": None,
    "importance": None,
    "lazy_rows": False,
}
_outside_of_graphs: list[Any] = []

_ARGUMENTS = """
    Args:
        params: as of torch's class; so are the arguments that follow.
        l1: the strength of ``sum |w|``, a finite float >= 0, or a 0-dim tensor on the CPU or on the parameters' device,
            whose value each step reads; taken as a constant. An option of a parameter group, as ``weight_decay`` is.
        l2: the strength of ``sum w ** 2``, likewise; ``weight_decay=wd`` coupled to the gradient is ``l2=wd / 2``.
        prox: ``False``: the gradient of the penalty is added to the loss's, as if the loss contained it. ``True``: its
            proximal operator with the learning rate follows the step, which makes weights exactly zero.
            ``"preconditioned"``: with the rate of each element, so that training comes to rest at the minimum of loss
            and penalty. See :doc:`/guides/weight_decay`. An option of a group, too.
        toward: reference weights, a tensor for each of ``params``, of its shape: the penalty is of ``w - toward``; or
            ``"start"``, copies of the weights as they are now. Lists are options of a group where there are several.
            They are kept as tuples and not copied, unless their parameters are converted, constants, and a part of the
            state dict: with ``"start"`` a training goes on toward the weights of its beginning. See
            :doc:`/guides/reference_weights`.
        importance: factors of the strengths by element, or by row as ``(rows, 1)``, likewise; finite and >= 0.
        lazy_rows: whether a parameter with a sparse gradient (``Embedding(sparse=True)``) has the penalty of the rows
            that the batch has touched alone, each once; ``penalty`` counts these rows then. Such a gradient is an error
            otherwise. Of :class:`SGD` and :class:`Adagrad`, whose classes of torch take sparse gradients. Such a step
            is not one pass: torch's own is taken, behind the penalty's gradient or before its proximal step.

    What has no gradient is left alone, as by ``weight_decay``, and counts in ``penalty``. With ``maximize=True`` the
    penalty shrinks weights all the same. State dicts load into torch's class and from it.

    Raises:
        TypeError: ``l1`` or ``l2`` is no number; at a step with a penalty, a parameter is complex, or a gradient sparse
            without ``lazy_rows``.
        ValueError: a strength is negative or not finite, ``prox`` is something else; ``differentiable=True``; a
            reference is not of its parameter's shape, dtype and device; ``lazy_rows`` of another class; at a step with
            a penalty, a parameter is a placeholder (DeepSpeed ZeRO-3) or a piece (FSDP1).
        NotImplementedError: at a step, ``prox="preconditioned"`` where the kernels do not take the parameters (of
            a tensor subclass). There the penalty, torch's own step and the proximal step are taken in turn.

    Warns:
        UserWarning: references are given without a strength.
    """


def _calls_hooks(function: Any) -> Any:
    """What torch makes of a step: it calls the hooks, and has a name in profiles. Where there is nothing to call, it
    takes no time."""
    with_hooks = Optimizer.profile_hook_step(function)

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            if not _outside_of_graphs:
                outside = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
                _outside_of_graphs.append(outside)  # torch 2.10 warns of a method that waits for what breaks the graph
            return _outside_of_graphs[0](self, *args, **kwargs)
        self.__dict__.pop("_guest", None)  # of a step that was interrupted
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiler._is_profiler_enabled
        ):
            return with_hooks(self, *args, **kwargs)
        return function(self, *args, **kwargs)

    hooked: Any = call
    hooked.hooked = True
    return hooked


def _without_hooks(function: Any) -> Any:
    while getattr(function, "hooked", False):
        function = function.__wrapped__
    return function


class OnePass(Optimizer):
    """What the five have in common. Each is of this class and of torch's."""

    _pass: ClassVar[int]  # in the order of csrc/passes/step.h
    _makes_states: ClassVar[bool] = True  # torch's class, before a step; else the step itself does
    _takes_sparse: ClassVar[bool] = False  # gradients, as torch's class
    _step_of_torch: ClassVar[Callable[[Any], Any]]  # without hooks, which run in ours
    _given: Mapping[str, Any] = _OWN
    _last: Penalty | None = None  # before the last step, unless that is somebody else's
    _attached: Sequence[Any] = ()  # weak references to attachments
    _plans: Plans

    if TYPE_CHECKING:  # torch's arguments, and ours, which `__init_subclass__` puts behind them

        def __init__(
            self,
            *args: Any,
            l1: float | Tensor = 0.0,
            l2: float | Tensor = 0.0,
            prox: Prox = False,
            toward: Toward | None = None,
            importance: Tensors | None = None,
            lazy_rows: bool = False,
            **kwargs: Any,
        ) -> None: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_pass" not in vars(cls):
            return
        base: Any = next(c for c in cls.__mro__ if c.__module__.startswith("torch.optim."))
        cls._step_of_torch = _without_hooks(next(vars(c)["step"] for c in base.__mro__ if "step" in vars(c)))
        if cls.__doc__:  # python -OO has none
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\n{inspect.cleandoc(_ARGUMENTS)}"

        def init(
            self: Any,
            *args: Any,
            l1: float | Tensor = 0.0,
            l2: float | Tensor = 0.0,
            prox: Prox = False,
            toward: Toward | None = None,
            importance: Tensors | None = None,
            lazy_rows: bool = False,
            **kwargs: Any,
        ) -> None:
            lists = {"toward": toward, "importance": importance}
            if args:
                args = in_one_group(f"{cls.__name__}: ", args[0], lists), *args[1:]
            elif "params" in kwargs:
                kwargs["params"] = in_one_group(f"{cls.__name__}: ", kwargs["params"], lists)
            words = {name: x if isinstance(x, str) else None for name, x in lists.items()}  # for later groups, too
            own = {"l1": l1, "l2": l2, "prox": prox, **words, "lazy_rows": lazy_rows}
            self._given = own
            base.__init__(self, *args, **kwargs)
            self.defaults.update(own)
            without = next((name for name in REFERENCES for g in self.param_groups if g[name] is not None), None)
            if without is not None and not self._has_own():
                warn(f"{cls.__name__}: {without} has no effect as long as l1 and l2 are 0 in every group; give one")

        written, own = (inspect.signature(f).parameters.values() for f in (base.__init__, init))
        more = [p for p in own if p.name in _OWN]
        function: Any = init
        function.__signature__ = inspect.Signature([*written, *more], return_annotation=None)
        function.__name__, function.__qualname__ = "__init__", f"{cls.__qualname__}.__init__"
        cls.__init__ = function  # type: ignore[method-assign]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of torch; what this class adds are options of a group."""
        if isinstance(param_group, dict):
            for key, value in self._given.items():
                param_group.setdefault(key, self.defaults.get(key, value))
        super().add_param_group(param_group)
        try:
            self._check(f"{type(self).__name__}: ", param_group)
        except Exception:
            self.param_groups.pop()
            raise
        self._plans = Plans()

    def _check(self, where: str, group: dict[str, Any]) -> None:
        check_options(where, group)
        if group["lazy_rows"] and not self._takes_sparse:
            raise ValueError(
                f"{where}lazy_rows must be False, because torch's {type(self).__name__} takes no sparse gradients; "
                "attach a Regularizer to SparseAdam"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what `load_state_dict` ends with. What torch's class has saved leaves our options as they are."""
        before = vars(self).get("param_groups") or repeat(state.get("defaults", _OWN))
        for i, (group, old) in enumerate(zip(state["param_groups"], before, strict=False)):
            for key, value in _OWN.items():
                group.setdefault(key, old.get(key, value))
            where = f"{type(self).__name__}: param_groups[{i}]: "
            read_references(where, group, is_loaded=True)
            self._check(where, group)
        super().__setstate__(state)
        self._plans = Plans()

    @property
    def penalty(self) -> Tensor:
        """The penalty of all parameters before the last step, and the ``value`` of what is attached; 0-dim, on their
        device, without a synchronization; before the first step, the penalty now. Of DTensors it is reduced when it is
        looked at: every process must look."""
        attached: list[Tensor] = [a.value for ref in self._attached if (a := ref()) is not None and a.is_active]
        if len(attached) == 1 and not self._has_own():
            return attached[0]
        own = (self._penalty_now() if self._last is None else self._last).total()
        return functools.reduce(lambda a, b: a + b.to(a.device), attached, own)

    def add_attached(self, attachment: Any) -> None:
        """One whose value is a part of the penalty."""
        self._attached = [*(ref for ref in self._attached if ref() is not None), weakref.ref(attachment)]

    def _has_own(self) -> bool:
        return any(map(has_penalty, self.param_groups))

    def can_host(self) -> bool:
        """Whether a penalty of somebody else can be in the pass: unless there is one, or the step is not ours."""
        return type(self).step is OnePass.step and "_guest" not in self.__dict__ and not self._has_own()

    def host(self, guest: Guest) -> bool:
        """Takes this penalty into the pass of the step that has begun, if it can."""
        if self.can_host():
            self._guest = guest
            return True
        return False

    def _dtype(self) -> torch.dtype:
        return value_dtype(p for group in self.param_groups for p in group["params"])

    def _penalty_now(self) -> Penalty:
        groups = [group for group in self.param_groups if group["params"]]
        for group in groups:
            read_references(f"{type(self).__name__}: ", group)
        return Penalty(self._dtype(), [partial(now, penalized(group), group["l1"], group["l2"]) for group in groups])

    @_calls_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of torch's optimizer, with the penalty in it.

        Args:
            closure: computes the loss anew, and returns it. It is without the penalty.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = self.__dict__
        guest = own.pop("_guest", None)
        found_inf, grad_scale = own.get("found_inf"), own.get("grad_scale")  # of a GradScaler, if fused=True
        if found_inf is not None and _devices.is_at_hand(found_inf):
            if bool(found_inf):
                return loss
            found_inf = None
        plan = self._plans.of(self, guest)
        ready = [] if plan is None else [(launch, launch.lists()) for launch in plan.launches]
        if plan is None or any(lists is None for _, lists in ready):
            self._step_in_turn(guest, found_inf, grad_scale)
            return loss
        for launch, _ in ready if len(ready) > 1 else ():
            launch.check()
        is_none = plan.may_be_inert and is_inert(self)
        parts: list[Any] = []
        for launch, lists in ready:
            parts.append(partial(total, launch.run(lists, grad_scale, found_inf, is_none), launch.processes))
        if not is_none:
            for group, rest in zip(self.param_groups, plan.rest, strict=True):
                if rest and has_penalty(group):
                    parts += penalties_of(rest, group["l1"], group["l2"])
            if guest is not None:
                parts += guest.owner.rest_of(plan.all_rest)
            self._last = Penalty(guest.dtype if guest else plan.dtype, self._unless(found_inf, parts))
        if guest is not None:
            guest.owner.has_ridden(None if is_none else self._last)
            self._last = None
        return loss

    def _unless(self, found_inf: Tensor | None, parts: list[Any]) -> list[Any]:
        """The penalty of this step; or the last one's, if a GPU knows that it was none."""
        if found_inf is None or not parts:
            return parts
        value = Penalty(torch.float64, parts).total()
        is_one = _devices.reachable(found_inf, value.device).reshape(()) == 0
        return [partial(total, torch.where(is_one, value, self.penalty), None)]

    def _step_in_turn(self, guest: Guest | None, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """The same where the kernels do not take a step: the penalty's gradient, torch's step, the proximal step."""
        if guest is not None:
            guest.owner.step_in_turn(self, self._step_of_torch)
            return
        name = type(self).__name__
        own = [(group, InTurn(name, group)) for group in self.param_groups if has_penalty(group)]
        is_none = len(own) > 0 and is_inert(self)
        last: list[Callable[[], Tensor]] = []
        for group, in_turn in () if is_none else own:
            sign = -1.0 if group["maximize"] else 1.0
            scale = sign if grad_scale is None else grad_scale * sign
            last += in_turn.penalties() if group["prox"] else in_turn.accumulate_grad_(scale)
        share: Any = 1.0
        if found_inf is not None:  # a GPU knows whether the step will be skipped
            share = (found_inf == 0).reshape(())
            last = self._unless(found_inf, last)
        if not is_none:
            self._last = Penalty(self._dtype(), last)
        self._step_of_torch()
        for group, in_turn in () if is_none else own:
            if group["prox"]:
                in_turn.prox_(share)

    def _formula(self, group: Mapping[str, Any]) -> Formula:
        raise NotImplementedError
