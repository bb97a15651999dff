"""Parameters are chosen by the types of the modules around them, beside their names."""

import copy
import pickle
import re

import pytest
import torch
from test_regularizer import assert_penalty, names_of, strengths_of
from torch import nn
from torch.nn.utils import parametrize, prune

from fused_reg import NORMS, Regularizer, regularized


class Scaled(nn.Linear):
    """A subclass."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)


class OtherNorm(nn.Module):
    """As those of other packages, which are no subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def make_net() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "conv": nn.Conv1d(2, 3, 1),
            "bn": nn.BatchNorm1d(3),
            "block": Block(),
            "head": Scaled(3, 2),
            "norm": OtherNorm(),
        }
    )


LINEAR = ["block.layer.weight", "block.layer.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"types": nn.Linear}, LINEAR),
        ({"types": Scaled}, LINEAR[2:]),
        ({"types": nn.Linear, "weights_only": True}, LINEAR[::2]),
        ({"types": (nn.Linear, nn.Conv1d), "weights_only": True}, ["conv.weight", *LINEAR[::2]]),
        ({"types": nn.Linear | nn.Conv3d, "include": "block.*"}, LINEAR[:2]),
        ({"types": Block}, [*LINEAR[:2], "block.norm.weight", "block.norm.bias"]),
        ({"types": Block, "exclude": NORMS}, LINEAR[:2]),
        ({"types": nn.Linear, "exclude": ["*.bias", Scaled]}, LINEAR[:1]),
        ({"exclude": NORMS}, ["conv.weight", "conv.bias", *LINEAR, "norm.weight"]),
        ({"exclude": [NORMS, "*norm*"]}, ["conv.weight", "conv.bias", *LINEAR]),
        ({"exclude": [NORMS, OtherNorm]}, ["conv.weight", "conv.bias", *LINEAR]),
    ],
)
def test_types_choose(given, names):
    net = make_net()
    regularizer = Regularizer(net, l1=0.5, **given)
    assert names_of(regularizer) == names
    params = dict(net.named_parameters())
    assert_penalty(regularizer, [params[name] for name in names], l1=0.5)


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3)),
        *(nn.InstanceNorm1d(3, affine=True), nn.InstanceNorm2d(3, affine=True), nn.InstanceNorm3d(3, affine=True)),
        *(nn.LazyBatchNorm1d(), nn.LazyInstanceNorm2d(affine=True)),
        *(nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.RMSNorm(3)),
        type("Subclass", (nn.LayerNorm,), {})(3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_norms_are_all_normalization_layers(layer):
    net = nn.Sequential(nn.Linear(3, 3), layer)
    assert len(list(layer.parameters())) > 0
    assert names_of(Regularizer(net, l1=0.5, exclude=NORMS)) == ["0.weight", "0.bias"]


def test_the_first_rule_that_matches_counts():
    """Whether it is a pattern or a type; what it does not name is of the mark, or else of the arguments."""
    net = make_net()
    regularized(net["head"], l2=0.25)
    rules = [
        ("head.bias", {"l1": 4.0}),
        (Scaled, {"l1": 2.0}),
        (nn.Linear | nn.Conv1d, {"l1": 1.0}),
        ("*.layer.*", {"l2": 8.0}),
    ]
    net["block"].other = nn.Module()
    net["block"].other.layer = nn.LayerNorm(3)
    found = strengths_of(Regularizer(net, l1=0.5, rules=rules))
    assert found == {
        **dict.fromkeys(("conv.weight", "conv.bias", *LINEAR[:2]), (1, 0, 0)),
        **dict.fromkeys(("bn.weight", "bn.bias", "block.norm.weight", "block.norm.bias"), (0.5, 0, 0)),
        **{f"block.other.layer.{key}": (0.5, 8, 0) for key in ("weight", "bias")},
        "head.weight": (2, 0.25, 0),
        "head.bias": (4, 0, 0),
        "norm.weight": (0.5, 0, 0),
    }


def test_a_tied_parameter_is_of_the_types_of_all_its_places():
    net = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False), "fc": nn.Linear(3, 3)})
    net["head"].weight = net["embedding"].weight
    for given, names in (
        ({"types": nn.Embedding}, ["embedding.weight"]),
        ({"types": nn.Linear}, ["embedding.weight", "fc.weight", "fc.bias"]),
        ({"exclude": nn.Embedding}, ["fc.weight", "fc.bias"]),
    ):
        assert names_of(Regularizer(net, l1=0.5, **given)) == names
    rules = [(nn.Linear, {"l2": 0.25}), (nn.Embedding | nn.Conv1d, {"l2": 4.0})]
    with pytest.raises(ValueError, match=r"rules\[1\] .* but a rule before it takes all of Embedding \| Conv1d$"):
        Regularizer(net, rules=rules)
    assert strengths_of(Regularizer(net, rules=rules[::-1]))["embedding.weight"] == (0, 4, 0)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda net: torch.compile(net, backend="eager"),
        lambda net: nn.ModuleDict({key: torch.compile(layer, backend="eager") for key, layer in net.items()}),
    ],
    ids=["parallel", "averaged", "compiled", "compiled layers"],
)
def test_types_through_wrappers(wrap):
    wrapped = wrap(make_net())
    assert names_of(Regularizer(wrapped, l1=0.5, types=nn.Linear)) == LINEAR
    assert "bn.weight" not in names_of(Regularizer(wrapped, l1=0.5, exclude=NORMS))


@pytest.mark.filterwarnings("ignore:Regularizer. it follows its module")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Softplus()),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["parametrized", "weight_norm", "pruned"],
)
def test_the_type_of_a_layer_that_computes_its_weight(change):
    net = make_net()
    given = {"rules": [(Scaled, {"l1": 0.5})], "exclude": [NORMS, "*.bias"]}
    followed = Regularizer(net, **given)
    change(net["head"])
    expected = [name for name, _ in net.named_parameters() if name.startswith("head.") and name != "head.bias"]
    assert names_of(followed) == names_of(Regularizer(net, **given)) == expected


def test_a_module_that_is_swapped_later_has_what_its_type_says():
    net = make_net()
    regularizer = Regularizer(net, types=nn.Linear, l1=0.5, rules=[(Scaled, {"l1": 2.0})])
    net["head"] = nn.Linear(3, 2)
    with pytest.warns(match="'head.weight', 'head.bias' replaced; .*; rules must match a module .*, got Scaled; there"):
        assert strengths_of(regularizer)["head.weight"] == (0.5, 0, 0)
    net["block"].layer = Scaled(3, 3)
    with pytest.warns(match="'block.layer.weight', 'block.layer.bias' replaced"):
        assert strengths_of(regularizer)["block.layer.weight"] == (2, 0, 0)
    net["head"] = nn.Conv1d(3, 2, 1)
    with pytest.warns(match="'head.weight', 'head.bias' gone"):
        assert names_of(regularizer) == LINEAR[:2]


def test_types_of_before_a_conversion():
    """A parameter that is put into another layer, at its place, keeps what it was; in the place of another it does
    not."""
    net = make_net()
    excluding = Regularizer(net, l1=0.5, exclude=nn.BatchNorm1d)
    setting = Regularizer(net, l1=0.5)
    setting.set_strength(l1=2.0, where=nn.BatchNorm1d)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert not isinstance(net["bn"], nn.BatchNorm1d)
    assert not any(name.startswith("bn.") for name in names_of(excluding))
    assert [name for name, (l1, _, _) in strengths_of(setting).items() if l1 == 2] == ["bn.weight", "bn.bias"]

    tied = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    tied["head"].weight = tied["embedding"].weight
    regularizer = Regularizer(tied, l1=0.5, rules=[(nn.Embedding, {"l1": 2.0})])
    tied["embedding"].weight = nn.Parameter(torch.ones(4, 3))
    with pytest.warns(match=r"'embedding\.weight' new"):
        assert strengths_of(regularizer) == {
            "embedding.weight": (2, 0, 0),
            **dict.fromkeys(("head.weight", "head.bias"), (0.5, 0, 0)),
        }


def test_set_strength_where():
    net = make_net()
    regularizer = Regularizer(net, l1=0.5, exclude=NORMS)
    regularizer.set_strength(l1=2.0, where=nn.Linear)
    found = strengths_of(regularizer)
    assert [name for name, (l1, _, _) in found.items() if l1 == 2] == LINEAR
    net["head"] = nn.Linear(3, 2)
    with pytest.warns(match="replaced"):
        assert strengths_of(regularizer) == found
    with pytest.raises(ValueError, match=r"^set_strength: where must match a module .*, got Conv2d; there are Conv1d"):
        regularizer.set_strength(l1=2.0, where=nn.Conv2d)
    with pytest.raises(
        TypeError, match=r"^set_strength: where must be a pattern of names or a type of modules, got type"
    ):
        regularizer.set_strength(l1=2.0, where=int)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_configurations(copied):
    net = make_net()
    rules = [(nn.Linear | nn.Conv2d, {"l1": 1.0})]
    regularizer = Regularizer(net, l1=0.5, types=[Block, nn.Conv1d], exclude=NORMS, rules=rules)
    config = regularizer.get_config()
    assert config["types"] == [Block, nn.Conv1d]
    assert (config["exclude"], config["rules"]) == ([NORMS], rules)
    net, again, config = copied((net, regularizer, config))
    for other in (again, Regularizer.from_config(config, net)):
        assert repr(other) == repr(regularizer)
        other.load_state_dict(regularizer.state_dict())
        assert strengths_of(other) == strengths_of(regularizer)
    net["block"].more = nn.Linear(3, 3)
    with pytest.warns(match=r"'block\.more\.weight', 'block\.more\.bias' new"):
        assert strengths_of(again)["block.more.weight"] == (1, 0, 0)


@pytest.mark.filterwarnings("ignore")  # of torch.distributed's own
def test_fully_shard(mesh):
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(3, 3), Scaled(3, 3), nn.BatchNorm1d(3))
    for part in (*net, net):
        fully_shard(part, mesh=mesh)
    assert names_of(Regularizer(net, l1=0.5, types=Scaled)) == ["1.weight", "1.bias"]
    assert names_of(Regularizer(net, l1=0.5, exclude=[NORMS, Scaled])) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"types": nn.Conv2d},
            ValueError,
            "types must match a module that has parameters, got Conv2d; there are Conv1d, ",
        ),
        ({"types": (nn.Linear, nn.Conv2d)}, ValueError, "types must match a module that has parameters, got Conv2d; "),
        (
            {"types": nn.Conv2d | nn.ReLU},
            ValueError,
            "types must match a module that has parameters, got Conv2d | ReLU;",
        ),
        ({"exclude": nn.GroupNorm}, ValueError, "exclude must match a module that has parameters, got GroupNorm; "),
        (
            {"rules": [(nn.Conv2d, {"l1": 1.0})]},
            ValueError,
            "rules must match a module that has parameters, got Conv2d; ",
        ),
        ({"types": []}, ValueError, "types must have a type, got an empty list; leave it out for all"),
        ({"types": int}, TypeError, "types must be a type of modules or a list of them, got the type int"),
        ({"types": int | str}, TypeError, "types must be a type of modules or a list of them, got UnionType"),
        (
            {"types": nn.Linear(2, 2)},
            TypeError,
            "types must be a type of modules or a list of them, got an instance of L",
        ),
        ({"types": "fc.*"}, TypeError, "types must be a type of modules or a list of them, got 'fc.*'"),
        ({"exclude": [3]}, TypeError, "exclude must be a pattern, a type of modules or a list of them, got int"),
        (
            {"include": nn.Linear},
            TypeError,
            "include must be a pattern or a list of them, got the type Linear; types= takes it",
        ),
        (
            {"rules": [(int, {"l1": 1.0})]},
            TypeError,
            "rules[0] must be a pair (pattern or type, dict(l1=...)), got (<class 'int'>",
        ),
        (
            {"types": (nn.Linear, nn.BatchNorm1d), "weights_only": True},
            ValueError,
            "types must leave a parameter, but include, exclude or weights_only removes BatchNorm1d",
        ),
        (
            {"include": ["head.*", "bn.*"], "types": nn.Linear},
            ValueError,
            "include must leave a parameter, but types, exclude or weights_only removes 'bn.*'",
        ),
        (
            {"types": nn.Linear, "rules": [(nn.Conv1d, {"l1": 1.0})]},
            ValueError,
            "rules[0] must apply to a parameter, but weights_only, include, types, exclude or a dtype takes all of Con",
        ),
        (
            {"types": nn.Linear, "include": "bn.*"},
            ValueError,
            "include, types, exclude, weights_only and rules must leave a parameter, got none",
        ),
    ],
)
def test_what_is_wrong_or_has_no_effect(given, error, message):
    with pytest.raises(error, match=f"^Regularizer: {re.escape(message)}"):
        Regularizer(make_net(), **({"l1": 0.5} | given))


def test_a_list_has_no_modules():
    message = "types must match a module that has parameters, got Linear; a list has no modules: pass the model"
    with pytest.raises(ValueError, match=f"^Regularizer: {message}$"):
        Regularizer(make_net().named_parameters(), l1=0.5, types=nn.Linear)
