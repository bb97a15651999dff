"""Strengths that change while training, and are saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from fused_reg.regularizer.patterns import check_matches
from fused_reg.regularizer.saved import parsed, state_of
from fused_reg.regularizer.strengths import KINDS, Given, checked
from fused_reg.regularizer.table import Table


class Adjustable:
    """The part of a `Regularizer` that changes its strengths."""

    _table: Table

    def _followed(self) -> Table:
        """The table as the module is now."""
        raise NotImplementedError

    @property
    def step(self) -> int:
        """How many steps have been counted, the number that schedules get. Set it to go on from a checkpoint that
        knows the step alone; the schedules' strengths follow."""
        return self._table.step

    @step.setter
    def step(self, step: int) -> None:
        self._table.go_to(as_count("step", step))

    def advance(self) -> None:
        """The next step of the schedules. An attached optimizer does it after each of its steps.

        It fills the strengths' tensors in place, so that compiled code and CUDA graphs see it. After the replay of a
        graph that holds an optimizer's step, call it yourself; within a graph it would repeat one step's numbers.

        Raises:
            ValueError: a schedule gives a number that is negative, infinite or NaN. No strength has changed then. As
                for ``LambdaLR``, a schedule is asked for one more step than are taken.
        """
        self._table.go_to(self.step + 1)

    def set_strength(
        self, l1: Given = None, l2: Given = None, l2_norm: Given = None, *, where: str | None = None
    ) -> None:
        """Changes strengths; what is not given stays as it is.

        A number is written into the tensor that holds the strength now, if one does (and ends its schedule), so that
        compiled code and CUDA graphs see it. A strength that is a Python number is a constant to these, and one on the
        CPU to CUDA graphs: begin with a 0-dim tensor on the parameters' device where that matters. Of a tensor that is
        shared with parameters which ``where`` does not name, those that it names get their own.

        Args:
            l1: a finite float >= 0, a 0-dim tensor, or a schedule.
            l2: likewise.
            l2_norm: likewise.
            where: a pattern of names (``fnmatch``): these parameters, and "*" is all. None: all that have such a term
                (not those that a rule gives 0, or that have rules or marks without it); where none has one, all.

        Raises:
            TypeError: a strength is no number; none is given.
            ValueError: a strength is negative, infinite or NaN; no name matches. Nothing has changed then.

        Example:
            >>> import torch
            >>> from fused_reg import Regularizer
            >>> regularizer = Regularizer([torch.nn.Parameter(torch.ones(3))], l1=0.5)
            >>> regularizer.set_strength(l1=1.0)
            >>> regularizer()
            tensor(3., grad_fn=<...>)
        """
        given = {kind: s for kind, s in zip(KINDS, (l1, l2, l2_norm), strict=True) if s is not None}
        if not given:
            raise TypeError("set_strength: l1, l2 or l2_norm must be given, got none")
        for kind, strength in given.items():
            if isinstance(strength, str):
                raise TypeError(
                    f"set_strength: {kind} must be a float, a 0-dim tensor or a schedule, got str; for parameters of "
                    f"some names say where={strength!r}"
                )
        strengths = {kind: checked(f"set_strength: {kind}", s) for kind, s in given.items()}
        table = self._followed()
        if where is not None:
            check_matches("set_strength", "where", where, table.entries)
        table.change(strengths, where)

    def state_dict(self) -> dict[str, Any]:
        """The step count and the strengths as they are now, in plain numbers and names.

        ``torch.save`` and ``torch.load(weights_only=True)`` take it. Schedules are code, which the constructor gets.
        """
        return {"step": self.step, "groups": state_of(self._followed())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, of a regularizer of parameters with the same names. A schedule goes on as the
        one that this regularizer has: it gives the strength for that step.

        Args:
            state_dict: of :meth:`state_dict`. Strengths in tensors are filled in place.

        Raises:
            ValueError: it is of other parameters, or needs a schedule that is not here. Nothing has changed then.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"step", "groups"}:
            raise ValueError("load_state_dict: state_dict must have the keys step and groups, as `state_dict` gives it")
        step = as_count("load_state_dict: step", state_dict["step"])
        table = self._followed()
        table.load(step, parsed(state_dict["groups"], table.entries))


def as_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return int(value)
