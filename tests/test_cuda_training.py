"""A whole training step in a CUDA graph: each replay is a step of the same training without one (hard case 35)."""

import pytest
import torch
from samples import draw
from test_attach import filled
from test_cuda_streams import captured
from torch import nn

from fused_reg import Regularizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("cuda"),
    # Of a node that the engine's thread has not let go of yet, when the next call runs on another stream.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match"),
    # Of the steps before the graph.
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True"),
]

WARM_UP = 3  # steps of `captured`, which the graph's training takes before it
REPLAYS = 10


def two_groups(net, device) -> list[dict]:
    """With learning rates in tensors, which a graph reads anew."""
    return [{"params": net[i].parameters(), "lr": torch.tensor(lr, device=device)} for i, lr in ((0, 0.02), (2, 0.01))]


OPTIMIZERS = {
    "SGD": lambda net, device: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "fused SGD": lambda net, device: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda net, device: torch.optim.Adam(
        net.parameters(), lr=torch.tensor(0.01, device=device), capturable=True
    ),
    "fused Adam": lambda net, device: torch.optim.Adam(net.parameters(), lr=0.01, capturable=True, fused=True),
    "Adam, two rates": lambda net, device: torch.optim.Adam(two_groups(net, device), capturable=True),
}


class Training:
    """With a scheduled l1, and an l2 in a tensor."""

    def __init__(self, way, by_layer, optimizer, device, set_to_none=True) -> None:
        self.net = filled(nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)).to(device)).double()
        self.optimizer = OPTIMIZERS[optimizer](self.net, device)
        self.x, self.y = (torch.empty(32, n, dtype=torch.float64, device=device) for n in (7, 5))
        self.way, self.set_to_none = way, set_to_none
        self.changing = "0.*" if by_layer else None  # the parameters whose strengths change
        changing = {"l1": lambda step: 0.05 * (1 + step), "l2": torch.tensor(0.01, device=device)}
        rules = [("0.*", changing), ("*", {"l1": 0.01, "l2_norm": 0.1, "group": "row"})]
        self.regularizer = Regularizer(self.net, rules=rules) if by_layer else Regularizer(self.net, **changing)
        is_attached = way in ("grad", "prox")
        self.attachment = self.regularizer.attach(self.optimizer, way) if is_attached else None
        self.feed(0)

    def feed(self, i) -> None:
        """What is different in the next step: the batch, where it is, a strength and the learning rates in tensors."""
        self.x.copy_(draw(self.x.shape, torch.float64, seed=2 * i))
        self.y.copy_(draw(self.y.shape, torch.float64, seed=2 * i + 1))
        if i % 3 == 2:
            self.regularizer.set_strength(l2=0.01 * i, where=self.changing)
            for group in self.optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].mul_(0.5)

    def step(self) -> list[torch.Tensor]:
        self.optimizer.zero_grad(self.set_to_none)
        loss = nn.functional.mse_loss(self.net(self.x), self.y)
        if self.way == "composed":
            loss = loss + self.regularizer()
        loss.backward()
        if self.way == "accumulated":
            self.regularizer.accumulate_grad_()
        self.optimizer.step()
        return [loss.detach()]

    def params(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]

    def assert_near(self, other) -> None:
        torch.testing.assert_close(self.params(), other.params(), rtol=1e-7, atol=1e-9)
        if self.attachment is not None:
            torch.testing.assert_close(self.attachment.value, other.attachment.value)
        assert self.regularizer.step == other.regularizer.step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("way", ["composed", "accumulated", "grad", "prox"])
def test_training_in_a_graph(way, by_layer, optimizer, cuda):
    """Batches, strengths and learning rates change between the replays."""
    compare(Training(way, by_layer, optimizer, cuda), Training(way, by_layer, optimizer, cuda))


@pytest.mark.parametrize("way", ["composed", "accumulated", "grad", "prox"])
def test_gradients_that_are_kept(way, cuda):
    """Zeroed in the graph, and not allocated by it."""
    compare(*(Training(way, True, "SGD", cuda, set_to_none=False) for _ in range(2)))


def compare(eager, graphed) -> None:
    for _ in range(WARM_UP):
        eager.step()
    graph, (loss,) = captured(graphed.step)
    torch.testing.assert_close(graphed.params(), eager.params())  # a capture takes no step,
    assert graphed.regularizer.step == eager.regularizer.step  # and advances no schedule
    for i in range(1, REPLAYS + 1):
        for training in (eager, graphed):
            training.feed(i)
        (expected,) = eager.step()
        graph.replay()
        graphed.regularizer.advance()
        if eager.attachment is None:  # else its own step has done it
            eager.regularizer.advance()
        torch.testing.assert_close(loss, expected)
        graphed.assert_near(eager)
