"""What a task leaves behind, in every setting in which it is trained: checkpoints, deltas, and the merged model."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gradsel
from tests.support.deltas import assert_same, frozen_copy
from tests.support.selections import data, toy
from tests.support.settings import COMPILED, SETTINGS, Setting
from tests.support.toy import cross_entropy


class Training:
    """Of a model that is attached in a setting, by MaskedAdam."""

    def __init__(self, how: Setting, base: nn.Module, selection: gradsel.Selection) -> None:
        self.how, self.model = how, copy.deepcopy(base)
        gradsel.attach(self.model, selection)
        self.called = how.wrap(self.model)
        self.optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(self.called), lr=1e-2)
        self.scaler = how.scaler()

    def train(self, first: int, last: int) -> Training:
        for batch in data(self.how.dtype, last)[first:]:
            self.optimizer.zero_grad()
            with self.how.context():
                loss = cross_entropy(self.called, batch)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return self

    def parts(self) -> dict:
        return {"model": self.called, "optimizer": self.optimizer, "scaler": self.scaler}


@pytest.mark.supports("autocast", "save/load", "delta", "merge")
@pytest.mark.supports("bf16", "save/load", "delta", "merge")
@pytest.mark.supports("fp16", "save/load", "delta", "merge")
@pytest.mark.supports("torch.compile", "save/load", "delta", "merge")
@pytest.mark.supports("offload", "save/load", "delta", "merge")
@pytest.mark.parametrize("setting", [*SETTINGS, *(name for name in COMPILED if name not in SETTINGS)])
def test_a_task_in_every_setting(setting: str, tmp_path: Path) -> None:
    how = SETTINGS.get(setting) or Setting(wrap=COMPILED[setting])
    base, selection = toy(dtype=how.dtype)
    before = frozen_copy(base.eval())
    whole = Training(how, base, selection).train(0, 3)

    file = io.BytesIO()
    torch.save(
        {name: part.state_dict() for name, part in Training(how, base, selection).train(0, 2).parts().items()}, file
    )
    file.seek(0)
    resumed = Training(how, base, selection)
    for name, state in torch.load(file, weights_only=True).items():
        resumed.parts()[name].load_state_dict(state)
    resumed.train(2, 3)
    assert_same(resumed.called, whole.called.state_dict())

    gradsel.save_delta(whole.called, tmp_path / "delta")
    gradsel.export(whole.called, tmp_path / "model.safetensors")
    with torch.no_grad(), how.context():
        scores = whole.called(data(how.dtype)[0][0])
    assert gradsel.detach(whole.called) is whole.called
    with torch.no_grad(), how.context():
        assert torch.equal(whole.called(data(how.dtype)[0][0]), scores)
    assert all(type(p) is nn.Parameter for p in whole.model.parameters())
    tuned = load_file(tmp_path / "model.safetensors")
    for (name, p), q in zip(base.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(tuned[name], q), name
        assert torch.equal(p, q) != bool(selection[name].nnz and not name.startswith("tokens")), name
    delta = gradsel.Delta.load(tmp_path / "delta")
    assert set(delta) <= set(before)
    with delta.applied(base):
        assert_same(base, tuned)
    assert_same(base, before)
    with delta.applied(how.wrap(base)):
        assert torch.equal(base.head.weight, tuned["head.weight"])


# --- Offloaded by accelerate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param("select", marks=pytest.mark.refuses("offload", "select")),
        pytest.param("attach", marks=pytest.mark.refuses("offload", "attach")),
        pytest.param("train", marks=pytest.mark.refuses("offload", "attach")),
        pytest.param("delta", marks=pytest.mark.refuses("offload", "delta")),
    ],
)
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_parameters_that_accelerate_takes_away_are_missed(way: str, operation: str, refusal, tmp_path: Path) -> None:
    """They are on the meta device, and others are in their place during a forward."""
    accelerate = pytest.importorskip("accelerate")
    model, selection = toy()
    model.eval()
    if operation in ("train", "delta"):
        gradsel.attach(model, selection)
    scores = model(data()[0][0])
    folder = {"offload_dir": tmp_path} if way == "disk_offload" else {}
    getattr(accelerate, way)(model, execution_device="cpu", **folder)
    with refusal(
        (ValueError, RuntimeError), match=r"\.(weight|bias)\b.* meta device.*accelerate|meta device, first \S+:"
    ):
        {
            "select": lambda: gradsel.select(model, data(), cross_entropy),
            "attach": lambda: gradsel.attach(model, selection),
            "train": lambda: model(data()[0][0]),
            "delta": lambda: gradsel.Delta.of(model),
        }[operation]()
    with pytest.raises(ValueError, match=r"meta device, first \S+: .*remove_hook_from_submodules"):
        gradsel.export(model, tmp_path / "model.safetensors")
    attached = operation in ("train", "delta")
    if attached:
        with pytest.raises(ValueError, match=r"meta device.*remove_hook_from_submodules.* and then gradsel.detach"):
            gradsel.detach(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    if attached:
        gradsel.detach(model)
    assert torch.equal(model(data()[0][0]), scores)
    gradsel.export(model, tmp_path / "model.safetensors")
