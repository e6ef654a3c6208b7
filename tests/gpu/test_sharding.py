"""FSDP2 on one GPU, a group of one rank: what is moved to the device, what stays on the CPU, and what comes of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import gradsel
from gradsel.attached import Selected, selected_in
from tests.gpu.training import moved
from tests.support.selections import toy
from tests.support.sharded import shard_attached, whole_state
from tests.support.toy import Toy, batches, cross_entropy


@pytest.fixture
def mesh(device, tmp_path):
    """Of this process alone."""
    if not dist.is_gloo_available() or (device == "cuda" and not dist.is_nccl_available()):
        pytest.skip("this build of torch has no process group for the device")
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", store=dist.FileStore(str(tmp_path / "meet"), 1), rank=0,
        world_size=1,
    )  # fmt: skip
    yield init_device_mesh(device, (1,))
    dist.destroy_process_group()


def model_of(kind: str) -> tuple[Toy, gradsel.Selection]:
    model, selection = toy(kind, torch.float64)
    return model.eval(), selection


def train(model: Toy, device: str) -> None:
    optimizer = gradsel.MaskedAdamW(gradsel.trainable_parameters(model), lr=1e-2, eps=1e-3, anchor=0.1)
    for batch in moved(batches(2), device, torch.float64):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()


def check_devices(selected: Selected, device: str, attach_first: bool) -> None:
    assert selected.shards is not None
    assert selected.mask.device.type == device
    assert selected.shards.share.mask.device.type == device
    by_rows = hasattr(selected.entries, "device_mesh")
    if attach_first:
        assert selected.entries.device.type == "cpu"
        assert not by_rows
    linear = selected.direct.get("linear")
    if linear is not None and selected.mask.kind == "per-row":
        assert linear.cols is selected.mask.cols
        assert by_rows is not attach_first


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("kind", ["per-row", "irregular"])
def test_one_rank(device: str, mesh: DeviceMesh, kind: str, attach_first: bool, tmp_path):
    (model, selection), (alone, _) = model_of(kind), model_of(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shard_attached(model, selection, mesh, attach_first)
    gradsel.attach(alone, selection)
    train(model, device)
    train(alone, "cpu")
    for module in model.modules():
        for selected in selected_in(module).values():
            check_devices(selected, device, attach_first)

    def check(state: dict[str, Tensor]) -> None:
        for name, tensor in alone.state_dict().items():
            if name in state:
                torch.testing.assert_close(state[name].cpu(), tensor, rtol=0, atol=1e-9, msg=name)

    check(whole_state(model))
    gradsel.export(model, tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    assert plain.keys() == before.keys()
    check(plain)
    delta, expected = gradsel.Delta.of(model), gradsel.Delta.of(alone)
    assert {name: part.digest for name, part in delta.items()} == {name: part.digest for name, part in expected.items()}
    if not attach_first:
        restored = whole_state(gradsel.detach(model, restore=True))
        assert all(torch.equal(restored[name].cpu(), tensor) for name, tensor in before.items())
