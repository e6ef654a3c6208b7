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
from tests.support.mutations import mutated


def rewrite(path, change):
    """Changes a file and recomputes its checksum, as a hostile author would."""
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
    (put("one:cols", lambda c: torch.full_like(c, 3000)), "one: cols .*0 to 2999.*3000 to 3000"),
    (put("one:cols", lambda c: c.to(torch.int32) - 3000), "one: cols .*0 to 2999.*-"),
    (put("one:cols", lambda c: c[:5]), r"one: cols .*\[6, at most 3000\]"),
    (put("one:cols", lambda c: c.to(torch.int64)), "one: cols .*torch.uint16, torch.int32"),
    (put("many:bits", lambda b: torch.full_like(b, -1)), "many: bits .*last column"),
    (swap("some:gaps", "some:indices", lambda g: torch.tensor([7, 0, 8])), "some: indices .*0 to 299"),
    (put("some:gaps", lambda g: u8(0, 255)), "some: .*last gap"),
    (put("some:gaps", lambda g: u8(0, 6, 255, 37)), "some: indices .*0 to 299"),
    (put("some:gaps", lambda g: u8(0, 6)), r"some: values .*\[2\].*\[3\]"),
    (put("few:gaps", lambda g: g[:-1]), "few: 59 entries .*6 rows of 300"),
    (put("few:gaps", lambda g: u8(*[0] * 60)), "few: gaps .*rows"),
    (put("few:gaps", lambda g: g.to(torch.float32)), "few: gaps .*uint8 or uint16"),
    (swap("bias:values", "bias:gaps", lambda v: u8(1)), "damaged: KeyError"),
    (put("rows:gaps", lambda g: u8(1)), "rows: .*rows, got|rows: part"),
    (put("bias:gaps", lambda g: u8(1)), "bias: .*'whole' .*gaps"),
    (put("bias:cols", lambda g: u8(1)), "bias: .*no tensors.*cols"),
    (put("one:values", lambda v: v[:5]), r"one: values .*\[6, 1\].*\[5, 1\]"),
    (put("one:values", lambda v: v.view(6)), r"one: values .*\[6, 1\].*\[6\]"),
    (put("one:values", lambda v: v.long()), "one: values .*torch.int64 .*torch.float32"),
    (put("count:values", lambda v: v.float()), "count: values .*torch.float32 .*torch.int64"),
    (put("one:values", lambda v: v.to(torch.complex64)), "one: values .*torch.complex64"),
    (put("one:originals", lambda v: torch.zeros(6, 1).half()), "one: originals .*torch.float16"),
    (put("one:originals", lambda v: torch.zeros(6, 2)), r"one: originals .*\[6, 1\].*\[6, 2\]"),
    (put("stranger:values", lambda v: torch.zeros(1)), "unknown parameters: stranger"),
    (put("no colon", lambda v: torch.zeros(1)), "unknown parameters"),
    (lambda m, t, p: t.pop("one:values"), r"damaged: KeyError\('values'\)"),
    (lambda m, t, p: t.pop("one:cols"), r"damaged: KeyError\('cols'\)"),
    (lambda m, t, p: p.pop("one"), "unknown parameters: one"),
    (lambda m, t, p: p.update(one=[1]), "damaged"),
    (lambda m, t, p: m.pop("notes"), r"damaged: KeyError\('notes'\)"),
    (lambda m, t, p: m.pop("checksum"), r"damaged: KeyError\('checksum'\)"),
    (describe("one", dtype="float8"), r"damaged: KeyError\('float8'\)"),
    (describe("one", dtype=["float32"]), "damaged: .*unhashable"),
    (describe("one", digest=3), "one: digest and fingerprint"),
    (describe("one", fingerprint=None), "one: digest and fingerprint"),
    (describe("one", kind="diagonal"), "one: .*kind .*'diagonal'"),
    (describe("one", shape=[10**12, 300]), r"one: cols .*\[1000000000000, at most 300\]"),
    (describe("few", shape=[10**12, 300]), "few: 60 entries .*1000000000000 rows of 300"),
    (describe("few", shape=[6, 0]), "few: 60 entries .*6 rows of 0"),
    (describe("few", row_dims=[0, 0]), r"few: row_dims \(0, 0\)"),
    (describe("bias", shape=[10**12]), r"bias: values .*\[1000000000000\].*\[6\]"),
    (describe("bias", shape=[2**70]), "bias: .*shape .*more than"),
    (describe("columns", shape=[10**12, 5]), r"columns: values .*\[1000000000000, 2\].*\[6, 2\]"),
    (describe("bias", shape=[0, 10**15]), "bias: no entries"),
    (huge_empty, "one: no entries"),
    (note(notes="[]"), "notes .*JSON object.*list"),
    (note(notes="{"), "damaged"),
    (note(notes="[" * 100_000), "damaged: RecursionError"),
    (note(version="3"), "version 3.*update"),
    (note(format="gradsel.selection"), "format .*'gradsel.selection'.*'gradsel.delta'"),
    (put("one:values", lambda v: v.fill_(torch.nan)), "one .*6 values .*NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_hostile_files_are_refused(path, change, message):
    """Their checksums are correct, yet their contents are checked all the same."""
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
        ("foreign", "format .*None"),
        ("selection", "format .*'gradsel.selection'"),
        ("text", "readable safetensors"),
        ("empty", "readable safetensors"),
        ("long", "readable safetensors"),
        ("d.delta", "'one'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_delta(base, tmp_path / name)
    with pytest.raises(ValueError, match="not a selection"):
        gradsel.Selection.load(path)
    assert_same(base, before)


def test_no_mutated_file_crashes_or_is_taken_for_another(tmp_path):
    """A mutated file that still loads gives the saved delta, bit for bit."""
    delta, _ = delta_of(x={0: 1.0, 5: 2.0}, y={1: 3.0, 2: 4.0, 4: 5.0, 6: 6.0})
    path = tmp_path / "d"
    delta.save(path)
    whole = path.read_bytes()
    drawn = random.Random(0)
    refused = 0
    for _ in range(3_000):
        path.write_bytes(mutated(whole, drawn))
        try:
            loaded = Delta.load(path, force=True)
        except ValueError:
            refused += 1
            continue
        assert loaded == delta
        assert [part.digest for part in loaded.values()] == [part.digest for part in delta.values()]
    assert refused > 2_700


def test_mutated_files_with_a_right_checksum_do_not_crash(path):
    """One digit of the description and one byte of a tensor are changed at random."""
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
