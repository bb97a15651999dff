"""Groups of several parameters in all that uses a `Regularizer`: attached, compiled, differentiated again, trained
strengths, schedules, states, reports, and copies."""

import copy
import pickle

import pytest
import torch
from test_together import CHANNELS, NEURONS, RULES, assert_near, joined, make_net, penalty_of, prox_of
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parametrizations, prune

from fused_reg import NORMS, Regularizer, optim, regularized
from fused_reg.schedules import LinearRamp

SETS = [CHANNELS, NEURONS]


def regularizer_of(net, l2_norm=0.3, **given):
    return Regularizer(net, l2_norm=l2_norm, group="output", together=RULES, **given)


def x_of(i: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i))


def backward(net, i: int, penalty=None) -> None:
    net.zero_grad()
    loss = net(x_of(i)).square().mean()
    (loss if penalty is None else loss + penalty(net)).backward()


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.05}),
    (optim.SGD, {"lr": 0.05}),
    (torch.optim.Adam, {"lr": 0.05}),
    (optim.AdamW, {"lr": 0.05}),
]


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS, ids=lambda x: getattr(x, "__module__", ""))
def test_attached_gradients(make, options):
    """As if the penalty were in the loss; ``.grad`` is there from the second step on, and not."""
    net, other = make_net(), make_net()
    optimizer, expected = make(net.parameters(), **options), make(other.parameters(), **options)
    attachment = regularizer_of(net, l1=0.01).attach(optimizer)

    def penalty(model):
        return penalty_of(model, SETS, 0.3) + 0.01 * sum(p.abs().sum() for p in model.parameters())

    for i in range(4):
        assert_near(attachment.value if i == 0 else penalty(net).detach(), penalty(other).detach(), rtol=1e-9)
        value = penalty(net).detach()
        backward(net, i)
        optimizer.step()
        assert_near(attachment.value, value)
        backward(other, i, penalty)
        expected.step()
        assert_near([*net.parameters()], [*other.parameters()], rtol=1e-9)


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS[:2], ids=lambda x: getattr(x, "__module__", ""))
@pytest.mark.parametrize("is_split", [False, True])
def test_attached_steps(make, options, is_split):
    """Also with biases in a parameter group of their own, of the same learning rate."""
    net, other = make_net(), make_net()
    groups = net.parameters()
    if is_split:
        groups = [{"params": [p for p in net.parameters() if (p.ndim > 1) == is_weight]} for is_weight in (True, False)]
    optimizer, expected = make(groups, **options), torch.optim.SGD(other.parameters(), **options)
    attachment = regularizer_of(net, l2_norm=16.0, l1=0.1, l2=0.2).attach(optimizer, mode="prox")
    for i in range(8):
        backward(net, i)
        optimizer.step()
        backward(other, i)
        expected.step()
        after = prox_of(other, SETS, 0.05 * 16, 0.05 * 0.1, shrink=1 + 2 * 0.05 * 0.2)
        for names, own in zip(SETS, after, strict=True):
            assert_near(joined(net, names).detach(), own, rtol=1e-9)
        other.load_state_dict(net.state_dict())
    assert attachment.value.isfinite()
    assert (joined(net, NEURONS) == 0).all(1).any() or (joined(net, CHANNELS) == 0).all(1).any()


def test_a_member_without_a_gradient_stays_as_it_is():
    """In a proximal step it is not in its group; with mode "grad" its norm counts, as in the value."""
    for mode in ("grad", "prox"):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        attachment = regularizer_of(net).attach(optimizer, mode=mode)
        value = penalty_of(net, SETS, 0.3)
        (expected,) = torch.autograd.grad(value, net[4].weight)
        (shrunk,) = prox_of(net, [NEURONS[:1]], 0.5 * 0.3)
        before = net[4].weight.detach().clone()
        net[4].weight.grad = torch.zeros_like(net[4].weight)
        rest = [p.detach().clone() for p in net.parameters() if p is not net[4].weight]
        optimizer.step()
        assert_near(net[4].weight.detach(), before - 0.5 * expected if mode == "grad" else shrunk)
        assert_near([p.detach() for p in net.parameters() if p is not net[4].weight], rest, rtol=0, atol=0)
        if mode == "grad":
            assert_near(attachment.value, value.detach())
            assert net[4].bias.grad is None
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    regularizer_of(net).attach(optimizer, include_unused=True)
    net[4].weight.grad = torch.zeros_like(net[4].weight)
    expected = torch.autograd.grad(penalty_of(net, SETS, 0.3), [*net.parameters()])
    optimizer.step()
    assert_near([p.grad for p in net.parameters()], [*expected])


def test_scaled_gradients():
    """As a `GradScaler` leaves them to a fused optimizer; in a step that it skips nothing moves."""
    net = make_net()
    groups = [
        {"params": [*net[0].parameters(), *net[1].parameters()]},
        {"params": net[4].weight},
        {"params": net[4].bias},
    ]
    for mode in ("grad", "prox"):
        optimizer = torch.optim.SGD(groups, lr=0.1, fused=True)
        with regularizer_of(net).attach(optimizer, mode=mode):
            optimizer.grad_scale = torch.tensor(8.0)
            optimizer.found_inf = torch.tensor(1.0)
            backward(net, 0)
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.step()
            assert_near([p.detach() for p in net.parameters()], before, rtol=0, atol=0)
            optimizer.found_inf = torch.tensor(0.0)
            backward(net, 0)
            grads = [8 * p.grad for p in net.parameters()]
            for p, own in zip(net.parameters(), grads, strict=True):
                p.grad = own
            other = copy.deepcopy(net)
            optimizer.step()
        backward(other, 0, (lambda m: penalty_of(m, SETS, 0.3)) if mode == "grad" else None)
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        after = [joined(other, names).detach() for names in SETS] if mode == "grad" else prox_of(other, SETS, 0.03)
        for names, own in zip(SETS, after, strict=True):
            assert_near(joined(net, names).detach(), own, rtol=1e-9)


def test_derivatives_of_higher_order():
    net = make_net()
    params = [*net.parameters()]
    regularizer = regularizer_of(net)
    assert torch.autograd.gradgradcheck(lambda *_: regularizer(), params)
    first = [torch.autograd.grad(v, params, create_graph=True) for v in (regularizer(), penalty_of(net, SETS, 0.3))]
    second = [torch.autograd.grad(sum(g.square().sum() for g in own), params) for own in first]
    assert_near(*second, rtol=1e-10)


def test_trained_strengths():
    net = make_net()
    params = [*net.parameters()]
    strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value, expected = regularizer_of(net, strength, l1=0.1)(), penalty_of(net, SETS, strength)
    expected = expected + 0.1 * sum(p.abs().sum() for p in params)
    assert_near(value, expected)
    assert_near(
        torch.autograd.grad(value, [strength, *params], create_graph=True),
        torch.autograd.grad(expected, [strength, *params], create_graph=True),
    )
    with pytest.raises(ValueError, match=r"^attach: l2_norm of '0.weight' must be a constant"):
        regularizer_of(net, strength).attach(torch.optim.SGD(params, lr=0.1))


def test_transforms():
    net = make_net()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    sets = [CHANNELS, NEURONS]

    def ours(ps):
        return Regularizer(ps.items(), l2_norm=0.3, group="row", together=sets)()

    def expected(ps):
        whole = [torch.cat([ps[n].reshape(len(ps[n]), -1) for n in names], 1) for names in sets]
        return 0.3 * sum(w.norm(dim=1).sum() for w in whole)

    assert_near(grad(ours)(params), grad(expected)(params))
    few = {name: params[name] for name in NEURONS}
    sets = [NEURONS]
    for row, other in zip(*(jacrev(jacrev(f))(few).values() for f in (ours, expected)), strict=True):
        assert_near([*row.values()], [*other.values()], rtol=1e-10)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in few.items()}
    assert_near(vmap(grad(ours))(stacked), vmap(grad(expected))(stacked))


def test_a_functional_call():
    """A constant there: the regularizer is of its own parameters."""
    net = make_net().eval()
    regularizer = regularizer_of(net)
    params = {name: p.detach() + 1 for name, p in net.named_parameters()}

    def loss(ps):
        return functional_call(net, ps, (x_of(0),)).sum() + regularizer()

    expected = grad(lambda ps: functional_call(net, ps, (x_of(0),)).sum())(params)
    assert_near(grad(loss)(params), expected)


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
def test_compiled():
    results = []
    for is_compiled in (False, True):
        net = make_net()
        regularizer = regularizer_of(net, LinearRamp(0.1, 0.5, 4), l1=0.01)

        def step(x, net=net, regularizer=regularizer):
            (net(x).square().mean() + regularizer()).backward()
            regularizer.accumulate_grad_(0.5)
            regularizer.prox_(0.5)

        run = torch.compile(step, backend="aot_eager") if is_compiled else step
        for i in range(3):
            net.zero_grad()
            run(x_of(i))
            regularizer.advance()
        results.append([p.detach() for p in net.parameters()] + [p.grad for p in net.parameters()])
    assert_near(results[1], results[0], rtol=1e-10)


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
@pytest.mark.parametrize("given", [{}, {"together": "bias"}], ids=["several groups", "together"])
def test_compiled_as_one_graph(given):
    """Also where there are gradients to add to, and several calls."""
    results = []
    for is_compiled in (False, True):
        net = make_net()
        rules = [("0.*", {"group": "row"}), ("4.*", {"group": "tensor"})]
        regularizer = Regularizer(net, l2_norm=0.3, l1=0.01, rules=rules, exclude="1.*", **given)

        def step(regularizer=regularizer):
            value = regularizer.accumulate_grad_(0.5)
            regularizer.prox_(0.5)
            return value

        run = torch.compile(step, backend="aot_eager", fullgraph=True) if is_compiled else step
        values = [run() for _ in range(3)]
        results.append([*values, *net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == 3 + 6 + 4
    assert_near(results[1], results[0], rtol=1e-10)


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_compiled_optimizer(mode):
    results = []
    for is_compiled in (False, True):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        regularizer_of(net).attach(optimizer, mode=mode)
        step = torch.compile(optimizer.step, backend="eager") if is_compiled else optimizer.step
        for i in range(3):
            backward(net, i)
            step()
        results.append([p.detach() for p in net.parameters()])
    assert_near(results[1], results[0], rtol=1e-10)


def test_schedules_and_states():
    net = make_net()
    regularizer = regularizer_of(net, LinearRamp(0.0, 1.0, 10))
    regularizer.advance()
    regularizer.advance()
    assert_near(regularizer().detach(), penalty_of(net, SETS, 0.2).detach())
    again = regularizer_of(net, LinearRamp(0.0, 1.0, 10))
    again.load_state_dict(regularizer.state_dict())
    again.advance()
    assert_near(again().detach(), penalty_of(net, SETS, 0.3).detach())
    other, copied = pickle.loads(pickle.dumps((net, again)))
    copied.advance()
    assert_near(copied().detach(), penalty_of(other, SETS, 0.4).detach())
    for made in (copy.deepcopy((net, regularizer_of(net))), (net, None)):
        other, copied = made
        copied = copied or Regularizer.from_config(regularizer_of(net).get_config(), net)
        copied.set_strength(l2_norm=0.7)
        assert_near(copied().detach(), penalty_of(other, SETS, 0.7).detach())
        copied.set_strength(l2_norm=0.0)
        assert copied() == 0
    state = regularizer.state_dict()
    state["groups"] = [{**group, "params": [name]} for group in state["groups"] for name in group["params"]]
    state["groups"][1] = {**state["groups"][1], "l2_norm": 9.0, "scheduled": []}
    before = regularizer.state_dict()
    with pytest.raises(ValueError, match=r"^load_state_dict: l2_norm of '0.bias' must be that of '0.weight', because"):
        regularizer.load_state_dict(state)
    assert regularizer.state_dict() == before


def test_reports():
    """The value of a set's norms, and its groups, are in the row of its first parameter, each once."""
    net = make_net()
    with torch.no_grad():
        net[4].weight[1:3] = 0
        net[4].bias[2:4] = 0
    regularizer = regularizer_of(net, l1=0.1)
    report = regularizer.report()
    total = penalty_of(net, SETS, 0.3) + 0.1 * sum(p.abs().sum() for p in net.parameters())
    assert report.total["value"] == pytest.approx(total.item(), rel=1e-12)
    for names in SETS:
        own = 0.3 * joined(net, names).norm(dim=1).sum() + 0.1 * dict(net.named_parameters())[names[0]].abs().sum()
        assert report[names[0]]["value"] == pytest.approx(own.item(), rel=1e-12)
        assert report[names[0]]["slices"] == len(joined(net, names))
        for name in names[1:]:
            assert report[name]["value"] == pytest.approx(0.1 * dict(net.named_parameters())[name].abs().sum().item())
            assert "slices" not in report[name]
    assert (report["4.weight"]["zero_slices"], report["4.weight"]["zeros"]) == (1, 32)
    assert (report["group 0"]["zero_slices"], report["group 0"]["slices"]) == (1, 9)
    net[4].weight.requires_grad_(False)
    report = regularizer.report()
    assert (report["4.bias"]["zero_slices"], report["4.bias"]["slices"]) == (2, 5)
    assert "1 of 4" not in str(report) or str(report)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1e200)
    assert report.total["value"] == report.total["value"]
    assert regularizer.report().total["value"] == pytest.approx(regularizer().item(), rel=1e-12)


def test_layers_that_compute_their_weights():
    """A bias is found by the name of the weight before pruning; with a parametrization by the name of what it makes."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    prune.l1_unstructured(net[0], "weight", 0.5)
    parametrizations.orthogonal(net[1])
    params = dict(net.named_parameters())
    names = [("0.weight_orig", "0.bias"), ("1.parametrizations.weight.original", "1.bias")]
    expected = sum(torch.cat([params[a], params[b][:, None]], 1).norm(dim=1).sum() for a, b in names)
    assert_near(Regularizer(net, l2_norm=0.3, group="row", together="bias")().detach(), 0.3 * expected.detach())


WEIGHT = "parametrizations.weight.original"
#: How a layer computes its weight, and the parameters of a neuron.
COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, ["bias", f"{WEIGHT}0", f"{WEIGHT}1"]),
    "its old form": (nn.utils.weight_norm, ["bias", "weight_g", "weight_v"]),
    "with one size": (lambda layer: parametrizations.weight_norm(layer, dim=None), ["bias", f"{WEIGHT}1"]),
    "of the bias, too": (
        lambda layer: parametrizations.weight_norm(parametrizations.weight_norm(layer), "bias", dim=None),
        [f"{WEIGHT}0", f"{WEIGHT}1", "parametrizations.bias.original1"],
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("way", COMPUTED)
@pytest.mark.parametrize("layer", [nn.Linear, lambda i, o: nn.Conv2d(i, o, 1)], ids=["linear", "convolution"])
def test_a_weight_that_is_computed_of_several_parameters(layer, way):
    """All of them make up a neuron, with its bias; a number for all neurons is of none."""
    compute, names = COMPUTED[way]
    net = compute(layer(4, 3)).double()
    rest = [(name,) for name, p in net.named_parameters() if name not in names and p.ndim > 0]
    alone = sum(p.abs() for p in net.parameters() if p.ndim == 0)
    found = Regularizer(net, l2_norm=0.3, group="output", together="bias")
    assert_near(found().detach(), (penalty_of(net, [tuple(names), *rest], 0.3) + 0.3 * alone).detach())


def test_a_computed_weight_before_a_normalization():
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 3, 1)), nn.BatchNorm2d(3)).double()
    found = Regularizer(net, l2_norm=0.3, group="output", together=RULES)
    assert_near(found().detach(), penalty_of(net, [[name for name, _ in net.named_parameters()]], 0.3).detach())
    gates = Regularizer(net, l2_norm=0.3, group="output", together=RULES, exclude="*.original1")
    names = [name for name, _ in net.named_parameters() if not name.endswith("1")]
    assert_near(gates().detach(), penalty_of(net, [names], 0.3).detach())


def test_layers_with_other_names():
    attention = nn.MultiheadAttention(4, 2).double()
    lstm = nn.LSTM(3, 2).double()
    for layer in (attention, lstm):
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_()
        sets = [(n, n.replace("weight", "bias")) for n, p in layer.named_parameters() if p.ndim > 1]
        found = Regularizer(layer, l2_norm=0.3, group="row", together="bias")
        assert len(sets) == 2
        assert_near(found().detach(), penalty_of(layer, sets, 0.3).detach())


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda net: torch.compile(net, backend="eager"),
        lambda net: nn.Sequential(*(torch.compile(layer, backend="eager") for layer in net)),
        nn.SyncBatchNorm.convert_sync_batchnorm,
    ],
    ids=["parallel", "compiled", "compiled layers", "converted"],
)
def test_rules_through_wrappers(wrap):
    net = make_net()
    expected = penalty_of(net, SETS, 0.3).detach()
    assert_near(regularizer_of(wrap(net))().detach(), expected)


def test_marks():
    net = nn.Sequential(regularized(nn.Linear(4, 3), l2_norm=0.3, group="row", bias=True), nn.Linear(3, 2)).double()
    found = Regularizer(net, together="bias")
    assert_near(found().detach(), penalty_of(net, [("0.weight", "0.bias")], 0.3).detach())


def test_a_layer_of_another_size():
    net = make_net()
    regularizer = regularizer_of(net)
    net[4] = nn.Linear(16, 7).double()
    with pytest.warns(UserWarning, match="it follows its module"):
        value = regularizer()
    assert_near(value.detach(), penalty_of(net, SETS, 0.3).detach())


def test_roots_of_sizes():
    """``sqrt_size`` is of the whole group."""
    net = make_net()
    found = regularizer_of(net, group_weights="sqrt_size")
    roots = [torch.full((len(joined(net, names)),), joined(net, names).shape[1]).double().sqrt() for names in SETS]
    assert_near(found().detach(), penalty_of(net, SETS, 0.3, roots).detach())


def test_a_linear_layer_before_a_normalization():
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    sets = [("0.weight", "1.weight", "1.bias"), ("2.weight",)]
    found = Regularizer(net, l2_norm=0.3, group="row", together=NORMS, exclude=["0.bias", "2.bias"])
    assert_near(found().detach(), penalty_of(net, sets, 0.3).detach())
