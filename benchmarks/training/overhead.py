"""What the Trainer, selection and the command line cost: ``python -m benchmarks.training.overhead``.

- A training step of :class:`gradsel.training.Trainer`, as ``gradsel finetune`` sets it up, against the same step in a
  bare loop: another copy of the model, the same optimizer, schedule and batches. The bare step is taken inside a
  callback of the Trainer, so that the two alternate and a busy machine slows both.
- Selection on some batches against full fine-tuning and GPS on as many, in turn. A pass of selection computes every
  gradient once, as full fine-tuning does; with two views of each image it computes twice as many.
- ``gradsel finetune --help`` against starting Python, each in a new process, which must not import torch.

Steps and selection are timed by the CPU time of one thread, because it does not count what other processes take;
``gradsel --help`` by the wall clock. The ratio is the median over the pairs.

Results go to ``benchmarks/results/overhead-cpu.csv``; rows of an earlier run with the same key are replaced. ``load``
is the machine's load average over 15 minutes at the beginning.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import gradsel
from benchmarks.harness.environment import MACHINE, RESULTS, ROOT, machine
from benchmarks.harness.results import merge
from benchmarks.harness.timing import interleaved
from gradsel.experiments.cost.timing import percentiles
from gradsel.methods import Context, Method, method
from gradsel.training.config import RecipeConfig
from gradsel.training.models import logits_of
from gradsel.training.recipe import Recipe
from gradsel.training.seconds import Seconds
from gradsel.training.trainer import Epochs, StopCleanly, Trainer

FIELDS = [
    "benchmark", "size", "provider", "clock", "p20_ms", "p50_ms", "p80_ms", "rounds", "baseline", "ratio", "goal",
    "load", "transformers", *MACHINE,
]  # fmt: skip
KEY = ("benchmark", "size", "provider", "device", "threads")
STEP, SELECTION, HELP = "training step", "selection", "gradsel --help"
FULL_EPOCH = "an epoch of full fine-tuning"
WARM_UP = 3
Sample = dict[str, Any]


# --- Cases -------------------------------------------------------------------------------------------------------


def images(batch: int, views: int | None = None) -> Sample:
    """One batch of random images; with several views of each, [batch, views, 3, 224, 224]."""
    shape = (batch, 3, 224, 224) if views is None else (batch, views, 3, 224, 224)
    return {"pixel_values": torch.randn(shape), "labels": torch.arange(batch) % 4}


def texts(batch: int, length: int) -> Sample:
    ids = torch.randint(1000, 20000, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch) % 4}


def vit(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=10)


def minilm() -> nn.Module:
    """MiniLM-L6 with random weights."""
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=10
        )
    )


#: Size, model, a batch for training, and the batches that its selection sees.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Sample], dict[str, Callable[[], Sample]]]] = {
    "ViT-Ti/16, batch 8": (
        lambda: vit("vit_tiny_patch16_224"),
        lambda: images(8),
        {"one view": lambda: images(8), "two views": lambda: images(8, 2)},
    ),
    "MiniLM-L6, batch 8, 64 tokens": (minilm, lambda: texts(8, 64), {"one view": lambda: texts(8, 64)}),
}
SMALL: dict[str, Any] = {
    "tiny ViT, batch 8": (
        lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2, num_classes=10),
        lambda: images(8),
        {"one view": lambda: images(8), "two views": lambda: images(8, 2)},
    )
}


class Repeated(torch.utils.data.Dataset[Sample]):
    """The samples of one batch, again and again."""

    def __init__(self, batch: Sample, batches: int) -> None:
        self.batch, self.size, self.batches = batch, len(batch["labels"]), batches

    def __len__(self) -> int:
        return self.size * self.batches

    def __getitem__(self, index: int) -> Sample:
        return {name: tensor[index % self.size] for name, tensor in self.batch.items()}


def collate(samples: Sequence[Sample]) -> Sample:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


# --- A step ------------------------------------------------------------------------------------------------------


class BareLoop:
    """What a short script does: one step at a time, with nothing around it."""

    def __init__(self, model: nn.Module, dataset: Repeated, how: Method, recipe: Recipe) -> None:
        self.model = model
        self.optimizer = how.optimizer(model, recipe.rate, decoupled=False)
        self.scheduler = LambdaLR(self.optimizer, recipe.factor(dataset.batches))
        self.loader = iter(DataLoader(dataset, dataset.size, shuffle=True, collate_fn=collate))
        self.recipe, self.loss = recipe, torch.zeros(())

    def step(self) -> None:
        batch = next(self.loader)
        labels = batch.pop("labels")
        self.model.train()
        loss = self.recipe.loss(logits_of(self.model, batch), labels)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.loss += loss.detach()


class Alternating(transformers.TrainerCallback):
    """After each step of the Trainer, takes one of the bare loop; times both."""

    def __init__(self, bare: BareLoop) -> None:
        self.bare = bare
        self.trainer: list[float] = []
        self.loop: list[float] = []
        self.begun = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time()
        self.trainer.append(now - self.begun)
        self.bare.step()
        self.begun = time.process_time()
        self.loop.append(self.begun - now)


def step_times(make: Callable[[], nn.Module], batch: Sample, rounds: int) -> dict[str, list[float]]:
    """Seconds of the steps of both, pair by pair."""
    how = method("gps")
    recipe = Recipe(RecipeConfig(epochs=1, warmup_epochs=0.1), how, 10)
    dataset = Repeated(batch, WARM_UP + rounds)
    model = make().eval()
    selection = how.prepare(copy.deepcopy(model), [batch], Context(progress=False)).selection
    assert selection is not None
    models = [copy.deepcopy(model) for _ in range(2)]
    for each in models:
        gradsel.attach(each, selection)
    timer = Alternating(BareLoop(models[0], dataset, how, recipe))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, num_train_epochs=1, per_device_train_batch_size=dataset.size, max_grad_norm=0.0,
            learning_rate=recipe.rate, use_cpu=True, save_strategy="no", logging_strategy="epoch", report_to="none",
            remove_unused_columns=False, label_names=["labels"], disable_tqdm=True,
        )  # fmt: skip
        stopping = StopCleanly()
        callbacks = [Seconds(Path(folder) / "seconds.json"), Epochs(), stopping, timer]
        trainer = Trainer(models[1], arguments, collate, dataset, callbacks=callbacks, method=how, recipe=recipe)
        trainer.remove_callback(transformers.PrinterCallback)
        try:
            trainer.train()
        finally:
            stopping.release()
    return {"bare loop": timer.loop[WARM_UP:], "Trainer": timer.trainer[WARM_UP:]}


# --- Selection ---------------------------------------------------------------------------------------------------


def selection_times(
    make: Callable[[], nn.Module], batch: Sample, ranking: Sample, views: bool, rounds: int, batches: int = 4
) -> dict[str, list[float]]:
    """Seconds of selecting on some batches, and of training on as many, all parameters or a selection."""
    how = method("gps")
    recipe = Recipe(RecipeConfig(epochs=1), how, 10)
    model = make().eval()
    plain = copy.deepcopy(model)  # not attached
    selection = how.prepare(copy.deepcopy(model), [ranking], Context(views=views, progress=False)).selection
    assert selection is not None
    gradsel.attach(model, selection)
    dataset = Repeated(batch, (rounds + 1) * batches)
    bare, whole = BareLoop(model, dataset, how, recipe), method("full")
    full = BareLoop(whole.prepare(copy.deepcopy(plain)).model, dataset, whole, recipe)
    choose = functools.partial(how.choose, plain, [ranking] * batches, Context(views=views, progress=False))
    runs = {
        FULL_EPOCH: lambda: [full.step() for _ in range(batches)],
        "an epoch of GPS": lambda: [bare.step() for _ in range(batches)],
        "select()": choose,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: values[1:] for name, values in seconds.items()}


# --- The command line --------------------------------------------------------------------------------------------

_HELP = """
import sys
from gradsel.cli.main import main
try:
    main(["finetune", "--help"])
except SystemExit:
    pass
sys.exit("torch" in sys.modules)
"""


def help_times(rounds: int) -> dict[str, list[float]]:
    """Seconds of new processes. Raises CalledProcessError if torch is imported."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}"}

    def process(code: str) -> Callable[[], object]:
        command = [sys.executable, "-c", code]
        return lambda: subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

    return interleaved({"python": lambda: process("pass"), "gradsel": lambda: process(_HELP)}, rounds, warm_up=0)


# --- Results -----------------------------------------------------------------------------------------------------


def rows(benchmark: str, size: str, seconds: dict[str, list[float]], goal: str, load: float) -> list[dict[str, Any]]:
    """One row for each contender, the baseline first; the ratio is the median of those of all pairs."""
    baseline = next(iter(seconds))
    found = []
    for name, values in seconds.items():
        ratios = [one / other for one, other in zip(values, seconds[baseline], strict=True)]
        p20, p50, p80 = (f"{1e3 * value:.2f}" for value in percentiles(values))
        found.append(
            {
                "benchmark": benchmark, "size": size, "provider": name,
                "clock": "wall" if benchmark == HELP else "cpu", "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
                "rounds": len(values), "baseline": baseline, "ratio": f"{percentiles(ratios)[1]:.3f}",
                "goal": goal if name == list(seconds)[-1] else "", "load": f"{load:.1f}",
                "transformers": transformers.__version__, **machine(),
            }
        )  # fmt: skip
        print(f"{benchmark:<16}{size:<42}{name:<30}{float(p50):10.1f} ms {found[-1]['ratio']:>8}  {found[-1]['goal']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="pairs of each (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program; writes nothing")
    arguments = parser.parse_args()
    rounds = 3 if arguments.small else arguments.rounds
    load = os.getloadavg()[2]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    measured = rows(HELP, "", help_times(rounds), "under 500 ms, without torch", load)
    for size, (make, batch, ranking) in (SMALL if arguments.small else CASES).items():
        measured += rows(STEP, size, step_times(make, batch(), rounds), "at most 1.03", load)
        for views, of in ranking.items():
            given = of()
            found = selection_times(make, batch(), given, views == "two views", max(rounds // 5, 2))
            measured += rows(SELECTION, f"{size}, {views}", found, "at most 1", load)
    if not arguments.small:
        merge(RESULTS / "overhead-cpu.csv", FIELDS, KEY, measured)


if __name__ == "__main__":
    main()
