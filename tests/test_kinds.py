"""Kinds of tensors: dtypes, layouts, subclasses, flags (hard cases 15, 17-21)."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from oracle import assert_same_bits, assert_value, gradients, loop_gradients
from samples import DTYPES, draw, draw_list, leaves, mixed_list
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fused_reg import fused_penalty, reference, value_and_grad

FUNCTIONS = pytest.mark.parametrize("function", [fused_penalty, value_and_grad])
FLOATS = "float32, float64, bfloat16 or float16"


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def assert_refused(function, wrong, rule):
    """As the only parameter and among others; and the next call works."""
    w = torch.ones(3, device=wrong.device)
    for params, index in (([wrong], 0), ([w, wrong], 1), ([w, w, wrong, w], 2)):
        with raises(TypeError, f"{function.__name__}: params[{index}] must be {rule}"):
            function(params, l1=0.5, l2=0.25)
    assert fused_penalty(w, l1=0.5, l2=0.25) == 2.25


@FUNCTIONS
@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128],
    ids=str,
)
def test_not_floating_point(dtype, function, device):
    """Hard case 19."""
    assert_refused(function, torch.ones(3).to(dtype).to(device), f"floating point, got {dtype}")


@FUNCTIONS
@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str
)
def test_float8(dtype, function, device):
    """Hard case 19."""
    assert_refused(function, torch.ones(3).to(dtype).to(device), f"{FLOATS}, got {dtype}")


@FUNCTIONS
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: "sparse CSR is in beta state"
@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (torch.Tensor.to_sparse, torch.sparse_coo),
        (torch.Tensor.to_sparse_csr, torch.sparse_csr),
        (torch.Tensor.to_sparse_csc, torch.sparse_csc),
        (lambda t: t.to_sparse_bsr((2, 2)), torch.sparse_bsr),
        (lambda t: t.to_sparse_bsc((2, 2)), torch.sparse_bsc),
    ],
    ids=lambda x: str(x) if isinstance(x, torch.layout) else "",
)
def test_sparse(make, layout, function, device):
    """Hard case 19."""
    assert_refused(function, make(torch.eye(4)).to(device), f"dense (torch.strided), got {layout}")


@FUNCTIONS
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without mkldnn")
def test_mkldnn(function):
    """Hard case 19."""
    assert_refused(function, torch.ones(3, 3).to_mkldnn(), "dense (torch.strided), got torch._mkldnn")


@FUNCTIONS
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: quantized tensors are deprecated
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8], ids=str)
def test_quantized(dtype, function):
    """Hard case 19."""
    per_tensor = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, dtype)
    per_channel = torch.quantize_per_channel(torch.ones(3, 3), torch.ones(3), torch.zeros(3), 0, dtype)
    for wrong in (per_tensor, per_channel):
        assert_refused(function, wrong, f"floating point, got {dtype}")


@FUNCTIONS
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: nested tensors are a prototype
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested(layout, function, device):
    """Hard case 19."""
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=layout, device=device)
    assert_refused(function, nested, "one dense tensor, got a nested tensor")


@FUNCTIONS
@pytest.mark.parametrize("kind", [torch.nn.UninitializedParameter, torch.nn.parameter.UninitializedBuffer])
def test_uninitialized(kind, function):
    """Hard case 19."""
    rule = f"initialized, got {kind.__name__}; run the module once so that it knows its shapes"
    assert_refused(function, kind(), rule)


def test_lazy_module_works_once_it_ran(device):
    """Hard case 19."""
    model = torch.nn.LazyLinear(3)
    with raises(
        TypeError,
        "fused_penalty: params[0] must be initialized, got UninitializedParameter; "
        "run the module once so that it knows its shapes",
    ):
        fused_penalty(model.parameters(), l1=0.1)
    model(torch.ones(1, 5))
    model.to(device)
    assert_value(fused_penalty(model.parameters(), l1=0.1), list(model.parameters()), l1=0.1)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32,), torch.float32),
        ((torch.bfloat16,), torch.float32),
        ((torch.float16,), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float64,), torch.float64),
        ((torch.float16, torch.float64), torch.float64),
        (DTYPES, torch.float64),
    ],
    ids=str,
)
def test_result_dtype(dtypes, expected, device):
    """Hard case 18: float64 if any parameter is, else float32; gradients in each parameter's own."""
    params = [draw(9, dtype, device, i) for i, dtype in enumerate(dtypes)]
    value, grads = value_and_grad(params, l1=0.5)
    assert value.dtype == fused_penalty(params, l1=0.5).dtype == expected
    assert [g.dtype for g in grads] == list(dtypes)
    assert value.device == params[0].device
    frozen_double = [*params, torch.zeros(0, dtype=torch.float64, device=device)]
    assert fused_penalty(frozen_double, l1=0.5).dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_meta(requires_grad, dtype):
    """Hard case 20."""
    w = torch.empty((3, 5), dtype=dtype, device="meta").t().requires_grad_(requires_grad)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    penalty = fused_penalty([w, w], l1=0.5)
    value, (grad, _) = value_and_grad([w, w], l1=0.5, l2=torch.tensor(0.5))
    for scalar in (penalty, value):
        assert (scalar.device.type, scalar.dtype, scalar.shape) == ("meta", expected, ())
    assert (grad.device.type, grad.dtype, grad.shape, grad.stride()) == ("meta", dtype, w.shape, w.stride())
    if requires_grad:
        penalty.backward()
        assert (w.grad.device.type, w.grad.dtype, w.grad.shape) == ("meta", dtype, w.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake(dtype, device):
    """Hard case 20."""
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    with FakeTensorMode():
        w = torch.empty((3, 5), dtype=dtype, device=device, requires_grad=True)
        penalty = fused_penalty([w, w], l1=0.5, l2=[0.1, 0.2])
        value, (grad, _) = value_and_grad([w, w], l1=0.5)
        penalty.backward()
    for scalar in (penalty, value):
        assert isinstance(scalar, FakeTensor)
        assert (scalar.device.type, scalar.dtype, scalar.shape) == (device.type, expected, ())
    assert isinstance(w.grad, FakeTensor)
    assert (grad.dtype, grad.shape, w.grad.dtype, w.grad.shape) == (dtype, w.shape, dtype, w.shape)


@FUNCTIONS
def test_meta_among_others(function, device):
    """Hard case 18: devices that do not go together are named."""
    w = torch.ones(3, device=device)
    with raises(ValueError, f"{function.__name__}: params[1] must be on {w.device}, as params[0], got meta"):
        function([w, torch.ones(3, device="meta")], l1=0.5)


class _Dataless(torch.Tensor):
    """A wrapper that says its shape, holds no memory, and knows no operator."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"_Dataless does not know {func}")


@FUNCTIONS
@pytest.mark.parametrize("position", [0, 1])
def test_subclass_without_data(position, function, device):
    """Hard case 20: its own error."""
    params = [torch.ones(5, device=device), torch.ones(5, device=device)]
    params[position] = _Dataless(params[position])
    with pytest.raises(NotImplementedError, match=r"_Dataless does not know fused_reg\."):
        function(params, l1=0.5)


_PASSING = """
import sys
import torch
from fused_reg import fused_penalty, value_and_grad

class Passing(torch.Tensor):
    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))

for function in (fused_penalty, value_and_grad):
    for position in (0, 1):
        params = [torch.ones(5, device=sys.argv[1]), torch.ones(5, device=sys.argv[1])]
        params[position] = Passing(params[position])
        try:
            function(params, l1=0.5)
        except TypeError as error:
            print(error)
"""


def test_subclass_without_data_that_passes_operators_on(device):
    """Hard case 20: an error, never a crash, where a wrapper claims to be a plain tensor. (A crash ends the script.)"""
    command = [sys.executable, "-c", _PASSING, str(device)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    rule = "must have memory of its own, got a tensor subclass without"
    names = ("fused_penalty", "value_and_grad")
    assert done.stdout.splitlines() == [f"{name}: params[{i}] {rule}" for name in names for i in (0, 1)]
    assert done.returncode == 0


def test_subclass_with_data(device):
    """A subclass that is a plain tensor underneath counts as one."""

    class Tagged(torch.Tensor):
        pass

    w = draw(100, device=device)
    tagged = w.clone().as_subclass(Tagged).requires_grad_()
    penalty = fused_penalty([tagged], l1=0.1, l2=0.3)
    assert_value(penalty, [w], 0.1, 0.3)
    penalty.backward()
    assert_same_bits([tagged.grad.as_subclass(torch.Tensor)], value_and_grad(w, 0.1, 0.3)[1])


def test_negative_and_conjugate_views(device):
    """Hard case 15: the right sign, also where only a flag says so."""
    w = draw((6, 50), device=device)
    z = torch.complex(w, draw((6, 50), device=device, seed=1))
    for view in (torch._neg_view(w), z.conj().imag, z.conj().real, torch._neg_view(w).t(), torch._neg_view(w)[:, ::2]):
        plain = view.resolve_neg().clone()
        assert_value(fused_penalty(view, l1=0.1, l2=0.3), [plain], 0.1, 0.3)
        assert_same_bits(value_and_grad(view, l1=0.1, l2=0.3)[1], value_and_grad(plain, l1=0.1, l2=0.3)[1])
        for upstream in (1.0, 0.37):
            actual = gradients(fused_penalty, [view], upstream, l1=0.1, l2=0.3)
            assert_same_bits(actual, loop_gradients([plain], upstream, l1=0.1, l2=0.3))

    both = leaves([w, w])
    for function, leaf in zip((fused_penalty, reference.loop), both, strict=True):
        function([torch._neg_view(leaf)], l1=0.1, l2=0.3).backward()
    assert_same_bits([both[0].grad], [both[1].grad])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_read_only_memory(requires_grad, tmp_path):
    """Hard case 17: a file that is mapped for reading; a write would end the process."""
    expected = draw(70_000, device="cpu")
    expected.numpy().tofile(tmp_path / "weights")
    w = torch.from_numpy(np.memmap(tmp_path / "weights", np.float32, "r")).requires_grad_(requires_grad)
    w = torch.nn.Parameter(w, requires_grad)
    value, grads = value_and_grad([w, w[1:], w[::2]], l1=0.1, l2=0.3)
    assert_value(value, [expected, expected[1:], expected[::2]], 0.1, 0.3)
    assert_same_bits(grads[:1], value_and_grad(expected, 0.1, 0.3)[1])
    penalty = 0.37 * fused_penalty(w, l1=0.1)
    if requires_grad:
        penalty.backward()
        assert_same_bits([w.grad], loop_gradients([expected], 0.37, l1=0.1))


def test_shared_memory():
    """Hard case 17."""
    w = draw(70_000)
    shared = w.clone().share_memory_()
    assert_same_bits(gradients(fused_penalty, [shared], 0.37, l1=0.1), gradients(fused_penalty, [w], 0.37, l1=0.1))
    assert_same_bits([shared], [w])


@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("frozen", [(0,), (1, 4, 8), (10,), tuple(range(10))])
def test_frozen_parameters(frozen, upstream, device):
    """Hard case 21: counted in the value, no gradient; the others' gradients do not move."""
    params = mixed_list(device)
    l1, l2 = [0.1 * i for i in range(11)], [0.7 / (i + 1) for i in range(11)]
    expected = gradients(fused_penalty, params, upstream, l1=l1, l2=l2)
    some = [p.detach().requires_grad_(i not in frozen) for i, p in enumerate(params)]
    penalty = fused_penalty(some, l1=l1, l2=torch.tensor(l2, dtype=torch.float64))
    assert_value(penalty.detach(), params, l1, l2)
    (penalty * upstream).backward()
    for i, p in enumerate(some):
        if i in frozen:
            assert p.grad is None
        else:
            assert_same_bits([p.grad], [expected[i]])


def test_all_frozen(device):
    """Hard case 21."""
    params = draw_list(torch.float32, device)
    penalty = fused_penalty(params, l1=0.1)
    assert not penalty.requires_grad
    assert penalty.grad_fn is None
    assert_value(penalty, params, l1=0.1)


def test_value_and_grad_is_outside_of_autograd(device):
    params = leaves(draw_list(torch.float32, device))
    strength = torch.tensor(0.5, device=device, requires_grad=True)
    value, grads = value_and_grad(params, l1=strength)
    assert not any(t.requires_grad for t in (value, *grads))
    assert_same_bits([value, *grads], [(expected := value_and_grad(params, l1=0.5))[0], *expected[1]])


def test_reading_functions_write_nothing(device):
    """Neither a parameter nor its version."""
    params = leaves(mixed_list(device))
    before = [p.detach().clone() for p in params]
    versions = [p._version for p in params]
    (0.37 * fused_penalty(params, l1=0.1, l2=0.2)).backward()
    value_and_grad(params, l1=0.1)
    assert_same_bits(params, before)
    assert [p._version for p in params] == versions
