"""The README's code runs, in its order, as one program."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its compiler, of itself
def test_every_python_block_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert "tensor(" in capsys.readouterr().out  # the gradient of the learned strength
    total = namespace["report"].rows[-1]  # of the section on exact zeros
    assert 0 < total["zeros"] < total["elements"]


def test_first_example_is_equivalent_to_the_loop():
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[:2]
    namespace: dict[str, object] = {}
    exec(first.split("optimizer.zero_grad()")[0], namespace)
    ours = namespace["loss"]
    exec(second, namespace)
    assert abs((ours - namespace["loss"]).item()) <= 1e-6
    assert len(first.strip().splitlines()) <= 14
