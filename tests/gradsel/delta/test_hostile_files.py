"""Damaged and hostile files of deltas are refused."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gradsel
from gradsel import sealed
from gradsel.delta.delta import Delta, load_delta
from tests.support.deltas import assert_same, delta_of, frozen_copy, trained


def rewrite(path, change):
    """Changes a file and makes its checksum right again, as a hostile author would."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    parameters = json.loads(metadata["parameters"])
    change(metadata, tensors, parameters)
    metadata["parameters"] = json.dumps(parameters)
    if "checksum" in metadata:
        metadata["checksum"] = sealed._checksum(metadata, tensors)
    save_file(tensors, path, metadata)


def put(key, make):
    return lambda metadata, tensors, parameters: tensors.update({key: make(tensors.get(key))})


def swap(old, new, make):
    return lambda metadata, tensors, parameters: tensors.update({new: make(tensors.pop(old))})


def describe(name, **values):
    return lambda metadata, tensors, parameters: parameters[name].update(values)


def note(**values):
    return lambda metadata, tensors, parameters: metadata.update(values)


def u8(*numbers):
    return torch.tensor(numbers, dtype=torch.uint8)


def huge_empty(metadata, tensors, parameters):
    tensors["one:cols"] = torch.empty(10**15, 0, dtype=torch.int32)
    tensors["one:values"] = torch.empty(10**15, 0)
    parameters["one"]["shape"] = [10**15, 300]


HOSTILE = [
    (put("one:cols", lambda c: torch.full_like(c, 3000)), "one: cols must lie in 0 to 2999, found 3000 to 3000"),
    (put("one:cols", lambda c: c.to(torch.int32) - 3000), "one: cols must lie in 0 to 2999, found -"),
    (put("one:cols", lambda c: c[:5]), r"one: cols must be \[6, at most 3000\]"),
    (put("one:cols", lambda c: c.to(torch.int64)), "one: cols must be one of torch.uint16, torch.int32"),
    (put("many:bits", lambda b: torch.full_like(b, -1)), "many: bits are set behind the last column"),
    (swap("some:gaps", "some:indices", lambda g: torch.tensor([7, 0, 8])), "some: indices must ascend within 0 to 299"),
    (put("some:gaps", lambda g: u8(0, 255)), "some: the last gap is cut off"),
    (put("some:gaps", lambda g: u8(0, 6, 255, 37)), "some: indices must ascend within 0 to 299"),
    (put("some:gaps", lambda g: u8(0, 6)), r"some: values must be \[2\], got \[3\]"),
    (put("few:gaps", lambda g: g[:-1]), "few: 59 entries are not as many in each of 6 rows of 300"),
    (put("few:gaps", lambda g: u8(*[0] * 60)), "few: gaps leave the rows that they are for"),
    (put("few:gaps", lambda g: g.to(torch.float32)), "few: gaps must be uint8 or uint16"),
    (swap("bias:values", "bias:gaps", lambda v: u8(1)), "is damaged: KeyError"),
    (put("rows:gaps", lambda g: u8(1)), "rows: expected rows, got|rows: part"),
    (put("bias:gaps", lambda g: u8(1)), "bias: a mask of kind 'whole' has no gaps"),
    (put("bias:cols", lambda g: u8(1)), "bias: expected no tensors, got cols"),
    (put("one:values", lambda v: v[:5]), r"one: values must be \[6, 1\], got \[5, 1\]"),
    (put("one:values", lambda v: v.view(6)), r"one: values must be \[6, 1\], got \[6\]"),
    (put("one:values", lambda v: v.long()), "one: values are torch.int64 for a tensor of torch.float32"),
    (put("count:values", lambda v: v.float()), "count: values are torch.float32 for a tensor of torch.int64"),
    (put("one:values", lambda v: v.to(torch.complex64)), "one: values are torch.complex64"),
    (put("one:originals", lambda v: torch.zeros(6, 1).half()), "one: originals are torch.float16 for a tensor of"),
    (put("one:originals", lambda v: torch.zeros(6, 2)), r"one: originals must be \[6, 1\], got \[6, 2\]"),
    (put("stranger:values", lambda v: torch.zeros(1)), "tensors of unknown parameters: stranger"),
    (put("no colon", lambda v: torch.zeros(1)), "tensors of unknown parameters"),
    (lambda m, t, p: t.pop("one:values"), r"is damaged: KeyError\('values'\)"),
    (lambda m, t, p: t.pop("one:cols"), r"is damaged: KeyError\('cols'\)"),
    (lambda m, t, p: p.pop("one"), "tensors of unknown parameters: one"),
    (lambda m, t, p: p.update(one=[1]), "is damaged"),
    (lambda m, t, p: m.pop("notes"), r"is damaged: KeyError\('notes'\)"),
    (lambda m, t, p: m.pop("checksum"), r"is damaged: KeyError\('checksum'\)"),
    (describe("one", dtype="float8"), r"is damaged: KeyError\('float8'\)"),
    (describe("one", dtype=["float32"]), "is damaged: .*unhashable"),
    (describe("one", digest=3), "one: digest and fingerprint are texts"),
    (describe("one", fingerprint=None), "one: digest and fingerprint are texts"),
    (describe("one", kind="diagonal"), "one: unknown kind of mask 'diagonal'"),
    (describe("one", shape=[10**12, 300]), r"one: cols must be \[1000000000000, at most 300\]"),
    (describe("few", shape=[10**12, 300]), "few: 60 entries are not as many in each of 1000000000000 rows of 300"),
    (describe("few", shape=[6, 0]), "few: 60 entries are not as many in each of 6 rows of 0"),
    (describe("few", row_dims=[0, 0]), r"few: row_dims \(0, 0\) are not distinct"),
    (describe("bias", shape=[10**12]), r"bias: values must be \[1000000000000\], got \[6\]"),
    (describe("bias", shape=[2**70]), "bias: a shape with more than"),
    (describe("columns", shape=[10**12, 5]), r"columns: values must be \[1000000000000, 2\], got \[6, 2\]"),
    (describe("bias", shape=[0, 10**15]), "bias: no entries"),
    (huge_empty, "one: no entries"),
    (note(notes="[]"), "notes must be a JSON object, got a list"),
    (note(notes="{"), "is damaged"),
    (note(notes="[" * 100_000), "is damaged: RecursionError"),
    (note(version="2"), "is of version 2; this library reads 1, update it"),
    (note(format="gradsel.selection"), "is not a delta: its format is 'gradsel.selection', expected 'gradsel.delta'"),
    (put("one:values", lambda v: v.fill_(torch.nan)), "one has 6 values that are NaN or infinite"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_hostile_files_are_refused(path, change, message):
    """Their checksums are right: what they say is looked at all the same."""
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        Delta.load(path)


def test_foreign_files_are_refused_and_the_model_stays(path, tmp_path):
    base, selection, _ = trained()
    before = frozen_copy(base)
    save_file({"a": torch.zeros(3)}, tmp_path / "foreign")
    selection.save(tmp_path / "selection")
    (tmp_path / "text").write_text("no delta")
    (tmp_path / "empty").touch()
    (tmp_path / "long").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    for name, message in [
        ("foreign", "is not a delta: its format is None"),
        ("selection", "is not a delta: its format is 'gradsel.selection'"),
        ("text", "is not a readable safetensors file"),
        ("empty", "is not a readable safetensors file"),
        ("long", "is not a readable safetensors file"),
        ("d.delta", "the model has no 'one'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_delta(base, tmp_path / name)
    with pytest.raises(ValueError, match="is not a selection"):
        gradsel.Selection.load(path)
    assert_same(base, before)


def mutated(whole, header, trial):
    """One of: a few other bytes, in the header or anywhere; cut off; a piece repeated, left out or from elsewhere."""
    data = bytearray(whole)
    kind = trial % 8
    if kind < 4:
        end = header if kind % 2 else len(data)
        for _ in range(random.choice((1, 1, 2, 8))):
            data[random.randrange(end)] = random.randrange(256)
    elif kind == 4:
        del data[random.randrange(len(data)) :]
    elif kind == 5:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    else:
        start, length, to = random.randrange(len(data)), random.randrange(1, 40), random.randrange(len(data))
        piece = data[start : start + length]
        data[to : to + (0 if kind == 6 else len(piece))] = piece
    return bytes(data)


def test_no_mutated_file_crashes_or_is_taken_for_another(tmp_path):
    """What loads all the same is the delta that was saved, to the bit."""
    delta, _ = delta_of(x={0: 1.0, 5: 2.0}, y={1: 3.0, 2: 4.0, 4: 5.0, 6: 6.0})
    path = tmp_path / "d"
    delta.save(path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    random.seed(0)
    refused = 0
    for trial in range(10_000):
        path.write_bytes(mutated(whole, header, trial))
        try:
            loaded = Delta.load(path, force=True)
        except ValueError:
            refused += 1
            continue
        assert loaded == delta
        assert [part.digest for part in loaded.values()] == [part.digest for part in delta.values()]
    assert refused > 9_000


def test_mutated_files_with_a_right_checksum_do_not_crash(path):
    """Any number in the description may be another one, and any tensor may hold other bytes."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    random.seed(1)
    for _ in range(1_000):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        key = random.choice(list(changed))
        raw = changed[key].reshape(-1).view(torch.uint8)
        raw[random.randrange(raw.numel())] = random.randrange(256)
        text = list(metadata["parameters"])
        digits = [place for place, letter in enumerate(text) if letter.isdigit()]
        text[random.choice(digits)] = random.choice("0123456789")
        described = {**metadata, "parameters": "".join(text)}
        described["checksum"] = sealed._checksum(described, changed)
        save_file(changed, path, described)
        try:
            loaded = Delta.load(path, force=True)
        except ValueError:
            continue
        for name, part in loaded.items():
            assert part.values.shape == part.mask.compact_shape, name
            entries = part.mask.entries()
            assert 0 <= int(entries.min()) <= int(entries.max()) < part.mask.numel
