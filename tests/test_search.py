"""`largest_strength`: above it zero is the minimum, below it it is not."""

import math
import re

import pytest
import torch
from oracle import assert_same_bits
from torch import nn

from fused_reg import Regularizer, fused_penalty, largest_strength, prox_


class Linear:
    """Least squares of two outputs with intercepts, which are fitted at zero weights; the loss is convex in w."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 6, generator=draw, dtype=torch.float64)
        self.y = torch.randn(40, 2, generator=draw, dtype=torch.float64) + 3.0
        self.w = torch.randn(2, 6, generator=draw, dtype=torch.float64, requires_grad=True)
        self.b = self.y.mean(dim=0)

    def loss(self):
        return (self.x @ self.w.T + self.b - self.y).square().sum() / 80

    def minimum(self, **strengths):
        """By proximal gradient steps with a step of 1 / the largest curvature."""
        step = 40 / torch.linalg.eigvalsh(self.x.T @ self.x)[-1].item()
        for _ in range(3000):
            (grad,) = torch.autograd.grad(self.loss(), self.w)
            with torch.no_grad():
                self.w -= step * grad
            prox_([self.w], **strengths, step=step)
        return self.w.detach()


GROUPS = (None, "tensor", "row", "column")


def penalty_of(group, strength):
    return {"l1": strength} if group is None else {"l2_norm": strength, "group": group}


@pytest.mark.parametrize("l2", [0.0, 0.5])
@pytest.mark.parametrize("group", GROUPS)
def test_zero_is_the_minimum_from_it_on(group, l2):
    problem = Linear()
    largest = largest_strength([problem.w], problem.loss, group=group)
    assert torch.count_nonzero(problem.minimum(**penalty_of(group, largest * 1.001), l2=l2)) == 0
    with torch.no_grad():
        problem.w.fill_(1.0)
    assert torch.count_nonzero(problem.minimum(**penalty_of(group, largest * 0.999), l2=l2)) > 0


@pytest.mark.parametrize("group", GROUPS)
def test_optimality_at_zero(group):
    """Zero is a minimum of loss and penalty exactly if no direction leads down: the slopes are the loss's gradient
    times the direction, and the penalty of the direction itself. Here the steepest one is flat."""
    problem = Linear()
    largest = largest_strength([problem.w], problem.loss, group=group)
    grad = -(problem.x.T @ (problem.y - problem.b)).T / 40  # by hand, at zero
    directions = [-grad, -torch.where(grad.abs() == grad.abs().max(), grad, 0)]
    directions += [-torch.where(torch.arange(2)[:, None] == i, grad, 0) for i in range(2)]
    directions += [-torch.where(torch.arange(6) == i, grad, 0) for i in range(6)]
    slopes = [
        ((grad * d).sum() + fused_penalty([d], **penalty_of(group, largest))).item() / d.norm().item()
        for d in directions
    ]
    assert min(slopes) == pytest.approx(0, abs=1e-12)


def test_the_parameters_of_a_regularizer():
    """The largest of all; what is not penalized is as it is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    before = [p.detach().clone() for p in net.parameters()]
    net(x).sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    chosen = [p for _, p in Regularizer(net, l1=1.0, include="1.*").named_parameters()]
    versions = [p._version for p in chosen]
    largest = largest_strength(iter(chosen), lambda: (net(x) - 2).square().sum())
    with torch.no_grad():
        residual = torch.full((5, 2), -4.0, dtype=torch.float64)
        expected = max((residual.T @ net[0](x)).abs().max().item(), residual.sum(dim=0).abs().max().item())
    assert largest == pytest.approx(expected, rel=1e-12)
    assert_same_bits(list(net.parameters()), before)
    assert_same_bits([p.grad for p in net.parameters()], grads)
    assert [p._version for p in chosen] == versions


def test_everything_is_as_before_where_the_loss_raises():
    w = torch.tensor([1.0, -0.0, math.pi], requires_grad=True)
    before = w.detach().clone()

    def loss():
        assert torch.count_nonzero(w) == 0
        raise RuntimeError("of the loss")

    with pytest.raises(RuntimeError, match="of the loss"):
        largest_strength([w], loss)
    assert_same_bits([w.detach()], [before])


@torch.no_grad()
def test_without_grad_around_unused_and_empty_ones():
    w, unused, empty = (torch.ones(n, requires_grad=True) for n in (2, 3, 0))
    assert largest_strength([unused, empty, w], lambda: (w * 3).sum() + empty.sum()) == 3.0
    assert largest_strength([w, unused], lambda: w.square().sum()) == 0.0


@pytest.mark.filterwarnings("ignore")  # of torch.distributed's own
def test_sharded_ones(mesh):
    """Their gradients come by hooks of `backward`, and never here."""
    from torch.distributed.fsdp import fully_shard

    net = nn.Linear(3, 2)
    fully_shard(net, mesh=mesh)
    with pytest.raises(TypeError, match=r"params\[0\] must be a plain tensor, got a DTensor; search before sharding"):
        largest_strength(net.parameters(), lambda: net(torch.ones(3)).sum())


W = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("params", "loss", "given", "error", "message"),
    [
        ([W], W.sum(), {}, TypeError, "loss must be a function without arguments, got Tensor"),
        ([], W.sum, {}, ValueError, "params must hold a tensor, got none"),
        ([W, torch.ones(2)], W.sum, {}, ValueError, "params[1] must require grad, got one that does not"),
        (
            [W],
            W.sum,
            {"group": "rows"},
            ValueError,
            'group must be "tensor", "row", "column", or a pair of "row", "column" or "block" and n >= 1, got \'rows\'',
        ),
        ([W], lambda: 3.0, {}, TypeError, "loss must give a tensor, got float"),
        ([W], lambda: W * 2, {}, ValueError, "loss must give one element, got shape (2,)"),
        (
            [W],
            lambda: torch.ones(()),
            {},
            ValueError,
            "loss must depend on params, got one that uses none",
        ),
        ([W], lambda: W.sqrt().sum(), {}, ValueError, "the gradient of params[0] at zero must be finite, got inf"),
        ([W], lambda: (W / W).sum(), {}, ValueError, "the gradient of params[0] at zero must be finite, got nan"),
    ],
)
def test_errors(params, loss, given, error, message):
    with pytest.raises(error, match=f"^largest_strength: {re.escape(message)}"):
        largest_strength(params, loss, **given)
    assert torch.equal(W, torch.ones(2))
