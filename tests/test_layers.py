"""``group="output"`` and ``"input"``: the weights that lead to an output of a layer, or from an input, in every type.

Which these are the tests find by derivatives of what the layers compute. The package has a table of types.
"""

import copy
import re

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.utils import parametrize, prune

from fused_reg import Regularizer, fused_penalty, largest_strength, optim, reference, regularized


def assert_near(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected).to(torch.as_tensor(found).dtype))


class Conv1D(nn.Module):
    """As that of the package transformers."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight)

    def forward(self, x):
        return x @ self.weight + self.bias


class Scaled(nn.Linear):
    """A subclass."""


class OneHot(nn.Module):
    """An embedding as the linear layer that it is."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, x):
        return x @ self.embedding.weight


# name -> layer, an input, the dimension of channels there
LAYERS = {
    "Linear": (lambda: nn.Linear(4, 3), (2, 4), -1),
    "subclass of Linear": (lambda: Scaled(4, 3), (2, 4), -1),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 2), (2, 4, 5), 1),
    "Conv2d": (lambda: nn.Conv2d(4, 3, 2), (2, 4, 5, 5), 1),
    "Conv3d": (lambda: nn.Conv3d(4, 3, 2), (2, 4, 3, 3, 3), 1),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 2), (2, 4, 5), 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 2), (2, 4, 5, 5), 1),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 3, 2), (2, 4, 3, 3, 3), 1),
    "depthwise Conv2d": (lambda: nn.Conv2d(3, 6, 2, groups=3), (2, 3, 5, 5), 1),
    "depthwise ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 3, 2, groups=3), (2, 6, 5), 1),
    "Conv1d with groups": (lambda: nn.Conv1d(6, 4, 2, groups=2), (2, 6, 5), 1),
    "Conv2d with groups": (lambda: nn.Conv2d(6, 9, 2, groups=3), (2, 6, 5, 5), 1),
    "ConvTranspose2d with groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 5, 5), 1),
    "channels_last": (lambda: nn.Conv2d(6, 4, 2, groups=2).to(memory_format=torch.channels_last), (2, 6, 5, 5), 1),
    "Embedding": (lambda: OneHot(nn.Embedding(4, 3)), (2, 4), -1),
    "EmbeddingBag": (lambda: OneHot(nn.EmbeddingBag(4, 3)), (2, 4), -1),
    "transformers' Conv1D": (lambda: Conv1D(3, 4), (2, 4), -1),
    "pruned": (lambda: prune.identity(nn.Linear(4, 3), "weight"), (2, 4), -1),
    "parametrized": (lambda: parametrized(nn.ConvTranspose2d(4, 3, 2)), (2, 4, 5, 5), 1),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)
EVERY_GROUP = pytest.mark.parametrize("group", ["output", "input"])


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def parametrized(module):
    return parametrize.register_parametrization(module, "weight", Doubled())


def weight_of(net):
    return next(p for name, p in net.named_parameters() if "bias" not in name)


def regularizer_of(net, group, **strengths):
    return Regularizer(net.double(), **strengths, group=group, weights_only=True)


def masks_of(net, x, channels, group):
    """For each output, or input, where the weights are that lead to it, or from it: found by derivatives."""
    weight = weight_of(net)
    x = torch.ones_like(x)
    found = []
    count = (net(x) if group == "output" else x).shape[channels]
    for i in range(count):
        if group == "output":
            y = net(x).select(channels, i)
        else:
            one = torch.zeros_like(x)
            one.select(channels, i).fill_(1.0)
            y = net(one) - net(torch.zeros_like(x))
        found.append(torch.autograd.grad(y.sum(), weight)[0] != 0)
    assert sum(found).eq(1).all()  # each weight is in one group
    return found


def case(name, group):
    torch.manual_seed(0)
    make, shape, channels = LAYERS[name]
    net = make().double()
    return net, masks_of(net, torch.randn(shape).double(), channels, group)


def penalty_of(weight, masks):
    return sum(torch.linalg.vector_norm(weight[mask]) for mask in masks)


@EVERY_GROUP
@EVERY_LAYER
def test_values_and_gradients(name, group):
    net, masks = case(name, group)
    regularizer = regularizer_of(net, group, l2_norm=0.3)
    weight = weight_of(net)
    (expected,) = torch.autograd.grad(0.3 * penalty_of(weight, masks), weight)
    value = regularizer()
    assert_near(value.detach(), 0.3 * penalty_of(weight, masks).detach())
    assert_near(torch.autograd.grad(value, weight)[0], expected)
    weight.grad = torch.ones_like(weight)
    regularizer.accumulate_grad_(0.5)
    assert_near(weight.grad, 1 + 0.5 * expected)
    row = regularizer.report().rows[1]
    assert_near(row["value"], float(0.3 * penalty_of(weight.detach(), masks)))
    assert (row["slices"], row["zero_slices"]) == (len(masks), 0)
    assert_near(row["norm"], float(torch.linalg.vector_norm(weight.detach())))


@EVERY_GROUP
@EVERY_LAYER
def test_the_proximal_step_makes_whole_channels_zero(name, group):
    net, masks = case(name, group)
    weight = weight_of(net)
    weight.data[masks[2]] *= 0.01
    before = weight.detach().clone()
    regularizer = regularizer_of(net, group, l2_norm=0.5)
    regularizer.prox_(0.2)
    for i, mask in enumerate(masks):
        norm = torch.linalg.vector_norm(before[mask])
        assert (norm <= 0.1) == (i == 2)
        assert_near(weight.detach()[mask], before[mask] * max(0, 1 - 0.1 / norm))
    assert regularizer.report().rows[1]["zero_slices"] == 1


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD])
@pytest.mark.parametrize(("name", "group"), [("ConvTranspose2d", "output"), ("Conv2d with groups", "input")])
def test_attached(name, group, make, mode):
    net, masks = case(name, group)
    weight = weight_of(net)
    optimizer = make([weight], lr=0.1)
    attachment = regularizer_of(net, group, l2_norm=0.5).attach(optimizer, mode=mode)
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        if mode == "grad" or make is optim.SGD:
            assert_near(attachment.value, 0.5 * penalty_of(before, masks))
        shrunk = [before[mask] * (1 - 0.05 / torch.linalg.vector_norm(before[mask])) for mask in masks]
        for mask, expected in zip(masks, shrunk, strict=True):
            assert_near(weight.detach()[mask], expected)


def with_groups():
    net, masks = case("Conv2d with groups", "input")
    return net, net.weight, masks


def test_channels_of_groups_beside_other_terms():
    """Of several layers, with L1 and reference weights, and the factor of each group's size."""
    net, weight, masks = with_groups()
    other = nn.Conv2d(9, 4, 1).double()
    both = nn.Sequential(net, other)
    strengths = {"l1": 0.1, "l2_norm": 0.3, "group": "input", "weights_only": True}
    regularizer = Regularizer(both, **strengths, group_weights="sqrt_size")
    size = int(masks[0].sum())
    expected = 0.1 * (weight.abs().sum() + other.weight.abs().sum()) + 0.3 * size**0.5 * penalty_of(weight, masks)
    expected = expected + 0.3 * 2 * sum(torch.linalg.vector_norm(x) for x in other.weight.unbind(1))
    assert_near(regularizer().detach(), expected.detach())
    assert_near(regularizer.report().total["value"], expected.detach())
    start = weight.detach().clone()
    regularizer = Regularizer(net, l2_norm=0.3, group="input", weights_only=True, toward="start")
    weight.data += torch.linspace(-1, 1, weight.numel()).double().reshape(weight.shape)
    expected = 0.3 * penalty_of(weight.detach() - start, masks)
    assert_near(regularizer().detach(), expected)
    assert_near(regularizer.report().total["value"], expected)
    regularizer.prox_(1e6)
    assert torch.equal(weight, start)


def test_gradients_of_such_channels_that_are_missing_or_of_another_dtype():
    net, weight, masks = with_groups()
    regularizer = Regularizer(net, l2_norm=0.3, group="input", weights_only=True)
    (expected,) = torch.autograd.grad(0.3 * penalty_of(weight, masks), weight)
    regularizer.accumulate_grad_()
    assert_near(weight.grad, expected)
    weight.data = weight.data.to(torch.bfloat16)
    weight.grad, weight.grad_dtype = None, None
    weight.grad = torch.zeros(weight.shape)
    regularizer.accumulate_grad_()
    torch.testing.assert_close(weight.grad, expected.float(), rtol=0.02, atol=1e-3)
    weight.requires_grad_(False)
    before = weight.grad.clone()
    regularizer = Regularizer(net, l2_norm=0.3, group="input")
    regularizer.accumulate_grad_()
    assert torch.equal(weight.grad, before)


def test_what_such_channels_refuse(mesh):
    """Errors name the parameter, and nothing is written."""
    net, weight, _ = with_groups()
    regularizer = Regularizer(net, l2_norm=0.3, group="input", weights_only=True)
    weight.data[0, 0, 0, 0] = 5.0
    before = weight.detach().clone()
    weight.data = weight.data[:, :1].expand(-1, 2, -1, -1)
    with pytest.raises(ValueError, match=r"^prox_: params\['weight'\] must have memory for each of its elements"):
        regularizer.prox_(0.1)
    weight.data = before
    with pytest.raises(ValueError, match=r"step must be finite and >= 0"):
        regularizer.prox_(-1.0)
    assert torch.equal(weight, before)
    net.weight = nn.Parameter(distribute_tensor(before, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"params\['weight'\] must be a plain tensor, .* groups=3, got a DTensor"):
        Regularizer(net, l2_norm=0.3, group="input", weights_only=True)()


def test_channels_in_a_call_of_their_own(monkeypatch):
    """Norms of rows are another call; and no step with such a call is one that repeats the last."""
    net, weight, masks = with_groups()
    both = nn.Sequential(net, nn.Linear(3, 2).double())
    rules = [("1.*", {"group": "row"})]
    regularizer = Regularizer(both, l2_norm=0.3, group="input", weights_only=True, rules=rules)
    weight.grad = torch.ones_like(weight)
    (expected,) = torch.autograd.grad(0.3 * penalty_of(weight, masks), weight)
    regularizer.accumulate_grad_()
    assert_near(weight.grad, 1 + expected)

    def fail(*_):
        raise AssertionError("repeated")

    monkeypatch.setattr("fused_reg.regularizer.calls._Call.add_to", fail)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    Regularizer(net, l2_norm=0.3, group="input", weights_only=True).attach(optimizer)
    for _ in range(2):
        optimizer.step()


def test_layers_with_groups_that_share_a_weight(mesh):
    one, several = nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(4, 4, 3, groups=2, bias=False)
    several.weight = one.weight
    net = nn.Sequential(one, several)
    assert Regularizer(net, l2_norm=0.1, group="output").report().rows[1]["group"] == "row"
    with pytest.raises(ValueError, match="its layers differ, as it is tied"):
        Regularizer(net, l2_norm=0.1, group="input")
    weight = several.weight.detach()
    several.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    net = nn.Sequential(several, nn.Linear(2, 2))
    regularizer = Regularizer(net, l1=0.1, group="input", rules=[("1.*", {"l2_norm": 0.1})], include="*weight")
    expected = 0.1 * weight.abs().sum() + 0.1 * net[1].weight.abs().sum()
    expected = expected + 0.1 * sum(torch.linalg.vector_norm(x) for x in net[1].weight.unbind(1))
    assert_near(regularizer().detach(), expected.detach())


def test_a_compiled_loss_with_such_channels():
    net, weight, masks = with_groups()
    regularizer = Regularizer(net, l2_norm=0.3, group="input", weights_only=True)
    compiled = torch.compile(lambda: 2 * regularizer(), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(0.6 * penalty_of(weight, masks), weight)
    assert_near(torch.autograd.grad(compiled(), weight)[0], expected[0])


def test_attention_and_biases():
    attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    whole = nn.MultiheadAttention(4, 2)
    for net in (attention, whole):
        weights = dict(Regularizer(net, l2_norm=1.0, group="output").named_parameters()).values()
        expected = reference.fused_penalty(weights, l2_norm=1.0, group="row")
        assert_near(Regularizer(net, l2_norm=1.0, group="output")().detach(), expected.detach())
        expected = reference.fused_penalty(weights, l2_norm=1.0, group="column")
        assert_near(Regularizer(net, l2_norm=1.0, group="input")().detach(), expected.detach())


def test_rules_marks_and_mixed_layers():
    net = nn.Sequential(nn.ConvTranspose1d(4, 3, 2), regularized(nn.Conv1d(3, 2, 2), l2_norm=0.2, group="input"))
    rules = [(nn.ConvTranspose1d, {"l2_norm": 0.1, "group": "output"})]
    regularizer = Regularizer(net, rules=rules, weights_only=True)
    assert_near(
        regularizer().detach(),
        reference.fused_penalty([net[0].weight, net[1].weight], l2_norm=[0.1, 0.2], group="column").detach(),
    )
    assert 'group="column"' in repr(regularizer)
    assert regularizer.get_config()["rules"] == rules
    again = Regularizer.from_config(regularizer.get_config(), net)
    again.load_state_dict(regularizer.state_dict())
    copied, _its_net = copy.deepcopy((again, net))
    assert_near(copied().detach(), regularizer().detach())
    mixed = Regularizer(nn.Sequential(nn.Linear(3, 3), nn.Embedding(4, 3)), l2_norm=0.1, group="output").report()
    groups = {row["name"]: row["group"] for row in mixed.rows if row["level"] == "parameter"}
    assert groups == {"0.weight": "row", "0.bias": "row", "1.weight": "column"}


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(2, 3))
        self.scale = nn.Parameter(torch.ones(3))


def test_a_layer_that_is_unknown():
    net = nn.Sequential(nn.Linear(3, 3), Own())
    error = (
        "Regularizer: group=\"output\" of '1.kernel' must be slices of a layer that is known, got Own; give it "
        'group="row", "column" or "tensor" by a rule'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        Regularizer(net, l2_norm=0.1, group="output")
    regularizer = Regularizer(net, l2_norm=0.1, group="output", rules=[("1.kernel", {"group": "column"})])
    assert regularizer.report()["1.kernel"]["group"] == "column"
    # Where it has no norms it does not matter, until it gets some.
    regularizer = Regularizer(net, l1=0.1, group="output", rules=[(nn.Linear, {"l2_norm": 0.1})])
    assert [row["group"] for row in regularizer.report().rows if row["level"] == "parameter"] == GROUPS_OF_NET
    before = regularizer.state_dict()
    with pytest.raises(ValueError, match=r"^set_strength: group=\"output\" of '1.kernel' must be slices of a layer"):
        regularizer.set_strength(l2_norm=0.3, where="1.*")
    assert regularizer.state_dict() == before
    regularizer.set_strength(l2_norm=0.3, where="1.scale")


GROUPS_OF_NET = ["row", "row", "tensor", "row"]


@pytest.mark.parametrize(
    ("make", "group", "message"),
    [
        (lambda: nn.LSTM(3, 3), "output", "got LSTM"),
        (lambda: [nn.Parameter(torch.ones(2, 2))], "output", "needs the layer, got a list of tensors; pass the model"),
        (lambda: tied(), "output", "its layers differ, as it is tied"),
        (
            lambda: nn.Linear(3, 3),
            "outputs",
            '"output", "input", or a pair of "row", "column" or "block" and n >= 1, got',
        ),
    ],
)
def test_what_is_no_slice(make, group, message):
    with pytest.raises(ValueError, match=f"group.*{re.escape(message)}"):
        Regularizer(make(), l2_norm=0.1, group=group)


def tied():
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    net[1].weight = net[0].weight
    return net


def test_functions_know_no_layers():
    w = torch.ones(2, 2, requires_grad=True)
    message = (
        'group must be "tensor", "row", "column", or a pair of "row", "column" or "block" and n >= 1, got \'output\''
    )
    message += "; a Regularizer of a module knows its layers"
    with pytest.raises(ValueError, match=f"^fused_penalty: {message}$"):
        fused_penalty([w], l2_norm=0.1, group="output")
    with pytest.raises(ValueError, match=message):
        largest_strength([w], w.sum, group="output")
