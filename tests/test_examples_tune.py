"""examples/tune.py: three searches with one budget, on data that the verdict is not from."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
from loaded_examples import DOCS, EXAMPLES, loaded, need

need("tune")

import optuna  # noqa: E402
import torch  # noqa: E402

pytestmark = pytest.mark.long

BUDGET = (4, 25)  # of the studies here: 16 trials of 25 steps, of which Optuna's sampler guides the last 6


@pytest.fixture(scope="module")
def tune():
    with loaded("tune") as module:
        yield module


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def results(tune, out):
    return tune.main(["--quick", "--out", str(out)])


def storage_in(folder):
    return optuna.storages.RDBStorage(f"sqlite:///{folder / 'tune.db'}")


def searched(tune, folder, search):
    """The finished trials of a study that is begun or gone on with in the folder: points, value, state."""
    storage = storage_in(folder)
    study = tune.open_study(search, 0, tune.Budget(*BUDGET), storage)
    for _ in tune.finish(study, search, 0, tune.Budget(*BUDGET)):
        pass
    trials = [(trial.params, trial.value, trial.state) for trial in tune.finished(study)]
    states = [trial.state for trial in study.get_trials()]
    storage.engine.dispose()
    return trials, states


def test_the_test_set_is_apart(tune):
    def rows(examples):
        return {tuple(row) for row in torch.column_stack(examples).tolist()}

    first, second = tune.load(0), tune.load(1)
    assert first.test[0].equal(second.test[0])
    assert not first.train[0].equal(second.train[0])
    seen = rows(first.train) | rows(first.validation)
    assert len(seen) == 300  # no digit is there twice
    assert not seen & rows(first.test)
    assert len(first.test[0]) == 797


def test_every_search_has_the_same_budget(tune, results, out):
    for search in tune.SEARCHES:
        assert [len(curve) for curve in results[search]["best_so_far"]] == [9, 9]
        assert all(steps <= 9 * 50 for steps in results[search]["steps"])
        for curve, best in zip(results[search]["best_so_far"], results[search]["validation_loss"], strict=True):
            assert curve == sorted(curve, reverse=True)
            assert curve[-1] == best
    assert results["random"]["pruned"] == results["grid"]["pruned"] == [0, 0]


def test_the_grid_is_whole(tune):
    points = tune.grid(3, seed=0)
    expected = [(a, b) for a in (1e-5, 1e-3, 1e-1) for b in (1e-5, 1e-3, 1e-1)]
    assert torch.tensor(sorted(points)).allclose(torch.tensor(expected))
    assert points != sorted(points)


def test_what_is_chosen_is_judged_on_the_test_set(tune, results):
    data, given = tune.load(1), results["grid"]["strengths"][1]
    model = tune.fit(data.train_and_validation, given, seed=1, steps=50)
    assert tune.judge(model, data.test) == (results["grid"]["test_loss"][1], results["grid"]["test_accuracy"][1])
    assert len(data.train_and_validation[0]) == 300


def test_the_verdict_is_that_of_the_interval(tune):
    reference = [1.0, 2.0, 3.0]
    assert tune.gain_over([0.9, 1.9, 2.9], reference)["verdict"] == "better"
    assert tune.gain_over([1.1, 2.1, 3.1], reference)["verdict"] == "worse"
    noisy = tune.gain_over([0.9, 2.05, 2.9], reference)
    assert noisy["verdict"] == "within noise"
    assert noisy["mean"] == pytest.approx(0.05)
    assert noisy["half_interval"] == pytest.approx(4.302653 * noisy["sd"] / 3**0.5)
    assert tune.gain_over([1.0], [2.0])["verdict"] == "one seed: no spread"


def test_the_unscaled_default_is_worse_than_none(results):
    assert results["fused_penalty's default"]["gain"]["no penalty"]["verdict"] == "worse"
    assert min(results["no penalty"]["test_accuracy"]) > 0.85


def test_pictures_and_numbers(results, out):
    for name in ("planes", "results"):
        assert (out / f"tune-{name}.png").stat().st_size > 10_000
    saved = json.loads((out / "tune.json").read_text())
    assert saved["results"] == results
    assert saved["trials"] == 9


def test_no_line_of_the_picture_hides_another(tune):
    """Optuna's first trials are the random ones: where two lines are one, the lower is wider."""
    drawn = json.loads((DOCS / "pictures" / "tune.json").read_text())["results"]
    lines = {line.get_label(): line for line in tune.draw_results(drawn).axes[0].lines}
    below, above = lines["random"], lines["Optuna"]
    assert list(below.get_ydata())[:10] == list(above.get_ydata())[:10]
    assert below.get_linewidth() > 2 * above.get_linewidth()
    assert below.get_zorder() < above.get_zorder()


def test_a_finished_study_is_not_searched_again(tune, results, out, monkeypatch):
    monkeypatch.setattr(tune, "run_trial", None)
    assert tune.main(["--quick", "--out", str(out)]) == results


@pytest.mark.parametrize("search", ["grid", "random", "Optuna"])
def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tune, search, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    calls, interrupt_at = [], math.inf

    def loss(trial, *_):
        calls.append(trial)
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        return abs(math.log10(trial.params["l1"]) + 3) + abs(math.log10(trial.params["l2"]) + 2)

    monkeypatch.setattr(tune, "run_trial", loss)
    whole, _ = searched(tune, tmp_path / "whole", search)
    assert len({tuple(params.values()) for params, _, _ in whole}) == 16
    calls, interrupt_at = [], 13
    with pytest.raises(KeyboardInterrupt):
        searched(tune, tmp_path / "cut", search)
    trials, states = searched(tune, tmp_path / "cut", search)
    assert trials == whole
    assert len(calls) == 13 + 4  # twelve finished and one interrupted, and the four that are missing
    assert states.count(optuna.trial.TrialState.FAIL) == 1
    assert optuna.trial.TrialState.RUNNING not in states


def test_a_killed_process_leaves_its_study(tune, tmp_path):
    """A real process, killed in its twelfth training; the study has what was finished."""
    program = """if True:
        import os, signal, sys, tune
        original, calls = tune.fit, []
        def fit(*arguments, **named):
            calls.append(arguments)
            if len(calls) == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)
        tune.fit = fit
        storage = tune.optuna.storages.RDBStorage(f"sqlite:///{sys.argv[1]}/tune.db")
        budget = tune.Budget(4, 25)
        for _ in tune.finish(tune.open_study("Optuna", 0, budget, storage), "Optuna", 0, budget):
            pass
    """
    path = os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=False, timeout=300, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    trials, states = searched(tune, tmp_path, "Optuna")
    assert len(trials) == 16
    assert states[11] == optuna.trial.TrialState.FAIL
    (tmp_path / "whole").mkdir()
    assert trials == searched(tune, tmp_path / "whole", "Optuna")[0]


def test_interrupting_the_example_says_how_to_go_on(tune, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run_trial", interrupt)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on from here"):
        tune.main(["--quick", "--out", str(tmp_path)])


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_no_study(tune, tmp_path):
    (tmp_path / "tune.db").write_text("garbage" * 100)
    with pytest.raises(SystemExit, match=r"tune.db is not a study; remove it to search anew"):
        tune.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "tune.db").read_text().startswith("garbage")
