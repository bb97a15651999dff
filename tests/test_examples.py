"""The examples run, in a short form, and show what they say."""

import os
import subprocess
import sys

import pytest
from loaded_examples import EXAMPLES, PACKAGES, loaded

pytestmark = pytest.mark.long

ROOT = EXAMPLES.parent

# Runs an example of which a module is missing.
WITHOUT = """
import runpy, sys
sys.modules[sys.argv[1]] = None
sys.path[:0] = sys.argv[2:4]
sys.argv = [sys.argv[4]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("example", "module"),
    [
        *(("finetune", package) for package in PACKAGES["finetune"]),
        ("continual", "rich"),
        ("digits", "sklearn"),
        ("pat", "matplotlib"),
        ("path", "sklearn"),
        ("prune", "matplotlib"),
        ("tune", "optuna"),
        ("tune", "sklearn.datasets"),
        ("weights", "sklearn.datasets"),
        ("weights", "tensorboard"),
    ],
)
def test_a_missing_package(example, module):
    """One sentence that names the command, and no traceback."""
    script = EXAMPLES / f"{example}.py"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, module, str(ROOT), str(EXAMPLES), str(script)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1
    package = module.partition(".")[0].replace("sklearn", "scikit-learn")
    assert done.stderr == f"{example}.py: needs {package}; run pip install 'fused_reg[examples]'\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of transformers' imports
@pytest.mark.parametrize(
    ("example", "training"),
    [
        ("continual", "run"),
        ("finetune", "Study"),
        ("pat", "compare"),
        ("path", "compare"),
        ("prune", "train"),
        ("tune", "fit"),
        ("weights", "train"),
    ],
)
def test_a_folder_that_cannot_be_written(example, training, tmp_path, monkeypatch):
    """Said before the training."""
    (tmp_path / "file").touch()
    with loaded(example) as module:
        monkeypatch.setattr(module, training, None)
        with pytest.raises(SystemExit, match=r"cannot write to .*file/out: Not a directory"):
            module.main(["--quick", "--out", str(tmp_path / "file" / "out")])


def test_digits_trains_alike_three_ways(capsys):
    with loaded("digits") as digits:
        loop, ours, weight_decay = digits.main(["--epochs", "3"])
    assert digits.largest_difference(ours, loop) == 0
    assert 0 < digits.largest_difference(weight_decay, loop) < 1e-5
    assert ours.losses[-1][0] < 0.5
    assert ours.accuracy == loop.accuracy > 0.8
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [2, 3])
def test_fsdp2_trains_alike_sharded_and_whole(processes):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "examples" / "fsdp2.py"), "--steps", "5"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))},
    )
    assert done.returncode == 0, done.stderr
    assert "the same sharded and whole in 5 of 5 steps" in done.stdout


def test_fsdp2_alone():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "fsdp2.py")], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("needs several processes; run torchrun --nproc-per-node 2 examples/fsdp2.py")
