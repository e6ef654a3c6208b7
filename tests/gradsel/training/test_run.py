"""Whole runs: every method on images and texts, stopped and resumed, tested and used in a new process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerCallback

import gradsel
from gradsel.training import RunError
from gradsel.training.run import Stopped
from tests.support import runs
from tests.support.runs import Interrupt

ROOT = Path(__file__).parents[3]
METHODS = {
    "gps": {"k": 2},
    "grft": {"columns": 1, "anchor": 1e-3, "subsets": 2},
    "full": {},
    "linear": {},
    "bias": {},
    "lora": {"rank": 2, "dropout": 0.1},
    "shira": {"rank": 2},
    "ssf": {},
    "spt-lora": {"budget": 900, "rank": 1},
    "vpt-deep": {"prompts": 3},
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("images", name) for name in METHODS), *(("texts", name) for name in METHODS if name != "vpt-deep")],
)
def test_every_method_trains_and_its_folder_gives_the_same_numbers(kind, name, images, table, bert, tmp_path):
    settings = {"method__name": name, "method__options": METHODS[name], "recipe__epochs": 1}
    output = tmp_path / "run"
    if kind == "images":
        config = runs.image_run(images, output, **settings)
    else:
        config = runs.text_run(table, bert, output, **settings)
    result = gradsel.finetune(config, quiet=True)
    files = {path.name for path in output.iterdir()}
    assert {"config.yaml", "labels.json", "results.json", "log.txt", "README.md"} <= files
    assert "delta.safetensors" in files or name in ("full", "lora", "shira")
    assert result.results == json.loads((output / "results.json").read_text())
    assert 0 < result.results["trained"] <= result.results["parameters"]
    assert gradsel.evaluate(output) == result.metrics
    for checkpoint in (output / "checkpoints").iterdir():
        stored = load_file(checkpoint / "trained.safetensors")
        assert sum(tensor.numel() for tensor in stored.values()) == result.results["trained"]


def test_a_new_process_gives_the_same_numbers(images, tmp_path):
    result = gradsel.finetune(runs.image_run(images, tmp_path / "run"), quiet=True)
    code = (
        "import json, sys, torch; torch.set_num_threads(1); from gradsel.cli.main import main; "
        f"main(['evaluate', {str(result.folder)!r}, '--json']); "
        f"main(['predict', {str(result.folder)!r}, {str(images / 'test/red/0.png')!r}, '--top', '2'])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, end = json.JSONDecoder().raw_decode(done.stdout)
    assert found == result.metrics
    path, *classes = done.stdout[end:].strip().split("\t")
    assert path == str(images / "test/red/0.png")
    assert len(classes) == 2
    assert all(re.fullmatch(r"(red|green|blue) \d+\.\d %", each) for each in classes)


@pytest.mark.parametrize("step", [2, 6, 7], ids=["in the first epoch", "at the end of the second", "in the third"])
def test_stopped_by_ctrl_c_and_resumed_is_as_if_it_had_not_stopped(step, images, tmp_path):
    settings = {"recipe__epochs": 3, "model__drop_path": 0.2, "recipe__warmup_epochs": 1.0}
    straight = gradsel.finetune(runs.image_run(images, tmp_path / "straight", **settings), quiet=True)
    assert straight.results["steps"] == 9
    handler = signal.getsignal(signal.SIGINT)
    config = runs.image_run(images, tmp_path / "stopped", **settings)
    with pytest.raises(Stopped):
        gradsel.finetune(config, callbacks=[Interrupt(step)], quiet=True)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "stopped" / "checkpoints" / f"checkpoint-{step}").is_dir()
    assert not (tmp_path / "stopped" / "results.json").exists()
    with pytest.raises(ValueError, match="is not finished; gradsel resume"):
        gradsel.evaluate(tmp_path / "stopped")
    runs.check_same_result(gradsel.resume(tmp_path / "stopped", quiet=True), straight)
    with pytest.raises(ValueError, match="is finished; there is nothing to resume"):
        gradsel.resume(tmp_path / "stopped")


@pytest.mark.parametrize("name", ["grft", "full", "lora", "spt-lora"])
def test_killed_and_resumed_is_as_if_it_had_not_stopped(name, table, bert, tmp_path):
    settings = {"method__name": name, "method__options": METHODS[name], "recipe__epochs": 2}
    if name == "grft":
        settings["method__options"] = {"rows": 1, "anchor": 1e-2}
    straight = gradsel.finetune(runs.text_run(table, bert, tmp_path / "straight", **settings), quiet=True)
    config = runs.text_run(table, bert, tmp_path / "killed", **settings)
    with pytest.raises(RuntimeError, match="killed"):
        gradsel.finetune(config, callbacks=[Interrupt(4, crash=True)], quiet=True)
    half = tmp_path / "killed" / "checkpoints" / "checkpoint-4"
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"cut off")
    runs.check_same_result(gradsel.resume(tmp_path / "killed", quiet=True), straight)


def test_the_best_epoch_of_the_validation_set_is_what_counts(images, tmp_path):
    config = runs.image_run(images, tmp_path / "run", recipe__epochs=4, recipe__learning_rate=0.1, output__keep=4)
    result = gradsel.finetune(config, quiet=True)
    scores = {e["step"]: e["eval_top1"] for e in result.results["history"] if "eval_top1" in e}
    best = result.results["best_checkpoint"]
    assert scores[best] == max(scores.values())
    assert best == min(step for step in scores if scores[step] == scores[best])
    stored = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / "trained.safetensors")
    delta = gradsel.Delta.load(tmp_path / "run" / "delta.safetensors")
    for name, part in delta.items():
        values = stored[name if part.mask.is_whole else f"{name}_values"]
        assert torch.equal(values.reshape(-1), part.values.reshape(-1)), name


@pytest.mark.parametrize(
    ("name", "options", "rate"),
    [("gps", {"k": 2}, 1e-2), ("grft", {"rows": 3, "anchor": 1e-4}, 1e-2), ("full", {}, 3e-3)],
)
def test_it_learns(name, options, rate, images, tmp_path):
    settings = {"method__name": name, "method__options": options, "recipe__learning_rate": rate, "recipe__epochs": 15}
    config = runs.image_run(images, tmp_path / "run", recipe__mixup=0.0, recipe__cutmix=0.0, **settings)
    result = gradsel.finetune(config, quiet=True)
    assert result.metrics["top1"] > 90
    losses = [entry["loss"] for entry in result.results["history"] if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_early_stopping(images, tmp_path):
    settings = {"recipe__epochs": 30, "recipe__learning_rate": 1e-12, "recipe__patience": 1}
    result = gradsel.finetune(runs.image_run(images, tmp_path / "run", **settings), quiet=True)
    assert result.results["steps"] == 2 * 3


def test_other_data_and_predictions(table, bert, tmp_path):
    gradsel.finetune(runs.text_run(table, bert, tmp_path / "run"), quiet=True)
    other = runs.reviews(tmp_path / "other.csv", count=10)
    assert gradsel.evaluate(tmp_path / "run", other)["samples"] == 10
    found = gradsel.predict(tmp_path / "run", ["the fine great thing", "the awful thing"], top=5)
    assert [len(each) for each in found] == [2, 2]
    assert all(sum(share for _, share in each) == pytest.approx(1) for each in found)
    with pytest.raises(ValueError, match="takes 1 texts at a time, got 2"):
        gradsel.predict(tmp_path / "run", [("a", "b")])
    (tmp_path / "strange.csv").write_text("text,label\n" + "a,good\nb,ugly\n" * 3)
    with pytest.raises(ValueError, match="knows no class 'ugly'"):
        gradsel.evaluate(tmp_path / "run", tmp_path / "strange.csv")


@pytest.mark.filterwarnings("error")
def test_other_data_may_have_one_class_or_one_sample(images, tmp_path):
    """The model knows its classes, so the data need not show them all."""
    gradsel.finetune(runs.image_run(images, tmp_path / "run", recipe__epochs=1), quiet=True)
    whole = gradsel.evaluate(tmp_path / "run", images)["per_class"]
    (tmp_path / "one").mkdir()
    shutil.copytree(images / "test" / "green", tmp_path / "one" / "green")
    found = gradsel.evaluate(tmp_path / "run", tmp_path / "one")
    assert found["samples"] == len(list((images / "test" / "green").iterdir()))
    assert found["top1"] == pytest.approx(100 * whole["green"]["recall"])
    assert found["per_class"]["red"]["samples"] == 0
    for path in sorted((tmp_path / "one" / "green").iterdir())[1:]:
        path.unlink()
    assert gradsel.evaluate(tmp_path / "run", tmp_path / "one")["samples"] == 1
    (tmp_path / "one" / "green").rename(tmp_path / "one" / "violet")
    with pytest.raises(RunError, match="the model knows no class 'violet'"):
        gradsel.evaluate(tmp_path / "run", tmp_path / "one")
    next((tmp_path / "one" / "violet").iterdir()).unlink()
    with pytest.raises(RunError, match="nothing to test on"):
        gradsel.evaluate(tmp_path / "run", tmp_path / "one")


class Poison(TrainerCallback):
    """Makes a trained value NaN in a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = torch.nan


def test_a_run_that_diverges_late_says_what_is_left(images, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RunError, match="training has diverged") as raised:
        gradsel.finetune(runs.image_run(images, run, recipe__epochs=3), callbacks=[Poison(4)], quiet=True)
    last = max(int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").iterdir())
    assert f"{run} keeps checkpoints up to step {last} and its selection and the log of this run" in str(raised.value)
    assert "resuming would end in the same way, so begin anew with another --output" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(RunError, match=rf"keeps checkpoints up to step {last} .* end in the same way"):
        gradsel.resume(run, callbacks=[Poison(last)], quiet=True)


def test_the_written_configuration_repeats_the_run(images, tmp_path):
    from gradsel.training import read_config

    first = gradsel.finetune(runs.image_run(images, tmp_path / "first"), quiet=True)
    config = read_config(tmp_path / "first" / "config.yaml").replaced({"output.folder": str(tmp_path / "second")})
    runs.check_same_result(first, gradsel.finetune(config, quiet=True))


def test_accumulated_batches_are_one_batch(images, tmp_path):
    settings = {"method__name": "bias", "recipe__mixup": 0.0, "recipe__cutmix": 0.0}
    gradsel.finetune(runs.image_run(images, tmp_path / "whole", **settings), quiet=True)
    settings |= {"recipe__batch_size": 3, "recipe__accumulation": 2}
    gradsel.finetune(runs.image_run(images, tmp_path / "parts", **settings), quiet=True)
    whole, parts = (gradsel.Delta.load(tmp_path / name / "delta.safetensors") for name in ("whole", "parts"))
    for name, part in whole.items():
        torch.testing.assert_close(parts[name].values, part.values, rtol=1e-3, atol=1e-4)


def test_bfloat16(images, tmp_path):
    result = gradsel.finetune(runs.image_run(images, tmp_path / "run", precision="bf16"), quiet=True)
    assert gradsel.evaluate(tmp_path / "run") == result.metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "nowhere"}, "no file or folder nowhere"),
        ({"model__name": "vit_tiny_patch16_225"}, "vit_tiny_patch16_225.* neither .*did you mean vit_tiny_patch16_224"),
        ({"model__name": "timm/vit_tini"}, "timm has no model 'vit_tini'; did you mean"),
        ({"model__name": "./models/none"}, "no folder ./models/none"),
        ({"model__options": {"depht": 2}}, r"model\.options: .*depht"),
        ({"method__name": "gsp"}, "no method 'gsp'; did you mean gps"),
        ({"method__options": {"rank": 2}}, "gps has no option 'rank'"),
        ({"method__options": {"k": 0}}, "k >= 1, got 0"),
        ({"device": "cuda"}, "torch sees no GPU"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"recipe__warmup_epochs": 2.0}, "leaves nothing of the 2 epochs"),
        ({"output__folder": ""}, "output.folder is not set; pass --output"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(changes, message, images, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = runs.image_run(images, tmp_path / "run").replaced(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    with pytest.raises(ValueError, match=message) as raised:
        gradsel.finetune(config, quiet=True)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_folders_and_disks_that_do_not_fit(images, table, bert, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(ValueError, match=r"output\.folder: .*full exists and is not empty$"):
        gradsel.finetune(runs.image_run(images, tmp_path / "full"))
    assert os.listdir(tmp_path / "full") == ["x"]
    with pytest.raises(ValueError, match="has no run of gradsel"):
        gradsel.resume(tmp_path / "full")
    with pytest.raises(ValueError, match=r"recipe\.patience needs a validation set"):
        gradsel.finetune(runs.text_run(table, bert, tmp_path / "run", recipe__patience=2))
    with pytest.raises(ValueError, match="mix images, but the data are texts"):
        gradsel.finetune(runs.text_run(table, bert, tmp_path / "run", recipe__mixup=0.1))
    with pytest.raises(ValueError, match="a model for images, the data are texts"):
        gradsel.finetune(runs.image_run(table, tmp_path / "run", recipe__mixup=0.0, recipe__cutmix=0.0))
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(ValueError, match=r"need about .* MB left; keep fewer checkpoints"):
        gradsel.finetune(runs.image_run(images, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
