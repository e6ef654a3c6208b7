"""Task banks: any sequence of switches is exact, compiled code stays valid, and only the tasks' entries are written."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import gradsel
from gradsel.delta.bank import TaskBank
from gradsel.delta.delta import Delta
from gradsel.delta.parts import Part, same_bits
from gradsel.masks import Whole
from tests.support.deltas import assert_same, frozen_copy, plain, train
from tests.support.selections import data, random_selection
from tests.support.toy import Toy

KINDS = ["per-row", "rows", "columns", "irregular", "whole"]


def tasks(dtype=torch.float32):
    """A base, a delta for each kind of mask, and the state of the model with it."""
    torch.manual_seed(0)
    base = Toy().to(dtype).eval()
    deltas, states = {}, {None: frozen_copy(base)}
    for number, kind in enumerate(KINDS):
        model = copy.deepcopy(base)
        gradsel.attach(model, random_selection(model, kind, k=number + 1, freeze=["unused.*"]))
        train(model, steps=1, seed=number)
        deltas[kind], states[kind] = Delta.of(model), frozen_copy(plain(model))
    return base, deltas, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_thousand_random_switches(dtype, tmp_path):
    base, deltas, states = tasks(dtype)
    identities = [(id(p), p.data_ptr()) for p in base.parameters()]
    bank = TaskBank(base)
    random.seed(0)
    for name, delta in deltas.items():
        delta.save(tmp_path / name)
        bank.add(name, tmp_path / name)
        bank.activate(random.choice([None, *bank]))  # the rest are added while a task is active
    assert bank.names == tuple(KINDS) == tuple(bank)
    assert len(bank) == 5
    assert "rows" in bank
    for _ in range(1000):
        name = random.choice([None, *KINDS])
        bank.activate(name)
        assert bank.active == name
        parameter = random.choice(list(states[None]))
        assert same_bits(base.state_dict()[parameter], states[name][parameter]), (name, parameter)
    for name in [*KINDS, None]:
        bank.activate(name)
        assert_same(base, states[name])
    assert [(id(p), p.data_ptr()) for p in base.parameters()] == identities


def test_only_entries_of_the_two_tasks_are_written():
    base, deltas, _ = tasks()
    bank = TaskBank(base)
    for name in ("per-row", "irregular"):
        bank.add(name, deltas[name])
    touched = {name for task in bank for name in bank[task]}
    versions = {name: p._version for name, p in base.named_parameters()}
    for name in ("per-row", "irregular", None):
        bank.activate(name)
    moved = {name for name, p in base.named_parameters() if p._version != versions[name]}
    assert moved == touched
    # Where both set the same entries of a tensor, the second task's values take the place of the first one's at once.
    versions = {name: p._version for name, p in base.named_parameters()}
    bank.activate("per-row")
    bank.activate("irregular")
    assert base.head.bias._version == versions["head.bias"] + 2
    assert base.blocks[0].fc1.weight._version == versions["blocks.0.fc1.weight"] + 3
    versions = {name: p._version for name, p in base.named_parameters()}
    bank.activate("irregular")  # is active already
    assert {name: p._version for name, p in base.named_parameters()} == versions


def test_compiled_models_are_not_compiled_again():
    base, deltas, states = tasks()
    fresh = copy.deepcopy(base)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    counted = torch.compile(base, fullgraph=True, backend=backend)
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    bank = TaskBank(counted)
    for name, delta in deltas.items():
        bank.add(name, delta)
    x = data()[0][0]
    with torch.no_grad():
        for name in ["rows", None, "per-row", "whole", "irregular", None, "columns"]:
            bank.activate(name)
            fresh.load_state_dict(states[name])
            assert torch.equal(counted(x), fresh(x))
            assert torch.equal(compiled(x), fresh(x))
    assert len(graphs) == 1


def test_a_task_that_does_not_fit_is_named():
    base, deltas, _ = tasks()
    bank = TaskBank(base)
    bank.add("rows", deltas["rows"])
    wide = Toy(classes=9)
    gradsel.attach(wide, random_selection(wide, freeze=["unused.*"]))
    bank.activate("rows")
    state = frozen_copy(base)
    with pytest.raises(ValueError, match=r"head\.weight .*for 9 classes .*for 4 .*bias"):
        bank.add("wide", Delta({n: p for n, p in Delta.of(wide).items() if n == "head.weight"}))
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1\.weight .*24x13 .*24x12"):
        bank.add("wide", Delta({"blocks.0.fc1.weight": Part(Whole((24, 13)), torch.zeros(24, 13), torch.float32)}))
    other = Toy()
    gradsel.attach(other, random_selection(other, freeze=["unused.*"]))
    with pytest.raises(ValueError, match=r"of \d+ tensors"):
        bank.add("other", Delta.of(other))
    with pytest.raises(ValueError, match="task 'rows'"):
        bank.add("rows", deltas["columns"])
    with pytest.raises(KeyError, match=r"task 'wide'.*rows"):
        bank.activate("wide")
    with pytest.raises(KeyError, match="task 'wide'"):
        bank.remove("wide")
    assert bank.active == "rows"
    assert bank.names == ("rows",)
    assert_same(base, state)


def test_removing():
    base, deltas, states = tasks()
    bank = TaskBank(base)
    for name in ("rows", "columns"):
        bank.add(name, deltas[name])
    bank.activate("rows")
    bank.remove("columns")
    assert_same(base, states["rows"])
    bank.remove("rows")
    assert_same(base, states[None])
    assert (bank.active, len(bank)) == (None, 0)


def test_a_name_may_be_used_again_for_other_entries():
    base, deltas, states = tasks()
    bank = TaskBank(base)
    for name, kind in (("a", "rows"), ("b", "rows"), ("b", "irregular")):
        if name in bank:
            bank.remove(name)
        bank.add(name, deltas[kind])
        for task, expected in (("a", "rows"), (name, kind), (None, None)):
            bank.activate(task)
            assert_same(base, states[expected])


def test_a_delta_on_top_must_go_first():
    base, deltas, states = tasks()
    bank = TaskBank(base)
    bank.add("rows", deltas["rows"])
    bank.activate("rows")
    with pytest.raises(ValueError, match="modified"):
        deltas["columns"].apply_(base)
    handle = deltas["columns"].apply_(base, force=True)
    state = frozen_copy(base)
    with pytest.raises(RuntimeError, match=r"Applied\(.*\) .*same tensors.*revert"):
        bank.activate(None)
    assert_same(base, state)
    handle.revert_()
    bank.activate(None)
    assert_same(base, states[None])


def test_moved_and_attached_models_are_refused():
    base, deltas, _ = tasks()
    bank = TaskBank(base)
    bank.add("rows", deltas["rows"])
    base.double()
    with pytest.raises(RuntimeError, match="moved"):
        bank.activate("rows")
    model = nn.Linear(3, 3)
    gradsel.attach(model, random_selection(model))
    with pytest.raises(ValueError, match="attached"):
        TaskBank(model).add("a", Delta.of(model))


def test_overlap():
    base, deltas, _ = tasks()
    bank = TaskBank(base)
    for name in ("per-row", "rows", "columns"):
        bank.add(name, deltas[name])
    found = bank.overlap()
    assert list(found) == [("per-row", "rows"), ("per-row", "columns"), ("rows", "columns")]
    assert len(found) == 3
    expected = deltas["per-row"].overlap(deltas["columns"])
    assert found["per-row", "columns"] == found["columns", "per-row"] == expected
    assert 0 < expected.shared < bank.overlap(whole=True)["per-row", "columns"].shared
    assert f"{expected.shared:,}" in str(found)


def test_nothing_is_written_over_another_bank_or_under_a_delta():
    base, deltas, states = tasks()
    first, second = TaskBank(base), TaskBank(base)
    first.add("rows", deltas["rows"])
    second.add("per-row", deltas["per-row"])
    first.activate("rows")
    with pytest.raises(RuntimeError, match="same tensors"):
        second.activate("per-row")
    assert_same(base, states["rows"])
    first.activate(None)
    handle = deltas["rows"].apply_(base)
    with pytest.raises(RuntimeError, match="same tensors"):
        second.activate("per-row")
    handle.revert_()
    second.activate("per-row")
    assert_same(base, states["per-row"])


@pytest.mark.parametrize("change", ["assign", "module", "attach"])
def test_a_model_with_other_tensors_is_refused(change):
    base, deltas, _ = tasks()
    bank = TaskBank(base)
    bank.add("rows", deltas["rows"])
    handle = deltas["rows"].apply_(base)
    if change == "assign":
        base.load_state_dict({key: tensor.clone() for key, tensor in base.state_dict().items()}, assign=True)
    elif change == "module":
        base.head = nn.Linear(12, 4)
    else:
        gradsel.attach(base, random_selection(base, "rows", k=1))
    before = frozen_copy(base)
    for write in (handle.revert_, lambda: bank.activate("rows")):
        with pytest.raises(RuntimeError, match=r"moved|attached"):
            write()
    assert handle.active
    assert bank.active is None
    assert_same(base, before)


def test_a_write_that_fails_leaves_the_base(monkeypatch):
    base, deltas, states = tasks()
    bank = TaskBank(base)
    for name in ("rows", "per-row"):
        bank.add(name, deltas[name])
    bank.activate("rows")
    for module in ("bank", "applying"):
        real, calls = getattr(gradsel.delta, module).write_, []

        def failing(*args, real=real, calls=calls):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(f"gradsel.delta.{module}.write_", failing)
            with pytest.raises(KeyboardInterrupt):
                bank.activate("per-row") if module == "bank" else deltas["rows"].apply_(base)
        assert_same(base, states[None])
        assert bank.active is None
    bank.activate("per-row")
    assert_same(base, states["per-row"])
