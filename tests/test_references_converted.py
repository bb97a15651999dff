"""``toward`` and ``importance`` of parameters that were converted since (``.double()``, ``.half()``): they follow, as
the buffers of a module do, at every use, and a warning says so."""

import copy

import pytest
import torch
from optim_cases import ONE_EACH, backward, named, net, pair
from oracle import assert_same_bits
from torch import nn

from fused_reg import Regularizer, fused_penalty, optim, prox_, value_and_grad

FOLLOWS = pytest.warns(
    UserWarning, match=r"^Regularizer: it follows its module: '0.weight', .* converted; their toward"
)
TERMS = {"l1": 0.1, "l2": 0.3}
GIVEN = pytest.mark.parametrize("given", ["start", "list"])
TO = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])


def made(given):
    """A float32 model a step away from its references, and a Regularizer of it."""
    model = net(torch.float32)
    start = [p.detach().clone() for p in model.parameters()]
    importance = [torch.rand(p.shape) if p.ndim == 1 else torch.rand(len(p), 1) for p in model.parameters()]
    regularizer = Regularizer(model, **TERMS, toward=start if given == "list" else given, importance=importance)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p))
    return model, regularizer, {"toward": start, "importance": importance}


def converted(references, dtype):
    return {name: [x.to(dtype) for x in xs] for name, xs in references.items()}


@GIVEN
@TO
@pytest.mark.parametrize("use", ["call", "report", "accumulate_grad_", "prox_", "state", "attached", "value"])
def test_every_use_follows(given, dtype, use):
    """Whichever comes first; the functions, which are given both, have the same bits."""
    model, regularizer, references = made(given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attachment = regularizer.attach(optimizer) if use in ("attached", "value") else None
    model.to(dtype)
    params = list(model.parameters())
    terms = {**TERMS, **converted(references, dtype)}
    value, grads = value_and_grad(params, **terms)
    for p in params:
        p.grad = torch.zeros_like(p)
    with FOLLOWS:
        if use == "call":
            assert_same_bits([regularizer()], [value])
        elif use == "report":
            torch.testing.assert_close(regularizer.report().total["value"], value.item(), rtol=1e-6, atol=0)
        elif use == "accumulate_grad_":
            assert_same_bits([regularizer.accumulate_grad_(), *(p.grad for p in params)], [value, *grads])
        elif use == "prox_":
            expected = [p.detach().clone() for p in params]
            prox_(expected, **terms, step=0.5)
            regularizer.prox_(0.5)
            assert_same_bits(params, expected)
        elif use == "state":
            saved = regularizer.state_dict().get("references")
            assert (saved is None) == (given == "list")
            assert_same_bits(
                [] if saved is None else list(saved["toward"].values()), terms["toward"][: 4 * bool(saved)]
            )
        elif use == "value":
            assert_same_bits([attachment.value], [value])
        else:
            optimizer.param_groups[0]["lr"] = 1e-30
            optimizer.step()
            assert_same_bits([attachment.value, *(p.grad for p in params)], [value, *grads])
    regularizer()  # and says so once: other warnings are errors


def test_what_is_converted_later_or_in_part():
    model, regularizer, references = made("list")
    value = regularizer()
    model[0].double()
    with pytest.warns(UserWarning, match=r"^Regularizer: it follows its module: '0.weight', '0.bias' converted; "):
        torch.testing.assert_close(regularizer().item(), value.item())
    assert regularizer().dtype is torch.float64
    references["importance"][2].zero_()  # those that were not converted are kept, not copied
    given = {name: [x.to(p) for x, p in zip(xs, model.parameters(), strict=True)] for name, xs in references.items()}
    assert_same_bits([regularizer()], [fused_penalty(model.parameters(), **TERMS, **given)])


@GIVEN
def test_a_module_that_is_read_again(given):
    """By a parameter that is new, or because a conversion makes parameters anew."""
    model, regularizer, references = made(given)
    model.double()
    with FOLLOWS:
        regularizer()
    model[2].bias.requires_grad_(False)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    terms = {**TERMS, **converted(references, torch.float64)}
    with pytest.warns(UserWarning, match="'0.weight' replaced"):
        value = regularizer()
    model[2].bias.requires_grad_(True)
    torch.testing.assert_close(regularizer(), fused_penalty(model.parameters(), **terms), rtol=1e-14, atol=0)
    assert value < regularizer()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with pytest.warns(UserWarning, match=r"'0.weight', .* (replaced|converted)") as said:
        value = regularizer()
    assert len(said) == 2
    terms = {**TERMS, **converted(references, torch.float32)}
    assert_same_bits([value], [fused_penalty(model.parameters(), **terms)])


def test_a_layer_that_is_replaced_after_a_state_was_loaded():
    """It begins anew, as one that is replaced before."""
    model = net()
    regularizer = Regularizer(model, l2=0.2, toward="start")
    regularizer.load_state_dict(regularizer.state_dict())
    model[2] = nn.Linear(20, 5).double()
    with pytest.warns(UserWarning, match="it follows its module"):
        assert regularizer() == 0


def test_states_of_another_dtype():
    """They are taken as the parameters are, as torch takes those of modules and optimizers."""
    model, _, references = made("start")
    state = Regularizer(model, **TERMS, **references, save_references=True).state_dict()
    half = copy.deepcopy(model).half()
    given = {"toward": [torch.zeros_like(p) for p in half.parameters()]}
    given["importance"] = [torch.ones_like(p) for p in half.parameters()]
    other = Regularizer(half, **TERMS, **given)
    other.load_state_dict(state)
    terms = {**TERMS, **converted(references, torch.float16)}
    assert_same_bits([other()], [fused_penalty(half.parameters(), **terms)])


def test_an_importance_that_does_not_fit():
    """At every use, before anything is written."""
    model = net(torch.float32)
    importance = {"0.bias": torch.full((20,), 1e6)}
    regularizer = Regularizer(model, l2=0.1, importance=importance)
    model.half()
    before = [p.detach().clone() for p in model.parameters()]
    for use in (regularizer, regularizer.report, lambda: regularizer.prox_(0.1)) * 2:
        with pytest.raises(ValueError, match=r"importance\['0.bias'\] must be finite and >= 0, got inf"):
            use()
    assert_same_bits(list(model.parameters()), before)
    model.float()
    assert_same_bits([regularizer()], [Regularizer(model, l2=0.1, importance=importance)()])


@pytest.mark.parametrize("as_option", [True, False])
def test_an_importance_of_rows_takes_as_much_memory(as_option):
    p, rows = nn.Parameter(torch.ones(6, 1000)), torch.ones(6, 1)
    model = nn.ParameterDict({"w": p})
    if as_option:
        optimizer = optim.SGD([p], lr=0.1, l2=0.1, importance=[rows])
    else:
        regularizer = Regularizer(model, l2=0.1, importance={"w": rows}, save_references=True)
    model.double()
    with pytest.warns(UserWarning, match="converted"):
        value = optimizer.penalty if as_option else regularizer()
    assert value.item() == 600
    found = (
        optimizer.param_groups[0]["importance"][0]
        if as_option
        else regularizer.state_dict()["references"]["importance"]["w"]
    )
    assert (found.dtype, found.shape, found.untyped_storage().nbytes()) == (torch.float64, p.shape, 6 * 8)


def test_a_device_without_values_has_no_references():
    """Such a conversion cannot be undone."""
    model, regularizer, _ = made("start")
    model.to("meta")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"toward\['0.weight'\] must have the device"):
            regularizer()


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
def test_compiled():
    torch._dynamo.reset()
    model, regularizer, references = made("start")
    compiled = torch.compile(lambda: regularizer(), backend="aot_eager", fullgraph=True)
    compiled()
    model.double()
    terms = {**TERMS, **converted(references, torch.float64)}
    assert_same_bits([compiled()], [fused_penalty(model.parameters(), **terms)])


@pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
@pytest.mark.parametrize("prox", [False, True])
@pytest.mark.parametrize("is_first", [True, False])
def test_options_of_an_optimizer(name, options, prox, is_first):
    """As of a Regularizer that is attached to it."""
    nets = []
    for as_option in (False, True):
        model = net(torch.float32)
        given = {
            "toward": [torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) for p in model.parameters()]
        }
        given["importance"] = [x * 0.5 for x in given["toward"]]
        optimizer = pair(name)[1](
            model.parameters(), **options, **({**TERMS, "prox": prox, **given} if as_option else {})
        )
        if not as_option:
            Regularizer(model, **TERMS, **given).attach(optimizer, "prox" if prox else "grad")
        if not is_first:
            backward(model, 0)
            optimizer.step()
        optimizer.state.clear()  # of another dtype
        model.double()
        backward(model, 1)
        match = rf"^{name}: toward and importance are converted copies" if as_option else "^Regularizer: it follows"
        with pytest.warns(UserWarning, match=match):
            optimizer.step()
        backward(model, 2)
        optimizer.step()
        nets.append([*model.parameters(), optimizer.penalty])
    assert_same_bits(*nets)


def test_the_penalty_of_an_optimizer_before_a_step():
    model = net(torch.float32)
    optimizer = optim.SGD(model.parameters(), lr=0.1, **TERMS, toward="start")
    model.double()
    with pytest.warns(UserWarning, match="^SGD: toward and importance are converted copies"):
        assert optimizer.penalty == 0
    assert optimizer.state_dict()["param_groups"][0]["toward"][0].dtype is torch.float64
    optimizer.param_groups[0]["toward"] = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^SGD: toward\[0\] must have the dtype"):  # a list that is given must fit
        optimizer.step()
