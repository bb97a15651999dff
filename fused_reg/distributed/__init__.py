"""Lists that are in several places: on several devices, or cut into shards (DTensor)."""

from fused_reg.distributed.shards import (
    Bucket,
    accumulate_grad_,
    buckets,
    check_distinct,
    cuts,
    is_sharded,
    penalty,
    prox_,
    shards_of,
    value_and_grad,
    with_grads,
)

__all__ = [
    "Bucket",
    "accumulate_grad_",
    "buckets",
    "check_distinct",
    "cuts",
    "is_sharded",
    "penalty",
    "prox_",
    "shards_of",
    "value_and_grad",
    "with_grads",
]
