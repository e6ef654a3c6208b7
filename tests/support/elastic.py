"""Training that torchrun restarts: two ranks of FSDP2, of which one is killed while a checkpoint is being written.

Started by ``torchrun ... tests/support/elastic.py FOLDER``. In the first attempt rank 1 writes its shards of the third
checkpoint and kills itself. The next attempt goes on from the last whole checkpoint, and then trains the same model
once more without checkpoints. Both results are saved.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import gradsel
from tests.support.sharded import OPTIMIZERS, batches, models, shard, share, whole_state
from tests.support.toy import cross_entropy

STEPS, KILLED_AT = 4, 3


class KilledWhileWriting(dcp.FileSystemWriter):
    """A rank's shards are on the disk, and nobody has said that the checkpoint is whole."""

    def write_data(self, *args, **kwargs):
        super().write_data(*args, **kwargs).wait()
        os.kill(os.getpid(), signal.SIGKILL)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    parts = get_state_dict(model, optimizer)
    return {"model": parts[0], "optimizer": parts[1]}


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint whose metadata, which are written when all ranks have written their shards, are there."""
    whole = [file.parent for file in folder.glob("step-*/.metadata")]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def train(folder: Path | None, writer: type[dcp.FileSystemWriter] | None = None) -> tuple[int, dict[str, Tensor]]:
    """Trains to the end.

    Args:
        folder: of checkpoints to go on from, and to write after each step; None: there are none.
        writer: of the checkpoint after step ``KILLED_AT``.

    Returns:
        The number of steps that were done before, and the trained state.
    """
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model, _, selection = models()
    gradsel.attach(model, selection)
    shard(model, mesh)
    optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(model))
    done = 0
    if folder is not None and (last := last_whole(folder)) is not None:
        done = int(last.name.removeprefix("step-"))
        state = state_of(model, optimizer)
        dcp.load(state, checkpoint_id=last)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for number, batch in enumerate(batches(count=STEPS)[done:], done + 1):
        optimizer.zero_grad()
        cross_entropy(model, share(batch, mesh)).backward()
        optimizer.step()
        if folder is not None:
            kind = writer if writer is not None and number == KILLED_AT else dcp.FileSystemWriter
            dcp.save(state_of(model, optimizer), storage_writer=kind(folder / f"step-{number}"))
    return done, whole_state(model)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", dist.get_rank()
    done, restarted = train(folder, KilledWhileWriting if first and rank == 1 else None)
    _, unkilled = train(None)
    torch.save({"done": done, "restarted": restarted, "unkilled": unkilled}, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()
    # FSDP2 keeps the group and gloo's threads, and one that drops its last tensor while Python ends aborts the process.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
