"""What parameters, groups and gradients `fused_reg.optim` is given: as torch's classes take them."""

import copy

import pytest
import torch
from optim_cases import ONE_EACH, PENALTY, assert_same, assert_same_states, given, named, net, pair, train
from torch import nn

from fused_reg import fused_penalty, optim

EACH = pytest.mark.parametrize(("name", "options"), named(ONE_EACH))


def both(name, params, options, steps=3):
    """torch's and ours over lists that ``params`` makes, after a few steps; both step alike."""
    found = []
    for kind in pair(name):
        optimizer = kind(params(), **options)
        for i in range(steps):
            given(optimizer, i).step()
        found.append(optimizer)
    assert_same(*(all_of(o) for o in found), rtol=1e-5, atol=1e-6)
    assert_same_states(*found, rtol=1e-5, atol=1e-6)
    return found[1]


def all_of(optimizer):
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def weights(*shapes, **options):
    return [nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel()).reshape(s), **options) for s in shapes]


@EACH
@pytest.mark.parametrize(
    "shapes", [[()], [(0,)], [(3, 0), (2,)], [(2,), (0,), (), (1, 1, 7)]], ids=lambda shapes: str(len(shapes))
)
def test_shapes(name, options, shapes):
    """Also scalars, and what has no elements."""
    optimizer = both(name, lambda: weights(*shapes), options)
    optimizer.param_groups[0].update(PENALTY)
    with torch.no_grad():
        before = fused_penalty(optimizer.param_groups[0]["params"], **PENALTY)
    optimizer.step()
    assert optimizer.penalty == before


@EACH
def test_groups(name, options):
    """With options of their own; one that is empty, one without gradients, one that is added."""
    more = {"SGD": {"nesterov": True}, "RMSprop": {"centered": False}, "Adagrad": {}}.get(name, {"amsgrad": True})

    def params():
        groups = [{"params": weights((3,)), "lr": 0.5}, {"params": []}, {"params": weights((9, 2)), **more}]
        return [*groups, {"params": weights((4,)), "weight_decay": 0.3, "maximize": True}]

    optimizer = both(name, params, options)
    empty, *_, last = optimizer.param_groups[1:]
    empty.update(PENALTY)
    last.update(PENALTY)
    kept = last["params"][0].detach().clone()
    last["params"][0].grad = None
    optimizer.step()
    assert torch.equal(last["params"][0].detach(), kept)
    torch.testing.assert_close(optimizer.penalty, fused_penalty(kept, **PENALTY))
    empty["params"] = weights((2,))
    if name != "Adagrad":  # whose constructor makes the states
        given(optimizer).step()
        assert not torch.equal(empty["params"][0], weights((2,))[0])


@EACH
def test_nothing_but_empty_groups(name, options):
    optimizer = pair(name)[1]([{"params": []}], **options, **PENALTY)
    assert optimizer.step(lambda: 3) == 3
    assert optimizer.penalty == 0


@EACH
def test_what_is_no_parameter(name, options):
    """Tensors that need no gradient but have one, from a generator."""
    both(name, lambda: (p.detach() for p in weights((3,), (4, 2))), options)
    both(name, lambda: weights((3,), (4, 2), requires_grad=False), options)


@pytest.mark.parametrize("betas", [(0.8, 0.9), [0.8, 0.9], (torch.tensor(0.8), torch.tensor(0.9))])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas(name, betas):
    optimizer = both(name, lambda: weights((3,), (4, 2)), {"betas": copy.deepcopy(betas)})
    if isinstance(betas[0], torch.Tensor):  # may change in place
        other = copy.deepcopy(optimizer)
        optimizer.param_groups[0]["betas"][0].fill_(0.1)
        for o in (optimizer, other):
            given(o, 9).step()
        assert not torch.equal(all_of(optimizer)[0], all_of(other)[0])


@EACH
@pytest.mark.parametrize("penalty", [{}, PENALTY, {**PENALTY, "prox": True}, {**PENALTY, "prox": "preconditioned"}])
def test_gradients_are_not_written(name, options, penalty):
    """Nor is their version another, whatever their layout."""
    p, q = weights((5, 4), (8,))
    p.grad, q.grad = torch.ones(4, 5).t(), torch.ones(16)[::2]
    before = [(g.clone(), g._version) for g in (p.grad, q.grad)]
    optimizer = pair(name)[1]([p, q], **options, **penalty)
    for _ in range(2):
        optimizer.step()
    for g, (numbers, version) in zip((p.grad, q.grad), before, strict=True):
        assert torch.equal(g, numbers)
        assert g._version == version
    assert p._version == q._version
    assert p._version > 0


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_complex(name):
    """Without a penalty, torch's own step."""
    options = {"SGD": {"momentum": 0.9}, "RMSprop": {"centered": True}}.get(name, {})
    found = []
    for kind in pair(name):
        z = nn.Parameter(torch.complex(torch.linspace(0, 1, 5), torch.linspace(1, -1, 5)))
        optimizer = kind([z], lr=0.1, **options)
        for i in range(3):
            z.grad = torch.complex(torch.linspace(-1, i, 5), torch.linspace(i, 1, 5))
            optimizer.step()
        found.append((z, optimizer))
    assert_same([found[0][0]], [found[1][0]], rtol=1e-6, atol=1e-7)
    assert_same_states(found[0][1], found[1][1], rtol=1e-6, atol=1e-7)
    assert found[1][1].penalty == 0


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_sparse(name):
    """Without a penalty, torch's own step, or its error. Dense and sparse gradients may alternate."""
    found = []
    for kind in pair(name):
        (p,) = weights((4, 2))
        optimizer = kind([p], lr=0.1)
        try:
            for i in range(3):
                p.grad = torch.ones(4, 2)
                if i != 1:
                    p.grad = torch.sparse_coo_tensor(torch.tensor([[0, 0, 3]]), torch.ones(3, 2), (4, 2))
                optimizer.step()
            found.append(p.detach())
        except RuntimeError as error:
            found.append(str(error))
    a, b = found
    assert a == b if isinstance(a, str) else torch.allclose(a, b)
    assert isinstance(a, str) == (name not in ("SGD", "Adagrad"))


@EACH
def test_dtypes_that_change(name, options):
    """A net is cast between steps; its states follow, as torch's do, where they are loaded again."""
    found = []
    for kind in pair(name):
        model = net(torch.float32)
        optimizer = kind(model.parameters(), **options)
        train(model, optimizer)
        model.double()
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, [0])
        found.append((model, optimizer))
    assert_same(*(model for model, _ in found), rtol=1e-4, atol=1e-5)
    assert_same_states(*(o for _, o in found), rtol=1e-3, atol=1e-4)


@EACH
def test_meta(name, options):
    """A net without data steps as torch's, to nothing."""
    with torch.device("meta"):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
    for kind in pair(name):
        kind([p], **options).step()


@pytest.mark.parametrize("prox", [False, True])
def test_tied_weights(prox):
    """A parameter twice in a group: torch warns, and steps it twice."""
    found = []
    for kind in pair("SGD"):
        (p,) = weights((3,))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = kind([p, p], lr=0.1, **({"prox": prox} if kind is optim.SGD else {}))
        given(optimizer).step()
        found.append(p.detach())
    assert_same([found[0]], [found[1]], rtol=1e-6, atol=1e-7)
