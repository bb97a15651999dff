"""`fused_reg.integrations.lightning` in trainers, under both names of the package, beside loops written by hand."""

import importlib
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

NAMES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
BATCHES = [
    (x, x[:, :1] - 2 * x[:, 1:2])
    for x in torch.randn(8, 16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
]
BOTH = {"l1": 0.01, "l2": 0.02}


@pytest.fixture(params=NAMES)
def package(request):
    """The package, and our callback for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own imports deprecate
        pytest.importorskip(NAMES[request.param], reason=f"needs {request.param} (pip install fused_reg[integrations])")
        ours = importlib.import_module(f"fused_reg.integrations.{request.param}")
        return importlib.import_module(NAMES[request.param]), ours.RegularizerCallback


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def module_of(pl, dtype=torch.float64, raises_at=None, optimizer=torch.optim.SGD):
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = layers().to(dtype)

        def training_step(self, batch, i):
            if i == raises_at:
                raise KeyError(i)
            return nn.functional.mse_loss(self.layers(batch[0].to(dtype)), batch[1].to(dtype))

        def configure_optimizers(self):
            return optimizer(self.parameters(), lr=0.1)

    return Net()


def two_of(pl):
    class Two(pl.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 1).double(), nn.Linear(4, 1).double()

        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.a, self.b)]

        def training_step(self, batch, _):
            for optimizer, layer in zip(self.optimizers(), (self.a, self.b), strict=True):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(layer(batch[0]), batch[1]))
                optimizer.step()

    return Two()


def trainer_of(pl, callbacks, **arguments):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        accelerator="cpu", devices=1, callbacks=callbacks, enable_model_summary=False, **{**quiet, **arguments}
    )


def fit(trainer, module, **arguments):
    trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None), **arguments)


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def logger_of(pl):
    """Keeps what is logged as "penalty"."""

    class Kept(pl.loggers.logger.Logger):
        name, version = "kept", 0

        def __init__(self):
            super().__init__()
            self.penalties = []

        def log_hyperparams(self, *_, **__):
            pass

        def log_metrics(self, metrics, step=None):
            if "penalty" in metrics:
                self.penalties.append(metrics["penalty"])

    return Kept()


def by_hand(mode, accumulate, clip):
    """The weights and the penalties after each batch of two epochs."""
    net = layers()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = Regularizer(net, **BOTH).attach(optimizer, mode=mode)
    penalties = []
    for _ in range(2):
        for i, (x, y) in enumerate(BATCHES):
            (nn.functional.mse_loss(net(x), y) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                penalties.append(attachment.value.item())
    return weights(net), penalties


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (2, 0.1)])
def test_trains_as_the_loop_by_hand(package, mode, accumulate, clip):
    pl, callback_of = package
    callback, logger, module = callback_of(**BOTH, mode=mode), logger_of(pl), module_of(pl)
    trainer = trainer_of(
        pl, [callback], max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=clip, logger=logger,
        log_every_n_steps=1,
    )  # fmt: skip
    fit(trainer, module)
    expected, penalties = by_hand(mode, accumulate, clip)
    torch.testing.assert_close(weights(module), expected, rtol=1e-12, atol=1e-12)
    assert logger.penalties == pytest.approx(penalties, rel=1e-6)  # a logger gets float32
    assert callback.regularizer.step == len(penalties)
    assert callback.penalty.item() == pytest.approx(penalties[-1], rel=1e-12)
    assert not callback.attachments[0].is_active


def test_the_loss_scale_is_divided_out(package):
    pl, callback_of = package
    module = module_of(pl, dtype=torch.float32)
    mixed = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fit(trainer_of(pl, [callback_of(l1=0.5)], max_epochs=1, plugins=[mixed]), module)
    net = layers().float()
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    Regularizer(net, l1=0.5).attach(optimizer)
    for x, y in BATCHES:
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(net(x.float()), y.float())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(module), weights(net))


def test_two_optimizers(package):
    """The penalty is that of both; schedules count the steps of one."""
    pl, callback_of = package
    module, callback = two_of(pl), callback_of(l1=0.1)
    fit(trainer_of(pl, [callback], max_steps=8), module)
    assert callback.regularizer.step == 4
    for layer, attachment in zip((module.a, module.b), callback.attachments, strict=True):
        alone = two_of(pl).a if layer is module.a else two_of(pl).b
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        expected = Regularizer(alone, l1=0.1).attach(optimizer)
        for x, y in BATCHES[:4]:
            optimizer.zero_grad()
            nn.functional.mse_loss(alone(x), y).backward()
            optimizer.step()
        torch.testing.assert_close(weights(layer), weights(alone), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(attachment.value, expected.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(callback.penalty, sum(a.value for a in callback.attachments))


def test_an_optimizer_without_regularized_parameters(package):
    pl, callback_of = package
    callback = callback_of(l1=0.1, include="b.*")
    trainer = trainer_of(pl, [callback], max_steps=4)
    fit(trainer, two_of(pl))
    (attachment,) = callback.attachments
    assert attachment.optimizer is trainer.optimizers[1]
    assert callback.regularizer.step == 2


def test_resumes_from_a_checkpoint(package, tmp_path):
    pl, callback_of = package

    def run(epochs, **arguments):
        callback = callback_of(l1=lambda step: 0.001 * step)
        trainer, module = trainer_of(pl, [callback], max_epochs=epochs), module_of(pl)
        fit(trainer, module, **arguments)
        assert callback.regularizer.step == epochs * len(BATCHES)
        return trainer, weights(module)

    run(2)[0].save_checkpoint(tmp_path / "half.ckpt")
    resumed = run(4, ckpt_path=tmp_path / "half.ckpt")[1]
    torch.testing.assert_close(resumed, run(4)[1], rtol=1e-12, atol=1e-12)


def test_resumes_a_given_regularizer(package, tmp_path):
    """Its own count, which is not the trainer's."""
    pl, callback_of = package
    for epochs, arguments in ((1, {}), (2, {"ckpt_path": tmp_path / "one.ckpt"})):
        module = module_of(pl)
        regularizer = Regularizer(module, l1=lambda step: 0.001 * step)
        regularizer.step = 0 if arguments else 100
        trainer = trainer_of(pl, [callback_of(regularizer)], max_epochs=epochs)
        fit(trainer, module, **arguments)
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        assert regularizer.step == 100 + epochs * len(BATCHES)


def test_resumes_from_a_checkpoint_without_the_callback(package, tmp_path):
    """By the trainer's count, which is of the steps of all optimizers."""
    pl, callback_of = package
    for make, counted in ((module_of, 1), (two_of, 2)):
        trainer = trainer_of(pl, [], max_epochs=1)
        fit(trainer, make(pl))
        trainer.save_checkpoint(tmp_path / "without.ckpt")
        assert trainer.global_step == counted * len(BATCHES)
        callback = callback_of(l1=lambda step: 0.001 * step)
        fit(trainer_of(pl, [callback], max_epochs=2), make(pl), ckpt_path=tmp_path / "without.ckpt")
        assert callback.regularizer.step == 2 * len(BATCHES)


def test_two_callbacks_have_states_of_their_own(package, tmp_path):
    pl, callback_of = package
    path = tmp_path / "one.ckpt"

    def run(epochs, **arguments):
        callbacks = [callback_of(name="heads", l1=0.5, include="*.2.*"), callback_of(l2=0.5, include="*.0.*")]
        trainer = trainer_of(pl, callbacks, max_epochs=epochs)
        fit(trainer, module_of(pl), **arguments)
        return trainer, *[callback.regularizer for callback in callbacks]

    trainer, first, second = run(1)
    first.set_strength(l1=0.25)
    second.set_strength(l2=0.125)
    trainer.save_checkpoint(path)
    _, first, second = run(2, ckpt_path=path)
    assert "l1=0.25:" in repr(first)
    assert "l2=0.125:" in repr(second)
    assert first.step == second.step == 2 * len(BATCHES)


def test_an_exception_detaches(package):
    pl, callback_of = package
    callback, module = callback_of(l1=0.1), module_of(pl, raises_at=3)
    trainer = trainer_of(pl, [callback], max_epochs=1)
    with pytest.raises(KeyError):
        fit(trainer, module)
    (attachment,) = callback.attachments
    assert callback.regularizer.step == 3
    assert not attachment.is_active
    before = weights(module)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    attachment.optimizer.step()
    torch.testing.assert_close(weights(module), before, rtol=0, atol=0)


def test_fits_twice(package):
    """The same trainer goes on; another one begins anew, with the module that it has."""
    pl, callback_of = package
    callback, module = callback_of(l1=lambda step: 0.001 * step), module_of(pl)
    trainer = trainer_of(pl, [callback], max_epochs=1)
    fit(trainer, module)
    first = callback.regularizer
    trainer.fit_loop.max_epochs = 2
    fit(trainer, module)
    assert callback.regularizer is first
    assert first.step == 2 * len(BATCHES)
    once = module_of(pl)
    fit(trainer_of(pl, [callback_of(l1=lambda step: 0.001 * step)], max_epochs=2), once)
    torch.testing.assert_close(weights(module), weights(once), rtol=1e-12, atol=1e-12)

    other = module_of(pl)
    fit(trainer_of(pl, [callback], max_epochs=2), other)
    assert callback.regularizer is not first
    torch.testing.assert_close(weights(other), weights(once), rtol=1e-12, atol=1e-12)


def test_no_optimizer(package):
    pl, callback_of = package
    module = module_of(pl, optimizer=lambda *_, **__: None)
    with pytest.raises(
        ValueError, match=r"^RegularizerCallback: an optimizer of the trainer must hold 'layers\.0\.bias'"
    ):
        fit(trainer_of(pl, [callback_of(l1=0.1)], max_epochs=1), module)
