"""`fused_reg.integrations.skorch` in nets of skorch, beside loops written by hand."""

import pickle
import warnings

import pytest
import torch
from torch import nn

from fused_reg import Regularizer

pytestmark = [
    pytest.mark.long,
    # The package's own are none of ours; what we say is an error.
    pytest.mark.filterwarnings("ignore", "error:(attach|Regularizer)"),
]

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
Y = X[:, :1] - 2 * X[:, 1:2]
BATCH = 8
BOTH = {"l1": 0.01, "l2": 0.02}


@pytest.fixture(scope="module")
def skorch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own imports deprecate
        return pytest.importorskip("skorch", reason="needs skorch (pip install fused_reg[integrations])")


@pytest.fixture(scope="module")
def ours(skorch):
    from fused_reg.integrations.skorch import RegularizerCallback

    return RegularizerCallback


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def forward(self, x):
        return self.layers(x)


class Raises(Net):
    """At the third call of its life."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise KeyError(self.calls)
        return super().forward(x)


def net_of(skorch, callbacks, module=Net, kind=None, **arguments):
    return (kind or skorch.NeuralNetRegressor)(
        module, optimizer=torch.optim.SGD, lr=0.1, batch_size=BATCH, train_split=None, verbose=0, callbacks=callbacks,
        **{"max_epochs": 2, **arguments},
    )  # fmt: skip


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def by_hand(epochs=2, clip=None, mode="grad", **penalty):
    """The weights and the penalty after each epoch."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = Regularizer(net, **penalty).attach(optimizer, mode=mode)
    penalties = []
    for _ in range(epochs):
        for x, y in zip(torch.tensor(X).split(BATCH), torch.tensor(Y).split(BATCH), strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
        penalties.append(attachment.value.item())
    return weights(net), penalties


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_trains_as_the_loop_by_hand(skorch, ours, mode, clip):
    callback = ours(**BOTH, mode=mode)
    clips = [] if clip is None else [skorch.callbacks.GradientNormClipping(clip)]
    net = net_of(skorch, [callback, *clips]).fit(X, Y)
    expected, penalties = by_hand(clip=clip, mode=mode, **BOTH)
    assert_equal(weights(net.module_), expected)
    assert net.history[:, "penalty"] == pytest.approx(penalties, rel=1e-12)
    assert callback.penalty.item() == pytest.approx(penalties[-1], rel=1e-12)
    assert callback.regularizer.step == 2 * len(X) // BATCH
    assert not callback.attachments[0].is_active


def test_accumulates_gradients(skorch, ours):
    """By the way of skorch's documentation, an override of the step."""

    class Accumulates(skorch.NeuralNetRegressor):
        batches = 0

        def get_loss(self, *args, **kwargs):
            return super().get_loss(*args, **kwargs) / 4

        def train_step(self, batch, **fit_params):
            step = self.train_step_single(batch, **fit_params)
            self.batches += 1
            if self.batches % 4 == 0:
                self.optimizer_.step()
                self.optimizer_.zero_grad()
            return step

    callback = ours(**BOTH)
    net = net_of(skorch, [callback], kind=Accumulates, max_epochs=3).fit(X, Y)
    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    Regularizer(plain, **BOTH).attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(torch.tensor(X)), torch.tensor(Y)).backward()
        optimizer.step()
    assert callback.regularizer.step == 3
    assert_equal(weights(net.module_), weights(plain))
    net.partial_fit(X, Y)
    assert callback.regularizer.step == 6  # its own count, which is not that of batches


def test_two_modules_and_optimizers(skorch, ours):
    """Each in the optimizer that holds it; names begin with that of the module."""

    class Two(skorch.NeuralNetRegressor):
        def initialize_module(self):
            super().initialize_module()
            self.second_ = Net()
            return self

        def initialize_optimizer(self):
            self.optimizer_ = torch.optim.SGD(self.module_.parameters(), lr=0.1)
            self.other_ = torch.optim.SGD(self.second_.parameters(), lr=0.1)
            return self

        def train_step_single(self, batch, **fit_params):
            x, y = batch
            loss = nn.functional.mse_loss(self.module_(x), y) + nn.functional.mse_loss(self.second_(x), y)
            loss.backward()
            return {"loss": loss, "y_pred": y}

    callback = ours(rules=[("module.*", BOTH), ("second.*", {"l1": 0.03})])
    net = net_of(skorch, [callback], kind=Two).fit(X, Y)
    assert [a.optimizer for a in callback.attachments] == [net.optimizer_, net.other_]
    (first, penalties), (second, others) = by_hand(**BOTH), by_hand(l1=0.03)
    # The second optimizer's closure comes when the first has stepped; it holds none of what the first has.
    assert_equal(weights(net.module_), first)
    assert_equal(weights(net.second_), second)
    assert callback.penalty.item() == pytest.approx(penalties[-1] + others[-1], rel=1e-12)


def test_goes_on_and_begins_anew(skorch, ours):
    """``partial_fit``, a pickled net and ``warm_start`` go on; ``fit`` begins anew."""
    schedule = {"l1": Schedule()}
    callback = ours(**schedule)
    net = net_of(skorch, [callback], max_epochs=1)
    net.fit(X, Y)
    first = callback.regularizer
    net.partial_fit(X, Y)
    assert callback.regularizer is first
    loaded, another = (pickle.loads(pickle.dumps(net)) for _ in range(2))
    net.partial_fit(X, Y)
    loaded.partial_fit(X, Y)
    expected = by_hand(3, **schedule)[0]
    assert_equal(weights(net.module_), expected)
    assert_equal(weights(loaded.module_), expected)
    (again,) = [cb for _, cb in loaded.callbacks_ if isinstance(cb, ours)]
    assert again.regularizer.step == first.step == 3 * len(X) // BATCH
    for each in (net, loaded, another):
        each.fit(X, Y)
        assert_equal(weights(each.module_), by_hand(1, **schedule)[0])
    assert callback.regularizer is not first


def test_goes_on_from_saved_parameters(skorch, ours, tmp_path):
    files = {f"f_{what}": str(tmp_path / what) for what in ("params", "optimizer", "history")}
    net_of(skorch, [ours(l1=Schedule())]).fit(X, Y).save_params(**files)
    net = net_of(skorch, [ours(l1=Schedule())], max_epochs=1).initialize()
    net.load_params(**files)
    net.partial_fit(X, Y)
    assert_equal(weights(net.module_), by_hand(3, l1=Schedule())[0])


def test_two_callbacks(skorch, ours):
    first, second = ours(name="head", l2=0.5, include="*.2.*"), ours(l1=0.5, include="*.0.*")
    net = net_of(skorch, [("first", first), ("second", second)]).fit(X, Y)
    expected, penalties = by_hand(rules=[("*.2.*", {"l2": 0.5}), ("*.0.*", {"l1": 0.5})])
    assert_equal(weights(net.module_), expected)
    found = [row["head"] + row["penalty"] for row in net.history]
    assert found == pytest.approx(penalties, rel=1e-12)
    net = net_of(skorch, [("first", ours(l1=0.5, include="*.0.*")), ("second", second)])
    with pytest.raises(ValueError, match=r"^RegularizerCallback: name must be another .*, got 'penalty' twice$"):
        net.fit(X, Y)


class Schedule:
    """Can be pickled."""

    def __call__(self, step):
        return 0.001 * step


def test_parameters_of_the_net(skorch, ours):
    """As a search sets them. A copy of the net has a callback of its own; the count of steps goes on."""
    from sklearn.base import clone

    net = clone(net_of(skorch, [("reg", ours(l1=0.5, rules=[("*.0.*", {"l2": 0.5})]))], max_epochs=1))
    assert net.initialize().get_params()["callbacks__reg__l1"] == 0.5
    net.set_params(callbacks__reg__l1=0.01, callbacks__reg__rules=None)
    net.fit(X, Y)
    assert_equal(weights(net.module_), by_hand(1, l1=0.01)[0])
    net.set_params(callbacks__reg__l1=0.02)
    net.partial_fit(X, Y)
    callback = dict(net.callbacks_)["reg"]
    assert "l1=0.02:" in repr(callback.regularizer)
    assert callback.regularizer.step == 2 * len(X) // BATCH
    with pytest.raises(TypeError, match=r"^RegularizerCallback: arguments must be those of Regularizer, got 'lamda'$"):
        callback.set_params(lamda=1.0)


def test_a_search(skorch, ours):
    from sklearn.model_selection import GridSearchCV

    net = net_of(skorch, [ours(l1=0.0, mode="prox")], max_epochs=20)
    search = GridSearchCV(net, {"callbacks__RegularizerCallback__l1": [1e-4, 10.0]}, cv=2, scoring="r2").fit(X, Y)
    assert search.best_params_ == {"callbacks__RegularizerCallback__l1": 1e-4}
    assert search.cv_results_["mean_test_score"][1] < 0.1  # all weights are 0


def test_a_training_that_raises(skorch, ours):
    """Within the context it detaches; the next training goes on either way, and has the penalty once."""
    callback = ours(**BOTH)
    net = net_of(skorch, [callback], module=Raises)
    with pytest.raises(KeyError), callback:
        net.fit(X, Y)
    (attachment,) = callback.attachments
    assert callback.regularizer.step == 2
    assert not attachment.is_active
    with pytest.raises(KeyError):
        net.fit(X, Y)
    assert callback.attachments[0].is_active
    net.module_.load_state_dict(Net().state_dict())
    net.partial_fit(X, Y)
    assert_equal(weights(net.module_), by_hand(**BOTH)[0])


def test_a_given_regularizer_is_refused(ours):
    """The module, which skorch makes, is another in each fit."""
    with pytest.raises(TypeError, match="regularizer"):
        ours(regularizer=Regularizer(Net(), l1=0.1))
