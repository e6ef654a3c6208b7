"""What goes wrong during a run, or with its result afterwards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings

import pytest
import torch

import gradsel
from gradsel.cli import main as cli
from gradsel.cli import running
from gradsel.methods import ranked
from gradsel.tensor_files import save_file
from gradsel.training import evaluation, saving
from tests.support import runs, tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return runs.image_folder(tmp_path_factory.mktemp("data") / "images", train=4, test=2)


def arguments(images, output, *more, model="vit_tiny_patch16_224", options=tiny.VIT):
    given = [f"--model-option={name}={value}" for name, value in options.items()]
    return [
        "finetune", "--data", str(images), "--model", model, "--weights", "none", "--epochs", "1", "--batch-size", "6",
        "--device", "cpu", "--no-report", "--output", str(output), *given, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def results(images, tmp_path_factory):
    """The folders of finished runs by method."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("gps", "ssf", "lora", "full"):
        assert cli.main(arguments(images, folder / name, "--method", name)) == 0
    return folder


def one_line(capsys, command):
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith(f"gradsel {command}: ")
    return printed[-1]


@pytest.mark.parametrize("epochs", ["1", "3"])
def test_a_run_that_diverges_has_no_result(epochs, images, tmp_path, capsys):
    output = tmp_path / "run"
    rates = ["--learning-rate", "1e38", "--first-learning-rate", "1e38", "--warmup-epochs", "0", "--weight-decay", "1"]
    assert cli.main(arguments(images, output, *rates, "--method", "full", "--epochs", epochs)) == 1
    told = one_line(capsys, "finetune")
    assert "training has diverged" in told
    assert "a smaller --learning-rate than 1e+38" in told
    assert not output.exists()


def test_a_last_batch_of_one_sample_is_left_out_where_batchnorm_cannot_normalise_it(images, tmp_path, capsys):
    small = {"model": "test_resnet", "options": {}}
    more = ("--image-size", "32", "--method", "linear", "--batch-size", "11")
    assert cli.main(arguments(images, tmp_path / "run", *more, **small)) == 0
    assert "every epoch leaves out one sample" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 1
    assert cli.main(arguments(images, tmp_path / "vit", "--batch-size", "11")) == 0
    assert json.loads((tmp_path / "vit" / "results.json").read_text())["steps"] == 2


def test_batches_of_one_sample_are_one_line(images, tmp_path, capsys):
    small = {"model": "test_resnet", "options": {}}
    more = ("--image-size", "32", "--method", "linear", "--batch-size", "1")
    assert cli.main(arguments(images, tmp_path / "run", *more, **small)) == 1
    assert "recipe.batch_size: a batch of one sample has one value per channel" in one_line(capsys, "finetune")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_during_selection_says_how_to_go_on(images, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ranked, "select", interrupted)
        assert cli.main(arguments(images, tmp_path / "run")) == 130
    assert f"stopped; gradsel resume {tmp_path / 'run'} goes on" in capsys.readouterr().err
    assert cli.main(["resume", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("method", "file", "keep", "message"),
    [
        ("gps", "delta.safetensors", None, "is incomplete: "),
        ("gps", "selection.safetensors", None, "is incomplete: "),
        ("gps", "delta.safetensors", 100, "delta.safetensors is not a readable safetensors file"),
        ("gps", "labels.json", 9, "labels.json cannot be read"),
        ("gps", "config.yaml", None, "has no run of gradsel"),
        ("ssf", "additions.safetensors", None, "additions.safetensors is missing"),
        ("ssf", "additions.safetensors", 100, "additions.safetensors: not a readable safetensors file"),
        ("lora", "adapter/adapter_model.safetensors", None, "has no adapter of PEFT"),
        ("lora", "adapter/adapter_model.safetensors", 100, "adapter cannot be read"),
        ("lora", "adapter/adapter_config.json", 100, "adapter cannot be read"),
        ("full", "weights.safetensors", None, "weights.safetensors"),
        ("full", "weights.safetensors", 100, "weights.safetensors cannot be read, or is of another model"),
    ],
)
def test_a_damaged_result_is_one_line(method, file, keep, message, results, tmp_path, capsys):
    folder = shutil.copytree(results / method, tmp_path / "run")
    if keep is None:
        (folder / file).unlink()
    else:
        os.truncate(folder / file, keep)
    assert cli.main(["evaluate", str(folder)]) == 1
    assert message in one_line(capsys, "evaluate")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("labels.json", '{"red": 1}', "labels.json is damaged: it is no list of names"),
        ("results.json", "{}", "results.json is damaged"),
    ],
)
def test_files_with_something_else_are_one_line(file, text, message, results, images, tmp_path, capsys):
    folder = shutil.copytree(results / "gps", tmp_path / "run")
    (folder / file).write_text(text)
    assert cli.main(["predict", str(folder), str(images / "test/red/0.png")]) == 1
    assert message in one_line(capsys, "predict")


def test_pairs_and_texts_for_a_model_of_images(results, tmp_path, capsys):
    assert cli.main(["predict", "--pair", str(results / "gps"), "a", "b"]) == 1
    assert "the model takes images by their paths" in one_line(capsys, "predict")
    assert cli.main(["evaluate", str(results / "gps"), "--data", str(runs.reviews(tmp_path / "reviews.csv"))]) == 1
    assert "the model is for images, but these are texts" in one_line(capsys, "evaluate")


def test_a_folder_is_not_an_image(results, images, capsys):
    assert cli.main(["predict", str(results / "gps"), str(images / "test")]) == 1
    assert f"{images / 'test'} is a folder; name the images in it" in one_line(capsys, "predict")


def test_one_input_and_settings_in_a_dictionary_are_told_what_is_expected(results, images):
    image = images / "test/red/0.png"
    for given in (image, str(image)):
        with pytest.raises(
            gradsel.training.RunError, match=r"inputs must be a list, got a single one; pass \['.*0.png'\]"
        ):
            gradsel.predict(results / "gps", given)
    with pytest.raises(gradsel.training.RunError, match=r"config must be a Config, got dict; Config\.from_dict"):
        gradsel.finetune({"data": {"path": str(images)}})


def test_warnings_are_one_line_without_a_place_in_the_code(capsys):
    def command():
        print(warnings.formatwarning(UserWarning("first\nsecond"), UserWarning, "file.py", 1), end="")

    formatted = warnings.formatwarning
    assert running.run("evaluate", command) == 0
    assert capsys.readouterr().out == "gradsel evaluate: warning: first second\n"
    assert warnings.formatwarning is formatted


def test_a_test_set_of_one_class_that_is_recognised_warns_of_nothing():
    labels = torch.zeros(3, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluation.metrics(torch.eye(2)[labels], labels, ["a", "b"])
    assert (found["top1"], found["matthews"]) == (100, 0)


def test_all_files_of_a_result_may_be_read_by_whom_the_umask_lets(results):
    for folder in results.iterdir():
        mode = (folder / "config.yaml").stat().st_mode
        assert {file.name for file in folder.glob("*.safetensors") if file.stat().st_mode != mode} == set()


def test_the_size_of_the_whole_model_does_not_count_adapters(results):
    sizes = {name: json.loads((results / name / "results.json").read_text()) for name in ("gps", "lora", "full")}
    assert {found["bytes_of_full_model"] for found in sizes.values()} == {4 * sizes["full"]["parameters"]}


def test_a_reader_that_stops_ends_a_listing_without_a_message(capsys):
    def stopped():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):  # which main() takes for the end, as in ``gradsel presets | head``
        running.run("presets", stopped)
    assert capsys.readouterr().err == ""


def test_a_damaged_checkpoint_is_one_line_and_says_what_to_do(images, tmp_path, monkeypatch, capsys):
    saved = []

    def full(tensors, path):
        saved.append(path)
        if len(saved) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        save_file(tensors, path)

    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_file", full)
        assert cli.main(arguments(images, tmp_path / "run", "--epochs", "3")) == 1
    assert "No space left on device" in one_line(capsys, "finetune")
    [first, second] = sorted((tmp_path / "run" / "checkpoints").glob("*/trainer_state.json"))
    for name in ("loss.json", "optimizer.pt", "rng_state.pth", "selection.safetensors", "trained.safetensors"):
        file = second.parent / name
        before = file.read_bytes()
        os.truncate(file, 20)
        assert cli.main(["resume", str(tmp_path / "run")]) == 1
        assert f"{file} is damaged" in one_line(capsys, "resume")
        file.write_bytes(before)
    shutil.rmtree(second.parent)
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert f"resumed from {first.parent}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "message"),
    [("gps,gpz", "there is no method 'gpz'; did you mean gps?"), ("gps:k=x", "k >= 1, got 'x'")],
)
def test_a_comparison_of_what_there_is_not_is_one_line(methods, message, images, tmp_path, capsys):
    model = ["--model", "vit_tiny_patch16_224", "--weights", "none"]
    given = ["--data", str(images), *model, "--methods", methods, "--output", str(tmp_path / "run")]
    assert cli.main(["compare", *given]) == 1
    assert message in one_line(capsys, "compare")
