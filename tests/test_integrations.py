"""`fused_reg.integrations` without a trainer: what is imported, what is said, and what all callbacks share."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_reg import Regularizer
from fused_reg.integrations._attached import Attached, needs
from scripts.check_oldest_trainers import oldest

ROOT = Path(__file__).parents[1]
MODULES = {  # and the package that each asks for first
    "lightning": "lightning",
    "pytorch_lightning": "pytorch_lightning",
    "skorch": "skorch",
    "transformers": "accelerate",
}
PACKAGES = sorted({*MODULES, *MODULES.values()})


def python(code):
    command = [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_no_trainer_is_imported():
    done = python(f"import fused_reg, fused_reg.integrations; print([n for n in {PACKAGES} if n in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_a_missing_package(module):
    """One sentence that names the command, not the traceback of an import within an import."""
    done = python(f"sys.modules.update(dict.fromkeys({PACKAGES})); import fused_reg.integrations.{module}")
    said = f"needs {MODULES[module]}; run pip install 'fused_reg[{module.replace('_', '-')}]'"
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: fused_reg.integrations: {said}"
    assert "During handling" not in done.stderr
    assert "direct cause" not in done.stderr


def test_the_page_names_the_oldest_versions():
    """Those with which `make oldest` tests."""
    page = (ROOT / "docs" / "torch.md").read_text()
    versions = dict(requirement.split("==") for requirement in oldest())
    assert versions["pytorch-lightning"] == versions["lightning"]
    for package, title in (("lightning", "Lightning"), ("transformers", "transformers"), ("skorch", "skorch")):
        assert f"| {title} from {versions[package]} " in page


def test_the_second_package_of_a_trainer():
    def lacking(name):
        with needs("transformers", "accelerate", extra="transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    with pytest.raises(ModuleNotFoundError, match=r"needs accelerate; run pip install 'fused_reg\[transformers\]'"):
        lacking("accelerate.optimizer")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'safetensors'$"):
        lacking("safetensors")


def make():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    return net, [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net]


def step(net, optimizers):
    net(torch.ones(4, 3)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"regularizer": 0.1}, "regularizer must be a Regularizer or None, got float"),
        ({"lamda": 0.1}, "arguments must be those of Regularizer, got 'lamda'"),
        ({"params": []}, "arguments must be those of Regularizer, got 'params'"),
    ],
)
def test_wrong_arguments(arguments, said):
    with pytest.raises(TypeError, match=f"^RegularizerCallback: {said}$"):
        Attached(**arguments)


def test_a_regularizer_and_arguments_of_one():
    net, _ = make()
    with pytest.raises(TypeError, match=r"^RegularizerCallback: l1 must be None where a regularizer is given"):
        Attached(Regularizer(net, l2=1.0), l1=1.0)


def test_the_penalty_is_that_of_all_optimizers():
    net, optimizers = make()
    callback = Attached(l1=0.5)
    assert callback.penalty is None
    callback._begin(net, optimizers, goes_on=False)
    assert len(callback.attachments) == 2
    assert callback.penalty.item() == pytest.approx(0.5 * sum(p.abs().sum().item() for p in net.parameters()))
    assert not callback.penalty.requires_grad


@pytest.mark.parametrize("include_unused", [False, True])
def test_unused_parameters(include_unused):
    net, optimizers = make()
    callback = Attached(l2=0.5, include_unused=include_unused)
    callback._begin(net, optimizers, goes_on=False)
    net[1].bias.square().sum().backward()  # the other parameters have no gradient
    before = net[1].weight.detach().clone()
    optimizers[1].step()
    assert torch.equal(net[1].weight, before) != include_unused


def test_rows_of_a_batch():
    net = nn.Embedding(4, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(net.parameters())
    callback = Attached(l2=0.5, lazy_rows=True)
    callback._begin(net, [optimizer], goes_on=False)
    net(torch.tensor([1, 1])).sum().backward()
    optimizer.step()
    assert net.weight.grad.indices().tolist() == [[1]]


@pytest.mark.parametrize(
    ("pick", "got"), [(lambda net: [None], "none"), (lambda net: [torch.optim.SGD([torch.ones(1)])], "SGD")]
)
def test_no_optimizer_holds_a_parameter(pick, got):
    net, _ = make()
    with pytest.raises(ValueError, match=f"^RegularizerCallback: an optimizer of .* hold '0.bias' or .*, got {got};"):
        Attached(l1=0.5)._begin(net, pick(net), goes_on=False)


def test_what_cannot_be_attached_leaves_nothing_attached():
    net, optimizers = make()
    del optimizers[1].param_groups[0]["lr"]
    callback = Attached(l1=0.5, mode="prox")
    with pytest.raises(ValueError, match="lr"):
        callback._begin(net, optimizers, goes_on=False)
    assert not any(attachment.is_active for attachment in callback.attachments)


def test_a_context_that_raises_detaches():
    net, optimizers = make()
    callback = Attached(l1=0.5)
    callback._begin(net, optimizers, goes_on=False)
    with pytest.raises(KeyError), callback:
        raise KeyError
    assert len(callback.attachments) == 2
    assert not any(attachment.is_active for attachment in callback.attachments)


def test_an_interrupted_training_has_no_penalty_in_the_next():
    """The optimizers are the same, and the penalty enters once."""
    net, optimizers = make()
    callback = Attached(l1=0.5)
    for _ in range(2):
        callback._begin(net, optimizers, goes_on=False)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * 0.5 * old.sign())


def test_a_training_begins_anew_or_goes_on():
    net, optimizers = make()
    callback = Attached(l1=lambda step: 0.1 * step)
    callback._begin(net, optimizers, goes_on=False)
    step(net, optimizers)
    first = callback.regularizer
    assert first.step == 1
    callback._begin(net, optimizers, goes_on=True)
    assert callback.regularizer is first
    step(net, optimizers)
    assert first.step == 2
    callback._begin(net, optimizers, goes_on=False)
    assert callback.regularizer is not first
    assert callback.regularizer.step == 0
    other, optimizers = make()
    callback._begin(other, optimizers, goes_on=True)
    assert {id(p) for _, p in callback.regularizer.named_parameters()} == {id(p) for p in other.parameters()}


def test_a_given_regularizer_keeps_its_count():
    net, optimizers = make()
    regularizer = Regularizer(net, l1=lambda step: 0.1 * step)
    regularizer.step = 7
    callback = Attached(regularizer)
    callback._begin(net, optimizers, goes_on=False)
    step(net, optimizers)
    assert callback.regularizer is regularizer
    assert regularizer.step == 8


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_is_attached_nowhere_and_goes_on(copied):
    net, optimizers = make()
    callback = Attached(l1=0.5)
    callback._begin(net, optimizers, goes_on=False)
    step(net, optimizers)
    callback.regularizer.set_strength(l1=0.25)
    other = copied(callback)
    assert other.regularizer is None
    assert other.attachments == []
    net, optimizers = make()
    other._begin(net, optimizers, goes_on=True)
    assert other.regularizer.step == 1
    assert other.penalty.item() == pytest.approx(0.25 * sum(p.abs().sum().item() for p in net.parameters()))
