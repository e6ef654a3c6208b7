"""``gradsel delta`` on hostile files, on disks that fail, and beside others who write."""

from __future__ import annotations

import errno
import json
import os
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradsel.cli import main as cli
from gradsel.delta import checkpoints
from gradsel.delta.checkpoints import Checkpoint
from gradsel.delta.delta import Delta
from gradsel.delta.parts import Part
from gradsel.masks import PerRow, Whole
from gradsel.views import NeuronView
from tests.support.deltas import delta_of
from tests.support.faults import killed_at

INDEX = "model.safetensors.index.json"
#: Clears the screen, turns the text around, goes to the start of the line, and ends it.
ESCAPES = "\x1b[2J\u202e\r\nname"


def run(*arguments):
    return cli.main(["delta", *map(str, arguments)])


def shards(folder, **files):
    """A checkpoint whose files have the given tensors."""
    folder.mkdir(exist_ok=True)
    for file, tensors in files.items():
        save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
    weight_map = {name: f"{file}.safetensors" for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


# --- What is printed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["info", "diff", "apply"])
def test_names_and_notes_do_not_steer_the_terminal(verb, tmp_path, capsys):
    part = Part(Whole((3,)), torch.ones(3), torch.float32)
    Delta({ESCAPES: part}, {"policy" + ESCAPES: ESCAPES}).save(tmp_path / "d")
    save_file({"x": torch.ones(3)}, tmp_path / "base")
    arguments = {"info": (), "diff": (tmp_path / "d",), "apply": (tmp_path / "base", tmp_path / "out")}[verb]
    assert run(verb, tmp_path / "d", *arguments) == (1 if verb == "apply" else 0)
    printed = "".join(capsys.readouterr())
    assert "\\x1b[2J\\u202e\\r\\nname" in printed
    assert not set(printed) & set("\x1b\u202e\r")
    assert "\nname" not in printed


def test_masks_of_two_kinds_have_two_lines():
    """Square matrices with as many entries, by rows of the weight and by rows of its transpose."""
    cols = torch.zeros(4, 1, dtype=torch.int32)
    masks = {"0.weight": PerRow(cols, (4, 4)), "1.weight": PerRow(cols, (4, 4), NeuronView((1,)))}
    parts = {name: Part(mask, torch.ones(4, 1), torch.float32) for name, mask in masks.items()}
    parts["2.weight"] = Part(masks["0.weight"], torch.ones(4, 1), torch.bfloat16)
    lines = str(Delta(parts)).splitlines()[1:4]
    assert [" ".join(line.split()[2:6]) for line in lines] == [
        "per-row gaps float32 4", "per-row (rows: dim 1)", "per-row gaps float32 for",
    ]  # fmt: skip


@pytest.mark.parametrize("verb", ["apply", "revert", "make", "merge"])
def test_messages_name_the_options_of_the_command_line(verb, tmp_path, capsys):
    delta, _ = delta_of(x={0: float("nan")})
    delta.save(tmp_path / "d", originals=True, force=True)
    save_file({"x": torch.ones(2, 4)}, tmp_path / "base")
    save_file({"x": torch.full((2, 4), float("nan")).index_fill(1, torch.tensor([1, 2, 3]), 1)}, tmp_path / "nan")
    arguments = {
        "apply": (tmp_path / "d", tmp_path / "base"),
        "revert": (tmp_path / "d", tmp_path / "base"),
        "make": (tmp_path / "base", tmp_path / "nan"),
        "merge": (tmp_path / "d", tmp_path / "d"),
    }[verb]
    assert run(verb, *arguments, tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "pass --force if that is intended" in message
    assert "force=True" not in message
    assert not (tmp_path / "out").exists()
    assert run(verb, *arguments, tmp_path / "out", "--force") == 0


def test_python_dash_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gradsel", "config"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("gradsel", run_name="__main__")
    assert left.value.code == 0
    assert "gradsel_kernels" in capsys.readouterr().out


# --- Two tasks in one file ---------------------------------------------------------------------------------------


def test_merge(tmp_path, capsys):
    base = torch.zeros(2, 4)
    save_file({"x": base}, tmp_path / "base")
    for name, entries in {"a": {0: 1.0, 5: 2.0}, "b": {5: 9.0, 7: 3.0}, "c": {7: 4.0}}.items():
        delta_of(x=entries)[0].save(tmp_path / name, originals=True)
    assert run("merge", tmp_path / "a", tmp_path / "c", tmp_path / "ac") == 0
    assert "0 entries were set differently" in capsys.readouterr().out
    assert run("merge", tmp_path / "a", tmp_path / "b", tmp_path / "ab") == 1
    assert "1 of the same entries of x, to other values; pass --wins first or --wins second" in capsys.readouterr().err
    assert not (tmp_path / "ab").exists()
    for wins, value in (("first", 2.0), ("second", 9.0)):
        assert run("merge", tmp_path / "a", tmp_path / "b", tmp_path / "ab", "--wins", wins) == 0
        assert "1 entries were set differently" in capsys.readouterr().out
        assert run("apply", tmp_path / "ab", tmp_path / "base", tmp_path / "out.safetensors") == 0
        assert load_file(tmp_path / "out.safetensors")["x"].view(-1).tolist() == [1, 0, 0, 0, 0, value, 0, 3]
        assert run("revert", tmp_path / "ab", tmp_path / "out.safetensors", tmp_path / "back") == 0
        assert torch.equal(load_file(tmp_path / "back")["x"], base)
    assert run("merge", tmp_path / "a", tmp_path / "c", tmp_path / "a") == 1
    assert "would replace" in capsys.readouterr().err


# --- Shards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_a_name_in_two_shards_is_refused(options, tmp_path, capsys):
    base = shards(tmp_path / "base", one={"x": torch.zeros(2, 4)}, two={"y": torch.zeros(3)})
    save_file({"y": torch.zeros(3), "x": torch.zeros(1)}, base / "two.safetensors")
    delta_of(x={5: 2.0})[0].save(tmp_path / "d")
    assert run("apply", tmp_path / "d", base, tmp_path / "out", *options) == 1
    assert "x is in one.safetensors and in two.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_index_that_is_wrong_about_its_shards_is_refused(tmp_path):
    base = shards(tmp_path / "base", one={"x": torch.zeros(2, 4)}, two={"y": torch.zeros(3)})
    for name, file in (("x", "two.safetensors"), ("z", "one.safetensors")):
        index = json.loads((base / INDEX).read_text())
        index["weight_map"][name] = file
        (tmp_path / "base" / "wrong.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=f"says that {name} is in {file}, and it is not"):
            Checkpoint(base / "wrong.json")


def test_a_killed_apply_leaves_no_index_of_two_tasks(tmp_path):
    """The process dies at any call while the shards of another task are replaced."""
    base = shards(tmp_path / "base", one={"x": torch.zeros(2, 4)}, two={"y": torch.zeros(2, 4)})
    for task, value in (("a", 1.0), ("b", 2.0)):
        delta_of(x={5: value}, y={3: value})[0].save(tmp_path / task)
    out = tmp_path / "out"
    assert run("apply", tmp_path / "a", base, out) == 0

    def apply():
        torch.set_num_threads(1)
        assert run("apply", tmp_path / "b", base, out) == 0

    number, mixed = 0, 0
    while True:
        number += 6
        if not killed_at(number, apply):
            break
        if (out / INDEX).exists():
            found = Checkpoint(out)
            assert found["x"].view(-1)[5] == found["y"].view(-1)[3], number
        else:
            mixed += 1
            assert run("apply", tmp_path / "a", base, out) == 0
    assert number > 10
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_one_file_and_shards_are_not_mixed_in_a_folder(tmp_path, capsys):
    base = shards(tmp_path / "base", one={"x": torch.zeros(2, 4)})
    (tmp_path / "single").mkdir()
    save_file({"x": torch.zeros(2, 4)}, tmp_path / "single" / "model.safetensors")
    delta_of(x={5: 1.0})[0].save(tmp_path / "d")
    assert run("apply", tmp_path / "d", tmp_path / "single", tmp_path / "out") == 0
    assert run("apply", tmp_path / "d", base, tmp_path / "out") == 1
    assert "model.safetensors would be loaded in place" in capsys.readouterr().err


# --- Disks and others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["make", "merge"])
def test_a_missing_folder_is_said_before_any_work(verb, tmp_path, capsys):
    assert run(verb, tmp_path / "no a", tmp_path / "no b", tmp_path / "missing" / "d") == 1
    assert "the folder to write to does not exist, create it first" in capsys.readouterr().err


@pytest.mark.parametrize("tuned", [False, True])
def test_a_missing_checkpoint_is_called_missing(tuned, tmp_path, capsys):
    save_file({"weight": torch.zeros(2)}, tmp_path / "there.safetensors")
    given = [str(tmp_path / "there.safetensors"), str(tmp_path / "lost")]
    assert cli.main(["delta", "make", *(given if tuned else given[::-1]), str(tmp_path / "out.safetensors")]) == 1
    assert capsys.readouterr().err == f"gradsel delta make: there is no file or folder {tmp_path / 'lost'}\n"


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    save_file({"x": torch.zeros(2, 4)}, tmp_path / "base")
    save_file({"x": torch.zeros(2, 4).index_fill(1, torch.tensor([2]), 1)}, tmp_path / "tuned")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run("make", tmp_path / "base", tmp_path / "tuned", tmp_path / "d") == 1
    error = capsys.readouterr().err
    assert error.startswith("gradsel delta make: ")
    assert "No space left on device" in error
    assert not (tmp_path / "d").exists()


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    """A mapped one would kill the process (SIGBUS)."""
    save_file({"x": torch.zeros(1 << 20), "y": torch.ones(8)}, tmp_path / "base")
    source = Checkpoint(tmp_path / "base")
    os.truncate(tmp_path / "base", 5000)
    with pytest.raises(ValueError, match="was changed while it was read"):
        source["x"]


def test_a_checkpoint_that_is_replaced_while_it_is_copied_is_an_error(tmp_path, monkeypatch, capsys):
    save_file({"x": torch.zeros(2, 4)}, tmp_path / "base")
    delta_of(x={5: 1.0})[0].save(tmp_path / "d")
    real = checkpoints._copied

    def copied(*arguments):
        real(*arguments)
        save_file({"x": torch.ones(2, 4)}, tmp_path / "base")
        os.utime(tmp_path / "base", ns=(0, 0))

    monkeypatch.setattr(checkpoints, "_copied", copied)
    assert run("apply", tmp_path / "d", tmp_path / "base", tmp_path / "out.safetensors") == 0  # it read the old file
    assert load_file(tmp_path / "out.safetensors")["x"].view(-1).tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    with pytest.raises(ValueError, match="not those that the delta was made on"):
        Delta.load(tmp_path / "d").apply_(holder(load_file(tmp_path / "base")["x"]))


def holder(tensor):
    model = torch.nn.Module()
    model.x = torch.nn.Parameter(tensor)
    return model
