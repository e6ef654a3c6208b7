"""What does not fit is one line and leaves nothing behind; what is a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import shutil

import huggingface_hub
import pytest
import torch

from gradsel.cli import main as cli
from gradsel.cli.running import TRACEBACK
from gradsel.training import run
from tests.support import runs, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With images, a table of texts, a damaged table, and a folder that is not empty."""
    folder = tmp_path_factory.mktemp("data")
    runs.image_folder(folder / "images", train=4, test=2)
    runs.reviews(folder / "reviews.csv")
    (folder / "numbers.csv").write_text("text,label\n" + "".join(f"a,{n / 3}\n" for n in range(9)))
    (folder / "twice.csv").write_text("text,text,label\na,b,0\nc,d,1\n")
    (folder / "header.csv").write_text("text,label\n")
    runs.image_folder(folder / "one", train=1)
    shutil.move(folder / "one" / "train", folder / "single")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    return folder


@pytest.fixture(autouse=True)
def alone(folder, monkeypatch):
    """In that folder, without a GPU and a network."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv(TRACEBACK, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def arguments(*more):
    options = [f"--model-option={name}={value}" for name, value in tiny.VIT.items()]
    return [
        "finetune", "--data", "images", "--model", "vit_tiny_patch16_224", "--weights", "none", *options,
        "--epochs", "1", "--batch-size", "6", "--no-report", "--output", "run", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data nowhere", "data.path: there is no file or folder nowhere"),
        ("--data full", "data.path: full has no folders, one for each class with its images"),
        ("--data numbers.csv", "labels of the train set are out of range or missing in column 'label'"),
        ("--data reviews.csv --label-column labl", "there is no column 'labl'; did you mean label?"),
        ("--data reviews.csv --text-column txt", "there is no column 'txt'; did you mean text?"),
        ("--data reviews.csv", "vit_tiny_patch16_224 is a model for images, the data are texts"),
        ("--model vit_tini_patch16_224", "did you mean vit_tiny_patch16_224?"),
        ("--model user/nothing", "'user/nothing' is neither a model of timm nor a local folder"),
        ("--model ./nothing", "model.name: there is no folder ./nothing"),
        ("--model full", "model.name: full has no config.json"),
        ("--model-option depht=2", "model.options: vit_tiny_patch16_224 refuses them"),
        ("--method gsp", "there is no method 'gsp'; did you mean gps?"),
        ("--method lora --k 2", "lora has no option 'k'"),
        ("--preset gps/cup", "preset: "),
        ("--preset gsp/cub", "did you mean gps?"),
        ("--config nowhere.yaml", "there is no configuration file nowhere.yaml"),
        ("--epochs 0", "recipe.epochs must be at least 1, got 0"),
        ("--patience 2", "recipe.patience needs a validation set"),
        ("--device cuda", "device: cuda was asked for, but torch sees no GPU; pass --device cpu"),
        ("--precision fp16", "precision: fp16 needs a GPU"),
        ("--learning-rate inf", "recipe.learning_rate must be finite, got inf"),
        ("--image-size 64", "data.image_size is 64, but model.options has img_size=32"),
        ("--method grft --anchor 1 --anchor-blocks 3", "anchor_blocks must be 'all' or 0 to 2, the blocks there are"),
        ("--tracking tensorbord", "output.tracking: transformers logs to no 'tensorbord'; did you mean tensorboard?"),
        ("--data twice.csv", "twice.csv has more than one column called 'text'"),
        ("--data header.csv", "header.csv has no rows below its header"),
        ("--data single", "no class has a second sample that could be held out"),
        ("--output numbers.csv", "output.folder: numbers.csv is a file; name a new folder"),
        ("--output full", "output.folder: full exists and is not empty"),
        ("--output images/train/red/0.png/run", "is not a folder that may be written"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(more, message, folder, capsys):
    before = sorted(folder.rglob("*"))
    code = cli.main(arguments(*more.split()))
    printed = capsys.readouterr().err
    assert code == 1, printed
    *notes, line = printed.splitlines()
    assert all(note.startswith(("preset ", "not published")) for note in notes)
    assert line.startswith("gradsel finetune: ")
    assert message in line
    assert sorted(folder.rglob("*")) == before


def test_too_little_disk(folder, monkeypatch, capsys):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    assert cli.main(arguments()) == 1
    printed = capsys.readouterr().err
    assert "checkpoints and result need about 1.13 MB, but the disk of run has 1 MB left" in printed
    assert not os.path.exists("run")


def test_a_selection_that_fails_leaves_nothing(capsys):
    """No batch of one sample has a pair to compare, which only selecting finds out."""
    assert cli.main(arguments("--batch-size", "1", "--augmentation", "none")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("gradsel finetune: ")
    assert not os.path.exists("run")


def raising(error, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(run, "train", fails)
    return cli.main(arguments("--output", "new"))


def test_a_bug_keeps_its_traceback(monkeypatch, capsys, folder):
    with pytest.raises(ValueError, match="a bug"):
        raising(ValueError("a bug"), monkeypatch)
    shutil.rmtree(folder / "new")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "No space left on device: 'x'"),
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), "2 GiB; pass a smaller --batch-size, and --accumulation"),
    ],
)
def test_a_machine_that_is_too_small_is_one_line(error, message, monkeypatch, capsys, folder):
    assert raising(error, monkeypatch) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    shutil.rmtree(folder / "new")


def test_the_traceback_can_be_seen(capsys):
    assert cli.main(["--traceback", *arguments("--data", "nowhere")]) == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert 'raise ValueError(f"data.path: there is no file or folder' in printed
    assert printed.splitlines()[-1] == "gradsel finetune: data.path: there is no file or folder nowhere"
