"""Tables in device memory for masked Adam: made once, used again while they hold, and captured in CUDA graphs.

A graph replays what was launched, with the addresses that were current, and nothing that the host did. So while a
stream is captured nothing is copied from the host: the table of an earlier step on the same tensors is used. Gradients
may lie elsewhere by then, because backward passes allocate them, and in a captured one from the graph's own memory. In
that case the graph gets a copy of the table, into which a kernel writes the new addresses, which it has as parameters.
The earlier step may have been made on another stream: torch.cuda.graph() begins by waiting for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gradsel_kernels._streams import is_capturing, stream_of
from gradsel_kernels.adam_item import ITEM_WORDS, WORD_OF
from gradsel_kernels.adam_table import AdamTable

#: Entries of one tile, 4 a thread: vectors of 16 bytes, and so few registers that occupancy hides scattered reads.
ENTRIES = 512
#: Words of a tensor's line: its AdamItem, and the number of its first tile.
LINE = ITEM_WORDS + 1
#: Addresses that one launch writes.
ADDRESSES = 32
_GRAD = WORD_OF["grad"]


class Prepared(NamedTuple):
    """A bucket ready to launch.

    Attributes:
        bucket: what its tensors share.
        members: their numbers in the call.
        table: int64 [tensors, LINE].
        tiles: the tensor of every tile, int32.
    """

    bucket: Any
    members: list[int]
    table: Tensor
    tiles: Tensor


#: A bucket, and the numbers of its tensors.
Buckets = Callable[[], list[tuple[Any, list[int]]]]

#: What graphs read, for as long as the first moments that they update.
_captured: WeakIdKeyDictionary = WeakIdKeyDictionary()


def of(table: AdamTable, variant: tuple, buckets: Buckets, moment: Tensor) -> list[Prepared]:
    """A table in device memory.

    Args:
        variant: what the compiled code depends on besides the table.
        buckets: finds the buckets.
        moment: the first moment of the first tensor.

    Raises:
        RuntimeError: the stream is being captured, and no such step has been made before.
    """
    key = (stream_of(moment.device), variant, table.words.tobytes())
    if is_capturing(moment.device):
        found = _for_graph(table, variant, key[-1], buckets)
        _captured.setdefault(moment, []).append(found)
        return found
    return table.prepared(key, lambda: _prepare(table, buckets(), moment.device))


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy for which the host does not wait; torch keeps the pinned source until it is done."""
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


def refuse_capture(what: str, device: torch.device) -> None:
    """Raises RuntimeError if the stream is being captured."""
    if is_capturing(device):
        raise RuntimeError(
            f"Triton's {what} cannot be captured in a CUDA graph, because it copies addresses from the host. Call it "
            "outside of the graph, or use the kernel in CUDA C++: gradsel_kernels.use_backend('cuda')"
        )


def _prepare(table: AdamTable, buckets: list[tuple[Any, list[int]]], device: torch.device) -> list[Prepared]:
    words = torch.frombuffer(table.words, dtype=torch.int64).view(-1, ITEM_WORDS)
    prepared = []
    for bucket, members in buckets:
        counts = [triton.cdiv(table.items[i].nnz, ENTRIES) for i in members]
        lines, tiles = lines_and_tiles(words[members], counts)
        prepared.append(Prepared(bucket, members, to_device(lines, device), to_device(tiles, device)))
    if device.type == "cuda":
        _load_writer(device)
    return prepared


def lines_and_tiles(words: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Items with the number of each one's first tile, and the item of every tile, given the items' counts of tiles."""
    first_tiles = list(itertools.accumulate(counts, initial=0))[:-1]
    lines = torch.cat([words, torch.tensor(first_tiles).unsqueeze(1)], dim=1)
    return lines, torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))


def _for_graph(table: AdamTable, variant: tuple, content: bytes, buckets: Buckets) -> list[Prepared]:
    """What an earlier step prepared; if gradients lie elsewhere now, a copy with their addresses."""
    same = table.earlier(lambda key: key[1:] == (variant, content))
    if same is not None:
        return same
    other = table.earlier(lambda key: key[1] == variant)  # as long as a table lives, only gradients change in it
    if other is None or [(each.bucket, each.members) for each in other] != buckets():
        raise RuntimeError(
            "this step of masked_adam_ is being captured in a CUDA graph, but none like it has been made before: its "
            "tensors, other than the gradients, or its options have changed, or it is the first one. Make a step with "
            "the same tensors and options outside of the graph, then capture; if tensors are replaced in between, for "
            "instance by load_state_dict(), make another one"
        )
    return [
        each._replace(table=_with_addresses(each.table, [table.items[i].grad for i in each.members])) for each in other
    ]


def _with_addresses(lines: Tensor, grads: list[int]) -> Tensor:
    """A copy of a bucket's lines with other gradients. Nothing comes from host memory."""
    lines = lines.clone()
    for first in range(0, len(grads), ADDRESSES):
        part = grads[first : first + ADDRESSES]
        _write_addresses[(1,)](
            lines[first:], len(part), *part, *[0] * (ADDRESSES - len(part)), FIELD=_GRAD, FIELDS=LINE, num_warps=1
        )
    return lines


@cache
def _load_writer(device: torch.device) -> None:
    """Compiles the kernel and loads it, which a capture does not allow."""
    _with_addresses(torch.zeros((1, LINE), dtype=torch.int64, device=device), [0])


_PARAMETERS = [f"a{i}" for i in range(ADDRESSES)]


@triton.jit(do_not_specialize=["count", *_PARAMETERS])
def _write_addresses(
    lines, count,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
    a8: tl.int64, a9: tl.int64, a10: tl.int64, a11: tl.int64, a12: tl.int64, a13: tl.int64, a14: tl.int64,
    a15: tl.int64, a16: tl.int64, a17: tl.int64, a18: tl.int64, a19: tl.int64, a20: tl.int64, a21: tl.int64,
    a22: tl.int64, a23: tl.int64, a24: tl.int64, a25: tl.int64, a26: tl.int64, a27: tl.int64, a28: tl.int64,
    a29: tl.int64, a30: tl.int64, a31: tl.int64,
    FIELD: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Writes one field of up to 32 lines."""
    addresses = (
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23,
        a24, a25, a26, a27, a28, a29, a30, a31,
    )  # fmt: skip
    for i in tl.static_range(32):
        if i < count:
            tl.store(lines + i * FIELDS + FIELD, addresses[i])
