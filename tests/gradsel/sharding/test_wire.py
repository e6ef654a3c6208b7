"""What a step of an attached model sends: weights are gathered, and only gradients of what is trained are reduced.

Under tensor parallelism, what it sends beyond the same model with frozen weights in place of values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from torch.distributed.tensor.parallel import ColwiseParallel

import gradsel
from gradsel.masks import Frozen
from tests.support import parallel
from tests.support.sharded import OPTIMIZERS, batches, meshes, models, shard_attached, share
from tests.support.toy import cross_entropy
from tests.support.wire import Wire

pytestmark = pytest.mark.xdist_group("ranks")

BYTES = 8  # float64


def padded(shape: Sequence[int], ranks: int) -> int:
    """Numbers that FSDP reduces for a tensor: as many rows as all shards of the first have."""
    return math.ceil(shape[0] / ranks) * ranks * math.prod(shape[1:])


def counted(kind: str, attach_first: bool, optimizer_name: str) -> None:
    mesh = meshes()["four"]
    model, _, selection = models(kind)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shard_attached(model, selection, mesh, attach_first, reshard_after_forward=True)
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


def step_of_parallel_model(order: str, selection: gradsel.Selection) -> list[Counter[str]]:
    """What forward, backward and the optimizer of a second step send; the order is that of ``parallel.prepared()``."""
    model, _ = parallel.prepared(order, selection)
    optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(model))
    for _ in range(2):
        with Wire() as forward:
            loss = cross_entropy(model, parallel.share(batches()[0], order))
        with Wire() as backward:
            loss.backward()
        with Wire() as step:
            optimizer.step()
    return [forward.sent, backward.sent, step.sent]


def counted_beyond_frozen(order: str, kind: str) -> None:
    """Of two ranks of tensor parallelism, and two of FSDP."""
    selection = models(kind)[2]
    values = {name: mask for name, mask in selection.items() if mask.nnz and not mask.is_whole}
    frozen = gradsel.Selection(dict(selection) | {name: Frozen(mask.shape) for name, mask in values.items()})
    plan, by_rows = parallel.plan(), kind in ("per-row", "columns")
    more: list[Counter[str]] = [Counter(), Counter(), Counter()]
    forward, backward, step = more
    for name, mask in values.items():
        split = plan.get(name.removesuffix(".weight"))
        own = isinstance(split, ColwiseParallel) and by_rows  # each rank has the values of its own rows
        whole, shape = mask.nnz, list(mask.compact_shape)
        if order == "psa":
            if split is not None:
                backward["all-reduce"] += 2 * whole
            else:
                backward["reduce-scatter" if by_rows else "all-reduce"] += whole
            continue
        if order == "ap" and isinstance(split, ColwiseParallel) and not by_rows:
            backward["reduce-scatter"] += padded(shape, 2)
            step["all-gather"] += padded(shape, 2) // 2
        elif split is not None and not own:
            backward["all-reduce"] += whole
        if "s" in order:
            held = padded([shape[0] // 2, *shape[1:]] if own else shape, 2)
            forward["all-gather"] += held // 2
            backward["all-gather"] += held // 2 if name.startswith("blocks") else 0  # the root is still gathered
            backward["reduce-scatter"] += held
            step["all-gather"] += 0 if own or (split is None and by_rows) else held // 2
    attached, alike = step_of_parallel_model(order, selection), step_of_parallel_model(order, frozen)
    assert not alike[2]
    for sent, activations, numbers in zip(attached, alike, more, strict=True):
        assert sent == activations + Counter({what: count * BYTES for what, count in numbers.items()})


@pytest.mark.parametrize(
    ("order", "kind"),
    [
        ("pa", "per-row"),
        ("pa", "irregular"),
        ("ap", "columns"),
        ("ap", "rows"),
        ("pas", "per-row"),
        ("pas", "rows"),
        ("psa", "per-row"),
        ("psa", "irregular"),
    ],
)
def test_bytes_of_tensor_parallelism(ranks, order, kind):
    ranks.run(counted_beyond_frozen, order, kind)
