r"""Proximal gradient descent with ``prox_`` against scikit-learn's solvers: the same coefficients, the same zeros.

scikit-learn's objectives put the samples' number elsewhere. With the loss :math:`\frac{1}{2n} \lVert y - Xw \rVert^2`
and :math:`r` for ``l1_ratio``:

==================================  ==================================================================  =============
scikit-learn                        its objective, divided so that the loss is that                     fused_reg
==================================  ==================================================================  =============
``Lasso(alpha)``                    loss + alpha * sum|w|                                               l1 = alpha
``ElasticNet(alpha, l1_ratio=r)``   loss + alpha * r * sum|w| + alpha * (1 - r) / 2 * sum w^2           l1 = alpha * r,
                                                                                                        l2 = alpha * (1 - r) / 2
``Ridge(alpha)``                    loss + alpha / (2n) * sum w^2                                       l2 = alpha / (2n)
``MultiTaskLasso(alpha)``           loss + alpha * sum of the norms of each feature's coefficients      l2_norm = alpha,
                                                                                                        group = "row"
``MultiTaskElasticNet(alpha, r)``   loss + alpha * r * the same + alpha * (1 - r) / 2 * sum w^2         l2_norm = alpha * r,
                                                                                                        l2 = alpha * (1 - r) / 2
==================================  ==================================================================  =============

``torch.nn.MSELoss()`` has no 1/2, and for T tasks it divides by T: take 2 / T times these strengths. The groups of the
multi-task models are features: the rows of W of shape (features, tasks), which is the transpose of ``coef_`` and of
``torch.nn.Linear.weight``; ``prox_(linear.weight.t(), l2_norm=..., group="row", step=...)`` writes through the view.
"""  # noqa: E501

import numpy as np
import pytest
import torch

from fused_reg import Regularizer, fused_penalty, prox_

pytest.importorskip("sklearn", reason="needs scikit-learn (pip install fused_reg[examples])")
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, MultiTaskElasticNet, MultiTaskLasso, Ridge

EXACT = {"fit_intercept": False, "tol": 1e-12, "max_iter": 1_000_000}
WITHIN = 1e-4


def data(tasks: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """442 patients, 10 standardized features (five of them nearly collinear), and the centered target; or several."""
    x, y = load_diabetes(return_X_y=True)
    x = x / x.std(axis=0)
    if tasks:  # the target, and noisy others that depend on some features each
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((10, tasks)) * 20 * (np.arange(10)[:, None] % 3 > 0)
        y = np.column_stack([y, x @ weights + 30 * rng.standard_normal((len(x), tasks))])[:, :tasks]
    return torch.from_numpy(x), torch.from_numpy(y - y.mean(axis=0))


def solve(x, y, group="tensor", accelerated=True, steps=1500, **strengths) -> torch.Tensor:
    """FISTA, or ISTA, with step 1/L, where L is the largest curvature of the loss."""
    gram, moments = x.T @ x / len(x), x.T @ y / len(x)
    step = 1 / float(torch.linalg.matrix_norm(gram, 2))
    w = ahead = torch.zeros_like(moments)
    t = 1.0
    for _ in range(steps):
        before, w = w, ahead - step * (gram @ ahead - moments)
        prox_(w, **strengths, group=group, step=step)
        if not accelerated or ((ahead - w) * (w - before)).sum() > 0:  # restart (O'Donoghue and Candes 2015)
            ahead, t = w.clone(), 1.0
        else:
            t_before, t = t, (1 + (1 + 4 * t * t) ** 0.5) / 2
            ahead = w + (t_before - 1) / t * (w - before)
    return w


def assert_same_solution(w: torch.Tensor, coef: np.ndarray) -> None:
    """Coefficients within 1e-4, zeros in the same places."""
    expected = torch.from_numpy(np.ascontiguousarray(coef)).reshape(w.shape)
    assert torch.equal(w == 0, expected == 0)
    assert (w - expected).abs().max() < WITHIN


@pytest.mark.parametrize("alpha", [0.05, 1.0, 3.0, 10.0, 30.0, 100.0])
def test_lasso(alpha):
    x, y = data()
    expected = Lasso(alpha, **EXACT).fit(x, y).coef_
    w = solve(x, y, l1=alpha)
    assert_same_solution(w, expected)
    assert (w == 0).any() == (alpha >= 1)
    assert w.any() == (alpha < 100)


def test_lasso_without_acceleration():
    x, y = data()
    assert_same_solution(solve(x, y, accelerated=False, steps=8000, l1=3.0), Lasso(3.0, **EXACT).fit(x, y).coef_)


@pytest.mark.parametrize("l1_ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("alpha", [0.1, 3.0, 20.0])
def test_elastic_net(alpha, l1_ratio):
    x, y = data()
    expected = ElasticNet(alpha, l1_ratio=l1_ratio, **EXACT).fit(x, y).coef_
    assert_same_solution(solve(x, y, l1=alpha * l1_ratio, l2=alpha * (1 - l1_ratio) / 2), expected)


@pytest.mark.parametrize("alpha", [0.1, 10.0, 1000.0])
def test_ridge(alpha):
    x, y = data()
    expected = Ridge(alpha, fit_intercept=False, solver="cholesky").fit(x, y).coef_
    assert_same_solution(solve(x, y, l2=alpha / (2 * len(x))), expected)


@pytest.mark.parametrize("alpha", [0.5, 5.0, 20.0, 40.0])
def test_multi_task_lasso(alpha):
    """``coef_`` is (tasks, features), its groups are features."""
    x, y = data(tasks=3)
    expected = MultiTaskLasso(alpha, **EXACT).fit(x, y).coef_.T
    w = solve(x, y, "row", l2_norm=alpha)
    assert_same_solution(w, expected)
    zero_rows = (w == 0).all(dim=1)
    assert zero_rows.any() == (alpha > 1)
    assert torch.equal(zero_rows, (w == 0).any(dim=1))  # whole features, and not single coefficients
    assert not zero_rows.all()


@pytest.mark.parametrize("l1_ratio", [0.3, 0.8])
def test_multi_task_elastic_net(l1_ratio):
    x, y = data(tasks=3)
    expected = MultiTaskElasticNet(10.0, l1_ratio=l1_ratio, **EXACT).fit(x, y).coef_.T
    w = solve(x, y, "row", l2_norm=10.0 * l1_ratio, l2=10.0 * (1 - l1_ratio) / 2)
    assert_same_solution(w, expected)


def test_tensor_norm_is_the_multi_task_lasso_of_one_feature():
    """A whole tensor as a group: one feature's coefficients of all tasks."""
    x, y = data(tasks=3)
    x = x[:, 2:3]
    for alpha in (5.0, 500.0):
        expected = MultiTaskLasso(alpha, **EXACT).fit(x, y).coef_.T
        assert_same_solution(solve(x, y, l2_norm=alpha, accelerated=False, steps=100), expected)


@pytest.mark.parametrize("how", ["optimizer", "attach"])
def test_through_a_linear_layer(how):
    """A module, MSELoss and torch.optim.SGD: twice the strength, because this loss has no 1/2. The bias has none."""
    x, _ = data()
    y = torch.from_numpy(load_diabetes().target)  # not centered: the bias learns the mean
    reference = Lasso(5.0, tol=1e-12, max_iter=1_000_000).fit(x, y)
    linear = torch.nn.Linear(10, 1, dtype=torch.float64)
    lr = len(x) / (2 * float(torch.linalg.matrix_norm(x, 2)) ** 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr)
    if how == "attach":
        Regularizer(linear, l1=2 * 5.0, weights_only=True).attach(optimizer, mode="prox")
    for _ in range(1500):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(linear(x).squeeze(1), y).backward()
        optimizer.step()
        if how == "optimizer":
            prox_(linear.weight, l1=2 * 5.0, step=lr)
    assert_same_solution(linear.weight.detach()[0], reference.coef_)
    assert 0 < (linear.weight == 0).sum() < 10
    assert abs(linear.bias.item() - reference.intercept_) < WITHIN


def test_multi_task_through_a_linear_layer():
    """The groups of ``Linear.weight``'s columns: rows of its transpose, written through the view."""
    x, y = data(tasks=3)
    expected = MultiTaskLasso(20.0, **EXACT).fit(x, y).coef_
    linear = torch.nn.Linear(10, 3, bias=False, dtype=torch.float64)
    lr = 3 * len(x) / (2 * float(torch.linalg.matrix_norm(x, 2)) ** 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr)
    for _ in range(1500):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(linear(x), y).backward()
        optimizer.step()
        prox_(linear.weight.t(), l2_norm=2 / 3 * 20.0, group="row", step=lr)
    assert_same_solution(linear.weight.detach(), expected)
    assert (linear.weight == 0).any()


def test_l2_in_the_loss_and_l1_in_the_step():
    """An elastic net, its smooth part by fused_penalty in the loss."""
    x, y = data()
    alpha, l1_ratio = 3.0, 0.5
    l1, l2 = alpha * l1_ratio, alpha * (1 - l1_ratio) / 2
    w = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    lr = 1 / (float(torch.linalg.matrix_norm(x, 2)) ** 2 / len(x) + 2 * l2)
    optimizer = torch.optim.SGD([w], lr=lr)
    for _ in range(1500):
        optimizer.zero_grad()
        ((x @ w - y).square().mean() / 2 + fused_penalty(w, l2=l2)).backward()
        optimizer.step()
        prox_(w, l1=l1, step=lr)
    assert_same_solution(w.detach(), ElasticNet(alpha, l1_ratio=l1_ratio, **EXACT).fit(x, y).coef_)


def test_l1_in_the_loss_never_arrives():
    """The recurring bug: a subgradient step jumps over zero. Near the solution, and no coefficient is zero."""
    x, y = data()
    expected = torch.from_numpy(Lasso(10.0, **EXACT).fit(x, y).coef_)
    assert (expected == 0).sum() > 3
    w = torch.full((10,), 0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.01)
    for _ in range(1500):
        optimizer.zero_grad()
        ((x @ w - y).square().mean() / 2 + fused_penalty(w, l1=10.0)).backward()
        optimizer.step()
    assert (w - expected).abs().max() < 1
    assert not (w == 0).any()


def test_values_are_scikit_learns_objective():
    """At its solution no neighbour is better, by our value of the penalty; so the conversion is right."""
    x, y = data()
    w = torch.from_numpy(ElasticNet(3.0, l1_ratio=0.7, **EXACT).fit(x, y).coef_)

    def objective(w):
        return (x @ w - y).square().sum() / (2 * len(x)) + fused_penalty(w, l1=3.0 * 0.7, l2=3.0 * 0.3 / 2)

    best = objective(w)
    for i in range(10):
        for change in (0.01, -0.01):
            other = w.clone()
            other[i] += change
            assert objective(other) > best
