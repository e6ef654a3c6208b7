"""MaskedAdam with policy=: the first step selects, and what follows is the optimizer with that selection."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradsel
import gradsel_kernels as gk
from gradsel.masks import Frozen, PerRow
from tests.gradsel.optim.cases import ADAM_OPTIONS, ANCHORS, assert_frozen, frozen_bits, selection_for, train
from tests.kernels.cases import same_bits
from tests.support.toy import Toy, batches, cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:.*ranked parameters got no gradient", "ignore:.*neurons score zero")


def toy(dtype=torch.float32):
    torch.manual_seed(1)
    return Toy().eval().to(dtype)


def gradients(model, batch=0):
    model.zero_grad()
    data, labels = batches()[batch]
    cross_entropy(model, (data.to(next(model.parameters()).dtype), labels)).backward()


def twins(dtype=torch.float32, k=2, **options):
    """A model whose optimizer selects by itself, and its twin, trained with what select() finds on the same batch."""
    model = toy(dtype)
    twin = copy.deepcopy(model)
    data, labels = batches()[0]
    selection = gradsel.select(twin, [(data.to(dtype), labels)], cross_entropy, gradsel.PerNeuron(k))
    ours = gradsel.MaskedAdam(model.named_parameters(), policy=gradsel.PerNeuron(k), **options)
    theirs = gradsel.MaskedAdam(twin.named_parameters(), masks=selection, **options)
    return model, ours, twin, theirs, selection


def step_both(model, ours, twin, theirs, steps=1, first=0):
    for step in range(first, first + steps):
        for net, optimizer in ((model, ours), (twin, theirs)):
            gradients(net, step % 3)
            optimizer.step()


def assert_same(model, ours, twin, theirs):
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach()), name
        mine, other = ours.state.get(p, {}), theirs.state.get(q, {})
        assert mine.keys() == other.keys(), name
        for key, value in mine.items():
            assert value == other[key] if isinstance(value, int) else same_bits(value, other[key]), (name, key)


@pytest.mark.parametrize("options", ADAM_OPTIONS + ANCHORS, ids=str)
def test_equals_select_and_masks(backend, options):
    model, ours, twin, theirs, selection = twins(**options)
    bits = frozen_bits(model, selection)
    assert ours.selection is None
    step_both(model, ours, twin, theirs)
    assert ours.selection == selection
    assert ours.selection.base == selection.base
    assert_same(model, ours, twin, theirs)
    step_both(model, ours, twin, theirs, steps=3, first=1)
    assert_same(model, ours, twin, theirs)
    assert_frozen(model, selection, bits)


@pytest.mark.parametrize("low_precision", ["master", "kahan", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_low_precision(dtype, low_precision):
    both = twins(dtype, low_precision=low_precision, state_dtype=torch.bfloat16, betas=(0.9, 0.99))[:4]
    step_both(*both, steps=4)
    assert_same(*both)


def test_ranked_weights_take_the_fused_operator(monkeypatch):
    model, ours, *_ = twins()
    calls = []
    real = gk.topk_masked_adam_
    monkeypatch.setattr(gk, "topk_masked_adam_", lambda *args, **kw: calls.append(len(args[0])) or real(*args, **kw))
    gradients(model)
    ours.step()
    gradients(model)
    ours.step()
    ranked = sum(isinstance(mask, PerRow) for mask in ours.selection.values())
    assert calls == [ranked]


@pytest.mark.parametrize(
    ("policy", "criterion"),
    [
        (gradsel.Rows(2), "gradient"),
        (gradsel.Global(count=50), "gradient"),
        (gradsel.PerNeuron(2, columns=4), "gradient"),
        (gradsel.PerNeuron(1), "snip"),
        (gradsel.PerNeuron(1), "fisher"),
        (gradsel.PerNeuron(1), "magnitude"),
        pytest.param(gradsel.PerNeuron(1), lambda weight, grad: grad * 2, id="PerNeuron(1)-function"),
    ],
    ids=str,
)
def test_every_policy_and_criterion(policy, criterion):
    model = toy()
    twin = copy.deepcopy(model)
    selection = gradsel.select(twin, batches()[:1], cross_entropy, policy, criterion=criterion)
    ours = gradsel.MaskedAdamW(model.named_parameters(), policy=policy, criterion=criterion)
    theirs = gradsel.MaskedAdamW(twin.named_parameters(), masks=selection)
    step_both(model, ours, twin, theirs, steps=2)
    assert ours.selection == selection
    assert_same(model, ours, twin, theirs)


@pytest.mark.parametrize("criterion", ["gradient", "fisher"])
def test_several_steps_are_ranked_together(criterion):
    model = toy()
    selection = gradsel.select(
        copy.deepcopy(model), batches(), cross_entropy, gradsel.PerNeuron(1), criterion=criterion
    )
    before = copy.deepcopy(model.state_dict())
    optimizer = gradsel.MaskedAdam(
        model.named_parameters(), policy=gradsel.PerNeuron(1), criterion=criterion, select_after=3
    )
    for batch in (0, 1):
        gradients(model, batch)
        optimizer.step()
        assert optimizer.selection is None
        assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    resumed = gradsel.MaskedAdam(
        model.named_parameters(), policy=gradsel.PerNeuron(1), criterion=criterion, select_after=3
    )
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    gradients(model, 2)
    resumed.step()
    assert resumed.selection == selection
    assert not same_bits(model.head.weight.detach(), before["head.weight"])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resumed_runs_go_on_to_the_bit(stop):
    model, ours = toy(), None
    ours = gradsel.MaskedAdamW(model.named_parameters(), policy=gradsel.PerNeuron(2))
    train(model, ours, steps=stop)
    twin = copy.deepcopy(model)
    resumed = gradsel.MaskedAdamW(twin.named_parameters(), policy=gradsel.PerNeuron(2))
    resumed.load_state_dict(through_a_file(ours.state_dict()))
    assert resumed.selection == ours.selection
    copied = copy.deepcopy(ours)
    pickled = pickle.loads(pickle.dumps(ours))
    assert copied.selection == pickled.selection == ours.selection
    step_both(model, ours, twin, resumed, steps=3)
    assert_same(model, ours, twin, resumed)


def test_reselection_keeps_the_moments_of_what_stays():
    model = toy()
    optimizer = gradsel.MaskedAdam(model.named_parameters(), policy=gradsel.PerNeuron(2), reselect_every=2)
    found = []
    for step in range(5):
        twin = copy.deepcopy(model)
        gradients(model, step % 3)
        optimizer.step()
        found.append(optimizer.selection)
        if step in (0, 2, 4):
            expected = gradsel.select(twin, batches()[step % 3 : step % 3 + 1], cross_entropy, gradsel.PerNeuron(2))
            assert optimizer.selection == expected
    assert found[0] is found[1]
    assert found[2] is found[3]
    assert found[0] != found[2]
    assert float(optimizer.state[model.blocks[0].fc1.weight]["step"]) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_precision", ["master", "kahan"])
def test_attach_goes_on_without_dense_gradients(dtype, low_precision):
    model = toy(dtype)
    optimizer = gradsel.MaskedAdam(
        model.named_parameters(), policy=gradsel.PerNeuron(2), low_precision=low_precision, anchor=0.1
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(ValueError, match="nothing has been selected yet"):
        optimizer.attach(model)
    for step in (0, 1):
        gradients(model, step)
        optimizer.step()
        scheduler.step()
    selection, states = optimizer.selection, {}
    for name, parameter in model.named_parameters():
        if optimizer.state.get(parameter):
            states[name] = copy.deepcopy(optimizer.state[parameter])
    bits = frozen_bits(model, selection)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not a parameter of this model"):
        optimizer.attach(toy(dtype))
    report = optimizer.attach(model)
    assert any(route.route == "direct" for route in report.values())
    assert all(same_bits(value, weights[name]) for name, value in model.state_dict().items() if name in weights)
    values = dict(model.named_parameters())
    for name, state in states.items():
        moved = optimizer.state[values.get(name + "_values", values[name])]
        for key in ("exp_avg", "exp_avg_sq", "step", "original"):
            assert same_bits(moved[key], state[key]), (name, key)
        if "master" in state and name + "_values" in values:
            assert same_bits(values[name + "_values"].detach(), state["master"])
    for step in (2, 3):
        gradients(model, step % 3)
        assert model.blocks[0].fc1.weight.grad is None
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    assert not same_bits(model.blocks[0].fc1.weight.detach(), weights["blocks.0.fc1.weight"])
    gradsel.detach(model)
    assert_frozen(model, selection, bits)


def test_attached_and_dense_runs_agree():
    model = toy()
    optimizer = gradsel.MaskedAdamW(model.named_parameters(), policy=gradsel.PerNeuron(1))
    train(model, optimizer, steps=2)
    twin, (other,) = copy.deepcopy((model, [optimizer]))
    optimizer.attach(model)
    losses, expected = train(model, optimizer, steps=3), train(twin, other, steps=3)
    assert losses == pytest.approx(expected, rel=1e-5)


class Half(torch.amp.GradScaler):
    """A scaler that works on the CPU and finds an overflow in its first step."""

    def __init__(self):
        super().__init__("cpu", init_scale=2.0**10)


@pytest.mark.parametrize("fused", [None, True])
def test_scaler_skips_the_selection_of_an_overflow(fused):
    model, scaler = toy(), Half()
    optimizer = gradsel.MaskedAdam(model.named_parameters(), policy=gradsel.PerNeuron(1), fused=fused)
    before = copy.deepcopy(model.state_dict())
    for overflows in (True, False):
        model.zero_grad()
        scaler.scale(cross_entropy(model, batches()[0])).backward()
        if overflows:
            model.head.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert optimizer.selection is None
            assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    expected = gradsel.select(toy(), batches()[:1], cross_entropy, gradsel.PerNeuron(1))
    assert optimizer.selection == expected


@pytest.mark.parametrize("policy", [gradsel.PerNeuron(1), gradsel.Rows(1)], ids=str)
def test_gradients_that_are_not_finite_change_nothing(policy):
    model = toy()
    optimizer = gradsel.MaskedAdamW(model.named_parameters(), policy=policy)
    before = copy.deepcopy(model.state_dict())
    gradients(model)
    model.blocks[1].fc2.weight.grad[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"the gradient of blocks.1.fc2.weight is not finite \(1 of 288 entries\)"):
        optimizer.step()
    assert optimizer.selection is None
    assert not optimizer.state
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    gradients(model)
    optimizer.step()
    assert optimizer.selection is not None


def test_gradients_of_zero_select_nothing():
    """torch.distributed.checkpoint steps with them to create states."""
    model = toy()
    optimizer = gradsel.MaskedAdamW(model.named_parameters(), policy=gradsel.PerNeuron(1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert optimizer.selection is None
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


def gradient(weight, grad):
    """A criterion that shares its name with the built-in one."""
    return weight


def test_a_function_called_gradient_is_not_the_criterion():
    model = toy()
    expected = gradsel.select(copy.deepcopy(model), batches()[:1], cross_entropy, criterion=gradient)
    optimizer = gradsel.MaskedAdam(model.named_parameters(), policy=gradsel.PerNeuron(1), criterion=gradient)
    train(model, optimizer, steps=1)
    assert optimizer.selection == expected


def test_sparse_gradients_are_refused_in_the_words_of_torch():
    model = toy()
    optimizer = gradsel.MaskedAdam(model.named_parameters(), policy=gradsel.PerNeuron(1))
    gradients(model)
    model.head.weight.grad = None
    model.blocks[0].fc1.weight.grad = model.blocks[0].fc1.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        optimizer.step()


def test_rules_groups_and_flags():
    model = toy()
    model.blocks[0].fc1.weight.requires_grad_(False)
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim > 1 and n != "tokens.weight"], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.ndim < 2]},
    ]
    optimizer = gradsel.MaskedAdam(
        groups, policy=gradsel.PerNeuron(1), rules={"blocks": [-2, -1], "whole": ["pos_embed"]}, model=model
    )
    gradients(model)
    optimizer.step()
    selection = optimizer.selection
    assert selection.keys() == {name for name, _ in named}
    assert selection["pos_embed"].is_whole
    assert selection["head.weight"].is_whole
    assert selection["patch_embed.weight"].label == "block left out"
    assert isinstance(selection["blocks.1.fc1.weight"], PerRow)
    assert isinstance(selection["blocks.0.fc1.weight"], Frozen)
    assert selection["blocks.0.fc1.weight"].label == "requires_grad is False"
    assert selection["tokens.weight"].label == "not in the optimizer"


def test_views_that_need_a_copy_are_ranked_too():
    torch.manual_seed(0)

    def network():
        convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 6, 3, groups=2)
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(600, 4)).to(memory_format=torch.channels_last)

    model = network()
    twin = copy.deepcopy(model)
    selection = gradsel.select(twin, batches()[:1], cross_entropy, gradsel.PerNeuron(2))
    ours = gradsel.MaskedAdam(model.named_parameters(), policy=gradsel.PerNeuron(2))
    theirs = gradsel.MaskedAdam(twin.named_parameters(), masks=selection)
    step_both(model, ours, twin, theirs, steps=2)
    assert ours.selection == selection
    assert_same(model, ours, twin, theirs)


def test_goes_on_from_a_dense_adam():
    model = toy()
    dense = torch.optim.Adam(model.named_parameters())
    gradients(model)
    dense.step()
    optimizer = gradsel.MaskedAdam(model.named_parameters(), policy=gradsel.PerNeuron(1))
    optimizer.load_state_dict(dense.state_dict())
    weight = model.blocks[0].fc1.weight
    moments = optimizer.state[weight]["exp_avg"].clone()
    gradients(model, 1)
    optimizer.step()
    mask = optimizer.selection["blocks.0.fc1.weight"]
    assert float(optimizer.state[weight]["step"]) == 2
    expected = torch.lerp(mask.gather(moments), mask.gather(weight.grad), 0.1)
    assert torch.allclose(optimizer.state[weight]["exp_avg"], expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: {"params": m.parameters(), "model": m}, ValueError, "the parameters have no names"),
        (lambda m: {"params": list(m.named_parameters())}, ValueError, r"pass model.named_parameters\(\) itself"),
        (lambda m: {"policy": "per neuron"}, TypeError, "policy must be a policy such as"),
        (lambda m: {"masks": selection_for(m)}, ValueError, "masks and policy are both given"),
        (lambda m: {"select_after": 0}, ValueError, "select_after must be a number of steps, at least 1, got 0"),
        (lambda m: {"select_after": 4, "reselect_every": 2}, ValueError, "reselect_every must be a number of steps"),
        (lambda m: {"policy": None, "reselect_every": 2}, ValueError, "pass policy=PerNeuron"),
        (lambda m: {"criterion": "grad"}, ValueError, "unknown criterion 'grad'"),
        (lambda m: {"rules": {"head": ["haed"]}}, ValueError, "did you mean head"),
        (lambda m: {"params": nn.Linear(2, 2).named_parameters(), "model": m}, ValueError, "no such parameter"),
    ],
)
def test_errors(make, error, message):
    model = toy()
    arguments = {"params": model.named_parameters(), "policy": gradsel.PerNeuron(1), **make(model)}
    with pytest.raises(error, match=message):
        gradsel.MaskedAdam(**arguments)


def test_attached_models_have_a_selection():
    model = toy()
    gradsel.attach(model, selection_for(model))
    with pytest.raises(ValueError, match="the model is attached, so it has a selection"):
        gradsel.MaskedAdam(model.named_parameters(), policy=gradsel.PerNeuron(1))


def test_a_damaged_selection_changes_nothing():
    model, ours = toy(), None
    ours = gradsel.MaskedAdamW(model.named_parameters(), policy=gradsel.PerNeuron(1))
    train(model, ours, steps=1)
    state = ours.state_dict()
    state["selection"]["selection"]["masks"]["blocks.0.fc1.weight"]["tensors"]["cols"] = torch.zeros(3)
    before = ours.selection
    with pytest.raises(ValueError, match=r"damaged at blocks.0.fc1.weight"):
        ours.load_state_dict(state)
    assert ours.selection is before
    train(model, ours, steps=1)


def run_rank(rank, world, folder):
    """Trains with gradients that are reduced, and then with others, which is refused."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for reduced in (True, False):
        model = toy()
        model.unused.requires_grad_(False)
        model.tokens.requires_grad_(False)
        net = DistributedDataParallel(model) if reduced else model
        optimizer = gradsel.MaskedAdamW(net.named_parameters(), lr=1e-2, policy=gradsel.PerNeuron(1))
        cross_entropy(net, batches()[rank]).backward()
        if reduced:
            optimizer.step()
            optimizer.selection.save(f"{folder}/{rank}.safetensors")
            with pytest.raises(ValueError, match="made for a model in DistributedDataParallel"):
                optimizer.attach(model)
            optimizer.step()
        else:
            with pytest.raises(
                RuntimeError, match="ranks 0 and 1 have selected different entries, first in patch_embed"
            ):
                optimizer.step()
            assert optimizer.selection is None
            unchanged = zip(model.parameters(), toy().parameters(), strict=True)
            assert all(same_bits(p.detach(), q.detach()) for p, q in unchanged)
    dist.destroy_process_group()


def test_ranks_select_the_same_or_are_told(tmp_path):
    torch.multiprocessing.spawn(run_rank, (2, str(tmp_path)), nprocs=2)
    first, second = (gradsel.Selection.load(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first == second
