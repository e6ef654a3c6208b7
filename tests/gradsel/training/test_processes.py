"""Runs on two processes: the same numbers as one, stopped and killed and resumed bit for bit, errors told once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gradsel
from gradsel.training.saving import last_checkpoint
from tests.support import masks, ranks, runs

ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo"),
    pytest.mark.xdist_group("processes"),
]


def written(config, path):
    """The arguments of ``gradsel finetune`` for a configuration."""
    path.write_text(config.to_yaml())
    return ["finetune", "--config", str(path)]


def test_two_processes_do_what_one_does(tmp_path):
    images = runs.image_folder(tmp_path / "images", train=4, val=3, test=4)
    settings = {"recipe__mixup": 0.0, "recipe__cutmix": 0.0, "recipe__epochs": 3, "recipe__batch_size": 4}
    first, second = ranks.run(written(runs.image_run(images, tmp_path / "two", **settings), tmp_path / "a"), tmp_path)
    assert (first.code, second.code) == (0, 0), first.printed + second.printed
    assert "2 processes, 2 of the 4 samples of a batch in each" in first.printed
    assert "top-1" not in second.printed
    one = gradsel.finetune(runs.image_run(images, tmp_path / "one", **settings), quiet=True)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["processes"] == 2
    assert two["batch_size"] == {"all": 4, "per_process": 2}
    assert two["steps"] == one.results["steps"]

    selections = [gradsel.Selection.load(tmp_path / name / "selection.safetensors") for name in ("one", "two")]
    assert all(torch.equal(mask.to_dense(), selections[1][name].to_dense()) for name, mask in selections[0].items())
    deltas = [gradsel.Delta.load(tmp_path / name / "delta.safetensors") for name in ("one", "two")]
    for name, part in deltas[0].items():  # the order of sums differs, and Adam makes much of small gradients
        torch.testing.assert_close(deltas[1][name].values, part.values, rtol=2e-3, atol=2e-4)

    # Every sample counts once: 12 of testing, and 9 of validation, of which the last is in a batch filled up to 4.
    assert gradsel.evaluate(tmp_path / "two") == two["metrics"]
    chosen = gradsel.evaluate(tmp_path / "two", validation_only(images, tmp_path))
    logged = {entry["step"]: entry for entry in two["history"] if "eval_top1" in entry}[two["best_checkpoint"]]
    assert logged["eval_top1"] == pytest.approx(chosen["top1"], abs=1e-5)
    assert logged["eval_loss"] == pytest.approx(chosen["loss"], rel=1e-5)
    assert chosen["samples"] == 9
    found, silent = ranks.run(["evaluate", str(tmp_path / "two"), "--json"], tmp_path)
    assert json.loads(found.printed[found.printed.index("{") :]) == two["metrics"]
    assert "{" not in silent.printed


def validation_only(images, folder):
    (folder / "other").mkdir()
    (folder / "other" / "train").symlink_to(images / "train")
    (folder / "other" / "test").symlink_to(images / "val")
    return folder / "other"


@pytest.mark.supports("DDP", "save/load")
@pytest.mark.parametrize("kind", ["images", "texts", "masks"])
def test_stopped_and_killed_and_resumed_is_as_if_it_had_not_stopped(kind, images, table, bert, tmp_path):
    if kind == "masks":
        ellipses, sam = masks.masked_folder(tmp_path / "ellipses", train=10, test=3), masks.sam_folder(tmp_path / "sam")

    def config(folder):
        if kind == "masks":
            return masks.mask_run(ellipses, sam, folder, recipe__epochs=3)
        if kind == "images":
            settings = {"recipe__epochs": 3, "model__drop_path": 0.2, "method__options": {"k": 2}}
            return runs.image_run(images, folder, **settings)
        settings = {"method__name": "grft", "method__options": {"columns": 1, "subsets": 2, "anchor": 1e-3}}
        return runs.text_run(table, bert, folder, recipe__epochs=2, **settings)

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    ended = ranks.run(written(config(straight), tmp_path / "a"), tmp_path)
    assert [each.code for each in ended] == [0, 0], ended[0].printed + ended[1].printed

    ended = ranks.run(written(config(resumed), tmp_path / "b"), tmp_path, what="SIGTERM", of=1, at=2)
    assert [each.code for each in ended] == [130, 130], ended[0].printed + ended[1].printed
    assert "gradsel finetune: stopped" in ended[0].printed
    assert "stopped" not in ended[1].printed
    assert last_checkpoint(resumed / "checkpoints").name == "checkpoint-2"
    with pytest.raises(ValueError, match="by a run of 2, not of 1, processes; start it by torchrun --nproc-per-node 2"):
        gradsel.resume(resumed)

    ended = ranks.run(["resume", str(resumed)], tmp_path, what="SIGKILL", of=1, at=5)
    assert [each.code for each in ended] == [1, -signal.SIGKILL], ended[0].printed
    assert "another process of the run was killed; gradsel resume goes on" in ended[0].printed

    ended = ranks.run(["resume", str(resumed)], tmp_path)
    assert [each.code for each in ended] == [0, 0], ended[0].printed + ended[1].printed
    result = gradsel.training.Result.from_pretrained(resumed)
    runs.check_same_result(result, gradsel.training.Result.from_pretrained(straight))
    assert gradsel.evaluate(resumed) == result.results["metrics"]


def test_an_error_is_told_once_and_ends_all(images, tmp_path):
    config = runs.image_run(images, tmp_path / "run", recipe__batch_size=7)
    first, second = ranks.run(written(config, tmp_path / "a"), tmp_path)
    assert (first.code, second.code) == (1, 1)
    assert first.printed == (
        "gradsel finetune: recipe.batch_size is 7, which 2 processes cannot share equally; pass a multiple of 2\n"
    )
    assert second.printed == ""
    config = runs.image_run(images, tmp_path / "run")
    first, second = ranks.run(written(config, tmp_path / "a"), tmp_path, what="data", of=1)
    assert (first.code, second.code) == (1, 1)
    assert first.printed == ""
    assert second.printed == "gradsel finetune: data: this machine has none\n"
    assert not (tmp_path / "run").exists()

    first, second = ranks.run(written(config, tmp_path / "a"), tmp_path, what="bug", of=1, at=2)
    assert (first.code, second.code) == (1, 70)
    assert "Traceback" not in first.printed
    assert "ValueError: a bug" in second.printed


def test_torchrun_passes_the_signal_on_and_all_stop_at_the_same_step(images, tmp_path):
    config = runs.image_run(images, tmp_path / "run", recipe__epochs=40, output__save_steps=10)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    with (tmp_path / "printed").open("w") as file:
        launched = subprocess.Popen(
            [*command, "gradsel", *written(config, tmp_path / "a")],
            cwd=tmp_path, env=environment, stdout=file, stderr=file,
        )  # fmt: skip
        begun = time.monotonic()
        while last_checkpoint(tmp_path / "run" / "checkpoints") is None and launched.poll() is None:
            assert time.monotonic() - begun < ranks.SECONDS
            time.sleep(0.02)
        launched.send_signal(signal.SIGTERM)
        launched.wait(ranks.SECONDS)
    printed = (tmp_path / "printed").read_text()
    assert printed.count("gradsel finetune: stopped") == 1, printed
    assert not (tmp_path / "run" / "results.json").exists()
    last = last_checkpoint(tmp_path / "run" / "checkpoints")
    assert f"stopped after {last.name.rpartition('-')[2]} of 120 steps; gradsel resume" in printed
    assert len(list(last.glob("rng_state_*.pth"))) == 2
