"""Attached models under tensor parallelism, alone and with FSDP2: they train what one process trains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import gradsel
from gradsel.attached import selected_in
from gradsel.masks import Flat
from gradsel.nn import tensor_parallel
from tests.support.parallel import parallelise, prepared, share
from tests.support.selections import random_selection
from tests.support.sharded import (
    OPTIMIZERS,
    batches,
    check_alike,
    check_equal,
    check_written,
    common_folder,
    meshes,
    models,
    one,
    shard,
    whole,
    whole_state,
)
from tests.support.toy import cross_entropy

pytestmark = pytest.mark.xdist_group("ranks")


def step(models: list[tuple[nn.Module, torch.optim.Optimizer, str]], count: int = 3) -> None:
    for batch in batches(count=count):
        for model, optimizer, order in models:
            optimizer.zero_grad()
            cross_entropy(model, share(batch, order)).backward()
            optimizer.step()


def train(order: str, kind: str, optimizer_name: str) -> None:
    model, alone = prepared(order, kind)
    before = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    optimizers = [OPTIMIZERS[optimizer_name](gradsel.trainable_parameters(each)) for each in (model, alone)]
    step([(model, optimizers[0], order), (alone, optimizers[1], "")])
    state = whole_state(model)
    check_equal(state, alone.state_dict())
    check_alike(state)
    check_written(model)
    for module in model.modules():
        for short, selected in selected_in(module).items():
            assert short not in vars(module)
            name, frozen = selected.name, ~selected.mask.to_dense()
            assert torch.equal(state[name][frozen], before[name][frozen]), name
            assert name.startswith("tokens") or not torch.equal(state[name], before[name]), name


@pytest.mark.supports("TP", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.parametrize(
    ("order", "kind", "optimizer"),
    [
        ("pa", "per-row", "MaskedAdamW"),
        ("pa", "rows", "AdamW"),
        ("pa", "columns", "MaskedAdamW"),
        ("pa", "irregular", "MaskedAdamW"),
        ("ap", "per-row", "AdamW"),
        ("ap", "irregular", "MaskedAdamW"),
    ],
)
def test_tensor_parallelism(ranks, order, kind, optimizer):
    ranks.run(train, order, kind, optimizer)


@pytest.mark.supports("FSDP2 + TP", "attach", "MaskedAdam", "other optimizers")
@pytest.mark.parametrize(
    ("order", "kind", "optimizer"),
    [
        ("pas", "per-row", "MaskedAdamW"),
        ("pas", "rows", "SGD"),
        ("pas", "columns", "AdamW"),
        ("pas", "irregular", "MaskedAdamW"),
        ("aps", "per-row", "SGD"),
        ("aps", "rows", "MaskedAdamW"),
        ("psa", "per-row", "MaskedAdamW"),
        ("psa", "irregular", "SGD"),
    ],
)
def test_with_fsdp(ranks, order, kind, optimizer):
    ranks.run(train, order, kind, optimizer)


class Small(nn.Module):
    """Embeddings whose rows and columns four ranks cannot share equally, and a norm of parts of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.more = nn.Embedding(11, 6), nn.Embedding(11, 6)
        self.up, self.down, self.norm = nn.Linear(6, 12), nn.Linear(12, 5), nn.LayerNorm(5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.down(torch.tanh(self.up(self.tokens(tokens) + self.more(tokens)))))


def small() -> None:
    torch.manual_seed(0)
    model = Small().double()
    alone = copy.deepcopy(model)
    rank = {"tokens.weight", "more.weight", "up.weight", "down.weight", "norm.weight"}
    selection = random_selection(model, "irregular", freeze=(), kinds={"embedding": "rank"})
    masks = dict(selection) | {"norm.weight": Flat(torch.tensor([1, 3]), (5,))}
    selection = gradsel.Selection(masks)
    assert rank == {name for name, mask in selection.items() if mask.nnz and not mask.is_whole}
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "more": ColwiseParallel(output_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
    }
    parallelize_module(model, meshes()["four"], plan)
    gradsel.attach(model, selection)
    gradsel.attach(alone, selection)
    optimizers = [OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each)) for each in (model, alone)]
    tokens = torch.arange(24).view(3, 8) % 11
    harvested, harvest = [], tensor_parallel._harvest
    tensor_parallel._harvest = lambda weight, *rest: harvested.append(tuple(weight.shape)) or harvest(weight, *rest)
    try:
        for _ in range(2):
            for each, optimizer in zip((model, alone), optimizers, strict=True):
                optimizer.zero_grad()
                output = each(tokens)
                (output.full_tensor() if each is model else output).square().mul(torch.arange(5)).mean().backward()
                optimizer.step()
    finally:
        tensor_parallel._harvest = harvest
    assert set(harvested) == {(11, 6), (5,)}, "a Linear layer has formed a dense gradient"
    check_equal(whole_state(model), alone.state_dict())
    check_written(model)


def test_embeddings_and_norms(ranks):
    ranks.run(small)


def sequences(order: str, optimizer_name: str) -> None:
    """Norms of parts of sequences, of which torch leaves gradients that the ranks have yet to add up.

    One is trained whole. The other one is frozen, and torch makes a parameter of it that requires grad.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)).double()
    alone, frozen = copy.deepcopy(model), model[0].weight.detach().clone()
    selection = random_selection(model, whole=["3.*"])
    assert not selection["0.weight"].nnz
    assert selection["3.weight"].is_whole
    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "2": RowwiseParallel(output_layouts=Shard(1)),
        "3": SequenceParallel(use_local_output=True),
    }
    steps = {
        "p": lambda: parallelize_module(model, meshes()["four"], plan),
        "a": lambda: gradsel.attach(model, selection),
    }
    for letter in order:
        steps[letter]()
    gradsel.attach(alone, selection)
    optimizers = [OPTIMIZERS[optimizer_name](gradsel.trainable_parameters(each)) for each in (model, alone)]
    inputs, targets = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    first = 2 * meshes()["four"].get_local_rank()
    own = slice(first, first + 2)
    for _ in range(3):
        for each, optimizer, part in ((model, optimizers[0], own), (alone, optimizers[1], slice(8))):
            optimizer.zero_grad()
            (each(inputs[:, part]) * targets[:, part]).sum().backward()
            optimizer.step()
    state = whole_state(model)
    check_equal(state, alone.state_dict())
    check_alike(state)
    assert torch.equal(state["0.weight"], frozen)


@pytest.mark.parametrize("optimizer", ["MaskedAdamW", "AdamW"])
@pytest.mark.parametrize("order", ["pa", "ap"])
def test_norms_of_parts_of_sequences(ranks, order, optimizer):
    ranks.run(sequences, order, optimizer)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.tokens(tokens))


def tied() -> None:
    """parallelize_module gives the modules that share a weight one each."""
    model = Tied()
    alone, tokens = copy.deepcopy(model), torch.arange(8).view(2, 4)
    selection = random_selection(model, kinds={"embedding": "rank"})
    assert selection["tokens.weight"].nnz
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    late = copy.deepcopy(model)
    gradsel.attach(model, selection)
    parallelize_module(model, meshes()["four"], plan)
    with pytest.raises(RuntimeError, match=r"tokens.weight is shared.*tie them again, then select and attach"):
        model(tokens)
    parallelize_module(late, meshes()["four"], plan)
    late.head.weight = late.tokens.weight
    for each in (late, alone):
        gradsel.attach(each, selection)
        each(tokens).square().sum().backward()
        OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each)).step()
    check_equal(whole_state(late), alone.state_dict(), 1e-6)


def test_tied_weights(ranks):
    ranks.run(tied)


def saved(order: str) -> None:
    """A checkpoint, from which all ranks and one process go on; the delta; and the plain model again."""
    folder = common_folder()
    model, _ = prepared(order, "per-row")
    start = {name: tensor.clone() for name, tensor in models()[0].state_dict().items()}
    optimizer = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(model))
    step([(model, optimizer, order)], 2)
    parts = get_state_dict(model, optimizer)
    dcp.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=folder)
    expected = {name: tensor.clone() for name, tensor in whole_state(model).items()}
    for other, there in zip(prepared(order, "per-row"), (order, ""), strict=True):
        own = OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(other))
        parts = get_state_dict(other, own)
        into = {"model": parts[0], "optimizer": parts[1]}
        dcp.load(into, checkpoint_id=folder, no_dist=not there)
        set_state_dict(other, own, model_state_dict=into["model"], optim_state_dict=into["optimizer"])
        different = [name for name, tensor in whole_state(other).items() if not torch.equal(tensor, expected[name])]
        assert not different, (there, different)
        step([(other, own, there)], 1)
        if there:
            step([(model, optimizer, order)], 1)
            expected_then = whole_state(model)
            assert all(torch.equal(tensor, expected_then[name]) for name, tensor in whole_state(other).items())
        else:
            check_equal(expected_then, other.state_dict())
    base = models()[0]
    with gradsel.Delta.of(model).applied(base):
        for name, tensor in base.state_dict().items():
            assert torch.equal(tensor, expected_then[name]), name
    assert all(torch.equal(tensor, start[name]) for name, tensor in base.state_dict().items())
    gradsel.export(model, folder / "plain.safetensors")
    written = load_file(folder / "plain.safetensors")
    assert written.keys() == start.keys()
    assert all(torch.equal(tensor, expected_then[name]) for name, tensor in written.items())
    if order == "pas":
        return  # see refused()
    plain = gradsel.detach(model)
    state = whole_state(plain)
    assert state.keys() == start.keys()
    assert all(torch.equal(tensor, expected_then[name]) for name, tensor in state.items())
    restored, _ = prepared(order, "rows")
    step([(restored, OPTIMIZERS["SGD"](gradsel.trainable_parameters(restored)), order)], 1)
    state = whole_state(gradsel.detach(restored, restore=True))
    assert all(torch.equal(tensor, start[name]) for name, tensor in state.items())
    cross_entropy(plain, share(batches()[0], order)).backward()
    assert plain.blocks[0].fc1.weight.grad is not None


@pytest.mark.supports("TP", "save/load", "delta", "merge")
@pytest.mark.parametrize("order", ["pa", "ap"])
def test_what_becomes_of_it(ranks, order):
    ranks.run(saved, order)


@pytest.mark.supports("FSDP2 + TP", "save/load", "delta", "merge")
def test_what_becomes_of_it_with_fsdp(ranks):
    for order in ("pas", "psa"):
        ranks.run(saved, order)


@pytest.mark.refuses("FSDP2 + TP", "merge")
def test_merging_with_fsdp(ranks, refusal):
    refusal.saw(ranks.run(refused)[0])


def refused() -> str:
    model, _ = prepared("pas", "per-row")
    before = whole_state(model)
    with pytest.raises(ValueError, match=r"sharded.*detach") as error:
        gradsel.detach(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole_state(model).items())
    return str(error.value)


def outside() -> None:
    """FSDP gathers for its own module's forward, not for that of a module inside it."""
    model, _ = prepared("pas", "per-row")
    with pytest.raises(RuntimeError, match=r"blocks.0.fc1.weight is a DTensor that FSDP has not gathered"):
        model.blocks[0].fc1(torch.zeros(2, 12, dtype=torch.float64))


def test_a_module_outside_of_fsdp_forward(ranks):
    ranks.run(outside)


def select_and_clip(order: str) -> None:
    """select() on the parallel model, and clipping."""
    model, alone, _ = models()
    parallelise(model)
    if "s" in order:
        shard(model, meshes()["hybrid"]["replicate"])
    chosen = {"policy": gradsel.PerNeuron(2), "freeze": ["unused.*", "tokens.*"]}
    selection = gradsel.select(model, [share(batch, order) for batch in batches()], cross_entropy, **chosen)
    expected = gradsel.select(alone, batches(), cross_entropy, process_group=one(), **chosen)
    for name, mask in expected.items():
        assert torch.equal(selection[name].to_dense(), mask.to_dense()), name
    assert selection.base == expected.base
    optimizers = []
    for each in (model, alone):
        gradsel.attach(each, selection)
        optimizers.append(OPTIMIZERS["MaskedAdamW"](gradsel.trainable_parameters(each)))
        cross_entropy(each, share(batches()[0], order if each is model else "")).backward()
    norms = [whole(optimizer.clip_grad_norm_(0.05)) for optimizer in optimizers]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)


@pytest.mark.supports("TP", "select")
def test_selecting_and_clipping(ranks):
    ranks.run(select_and_clip, "p")


@pytest.mark.supports("FSDP2 + TP", "select")
def test_selecting_and_clipping_with_fsdp(ranks):
    ranks.run(select_and_clip, "ps")
