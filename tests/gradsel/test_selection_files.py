"""Files of selections: their size, what they remember, hostile ones, and the check against a model."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import gradsel
import gradsel_kernels as gk
from gradsel import sealed
from gradsel.masks import Flat, Frozen, PerRow, Whole, WholeColumns, WholeRows
from gradsel.parameters.fingerprints import fingerprint, fingerprints
from gradsel.views import NeuronView
from tests.gradsel.toy import Toy


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
    """Changes the parts of a file; sealed, the checksum is right again, as a hostile author would see to."""
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
    with pytest.raises(ValueError, match=r"is damaged: .*the checksum does not match"):
        gradsel.Selection.load(path)


def ints(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("few:cols", lambda c: c.to(torch.int64)), r"few: cols must be one of torch\.uint16, torch\.int32, got"),
        (put("few:cols", lambda c: c.to(torch.float32)), "few: cols must be one of"),
        (put("few:cols", lambda c: torch.full_like(c, 300)), "few: cols must lie in 0 to 299, found 300 to 300"),
        (put("few:cols", lambda c: c.to(torch.int32) - 300), "found -"),
        (put("few:cols", lambda c: c.to(torch.int32).flip(1).to(torch.uint16)), "few: cols must ascend in every row"),
        (put("few:cols", lambda c: c[:5]), r"few: cols must be \[6, at most 300\]"),
        (put("few:cols", lambda c: c[0]), r"few: cols must be \[6"),
        (put("few:cols", lambda c: torch.zeros((), dtype=torch.int32)), r"few: cols must be \[6"),
        (put("many:bits", lambda b: b.to(torch.int64)), r"many: bits must be torch\.int32"),
        (
            put("many:bits", lambda b: b[:, :9].clone()),
            r"many: bits must be \[6, 10\] .*, got \[6, 9\]",
        ),
        (put("many:bits", lambda b: torch.full_like(b, -1)), "many: bits are set after the last column, 299"),
        (put("many:bits", lambda b: b.index_fill(0, torch.tensor([0]), 0)), "many: rows have 0 to 100 bits set"),
        (put("most:bits", lambda b: torch.full_like(b, -1)), "most: bits are set after the last column, 599"),
        (put("most:bits", lambda b: b.view(-1)), r"most: bits must be \[1, 19\]"),
        (put("rows:rows", lambda r: ints(1, 6)), "rows: rows must ascend within 0 to 5"),
        (put("rows:rows", lambda r: ints(4, 1)), "rows: rows must ascend"),
        (put("rows:rows", lambda r: ints(1, -(2**31))), "rows: rows must ascend"),
        (put("rows:rows", lambda r: ints(1, 1)), "rows: rows must ascend"),
        (put("rows:rows", lambda r: ints(0, 1, dtype=torch.int64)), "rows: rows must be one of"),
        (put("columns:cols", lambda c: ints(0, 5)), "columns: cols must ascend within 0 to 4"),
        (put("some:indices", lambda i: ints(0, 300)), "some: indices must ascend within 0 to 299"),
        (put("some:indices", lambda i: ints(5, -(2**31))), "some: indices must ascend"),
        (put("some:indices", lambda i: ints(5, -(2**63), dtype=torch.int64)), "some: indices must ascend"),
        (put("some:indices", lambda i: i.to(torch.float16)), "some: indices must be one of"),
        (put("huge:indices", lambda i: ints(5, 2**40, dtype=torch.int64)), "huge: indices must ascend"),
        (put("bias:indices", lambda i: ints(0)), "bias: expected no tensors, got indices"),
        (put("few:bits", lambda b: ints(0)), "few: expected cols or bits, got "),
        (put("stranger:cols", lambda c: ints(0)), "tensors of unknown parameters: stranger"),
        (put("no colon", lambda c: ints(0)), "tensors of unknown parameters"),
        (renamed("few:cols", "few:indices"), "few: expected cols or bits, got indices"),
        (renamed("some:indices", "some:cols"), "some: expected indices or bits, got cols"),
        (drop("few:cols"), r"is damaged: KeyError\('cols'\)"),
        (drop("most:bits"), r"is damaged: KeyError\('indices'\)"),
        (describe("few", shape=[6, -300]), "few: a shape is a list of sizes"),
        (describe("few", shape=[6, 300.0]), "a shape is a list of sizes"),
        (describe("few", shape=[True, 300]), "a shape is a list of sizes"),
        (describe("few", shape="6x300"), "a shape is a list of sizes"),
        (describe("few", shape={"0": 6}), "a shape is a list of sizes"),
        (describe("few", shape=[2**40, 2**40]), r"a shape with more than 64 dimensions or 2\*\*63 entries"),
        (describe("bias", shape=[2**70]), "a shape with more than"),
        (describe("bias", shape=[1] * 65), "a shape with more than 64 dimensions"),
        (describe("bias", shape=[0, 2**70]), "a shape with more than"),
        (describe("few", shape=[10**12, 300]), r"few: cols must be \[1000000000000, at most 300\]"),
        (describe("most", shape=[10**12]), r"most: bits must be \[1, 31250000000\]"),
        (describe("many", shape=[10**12, 0]), r"many: bits must be \[1000000000000, 0\]"),
        (describe("few", shape=[]), "row_dims .* are not distinct dimensions"),
        (describe("few", kind="diagonal"), "unknown kind of mask 'diagonal'"),
        (describe("few", kind=["per-row"]), "is damaged: .*few: .*unhashable"),
        (describe("few", kind=None), "unknown kind of mask None"),
        (describe("few", row_dims=[0, 0]), r"few: row_dims \(0, 0\) are not distinct"),
        (describe("few", row_dims=[-1]), "are not distinct dimensions"),
        (describe("few", row_dims=[0.0]), "row_dims and groups are integers"),
        (describe("few", row_dims="0"), "row_dims and groups are integers"),
        (describe("few", groups=2.0), "row_dims and groups are integers"),
        (describe("few", groups=-6), "groups = -6 does not divide"),
        (describe("few", groups=4), "groups = 4 does not divide"),
        (describe("few", groups=None), "row_dims and groups are integers"),
        (lambda m, t, p: p["few"].pop("row_dims"), r"is damaged: KeyError\('row_dims'\)"),
        (lambda m, t, p: p["bias"].pop("shape"), r"is damaged: KeyError\('shape'\)"),
        (lambda m, t, p: p.pop("few"), "tensors of unknown parameters: few"),
        (lambda m, t, p: p.update(few=[1]), "is damaged"),
        (lambda m, t, p: m.pop("base"), r"is damaged: KeyError\('base'\)"),
        (lambda m, t, p: m.pop("checksum"), r"is damaged: KeyError\('checksum'\)"),
        (note(notes="[]"), "notes must be a JSON object, got a list"),
        (note(notes="{"), "is damaged"),
        (note(base="3"), "base must be a JSON object, got a int"),
        (note(base='{"few": 3}'), "fingerprints must be strings"),
        (note(notes='{"n": ' + "9" * 5000 + "}"), "is damaged"),
    ],
)
def test_hostile_files_are_refused(path, change, message):
    """Their checksums are right: what they say is looked at all the same."""
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        gradsel.Selection.load(path)


def test_bits_without_columns_are_refused_before_they_take_memory(path):
    def change(metadata, tensors, parameters):
        tensors["many:bits"] = torch.empty(10**15, 0, dtype=torch.int32)
        parameters["many"]["shape"] = [10**15, 0]

    rewrite(path, change)
    with pytest.raises(ValueError, match=r"many: bits must be \[1000000000000000, 0\] for a matrix"):
        gradsel.Selection.load(path)


def test_sizes_without_entries_take_no_memory(path):
    """Petabytes of neurons without inputs are odd, but the file says no more than that."""
    rewrite(path, describe("bias", shape=[10**15, 0]))
    assert gradsel.Selection.load(path)["bias"].nnz == 0


def test_garbled_bytes_never_crash(path):
    """Any byte may be wrong: what loads all the same is the selection that was saved."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (40, 50), (3, 4, 5, 6)], ids=str)
def test_fingerprints_are_of_logical_entries(shape, dtype):
    weight = (torch.randn(shape) * 10).to(dtype)
    text = fingerprint(weight)
    size, kind, digest = text.split(" ")
    assert (size, kind) == ("x".join(map(str, shape)) or "scalar", str(dtype).removeprefix("torch."))
    flat = weight.reshape(-1)
    count = min(256, flat.numel())
    sample = torch.stack([flat[i * flat.numel() // count] for i in range(count)]) if count else flat
    raw = bytes(sample.view(torch.uint8).tolist())
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    total = sum(weight.contiguous().view(integers).reshape(-1).tolist())
    total = (total + 2**63) % 2**64 - 2**63  # as 64 bits add
    assert digest == hashlib.blake2b(raw + str(total).encode(), digest_size=8).hexdigest()
    assert fingerprint(nn.Parameter(weight, requires_grad=False)) == text
    if weight.ndim == 4:
        assert fingerprint(weight.to(memory_format=torch.channels_last)) == text
    if weight.ndim == 2:
        assert fingerprint(weight.t().contiguous().t()) == text
    if weight.numel() > 1 and dtype is not torch.bool:
        assert fingerprint(weight + 1) != text
        weight.view(-1)[-1].zero_().add_(1 if flat[-1] == 0 else 0)  # one entry, which no sample reads in a large one
        assert fingerprint(weight) != text


def test_fingerprints_know_wrapped_models_by_their_names():
    model = Toy()
    wrapped = nn.Module()
    wrapped.module = model
    assert fingerprints(wrapped) == fingerprints(model)
    assert list(fingerprints(model)) == [name for name, _ in model.named_parameters()]


def selection_on(model):
    masks = gradsel.select(model, None, None, criterion="magnitude")
    return gradsel.Selection(masks, masks.notes, fingerprints(model))


def test_a_selection_knows_its_model(tmp_path):
    model = Toy()
    selection = selection_on(model)
    selection.save(tmp_path / "s")
    assert gradsel.Selection.load(tmp_path / "s").base == fingerprints(model)
    loaded = gradsel.Selection.load(tmp_path / "s", copy.deepcopy(model))
    loaded.check(model.double())  # another dtype is not compared
    with pytest.raises(ValueError, match="differ from the weights this selection was made on"):
        gradsel.Selection.load(tmp_path / "s", Toy())


def test_other_weights_are_told_by_name_but_not_those_trained_whole():
    model = Toy()
    selection = selection_on(model)
    with torch.no_grad():
        model.head.weight += 1
        model.blocks[0].fc1.bias += 1
    selection.check(model)
    with torch.no_grad():
        model.blocks[1].fc1.weight += 1  # ranked
        model.blocks[1].norm.weight += 1  # frozen
    compared = sum(not mask.is_whole for mask in selection.values())
    message = (
        rf"2 of {compared} ranked and frozen parameters differ .*, first blocks\.1\.norm\.weight: pass values=False"
    )
    with pytest.raises(ValueError, match=message):
        selection.check(model)
    selection.check(model, values=False)
    gradsel.Selection(selection).check(model)  # knows of no weights


def test_other_models_are_told_by_their_parameters():
    model = Toy()
    selection = selection_on(model)
    renamed_model = Toy()
    renamed_model.backbone = renamed_model.blocks
    del renamed_model.blocks
    message = (
        r"the model lacks 18 parameters \(blocks\.0\.gamma, .* and 15 more\); did you mean backbone\.0\.gamma\?; "
        r"the selection lacks 18 parameters \(backbone\.0\.gamma"
    )
    with pytest.raises(ValueError, match=message):
        selection.check(renamed_model, values=False)
    with pytest.raises(
        ValueError, match=r"shapes differ in 2 parameters .*: head\.weight is 4x12 in .*, 7x12 in the mo"
    ):
        selection.check(Toy(classes=7), values=False)
