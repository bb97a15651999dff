"""``lazy_rows``: the penalty of the rows that a batch has touched, where gradients are sparse (``Embedding``)."""

import copy
import pickle

import pytest
import torch
from optim_cases import assert_same
from oracle import assert_same_bits
from torch import nn

from fused_reg import Regularizer, optim, reference, regularized
from fused_reg.regularizer import share

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant")

BATCHES = [[1, 1, 4], [0, 4], [], [2, 1, 2, 2]]
OPTIMIZERS = {
    "SparseAdam": lambda params: torch.optim.SparseAdam(list(params), lr=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.5),
    "SGD, maximize": lambda params: torch.optim.SGD(params, lr=0.1, maximize=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "ours, SGD": lambda params: optim.SGD(params, lr=0.1),
    "ours, Adagrad": lambda params: optim.Adagrad(params, lr=0.1),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("name", OPTIMIZERS)
MODES = pytest.mark.parametrize("mode", ["grad", "prox"])
TERMS = [
    {"l1": 0.3, "l2": 0.2},
    {"smooth_l1": 0.3, "beta": 0.4},
    {"l1": 0.1, "l2_norm": 0.5, "group": "row"},
    {"l1": 0.3, "toward": True},
    {"l1": 0.1, "l2": 0.2, "toward": True, "importance": True},
    {"l2_norm": 0.5, "group": "row", "toward": True},
]


def table(kind=nn.Embedding, seed=0):
    torch.manual_seed(seed)
    return kind(6, 3, sparse=True).double()


def backward(net, batch, factor=1.0):
    if batch:
        x = torch.tensor([batch])
        (factor * (net(x) * torch.linspace(0.5, 1.5, 3).double()).square().sum()).backward()
    else:
        net.weight.grad = torch.sparse_coo_tensor(torch.empty(1, 0).long(), torch.empty(0, 3).double(), (6, 3))


def numbers(terms):
    torch.manual_seed(3)
    given = {key: torch.rand(6, 3).double() for key in ("toward", "importance")}
    return {key: given[key] if x is True else x for key, x in terms.items()}


def regularizer_of(net, terms):
    lists = {key: [x] if isinstance(x, torch.Tensor) else x for key, x in numbers(terms).items()}
    return Regularizer([("w", net.weight)], **lists)


def at(terms, rows):
    return {key: x[rows] if isinstance(x, torch.Tensor) else x for key, x in numbers(terms).items()}


@EVERY_OPTIMIZER
@MODES
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_the_rows_of_the_batch_alone(name, mode, terms):
    """As by hand, a row that is there twice once; the others keep their bits."""
    theirs, ours = table(), table()
    by_hand, optimizer = OPTIMIZERS[name](theirs.parameters()), OPTIMIZERS[name](ours.parameters())
    attachment = regularizer_of(ours, terms).attach(optimizer, mode, lazy_rows=True)
    sign = -1.0 if "maximize" in name else 1.0
    for batch in BATCHES:
        rows = sorted(set(batch))
        before = ours.weight.detach().clone()
        for net in (theirs, ours):
            net.zero_grad()
            backward(net, batch)
        value, (grad,) = reference.value_and_grad(theirs.weight.detach()[rows], **at(terms, rows))
        if mode == "grad" and rows:
            given = theirs.weight.grad.coalesce()
            assert given.indices()[0].tolist() == rows
            theirs.weight.grad = torch.sparse_coo_tensor(given.indices(), given.values() + sign * grad, (6, 3))
        by_hand.step()
        optimizer.step()
        if mode == "prox" and rows:
            shrunk = theirs.weight.detach()[rows]
            reference.prox_(shrunk, step=0.1, **at(terms, rows))
            theirs.weight.data[rows] = shrunk
        assert_same([ours.weight], [theirs.weight])
        grad = ours.weight.grad
        assert grad.is_sparse
        assert grad.is_coalesced()
        assert grad.indices()[0].tolist() == rows
        if mode == "grad" or name.startswith("ours"):
            torch.testing.assert_close(attachment.value, value, rtol=1e-14, atol=0)
        if "momentum" not in name:
            others = [i for i in range(6) if i not in rows]
            assert_same_bits([ours.weight.detach()[others]], [before[others]])


@MODES
def test_a_bag_beside_dense_layers(mode):
    """Of one optimizer. The dense ones have their penalty as ever, also while a batch does not use the table."""
    nets = []
    for lazy in (False, True):
        bag = table(nn.EmbeddingBag)
        net = nn.Sequential(bag, nn.Linear(3, 2).double())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        attachment = Regularizer(net, l1=0.2, l2=0.1).attach(optimizer, mode, lazy_rows=lazy)
        for batch in ([1, 1, 4], None, [5], None, [0, 1]):
            net.zero_grad()
            x = bag.weight.new_ones(1, 3) if batch is None else bag(torch.tensor([batch]))
            net[1](x).square().sum().backward()
            before = bag.weight.detach().clone()
            used = [*net[1].parameters(), before if batch is None else before[sorted({*batch})]]
            expected = reference.fused_penalty(used, l1=0.2, l2=0.1).detach()
            if not lazy and batch is not None:  # the same gradient, dense
                bag.weight.grad = bag.weight.grad.to_dense()
            optimizer.step()
            if not lazy and batch is not None:
                others = [i for i in range(6) if i not in batch]
                bag.weight.data[others] = before[others]
            if lazy and mode == "grad":
                torch.testing.assert_close(attachment.value, expected, rtol=1e-14, atol=0)
        nets.append(net)
    assert_same(*nets)


def test_the_value_counts_these_rows():
    net = table()
    regularizer = Regularizer(net, l1=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = regularizer.attach(optimizer, lazy_rows=True)
    whole, rows = 0.5 * net.weight.detach().abs().sum(), 0.5 * net.weight.detach()[[1, 4]].abs().sum()
    torch.testing.assert_close(attachment.value, whole)

    def closure():
        net.zero_grad()
        backward(net, [1, 4, 4])
        return 7.0

    torch.testing.assert_close(torch.tensor(optimizer.step(closure)), 7 + rows.float())
    torch.testing.assert_close(attachment.value, rows)
    torch.testing.assert_close(regularizer(), 0.5 * net.weight.abs().sum())


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD])
@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("has_closure", [True, False])
def test_the_rows_of_a_step_are_looked_for_once(make, mode, has_closure, monkeypatch):
    found = []
    own = share.touched
    monkeypatch.setattr(share, "touched", lambda *args: found.append(own(*args)) or found[-1])
    net = table()
    optimizer = make(net.parameters(), lr=0.1)
    Regularizer(net, l1=0.5).attach(optimizer, mode=mode, lazy_rows=True)
    for rows in ([1, 4, 4], [2]):

        def closure(rows=rows):
            net.zero_grad()
            backward(net, rows)

        found.clear()
        if has_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert [index.tolist() for index in found] == [sorted({*rows})]


def test_a_schedule():
    net = table()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = Regularizer(net, l1=lambda step: 0.5 * step).attach(optimizer, lazy_rows=True)
    for step in range(3):
        optimizer.zero_grad()
        backward(net, [step, 5])
        expected = 0.5 * step * net.weight.detach()[[step, 5]].abs().sum()
        optimizer.step()
        torch.testing.assert_close(attachment.value, expected)


@MODES
def test_dense_and_sparse_gradients_may_alternate(mode):
    """Also where a step repeats the last one."""
    net = table()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, l2=0.5).attach(optimizer, mode, lazy_rows=True)
    for is_sparse in (False, False, True, True, False, True):
        before = net.weight.detach().clone()
        rows = [2] if is_sparse else list(range(6))
        grad = torch.zeros(6, 3).double()
        net.weight.grad = torch.sparse_coo_tensor([rows], grad[rows], (6, 3)) if is_sparse else grad
        optimizer.step()
        changed = (net.weight != before).any(1).nonzero()[:, 0].tolist()
        assert changed == rows


@MODES
def test_gradients_that_are_accumulated_and_clipped(mode):
    """The gradient is what it is at the step: of all micro-batches, and clipped; the penalty enters once."""
    net, other = table(), table()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, l1=0.5).attach(optimizer, mode, lazy_rows=True)
    for own in (net, other):
        backward(own, [1, 1])
        backward(own, [1, 3])
    net.weight.grad *= 0.25
    grad = 0.25 * other.weight.grad.to_dense()
    rows = [1, 3]
    optimizer.step()
    w = other.weight.detach()[rows]
    if mode == "grad":
        w -= 0.1 * (grad[rows] + 0.5 * w.sign())
    else:
        w -= 0.1 * grad[rows]
        reference.prox_(w, l1=0.5, step=0.1)
    assert_same([net.weight[rows]], [w])


def test_marks_and_tokens():
    """``"input"`` of an embedding is a row."""
    net = regularized(table(), l2_norm=0.5, group="input")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net).attach(optimizer, "prox", lazy_rows=True)
    net.weight.data[1] = 1e-3
    net.weight.grad = torch.sparse_coo_tensor([[1, 2]], torch.zeros(2, 3).double(), (6, 3))
    optimizer.step()
    assert (net.weight == 0).all(1).tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
def test_dtypes(dtype, grad_dtype):
    """A gradient may be of another dtype than its parameter."""
    net = nn.Embedding(6, 3, sparse=True).to(dtype)
    net.weight.grad_dtype = grad_dtype
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    Regularizer(net, l1=0.5).attach(optimizer, lazy_rows=True)
    net.weight.grad = torch.sparse_coo_tensor([[1, 5]], torch.ones(2, 3, dtype=grad_dtype or dtype), (6, 3))
    optimizer.step()
    grad = net.weight.grad
    assert grad.dtype is (grad_dtype or dtype)
    assert_same_bits([grad.values()], [(1 + 0.5 * net.weight.detach()[[1, 5]].sign()).to(grad.dtype)])


@MODES
def test_a_frozen_table(mode):
    """Its old gradient is left alone, and so are its weights."""
    net, layer = table(), nn.Linear(3, 1)
    optimizer = torch.optim.SGD([*net.parameters(), *layer.parameters()], lr=0.1)
    Regularizer([net.weight, layer.weight], l1=0.5).attach(optimizer, mode, lazy_rows=True)
    backward(net, [1, 1])
    net.requires_grad_(False)
    layer(torch.ones(3)).sum().backward()
    grad, shifted = net.weight.grad.to_dense(), net.weight.detach() - 0.1 * net.weight.grad.to_dense()
    optimizer.step()  # which has a gradient of it all the same
    assert_same_bits([net.weight.grad.to_dense()], [grad])
    assert_same([net.weight], [shifted])


def test_such_a_step_is_not_kept_for_the_next(monkeypatch):
    """A step that repeats the last one looks at little."""
    net = table()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, l1=0.5).attach(optimizer, lazy_rows=True)
    monkeypatch.setattr("fused_reg.regularizer.attachment.Repeat", None)
    backward(net, [1])
    optimizer.step()
    net.weight.grad = torch.zeros_like(net.weight)
    with pytest.raises(TypeError, match="not callable"):
        optimizer.step()


def refused(net, match, **terms):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, **terms).attach(optimizer, lazy_rows=True)
    before = [x.clone() for x in (net.weight.detach(), net.weight.grad.to_dense())]
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert_same_bits([net.weight.detach(), net.weight.grad.to_dense()], before)


@pytest.mark.parametrize("group", ["tensor", "column", ("row", 2), ("block", 3), "output"])
def test_other_groups_are_refused(group):
    net = table()
    backward(net, [1, 2])
    text = r"^attach: l2_norm of 'weight' must be of rows where its gradient is sparse, .*, got group="
    refused(net, text, l2_norm=0.1, group=group)


def test_a_share_of_zeros_is_refused():
    """It is of the whole table, of which a batch has some rows. Where the gradient is dense it is reached."""
    net = table()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    Regularizer(net, l1=0.1, zeros=0.5).attach(optimizer, "prox", lazy_rows=True)
    backward(net, [1, 2])
    before = [x.clone() for x in (net.weight.detach(), net.weight.grad.to_dense())]
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^attach: lazy_rows must come without zeros, got both for the sparse .*'"
        ):
            optimizer.step()
        assert_same_bits([net.weight.detach(), net.weight.grad.to_dense()], before)
    net.weight.grad = net.weight.grad.to_dense()
    optimizer.step()
    assert (net.weight == 0).sum() == 9


def test_gradients_that_are_sparse_in_elements_are_refused():
    net = nn.Linear(3, 2, bias=False)
    net.weight.grad = torch.eye(2, 3).to_sparse()
    refused(net, r"^attach: params\['weight'\].grad must be sparse in rows, .* got 2 sparse dimensions", l1=0.1)


def test_arguments():
    net = table()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = Regularizer(net, l1=0.1)
    with pytest.raises(ValueError, match=r"^attach: lazy_rows must come without include_unused, .*, got both"):
        regularizer.attach(optimizer, include_unused=True, lazy_rows=True)
    with pytest.raises(TypeError, match=r"^attach: lazy_rows must be True or False, got 'yes'"):
        regularizer.attach(optimizer, lazy_rows="yes")
    regularizer.attach(optimizer)
    backward(net, [1])
    with pytest.raises(TypeError, match=r"params\['weight'\].grad must be dense .*with lazy_rows=True"):
        optimizer.step()


@MODES
def test_copies(mode):
    net = table()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = Regularizer(net, l1=0.1).attach(optimizer, mode, lazy_rows=True)
    backward(net, [1, 2])
    optimizer.step()
    for copied in (copy.deepcopy(attachment), pickle.loads(pickle.dumps(attachment))):
        assert not copied.is_active
        torch.testing.assert_close(copied.value, attachment.value)
