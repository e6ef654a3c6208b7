"""``gradsel delta``: checkpoints in one file and in shards, without any model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gradsel.cli import main as cli
from gradsel.delta import checkpoints as delta_checkpoint
from gradsel.delta.delta import Delta
from gradsel.delta.exporting import export
from tests.support.deltas import plain, trained

INDEX = "model.safetensors.index.json"


def shard(folder, tensors):
    """Writes a checkpoint in three shards, named as transformers names them."""
    folder.mkdir()
    names = list(tensors)
    weight_map = {name: f"model-{1 + i * 3 // len(names):05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        own = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        # A single note: safetensors writes several of them in no fixed order.
        save_file(own, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture(params=["single", "sharded"])
def files(request, tmp_path):
    """base and tuned checkpoints, the delta between them, and how to read a checkpoint."""
    base, selection, model = trained()
    tuned = plain(model)
    Delta.of(model, selection=selection).save(tmp_path / "d.delta", originals=True)
    if request.param == "single":
        export(base, tmp_path / "base")
        export(tuned, tmp_path / "tuned")
    else:
        shard(tmp_path / "base", {name: t.clone() for name, t in base.state_dict().items()})
        shard(tmp_path / "tuned", {name: t.clone() for name, t in tuned.state_dict().items()})
    return tmp_path


def contents(path):
    """The bytes of every file of a checkpoint, including the index of a sharded one."""
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


def run(*arguments):
    return cli.main(["delta", *map(str, arguments)])


def test_apply_and_revert_write_the_other_checkpoint_to_the_byte(files, capsys):
    assert run("apply", files / "d.delta", files / "base", files / "out") == 0
    assert contents(files / "out") == contents(files / "tuned")
    assert str(files / "out") in capsys.readouterr().out
    assert run("revert", files / "d.delta", files / "out", files / "back") == 0
    assert contents(files / "back") == contents(files / "base")


def test_make_finds_what_differs(files, capsys):
    assert run("make", files / "base", files / "tuned", files / "made.delta") == 0
    printed = capsys.readouterr().out
    made, given = Delta.load(files / "made.delta"), Delta.load(files / "d.delta")
    assert f"{made.trainable_count():,} entries" in printed
    assert f"{(files / 'made.delta').stat().st_size:,} bytes" in printed
    found = given.difference(made)
    assert found.differing == 0
    assert found.shared == made.trainable_count()
    for name, part in made.items():
        assert part.originals is None
        assert part.fingerprint == given[name].fingerprint
    assert made.notes["policy"] == "entries that differ"
    assert run("apply", files / "made.delta", files / "base", files / "out") == 0
    assert contents(files / "out") == contents(files / "tuned")


def test_revert_needs_originals(files, capsys):
    run("make", files / "base", files / "tuned", files / "made.delta")
    assert run("revert", files / "made.delta", files / "tuned", files / "back") == 1
    message = capsys.readouterr().err
    assert "original entries" in message
    assert "--with-originals" in message
    assert not (files / "back").exists()
    assert run("make", files / "base", files / "tuned", files / "made.delta", "--with-originals") == 0
    assert run("revert", files / "made.delta", files / "tuned", files / "back") == 0
    assert contents(files / "back") == contents(files / "base")


def test_values_may_be_rounded(files):
    run("make", files / "base", files / "tuned", files / "made.delta", "--dtype", "bfloat16")
    assert {part.values.dtype for part in Delta.load(files / "made.delta").values()} == {torch.bfloat16}


@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_another_checkpoint_is_refused_before_anything_is_written(files, verb, capsys):
    right, wrong = ("base", "tuned") if verb == "apply" else ("tuned", "base")
    assert run(verb, files / "d.delta", files / wrong, files / "out") == 1
    assert "tensors" in capsys.readouterr().err
    assert not (files / "out").exists()
    assert run(verb, files / "d.delta", files / wrong, files / "out", "--force") == 0
    assert contents(files / "out") == contents(files / wrong)  # already has these values
    assert run(verb, files / "d.delta", files / right, files / right) == 1
    assert "replace" in capsys.readouterr().err


def test_one_tensor_is_in_memory_at_a_time(files, monkeypatch):
    asked = []
    read = delta_checkpoint.Checkpoint.__getitem__
    monkeypatch.setattr(
        delta_checkpoint.Checkpoint, "__getitem__", lambda self, name: (asked.append(name), read(self, name))[1]
    )
    run("apply", files / "d.delta", files / "base", files / "out")
    assert set(asked) == set(Delta.load(files / "d.delta"))  # tensors that stay the same are copied with their file


def test_metadata_stays(files):
    run("apply", files / "d.delta", files / "base", files / "out")
    first = sorted((files / "out").glob("*.safetensors"))[0] if (files / "out").is_dir() else files / "out"
    with safe_open(first, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_info(files, capsys):
    assert run("info", files / "d.delta") == 0
    printed = capsys.readouterr().out
    delta = Delta.load(files / "d.delta")
    assert str(delta) in printed
    assert f"originals, to revert: {len(delta)} of {len(delta)} tensors" in printed
    assert f"{(files / 'd.delta').stat().st_size:,} bytes" in printed


def test_diff(tmp_path, capsys):
    _, _, one = trained(seed=0)
    _, _, other = trained(seed=1)
    Delta.of(one).save(tmp_path / "a")
    Delta.of(other).save(tmp_path / "b")
    assert run("diff", tmp_path / "a", tmp_path / "b") == 0
    found = Delta.of(one).difference(Delta.of(other))
    assert 0 < found.differing <= found.shared == found.a == found.b
    counts = [f"{count:,}" for count in (found.a, found.b, found.shared, found.differing)]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["in", "all", *counts]
    assert run("diff", tmp_path / "a", tmp_path / "none") == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(a=t["a"] + 1), r"10,000 of 10,012 .*99\.9 %.*100\.0 % of a"),
        (lambda t: t.update(a=torch.zeros(100, 101)), "a .*100x101.*100x100"),
        (lambda t: t.update(a=t["a"].bfloat16()), r"a .*torch\.bfloat16.*torch\.float32"),
        (lambda t: t.update({"x." + name: t.pop(name) for name in list(t)}), "none of the 2 tensors .*config.json"),
        (lambda t: t.update(c=torch.zeros(20_000)), "20,000 of 30,012 .*100.0 % of c"),
        (lambda t: t["b"].fill_(torch.nan), "b .*12 .*NaN"),
    ],
)
def test_no_delta_can_be_made(change, message, tmp_path, capsys):
    tensors = {"a": torch.randn(100, 100), "b": torch.randn(12)}
    save_file(tensors, tmp_path / "base")
    tuned = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tuned)
    save_file(tuned, tmp_path / "tuned")
    assert run("make", tmp_path / "base", tmp_path / "tuned", tmp_path / "d") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "d").exists()


def test_any_dtype_shape_and_key(tmp_path):
    """Whatever a checkpoint may hold: integers, flags, scalars, odd offsets, names with colons."""
    base = {
        "flags": torch.tensor([True, False, True]),
        "bytes:raw": torch.arange(7, dtype=torch.uint8),
        "count": torch.tensor(3),
        "half": torch.randn(33).half(),
        "wide": torch.randn(5, 5, dtype=torch.float64),
        "same": torch.randn(1000),
    }
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["flags"][1] = True
    tuned["bytes:raw"][6] = 200
    tuned["count"] += 4
    tuned["half"][32] = -0.0
    tuned["wide"][2, 3] = 1e300
    save_file(base, tmp_path / "base")
    save_file(tuned, tmp_path / "tuned")
    run("make", tmp_path / "base", tmp_path / "tuned", tmp_path / "d", "--with-originals")
    assert Delta.load(tmp_path / "d").trainable_count() == 5
    run("apply", tmp_path / "d", tmp_path / "base", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "tuned")
    run("revert", tmp_path / "d", tmp_path / "tuned", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "base")
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in load_file(tmp_path / "out").items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "index"),
        ("[", "index"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": "../secret"}}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "missing.safetensors"),
    ],
)
def test_damaged_indices_are_refused(text, message, files, capsys):
    (files / "bad").mkdir()
    (files / "bad" / INDEX).write_text(text)
    assert run("apply", files / "d.delta", files / "bad", files / "out") == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_model(files, capsys):
    save_file({"other": torch.zeros(2)}, files / "other")
    assert run("apply", files / "d.delta", files / "other", files / "out") == 1
    assert "'patch_embed.weight'" in capsys.readouterr().err


def test_inputs_are_not_written_over(files, capsys):
    delta, base, tuned = files / "d.delta", files / "base", files / "tuned"
    before = delta.read_bytes(), contents(base), contents(tuned)
    single = base.is_file()
    attempts = [("apply", delta, base, delta), ("revert", delta, tuned, delta)]
    attempts += [("make", base, tuned, tuned), ("make", base, tuned, base)] if single else []
    attempts += [] if single else [("make", base, tuned, next(tuned.glob("*.safetensors")))]
    for arguments in attempts:
        assert run(*arguments) == 1
        assert "another file" in capsys.readouterr().err
    assert (delta.read_bytes(), contents(base), contents(tuned)) == before
