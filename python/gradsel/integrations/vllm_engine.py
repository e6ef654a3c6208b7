"""vLLM's side of an update: our receiver checks it, vLLM's own loader writes it.

This module imports vLLM; :mod:`gradsel.integrations.vllm` registers it without that. Its base class is
``WeightTransferEngine`` (in vllm/distributed/weight_transfer/base.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

from gradsel.integrations.patches import Patch
from gradsel.integrations.receiving import Receiver
from gradsel.integrations.vllm import decoded


@dataclass
class PatchInitInfo(WeightTransferInitInfo):
    """Nothing: the values travel in the request."""


@dataclass
class PatchUpdateInfo(WeightTransferUpdateInfo):
    """One update.

    Attributes:
        update: of ``Patches.to_bytes()``, in base64.
    """

    update: str


class PatchEngine(WeightTransferEngine):
    """Applies updates in their order to the initialized model, in place, on every rank of the server."""

    init_info_cls = PatchInitInfo
    update_info_cls = PatchUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiver = Receiver(self._write)

    def init_transfer_engine(self, init_info: PatchInitInfo) -> None:
        """Nothing to do: there is no connection besides the requests."""

    def start_weight_update(self) -> None:
        """Nothing to do: patches are written in place."""

    def finish_weight_update(self) -> None:
        """Nothing to do: patches are written in place."""

    def receive_weights(self, update_info: PatchUpdateInfo) -> None:
        """Checks an update and writes it.

        Raises:
            UpdateRefused: it does not follow the last one; nothing was written.
        """
        self._receiver.receive(decoded(update_info.update))

    def shutdown(self) -> None:
        """Nothing to do."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Not the way to send: see :class:`gradsel.integrations.trl.PatchTransfer`."""
        raise NotImplementedError("send updates with gradsel.integrations.trl.PatchTransfer")

    def _write(self, patches: list[Patch]) -> None:
        """All patches as sparse ones: vLLM loads dense ones only by reloading layers, which the others must not."""
        load_checkpoint_weight_patches(self.model, [self._sparse(patch) for patch in patches])

    def _sparse(self, patch: Patch) -> CheckpointWeightPatch:
        indices = patch.indices
        if indices is None:
            indices = torch.arange(patch.values.numel(), dtype=torch.int64)
        values, indices = patch.values.to(self.device), indices.to(self.device)
        return CheckpointWeightPatch(patch.name, tuple(patch.shape), patch.dtype, values, indices)
