"""Damaged files of selections are refused."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

import gradsel
from tests.support.toy import Toy


def damage(path, change):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def replace_in(metadata, old, new):
    metadata["parameters"] = metadata["parameters"].replace(old, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.update(format="pt"), "format .*'pt'"),
        (lambda m, t: m.update(version="99"), "version 99"),
        (lambda m, t: t["blocks.0.fc1.weight:cols"].fill_(65535), "damaged.*65535"),
        (lambda m, t: t.pop("blocks.0.fc1.weight:cols"), "damaged: KeyError"),
        (lambda m, t: replace_in(m, "per-row", "diagonal"), "kind .*'diagonal'"),
        (lambda m, t: m.update(parameters=json.dumps({"a": 1})), "damaged"),
        (lambda m, t: m.update(parameters="[]"), "damaged"),
        (lambda m, t: m.update(parameters="[" * 100_000), "damaged"),
        (
            lambda m, t: m.update(parameters=m["parameters"].replace('"row_dims": [0]', '"row_dims": [5]')),
            "row_dims .*distinct",
        ),
        (lambda m, t: m.update(parameters=m["parameters"].replace('"groups": 1', '"groups": 0')), "groups = 0"),
        (lambda m, t: m.update(parameters='{"a": {"kind": "whole", "shape": [-3, 4]}}'), "list of sizes"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    path = tmp_path / "s.selection"
    gradsel.select(Toy(), None, None, criterion="magnitude").save(path)
    damage(path, change)
    with pytest.raises(ValueError, match=message):
        gradsel.Selection.load(path)


def test_a_file_that_is_no_safetensors(tmp_path):
    path = tmp_path / "s.selection"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="readable safetensors"):
        gradsel.Selection.load(path)
