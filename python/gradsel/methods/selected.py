"""Methods that train a selection of the model's entries: GPS, GRFT, biases, the head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsel.delta.delta import Delta
from gradsel.methods.base import DELTA, SELECTION, Context, Method, Prepared, count, option, saved_buffers
from gradsel.nn.attaching import attach
from gradsel.optim.adamw import MaskedAdamW
from gradsel.optim.anchoring import anchored_groups
from gradsel.optim.optimizer import MaskedAdam
from gradsel.parameters.names import did_you_mean, named_parameters
from gradsel.parameters.rules import HEAD, KINDS
from gradsel.ranking.criteria import Criterion, random_scores
from gradsel.ranking.losses import contrastive, cross_entropy
from gradsel.ranking.policies import Columns, PerNeuron, Policy, Rows
from gradsel.ranking.pooling import features
from gradsel.ranking.selecting import select
from gradsel.ranking.subsets import easiest_subset
from gradsel.selection.selection import Selection

CRITERIA = ("gradient", "absolute", "fisher", "snip", "magnitude", "random")
LOSSES = ("contrastive", "cross-entropy")


@dataclass(frozen=True)
class Selected(Method):
    """A method that attaches the model to a selection, so that nothing else gets a gradient."""

    @abstractmethod
    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        """The selection to train."""

    def prepare(
        self, model: nn.Module, batches: Iterable[Any] | None = None, context: Context | None = None
    ) -> Prepared:
        context = context or Context()
        total = count(model)
        selection = context.selection
        if selection is None:
            if self.needs_batches and batches is None:
                raise ValueError(f"{self.name} ranks weights by their gradients on training data: pass batches")
            selection = self.choose(model, batches, context)
        else:
            selection.check(model)
        notes = {"buffers": {name: tensor.detach().clone() for name, tensor in saved_buffers(model).items()}}
        attach(model, selection)
        return Prepared(model, selection.trainable_count(), total, selection, notes)

    def optimizer(self, model: nn.Module, lr: float, weight_decay: float = 0.0, decoupled: bool = True) -> Optimizer:
        kind = MaskedAdamW if decoupled else MaskedAdam
        return kind(self.groups(model), lr=lr, weight_decay=weight_decay)

    def save(self, prepared: Prepared, folder: Path) -> None:
        assert prepared.selection is not None
        prepared.selection.save(folder / SELECTION)
        delta = Delta.of(prepared.model, selection=prepared.selection, base=prepared.notes["buffers"] or None)
        delta.save(folder / DELTA)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        Selection.load(folder / SELECTION, model)
        delta = Delta.load(folder / DELTA)
        # Of parameters trained whole nothing of the base is left, so a new head may have been initialised otherwise.
        whole = {name: part for name, part in delta.items() if part.mask.is_whole}
        Delta({name: part for name, part in delta.items() if name not in whole}).apply_(model)
        Delta(whole).apply_(model, force=True)
        return model


@dataclass(frozen=True)
class Ranked(Selected):
    """A method that ranks weights by their gradients on the training set."""

    needs_batches: ClassVar[bool] = True
    criterion: str = option("gradient", f"what weights are ranked by: {', '.join(CRITERIA)}", choices=CRITERIA)
    loss: str = option("contrastive", "loss whose gradient is taken: contrastive or cross-entropy", choices=LOSSES)

    def __post_init__(self) -> None:
        _one_of("criterion", self.criterion, CRITERIA)
        _one_of("loss", self.loss, LOSSES)

    @abstractmethod
    def policy(self) -> Policy:
        """How many entries are trained, and which compete."""

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        criterion: str | Criterion = random_scores(context.seed) if self.criterion == "random" else self.criterion
        return select(
            model, batches, self.loss_for(model, context.views), self.policy(), criterion,
            head=context.head, progress=context.progress,
        )  # fmt: skip

    def loss_for(self, model: nn.Module, views: bool) -> Any:
        """``loss(model, batch)``; with several views of each sample in a batch, each of them counts."""
        if self.loss == "contrastive":
            pooled = features(model)
            if not views:
                return contrastive(pooled)

            def of_views(model: Any, inputs: Any) -> Tensor:
                flat, shape = _flattened(inputs)
                return pooled(model, flat).unflatten(0, shape)

            return contrastive(of_views, views=True)
        if not views:
            return _supervised

        def loss(model: Any, batch: Any) -> Tensor:
            flat, shape = _flattened({name: value for name, value in batch.items() if name != "labels"})
            return _supervised(model, {**flat, "labels": batch["labels"].repeat_interleave(shape[1])})

        return loss


@dataclass(frozen=True)
class GPS(Ranked):
    """Gradient-based parameter selection (Zhang et al., CVPR 2024): the K best weights of every neuron."""

    name: ClassVar[str] = "gps"
    summary: ClassVar[str] = "the k weights of every neuron with the largest gradient, all biases, the head"
    k: int = option(1, "weights per neuron")
    columns: int | None = option(None, "inputs of a layer to choose from; default: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self) -> Policy:
        return PerNeuron(self.k, self.columns)


@dataclass(frozen=True)
class GRFT(Ranked):
    """Gradient-based and regularized fine-tuning: whole rows or columns, and a pull towards the pre-trained weights."""

    name: ClassVar[str] = "grft"
    summary: ClassVar[str] = (
        "the rows (or columns) of every matrix with the largest gradient, pulled to where they began"
    )
    warmup: ClassVar[str] = "before"
    rows: int | None = option(None, "rows per matrix; the default is 1 row", variant=True)
    columns: int | None = option(None, "columns per matrix, in place of rows", variant=True)
    sparse: int | None = option(None, "weights per neuron, in place of rows (their Tab. 4)", variant=True)
    anchor: float = option(0.0, "strength of the pull towards the pre-trained weights (lambda)")
    anchor_blocks: int | str = option("all", "last blocks that are pulled, besides patch embedding and head; or all")
    subsets: int = option(1, "random parts of the training set; selection uses the one with the smallest loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("rows", "columns", "sparse") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"grft trains rows, columns or sparse, got {' and '.join(given)}")
        if not isinstance(self.subsets, int) or self.subsets < 1:
            raise ValueError(f"subsets must be an integer >= 1, got {self.subsets!r}")
        if not self.anchor >= 0:
            raise ValueError(f"anchor must not be negative, got {self.anchor!r}")
        self.policy()

    def policy(self) -> Policy:
        if self.columns is not None:
            return Columns(self.columns)
        if self.sparse is not None:
            return PerNeuron(self.sparse)
        return Rows(1 if self.rows is None else self.rows)

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        if self.subsets == 1:
            return super().choose(model, batches, context)
        if context.dataset is None or context.batches_of is None:
            raise ValueError("subsets > 1 needs the training set: Context(dataset=..., batches_of=...)")
        loss = self.loss_for(model, context.views)
        part = easiest_subset(
            model, context.dataset, loss, self.subsets, batches=context.batches_of, seed=context.seed
        )  # fmt: skip
        selection = super().choose(model, context.batches_of(part), context)
        selection.notes["data subset"] = f"{part.part + 1} of {self.subsets}"
        return selection

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        if not self.anchor:
            return super().groups(model)
        return anchored_groups(model, self.anchor, self.anchor_blocks)


@dataclass(frozen=True)
class Linear(Selected):
    """A linear probe: the head on frozen features."""

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "the head only"
    rate: ClassVar[float] = 1e-2

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        return _by_rules(model, "the head", context.head)


@dataclass(frozen=True)
class Bias(Selected):
    """Every bias and the head (BitFit, Ben Zaken et al., ACL 2022)."""

    name: ClassVar[str] = "bias"
    summary: ClassVar[str] = "all biases, those of normalisation layers included, and the head"

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        biases = [name for name in named_parameters(model) if name.rpartition(".")[2] == "bias"]
        return _by_rules(model, "biases and the head", context.head, biases)


def head_only(model: nn.Module, head: Iterable[str] = HEAD) -> Selection:
    """A selection of the head; it knows the fingerprints of everything else."""
    return _by_rules(model, "the head", head)


def _by_rules(model: nn.Module, policy: str, head: Iterable[str], whole: Iterable[str] = ()) -> Selection:
    kinds = {**dict.fromkeys(KINDS, "freeze"), "head": "whole"}
    selection = select(model, None, None, criterion="magnitude", head=head, kinds=kinds, whole=whole)
    selection.notes = {"policy": policy}
    return selection


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}{did_you_mean(str(value), known)}")


def _supervised(model: Any, batch: Any) -> Tensor:
    """Cross-entropy of a batch; a model that takes one tensor gets it from a batch with one input."""
    if isinstance(batch, dict) and not hasattr(model, "config"):
        inputs = [value for name, value in batch.items() if name != "labels"]
        return cross_entropy(model, (inputs[0], batch["labels"]))
    return cross_entropy(model, batch)


def _flattened(inputs: Any) -> tuple[Any, tuple[int, int]]:
    """Inputs [batch, views, ...] as [batch * views, ...], and (batch, views)."""
    if isinstance(inputs, torch.Tensor):
        return inputs.flatten(0, 1), (inputs.shape[0], inputs.shape[1])
    first = next(iter(inputs.values()))
    return {name: value.flatten(0, 1) for name, value in inputs.items()}, (first.shape[0], first.shape[1])
