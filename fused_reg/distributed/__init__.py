"""Lists that are in several places: on several devices, or cut into shards (DTensor)."""

from fused_reg.distributed.buckets import Bucket, value_of
from fused_reg.distributed.parts import (
    accumulate_grad_,
    are_mixed,
    check_accumulation,
    check_prox,
    checked_buckets,
    penalty,
    prox_,
    value_and_grad,
)
from fused_reg.distributed.shards import cuts, is_sharded, shards_of

__all__ = [
    "Bucket",
    "accumulate_grad_",
    "are_mixed",
    "check_accumulation",
    "check_prox",
    "checked_buckets",
    "cuts",
    "is_sharded",
    "penalty",
    "prox_",
    "shards_of",
    "value_and_grad",
    "value_of",
]
