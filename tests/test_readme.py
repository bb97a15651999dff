"""The README is short, begins with an example and the installation, and its first example is the loop's penalty.

That its code runs, and its links and lines, is in test_docs.py with that of the pages."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_it_is_short():
    assert len(README.splitlines()) <= 160


def test_install_follows_the_first_example():
    beginning, _, rest = README.partition("\n## ")
    assert beginning.count("```python") == 1
    assert rest.startswith("Install\n")
    assert "\nregularizer = Regularizer(" in rest
    assert re.findall(r"!\[[^]]*\]\((.*?)\)", README) == ["benchmarks/results/cpu.png"]


def test_first_example_is_equivalent_to_the_loop():
    first, second = BLOCKS[:2]
    namespace: dict[str, object] = {}
    exec(first.split("optimizer.zero_grad()")[0], namespace)
    ours = namespace["loss"]
    exec(second, namespace)
    assert abs((ours - namespace["loss"]).item()) <= 1e-6
    assert len(first.strip().splitlines()) <= 14
