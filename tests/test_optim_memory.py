"""A step needs no memory beside the tensors that it steps, with a penalty or without."""

import pytest
import torch
from torch.profiler import profile

from fused_reg import optim


@pytest.mark.parametrize("own", [{}, {"l1": 0.1, "l2": 0.1}, {"l1": 0.1, "prox": True}])
@pytest.mark.parametrize("name", optim.__all__)
def test_a_step_allocates_its_value_only(name, own):
    params = [torch.nn.Parameter(torch.ones(300, 10)) for _ in range(3)]
    optimizer = getattr(optim, name)(params, lr=0.1, **own)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # makes the states
    with profile(profile_memory=True) as profiler:
        optimizer.step()
    assert 0 < sum(max(0, event.self_cpu_memory_usage) for event in profiler.events()) <= 8  # a number
