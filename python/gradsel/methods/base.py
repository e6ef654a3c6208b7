"""What every method has: options, how it prepares a model, its optimizer, and how its result is saved and loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.data import Dataset

from gradsel.parameters.names import strip_wrappers
from gradsel.parameters.rules import HEAD
from gradsel.selection.selection import Selection

#: Files of a result.
SELECTION, DELTA, WEIGHTS, BUFFERS, ADAPTER = (
    "selection.safetensors",
    "delta.safetensors",
    "weights.safetensors",
    "buffers.safetensors",
    "adapter",
)


@dataclass(frozen=True)
class Context:
    """What a method may need beyond the model and the batches.

    Attributes:
        head: names of the head's modules, as in :func:`gradsel.parameters.rules.parameter_rules`.
        seed: of everything random: masks, subsets, the initial values of adapters.
        progress: whether to show progress bars; None: only on a terminal.
        views: the inputs of a batch have several views of each sample, [batch, views, ...].
        selection: the selection of an earlier run, to continue with; then nothing is ranked.
        dataset, batches_of: the training set, and what makes batches of a part of it, for GRFT's data subsets.
    """

    head: Iterable[str] = HEAD
    seed: int = 0
    progress: bool | None = None
    views: bool = False
    selection: Selection | None = None
    dataset: Dataset | None = None
    batches_of: Callable[[Dataset], Iterable[Any]] | None = None


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for training.

    Attributes:
        model: the model to train, which may be wrapped.
        trained: number of trained scalars.
        total: number of parameters of the model, without those that the method added.
        selection: which entries of the model are trained; None: all of them.
        notes: what else there is to say, for tables and files.
    """

    model: nn.Module
    trained: int
    total: int
    selection: Selection | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Trained scalars, in percent of the parameters of the model."""
        return 100 * self.trained / max(self.total, 1)


@dataclass(frozen=True)
class Method(ABC):
    """One way to fine-tune. The fields of a subclass are its options, each with a ``help`` in its metadata.

    Attributes:
        name: what it is called on the command line.
        summary: one line about it.
        needs_batches: it looks at training data before training.
        rate: a learning rate to start from; the best one depends on the data.
        warmup: whether its paper warms up "inside" the epochs or "before" them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_batches: ClassVar[bool] = False
    rate: ClassVar[float] = 1e-3
    warmup: ClassVar[str] = "inside"

    @abstractmethod
    def prepare(
        self, model: nn.Module, batches: Iterable[Any] | None = None, context: Context | None = None
    ) -> Prepared:
        """Makes the model train what this method trains, and nothing else.

        Args:
            model: plain, on its device, with its new head. It may be changed in place.
            batches: of training data, for methods that rank by gradients; iterated over once or several times.
            context: see :class:`Context`; None for its defaults.
        """

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with the names of the parameters."""
        return [{"params": [(name, p) for name, p in model.named_parameters() if p.requires_grad]}]

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float = 0.0, decoupled: bool = True) -> Optimizer:
        """Adam for what is trained: AdamW if ``decoupled``, else Adam with weight decay as an L2 term."""
        kind = AdamW if decoupled else Adam
        return kind(self.groups(model), lr=lr, weight_decay=weight_decay, fused=True)

    @abstractmethod
    def save(self, prepared: Prepared, folder: Path) -> None:
        """Writes what training changed."""

    @abstractmethod
    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """Loads what :meth:`save` wrote into the model that training began with.

        Returns:
            The fine-tuned model, which may be wrapped.

        Raises:
            ValueError: the model is another one.
        """

    def options(self) -> dict[str, Any]:
        """The options by name, as they stand in configuration files."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.options().items() if value is not None)
        return f"{self.name} ({given})" if given else self.name


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a method: its default, and what ``--help`` says about it."""
    return field(default=default, metadata={"help": help, **metadata})


def count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that checkpoints contain, such as running statistics, by name."""
    return {strip_wrappers(name): tensor for name, tensor in _buffers(model)}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for short, tensor in module._buffers.items():
            if tensor is not None and short not in module._non_persistent_buffers_set:
                yield (f"{path}.{short}" if path else short), tensor
