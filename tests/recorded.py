"""Calls of the operators and what came of them, for a CPU without Python: ``PYTHONPATH=tests python -m recorded FILE``.

They are those of lists of ``golden.csv``, whose bits are looked at first, and steps of every optimizer.
``cpp/test_recorded.cpp`` makes them again.
"""

import sys

import golden
import optim_cases
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

BLOCKS = range(0, golden.BLOCKS, 16)
WITHOUT_BITS = (torch.ops.fused_reg.empty_grads.default,)  # memory that is not written yet


def copied(t: torch.Tensor) -> torch.Tensor:
    """With its place in the storage: where no vector load is aligned, there it is none."""
    storage = t.untyped_storage().clone()
    return torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.size(), t.stride())


class Recorded(TorchDispatchMode):
    """Each call as its name, its arguments, and the tensors that it has written: arguments, then results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "fused_reg" or func in WITHOUT_BITS:
            return func(*args, **(kwargs or {}))
        before = tree_map_only(torch.Tensor, copied, args)
        result = func(*args)
        formal = func._schema.arguments
        written = [x for x, f in zip(args, formal, strict=True) if f.alias_info and f.alias_info.is_write]
        after = [copied(t) for t in tree_leaves((written, result)) if isinstance(t, torch.Tensor)]
        self.calls.append((func._schema.name, before, after))
        return result


def main(file: str) -> None:
    with Recorded() as recorded:
        for block in BLOCKS:
            if golden.hashes(block) != golden.recorded()[block]:
                raise SystemExit(f"block {block} has not the bits of {golden.FILE}")
        optim_cases.results()
    names = {name for name, *_ in recorded.calls}
    torch.save(recorded.calls, file)
    print(f"{len(recorded.calls)} calls of {', '.join(sorted(names))}")


if __name__ == "__main__":
    main(sys.argv[1])
