"""Methods that train a selection of the model's entries: GPS, GRFT, biases, the head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradsel.attached import is_attached
from gradsel.delta.delta import Delta
from gradsel.files import replacing
from gradsel.methods.additions import (
    Addition,
    addition_parameters,
    additions_in,
    load_additions,
    merge_additions,
    place,
    require_linear,
)
from gradsel.methods.base import (
    ADDITIONS,
    DELTA,
    NO_PARTS,
    SELECTION,
    Context,
    Method,
    Parts,
    Prepared,
    count,
    option,
)
from gradsel.methods.targets import matrices
from gradsel.nn.attaching import attach, detach
from gradsel.optim.adamw import MaskedAdamW
from gradsel.optim.anchoring import anchored_groups, regular_blocks
from gradsel.optim.optimizer import MaskedAdam
from gradsel.parameters.names import did_you_mean, named_parameters
from gradsel.parameters.rules import HEAD, KINDS, RuleOptions, parameter_rules, ranked_sizes, sizes_of
from gradsel.ranking.criteria import Criterion, random_scores
from gradsel.ranking.losses import contrastive, cross_entropy
from gradsel.ranking.policies import Columns, Global, PerLayer, PerNeuron, Policy, Rows, equal_budget
from gradsel.ranking.pooling import features
from gradsel.ranking.selecting import select
from gradsel.ranking.subsets import easiest_subset
from gradsel.selection.selection import Selection
from gradsel.tensor_files import save_file

CRITERIA = ("gradient", "absolute", "fisher", "snip", "magnitude", "random")
LOSSES = ("contrastive", "cross-entropy", "task")
#: What competes for the selected weights; the number of these is that of ``k`` weights for every neuron (GPS, Tab. 6a).
SCOPES: Mapping[str, type[Policy]] = MappingProxyType({"neuron": PerNeuron, "layer": PerLayer, "net": Global})
#: Of the kinds of parameters, only the head is trained.
HEAD_ONLY: Mapping[str, str] = MappingProxyType({**dict.fromkeys(KINDS, "freeze"), "head": "whole"})


@dataclass(frozen=True)
class Selected(Method):
    """A method that attaches the model to a selection, so that nothing else gets a gradient."""

    def rules(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> RuleOptions:
        """What is ranked, trained whole or frozen; see :func:`gradsel.parameters.rules.parameter_rules`."""
        return parts.rules(head)

    def policy(self, sizes: Collection[tuple[int, int]] = ()) -> Policy | None:
        """How many entries are trained, and which compete, in neuron views of these sizes; None: nothing is ranked."""
        return None

    def additions(
        self, model: nn.Module, whole: Collection[str], notes: Mapping[str, Any]
    ) -> dict[str, Callable[[], Addition]]:
        """What is trained besides the selection: makers of additions by the layer that each goes to.

        Args:
            model: plain.
            whole: the names of the parameters that are trained whole, such as the head.
            notes: those of the selection.

        Raises:
            ValueError: the method does not fit the model.
        """
        return {}

    @abstractmethod
    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        """The selection to train."""

    def trained_on(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> int:
        rules, parameters = parameter_rules(model, **self.rules(model, head, parts)), named_parameters(model)
        whole = [name for name, rule in rules.items() if rule.action == "whole"]
        with torch.device("meta"):
            added = sum(count(make()) for make in self.additions(model, whole, {}).values())
        sizes = sizes_of(rules, parameters).values()
        policy = self.policy(sizes)
        ranked = 0 if policy is None else policy.budget(sizes)
        return sum(parameters[name].numel() for name in whole) + ranked + added

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
        additions = self.additions(model, _whole(selection), selection.notes)
        attach(model, selection)
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            place(model, additions)
        added = sum(count(addition) for _, _, addition in additions_in(model))
        return Prepared(model, selection.trainable_count() + added, total, selection)

    def optimizer(
        self, model: nn.Module, lr: float, weight_decay: float = 0.0, decoupled: bool = True,
        head: Iterable[str] = HEAD,
    ) -> Optimizer:  # fmt: skip
        kind = MaskedAdamW if decoupled else MaskedAdam
        return kind(self.groups(model, head), lr=lr, weight_decay=weight_decay)

    def save(self, prepared: Prepared, folder: Path) -> None:
        assert prepared.selection is not None
        prepared.selection.save(folder / SELECTION)
        Delta.of(prepared.model, selection=prepared.selection).save(folder / DELTA)
        if added := addition_parameters(prepared.model):
            with replacing(folder / ADDITIONS) as unfinished:
                save_file(added, unfinished)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        selection = Selection.load(folder / SELECTION, model)
        additions = self.additions(model, _whole(selection), selection.notes)
        delta = Delta.load(folder / DELTA)
        # Of parameters trained whole nothing of the base is left, so a new head may have been initialised otherwise.
        whole = {name: part for name, part in delta.items() if part.mask.is_whole}
        Delta({name: part for name, part in delta.items() if name not in whole}).apply_(model)
        Delta(whole).apply_(model, force=True)
        if additions:
            with torch.random.fork_rng():
                place(model, additions)
            load_additions(model, folder / ADDITIONS)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        require_linear(model, self.name)
        if is_attached(model):
            detach(model)
        return merge_additions(model)


def _whole(selection: Selection) -> list[str]:
    return [name for name, mask in selection.items() if mask.is_whole]


@dataclass(frozen=True)
class Ranked(Selected):
    """A method that ranks weights by their gradients on the training set."""

    needs_batches: ClassVar[bool] = True
    criterion: str = option("gradient", f"what weights are ranked by: {', '.join(CRITERIA)}", choices=CRITERIA)
    loss: str = option(
        "contrastive", "loss whose gradient is taken: contrastive, cross-entropy, or that of the task", choices=LOSSES
    )

    def __post_init__(self) -> None:
        _one_of("criterion", self.criterion, CRITERIA)
        _one_of("loss", self.loss, LOSSES)

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
    scope: str = option("neuron", "what competes for as many weights in all: neuron, layer or net", choices=SCOPES)
    blocks: Sequence[int] | None = option(None, "numbers of the blocks to train; default: all")
    skip_blocks: Sequence[int] | None = option(None, "numbers of blocks to freeze; negative ones count from the last")

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("scope", self.scope, tuple(SCOPES))
        PerNeuron(self.k, self.columns)
        if self.columns is not None and self.scope != "neuron":
            raise ValueError(f"columns confines the inputs of neurons, which scope={self.scope!r} does not rank")
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
        if not isinstance(self.subsets, int) or self.subsets < 1:
            raise ValueError(f"subsets must be an integer >= 1, got {self.subsets!r}")
        if not self.anchor >= 0:
            raise ValueError(f"anchor must not be negative, got {self.anchor!r}")
        if self.anchor_norm not in (1, 2):
            raise ValueError(f"anchor_norm must be 1 or 2, got {self.anchor_norm!r}")
        self.policy()

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


@dataclass(frozen=True)
class Linear(Selected):
    """A linear probe: the head on frozen features."""

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "the head only"
    rate: ClassVar[float] = 1e-2

    def rules(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> RuleOptions:
        return {"head": head, "kinds": HEAD_ONLY, "whole": parts.head}

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        return by_rules(model, "the head", self.rules(model, context.head, context.parts))


@dataclass(frozen=True)
class Bias(Selected):
    """Every bias and the head (BitFit, Ben Zaken et al., ACL 2022)."""

    name: ClassVar[str] = "bias"
    summary: ClassVar[str] = "all biases, those of normalisation layers included, and the head"

    def rules(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> RuleOptions:
        names = [name for name in named_parameters(model) if name not in parts.unused]
        biases = [name for name in names if name.rpartition(".")[2] == "bias"]
        return {"head": head, "kinds": HEAD_ONLY, "whole": [*parts.head, *biases]}

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        return by_rules(model, "biases and the head", self.rules(model, context.head, context.parts))


@dataclass(frozen=True)
class Paca(Selected):
    """Whole columns chosen at random in every linear layer, and the head (PaCA, Woo et al., ICLR 2025)."""

    name: ClassVar[str] = "paca"
    summary: ClassVar[str] = "columns of every linear layer, chosen at random, and the head"
    columns: int = option(16, "columns per linear layer")

    def __post_init__(self) -> None:
        self.policy()

    def rules(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> RuleOptions:
        return {
            "head": head,
            "kinds": HEAD_ONLY,
            "whole": parts.head,
            "rank": [f"{path}.weight" for path in matrices(model, head, parts)],
        }

    def policy(self, sizes: Collection[tuple[int, int]] = ()) -> Policy:
        return Columns(self.columns)

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        return select(
            model, None, None, self.policy(), random_scores(context.seed),
            progress=context.progress, **self.rules(model, context.head, context.parts),
        )  # fmt: skip


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


def head_only(model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> Selection:
    """A selection of the head; it knows the fingerprints of everything else."""
    return by_rules(model, "the head", {"head": head, "kinds": HEAD_ONLY, "whole": parts.head})


def by_rules(model: nn.Module, policy: str, rules: RuleOptions) -> Selection:
    """A selection that ranks nothing."""
    selection = select(model, None, None, criterion="magnitude", **rules)
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
