"""Time and memory of a training step of every method of the table: ``python -m benchmarks.transfers.cost FOLDER``.

FOLDER is that of ``python -m benchmarks.transfers``, which has the data and models. Weights are ranked on a few batches
of the training set, and steps are taken on one. Each method has a process of its own, forked when everything is
imported. The peak is that of the whole process as Linux counts it (VmHWM, reset after the first steps); the row
"nothing" is a process that loads no model. Results go to ``benchmarks/results/transfers-cost-cpu.csv``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft  # noqa: F401  imported here, so that every process has it from the start
import timm  # noqa: F401
import torch

from benchmarks.harness.environment import MACHINE, RESULTS, machine
from benchmarks.harness.results import merge
from benchmarks.selection.select_memory import peak_of
from benchmarks.transfers.data import DIGITS, REVIEWS
from benchmarks.transfers.plan import TABLE, settings
from gradsel.experiments.comparing import Contestant
from gradsel.methods import Context
from gradsel.training.parts import load_parts
from gradsel.training.processes import ALONE
from gradsel.training.recipe import Recipe

FIELDS = ["transfer", "method", "steps", "step_ms", "peak_bytes", *MACHINE]
KEY = ("transfer", "method", "device", "threads")
FILE = RESULTS / "transfers-cost-cpu.csv"
NOTHING = "nothing"
WARM_UP, STEPS = 3, 15
#: Batches that weights are ranked on.
RANKED = 4
#: So low that the last step does the same work as the first.
RATE = 1e-6


def measured(root: Path, transfer: str, text: str) -> dict[str, Any]:
    """A row about a method, in this process."""
    if text == NOTHING:
        return {"transfer": transfer, "method": text, "steps": "", "step_ms": "", "peak_bytes": peak_of(int)[1]}
    how = Contestant.of(text).how
    step = step_of(root, transfer, text)
    for _ in range(WARM_UP):
        step()
    took: list[float] = []

    def steps() -> None:
        for _ in range(STEPS):
            start = time.perf_counter()
            step()
            took.append(time.perf_counter() - start)

    _, peak, _ = peak_of(steps)
    print(f"{transfer}, {how}: {1000 * statistics.median(took):.0f} ms, {peak / 1e6:.0f} MB", file=sys.stderr)
    return {
        "transfer": transfer, "method": text, "steps": STEPS, "step_ms": f"{1000 * statistics.median(took):.4g}",
        "peak_bytes": peak,
    }  # fmt: skip


def step_of(root: Path, transfer: str, text: str) -> Callable[[], None]:
    """What takes a step of a method on a batch of the training set."""
    how = Contestant.of(text).how
    options = {name: value for name, value in how.options().items() if value is not None}
    changes = {"method.name": how.name, "method.options": options}
    config = settings(root, transfer, root).replaced(changes)
    parts = load_parts(config, ALONE)
    model, recipe = parts.loaded.model, parts.recipe
    datasets, _, _ = parts.task.datasets(parts.data.splits, parts.loaded, config)
    samples: Any = datasets["train"]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    size, collate = config.recipe.batch_size, parts.task.collate(parts.loaded)
    batches = [
        collate([samples[number] for number in order[start : start + size]]) for start in range(0, RANKED * size, size)
    ]
    context = Context(head=parts.loaded.head, parts=parts.loaded.parts, progress=False)
    prepared = how.prepare(model, batches if how.needs_batches else None, context).model.train()
    batch = batches[0]
    optimizer = how.optimizer(prepared, RATE, decoupled=False, head=(*parts.loaded.head, *parts.loaded.parts.head))
    return lambda: _step(prepared, optimizer, recipe, dict(batch))


def _step(model: Any, optimizer: Any, recipe: Recipe, inputs: dict[str, Any]) -> None:
    labels = inputs.pop("labels")
    optimizer.zero_grad()
    recipe.loss(recipe.outputs(model, inputs), labels).backward()
    optimizer.step()


def _measure(sender: Connection, root: Path, transfer: str, text: str) -> None:
    sender.send(measured(root, transfer, text))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfers.cost", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that of python -m benchmarks.transfers")
    parser.add_argument("--only", choices=(REVIEWS, DIGITS), help="one of the transfers")
    arguments = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("peak memory is measured through /proc, which this system does not have")
    forking = multiprocessing.get_context("fork")
    for transfer in (REVIEWS, DIGITS) if arguments.only is None else (arguments.only,):
        rows = []
        for text in (NOTHING, *TABLE[transfer]):
            receiver, sender = forking.Pipe(duplex=False)
            process = forking.Process(target=_measure, args=(sender, arguments.folder, transfer, text))
            process.start()
            sender.close()
            try:
                rows.append({**receiver.recv(), **machine()})
            except EOFError:
                sys.exit(f"{transfer}, {text}: failed, see above")
            process.join()
        merge(FILE, FIELDS, KEY, rows, ordered=False)


if __name__ == "__main__":
    main()
