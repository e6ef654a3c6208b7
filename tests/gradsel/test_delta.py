"""Deltas of models: made, applied and taken back to the bit, in every dtype and for every kind of mask."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradsel
from gradsel.delta.delta import Delta, load_delta, save_delta
from gradsel.delta.exporting import export
from gradsel.delta.parts import bits_of, same_bits
from gradsel.masks import Flat, Frozen, PerRow, Whole, WholeColumns, WholeRows
from gradsel.views import NeuronView
from tests.gradsel.test_attach import KINDS, check_consistent, data, random_selection, toy
from tests.gradsel.toy import Toy, cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def train(model, steps=2, seed=0, lr=0.05):
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=lr)
    model.eval()  # no dropout and no running statistics: two runs are the same
    for images, labels in data(count=steps + seed)[seed:]:
        optimizer.zero_grad()
        cross_entropy(model, (images.to(next(model.parameters()).dtype), labels)).backward()
        optimizer.step()
    return model


def trained(kind="per-row", dtype=torch.float32, seed=0):
    """A base, the selection, and an attached model that has been trained on it."""
    base, selection = toy(kind, dtype)
    base.eval()
    model = copy.deepcopy(base)
    gradsel.attach(model, selection)
    return base, selection, train(model, seed=seed)


def frozen_copy(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, state):
    found = model.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert same_bits(found[name], tensor), name


def plain(model):
    return gradsel.detach(copy.deepcopy(model))


# --- Out of a model and into another -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_applied_and_reverted_to_the_bit(kind, dtype, tmp_path):
    base, selection, model = trained(kind, dtype)
    before = frozen_copy(base)
    made = save_delta(model, tmp_path / "d")
    loaded = Delta.load(tmp_path / "d")
    assert loaded == made
    assert loaded.trained_count() == selection.trainable_count()
    for module in model.modules():
        for short, selected in vars(module).get("_gradsel_selected", {}).items():
            assert same_bits(loaded[selected.name].values, module._parameters[short + "_values"].detach())
    handle = load_delta(base, tmp_path / "d")
    assert_same(base, plain(model).state_dict())
    handle.revert_()
    assert_same(base, before)
    with loaded.applied(base):
        assert_same(base, plain(model).state_dict())
    assert_same(base, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_may_be_saved_narrower_and_are_rounded_once(dtype, tmp_path):
    base, _, model = trained()
    exact, rounded = save_delta(model, tmp_path / "exact"), save_delta(model, tmp_path / "rounded", dtype=dtype)
    loaded = Delta.load(tmp_path / "rounded")
    loaded.apply_(base)
    for name, part in exact.items():
        assert loaded[name].values.dtype is dtype
        assert same_bits(part.mask.gather(base.get_parameter(name).detach()), part.values.to(dtype).float()), name
    assert rounded == loaded
    assert (exact == loaded) == (dtype is torch.float32)


class Odd(nn.Module):
    """Weights whose rows are not the first dimension, and other memory formats."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 8))
        self.b = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
        self.c = nn.Parameter(torch.randn(8, 6).t())
        self.d = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
        self.e = nn.Parameter(torch.randn(9, 9))


def odd_selection():
    def cols(rows, n, k=2):
        return torch.rand(rows, n).topk(k, 1).indices.sort(1).values.to(torch.int32)

    return gradsel.Selection(
        {
            "a": PerRow(cols(8, 6), (6, 8), NeuronView((1,))),
            "b": PerRow(cols(8, 18), (8, 4, 3, 3), NeuronView((0, 2), groups=2)),
            "c": Flat(torch.tensor([0, 5, 40]), (6, 8)),
            "d": Whole((4, 3, 3, 3)),
            "e": WholeColumns(torch.tensor([0, 7], dtype=torch.int32), (9, 9), NeuronView((1,))),
        }
    )


def test_any_view_and_memory_format(tmp_path):
    torch.manual_seed(0)
    base, selection = Odd(), odd_selection()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            selection[name].scatter_(parameter, selection[name].gather(parameter) + 1)
    made = save_delta(tuned, tmp_path / "d", selection=selection, base=base)
    loaded = Delta.load(tmp_path / "d")
    assert made == loaded
    assert loaded == Delta.of(tuned, selection=selection, base={n: p.contiguous() for n, p in base.named_parameters()})
    before = frozen_copy(base)
    strides = [p.stride() for p in base.parameters()]
    for model in (base, copy.deepcopy(base)):
        with loaded.applied(model):
            assert_same(model, tuned.state_dict())
        assert_same(model, before)
        assert [p.stride() for p in model.parameters()] == strides
    gradsel.attach(base, selection)
    with torch.no_grad():
        for p in gradsel.trainable_parameters(base):
            p.add_(1)
    gradsel.sync(base)
    assert Delta.of(base) == made
    assert [part.digest for part in Delta.of(base).values()] == [part.digest for part in made.values()]
    assert [part.fingerprint for part in Delta.of(base).values()] == [part.fingerprint for part in made.values()]


def test_a_plain_model_with_its_selection_and_base():
    base, selection, model = trained()
    attached, tuned = Delta.of(model), plain(model)
    by_both = Delta.of(tuned, selection=selection, base=base)
    by_state = Delta.of(tuned, selection=selection, base=base.state_dict())
    assert attached == by_both == by_state
    for name, part in attached.items():
        for other in (by_both[name], by_state[name]):
            assert (other.digest, other.fingerprint) == (part.digest, part.fingerprint), name
            assert same_bits(other.originals, part.originals)
    by_base = Delta.of(tuned, base=base)  # only what has moved
    assert 0 < by_base.trained_count() <= attached.trained_count()
    with by_base.applied(base):
        assert_same(base, tuned.state_dict())
    with pytest.raises(ValueError, match="pass the selection that it was trained with, or its base, or both"):
        Delta.of(tuned)
    with torch.no_grad():
        tuned.pos_embed[0, 0, 0] += 1
    with pytest.raises(ValueError, match="1 entries of pos_embed differ from the base and are not selected"):
        Delta.of(tuned, selection=selection, base=base)
    with pytest.raises(ValueError, match=r"head.weight is 4x12 in the model, 7x12 in the base; .* new heads included"):
        Delta.of(plain(model), selection=selection, base={**base.state_dict(), "head.weight": torch.zeros(7, 12)})
    with pytest.raises(ValueError, match="pos_embed is 1x5x12 in the model, missing in the base"):
        Delta.of(tuned, selection=selection, base={n: base.get_parameter(n) for n in ("cls_token",)})
    with pytest.raises(ValueError, match="the base is attached"):
        Delta.of(tuned, base=model)


def test_a_selection_alone_recognises_the_base_by_its_fingerprints():
    base, _ = toy()
    selection = gradsel.select(base, None, None, gradsel.PerNeuron(1), "random", progress=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            selection[name].scatter_(parameter, selection[name].gather(parameter) + 1)
    delta = Delta.of(tuned, selection=selection)
    assert not any(part.digest for part in delta.values())
    assert delta.notes == selection.notes
    with delta.applied(base):
        assert_same(base, tuned.state_dict())
    with pytest.raises(ValueError, match=r"are not those that the delta was made on, first patch_embed.weight"):
        delta.apply_(tuned)
    unknown = Delta.of(tuned, selection=gradsel.Selection(selection))
    with pytest.raises(ValueError, match=r"does not know the base of patch_embed.weight, as it was made without"):
        unknown.apply_(base)
    with pytest.raises(ValueError, match="does not know the base"):
        unknown.check(base)
    unknown.apply_(base, force=True)
    assert_same(base, tuned.state_dict())


def test_the_selection_saves_computing_fingerprints_of_an_attached_model():
    base, _ = toy()
    selection = gradsel.select(base, None, None, gradsel.PerNeuron(1), "random", freeze=["unused.*"], progress=False)
    gradsel.attach(base, selection)
    train(base)
    with_it, without = Delta.of(base, selection=selection), Delta.of(base)
    assert [part.fingerprint for part in with_it.values()] == [part.fingerprint for part in without.values()]
    assert with_it.notes["policy"] == selection.notes["policy"]
    assert Delta.of(base, selection=selection, notes={"task": "toys"}).notes["task"] == "toys"
    with pytest.raises(ValueError, match="is not attached as this selection says"):
        Delta.of(base, selection=random_selection(base_of(base)))


def base_of(attached):
    return gradsel.detach(copy.deepcopy(attached), restore=True)


def test_running_statistics_go_along_if_the_base_is_given():
    base, selection = toy()
    model = copy.deepcopy(base)
    gradsel.attach(model, selection)
    train(model).train()
    model(data()[0][0])
    delta = Delta.of(model, base=base)
    assert {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"} <= delta.keys()
    before = frozen_copy(base)
    with delta.applied(base):
        assert_same(base, plain(model).state_dict())
    assert_same(base, before)
    again = copy.deepcopy(base)
    gradsel.attach(again, selection)
    load_delta(again, delta)
    assert_same(plain(again), plain(model).state_dict())


# --- The base ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["selected", "whole", "probe", "elsewhere"])
def test_a_modified_base_is_refused_by_name(where):
    base, selection, model = trained()
    delta = Delta.of(model)
    name = "head.bias" if where == "whole" else "blocks.0.fc1.weight"
    weight = base.get_parameter(name)
    entries = delta[name].mask.entries()
    probes = torch.arange(32) * weight.numel() // 32
    taken = set(entries.tolist())
    place = {
        "selected": int(entries[3]),
        "whole": 1,
        "probe": next((p for p in probes.tolist() if p not in taken), -1),
        "elsewhere": next((p for p in range(weight.numel()) if p not in taken and p not in probes.tolist()), -1),
    }[where]
    with torch.no_grad():
        bits_of(weight).view(-1)[place] ^= 1  # the last bit of one entry
    state = frozen_copy(base)
    message = f"1 of {len(delta)} tensors are not those that the delta was made on, first {name}"
    with pytest.raises(ValueError, match=message):
        delta.check(base)
    if where == "elsewhere":  # as documented: applying looks at few of the entries that stay
        delta.apply_(base).revert_()
    else:
        with pytest.raises(ValueError, match=message):
            delta.apply_(base)
        assert_same(base, state)
        with delta.applied(base, force=True):
            assert_same(base, {**plain(model).state_dict(), name: base.state_dict()[name]})
    assert_same(base, state)
    gradsel.attach(base, selection)
    if where != "elsewhere":
        with pytest.raises(ValueError, match=message):
            load_delta(base, delta)
        load_delta(base, delta, force=True)
        check_consistent(base)
        gradsel.detach(base, restore=True)
        assert_same(base, state)


def test_other_models_are_refused_and_stay_as_they_are():
    base, _, model = trained()
    delta = Delta.of(model)
    other = Toy(classes=7)
    state = frozen_copy(other)
    with pytest.raises(ValueError, match=r"head.weight is 4x12 in the delta, 7x12 in the model; .* number of classes"):
        delta.apply_(other)
    with pytest.raises(ValueError, match=r"the model has no 'patch_embed.weight', which the delta sets"):
        delta.apply_(nn.Linear(2, 2))
    assert_same(other, state)
    half = copy.deepcopy(base).bfloat16()
    with pytest.raises(ValueError, match=r"is torch.bfloat16, the delta was made on torch.float32"):
        delta.apply_(half)
    state = frozen_copy(half)
    with delta.applied(half, force=True):
        assert_same(half, {**state, **{n: t.bfloat16() for n, t in plain(model).state_dict().items() if n in delta}})
    assert_same(half, state)
    with pytest.raises(ValueError, match=r"the model is attached: use load_delta"):
        delta.apply_(model)


def test_values_that_the_weight_cannot_hold():
    base, selection = toy(dtype=torch.float16)
    model = copy.deepcopy(base)
    gradsel.attach(model, selection)
    with torch.no_grad():
        model.blocks[0].fc1.weight_values[0, 0] = 1e6
    delta = Delta.of(model)
    with pytest.raises(
        ValueError, match=r"in torch.float16, blocks.0.fc1.weight has 1 values that are NaN or infinite"
    ):
        delta.apply_(base)
    delta.apply_(base, force=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_needs_force_on_every_way(bad, tmp_path):
    base, _, model = trained()
    with torch.no_grad():
        model.head.bias[2] = bad
    with pytest.raises(ValueError, match=r"head.bias has 1 values that are NaN or infinite; pass force=True"):
        save_delta(model, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    made = Delta.of(model)
    made.save(tmp_path / "d", force=True)
    with pytest.raises(ValueError, match=r"head.bias has 1 values that are NaN or infinite"):
        load_delta(base, tmp_path / "d")
    loaded = Delta.load(tmp_path / "d", force=True)
    assert loaded == made  # by their bits
    loaded.apply_(base)
    assert_same(base, plain(model).state_dict())


# --- Applied on top of each other --------------------------------------------------------------------------------


def two():
    base, _, model = trained()
    other = copy.deepcopy(base)
    gradsel.attach(other, random_selection(base, k=3, freeze=["*"], rank=["blocks.*.qkv.weight"]))
    return base, Delta.of(model), Delta.of(train(other))


def test_nested_deltas_of_separate_entries_revert_in_any_order():
    base, selection = toy()
    parts = []
    for name in ("blocks.0.fc1.weight", "blocks.1.fc1.weight"):
        tuned = copy.deepcopy(base)
        own = {n: m if n == name else Frozen(m.shape) for n, m in selection.items()}
        gradsel.attach(tuned, gradsel.Selection(own))
        parts.append(Delta.of(train(tuned)))
    before = frozen_copy(base)
    first, second = parts[0].apply_(base), parts[1].apply_(base)
    first.revert_()
    second.revert_()
    assert_same(base, before)
    with parts[0].applied(base), parts[1].applied(base):
        assert_same(base, {**before, **{k: base.state_dict()[k] for part in parts for k in part}})
    assert_same(base, before)


def test_out_of_order_is_refused():
    base, a, b = two()
    before = frozen_copy(base)
    first = a.apply_(base)
    between = frozen_copy(base)
    with pytest.raises(ValueError, match="tensors are not those that the delta was made on"):
        a.apply_(base)  # its own entries are modified
    second = b.apply_(base, force=True)
    both = frozen_copy(base)
    with pytest.raises(RuntimeError, match=r"Applied\(.*\) has been applied on top of Applied\(.*\); revert that first|"
                                           r"has been applied on top of .*, to the same tensors"):  # fmt: skip
        first.revert_()
    assert_same(base, both)
    second.revert_()
    assert_same(base, between)
    first.revert_()
    assert_same(base, before)
    with pytest.raises(RuntimeError, match="was reverted already"):
        first.revert_()


def test_a_forgotten_handle_is_in_nobodys_way():
    base, a, b = two()
    first = a.apply_(base)
    b.apply_(base, force=True)  # nobody keeps what takes it back
    with pytest.raises(RuntimeError, match="have changed since the delta was applied"):
        first.revert_()
    first.revert_(force=True)


def test_changes_after_applying_are_noticed():
    base, a, _ = two()
    handle = a.apply_(base)
    with torch.no_grad():
        base.head.bias[0] += 1
    state = frozen_copy(base)
    with pytest.raises(RuntimeError, match=r"1 tensors have changed since the delta was applied, first head.bias"):
        handle.revert_()
    assert_same(base, state)
    base.bfloat16()
    with pytest.raises(RuntimeError, match="was moved, cast or replaced"):
        handle.revert_(force=True)


def test_autograd_notices_weights_written_in_between():
    base, a, _ = two()
    loss = cross_entropy(base, data()[0])
    a.apply_(base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_exception_inside_reverts_too():
    base, a, _ = two()
    before = frozen_copy(base)
    with pytest.raises(KeyError), a.applied(base):
        raise KeyError
    assert_same(base, before)


def test_a_wrapped_model_is_written_by_its_own_names():
    base, a, _ = two()
    before = frozen_copy(base)
    wrapped = torch.compile(base, backend="eager")
    with a.applied(wrapped):
        assert not same_bits(base.head.bias, before["head.bias"])
    assert_same(base, before)


# --- Attached models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_loaded_delta(kind, dtype, tmp_path):
    base, _, model = trained(kind, dtype)
    before = frozen_copy(base)
    save_delta(model, tmp_path / "d")
    delta = Delta.load(tmp_path / "d")
    again = copy.deepcopy(base)
    gradsel.attach(again, delta.selection(again))
    assert load_delta(again, tmp_path / "d") is None
    check_consistent(again)
    assert_same(again, model.state_dict())
    assert Delta.of(again) == delta
    assert [part.digest for part in Delta.of(again).values()] == [part.digest for part in delta.values()]
    train(model, seed=1)
    train(again, seed=1)
    assert_same(again, model.state_dict())
    assert_same(gradsel.detach(again, restore=True), before)


def test_other_entries_are_refused_and_a_way_out_is_named():
    base, _, model = trained()
    delta = Delta.of(model)
    other = copy.deepcopy(base)
    gradsel.attach(other, random_selection(base, k=1, freeze=["unused.*"]))
    state = frozen_copy(other)
    with pytest.raises(ValueError, match=r"entries than the delta's, first of patch_embed.weight: gradsel.detach"):
        load_delta(other, delta)
    assert_same(other, state)
    gradsel.detach(other, restore=True)
    gradsel.attach(other, delta.selection(other))
    load_delta(other, delta)
    assert_same(plain(other), plain(model).state_dict())


def test_a_delta_made_with_a_selection_alone_loads_into_an_attached_model():
    base, _ = toy()
    selection = gradsel.select(base, None, None, gradsel.PerNeuron(1), "random", freeze=["unused.*"], progress=False)
    attached = copy.deepcopy(base)
    gradsel.attach(attached, selection)
    delta = Delta.of(plain(train(attached)), selection=selection)
    fresh = copy.deepcopy(base)
    gradsel.attach(fresh, selection)
    load_delta(fresh, delta)
    assert_same(plain(fresh), plain(attached).state_dict())


def test_two_attached_parts_have_no_one_delta():
    one, selection = toy()
    other = copy.deepcopy(one)
    gradsel.attach(one, selection)
    gradsel.attach(other, selection)
    with pytest.raises(ValueError, match="2 modules of the model are attached, each on its own"):
        Delta.of(nn.ModuleList([one, other]))
    assert Delta.of(nn.Sequential(one)).keys() == Delta.of(one).keys()


# --- Two deltas --------------------------------------------------------------------------------------------------


def delta_of(**tensors):
    """A delta of 2x4 zeros: the entries that are named, and their values."""
    base, tuned = nn.Module(), nn.Module()
    masks = {}
    for name, entries in tensors.items():
        base.register_parameter(name, nn.Parameter(torch.zeros(2, 4)))
        tuned.register_parameter(name, nn.Parameter(torch.zeros(2, 4)))
        masks[name] = Flat(torch.tensor(sorted(entries)), (2, 4))
        for entry, value in entries.items():
            tuned.get_parameter(name).data.view(-1)[entry] = value
    return Delta.of(tuned, selection=gradsel.Selection(masks), base=base), base


def test_combining():
    (a, base), (b, _) = delta_of(x={0: 1.0, 5: 2.0}), delta_of(x={5: 2.0, 7: 3.0})
    both = a | b
    assert both.trained_count() == 3
    with both.applied(base):
        assert base.x.view(-1).tolist() == [1, 0, 0, 0, 0, 2, 0, 3]
    assert (a | a) == a
    assert (a | a)["x"].digest == a["x"].digest
    assert a.overlap(b).shared == 1
    clash, _ = delta_of(x={5: 9.0, 7: 3.0})
    with pytest.raises(ValueError, match=r"both set 1 of the same entries of x, to other values; say which wins"):
        a | clash
    for wins, value in (("self", 2.0), ("other", 9.0)):
        with a.merged(clash, wins=wins).applied(base):
            assert base.x.view(-1).tolist() == [1, 0, 0, 0, 0, value, 0, 3]
    counted = a.difference(clash)
    assert (counted.a, counted.b, counted.shared, counted.differing) == (2, 2, 1, 1)
    assert "differing" in str(counted)
    with pytest.raises(ValueError, match="wins is 'both'"):
        a.merged(b, wins="both")
    with pytest.raises(TypeError):
        a | 3


def test_combining_rows_that_are_not_the_first_dimension():
    """The union is again so many entries a row, whose order is not that of the tensor."""
    base = nn.Module()
    base.x = nn.Parameter(torch.zeros(3, 5))
    deltas = []
    for column in (0, 2):
        mask = PerRow(torch.full((5, 1), column, dtype=torch.int32), (3, 5), NeuronView((1,)))
        tuned = copy.deepcopy(base)
        tuned.x.data[column] = torch.arange(5) + 10.0 * column
        deltas.append(Delta.of(tuned, selection=gradsel.Selection({"x": mask}), base=base))
    both = deltas[0] | deltas[1]
    assert both["x"].mask.kind == "per-row"
    assert both["x"].mask.view == NeuronView((1,))
    with both.applied(base):
        assert base.x.tolist() == [[0, 1, 2, 3, 4], [0] * 5, [20, 21, 22, 23, 24]]


def test_combining_other_tensors_and_kinds():
    base, selection, model = trained()
    tuned = plain(model)
    all_of_it = Delta.of(tuned, selection=selection, base=base)
    head = Delta({name: part for name, part in all_of_it.items() if name.startswith("head")})
    rest = Delta({name: part for name, part in all_of_it.items() if not name.startswith("head")})
    assert (head | rest) == all_of_it
    odd, odd_base = Odd(), odd_selection()
    with torch.no_grad():
        changed = copy.deepcopy(odd)
        for p in changed.parameters():
            p.add_(torch.randn_like(p))
        kept = copy.deepcopy(odd)
        other = odd_selection()  # other columns
        for name, parameter in kept.named_parameters():
            for mask in (odd_base[name], other[name]):
                mask.scatter_(parameter, mask.gather(dict(changed.named_parameters())[name]))
    known = dict(odd.named_parameters())

    def taken(selection):
        tuned = copy.deepcopy(odd)
        for name, parameter in tuned.named_parameters():
            selection[name].scatter_(parameter.data, selection[name].gather(changed.get_parameter(name).data))
        return Delta.of(tuned, selection=selection, base=known)

    merged = taken(odd_base) | taken(other)
    with merged.applied(odd):
        assert_same(odd, kept.state_dict())


def test_deltas_of_other_bases_do_not_combine():
    a, _ = delta_of(x={0: 1.0})
    other = nn.Module()
    other.x = nn.Parameter(torch.ones(2, 4))
    tuned = copy.deepcopy(other)
    tuned.x.data[1, 1] = 4
    with pytest.raises(ValueError, match="the deltas were made on bases whose x differ"):
        a | Delta.of(tuned, base=other)
    tall = nn.Module()
    tall.x = nn.Parameter(torch.zeros(4, 4))
    for operation in (a.overlap, a.difference, a.merged):
        with pytest.raises(ValueError, match="x is 2x4 in one delta, 4x4 in the other"):
            operation(Delta.of(tall, selection=gradsel.Selection({"x": Whole((4, 4))})))


def test_equality_is_that_of_bits():
    a, _ = delta_of(x={0: 1.0})
    assert a != delta_of(x={0: 2.0})[0]
    assert a != delta_of(x={1: 1.0})[0]
    assert a != delta_of(y={0: 1.0})[0]
    assert delta_of(x={0: 0.0})[0] != delta_of(x={0: -0.0})[0]
    assert a != 3


def test_tables():
    _, selection, model = trained("rows")
    text = str(Delta.of(model, notes={"task": "toys"}))
    assert "blocks.*.qkv.weight  x2" in text
    assert f"{selection.trainable_count():,} entries" in text
    assert "task: toys" in text
    assert WholeRows.kind in text
    assert repr(Delta.of(model)).startswith(f"Delta({selection.trainable_count():,} entries of ")


# --- Full checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_loads_without_this_library(kind, tmp_path):
    from safetensors.torch import load_file

    base, _, model = trained(kind, torch.bfloat16)
    export(model, tmp_path / "full.safetensors")
    state = load_file(tmp_path / "full.safetensors")
    assert state.keys() == base.state_dict().keys()
    base.load_state_dict(state)
    assert_same(base, plain(model).state_dict())
    export(base, tmp_path / "plain.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "full.safetensors").read_bytes()


def test_tied_weights_are_exported_under_each_name(tmp_path):
    from safetensors.torch import load_file

    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    gradsel.attach(model, random_selection(model))
    export(torch.compile(model, backend="eager"), tmp_path / "f")
    assert load_file(tmp_path / "f").keys() == {"0.weight", "1.weight"}


def test_a_base_given_for_an_attached_model_is_compared():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradsel.attach(model, gradsel.select(model, None, None, criterion="random", freeze=["1.bias"]))
    with torch.no_grad():
        model[0].weight_values.add_(1)
    gradsel.sync(model)
    assert set(Delta.of(model, base=base)) == {"0.weight", "0.bias", "1.weight"}
    with pytest.raises(ValueError, match=r"0\.weight was not this at attach\(\)"):
        Delta.of(model, base={name: tensor + 1 for name, tensor in base.items()})
    with torch.no_grad():
        model[1].bias.add_(1)
    with pytest.raises(ValueError, match=r"1\.bias was not this at attach\(\), or was changed outside the selection"):
        Delta.of(model, base=base)
