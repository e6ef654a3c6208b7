"""Weights that are DTensors: what a rank holds of them and of their values, and what ranks tell each other."""

from gradsel.sharding.parallel import Part, settled
from gradsel.sharding.shards import Shards
from gradsel.sharding.shares import Share, by_rows, entries_of, share_of
from gradsel.sharding.tensors import (
    agree_over,
    box_of,
    group_of,
    is_managed,
    is_sharded,
    local_of,
    mesh_of,
    on_first_rank,
    part_like,
    placed_like,
    reshard,
    sharded_like,
    sum_over_shards,
    whole_of,
)

__all__ = [
    "Part",
    "Shards",
    "Share",
    "agree_over",
    "box_of",
    "by_rows",
    "entries_of",
    "group_of",
    "is_managed",
    "is_sharded",
    "local_of",
    "mesh_of",
    "on_first_rank",
    "part_like",
    "placed_like",
    "reshard",
    "settled",
    "sharded_like",
    "share_of",
    "sum_over_shards",
    "whole_of",
]
