"""Parameters that are not whole here and look as if they were: placeholders and pieces of other libraries."""

import re

import pytest
import torch
from ranks import ranks
from samples import draw
from torch import nn

import fused_reg
from fused_reg import Regularizer, fused_penalty, optim, value_and_grad

CALLS = {
    "fused_penalty": lambda params: fused_penalty(params, l1=0.1),
    "value_and_grad": lambda params: value_and_grad(params, l1=0.1),
    "accumulate_grad_": lambda params: fused_reg.accumulate_grad_(params, l1=0.1),
    "prox_": lambda params: fused_reg.prox_(params, l1=0.1, step=0.1),
}


def zero_3(p: torch.Tensor) -> nn.Parameter:
    """What DeepSpeed leaves of a parameter until its module runs."""
    placeholder = nn.Parameter(torch.empty(0))
    placeholder.ds_id, placeholder.ds_status = 0, "NOT_AVAILABLE"
    placeholder.ds_shape, placeholder.ds_numel = p.shape, p.numel()
    placeholder.ds_tensor = p.detach().flatten().chunk(2)[0]
    return placeholder


def attributes(**values):
    def make(p: torch.Tensor) -> nn.Parameter:
        piece = nn.Parameter(p.detach().flatten()[: values.get("elements", 0)])
        for name, value in values.items():
            setattr(piece, name, value)
        return piece

    return make


PARTITIONED = {
    "ZeRO-3": (zero_3, "DeepSpeed ZeRO-3"),
    "ZeRO-3 without a shape": (attributes(ds_id=0), "DeepSpeed ZeRO-3"),
    "ZeRO-3 of its first versions": (attributes(ds_id=0, ds_shape=(5, 7), elements=1), "DeepSpeed ZeRO-3"),
    "another's placeholder": (attributes(ps_tensor=torch.ones(9)), "ZeRO-3"),
    "FSDP1": (attributes(_is_flat_param=True, elements=20), "FSDP1"),
    "FSDP1 with the original parameters": (attributes(_fsdp_flattened=True, elements=20), "FSDP1"),
    "FSDP1, elsewhere": (attributes(_fsdp_flattened=True), "FSDP1"),
    "FairScale": (attributes(_is_sharded=True, _orig_size=torch.Size((5, 7)), elements=18), "FSDP1"),
}


@pytest.mark.parametrize("kind", PARTITIONED)
@pytest.mark.parametrize("function", CALLS)
def test_functions_refuse_it(function, kind):
    make, whose = PARTITIONED[kind]
    first = nn.Parameter(draw(4))
    before = first.detach().clone()
    with pytest.raises(ValueError, match=rf"^{function}: params\[1\] must be whole, got .*{re.escape(whose)}"):
        CALLS[function]([first, make(draw((5, 7)))])
    assert first.grad is None
    assert torch.equal(first, before)


@pytest.mark.parametrize("kind", PARTITIONED)
@pytest.mark.parametrize("in_turn", [False, True])
def test_an_optimizer_refuses_it(kind, in_turn):
    """At its step, where it has a penalty: also one that it had not at the last."""
    make, whose = PARTITIONED[kind]
    first, piece = nn.Parameter(draw(4)), make(draw((5, 7)))
    optimizer = optim.SGD([first, piece, *[nn.Parameter(draw(2, dtype=torch.complex64))] * in_turn], lr=0.1)
    piece.grad = torch.ones_like(piece)
    optimizer.step()
    before = first.detach().clone()
    optimizer.param_groups[0]["l1"], first.grad = 0.1, torch.ones(4)
    with pytest.raises(ValueError, match=rf"^SGD: params\[1\] must be whole, got .*{re.escape(whose)}"):
        optimizer.step()
    assert torch.equal(first, before)


@pytest.mark.parametrize("kind", PARTITIONED)
@pytest.mark.parametrize("options", [{}, {"weights_only": True}])
def test_a_regularizer_refuses_it_when_it_is_built(kind, options):
    make, whose = PARTITIONED[kind]
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 2))
    net[0].weight = make(net[0].weight)
    with pytest.raises(
        ValueError, match=rf"^Regularizer: params\['0.weight'\] must be whole, got .*{re.escape(whose)}"
    ):
        Regularizer(net, l1=0.1, **options)


def partitioned_later() -> tuple[Regularizer, nn.Module, torch.optim.Optimizer]:
    net = nn.Linear(7, 5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = Regularizer(net, l1=0.1)
    net.weight.ds_id, net.weight.ds_shape = 0, net.weight.shape
    net.weight.whole = net.weight.data
    net.weight.data = torch.empty(0)
    return regularizer, net, optimizer


@pytest.mark.parametrize(
    "use",
    [
        lambda regularizer: regularizer(),
        lambda regularizer: regularizer.accumulate_grad_(),
        lambda regularizer: regularizer.prox_(0.1),
        lambda regularizer: regularizer.report(),
    ],
)
def test_a_regularizer_refuses_it_when_it_is_used(use):
    regularizer, *_ = partitioned_later()
    with pytest.raises(ValueError, match=r"params\['weight'\] must be whole"):
        use(regularizer)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_an_attached_step_refuses_it(mode):
    regularizer, net, optimizer = partitioned_later()
    net.weight.data = net.weight.whole
    regularizer.attach(optimizer, mode)
    net(torch.ones(7)).sum().backward()
    net.weight.data = torch.empty(0)
    net.weight.grad = None
    with pytest.raises(ValueError, match=r"params\['weight'\] must be whole"):
        optimizer.step()


def test_what_is_gathered_is_whole():
    """DeepSpeed puts the whole back into the parameter, whose attributes stay."""
    net = nn.Linear(7, 5)
    expected = fused_penalty(net.parameters(), l1=0.1)
    net.weight.ds_id, net.weight.ds_status, net.weight.ds_shape = 0, "AVAILABLE", net.weight.shape
    net.weight.ds_tensor = torch.ones(18)
    assert fused_penalty(net.parameters(), l1=0.1) == expected
    assert Regularizer(net, l1=0.1)() == expected


def test_other_attributes_do_not_matter():
    """Of Megatron, of MuP, of a user; and of parameters that are empty by themselves."""
    net = nn.Linear(7, 5)
    expected = fused_penalty(net.parameters(), l1=0.1)
    net.weight.tensor_model_parallel, net.weight.infshape, net.bias.mask = True, (7, 5), torch.ones(5)
    empty = nn.Parameter(torch.empty(0, 3))
    empty.label, empty.shape_before, empty.mask = "empty", torch.Size((0, 3)), torch.empty(0, 3)
    assert fused_penalty([*net.parameters(), empty], l1=0.1) == expected


def check_fsdp_1(original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    for i, p in enumerate(net.parameters()):
        p.data.copy_(draw(p.shape, seed=i))
    with torch.no_grad():
        expected = fused_penalty(net.parameters(), l1=0.1, l2=0.2)
    cut = FullyShardedDataParallel(net, use_orig_params=original, device_id=torch.device("cpu"))
    for call in CALLS.values():
        with pytest.raises(ValueError, match="FSDP1"):
            call(cut.parameters())
    with pytest.raises(ValueError, match="FSDP1"):
        Regularizer(cut, l1=0.1)
    with FullyShardedDataParallel.summon_full_params(cut), torch.no_grad():
        assert fused_penalty(cut.parameters(), l1=0.1, l2=0.2) == expected


@pytest.mark.parametrize("original", [False, True])
def test_fsdp_1(original):
    """As it is: pieces are refused on every process, and inside `summon_full_params` the value is that of the whole."""
    ranks(2).run(check_fsdp_1, original)
