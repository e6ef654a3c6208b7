"""The forward of quantised layers in an attached model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradsel.attached import SUFFIX, Differences
from gradsel.masks import Mask
from gradsel.quantised import Forward
from gradsel.sharding import is_sharded


class Attached(Forward):
    """That of a layer whose differences :func:`gradsel.attach` trains."""

    def __init__(self, module: nn.Module, differences: Differences) -> None:
        super().__init__(module, differences.name)
        self.differences = differences

    def trained(self, device: torch.device) -> tuple[Tensor | None, Mask | None, Any]:
        values = self.module._parameters.get("weight" + SUFFIX)
        if values is None:
            raise RuntimeError(f"{self.name}{SUFFIX} has been taken out of its layer; call gradsel.detach(model) first")
        if is_sharded(values):
            raise RuntimeError(
                f"{self.name} is quantised and a DTensor in its layer's forward: FSDP has not gathered it (call the "
                "module that is given to fully_shard()), or tensor parallelism has split it, which is not supported"
            )
        if values.dtype is not torch.float32:
            raise RuntimeError(
                f"{self.name}{SUFFIX} has become {values.dtype}: differences are trained in float32. Cast the model "
                "before attach(), or cast this parameter back"
            )
        self.differences.follow(device)
        return values, self.differences.mask, self.differences.product
