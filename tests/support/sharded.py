"""Toy models sharded by FSDP2, trained beside the same model in one process. Every rank runs these functions."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradsel
from tests.support.selections import toy
from tests.support.toy import Toy

#: Samples of a batch: a multiple of the number of ranks.
SIZE = 12

Optimizer = Callable[[Any], torch.optim.Optimizer]
#: With an eps that keeps Adam from normalising rounding errors of gradients near zero.
OPTIMIZERS: dict[str, Optimizer] = {
    "MaskedAdamW": lambda parameters: gradsel.MaskedAdamW(parameters, lr=1e-2, eps=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@cache
def meshes() -> dict[str, DeviceMesh]:
    """All four ranks, two pairs of two, and both as replicas and shards."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return {"four": init_device_mesh("cpu", (4,)), "two": both["shard"], "hybrid": both}


@cache
def one() -> dist.ProcessGroup:
    """A group of this rank alone, for a model that is not distributed."""
    return [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]


def shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """Block by block, as FSDP2 is used."""
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def shard_attached(
    model: nn.Module, selection: gradsel.Selection, mesh: DeviceMesh, attach_first: bool, **options: Any
) -> None:
    """Attaches and shards a model, in this order or in the other one."""
    if attach_first:
        gradsel.attach(model, selection)
    shard(model, mesh, **options)
    if not attach_first:
        gradsel.attach(model, selection)


def batches(dtype: torch.dtype = torch.float64, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(SIZE, 3, 8, 8, generator=generator).to(dtype),
            torch.randint(0, 4, (SIZE,), generator=generator),
        )
        for _ in range(count)
    ]


def share(batch: tuple[Tensor, Tensor], mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """What this rank of a mesh sees of a batch."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    number = 0
    for place, size in zip(coordinate, mesh.shape, strict=True):
        number = number * size + place
    each = SIZE // mesh.size()
    return batch[0][number * each : (number + 1) * each], batch[1][number * each : (number + 1) * each]


def models(kind: str = "per-row", dtype: torch.dtype = torch.float64) -> tuple[Toy, Toy, gradsel.Selection]:
    """Two equal models, without dropout and batch statistics, which ranks could not share, and a selection."""
    model, selection = toy(kind, dtype)
    return model.eval(), copy.deepcopy(model), selection


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a sharded model, gathered."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def common_folder() -> Path:
    """A new folder that all ranks know."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return Path(made[0])


def check_equal(sharded: dict[str, Tensor], alone: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert sharded.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def check_alike(state: dict[str, Tensor]) -> None:
    """All ranks hold the same bits."""
    own = torch.cat([tensor.double().flatten() for tensor in state.values()])
    first = own.clone()
    dist.broadcast(first, 0)
    assert torch.equal(own, first), "the ranks drift apart"


def check_written(model: nn.Module) -> None:
    """Every weight holds its values."""
    state = whole_state(model)
    for module in model.modules():
        for selected in gradsel.attached.selected_in(module).values():
            held = selected.mask.gather(state[selected.name])
            assert torch.equal(held, state[selected.name + "_values"].to(held.dtype)), selected.name
