"""torch.compile: every public function in one graph, the same numbers, no second compilation for a new strength."""

from functools import partial

import pytest
import torch
from oracle import assert_same_bits
from samples import draw, first_quick, numbers
from test_attach import X, filled, loss_of
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

import fused_reg
from fused_reg import Regularizer, accumulate_grad_, fused_penalty, prox_, value_and_grad
from fused_reg._terms import group_count
from fused_reg.autograd import merged

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself

STRENGTHS = (
    {},
    {"l1": 0.1},
    {"l1": 0.1, "l2": 0.2},
    {"l1": torch.tensor(0.1), "l2": 0.2},
    {"l2": [0.1, 0.2, 0.3, 0.4]},
    {"l1": 0.1, "l2_norm": 0.3},
    {"l2_norm": torch.tensor(0.3), "group": "row"},
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture(params=["short", "operators"])
def form(request, monkeypatch):
    """The penalty of a short list, on the CPU, as plain operations, and through the operators as that of a long one."""
    if request.param == "operators":
        monkeypatch.setattr(merged, "MOST_TENSORS", 0)


def make(device) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 5)).to(device))


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
@pytest.mark.parametrize("backend", first_quick("aot_eager", "eager"))
def test_penalty_in_the_loss(strengths, backend, device):
    net = make(device)

    def objective():
        return loss_of(net) + fused_penalty(net.parameters(), **strengths)

    results = []
    for function in (objective, compiled(objective, backend)):
        net.zero_grad()
        value = function()
        value.backward()
        results.append([value.detach(), *(p.grad for p in net.parameters())])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", first_quick("aot_eager", "inductor"))
@pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
def test_functions_outside_of_autograd(strengths, backend, device):
    """The same bits as without a compiler."""
    results = []
    for wrap in (lambda f: f, partial(compiled, backend=backend)):
        net = make(device)
        params = list(net.parameters())
        params[0].grad = draw(params[0].shape, device=device, seed=9)
        value, grads = wrap(lambda ps=params: value_and_grad(ps, **strengths))()
        added = wrap(lambda ps=params: accumulate_grad_(ps, **strengths, scale=0.5))()
        after = [p.grad.clone() for p in params]
        wrap(lambda ps=params: prox_(ps, **strengths, step=0.25))()
        results.append([value, *grads, added, *after, *(p.detach() for p in params)])
    assert_same_bits(*results)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("group", ["tensor", "row"])
def test_regularizer(group, device):
    """As penalty of the loss, as gradient and as proximal step, with a schedule."""
    results = []
    for wrap in (lambda f: f, compiled):
        net = make(device)
        regularizer = Regularizer(net, l1=lambda step: 0.1 * (1 + step), l2=0.2, l2_norm=0.1, group=group)

        def step(net=net, regularizer=regularizer):
            (loss_of(net) + regularizer()).backward()
            regularizer.accumulate_grad_(0.5)
            regularizer.prox_(0.1)

        run = wrap(step) if wrap is not compiled else torch.compile(step, backend="aot_eager")
        for _ in range(3):
            net.zero_grad()
            run()
            regularizer.advance()
        results.append([p.detach() for p in net.parameters()])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("form")
def test_a_new_strength_compiles_nothing(device):
    """Floats, tensors and schedules; a strength that is a constant of the graph would fail after eight."""
    params = [p.detach() for p in make(device).parameters()]
    regularizer = Regularizer([nn.Parameter(p) for p in params], l1=lambda step: 0.1 * (1 + step))
    cases = {
        "float": (lambda l1: fused_penalty(params, l1, 0.5), lambda i: 0.1 * i),
        "tensor": (lambda l1: fused_penalty(params, l1, 0.5), lambda i: torch.tensor(0.1 * i)),
        "scale": (lambda scale: accumulate_grad_(params, 0.1, scale=scale), lambda i: 0.1 * i),
        "step": (lambda step: prox_(params, 1e-3, step=step), lambda i: 1e-3 * i),
        "schedule": (lambda _: regularizer(), lambda i: None),
    }
    for name, (function, argument) in cases.items():
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(function, backend=counter, fullgraph=True)
        for i in range(1, 12):
            before = [p.clone() for p in params]
            actual = run(argument(i))
            for p, old in zip(params, before, strict=True):
                p.copy_(old)
            expected = function(argument(i))
            regularizer.advance()
            if expected is not None:
                assert_same_bits([actual.detach()], [expected.detach()])
        assert counter.frame_count <= 2, name  # the second: what was a constant of the graph became an input of it


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("kind", [{}, {"l2_norm": 0.3}, {"l2_norm": 0.3, "group": "row"}], ids=str)
def test_dynamic_shapes(kind, device):
    """Lists of tensors whose sizes change, and with them where the norms of each begin."""
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(fused_penalty, backend=counter, fullgraph=True, dynamic=True)
    for n in (3, 5, 8, 13, 21):
        params = [draw((n, 4), device=device, seed=i).requires_grad_() for i in range(3)]
        value = run(params, 0.1, 0.2, **kind)
        value.backward()
        expected, grads = value_and_grad(params, 0.1, 0.2, **kind)
        assert_same_bits([value.detach(), *(p.grad for p in params)], [expected, *grads])
    assert counter.frame_count == 1


SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 1e-30, -3e38]


@pytest.mark.parametrize("backend", first_quick("aot_eager", "inductor"))
@pytest.mark.parametrize(("special", "upstream"), [(False, 1.0), (True, -0.37)])
@pytest.mark.parametrize("most_summed", [0, 1 << 20])
def test_a_merged_list_has_the_same_bits(most_summed, special, upstream, backend, device, monkeypatch):
    """Its gradients; and its value, which is summed in another order but in float64, too, or by the operator."""
    monkeypatch.setattr(merged, "_MOST_SUMMED", most_summed)
    kinds = (
        {"l1": 0.1, "l2": torch.tensor(0.2)},
        {"l1": torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)},
        {"l2": [0.1, 0.2, 0.3]},
        {"l1": [0.1, 0.2, 0.0], "l2": [0.1, 0.0, 0.0]},
        {"l1": 0.0},
        {},
    )
    lists = [[draw(shape, device=device, seed=9) for shape in [(37, 50), (301,), (len(SPECIAL), 3)]] for _ in kinds]
    for params in lists:
        params[0] = params[0].t()
        if special:
            params[2].copy_(torch.tensor(SPECIAL, device=device)[:, None])
        for p in params[1:]:
            p.requires_grad_()

    def penalties(lists):
        return [fused_penalty(params, **strengths) for params, strengths in zip(lists, kinds, strict=True)]

    results = []
    for function in (penalties, compiled(penalties, backend)):
        values = function(lists)
        trained = [p for params in lists for p in params[1:]]
        results.append([*values, *torch.autograd.grad([upstream * value for value in values], trained)])
    assert_same_bits(*results)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("backend", first_quick("aot_eager", "inductor"))
def test_a_strength_of_zero_drops_its_term(backend, device):
    """Of weights that are not finite, too, where the compiler cannot know it."""
    kinds = (
        {"l1": 0.1, "l2": torch.tensor([0.1, 0.2, 0.0])},
        {"l1": torch.tensor(0.0), "l2": [0.2, 0.1, 0.0]},
        {"l1": 0.1, "l2": torch.tensor(0.0)},
    )
    params = [draw((37, 50), device=device, seed=1), draw((301,), device=device, seed=2)]
    params = [p.requires_grad_() for p in (*params, torch.tensor([-torch.inf, 1.0, torch.nan], device=device))]

    def penalties():
        return [fused_penalty(params, **strengths) for strengths in kinds]

    results = [
        [(value, *torch.autograd.grad(value, params, retain_graph=True)) for value in function()]
        for function in (penalties, compiled(penalties, backend))
    ]
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert results[1][1][0].isfinite()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("form_of_strength", ["one", "per parameter", "norms"])
def test_strengths_that_require_grad(form_of_strength, device):
    results = []
    for wrap in (lambda f: f, compiled):
        params = list(make(device).parameters())
        strength = torch.full((len(params),) if form_of_strength == "per parameter" else (), 0.1, requires_grad=True)
        kind = {"l2_norm" if form_of_strength == "norms" else "l1": strength}
        value = wrap(lambda ps=params, kind=kind: fused_penalty(ps, l2=0.2, **kind))()
        value.backward()
        results.append([value.detach(), strength.grad, *(p.grad for p in params)])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [{"l1": 0.1, "l2": 0.2}, {"l2_norm": 0.3}], ids=str)
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_transforms_inside(transform, kind, device):
    p = draw((4, 3), device=device)
    expected = transform(lambda q: fused_penalty([q], **kind))(p)
    actual = compiled(lambda p: transform(lambda q: fused_penalty([q], **kind))(p))(p)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "kind", [{"l1": 0.1, "l2": 0.2}, {"l1": [0.1]}, {"l2": torch.tensor(0.2)}, {"l2_norm": 0.3}], ids=str
)
def test_vmap_inside(kind, device):
    batch = draw((3, 4, 2), device=device)
    expected = torch.stack([fused_penalty([w], **kind) for w in batch])
    actual = compiled(lambda: torch.func.vmap(lambda w: fused_penalty([w], **kind))(batch))()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("count", [0, 2])
def test_values_of_a_dictionary(count):
    params = dict(list(filled(nn.Linear(3, 2)).named_parameters())[:count])
    expected = sum((0.5 * p.abs().sum() for p in params.values()), torch.tensor(0.0))
    torch.testing.assert_close(compiled(lambda: fused_penalty(params.values(), l1=0.5), "eager")(), expected)


@pytest.mark.parametrize(
    ("make_params", "message"),
    [
        (lambda net: net.named_parameters(), r"params\[0\] must be a tensor, got a \(name, tensor\) pair"),
        (lambda net: [net.weight, None], r"params\[1\] must be a tensor, got NoneType"),
        (lambda net: {"a": net.weight}, r"params\[0\] must be a tensor, got str"),
    ],
)
def test_params_that_are_no_tensors(make_params, message, device):
    net = nn.Linear(2, 3, device=device)
    with pytest.raises(TypeError, match=message):
        torch.compile(lambda: fused_penalty(make_params(net), 0.1), backend="aot_eager")()


def test_an_exported_penalty_of_a_long_list_has_its_gradient(device):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([filled(nn.Linear(3, 3)) for _ in range(20)]).to(device)

        def forward(self, x):
            return x.sum() + fused_penalty(self.parameters(), l1=0.1, l2_norm=0.2)

    net, x = Net(), torch.ones(2, 3, device=device)
    exported = torch.export.export(net, (x,)).module()
    for module in (net, exported):
        module(x).backward()
    assert_same_bits([p.grad for p in exported.parameters()], [p.grad for p in net.parameters()])


def test_a_penalty_of_activations_is_exported_for_every_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x).sum() + fused_penalty([self.layer(x)], l1=0.1)

    net, batch = Net(), torch.export.Dim("batch")
    exported = torch.export.export(net, (torch.ones(5, 3),), dynamic_shapes={"x": {0: batch}}).module()
    for size in (2, 7):
        x = draw((size, 3), seed=size)
        torch.testing.assert_close(exported(x), net(x))


def test_a_long_list_keeps_the_operator(device):
    """So that it compiles in seconds."""
    params = [draw((3,), device=device, seed=i).requires_grad_() for i in range(merged.MOST_TENSORS + 1)]
    recorder = AotEagerAndRecordGraphs()
    torch.compile(fused_penalty, backend=recorder, fullgraph=True)(params, 0.1, 0.2)
    assert "fused_reg.penalty.default" in recorder.fw_graphs[0].code


@pytest.mark.parametrize(
    ("strengths", "is_merged"), [({"l1": [0.1, 0.2]}, True), ({"l2": [0.1, 0.2]}, True), ({"l1": [0.1, 0.0]}, False)]
)
def test_a_short_list_has_no_operator(strengths, is_merged):
    """So that it is merged with the model. Only with an operator has a parameter of strength 0 a gradient."""
    params = [draw((3,), seed=i).requires_grad_() for i in range(2)]
    recorder = AotEagerAndRecordGraphs()
    torch.compile(fused_penalty, backend=recorder, fullgraph=True)(params, **strengths)
    assert ("fused_reg" not in recorder.fw_graphs[0].code) == is_merged


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_numbers_that_are_positive_are_not_compared_with_zero(kind):
    recorder = AotEagerAndRecordGraphs()
    params = [draw((3,)).requires_grad_()]
    torch.compile(fused_penalty, backend=recorder, fullgraph=True)(params, **{kind: 0.1})
    assert "where" not in recorder.fw_graphs[0].code


@pytest.mark.usefixtures("form")
def test_inductor_trains(device):
    """A whole training step: model, loss, penalty and backward in one graph, the optimizer's step behind it."""
    results = []
    for wrap in (lambda f: f, torch.compile):
        net = make(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        regularizer = Regularizer(net, l1=1e-2, l2=1e-2)
        attachment = Regularizer(net, l2=1e-2).attach(optimizer)
        objective = wrap(lambda net=net, r=regularizer: loss_of(net) + r() + fused_penalty(net.parameters(), l2=1e-3))
        for _ in range(3):
            optimizer.zero_grad()
            objective().backward()
            optimizer.step()
        assert attachment.value > 0
        results.append([p.detach() for p in net.parameters()])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


class Penalized(nn.Module):
    """A module that has a penalty in its forward."""

    def __init__(self, device) -> None:
        super().__init__()
        self.net = make(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).square().mean() + fused_reg.fused_penalty(self.net.parameters(), l1=0.1, l2=0.2)


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="torch takes no backward in a graph"
)
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("backend", first_quick("aot_eager", "inductor"))
def test_backward_inside(backend, device):
    """Model, loss, penalty and backward in one graph."""
    results = []
    for wrap in (lambda f: f, partial(compiled, backend=backend)):
        net = make(device)

        def step(net=net):
            loss = loss_of(net) + fused_penalty(net.parameters(), 0.1, 0.2)
            loss.backward()
            return loss.detach()

        with torch._dynamo.config.patch(trace_autograd_ops=True):
            results.append([wrap(step)(), *(p.grad for p in net.parameters())])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_attached_to_a_compiled_optimizer(mode, device):
    results = []
    for wrap in (lambda f: f, torch.compile):
        net = make(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        Regularizer(net, l1=lambda step: 1e-2 * (1 + step)).attach(optimizer, mode)
        step = wrap(optimizer.step)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net).backward()
            step()
        results.append([p.detach() for p in net.parameters()])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, device):
    module = Penalized(device)
    x = X.to(device)
    program = torch.export.export(module, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), module(x))


LISTS = {
    "mixed": [((3, 5), torch.float32), ((5, 3), torch.float64), ((4,), torch.bfloat16)],
    "with empty": [((0, 2), torch.float32), ((), torch.float16), ((7, 1), torch.float32)],
    "large": [((300, 130), torch.float32)],
}
FORMS = {
    "floats": numbers((0.1,), (0.2,), step=(0.1,)),
    "per parameter": numbers(torch.tensor([0.1, 0.2, 0.3]), (0.3, 0.2, 0.1), step=torch.tensor(0.5)),
    "tensor": numbers(l2=torch.tensor(0.5)),
    "norms": numbers((0.1,), l2_norm=(0.3,), step=(0.1,), group="tensor"),
    "rows": numbers(l2_norm=torch.tensor(0.3), group="row"),
}


def calls(params, given, device):
    """Every operator with arguments for these."""
    count = len(params)
    upstream, scale = torch.tensor(0.37, device=device), torch.tensor(0.5, dtype=torch.float64)
    grads = [draw(p.shape, p.dtype, device, seed=i) for i, p in enumerate(params)]
    selected, needs_grad = params[:1] + params[2:], [i != 1 for i in range(count)]
    modes = [(1, 2, 0)[i % 3] for i in range(count)]
    written = [g for g, mode in zip(grads, modes, strict=True) if mode != 0]
    yield "penalty", (params, (), *given)
    yield "penalty_in_graph", (params, *given, False)
    yield "penalty", (params, needs_grad, *given)
    yield "accumulate_grad_", (params, written, modes, 0.5, None, *given)
    yield "accumulate_grad_", (params, written, modes, 1.0, scale, *given)
    yield "prox_", (grads, None, (), *given)
    if given.has_norms():
        norms = torch.ops.fused_reg.norms(params, *given)
        sizes = [group_count(p, given.group) for p in params]
        firsts = [sum(sizes[:i]) for i in range(count) if needs_grad[i]]
        yield "norms", (params, *given)
    else:
        norms, firsts = None, ()
    ones = [torch.empty_like(p).fill_(1) for p in selected]
    yield "penalty_grad", (upstream, selected, needs_grad, norms, firsts, *given)
    yield "rescale_grad_", (upstream, selected, ones, needs_grad, norms, firsts, *given)
    for with_zeros in (False, True):
        yield "sums", (params, with_zeros, *given.having(l2_norm=())._replace(group=0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sample", first_quick(*LISTS))
def test_opcheck(sample, form, device):
    """Schemas, fake kernels, autograd keys, and functionalization of what mutates."""
    params = [draw(shape, dtype, device, seed=i) for i, (shape, dtype) in enumerate(LISTS[sample])]
    params[0] = params[0].t() if params[0].ndim == 2 else params[0]
    given = FORMS[form]
    if len(params) != 3 and form == "per parameter":
        given = numbers(torch.tensor([0.1] * len(params)), (0.3,) * len(params))
    for name, arguments in calls(params, given, device):
        packet = getattr(torch.ops.fused_reg, name)
        results = torch.library.opcheck(getattr(packet, packet.overloads()[-1]), arguments)
        assert set(results.values()) == {"SUCCESS"}, (name, results)
    torch.library.opcheck(torch.ops.fused_reg.numbers.default, (params[0], [0.1, 0.3]))
    # What is in fresh memory differs from call to call.
    torch.library.opcheck(torch.ops.fused_reg.empty_grads.default, (params,), test_utils="test_faketensor")
