"""The model card: its metadata are those of the hub's format, and its code runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

import gradsel
from gradsel.cli import main as cli
from gradsel.training.card import _hub_id
from tests.support import runs


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_the_card_is_one_of_the_hub_and_its_code_runs(kind, images, table, bert, tmp_path, monkeypatch, capsys):
    output = tmp_path / "my run"
    config = runs.image_run(images, output) if kind == "images" else runs.text_run(table, bert, output)
    result = gradsel.finetune(config.replaced({"recipe.epochs": 1}), quiet=True)
    card = ModelCard.load(output / "README.md")
    task = "image-classification" if kind == "images" else "text-classification"
    assert card.data.pipeline_tag == task
    assert card.data.library_name == "gradsel"
    assert card.data.tags == ["gradsel", "gps"]
    assert card.data.base_model == ("timm/vit_tiny_patch16_224" if kind == "images" else None)
    scores = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert scores["accuracy"] == pytest.approx(result.metrics["top1"] / 100, abs=1e-6)
    assert scores["matthews_correlation"] == pytest.approx(result.metrics["matthews"], abs=1e-6)
    assert f"{result.results['trained']:,} of {result.results['parameters']:,}" in card.text

    monkeypatch.chdir(tmp_path)
    if kind == "images":
        shutil.copy(images / "test/red/0.png", tmp_path / "photo.jpg")
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    exec(compile(code, "card", "exec"), {})
    by_python = re.findall(r"^(\w+): ([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    line = re.search(r"^gradsel (predict .*)$", card.text, re.MULTILINE)[1]
    assert cli.main(shlex.split(line)) == 0
    by_command = re.findall(r"(\w+) ([\d.]+) %", capsys.readouterr().out)
    assert by_python == by_command
    assert len(by_python) == min(3, result.results["classes"])
    line = re.search(r"`gradsel (finetune .*?)`", card.text)[1]
    assert cli.main([*shlex.split(line), "--print-config"]) == 0
    assert os.listdir(tmp_path).count("NEW") == 0


@pytest.mark.parametrize("name", ["google/vit-base-patch16-224", "timm/vit_base_patch16_224", "vit_base_patch16_224"])
def test_ids_are_those_of_the_hub(name, tmp_path):
    found = _hub_id(name)
    validate_repo_id(found)
    assert found.count("/") == 1
    assert _hub_id(str(tmp_path)) is None
