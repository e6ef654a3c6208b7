"""What a step of an attached model sends: weights are gathered, and only gradients of what is trained are reduced."""

from __future__ import annotations

import math

import pytest

import gradsel
from tests.support.sharded import OPTIMIZERS, batches, meshes, models, shard, share
from tests.support.toy import cross_entropy
from tests.support.wire import Wire

pytestmark = pytest.mark.xdist_group("ranks")

BYTES = 8  # float64


def padded(shape: tuple[int, ...], ranks: int) -> int:
    """Numbers that FSDP reduces for a tensor: as many rows as all shards of the first have."""
    return math.ceil(shape[0] / ranks) * ranks * math.prod(shape[1:])


def counted(kind: str, attach_first: bool, optimizer_name: str) -> None:
    mesh = meshes()["four"]
    model, _, selection = models(kind)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if attach_first:
        gradsel.attach(model, selection)
    shard(model, mesh, reshard_after_forward=True)
    if not attach_first:
        gradsel.attach(model, selection)
    optimizer = OPTIMIZERS[optimizer_name](gradsel.trainable_parameters(model))
    used = {name: mask for name, mask in selection.items() if not name.startswith(("unused", "tokens"))}
    values = {name: mask.compact_shape for name, mask in used.items() if mask.nnz and not mask.is_whole}
    whole = {name: mask.shape for name, mask in used.items() if mask.nnz and mask.is_whole}
    tokens = selection["tokens.weight"].compact_shape
    with Wire() as first:  # compares the masks of all ranks
        cross_entropy(model, share(batches()[0], mesh)).backward()
    assert first.sent["all-gather"]
    for _ in range(2):
        with Wire() as wire:
            loss = cross_entropy(model, share(batches()[0], mesh))
        gathered = sum(padded(shape, 4) for shape in shapes.values())
        if attach_first:
            gathered += sum(padded(shape, 4) for shape in (*values.values(), tokens))
        assert wire.sent == {"all-gather": gathered * BYTES // 4}
        with Wire() as wire:
            loss.backward()
        assert wire.sent["all-gather"] <= gathered * BYTES // 4  # a block that needs no gradient is not gathered again
        if attach_first:
            reduced = sum(padded(shape, 4) for shape in (*values.values(), *whole.values()))
            assert wire.sent["reduce-scatter"] == reduced * BYTES
            assert not wire.sent["all-reduce"]
        else:
            scattered = {name: shape for name, shape in values.items() if kind in ("per-row", "columns")}
            own = sum(padded(shape, 4) for shape in (*scattered.values(), *whole.values()))
            assert wire.sent["reduce-scatter"] == own * BYTES
            alike = sum(math.prod(shape) for name, shape in values.items() if name not in scattered)
            assert wire.sent["all-reduce"] == alike * BYTES
        with Wire() as wire:
            optimizer.step()
        aligned = kind in ("per-row", "columns") or not attach_first
        everything = sum(padded(shape, 4) for shape in values.values())
        assert wire.sent["all-gather"] == (0 if aligned else everything * BYTES // 4)
        assert not wire.sent["reduce-scatter"]
        assert not wire.sent["all-reduce"]


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("kind", ["per-row", "rows"])
def test_bytes(ranks, kind, attach_first):
    ranks.run(counted, kind, attach_first, "MaskedAdamW")


def test_bytes_with_another_optimizer(ranks):
    ranks.run(counted, "per-row", True, "AdamW")
