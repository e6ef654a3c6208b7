"""A stand-in for a vLLM server: its routes over HTTP, and the parts of it that our engine is built on, written anew.

Interfaces are those of vLLM's distributed/weight_transfer/base.py and factory.py, and of its
model_executor/model_loader/checkpoint_weight_patch.py.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import types
from abc import ABC
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class CheckpointWeightPatch(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor | None = None


def load_checkpoint_weight_patches(model, patches):
    """Checks what vLLM checks, and loads: sparse patches as tensors with NaN where nothing changes."""
    patches = list(patches)
    assert len({patch.indices is None for patch in patches}) <= 1, "dense and sparse patches are not mixed"
    for patch in patches:
        count = math.prod(patch.shape)
        assert patch.values.ndim == 1
        if patch.indices is not None:
            assert patch.dtype.is_floating_point
            assert patch.indices.dtype in (torch.int32, torch.int64)
            assert patch.indices.shape == patch.values.shape
            assert not patch.values.isnan().any()
            assert ((patch.indices >= 0) & (patch.indices < count)).all()
            assert patch.indices.unique().numel() == patch.indices.numel()
    for patch in patches:
        tensor = torch.full((math.prod(patch.shape),), math.nan, dtype=patch.dtype)
        if patch.indices is None:
            tensor = patch.values.clone()
        else:
            tensor[patch.indices.long()] = patch.values
        model.load_weights([(patch.name, tensor.view(patch.shape))])


@dataclass
class WeightTransferInitInfo(ABC):  # noqa: B024
    pass


@dataclass
class WeightTransferUpdateInfo(ABC):  # noqa: B024
    pass


class WeightTransferEngine:
    def __init__(self, config, vllm_config, device, model):
        self.device, self.model = device, model

    def init(self, info):
        self.init_transfer_engine(self.init_info_cls(**info))

    def update_weights(self, info):
        self.receive_weights(self.update_info_cls(**info))


class WeightTransferEngineFactory:
    _registry: ClassVar[dict] = {}

    @classmethod
    def register_engine(cls, name, module, kind):
        assert name not in cls._registry
        cls._registry[name] = lambda: getattr(__import__(module, fromlist=[kind]), kind)


def install(monkeypatch):
    """Makes ``import vllm...`` find the stand-in."""
    places = {
        "vllm.distributed.weight_transfer.base": (
            WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo,
        ),
        "vllm.distributed.weight_transfer.factory": (WeightTransferEngineFactory,),
        "vllm.model_executor.model_loader.checkpoint_weight_patch": (
            CheckpointWeightPatch, load_checkpoint_weight_patches,
        ),
    }  # fmt: skip
    for path, things in places.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        for thing in things:
            setattr(sys.modules[path], thing.__name__, thing)
    monkeypatch.setattr(WeightTransferEngineFactory, "_registry", {})
    monkeypatch.delitem(sys.modules, "gradsel.integrations.vllm_engine", raising=False)


class Weights:
    """The model of the server: tensors of a checkpoint, written where what is loaded is not NaN."""

    def __init__(self, tensors):
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def load_weights(self, weights):
        for name, tensor in weights:
            own = self.tensors[name]
            assert own.shape == tensor.shape
            assert own.dtype is tensor.dtype
            own.copy_(torch.where(tensor.isnan(), own, tensor))


class Server:
    """The routes; ``mishap(update_info)`` may change, delay or drop an update, or raise to answer with an error.

    Attributes:
        calls: the routes that were called, in order.
        updates: the texts of all updates that arrived.
    """

    def __init__(self, tensors, backend):
        self.backend = backend
        self.restart(tensors)
        self.calls, self.updates = [], []
        self.mishap = lambda info: info
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(200, {"status": "ok"})

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                route = self.path.partition("?")[0].strip("/")
                owner.calls.append(route)
                try:
                    getattr(owner, route)(body)
                except Exception as error:
                    self._answer(500, {"error": f"{type(error).__name__}: {error}"})
                else:
                    self._answer(200, {})

            def _answer(self, code, body):
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def restart(self, tensors):
        """A new engine with the weights of a checkpoint."""
        self.model = Weights(tensors)
        kind = WeightTransferEngineFactory._registry[self.backend]()
        self.engine = kind(None, None, torch.device("cpu"), self.model)
        self.paused = self.updating = False

    def init_weight_transfer_engine(self, body):
        self.engine.init(body["init_info"])

    def pause(self, body):
        self.paused = True

    def resume(self, body):
        assert not self.updating
        self.paused = False

    def start_weight_update(self, body):
        assert self.paused, "weights change while tokens are generated"
        assert not self.updating, "an update is under way"
        self.updating = True
        self.engine.start_weight_update()

    def update_weights(self, body):
        assert self.updating
        self.updates.append(body["update_info"])
        info = self.mishap(body["update_info"])
        if info is not None:
            self.engine.update_weights(info)

    def finish_weight_update(self, body):
        assert self.updating
        self.updating = False
        self.engine.finish_weight_update()
