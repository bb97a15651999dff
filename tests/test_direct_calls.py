"""The operators as functions of the compiled module: what they take themselves, and what they leave to torch.ops."""

import pytest
import torch
from oracle import assert_same_bits
from samples import draw
from torch.overrides import TorchFunctionMode

from fused_reg import _ops
from fused_reg._terms import NUMBERS


def counts(*first):
    """Of every column; 0 behind the first ones."""
    return [*first, *[0] * (len(NUMBERS) - len(first))]


HALF = ([0.5], [], counts(1), 0)
NORMS = ([0.5], [], counts(0, 0, 1), 1)


def general(name):
    return getattr(torch.ops.fused_reg, name).default


class Seen(TorchFunctionMode):
    def __init__(self):
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "numbers"), [("sums", (True, *HALF)), ("empty_grads", ()), ("norms", NORMS)])
def test_a_mode_sees_the_call(name, numbers):
    params = [draw(5, torch.float32)]
    with Seen() as seen:
        getattr(_ops, name)(params, *numbers)
    assert general(name) in seen.calls
    with torch._C.DisableTorchFunction():
        getattr(_ops, name)(params, *numbers)


@pytest.mark.parametrize("strength", [0.5, 1, True, torch.tensor(0.5).numpy()[()]], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("sequence", [list, tuple])
def test_lists_and_numbers(strength, sequence):
    """A float is taken, and torch.ops converts what else is a number."""
    params = sequence([draw(5, torch.float32), draw(7, torch.float64, seed=1)])
    arguments = (params, sequence([]), sequence([strength]), sequence([]), sequence(counts(1)), 0)
    expected, *_ = general("penalty")(list(params), [], [float(strength)], *HALF[1:])
    assert_same_bits([_ops.penalty(*arguments)[0]], [expected])


def test_results():
    """A tensor, a list, tuples of both, None."""
    params = [draw(5, torch.float32), draw(7, torch.float32, seed=1)]
    value, grads, norms = _ops.penalty(params, [True, False], *NORMS)
    expected, (grad,), (norm,) = general("penalty")(params, [True, False], *NORMS)
    assert (type(grads), type(norms)) == (list, list)
    assert_same_bits([value, *grads, *norms], [expected, grad, norm])
    assert _ops.prox_([p.clone() for p in params], None, [], *HALF) is None
    assert_same_bits([_ops.norms(params, *NORMS)], [norm])
    assert [g.shape for g in _ops.empty_grads(params)] == [(5,), (7,)]


@pytest.mark.parametrize("values", [(), (0.1,), [1 / 3, float("nan"), 5e-324], (2, True)])
def test_numbers(values):
    expected = torch.tensor([float(x) for x in values], dtype=torch.float64)
    assert_same_bits([_ops.numbers(torch.empty(0), values)], [expected])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("numbers", (torch.ones(2),)),
        ("numbers", (None, [0.5])),
        ("numbers", (torch.ones(2), ["0.5"])),
        ("empty_grads", ()),
        ("empty_grads", ([], 1)),
        ("empty_grads", (None,)),
        ("empty_grads", ([torch.ones(2), None],)),
        ("empty_grads", ([],)),
        ("empty_grads", ([torch.ones(2, dtype=torch.int32)],)),
        ("norms", ([torch.ones(2)], *NORMS[:3], "row")),
        ("norms", ([torch.ones(2)], *NORMS[:3], 5)),
        ("norms", ([torch.ones(2)], *NORMS[:3], 9)),  # several tensors
        ("norms", ([torch.ones(2)], *NORMS[:3], -1)),
        ("norms", ([torch.ones(2)], *HALF)),
        ("penalty", ([torch.ones(2)], [], ["0.5"], *HALF[1:])),
        ("penalty", ([torch.ones(2)], [], 0.5, *HALF[1:])),
        ("penalty", ([torch.ones(2)], [], [0.5, 0.5], [], counts(2), 0)),
        ("penalty", ([torch.ones(2)], [], [], *HALF[1:])),  # fewer floats than counted
        ("penalty", ([torch.ones(2)], [], [0.5], [], counts(-1), 0)),  # fewer tensors
        ("penalty", ([torch.ones(2)], [], [0.5], [], counts(-2), 0)),
        ("penalty", ([torch.ones(2)], [], [0.5], [], [1, 0], 0)),  # fewer counts
        ("prox_", ([torch.ones(2)], None, [1 << 70], *HALF)),
        ("rescale_grad_", (torch.tensor(2.0), [torch.ones(2)], [torch.ones(2)], [True], None, (), *NORMS)),
    ],
)
def test_errors_are_those_of_torch_ops(name, arguments):
    """Also where the function itself raises them; their type, and what they say."""
    with pytest.raises(Exception) as expected:  # noqa: PT011
        general(name)(*arguments)
    with pytest.raises(type(expected.value)) as error:
        getattr(_ops, name)(*arguments)
    assert str(error.value) == str(expected.value)
