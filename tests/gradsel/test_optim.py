"""MaskedAdam as a drop-in optimizer: equal to Adam where it should be, silent where it should be."""

from __future__ import annotations

import collections
import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

import gradsel
import gradsel_kernels as gk
from gradsel.masks import Flat, Frozen, PerRow, Whole, WholeColumns, WholeRows, from_parts
from gradsel.optim.state import fingerprint
from gradsel.views import NeuronView
from tests.gradsel.toy import Toy, batches, cross_entropy
from tests.kernels.cases import same_bits

ADAM_OPTIONS = [
    {},
    {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-4},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"amsgrad": True, "maximize": True},
]

ANCHORS = [
    {"anchor": 0.125, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"anchor": 0.1, "anchor_norm": 1, "maximize": True},
    {"anchor": 10.0, "anchor_decoupled": True, "amsgrad": True},
    {"anchor": 1.0, "anchor_decoupled": True, "anchor_norm": 1, "weight_decay": 0.1},
]
#: Takes every entry with a gradient of zero back to its original, in one step.
RETURN = {"anchor": 1e9, "anchor_decoupled": True, "anchor_norm": 1, "betas": (0.0, 0.999)}


def selection_for(model, k=1):
    return gradsel.select(copy.deepcopy(model).eval(), batches(), cross_entropy, gradsel.PerNeuron(k))


def frozen_bits(model, selection):
    return {name: p.detach()[~selection[name].to_dense()].clone() for name, p in model.named_parameters()}


def assert_frozen(model, selection, bits):
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.detach()[~selection[name].to_dense()], bits[name]), name


def train(model, optimizer, steps=4, scheduler=None):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model, batches()[step % 3])
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=["reference", "native"])
def backend(request):
    with gk.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_without_masks_it_is_adam(options, dtype):
    model = Toy().to(dtype).eval()
    twin = copy.deepcopy(model)
    ours = gradsel.MaskedAdam(model.parameters(), **options)
    theirs = torch.optim.Adam(twin.parameters(), foreach=False, fused=False, **options)
    with gk.use_backend("reference"):
        for batch in [(x.to(dtype), y) for x, y in batches(6)]:
            for net, optimizer in ((model, ours), (twin, theirs)):
                optimizer.zero_grad()
                cross_entropy(net, batch).backward()
                optimizer.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_with_masks_it_is_adam_on_the_selected_entries(backend, options):
    """The twin trains dense copies of the selected entries with torch's Adam, from the same gradients."""
    model = Toy().eval()
    selection = selection_for(model, k=2)
    masks = {name: selection[name].to_dense() for name, _ in model.named_parameters()}
    bits = frozen_bits(model, selection)
    twins = {name: nn.Parameter(p.detach()[masks[name]].clone()) for name, p in model.named_parameters()}
    ours = gradsel.MaskedAdam(model.named_parameters(), masks=selection, **options)
    theirs = torch.optim.Adam(twins.values(), foreach=False, fused=False, **options)
    for batch in batches(8):
        ours.zero_grad()
        cross_entropy(model, batch).backward()
        for name, p in model.named_parameters():
            twins[name].grad = None if p.grad is None else p.grad[masks[name]].clone()
        ours.step()
        theirs.step()
        for name, p in model.named_parameters():
            got = p.detach()[masks[name]]
            if backend == "reference":
                assert torch.equal(got, twins[name]), name
            else:
                torch.testing.assert_close(got, twins[name].detach(), rtol=1e-6, atol=1e-7)
            twins[name].data.copy_(got)  # the next gradients come from the same weights
    assert_frozen(model, selection, bits)


@pytest.mark.parametrize("options", [{"anchor": 0.125}, {"anchor": 0.1, "anchor_norm": 1}], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_with_an_anchor_it_is_adam_on_the_regularised_loss(backend, options, maximize):
    """To the bit: products with a power of two and with a sign are exact, so autograd rounds once as we do."""
    model = Toy().eval()
    selection = selection_for(model, 2)
    masks = {name: mask.to_dense() for name, mask in selection.items()}
    ours = gradsel.MaskedAdam(model.named_parameters(), masks=selection, maximize=maximize, **options)
    originals = {name: p.detach()[masks[name]].clone() for name, p in model.named_parameters()}
    twins = {name: nn.Parameter(original.clone()) for name, original in originals.items()}
    theirs = torch.optim.Adam(twins.values(), maximize=maximize, foreach=False, fused=False)
    for batch in batches(8):
        ours.zero_grad()
        theirs.zero_grad()
        cross_entropy(model, batch).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                gap = twins[name] - originals[name]
                pull = options["anchor"] * (gap.abs() if "anchor_norm" in options else gap**2).sum()
                ((p.grad[masks[name]] * twins[name]).sum() + (-pull if maximize else pull)).backward()
        ours.step()
        theirs.step()
        for name, p in model.named_parameters():
            got = p.detach()[masks[name]]
            if backend == "reference":
                assert torch.equal(got, twins[name]), name
            else:
                torch.testing.assert_close(got, twins[name].detach(), rtol=1e-6, atol=1e-7)
            twins[name].data.copy_(got)


def return_to_originals(model, optimizer):
    for group in optimizer.param_groups:
        group.update(RETURN)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_originals_are_the_weights_of_the_first_step_with_an_anchor(backend, dtype):
    model, pretrained = Toy().to(dtype), Toy().to(dtype).state_dict()
    selection = gradsel.select(model, None, None, criterion="random")
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection, lr=0.01, anchor=0.1)
    model.load_state_dict(pretrained)  # after the optimizer was made
    data = [(x.to(dtype), y) for x, y in batches(4)]
    for batch in data:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    for p in optimizer.state:
        assert optimizer.state[p]["original"].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert not torch.equal(model.head.weight, pretrained["head.weight"])
    return_to_originals(model, optimizer)
    for name, p in model.named_parameters():
        assert not selection[name].nnz or same_bits(p.detach(), pretrained[name]), name


def test_an_anchor_that_comes_later_holds_the_weights_of_then():
    model = Toy()
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection_for(model), lr=0.01)
    train(model, optimizer, 2)
    assert all("original" not in state for state in optimizer.state.values())
    then = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0]["anchor"] = 0.1
    train(model, optimizer, 2)
    optimizer.param_groups[0]["anchor"] = 0.0
    train(model, optimizer, 2)
    return_to_originals(model, optimizer)
    for p, name in ((model.head.weight, "head.weight"), (model.head.bias, "head.bias")):
        assert same_bits(p.detach(), then[name])


@pytest.mark.parametrize("duplicate", [lambda x: x, copy.deepcopy], ids=["itself", "deepcopy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_attached_models_are_anchored_to_what_they_were_at_attach(backend, dtype, duplicate):
    """Also where the anchor comes later; and what detach() restores has not changed."""
    model = Toy().to(dtype).eval()
    selection = gradsel.select(model, None, None, criterion="random")
    pretrained = copy.deepcopy(model.state_dict())
    gradsel.attach(model, selection)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.01)
    wholes = [p for p in optimizer.param_groups[0]["params"] if gradsel.attached.owner_of(p) is None]

    def steps():
        for x, y in batches(3):
            optimizer.zero_grad()
            cross_entropy(model, (x.to(dtype), y)).backward()
            optimizer.step()

    steps()
    with torch.no_grad():
        for p in wholes:  # these are anchored to what they are at the first step with an anchor
            p.copy_(next(pretrained[name] for name, q in model.named_parameters() if q is p))
    for group in optimizer.param_groups:
        group.update(anchor=0.1, anchor_norm=1)
    steps()
    model, optimizer = duplicate((model, optimizer))
    steps()
    trained = {name for name, p in model.named_parameters() if name in pretrained and selection[name].nnz}
    own = model.state_dict()
    assert sum(not torch.equal(own[name], pretrained[name]) for name in trained) > len(trained) // 2
    return_to_originals(model, optimizer)
    for name, value in model.state_dict().items():
        assert name not in pretrained or same_bits(value, pretrained[name]), name
    gradsel.detach(model, restore=True)
    for name, value in model.state_dict().items():
        assert same_bits(value, pretrained[name]), name


def test_a_resumed_run_keeps_its_anchor_where_the_model_is_attached_as_trained(backend):
    plain, data = Toy().eval(), batches(6)
    selection = gradsel.select(plain, None, None, criterion="random")

    def attached(model):
        gradsel.attach(model, selection)
        return model, gradsel.MaskedAdam(gradsel.trainable_parameters(model), anchor=0.1)

    def steps(model, optimizer, part):
        for batch in part:
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()

    model, optimizer = attached(copy.deepcopy(plain))
    steps(model, optimizer, data[:3])
    trained = {name: p for name, p in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(trained)
    resumed, second = attached(plain)
    second.load_state_dict(optimizer.state_dict())
    steps(model, optimizer, data[3:])
    steps(resumed, second, data[3:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())


def test_the_stronger_the_anchor_the_nearer_the_weights_stay():
    """Parameter groups have anchors of their own: here none for heads and biases."""
    start = Toy().eval()
    selection = gradsel.select(start, None, None, criterion="random")

    def distance(anchor):
        model = copy.deepcopy(start)
        gradsel.attach(model, selection)
        parameters = gradsel.trainable_parameters(model)
        held = [p for p in parameters if gradsel.attached.owner_of(p) is not None]
        groups = [{"params": held, "anchor": anchor}, {"params": [p for p in parameters if p not in set(held)]}]
        optimizer = gradsel.MaskedAdamW(groups, lr=0.01, weight_decay=0.0, anchor_decoupled=True)
        train(model, optimizer, 20)
        kept = [p for p, state in optimizer.state.items() if "original" in state]
        assert set(kept) == ({p for p in held if p.grad is not None} if anchor else set())
        return sum((p - gradsel.attached.owner_of(p)[1].original).square().sum().item() for p in held)

    assert distance(0.0) > distance(5.0) > distance(40.0) > 0


def test_state_has_the_size_of_the_selection():
    model = Toy()
    selection = selection_for(model)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection)
    train(model, optimizer, 1)
    trained = sum(selection[n].nnz for n, p in model.named_parameters() if p.grad is not None)
    steps = len(optimizer.state)
    assert gradsel.state_bytes(optimizer) == 8 * trained + 4 * steps
    assert all(selection[n].nnz for n, p in model.named_parameters() if p in optimizer.state)
    optimizer.param_groups[0]["anchor"] = 0.1
    train(model, optimizer, 1)
    assert gradsel.state_bytes(optimizer) == 12 * trained + 4 * steps


@pytest.mark.parametrize("options", [*ADAM_OPTIONS, {"weight_decay": 10.0}, *ANCHORS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_frozen_entries_keep_every_bit(backend, options, dtype):
    model = Toy().to(dtype).eval()
    selection = gradsel.select(model, None, None, criterion="random")
    bits = frozen_bits(model, selection)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection, **options)
    for x, y in batches(6):
        optimizer.zero_grad()
        cross_entropy(model, (x.to(dtype), y)).backward()
        optimizer.step()
    assert_frozen(model, selection, bits)
    for name, p in model.named_parameters():
        if p.grad is not None and selection[name].kind == "per-row":
            assert not torch.equal(p, before[name])


def test_nan_gradients_stay_in_selected_entries(backend):
    model = Toy()
    selection = selection_for(model)
    bits = frozen_bits(model, selection)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection, weight_decay=0.1, amsgrad=True)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert_frozen(model, selection, bits)
    assert model.head.weight.isnan().all()


def test_irregular_and_dense_masks(backend):
    model = nn.Linear(9, 4)
    dense = torch.rand(4, 9) < 0.4
    selection = gradsel.Selection.from_dense({"weight": dense, "bias": torch.zeros(4, dtype=torch.bool)})
    assert isinstance(selection["weight"], Flat)
    before = copy.deepcopy(model)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection)
    model(torch.randn(5, 9)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.weight != before.weight, dense & (model.weight.grad != 0))
    assert torch.equal(model.bias, before.bias)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.to(memory_format=torch.channels_last)], ids=["nchw", "nhwc"])
def test_memory_formats_and_transposed_convolutions(backend, wrap):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Flatten(), nn.Linear(6 * 49, 5))
    expected = copy.deepcopy(model)
    data = torch.randn(3, 4, 8, 8)
    selection = gradsel.select(model, [data], lambda m, x: m(x).square().mean(), gradsel.PerNeuron(2))

    def step(net):
        optimizer = gradsel.MaskedAdam(net.named_parameters(), masks=selection, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(data).square().mean().backward()
            optimizer.step()

    bits = frozen_bits(model, selection)
    step(expected)
    model = wrap(model)
    step(model)
    assert_frozen(model, selection, bits)
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_low_precision_weights_learn_through_masters():
    """Updates below half a unit of bfloat16's last place add up instead of being lost."""
    weight = nn.Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    mask = PerRow(torch.zeros(4, 1, dtype=torch.int32), (4, 6))
    optimizer = gradsel.MaskedAdam([("w", weight)], lr=1e-4, masks=gradsel.Selection({"w": mask}))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    master = optimizer.state[weight]["master"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, torch.full((4, 1), 0.99), rtol=1e-5, atol=0)
    assert torch.equal(weight[:, :1], master.bfloat16())
    assert (weight[:, 1:] == 1).all()


def test_a_weight_written_by_others_is_taken_over():
    weight = nn.Parameter(torch.full((2, 3), 0.25, dtype=torch.bfloat16))
    optimizer = gradsel.MaskedAdam([("w", weight)], lr=1e-3)
    for written in (0.25, 5.0, -3.0):
        with torch.no_grad():
            weight[0].fill_(written)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight[0].float(), torch.full((3,), written), rtol=1e-2, atol=0)
    torch.testing.assert_close(optimizer.state[weight]["master"][1], torch.full((3,), 0.247), rtol=1e-4, atol=0)


def test_state_of_a_float32_run_grows_masters_on_bfloat16():
    weight = nn.Parameter(torch.ones(2, 3))
    first = gradsel.MaskedAdam([weight], lr=1e-4)
    weight.grad = torch.ones_like(weight)
    first.step()
    low = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    second = gradsel.MaskedAdam([low], lr=1e-4)
    second.load_state_dict(first.state_dict())
    for _ in range(200):
        low.grad = torch.ones_like(low)
        second.step()
    torch.testing.assert_close(low.float(), torch.full((2, 3), 0.98), rtol=4e-3, atol=0)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_rows_kept_whole_on_transposed_weights(backend, k):
    """K at or past the row's length makes dense and compact gradients look alike."""
    parameter = nn.Parameter(torch.randn(5, 3).t())
    before = parameter.detach().clone()
    rows, n = parameter.shape
    cols = gk.topk_rows(torch.randn(rows, n), k)
    dense = PerRow(cols, (rows, n)).to_dense()
    optimizer = gradsel.MaskedAdam([("w", parameter)], masks=gradsel.Selection({"w": PerRow(cols, (rows, n))}))
    parameter.grad = torch.randn(5, 3).t()
    optimizer.step()
    assert torch.equal(parameter != before, dense)


def test_parameter_groups_and_schedulers():
    model, twin = Toy().eval(), None
    twin = copy.deepcopy(model)

    def groups(net):
        named = dict(net.named_parameters())
        head = [(n, p) for n, p in named.items() if n.startswith("head")]
        rest = [(n, p) for n, p in named.items() if not n.startswith("head")]
        return [{"params": rest}, {"params": head, "lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.9)}]

    ours = gradsel.MaskedAdam(groups(model), lr=0.01)
    theirs = torch.optim.Adam(groups(twin), lr=0.01, foreach=False, fused=False)
    with gk.use_backend("reference"):
        train(model, ours, 6, lr_scheduler.CosineAnnealingLR(ours, 6))
        train(twin, theirs, 6, lr_scheduler.CosineAnnealingLR(theirs, 6))
    assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_add_param_group():
    model = Toy()
    selection = selection_for(model)
    named = list(model.named_parameters())
    optimizer = gradsel.MaskedAdam(named[:4], masks=selection)
    optimizer.add_param_group({"params": named[4:], "lr": 0.1})
    bits = frozen_bits(model, selection)
    train(model, optimizer)
    assert_frozen(model, selection, bits)
    with pytest.raises(KeyError, match="'stranger'"):
        optimizer.add_param_group({"params": [("stranger", nn.Parameter(torch.ones(2)))]})
    assert len(optimizer.param_groups) == 2


def test_closure_and_hooks():
    model = Toy()
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection_for(model))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model, batches()[0])
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}, *ANCHORS], ids=str)
def test_resuming_is_bit_equal_to_not_having_stopped(backend, options, dtype):
    data = [(x.to(dtype), y) for x, y in batches(6)]

    def steps(model, optimizer, part):
        for batch in part:
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()

    model = Toy().to(dtype).eval()
    selection = gradsel.select(model, None, None, criterion="random")
    resumed = copy.deepcopy(model)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection, **options)
    steps(model, optimizer, data[:3])

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    second = gradsel.MaskedAdam(resumed.named_parameters(), masks=selection, **options)
    second.load_state_dict(checkpoint["optimizer"])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert second.state[q].keys() == optimizer.state[p].keys()
        for key, value in optimizer.state[p].items():
            if key == "mask_fingerprint":
                assert second.state[q][key] == value
            else:
                assert same_bits(second.state[q][key], value)
                assert second.state[q][key].data_ptr() != value.data_ptr()

    steps(model, optimizer, data[3:])
    steps(resumed, second, data[3:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert same_bits(p, q)


def test_loaded_state_does_not_alias_its_source():
    model = Toy()
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection_for(model))
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    other = gradsel.MaskedAdam(model.named_parameters(), masks=optimizer._selection)
    other.load_state_dict(state)
    before = copy.deepcopy(state["state"])
    train(model, other, 2)
    for key, entries in before.items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(state["state"][key][name]), torch.as_tensor(value))


def test_state_of_a_run_that_knew_no_anchor_leaves_it_as_it_is():
    model = Toy()
    dense = torch.optim.Adam(model.parameters())
    train(model, dense, 1)
    optimizer = gradsel.MaskedAdam(model.parameters(), anchor=0.1, anchor_decoupled=True, anchor_norm=1)
    assert "anchor" not in dense.param_groups[0]
    optimizer.load_state_dict(dense.state_dict())
    options = optimizer.param_groups[0]
    assert (options["anchor"], options["anchor_decoupled"], options["anchor_norm"]) == (0.1, True, 1)
    train(model, optimizer, 1)
    assert all("original" in state for state in optimizer.state.values())


def test_an_optimizer_of_an_older_version_can_be_copied_and_extended():
    old = gradsel.MaskedAdam(one_parameter())
    for options in (old.defaults, *old.param_groups):
        for name in [name for name in options if name.startswith("anchor")]:
            del options[name]
    new = copy.deepcopy(old)
    new.add_param_group({"params": one_parameter()})
    assert [group["anchor"] for group in new.param_groups] == [0.0, 0.0]


# --- Conversion of states ----------------------------------------------------------------------------------------


def random_masks(model, seed, k=2):
    """K random entries in every neuron, and all other parameters whole."""
    generator = torch.Generator().manual_seed(seed)

    def mask(p):
        if p.ndim < 2:
            return Whole(p.shape)
        rows, n = p.shape[0], p[0].numel()
        cols = torch.stack([torch.randperm(n, generator=generator)[:k].sort().values for _ in range(rows)])
        return PerRow(cols.to(torch.int32), p.shape)

    return gradsel.Selection({name: mask(p) for name, p in model.named_parameters()})


def masked(model, selection, **options):
    return gradsel.MaskedAdam(model.named_parameters(), masks=selection, **options)


@pytest.mark.parametrize("cls", [nn.Linear, lambda n, m: nn.Conv2d(n, m, 1)], ids=["linear", "conv"])
def test_state_of_another_selection_is_refused(cls):
    """Though the shapes agree; the error names the parameter, and nothing has changed."""
    model = nn.Sequential(cls(9, 4))
    masks, others = random_masks(model, 0), random_masks(model, 1)
    optimizer = masked(model, masks)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    masked(model, masks).load_state_dict(state)
    second = masked(model, others)
    with pytest.raises(ValueError, match=r"another selection of 0\.weight"):
        second.load_state_dict(state)
    assert not second.state
    unnamed = gradsel.MaskedAdam(model.parameters())
    with pytest.raises(ValueError, match="another selection of parameter 0"):
        unnamed.load_state_dict(state)
    torch.optim.Adam(model.parameters()).load_state_dict(state)  # shapes are its own affair


def test_state_of_another_selection_is_refused_where_the_model_is_attached():
    plain = nn.Sequential(nn.Linear(9, 4))
    states = []
    for seed in (0, 1):
        model = copy.deepcopy(plain)
        gradsel.attach(model, random_masks(model, seed))
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model))
        model(torch.ones(2, 9)).sum().backward()
        optimizer.step()
        states.append(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"another selection of 0\.weight"):
        optimizer.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])


def test_fingerprints_tell_masks_apart():
    """Kind, view and shape too: they decide on the order of moments. Copies and files change nothing."""
    cols = torch.tensor([[0, 1], [1, 2], [0, 2]], dtype=torch.int32)
    masks = [
        PerRow(cols, (3, 3)),
        PerRow(cols, (3, 3), NeuronView((1,))),
        PerRow(cols, (3, 1, 3)),
        PerRow(cols.flip(0), (3, 3)),
        Flat(torch.tensor([0, 1, 4, 5, 6, 8]), (3, 3)),
        WholeRows(torch.tensor([0, 1], dtype=torch.int32), (3, 3)),
        WholeRows(torch.tensor([0, 2], dtype=torch.int32), (3, 3)),
        WholeColumns(torch.tensor([0, 2], dtype=torch.int32), (3, 3)),
    ]
    prints = [fingerprint(mask) for mask in masks]
    assert len(set(prints)) == len(masks)
    assert all(0 <= number < 2**63 for number in prints)
    assert [fingerprint(copy.deepcopy(mask)) for mask in masks] == prints
    read = [from_parts(mask.kind, mask.shape, mask.describe(), mask.packed()) for mask in masks]
    assert [fingerprint(mask) for mask in read] == prints


def test_a_state_without_fingerprints_is_taken_where_shapes_agree():
    """Of the version before; but not of another number of entries."""
    model = nn.Sequential(nn.Linear(9, 4))
    optimizer = masked(model, random_masks(model, 0))
    model(torch.ones(2, 9)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["mask_fingerprint"]
    optimizer.load_state_dict(state)
    assert "mask_fingerprint" in optimizer.state[model[0].weight]
    with pytest.raises(ValueError, match=r"exp_avg of 0\.weight has shape 4x2 .* the mask selects 4x3"):
        masked(model, random_masks(model, 0, k=3)).load_state_dict(state)


def wide_grads(model, batch, masks=None):
    """Gradients of a batch, with zeros where nothing is selected."""
    model.zero_grad()
    cross_entropy(model, batch).backward()
    for name, p in model.named_parameters():
        if masks is not None and p.grad is not None:
            p.grad *= masks[name].to_dense()


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("attached", [False, True])
def test_a_dense_run_goes_on_as_a_masked_one(cls, attached):
    """Bit for bit on the selected entries: torch's run with masked gradients from there, and ours."""
    torch.manual_seed(1)
    twin, data = Toy().eval(), batches(8)
    theirs = cls(twin.named_parameters(), foreach=False, fused=False, amsgrad=True)
    for batch in data[:4]:
        wide_grads(twin, batch)
        theirs.step()
    model = copy.deepcopy(twin)
    selection = selection_for(model, k=2)
    bits = frozen_bits(model, selection)
    masks = {name: mask.to_dense() for name, mask in selection.items()}
    kind = gradsel.MaskedAdam if cls is torch.optim.Adam else gradsel.MaskedAdamW
    if attached:
        gradsel.attach(model, selection)
        own = {name.removesuffix("_values"): p for name, p in model.named_parameters() if p.requires_grad}
        named = dict(model.named_parameters())
        order = [(name, own.get(name, named[name])) for name, _ in twin.named_parameters()]
        ours = kind(order[::-1])  # names say what belongs together
    else:
        ours = kind(model.named_parameters(), masks=selection)
    ours.load_state_dict(theirs.state_dict())
    with gk.use_backend("reference"):
        for batch in data[4:]:
            wide_grads(twin, batch, selection)
            parameters = ours.param_groups[0]["params"]
            for p, q in zip(parameters[::-1] if attached else parameters, twin.named_parameters(), strict=True):
                owner = gradsel.attached.owner_of(p)
                grad = q[1].grad
                if grad is not None and p.requires_grad:
                    p.grad = grad.clone() if owner is None else owner[1].mask.gather(grad)
            theirs.step()
            ours.step()
    weights = dict(model.named_parameters())
    for name, p in twin.named_parameters():
        assert torch.equal(weights[name].detach()[masks[name]], p.detach()[masks[name]]), name
        assert same_bits(weights[name].detach()[~masks[name]], bits[name]), name
    assert gradsel.state_bytes(ours) < gradsel.state_bytes(theirs) / 2


@pytest.mark.parametrize("kind", ["drop-in", "attached"])
def test_a_masked_run_goes_on_as_a_dense_one(kind):
    """Its moments among zeros; torch's Adam then moves what was selected as we would."""
    model = Toy().eval()
    selection = selection_for(model, k=2)
    if kind == "attached":
        gradsel.attach(model, selection)
        optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), amsgrad=True)
    else:
        optimizer = masked(model, selection, amsgrad=True)
    train(model, optimizer, 3)
    state = optimizer.dense_state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    routes = [(p, gradsel.attached.owner_of(p)) for p in optimizer.param_groups[0]["params"]]
    weights = [nn.Parameter((p if owner is None else owner[0]).detach().clone()) for p, owner in routes]
    dense = torch.optim.Adam(weights, foreach=False, fused=False)
    dense.load_state_dict(torch.load(file, weights_only=True))
    names = {p: name for name, p in model.named_parameters()}
    for (p, _), weight in zip(routes, weights, strict=True):
        mask = selection[names[p].removesuffix("_values")]
        assert (weight in dense.state) == (p in optimizer.state)
        if p not in optimizer.state:
            continue
        assert dense.state[weight].keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(mask.gather(dense.state[weight][name]), optimizer.state[p][name])
            assert not dense.state[weight][name][~mask.to_dense()].any()
            assert dense.state[weight][name].data_ptr() != optimizer.state[p][name].data_ptr()
        p.grad = torch.ones_like(p)
        weight.grad = mask.to_dense().float()
    with gk.use_backend("reference"):
        optimizer.step()
        dense.step()
    for (p, owner), weight in zip(routes, weights, strict=True):
        assert torch.equal(p if owner is None else owner[0], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reselection_keeps_the_state_of_entries_that_stay(backend, dtype):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(9, 6), nn.Conv2d(2, 4, 3), nn.Linear(5, 3)).to(dtype)
    selections = [random_masks(model, 0, 3), random_masks(model, 1, 4)]
    frozen = {"2.weight": Frozen((3, 5)), "0.bias": Frozen((6,))}
    selections = [selections[0], gradsel.Selection({**selections[1], **frozen}), selections[0]]
    optimizer = masked(model, selections[0], lr=0.01, amsgrad=True, anchor=0.1)
    names = {p: name for name, p in model.named_parameters()}

    def steps(count):
        for _ in range(count):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    steps(3)
    for old, new in pairwise(selections):
        before = copy.deepcopy({names[p]: state for p, state in optimizer.state.items()})
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.reselect(new)
        for name, p in model.named_parameters():
            assert torch.equal(p, weights[name])
            if name not in before or not new[name].nnz:
                assert p not in optimizer.state
                continue
            state, both = optimizer.state[p], old[name].to_dense() & new[name].to_dense()
            assert both.any()
            assert state["step"] == before[name]["step"]
            for key in before[name].keys() - {"step", "mask_fingerprint"}:
                start = torch.zeros(p.shape) if "exp_avg" in key else weights[name].float()
                was, now = start.clone(), start.clone()
                old[name].scatter_(was, before[name][key])
                new[name].scatter_(now, state[key])
                assert same_bits(now[both], was[both])
                assert same_bits(now[~both], start[~both])
        bits = frozen_bits(model, new)
        steps(2)
        assert_frozen(model, new, bits)
        steps(1)
    fresh = masked(model, selections[-1], amsgrad=True)
    fresh.load_state_dict(optimizer.state_dict())


def test_reselection_of_a_dense_run_and_what_it_refuses():
    model = nn.Sequential(nn.Linear(9, 4))
    optimizer = gradsel.MaskedAdam(model.named_parameters())
    model(torch.ones(2, 9)).sum().backward()
    optimizer.step()
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    with pytest.raises(KeyError, match=r"has no parameter '0\.bias'"):
        optimizer.reselect({"0.weight": PerRow(torch.zeros(4, 1, dtype=torch.int32), (4, 9))})
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moments)
    optimizer.reselect(random_masks(model, 0))
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (4, 2)
    gradsel.attach(model, random_masks(model, 0))
    with pytest.raises(ValueError, match="attached"):
        gradsel.MaskedAdam(gradsel.trainable_parameters(model)).reselect(random_masks(model, 0))
    with pytest.raises(ValueError, match="have no names"):
        gradsel.MaskedAdam([nn.Parameter(torch.ones(2, 3))]).reselect(MASKS)


def test_attached_models_are_reselected_through_the_dense_state():
    """As docs/optimizer.md has it: dense_state_dict, detach, attach, a new optimizer, load_state_dict."""
    model = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))
    first, second = random_masks(model, 0, 3), random_masks(model, 1, 3)
    gradsel.attach(model, first)
    optimizer = gradsel.MaskedAdam(trained(model))
    model(torch.ones(2, 9)).square().sum().backward()
    optimizer.step()
    state = optimizer.dense_state_dict()
    gradsel.detach(model)
    gradsel.attach(model, second)
    optimizer = gradsel.MaskedAdam(trained(model))
    optimizer.load_state_dict(state)
    numbers = {name: number for number, name in enumerate(state["param_groups"][0]["param_names"])}
    for name, p in trained(model):
        owner = gradsel.attached.owner_of(p)
        moments = state["state"][numbers[name.removesuffix("_values")]]["exp_avg"]
        assert torch.equal(optimizer.state[p]["exp_avg"], moments if owner is None else owner[1].mask.gather(moments))
        assert optimizer.state[p]["step"] == 1
    both = first["0.weight"].to_dense() & second["0.weight"].to_dense()
    assert (state["state"][numbers["0.weight"]]["exp_avg"] != 0)[both].any()


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_states_find_their_parameters_by_name():
    """attach() puts values behind biases, and all shapes here are the same."""
    model = nn.LayerNorm(6)
    whole = gradsel.Selection({"weight": Whole((6,)), "bias": Whole((6,))})
    part = gradsel.Selection({"weight": Flat(torch.tensor([0, 2, 5], dtype=torch.int32), (6,)), "bias": Whole((6,))})
    gradsel.attach(model, whole)
    optimizer = gradsel.MaskedAdam(trained(model))
    model.weight.grad, model.bias.grad = torch.full((6,), 2.0), torch.full((6,), 3.0)
    optimizer.step()
    state = optimizer.dense_state_dict()
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in trained(model)}
    gradsel.detach(model)
    gradsel.attach(model, part)
    assert [name for name, _ in trained(model)] == ["bias", "weight_values"]
    second = gradsel.MaskedAdam(trained(model))
    second.load_state_dict(state)
    assert torch.equal(second.state[model.bias]["exp_avg"], moments["bias"])
    assert torch.equal(second.state[model.weight_values]["exp_avg"], moments["weight"][[0, 2, 5]])
    assert second.param_groups[0]["param_names"] == ["bias", "weight_values"]
    with pytest.raises(ValueError, match="takes a dense state by name only"):
        gradsel.MaskedAdam(gradsel.trainable_parameters(model)).load_state_dict(state)


@pytest.mark.parametrize("how", ["master", "kahan", "stochastic"])
@pytest.mark.parametrize("dtypes", [(0, 1), (1, 0), (1, 2), (0, 3), (3, 0)], ids=str)
def test_a_model_cast_between_steps(dtypes, how):
    """The plan and the state follow, in both routes."""
    first, then = ([torch.float32, torch.bfloat16, torch.float16, torch.float64][i] for i in dtypes)
    model = nn.Linear(8, 6).to(first)
    selection = gradsel.select(model, None, None, criterion="random")
    optimizer = gradsel.MaskedAdam(model.named_parameters(), 1e-4, masks=selection, low_precision=how, anchor=0.1)

    def step(count=1):
        for _ in range(count):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()

    step(2)
    model.to(then)
    step()
    for p in model.parameters():
        state = optimizer.state[p]
        wide = torch.float64 if then is torch.float64 else torch.float32
        assert state["exp_avg"].dtype is state["original"].dtype is wide
        low = then in (torch.bfloat16, torch.float16)
        assert ("master" in state) == (low and how == "master")
        assert ("compensation" in state) == (low and how == "kahan")
        assert "compensation" not in state or state["compensation"].dtype is then
    with torch.no_grad():
        model.weight.fill_(5.0)
    before = model.weight.detach().clone()
    step()
    assert (model.weight.detach() - before).abs().max() < 0.05  # nothing old is written back


def test_data_that_is_swapped_is_taken_over():
    weight = nn.Parameter(torch.zeros(6, dtype=torch.bfloat16))
    optimizer = gradsel.MaskedAdam([weight], 1e-3)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.data = torch.full_like(weight, 5.0)
    optimizer.step()
    assert weight.detach().float().min() > 4.9


def test_a_state_that_is_reset_begins_anew():
    weight = nn.Parameter(torch.zeros(6))
    optimizer = gradsel.MaskedAdam([weight], 1e-3)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.state = collections.defaultdict(dict)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1
    optimizer.state[weight].clear()
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1


def test_options_of_ours_survive_a_state_of_torch_s_adam():
    model = Toy()
    dense = torch.optim.Adam(model.parameters())
    train(model, dense, 1)
    options = {"anchor": 0.3, "anchor_norm": 1, "anchor_decoupled": True, "low_precision": "kahan", "seed": 7}
    optimizer = gradsel.MaskedAdam(model.parameters(), **options)
    optimizer.load_state_dict(dense.state_dict())
    assert {name: optimizer.param_groups[0][name] for name in options} == options


def test_reselecting_leaves_groups_with_masks_of_their_own_and_failures_change_nothing(monkeypatch):
    model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 3))
    masks = random_masks(model, 0, 3)
    head = {"params": list(model[1].named_parameters("1")), "masks": None}
    optimizer = gradsel.MaskedAdam([{"params": list(model[0].named_parameters("0"))}, head], masks=masks)
    model(torch.ones(2, 9)).square().sum().backward()
    optimizer.step()
    before = {p: dict(state) for p, state in optimizer.state.items()}
    with monkeypatch.context() as patch:
        patch.setattr("gradsel.optim.optimizer.migrated", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.reselect(random_masks(model, 1, 3))
    assert {p: dict(state) for p, state in optimizer.state.items()}.keys() == before.keys()
    assert all(optimizer.state[p][key] is value for p, state in before.items() for key, value in state.items())
    optimizer.reselect(gradsel.Selection({name: m for name, m in random_masks(model, 1, 3).items() if name[0] == "0"}))
    assert optimizer.state[model[1].weight]["exp_avg"].shape == model[1].weight.shape
    attached = nn.Linear(4, 4)
    gradsel.attach(attached, gradsel.select(attached, None, None, criterion="random"))
    with pytest.raises(ValueError, match="the model is attached; detach it"):
        gradsel.MaskedAdam(gradsel.trainable_parameters(attached)).reselect(None)


def test_a_bad_anchor_in_the_middle_and_rounded_moments():
    weight = nn.Parameter(torch.zeros(6))
    optimizer = gradsel.MaskedAdam([weight], 1e-3, anchor=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.param_groups[0]["anchor"] = -50.0
    with pytest.raises(ValueError, match=r"Invalid anchor value: -50\.0"):
        optimizer.step()
    with pytest.warns(UserWarning, match=r"beta2 = 0\.999 second moments never fall"):
        rounded = gradsel.MaskedAdam([weight], state_dtype=torch.bfloat16)
    rounded.step()
    assert rounded.dense_state_dict()["state"][0]["exp_avg"].dtype is torch.float32


def test_a_parameter_put_into_a_group_by_hand():
    old, new = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    new.grad = torch.ones(3)
    optimizer = gradsel.MaskedAdam([old])
    optimizer.param_groups[0]["params"][0] = new
    optimizer.step()
    assert (new != 0).all()
    masked = gradsel.MaskedAdam([("old", old)], masks={"old": Whole((3,))})
    masked.param_groups[0]["params"][0] = new
    with pytest.raises(KeyError, match="put into a group by hand"):
        masked.step()


def test_a_compact_gradient_in_any_layout():
    model = nn.Linear(8, 6)
    gradsel.attach(model, gradsel.select(model, None, None, criterion="random"))
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), 1e-2)
    before = model.weight_values.detach().clone()
    model.weight_values.grad = torch.ones(()).expand(model.weight_values.shape)
    optimizer.step()
    assert (model.weight_values != before).all()


# --- Clipping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf"), "inf"])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
@pytest.mark.parametrize("attached", [False, True])
def test_clipping_is_torch_s_on_the_selected_entries(norm_type, max_norm, attached):
    model = Toy().eval()
    selection = selection_for(model, 2)
    wide_grads(model, batches()[0])
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and selection[name].nnz}
    gathered = [nn.Parameter(torch.zeros_like(selection[name].gather(grad))) for name, grad in grads.items()]
    for p, (name, grad) in zip(gathered, grads.items(), strict=True):
        p.grad = selection[name].gather(grad)
    wide = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    expected = torch.nn.utils.clip_grad_norm_(gathered, max_norm, norm_type)
    if attached:
        gradsel.attach(model, selection)
        wide_grads(model, batches()[0])
        parameters = gradsel.trainable_parameters(model)
        optimizer = gradsel.MaskedAdam(parameters)
        before = [p.grad.clone() for p in parameters if p.grad is not None]
        torch_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
        clipped = [p.grad for p in parameters if p.grad is not None]
        for p, grad in zip([p for p in parameters if p.grad is not None], before, strict=True):
            p.grad = grad
        norm = optimizer.clip_grad_norm_(max_norm, norm_type)
        assert torch.equal(norm, torch_norm)
        assert all(map(torch.equal, clipped, [p.grad for p in parameters if p.grad is not None]))
        torch.testing.assert_close(norm, expected)
        return
    optimizer = masked(model, selection)
    norm = optimizer.clip_grad_norm_(max_norm, norm_type)
    assert torch.equal(norm, expected)
    assert norm < torch.nn.utils.get_total_norm(wide, float(norm_type)) or float(norm_type) == float("inf")
    for p, (name, grad) in zip(gathered, grads.items(), strict=True):
        assert torch.equal(selection[name].gather(grad), p.grad)


def test_clipping_looks_at_selected_entries_only_and_reports_what_is_not_finite():
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = masked(model, random_masks(model, 0, 1))
    assert optimizer.clip_grad_norm_(1.0) == 0
    selected = optimizer._masks[model[0].weight].to_dense()
    model[0].weight.grad = torch.where(selected, 2.0, float("nan"))
    norm = optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    torch.testing.assert_close(norm, torch.tensor(12.0).sqrt())
    torch.testing.assert_close(model[0].weight.grad[selected], torch.full((3,), 3**-0.5), rtol=1e-5, atol=0)
    model[0].bias.grad = torch.full((3,), float("inf"))
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)


# --- Groups, calls, copies ---------------------------------------------------------------------------------------


def test_groups_have_masks_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4))
    all_masks = random_masks(model, 0)
    own = {"1.weight": PerRow(torch.full((4, 1), 5, dtype=torch.int32), (4, 6)), "1.bias": Frozen((4,))}
    groups = [{"params": list(layer.named_parameters(prefix=str(i)))} for i, layer in enumerate(model)]
    groups[1]["masks"], groups[2]["masks"] = own, None
    optimizer = gradsel.MaskedAdam(groups, masks=all_masks)
    assert groups[1]["masks"] is own  # the caller's dict can be used again
    assert all("masks" not in group for group in optimizer.param_groups)
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    changed = [
        [p != q for p, q in zip(layer.parameters(), old.parameters(), strict=True)]
        for layer, old in zip(model, before, strict=True)
    ]
    assert torch.equal(changed[0][0], all_masks["0.weight"].to_dense())
    assert torch.equal(changed[1][0], own["1.weight"].to_dense())
    assert not changed[1][1].any()
    assert all(c.all() for c in (changed[0][1], *changed[2]))
    with pytest.raises(TypeError, match="masks must be a Selection"):
        gradsel.MaskedAdam([{"params": list(model.named_parameters()), "masks": [1]}])


def test_a_step_is_one_operator_call_and_allocates_nothing():
    """After the first: on an attached model, with moments, anchor and all, only masked_adam_ is dispatched."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "profiler" not in str(func):  # torch's own, around every step
                calls.append(str(func))
            return func(*args, **(kwargs or {}))

    model = Toy().eval()
    gradsel.attach(model, selection_for(model))
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), anchor=0.1, amsgrad=True)
    for count in (1, 2):
        wide_grads(model, batches()[0])
        calls = []
        with Count():
            optimizer.step()
        assert (len(calls) == 1) == (count == 2)
    assert calls == ["gradsel_kernels.masked_adam_.default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_step_remembers_is_forgotten_when_it_no_longer_holds(dtype):
    """Whatever is done to model and optimizer between steps, they go on as an optimizer does that remembers nothing."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(2, 3, 2), nn.Linear(4, 4)).to(dtype)
    selection = random_masks(plain, 0)

    def replace_weights(model, optimizer):
        for p in model.parameters():
            p.data = p.data.clone()

    def replace_state(model, optimizer):
        for p, state in list(optimizer.state.items()):
            optimizer.state[p] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}

    def replace_moments(model, optimizer):
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"] * 0.5

    def restride(model, optimizer):
        model.to(memory_format=torch.channels_last)

    def assign(model, optimizer):
        if not hasattr(model[0], "weight_values"):
            model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
            return
        weight = model[0]._parameters["weight"]
        model[0]._parameters["weight"] = nn.Parameter(weight.detach().clone(), requires_grad=False)

    def freeze_one(model, optimizer):
        next(iter(optimizer.state)).grad = None

    def options(model, optimizer):
        optimizer.param_groups[0].update(lr=0.1, amsgrad=True, anchor=0.5)

    def reload(model, optimizer):
        optimizer.load_state_dict(optimizer.state_dict())

    def regroup(model, optimizer):
        params = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = params[1:]

    changes = [
        replace_weights, replace_state, replace_moments, restride, assign, freeze_one, options, reload, regroup,
    ]  # fmt: skip
    for attached in (False, True):
        models = [copy.deepcopy(plain) for _ in range(2)]
        optimizers = []
        for model in models:
            if attached:
                gradsel.attach(model, selection)
                optimizers.append(gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.01))
            else:
                optimizers.append(masked(model, selection, lr=0.01))
        for change in [lambda *_: None, *changes]:
            for _ in range(2):
                params = [[p for p in model.parameters() if p.requires_grad] for model in models]
                for p, q in zip(*params, strict=True):
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                    q.grad = p.grad.clone()
                for model, optimizer in zip(models, optimizers, strict=True):
                    change(model, optimizer)
                optimizers[1]._plans.clear()
                for optimizer in optimizers:
                    optimizer.step()
                for (name, p), q in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
                    assert same_bits(p, q), (change, name)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_their_masks(duplicate):
    model = Toy()
    selection = selection_for(model)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), masks=selection)
    train(model, optimizer, 2)
    model, optimizer = duplicate((model, optimizer))
    bits = frozen_bits(model, selection)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 2)
    assert_frozen(model, selection, bits)
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_names_with_wrapper_prefixes():
    model = Toy()
    selection = selection_for(model)
    named = [(f"_orig_mod.module.{name}", p) for name, p in model.named_parameters()]
    bits = frozen_bits(model, selection)
    train(model, gradsel.MaskedAdam(named, masks=selection))
    assert_frozen(model, selection, bits)


def test_adamw_defaults():
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    ours, theirs = gradsel.MaskedAdamW(model.parameters()), torch.optim.AdamW(twin.parameters(), foreach=False)
    for net, optimizer in ((model, ours), (twin, theirs)):
        net(torch.ones(1, 3)).sum().backward()
        with gk.use_backend("reference"):
            optimizer.step()
    assert ours.defaults["weight_decay"] == 0.01
    assert torch.equal(model.weight, twin.weight)


def one_parameter():
    return [nn.Parameter(torch.ones(2, 3))]


def named_parameter(shape=(2, 3)):
    return [("w", nn.Parameter(torch.ones(shape)))]


MASKS = gradsel.Selection({"w": PerRow(torch.zeros(2, 1, dtype=torch.int32), (2, 3))})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gradsel.MaskedAdam(one_parameter(), lr=-1), ValueError, "Invalid learning rate: -1"),
        (lambda: gradsel.MaskedAdam(one_parameter(), eps=-1), ValueError, "Invalid epsilon value: -1"),
        (lambda: gradsel.MaskedAdam(one_parameter(), betas=(1.0, 0.9)), ValueError, "parameter at index 0: 1.0"),
        (lambda: gradsel.MaskedAdam(one_parameter(), weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
        (lambda: gradsel.MaskedAdam(one_parameter(), anchor=-1), ValueError, "Invalid anchor value: -1"),
        (lambda: gradsel.MaskedAdam([{"params": one_parameter(), "anchor": -1}]), ValueError, "Invalid anchor value"),
        (lambda: gradsel.MaskedAdamW(one_parameter(), anchor_norm=3), ValueError, "Invalid anchor_norm value: 3"),
        (lambda: gradsel.MaskedAdam(one_parameter(), lr=torch.ones(2)), ValueError, "lr must be 1-element"),
        (lambda: gradsel.MaskedAdam(one_parameter(), masks=MASKS), ValueError, "pass model.named_parameters"),
        (lambda: gradsel.MaskedAdam(named_parameter(), masks=torch.ones(2)), TypeError, "Selection, got Tensor"),
        (lambda: gradsel.MaskedAdam(named_parameter(), masks={"w": torch.ones(2, 3)}), TypeError, "is a Tensor"),
        (lambda: gradsel.MaskedAdam([("v", one_parameter()[0])], masks=MASKS), KeyError, "has no parameter 'v'"),
        (lambda: gradsel.MaskedAdam(named_parameter((3, 2)), masks=MASKS), ValueError, r"mask of w is for shape"),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.ones(2, 3).to_sparse(), "does not support sparse gradients, please consider SparseAdam instead"),
        (None, "MaskedAdam does not support complex parameters"),
    ],
)
def test_sparse_and_complex_gradients(grad, message):
    parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64 if grad is None else torch.float32))
    parameter.grad = torch.ones_like(parameter) if grad is None else grad
    with pytest.raises(RuntimeError, match=message):
        gradsel.MaskedAdam([parameter]).step()
