"""Segmentation with SAM: what is trained, the loss and the metrics, whole runs, stopped and resumed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import gradsel
from gradsel.cli import main as cli
from gradsel.parameters.rules import parameter_rules, sizes_of
from gradsel.training import ModelConfig, predict_masks
from gradsel.training.models import load_model
from gradsel.training.run import Stopped
from gradsel.training.segmentation.data import read_mask
from gradsel.training.segmentation.model import batch_loss, load_sam, mask_loss, masks_of, sam_parts
from gradsel.training.segmentation.scores import dice_and_iou, metrics
from gradsel.training.segmentation.task import Segmentation
from tests.support import masks, runs
from tests.support.runs import Interrupt, check_same_result

ROOT = Path(__file__).parents[3]
METHODS = {
    "gps": {"k": 2},
    "grft": {"rows": 1, "anchor": 1e-3, "subsets": 2},
    "full": {},
    "linear": {},
    "bias": {},
    "lora": {"rank": 2},
}
#: Of the tiny SAM: rows of the ranked matrices, biases of the encoder with those of the neck's norms, and the decoder.
ROWS, BIASES, DECODER = 2 * (96 + 32 + 64 + 32) + 32 + 2 * 16, 2 * (96 + 32 + 64 + 32) + 32 + 2 * 16, 8344


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return masks.masked_folder(tmp_path_factory.mktemp("data") / "ellipses", train=12, val=3, test=4)


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return masks.sam_folder(tmp_path_factory.mktemp("model") / "sam")


# --- What is trained ---------------------------------------------------------------------------------------------


def test_a_sam_without_the_task_is_told_the_task(sam):
    with pytest.raises(ValueError, match=r"is not a model for images; for images with masks, pass --task segmentation"):
        load_model(ModelConfig(name=str(sam)), ["a", "b"], "images")


def test_counts_of_sam_vit_b_are_those_of_the_published_code():
    with torch.device("meta"):
        model = transformers.SamModel(transformers.SamConfig())
    parts = sam_parts(model)
    rules, parameters = parameter_rules(model, **parts.rules(())), dict(model.named_parameters())
    assert sum(rows for rows, _ in sizes_of(rules, parameters).values()) == 84_224
    assert all(name.startswith("vision_encoder.") for name in sizes_of(rules, parameters))
    whole = {name: parameters[name].numel() for name, rule in rules.items() if rule.action == "whole"}
    encoder = sum(count for name, count in whole.items() if name.startswith("vision_encoder."))
    assert encoder == 83_712 + 512  # those of ViT-B/16, and of the neck's two norms
    decoder, iou_head, other_masks = 4_058_340, 132_612, 3 * 139_808
    assert sum(p.numel() for p in model.mask_decoder.parameters()) == decoder
    assert sum(whole.values()) - encoder == decoder - iou_head - other_masks + 256  # the embedding of no mask


def test_all_that_is_trained_has_a_gradient_and_nothing_that_is_unused(sam):
    loaded = load_sam(ModelConfig(name=str(sam)))
    batch = {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.randint(0, 2, (2, 64, 64), dtype=torch.uint8)}
    loaded.model.requires_grad_(True)
    batch_loss(loaded.model, batch).backward()
    rules = parameter_rules(loaded.model, **loaded.rules)
    moved = {name for name, p in loaded.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name, rule in rules.items() if rule.action != "freeze"} <= moved
    assert moved.isdisjoint(loaded.parts.unused)
    assert {name for name in rules if name not in moved} == set(loaded.parts.unused)


def test_where_the_general_rules_differ(sam):
    model = load_sam(ModelConfig(name=str(sam))).model
    general, own = parameter_rules(model), parameter_rules(model, **sam_parts(model).rules(()))
    different = {name for name in own if own[name].action != general[name].action}
    positions = {name for name in different if ".rel_pos_" in name}
    neck = {name for name in different if "neck.layer_norm" in name}
    assert len(positions) == 4
    assert {own[name].action for name in positions} == {"freeze"}
    assert {own[name].action for name in neck} == {"whole"}
    assert all(not name.startswith("vision_encoder.") for name in different - positions - neck)


# --- Loss and metrics --------------------------------------------------------------------------------------------


def test_the_loss_is_cross_entropy_and_iou():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[2.0, -1.0], [0.5, 0.0]]])
    truth = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [1, 0]]], dtype=torch.uint8)
    chance = logits.double().sigmoid()
    entropy = -torch.where(truth > 0, chance, 1 - chance).log().mean()
    shared = (chance * truth).sum((1, 2))
    iou = shared / (chance.sum((1, 2)) + truth.sum((1, 2)) - shared)
    assert iou[0] == pytest.approx(1 / 3)
    assert mask_loss(logits, truth).item() == pytest.approx((entropy + 1 - iou.mean()).item(), rel=1e-6)
    assert mask_loss(logits, truth[:, :1].expand(2, 6, 2)).isfinite()  # logits are resized to the mask
    assert mask_loss(logits, torch.zeros_like(truth)).isfinite()  # without foreground, too


def test_dice_and_iou_of_each_image():
    logits, truth = torch.full((4, 4, 4), -0.1), torch.zeros(4, 4, 4, dtype=torch.uint8)
    logits[0, :2], truth[0, 1:3] = 0.1, 1  # 8 and 8 pixels, 4 of them in both
    truth[1, 0] = 1  # missed
    logits[2, 0] = 0.1  # where there is nothing
    dice, iou = dice_and_iou(logits, truth)
    assert dice[:3] == [0.5, 0.0, 0.0]
    assert iou[:3] == pytest.approx([1 / 3, 0.0, 0.0])
    assert math.isnan(dice[3])
    assert math.isnan(iou[3])
    found = metrics(logits, truth)
    assert found["mdice"] == pytest.approx(100 * 0.5 / 3)
    assert found["miou"] == pytest.approx(100 / 9)
    assert found["per_image"]["dice"] == [0.5, 0.0, 0.0, None]
    assert json.loads(json.dumps(found)) == found


# --- Runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_its_folder_gives_the_same_numbers(name, data, sam, tmp_path):
    settings = {"method__name": name, "method__options": METHODS[name], "recipe__epochs": 1}
    result = gradsel.finetune(masks.mask_run(data, sam, tmp_path / "run", **settings), quiet=True)
    loaded = load_sam(ModelConfig(name=str(sam)))
    total = sum(parameter.numel() for parameter in loaded.model.parameters())
    unused = sum(loaded.model.get_parameter(name).numel() for name in loaded.parts.unused)
    trained = {
        "gps": 2 * ROWS + BIASES + DECODER,
        "grft": 2 * (32 + 32 + 32 + 64) + 3 * 16 * 16 + 32 + 16 * 9 + BIASES + DECODER,  # a row of every matrix
        "full": total - unused,
        "linear": DECODER,
        "bias": BIASES + 2 * 2 * 32 + DECODER,  # and those of the norms of two blocks
        "lora": 2 * 2 * ((32 + 96) + (32 + 32) + 2 * (32 + 64)) + DECODER,
    }
    assert result.results["trained"] == trained[name]
    assert result.results["parameters"] == total
    assert gradsel.evaluate(tmp_path / "run") == result.metrics
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        stored = load_file(checkpoint / "trained.safetensors")
        assert sum(tensor.numel() for tensor in stored.values()) == result.results["trained"]


def test_it_learns(data, sam, tmp_path):
    config = masks.mask_run(data, sam, tmp_path / "run", recipe__epochs=12, method__options={"k": 4})
    task = Segmentation()
    loaded, split = task.load(config, [], "masks"), task.read(config).splits["test"]
    batch = task.collate(loaded)([task.testing(split, loaded, config)[number] for number in range(len(split.labels))])
    with torch.no_grad():
        before = metrics(masks_of(loaded.model, {"pixel_values": batch["pixel_values"]}), batch["labels"])
    result = gradsel.finetune(config, quiet=True)
    assert result.metrics["mdice"] > 65, (before["mdice"], result.metrics["mdice"])
    assert result.metrics["mdice"] > before["mdice"] + 20
    assert result.metrics["loss"] < 0.8 * before["loss"]
    # Masks of the images' own size say nearly the same as those of the input's size, which count.
    split = task.read(config).splits["test"]
    truth = [read_mask(path) for path in split.labels]
    found = predict_masks(result.folder, split.inputs)
    dice = [2 * float((ours * mask).sum() / (ours.sum() + mask.sum())) for ours, mask in zip(found, truth, strict=True)]
    assert 100 * sum(dice) / len(dice) == pytest.approx(result.metrics["mdice"], abs=2)
    history = result.results["history"]
    scores = {entry["step"]: entry["eval_mdice"] for entry in history if "eval_mdice" in entry}
    assert len(scores) == 12
    assert scores[result.results["best_checkpoint"]] == max(scores.values())


@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "killed"])
def test_resumed_is_as_if_it_had_not_stopped(crash, data, sam, tmp_path):
    settings = {"recipe__epochs": 2, "data__augmentation": "crop", "method__options": {"k": 2}}
    straight = gradsel.finetune(masks.mask_run(data, sam, tmp_path / "straight", **settings), quiet=True)
    config = masks.mask_run(data, sam, tmp_path / "halved", **settings)
    with pytest.raises(RuntimeError if crash else Stopped):
        gradsel.finetune(config, callbacks=[Interrupt(4, crash)], quiet=True)
    check_same_result(gradsel.resume(tmp_path / "halved", quiet=True), straight)


def test_a_new_process_gives_the_same_numbers_and_masks(data, sam, tmp_path):
    result = gradsel.finetune(masks.mask_run(data, sam, tmp_path / "run", output__report=True), quiet=True)
    images = sorted((data / "test" / "images").iterdir())
    commands = [
        ["evaluate", str(result.folder), "--json"],
        ["predict", str(result.folder), *map(str, images)],
        ["predict", str(result.folder), str(images[0]), "--output", "elsewhere"],
    ]
    code = (
        "import torch; torch.set_num_threads(1); from gradsel.cli.main import main; "
        f"assert not any(main(command) for command in {commands!r})"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, end = json.JSONDecoder().raw_decode(done.stdout)
    assert found == result.metrics
    folder = result.folder / "predictions"
    assert done.stdout[end:].split() == [
        *(str(each) for image in images for each in (image, folder / f"{image.stem}.png")),
        str(images[0]), "elsewhere/test0.png",
    ]  # fmt: skip
    for image, mask in zip(images, predict_masks(result.folder, images), strict=True):
        assert mask.shape == (60, 72)
        assert np.array_equal(np.asarray(Image.open(folder / f"{image.stem}.png")), mask.numpy())


def test_the_report_and_the_card(data, sam, tmp_path):
    result = gradsel.finetune(masks.mask_run(data, sam, tmp_path / "run", output__report=True), quiet=True)
    page = (result.folder / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 3 * 4  # three pictures of each image
    assert page.count(', truth"') == 4
    assert f"{result.metrics['mdice']:.1f} %" in page
    card = (result.folder / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card
    assert f"| mDice | {result.metrics['mdice']:.2f} % |" in card
    assert gradsel.evaluate(result.folder, masks.masked_folder(tmp_path / "other"))["samples"] == 10


def test_on_the_command_line_with_random_weights(data, sam, tmp_path, capsys):
    run = ["--data", str(data), "--model", str(sam), "--weights", "none", "--output", str(tmp_path / "run")]
    recipe = ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--no-report"]
    assert cli.main(["finetune", "--task", "segmentation", *run, *recipe]) == 0
    assert "mDice" in (tmp_path / "run" / "log.txt").read_text()
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.endswith("4 images\n")
    assert cli.main(["predict", str(tmp_path / "run"), str(data / "test/images/test0.jpg"), "nothing.jpg"]) == 1
    assert "there is no image nothing.jpg" in capsys.readouterr().err
    twice = [str(data / "test/images/test0.jpg")] * 2
    assert cli.main(["predict", str(tmp_path / "run"), *twice]) == 1
    assert "two images are called test0" in capsys.readouterr().err
    assert cli.main(["predict", str(tmp_path / "run"), *twice, "--pair"]) == 1
    assert "--pair is for texts, but this run segments images" in capsys.readouterr().err
    assert not (tmp_path / "run" / "predictions").exists()
    with pytest.raises(ValueError, match="is one of segmentation, so it has no classes"):
        gradsel.predict(tmp_path / "run", twice[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method__options": {"loss": "contrastive"}}, r"method\.options\.loss is 'contrastive', but without classes"),
        ({"method__name": "grft", "method__options": {"anchor_blocks": 2}}, r"anchor_blocks .* takes all, got 2"),
        ({"recipe__mixup": 0.8}, r"recipe\.mixup is 0\.8, but it is for classification alone"),
        ({"recipe__label_smoothing": 0.1}, r"recipe\.label_smoothing is 0\.1, but it is"),
        ({"data__kind": "texts"}, r"data\.kind is 'texts', but it is for classification alone"),
        ({"data__augmentation": "fgvc"}, r"data\.augmentation is 'fgvc', expected one of crop, flip, none"),
        ({"data__image_size": 128}, r"data\.image_size is 128, but .* takes 64"),
        ({"model__drop_path": 0.1}, r"\(sam\) has no drop path"),
        ({"data__path": "nowhere"}, r"data\.path: there is no folder nowhere"),
        ({"method__name": "gsp"}, "no method 'gsp'; did you mean gps"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(changes, message, data, sam, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        gradsel.finetune(masks.mask_run(data, sam, tmp_path / "run", **changes), quiet=True)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_other_models_other_methods_and_damaged_weights_are_refused(data, sam, bert, tmp_path, monkeypatch):
    from gradsel.methods import METHODS as KNOWN
    from gradsel.training.segmentation import task

    with pytest.raises(ValueError, match=r"\(bert\) is not a SAM, such as facebook/sam-vit-base"):
        gradsel.finetune(masks.mask_run(data, bert, tmp_path / "run"))
    with pytest.raises(ValueError, match="timm/resnet18 is a model of timm; segmentation needs a SAM"):
        gradsel.finetune(masks.mask_run(data, "timm/resnet18", tmp_path / "run"))
    monkeypatch.setattr(task, "METHODS", {**KNOWN, "other": KNOWN["bias"]})
    with pytest.raises(ValueError, match=r"method\.name: other is not for segmentation; gps, grft, full"):
        gradsel.finetune(masks.mask_run(data, sam, tmp_path / "run", method__name="other"))
    model = transformers.SamModel.from_pretrained(sam)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "upscale_conv1" not in name}
    model.save_pretrained(tmp_path / "half", state_dict=kept)
    with pytest.raises(ValueError, match=r"lacks 2 weights of SAM, first mask_decoder\.upscale_conv1\.bias"):
        gradsel.finetune(masks.mask_run(data, tmp_path / "half", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_classification_has_no_loss_of_its_own(images, tmp_path):
    with pytest.raises(ValueError, match="classification ranks by the loss contrastive or cross-entropy, got task"):
        gradsel.finetune(runs.image_run(images, tmp_path / "run", method__options={"loss": "task"}))
    with pytest.raises(ValueError, match="loss is 'task', but this task has none of its own"):
        gradsel.methods.method("gps", loss="task").prepare(torch.nn.Linear(2, 2), [])
