"""The processes of one run, as ``torchrun`` and ``accelerate launch`` start them: one for each GPU, or on the CPU."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from gradsel.errors import OtherRankFailed, RunError, expected, one_line
from gradsel.nn.buffers import saved_buffers

T = TypeVar("T")
_FAILED = "gradsel/failed"


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: its number; rank 0 alone writes files and prints.
        count: of all processes.
        local_rank: its number on this machine, which is that of its GPU.
        group: the process group of all; None if there is only one process.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, batches: Sequence[T]) -> list[T]:
        """This process's part of a sequence: every ``count``-th element."""
        return list(batches[self.rank :: self.count])

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.group)
        return found

    def joined(self, shares: Sequence[T]) -> list[T]:
        """The inverse of :meth:`share`: the elements of all ranks in their original order, on every rank."""
        parts = self.gather(list(shares))
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self.group)
        return held[0]

    def any(self, value: bool) -> bool:
        """Whether the value is true on any rank."""
        if self.group is None:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around preparations: an error of one rank stops all of them, before any waits for another.

        Every rank has to reach the end of the block. What users gave and does not fit is :class:`RunError`.

        Raises:
            OtherRankFailed: on all ranks but the first that failed, which raises its own error.
        """
        failure: Exception | None = None
        try:
            with expected():
                yield
        except Exception as error:
            failure = error
        own = None if failure is None or isinstance(failure, OtherRankFailed) else one_line(failure)
        for rank, told in enumerate(self.gather(own)):
            if told is not None and rank != self.rank:
                other = OtherRankFailed(f"rank {rank} failed: {told}")
                other.together = True
                raise other from failure
            if told is not None:
                if isinstance(failure, RunError) and self.count > 1:
                    failure.told = failure.together = True
                break
        if failure is not None:
            raise failure

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around training, where ranks wait for each other: one that fails leaves a note before it ends.

        Raises:
            OtherRankFailed: this rank's error is the consequence of another's, whose process has ended.
            RunError: another process was killed.
        """
        try:
            yield
        except Exception as error:
            if self.group is None or isinstance(error, OtherRankFailed):
                raise
            try:
                store = dist.distributed_c10d._get_default_store()
                failed = int(store.compare_set(_FAILED, "", str(self.rank)))
            except Exception:  # the store was in the process that has ended
                failed = 0
            if failed != self.rank:
                raise OtherRankFailed(f"rank {failed} failed during training") from error
            if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
                lost = RunError(
                    "another process of the run was killed; gradsel resume goes on from its last checkpoint"
                )
                lost.told = True
                raise lost from error
            if isinstance(error, RunError):
                error.told = True  # the others only know that this rank has failed
            raise

    def same_buffers(self, model: nn.Module) -> None:
        """Gives all ranks the buffers of rank 0, such as running statistics, as DistributedDataParallel does."""
        if self.group is not None:
            with torch.no_grad():
                for buffer in saved_buffers(model).values():
                    dist.broadcast(buffer, src=0, group=self.group)


ALONE = Processes()


def join(device: str = "auto") -> Processes:
    """Joins the other processes of the run, if the environment says that there are some.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``. Processes talk over gloo on the CPU and over NCCL on GPUs.

    Raises:
        RunError: the launcher has set ``WORLD_SIZE``, but not what else is needed.
    """
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            return ALONE
    elif int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    else:
        on_gpu = device != "cpu" and torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if on_gpu and local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        with expected():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        atexit.register(_leave)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return Processes(dist.get_rank(), dist.get_world_size(), local, dist.group.WORLD)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # what still holds the group keeps gloo's threads, which can abort a process while Python ends


def require_count(checkpoint: Path, count: int) -> None:
    """Refuses to resume on another number of processes: they would see other batches and random numbers.

    Raises:
        RunError: the checkpoint was written by another number of processes.
    """
    before = 1 if (checkpoint / "rng_state.pth").exists() else len(list(checkpoint.glob("rng_state_*.pth")))
    if before != count:
        how = "without torchrun" if before == 1 else f"by torchrun --nproc-per-node {before}"
        raise RunError(
            f"{checkpoint} was written by a run of {before}, not of {count}, processes; start it {how}, so that it "
            "ends with the same bits"
        )
