"""``group_weights`` with a tensor for each parameter: a factor of the strength of each group."""

import copy

import pytest
import torch
from test_together import CHANNELS, NEURONS, RULES, assert_near, joined, make_net, penalty_of
from torch import nn

from fused_reg import Regularizer, optim
from fused_reg.schedules import LinearRamp

WEIGHTS = {"0.weight": torch.tensor([0.0, 0.5, 1.0, 3.0]), "4.weight": torch.tensor([2.0, 0.0, 1e-3, 1.0, 7.0])}
SETS = [(name,) for name, _ in make_net().named_parameters()]


def in_order(sets, net):
    """The weights of each set; 1 where there are none."""
    known = {name: x.to(joined(net, sets[0])) for name, x in WEIGHTS.items()}
    ones = [torch.ones_like(joined(net, names)[:, 0]) for names in sets]
    return [next((known[n] for n in names if n in known), one) for names, one in zip(sets, ones, strict=True)]


@pytest.mark.parametrize("together", [None, RULES], ids=["alone", "together"])
@pytest.mark.parametrize("strength", [0.3, torch.tensor(0.3, dtype=torch.float64), LinearRamp(0.3, 0.6, 10)], ids=type)
def test_values_gradients_and_steps(together, strength, device):
    net = make_net(device=device)
    params = [*net.parameters()]
    sets = SETS if together is None else [CHANNELS, NEURONS]
    weights = {name: x.to(device) for name, x in WEIGHTS.items()}
    given = {"group": "output", "group_weights": weights, "together": together}
    regularizer = Regularizer(net, l2_norm=strength, **given)
    value, expected = regularizer(), penalty_of(net, sets, 0.3, in_order(sets, net))
    assert_near(value.detach(), expected.detach())
    grads = torch.autograd.grad(expected, params)
    assert_near(torch.autograd.grad(value, params, create_graph=True), grads)
    regularizer.accumulate_grad_(2.0)
    assert_near([p.grad for p in params], [2 * g for g in grads])
    assert regularizer.report().total["value"] == pytest.approx(expected.item(), rel=1e-12)
    before = [joined(net, names).detach() for names in sets]
    regularizer.prox_(1.0)
    for names, weights, w in zip(sets, in_order(sets, net), before, strict=True):
        thresholds, norms = 0.3 * weights[:, None], w.norm(dim=1, keepdim=True)
        shrunk = torch.where(norms > thresholds, w * (1 - thresholds / norms), 0)
        assert_near(joined(net, names).detach(), shrunk)
        if "4.weight" in names:
            assert_near(joined(net, names).detach()[1], w[1], rtol=0, atol=0)  # a weight of 0 keeps its bits


def test_a_weight_of_0_and_a_norm_of_0():
    """No NaN; and what is NaN stays in its group, also where the weight is 0."""
    weight = nn.Parameter(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [torch.nan, 1.0]]))
    weights = torch.tensor([0.0, 0.0, 2.0, 1.0])
    regularizer = Regularizer([("w", weight)], l2_norm=0.5, group="row", group_weights=[weights])
    assert regularizer().isnan()
    with torch.no_grad():
        weight[3] = torch.tensor([6.0, 8.0])
    value = regularizer()
    assert value == 5
    value.backward()
    assert_near(weight.grad, torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.3, 0.4]]), rtol=1e-6)
    regularizer.prox_(4.0)
    assert_near(weight.detach(), torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [4.8, 6.4]]), rtol=1e-6)


def test_weights_that_change_in_place():
    """As importances are they are kept, not copied: weights that are found anew (adaptive group lasso)."""
    net = make_net()
    weights = {"4.weight": torch.ones(5)}
    regularizer = Regularizer(net, l2_norm=0.3, group="output", group_weights=weights)
    weights["4.weight"].copy_(1 / net[4].weight.detach().norm(dim=1))
    own = [torch.ones(len(p)) if p is not net[4].weight else weights["4.weight"].double() for p in net.parameters()]
    assert_near(regularizer().detach(), penalty_of(net, SETS, 0.3, own).detach())


def test_channels_of_a_convolution_with_groups():
    """Whose groups are those of several runs of rows."""
    net = nn.Sequential(*(nn.Conv2d(4, 6, 3, groups=2, bias=False) for _ in range(2))).double()
    weights = {"0.weight": torch.arange(4) / 4, "1.weight": torch.arange(4) / 2 + 3}
    regularizer = Regularizer(net, l2_norm=0.3, group="input", group_weights=weights)
    params = [*net.parameters()]
    norms = [p.reshape(2, 3, 2, 9).transpose(1, 2).flatten(2).norm(dim=2).reshape(-1) for p in params]
    expected = 0.3 * sum((w.double() * own).sum() for w, own in zip(weights.values(), norms, strict=True))
    value = regularizer()
    assert_near(value.detach(), expected.detach())
    grads = torch.autograd.grad(expected, params)
    assert_near(torch.autograd.grad(value, params), grads)
    regularizer.accumulate_grad_()
    regularizer.accumulate_grad_()
    assert_near([p.grad for p in params], [2 * g for g in grads])


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD])
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_attached(make, mode):
    net, other = make_net(), make_net()
    optimizer = make(net.parameters(), lr=0.1)
    attachment = Regularizer(net, l2_norm=0.3, group="output", group_weights=WEIGHTS).attach(optimizer, mode=mode)
    by_hand = Regularizer(other, l2_norm=0.3, group="output", group_weights=WEIGHTS)
    expected = torch.optim.SGD(other.parameters(), lr=0.1)
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        expected.zero_grad()
        net(x).square().sum().backward()
        other(x).square().sum().backward()
        if mode == "grad":
            by_hand().backward()
        optimizer.step()
        expected.step()
        if mode == "prox":
            by_hand.prox_(0.1)
        assert_near([*net.parameters()], [*other.parameters()])
    assert attachment.value.isfinite()


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("use", ["call", "accumulate_grad_", "prox_"])
@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_in_compiled_code(bad, use, backend):
    """They are looked at where they are used, and the sentence is that of a use that is not compiled."""
    torch._dynamo.reset()
    results, errors = [], []
    for is_compiled in (False, True):
        net, weights = make_net(), {name: x.clone() for name, x in WEIGHTS.items()}
        regularizer = Regularizer(net, l2_norm=0.3, group="output", group_weights=weights)
        step = {"call": regularizer, "accumulate_grad_": regularizer.accumulate_grad_}.get(use, regularizer.prox_)
        args = (0.5,) * (use == "prox_")
        run = torch.compile(lambda *x, step=step: step(*x), backend=backend, fullgraph=True) if is_compiled else step
        values = [run(*args)]
        weights["4.weight"][0] = 9
        values.append(run(*args))
        results.append([x.detach() for x in values if x is not None])
        before = [p.detach().clone() for p in net.parameters()]
        results[-1] += before
        weights["4.weight"][2] = bad
        with pytest.raises(ValueError, match=r"group_weights\['4.weight'\] must be finite and >= 0") as found:
            run(*args)
        errors.append(str(found.value))
        assert_near([p.detach() for p in net.parameters()], before, rtol=0, atol=0)
        weights["4.weight"][2] = 1
        run(*args)
    assert_near(results[1], results[0])
    assert errors[1] == errors[0]


def test_configurations_and_copies():
    net = make_net()
    regularizer = Regularizer(net, l2_norm=0.3, group="output", group_weights=WEIGHTS)
    again = Regularizer.from_config(regularizer.get_config(), net)
    assert again() == regularizer()
    net, copied = copy.deepcopy((net, regularizer))
    assert copied() == regularizer()
    copied.load_state_dict(regularizer.state_dict())
    assert copied() == regularizer()
