"""Sparse adapters of PEFT with and without ``gradsel.peft.accelerate``: ``python -m benchmarks.training.peft_layers``.

One MLP block, forward and backward, in interleaved rounds; the time is the fastest of a round, as other work on the
machine only adds to it. Saved bytes are those that forward keeps for backward, without parameters and the input.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import peft
import torch
from torch import Tensor, nn

from benchmarks.harness.environment import machine
from gradsel.peft import accelerate

TARGETS = ["up", "down"]
CONFIGS = {
    "SHiRA, r = 8": lambda: peft.ShiraConfig(r=8, target_modules=TARGETS),
    "Super-Tuning, 1 %": lambda: peft.SupertuningConfig(sparsity=0.99, target_modules=TARGETS),
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    known = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    found = {}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_sparse and tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=197 * 4)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(machine())
    x = torch.randn(arguments.tokens, arguments.width, requires_grad=True)
    print("adapter | PEFT ms | ours ms | PEFT saved MB | ours saved MB")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        theirs = peft.get_peft_model(Block(arguments.width), config())
        models = [theirs, accelerate(copy.deepcopy(theirs))]
        times: list[list[float]] = [[], []]
        for _ in range(arguments.rounds):
            for own, model in zip(times, models, strict=True):
                start = time.perf_counter()
                model(x).sum().backward()
                own.append(time.perf_counter() - start)
        fastest = " | ".join(f"{min(own) * 1e3:.1f}" for own in times)
        print(f"{name} | {fastest} | {' | '.join(f'{saved_bytes(m, x) / 1e6:.1f}' for m in models)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
