"""torch.compile, with a bound on what it may take."""

import math
import signal
from collections.abc import Callable, Mapping
from time import perf_counter
from types import FunctionType
from typing import Any

import torch

# An exception that falls into a callback is lost: raise it again. An alarm takes no more seconds than these.
_REPEAT_S, _MOST_S = 5.0, 1e8


class UnavailableError(Exception):
    """An implementation cannot be had here; the message continues its name."""


class Compiler:
    """What a run compiles, each function once for a case, within the seconds that the run may spend on it."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._seconds = self._left = seconds
        self.reset()

    def reset(self) -> None:
        """Forget what was compiled for the last case."""
        torch._dynamo.reset()
        self._functions: dict[str, Callable[..., Any]] = {}
        self._outcomes: dict[tuple[str, bool], float | Exception] = {}

    def function(
        self, name: str, function: FunctionType, options: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """It, compiled, and known by the name."""
        if name not in self._functions:
            # Dynamo finds what it compiled by the code, and would try that of every other closure of the same.
            code, closure = function.__code__.replace(), function.__closure__
            own = FunctionType(code, function.__globals__, argdefs=function.__defaults__, closure=closure)
            own.__kwdefaults__ = function.__kwdefaults__
            self._functions[name] = torch.compile(
                own, fullgraph=True, dynamic=False, options=dict(options or {}) or None
            )
        return self._functions[name]

    def seconds(self, name: str, call: Callable[[], object], wants_grad: bool) -> float:
        """Run the call that compiles; the seconds it took, or had taken. What stopped it is raised, also again."""
        if (name, wants_grad) not in self._outcomes:
            try:
                self._outcomes[name, wants_grad] = self._spend(call)
            except Exception as error:
                self._outcomes[name, wants_grad] = error
        if isinstance(outcome := self._outcomes[name, wants_grad], Exception):
            raise outcome
        return outcome

    def _spend(self, call: Callable[[], object]) -> float:
        if self._left <= 0:
            raise UnavailableError(f"is not compiled: the run's {self._seconds:.0f} s for compiling are spent")

        def stop(*_: object) -> None:
            raise TimeoutError

        start, before = perf_counter(), signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, min(self._left, _MOST_S), _REPEAT_S)
        try:
            # The alarm interrupts the main thread, so the backward pass, which compiles too, must run there.
            with torch.autograd.set_multithreading_enabled(False):
                call()
        except Exception as error:
            if perf_counter() - start < self._left:
                raise
            reason = f"did not compile in the {self._left:.0f} s that were left for compiling"
            raise UnavailableError(reason) from error  # whatever the alarm became on its way
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            seconds = perf_counter() - start
            self._left -= seconds
        return seconds
