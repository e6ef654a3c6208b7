"""Weight transfer for TRL: its own code of a sync, our transfer and our engine, with a stand-in for vLLM over HTTP."""

from __future__ import annotations

import copy
import importlib
import logging
import re
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import gradsel
from gradsel.delta.parts import same_bits
from gradsel.integrations import vllm
from gradsel.integrations.trl import PatchTransfer
from tests.support import fake_vllm
from tests.support.checkpoints import llama, saved
from tests.support.deltas import plain

IDS = torch.arange(12).view(2, 6)
SYNC = ["pause", "start_weight_update", "update_weights", "finish_weight_update", "resume"]


def base_model(dtype=torch.bfloat16):
    return llama(dtype, layers=1)


class Training:
    """A base, an attached model, a server that has loaded the base, and the transfer between the two."""

    def __init__(self, server, folder):
        self.base, self.server, self.folder, self.count = base_model(), server, folder, 0
        self.model = copy.deepcopy(self.base)
        selection = gradsel.select(self.model, None, None, gradsel.PerNeuron(2), "random", progress=False)
        gradsel.attach(self.model, selection)
        self.optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(self.model), lr=1e-2)
        self.transfer = PatchTransfer(self.model, server.url, patience=5.0)
        self.transfer.init_weight_transfer()
        self.sync()

    def step(self):
        self.optimizer.zero_grad()
        self.model(input_ids=IDS, labels=IDS).loss.backward()
        self.optimizer.step()

    def sync(self):
        """What AsyncGRPOTrainer does, without its trainer."""
        self.transfer.pause()
        self.transfer.send_weights(iter(()))
        self.transfer.resume()

    def assert_served(self):
        self.count += 1
        expected = saved(plain(self.model), self.folder / str(self.count))
        found = self.server.model.tensors
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same_bits(found[name], tensor), name


@pytest.fixture
def server(monkeypatch, tmp_path):
    fake_vllm.install(monkeypatch)
    vllm.register()
    vllm.register()  # vLLM may load plugins several times in a process
    with fake_vllm.Server(saved(base_model(), tmp_path / "base"), vllm.NAME) as server:
        yield server


@pytest.fixture
def training(server, tmp_path):
    return Training(server, tmp_path)


@pytest.fixture
def async_grpo_trainer(monkeypatch):
    """TRL's module, imported before there is anything that it would take for vLLM."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl", reason="TRL is not installed")
    accelerate = pytest.importorskip("accelerate", reason="TRL needs it")
    accelerate.PartialState(cpu=True)  # its loggers ask for it
    yield importlib.import_module("trl.experimental.async_grpo.async_grpo_trainer")
    accelerate.PartialState._reset_state()


def test_the_sync_of_trls_trainer(async_grpo_trainer, server, tmp_path):
    training = Training(server, tmp_path)
    accelerator = SimpleNamespace(
        is_main_process=True, device=torch.device("cpu"), wait_for_everyone=lambda: None, unwrap_model=lambda m: m
    )
    methods = async_grpo_trainer.AsyncGRPOTrainer
    trainer = SimpleNamespace(
        accelerator=accelerator, model=training.model, weight_transfer=training.transfer, model_version=0,
        rollout_worker=None, _lora_sync=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    trainer._streaming_iter = lambda: methods._streaming_iter(trainer)
    trainer._sync_weight_merged = lambda start: methods._sync_weight_merged(trainer, start)
    server.calls.clear()
    for count in range(1, 4):
        training.step()
        methods._sync_weight(trainer)
        assert trainer.model_version == count
        training.assert_served()
    assert server.calls == 3 * SYNC


def test_k_steps_and_k_syncs(training):
    training.assert_served()
    sizes = []
    for _ in range(4):
        training.step()
        training.sync()
        training.assert_served()
        sizes.append(len(training.server.updates[-1]["update"]))
    assert training.transfer.last.sequence == 4
    assert not training.transfer.last.is_full
    training.sync()  # nothing has changed
    assert len(training.server.updates) == 5
    assert training.server.calls[-2:] == ["pause", "resume"]


def healed(training, caplog, message):
    """A step and a sync, after which the server has the weights, and how many updates that took."""
    before = len(training.server.updates)
    with caplog.at_level(logging.WARNING):
        training.step()
        training.sync()
    assert re.search(message, caplog.text)
    training.assert_served()
    training.step()
    training.sync()
    training.assert_served()
    assert not training.transfer.last.is_full
    return len(training.server.updates) - before - 1


def mishaps(server, *mishaps):
    """Each update meets the next of these mishaps; afterwards all goes well."""
    waiting = list(mishaps)
    server.mishap = lambda info: waiting.pop(0)(info) if waiting else info


def fails(info):
    raise OSError("no space left")


def test_a_dropped_update_is_noticed_and_healed(training, caplog):
    mishaps(training.server, lambda info: None)
    training.step()
    training.sync()  # the server said that all was well
    with pytest.raises(AssertionError):
        training.assert_served()
    assert healed(training, caplog, "updates between the two are missing") == 2


def test_a_repeated_update_is_refused_and_healed(training, caplog):
    first = training.server.updates[0]
    mishaps(training.server, lambda info: first)
    assert healed(training, caplog, "update 0 came after update 0") == 2


def test_reordered_updates_are_refused_and_healed(training, caplog):
    held = []
    mishaps(training.server, held.append, lambda info: held[0])
    training.step()
    training.sync()  # this update is held back
    training.step()
    training.sync()  # and arrives instead of the next one, which is lost
    assert healed(training, caplog, "updates between the two are missing") == 2


def test_an_error_of_the_server_is_healed(training, caplog):
    mishaps(training.server, fails)
    assert healed(training, caplog, "answered 500: .*no space left") == 2


def test_a_server_that_was_restarted_gets_everything(training, caplog, tmp_path):
    training.step()
    training.sync()
    training.server.restart(saved(training.base, tmp_path / "again"))
    training.server.paused = True
    assert healed(training, caplog, "does not follow the base") == 2


def test_a_server_that_takes_nothing_stops_the_training(training):
    mishaps(training.server, fails, fails)
    training.step()
    with pytest.raises(ConnectionError, match=r"/update_weights answered 500: .*no space left"):
        training.sync()
    assert not training.server.updating
    training.sync()  # a later try sends everything
    training.assert_served()


def test_the_dtype_of_the_server(server, tmp_path):
    model = base_model(torch.float32)
    gradsel.attach(model, gradsel.select(model, None, None, gradsel.PerNeuron(1), "random", progress=False))
    transfer = PatchTransfer(model, server.url, dtype=torch.bfloat16)
    transfer.init_weight_transfer()
    transfer.pause()
    transfer.send_weights()
    assert {patch.dtype for patch in transfer.last} == {torch.bfloat16}
    transfer.destroy()
    transfer.send_weights()  # a new sequence
    assert transfer.last.is_full


def test_a_vllm_without_weight_transfer_starts_as_before(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.factory", None)
    with caplog.at_level(logging.INFO):
        vllm.register()
    assert "vLLM has no weight transfer that gradsel could be registered for" in caplog.text


def test_a_server_that_is_not_there():
    transfer = PatchTransfer(torch.nn.Linear(1, 1), "http://127.0.0.1:9", patience=0.1)
    with pytest.raises(TimeoutError, match=r"http://127\.0\.0\.1:9 was not ready within 0 s"):
        transfer.init_weight_transfer()
