"""`fused_reg.integrations.transformers` in the Trainer of Hugging Face, beside loops written by hand."""

import json
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fused_reg import Regularizer
from fused_reg.schedules import CubicRamp, LinearRamp

pytestmark = [
    pytest.mark.long,
    # The package's own are none of ours; what we say is an error.
    pytest.mark.filterwarnings("ignore", "error:(attach|Regularizer)"),
]

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EXAMPLES = [{"x": x, "y": x[:1] - 2 * x[1:2]} for x in X]  # all in each step, so that their order does not matter
BOTH = {"l1": 0.01, "l2": 0.02}


@pytest.fixture(scope="module")
def hf():
    """The package, and our callback for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own imports deprecate
        for package in ("transformers", "accelerate"):
            pytest.importorskip(package, reason=f"needs {package} (pip install fused_reg[integrations])")
        import transformers
        from transformers.trainer_callback import PrinterCallback

        from fused_reg.integrations.transformers import RegularizerCallback

        return SimpleNamespace(
            Arguments=transformers.TrainingArguments, Callback=transformers.TrainerCallback, Ours=RegularizerCallback,
            Trainer=transformers.Trainer, Printer=PrinterCallback,
        )  # fmt: skip


class Net(nn.Module):
    def __init__(self, raises_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        self.raises_at, self.calls = raises_at, 0

    def forward(self, x, y):
        self.calls += 1
        if self.calls == self.raises_at:
            raise KeyError(self.calls)
        return {"loss": nn.functional.mse_loss(self.layers(x), y)}


def trainer_of(hf, folder, callbacks, net=None, accumulate=1, **arguments):
    args = hf.Arguments(
        str(folder), per_device_train_batch_size=len(EXAMPLES) // accumulate, gradient_accumulation_steps=accumulate,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", use_cpu=True, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False,
        **{"max_steps": 4, "max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 1, **arguments},
    )  # fmt: skip
    trainer = hf.Trainer(Net() if net is None else net, args, train_dataset=EXAMPLES, callbacks=callbacks)
    trainer.remove_callback(hf.Printer)
    return trainer


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def logged(trainer):
    return [row["penalty"] for row in trainer.state.log_history if "penalty" in row]


def by_hand(steps, clip=0.0, mode="grad", **penalty):
    """The weights and the penalty after each step."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = Regularizer(net, **penalty).attach(optimizer, mode=mode)
    penalties = []
    for _ in range(steps):
        net(X, torch.stack([e["y"] for e in EXAMPLES]))["loss"].backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        penalties.append(attachment.value.item())
    return weights(net), penalties


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (2, 0.0), (2, 0.1)])
def test_trains_as_the_loop_by_hand(hf, tmp_path, mode, accumulate, clip):
    callback = hf.Ours(**BOTH, mode=mode)
    trainer = trainer_of(hf, tmp_path, [callback], accumulate=accumulate, max_grad_norm=clip)
    trainer.train()
    expected, penalties = by_hand(4, clip, mode, **BOTH)
    assert_equal(weights(trainer.model), expected)
    assert logged(trainer) == pytest.approx(penalties, rel=1e-12)
    assert callback.penalty.item() == pytest.approx(penalties[-1], rel=1e-12)
    assert callback.regularizer.step == 4
    assert not callback.attachments[0].is_active


def test_a_callback_behind_it_sees_the_penalty(hf, tmp_path):
    class Kept(hf.Callback):
        def __init__(self):
            self.penalties = []

        def on_log(self, args, state, control, *, logs, **_):
            self.penalties += [logs["penalty"]] if "penalty" in logs else []

    kept = Kept()
    trainer = trainer_of(hf, tmp_path, [kept, hf.Ours(**BOTH)])
    trainer.train()
    assert kept.penalties == []
    trainer.add_callback(trainer.pop_callback(Kept))
    trainer.train()
    assert len(kept.penalties) == 4
    assert kept.penalties == logged(trainer)


def weakens(hf, ours):
    """A callback that changes a strength of ours after the first step."""

    class Weakens(hf.Callback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 1:
                ours.regularizer.set_strength(l2=0.25)

    return Weakens()


@pytest.mark.parametrize("restores", [False, True])
def test_resumes_from_a_checkpoint(hf, tmp_path, restores):
    """``restores``: the trainer builds the callbacks anew, by itself."""

    def run(**arguments):
        ours = hf.Ours(l1=0.01, l2=0.5, mode="prox", rules=[("*.0.*", {"l2": 0.5})])
        args = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restores}
        trainer = trainer_of(hf, tmp_path, [ours, weakens(hf, ours)], **args)
        trainer.train(**arguments)
        (ours,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, hf.Ours)]
        assert ours.regularizer.step == 4
        assert "l2=0.25:" in repr(ours.regularizer)
        return weights(trainer.model)

    straight = run()
    assert_equal(run(resume_from_checkpoint=str(tmp_path / "checkpoint-2")), straight)


def heads(group):
    return {"l2_norm": 0.1, "include": "*.0.weight", "group": group}


@pytest.mark.parametrize(
    ("arguments", "lacks"),
    [
        (lambda net: {"l2": 0.1, "toward": Net().state_dict()}, "toward"),
        (
            lambda net: {"l2": 0.1, "importance": {"layers.0.weight": torch.ones_like(net.layers[0].weight)}},
            "importance",
        ),
        (lambda net: {"l1": 0.1, "types": nn.Linear}, "types"),
        (lambda net: {"l1": 0.1, "rules": [(nn.Linear, {"l2": 0.1})]}, "rules"),
        (lambda net: {"l1": LinearRamp(0.0, 0.1, steps=4)}, "l1"),
        (lambda net: {"l1": 0.1, "zeros": CubicRamp(0.0, 0.5, steps=4), "mode": "prox"}, "zeros"),
        (lambda net: {"regularizer": Regularizer(net, l1=0.1)}, "regularizer"),
        (lambda net: heads(("row", 2)), ""),
        (lambda net: {"l1": 0.1, "rules": [("*.0.weight", {"l2_norm": 0.1, "group": ("block", 2)})]}, ""),
        (lambda net: {"l1": 0.1, "rules": []}, ""),
        (lambda net: {"l1": 0.1, "weights_only": True, "toward": None}, ""),
    ],
)
def test_what_the_trainer_builds_anew_is_whole(hf, tmp_path, arguments, lacks):
    """Or says so: a penalty toward other weights, or of others, would go on in silence. Left to us, it is resumed."""

    def run(restores, **how):
        net = Net()
        args = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restores}
        trainer = trainer_of(hf, tmp_path, [hf.Ours(**arguments(net))], net, **args)
        trainer.train(**how)
        return weights(trainer.model)

    straight, checkpoint = run(False), str(tmp_path / "checkpoint-2")
    if lacks:
        with pytest.raises(ValueError, match=rf"^RegularizerCallback: {lacks} must be given again, because"):
            run(True, resume_from_checkpoint=checkpoint)
    else:
        assert_equal(run(True, resume_from_checkpoint=checkpoint), straight)
    assert_equal(run(False, resume_from_checkpoint=checkpoint), straight)


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("is_written", [False, True])
def test_resumes_a_schedule(hf, tmp_path, is_given, is_written):
    """Also from a checkpoint that was written without the callback, by the trainer's count."""

    def run(with_callback=True, **arguments):
        net, strength = Net(), {"l1": lambda step: 0.01 * step}
        ours = hf.Ours(Regularizer(net, **strength)) if is_given else hf.Ours(**strength)
        args = {"save_strategy": "steps", "save_steps": 2}
        trainer = trainer_of(hf, tmp_path, [ours] if with_callback else [], net, **args)
        trainer.train(**arguments)
        return ours, weights(trainer.model)

    _, straight = run(with_callback=is_written)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert ("RegularizerCallback" in state["stateful_callbacks"]) == is_written
    ours, resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ours.regularizer.step == 4
    assert not ours.attachments[0].is_active
    if is_written:
        assert_equal(resumed, straight)


def test_two_callbacks_have_states_of_their_own(hf, tmp_path):
    def run(**arguments):
        first, second = hf.Ours(name="head", l2=0.5, include="*.2.*"), hf.Ours(l1=0.5, include="*.0.*")
        args = {"save_strategy": "steps", "save_steps": 2}
        trainer = trainer_of(hf, tmp_path, [first, second, weakens(hf, first)], **args)
        trainer.train(**arguments)
        return weights(trainer.model), first.regularizer, second.regularizer

    straight, *_ = run()
    resumed, first, second = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(resumed, straight)
    assert "l2=0.25:" in repr(first)
    assert "l1=0.5:" in repr(second)


def test_two_callbacks_of_one_name(hf, tmp_path):
    trainer = trainer_of(hf, tmp_path, [hf.Ours(l2=0.5, include="*.2.*"), hf.Ours(l1=0.5, include="*.0.*")])
    with pytest.raises(ValueError, match=r"^RegularizerCallback: name must be another .*, got 'penalty' twice$"):
        trainer.train()


def test_a_training_that_raises(hf, tmp_path):
    """Within the context it detaches; the next training begins anew either way, and has the penalty once."""
    for is_in_context in (True, False):
        callback, net = hf.Ours(**BOTH), Net(raises_at=3)
        trainer = trainer_of(hf, tmp_path, [callback], net)
        with pytest.raises(KeyError), callback if is_in_context else nullcontext():
            trainer.train()
        (attachment,) = callback.attachments
        assert callback.regularizer.step == 2
        assert attachment.is_active != is_in_context
        net.load_state_dict(Net().state_dict())
        trainer.train()
        assert_equal(weights(net), by_hand(4, **BOTH)[0])


def test_trains_twice(hf, tmp_path):
    """The trainer counts from 0 again, and so does the schedule."""
    callback = hf.Ours(l1=lambda step: 0.01 * step)
    trainer = trainer_of(hf, tmp_path, [callback])
    trainer.train()
    first = callback.regularizer
    trainer.model.load_state_dict(Net().state_dict())
    trainer.train()
    assert callback.regularizer is not first
    assert callback.regularizer.step == 4
    assert_equal(weights(trainer.model), by_hand(4, l1=lambda step: 0.01 * step)[0])


def test_accelerates_wrapper_is_not_tried_out(hf, tmp_path, monkeypatch):
    """Which for a proximal step takes 40 steps of what wraps an optimizer."""
    monkeypatch.setattr("fused_reg.regularizer.attachments.check_wrapper", None)
    trainer_of(hf, tmp_path, [hf.Ours(l1=0.1, mode="prox")]).train()


def test_an_optimizer_of_shards(hf):
    """As DeepSpeed's, which holds none of the model's parameters; and none at all."""
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    for optimizer, got in ((torch.optim.SGD([torch.ones(1)], 0.1), "SGD"), (None, "none")):
        with pytest.raises(ValueError, match=rf"^RegularizerCallback: an optimizer .* 'layers\.0\.bias' .* got {got};"):
            hf.Ours(l1=0.1).on_train_begin(None, state, None, model=Net(), optimizer=optimizer)


def test_reference_weights_are_in_no_checkpoint(hf, tmp_path):
    trainer = trainer_of(hf, tmp_path, [hf.Ours(l2=0.1, toward="start")])
    with pytest.raises(ValueError, match="RegularizerCallback: save_references must be False with the Trainer"):
        trainer.train()
    net = Net()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    callback = hf.Ours(l2=0.1, toward=start)
    trainer_of(hf, tmp_path, [callback], net=net).train()
    assert callback.penalty.item() > 0
