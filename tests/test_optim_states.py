"""State dicts of `fused_reg.optim` and of torch's classes in each other, and what else is saved, copied and hooked."""

import copy
import io

import pytest
import torch
from optim_cases import ONE_EACH, PENALTY, assert_same, assert_same_states, given, named, net, pair, train
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

EACH = pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
#: Keys of a group that torch has added in the course of time, and ours.
NEWER = ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay", "l1", "l2", "prox")


def trained(kind, options, dtype=torch.float64, names=False):
    model = net(dtype)
    optimizer = kind(model.named_parameters() if names else model.parameters(), **options)
    train(model, optimizer)
    return model, optimizer


def goes_on(model, optimizer, state):
    """Two further steps of another one, from there."""
    other = copy.deepcopy(model)
    kind = type(optimizer)(other.parameters(), **{"lr": 0.5})
    kind.load_state_dict(state)
    train(other, kind, range(4, 6))
    return other, kind


@EACH
@pytest.mark.parametrize("as_tensor", [False, True])
def test_older(name, options, as_tensor):
    """Groups without newer keys, steps that are numbers: as torch's class takes them."""
    found = []
    for kind in pair(name):
        model, optimizer = trained(kind, {**options, "maximize": False})
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            for key in NEWER:
                group.pop(key, None)
        for held in state["state"].values() if not as_tensor else ():
            if "step" in held:
                held["step"] = int(held["step"])
        found.append(goes_on(model, optimizer, state))
    assert_same(*(model for model, _ in found))
    assert_same_states(*(optimizer for _, optimizer in found))
    assert found[1][1].penalty == 0


@EACH
def test_other_dtypes(name, options):
    """The states of a net in another dtype become the parameters'. In float32 torch rounds otherwise, and a centered
    average makes more of it."""
    found = []
    for kind in pair(name):
        _, saved = trained(kind, options, torch.float32)
        model = net(torch.float64)
        optimizer = kind(model.parameters(), **options)
        optimizer.load_state_dict(saved.state_dict())
        train(model, optimizer, range(4, 6))
        found.append((model, optimizer))
    assert_same(*(model for model, _ in found), rtol=1e-3, atol=1e-5)
    assert_same_states(*(optimizer for _, optimizer in found), rtol=1e-3, atol=1e-5)


@EACH
@pytest.mark.parametrize("of_saved", [False, True])
@pytest.mark.parametrize("of_loading", [False, True])
def test_names(name, options, of_saved, of_loading):
    """Of parameters, in a group beside ours."""
    for saving, loading in zip(pair(name), reversed(pair(name)), strict=True):
        _, saved = trained(saving, options, names=of_saved)
        model, optimizer = trained(loading, options, names=of_loading)
        optimizer.load_state_dict(saved.state_dict())
        train(model, optimizer, [4])
        (group,) = optimizer.state_dict()["param_groups"]
        expected = [n for n, _ in model.named_parameters()] if of_saved or of_loading else None
        assert group.get("param_names") == expected


@EACH
def test_weights_only(name, options):
    _, optimizer = trained(pair(name)[1], {**options, **PENALTY, "prox": True})
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded, state = torch.load(file, weights_only=True), optimizer.state_dict()
    assert loaded["param_groups"] == state["param_groups"]
    torch.testing.assert_close(loaded["state"], state["state"], rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(loaded)["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


@EACH
def test_hooks_of_states(name, options):
    """Before and after what is saved and loaded; one before may exchange it."""
    model, optimizer = trained(pair(name)[1], options)
    seen = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda o: seen.append("save")),
        optimizer.register_state_dict_post_hook(lambda o, state: {**state, "more": 1}),
        optimizer.register_load_state_dict_pre_hook(lambda o, state: {**state, "param_groups": renamed(state, 0.25)}),
        optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("load"), prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"])),
    ]

    def renamed(state, lr):
        return [{**group, "lr": lr, "l1": 0.5} for group in state["param_groups"]]

    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["save", "load", 0.25]
    train(model, optimizer, [4])
    assert optimizer.param_groups[0]["l1"] == 0.5
    assert optimizer.penalty > 0
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("name", "options"), named(case for case in ONE_EACH if case[0] in ("SGD", "AdamW")))
@pytest.mark.filterwarnings("ignore:torch.distributed is")  # in a single process, as intended
@pytest.mark.filterwarnings("ignore:TypedStorage")  # which torch 2.10 uses
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("saving", "loading"), [(0, 1), (1, 0), (1, 1)])
def test_distributed_checkpoint(name, options, flat, saving, loading, tmp_path):
    """Through files, also flattened, where each option stands for each parameter. A checkpoint of torch's is a partial
    one: it has none of ours, which stay as they are."""
    asked = StateDictOptions(flatten_optimizer_state_dict=flat)
    ours, fewer = {**PENALTY, "prox": True}, {"l1": 0.5}
    a, saved = trained(pair(name)[saving], {**options, **(ours if saving else {})})
    b = net()
    optimizer = pair(name)[loading](b.parameters(), **{**options, "lr": 0.5, **(fewer if loading else {})})
    before = [p.detach().clone() for p in b.parameters()]
    checkpoint.save(get_optimizer_state_dict(a, saved, options=asked), checkpoint_id=tmp_path, no_dist=True)
    state = get_optimizer_state_dict(b, optimizer, options=asked)
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=(saving, loading) == (0, 1))
    checkpoint.load(state, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    set_optimizer_state_dict(b, optimizer, state, options=asked)
    assert_same_states(saved, optimizer, rtol=0, atol=0)
    assert_same(b.parameters(), before, rtol=0, atol=0)
    (group,) = optimizer.param_groups
    assert group["lr"] == saved.param_groups[0]["lr"]
    if loading:
        assert [group[key] for key in ours] == (list(ours.values()) if saving else [0.5, 0.0, False])


@EACH
def test_attributes_in_copies(name, options):
    _, optimizer = trained(pair(name)[1], {**options, **PENALTY})
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert {key for key in vars(copy.deepcopy(optimizer)) if not key.startswith("_")} == public
    assert set(optimizer.__getstate__()) == set(pair(name)[0](net().parameters()).__getstate__())


@EACH
def test_groups_twice(name, options):
    """A group that stands there twice has the same in the state dict, and its parameters the same numbers."""
    _, optimizer = trained(pair(name)[1], options)
    optimizer.param_groups.extend(optimizer.param_groups)
    first, second = optimizer.state_dict()["param_groups"]
    assert first == second
    given(optimizer).step()
