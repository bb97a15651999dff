"""torch.compile, with a bound on what it may take."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from types import FunctionType
from typing import Any

import torch

from benchmarks.rows import UnavailableError

# An exception that falls into a callback is lost: raise it again.
_REPEAT_S = 5.0


class CompileBudget:
    """The seconds that a run may spend on compiling."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._seconds = self._left = seconds

    def spend(self, call: Callable[[], object]) -> float:
        """Run a call that compiles; the seconds it took.

        Raises:
            UnavailableError: the budget is spent, before or by this call.
        """
        if self._left <= 0:
            raise UnavailableError(f"is not compiled: the run's {self._seconds:.0f} s for compiling are spent")
        start = perf_counter()
        try:
            # The alarm interrupts the main thread, so the backward pass, which compiles too, must run there.
            with _at_most(self._left), torch.autograd.set_multithreading_enabled(False):
                call()
        except Exception as error:
            if perf_counter() - start >= self._left:  # whatever the alarm became on its way
                reason = f"did not compile in the {self._left:.0f} s that were left for compiling"
                raise UnavailableError(reason) from error
            raise
        finally:
            seconds = perf_counter() - start
            self._left -= seconds
        return seconds


class Compiled:
    """A function compiled for one case, and how long that took: once with gradients, once without."""

    def __init__(
        self,
        function: Callable[..., Any],
        options: Iterable[tuple[str, Any]] = (),
        budget: CompileBudget | None = None,
    ) -> None:
        own = _with_own_code(function)
        self.function = torch.compile(own, fullgraph=True, dynamic=False, options=dict(options) or None)
        self._budget = budget or CompileBudget()
        self._seconds: dict[bool, float] = {}
        self._failures: dict[bool, Exception] = {}

    def compile(self, call: Callable[[], object], wants_grad: bool) -> float:
        """Run the call that compiles; the seconds it took, or had taken if it is compiled already.

        Raises:
            Exception: what stopped it, now or the last time.
        """
        if wants_grad in self._failures:
            raise self._failures[wants_grad]
        if wants_grad not in self._seconds:
            try:
                self._seconds[wants_grad] = self._budget.spend(call)
            except Exception as error:
                self._failures[wants_grad] = error
                raise
        return self._seconds[wants_grad]


def _with_own_code(function: Callable[..., Any]) -> FunctionType:
    """A copy. Dynamo finds what it compiled by the code, and would try that of every other closure of the same."""
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Stop the body after so many seconds, where an alarm can."""
    bounded = seconds < math.inf and hasattr(signal, "setitimer")
    if not bounded or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
