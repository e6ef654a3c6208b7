"""Methods that rank weights by their gradients and train the best ones: GPS and GRFT."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradsel.attached import is_values
from gradsel.methods.base import NO_PARTS, Context, Parts, option, require_count, require_one_of
from gradsel.methods.reselecting import trained
from gradsel.methods.selected import Selected
from gradsel.optim.anchoring import anchored_groups, regular_blocks
from gradsel.parameters.rules import HEAD, RuleOptions, ranked_sizes
from gradsel.ranking.criteria import Criterion, criterion_of, random_scores
from gradsel.ranking.losses import contrastive, cross_entropy
from gradsel.ranking.policies import ByMass, Columns, Global, PerLayer, PerNeuron, Policy, Rows, equal_budget
from gradsel.ranking.pooling import features
from gradsel.ranking.selecting import require_uneven, select
from gradsel.ranking.subsets import easiest_subset
from gradsel.selection.selection import Selection

CRITERIA = ("gradient", "absolute", "fisher", "relative", "snip", "magnitude", "random")
LOSSES = ("contrastive", "cross-entropy", "task")
#: What competes for the selected weights; the number of these is that of ``k`` weights for every neuron (GPS, Tab. 6a).
SCOPES: Mapping[str, type[Policy]] = MappingProxyType({
    "neuron": PerNeuron, "mass": ByMass, "layer": PerLayer, "net": Global,
})  # fmt: skip


@dataclass(frozen=True)
class Ranked(Selected):
    """A method that ranks weights by their gradients on the training set."""

    needs_batches: ClassVar[bool] = True
    criterion: str = option("gradient", f"what weights are ranked by: {', '.join(CRITERIA)}", choices=CRITERIA)
    loss: str = option(
        "contrastive", "loss whose gradient is taken: contrastive, cross-entropy, or that of the task", choices=LOSSES
    )

    def __post_init__(self) -> None:
        require_one_of("criterion", self.criterion, CRITERIA)
        require_one_of("loss", self.loss, LOSSES)

    @abstractmethod
    def policy(self, sizes: Collection[tuple[int, int]] = ()) -> Policy:
        """How many entries are trained, and which compete, in neuron views of these sizes."""

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        criterion: str | Criterion = random_scores(context.seed) if self.criterion == "random" else self.criterion
        rules = self.rules(model, context.head, context.parts)
        sizes = ranked_sizes(model, **rules).values()
        return select(
            model, batches, self.selection_loss(model, context), self.policy(sizes), criterion,
            progress=context.progress, process_group=context.process_group, **rules,
        )  # fmt: skip

    def selection_loss(self, model: nn.Module, context: Context) -> Any:
        """``loss(model, batch)``, whose gradient ranks.

        Raises:
            ValueError: it is that of the task, and the context has none.
        """
        if self.loss != "task":
            return self.loss_for(model, context.views)
        if context.loss is None:
            raise ValueError("loss is 'task', but this task has none of its own; choose contrastive or cross-entropy")
        return context.loss

    def loss_for(self, model: nn.Module, views: bool) -> Any:
        """``loss(model, batch)``; see :func:`loss_for`."""
        return loss_for(model, self.loss, views)


@dataclass(frozen=True)
class GPS(Ranked):
    """Gradient-based parameter selection (Zhang et al., CVPR 2024): the K best weights of every neuron."""

    name: ClassVar[str] = "gps"
    summary: ClassVar[str] = "the k weights of every neuron with the largest gradient, all biases, the head"
    k: int = option(1, "weights per neuron")
    columns: int | None = option(None, "inputs of a layer to choose from; default: all")
    scope: str = option(
        "neuron",
        "what competes for as many weights in all: the inputs of a neuron; mass: these, but more of them in layers "
        "with a larger gradient; layer; or net",
        choices=SCOPES,
    )
    blocks: Sequence[int] | None = option(None, "numbers of the blocks to train; default: all")
    skip_blocks: Sequence[int] | None = option(None, "numbers of blocks to freeze; negative ones count from the last")
    ratio: float | None = option(
        None, "learning rate of the chosen weights, as a multiple of that of biases and head; default: the same"
    )

    reselect: int = option(
        0, "epochs that a first selection is trained for, before another one is chosen and training starts anew"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.reselect) is not int or self.reselect < 0:
            raise ValueError(f"reselect must be a number of epochs, got {self.reselect!r}")
        if self.ratio is not None and (type(self.ratio) not in (int, float) or not 0 < self.ratio < math.inf):
            raise ValueError(f"ratio must be a positive number, got {self.ratio!r}")
        require_one_of("scope", self.scope, SCOPES)
        PerNeuron(self.k, self.columns)
        if self.columns is not None and self.scope != "neuron":
            raise ValueError(f"columns is for scope='neuron', got scope={self.scope!r}")
        for name in ("blocks", "skip_blocks"):
            numbers = getattr(self, name)
            if numbers is not None and not (
                isinstance(numbers, Sequence) and not isinstance(numbers, str) and all(type(n) is int for n in numbers)
            ):
                raise ValueError(f"{name} must be a list of numbers of blocks, got {numbers!r}")

    def rules(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> RuleOptions:
        return {**parts.rules(head), "blocks": self.blocks, "skip_blocks": self.skip_blocks or ()}

    def policy(self, sizes: Collection[tuple[int, int]] = ()) -> Policy:
        policy = PerNeuron(self.k, self.columns)
        return policy if self.scope == "neuron" else equal_budget(SCOPES[self.scope], policy, sizes)

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        first = super().choose(model, batches, context)
        if not self.reselect:
            return first
        if context.process_group is not None:
            raise ValueError("reselect trains in one process, but several run; select in one, and pass its selection")
        assert batches is not None
        rate = self.rate if context.rate is None else context.rate
        with trained(
            model, first, self.reselect, batches, loss_for(model, "cross-entropy", context.views),
            lambda model: self.optimizer(model, rate, decoupled=False, head=context.head),
        ):  # fmt: skip
            second = super().choose(model, batches, context)
        return Selection(second, {**second.notes, "selected after": f"{self.reselect} epochs"}, first.base)

    def rated(self, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
        if self.ratio is None:
            return groups
        parts = []
        for group in groups:
            for chosen, rate in ((True, lr * self.ratio), (False, lr)):
                if own := [(name, parameter) for name, parameter in group["params"] if is_values(parameter) == chosen]:
                    parts.append({**group, "params": own, "lr": rate})
        return parts


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
    anchor_norm: int = option(2, "norm of the pull: 2, or 1 as in their Tab. 5")
    subsets: int = option(1, "random parts of the training set; selection uses the one with the smallest loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("rows", "columns", "sparse") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"grft trains rows, columns or sparse, got {' and '.join(given)}")
        require_count("subsets", self.subsets)
        if not self.anchor >= 0:
            raise ValueError(f"anchor must not be negative, got {self.anchor!r}")
        if self.anchor_norm not in (1, 2):
            raise ValueError(f"anchor_norm must be 1 or 2, got {self.anchor_norm!r}")
        require_uneven(self.policy(), criterion_of(self.criterion))

    def policy(self, sizes: Collection[tuple[int, int]] = ()) -> Policy:
        if self.columns is not None:
            return Columns(self.columns)
        if self.sparse is not None:
            return PerNeuron(self.sparse)
        return Rows(1 if self.rows is None else self.rows)

    def trained_on(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> int:
        regular_blocks(model, self.anchor_blocks, "anchor_blocks")
        return super().trained_on(model, head, parts)

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        if self.subsets == 1:
            return super().choose(model, batches, context)
        if context.dataset is None or context.batches_of is None:
            raise ValueError("subsets > 1 needs the training set: Context(dataset=..., batches_of=...)")
        loss = self.selection_loss(model, context)
        part = easiest_subset(
            model, context.dataset, loss, self.subsets, batches=context.batches_of, seed=context.seed,
            process_group=context.process_group,
        )  # fmt: skip
        selection = super().choose(model, context.batches_of(part), context)
        selection.notes["data subset"] = f"{part.part + 1} of {self.subsets}"
        return selection

    def groups(self, model: nn.Module, head: Iterable[str] = HEAD) -> list[dict[str, Any]]:
        if not self.anchor:
            return super().groups(model, head)
        groups = anchored_groups(model, self.anchor, self.anchor_blocks, head=head)
        return [{**group, "anchor_norm": self.anchor_norm} for group in groups]


def loss_for(model: nn.Module, kind: str, views: bool) -> Any:
    """``loss(model, batch)`` of a kind; with several views of each sample in a batch, each of them counts."""
    if kind == "contrastive":
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
