"""examples/weights.py: what each penalty does to the weights."""

import json

import pytest
from loaded_examples import loaded

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def weights():
    with loaded("weights") as module:
        yield module


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def runs(weights, out):
    """By method, those of each seed."""
    return {own[0].method.name: own for own in weights.main(["--quick", "--out", str(out)])}


def test_all_start_from_the_same_weights(runs):
    for own in runs.values():
        for run, unpenalized in zip(own, runs["no penalty"], strict=True):
            assert run.before.equal(unpenalized.before)
            assert not run.after.equal(run.before)
    assert not runs["L1"][0].before.equal(runs["L1"][1].before)


SPARSE = ("L1, proximal", "Adam, L1, preconditioned")


def test_only_proximal_steps_give_exact_zeros(runs):
    """Those of Adam with the learning rate give few, if any."""
    for name, own in runs.items():
        for run in own:
            zeros = (run.after == 0).float().mean().item()
            assert (zeros > 0.05) if name in SPARSE else (zeros < 0.01 * ("proximal" in name) + 1e-9)
            assert max(run.zeros.values()) > 0 or name not in SPARSE


def test_l1_comes_to_the_same_loss_with_its_gradient_and_with_proximal_steps(runs):
    for run, proximal in zip(runs["L1"], runs["L1, proximal"], strict=True):
        assert proximal.task_loss == pytest.approx(run.task_loss, rel=0.05)
        assert proximal.penalty == pytest.approx(run.penalty, rel=0.05)


def test_with_adam_preconditioned_steps_do(runs):
    names = ("Adam, L1", "Adam, L1, preconditioned", "Adam, L1, proximal")
    for own in zip(*(runs[name] for name in names), strict=True):
        coupled, preconditioned, decoupled = (run.task_loss + run.penalty for run in own)
        assert preconditioned == pytest.approx(coupled, rel=0.2)
        assert decoupled > 1.5 * coupled


def test_penalties_make_weights_smaller(runs):
    for name, norm in (("L1", 1), ("L2", 2), ("elastic net", 1), ("elastic net", 2), ("L1, proximal", 1)):
        for run, unpenalized in zip(runs[name], runs["no penalty"], strict=True):
            assert run.after.norm(norm) < unpenalized.after.norm(norm)
            assert run.task_loss > unpenalized.task_loss


def test_it_learns(runs):
    assert all(run.accuracy > 0.8 for own in runs.values() for run in own)


def test_pictures_and_numbers(runs, out):
    for name in ("histograms", "zeros", "losses"):
        assert (out / f"weights-{name}.png").stat().st_size > 10_000
    methods = json.loads((out / "weights.json").read_text())["methods"]
    assert methods.keys() == runs.keys()
    assert methods["L1"]["test_accuracy"] == [run.accuracy for run in runs["L1"]]


def test_tensorboard_has_the_reports(runs, out):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = accumulator.EventAccumulator(str(out / "tensorboard" / "L1-proximal")).Reload()
    tags = log.Tags()["scalars"]
    assert {"task_loss", "regularizer/value", "regularizer/0.weight/zero_share"} <= set(tags)
    run = runs["L1, proximal"][0]
    assert [event.value for event in log.Scalars("regularizer/value")] == pytest.approx([p for _, p, _ in run.history])
    assert log.Scalars("regularizer/0.weight/zero_share")[-1].value == pytest.approx(run.zeros["0.weight"])


def test_the_same_seed_is_the_same_training(weights, runs):
    again = weights.train(weights.METHODS[1], seed=1, epochs=len(runs["L1"][1].history))
    assert again.after.equal(runs["L1"][1].after)
