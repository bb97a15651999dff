"""The strengths of docs/l2.md beside other libraries: what each computes, in its own terms, and what `prox_` gives.

Their formulas are written down from their sources (TensorFlow's kernels, jaxopt 0.8.5, skglm 0.5, torchao's
prototype.pat), which nothing here needs. scikit-learn's models are in test_lasso.py, Keras' in test_keras.py.
"""

import math

import pytest
import torch
from samples import draw

from fused_reg import fused_penalty, prox_

A, B, R, STEP = 0.3, 0.7, 0.4, 0.25
SIZE = 12  # elements of a group


def soft(v, threshold):
    return v.sign() * (v.abs() - threshold).clamp(min=0)


def block(v, threshold):
    return v * (1 - threshold / v.norm(dim=1, keepdim=True)).clamp(min=0)


STEPS = {
    "TensorFlow": (lambda v: soft(v, STEP * A) / (1 + STEP * B), {"l1": A, "l2": B / 2}),
    "jaxopt, lasso": (lambda v: soft(v, STEP * A), {"l1": A}),
    "jaxopt, ridge": (lambda v: v / (1 + STEP * B), {"l2": B / 2}),
    "jaxopt, elastic net": (lambda v: soft(v, STEP * A) / (1 + STEP * A * B), {"l1": A, "l2": A * B / 2}),
    "jaxopt, group lasso": (lambda v: block(v, STEP * A), {"l2_norm": A, "group": "row"}),
    "skglm, elastic net": (
        lambda v: soft(v, STEP * A * R) / (1 + STEP * A * (1 - R)),
        {"l1": A * R, "l2": A * (1 - R) / 2},
    ),
    "PAT, lasso": (lambda v: v * (1 - A * STEP / v.abs()).clamp(min=0), {"l1": A}),
    "PAT, group lasso": (
        lambda v: block(v, A * math.sqrt(SIZE) * STEP),
        {"l2_norm": A * math.sqrt(SIZE), "group": "row"},
    ),
}


@pytest.mark.parametrize("library", STEPS)
def test_proximal_steps(library):
    theirs, ours = STEPS[library]
    v = draw((9, SIZE), torch.float64)
    v[v == 0] = 1e-3
    v[0] /= 100  # a group that vanishes
    expected = theirs(v)
    prox_(v, **ours, step=STEP)
    assert torch.allclose(v, expected, rtol=1e-12, atol=0)
    assert (v == 0).any() == (library != "jaxopt, ridge")


VALUES = {
    "skglm, L2": (lambda w: B * (w**2).sum() / 2, {"l2": B / 2}),
    "skglm, elastic net": (
        lambda w: R * A * w.abs().sum() + (1 - R) * A / 2 * (w**2).sum(),
        {"l1": A * R, "l2": A * (1 - R) / 2},
    ),
    "MultiTaskElasticNet": (
        lambda w: A * R * w.norm(dim=1).sum() + 0.5 * A * (1 - R) * (w**2).sum(),
        {"l2_norm": A * R, "l2": A * (1 - R) / 2, "group": "row"},
    ),
}


@pytest.mark.parametrize("library", VALUES)
def test_values(library):
    theirs, ours = VALUES[library]
    w = torch.nn.Parameter(draw((9, SIZE), torch.float64))
    assert math.isclose(fused_penalty(w, **ours).item(), theirs(w).item(), rel_tol=1e-12)
