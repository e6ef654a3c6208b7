"""Ranking DTensors: each rank ranks its own rows, and ranks that hold columns of the same rows exchange their best.

What needs all scores of a parameter at once gets them, one parameter at a time: policies other than ``PerNeuron(k)``,
criteria that are functions, neuron views whose rows are not those of the tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

import gradsel_kernels as gk
from gradsel.sharding import box_of, is_sharded, local_of, mesh_of
from gradsel.views import NeuronView


def shard_of(grad: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of a gradient, sharded like its parameter."""
    placements = cast(Any, parameter).placements
    if is_sharded(grad) and cast(Any, grad).placements != placements:
        grad = cast(Any, grad).redistribute(mesh_of(parameter), placements)
    return local_of(grad)


def gathered(local: Tensor, parameter: Tensor) -> Tensor:
    """The whole of a tensor that is sharded like a parameter. A collective call.

    Args:
        local: what this rank holds of it.
    """
    from torch.distributed.tensor import DTensor

    shape, placements = parameter.shape, cast(Any, parameter).placements
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local.contiguous(), mesh_of(parameter), placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def is_by_matrix(parameter: Tensor, view: NeuronView) -> bool:
    """Whether what each rank holds of a parameter are rows, columns or a block of its neuron view."""
    dims = {placement.dim for placement in cast(Any, parameter).placements if not placement.is_replicate()}
    return view.is_first_dim and (dims <= {0} or (parameter.ndim == 2 and dims <= {0, 1}))


class Best(NamedTuple):
    """The best entries of every row of a parameter.

    Attributes:
        cols: int32 [rows, k], ascending.
        silent: number of rows whose scores are all zero.
        finite: whether all scores are.
    """

    cols: Tensor
    silent: int
    finite: bool


@torch.no_grad()
def best_of_rows(score: Tensor, parameter: Tensor, k: int) -> Best:
    """The ``k`` largest magnitudes of every row of a parameter, on every rank.

    A collective call that sends about k numbers a row.

    Args:
        score: [rows, cols] of what this rank holds.
        parameter: the DTensor, see :func:`is_by_matrix`.
    """
    _, (_, *first) = box_of(parameter)
    own = min(k, score.shape[1])
    cols = gk.topk_rows(score, own) if score.numel() else _none(score, own)
    scores = gk.gather_rows(score, cols) if cols.numel() else score.new_empty(cols.shape)
    cols = cols + (first[0] if parameter.ndim == 2 else 0)
    mesh, placements = mesh_of(parameter), cast(Any, parameter).placements
    for dim in reversed(range(mesh.ndim)):  # ranks along a mesh dimension hold ascending columns
        if placements[dim].is_shard(1) and parameter.ndim == 2:
            cols, scores = _merged(cols, scores, k, mesh.get_group(dim))
    peaks = gk.gather_rows(scores, gk.topk_rows(scores, 1)) if scores.numel() else scores
    found = torch.tensor([int((peaks == 0).sum()), int((~peaks.isfinite()).sum())], device=score.device)
    for dim, placement in enumerate(placements):
        if placement.is_shard(0):
            dist.all_reduce(found, group=mesh.get_group(dim))
    silent, infinite = found.tolist()
    return Best(_rows_of(cols, parameter), silent, not infinite)


def _none(score: Tensor, k: int) -> Tensor:
    return torch.empty(score.shape[0], k, dtype=torch.int32, device=score.device)


def _merged(cols: Tensor, scores: Tensor, k: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The best of the candidates of all ranks in a group; ties go to the lowest column."""
    rows, own = cols.shape
    sent_cols = torch.nn.functional.pad(cols, (0, k - own), value=-1)
    sent = torch.nn.functional.pad(scores, (0, k - own))
    world = dist.get_world_size(group)
    all_cols, all_scores = (torch.empty(world * rows, k, dtype=t.dtype, device=t.device) for t in (sent_cols, sent))
    dist.all_gather_into_tensor(all_cols, sent_cols.contiguous(), group=group)
    dist.all_gather_into_tensor(all_scores, sent.contiguous(), group=group)
    all_cols, all_scores = (t.view(world, rows, k).transpose(0, 1).reshape(rows, -1) for t in (all_cols, all_scores))
    if rows:
        there = all_cols[0] >= 0
        all_cols, all_scores = all_cols[:, there].contiguous(), all_scores[:, there].contiguous()
    if not all_scores.numel():
        return all_cols, all_scores
    best = gk.topk_rows(all_scores, min(k, all_scores.shape[1]))
    return all_cols.gather(1, best.long()), gk.gather_rows(all_scores, best)


def _rows_of(cols: Tensor, parameter: Tensor) -> Tensor:
    """The columns of all rows, from those of this rank's."""
    from torch.distributed.tensor import DTensor, Replicate

    placements = [
        Replicate() if placement.is_replicate() or placement.dim == 1 else placement
        for placement in cast(Any, parameter).placements
    ]
    shape = torch.Size((parameter.shape[0], cols.shape[1]))
    return DTensor.from_local(
        cols.contiguous(), mesh_of(parameter), placements, run_check=False, shape=shape, stride=(shape[1], 1)
    ).full_tensor()
