"""Mutated files and failing disks on every way in: what is not right is refused with a message, and nothing is broken.

A short, seeded run; ``GRADSEL_FUZZ=50 python -m pytest tests/gradsel/delta/test_fuzz.py`` makes fifty times as many
trials.
"""

from __future__ import annotations

import errno
import json
import os
import random
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gradsel
from gradsel.cli import main as cli
from gradsel.delta.checkpoints import Checkpoint
from gradsel.delta.delta import Delta
from gradsel.delta.parts import same_bits
from tests.support.deltas import delta_of
from tests.support.faults import counting, killed_at
from tests.support.mutations import mutated, mutated_json

SCALE = int(os.environ.get("GRADSEL_FUZZ", "1"))
INDEX = "model.safetensors.index.json"
SHARDS = ("one.safetensors", "two.safetensors")
TENSORS = {"x": torch.zeros(2, 4), "y": torch.ones(2, 4)}


@pytest.fixture
def work(tmp_path):
    """Two deltas ``a`` and ``b``, a base in one file and in shards, and a file outside that nobody may touch."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        parts = delta_of(x={0: value, 5: value})[0] | delta_of(x={3: value}, y={2: 3.0})[0]
        Delta({n: p for n, p in parts.items() if n == "x"}).save(tmp_path / name, originals=True)
    save_file(TENSORS, tmp_path / "single")
    (tmp_path / "base").mkdir()
    for file, name in zip(SHARDS, TENSORS, strict=True):
        save_file({name: TENSORS[name]}, tmp_path / "base" / file)
    weight_map = dict(zip(TENSORS, SHARDS, strict=True))
    (tmp_path / "base" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "outside").write_text("untouched")
    return tmp_path


def run(*arguments):
    return cli.main(["delta", *map(str, arguments)])


def commands(work):
    return [
        ("info", work / "a"),
        ("diff", work / "a", work / "b"),
        ("merge", work / "a", work / "b", work / "merged", "--wins", "first"),
        ("apply", work / "a", work / "single", work / "out.safetensors"),
        ("apply", work / "a", work / "base", work / "out", "--force"),
        ("revert", work / "a", work / "single", work / "back", "--force"),
        ("make", work / "single", work / "base", work / "made"),
    ]


def test_the_command_line_ends_with_a_message(work, capsys):
    """Any of the files that a command reads is mutated: it exits with 0 or 1, and never with a traceback."""
    rng = random.Random(0)
    inputs = [work / "a", work / "b", work / "single", *(work / "base" / name for name in (*SHARDS, INDEX))]
    refused = 0
    for trial in range(150 * SCALE):
        victim = rng.choice(inputs)
        whole = victim.read_bytes()
        change = mutated_json if victim.suffix == ".json" and rng.random() < 0.7 else mutated
        victim.write_bytes(change(whole, rng))
        command = commands(work)[trial % len(commands(work))]
        code = run(*command)
        error = capsys.readouterr().err
        assert code in (0, 1), (trial, command)
        assert (code == 0) == (not error), (trial, command)
        assert error.count("\n") <= 1
        refused += code
        victim.write_bytes(whole)
        for path in (work / "out").glob("*.safetensors") if code == 0 and command[0] == "apply" else ():
            assert path.stat().st_size == (work / "base" / path.name).stat().st_size
    assert refused > 30 * SCALE
    assert (work / "outside").read_text() == "untouched"


def test_indexes(work):
    """An index gives the tensors that its shards have, or none."""
    rng = random.Random(1)
    whole = (work / "base" / INDEX).read_bytes()
    refused = 0
    for trial in range(300 * SCALE):
        (work / "base" / INDEX).write_bytes((mutated_json if trial % 3 else mutated)(whole, rng))
        try:
            found = Checkpoint(work / "base")
            assert all(same_bits(tensor, TENSORS[name]) for name, tensor in found.items())
        except ValueError:
            refused += 1
    assert refused > 100 * SCALE


def test_shira_adapters(tmp_path):
    """Only ValueError, whatever is in the adapter; what loads sets entries of the base."""
    torch.manual_seed(0)
    base = nn.Module()
    base.fc = nn.Linear(8, 6, bias=False)
    tuned = nn.Module()
    tuned.fc = nn.Linear(8, 6, bias=False)
    with torch.no_grad():
        tuned.fc.weight.copy_(base.fc.weight)
        tuned.fc.weight[:, 0] += 1
    Delta.of(tuned, base=base).to_shira(tmp_path)
    rng = random.Random(2)
    paths = [tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"]
    refused = 0
    for trial in range(400 * SCALE):
        victim = paths[trial % 4 == 0]
        whole = victim.read_bytes()
        change = mutated_json if victim.suffix == ".json" else (retyped if trial % 3 else mutated)
        victim.write_bytes(change(whole, rng))
        try:
            assert Delta.from_shira(tmp_path, base).keys() <= {"fc.weight"}
        except ValueError:
            refused += 1
        victim.write_bytes(whole)
    assert refused > 100 * SCALE


def retyped(whole, rng):
    """Another dtype of the same size in the header, or another shape, as bytes of the same length."""
    old, new = rng.choice(
        [
            (b"I32", b"F32"),
            (b"I32", b"U32"),
            (b"F32", b"I32"),
            (b"F32", b"U32"),
            (b"[2,14]", b"[14,2]"),
            (b"[14]", b"[ 1]"),
        ]
    )
    return whole.replace(old, new, 1 if rng.random() < 0.5 else -1)


def test_links(work):
    """Inputs, outputs and temporary names are links to anything; what was asked for is written, and nothing outside."""
    rng = random.Random(3)
    expected = Delta.load(work / "a")
    for _ in range(40 * SCALE):
        out = work / f"out{rng.randrange(10**9)}"
        (work / "elsewhere").mkdir(exist_ok=True)
        kind = rng.choice(["plain", "link", "dangling", "loop", "folder", "device"])
        if kind == "link":
            (work / "elsewhere" / out.name).write_text("old")
        if kind in ("link", "dangling"):
            out.symlink_to(work / "elsewhere" / out.name)
        elif kind == "loop":
            out.symlink_to(out)
        elif kind == "folder":
            out.symlink_to(work / "elsewhere")
        elif kind == "device":
            out.symlink_to("/dev/null")
        for planted in (f"{out.name}.tmp", f"{out.name}.{os.getpid()}.tmp", f".gradsel-{rng.randrange(10**8):08}.tmp"):
            if not (work / planted).is_symlink():
                (work / planted).symlink_to(work / "outside")
        try:
            expected.save(out)
        except OSError:
            assert kind in ("loop", "folder", "device"), kind
        else:
            assert kind in ("plain", "link", "dangling"), kind
            assert Delta.load(out) == expected
            assert out.is_symlink() == (kind != "plain")
    assert (work / "outside").read_text() == "untouched"


def test_disks_that_fail(work):
    """Any call of a save fails, a write after half of its bytes: the old delta stays, and its folder is clean."""
    rng = random.Random(4)
    a, b = (Delta.load(work / name) for name in ("a", "b"))
    (work / "saved").mkdir()
    path = work / "saved" / "d"
    a.save(path)
    failed = 0
    for _ in range(40 * SCALE):
        at, code = rng.randrange(1, 40), rng.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EINTR])

        def fail(count, name, at=at, code=code):
            if count == at:
                raise OSError(code, os.strerror(code))

        with counting(fail), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                b.save(path)
            except OSError:
                failed += 1
        assert Delta.load(path) in (a, b)
        a.save(path)
        assert [other.name for other in path.parent.iterdir()] == ["d"]
    assert failed > 10 * SCALE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes that die")
def test_processes_that_die(work):
    """A save dies at any call: the delta is the old or the new one, and the next save removes what was left."""
    rng = random.Random(5)
    a, b = (Delta.load(work / name) for name in ("a", "b"))
    (work / "saved").mkdir()
    path = work / "saved" / "d"
    a.save(path)
    died = 0
    for _ in range(10 * SCALE):

        def save():
            torch.set_num_threads(1)
            b.save(path)

        died += killed_at(rng.randrange(1, 40), save)
        assert Delta.load(path) in (a, b)
        a.save(path)
        assert [other.name for other in path.parent.iterdir()] == ["d"]
    assert died > 2 * SCALE


def test_banks(work):
    """A mutated bank.json gives tasks of the folder, or none."""
    base = nn.Module()
    base.x = nn.Parameter(torch.zeros(2, 4))
    bank = gradsel.TaskBank(base)
    for name in ("a", "b"):
        bank.add(name, work / name)
    bank.save(work / "bank")
    whole = (work / "bank" / "bank.json").read_bytes()
    rng = random.Random(6)
    refused = 0
    for trial in range(100 * SCALE):
        (work / "bank" / "bank.json").write_bytes((mutated_json if trial % 2 else mutated)(whole, rng))
        try:
            gradsel.TaskBank.load(base, work / "bank")
        except (ValueError, OSError):
            refused += 1
    assert refused > 20 * SCALE
