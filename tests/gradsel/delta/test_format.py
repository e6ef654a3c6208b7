"""The format, read as docs/deltas.md describes it: with json, struct, hashlib and NumPy, without our code or torch."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import struct

import numpy
import pytest
import torch

from gradsel.delta.delta import Delta, save_delta
from gradsel.masks import Flat, PerRow, Whole, WholeColumns, WholeRows
from gradsel.selection.selection import Selection
from gradsel.views import NeuronView
from tests.support.deltas import Odd, cols, odd_selection

DTYPES = {"F32": ("<f4", "float32"), "U16": ("<u2", "uint16"), "U8": ("u1", "uint8"), "I32": ("<i4", "int32")}


def read(path):
    """The parameters and tensors of a file, after its checksum is verified."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"checksum"}):
        digest.update(json.dumps([key, metadata[key]]).encode())
    tensors = {}
    for key, about in sorted(header.items()):
        data = body[slice(*about["data_offsets"])]
        code, name = DTYPES[about["dtype"]]
        digest.update(json.dumps([key, f"torch.{name}", about["shape"]]).encode() + data)
        tensors[key] = numpy.frombuffer(data, code).reshape(about["shape"])
    assert digest.hexdigest() == metadata["checksum"]
    assert (metadata["format"], metadata["version"]) == ("gradsel.delta", "1")
    return json.loads(metadata["parameters"]), tensors


def matrix(about):
    """The row-major indices of a tensor, arranged in its neuron view."""
    numbers = numpy.arange(math.prod(about["shape"])).reshape(about["shape"])
    if about["groups"] > 1:
        numbers = numbers.reshape(about["groups"], -1, *about["shape"][1:])
    first = about["row_dims"]
    order = [*first, *(dim for dim in range(numbers.ndim) if dim not in first)]
    return numbers.transpose(order).reshape(math.prod(numbers.shape[dim] for dim in first), -1)


def entries(about, tensors):
    """The row-major indices of the selected entries, in mask order."""
    kind = about["kind"]
    if kind == "whole":
        return numpy.arange(math.prod(about["shape"]))
    view = matrix(about) if "row_dims" in about else numpy.arange(math.prod(about["shape"])).reshape(1, -1)
    ((part, numbers),) = tensors.items()
    if part == "bits":
        bits = numpy.unpackbits(numbers.view(numpy.uint8), axis=1, bitorder="little")[:, : view.shape[1]]
        return view[bits.astype(bool)]
    if part == "gaps":
        escape = 255 if numbers.dtype == numpy.uint8 else 65535
        ends = numbers != escape
        return view.reshape(-1)[numbers.astype(numpy.int64).cumsum()[ends] + numpy.arange(ends.sum())]
    numbers = numbers.astype(numpy.int64)
    if kind == "per-row":
        return numpy.take_along_axis(view, numbers, 1).reshape(-1)
    return {"rows": view[numbers], "columns": view[:, numbers], "irregular": view[:, numbers]}[kind].reshape(-1)


def other_selection():
    return Selection(
        {
            "a": PerRow(cols(6, 8, 7), (6, 8)),
            "b": WholeRows(torch.tensor([1, 5], dtype=torch.int32), (8, 4, 3, 3)),
            "c": WholeColumns(torch.tensor([0, 2], dtype=torch.int32), (6, 8)),
            "d": PerRow(cols(4, 27, 1), (4, 3, 3, 3)),
            "e": Flat(torch.arange(3, 70), (9, 9)),
        }
    )


def wide():
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.randn(3, 40_000))
    return model


CASES = {
    "odd": (Odd, odd_selection),
    "other": (Odd, other_selection),
    "columns": (wide, lambda: Selection({"w": PerRow(cols(3, 40_000, 1), (3, 40_000))})),
    "gaps": (wide, lambda: Selection({"w": Flat(torch.tensor([5, 99_999, 119_999]), (3, 40_000))})),
    "whole": (wide, lambda: Selection({"w": Whole((3, 40_000))})),
    "turned": (wide, lambda: Selection({"w": PerRow(cols(40_000, 3, 1), (3, 40_000), NeuronView((1,)))})),
}


@pytest.mark.parametrize("case", CASES)
def test_the_description_is_enough(case, tmp_path):
    torch.manual_seed(0)
    make, select = CASES[case]
    base, selection = make(), select()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            mask = selection[name]
            mask.scatter_(parameter, torch.randn(mask.compact_shape))
    save_delta(tuned, tmp_path / "d", selection=selection, base=base)
    Delta.load(tmp_path / "d").save(tmp_path / "again")
    parameters, tensors = read(tmp_path / "again")
    assert parameters.keys() == dict(base.named_parameters()).keys()
    for name, about in parameters.items():
        own = {key.removeprefix(f"{name}:"): t for key, t in tensors.items() if key.startswith(f"{name}:")}
        values = own.pop("values").reshape(-1)
        places = entries(about, own)
        weight = base.get_parameter(name).detach().contiguous().numpy().reshape(-1).copy()
        assert about["shape"] == list(base.get_parameter(name).shape)
        count = min(weight.size, 32)
        probes = [i * weight.size // count for i in range(count)]
        others = [place for place in probes if place not in set(places.tolist())]
        seen = weight[places].tobytes() + weight[others].tobytes()
        assert hashlib.blake2b(seen, digest_size=16).hexdigest() == about["digest"], name
        weight[places] = values
        expected = tuned.get_parameter(name).detach().contiguous().numpy().reshape(-1)
        assert (weight.view(numpy.int32) == expected.view(numpy.int32)).all(), name
