"""Files of deltas: their size and encodings, hostile and damaged ones, and saves that fail."""

from __future__ import annotations

import json
import os
import random
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gradsel
import gradsel_kernels as gk
from gradsel import sealed
from gradsel.delta.coding import from_gaps, packed, to_gaps, unpacked
from gradsel.delta.delta import Delta, load_delta, save_delta
from gradsel.delta.parts import Part, same_bits
from gradsel.masks import Flat, PerRow, Whole, WholeColumns, WholeRows, same
from gradsel.views import NeuronView
from tests.gradsel.test_delta import assert_same, delta_of, frozen_copy, trained

# --- Gaps --------------------------------------------------------------------------------------------------------


def test_gaps_by_hand():
    assert to_gaps(torch.tensor([0, 7, 299]), torch.uint8).tolist() == [0, 6, 255, 36]
    assert to_gaps(torch.tensor([254, 510]), torch.uint8).tolist() == [254, 255, 0]
    assert to_gaps(torch.tensor([65535, 65536 * 3]), torch.uint16).tolist() == [65535, 0, 65535, 65535, 2]
    assert from_gaps(torch.tensor([0, 6, 255, 36], dtype=torch.uint8)).tolist() == [0, 7, 299]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("end", [3, 300, 10**6, 2**40])
def test_gaps_come_back(dtype, end):
    generator = torch.Generator().manual_seed(end)
    for _ in range(20):
        count = int(torch.randint(1, 40, (), generator=generator))
        numbers = torch.randint(0, min(end, 10**7), (count,), generator=generator).unique()
        numbers[-1:] += (end - 1 - numbers[-1]) * (end <= 10**7)  # the last entry of all
        assert torch.equal(from_gaps(to_gaps(numbers, dtype)), numbers)


@pytest.mark.parametrize(
    ("gaps", "error", "message"),
    [
        (torch.tensor([1, 255], dtype=torch.uint8), ValueError, "the last gap is cut off"),
        (torch.tensor([], dtype=torch.uint8), ValueError, r"must be a vector with entries, got \[0\]"),
        (torch.tensor([[1]], dtype=torch.uint8), ValueError, r"must be a vector with entries, got \[1, 1\]"),
        (torch.tensor([1], dtype=torch.int32), TypeError, r"must be uint8 or uint16, got torch.int32"),
    ],
)
def test_gaps_that_mean_nothing(gaps, error, message):
    with pytest.raises(error, match=message):
        from_gaps(gaps)


def cols(rows, n, k):
    generator = torch.Generator().manual_seed(n)
    return torch.rand(rows, n, generator=generator).topk(k, 1).indices.sort(1).values.to(torch.int32)


@pytest.mark.parametrize(
    ("mask", "part", "dtype"),
    [
        (PerRow(cols(6, 3000, 1), (6, 3000)), "cols", "uint16"),
        (PerRow(cols(6, 70_000, 1), (6, 70_000)), "gaps", "uint16"),  # columns would be int32
        (PerRow(cols(6, 300, 10), (6, 300)), "gaps", "uint8"),
        (PerRow(cols(6, 300, 100), (6, 300)), "bits", "int32"),
        (PerRow(cols(6, 300, 10), (300, 6), NeuronView((1,))), "gaps", "uint8"),
        (PerRow(cols(2, 10**7, 1), (2, 10**7)), "cols", "int32"),
        (Flat(torch.tensor([0, 7, 299]), (6, 50)), "gaps", "uint8"),
        (Flat(torch.arange(2, 600), (6, 100)), "bits", "int32"),
        (Flat(torch.tensor([5, 90_000_000]), (10_000, 10_000)), "indices", "int32"),
        (WholeRows(torch.tensor([1, 4], dtype=torch.int32), (6, 5)), "rows", "uint16"),
        (WholeColumns(torch.tensor([1], dtype=torch.int32), (6, 5)), "cols", "uint16"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_smallest_encoding_comes_back(mask, part, dtype):
    ((found, tensor),) = packed(mask).items()
    assert (found, str(tensor.dtype)) == (part, f"torch.{dtype}")
    assert same(unpacked(mask.kind, list(mask.shape), mask.describe(), {found: tensor}), mask)
    if part == "gaps":
        assert tensor.nbytes < sum(t.nbytes for t in mask.packed().values())


# --- What a file holds -------------------------------------------------------------------------------------------


def every_kind():
    torch.manual_seed(0)
    masks = {
        "one": PerRow(cols(6, 3000, 1), (6, 3000)),
        "few": PerRow(cols(6, 300, 10), (6, 300)),
        "many": PerRow(cols(6, 300, 100), (6, 3, 100)),
        "turned": PerRow(cols(6, 300, 1), (300, 6), NeuronView((1,))),
        "rows": WholeRows(torch.tensor([1, 4], dtype=torch.int32), (6, 5)),
        "columns": WholeColumns(torch.tensor([0, 4], dtype=torch.int32), (6, 5)),
        "some": Flat(torch.tensor([0, 7, 299]), (6, 50)),
        "bias": Whole((6,)),
        "scalar:": Whole(()),
    }
    parts = {
        name: Part(mask, torch.randn(mask.compact_shape), torch.float32, "d" * 32, "6x300 float32 0123456789abcdef")
        for name, mask in masks.items()
    }
    parts["count"] = Part(Whole(()), torch.tensor(7), torch.int64)
    half = torch.randn(6).bfloat16()
    parts["half"] = Part(Whole((6,)), half, torch.bfloat16, originals=torch.zeros_like(half))
    return Delta(parts, {"policy": "PerNeuron(k=1)", "task": "toys"})


@pytest.fixture
def path(tmp_path):
    every_kind().save(tmp_path / "d.delta")
    return tmp_path / "d.delta"


def test_every_kind_comes_back(path):
    delta, loaded = every_kind(), Delta.load(path)
    assert loaded == delta
    assert list(loaded) == list(delta)
    assert loaded.notes == delta.notes
    for name, part in delta.items():
        other = loaded[name]
        assert (other.dtype, other.digest, other.fingerprint) == (part.dtype, part.digest, part.fingerprint)
        assert other.originals is None
        assert other.values.data_ptr() % other.values.element_size() == 0
    assert str(loaded) == str(delta)


def test_the_file_is_as_documented(path):
    tensors = load_file(path)
    found = {key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for key, tensor in tensors.items()}
    assert found["one:cols"] == ("uint16", (6, 1))
    assert found["few:gaps"][0] == "uint8"
    assert found["many:bits"] == ("int32", (6, 10))
    assert found["some:gaps"] == ("uint8", (4,))
    assert found["one:values"] == ("float32", (6, 1))
    assert found["scalar::values"] == ("float32", ())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], metadata["library"]) == ("gradsel.delta", "1", gk.__version__)
    assert json.loads(metadata["notes"]) == every_kind().notes
    assert json.loads(metadata["parameters"])["turned"] == {
        "kind": "per-row", "shape": [300, 6], "row_dims": [1], "groups": 1, "dtype": "float32",
        "digest": "d" * 32, "fingerprint": "6x300 float32 0123456789abcdef",
    }  # fmt: skip


def test_entries_cost_six_bytes_or_four(tmp_path):
    _, selection, model = trained()
    entries = sum(mask.nnz for mask in selection.values() if not mask.is_whole)
    wholes = selection.trainable_count() - entries
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        delta = save_delta(model, tmp_path / "d", dtype=dtype)
        # Columns of these matrices take a byte or two each: narrow ones are gaps.
        assert delta.nbytes <= (size + 2) * entries + size * wholes
        assert delta.nbytes < (tmp_path / "d").stat().st_size


def test_originals_are_kept_if_asked_for(tmp_path):
    base, _, model = trained()
    delta = Delta.of(model)
    delta.save(tmp_path / "with", originals=True)
    loaded = Delta.load(tmp_path / "with")
    for name, part in delta.items():
        assert same_bits(loaded[name].originals, part.originals)
        assert same_bits(part.originals, part.mask.gather(base.get_parameter(name).detach())), name
    delta.save(tmp_path / "without")
    with pytest.raises(ValueError, match=r"the original entries of patch_embed.weight are not known"):
        Delta.load(tmp_path / "without").save(tmp_path / "again", originals=True)


# --- Saves that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_crash_leaves_the_old_file(path, monkeypatch, fails):
    before = path.read_bytes()
    fault = OSError(28, "No space left on device")

    def broken(*args, **kwargs):
        if fails == "write":  # half of it is there
            args[1].write_bytes(b"half")
        raise fault

    target, name = {"write": (sealed, "save_file"), "fsync": (os, "fsync"), "replace": (os, "replace")}[fails]
    monkeypatch.setattr(target, name, broken)
    with pytest.raises(OSError, match="No space left"):
        delta_of(x={0: 1.0})[0].save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_file_and_folder_are_on_the_disk_before_and_after_it_takes_its_place(path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    every_kind().save(path)
    assert [os.path.basename(step) for step in order] == [
        f"{path.name}.{os.getpid()}.tmp", "replace", path.parent.name,
    ]  # fmt: skip


def test_notes_that_are_no_json(path):
    before = path.read_bytes()
    with pytest.raises(TypeError, match="JSON serializable"):
        Delta(every_kind(), {"policy": object()}).save(path)
    assert path.read_bytes() == before


# --- Files that are not trusted ----------------------------------------------------------------------------------


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
    (put("many:bits", lambda b: torch.full_like(b, -1)), "many: bits are set after the last column"),
    (swap("some:gaps", "some:indices", lambda g: torch.tensor([7, 0, 8])), "some: indices must ascend within 0 to 299"),
    (put("some:gaps", lambda g: u8(0, 255)), "some: the last gap is cut off"),
    (put("some:gaps", lambda g: u8(0, 6, 255, 37)), "some: indices must ascend within 0 to 299"),
    (put("some:gaps", lambda g: u8(0, 6)), r"some: values must be \[2\], got \[3\]"),
    (put("few:gaps", lambda g: g[:-1]), "few: 59 entries are not the same number in each of 6 rows of 300"),
    (put("few:gaps", lambda g: u8(*[0] * 60)), "few: gaps leave their rows"),
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
    (describe("one", digest=3), "one: digest and fingerprint must be strings"),
    (describe("one", fingerprint=None), "one: digest and fingerprint must be strings"),
    (describe("one", kind="diagonal"), "one: unknown kind of mask 'diagonal'"),
    (describe("one", shape=[10**12, 300]), r"one: cols must be \[1000000000000, at most 300\]"),
    (describe("few", shape=[10**12, 300]), "few: 60 entries are not the same number in each of 1000000000000"),
    (describe("few", shape=[6, 0]), "few: 60 entries are not the same number in each of 6 rows of 0"),
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
