"""Bytes and milliseconds of a weight sync on the CPU: ``python -m benchmarks.training.weight_sync``.

The model is shaped like Llama-3.2-1B, with random bfloat16 weights, K = 1 of every neuron in attention and MLP. Every
trained value moves between two syncs. Three ways to tell a server:

- patches: ``gradsel.patches(model, since)``, which knows the trained entries;
- dense: all weights, as a broadcast sends them; the time is that of one copy, without any network;
- diffing: every weight is compared with a copy of the last sync, and the entries that differ are taken.

All times are medians without a network; the extra memory is the rise of the process's peak, as Linux counts it.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from torch import Tensor, nn

import gradsel
from benchmarks.harness.environment import machine
from benchmarks.selection.select_memory import build, peak_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = build(arguments.small)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    rules = {"kinds": {"bias": "freeze"}}
    selection = gradsel.select(model, None, None, gradsel.PerNeuron(1), "random", progress=False, **rules)
    gradsel.attach(model, selection)
    total = sum(tensor.nbytes for tensor in base.values())
    print(f"{machine()}")
    print(f"{selection.trainable_count():,} of {sum(t.numel() for t in base.values()):,} entries are trained")
    last = gradsel.patches(model)
    rows: dict[str, list[tuple[int, float, int]]] = {"patches": [], "dense": [], "diffing": []}
    for _ in range(arguments.rounds):
        moved(model)
        gradsel.sync(model)
        floor = peak_of(lambda: None)[1]
        (last, data), peak, seconds = peak_of(lambda since=last: sent(model, since))
        rows["patches"].append((len(data), seconds, peak - floor))
        weights = {name: p.detach() for name, p in model.named_parameters() if name in base}
        floor = peak_of(lambda: None)[1]
        copied, peak, seconds = peak_of(lambda own=weights: [tensor.clone() for tensor in own.values()])
        del copied
        rows["dense"].append((total, seconds, peak - floor))
        floor = peak_of(lambda: None)[1]
        size, peak, seconds = peak_of(lambda own=weights: differences(own, base))
        rows["diffing"].append((size, seconds, peak - floor + total))
    print("way | MB | ms | extra memory in MB")
    for way, found in rows.items():
        size, seconds, memory = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{way} | {size / 1e6:,.2f} | {seconds * 1e3:,.0f} | {memory / 1e6:,.0f}")


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for values in gradsel.trainable_parameters(model):
            values.add_(torch.randn_like(values) * 0.1)


def sent(model: nn.Module, since: gradsel.Patches) -> tuple[gradsel.Patches, bytes]:
    update = gradsel.patches(model, since)
    return update, update.to_bytes()


def differences(weights: dict[str, Tensor], before: dict[str, Tensor]) -> int:
    """Bytes of the entries that differ; ``before`` follows."""
    size = 0
    for name, weight in weights.items():
        places = (weight != before[name]).view(-1).nonzero().view(-1)
        if places.numel():
            values = weight.view(-1)[places]
            before[name].view(-1)[places] = values
            size += values.nbytes + places.to(torch.int32).nbytes
    return size


if __name__ == "__main__":
    sys.exit(main())
