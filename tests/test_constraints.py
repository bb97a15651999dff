"""``lower``, ``upper`` and ``max_norm``: constraints, in everything that takes a proximal step."""

import copy
import math
import re

import pytest
import torch
from oracle import assert_same_bits
from samples import DTYPES, draw, mixed_list

from fused_reg import Regularizer, accumulate_grad_, fused_penalty, optim, prox_, reference, regularized, value_and_grad

COUNT = len(mixed_list())
GIVEN = {
    "non-negative": {"lower": 0.0},
    "a box": {"lower": -0.25, "upper": 0.5},
    "beside the others": {"l1": 0.1, "l2": 0.2, "smooth_l1": 0.3, "beta": 0.5, "lower": -0.5, "upper": 0.75},
    "bounds each": {
        "lower": [-0.5 if i % 2 else -math.inf for i in range(COUNT)],
        "upper": torch.tensor([0.5 * (i % 3) if i % 3 else math.inf for i in range(COUNT)]).double(),
    },
    "norms": {"max_norm": 0.5},
    "norms of rows": {"l1": 0.1, "l2": 0.2, "l2_norm": 0.3, "max_norm": 0.5, "group": "row"},
    "norms each": {"max_norm": [0.5 if i % 2 else math.inf for i in range(COUNT)], "group": "column"},
}
EVERY = pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)


@EVERY
def test_proximal_steps_agree_with_the_reference(given, device):
    params, expected = mixed_list(device), mixed_list(device)
    prox_(params, **given, step=0.7)
    reference.prox_(expected, **given, step=0.7)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e, rtol=8 * torch.finfo(p.dtype).eps, atol=torch.finfo(p.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1e-3, 1.0, 50.0])
def test_a_constraint_alone_is_a_projection(dtype, step, device):
    """Whatever the step: torch's clamp and renorm."""
    w = draw((19, 33), dtype, device)
    x = w.clone()
    prox_(x, lower=-0.25, upper=0.5, step=step)
    assert_same_bits([x], [w.clamp(-0.25, 0.5) + 0.0])
    prox_(w, max_norm=0.5, group="row", step=step)
    norms = w.double().norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.5), rtol=2 * torch.finfo(dtype).eps, atol=0)
    before = w.clone()
    prox_(w, max_norm=1.0, group="row", step=step)
    assert_same_bits([w], [before])


def test_a_proximal_step_is_the_minimum_within_the_box():
    """By a look at every point of a fine grid."""
    w = torch.linspace(-3, 3, 31, dtype=torch.float64)
    for lower, upper in ((0.0, math.inf), (-0.3, 0.8), (0.2, 0.9), (-math.inf, -0.1)):
        x = w.clone()
        prox_(x, l1=0.3, l2=0.2, smooth_l1=0.4, beta=0.3, lower=lower, upper=upper, step=0.9)
        grid = torch.linspace(max(lower, -4), min(upper, 4), 10_001, dtype=torch.float64)

        def cost(x, w):
            smooth = torch.where(x.abs() < 0.3, x**2 / 0.6, x.abs() - 0.15)
            return (x - w) ** 2 / 2 + 0.9 * (0.3 * x.abs() + 0.2 * x**2 + 0.4 * smooth)

        assert ((x >= lower) & (x <= upper)).all()
        for own, found in zip(w, x, strict=True):
            assert cost(found, own) <= cost(grid, own).min() + 1e-12


def test_a_proximal_step_is_the_minimum_within_the_ball():
    """By the conditions of optimality: where the norm is the largest, what pulls further out points outward."""
    torch.manual_seed(0)
    w = torch.randn(50, 6, dtype=torch.float64)
    terms = {"l1": 0.2, "l2": 0.3, "l2_norm": 0.4, "group": "row"}
    x = w.clone()
    prox_(x, **terms, max_norm=0.6, step=0.5)
    norms = x.norm(dim=1)
    assert (norms <= 0.6 * (1 + 1e-15)).all()
    on_border = norms > 0.6 * (1 - 1e-12)
    assert 0 < on_border.sum() < 50
    (grad,) = value_and_grad(x, **terms)[1]
    pull = w - x - 0.5 * grad
    for own, g, border in zip(x, pull, on_border, strict=True):
        outward = (own * g).sum() / (own * own).sum().clamp(min=1e-30)
        assert (outward > 1e-12) == border or not own.any()
        rest = torch.where(own == 0, 0, g - (outward if border else 0) * own)
        assert rest.abs().max() < 1e-14


def test_what_no_step_changes(device):
    """An importance or a step of 0 leaves an element where it is; NaN stays, and what is infinite is cut."""
    w = draw((100,), torch.float64, device)
    importance = torch.ones_like(w)
    importance[::3] = 0
    x, y = w.clone(), w.clone()
    prox_(x, lower=0.1, upper=0.2, step=0.5, importance=importance)
    assert_same_bits([x[::3]], [w[::3] + 0.0])
    assert ((x[1::3] >= 0.1) & (x[1::3] <= 0.2)).all()
    prox_(y, lower=0.1, upper=0.2, step=0.0)
    prox_(y, max_norm=0.1, step=0.0)
    assert_same_bits([y], [w + 0.0])
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=torch.float64, device=device)
    prox_(odd, lower=0.0, upper=1.0, step=0.5)
    assert odd[0].isnan()
    assert_same_bits([odd[1:]], [torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)])


def test_bounds_are_of_the_difference_from_reference_weights(device):
    w, w0 = draw((40, 5), torch.float64, device), draw((40, 5), torch.float64, device, seed=1)
    x, y = w.clone(), w.clone()
    prox_(x, l1=0.1, lower=-0.25, upper=0.5, step=0.5, toward=w0)
    assert ((x - w0 >= -0.25 - 1e-15) & (x - w0 <= 0.5 + 1e-15)).all()
    prox_(y, l2=0.3, max_norm=0.5, group="row", step=0.5, toward=w0)
    norms = (y - w0).norm(dim=1)
    assert (norms <= 0.5 * (1 + 1e-14)).all()
    assert (norms > 0.5 * (1 - 1e-14)).any()
    expected = w.clone()
    reference.prox_(expected, l2=0.3, max_norm=0.5, group="row", step=0.5, toward=w0)
    torch.testing.assert_close(y, expected)


def test_no_value_and_no_gradient():
    w = draw((3,))
    rule = (
        "must be for proximal steps (prox_, attach with mode='prox'), because a constraint has no value and no gradient"
    )
    for given in ({"lower": 0.0}, {"l1": 0.1, "upper": 1.0}, {"max_norm": 1.0}):
        name = list(given)[-1]
        for function in (fused_penalty, value_and_grad, accumulate_grad_):
            with pytest.raises(ValueError, match=rf"^{function.__name__}: {name} {re.escape(rule)}$"):
                function(w, **given)
        for function in (reference.fused_penalty, reference.value_and_grad):
            with pytest.raises(ValueError, match=f"{name} has no value"):
                function(w, **given)
        model = net()
        regularizer = Regularizer(model, **given)
        own = f"{name} of '0.weight' {rule}"
        for where, call in (
            ("Regularizer", regularizer),
            ("accumulate_grad_", regularizer.accumulate_grad_),
            ("attach", lambda r=regularizer, m=model: r.attach(torch.optim.SGD(m.parameters(), lr=0.1))),
        ):
            with pytest.raises(ValueError, match=rf"^{where}: {re.escape(own)}$"):
                call()


@pytest.mark.parametrize("ours", [False, True], ids=["of torch", "of fused_reg.optim"])
def test_none_can_enter_an_attached_gradient(ours):
    model = net()
    optimizer = (optim if ours else torch.optim).SGD(model.parameters(), lr=0.5)
    regularizer = Regularizer(model, l1=0.1)
    with regularizer.attach(optimizer):
        for constrained in (False, True):
            model(torch.ones(3)).sum().backward()
            if not constrained:
                optimizer.step()
        before = copy.deepcopy(model.state_dict())
        regularizer.set_strength(lower=0.0)
        with pytest.raises(ValueError, match=r"lower of '0.weight' must be for proximal steps"):
            optimizer.step()
    assert_same_bits(list(model.state_dict().values()), list(before.values()))


def test_errors():
    w = draw((3, 2))
    before = w.clone()
    for given, message in (
        ({"lower": 1.0, "upper": 1.0}, r"lower must be less than upper, got 1.0 and 1.0 for params\[0\]"),
        ({"lower": torch.tensor(0.5), "upper": 0.25}, "lower must be less than upper, got 0.5 and 0.25 for params"),
        ({"lower": math.inf}, r"lower must be less than upper, got inf and inf for params\[0\]"),
        ({"lower": math.nan}, "lower must be a number, not NaN, got nan"),
        ({"upper": torch.tensor(math.nan)}, "upper must be a number"),
        ({"max_norm": 0.0}, "max_norm must be > 0, got 0.0"),
        ({"max_norm": torch.tensor(-1.0)}, "max_norm must be > 0, got -1"),
        ({"upper": torch.ones((), requires_grad=True)}, "upper must be a constant, got a tensor that requires grad"),
        (
            {"lower": 0.0, "group": "row"},
            'group="row" must come with l2_norm or max_norm, whose norms it is about, got',
        ),
        ({"lower": 0.0, "l2_norm": 0.1}, "lower and l2_norm of one parameter have no proximal operator in closed form"),
        ({"max_norm": 1.0, "upper": 0.5}, "max_norm and upper of one parameter have no proximal operator in closed"),
        ({"max_norm": 1.0, "smooth_l1": 1.0}, "max_norm and smooth_l1 of one parameter have no proximal operator"),
        ({"lower": 0.0, "mcp": 1.0}, "lower and mcp of one parameter have no proximal operator in closed form"),
        ({"max_norm": 1.0, "importance": torch.ones(3, 2)}, "importance must come without max_norm"),
    ):
        with pytest.raises(ValueError, match=rf"^prox_: {message}"):
            prox_(w, **given, step=0.5)
    with pytest.raises(TypeError, match=r"^prox_: lower must be a float, a 0-dim tensor or a sequence"):
        prox_(w, lower="0", step=0.5)
    assert_same_bits([w], [before])
    prox_([w, before], lower=[0.0, -math.inf], l2_norm=[0.0, 0.1], step=0.1)  # not on one parameter


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))


def test_a_regularizer_has_them_as_any_term():
    model, by_hand = net(), net()
    bounds = [("*.bias", {"upper": 0.1}), ("1.weight", {"lower": math.inf})]
    rules = [("0.weight", {"max_norm": 0.3, "group": "row"}), *bounds]
    with pytest.raises(ValueError, match=r"lower of '1.weight' must be less than upper"):
        Regularizer(model, l1=0.1, rules=rules)
    rules[2] = ("1.weight", {"lower": 0.0})
    regularizer = Regularizer(model, l1=0.1, rules=rules)
    assert repr(regularizer).split("\n")[1:4] == [
        '  l1=0.1, max_norm=0.3, group="row": 1 parameter, 12 elements: 0.weight',
        "  l1=0.1, upper=0.1: 2 parameters, 5 elements: 0.bias, 1.bias",
        "  l1=0.1, lower=0: 1 parameter, 4 elements: 1.weight",
    ]
    regularizer.prox_(0.5)
    params = list(by_hand.parameters())
    with torch.no_grad():
        prox_(params[0], l1=0.1, max_norm=0.3, group="row", step=0.5)
        prox_(params[1::2], l1=0.1, upper=0.1, step=0.5)
        prox_(params[2], l1=0.1, lower=0.0, step=0.5)
    assert_same_bits(list(model.parameters()), params)
    report = regularizer.report()
    assert report["group 2"]["lower"] == 0
    assert report.total["value"] == pytest.approx(fused_penalty(params, l1=0.1).item())
    assert "lower" in str(report)
    assert "lower" not in str(Regularizer(net(), l1=0.1).report())
    state = regularizer.state_dict()
    other = Regularizer.from_config(regularizer.get_config(), model)
    other.set_strength(upper=0.5, where="1.weight")
    other.load_state_dict(state)
    assert other.state_dict() == state
    marked = net()
    regularized(marked[0], max_norm=0.5, group="row")
    assert repr(marked[0]).startswith('Linear[max_norm=0.5, group="row"](')
    Regularizer(marked).prox_(1.0)
    assert (marked[0].weight.norm(dim=1) <= 0.5 * (1 + 1e-6)).all()


@pytest.mark.parametrize("ours", [False, True], ids=["of torch", "of fused_reg.optim"])
@pytest.mark.parametrize("name", ["non-negative", "a box", "norms of rows", "only norms"])
def test_attached(name, ours):
    given = {"max_norm": 0.3, "group": "row"} if name == "only norms" else GIVEN[name]
    model, by_hand = net(), net()
    optimizer = (optim if ours else torch.optim).Adam(model.parameters(), lr=0.1)
    own = torch.optim.Adam(by_hand.parameters(), lr=0.1, foreach=False)
    valued = {key: x for key, x in given.items() if key not in ("lower", "upper", "max_norm")}
    valued = {} if "l2_norm" not in valued and "l1" not in valued else valued
    with Regularizer(model, **given).attach(optimizer, mode="prox") as attachment:
        for _ in range(3):
            for m, o in ((model, optimizer), (by_hand, own)):
                o.zero_grad()
                m(torch.ones(3)).square().sum().backward()
            optimizer.step()
            own.step()
            with torch.no_grad():
                prox_(by_hand.parameters(), **given, step=0.1)
                expected = fused_penalty(by_hand.parameters(), **valued) if valued else torch.zeros(())
            if not ours:
                torch.testing.assert_close(attachment.value, expected)
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    if "lower" in given:
        assert all((p >= given["lower"]).all() for p in model.parameters())


def test_in_the_pass_of_an_optimizer_that_holds_others_too():
    """Parameters without a constraint, and bounds of some of them."""
    models = [net(), net()]
    rules = [("0.weight", {"lower": 0.0, "upper": 0.2}), ("1.weight", {"upper": 0.0})]
    for model, kind in zip(models, (optim, torch.optim), strict=True):
        params = list(model.parameters())
        optimizer = kind.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
        Regularizer(model, l1=0.01, exclude="0.bias", rules=rules).attach(optimizer, mode="prox")
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3)).sum().backward()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # torch's own kernels round otherwise
    first, _, last, _ = models[0].parameters()
    assert first.min() == 0
    assert first.max() <= 0.2 + 1e-7
    assert last.max() == 0


def test_a_schedule_narrows_a_box():
    w = torch.nn.Parameter(torch.tensor([-3.0, 0.5, 3.0]))
    regularizer = Regularizer([w], lower=lambda step: -2.0 + step, upper=2.0)
    for step, expected in ((0, [-2.0, 0.5, 2.0]), (1, [-1.0, 0.5, 2.0]), (2, [0.0, 0.5, 2.0])):
        regularizer.step = step
        regularizer.prox_(1.0)
        assert w.tolist() == expected
