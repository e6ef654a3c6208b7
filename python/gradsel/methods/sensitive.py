"""SPT: trains entries where few are sensitive, adapters or LoRA where many are (He et al., ICCV 2023)."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradsel.masks import Frozen, Mask, Whole
from gradsel.methods.additions import Addition, Bottleneck, LowRank, sizes
from gradsel.methods.base import NO_PARTS, Context, Parts, count, option, require_count
from gradsel.methods.ranked import loss_for
from gradsel.methods.selected import Selected
from gradsel.methods.targets import is_linear, is_patch_embedding, require_calls
from gradsel.parameters.names import named_parameters
from gradsel.parameters.rules import HEAD, KINDS, RuleOptions, parameter_rules, ranked_sizes
from gradsel.ranking.largest import mask_of
from gradsel.ranking.policies import Policy
from gradsel.ranking.scores import Ranking, Scores, Sizes
from gradsel.ranking.selecting import select
from gradsel.ranking.together import Together
from gradsel.selection.selection import Selection
from gradsel.views import NeuronView

#: Why a weight that gets an addition is itself frozen.
_ADAPTED = "adapted"
#: The numbers of most sensitive entries that are tried, in twentieths of the budget.
_TRIED = range(1, 81)


@dataclass(frozen=True)
class SensitiveWithin(Policy):
    """SPT's allocation of the most sensitive entries of the whole model.

    Those of a matrix give way to an addition, and those of a vector to the whole vector, where there are enough of
    them; all others are trained themselves.

    How many entries are looked at is what brings the number of trained scalars closest to the budget.

    Args:
        most: the budget.
        costs: the number of scalars of the addition that a matrix may get, by the name of its weight.
        alpha, beta: a matrix is adapted from ``cost / alpha`` sensitive entries on, a vector is trained whole from
            ``size / beta`` on.
    """

    most: int
    costs: Mapping[str, int] = field(default_factory=dict, repr=False)
    alpha: float = 10.0
    beta: float = 5.0

    def entries(self, rows: int, cols: int) -> int:
        return min(rows * cols, self.most)

    def budget(self, sizes: Iterable[tuple[int, int]]) -> int:
        return min(self.most, sum(rows * cols for rows, cols in sizes))

    def start(self, sizes: Sizes) -> Ranking:
        return _Allocation(self, list(sizes))

    def choose(self, scores: Scores) -> Mask:
        ranking = self.start({"": (scores.matrix.shape[0], scores.matrix.shape[1])})
        ranking.add("", scores)
        return ranking.finish()[""]


class _Allocation:
    def __init__(self, policy: SensitiveWithin, names: list[str]) -> None:
        self._policy, self._names = policy, names
        self._together = Together(max(map(self._tried, _TRIED)), names)
        self._added: dict[str, tuple[torch.device, tuple[int, ...], NeuronView]] = {}

    def _tried(self, twentieths: int) -> int:
        return math.ceil(self._policy.most * twentieths / 20)

    def add(self, name: str, scores: Scores) -> None:
        self._together.add(name, scores)
        self._added[name] = (scores.matrix.device, scores.shape, scores.view)

    def finish(self) -> dict[str, Mask]:
        if not self._added:  # no parameter got a gradient
            return {}
        numbers, places = (tensor.cpu() for tensor in self._together.best())
        tried = [self._tried(twentieths) for twentieths in _TRIED]
        best = min(tried, key=lambda first: (abs(self._trained(numbers[:first]) - self._policy.most), -first))
        found = torch.bincount(numbers[:best], minlength=len(self._names)).tolist()
        masks: dict[str, Mask] = {}
        for number, name in enumerate(self._names):
            if name not in self._added:
                continue
            device, shape, view = self._added[name]
            if self._is_adapted(name, found[number]):
                masks[name] = Frozen(shape, _ADAPTED)
            elif self._is_whole(shape, found[number]):
                masks[name] = Whole(shape)
            else:
                own = places[:best][numbers[:best] == number].sort().values
                masks[name] = mask_of(own.to(device), shape, view)
        return masks

    def _trained(self, numbers: Tensor) -> int:
        """What is trained if these are the parameters of the most sensitive entries."""
        total = 0
        for name, found in zip(self._names, torch.bincount(numbers, minlength=len(self._names)).tolist(), strict=True):
            if name not in self._added:
                continue
            shape = self._added[name][1]
            if self._is_adapted(name, found):
                total += self._policy.costs[name]
            else:
                total += math.prod(shape) if self._is_whole(shape, found) else found
        return total

    def _is_adapted(self, name: str, found: int) -> bool:
        cost = self._policy.costs.get(name)
        return cost is not None and found >= cost / self._policy.alpha

    def _is_whole(self, shape: tuple[int, ...], found: int) -> bool:
        return len(shape) == 1 and found >= shape[0] / self._policy.beta


@dataclass(frozen=True)
class SPT(Selected):
    """Sensitivity-aware fine-tuning (He et al., ICCV 2023), with the settings of its authors' code.

    An entry's sensitivity is its squared gradient of the task's loss through the new head, summed over a few batches.
    The patch embedding and position embeddings are frozen; class token and head are trained whole.
    """

    needs_batches: ClassVar[bool] = True
    budget: int = option(400_000, "trained scalars besides the head")
    rank: int = option(8, "rank, or hidden width, of what is added to a sensitive matrix")
    alpha: float = option(10.0, "a matrix is adapted from (scalars added) / alpha sensitive entries on")
    batches: int = option(8, "batches of which the gradients are taken")

    def __post_init__(self) -> None:
        for name in ("budget", "rank", "batches"):
            require_count(name, getattr(self, name))
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha!r}")

    @abstractmethod
    def addition(self, layer: nn.Module) -> Addition:
        """What a sensitive linear layer gets."""

    def rules(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> RuleOptions:
        kinds = {**dict.fromkeys(KINDS, "freeze"), "head": "whole", "token": "whole"}
        kinds |= dict.fromkeys(("weight", "bias", "normalisation", "layer scale"), "rank")
        in_front = [name for name in named_parameters(model) if is_patch_embedding(name)]
        tokens = [name for name, rule in parameter_rules(model, head=head).items() if rule.reason == "token"]
        return {
            "head": head,
            "kinds": kinds,
            "whole": parts.head,
            "freeze": [name for name in in_front if name not in tokens],
        }

    def policy(self, sizes: Collection[tuple[int, int]] = ()) -> Policy:
        return SensitiveWithin(self.budget)

    def trained_on(self, model: nn.Module, head: Iterable[str] = HEAD, parts: Parts = NO_PARTS) -> int:
        return super().trained_on(model, head, parts) - self._tokens(model, head, parts)

    def _tokens(self, model: nn.Module, head: Iterable[str], parts: Parts) -> int:
        """Scalars that are trained whole, but are not the head's; they count to the budget."""
        parameters = named_parameters(model)
        rules = parameter_rules(model, **self.rules(model, head, parts))
        return sum(parameters[name].numel() for name, rule in rules.items() if rule.reason == "token")

    def choose(self, model: nn.Module, batches: Iterable[Any] | None, context: Context) -> Selection:
        require_calls(model, self.name)
        rules = self.rules(model, context.head, context.parts)
        linear = {f"{path}.weight": layer for path, layer in model.named_modules() if is_linear(layer)}
        left = self.budget - self._tokens(model, context.head, context.parts)
        if left < 1:
            raise ValueError(f"budget is {self.budget}, which the class token exceeds")
        with torch.device("meta"):
            costs = {
                name: count(self.addition(linear[name])) for name in ranked_sizes(model, **rules) if name in linear
            }
        assert batches is not None
        first = list(itertools.islice(batches, self.batches))
        with warnings.catch_warnings():  # entries of vectors that score zero are no neurons
            warnings.filterwarnings("ignore", message=".*neurons score zero")
            selection = select(
                model, first, loss_for(model, "cross-entropy", context.views), SensitiveWithin(left, costs, self.alpha),
                "fisher", progress=context.progress, **rules,
            )  # fmt: skip
        adapted = [name for name, mask in selection.items() if isinstance(mask, Frozen) and mask.label == _ADAPTED]
        selection.notes["adapted"] = [name.rpartition(".")[0] for name in adapted]
        return selection

    def additions(
        self, model: nn.Module, whole: Collection[str], notes: Mapping[str, Any]
    ) -> dict[str, Callable[[], Addition]]:
        layers = {path: model.get_submodule(path) for path in notes.get("adapted", ())}
        return {path: functools.partial(self.addition, layer) for path, layer in layers.items()}


@dataclass(frozen=True)
class SPTAdapter(SPT):
    """SPT with bottlenecks behind sensitive matrices."""

    name: ClassVar[str] = "spt-adapter"
    summary: ClassVar[str] = "the most sensitive weights; bottlenecks behind matrices with many of them; and the head"

    def addition(self, layer: nn.Module) -> Addition:
        return Bottleneck(sizes(layer)[1], self.rank)


@dataclass(frozen=True)
class SPTLora(SPT):
    """SPT with LoRA beside sensitive matrices."""

    name: ClassVar[str] = "spt-lora"
    summary: ClassVar[str] = "the most sensitive weights; LoRA beside matrices with many of them; and the head"

    def addition(self, layer: nn.Module) -> Addition:
        return LowRank(layer, self.rank)
