"""Files of selections: their size, what they remember, hostile ones, and saves that fail."""

from __future__ import annotations

import json
import random
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gradsel
import gradsel_kernels as gk
from gradsel import sealed
from gradsel.masks import Flat, Frozen, PerRow, Whole, WholeColumns, WholeRows
from gradsel.views import NeuronView


def every_kind():
    torch.manual_seed(0)
    few = torch.rand(6, 300).topk(2, 1).indices.sort(1).values.to(torch.int32)
    many = torch.rand(6, 300).topk(100, 1).indices.sort(1).values.to(torch.int32)
    return gradsel.Selection(
        {
            "few": PerRow(few, (6, 300)),
            "many": PerRow(many, (6, 3, 100)),
            "transposed": PerRow(many, (300, 6), NeuronView((1,))),
            "grouped": PerRow(torch.zeros(12, 1, dtype=torch.int32), (8, 3, 2), NeuronView((0, 2), groups=4)),
            "none": PerRow(torch.zeros(6, 0, dtype=torch.int32), (6, 300)),
            "rows": WholeRows(torch.tensor([1, 4], dtype=torch.int32), (6, 5)),
            "columns": WholeColumns(torch.tensor([0, 4], dtype=torch.int32), (6, 5)),
            "some": Flat(torch.tensor([0, 7, 299]), (6, 50)),
            "most": Flat(torch.arange(2, 600), (6, 100)),
            "huge": Flat(torch.tensor([5, 2**33]), (2**20, 2**20)),
            "empty": PerRow(torch.zeros(0, 0, dtype=torch.int32), (0, 4)),
            "bias": Whole((6,)),
            "scalar": Whole(()),
            "norm:weight": Frozen((6,), "normalisation"),
        },
        {"policy": "by hand"},
        {"few": "6x300 float32 0123456789abcdef"},
    )


@pytest.fixture
def path(tmp_path):
    every_kind().save(tmp_path / "s.selection")
    return tmp_path / "s.selection"


def test_every_kind_comes_back(path):
    selection, loaded = every_kind(), gradsel.Selection.load(path)
    assert list(loaded) == list(selection)
    assert (loaded.notes, loaded.base) == (selection.notes, selection.base)
    assert str(loaded) == str(selection)
    for name, mask in selection.items():
        assert type(loaded[name]) is type(mask)
        assert loaded[name].describe() == mask.describe()
        for part, tensor in mask.tensors().items():
            assert loaded[name].tensors()[part].dtype is tensor.dtype
            assert torch.equal(loaded[name].tensors()[part], tensor)


def test_the_file_holds_the_smallest_encodings(path):
    tensors = load_file(path)
    found = {key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for key, tensor in tensors.items()}
    assert found == {
        "few:cols": ("uint16", (6, 2)),
        "many:bits": ("int32", (6, 10)),
        "transposed:bits": ("int32", (6, 10)),
        "grouped:cols": ("uint16", (12, 1)),
        "none:cols": ("uint16", (6, 0)),
        "rows:rows": ("uint16", (2,)),
        "columns:cols": ("uint16", (2,)),
        "some:indices": ("uint16", (3,)),
        "most:bits": ("int32", (1, 19)),
        "huge:indices": ("int64", (2,)),
        "empty:cols": ("uint16", (0, 0)),
    }


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_file_says_what_wrote_it(path):
    metadata = metadata_of(path)
    assert (metadata["format"], metadata["version"]) == ("gradsel.selection", "1")
    assert metadata["library"] == gk.__version__
    assert len(metadata["checksum"]) == 64
    every_kind().save(path.with_name("again"))
    assert metadata_of(path.with_name("again"))["checksum"] == metadata["checksum"]


def rewrite(path, change, seal=True):
    """Changes the parts of a file; if ``sealed``, recomputes the checksum, as a hostile author would."""
    metadata, tensors = metadata_of(path), load_file(path)
    parameters = json.loads(metadata["parameters"])
    change(metadata, tensors, parameters)
    metadata["parameters"] = json.dumps(parameters)
    if seal and "checksum" in metadata:
        metadata["checksum"] = sealed._checksum(metadata, tensors)
    save_file(tensors, path, metadata)


def put(key, make):
    def change(metadata, tensors, parameters):
        tensors[key] = make(tensors.get(key))

    return change


def describe(name, **values):
    return lambda metadata, tensors, parameters: parameters[name].update(values)


def note(**values):
    return lambda metadata, tensors, parameters: metadata.update(values)


def drop(key):
    return lambda metadata, tensors, parameters: tensors.pop(key)


def renamed(old, new):
    def change(metadata, tensors, parameters):
        tensors[new] = tensors.pop(old)

    return change


def test_an_unchanged_file_stays_readable_when_rewritten(path):
    rewrite(path, note())
    assert list(gradsel.Selection.load(path)) == list(every_kind())


@pytest.mark.parametrize(
    "change",
    [
        put("few:cols", lambda cols: cols.flip(0)),
        put("many:bits", lambda bits: bits.flip(0)),
        note(notes='{"policy": "forged"}'),
        note(base="{}"),
        note(library="0.0.1"),
        describe("norm:weight", reason="forged"),
        note(checksum="0" * 64),
        note(checksum=""),
    ],
)
def test_the_checksum_tells_any_change(path, change):
    rewrite(path, change, seal=False)
    with pytest.raises(ValueError, match=r"damaged: .*checksum"):
        gradsel.Selection.load(path)


def ints(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


def uneven(bits):
    """As many bits, but some of the first row are in the second."""
    bits = bits.clone()
    place = next(i for i in range(bits.shape[1]) if int(bits[0, i]) & ~int(bits[1, i]))
    bit = int(bits[0, place]) & ~int(bits[1, place])
    bit &= -bit
    bits[0, place] ^= bit
    bits[1, place] |= bit
    return bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("few:cols", lambda c: c.to(torch.int64)), r"few: cols .*torch\.uint16, torch\.int32"),
        (put("few:cols", lambda c: c.to(torch.float32)), r"few: cols .*torch\.uint16, torch\.int32"),
        (put("few:cols", lambda c: torch.full_like(c, 300)), "few: cols .*0 to 299.*300 to 300"),
        (put("few:cols", lambda c: c.to(torch.int32) - 300), "few: cols .*-"),
        (put("few:cols", lambda c: c.to(torch.int32).flip(1).to(torch.uint16)), "few: cols .*ascend"),
        (put("few:cols", lambda c: c[:5]), r"few: cols .*\[6, at most 300\]"),
        (put("few:cols", lambda c: c[0]), r"few: cols .*\[6"),
        (put("few:cols", lambda c: torch.zeros((), dtype=torch.int32)), r"few: cols .*\[6"),
        (put("many:bits", lambda b: b.to(torch.int64)), r"many: bits .*torch\.int32"),
        (
            put("many:bits", lambda b: b[:, :9].clone()),
            r"many: bits .*\[6, 10\].*\[6, 9\]",
        ),
        (put("many:bits", lambda b: torch.full_like(b, -1)), "many: bits .*last column, 299"),
        (put("many:bits", lambda b: b.index_fill(0, torch.tensor([0]), 0)), "many: 500 bits .*6 rows"),
        (put("many:bits", lambda b: uneven(b)), "many: row 0 .*100 bits"),
        (put("most:bits", lambda b: torch.full_like(b, -1)), "most: bits .*last column, 599"),
        (put("most:bits", lambda b: b.view(-1)), r"most: bits .*\[1, 19\]"),
        (put("rows:rows", lambda r: ints(1, 6)), "rows: rows .*0 to 5"),
        (put("rows:rows", lambda r: ints(4, 1)), "rows: rows .*ascend"),
        (put("rows:rows", lambda r: ints(1, -(2**31))), "rows: rows .*ascend"),
        (put("rows:rows", lambda r: ints(1, 1)), "rows: rows .*ascend"),
        (put("rows:rows", lambda r: ints(0, 1, dtype=torch.int64)), "rows: rows .*torch.int64"),
        (put("columns:cols", lambda c: ints(0, 5)), "columns: cols .*0 to 4"),
        (put("some:indices", lambda i: ints(0, 300)), "some: indices .*0 to 299"),
        (put("some:indices", lambda i: ints(5, -(2**31))), "some: indices .*ascend"),
        (put("some:indices", lambda i: ints(5, -(2**63), dtype=torch.int64)), "some: indices .*ascend"),
        (put("some:indices", lambda i: i.to(torch.float16)), "some: indices .*torch.float16"),
        (put("huge:indices", lambda i: ints(5, 2**40, dtype=torch.int64)), "huge: indices .*ascend"),
        (put("bias:indices", lambda i: ints(0)), "bias: .*no tensors.*indices"),
        (put("few:bits", lambda b: ints(0)), "few: .*cols or bits"),
        (put("stranger:cols", lambda c: ints(0)), "unknown parameters: stranger"),
        (put("no colon", lambda c: ints(0)), "unknown parameters"),
        (renamed("few:cols", "few:indices"), "few: .*cols or bits.*indices"),
        (renamed("some:indices", "some:cols"), "some: .*indices or bits.*cols"),
        (drop("few:cols"), r"damaged: KeyError\('cols'\)"),
        (drop("most:bits"), r"damaged: KeyError\('indices'\)"),
        (describe("few", shape=[6, -300]), "few: .*list of sizes"),
        (describe("few", shape=[6, 300.0]), "few: .*list of sizes"),
        (describe("few", shape=[True, 300]), "few: .*list of sizes"),
        (describe("few", shape="6x300"), "few: .*list of sizes"),
        (describe("few", shape={"0": 6}), "few: .*list of sizes"),
        (describe("few", shape=[2**40, 2**40]), r"few: .*shape .*2\*\*63"),
        (describe("bias", shape=[2**70]), "bias: .*shape .*more than"),
        (describe("bias", shape=[1] * 65), "bias: .*shape .*64 dimensions"),
        (describe("bias", shape=[0, 2**70]), "bias: .*shape .*more than"),
        (describe("few", shape=[10**12, 300]), r"few: cols .*\[1000000000000, at most 300\]"),
        (describe("most", shape=[10**12]), r"most: bits .*\[1, 31250000000\]"),
        (describe("many", shape=[10**12, 0]), r"many: bits .*\[1000000000000, 0\]"),
        (describe("few", shape=[]), "few: row_dims .*distinct"),
        (describe("few", kind="diagonal"), "kind .*'diagonal'"),
        (describe("few", kind=["per-row"]), "damaged: .*few: .*unhashable"),
        (describe("few", kind=None), "kind .*None"),
        (describe("few", row_dims=[0, 0]), r"few: row_dims \(0, 0\)"),
        (describe("few", row_dims=[-1]), r"few: row_dims \(-1"),
        (describe("few", row_dims=[0.0]), "row_dims and groups"),
        (describe("few", row_dims="0"), "row_dims and groups"),
        (describe("few", groups=2.0), "row_dims and groups"),
        (describe("few", groups=-6), "groups = -6"),
        (describe("few", groups=4), "groups = 4"),
        (describe("few", groups=None), "row_dims and groups"),
        (lambda m, t, p: p["few"].pop("row_dims"), r"damaged: KeyError\('row_dims'\)"),
        (lambda m, t, p: p["bias"].pop("shape"), r"damaged: KeyError\('shape'\)"),
        (lambda m, t, p: p.pop("few"), "unknown parameters: few"),
        (lambda m, t, p: p.update(few=[1]), "damaged"),
        (lambda m, t, p: m.pop("base"), r"damaged: KeyError\('base'\)"),
        (lambda m, t, p: m.pop("checksum"), r"damaged: KeyError\('checksum'\)"),
        (note(notes="[]"), "notes .*JSON object.*list"),
        (note(notes="{"), "damaged"),
        (note(base="3"), "base .*JSON object.*int"),
        (note(base='{"few": 3}'), "fingerprints"),
        (note(notes='{"n": ' + "9" * 5000 + "}"), "damaged"),
    ],
)
def test_hostile_files_are_refused(path, change, message):
    """Their checksums are correct, yet their contents are checked all the same."""
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        gradsel.Selection.load(path)


def test_bits_without_columns_are_refused_before_they_take_memory(path):
    def change(metadata, tensors, parameters):
        tensors["many:bits"] = torch.empty(10**15, 0, dtype=torch.int32)
        parameters["many"]["shape"] = [10**15, 0]

    rewrite(path, change)
    with pytest.raises(ValueError, match=r"many: bits .*\[1000000000000000, 0\]"):
        gradsel.Selection.load(path)


def test_sizes_without_entries_take_no_memory(path):
    """Petabytes of neurons without inputs are odd, but the file says no more than that."""
    rewrite(path, describe("bias", shape=[10**15, 0]))
    assert gradsel.Selection.load(path)["bias"].nnz == 0


def test_garbled_bytes_never_crash(path):
    """Any byte may be wrong; a file that still loads gives the saved selection."""
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    random.seed(0)
    expected = every_kind()
    for trial in range(600):
        data = bytearray(whole)
        end = 8 + header if trial % 2 else len(data)  # half of them in the header
        for _ in range(random.choice((1, 1, 8))):
            data[random.randrange(end)] = random.randrange(256)
        path.write_bytes(bytes(data[: random.randrange(len(data))] if trial % 10 == 0 else data))
        try:
            loaded = gradsel.Selection.load(path)
        except ValueError:
            continue
        assert {name: mask.describe() for name, mask in loaded.items()} == {
            name: mask.describe() for name, mask in expected.items()
        }
        assert all(torch.equal(loaded[name].entries(), mask.entries()) for name, mask in expected.items() if mask.nnz)


def test_a_failed_save_leaves_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises(TypeError, match="JSON serializable"):
        gradsel.Selection(every_kind(), {"policy": object()}).save(path)
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir()] == ["s.selection"]
