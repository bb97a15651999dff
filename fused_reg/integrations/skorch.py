"""skorch: ``NeuralNetClassifier(..., callbacks=[RegularizerCallback(l1=1e-5, weights_only=True)])``."""

from __future__ import annotations

from typing import Any

from torch.nn import ModuleDict
from typing_extensions import Self

from fused_reg.integrations._attached import Attached, needs
from fused_reg.regularizer.attachment import Mode

with needs("skorch", extra="skorch"):
    from skorch.callbacks import Callback


class RegularizerCallback(Attached, Callback):
    """Attaches a :class:`.Regularizer` of the net's module to its optimizer, or to each of several.

    - The penalty enters once in each optimizer step, after ``GradientNormClipping``; ``train_loss`` is without it.
    - The history has it at each end of an epoch, as ``name``, and so the printed log.
    - ``fit`` begins at step 0; ``partial_fit`` goes on, also in a net that was pickled. Where the history was loaded
      (``load_params``, a ``LoadInitState`` before this callback), it goes on from the count of batches.
    - Its arguments are parameters of the net: ``GridSearchCV(net, {"callbacks__RegularizerCallback__l1": [...]})``.
    - It detaches when the training ends, also by Ctrl+C. Of other exceptions skorch tells no callback: call
      ``detach()``, or write ``with callback: net.fit(X, y)``. The next training takes it out of an interrupted one by
      itself.

    Args:
        mode: "grad" or "prox", as of :meth:`.Regularizer.attach`.
        include_unused: likewise.
        lazy_rows: likewise.
        name: what the penalty is called in the history. Two callbacks of one net need two names.
        arguments: those of :class:`.Regularizer` beside the parameters, which skorch makes: ``l1=1e-5,
            weights_only=True``. In a net with several modules, names begin with that of the module: "module.0.weight".

    Raises:
        ValueError: when a training begins, no optimizer of the net holds a parameter of the regularizer.
    """

    def __init__(
        self,
        *,
        mode: Mode = "grad",
        include_unused: bool = False,
        lazy_rows: bool = False,
        name: str = "penalty",
        **arguments: Any,
    ) -> None:
        own: dict[str, Any] = {"mode": mode, "include_unused": include_unused, "lazy_rows": lazy_rows, "name": name}
        super().__init__(None, **own, **arguments)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {**self._options(), **self._arguments}

    def set_params(self, **params: Any) -> Self:
        if params:
            self.detach()
            saved = self._saved if self.regularizer is None else self.regularizer.step
            self.__dict__.update(vars(type(self)(**{**self.get_params(), **params})), _saved=saved)
        return self

    def on_train_begin(self, net: Any, **_: Any) -> None:
        modules = {name: getattr(net, f"{name}_") for name in net._modules}
        module = next(iter(modules.values())) if len(modules) == 1 else ModuleDict(modules)
        optimizers = [getattr(net, f"{name}_") for name in net._optimizers]
        self._check_name(callback.name for _, callback in net.callbacks_ if isinstance(callback, RegularizerCallback))
        goes_on = len(net.history) > 0
        if goes_on and self.regularizer is None and self._saved is None:  # a loaded history
            self._saved = sum(row.get("train_batch_count", 0) for row in net.history)
        self._begin(module, optimizers, goes_on)

    def on_epoch_end(self, net: Any, **_: Any) -> None:
        net.history.record(self.name, float(self.penalty))  # type: ignore[arg-type]

    def on_train_end(self, net: Any, **_: Any) -> None:
        self.detach()
