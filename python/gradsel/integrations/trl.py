"""Weight transfer for TRL's ``AsyncGRPOTrainer``: patches of what is trained, over HTTP, to a vLLM server.

:class:`PatchTransfer` has the methods of ``WeightTransferProtocol`` (in trl/experimental/async_grpo). It calls the
routes of the server that TRL's own client calls (vllm_client.py in the same place). The values travel in
``/update_weights`` itself, and the server needs the engine of :mod:`gradsel.integrations.vllm`.
"""

from __future__ import annotations

import base64
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradsel.integrations.patches import Patches, patches

logger = logging.getLogger(__name__)


class PatchTransfer:
    """Sends what changed since the last sync to a server::

        gradsel.attach(model, selection)
        transfer = PatchTransfer(model, "http://localhost:8000", dtype=torch.bfloat16)
        AsyncGRPOTrainer(model, ..., weight_transfer=transfer)

    An update that the server refuses, or that is lost on the way, is followed by a full one at once.

    Attributes:
        last: the last update that was sent; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        url: str,
        *,
        dtype: torch.dtype | None = None,
        timeout: float = 1800.0,
        patience: float = 240.0,
    ) -> None:
        """
        Args:
            model: attached, and trained later; wrapped or not.
            url: of the server.
            dtype: in which the server has the weights; None: as the model.
            timeout: of a request, in seconds.
            patience: how long to wait for the server to become ready, in seconds.
        """
        self._model = model
        self._url = url.rstrip("/")
        self._dtype = dtype
        self._timeout = timeout
        self._patience = patience
        self._known = False
        self.last: Patches | None = None

    def init_weight_transfer(self) -> None:
        """Waits for the server and prepares it.

        Raises:
            TimeoutError: the server did not become ready.
            ConnectionError: it refuses to be prepared, for example because it was started without our engine.
        """
        end = time.monotonic() + self._patience
        while True:
            try:
                self._call("GET", "/health", timeout=5.0)
                break
            except ConnectionError as error:
                if time.monotonic() > end:
                    raise TimeoutError(f"{self._url} was not ready within {self._patience:.0f} s: {error}") from None
                time.sleep(min(0.5, self._patience / 10))
        self._call("POST", "/init_weight_transfer_engine", {"init_info": {}})

    def pause(self) -> None:
        """Pauses generation; the server keeps its cache."""
        self._call("POST", "/pause?mode=keep")

    def send_weights(self, iterator: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Sends what has changed since the last call; nothing if nothing has.

        Args:
            iterator: the trainer's dense weights, which are not read.

        Raises:
            ConnectionError: the server takes not even a full update. It may have a part of it, so it must not serve.
        """
        update = patches(self._model, self.last, dtype=self._dtype, full=not self._known)
        if not update:
            return
        self.last = update
        try:
            self._send(update)
        except ConnectionError as error:
            logger.warning("update %d was not taken, a full one follows: %s", update.sequence, error)
            self._known = False
            self.last = patches(self._model, update, dtype=self._dtype, full=True)
            self._send(self.last)
        self._known = True

    def resume(self) -> None:
        """Resumes generation."""
        self._call("POST", "/resume")

    def destroy(self) -> None:
        """Forgets what the server has."""
        self.last, self._known = None, False

    def _send(self, update: Patches) -> None:
        self._call("POST", "/start_weight_update", {"is_checkpoint_format": True})
        try:
            info = {"update": base64.b64encode(update.to_bytes()).decode()}
            self._call("POST", "/update_weights", {"update_info": info})
        except ConnectionError as error:
            try:
                self._call("POST", "/finish_weight_update")
            except ConnectionError as second:
                logger.warning("the server did not end a failed update: %s", second)
            raise error from None
        self._call("POST", "/finish_weight_update")

    def _call(self, method: str, route: str, body: Any = None, timeout: float | None = None) -> None:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + route, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout or self._timeout) as response:
                response.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            raise ConnectionError(f"{self._url}{route} answered {error.code}: {text}") from None
        except (OSError, urllib.error.URLError) as error:
            raise ConnectionError(f"{self._url}{route}: {error}") from None
