"""``gradsel finetune`` and its companions on the command line."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradsel.cli import main as cli
from gradsel.cli.finetune import GROUPS
from gradsel.methods import METHODS
from gradsel.training import Config
from tests.support import runs, tiny

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return runs.image_folder(tmp_path_factory.mktemp("data") / "images", train=4, test=2)


def arguments(images, output, *more):
    options = [f"--model-option={name}={value}" for name, value in tiny.VIT.items()]
    return [
        "finetune", "--data", str(images), "--model", "vit_tiny_patch16_224", "--weights", "none", *options,
        "--epochs", "1", "--batch-size", "6", "--device", "cpu", "--no-report", "--output", str(output), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("command", [[], ["finetune"]], ids=["gradsel", "finetune"])
def test_help_does_not_import_torch(command):
    code = f"""
import sys
from gradsel.cli.main import main
try:
    main({[*command, "--help"]!r})
except SystemExit as left:
    assert left.code == 0
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "finetune" in done.stdout
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 0.5  # seconds of a processor, because the machine may be busy


def test_a_run_from_beginning_to_end(images, tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.main(arguments(images, output, "--method", "grft", "--columns", "1", "--anchor", "1e-4")) == 0
    assert "parameters trained" in (output / "log.txt").read_text()
    assert cli.main(["evaluate", str(output)]) == 0
    assert "6 samples" in capsys.readouterr().out
    assert cli.main(["predict", str(output), str(images / "test/red/0.png")]) == 0
    assert capsys.readouterr().out.count(" %") == 3
    assert cli.main(["resume", str(output)]) == 1
    assert "is finished; there is nothing to resume" in capsys.readouterr().err
    assert cli.main(["delta", "info", str(output / "delta.safetensors")]) == 0
    assert cli.main(arguments(images, output)) == 1
    assert f"gradsel resume {output} goes on" in capsys.readouterr().err


def test_settings_come_from_a_file_and_flags_override_them(images, tmp_path, capsys):
    assert cli.main([*arguments(images, tmp_path / "a", "--k", "3"), "--print-config"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert not (tmp_path / "a").exists()
    given = ["finetune", "--config", str(tmp_path / "run.yaml"), "--print-config"]
    assert cli.main([*given, "--epochs", "7"]) == 0
    printed = capsys.readouterr().out
    assert "epochs: 7" in printed
    assert "k: 3" in printed
    assert "embed_dim: 24" in printed
    assert cli.main([*given, "--method", "lora"]) == 0  # another method does not inherit options
    assert "k: 3" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "gsp"], "there is no method 'gsp'; did you mean gps?"),
        (["--rank", "3"], "gps has no option 'rank'"),
        (["--epochs", "0"], "recipe.epochs must be at least 1, got 0"),
        (["--augmentation", "corp"], "did you mean crop?"),
        (["--data", "nowhere"], "data.path: there is no file or folder nowhere"),
        (["--config", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
        (["--model-option", "x"], "--model-option takes NAME=VALUE"),
        (["--output", ""], "output.folder is not set; pass --output"),
    ],
)
def test_what_does_not_fit_is_one_line(more, message, images, tmp_path, capsys):
    assert cli.main(arguments(images, tmp_path / "run", *more)) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("gradsel finetune: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["evaluate", "resume"])
def test_a_folder_without_a_run(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path)]) == 1
    assert "has no run of gradsel" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, images, tmp_path, capsys):
    for name in ("gradsel.training.run", "gradsel.training.loop"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(arguments(images, tmp_path / "run")) == 2
    assert "fine-tuning needs transformers" in capsys.readouterr().err


def test_ctrl_c_has_the_exit_code_of_shells(monkeypatch, images, tmp_path, capsys):
    from gradsel.training import run

    def stops(config):
        raise run.Stopped

    monkeypatch.setattr(run, "finetune", stops)
    assert cli.main(arguments(images, tmp_path / "run")) == 130
    assert capsys.readouterr().err == "gradsel finetune: stopped\n"


def test_methods_are_listed_with_every_option(capsys):
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    for name, kind in METHODS.items():
        assert f"{name}: {kind.summary}" in printed
        for option in dataclasses.fields(kind):
            assert f"    {option.name} (--" in printed


def test_every_setting_has_a_flag_and_a_place_in_the_documentation():
    flags = {flag.field: flag.flag for group in GROUPS.values() for flag in group} | {"preset": "--preset"}
    page = (ROOT / "docs" / "finetune.md").read_text()
    for part, values in Config().to_dict().items():
        for name in values if isinstance(values, dict) else [None]:
            field = part if name is None else f"{part}.{name}"
            if not field.endswith(".options"):
                assert field in flags
    options = {field.removeprefix("method.options.") for field in flags if field.startswith("method.options.")}
    assert options == {option.name for kind in METHODS.values() for option in dataclasses.fields(kind)}
    missing = [flag for flag in flags.values() if f"{flag}" not in page]
    assert not missing
