"""Strengths that change: schedules, `set_strength`, tensors, and their state."""

import copy
import io

import pytest
import torch
from samples import draw
from test_regularizer import assert_penalty, make_net, strengths_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_reg import Regularizer
from fused_reg._terms import DEFAULTS, KINDS


def three(device="cpu") -> list[nn.Parameter]:
    return [nn.Parameter(draw((5, 4), device=device, seed=i)) for i in range(3)]


def test_schedule(device):
    params = three(device)
    regularizer = Regularizer(params, l1=lambda step: 0.5**step, l2=0.1)
    for step in range(4):
        assert regularizer.step == step
        assert_penalty(regularizer, params, l1=0.5**step, l2=0.1)
        regularizer.advance()


def test_a_schedule_is_evaluated_once_a_step_however_many_parameters_have_it():
    steps = []

    def schedule(step):
        steps.append(step)
        return 0.5

    regularizer = Regularizer(make_net(), l1=schedule, rules=[("0.*", {"l2": schedule}), ("1.*", {"l1": schedule})])
    regularizer.advance()
    assert steps == [0, 1]


def test_schedule_and_numbers_by_rule(device):
    params = three(device)
    regularizer = Regularizer(
        params, l1=lambda step: 1 + step, rules=[("1", {"l1": 0.25}), ("2", {"l1": 0, "l2": 0.5})]
    )
    for step in range(3):
        assert_penalty(regularizer, params, l1=[1.0 + step, 0.25, 0], l2=[0, 0, 0.5])
        regularizer.advance()


def test_set_strength(device):
    params = three(device)
    regularizer = Regularizer(params, l1=0.5)
    regularizer.set_strength(l1=0.25, l2=0.125)
    assert_penalty(regularizer, params, l1=0.25, l2=0.125)
    regularizer.set_strength(l2=0.0, where="[12]")
    assert_penalty(regularizer, params, l1=0.25, l2=[0.125, 0, 0])
    regularizer.set_strength(l2_norm=lambda step: 0.75 + step)
    regularizer.advance()
    assert_penalty(regularizer, params, l1=0.25, l2=[0.125, 0, 0], l2_norm=1.75)
    regularizer.set_strength(l1=torch.tensor(0.375, device=device), where="0")
    assert_penalty(regularizer, params, l1=[0.375, 0.25, 0.25], l2=[0.125, 0, 0], l2_norm=1.75)


def test_a_new_schedule_begins_at_the_step_of_now():
    regularizer = Regularizer(three(), l1=0.5)
    for _ in range(3):
        regularizer.advance()
    regularizer.set_strength(l1=lambda step: float(step))
    assert strengths_of(regularizer)["0"][0] == 3


def test_a_number_ends_a_schedule_in_its_tensor():
    regularizer = Regularizer(three(), l1=lambda step: 1 + step)
    tensor = next(iter(regularizer._table.cells().values())).value
    regularizer.set_strength(l1=0.25)
    assert tensor.item() == 0.25
    regularizer.advance()
    assert strengths_of(regularizer) == dict.fromkeys("012", (0.25, 0, 0))
    assert next(iter(regularizer._table.cells().values())).value is tensor


def test_a_number_for_some_leaves_the_schedule_to_the_others():
    regularizer = Regularizer(three(), l1=lambda step: 1 + step)
    regularizer.set_strength(l1=0.25, where="[01]")
    regularizer.advance()
    assert strengths_of(regularizer) == {"0": (0.25, 0, 0), "1": (0.25, 0, 0), "2": (2, 0, 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_of_the_user(dtype, device):
    """Changed in place by the user, by `set_strength`, and differentiable."""
    params = three(device)
    strength = torch.tensor(0.5, dtype=dtype, device=device, requires_grad=True)
    regularizer = Regularizer(params, l1=strength, rules=[("2", {"l1": 0, "l2": 0.25})])
    assert_penalty(regularizer, params, l1=[0.5, 0.5, 0], l2=[0, 0, 0.25])
    with torch.no_grad():
        strength.fill_(0.75)
    assert_penalty(regularizer, params, l1=[0.75, 0.75, 0], l2=[0, 0, 0.25])
    (grad,) = torch.autograd.grad(regularizer(), strength)
    torch.testing.assert_close(grad, sum(p.detach().double().abs().sum() for p in params[:2]).to(dtype))
    regularizer.set_strength(l1=0.125, where="[01]")
    assert strength.item() == 0.125
    assert strength.requires_grad


def test_a_tensor_that_others_share_is_not_written():
    strength = torch.tensor(0.5)
    regularizer = Regularizer(three(), l1=strength, l2=strength)
    regularizer.set_strength(l1=0.25)
    assert strength.item() == 0.5
    assert strengths_of(regularizer)["0"] == (0.25, 0.5, 0)


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
def test_compiled_code_sees_new_strengths_without_another_compilation():
    params = three()
    compiled = 0

    def count(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph

    regularizer = Regularizer(params, l1=torch.tensor(0.5), l2=lambda step: 1 / (1 + step))

    @torch.compile(backend=count)
    def loss(x):
        return (x * params[0]).sum() + regularizer()

    x = torch.ones(5, 4)
    loss(x)
    before = compiled
    for _ in range(3):
        regularizer.advance()
        regularizer.set_strength(l1=0.25 * regularizer.step)
        torch.testing.assert_close(loss(x), (x * params[0]).sum() + regularizer())
    assert compiled == before


def test_compiled_code_takes_new_numbers():
    """Which are constants to it, and so are traced anew, in a list that has others by rule."""
    regularizer = Regularizer(three(), l1=0.1, rules=[("0", {"l2_norm": 0.2})])
    compiled = torch.compile(lambda: regularizer(), backend="aot_eager", fullgraph=True)
    for l1 in (0.1, 0.9):
        regularizer.set_strength(l1=l1)
        assert compiled() == regularizer()


def test_a_module_that_moves_takes_its_strengths_along(device):
    net = make_net()
    regularizer = Regularizer(net, l1=lambda step: 1 + step)
    net.to(device)
    assert_penalty(regularizer, list(net.parameters()), l1=1.0)
    (cell,) = regularizer._table.cells().values()
    assert cell.value.device.type == device.type


def test_a_schedule_on_the_meta_device_keeps_its_value():
    regularizer = Regularizer(make_net("meta"), l1=lambda step: 1 + step)
    assert regularizer().is_meta
    assert "l1=1 (schedule)" in repr(regularizer)


def test_state_dict():
    def build():
        rules = [("2", {"l1": 0, "l2": 0.25, "l2_norm": lambda step: step})]
        return Regularizer(three(), l1=lambda step: 1 + step, l2=torch.tensor(0.5), rules=rules)

    regularizer = build()
    regularizer.advance()
    regularizer.advance()
    regularizer.set_strength(l2=0.75)
    file = io.BytesIO()
    torch.save(regularizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    others = {kind: DEFAULTS[kind] for kind in KINDS[3:]} | {"group": "tensor"}
    assert state == {
        "step": 2,
        "groups": [
            {"params": ["0", "1"], "l1": 3, "l2": 0.75, "l2_norm": 0, **others, "scheduled": ["l1"]},
            {"params": ["2"], "l1": 0, "l2": 0.75, "l2_norm": 2, **others, "scheduled": ["l2_norm"]},
        ],
    }
    other = build()
    tensors = [cell.value for cell in other._table.cells().values()]
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert next(iter(other._table.cells().values())).value is tensors[0]
    for each in (regularizer, other):
        each.advance()
        assert strengths_of(each) == {"0": (4, 0.75, 0), "1": (4, 0.75, 0), "2": (0, 0.75, 3)}


def test_state_dict_of_split_strengths():
    """What `set_strength` did for some parameters comes back, also where a schedule was shared."""

    def build():
        return Regularizer(three(), l1=lambda step: 1 + step)

    regularizer = build()
    regularizer.set_strength(l1=0.25, where="1")
    other = build()
    other.load_state_dict(regularizer.state_dict())
    assert other.state_dict() == regularizer.state_dict()
    other.advance()
    assert strengths_of(other) == {"0": (2, 0, 0), "1": (0.25, 0, 0), "2": (2, 0, 0)}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
def test_strengths_change_in_compiled_code(backend):
    """Also float64 scalars, whose writes AOTAutograd loses."""
    w = nn.Parameter(torch.ones(3))
    regularizer = Regularizer([w], l1=lambda step: 1.0 + step, l2=torch.tensor(1.0, dtype=torch.float64))
    advance = torch.compile(regularizer.advance, backend=backend)
    set_strength = torch.compile(lambda value: regularizer.set_strength(l2=value), backend=backend)
    for step in (1, 2, 3):
        advance()
        set_strength(step / 2)
        assert regularizer().item() == 3 * (1 + step) + 3 * step / 2


def counted(calls):
    def schedule(step):
        calls.append(step)
        return 0.5 + step

    return schedule


def test_a_schedule_is_asked_once_by_set_strength_and_once_a_step():
    """For several kinds, for some parameters at a time, and loaded back."""
    calls = []
    schedule = counted(calls)
    regularizer = Regularizer(three(), l1=0.25)
    regularizer.set_strength(l1=schedule, l2=schedule)
    assert calls == [0]
    regularizer.set_strength(l2_norm=schedule, where="0")
    assert calls == [0, 0]
    regularizer.advance()
    assert calls == [0, 0, 1]
    regularizer.step = 4
    regularizer.load_state_dict(regularizer.state_dict())
    assert calls == [0, 0, 1, 4, 4]
    assert strengths_of(regularizer) == {"0": (4.5, 4.5, 4.5), "1": (4.5, 4.5, 0), "2": (4.5, 4.5, 0)}


def test_a_schedule_that_raises_changes_nothing():
    def failing(step):
        raise LookupError(step)

    held = torch.tensor(0.125)
    regularizer = Regularizer(three(), l1=held, l2=lambda step: 1 + step)
    before = regularizer.state_dict()
    for change in (
        lambda: regularizer.set_strength(l1=0.5, l2=0.5, l2_norm=failing),
        lambda: regularizer.set_strength(l1=failing, l2=0.5),
        lambda: regularizer.set_strength(l1=0.5, l2=lambda step: -1.0),
        lambda: regularizer.set_strength(l1=lambda step: 0.5, l2=failing, where="0"),
    ):
        with pytest.raises((LookupError, ValueError)):
            change()
        assert (regularizer.state_dict(), held.item()) == (before, 0.125)
    with pytest.raises(ValueError, match="set_strength: where must match"):
        regularizer.set_strength(l1=counted(calls := []), where="9")
    assert calls == []


@pytest.mark.parametrize("where", [None, "0"])
def test_a_number_that_its_tensor_cannot_hold_changes_nothing(where):
    """A half-type tensor of the user's: torch's own error would come after other strengths are written."""
    small = torch.tensor(0.5, dtype=torch.float16)
    regularizer = Regularizer(three()[:1], l1=0.25, l2=torch.tensor(0.75), l2_norm=small)
    before = regularizer.state_dict()
    message = "must be at most 65504.0, to fit its tensor of torch.float16, got 100000.0"
    with pytest.raises(ValueError, match=f"^set_strength: l2_norm {message}$"):
        regularizer.set_strength(l1=1.0, l2=1.0, l2_norm=1e5, where=where)
    with pytest.raises(ValueError, match=f"^load_state_dict: l2_norm of '0' {message}$"):
        regularizer.load_state_dict({"step": 3, "groups": [before["groups"][0] | {"l2": 1.0, "l2_norm": 1e5}]})
    assert regularizer.state_dict() == before
    regularizer.set_strength(l2_norm=65504.0)
    assert small.item() == 65504


def test_a_strength_that_its_users_leave_needs_not_fit():
    """Of two parameters with one tensor, one gets a number of its own."""
    small = torch.tensor(0.5, dtype=torch.float16)
    regularizer = Regularizer(three()[:2], l1=small)
    regularizer.set_strength(l1=1e5, where="0")
    assert (strengths_of(regularizer), small.item()) == ({"0": (1e5, 0, 0), "1": (0.5, 0, 0)}, 0.5)


def test_a_state_of_tensors():
    """Numbers in 0-dim tensors, as a converter of checkpoints leaves them, are copied."""
    regularizer = Regularizer(three(), l1=torch.tensor(0.5), l2=0.25)
    state = regularizer.state_dict()
    given = torch.tensor(0.75, dtype=torch.float64)
    regularizer.load_state_dict({"step": 1, "groups": [state["groups"][0] | {"l1": given, "l2": given}]})
    given.fill_(3.0)
    assert strengths_of(regularizer)["1"] == (0.75, 0.75, 0)


def test_a_configuration_is_a_copy():
    """Neither what the constructor got nor what `get_config` gave changes a regularizer built later."""
    given = {"l1": 0.5}
    rules, include = [("*", given)], ["[01]"]
    regularizer = Regularizer(three(), rules=rules, include=include)
    expected = {
        "l1": None,
        "l2": None,
        "l2_norm": None,
        "group": "tensor",
        "zeros": None,
        "zeros_per": None,
        "together": None,
        "group_weights": None,
        "weights_only": False,
    }
    expected |= {"include": ["[01]"], "types": None, "exclude": None, "rules": [("*", {"l1": 0.5})]}
    expected |= {"toward": None, "importance": None, "save_references": None}
    given["l1"] = 0.75
    rules.clear()
    include.append("2")
    config = regularizer.get_config()
    assert config == expected
    config["rules"][0][1]["l1"] = 0.25
    config["rules"].append(("0", {"l2": 1.0}))
    config["include"].append("2")
    assert regularizer.get_config() == copy.deepcopy(regularizer).get_config() == expected
    state = regularizer.state_dict()
    state["groups"][0]["params"].clear()
    assert regularizer.state_dict()["groups"][0]["params"] == ["0", "1"]


def test_strengths_of_a_batch():
    """Whose values nobody can look at."""
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    strengths = torch.tensor([0.5, 2.0])
    assert torch.func.vmap(lambda l1: Regularizer([p], l1=l1)())(strengths).tolist() == [1.5, 6.0]
    with FakeTensorMode():
        fake = Regularizer([nn.Parameter(torch.ones(3))], l1=torch.tensor(0.5))
        assert fake().shape == ()
