"""One network trained twice with the same penalty: sharded over processes with ``fully_shard``, and whole on each.

    torchrun --nproc-per-node 2 examples/fsdp2.py

On CPUs with gloo; with NCCL where there is a GPU for every process.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fused_reg import Regularizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 33), nn.Tanh(), nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 1))


def regularizer_of(model: nn.Module) -> Regularizer:
    return Regularizer(model, l1=lambda step: min(1e-3, 1e-4 * step), l2=1e-3, weights_only=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, regularizer: Regularizer, x: Tensor, y: Tensor) -> Tensor:
    """A training step; the penalty in its loss."""
    optimizer.zero_grad()
    penalty = regularizer()
    (nn.functional.mse_loss(model(x), y) + penalty).backward()
    optimizer.step()
    regularizer.advance()
    return penalty.detach()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args(arguments).steps
    if "RANK" not in os.environ:
        raise SystemExit(
            "examples/fsdp2.py: needs several processes; run torchrun --nproc-per-node 2 examples/fsdp2.py"
        )
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    kind = "cuda" if on_gpus else "cpu"
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        train(kind, steps)
    finally:
        dist.destroy_process_group()


def train(kind: str, steps: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(kind, (world_size,))
    sharded, whole = network().to(kind), network().to(kind)
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16 * world_size, 10, generator=generator).to(kind)
    y = x[:, :1] * x[:, 1:2]
    own_x, own_y = x.chunk(world_size)[rank], y.chunk(world_size)[rank]

    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (sharded, whole)]
    regularizers = [regularizer_of(model) for model in (sharded, whole)]
    same_values, last = 0, torch.zeros(())
    for _ in range(steps):
        last = step(sharded, optimizers[0], regularizers[0], own_x, own_y)
        expected = step(whole, optimizers[1], regularizers[1], x, y)
        same_values += int(torch.allclose(last, expected, rtol=1e-5))
    difference = max(
        (p.full_tensor() - q).abs().max().item()  # type: ignore[attr-defined]
        for p, q in zip(sharded.parameters(), whole.parameters(), strict=True)
    )
    if rank == 0:
        print(f"{world_size} processes on {kind}, {steps} steps")
        print(
            f"penalty after training: {last.item():.6f}; the same sharded and whole in {same_values} of {steps} steps"
        )
        print(f"largest difference of a weight: {difference:.1e}")
    if same_values < steps or difference > 1e-5:
        raise SystemExit(f"rank {rank}: sharded and whole training differ")


if __name__ == "__main__":
    main()
