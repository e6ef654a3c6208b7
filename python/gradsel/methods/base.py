"""What every method has: options, how it prepares a model, its optimizer, and how its result is saved and loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.data import Dataset

from gradsel.errors import did_you_mean
from gradsel.parameters.rules import HEAD, RuleOptions
from gradsel.selection.selection import Selection

#: Files of a result.
SELECTION, DELTA, WEIGHTS, BUFFERS, ADDITIONS, ADAPTER = (
    "selection.safetensors",
    "delta.safetensors",
    "weights.safetensors",
    "buffers.safetensors",
    "additions.safetensors",
    "adapter",
)


@dataclass(frozen=True)
class Parts:
    """Parameters by name, for models whose layers do not tell by kind and name what becomes of them.

    Attributes:
        head: trained whole by every method, like the modules that :attr:`Context.head` names, but with the norms and
            embeddings among them.
        whole, frozen: trained whole, or frozen, where all else is ranked.
        unused: without influence on the loss; no method trains them.
    """

    head: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def rules(self, head: Iterable[str]) -> RuleOptions:
        """The arguments of :func:`gradsel.parameters.rules.parameter_rules`.

        Args:
            head: as in :attr:`Context.head`.
        """
        return {"head": head, "whole": (*self.head, *self.whole), "freeze": (*self.frozen, *self.unused)}


NO_PARTS = Parts()


@dataclass(frozen=True)
class Context:
    """What a method may need beyond the model and the batches.

    Attributes:
        head: names of the head's modules, as in :func:`gradsel.parameters.rules.parameter_rules`.
        parts: what becomes of parameters that the general rules would treat otherwise.
        loss: ``loss(model, batch)``, that of training, for methods whose own loss is ``"task"``.
        rate: learning rate of the training that follows; None: the method's own.
        seed: of everything random: masks, subsets, the initial values of adapters.
        progress: whether to show progress bars; None: only on a terminal.
        views: the inputs of a batch have several views of each sample, [batch, views, ...].
        selection: the selection of an earlier run, to continue with; then nothing is ranked.
        dataset, batches_of: the training set, and what makes batches of a part of it, for GRFT's data subsets.
        process_group: processes that each have batches of their own share of the data, and select together.
    """

    head: Iterable[str] = HEAD
    parts: Parts = field(default_factory=Parts)
    loss: Callable[[Any, Any], Tensor] | None = None
    rate: float | None = None
    seed: int = 0
    progress: bool | None = None
    views: bool = False
    selection: Selection | None = None
    dataset: Dataset | None = None
    batches_of: Callable[[Dataset], Iterable[Any]] | None = None
    process_group: ProcessGroup | None = None


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for training.

    Attributes:
        model: the model to train, which may be wrapped.
        trained: number of trained scalars.
        total: number of parameters of the model, without those that the method added.
        selection: which entries of the model are trained; None: all of them.
    """

    model: nn.Module
    trained: int
    total: int
    selection: Selection | None = None

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
    def trained_on(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> int:
        """The number of scalars that this method trains in a model, from shapes alone; the model may be on meta.

        Raises:
            ValueError: the method does not fit the model.
        """

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

    def groups(self, model: nn.Module, head: Iterable[str] = HEAD) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with the names of the parameters.

        Args:
            head: names of the head's modules or parameters, as in :attr:`Context.head`.
        """
        return [{"params": [(name, p) for name, p in model.named_parameters() if p.requires_grad]}]

    def optimizer(
        self, model: nn.Module, lr: float, weight_decay: float = 0.0, decoupled: bool = True,
        head: Iterable[str] = HEAD,
    ) -> Optimizer:  # fmt: skip
        """Adam for what is trained: AdamW if ``decoupled``, else Adam with weight decay as an L2 term.

        Args:
            head: as for :meth:`groups`.
        """
        kind = AdamW if decoupled else Adam
        return kind(self.groups(model, head), lr=lr, weight_decay=weight_decay, fused=True)

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

    def merge(self, model: nn.Module) -> nn.Module:
        """The plain model that computes the same, with nothing beside its weights.

        Args:
            model: ``Prepared.model`` after training, or what :meth:`load` returned. It may be changed in place.

        Raises:
            ValueError: the method adds something that weights cannot hold.
        """
        raise ValueError(f"{self.name} cannot be merged: what it adds is no linear change of the model's weights")

    def options(self) -> dict[str, Any]:
        """The options by name, as they stand in configuration files."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.options().items() if value is not None)
        return f"{self.name} ({given})" if given else self.name


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a method: its default, and what ``--help`` says about it."""
    return field(default=default, metadata={"help": help, **metadata})


def require_one_of(name: str, value: Any, known: Collection[str]) -> None:
    """
    Raises:
        ValueError: an option has a value that is none of these.
    """
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}{did_you_mean(str(value), known)}")


def require_count(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: an option is no integer from 1 on.
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
