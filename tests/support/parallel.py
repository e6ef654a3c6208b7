"""The toy under tensor parallelism of two ranks, alone or with FSDP2 over two replicas.

Every rank runs these functions.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import gradsel
from tests.support.sharded import SIZE, meshes, models, shard
from tests.support.toy import Toy


def plan() -> dict[str, ParallelStyle]:
    """Both Linear layers of an MLP without a message between them; others with outputs that all ranks hold."""
    whole = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    found: dict[str, ParallelStyle] = {"head": ColwiseParallel(output_layouts=Replicate())}
    for number in range(2):
        found[f"blocks.{number}.fc1"], found[f"blocks.{number}.fc2"] = ColwiseParallel(), RowwiseParallel()
    found["blocks.0.qkv"], found["blocks.1.qkv"] = ColwiseParallel(**whole), RowwiseParallel(**whole)
    return found


def parallelise(model: Toy) -> None:
    parallelize_module(model, meshes()["two"], plan())


def prepared(
    order: str, selection: str | gradsel.Selection, then: Callable[[Toy], object] | None = None
) -> tuple[Toy, Toy]:
    """The toy on all ranks, and its twin in one process.

    Args:
        order: in which it is parallelised (p), attached (a), sharded by FSDP (s), and given to ``then`` (c).
        selection: or its kind.
    """
    model, alone, chosen = models(selection if isinstance(selection, str) else "per-row")
    chosen = chosen if isinstance(selection, str) else selection
    steps = {
        "p": lambda: parallelise(model),
        "a": lambda: gradsel.attach(model, chosen),
        "s": lambda: shard(model, meshes()["hybrid"]["replicate"]),
        "c": lambda: then(model),
    }
    for letter in order:
        steps[letter]()
    gradsel.attach(alone, chosen)
    return model, alone


def share(batch: tuple[Tensor, Tensor], order: str) -> tuple[Tensor, Tensor]:
    """All of a batch, or the half of this rank's replica."""
    if "s" not in order:
        return batch
    first = meshes()["hybrid"]["replicate"].get_local_rank() * (SIZE // 2)
    return batch[0][first : first + SIZE // 2], batch[1][first : first + SIZE // 2]
