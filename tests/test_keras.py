"""``keras.regularizers`` on the torch backend: the same numbers, so the same strengths.

===================================  =======================================
Keras                                fused_reg
===================================  =======================================
``L1(a)(w)``                         ``fused_penalty(w, l1=a)``
``L2(a)(w)``                         ``fused_penalty(w, l2=a)``
``L1L2(a, b)(w)``                    ``fused_penalty(w, l1=a, l2=b)``
``kernel_regularizer=`` of a layer   ``fused_reg.regularized(layer, ...)``
===================================  =======================================
"""

import os
import warnings

import pytest
import torch
from oracle import assert_value
from samples import draw

from fused_reg import fused_penalty, prox_, value_and_grad

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def keras():
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = "torch"  # read once, by the first import
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever its own dependencies deprecate
            module = pytest.importorskip("keras", reason="needs keras (pip install fused_reg[integrations])")
    finally:
        os.environ.pop("KERAS_BACKEND") if before is None else os.environ.update(KERAS_BACKEND=before)
    if module.backend.backend() != "torch":
        pytest.skip("keras was imported with another backend")
    return module


def assert_equal(ours, kerass) -> None:
    torch.testing.assert_close(ours.detach().cpu(), torch.as_tensor(kerass).detach().cpu(), rtol=2e-6, atol=0)


A, B = 0.01, 0.003
SHAPES = ((), (7,), (20, 30), (3, 3, 16, 8), (100_000,))


def each_regularizer(keras):
    regularizers = keras.regularizers
    yield regularizers.L1(A), {"l1": A}
    yield regularizers.L2(B), {"l2": B}
    yield regularizers.L1L2(A, B), {"l1": A, "l2": B}
    yield regularizers.L1L2(l1=A), {"l1": A}
    yield regularizers.L1L2(l2=B), {"l2": B}
    yield regularizers.L1(), {"l1": 0.01}
    yield regularizers.L2(), {"l2": 0.01}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient(keras, shape):
    for regularizer, strengths in each_regularizer(keras):
        w = draw(shape)
        ours, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
        value, kerass = fused_penalty(ours, **strengths), regularizer(theirs)
        assert_equal(value, kerass)
        assert_value(value, [w], **strengths)
        value.backward()
        kerass.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_config_holds_the_same_strengths(keras):
    """``get_config()`` of a Keras regularizer is a call of ours."""
    w = draw((20, 30))
    for regularizer, _ in each_regularizer(keras):
        config = {name: float(x) for name, x in regularizer.get_config().items()}
        assert set(config) <= {"l1", "l2"}
        assert_equal(fused_penalty(w, **config), regularizer(w))


def test_model_with_a_regularizer_in_each_layer(keras):
    """The sum of a model's ``losses`` is one call with a strength per parameter; biases have none."""
    regularizers = keras.regularizers
    model = keras.Sequential(
        [
            keras.layers.Input((12,)),
            keras.layers.Dense(8, activation="relu", kernel_regularizer=regularizers.L1(A)),
            keras.layers.Dense(8, activation="relu", kernel_regularizer=regularizers.L1L2(A, B)),
            keras.layers.Dense(1, kernel_regularizer=regularizers.L2(B)),
        ]
    )
    kernels = [layer.kernel.value for layer in model.layers]
    assert all(isinstance(kernel, torch.Tensor) for kernel in kernels)
    value = fused_penalty(kernels, l1=[A, A, 0.0], l2=[0.0, B, B])
    assert_equal(value, sum(model.losses))
    assert_equal(value_and_grad(kernels, l1=[A, A, 0.0], l2=[0.0, B, B])[0], sum(model.losses))


def test_exact_zeros_in_a_keras_model(keras):
    """``prox_`` takes Keras variables' tensors as it takes any: their ``value``."""
    layer = keras.layers.Dense(8, kernel_regularizer=keras.regularizers.L1(A))
    layer.build((None, 12))
    prox_(layer.kernel.value, l1=A, step=1e6)
    assert not layer.kernel.value.any()
    assert layer.losses[0] == 0
