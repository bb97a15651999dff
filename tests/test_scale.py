"""What a penalty communicates, counted, is what the documentation's table of large models takes from a formula."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import ranks
from samples import draw, first_quick
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_reg import Regularizer, fused_penalty

# Counted for each; the table's are too many to start.
WORLDS = first_quick(4, 2, 8)
NORMS = 5


class Bytes(TorchDispatchMode):
    """What this process gives to collectives, and what it gets of them."""

    given = got = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            out, own = args[:2]
            self.given += own.numel() * own.itemsize
            self.got += out.numel() * out.itemsize
        return op(*args, **(kwargs or {}))


def counted(function):
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as collectives, Bytes() as amounts:
        result = function()
    return result, (collectives.get_total_counts(), amounts.given, amounts.got)


def check_step(l2_norm):
    """Collectives and bytes of a forward, a backward and an attached optimizer's step, of a model in one bucket."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [
        nn.Parameter(distribute_tensor(draw((3 * i + 1, 4), seed=i), mesh, [Shard(0)], src_data_rank=None))
        for i in range(NORMS)
    ]
    penalty, forward = counted(lambda: fused_penalty(params, l1=0.1, l2=0.2, l2_norm=l2_norm))
    _, backward = counted(penalty.backward)
    optimizer = torch.optim.SGD(params, lr=0.1)
    Regularizer(params, l1=0.1, l2=0.2, l2_norm=l2_norm).attach(optimizer)
    _, step = counted(optimizer.step)
    return forward, backward, step


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("l2_norm", [None, 0.3])
def test_communication(world, l2_norm):
    numbers = 1 if l2_norm is None else 1 + NORMS
    gather = (1, 8 * numbers, 8 * numbers * world)
    assert ranks(world).run(check_step, l2_norm) == [(gather, (0, 0, 0), gather)] * world


def test_the_table_follows_the_formula():
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "MB": 10**6, "GB": 10**9}
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    rows = re.findall(r"^\| (1B|70B|1T) on ([\d,]+) \| (\S+) (\S+) \| 1 \| 8 B \| (\S+) (\S+) \| (\d+) \|$", page, re.M)
    assert len(rows) == 9
    for model, world, traffic, traffic_unit, got, got_unit, rounds in rows:
        elements, processes = {"1B": 1e9, "70B": 7e10, "1T": 1e12}[model], int(world.replace(",", ""))
        assert float(traffic) * units[traffic_unit] == pytest.approx(12 * elements / processes, rel=0.01)
        assert float(got) * units[got_unit] == 8 * processes
        assert 2 ** int(rounds) == processes
