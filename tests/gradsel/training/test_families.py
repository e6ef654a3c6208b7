"""Every family of models from one end to the other: trained, killed, resumed, tested, used."""

from __future__ import annotations

import json
import signal

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

import gradsel
from gradsel.cli import main as cli
from gradsel.training import Config
from tests.support import pretrained, ranks, runs, tiny

CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
#: Model, data, method with options, learning rate, whether its weights are real, further settings.
CASES = {
    "MiniLM": ("minilm", "docstrings", ("gps", {"k": 4}), 3e-3, True, {"data.max_length": 24}),
    "EfficientNet-Lite0": ("efficientnet", "digits", ("grft", {"columns": 2}), 1e-2, True, {"data.image_size": 64}),
    "timm ViT": ("vit_tiny_patch16_224", "digits", ("gps", {}), 1e-3, False, {"model.options": tiny.VIT}),
    "timm ConvNeXt": ("convnext_atto", "digits", ("grft", {"rows": 1, "anchor": 1e-3}), 1e-3, False,
                      {"model.options": CONVNEXT, "data.image_size": 32}),
    "transformers ViT": ("vit", "digits", ("gps", {"k": 2}), 1e-3, False, {}),
    "Llama, tied": ("llama", "docstrings", ("gps", {"criterion": "fisher"}), 1e-3, False, {"data.max_length": 24}),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    return {
        "docstrings": pretrained.docstrings(folder / "docstrings", train=16, test=8),
        "digits": pretrained.digits(folder / "digits", classes=4, train=9, test=3),
    }


def model_of(name, data, folder):
    if name == "llama":
        texts = (data["docstrings"] / "train.csv").read_text().splitlines()
        return pretrained.llama(folder, texts)
    made = {"efficientnet": pretrained.efficientnet, "vit": pretrained.vit}
    return pretrained.minilm() if name == "minilm" else made[name](folder) if name in made else name


@pytest.mark.filterwarnings("ignore:.*neurons score zero everywhere:UserWarning")  # ReLU6 cuts their gradients off
@pytest.mark.parametrize("case", CASES)
def test_trained_killed_and_resumed_tested_and_used(case, data, tmp_path, capsys):
    model, which, (method, options), rate, real, further = CASES[case]
    name = str(model_of(model, data, tmp_path / "model"))
    values = {
        "data.path": str(data[which]), "model.name": name, "method.name": method, "method.options": options,
        "model.weights": "none" if model == name else "pretrained", "recipe.epochs": 2, "recipe.batch_size": 12,
        "recipe.learning_rate": rate, "device": "cpu", "output.report": False, "output.save_steps": 2, **further,
    }  # fmt: skip
    config = Config().replaced({**values, "output.folder": str(tmp_path / "straight")})
    straight = gradsel.finetune(config, quiet=True)
    losses = [entry["loss"] for entry in straight.results["history"] if "loss" in entry]
    assert losses[-1] < losses[0] or not real
    assert straight.metrics["top1"] > 80 or model != "minilm"

    killed = config.replaced({"output.folder": str(tmp_path / "killed")})
    (tmp_path / "killed.yaml").write_text(killed.to_yaml())
    (ended,) = ranks.run(
        ["finetune", "--config", str(tmp_path / "killed.yaml")], tmp_path, count=1, what="SIGKILL", at=3
    )
    assert ended.code == -signal.SIGKILL, ended.printed
    counted = json.loads((tmp_path / "killed" / "seconds.json").read_text())
    resumed = gradsel.resume(tmp_path / "killed", quiet=True)
    runs.check_same_result(resumed, straight)
    for part in ("training", "selection", "all"):
        assert resumed.results["seconds"][part] > counted[part]

    capsys.readouterr()
    assert cli.main(["evaluate", str(resumed.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == straight.metrics
    sample = "a turtle draws a line" if which == "docstrings" else str(data["digits"] / "test" / "1" / "9.png")
    assert cli.main(["predict", str(resumed.folder), sample, "--top", "1"]) == 0
    guess = capsys.readouterr().out.split("\t")[1]
    assert guess.startswith("turtle ") or model != "minilm"


def test_the_convnet_recognises_a_flower(tmp_path):
    """Its weights are in the right places."""
    model = timm.create_model(f"local-dir:{pretrained.efficientnet(tmp_path / 'model')}", pretrained=True).eval()
    settings = resolve_model_data_config(model)
    flower = create_transform(**settings)(Image.fromarray(load_sample_image("flower.jpg")))
    with torch.no_grad():
        best = model(flower[None]).argmax().item()
    assert ImageNetInfo().index_to_description(best) == "daisy"
