"""MaskedAdamW: MaskedAdam with AdamW's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.masks import Mask
from gradsel.optim.optimizer import MaskedAdam
from gradsel.parameters.rules import RuleOptions
from gradsel.ranking.criteria import Criterion, Score
from gradsel.ranking.policies import Policy
from gradsel.selection.selection import Selection


class MaskedAdamW(MaskedAdam):
    """:class:`MaskedAdam` with the defaults of :class:`torch.optim.AdamW`: decoupled weight decay of 0.01."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        masks: Selection | Mapping[str, Mask] | None = None,
        policy: Policy | None = None,
        criterion: str | Criterion | Score = "gradient",
        rules: RuleOptions | None = None,
        select_after: int = 1,
        reselect_every: int | None = None,
        model: nn.Module | None = None,
        anchor: float = 0.0,
        anchor_decoupled: bool = False,
        anchor_norm: int = 2,
        low_precision: str = "master",
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            masks=masks,
            policy=policy,
            criterion=criterion,
            rules=rules,
            select_after=select_after,
            reselect_every=reselect_every,
            model=model,
            anchor=anchor,
            anchor_decoupled=anchor_decoupled,
            anchor_norm=anchor_norm,
            low_precision=low_precision,
            seed=seed,
            state_dtype=state_dtype,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # whatever a loaded state_dict says, as in torch
            group["decoupled_weight_decay"] = True
