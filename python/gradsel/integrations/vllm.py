"""The engine by which a vLLM server takes updates of :mod:`gradsel.integrations.patches`.

vLLM finds it by the entry point ``vllm.general_plugins`` of this package::

    vllm serve MODEL --weight-transfer-config '{"backend": "gradsel"}'
"""

from __future__ import annotations

import base64
import importlib
import logging

NAME = "gradsel"


def register() -> None:
    """Makes the engine known to vLLM by its name, once; vLLM calls this in every process.

    A vLLM without weight transfer starts as before, and refuses the name itself if it is asked for.
    """
    try:
        factory = importlib.import_module("vllm.distributed.weight_transfer.factory").WeightTransferEngineFactory
    except ImportError as error:
        logging.getLogger(__name__).info("vLLM has no weight transfer that %s could be registered for: %s", NAME, error)
        return
    if NAME not in factory._registry:
        factory.register_engine(NAME, "gradsel.integrations.vllm_engine", "PatchEngine")


def decoded(update: str) -> bytes:
    """An update from the text in a request.

    Raises:
        ValueError: it is no base64.
    """
    return base64.b64decode(update, validate=True)
