"""The operators as functions of the compiled module: what they take themselves, and what they leave to torch.ops."""

import pytest
import torch
from oracle import assert_same_bits
from samples import draw
from torch.overrides import TorchFunctionMode

from fused_reg import _ops

NONE = (None, None, None, False)


def general(name):
    return getattr(torch.ops.fused_reg, name).default


class Seen(TorchFunctionMode):
    def __init__(self):
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["term_sums", "zero_counts", "empty_grads"])
def test_a_mode_sees_the_call(name):
    params = [draw(5, torch.float32)]
    with Seen() as seen:
        getattr(_ops.library, name)(params)
    assert general(name) in seen.calls
    with torch._C.DisableTorchFunction():
        getattr(_ops.library, name)(params)


@pytest.mark.parametrize("strength", [0.5, 1, True, torch.tensor(0.5).numpy()[()]], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("sequence", [list, tuple])
def test_lists_and_numbers(strength, sequence):
    """A float is taken, and torch.ops converts what else is a number."""
    params = sequence([draw(5, torch.float32), draw(7, torch.float64, seed=1)])
    arguments = (params, sequence([strength]), sequence([]), sequence([]), *NONE)
    expected = general("penalty")(list(params), [float(strength)], [], [], *NONE)
    assert_same_bits([_ops.library.penalty(*arguments)], [expected])


def test_results():
    """A tensor, a list, a pair of both, None."""
    params = [draw(5, torch.float32), draw(7, torch.float32, seed=1)]
    value, grads = _ops.library.penalty_and_grad(params, [True, False], [0.5], [], [], *NONE)
    expected, (grad,) = general("penalty_and_grad")(params, [True, False], [0.5], [], [], *NONE)
    assert type(grads) is list
    assert_same_bits([value, *grads], [expected, grad])
    assert [g.shape for g in _ops.library.empty_grads(params)] == [(5,), (7,)]
    assert _ops.library.prox_([p.clone() for p in params], [1.0], None, None, [], [0.5], [], [], *NONE) is None
    pair = _ops.library.penalty_and_norms(params, [], [], [0.5], *NONE)
    assert type(pair) is tuple
    assert_same_bits(pair, general("penalty_and_norms")(params, [], [], [0.5], *NONE))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("term_sums", ()),
        ("term_sums", ([], 1)),
        ("term_sums", (None,)),
        ("term_sums", ([torch.ones(2), None],)),
        ("term_sums", ([],)),
        ("term_sums", ([torch.ones(2, dtype=torch.int32)],)),
        ("group_norms", ([torch.ones(2)], "row")),
        ("penalty", ([torch.ones(2)], ["0.5"], [], [], *NONE)),
        ("penalty", ([torch.ones(2)], 0.5, [], [], *NONE)),
        ("penalty", ([torch.ones(2)], [0.5, 0.5], [], [], *NONE)),
        ("prox_", ([torch.ones(2)], [1.0], None, None, [1 << 70], [0.5], [], [], *NONE)),
    ],
)
def test_errors_are_those_of_torch_ops(name, arguments):
    """Also where the function itself raises them; their type, and what they say."""
    with pytest.raises(Exception) as expected:  # noqa: PT011
        general(name)(*arguments)
    with pytest.raises(type(expected.value)) as error:
        getattr(_ops.library, name)(*arguments)
    assert str(error.value) == str(expected.value)
