"""``gradsel demo``: GPS on real images in about a minute, on a CPU and without a download.

A small vision transformer learns the handwritten digits 0 to 4 and is then adapted to 5 to 9 from ten examples of
each, by six methods. :func:`attached` and :func:`adapt` are what fine-tuning with this library looks like; the rest is
data and table.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradsel
from gradsel.delta.delta import Delta, save_delta
from gradsel.delta.exporting import export
from gradsel.demo import plots
from gradsel.demo.training import accuracy, batches, fine_tune, jitter
from gradsel.papers.vit import VisionTransformer
from gradsel.ranking.policies import Policy

OLD, NEW = range(5), range(5, 10)
BATCH = 32


@dataclass(frozen=True)
class Settings:
    """Sizes of the network and of the runs; the learning rates in :data:`METHODS` were chosen for these defaults."""

    dim: int = 64
    depth: int = 4
    heads: int = 4
    pretrain_epochs: int = 80
    pretrain_rate: float = 2e-3
    shots: int = 10
    epochs: int = 100


class Split(NamedTuple):
    """Images [n, 1, 8, 8] and their classes [n], for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


# --- Methods -----------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A network that is ready to be adapted."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trained: int  # scalars
    delta_bytes: int  # what a file of the difference needs
    selection: gradsel.Selection | None = None


#: ``choose(model, data, seed)``
Chooser = Callable[[VisionTransformer, Split, int], gradsel.Selection]
#: ``start(model, data, seed)``
Starter = Callable[[VisionTransformer, Split, int], Task]


def attached(choose: Chooser, anchor: float = 0.0) -> Starter:
    """Trains what is chosen by attach() and MaskedAdam: backward forms no other gradients.

    Args:
        anchor: strength of the pull of all trained weights to their first values (GRFT, Alg. 1).
    """

    def start(model: VisionTransformer, data: Split, seed: int) -> Task:
        selection = choose(model, data, seed)
        gradsel.attach(model, selection)
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), anchor=anchor)
        return Task(model, optimizer, selection.trainable_count(), delta_bytes(selection), selection)

    return start


def full(model: VisionTransformer, data: Split, seed: int) -> Task:
    """Trains every weight with torch's Adam."""
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    return Task(model, torch.optim.Adam(parameters, fused=True), count, 4 * count)


def lora(rank: int) -> Starter:
    """Trains two thin matrices beside every matrix of the blocks, and the head: PEFT's LoRA (Hu et al. 2022)."""

    def start(model: VisionTransformer, data: Split, seed: int) -> Task:
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
            modules_to_save=["head"],
        )
        adapted = get_peft_model(model, config)
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in parameters)
        return Task(adapted, torch.optim.Adam(parameters, fused=True), count, 4 * count)

    return start


def linear_probe(model: VisionTransformer, data: Split, seed: int) -> gradsel.Selection:
    """The head alone."""
    return gradsel.select(model, None, None, criterion="random", freeze=["*"], whole=["head.*"], progress=False)


def chosen(policy: Policy | type[Policy], criterion: str = "gradient", *, head: bool = False) -> Chooser:
    """What a policy takes by a criterion, with gradients of the supervised contrastive loss.

    Args:
        policy: a policy, or a kind of policy with the budget of ``PerNeuron(1)``.
        criterion: a name that ``gradsel.select`` knows; ``"random"`` draws anew for every seed.
        head: take gradients of the head and cross-entropy instead.
    """

    def choose(model: VisionTransformer, data: Split, seed: int) -> gradsel.Selection:
        generator = torch.Generator().manual_seed(seed)

        def view(images: Tensor) -> Tensor:
            return jitter(images, generator)

        def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return gradsel.cross_entropy(model, (view(batch[0]), batch[1]))

        one_pass = batches(data.images, data.labels, BATCH, generator)
        loss = cross_entropy if head else gradsel.contrastive(augment=view)
        if isinstance(policy, Policy):
            budget = policy
        else:
            budget = gradsel.equal_budget(policy, gradsel.PerNeuron(1), gradsel.ranked_sizes(model).values())
        score = gradsel.random_scores(seed) if criterion == "random" else criterion
        return gradsel.select(model, one_pass, loss, budget, score, progress=False)

    return choose


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    rate: float
    start: Starter
    colour: str


#: The method whose first run is saved as a delta.
SAVED = "GPS K=1"

# Every rate is the best of RATES for its method by tune(), which adapts to images that the table does not use.
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
METHODS = (
    Method("linear probe", 1e-2, attached(linear_probe), plots.GREY),
    Method("full fine-tuning", 3e-3, full, plots.PINK),
    Method("LoRA r=8", 1e-2, lora(8), plots.SKY),
    Method("random K=1", 1e-1, attached(chosen(gradsel.PerNeuron(1), "random")), plots.ORANGE),
    Method("GPS K=1", 3e-2, attached(chosen(gradsel.PerNeuron(1))), plots.BLUE),
    Method("GPS K=3", 3e-2, attached(chosen(gradsel.PerNeuron(3))), plots.GREEN),
)


# --- Adapting a pre-trained network ------------------------------------------------------------------------------


@dataclass
class Outcome:
    """One adaptation: what it reached and what it cost."""

    accuracy: float
    trained: int
    parameters: int
    state_bytes: int
    delta_bytes: int
    step_ms: float
    used_columns: dict[str, float]
    distribution: dict[str, dict[str, float]]


def adapt(
    pretrained: VisionTransformer,
    method: Method,
    data: Split,
    seed: int,
    *,
    epochs: int,
    rate: float | None = None,
    title: str | None = None,
) -> tuple[nn.Module, Outcome]:
    """Fine-tunes a copy of ``pretrained`` on ``data``; ``rate`` overrides the method's learning rate."""
    model = fresh(pretrained, seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    task = method.start(model, data, seed)
    history = fine_tune(
        task.model, task.optimizer, data.images, data.labels,
        epochs=epochs, lr=rate or method.rate, batch_size=BATCH, seed=seed, progress=title,
    )  # fmt: skip
    return task.model, Outcome(
        accuracy=accuracy(task.model, data.test_images, data.test_labels),
        trained=task.trained,
        parameters=parameters,
        state_bytes=gradsel.state_bytes(task.optimizer),
        delta_bytes=task.delta_bytes,
        step_ms=1000 * statistics.median(history.seconds),
        used_columns={} if task.selection is None else used_columns(task.selection),
        distribution={} if task.selection is None else task.selection.by_block().shares(),
    )


def fresh(pretrained: VisionTransformer, seed: int) -> VisionTransformer:
    """What adapting begins with: a copy with a new head."""
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    model.reset_classifier(len(NEW))
    return model


def delta_bytes(selection: gradsel.Selection) -> int:
    """Bytes of the fine-tuned difference: 4 for a value, and 2 for the column of a selected entry."""
    return sum(4 * mask.nnz + 2 * sum(t.numel() for t in mask.tensors().values()) for mask in selection.values())


def used_columns(selection: gradsel.Selection) -> dict[str, float]:
    """For each matrix with K weights a neuron: how many percent of its inputs any neuron has selected."""
    return {
        name: 100 * mask.used_columns().numel() / math.prod(mask.shape[1:])
        for name, mask in selection.items()
        if mask.kind == "per-row"
    }


# --- Data and pre-training ---------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits as [n, 1, 8, 8] in -1 to 1, always in the same random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images[order], torch.tensor(data.target)[order]


def split(classes: range, shots: int | float, part: slice, seed: int = 0) -> Split:
    """Trains on a random ``shots`` of each class (a share of it, if below 1) and tests on the others.

    Args:
        part: which images of a class to use, as a slice of percentages.
    """
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in classes:
        of_class = (labels == label).nonzero().view(-1)
        of_class = of_class[len(of_class) * part.start // 100 : len(of_class) * part.stop // 100]
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        count = int(shots) if shots >= 1 else int(shots * len(of_class))
        train.append(of_class[:count])
        test.append(of_class[count:])
    learn, check = torch.cat(train), torch.cat(test)
    return Split(images[learn], labels[learn] - classes.start, images[check], labels[check] - classes.start)


def pretrain(settings: Settings, quiet: bool) -> tuple[VisionTransformer, float]:
    """A network that knows the old classes, and its accuracy on images of them that it has not seen."""
    torch.manual_seed(0)
    data = split(OLD, 0.85, slice(0, 100))
    model = VisionTransformer(8, 2, 1, settings.dim, settings.depth, settings.heads, num_classes=len(OLD))
    fine_tune(
        model, torch.optim.Adam(model.parameters(), fused=True), data.images, data.labels,
        epochs=settings.pretrain_epochs, lr=settings.pretrain_rate, batch_size=64,
        progress=None if quiet else "pre-training",
    )  # fmt: skip
    return model, accuracy(model, data.test_images, data.test_labels)


# A third of the images of the new classes chose the learning rates; only the others count in the table.
TUNING, REPORTED = slice(0, 33), slice(33, 100)


# --- Running it all ----------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One method over all seeds."""

    method: str
    rate: float
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def accuracies(self) -> list[float]:
        return [outcome.accuracy for outcome in self.outcomes]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def std(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.outcomes) > 1 else 0.0

    @property
    def trained_percent(self) -> float:
        return 100 * self.outcomes[0].trained / self.outcomes[0].parameters

    @property
    def step_ms(self) -> float:
        return statistics.median(outcome.step_ms for outcome in self.outcomes)

    def used_columns(self) -> dict[str, float]:
        """Mean over the seeds."""
        return {
            name: statistics.mean(outcome.used_columns[name] for outcome in self.outcomes)
            for name in self.outcomes[0].used_columns
        }


@dataclass
class SavedDelta:
    """Sizes of the files of one adapted network, which came back from them to the bit."""

    method: str
    delta_bytes: int
    checkpoint_bytes: int


@dataclass
class Results:
    """All that the table, the picture and the JSON file show."""

    settings: Settings
    seeds: list[int]
    pretrained_accuracy: float
    test_images: int
    rows: list[Row]
    delta: SavedDelta | None = None


def run(
    seeds: Sequence[int] = (0, 1, 2),
    quiet: bool = False,
    settings: Settings = Settings(),
    methods: Sequence[Method] = METHODS,
) -> Results:
    """Pre-trains once, then adapts with every method and seed: a seed draws examples, head, order and augmentation."""
    with _one_thread():
        pretrained, reached = pretrain(settings, quiet)
        results = Results(settings, list(seeds), reached, 0, [Row(method.name, method.rate) for method in methods])
        for seed in seeds:
            data = split(NEW, settings.shots, REPORTED, seed)
            results.test_images = len(data.test_labels)
            for method, row in zip(methods, results.rows, strict=True):
                title = None if quiet else f"seed {seed}, {method.name}"
                model, outcome = adapt(pretrained, method, data, seed, epochs=settings.epochs, title=title)
                row.outcomes.append(outcome)
                if method.name == SAVED and results.delta is None:
                    results.delta = SavedDelta(SAVED, *saved_bytes(model, fresh(pretrained, seed)))
        return results


def saved_bytes(model: nn.Module, base: nn.Module) -> tuple[int, int]:
    """Saves the difference of an attached network, and all of it; bytes of both files.

    Args:
        model: stays as it is.
        base: what its training began with. The difference is loaded into it, and taken out again.

    Raises:
        RuntimeError: they did not come back to the bit.
    """
    with tempfile.TemporaryDirectory() as folder:
        small, full = Path(folder) / "task.delta", Path(folder) / "model.safetensors"
        export(model, full)
        saved = save_delta(model, small)
        before = copy.deepcopy(base.state_dict())
        with Delta.load(small).applied(base):
            tuned = load_file(full)
            exact = all(torch.equal(tensor, tuned[name]) for name, tensor in base.state_dict().items())
        exact &= all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
        if not exact or Delta.load(small) != saved:
            raise RuntimeError("the saved difference did not come back to the bit; please report this")
        return small.stat().st_size, full.stat().st_size


def saved_line(saved: SavedDelta) -> str:
    """What :func:`saved_bytes` found, for people."""
    return (
        f"One run of {saved.method}: its file has {saved.delta_bytes:,} bytes, a full checkpoint "
        f"{saved.checkpoint_bytes:,}.\nSaved, loaded and taken out of the base again: every bit is right."
    )


def tune(
    draws: Sequence[int] = (100, 101, 102),
    settings: Settings = Settings(),
    methods: Sequence[Method] = METHODS,
    rates: Sequence[float] = RATES,
) -> dict[str, dict[float, float]]:
    """The accuracy of every method at each of the rates, mean over ``draws`` of the images set apart for it."""
    with _one_thread():
        pretrained, _ = pretrain(settings, quiet=False)
        return {
            method.name: {
                rate: statistics.mean(
                    adapt(
                        pretrained, method, split(NEW, settings.shots, TUNING, draw), draw,
                        epochs=settings.epochs, rate=rate, title=f"{method.name}, rate {rate:g}",
                    )[1].accuracy
                    for draw in draws
                )
                for rate in rates
            }
            for method in methods
        }  # fmt: skip


def table(results: Results) -> str:
    """The results as text."""
    parameters = results.rows[0].outcomes[0].parameters
    lines = [
        f"A ViT with {parameters:,} weights, {results.pretrained_accuracy:.1f} % right on digits {OLD[0]}-{OLD[-1]},",
        f"learns {NEW[0]}-{NEW[-1]} from {results.settings.shots} examples of each. "
        f"{results.test_images} test images, {len(results.seeds)} seeds.",
        "",
        f"{'method':<18}{'accuracy %':>13}{'trained %':>11}{'state B':>11}{'difference B':>14}{'ms a step':>11}",
    ]
    for row in results.rows:
        one = row.outcomes[0]
        reached = f"{row.mean:.1f} ± {row.std:.1f}" if len(row.outcomes) > 1 else f"{row.mean:.1f}"
        lines.append(
            f"{row.method:<18}{reached:>13}{row.trained_percent:>11.2f}"
            f"{one.state_bytes:>11,}{one.delta_bytes:>14,}{row.step_ms:>11.1f}"
        )
    lines += [
        "",
        "accuracy: mean and standard deviation over seeds. state: all of Adam's. difference: what a file of the",
        "fine-tuned weights needs. a step: median, on one thread; this network is so small that much of it is Python.",
    ]
    return "\n".join(lines)


def save(results: Results, path: Path) -> None:
    """Writes everything as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")


def draw(results: Results, path: Path) -> None:
    """The picture: what every method reaches, and how few inputs the chosen weights read."""
    colours = {method.name: method.colour for method in METHODS}
    sparse = {row.method: row.used_columns() for row in results.rows if row.outcomes[0].used_columns}
    drawing, (left, right) = plots.figure(2, 13, 5.6)
    plots.accuracies(
        left,
        {row.method: row.accuracies for row in results.rows},
        {row.method: f"{row.trained_percent:.3g} % of the weights" for row in results.rows},
        colours,
    )
    left.set_title(f"Digits {OLD[0]}-{OLD[-1]} to {NEW[0]}-{NEW[-1]}, {results.settings.shots} examples of each")
    plots.used_columns(right, sparse, colours)
    right.set_title("How much of each layer's input the selected weights read")
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(drawing, path)


@contextmanager
def _one_thread() -> Iterator[None]:
    # Matrices this small gain nothing from a second core, and the rounding must not depend on how many there are.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
