"""Methods that train a selection which no gradient decides: the head, biases, random columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from gradsel.methods.base import NO_PARTS, Context, Parts, option
from gradsel.methods.selected import HEAD_ONLY, Selected, by_rules
from gradsel.methods.targets import matrices
from gradsel.parameters.names import named_parameters
from gradsel.parameters.rules import HEAD, RuleOptions
from gradsel.ranking.criteria import random_scores
from gradsel.ranking.policies import Columns, Policy
from gradsel.ranking.selecting import select
from gradsel.selection.selection import Selection


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
