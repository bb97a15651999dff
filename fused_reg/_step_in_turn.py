"""The penalty of a group in a step that the kernels do not take: its gradient, torch's own step, the proximal step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_reg._lazy_rows import lend_grad, put_back, rows_of, touched
from fused_reg._partitioned import check_whole
from fused_reg._step_penalty import now, penalties_of
from fused_reg._step_plans import check_options
from fused_reg._step_references import Penalized, params_of, penalized, references_of
from fused_reg.in_place import accumulate_grad_, prox_


class InTurn:
    """What of a group a step changes. Of sparse gradients it is the rows that these have, of which copies are in the
    place of their parameters, if the group says so."""

    def __init__(self, name: str, group: dict[str, Any]) -> None:
        """Raises where the step cannot be."""
        where = f"{name}: "
        check_options(where, group)
        if group["prox"] == "preconditioned":
            raise NotImplementedError(f'{where}prox="preconditioned" must have parameters that the kernels take')
        check_whole(name, group["params"])
        self._group = group
        self._strengths = group["l1"], group["l2"]
        held = penalized(group)
        self._own = [x for x in held if x.param.grad is not None]
        self._rest = [x for x in held if x.param.grad is None]
        self._rows: dict[int, Tensor] = {}  # of some of its own, by their places
        for i, p in enumerate(group["params"]):
            if p.is_complex():
                raise TypeError(f"{where}params[{i}] must be real where l1 or l2 is not 0, got {p.dtype}")
            if p.grad is None or p.grad.layout is torch.strided:
                continue
            rows = touched(f"{where}params[{i}]", p) if group["lazy_rows"] else None
            if rows is None:
                hint = "" if group["lazy_rows"] else "; lazy_rows=True takes the rows that it has"
                raise TypeError(
                    f"{where}params[{i}].grad must be dense where l1 or l2 is not 0, got {p.grad.layout}{hint}"
                )
            self._rows[next(k for k, x in enumerate(self._own) if x.param is p)] = rows

    def _stand_ins(self) -> list[Penalized]:
        own = [*self._own]
        for i, rows in self._rows.items():
            p, *references = own[i]
            own[i] = Penalized(rows_of(p, rows), *(None if x is None else rows_of(x, rows) for x in references))
        return own

    def penalties(self) -> list[Callable[[], Tensor]]:
        """The parts of the penalty now."""
        own = self._stand_ins()
        value = now(own, *self._strengths) if own else None
        return [*([] if value is None else [lambda: value]), *self._penalties_of_rest()]

    def accumulate_grad_(self, scale: float | Tensor) -> list[Callable[[], Tensor]]:
        """The same, whose gradient has been added to that of the loss."""
        own = self._stand_ins()
        for i in self._rows:
            lend_grad(own[i].param.requires_grad_(), self._own[i].param)
        value = accumulate_grad_(params_of(own), *self._strengths, scale=scale, **references_of(own)) if own else None
        return [*([] if value is None else [lambda: value]), *self._penalties_of_rest()]

    def _penalties_of_rest(self) -> list[Callable[[], Tensor]]:
        return penalties_of(self._rest, *self._strengths) if self._rest else []

    def prox_(self, share: float | Tensor) -> None:
        """With this share of the learning rate."""
        if not self._own:
            return
        lr, own = self._group["lr"], self._stand_ins()
        step = lr if isinstance(lr, Tensor) else max(lr, 0.0)
        prox_(params_of(own), *self._strengths, step=step * share, **references_of(own))
        for i, rows in self._rows.items():
            put_back(self._own[i].param, rows, own[i].param)
