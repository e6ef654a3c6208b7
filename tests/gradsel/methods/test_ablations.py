"""GPS's ablations as options, and the random columns of PaCA."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")
import gradsel
from gradsel.delta.parts import same_bits
from gradsel.masks import WholeColumns
from gradsel.methods import Context, method
from gradsel.methods.ranked import loss_for
from tests.support import tiny


def chosen(name="gps", seed=0, **options):
    return method(name, **options).prepare(tiny.vit(), tiny.images(), Context(seed=seed)).selection


def weights(selection):
    return {name: mask for name, mask in selection.items() if name.endswith("weight") and "head" not in name}


def test_scopes_train_as_many_weights_which_compete_within_a_neuron_a_layer_or_the_net():
    counts = {}
    for scope in ("neuron", "mass", "layer", "net"):
        counts[scope] = {name: mask.nnz for name, mask in weights(chosen(k=2, scope=scope)).items()}
    total = sum(counts["neuron"].values())
    assert total == 2 * (24 + 2 * (72 + 24 + 96 + 24))
    assert sum(counts["net"].values()) == total
    assert sum(counts["layer"].values()) == pytest.approx(total, abs=len(counts["layer"]))  # rounded in every layer
    sizes = {name: tensor.numel() for name, tensor in tiny.vit().named_parameters()}
    shares = [count / sizes[name] for name, count in counts["layer"].items() if count]
    assert max(shares) - min(shares) < 0.002
    assert len({count / sizes[name] for name, count in counts["net"].items() if count}) > 5


def test_scopes_are_the_policies_of_select():
    model, batches = tiny.vit(), tiny.images()
    how = method("gps", k=2, scope="net")
    budget = 2 * (24 + 2 * (72 + 24 + 96 + 24))
    expected = gradsel.select(model, batches, how.loss_for(model, False), gradsel.Global(count=budget))
    assert chosen(k=2, scope="net") == expected


def test_net_random_and_neuron_random_depend_on_the_seed():
    for scope in ("net", "neuron"):
        one = chosen(scope=scope, criterion="random", seed=1)
        assert one == chosen(scope=scope, criterion="random", seed=1)
        assert one != chosen(scope=scope, criterion="random", seed=2)


def test_blocks_are_kept_or_skipped_as_in_the_block_study():
    def trained(**options):
        names = [name for name, mask in chosen(**options).items() if mask.nnz]
        return {".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0] for name in names}

    assert trained() == {"patch_embed", "blocks.0", "blocks.1", "head"}
    assert trained(skip_blocks=[0]) == {"patch_embed", "blocks.1", "head"}
    assert trained(blocks=[-1]) == {"blocks.1", "head"}
    with pytest.raises(ValueError, match="skip_blocks names block 2, but VisionTransformer has 2 blocks"):
        chosen(skip_blocks=[2])


def test_paca_trains_whole_random_columns_of_linear_layers_and_the_head():
    selection = chosen("paca", columns=3, seed=1)
    found = {name: mask for name, mask in selection.items() if mask.nnz and not name.startswith("head")}
    assert {name.partition(".")[2][2:] for name in found} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight",
    }  # fmt: skip
    for name, mask in found.items():
        assert isinstance(mask, WholeColumns), name
        dense = mask.to_dense()
        assert torch.equal(dense.all(0), dense.any(0))
        assert dense.all(0).sum() == 3
    assert len({tuple(m.to_dense().all(0).nonzero().flatten().tolist()) for m in found.values()}) > 3
    assert selection != chosen("paca", columns=3, seed=2)
    assert selection == chosen("paca", columns=3, seed=1)


def test_reselecting_ranks_at_weights_that_have_been_trained_and_leaves_the_model_as_it_was():
    model = tiny.vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = method("gps", k=2, reselect=2)
    again = how.choose(model, tiny.images(), Context(rate=0.05))
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
    first = chosen(k=2)
    assert again.notes["selected after"] == "2 epochs"
    assert again.trainable_count() == first.trainable_count()
    assert again != first
    gradsel.attach(model, first)
    optimizer = gradsel.MaskedAdam(gradsel.trainable_parameters(model), lr=0.05)
    for batch in tiny.images() * 2:
        optimizer.zero_grad()
        loss_for(model, "cross-entropy", False)(model, batch).backward()
        optimizer.step()
    gradsel.detach(model)
    expected = gradsel.select(model, tiny.images(), how.loss_for(model, False), gradsel.PerNeuron(2))
    assert again == expected
    gradsel.attach(tiny.vit(), again)  # it is for the pre-trained weights
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="reselect must be a number of epochs, got"):
            method("gps", reselect=wrong)


def test_ratio_is_the_learning_rate_of_the_chosen_weights_alone():
    """Adam's first step is as long as the learning rate."""
    how = method("gps", k=2, ratio=4.0)
    model = how.prepare(tiny.vit(), tiny.images()).model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = how.optimizer(model, lr=1e-3)
    batch = tiny.images()[0]
    torch.nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
    optimizer.step()
    moved = {
        name: (parameter.detach() - before[name]).abs().max().item()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert moved.keys() > {"head.weight", "blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.weight_values"}
    for name, distance in moved.items():
        assert distance == pytest.approx(4e-3 if name.endswith("_values") else 1e-3, rel=0.01), name
    for wrong in (0, -1.0, float("inf"), "2", True):
        with pytest.raises(ValueError, match="ratio must be a positive number, got"):
            method("gps", ratio=wrong)


def test_columns_cannot_be_ranked_relative_to_them():
    with pytest.raises(ValueError, match=r"'relative' gives all inputs of a weight the same score, so Columns\(k=2\)"):
        method("grft", columns=2, criterion="relative")
    assert method("grft", rows=2, criterion="relative").rows == 2
    assert chosen(k=2, criterion="relative") != chosen(k=2)
