"""The names of parameters through wrappers, and what is said of a pattern that matches none."""

import re

import pytest
import torch
from test_regularizer import make_net, names_of, strengths_of
from torch import nn

from fused_reg import Regularizer


def wrapper(*names: str):
    """As those of Fabric, Opacus, DeepSpeed and of whatever comes next."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            for name in names:
                setattr(self, name, module)

    return Wrapper


WRAPPERS = {
    "fabric": wrapper("_forward_module", "_original_module"),
    "opacus": wrapper("_module"),
    "engine": wrapper("module"),
    "next": wrapper("_whatever_comes"),
    "both": lambda net: wrapper("_forward_module", "_original_module")(wrapper("module")(net)),
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_no_part_of_a_name(name):
    """Names are as without it; those with it are known to patterns, and both to `load_state_dict`."""
    net = make_net()
    wrapped = WRAPPERS[name](net)
    expected = [name for name, _ in net.named_parameters()]
    full = [name for name, _ in wrapped.named_parameters()]
    assert names_of(Regularizer(wrapped, l1=0.5)) == expected
    assert names_of(Regularizer(wrapped, l1=0.5, include=full[3])) == expected[3:4]
    within = Regularizer(nn.ModuleDict({"backbone": wrapped, "head": nn.Linear(2, 2)}), l1=0.5)
    assert names_of(within)[:2] == ["backbone.0.weight", "backbone.0.bias"]

    loaded = Regularizer(wrapped, l1=0.5)
    for saved in (Regularizer(net, l1=0.5), Regularizer(wrapped.named_parameters(), l1=0.5)):
        saved.set_strength(l1=0.25, where="*0.weight")
        loaded.load_state_dict(saved.state_dict())
        assert strengths_of(loaded)["0.weight"] == (0.25, 0, 0)
        saved.load_state_dict(saved.state_dict())
    plain = Regularizer(net, l1=0.5)
    plain.load_state_dict(loaded.state_dict())
    assert strengths_of(plain) == strengths_of(loaded)


def test_what_is_no_wrapper_is_in_the_names():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._encoder, self._decoder = nn.Linear(2, 2), nn.ModuleDict({"inner": nn.Linear(2, 2)})

    assert names_of(Regularizer(Net(), l1=0.5))[::2] == ["_encoder.weight", "_decoder.inner.weight"]
    assert names_of(Regularizer(nn.ModuleDict({"module": Net()}), l1=0.5))[0] == "module._encoder.weight"
    scaled = wrapper("module")(nn.Linear(2, 2))
    scaled.scale = nn.Parameter(torch.ones(1))
    assert names_of(Regularizer(scaled, l1=0.5)) == ["scale", "module.weight", "module.bias"]


def test_names_that_would_be_one_are_whole():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    net = nn.Module()
    net._one, net._other = nn.ParameterDict({"x": p, "y": q}), nn.ParameterDict({"x": q, "y": p})
    assert names_of(Regularizer(net, l1=0.5)) == ["_one.x", "_one.y"]
    assert list(Regularizer(net, l1=0.5, include="_other.x").named_parameters()) == [("_one.y", q)]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("mha", "mha.*"),
        ("mha*.in_proj.weight", "mha.in_proj_weight"),
        ("mha/in_proj_weight", "mha.in_proj_weight"),
        ("in_proj_weight", "*.in_proj_weight"),
        ("model.mha.in_proj_weight", "mha.in_proj_weight"),
        ("model.fc", "fc.*"),
        ("out_proj", "*.out_proj.*"),
        (r"mha\..*", "mha.*"),
        ("^fc.*$", "fc*"),
        (r"fc\.bias$", "fc.bias"),
        ("fc.wieght", "fc.weight"),
        ("mha.out_porj.*", "mha.out_proj.*"),
        ("proj", "*proj*"),
        ("decoder", None),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_is_near(pattern, near):
    net = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 2)})
    said = (
        f"did you mean {near!r}\\?$".replace("*", r"\*") if near else r"the names are 'mha.in_proj_weight', .*, \.\.\.$"
    )
    for argument in ("include", "exclude", "rules"):
        given = {argument: [(pattern, {"l1": 1.0})] if argument == "rules" else pattern}
        with pytest.raises(
            ValueError, match=f"^Regularizer: {argument} must match .*, got {re.escape(repr(pattern))}; {said}"
        ):
            Regularizer(net, l1=0.5, **given)
    with pytest.raises(ValueError, match=f"^set_strength: where must match .*; {said}"):
        Regularizer(net, l1=0.5).set_strength(l1=0.25, where=pattern)


def test_a_list_has_no_names_to_match():
    with pytest.raises(ValueError, match=r"got 'fc.weight'; the names of a list are numbers: pass the model, or pairs"):
        Regularizer(make_net().parameters(), l1=0.5, exclude="fc.weight")


@pytest.mark.parametrize("key", ["", ".", "/"])
def test_a_pattern_of_nothing(key):
    """There is nothing that it is near to."""
    with pytest.raises(ValueError, match=r"include must match the name of a parameter, got '.?'; the names are '0.wei"):
        Regularizer(nn.Sequential(nn.Linear(2, 2)), l1=0.5, include=key)
