"""The short way of `fused_penalty` to a number: it is taken where nothing else is wanted, and tells nothing apart."""

import numpy as np
import pytest
import torch
from oracle import assert_same_bits
from samples import draw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_reg import _ops, fused_penalty


def both_ways(monkeypatch, params, **strengths):
    """What it gives or raises, with and without the short way; and whether that was taken."""
    outcomes, taken, short = [], [], _ops.plain_value
    for way in (lambda *args: (taken.append(short(*args)), taken[-1])[1], lambda *args: None):
        monkeypatch.setattr(_ops, "plain_value", way)
        try:
            outcomes.append(fused_penalty(params, **strengths))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    monkeypatch.setattr(_ops, "plain_value", short)
    return *outcomes, any(x is not None for x in taken)


@pytest.mark.parametrize("strengths", [{"l1": 0.5}, {"l2": 0.25}, {"l1": 0.5, "l2": np.float64(0.25)}])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16, torch.float64]])
def test_same_bits(strengths, dtypes, device, monkeypatch):
    params = [nn.Parameter(draw(n, dtype, device=device)) for dtype in dtypes for n in (0, 3, 20000)]
    params.append(nn.Parameter(draw(30, dtypes[0], device=device).reshape(5, 6).t()[::2]))
    with torch.no_grad():
        short, long, is_taken = both_ways(monkeypatch, params, **strengths)
    assert is_taken
    assert not short.requires_grad
    assert short.dtype == long.dtype
    assert_same_bits([short], [long])


@pytest.mark.parametrize(
    ("params", "strengths"),
    [
        ([], {"l1": 0.5}),
        ([torch.ones(2, dtype=torch.int64)], {"l1": 0.5}),
        ([torch.ones(2), 3], {"l1": 0.5}),
        ([torch.ones(2), torch.ones(2).to_sparse()], {"l1": 0.5}),
        ([torch.ones(2)], {"l1": -0.5}),
        ([torch.ones(2)], {"l2": float("nan")}),
        ([torch.ones(2)], {"l2": float("inf")}),
        ([torch.ones(2)], {"l1": True}),
        ([torch.ones(2)], {"l1": 0.0}),
        ([torch.ones(2)], {}),
        ([torch.ones(2)], {"l1": torch.tensor(0.5)}),
        ([torch.ones(2), torch.ones(2)], {"l1": [0.5, 0.25]}),
    ],
)
def test_what_is_left_to_the_other_way(params, strengths, monkeypatch):
    with torch.no_grad():
        short, long, is_taken = both_ways(monkeypatch, params, **strengths)
    assert not is_taken
    assert type(short) is type(long)
    assert torch.equal(short, long) if isinstance(short, torch.Tensor) else short == long


def test_a_piece_is_refused():
    """Hard case 41: what other libraries leave is said, as ever."""
    p = nn.Parameter(torch.ones(2))
    p.ds_shape = torch.Size([4])
    with torch.no_grad(), pytest.raises(ValueError, match="must be whole"):
        fused_penalty([p], l1=0.5)


class _Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.enable_grad, _Function, _Dispatch, FakeTensorMode])
def test_it_is_not_for_who_looks_on(mode):
    with torch.no_grad(), mode():
        params = [nn.Parameter(torch.ones(3))]
        assert _ops.plain_value(params, 0.5, 0.25) is None
    with torch.no_grad():
        taken = []
        torch.func.vmap(lambda row: taken.append(_ops.plain_value([row], 0.5, 0.25)) or row)(torch.ones(2, 3))
        assert taken == [None]
        assert _ops.plain_value([torch.ones(3)], 0.5, 0.25) is not None


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_trace_is_refused():
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda w: fused_penalty([w], l1=0.5), torch.ones(3), check_trace=False)
