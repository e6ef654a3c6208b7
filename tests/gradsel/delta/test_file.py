"""What the file of a delta holds and costs, and saves that fail."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import gradsel_kernels as gk
from gradsel import sealed, tensor_files
from gradsel.delta.delta import Delta, save_delta
from gradsel.delta.parts import Part, same_bits
from gradsel.masks import Flat
from tests.gradsel.delta.cases import every_kind
from tests.support.deltas import delta_of, trained

# --- What a file holds -------------------------------------------------------------------------------------------


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


def test_the_table_adds_up_what_tensors_that_are_alike_take():
    """As many entries of two blocks, but gaps between some of them take two digits."""
    places = {"block.0.w": [0, 1, 2, 3], "block.1.w": [0, 300, 600, 900]}
    delta = Delta(
        {name: Part(Flat(torch.tensor(each), (1000,)), torch.zeros(4), torch.float32) for name, each in places.items()}
    )
    line = next(line for line in str(delta).splitlines() if line.startswith("block.*.w  x2"))
    assert line.split()[-2:] == ["8", f"{delta.nbytes}"]
    assert delta.nbytes == 2 * 16 + 4 + 7


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
        # Columns of these matrices take a byte or two each; those of narrow matrices are stored as gaps.
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
    with pytest.raises(ValueError, match=r"original entries of patch_embed\.weight"):
        Delta.load(tmp_path / "without").save(tmp_path / "again", originals=True)


def test_saving_again_gives_the_same_bytes(tmp_path):
    """safetensors writes metadata in a random order."""
    _, selection, model = trained()
    for what, name in ((every_kind(), "delta"), (selection, "selection")):
        files = set()
        for _ in range(8):
            what.save(tmp_path / name)
            files.add((tmp_path / name).read_bytes())
        assert len(files) == 1
    assert Delta.of(model).save(tmp_path / "a") is Delta.of(model).save(tmp_path / "b") is None
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_dtype_that_safetensors_has_is_written_as_it_does(tmp_path):
    dtypes = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.uint16, torch.bool, torch.int8]
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"turned": torch.arange(6.0).view(2, 3).t(), "scalar": torch.tensor(3), "none": torch.empty(0, 3)}
    tensor_files.save_file(tensors, tmp_path / "a", {"format": "pt", "more": 'é\n"\\'})
    found = load_file(tmp_path / "a")
    assert found.keys() == tensors.keys()
    assert all(found[n].dtype is t.dtype and found[n].tolist() == t.tolist() for n, t in tensors.items())
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"format": "pt", "more": 'é\n"\\'}
    with open(tmp_path / "a", "rb") as stream:
        header = tensor_files.read_header(stream)
        assert all(
            same_bits(tensor_files.read_tensor(stream, header.tensors[n]), found[n])
            for n in tensors if not found[n].dtype.is_complex
        )  # fmt: skip
    assert tensor_files.load_file(tmp_path / "a").keys() == tensors.keys()


# --- Saves that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_crash_leaves_the_old_file(path, monkeypatch, fails):
    before = path.read_bytes()
    fault = OSError(28, "No space left on device")

    def broken(*args, **kwargs):
        if fails == "write":  # leave half a file behind
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
        "0-new", "replace", path.parent.name,
    ]  # fmt: skip


def test_notes_that_are_no_json(path):
    before = path.read_bytes()
    with pytest.raises(TypeError, match="JSON serializable"):
        Delta(every_kind(), {"policy": object()}).save(path)
    assert path.read_bytes() == before
