"""The average of what is trained: by hand, in checkpoints, and in what is tested and saved."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerCallback

from gradsel.delta import Delta
from gradsel.training import evaluate, finetune, resume
from gradsel.training.averaging import Average
from gradsel.training.run import Stopped
from gradsel.training.saving import trained_state
from tests.support import runs


class Watch(TrainerCallback):
    """Averages by hand, and remembers the last values."""

    def __init__(self, decay):
        self.decay, self.average, self.last = decay, None, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = {name: tensor.clone() for name, tensor in trained_state(model).items()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.last = {name: tensor.clone() for name, tensor in trained_state(model).items()}
        for name, tensor in self.last.items():
            self.average[name] = self.decay * self.average[name] + (1 - self.decay) * tensor


@pytest.mark.parametrize("method", ["gps", "full"])
def test_what_is_tested_and_saved_is_the_average_of_every_step(images, tmp_path, method):
    watch = Watch(0.8)
    result = finetune(
        runs.image_run(images, tmp_path / "run", recipe__ema=0.8, method__name=method), callbacks=[watch], quiet=True
    )
    last = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    saved, values = load_file(last / "average.safetensors"), load_file(last / "trained.safetensors")
    assert set(saved) == set(watch.average)
    for name, tensor in watch.average.items():
        torch.testing.assert_close(saved[name], tensor)
        assert torch.equal(values[name], watch.last[name])
        assert not torch.equal(saved[name], values[name])
    assert evaluate(tmp_path / "run") == result.metrics


def test_it_does_not_change_training(images, tmp_path):
    last = []
    for ema in (None, 0.8):
        watch = Watch(0.5)
        finetune(runs.image_run(images, tmp_path / str(ema), recipe__ema=ema), callbacks=[watch], quiet=True)
        last.append(watch.last)
    for name, tensor in last[0].items():
        assert torch.equal(tensor, last[1][name])


def test_stopped_and_resumed_is_as_if_it_had_not_stopped(images, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    changes = {"recipe__ema": 0.9, "recipe__cooldown_epochs": 1}
    straight = finetune(runs.image_run(images, tmp_path / "straight", **changes), quiet=True)
    with pytest.raises(Stopped):
        finetune(runs.image_run(images, tmp_path / "stopped", **changes), callbacks=[Stop()], quiet=True)
    resumed = resume(tmp_path / "stopped", quiet=True)
    assert resumed.metrics == straight.metrics
    first, second = (load_file(tmp_path / name / "delta.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_best_checkpoint_is_that_of_the_average(images, tmp_path):
    """The image folder has a validation set, so the best epoch is loaded, and its average saved."""
    result = finetune(runs.image_run(images, tmp_path / "run", recipe__ema=0.8), quiet=True)
    best = tmp_path / "run" / "checkpoints" / f"checkpoint-{result.results['best_checkpoint']}"

    delta = Delta.load(tmp_path / "run" / "delta.safetensors")
    average = load_file(best / "average.safetensors")
    assert torch.equal(delta["head.weight"].values.flatten(), average["head.weight"].flatten())
    (told,) = [
        entry["eval_loss"]
        for entry in result.results["history"]
        if "eval_loss" in entry and entry["step"] == result.results["best_checkpoint"]
    ]
    assert evaluate(tmp_path / "run", images / "val")["loss"] == pytest.approx(told, rel=1e-5)


def test_it_is_the_average_only_inside(tmp_path):
    weight, count = torch.zeros(3), torch.tensor(0)
    average = Average(0.75, lambda: {"weight": weight, "count": count})
    with pytest.raises(RuntimeError, match="no average before training has begun"):
        average.save(tmp_path)
    average.on_train_begin(None, None, None)
    weight.fill_(4), count.fill_(7)
    average.on_step_end(None, None, None)
    with average.in_model():
        assert (weight.tolist(), int(count)) == ([1.0, 1.0, 1.0], 7)
    assert weight.tolist() == [4.0, 4.0, 4.0]
    with pytest.raises(ValueError, match=r"was saved without recipe\.ema"):
        average.load(tmp_path)
    average.save(tmp_path)
    other = Average(0.75, lambda: {"weight": torch.zeros(2), "count": count})
    with pytest.raises(ValueError, match="averages of other values"):
        other.load(tmp_path)
